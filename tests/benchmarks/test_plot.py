"""Pictures of results: which there are, what they say, where marks are, and what is never overwritten."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
import matplotlib.text
from PIL import Image

from benchmarks import plot
from benchmarks.plot import save_plots, sheets
from benchmarks.results import Results, Row
from tests.benchmarks.rows import RUN, make_row

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ["time.png", "roofline.png", "ratios.png", "memory.png"]
SECONDS = {
    "copy": 11e-3, "ceiling": 8e-3, "read": 6.5e-3, "norm_pool:cpu:out": 9.9e-3, "norm_pool:cpu": 9.8e-3,
    "grid_pool:cpu:out": 12e-3, "grid_pool:cpu": 29e-3, "avg_pool2d": 31e-3, "llava_avg_pool": 376e-3,
    "naive_norm_pool": 1.257, "naive_grid_pool": 1.673, "grid_pool:reference": 2.5,
}  # fmt: skip
"""Of 64 frames of 27 × 27 × 3584 in bfloat16."""


def rows_of(frames: int = 64, **values: Any) -> list[Row]:
    """All providers on a workload of so many frames; times and bytes go with the frames."""
    share = frames / 64
    facts = {"shape": (frames, 27, 27, 3584), "input_bytes": round(share * 334_430_208)} | values
    rows = []
    for provider, seconds in SECONDS.items():
        read, write = round(share * 305_600_000), round(share * 77_500_000)
        row = make_row(provider, share * seconds * 1e6, read_bytes=read, write_bytes=write, **facts)
        row.gb_per_s = (read + write) / (share * seconds) / 1e9
        if row.op:
            row.flops, row.percent_of_ceiling = share * 6e8, 100 * SECONDS["ceiling"] / seconds
            row.extra_peak_bytes = round(0.12 * row.input_bytes) if "grid_pool" in provider else 0
        rows.append(row)
    return rows


def results_of(*parts: list[Row], **run: Any) -> Results:
    return Results(replace(RUN, peaks={"fp32_gflops": 160.0}, **run), list(itertools.chain(*parts)))


@pytest.fixture(scope="module")
def results() -> Results:
    sweep = [rows_of(frames, workload=f"{frames}x27x27x3584", groups=("T-3584",)) for frames in (8, 16, 32)]
    wide = rows_of(workload="llava-video-7b-fp32", dtype="float32", input_bytes=668_860_416)
    return results_of(rows_of(groups=("main", "T-3584")), wide, *sweep, settings={"quick": True})


@pytest.fixture(scope="module")
def folder(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots") / "made" / "here"
    assert save_plots(results, folder, force=False) == [folder / name for name in NAMES]
    return folder


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


# ---- files ----


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_as_wide_as_a_page(folder: Path, name: str) -> None:
    with Image.open(folder / name) as picture:
        width, height = picture.size
        assert width == 1350
        assert 400 < height < 2000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert (folder / name).stat().st_size < 500_000


def test_existing_pictures_are_kept(results: Results, tmp_path: Path) -> None:
    (tmp_path / "memory.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"memory\.png"):
        save_plots(results, tmp_path, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.png"]  # nothing was written before it was noticed
    assert (tmp_path / "memory.png").read_bytes() == b"mine"


def test_existing_pictures_are_replaced_by_force(tmp_path: Path) -> None:
    (tmp_path / "memory.png").write_bytes(b"mine")
    (tmp_path / "time.png").write_bytes(b"of another run")  # for which there is nothing here
    only_memory = [make_row("norm_pool:cpu", 9.0, extra_peak_bytes=0)]
    assert save_plots(results_of(only_memory), tmp_path, force=True) == [tmp_path / "memory.png"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "time.png").read_bytes() == b"of another run"


def test_pictures_without_data_are_left_out(tmp_path: Path) -> None:
    assert save_plots(results_of(), tmp_path / "none", force=False) == []
    assert not (tmp_path / "none").exists()
    failed = [make_row("grid_pool:cpu", check="failed: out of memory"), make_row("copy", 9.0)]
    assert list(sheets(results_of(failed))) == []
    # one number of frames is no sweep
    assert list(sheets(results_of(rows_of(groups=("T-3584",))))) == []
    assert list(sheets(results_of(rows_of(8, groups=("T-3584",)), rows_of(groups=("T-3584",))))) == ["time.png"]
    assert list(sheets(results_of(rows_of()))) == NAMES[1:]
    unmeasured = [replace(row, extra_peak_bytes=None, flops=None) for row in rows_of()]
    assert list(sheets(results_of(unmeasured))) == ["ratios.png"]


def test_missing_matplotlib_is_named() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from benchmarks.plot import save_plots\n"
        "try: save_plots(None, Path('x'), False)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "needs matplotlib" in done.stdout


# ---- contents ----


@pytest.mark.parametrize("name", NAMES)
def test_pictures_say_where_and_when(results: Results, name: str) -> None:
    line = "Some CPU, 4 cores, 1 thread, avx512, torch 2.13.0, 2026-11-22, commit 7cc5a8a, quick"
    assert line in texts(sheets(results)[name].figure())


def test_times_and_lower_bounds(results: Results) -> None:
    figure = sheets(results)["time.png"].figure()
    (axes,) = figure.axes
    lines = {line.get_linestyle() + line.get_color(): line for line in axes.lines}
    ours = lines["-" + plot._COLOURS["norm_pool"]]
    assert list(ours.get_xdata()) == [8, 16, 32, 64]
    assert list(ours.get_ydata()) == pytest.approx([9.9 / 8, 9.9 / 4, 9.9 / 2, 9.9])
    # grid_pool's bytes at the rate of the copy, which moves as many
    assert list(lines["-." + plot._COLOURS["copy"]].get_ydata()) == pytest.approx([11 / 8, 11 / 4, 11 / 2, 11])
    assert list(lines[":" + plot._COLOURS["ceiling"]].get_ydata()) == pytest.approx([1, 2, 4, 8])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.99 * 9.9 / 8, 1.02 * 9.9))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    found = texts(figure)
    assert "frames of 27 × 27 tokens of 3584 channels, bfloat16" in found
    assert {"norm_pool, out=", "lower bound at copy's rate", "lower bound at ceiling's rate"} <= set(found)
    assert not {"torch copy", "read probe"} & set(found)


def test_roofs_and_points(results: Results) -> None:
    figure = sheets(results)["roofline.png"].figure()
    first, second = figure.axes
    points = {
        line.get_marker() + str(line.get_markerfacecolor()): line for line in first.lines if len(line.get_xdata()) == 1
    }
    (x,), (y,) = points["o" + plot._COLOURS["norm_pool"]].get_data()
    assert x == pytest.approx(6e8 / 383_100_000)
    assert y == pytest.approx(6e8 / 9.8e-3 / 1e9)
    roofs = [line for line in first.lines if len(line.get_xdata()) == 2]
    rates = [line.get_ydata()[0] / line.get_xdata()[0] for line in roofs]
    assert rates[:2] == pytest.approx([383.1 / 11, 383.1 / 8])
    assert list(roofs[2].get_ydata()) == [160, 160]
    assert roofs[1].get_xdata()[1] == roofs[2].get_xdata()[0] == pytest.approx(160 / (383.1 / 8))
    found = texts(figure)
    assert {"norm_pool  82 %", "llava-video-7b: 64 × 27 × 27 × 3584 bfloat16", "fp32: 160 GFLOP/s"} <= set(found)
    assert "llava-video-7b-fp32: 64 × 27 × 27 × 3584 float32" in found  # as wide a value as none before
    assert any("Counted alike for every contender" in text for text in found)
    assert second.get_xlabel() == "useful FLOP per byte that must be moved"


def test_roofline_without_a_peak_or_a_ceiling() -> None:
    rows = [
        replace(row, percent_of_ceiling=None, percent_of_copy=50.0) for row in rows_of() if row.provider != "ceiling"
    ]
    found = texts(sheets(Results(RUN, rows))["roofline.png"].figure())
    assert "torch's copy: 34.8 GB/s" in found
    assert "% of torch's copy" in found
    assert not [text for text in found if "fp32:" in text or "ceiling probe" in text]


def test_ratios(results: Results) -> None:
    noted = [
        replace(row, note="pools to 13 × 13") if row.provider == "naive_norm_pool" else row for row in results.rows
    ]
    skipped = [
        replace(row, check="skipped: slow", p50_us=None)
        if (row.workload, row.provider) == ("llava-video-7b-fp32", "grid_pool:reference")
        else row
        for row in noted
    ]
    figure = sheets(Results(results.run, skipped))["ratios.png"].figure()
    found = texts(figure)
    # 31 / 9.8, 8 / 9.8 and 1257 / 9.8
    for text in ("1.00 ×", "3.16 ×", "0.82 ×", "128 × *", "skipped"):
        assert text in found
    assert "64×27×27×3584 bfloat16\n1 × = norm_pool, 9.80 ms" in found
    assert "read probe" not in found
    assert found.index("ceiling probe") < found.index("norm_pool") < found.index("torch copy")
    (_, panel, *_) = figure.axes
    widths = sorted(bar.get_x() + bar.get_width() for bar in panel.patches if bar.get_x() == 1)
    assert widths[0] == pytest.approx(8 / 9.8)
    assert widths[-1] == pytest.approx(2500 / 9.8)


def test_memory() -> None:
    rows = rows_of()
    rows += [make_row("max_pool2d", 9.0, input_bytes=1000, extra_peak_bytes=5006)]
    rows += [make_row("adaptive_avg_pool2d", 9.0, extra_peak_bytes=None)]
    found = texts(sheets(results_of(rows))["memory.png"].figure())
    assert {"0", "12", "501"} <= set(found)
    assert "max_pool2d" in found
    assert not {"adaptive_avg_pool2d", "torch copy", "ceiling probe"} & set(found)


@pytest.mark.parametrize("name", NAMES)
def test_all_texts_are_within_the_picture(results: Results, name: str) -> None:
    odd = replace(results.run, device={"type": "cuda", "name": "A $very$ long name of a device " * 6})
    figure = sheets(Results(odd, results.rows))[name].figure()
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    page = figure.bbox
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_text() and text.get_visible() and text.axes is None:
            box = text.get_window_extent(renderer)
            assert page.x0 <= box.x0, text
            assert box.x1 <= page.x1, text
            assert page.y0 <= box.y0, text
            assert box.y1 <= page.y1, text
        elif isinstance(text, matplotlib.text.Annotation):
            assert text.get_window_extent(renderer).x1 <= page.x1, text


# ---- small helpers ----


@pytest.mark.parametrize(
    ("wanted", "gap", "places"),
    [
        ([0.5], 0.1, [0.5]),
        ([0.2, 0.7], 0.1, [0.2, 0.7]),
        ([0.5, 0.5], 0.1, [0.45, 0.55]),
        ([0.5, 0.52, 0.9], 0.1, [0.46, 0.56, 0.9]),
        ([0.0, 0.0, 0.05], 0.1, [0.0, 0.1, 0.2]),
        ([0.99, 1.0], 0.1, [0.9, 1.0]),
        ([0.4, 0.5, 0.6], 0.9, [0.0, 0.5, 1.0]),
    ],
)
def test_labels_keep_their_distance(wanted: list[float], gap: float, places: list[float]) -> None:
    assert plot._spread(wanted, gap) == pytest.approx(places)


def test_spread_is_the_nearest_that_keeps_the_gap() -> None:
    """Against all places on a grid."""
    wanted, gap, grid = [0.3, 0.32, 0.35, 0.8], 0.1, [i / 50 for i in range(51)]

    def distance(places: Any) -> float:
        return math.fsum((a - b) ** 2 for a, b in zip(places, wanted, strict=True))

    allowed = (
        places
        for places in itertools.combinations(grid, 4)
        if all(b - a > gap - 1e-9 for a, b in itertools.pairwise(places))
    )
    found = plot._spread(wanted, gap)
    assert all(b - a > gap - 1e-9 for a, b in itertools.pairwise(found))
    assert distance(found) <= min(map(distance, allowed)) + 1e-12


def test_providers_look_different() -> None:
    """The kernels of one device, and all else that is timed there."""
    others = [
        "llava_avg_pool", "llava_bilinear_pool", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "naive_norm_pool",
        "naive_grid_pool", "compiled_grid_pool", "compiled_grid_pool:max-autotune", "grid_pool:reference",
        "norm_pool:reference", "copy", "ceiling",
    ]  # fmt: skip
    for ours in (["triton", "cuda"], ["cpu", "cpu:out"]):
        providers = [f"{op}:{backend}" for op in ("grid_pool", "norm_pool") for backend in ours] + others
        assert len({plot._style(provider) for provider in providers}) == len(providers)
