"""Inspection: numbers against windows worked out by hand and against the ops; figures of inputs of every kind."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stgridpool_kernels import grid_plan, norm_pool, temporal_grid, token_norm
from stgridpool_kernels.cli import figure as module
from stgridpool_kernels.cli.figure import draw, save_figure
from stgridpool_kernels.cli.inspection import (
    Summary,
    choose_frames,
    inspect_command,
    inspect_tokens,
    list_summaries,
    window_weights,
)
from stgridpool_kernels.io.data import load_fixture

pytestmark = pytest.mark.filterwarnings("error")

NO_GRIDDING: dict[str, Any] = {"frame_strides": ()}


def of_norms(norms: Any, channels: int = 4) -> Tensor:
    """Tokens (T, H, W, C) whose RMS is the given (T, H, W)."""
    return torch.as_tensor(norms, dtype=torch.float64)[..., None].expand(*np.shape(norms), channels).contiguous()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 2 + 0.3 * torch.randn(*shape[:-1], 1, generator=generator)
    return scale * torch.randn(*shape, generator=generator)


# ---- numbers ----


def test_one_window_by_hand() -> None:
    found = inspect_tokens(of_norms([[[1, 2], [3, 4]]]), **NO_GRIDDING, temperature=0.5)
    assert (found.window_size, found.counted, found.windows) == (4, 1, 1)
    assert found.spread == pytest.approx([3 / 2.5])
    assert found.max_over_median == pytest.approx(4 / 2.5)
    assert [weights.temperature for weights in found.largest_weights] == [0.5, 1, 2, 5, 10]
    for weights in found.largest_weights:
        largest = 1 / sum(math.exp(weights.temperature * (norm - 4)) for norm in (1, 2, 3, 4))
        assert (weights.p5, weights.p50, weights.p95) == pytest.approx((largest,) * 3)
        assert weights.counts.sum() == 1
        assert weights.counts[int(largest * 100)] == 1


def test_quantiles_run_over_the_windows() -> None:
    # five windows of one token that stands out by k: largest weight e^k / (e^k + 3)
    norms = [[[1 + k, 1, 1, 1]] for k in range(5)]
    found = inspect_tokens(of_norms(norms), **NO_GRIDDING, kernel_size=(1, 4))
    largest = [math.exp(k) / (math.exp(k) + 3) for k in range(5)]
    weights = next(weights for weights in found.largest_weights if weights.temperature == 1)
    assert weights.p50 == pytest.approx(largest[2])
    assert weights.p5 == pytest.approx(np.quantile(largest, 0.05))
    assert weights.p95 == pytest.approx(np.quantile(largest, 0.95))
    assert found.spread == pytest.approx([k / (1 + k / 4) for k in range(5)])
    assert found.spread_p50 == pytest.approx(2 / 1.5)


def test_norms_are_those_of_the_ops_stage_by_stage() -> None:
    x = random_tokens(32, 5, 6, 8)
    found = inspect_tokens(x, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3), norm_type=3.0, normalize_norm=False)
    assert found.stage_norms.shape == (3, 32, 5, 6)
    one = temporal_grid(x, frame_strides=(2,), grid_shape=(2, 2))
    two = temporal_grid(x, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3))
    for stage, tokens in zip(found.stage_norms, (x, one, two), strict=True):
        np.testing.assert_array_equal(stage, token_norm(tokens, norm_type=3.0, normalize_norm=False).numpy())
    assert found.overwritten == grid_plan((32,), 5, 6, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3)).overwritten
    assert found.pooled_shape == (32, 2, 3, 8)


WINDOWS = [
    pytest.param({}, id="kernel2"),
    pytest.param({"kernel_size": 3, "padding": 1}, id="padding"),
    pytest.param({"kernel_size": 3, "padding": 1, "count_include_pad": False}, id="padding not counted"),
    pytest.param({"kernel_size": (2, 3), "stride": (1, 2)}, id="overlapping"),
    pytest.param({"ceil_mode": True}, id="ceil_mode"),
    pytest.param({"output_size": (3, 4)}, id="output_size"),
    pytest.param({"kernel_size": 3, "padding": 1, "temperature": -1.5}, id="negative temperature"),
]


@pytest.mark.parametrize("options", WINDOWS)
def test_weights_are_those_norm_pool_applies(options: dict[str, Any]) -> None:
    """Tokens along different channels: channel i of an output is token i's norm × its weight."""
    H, W = 7, 9
    norms = np.random.default_rng(1).uniform(0.5, 3, (1, H, W))
    x = torch.diag(torch.from_numpy(norms.ravel())).reshape(1, H, W, H * W)
    arguments = {"temperature": 0.7, "normalize_norm": False, **options}
    weights = (norm_pool(x, **arguments)[0] / torch.from_numpy(norms.ravel())).numpy().reshape(-1, H, W)

    found = inspect_tokens(x, **NO_GRIDDING, **arguments)
    plan, temperature = found.plan, arguments["temperature"]
    areas = np.multiply.outer(plan.window_rows.count, plan.window_cols.count).reshape(-1, 1, 1)
    hits = (weights > 0).sum(0)
    expected = (weights * areas).sum(0) / np.where(hits, hits, np.nan)
    np.testing.assert_allclose(window_weights(found.gridded_norms[0], plan, temperature), expected, rtol=1e-12)

    sizes, numbers = np.unique(areas, return_counts=True)
    size = max(sizes, key=lambda size: (numbers[sizes == size][0], size))
    assert (found.window_size, found.counted, found.windows) == (size, (areas == size).sum(), len(areas))
    # zero padding has the weight that the tokens leave
    tokens = weights[(areas == size).ravel()]
    padding = 1 - tokens.sum((1, 2))
    absent = size - (tokens > 0).sum((1, 2))
    largest = np.maximum(tokens.max((1, 2)), padding / np.where(absent, absent, np.inf))
    measured = next(weights for weights in found.largest_weights if weights.temperature == temperature)
    expected = [np.quantile(largest, q) for q in (0.05, 0.5, 0.95)]
    assert [measured.p5, measured.p50, measured.p95] == pytest.approx(expected, rel=1e-12)


def test_windows_are_taken_after_temporal_gridding() -> None:
    x = random_tokens(16, 4, 4, 8)
    found = inspect_tokens(x)
    gridded = inspect_tokens(temporal_grid(x), **NO_GRIDDING)
    np.testing.assert_array_equal(found.spread, gridded.spread)
    assert found.target_temperature == gridded.target_temperature


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 3}, {"kernel_size": (1, 2)}, {"temperature": -1.0}, {"ceil_mode": True}],
    ids=["2x2", "3x3", "1x2", "negative", "ceil"],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_solved_temperature_gives_the_target(options: dict[str, Any], scale: float) -> None:
    x = scale * random_tokens(16, 9, 9, 16)
    found = inspect_tokens(x, **options)
    solved = found.target_temperature
    assert solved is not None
    assert (solved < 0) == (options.get("temperature", 1) < 0)
    again = inspect_tokens(x, **{**options, "temperature": solved})
    weights = next(weights for weights in again.largest_weights if weights.temperature == solved)
    assert weights.p95 == pytest.approx(found.target_weight, rel=1e-4)
    assert found.target_weight == (0.75 if options.get("kernel_size") == (1, 2) else 0.5)
    assert f"take a temperature near {solved:.2g}." in found.advice


def test_input_is_left_alone_and_takes_no_gradient() -> None:
    x = random_tokens(8, 4, 4, 4).requires_grad_()
    before = x.detach().clone()
    inspect_tokens(x)
    assert torch.equal(x, before)
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    found = inspect_tokens(random_tokens(8, 4, 4, 4).to(dtype))
    assert f"torch.{found.dtype}" == str(dtype)
    assert found.target_temperature is not None


# ---- advice and degenerate inputs ----


def test_advice_near_average_pooling() -> None:
    tokens, _, _ = load_fixture()
    found = inspect_tokens(torch.from_numpy(tokens))
    assert found.advice.startswith("At temperature 1 the largest weight of a window is 0.26 at the median and ")
    assert "(0.25 is uniform): close to average pooling. For a largest weight above 0.50" in found.advice


@pytest.mark.parametrize(
    ("temperature", "verdict"),
    [
        (0.01, "close to average"),
        (2, "between average pooling and"),
        (50, "close to keeping one token"),
        (0, "close to"),
    ],
)
def test_verdict_follows_the_temperature(temperature: float, verdict: str) -> None:
    assert f": {verdict}" in inspect_tokens(random_tokens(8, 6, 6, 16), temperature=temperature).advice


def test_ties_have_no_temperature() -> None:
    found = inspect_tokens(of_norms(np.tile([[1.0, 1.0], [2.0, 2.0]], (4, 3, 3))), kernel_size=2)
    assert found.target_temperature is not None  # two of four tie at the largest norm: 0.5 is reached in the limit
    found = inspect_tokens(of_norms(np.tile([[1.0, 2.0], [2.0, 2.0]], (4, 3, 3))), kernel_size=2)
    assert found.target_temperature is None
    assert found.advice.endswith("No temperature lifts the largest weight to 0.50 in 5 % of the windows: norms tie.")


def degenerate() -> list[Any]:
    nan, spike = random_tokens(16, 6, 6, 4), random_tokens(16, 6, 6, 4)
    nan[3, 2, 2, 0], nan[4, 0, 0, 1] = math.nan, math.inf
    spike[5, 1, 1] = 500
    return [
        pytest.param(torch.zeros(16, 6, 6, 4), {}, "All token norms are zero", id="zero"),
        pytest.param(torch.ones(16, 6, 6, 4), {}, "The norms inside every window are equal", id="equal"),
        pytest.param(torch.full((8, 6, 6, 4), math.nan), {}, "No window is free of NaN", id="nan"),
        pytest.param(torch.full((8, 6, 6, 4), math.inf), {}, "No window is free of NaN", id="inf"),
        pytest.param(nan, {}, "2 of 576, are left out with their windows.", id="some nan"),
        pytest.param(spike, {}, "take a temperature near", id="outlier"),
        pytest.param(random_tokens(1, 1, 1, 4), {"kernel_size": 1}, "A window holds one token", id="one token"),
        pytest.param(random_tokens(1, 1, 1, 4), {"ceil_mode": True}, "A window holds one token", id="one in a window"),
        pytest.param(
            torch.zeros(4, 3, 3, 2), {"kernel_size": 3, "padding": 1}, "All token norms are zero", id="padded"
        ),
    ]


@pytest.mark.parametrize(("x", "options", "words"), degenerate())
def test_degenerate_inputs_say_so_and_draw(x: Tensor, options: dict[str, Any], words: str) -> None:
    found = inspect_tokens(x, **options)
    assert words in found.advice
    draw(found).canvas.draw()


def test_nonfinite_windows_are_left_out() -> None:
    x = of_norms([[[1, 2, 3, 4], [1, 2, 3, 4]]])
    x[0, 0, 0, 0] = math.nan
    found = inspect_tokens(x, **NO_GRIDDING)
    assert (found.nonfinite, found.counted, found.windows) == (1, 1, 2)
    assert found.spread == pytest.approx([1 / 3.5])
    weights = window_weights(found.gridded_norms[0], found.plan, 1.0)
    assert np.isnan(weights[:, :2]).all()
    assert weights[0, 3] == pytest.approx(2 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (torch.zeros(0, 4, 4, 4), {}, ValueError, "at least one frame .* got shape \\(0, 4, 4, 4\\)"),
        (torch.zeros(4, 4, 4, 4, dtype=torch.int64), {}, TypeError, "x must have dtype .* got torch.int64"),
        (torch.zeros(2, 4, 4, 4, 4), {}, ValueError, "one video of at least one frame"),
        (torch.zeros(4, 4, 4, 4), {"frame_counts": [2, 2]}, TypeError, "unexpected keyword argument 'frame_counts'"),
        (torch.zeros(4, 4, 4, 4), {"temperature": math.nan}, ValueError, "temperature must be finite"),
        (torch.zeros(4, 4, 4, 4), {"norm_type": 0.0}, ValueError, "norm_type"),
        (torch.zeros(4, 1, 1, 4), {}, ValueError, "leaves no window"),
        (torch.zeros(4, 4, 4, 4), {"backend": "abacus"}, ValueError, "backend must be one of"),
    ],
)
def test_refusals(x: Tensor, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        inspect_tokens(x, **options)


# ---- what is drawn ----


PLANS = [
    pytest.param(16, {}, id="16"),
    pytest.param(64, {}, id="64"),
    pytest.param(3, {}, id="3"),
    pytest.param(50, {"frame_strides": (3, 7), "grid_shape": (1, 2, 2, 1)}, id="ragged"),
    pytest.param(64, {"sampling": "first"}, id="first"),
    pytest.param(12, NO_GRIDDING, id="off"),
]


@pytest.mark.parametrize(("frames", "options"), PLANS)
def test_summaries_are_the_plans(frames: int, options: dict[str, Any]) -> None:
    plan = grid_plan((frames,), 4, 4, **options)
    summaries = list_summaries(plan)
    for number, level in enumerate(plan.levels, start=1):
        mine = [summary for summary in summaries if summary.level == number]
        assert tuple(summary.target for summary in mine) == level.targets
        assert tuple(summary.sources for summary in mine) == level.sources
        earlier = {target for before in plan.levels[: number - 1] for target in before.targets}
        assert all(set(summary.nested) == set(summary.sources) & earlier for summary in mine)
    assert sorted({summary.target for summary in summaries}) == list(plan.overwritten)
    short = list_summaries(plan, 20)
    assert short == [summary for summary in summaries if max(summary.target, *summary.sources) < 20]


def test_summaries_at_the_published_settings() -> None:
    assert list_summaries(grid_plan((16,), 4, 4)) == [
        Summary(1, 7, (1, 3, 5, 7), ()),
        Summary(1, 15, (9, 11, 13, 15), ()),
        Summary(2, 15, (3, 7, 11, 15), (7, 15)),
    ]


def test_diagram_joins_every_source_to_its_target() -> None:
    plan = grid_plan((32,), 4, 4)
    axes = draw(inspect_tokens(random_tokens(32, 4, 4, 4))).axes
    lanes = next(ax for ax in axes if len(ax.patches) == 32 * 4)
    drawn = sorted((round(line.get_ydata()[0]), *map(int, line.get_xdata())) for line in lanes.lines)
    joins = [(s.level - 1, source, s.target) for s in list_summaries(plan) for source in s.sources]
    assert drawn == sorted(joins)
    assert len([line for line in lanes.lines if line.get_marker() == "o"]) == sum(
        len(summary.nested) for summary in list_summaries(plan)
    )


@pytest.mark.parametrize("total", [1, 7, 8, 9, 31, 64, 257])
def test_chosen_frames(total: int) -> None:
    for overwritten in ((), (total // 2,), (0, total - 1)):
        chosen = choose_frames(total, 8, overwritten)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(total, 8)
        assert 0 <= chosen[0] <= chosen[-1] < total
        assert not overwritten or set(chosen) & set(overwritten)


FIGURES = [
    pytest.param((64, 6, 6, 8), {}, False, id="T64"),
    pytest.param((32, 9, 16, 8), {"temperature": 5.0}, True, id="T32"),
    pytest.param((3, 6, 6, 8), {}, False, id="no group"),
    pytest.param((1, 1, 1, 8), {"kernel_size": 1}, True, id="T1"),
    pytest.param((12, 8, 8, 8), NO_GRIDDING, False, id="off"),
    pytest.param((16, 7, 10, 8), {"kernel_size": 3, "padding": 1, "grid_shape": (2, 3)}, False, id="7x10"),
    pytest.param(
        (16, 9, 9, 8), {"output_size": (4, 5), "resize": "bilinear", "norm_type": math.inf}, False, id="output_size"
    ),
    pytest.param((100, 6, 6, 8), {"frame_strides": (2, 4, 30), "grid_shape": (3, 3, 2, 2, 1, 3)}, True, id="T100"),
    pytest.param((16, 20, 2, 8), {"sampling": "first", "temperature": -2.0}, True, id="tall"),
]


@pytest.mark.parametrize(("shape", "options", "pictures"), FIGURES)
def test_figures_draw_without_a_warning(shape: tuple[int, ...], options: dict[str, Any], pictures: bool) -> None:
    T, H, W, _ = shape
    frames = np.random.default_rng(0).integers(0, 256, (T, 4 * H, 4 * W, 3), dtype=np.uint8) if pictures else None
    figure = draw(inspect_tokens(random_tokens(*shape), **options), frames, name="$a_b$ [x].npz", credit="© someone")
    canvas: Any = figure.canvas
    canvas.draw()
    width, height = canvas.get_width_height()
    assert width == 1500
    renderer = canvas.get_renderer()
    outside = [
        text.get_text()
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
        if text.get_visible() and text.get_text() and not _within(text.get_window_extent(renderer), width, height)
    ]
    assert outside == []


def _within(box: Any, width: int, height: int) -> bool:
    # an axis makes tick labels beyond its limits that are never drawn; they have no extent
    return bool(box.width == 0 or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height))


def test_thumbnails_follow_the_tokens_gridding() -> None:
    _, frames, _ = load_fixture()
    plan = grid_plan((16,), 9, 16)
    stages = module._gridded_thumbnails(frames, plan)
    assert stages.shape[:2] == (4, 16)
    kept = [frame for frame in range(16) if frame not in plan.overwritten]
    assert (stages[:, kept] == stages[0, kept]).all()
    expected = temporal_grid(torch.from_numpy(stages[0]).float())
    assert np.abs(stages[-1] - expected.numpy()).max() <= 0.5


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((16, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((16, 8, 8), np.uint8), "\\(T, h, w, 3\\)"),
        (np.zeros((4, 8, 8, 3), np.uint8), "each of the 16 token frames, got 4"),
    ],
)
def test_frames_that_do_not_go_with_the_tokens(frames: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw(inspect_tokens(random_tokens(16, 4, 4, 4)), frames)


def test_no_global_state() -> None:
    code = """
import sys, torch
from stgridpool_kernels.cli.figure import draw
from stgridpool_kernels.cli.inspection import inspect_tokens
found = inspect_tokens(torch.rand(8, 4, 4, 4))
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
draw(found).canvas.draw()
assert "matplotlib.pyplot" not in sys.modules
# reading rcParams["backend"] would choose one
assert all(before[key] == matplotlib.rcParams[key] for key in before if key != "backend")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- files ----


def _size(png: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_fixture_figure(tmp_path: Path) -> None:
    tokens, frames, meta = load_fixture()
    found = inspect_tokens(torch.from_numpy(tokens))
    output = tmp_path / "fixture.png"
    save_figure(found, frames, output, force=False, name="fixture", credit=meta["credit"])
    png = output.read_bytes()
    width, height = _size(png)
    assert width == 1500
    assert 1200 < height < 1700
    assert 50_000 < len(png) <= 300_000
    assert [path.name for path in tmp_path.iterdir()] == ["fixture.png"]
    with pytest.raises(FileExistsError):
        save_figure(found, frames, output, force=False)
    with pytest.raises(ValueError, match="PNG"):
        save_figure(found, frames, tmp_path / "fixture.jpg", force=False)


def run_command(path: Path, output: Path, **changes: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    arguments: dict[str, Any] = {
        "options": {}, "num_frames": 8, "grid": (4, 6), "tap": "post_ln", "key": None, "force": False,
    }  # fmt: skip
    inspect_command(path, output, **(arguments | changes), console=console)
    file: Any = console.file
    return str(file.getvalue())


def test_command_on_a_file(tmp_path: Path) -> None:
    path, output = tmp_path / "[bold]tokens.npy", tmp_path / "out.png"
    np.save(path, random_tokens(16, 4, 4, 8).numpy())
    options = {"temperature": 3.0, "backend": "reference"}
    text = run_command(path, output, options=options)
    assert options == {"temperature": 3.0, "backend": "reference"}
    assert "[bold]tokens.npy" in text
    assert "2 of 16" in text
    assert "largest weight at 3" in text
    assert "At temperature 3 the largest weight" in text.replace("\n", " ")
    assert f"figure: {output}" in text
    assert _size(output.read_bytes())[0] == 1500
    with pytest.raises(FileExistsError):
        run_command(path, output)
    run_command(path, output, force=True)


def test_command_takes_the_first_video(tmp_path: Path) -> None:
    x = random_tokens(2, 12, 4, 4, 8).numpy()
    batch, packed, single = (tmp_path / f"{name}.npy" for name in ("batch", "packed", "single"))
    np.save(batch, x)
    np.save(packed, x.reshape(24, 4, 4, 8)[:20])
    np.save(single, x[0])
    pictures = []
    for path, options in ((batch, {}), (packed, {"frame_counts": [12, 8]}), (single, {})):
        text = run_command(path, tmp_path / f"{path.stem}.png", options=options)
        assert ("video 1 of 2" in text) == (path != single)
        assert "(12, 4, 4, 8)" in text
        pictures.append(text.splitlines()[1:-1])
    assert pictures[0] == pictures[1] == pictures[2]


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (np.zeros((4, 4, 4, 4), np.float32), {"frame_counts": [2, 3]}, "frame_counts must pack"),
        (np.zeros((1, 4, 4, 4, 4), np.float32), {"frame_counts": [4]}, "frame_counts must pack"),
        (np.zeros((0, 4, 4, 4), np.float32), {}, "(?i)no token|empty|at least|shape"),
        (np.zeros((4, 4, 4, 4), np.int64), {}, "dtype|float"),
    ],
)
def test_command_refusals_leave_no_file(tmp_path: Path, x: np.ndarray, options: dict[str, Any], words: str) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, x)
    with pytest.raises(ValueError, match=words):
        run_command(path, tmp_path / "out.png", options=options)
    assert not (tmp_path / "out.png").exists()


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "stgridpool_kernels\[demo\]"'):
        draw(inspect_tokens(random_tokens(8, 4, 4, 4)))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [-3.0, 0.0, 1.0, 20.0])
def test_advice_claims_nothing_about_the_picture(scale: float, temperature: float) -> None:
    advice = inspect_tokens(scale * random_tokens(8, 6, 6, 8), temperature=temperature).advice.lower()
    assert not any(word in advice for word in ("salien", "important", "object", "subject", "attention"))
