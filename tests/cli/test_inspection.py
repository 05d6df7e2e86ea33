"""Inspection: numbers against windows worked out by hand and against the ops, figures of all kinds of inputs."""

from __future__ import annotations

import ast
import inspect
import io
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import Tensor

from stgridpool_kernels import grid_plan, norm_pool, temporal_grid, token_norm
from stgridpool_kernels.cli import figure as module
from stgridpool_kernels.cli import inspect as command
from stgridpool_kernels.cli import inspection
from stgridpool_kernels.cli.figure import draw, save_figure
from stgridpool_kernels.cli.inspect import inspect_command
from stgridpool_kernels.cli.inspection import Inspection, inspect_tokens
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
    assert list(found.largest_weights) == [0.5, 1, 2, 5, 10]
    for temperature, weights in found.largest_weights.items():
        largest = 1 / sum(math.exp(temperature * (norm - 4)) for norm in (1, 2, 3, 4))
        assert weights == pytest.approx([largest])


def test_every_window_counts() -> None:
    # five windows of one token that stands out by k: largest weight e^k / (e^k + 3)
    norms = [[[1 + k, 1, 1, 1]] for k in range(5)]
    found = inspect_tokens(of_norms(norms), **NO_GRIDDING, kernel_size=(1, 4))
    largest = [math.exp(k) / (math.exp(k) + 3) for k in range(5)]
    assert found.largest_weights[1] == pytest.approx(largest)
    assert found.spread == pytest.approx([k / (1 + k / 4) for k in range(5)])
    median, top = np.quantile(largest, (0.5, 0.95))
    assert f"is {median:.2f} at the median and {top:.2f} at the 95th percentile (0.25 is uniform)" in found.advice


def test_norms_are_those_of_the_ops_stage_by_stage() -> None:
    x = random_tokens(32, 5, 6, 8)
    found = inspect_tokens(x, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3), norm_type=3.0, normalize_norm=False)
    assert found.stage_norms.shape == (3, 32, 5, 6)
    one = temporal_grid(x, frame_strides=(2,), grid_shape=(2, 2))
    two = temporal_grid(x, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3))
    for stage, tokens in zip(found.stage_norms, (x, one, two), strict=True):
        np.testing.assert_array_equal(stage, token_norm(tokens, norm_type=3.0, normalize_norm=False).numpy())
    for stage, tokens in zip(found.stages(x), (x, one, two), strict=True):
        assert torch.equal(stage, tokens)
    assert found.plan == grid_plan((32,), 5, 6, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3))
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
    np.testing.assert_allclose(found.relative_weights(0, temperature), expected, rtol=1e-12)

    sizes, numbers = np.unique(areas, return_counts=True)
    size = max(sizes, key=lambda size: (numbers[sizes == size][0], size))
    assert (found.window_size, found.counted, found.windows) == (size, (areas == size).sum(), len(areas))
    # zero padding has the weight that the tokens leave
    tokens = weights[(areas == size).ravel()]
    padding = 1 - tokens.sum((1, 2))
    absent = size - (tokens > 0).sum((1, 2))
    largest = np.maximum(tokens.max((1, 2)), padding / np.where(absent, absent, np.inf))
    assert found.largest_weights[temperature] == pytest.approx(largest, rel=1e-12)


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
    assert np.quantile(again.largest_weights[solved], 0.95) == pytest.approx(found.target_weight, rel=1e-4)
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
    weights = found.relative_weights(0, 1.0)
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


def diagram(inspection: Inspection) -> Any:
    """The axes of the diagram alone."""
    panel = Figure().subfigures()
    module._draw_diagram(panel, inspection)
    [axes] = panel.axes
    return axes


def joins(lines: list[Any]) -> list[tuple[int, ...]]:
    """(level that reads, counted from 0; source; target) of every line."""
    return sorted((round(line.get_ydata()[0]), *map(int, line.get_xdata())) for line in lines)


@pytest.mark.parametrize(("frames", "options"), PLANS)
def test_diagram_is_the_plans(frames: int, options: dict[str, Any]) -> None:
    """Lines run from sources to targets, with a dot if the source is a summary; boxes have their level's colour."""
    inspection = inspect_tokens(random_tokens(frames, 2, 2, 4), **options)
    axes = diagram(inspection)
    colours = [dict.fromkeys(range(frames), module._UNTOUCHED)]
    expected, nested = [], []
    for number, level in enumerate(inspection.plan.levels):
        read = [(number, s, t) for t, sources in zip(level.targets, level.sources, strict=True) for s in sources]
        expected += read
        nested += [join for join in read if colours[-1][join[1]] != module._UNTOUCHED]
        colours.append(colours[-1] | dict.fromkeys(level.targets, module._LEVEL_COLOURS[number]))
    assert joins(axes.lines) == sorted(expected)
    assert joins([line for line in axes.lines if line.get_marker() == "o"]) == sorted(nested)
    lanes = [[to_hex(colour).upper() for colour in boxes.get_facecolor()] for boxes in axes.collections]
    assert lanes == [[colour.upper() for colour in lane.values()] for lane in colours]


def test_diagram_at_the_published_settings() -> None:
    axes = diagram(inspect_tokens(random_tokens(16, 2, 2, 4)))
    first = [(0, 1, 7), (0, 3, 7), (0, 5, 7), (0, 7, 7), (0, 9, 15), (0, 11, 15), (0, 13, 15), (0, 15, 15)]
    assert joins(axes.lines) == [*first, (1, 3, 15), (1, 7, 15), (1, 11, 15), (1, 15, 15)]
    assert joins([line for line in axes.lines if line.get_marker() == "o"]) == [(1, 7, 15), (1, 15, 15)]


def test_diagram_of_a_long_video_ends_in_time() -> None:
    """Of 200 frames the first 64 are drawn, and no summary that reads a later one."""
    inspection = inspect_tokens(random_tokens(200, 2, 2, 4), frame_strides=(3, 40))
    axes = diagram(inspection)
    assert [len(boxes.get_facecolor()) for boxes in axes.collections] == [64] * 3
    targets = [frame for frame in inspection.plan.levels[0].targets if frame < 64]
    assert len(targets) > 1
    assert {target for _, _, target in joins(axes.lines)} == set(targets)
    labels = [label.get_text().splitlines()[0] for label in axes.get_yticklabels()]
    assert labels == ["input frames", "after level 1: 16 overwritten", "after level 2: 1 overwritten"]


@pytest.mark.parametrize("total", [1, 7, 8, 9, 31, 64, 257])
def test_chosen_frames(total: int) -> None:
    for overwritten in ((), (total // 2,), (0, total - 1)):
        chosen = module._choose_frames(total, overwritten)
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
def test_figures_draw_without_a_warning(
    shape: tuple[int, ...], options: dict[str, Any], pictures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text is cut by the page or overlaps another, and wherever colours mean numbers there is a colour bar."""
    T, H, W, _ = shape
    frames = np.random.default_rng(0).integers(0, 256, (T, 4 * H, 4 * W, 3), dtype=np.uint8) if pictures else None
    inspection = inspect_tokens(random_tokens(*shape), **options)
    figure = draw(inspection, frames, name="$a_b$ [x].npz", credit="© someone")
    drawn: list[Text] = []
    draw_text = Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw_text(text, renderer)))
    canvas: Any = figure.canvas
    canvas.draw()
    width, height = canvas.get_width_height()
    assert width == 1500
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in drawn if text.get_text()]
    assert len(boxes) > 30
    assert [text for text, box in boxes if not _within(box, width, height)] == []
    assert [(one[0], other[0]) for one, other in combinations(boxes, 2) if _overlap(one[1], other[1])] == []

    panels = {each._suptitle.get_text()[0]: each for each in figure.findobj(SubFigure) if each._suptitle}
    assert list(panels) == ["a", "b", "c", "d", "e"]
    bars = {panel: [bar.get_ylabel() for axes in panels[panel].axes for bar in axes.child_axes] for panel in "ad"}
    assert bars == {"a": [inspection.norm_name], "d": ["× uniform"]}


def _within(box: Any, width: int, height: int) -> bool:
    return bool(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height)


def _overlap(one: Any, other: Any) -> bool:
    common = Bbox.intersection(one, other)
    return common is not None and min(common.width, common.height) > 1


def test_thumbnails_follow_the_tokens_gridding() -> None:
    tokens, frames, _ = load_fixture()
    inspection = inspect_tokens(torch.from_numpy(tokens))
    stages = module._thumbnails(inspection, frames)
    assert stages.shape[:2] == (4, 16)
    kept = [frame for frame in range(16) if frame not in inspection.plan.overwritten]
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


def imported(module: ModuleType) -> set[str]:
    """Last names of the modules that a module imports at run time, inside functions too."""
    names = set()
    pending: list[ast.AST] = [ast.parse(inspect.getsource(module))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[-1])
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            pending += ast.iter_child_nodes(node)
    return names


def test_imports_run_one_way() -> None:
    assert {"picture", "plan"} < imported(module)
    assert not {"inspection", "inspect_command"} & imported(module)
    assert not {"figure", "picture", "inspect_command"} & imported(inspection)
    assert {"figure", "inspection"} < imported(command)


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
    assert 1000 < height < 1500
    assert len(png) <= 1_000_000
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
    assert "64 of 64 windows" in text
    assert f"figure: {output}" in text
    assert _size(output.read_bytes())[0] == 1500
    with pytest.raises(FileExistsError):
        run_command(path, output)
    run_command(path, output, force=True)


def test_command_takes_the_first_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(command, "save_figure", lambda found, *_, **__: saved.append(found.stage_norms))
    x = random_tokens(2, 12, 4, 4, 8).numpy()
    np.save(tmp_path / "batch.npy", x)
    np.save(tmp_path / "packed.npy", x.reshape(24, 4, 4, 8)[:20])
    np.save(tmp_path / "single.npy", x[0])
    for name, options, which in (
        ("batch.npy", {}, ", video 1 of 2"),
        ("packed.npy", {"frame_counts": [12, 8]}, ", video 1 of 2"),
        ("packed.npy", {"frame_counts": [0, 12, 8]}, ", video 2 of 3"),
        ("single.npy", {}, ""),
    ):
        text = run_command(tmp_path / name, tmp_path / "out.png", options=options)
        assert text.splitlines()[0].strip() == f"{name}{which}"
        assert "(12, 4, 4, 8)" in text
    assert len(saved) == 4
    assert all((norms == saved[-1]).all() for norms in saved)


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
