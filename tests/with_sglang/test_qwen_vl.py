"""Hooks for Qwen-VL work in SGLang's own processor, encoders and scheduling, as the installed release has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Switch
from sglang.srt.layers.rotary_embedding import MRotaryEmbedding
from torch import Tensor

import stgridpool_kernels as stgp
from stgridpool_kernels.integrations.modes import ModeOptions
from stgridpool_kernels.integrations.sglang import switched_options
from tests.support.tiny_grid_models import HIDDEN, QWEN_KINDS

DEEP = {"qwen3_vl", "qwen3_vl_moe"}
"""These are the kinds whose encoder also has deepstack channels, of two levels."""

POOL = "temperature=2,frame_strides=1:2"
GRID = "mode=grid,frame_strides=1:2"
OPTIONS: dict[str, dict[str, Any]] = {
    POOL: {"temperature": 2.0, "frame_strides": (1, 2), "ceil_mode": True},
    GRID: {"frame_strides": (1, 2)},
}


@pytest.fixture(params=QWEN_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def media(tmp_path: Path) -> list[Any]:
    """Return a prompt of two videos of different size with an image between them, as text, files and bytes."""
    videos = [tiny.film(tmp_path, 18, 28, 56), tiny.film(tmp_path, 12, 56, 28)]
    return ["ab", videos[0], "c", tiny.picture(40, 64), "d", videos[1], "ef"]


def shrunk(text: str, grids: Tensor) -> Tensor:
    """Return the rows of video_grid_thw that are left; POOL has windows of 2 × 2 tokens and rounds up."""
    if text == GRID:
        return grids
    return torch.stack([grids[:, 0], 2 * ((grids[:, 1] + 3) // 4), 2 * ((grids[:, 2] + 3) // 4)], 1)


def grids_of(made: Any) -> Tensor:
    return torch.cat([item.video_grid_thw for item in made.mm_items if item.is_video()])


def resized(ids: list[int], video: int, before: Tensor, after: Tensor, whole: bool) -> list[int]:
    """Return a prompt in which every run of placeholders for the grids `before` has the length for the grids `after`.

    whole: whether a run stands for a video rather than for a frame.
    """
    runs = [
        (math.prod(old) // 4, math.prod(new) // 4)
        for old, new in (
            ((old[0] if whole else 1, *old[1:]), (new[0] if whole else 1, *new[1:]))
            for old, new in zip(before.tolist(), after.tolist(), strict=True)
            for _ in range(1 if whole else old[0])
        )
    ]
    found: list[int] = []
    at = 0
    while at < len(ids):
        old, new = runs.pop(0) if ids[at] == video else (1, 1)
        assert ids[at : at + old] == [ids[at]] * old
        found += [ids[at]] * new
        at += old
    assert not runs
    return found


def expected(text: str, kind: str, tokens: Tensor, grids: Tensor) -> Tensor:
    """Return what the reference leaves of the tokens of videos, one after the other."""
    left = []
    for grid in grids.tolist():
        frames, rows, cols = grid[0], grid[1] // 2, grid[2] // 2
        video, tokens = tokens.split([frames * rows * cols, len(tokens) - frames * rows * cols])
        x, options = video.unflatten(0, (frames, rows, cols)), OPTIONS[text]
        if text == GRID:
            left.append(stgp.temporal_grid(x, backend="reference", **options))
        else:
            main = HIDDEN if kind in DEEP else None
            left.append(stgp.grid_pool(x, backend="reference", norm_channels=main, **options))
    return torch.cat([part.flatten(0, 2) for part in left])


@pytest.mark.parametrize("text", [POOL, GRID])
def test_prompts_and_positions_are_those_of_a_video_of_the_size_that_is_left(
    text: str, kind: str, switch: Switch, media: list[Any], tmp_path: Path
) -> None:
    stock = tiny.Engine(kind, tmp_path / "stock").prompt(*media)
    switch(text)
    engine = tiny.Engine(kind, tmp_path / "hooked")
    made = engine.prompt(*media)
    grids, video = grids_of(made), engine.config.video_token_id
    assert torch.equal(grids, grids_of(stock))  # The encoder needs the grids of whole videos.
    left = shrunk(text, grids)
    assert made.input_ids == resized(stock.input_ids, video, grids, left, whole=kind.startswith("qwen2"))

    at = [
        place
        for item in made.mm_items
        if item.is_video()
        for start, end in item.offsets
        for place in range(start, end + 1)
    ]
    assert at == [place for place, token in enumerate(made.input_ids) if token == video]
    assert len(at) == left.prod(1).sum() // 4
    seconds = next((item.second_per_grid_ts for item in made.mm_items if hasattr(item, "second_per_grid_ts")), None)
    image = next(item for item in made.mm_items if item.is_image())
    positions, delta = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=2,
        image_token_id=engine.config.image_token_id,
        video_token_id=video,
        vision_start_token_id=engine.config.vision_start_token_id,
        model_type=kind,
        tokens_per_second=getattr(engine.config.vision_config, "tokens_per_second", None),
        input_ids=torch.tensor([made.input_ids]),
        image_grid_thw=image.image_grid_thw,
        video_grid_thw=left,
        second_per_grid_ts=seconds,
    )
    assert torch.equal(made.mrope_positions, positions.squeeze(1))
    assert torch.equal(made.mrope_position_delta, delta)
    assert torch.equal(made.mrope_positions, stock.mrope_positions) == (text == GRID)

    before = next(item for item in stock.mm_items if item.is_image())
    assert torch.equal(image.feature, before.feature)
    assert image.model_specific_data.keys() == before.model_specific_data.keys()


@pytest.mark.parametrize("text", [POOL, GRID])
def test_the_language_model_gets_what_the_reference_leaves_of_every_video(
    text: str, kind: str, switch: Switch, media: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = tiny.Engine(kind, tmp_path / "stock")
    model = stock.model(monkeypatch)
    prompts = [media, ["g", media[1], "h"], ["i", media[3], "j"]]
    if kind == "qwen2_5_vl":  # SGLang takes images for encoded ones unless patches have 14 pixels.
        prompts = [[part for part in media if not isinstance(part, bytes)], prompts[1]]
    tiny.empty_cache()
    made = [stock.prompt(*parts) for parts in prompts]
    plain = tiny.embed(model, [tiny.schedule(one, model) for one in made])

    switch(text)
    engine = tiny.Engine(kind, tmp_path / "hooked")
    model = engine.model(monkeypatch)
    tiny.empty_cache()
    after = [engine.prompt(*parts) for parts in prompts]
    requests = [tiny.schedule(one, model) for one in after]
    found = tiny.embed(model, requests)
    video = engine.config.video_token_id
    for one, other, rows, whole in zip(after, made, found, plain, strict=True):
        here = torch.tensor(one.input_ids) == video
        there = torch.tensor(other.input_ids) == video
        assert torch.equal(rows[~here], whole[~there])
        if here.any():
            tokens = expected(text, kind, whole[there], grids_of(one))
            torch.testing.assert_close(rows[here], tokens, rtol=1e-5, atol=1e-5)
    assert (tuple(found[0].shape) == tuple(plain[0].shape)) == (text == GRID)

    for cuts in ([7, 30, 31, 60], [100, 120]):
        for size in (2**24, 1):  # The first cache holds all tokens, the second none.
            tiny.empty_cache(size)
            for whole, part in zip(found, tiny.embed(model, requests, cuts), strict=True):
                torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


def hashes(engine: tiny.Engine, media: list[Any]) -> dict[str, list[int]]:
    made = engine.prompt(*media)
    found: dict[str, list[int]] = {"IMAGE": [], "VIDEO": []}
    for item in made.mm_items:
        item.set_pad_value()
        found[item.modality.name].append(item.pad_value)
    return found


def test_placeholders_and_keys_of_caches_tell_options_and_modes_apart(
    switch: Switch, media: list[Any], tmp_path: Path
) -> None:
    found = []
    for number, text in enumerate(("", POOL, "on", GRID, "mode=grid", POOL)):
        switch(text)
        found.append(hashes(tiny.Engine("qwen3_vl", tmp_path / str(number)), media))
    assert found[1] == found[5]
    assert len({value for one in found for value in one["VIDEO"]}) == 2 * 5
    assert len({value for one in found for value in one["IMAGE"]}) == 1


def test_a_hash_that_comes_with_a_request_depends_on_the_options_too(
    switch: Switch, media: list[Any], tmp_path: Path
) -> None:
    values = set()
    for number, text in enumerate(("", POOL, GRID)):
        switch(text)
        made = tiny.Engine("qwen2_5_vl", tmp_path / str(number)).prompt(*media)
        for item in made.mm_items:
            item.set_hash(12345)
        values |= {(item.is_video(), item.hash) for item in made.mm_items}
        assert {item.hash for item in made.mm_items if item.is_image()} == {12345}
    assert len(values) == 1 + 3


def test_a_hash_is_the_same_where_it_is_taken_before_features_leave_the_device(
    switch: Switch, media: list[Any], tmp_path: Path
) -> None:
    switch(POOL)
    engine = tiny.Engine("qwen2_5_vl", tmp_path)
    late = hashes(engine, media)
    engine.processor.precompute_hash_before_cpu_transfer = True
    assert all(item.pad_value is not None for item in engine.prompt(*media).mm_items)
    assert hashes(engine, media) == late


def test_a_video_whose_prompt_another_process_made_keeps_its_tokens(
    switch: Switch, media: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = tiny.Engine("qwen3_vl", tmp_path / "stock")
    made = stock.prompt(*media)
    items = [item for item in made.mm_items if item.is_video()]
    with torch.no_grad():
        whole = stock.model(monkeypatch).get_video_feature(items)
        switch(POOL)
        model = tiny.Engine("qwen3_vl", tmp_path / "hooked").model(monkeypatch)
        assert torch.equal(model.get_video_feature(items), whole)
        items[0].model_specific_data["stgp_options"] = repr(switched_options(POOL))
        first = grids_of(made)[:1]
        of_first = whole[: first.prod() // 4]
        mixed = torch.cat([expected(POOL, "qwen3_vl", of_first, first), whole[len(of_first) :]])
        torch.testing.assert_close(model.get_video_feature(items), mixed, rtol=1e-5, atol=1e-5)
        items[1].model_specific_data["stgp_options"] = repr(switched_options(GRID))
        with pytest.raises(RuntimeError, match=r"STGP_SGLANG must be the same .*mode='grid'.*mode='pool'"):
            model.get_video_feature(items)


def test_copies_of_the_processor_in_threads_make_the_same_prompts(
    switch: Switch, media: list[Any], tmp_path: Path
) -> None:
    switch(POOL)
    alone = tiny.Engine("qwen3_vl", tmp_path / "alone", mm_processor_worker_num=1)
    several = tiny.Engine("qwen3_vl", tmp_path / "several", mm_processor_worker_num=2)
    several.processor = type(several.processor)(several.config, several.server, several.library_processor, "default")
    assert alone.processor.mm_processor_executor is None
    assert several.processor.mm_processor_executor is not None
    assert several.prompt(*media).input_ids == alone.prompt(*media).input_ids


@pytest.mark.parametrize("form", ["processor_output", "precomputed_embedding"])
def test_videos_that_were_processed_elsewhere_are_refused(form: str, switch: Switch, tmp_path: Path) -> None:
    switch(POOL)
    engine = tiny.Engine("qwen2_5_vl", tmp_path / "engine")
    base = type("Base", (), {"videos": [{"format": form}]})()
    with pytest.raises(ValueError, match=f"a video must be a file or frames .* got format='{form}'"):
        engine.processor.process_and_combine_mm_data(base, engine.processor.mm_tokens)


REFUSED = {
    "tokenizer_worker_num must be 1, got 2": {"tokenizer_worker_num": 2},
    "model_impl must not be 'transformers'": {"model_impl": "transformers"},
    "encoder_only must be off": {"encoder_only": True},
    "language_only must be off": {"language_only": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_engines_that_the_hooks_do_not_reach_are_refused_when_they_start(
    message: str, switch: Switch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch(POOL)
    engine = tiny.Engine("qwen3_vl", tmp_path / "engine")
    tiny.publish(tmp_path / "engine", **REFUSED[message])
    with pytest.raises(ValueError, match=message):
        engine.model(monkeypatch)
    with pytest.raises(ValueError, match=message):
        type(engine.processor)(engine.config, engine.server, engine.library_processor, "default", skip_mm_pool=True)


def test_options_that_the_model_does_not_fit_are_refused_when_it_starts(
    switch: Switch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch(f"norm_channels={HIDDEN + 1}")
    engine = tiny.Engine("qwen3_vl", tmp_path / "engine")
    with pytest.raises(ValueError, match=f"norm_channels must be at most the {HIDDEN} channels"):
        engine.model(monkeypatch)


def test_models_of_other_types_that_share_the_processor_are_left_alone(
    switch: Switch, media: list[Any], tmp_path: Path
) -> None:
    stock = tiny.Engine("qwen3_vl", tmp_path / "stock", model_type="qwen4_exp").prompt(*media)
    switch(POOL)
    made = tiny.Engine("qwen3_vl", tmp_path / "hooked", model_type="qwen4_exp").prompt(*media)
    assert made.input_ids == stock.input_ids
    assert torch.equal(made.mrope_positions, stock.mrope_positions)
    assert all("stgp_options" not in item.model_specific_data for item in made.mm_items)


def test_the_options_of_these_tests_are_what_the_switch_means() -> None:
    for text, options in OPTIONS.items():
        found: ModeOptions = switched_options(text)
        assert {name: found.arguments[name] for name in options} == options
