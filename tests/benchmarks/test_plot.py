"""Pictures show the times of results, and none is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.text
import pytest

from benchmarks.plot import draw_ratios, draw_times, save_plots
from benchmarks.results import BenchRow, Results
from tests.benchmarks.rows import RUN, make_row

pytestmark = pytest.mark.filterwarnings("error")

MS = {"copy": 11.0, "ceiling": 8.0, "read": 6.5, "norm_pool:cpu:out": 9.9, "norm_pool:cpu": 9.8, "avg_pool2d": 31.0,
      "grid_pool:cpu:out": 12.0, "llava_avg_pool": 376.0}  # fmt: skip
"""The time in ms of each provider on 64 frames."""


def rows_of(frames: int, **values: Any) -> list[BenchRow]:
    """Return rows of all providers on so many frames, with times and bytes that go with the frames."""
    share = frames / 64
    moved = {"read_bytes": round(share * 305_600_000), "write_bytes": round(share * 77_500_000)}
    values = {"workload": f"{frames}x27x27x3584", "shape": (frames, 27, 27, 3584), "groups": ("T-3584",)} | values
    return [make_row(provider, share * ms * 1e3, **moved, **values) for provider, ms in MS.items()]


GROUPS = ("main", "T-3584")
ALONE = [make_row(name, 5e5, workload="64x27x27x3584", groups=GROUPS) for name in ("max_pool2d", "compiled_grid_pool")]
RESULTS = Results(RUN, [*ALONE, *rows_of(64, groups=GROUPS), *rows_of(8), *rows_of(16)])


def test_pictures_are_never_overwritten(tmp_path: Path) -> None:
    """A picture that there are no data for is left out, and one that is there is noticed before anything is written."""
    failed = [make_row("grid_pool:cpu", check="failed: out of memory"), make_row("copy", 9.0)]
    assert save_plots(Results(RUN, failed), tmp_path) == []
    folder = tmp_path / "made" / "here"
    assert save_plots(Results(RUN, rows_of(64, groups=("pooling",))), folder) == [folder / "ratios.png"]
    (folder / "ratios.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"ratios\.png exists already; --force overwrites it"):
        save_plots(RESULTS, folder)
    assert [path.read_bytes() for path in folder.iterdir()] == [b"mine"]
    assert save_plots(RESULTS, folder, force=True) == [folder / "time.png", folder / "ratios.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_times_and_lower_bounds_are_drawn() -> None:
    figure: Any = draw_times(RESULTS)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["norm_pool"] == pytest.approx([9.8 / 8, 9.8 / 4, 9.8])
    assert lines["lower bound at the rate of ceiling probe"] == pytest.approx([1, 2, 8])
    assert lines["avg_pool2d"] == pytest.approx([31 / 8, 31 / 4, 31])
    left_out = {"max_pool2d", "torch.compile grid_pool", "lower bound at the rate of read probe"}
    assert not left_out & lines.keys()  # tables have what the ops do not stand in for; one time makes no line


def test_ratios_to_the_fastest_kernel_are_drawn() -> None:
    figure: Any = draw_ratios(RESULTS)
    found = {text.get_text() for text in figure.findobj(matplotlib.text.Text)}
    assert {" 1.00", " 3.16", " 0.82", " 38.4"} <= found  # 9.8, 31, 8 and 376 over 9.8
    assert any("torch 2.13.0" in text for text in found)
    assert "torch.compile grid_pool" in found
    assert "max_pool2d" not in found


def test_fresh_results_are_paler() -> None:
    figure: Any = draw_ratios(RESULTS)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    alphas = {names[round(bar.get_y() + 0.33)]: bar.get_alpha() for bar in axes.patches if bar.get_height() < 0.7}
    assert (alphas["norm_pool, out="], alphas["norm_pool"], alphas["avg_pool2d"]) == (1.0, 0.5, 1.0)


def test_at_most_eight_workloads_are_drawn() -> None:
    many = [row for frames in range(1, 11) for row in rows_of(frames, groups=("main",))]
    figure: Any = draw_ratios(Results(RUN, many))
    assert len(figure.axes) == 8
