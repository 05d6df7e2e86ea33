"""`get_2dPool` is replaced in LLaVA-NeXT's own classes, and tests/support/llava_stand_in.py is like them.

`make test-llava-next` makes an environment for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llavaction", reason="LLaVA-NeXT's classes are not installed: make test-llava-next")

import real
import torch
from real import SIDE, VIDEO, build, embed, pixels
from torch import Tensor
from transformers import Qwen2ForCausalLM

import stgridpool_kernels as stgp
from stgridpool_kernels.integrations import llava_next
from stgridpool_kernels.integrations.base import video_token_count
from tests.support.llava_stand_in import LlavaQwenForCausalLM as StandIn
from tests.support.pages import LLAVA_NEXT

MODES = ["average", "max", "bilinear"]
# "no_token" fails in llavaction itself, patched or not: it appends nothing to a list
NEWLINES = ["grid", "frame", "one_token"]
OPTIONS = {"temperature": 3.0, "frame_strides": (1, 2)}
PROMPT = torch.tensor([[5, VIDEO, 9, 11, VIDEO, 7]])


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Make `llava` mean the package, yield its own method, and put that back after the test."""
    real.as_llava(monkeypatch)
    owner = real.llava_arch.LlavaMetaForCausalLM
    own = owner.get_2dPool
    with torch.no_grad():
        yield own
    owner.get_2dPool = own


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real.save_tower(tmp_path_factory.mktemp("tower"))


def stand_in(model: Any) -> StandIn:
    """Return the stand-in, which tests without LLaVA-NeXT take for a model, with the parts of this model."""
    double = StandIn.__new__(StandIn)
    double.config = model.config
    double.model = SimpleNamespace(
        vision_tower=model.get_vision_tower(),
        mm_projector=model.get_model().mm_projector,
        image_newline=model.get_model().image_newline,
    )
    return double


def by_hand(model: Any, ids: Tensor, videos: list[Tensor], **options: Any) -> Tensor:
    """Return embeddings (1, tokens, C) of the prompt, with every video pooled alone by the op itself, and newlines."""
    windows = {} if "output_size" in options else {"ceil_mode": model.config.mm_spatial_pool_mode == "bilinear"}
    shown = []
    for video in videos:
        grid = model.encode_images(video).unflatten(1, (SIDE, SIDE))
        pooled = torch.ops.stgp.grid_pool(grid, **{**windows, **options}).flatten(1, 2)
        shown.append(stand_in(model).with_newlines(pooled))
    words = model.get_model().embed_tokens
    rest = iter(shown)
    return torch.cat([next(rest) if token == VIDEO else words(token[None]) for token in ids[0]])[None]


GREEDY = {"do_sample": False, "max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}


def answer(model: Any, ids: Tensor, videos: list[Tensor]) -> tuple[list[int], Tensor]:
    """Return the new tokens, and the scores that the first was chosen by."""
    found = model.generate(ids, images=videos, modalities=["video"] * len(videos), **GREEDY)
    return found.sequences[0].tolist(), found.scores[0]


def unlike(scores: Tensor, others: Tensor) -> bool:
    return bool((scores - others).abs().max() > 1e-2)


# ---- the replacement ----


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("mode", MODES)
def test_two_videos_in_a_prompt_are_pooled_as_if_each_were_alone(tower: Path, mode: str, newline: str) -> None:
    model, videos = build(tower, mode, newline), pixels(9, 16)
    before = embed(model, PROMPT, videos, ["video", "video"])
    llava_next.patch(**OPTIONS)
    found = embed(model, PROMPT, videos, ["video", "video"])
    torch.testing.assert_close(found, by_hand(model, PROMPT, videos, **OPTIONS))
    windows = {"ceil_mode": mode == "bilinear"}
    counts = [video_token_count(len(video), (SIDE, SIDE), newline, **windows) for video in videos]
    assert found.shape == before.shape == (1, 4 + sum(counts), real.CHANNELS)
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("options", [{}, OPTIONS, {"output_size": (2, 2)}], ids=["published", "other", "budget"])
def test_answers_are_those_to_embeddings_pooled_by_hand(tower: Path, options: dict) -> None:
    model, videos = build(tower), pixels(17, 9)
    _, own = answer(model, PROMPT, videos)
    llava_next.patch(**options)
    found, scores = answer(model, PROMPT, videos)
    given = by_hand(model, PROMPT, videos, **options)
    expected = Qwen2ForCausalLM.generate(model, inputs_embeds=given, **GREEDY)
    assert len(set(found)) > 3
    assert found == expected.sequences[0].tolist()
    torch.testing.assert_close(scores, expected.scores[0])
    assert unlike(scores, own)


def test_an_image_beside_a_video_is_left_alone(tower: Path) -> None:
    model, (video,), (image,) = build(tower), pixels(9), pixels(1)
    shown, kinds = [image, video], ["image", "video"]
    before = embed(model, PROMPT, shown, kinds)
    llava_next.patch()
    found = embed(model, PROMPT, shown, kinds)
    places = 1 + SIDE * SIDE + 1  # a word, the image, its newline
    assert torch.equal(found[:, :places], before[:, :places])
    assert not torch.allclose(found[:, places:], before[:, places:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tower: Path, dtype: torch.dtype) -> None:
    model, (features,) = build(tower).to(dtype), [torch.randn(9, SIDE * SIDE, real.CHANNELS).to(dtype)]
    kept = features.clone()
    llava_next.patch()
    pooled = model.get_2dPool(features)
    expected = stgp.grid_pool(features.unflatten(1, (SIDE, SIDE)), ceil_mode=True).flatten(1, 2)
    assert torch.equal(pooled, expected)
    pooled.zero_()
    assert torch.equal(features, kept)


def test_unpatch_restores(tower: Path, stock: object) -> None:
    model, videos = build(tower), pixels(9, 9)
    tokens, scores = answer(model, PROMPT, videos)
    llava_next.patch()
    assert unlike(answer(model, PROMPT, videos)[1], scores)
    llava_next.unpatch()
    assert real.llava_arch.LlavaMetaForCausalLM.get_2dPool is stock
    again, same = answer(model, PROMPT, videos)
    assert again == tokens
    assert torch.equal(same, scores)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"add_faster_video": True}, {}, "config.add_faster_video must be off"),
        ({"mode": "conv"}, {}, "config.mm_spatial_pool_mode must be one of"),
        ({}, {"output_size": (1, 4)}, "output must be square where config.mm_newline_position is 'grid', got 1 × 4"),
    ],
    ids=["faster video", "mode", "rectangle"],
)
def test_what_cannot_be_is_refused(tower: Path, settings: dict, options: dict, message: str) -> None:
    model = build(tower, **settings)
    llava_next.patch(**options)
    with pytest.raises(ValueError, match=message):
        answer(model, PROMPT, pixels(9, 9))


def test_the_snippet_of_the_page_runs(tower: Path, stock: object) -> None:
    videos = pixels(9, 16)
    _, plain = answer(build(tower), PROMPT, videos)
    names: dict[str, Any] = {"ask": lambda: answer(build(tower), PROMPT, videos)[1]}
    LLAVA_NEXT.run("llava", names, ("...  # load", "scores = ask()  # load"))
    assert unlike(names["scores"], plain)
    assert real.llava_arch.LlavaMetaForCausalLM.get_2dPool is stock


# ---- the stand-in ----


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_the_stand_in_pools_as_the_original(tower: Path, mode: str, stride: int) -> None:
    model = build(tower, mode)
    features = torch.randn(9, SIDE * SIDE, real.CHANNELS)
    assert torch.equal(stand_in(model).get_2dPool(features, stride), model.get_2dPool(features, stride))


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("mode", MODES)
def test_the_stand_in_makes_the_tokens_of_the_original(tower: Path, mode: str, newline: str) -> None:
    model, videos = build(tower, mode, newline), pixels(9, 16, 1)
    features = [model.get_vision_tower()(video) for video in videos]
    expected = torch.cat(stand_in(model).video_tokens(features))
    ids = torch.tensor([[VIDEO] * 3])
    torch.testing.assert_close(embed(model, ids, videos, ["video"] * 3), expected[None])


def test_both_refuse_an_unknown_mode(tower: Path) -> None:
    model = build(tower, "conv")
    for pooled in (model, stand_in(model)):
        with pytest.raises(ValueError, match="mode"):
            pooled.get_2dPool(torch.randn(1, SIDE * SIDE, real.CHANNELS))
