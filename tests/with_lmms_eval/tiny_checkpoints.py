"""This module makes checkpoints of few random weights for lmms-eval's models of transformers.

`save(name, folder)` writes one for `pretrained=`. While `recorded` is in force, what lmms-eval asks a model by
`generate` is recorded, with what the language model is given of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers import video_processing_utils, video_utils

from stgridpool_kernels import grid_pool, temporal_grid
from stgridpool_kernels.integrations import internvl, qwen_vl
from tests.support import tiny_grid_models

KINDS = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "qwen3_5": "qwen3_5", "internvl_hf": "internvl"}
"""These are kinds of tests/support/tiny_grid_models.py, by lmms-eval's name of a model."""

LEVELS = {"qwen3_vl": 3}
"""Language models are given this many levels of tokens; those that are not named are given one."""

ON_THE_CPU: dict[str, dict[str, Any]] = {
    name: {"device_map": "cpu"} | ({} if name == "internvl_hf" else {"min_pixels": 1024, "max_pixels": 4096})
    for name in KINDS
}
"""These are model arguments of a run on the CPU, by lmms-eval's name of a model.

They keep videos of 64 × 64 pixels small.
"""


class Request(NamedTuple):
    """This is a call of `generate`: its model, its arguments, and those of its first call of the language model."""

    model: Any
    inputs: dict[str, Any]
    given: dict[str, Any]


def save(name: str, folder: Path) -> str:
    """Save model and processor, with a chat template, and return the folder as text."""
    model, processor = tiny_grid_models.build(KINDS[name])
    processor.chat_template = tiny_grid_models.chat_template(KINDS[name])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def load(name: str, folder: str) -> tuple[Any, Any]:
    """Return model and processor as lmms-eval loads them."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def adapter(name: str) -> Any:
    """Return the integration for the models of transformers that one of lmms-eval holds."""
    return internvl if name == "internvl_hf" else qwen_vl


def arguments(name: str, folder: str, frames: int, **more: object) -> str:
    """Return model arguments of a run, as a command line has them."""
    limit = {"num_frames" if name == "internvl_hf" else "max_num_frames": frames}
    thinking = {"enable_thinking": False} if name == "qwen3_5" else {}
    given = {"pretrained": folder, **limit, **thinking, **ON_THE_CPU[name], **more}
    return ",".join(f"{key}={value}" for key, value in given.items())


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Record every call of `generate` in the list that is returned, until the test ends."""
    requests: list[Request] = []
    own = transformers.GenerationMixin.generate

    def generate(self: Any, **inputs: Any) -> Any:
        given: list[dict[str, Any]] = []
        handle = self.model.language_model.register_forward_pre_hook(
            lambda module, positional, keywords: given.append(keywords), with_kwargs=True
        )
        try:
            answer = own(self, **inputs)
        finally:
            handle.remove()
        requests.append(Request(self, inputs, given[0]))
        return answer

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    return requests


def decode_by_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processors read videos without torchcodec, which needs libraries of FFmpeg that no package of Python has."""

    def load_video(video: Any, backend: str, **keywords: Any) -> Any:
        return video_utils.load_video(video, backend="pyav", **keywords)

    monkeypatch.setattr(video_processing_utils, "is_torchcodec_usable", lambda **keywords: True)
    monkeypatch.setattr(video_processing_utils, "load_video", load_video)


def placeholders(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return where a prompt has placeholders of its video."""
    config = model.config
    token = config.image_token_id if "pixel_values" in inputs else config.video_token_id
    return inputs["input_ids"] == token


def pixels(request: Request) -> Tensor:
    """Return the pixels of the video that a model was asked about."""
    inputs = request.inputs
    found: Tensor = inputs["pixel_values"] if "pixel_values" in inputs else inputs["pixel_values_videos"]
    return found


def frames(request: Request) -> int:
    """Return the number of frames of the video that a model was asked about, of which Qwen encodes two as one."""
    grid = request.inputs.get("video_grid_thw")
    return len(pixels(request)) if grid is None else 2 * int(grid[0, 0])


def words(request: Request) -> Tensor:
    """Return the prompt without placeholders of the video."""
    return request.inputs["input_ids"][~placeholders(request.model, request.inputs)]


def seen(request: Request) -> list[Tensor]:
    """Return the tokens of the video that the language model was given: the main ones, then those of deepstack."""
    main = request.given["inputs_embeds"][placeholders(request.model, request.inputs)]
    return [main, *(request.given.get("deepstack_visual_embeds") or [])]


@torch.no_grad()
def by_hand(plain: Any, inputs: dict[str, Any], mode: str, **options: Any) -> list[Tensor]:
    """Return the tokens that the reference leaves of those of `plain`, a model that is not patched, as `seen` does."""
    if "pixel_values" not in inputs:
        return tiny_grid_models.by_hand(plain, inputs, mode, **options)
    frames = plain.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    x = frames.unflatten(1, (tiny_grid_models.INTERNVL_SIDE,) * 2)
    if mode == "grid":
        left = temporal_grid(x, **options, backend="reference")
    else:
        left = grid_pool(x, **{"ceil_mode": True, **options}, backend="reference")
    return [left.flatten(0, 2)]
