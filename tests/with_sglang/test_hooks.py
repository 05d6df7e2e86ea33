"""Hooks for LLaVA work in SGLang's own forward and pad_input_ids, as the installed release has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Switch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.models.llava import LlavaBaseForCausalLM
from torch import Tensor, nn

import stgridpool_kernels as stgp
from stgridpool_kernels.integrations import sglang_llava, sglang_qwen_vl
from stgridpool_kernels.integrations.sglang import switched_options
from stgridpool_kernels.integrations.sglang_llava import Hooks

SIDE, CHANNELS, VOCABULARY, IMAGE, NEWLINE = 5, 8, 100, 99, 7
POOLED = 3 * 3
TEXT = "temperature=2,frame_strides=2:4"


@pytest.fixture
def hooked(switch: Switch) -> None:
    switch(TEXT)


def expected(features: Tensor) -> Tensor:
    """Return the pooled tokens (F, P², C) of one video (F, g², C)."""
    grid = features.unflatten(1, (SIDE, SIDE))
    return stgp.grid_pool(grid, temperature=2.0, frame_strides=(2, 4), ceil_mode=True).flatten(1, 2)


def model(merge: str = "spatial_unpad") -> Any:
    """Return a model whose class inherits the hooked methods, and whose vision tower returns pixels as features."""
    torch.manual_seed(0)

    class LlavaQwenForCausalLM(LlavaBaseForCausalLM):
        def __init__(self) -> None:
            super().__init__()
            pinpoints = [[2 * SIDE, 2 * SIDE]]
            self.config = SimpleNamespace(
                vocab_size=VOCABULARY,
                image_token_index=IMAGE,
                image_aspect_ratio="anyres",
                image_grid_pinpoints=pinpoints,
            )
            self.image_size, self.patch_size, self.image_feature_len = SIDE, 1, SIDE * SIDE
            self.image_grid_pinpoints = pinpoints
            self.mm_patch_merge_type = merge
            self.vision_feature_layer, self.vision_feature_select_strategy = -1, "full"
            self.multi_modal_projector = nn.Linear(3, CHANNELS)
            inner = SimpleNamespace(
                embed_tokens=nn.Embedding(VOCABULARY, CHANNELS), image_newline=torch.randn(CHANNELS)
            )
            self.embeds: list[Tensor] = []
            self.language_model = Language(inner, self.embeds)

        def vision_tower(self, pixels: Tensor, output_hidden_states: bool) -> Any:
            return SimpleNamespace(hidden_states=[pixels.flatten(2).mT.float()])

    LlavaQwenForCausalLM.vision_tower.device = "cpu"
    LlavaQwenForCausalLM.vision_tower.config = SimpleNamespace(image_size=SIDE)
    return LlavaQwenForCausalLM()


class Language:
    def __init__(self, inner: Any, embeds: list[Tensor]) -> None:
        self.model, self.embeds = inner, embeds

    def __call__(self, input_ids: Tensor, positions: Tensor, batch: Any, input_embeds: Tensor | None = None) -> Tensor:
        self.embeds.append(input_embeds)
        return input_ids


class Request:
    """This object is a prompt with items, as the scheduler has it. parts: numbers for text, arrays for items."""

    def __init__(self, modality: str, *parts: Any) -> None:
        self.modality = Modality[modality]
        self.pixels = [part for part in parts if isinstance(part, np.ndarray)]
        aspect = "pad" if modality == "VIDEO" else "anyres"
        about = {"image_sizes": [(2 * SIDE, 2 * SIDE)], "image_aspect_ratio": aspect}
        self.items = [
            MultimodalDataItem(modality=self.modality, feature=pixels, model_specific_data=dict(about))
            for pixels in self.pixels
        ]
        for item in self.items:
            item.set_hash(hash(item.feature.tobytes()))
        self.ids = array("q", [IMAGE if isinstance(part, np.ndarray) else part for part in parts])
        self.inputs = SimpleNamespace(mm_items=self.items)

    def pad(self, of: Any) -> Request:
        self.padded = of.pad_input_ids(self.ids, self.inputs)
        return self


def video(frames: int, seed: int = 0) -> list[Any]:
    """Return the frames of a random video, each with the token after it that prompts have."""
    pixels = np.random.default_rng(seed).standard_normal((frames, 1, 3, SIDE, SIDE)).astype(np.float32)
    return [part for frame in pixels for part in (frame, NEWLINE)]


def tile(count: int) -> Any:
    return np.random.default_rng(9).standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)


def run(of: Any, requests: list[Request], prefixes: list[int] | None = None, ends: list[int] | None = None) -> Tensor:
    """Return what the language model gets for one chunk of every request, in a call of `forward`.

    prefixes, ends: where in its prompt each chunk starts and ends; by default a chunk is the whole prompt.
    """
    prefixes = prefixes or [0] * len(requests)
    ends = ends or [len(request.padded) for request in requests]
    pieces = [request.padded[start:end] for request, start, end in zip(requests, prefixes, ends, strict=True)]
    lengths = torch.tensor([len(piece) for piece in pieces])
    batch = SimpleNamespace(
        mm_inputs=[request.inputs for request in requests],
        forward_mode=SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False),
        batch_size=len(requests),
        extend_start_loc=lengths.cumsum(0) - lengths,
        extend_seq_lens=lengths,
        extend_prefix_lens_cpu=prefixes,
    )
    positions = torch.cat([torch.arange(start, end) for start, end in zip(prefixes, ends, strict=True)])
    of.forward(torch.tensor([token for piece in pieces for token in piece]), positions, batch)
    return of.embeds[-1]


def features(of: Any, request: Request) -> Tensor:
    pixels = torch.from_numpy(np.concatenate(request.pixels))
    return of.multi_modal_projector(pixels.flatten(2).mT)


@torch.no_grad()
def test_every_video_is_pooled_alone_and_nothing_else_changes(switch: Switch) -> None:
    text = [1, 2, 3]
    parts = [
        ("VIDEO", [*text, *video(32), *text]),
        ("IMAGE", [*text, tile(5), *text]),
        ("VIDEO", [*text, *video(24, 1), *text, *video(17, 2), *text]),
        ("VIDEO", [*text, *video(17, 3), *text]),
    ]
    stock = model()
    before = [Request(modality, *given).pad(stock) for modality, given in parts]
    reference = run(stock, before)
    switch(TEXT)
    of = model()
    after = [Request(modality, *given).pad(of) for modality, given in parts]
    assert [len(request.padded) for request in after] == [len(request.padded) for request in before]
    found = run(of, after)
    assert all(item.modality is request.modality for request in after for item in request.items)

    start, changed = 0, torch.zeros(len(found), dtype=torch.bool)
    for request, borders in ((after[0], [32]), (after[1], []), (after[2], [24, 17]), (after[3], [17])):
        if borders:
            pooled = torch.cat([expected(alone) for alone in features(of, request).split(borders)])
            for tokens, offset in zip(pooled, request.inputs.image_offsets, strict=True):
                place = slice(start + offset, start + offset + POOLED)
                torch.testing.assert_close(found[place], tokens, rtol=0, atol=0)
                changed[place] = True
        start += len(request.padded)
    assert torch.equal(found[~changed], reference[~changed])
    assert not torch.isclose(found[changed], reference[changed]).all()


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 40, 113, 200, 290])
def test_a_prompt_in_two_chunks_gives_what_one_gives(hooked: None, cut: int) -> None:
    of = model()
    request = Request("VIDEO", 1, 2, *video(32), 3).pad(of)
    whole = run(of, [request])
    first, second = run(of, [request], ends=[cut]), run(of, [request], prefixes=[cut])
    # A newline token that SGLang writes past a frame's placeholders is not written again by the next chunk.
    same = (torch.cat([first, second]) == whole).all(1)
    assert same.sum() >= len(whole) - 1


def test_placeholders_tell_videos_apart_that_share_frames(hooked: None) -> None:
    of = model()
    shared, other = video(33), video(20, 5)

    def values(*parts: Any) -> list[int]:
        return [item.pad_value for item in Request("VIDEO", *parts).pad(of).items]

    assert values(1, *shared) == values(2, 3, *shared)
    assert len(set(values(*shared))) == 33
    assert not set(values(*shared)) & set(values(*shared[:64]))
    assert values(*shared, 1, 2, *other) == values(*shared) + values(*other)
    single = Request("IMAGE", 1, tile(5), 2)
    own = single.items[0].pad_value
    assert single.pad(of).items[0].pad_value == own


@torch.no_grad()
def test_what_the_engine_would_not_pool_stays(hooked: None) -> None:
    flat = model(merge="flat")
    request = Request("VIDEO", 1, *video(17)).pad(flat)
    assert not any(hasattr(item, "stgp_frame") for item in request.items)
    of = model()
    missing = Request("VIDEO", 1, *video(17))
    missing.ids = missing.ids[:20]  # Fewer placeholders than frames are left.
    assert not any(hasattr(item, "stgp_frame") for item in missing.pad(of).items)


@torch.no_grad()
def test_modalities_come_back_after_an_error(hooked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model()
    request = Request("VIDEO", 1, *video(17)).pad(of)

    def fail(pixels: Tensor, output_hidden_states: bool) -> Any:
        raise RuntimeError("out of memory")

    fail.device = "cpu"
    monkeypatch.setattr(of, "vision_tower", fail, raising=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(of, [request])
    assert all(item.is_video() for item in request.items)


def test_the_engine_refuses_a_size_that_its_placeholders_do_not_fit(hooked: None) -> None:
    of = model()
    hooks = Hooks(switched_options("ceil_mode=false"))
    with pytest.raises(ValueError, match=r"SGLang expects 9 tokens per frame .*4 \(2 × 2\)"):
        hooks.load_weights(lambda model, weights: None, of, [])
    with pytest.raises(ValueError, match="mode must be 'pool' for LlavaQwenForCausalLM"):
        Hooks(switched_options("mode=grid")).load_weights(lambda model, weights: None, of, [])
    assert Hooks(switched_options("output_size=3")).load_weights(lambda model, weights: "loaded", of, []) == "loaded"


# ---- the switch ----

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "integrations" / "sglang.md").read_text(encoding="utf-8")
SWITCHES = re.findall(r"^export STGP_SGLANG=.*$", PAGE, re.MULTILINE)


def start(switch: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell and then start.py in one shell, and return its outcome."""
    environment = {name: value for name, value in os.environ.items() if name != "STGP_SGLANG"}
    command = ["bash", "-c", f"{switch}\n{sys.executable} {HERE / 'start.py'}"]
    return subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=300)


def test_the_page_has_the_ways_to_switch_on() -> None:
    assert [switch.partition("=")[2] for switch in SWITCHES] == ["on", "temperature=2,frame_strides=2:4:8", "mode=grid"]


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_engine_finds_the_plugin_and_puts_its_hooks_in_force(switch: str) -> None:
    done = start(switch)
    assert done.returncode == 0, done.stderr
    hooked, options = done.stdout.splitlines()[-2:]
    targets = {**sglang_llava.SIGNATURES, **sglang_qwen_vl.SIGNATURES}
    assert hooked == str(sorted(path.replace(":", ".") for path in targets))
    assert options == repr(switched_options(switch.partition("=")[2]))


def test_without_the_switch_the_engine_hooks_nothing() -> None:
    done = start("true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[]", ""]


def test_wrong_options_end_the_engine() -> None:
    done = start("export STGP_SGLANG=temprature=2")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("stgridpool_kernels: STGP_SGLANG=temprature=2: ")
