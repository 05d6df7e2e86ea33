"""The requests of the kernels are those counted by hand, and no token is loaded that no result depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.lower_bound import tokens_read
from benchmarks.workloads import WORKLOADS
from stgridpool_kernels import grid_plan

pytest.importorskip("triton", reason="no Triton")
from stgridpool_kernels.backends.triton_kernels import config
from tools import traffic
from tools.traffic import Counts, count_launches, loads_without_carrying

pytestmark = pytest.mark.needs("interpreter")


def test_even_frames() -> None:
    """Of 8 frames of 8 × 8 four are shrunk to 4 × 4 cells, all of which the summary in frame 7 has."""
    assert count_launches(grid_plan([8], 8, 8)) == [
        Counts(
            programs=4 * 16,  # one a window
            x_loads=4 * 64,  # each token once
            out_stores=3 * 16,
            cell_stores=4 * 16,
            table_loads=4 * 16 * 5,  # five numbers for a walk, here of one step
        ),
        Counts(programs=4 * 16, x_loads=4 * 64, out_stores=4 * 16, table_loads=4 * 16),  # one number for a window
        # a mosaic takes no number of its node, and four slots for a window
        Counts(programs=16, cell_loads=64, out_stores=16, table_loads=16 * (4 + 4)),
    ]


def test_odd_frames() -> None:
    """In frames of 9 × 9 cells overlap, and the last row and column of a summary is pooled into nothing."""
    walked = 81 + 70 + 70 + 36  # windows of frames 1, 3, 5 and 7, of which 5×5, 5×3, 3×5 and 3×3 cells are needed
    above = 4 * 9 + 4 * 6 + 2 * 9 + 2 * 6  # the row above these, which the walk above reads too
    # a walk is one cell, for so few; the column to the left of all but the first of 5, 3, 5 and 3 cells in a row, which
    # has 2 tokens in the first row, 3 in others, and 2 in the fifth
    beside = (13 * 4) + (13 * 2) + (8 * 4) + (8 * 2)
    windows = Counts(programs=4 * 16, x_loads=4 * 64, out_stores=4 * 16, table_loads=4 * 16)
    assert count_launches(grid_plan([8], 9, 9)) == [
        Counts(
            programs=4 * 25,
            x_loads=walked + above + beside,
            x_again=above + beside,
            out_stores=3 * 16,
            cell_stores=25 + 15 + 15 + 9,
            table_loads=4 * 25 * 5,
        ),
        windows,
        # 16 of the 25 pool a window and ask for the slots of a row above, too, which has no live cells; so do all that
        # are not the first of a row for those of a column to the left
        Counts(programs=25, cell_loads=64, out_stores=16, table_loads=25 * 4 + 16 * (4 + 2) + 20 * 3),
    ]


def test_walks_are_those_of_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for 8192 channels have 16 warps, one of which fits on a multiprocessor; there are 10 of these here.

    The 20 rows of 4 frames are walked as a whole, and the 25 cells of a summary three or two at a time.
    """
    monkeypatch.setitem(config.MULTIPROCESSORS, traffic.H100, 10)
    shrunk, _, mosaics = count_launches(grid_plan([8], 9, 9), channels=8192)
    assert (shrunk.programs, mosaics.programs) == (20, 10)
    assert shrunk.x_loads - shrunk.x_again == 81 + 70 + 70 + 36
    assert shrunk.x_again == 4 * 9 + 4 * 6 + 2 * 9 + 2 * 6  # the row above


def test_without_summaries() -> None:
    """Without summaries every token of a window is loaded once and, without levels, no table."""
    once = Counts(programs=12, x_loads=48, out_stores=12)
    assert count_launches(grid_plan([3], 5, 4)) == [replace(once, table_loads=12)]
    assert count_launches(grid_plan([3], 5, 4, frame_strides=())) == [once]


@pytest.mark.parametrize(
    ("counts", "H", "W", "arguments"),
    [([17], 7, 5, {}), ([4, 9], 6, 5, {"frame_strides": (1, 2)}), ([32], 1, 3, {"ceil_mode": True})],
    ids=str,
)
def test_no_more_of_x_is_loaded_than_the_result_depends_on(
    counts: list[int], H: int, W: int, arguments: dict[str, Any]
) -> None:
    """Each window is stored once."""
    plan = grid_plan(counts, H, W, **arguments)
    found = sum(count_launches(plan), Counts())
    assert found.x_loads - found.x_again == tokens_read(plan).sum()
    assert found.out_stores == sum(counts) * plan.pooled_size[0] * plan.pooled_size[1]


def test_loads_without_carrying() -> None:
    """Of 9 tokens in a row the 5 cells have 2, 3, 3, 3 and 2 each, and the first three have 8 together.

    Frames 3 and 5 lack a column or a row of cells, so that 4 programs there load windows of 4 tokens.
    """
    assert loads_without_carrying(grid_plan([8], 8, 8)) == 8 * 64
    assert loads_without_carrying(grid_plan([8], 9, 9)) == 13 * 13 + 2 * (13 * 8 + 4 * 4) + 8 * 8 + 4 * 64


# ---- gradients ----


def test_gradient_of_even_frames() -> None:
    """Frames 1, 3, 5 and 7 are shrunk again, and frame 7, which ends as the summary, has no window.

    All launches together take at most three times the bytes of the call, whether or not a cache serves what a launch
    loads again.
    """
    plan = grid_plan([8], 8, 8)
    launches = count_launches(plan, gradient=True)
    assert [replace(counts, table_loads=0) for counts in launches] == [
        Counts(programs=4 * 16, x_loads=4 * 64, cell_stores=4 * 16),
        Counts(programs=16, cell_loads=64, grad_loads=16, sum_stores=64),
        # every cell of the four frames has one token of the summary
        Counts(programs=8 * 16, x_loads=7 * 64, grad_loads=7 * 16, sum_loads=64, out_stores=8 * 64),
    ]
    forward, backward = sum(count_launches(plan), Counts()), sum(launches, Counts())
    for again in (True, False):
        assert 1 < backward.requests(again=again) / forward.requests(again=again) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_bytes_of_a_gradient_of_odd_frames(ceil_mode: bool) -> None:
    plan = grid_plan([16], 9, 9, ceil_mode=ceil_mode)
    forward, backward = (sum(count_launches(plan, gradient), Counts()) for gradient in (False, True))
    for again in (True, False):
        assert 1 < backward.requests(again=again) / forward.requests(again=again) <= 3
    assert backward.out_stores == 16 * 9 * 9
    assert backward.grad_loads == forward.out_stores  # each once
    # x for the thumbnails as in the call, and for the windows that are not of a summary
    assert backward.x_loads <= 2 * 16 * 9 * 9


def test_gradient_without_summaries() -> None:
    (counts,) = count_launches(grid_plan([3], 5, 4), gradient=True)
    assert replace(counts, table_loads=0) == Counts(programs=3 * 6, x_loads=48, grad_loads=12, out_stores=60)


def test_general_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="general kernels"):
        count_launches(grid_plan([8], 4, 4, kernel_size=3))


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("repair_interpreter", "hasten_interpreter"):  # which is done for all tests
        monkeypatch.setattr(traffic, name, lambda: None)
    small = replace(WORKLOADS["llava-next-video-7b"], grid=(6, 6))
    monkeypatch.setitem(WORKLOADS, "llava-next-video-7b", small)
    traffic.main(["--shape", "llava-next-video-7b", "--frames", "1", "--gradient"])
    printed = capsys.readouterr().out
    assert "not measurements" in printed
    assert "1 × 6 × 6 × 4096 bfloat16, frames pooled to 3 × 3" in printed
    x, out = 6 * 6 * 4096 * 2 / 1e6, 3 * 3 * 4096 * 2 / 1e6
    assert f"| frames of x |        9 |      {x:.1f} |" in printed
    assert f"{x + out:.1f} |           1.00 |         1.00 |" in printed
    assert f" {x + out:.1f} |" in printed.split("Its gradient")[1]
