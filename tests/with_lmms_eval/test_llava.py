"""lmms-eval finds the models of LLaVA, and evaluates a random one on videos that are made here.

`make test-lmms-eval` makes an environment for these tests. `llava` is a stub, as no index has LLaVA-NeXT.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

import stgridpool_kernels as stgp

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-lmms-eval")

import llava_stub
from lmms_eval import models
from tiny_task import FRAMES, evaluate_llava


def arguments(model: str, pretrained: str, **more: object) -> str:
    """Return model arguments of a run on the CPU, as a command line has them."""
    shared = {"pretrained": pretrained, "conv_template": "plain", "device_map": "auto", "max_frames_num": FRAMES}
    if model.startswith("llava_vid"):
        shared.update(torch_dtype="bfloat16", mm_newline_position="no_token", force_sample=True)
    return ",".join(f"{name}={value}" for name, value in {**shared, **more}.items())


def test_lmms_eval_finds_the_models() -> None:
    assert {"llava_vid_stgp", "llava_onevision_stgp"} <= set(models.list_available_models())
    entries = metadata.entry_points(group="lmms_eval.models")
    assert "stgridpool_kernels.integrations.lmms_eval:manifests" in {entry.value for entry in entries}
    for name in ("llava_vid", "llava_onevision"):
        pooled, own = models.get_model(f"{name}_stgp"), models.get_model(name)
        assert issubclass(pooled, own)
        assert pooled is models.get_model(f"{name}_stgp")
        assert models.get_model_manifest(f"{name}_stgp").chat_class_path is None


@pytest.mark.parametrize(
    ("model", "more", "options"),
    [
        ("llava_vid_stgp", {}, {}),
        (
            "llava_vid_stgp",
            {"stgp_temperature": 3, "stgp_frame_strides": "2:4", "stgp_norm_type": "inf", "stgp_grid_shape": "2:1"},
            {"temperature": 3.0, "frame_strides": (2, 4), "norm_type": float("inf"), "grid_shape": (2, 1)},
        ),
        ("llava_vid_stgp", {"mm_spatial_pool_mode": "bilinear"}, {"ceil_mode": True}),
        ("llava_vid_stgp", {"stgp_output_size": "3:5"}, {"output_size": (3, 5)}),
        ("llava_onevision_stgp", {"stgp_frame_strides": "none"}, {"frame_strides": (), "ceil_mode": True}),
        ("llava_onevision_stgp", {"video_decode_backend": "pyav"}, {"ceil_mode": True}),
    ],
)
def test_an_evaluation_pools_every_video_with_the_options(
    model: str, more: dict, options: dict, pretrained: str, tasks: Path
) -> None:
    loaded = evaluate_llava(model, arguments(model, pretrained, **more), tasks)
    for features, pooled in loaded.videos:
        assert features.shape[:2] == (FRAMES, llava_stub.SIDE**2)
        expected = stgp.grid_pool(features.unflatten(1, (llava_stub.SIDE,) * 2), **options).flatten(1, 2)
        assert torch.equal(pooled, expected)


@pytest.mark.parametrize("name", ["llava_vid", "llava_onevision"])
def test_other_models_of_the_process_keep_their_own_pooling(name: str, pretrained: str, tasks: Path) -> None:
    build = models.get_model(f"{name}_stgp").create_from_arg_string
    build(arguments(name, pretrained, stgp_temperature=2), {"device": "cpu", "batch_size": 1})
    own = evaluate_llava(name, arguments(name, pretrained), tasks)
    off = evaluate_llava(f"{name}_stgp", arguments(name, pretrained, stgp=False), tasks)
    on = evaluate_llava(f"{name}_stgp", arguments(name, pretrained), tasks)
    for (features, stock), (same, unpooled), (again, pooled) in zip(own.videos, off.videos, on.videos, strict=True):
        assert torch.equal(features, same)
        assert torch.equal(features, again)
        assert torch.equal(stock, unpooled)
        assert stock.shape == pooled.shape
        assert not torch.allclose(stock, pooled)


def test_two_models_in_one_process_do_not_share_options(pretrained: str) -> None:
    build = models.get_model("llava_vid_stgp").create_from_arg_string
    first = build(arguments("llava_vid", pretrained, stgp_temperature=2), {"device": "cpu"})
    second = build(arguments("llava_vid", pretrained, stgp_output_size=3), {"device": "cpu"})
    assert first.stgp_options == {"temperature": 2.0}
    assert second.stgp_options == {"output_size": 3}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stgp_temperature": "hot"}, "stgp_temperature must be a number, got 'hot'"),
        ({"stgp_temprature": 2}, "stgp_temprature=2"),
        ({"stgp_kernel_size": 10}, "kernel_size"),
        ({"stgp_output_size": "3:5", "mm_newline_position": "grid"}, "got 3 × 5"),
        ({"max_frames_num": 1000}, "1000 frames are 16000 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_said_before_the_first_video(more: dict, message: str, tmp_path: Path) -> None:
    llava_stub.save(tmp_path, tokenizer_model_max_length=16000)
    build = models.get_model("llava_vid_stgp").create_from_arg_string
    with pytest.raises((TypeError, ValueError)) as raised:
        build(arguments("llava_vid", str(tmp_path), **more), {"device": "cpu", "batch_size": 1})
    assert message in str(raised.value)


def test_an_error_in_a_run_is_raised_and_leaves_nothing_behind(
    pretrained: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, *arguments: object, **named: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llava_stub.LlavaQwenForCausalLM, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_llava("llava_vid_stgp", arguments("llava_vid", pretrained), tasks)
