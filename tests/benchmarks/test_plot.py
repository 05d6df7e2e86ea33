"""Pictures of results: which there are, what they show, and that none is overwritten."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.text
import pytest
from PIL import Image

from benchmarks import plot
from benchmarks.plot import draw_ratios, draw_times, save_plots
from benchmarks.results import BenchRow, Results
from tests.benchmarks.rows import RUN, make_row

pytestmark = pytest.mark.filterwarnings("error")

MS = {"copy": 11.0, "ceiling": 8.0, "read": 6.5, "norm_pool:cpu:out": 9.9, "norm_pool:cpu": 9.8, "avg_pool2d": 31.0,
      "grid_pool:cpu:out": 12.0, "llava_avg_pool": 376.0, "grid_pool:reference": 2500.0}  # fmt: skip
"""Times of 64 frames."""


def rows_of(frames: int = 64, **values: Any) -> list[BenchRow]:
    """All providers on a workload of some frames. Times and bytes go with the frames."""
    share = frames / 64
    moved = {"read_bytes": round(share * 305_600_000), "write_bytes": round(share * 77_500_000)}
    shape = {"shape": (frames, 27, 27, 3584)}
    return [make_row(provider, share * ms * 1e3, **moved, **shape, **values) for provider, ms in MS.items()]


@pytest.fixture(scope="module")
def results() -> Results:
    sweep = [rows_of(frames, workload=f"{frames}x27x27x3584", groups=("T-3584",)) for frames in (8, 16, 32)]
    wide = rows_of(workload="llava-video-7b-fp32", dtype="float32")
    odd = replace(RUN, device={"type": "cuda", "name": "A $very$ long name of a device " * 6})
    return Results(odd, list(itertools.chain(rows_of(groups=("main", "T-3584")), wide, *sweep)))


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_pictures_are_as_wide_as_a_page_and_never_overwritten(results: Results, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    assert save_plots(results, folder) == [folder / "time.png", folder / "ratios.png"]
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.size[0] == 1350
            assert 400 < picture.size[1] < 2000
    (folder / "ratios.png").write_bytes(b"mine")
    (folder / "time.png").unlink()
    with pytest.raises(FileExistsError, match=r"ratios\.png exists already; --force overwrites it"):
        save_plots(results, folder)
    assert [path.name for path in folder.iterdir()] == ["ratios.png"]  # nothing was written before it was noticed
    assert (folder / "ratios.png").read_bytes() == b"mine"
    assert len(save_plots(results, folder, force=True)) == 2


def test_pictures_without_data_are_left_out(tmp_path: Path) -> None:
    assert save_plots(Results(RUN, []), tmp_path) == []
    failed = [make_row("grid_pool:cpu", check="failed: out of memory"), make_row("copy", 9.0)]
    assert save_plots(Results(RUN, failed), tmp_path) == []
    one_point = rows_of(groups=("T-3584",))
    assert draw_times(Results(RUN, one_point)) is None
    assert draw_ratios(Results(RUN, one_point)) is None
    shapes = [replace(row, groups=("pooling",)) for row in one_point]
    assert draw_ratios(Results(RUN, shapes)) is not None


def test_times_and_lower_bounds(results: Results) -> None:
    figure = draw_times(results)
    assert figure is not None
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    ours = lines["norm_pool"]
    assert list(ours.get_xdata()) == [8, 16, 32, 64]
    assert list(ours.get_ydata()) == pytest.approx([9.8 / 8, 9.8 / 4, 9.8 / 2, 9.8])
    # grid_pool's bytes at the rate of the copy, which moves as many
    assert list(lines["lower bound at the rate of torch copy"].get_ydata()) == pytest.approx([11 / 8, 11 / 4, 5.5, 11])
    assert list(lines["lower bound at the rate of ceiling probe"].get_ydata()) == pytest.approx([1, 2, 4, 8])
    assert not {"torch copy", "read probe"} & set(lines)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[0] == "grid_pool, reference"  # in the order in which lines end
    assert names[-1] == "lower bound at the rate of ceiling probe"
    assert "frames of 27 × 27 × 3584 bfloat16" in texts(figure)


def test_ratios(results: Results) -> None:
    rows = [replace(row, note="pools to 14 × 14") if row.provider == "llava_avg_pool" else row for row in results.rows]
    figure = draw_ratios(Results(results.run, rows))
    assert figure is not None
    first, second = (axes for axes in figure.axes if axes.get_title(loc="left"))
    assert first.get_title(loc="left") == "llava-video-7b\n64×27×27×3584 bfloat16\n1 × = norm_pool, 9.80 ms"
    assert "float32" in second.get_title(loc="left")
    found = texts(figure)
    for ratio in (" 1.00", " 3.16", " 0.82", " 38.4 *"):  # 31, 8 and 376 over 9.8
        assert ratio in found
    assert "read probe" not in found
    widths = sorted(bar.get_x() + bar.get_width() for bar in first.patches if bar.get_x() == 1)
    assert (widths[0], widths[-1]) == (pytest.approx(8 / 9.8), pytest.approx(2500 / 9.8))


@pytest.mark.parametrize("draw", plot.PICTURES.values(), ids=plot.PICTURES)
def test_all_texts_are_within_the_picture(results: Results, draw: Any) -> None:
    """The machine and the versions are among them."""
    figure = draw(results)
    assert any("torch 2.13.0" in text for text in texts(figure))
    figure.canvas.draw()
    for text in figure.texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text


def test_providers_look_different() -> None:
    """The kernels of one device, and everything else that is timed there."""
    others = [
        "llava_avg_pool", "llava_bilinear_pool", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "naive_norm_pool",
        "naive_grid_pool", "compiled_grid_pool", "compiled_grid_pool:max-autotune", "grid_pool:reference",
        "norm_pool:reference",
    ]  # fmt: skip
    for ours in (["triton", "cuda"], ["cpu", "cpu:out"]):
        providers = [f"{op}:{backend}" for op in ("grid_pool", "norm_pool") for backend in ours] + others
        assert len({str(plot.style_of(provider)) for provider in providers}) == len(providers)
