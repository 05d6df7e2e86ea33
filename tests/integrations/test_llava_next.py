"""LLaVA-NeXT's pooling is replaced, in a stand-in with the clone's interface."""

from __future__ import annotations

import functools
import importlib.util
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stgridpool_kernels.integrations import llava_next
from stgridpool_kernels.integrations.base import pool_flat, video_token_count
from tests.support import llava_stand_in
from tests.support.llava_stand_in import LlavaMetaForCausalLM, LlavaQwenForCausalLM
from tests.support.pages import LLAVA_NEXT
from tests.support.tolerance import assert_same_bits

MODES = ["average", "max", "bilinear"]
NEWLINES = {"grid": "grid", "frame": "frame", "one_token": "one_token", "no_token": "none"}


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Make `llava` mean the stand-in, yield its own method, and put that back after the test."""
    llava_stand_in.install(monkeypatch)
    own = LlavaMetaForCausalLM.get_2dPool
    with torch.no_grad():
        yield own
    LlavaMetaForCausalLM.get_2dPool = own


def videos(model: LlavaQwenForCausalLM, *frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(frames))
    side = model.get_vision_tower().num_patches_per_side
    return [torch.randn(count, side * side, 16, generator=generator) for count in frames]


@pytest.mark.parametrize("side", [24, 27])
@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("mode", MODES)
def test_every_video_is_pooled_to_the_size_that_was_trained(mode: str, newline: str, side: int) -> None:
    model = LlavaQwenForCausalLM(side, mode=mode, newline=newline)
    given = videos(model, 9, 16, 1)
    stock = model.video_tokens(given)
    llava_next.patch(temperature=2.0)
    found = model.video_tokens(given)
    for video, tokens, before in zip(given, found, stock, strict=True):
        windows = {"ceil_mode": mode == "bilinear"}
        projected = model.model.mm_projector(video)
        alone = pool_flat(projected, [len(video)], (side, side), temperature=2.0, **windows)
        torch.testing.assert_close(tokens, model.with_newlines(alone))
        count = video_token_count(len(video), (side, side), NEWLINES[newline], **windows)
        assert tokens.shape == before.shape == (count, 16)
        assert not torch.allclose(tokens, before)


def test_nothing_is_written_in_place() -> None:
    model = LlavaQwenForCausalLM()
    (projected,) = videos(model, 16)
    before = projected.clone()
    llava_next.patch()
    model.get_2dPool(projected).zero_()
    assert_same_bits(projected, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = LlavaQwenForCausalLM()
    (video,) = videos(model, 8)
    llava_next.patch()
    pooled = model.get_2dPool(video.to(dtype))
    assert_same_bits(pooled, pool_flat(video.to(dtype), [8], ceil_mode=True))


@pytest.mark.parametrize("mode", MODES)
def test_the_stride_of_a_call_is_that_of_its_windows(mode: str) -> None:
    model = LlavaQwenForCausalLM(mode=mode)
    (video,) = videos(model, 8)
    shapes = [model.get_2dPool(video, stride).shape for stride in (3, 4)]
    llava_next.patch()
    assert [model.get_2dPool(video, stride).shape for stride in (3, 4)] == shapes
    expected = pool_flat(video, [8], kernel_size=4, ceil_mode=mode == "bilinear")
    assert_same_bits(model.get_2dPool(video, stride=4), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [{"ceil_mode": True}, {"ceil_mode": False}, {"output_size": (10, 10)}, {"kernel_size": 3, "ceil_mode": True}],
    ids=["ceil", "floor", "budget", "kernel"],
)
def test_options_choose_another_size(mode: str, options: dict) -> None:
    model = LlavaQwenForCausalLM(mode=mode)
    (video,) = videos(model, 8)
    llava_next.patch(**options)
    assert_same_bits(model.get_2dPool(video), pool_flat(video, [8], **options))
    count = video_token_count(8, (27, 27), "grid", **options)
    assert [len(tokens) for tokens in model.video_tokens([video])] == [count]


def test_models_that_exist_already_are_patched_and_restored(stock: object) -> None:
    model = LlavaQwenForCausalLM()
    given = videos(model, 9, 8)
    before = model.video_tokens(given)
    llava_next.patch()
    assert not torch.equal(model.video_tokens(given)[0], before[0])
    llava_next.unpatch()
    assert LlavaMetaForCausalLM.get_2dPool is stock
    assert "get_2dPool" not in vars(LlavaQwenForCausalLM)
    for tokens, own in zip(model.video_tokens(given), before, strict=True):
        assert_same_bits(tokens, own)


def test_patching_twice_is_refused(stock: object) -> None:
    with pytest.raises(RuntimeError, match="llava is not patched"):
        llava_next.unpatch()
    llava_next.patch(temperature=2.0)
    with pytest.raises(RuntimeError, match=r"patched already, with PoolOptions\(temperature=2.0\): unpatch it first"):
        llava_next.patch()
    llava_next.unpatch()
    assert LlavaMetaForCausalLM.get_2dPool is stock


def test_a_method_that_was_wrapped_after_the_patch_is_not_lost() -> None:
    llava_next.patch(temperature=2.0)
    patched = LlavaMetaForCausalLM.get_2dPool

    @functools.wraps(patched)
    def counted(self: LlavaMetaForCausalLM, image_feature: Tensor, stride: int = 2) -> Tensor:
        return patched(self, image_feature, stride)

    LlavaMetaForCausalLM.get_2dPool = counted
    with pytest.raises(RuntimeError, match=r"get_2dPool was wrapped after it was patched, .*: unwrap it first"):
        llava_next.unpatch()
    with pytest.raises(RuntimeError, match="patched already"):
        llava_next.patch()
    assert LlavaMetaForCausalLM.get_2dPool is counted


def test_a_model_is_pickled_as_if_it_were_not_patched() -> None:
    """The class is patched, in its process, so a process that a model is sent to has its own pooling or patch."""
    model = LlavaQwenForCausalLM()
    given = videos(model, 9)
    stock = model.video_tokens(given)
    llava_next.patch()
    pickled = pickle.dumps(model)
    llava_next.unpatch()
    assert_same_bits(pickle.loads(pickled).video_tokens(given)[0], stock[0])


def test_the_snippet_of_the_page_runs(stock: object) -> None:
    seen: list[object] = []
    ask = ("...  # load", "seen.append(LlavaMetaForCausalLM.get_2dPool)  # load")
    LLAVA_NEXT.run("llava", {"seen": seen, "LlavaMetaForCausalLM": LlavaMetaForCausalLM}, ask)
    assert seen[0] is not stock
    assert LlavaMetaForCausalLM.get_2dPool is stock


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"add_faster_video": True}, {}, "config.add_faster_video must be off"),
        ({"mm_spatial_pool_mode": "conv"}, {}, "config.mm_spatial_pool_mode must be one of 'average', .* got 'conv'"),
        ({}, {"output_size": (7, 26)}, "output must be square where .* is 'grid', got 7 × 26"),
        ({}, {"kernel_size": 30, "ceil_mode": False}, r"kernel_size=\[30, 30\] .* leaves no window on a 27 × 27 frame"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(settings: dict, options: dict, message: str) -> None:
    model = LlavaQwenForCausalLM()
    vars(model.config).update(settings)
    llava_next.patch(**options)
    with pytest.raises(ValueError, match=message):
        model.video_tokens(videos(model, 8))


def test_a_rectangle_fits_other_newlines() -> None:
    model = LlavaQwenForCausalLM(newline="one_token")
    llava_next.patch(output_size=(7, 26))
    assert [len(tokens) for tokens in model.video_tokens(videos(model, 8))] == [8 * 182 + 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"frame_counts": [8]}, TypeError, "options must be among .* got frame_counts"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict, error: type[Exception], message: str, stock: object) -> None:
    with pytest.raises(error, match=message):
        llava_next.patch(**options)
    assert LlavaMetaForCausalLM.get_2dPool is stock


def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    older = type("LlavaMetaForCausalLM", (), {"get_2dPool": lambda self, image_feature: image_feature})
    llava_stand_in.install(monkeypatch, older)
    with pytest.raises(RuntimeError, match=r"\(self, image_feature, stride\), got \(self, image_feature\)"):
        llava_next.patch()
    llava_stand_in.install(monkeypatch, type("LlavaMetaForCausalLM", (), {}))
    with pytest.raises(RuntimeError, match=r"has no LlavaMetaForCausalLM.get_2dPool: this takes LLaVA-NeXT"):
        llava_next.patch()


def test_a_missing_clone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="llava is not installed: put a clone of LLaVA-NeXT on the path"):
        llava_next.patch()
