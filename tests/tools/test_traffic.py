"""Counted requests of the kernels, against counts by hand and against which token each program needs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lower_bound import tokens_read
from stgridpool_kernels import grid_plan
from stgridpool_kernels.plan import GridPlan
from stgridpool_kernels.plan.dataflow import Dataflow
from tests.plan.test_dataflow import Token, brute_force, cell_tokens

pytest.importorskip("triton", reason="no Triton")
from tools.traffic import Counts, count_launches, loads_without_carrying

pytestmark = pytest.mark.needs("interpreter")


def test_even_frames() -> None:
    """8 frames of 8 × 8: four of them are shrunk to 4 × 4 cells, of which the summary in frame 7 has all."""
    assert count_launches(grid_plan([8], 8, 8)) == [
        Counts(
            programs=8 * 16,  # one a window
            x_loads=8 * 64,  # each token once
            out_stores=7 * 16,
            cell_stores=4 * 16,
            table_loads=4 * 16 * 5 + 4 * 16,  # five numbers for a walk, here of one step, and one for a window
        ),
        Counts(programs=16, cell_loads=64, out_stores=16, table_loads=16 * (5 + 4)),  # four slots for a window
    ]


def test_odd_frames() -> None:
    """8 frames of 9 × 9: cells overlap; the last row and column of a summary is pooled into nothing."""
    walked = 81 + 70 + 70 + 36  # windows of frames 1, 3, 5 and 7, of which 5×5, 5×3, 3×5 and 3×3 cells are needed
    above = 4 * 9 + 4 * 6 + 2 * 9 + 2 * 6  # the row above these, which the walk above reads too
    assert count_launches(grid_plan([8], 9, 9)) == [
        Counts(
            programs=4 * 5 + 4 * 16,
            x_loads=walked + above + 4 * 64,
            x_again=above,
            out_stores=7 * 16,
            cell_stores=25 + 15 + 15 + 9,
            table_loads=4 * 5 * 5 + 4 * 16,
        ),
        # 16 of the 25 pool a window; they ask for the slots of a column to the left and of a row above, too, which have
        # no tokens then
        Counts(programs=25, cell_loads=64, out_stores=16, table_loads=25 * 5 + 16 * (4 + 3 + 2)),
    ]


def test_without_summaries() -> None:
    """Every token of a window once, and no table."""
    assert count_launches(grid_plan([3], 5, 4)) == [Counts(programs=12, x_loads=48, out_stores=12)]


def needed_tokens(plan: GridPlan, carried: bool = True) -> list[Counts]:
    """What a program cannot do without: all tokens of a cell that it shrinks to, or else of a window that it pools.

    On frames of x a walk has a row of cells and reads a token of it once, if a column is carried; on summaries a
    program has one cell.
    """
    H, W = plan.height, plan.width
    h, w = -(-H // 2), -(-W // 2)
    OH, OW = plan.pooled_size
    graph = Dataflow.of(plan)
    cells = brute_force(plan)

    def tokens_of(node: int, i: int, j: int) -> set[Token]:
        if (i, j) in cells.get(node, ()):
            return {(r, c) for r in cell_tokens(H, i) for c in cell_tokens(W, j)}
        if node in graph.outputs and i < OH and j < OW:
            return {(r, c) for r in range(2 * i, min(2 * i + 2, H)) for c in range(2 * j, min(2 * j + 2, W))}
        return set()

    def loads(node: int, together: bool) -> tuple[int, int]:
        """Of all programs of a node, and of these what another one has loaded."""
        rows = [[tokens_of(node, i, j) for j in range(w)] for i in range(h)]
        found = [
            token for row in rows for token in (set().union(*row) if together else [t for one in row for t in one])
        ]
        return len(found), len(found) - len(set(found))

    launches = [range(sum(plan.frame_counts)), *([~s for s in level] for level in graph.by_level())]
    counts = []
    for number, nodes in enumerate(launches):
        loaded, again = (sum(one) for one in zip(*(loads(c, carried and number == 0) for c in nodes), strict=True))
        outs = sum(c in graph.outputs for c in nodes) * OH * OW
        stored = sum(len(cells.get(node, ())) for node in nodes)
        if number == 0:
            counts.append(Counts(x_loads=loaded, x_again=again, out_stores=outs, cell_stores=stored))
        else:
            counts.append(Counts(cell_loads=loaded, cells_again=again, out_stores=outs, cell_stores=stored))
    return counts


@pytest.mark.parametrize(
    ("counts", "H", "W", "arguments"),
    [
        ([17], 7, 5, {}),
        ([16], 5, 6, {"ceil_mode": True}),
        ([4, 9], 6, 5, {"frame_strides": (1, 2)}),
        ([32], 1, 3, {"ceil_mode": True}),
    ],
    ids=str,
)
def test_no_program_loads_what_it_does_not_need(counts: list[int], H: int, W: int, arguments: dict[str, Any]) -> None:
    plan = grid_plan(counts, H, W, **arguments)
    found = count_launches(plan)
    assert [replace(one, programs=0, table_loads=0) for one in found] == needed_tokens(plan)
    # and all together load no more of x than the result depends on
    assert found[0].x_loads - found[0].x_again == tokens_read(plan).sum()
    assert loads_without_carrying(plan) == needed_tokens(plan, carried=False)[0].x_loads


# ---- gradients ----


def test_gradient_of_even_frames() -> None:
    """8 frames of 8 × 8: frames 1, 3, 5 and 7 are shrunk again; frame 7, which ends as the summary, has no window."""
    launches = count_launches(grid_plan([8], 8, 8), gradient=True)
    assert [replace(counts, table_loads=0) for counts in launches] == [
        Counts(programs=4 * 16, x_loads=4 * 64, cell_stores=4 * 16),
        Counts(programs=16, cell_loads=64, grad_loads=16, sum_stores=64),
        # every cell of the four frames has one token of the summary
        Counts(programs=8 * 16, x_loads=7 * 64, grad_loads=7 * 16, sum_loads=64, out_stores=8 * 64),
    ]


def test_gradient_without_summaries() -> None:
    (counts,) = count_launches(grid_plan([3], 5, 4), gradient=True)
    assert replace(counts, table_loads=0) == Counts(programs=3 * 6, x_loads=48, grad_loads=12, out_stores=60)


@pytest.mark.parametrize(
    ("H", "W", "ceil_mode"),
    [(8, 8, False), *(pytest.param(9, 9, ceil_mode, marks=pytest.mark.slow) for ceil_mode in (False, True))],
)
def test_bytes_of_a_gradient(H: int, W: int, ceil_mode: bool) -> None:
    """At most three times those of its call, whether or not a cache serves what a launch loads again."""
    plan = grid_plan([16], H, W, ceil_mode=ceil_mode)
    forward, backward = (sum(count_launches(plan, gradient), Counts()) for gradient in (False, True))
    for again in (True, False):
        assert 1 < backward.requests(again=again) / forward.requests(again=again) <= 3
    assert backward.out_stores == 16 * H * W
    assert backward.grad_loads == forward.out_stores  # each once
    # x for the thumbnails as in the call, and for the windows that are not of a summary
    assert backward.x_loads <= 2 * 16 * H * W


def test_general_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="general kernels"):
        count_launches(grid_plan([8], 4, 4, kernel_size=3))


def test_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.traffic", "--shape", "llava-next-video-7b", "--frames", "1", "--gradient"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "not measurements" in done.stdout
    assert "1 × 24 × 24 × 4096 bfloat16, frames pooled to 12 × 12" in done.stdout
    x, out = 24 * 24 * 4096 * 2 / 1e6, 12 * 12 * 4096 * 2 / 1e6
    assert f"| frames of x |      144 |      {x:.1f} |" in done.stdout
    assert f"{x + out:.1f} |           1.00 |         1.00 |" in done.stdout
    assert f" {x + out:.1f} |" in done.stdout.split("Its gradient")[1]
