"""Inspection finds the numbers of windows worked out by hand and of the ops, and draws them."""

from __future__ import annotations

import io
import math
import os
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from stgridpool_kernels import grid_plan, norm_pool, temporal_grid, token_norm
from stgridpool_kernels.cli import figure as module
from stgridpool_kernels.cli import inspect as command
from stgridpool_kernels.cli.figure import draw
from stgridpool_kernels.cli.inspection import inspect_tokens
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.io.data import load_fixture
from stgridpool_kernels.io.token_files import write_tokens
from tests.support.cases import tokens as random_tokens

NO_GRIDDING: dict[str, Any] = {"frame_strides": ()}


def of_norms(norms: Any, channels: int = 4) -> Tensor:
    """Return tokens (T, H, W, C) whose RMS is the given (T, H, W)."""
    return torch.as_tensor(norms, dtype=torch.float64)[..., None].expand(*np.shape(norms), channels).contiguous()


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
    """Five windows have one token that stands out by k each: its weight is e^k / (e^k + 3)."""
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
    one = temporal_grid(x, frame_strides=(2,), grid_shape=(2, 2))
    two = temporal_grid(x, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3))
    for norms, stage, tokens in zip(found.stage_norms, found.stages(x), (x, one, two), strict=True):
        np.testing.assert_array_equal(norms, token_norm(tokens, norm_type=3.0, normalize_norm=False).numpy())
        assert torch.equal(stage, tokens)
    assert found.plan == grid_plan((32,), 5, 6, frame_strides=(2, 4), grid_shape=(2, 2, 1, 3))
    assert found.pooled_shape == (32, 2, 3, 8)
    # windows are taken where the op takes them, after temporal gridding
    gridded = inspect_tokens(two, **NO_GRIDDING, norm_type=3.0, normalize_norm=False)
    np.testing.assert_array_equal(found.spread, gridded.spread)
    assert found.target_temperature == gridded.target_temperature


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "count_include_pad": False, "temperature": -1.5},
        {"kernel_size": (2, 3), "stride": (1, 2), "ceil_mode": True},
        {"output_size": (3, 4)},
    ],
    ids=str,
)
def test_weights_are_those_norm_pool_applies(options: dict[str, Any]) -> None:
    """Each token has a channel of its own, so that channel i of an output is the norm of token i times its weight."""
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


@pytest.mark.parametrize(
    ("options", "scale", "dtype"),
    [
        ({}, 1e-3, torch.bfloat16),
        ({"kernel_size": 3}, 1.0, torch.float16),
        ({"kernel_size": (1, 2)}, 40.0, torch.float32),
        ({"temperature": -1.0, "ceil_mode": True}, 1.0, torch.float64),
    ],
    ids=str,
)
def test_solved_temperature_gives_the_target(options: dict[str, Any], scale: float, dtype: torch.dtype) -> None:
    """The input is left as it was, and takes no gradient."""
    x = (scale * random_tokens(16, 9, 9, 16)).to(dtype).requires_grad_()
    before = x.detach().clone()
    found = inspect_tokens(x, **options)
    solved = found.target_temperature
    assert solved is not None
    assert (solved < 0) == (options.get("temperature", 1) < 0)
    again = inspect_tokens(x, **{**options, "temperature": solved})
    assert np.quantile(again.largest_weights[solved], 0.95) == pytest.approx(found.target_weight, rel=1e-4)
    assert found.target_weight == (0.75 if options.get("kernel_size") == (1, 2) else 0.5)
    assert f"in 5 % of the windows takes a temperature near {solved:.2g}." in found.advice
    assert f"torch.{found.dtype}" == str(dtype)
    assert torch.equal(x.detach(), before)
    assert x.grad is None


# ---- advice and degenerate inputs ----


@pytest.mark.parametrize(
    ("temperature", "verdict"),
    [(0.01, "close to average"), (2, "between average pooling and"), (50, "close to keeping one token")],
)
def test_verdict_follows_the_temperature(temperature: float, verdict: str) -> None:
    assert f": {verdict}" in inspect_tokens(random_tokens(8, 6, 6, 16), temperature=temperature).advice


def test_ties_have_no_temperature() -> None:
    """Where two of four tie at the largest norm, half of the weight is reached in the limit."""
    found = inspect_tokens(of_norms(np.tile([[1.0, 1.0], [2.0, 2.0]], (4, 3, 3))), kernel_size=2)
    assert found.target_temperature is not None
    found = inspect_tokens(of_norms(np.tile([[1.0, 2.0], [2.0, 2.0]], (4, 3, 3))), kernel_size=2)
    assert found.target_temperature is None
    assert found.advice.endswith("No temperature lifts the largest weight to 0.50 in 5 % of the windows: norms tie.")


def test_degenerate_inputs_say_so() -> None:
    some_nan, ones = random_tokens(16, 6, 6, 4), torch.ones(16, 6, 6, 4)
    some_nan[3, 2, 2, 0], some_nan[4, 0, 0, 1] = math.nan, math.inf
    for x, options, words in (
        (0 * ones, {"kernel_size": 3, "padding": 1}, "All token norms are zero"),
        (ones, {}, "The norms inside every window are equal"),
        (math.inf * ones, {}, "No window is free of NaN"),
        (some_nan, {}, "2 of 576, are left out with their windows."),
        (random_tokens(1, 1, 1, 4), {"ceil_mode": True}, "A window holds one token"),
    ):
        assert words in inspect_tokens(x, **options).advice


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
        (
            torch.zeros(4, 4, 4, 4),
            {"frame_counts": [2, 2]},
            TypeError,
            "must be among .*, got frame_counts=",
        ),
        (torch.zeros(4, 4, 4, 4), {"temperature": math.nan}, ValueError, "temperature must be finite"),
        (torch.zeros(4, 1, 1, 4), {}, ValueError, "leaves no window"),
        (torch.zeros(4, 4, 4, 4), {"backend": "abacus"}, ValueError, "backend must be one of"),
    ],
)
def test_refusals(x: Tensor, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        inspect_tokens(x, **options)


# ---- what is drawn ----


def joins(lines: list[Any]) -> list[tuple[int, ...]]:
    """Return (level that reads, counted from 0; source; target) of every line of a diagram."""
    return sorted((round(line.get_ydata()[0]), *map(int, line.get_xdata())) for line in lines)


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (16, {}),
        (50, {"frame_strides": (3, 7), "grid_shape": (1, 2, 2, 1)}),
        (12, NO_GRIDDING),
        (200, {"frame_strides": (3, 40)}),
    ],
    ids=str,
)
def test_diagram_is_the_plans(frames: int, options: dict[str, Any]) -> None:
    """Lines run from sources to targets, with a dot if the source is a summary; boxes have the colour of their level.

    Of a long video the first 64 frames are drawn, and no summary that reads a later one.
    """
    inspection = inspect_tokens(random_tokens(frames, 2, 2, 4), **options)
    panel = Figure().subfigures()
    module._draw_diagram(panel, inspection)
    (axes,) = panel.axes
    colours = [dict.fromkeys(range(min(frames, 64)), module._UNTOUCHED)]
    expected, nested = [], []
    for number, level in enumerate(inspection.plan.levels):
        groups = [(t, s) for t, s in zip(level.targets, level.sources, strict=True) if max(t, *s) < 64]
        read = [(number, s, t) for t, sources in groups for s in sources]
        expected += read
        nested += [join for join in read if colours[-1][join[1]] != module._UNTOUCHED]
        colours.append(colours[-1] | {target: module._LEVEL_COLOURS[number] for target, _ in groups})
    assert joins(axes.lines) == sorted(expected)
    assert joins([line for line in axes.lines if line.get_marker() == "o"]) == sorted(nested)
    lanes = [[to_hex(colour).upper() for colour in boxes.get_facecolor()] for boxes in axes.collections]
    assert lanes == [[colour.upper() for colour in lane.values()] for lane in colours]
    if options == {}:
        assert joins(axes.lines)[-4:] == [(1, 3, 15), (1, 7, 15), (1, 11, 15), (1, 15, 15)]


FIGURES: dict[str, tuple[Tensor, dict[str, Any], bool]] = {
    "long": (random_tokens(100, 6, 6, 8), {"frame_strides": (2, 4, 30), "grid_shape": (3, 3, 2, 2, 1, 3)}, True),
    "one token": (random_tokens(1, 1, 1, 8), {"kernel_size": 1}, True),
    "tall": (random_tokens(16, 20, 4, 8), {"output_size": (4, 3), "resize": "bilinear", "norm_type": math.inf}, False),
    "no number": (torch.full((8, 6, 6, 4), math.nan), {"temperature": -2.0}, False),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("x", "options", "pictures"), FIGURES.values(), ids=FIGURES)
def test_figures_draw_without_a_warning(
    x: Tensor, options: dict[str, Any], pictures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text is cut by the page or overlaps another, and wherever colours mean numbers there is a colour bar.

    The global state of matplotlib is left alone.
    """
    T, H, W, _ = x.shape
    frames = np.random.default_rng(0).integers(0, 256, (T, 4 * H, 4 * W, 3), dtype=np.uint8) if pictures else None
    inspection = inspect_tokens(x, **options)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    before = matplotlib.rcParams.copy()
    figure = draw(inspection, frames, name="$a_b$ [x].npz", credit="© someone")
    drawn: list[Text] = []
    draw_text = Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw_text(text, renderer)))
    canvas: Any = figure.canvas
    canvas.draw()
    # reading rcParams["backend"] would choose one
    assert [key for key in before if key != "backend" and before[key] != matplotlib.rcParams[key]] == []
    width, height = canvas.get_width_height()
    seen = [text for text in drawn if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in seen]
    assert len(boxes) > 30
    assert [text for text, b in boxes if min(b.x0, b.y0) < 0 or b.x1 > width or b.y1 > height] == []
    inner = [(text, box.padded(-0.5)) for text, box in boxes]  # an overlap of one pixel is none
    assert [(one[0], other[0]) for one, other in combinations(inner, 2) if one[1].overlaps(other[1])] == []

    panels = {each._suptitle.get_text()[0]: each for each in figure.findobj(SubFigure) if each._suptitle}
    assert list(panels) == ["a", "b", "c", "d", "e"]
    bars = {panel: [bar.get_ylabel() for axes in panels[panel].axes for bar in axes.child_axes] for panel in "ad"}
    assert bars == {"a": [inspection.norm_name], "d": ["× uniform"]}


def test_thumbnails_follow_the_tokens_gridding() -> None:
    tokens, frames, _ = load_fixture()
    inspection = inspect_tokens(torch.from_numpy(tokens))
    stages = module._thumbnails(inspection, frames)
    assert stages.shape[:2] == (4, 16)
    expected = temporal_grid(torch.from_numpy(stages[0]).float())
    assert np.abs(stages[-1] - expected.numpy()).max() <= 0.5


def test_frames_that_do_not_go_with_the_tokens() -> None:
    inspection = inspect_tokens(random_tokens(16, 4, 4, 4))
    for frames, words in (
        (np.zeros((16, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((16, 8, 8), np.uint8), "\\(T, h, w, 3\\)"),
        (np.zeros((4, 8, 8, 3), np.uint8), "each of the 16 token frames, got 4"),
    ):
        with pytest.raises(ValueError, match=words):
            draw(inspection, frames)


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "stgridpool_kernels\[demo\]"'):
        draw(inspect_tokens(random_tokens(8, 4, 4, 4)))


# ---- the command ----


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("_here")
def test_a_file_is_measured_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    tokens, _, _ = load_fixture()
    np.save("[bold]x.npy", tokens)
    inspected = ["inspect", "[bold]x.npy", "-o", "out.png", "--temperature", "3", "--backend", "reference"]
    Path("out.png").write_bytes(b"mine")
    assert main(inspected) == 1
    assert "out.png: exists already" in capsys.readouterr().err
    assert Path("out.png").read_bytes() == b"mine"
    assert main([*inspected, "--force"]) == 0
    text = capsys.readouterr().out
    for said in ("[bold]x.npy", "2 of 16", "largest weight at 3", "At temperature 3 the largest weight"):
        assert said in text
    assert "figure: out.png" in text
    png = Path("out.png").read_bytes()
    with Image.open(io.BytesIO(png)) as picture:
        assert (picture.format, picture.size[0]) == ("PNG", 1500)
    assert len(png) <= 1_000_000
    assert sorted(path.name for path in Path().iterdir()) == ["[bold]x.npy", "out.png"]


@pytest.mark.usefixtures("_here")
def test_without_a_name_for_it_nothing_is_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers and advice need no matplotlib, which an installation without the extra `demo` lacks."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    np.save("x.npy", load_fixture()[0])
    assert main(["inspect", "x.npy"]) == 0
    text = capsys.readouterr().out
    assert "At temperature 1 the largest weight" in text
    assert "figure" not in text
    assert [path.name for path in Path().iterdir()] == ["x.npy"]
    assert main(["inspect", "x.npy", "-o", "x.png"]) == 1
    assert "the figure needs matplotlib" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_names_that_are_not_utf_8_are_drawn_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_tokens(f"{name}.safetensors", random_tokens(8, 4, 4, 8), force=False)
    assert main(["inspect", f"{name}.safetensors", "-o", f"{name}.png"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].strip() == "caf\\udce9.safetensors"
    assert "figure: caf\\udce9.png" in text
    assert Path(f"{name}.png").stat().st_size


@pytest.mark.usefixtures("_here")
def test_the_first_video_is_inspected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = []
    monkeypatch.setattr(command, "save_figure", lambda found, *_, **__: saved.append(found.stage_norms))
    x = random_tokens(2, 12, 4, 4, 8).numpy()
    np.save("batch.npy", x)
    np.save("packed.npy", x.reshape(24, 4, 4, 8)[:20])
    for name, counts, which in (
        ("batch.npy", [], ", video 1 of 2"),
        ("packed.npy", ["--frame-counts", "12,8"], ", video 1 of 2"),
        ("packed.npy", ["--frame-counts", "0,12,8"], ", video 2 of 3"),
    ):
        assert main(["inspect", name, "-o", "out.png", *counts]) == 0
        text = capsys.readouterr().out
        assert text.splitlines()[0].strip() == f"{name}{which}"
        assert "(12, 4, 4, 8)" in text
    assert len(saved) == 3
    assert all((norms == saved[-1]).all() for norms in saved)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("x", "arguments", "words"),
    [
        (np.zeros((4, 4, 4, 4), np.float32), ["--frame-counts", "2,3"], "frame_counts must pack the frames"),
        (np.zeros((0, 4, 4, 4), np.float32), [], "one video of at least one frame is inspected"),
        (np.zeros((4, 4, 4, 4), np.int64), [], "tokens are bfloat16, float16, float32 or float64, got int64"),
        (np.zeros((4, 4, 4, 4), np.float32), ["-o", "out.jpg"], "the figure is a PNG: give a name that ends in .png"),
        (np.zeros((4, 4, 4, 4), np.float32), ["-o", "x.npy", "--force"], "x.npy: is the input"),
        (np.zeros((4, 4, 4, 4), np.float32), ["--padding", "9"], "padding must be"),
    ],
)
def test_refusals_leave_no_file(
    x: np.ndarray, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("x.npy", x)
    assert main(["inspect", "x.npy", "-o", "out.png", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("stgp inspect: ")
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["x.npy"]
