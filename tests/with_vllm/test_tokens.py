"""An engine that is given tokens of videos answers as vLLM's own does that is given what grid_pool leaves of them.

Both compute in one arithmetic, so their answers are equal to the bit: also those of Qwen3.5, whose kernels for CPUs
take bfloat16 alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import questions
import torch
from runner import Runner, selected

from stgridpool_kernels.integrations.modes import mode_options

GRIDS = {"long": (34, 5, 7), "odd": (9, 3, 11), "small": (17, 3, 3)}
"""These are the number of frames, and of rows and columns of tokens, of each video."""

LEVELS = {"qwen2_5_vl": 1, "qwen3_vl": 3, "qwen3_5": 1, "qwen3_5_moe": 1}
"""The tokens of a model have this number of levels, of which all but the first are those of deepstack."""

OPTIONS = [
    {"mode": "pool", "temperature": 2.0},
    {"mode": "pool", "norm_type": 1.0, "frame_strides": [1, 2]},
    {"mode": "grid", "frame_strides": [1, 2]},
]
PROMPTS = {"one": "h i {long} w h y ?", "two": "s e e {odd} a n d {small} w h a t ?"}


def tokens(levels: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = 2 * questions.HEAD * levels
    return {name: torch.randn(*grid, channels, generator=generator).to(dtype) for name, grid in GRIDS.items()}


def asked(kind: str, videos: dict[str, torch.Tensor], prefix: str) -> list[dict[str, Any]]:
    """Return prompts as engine.py takes them. prefix: beginning of the names of the videos."""
    prompts = []
    for name, text in PROMPTS.items():
        shown = questions.videos_of(text)
        grids = [[videos[one].shape[0], 2 * videos[one].shape[1], 2 * videos[one].shape[2]] for one in shown]
        prompts.append(
            {
                "name": name,
                "text": questions.prompt_text(kind, text),
                "tokens": [f"{prefix} {one}" for one in shown],
                "grids": grids,
            }
        )
    return prompts


@pytest.mark.parametrize("kind", LEVELS)
def test_tokens_that_requests_bring(kind: str, runner: Runner, tmp_path: Any) -> None:
    dtype = torch.bfloat16 if kind.startswith("qwen3_5") else torch.float32
    brought = tokens(LEVELS[kind], dtype)
    main = 2 * questions.HEAD if LEVELS[kind] > 1 else None
    videos = {"brought": brought}
    for number, options in enumerate(OPTIONS):
        left = {name: mode_options(**options).apply(x, norm_channels=main) for name, x in brought.items()}
        videos[str(number)] = left
    arguments = {
        "model": str(questions.save(kind, tmp_path)),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": 2048,
        "enable_mm_embeds": True,
    }
    architecture = f"Stgp{questions.KINDS[kind]}"
    chosen = [{**arguments, **selected(architecture, **options)} for options in OPTIONS]
    engines = [{"arguments": one, "batches": [asked(kind, brought, "brought")]} for one in chosen]
    engines += [{"arguments": arguments, "batches": [asked(kind, some, name)]} for name, some in videos.items()]
    media = {
        f"{name} {one}": x.flatten(0, 2).float().numpy() for name, some in videos.items() for one, x in some.items()
    }
    *ours, unpooled, first, second, third = [result["answers"] for result in runner(engines, media)]
    assert ours == [first, second, third]
    assert all(answers[name]["logprobs"] != unpooled[name]["logprobs"] for answers in ours for name in PROMPTS)
