"""Which summaries are computed, and which cells of miniatures, against the dependencies token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stgridpool_kernels import grid_plan
from stgridpool_kernels.plan import GridPlan
from stgridpool_kernels.plan.dataflow import Schedule, needed_cells, pools_pairs, shrinks_by_halves

Token = tuple[int, int]

PLANS: dict[str, tuple[list[int], int, int, dict[str, Any]]] = {
    "published": ([64], 27, 27, {}),
    "published-ceil": ([64], 27, 27, {"ceil_mode": True}),
    "even": ([32], 24, 24, {}),
    "small": ([40], 5, 7, {}),
    "one row": ([32], 1, 6, {"ceil_mode": True}),
    "packed": ([9, 0, 33, 16], 3, 4, {}),
    "first": ([64], 7, 5, {"sampling": "first"}),
    "every frame": ([21], 5, 5, {"frame_strides": (1, 2, 1, 3)}),
}
plans = pytest.mark.parametrize(("counts", "H", "W", "arguments"), PLANS.values(), ids=PLANS.keys())


def cell_tokens(size: int, i: int) -> range:
    """Rows that row i of a miniature averages: adaptive average pooling to ⌈size/2⌉."""
    half = -(-size // 2)
    return range(i * size // half, -(-(i + 1) * size // half))


def brute_force(plan: GridPlan) -> dict[int, set[Token]]:
    """The cells of every content that some pooled token depends on, following each token on its own."""
    H, W = plan.height, plan.width
    h, w = -(-H // 2), -(-W // 2)
    steps = Schedule.of(plan)
    pooled = {
        (r, c)
        for top, rows in zip(plan.window_rows.start, plan.window_rows.count, strict=True)
        for left, cols in zip(plan.window_cols.start, plan.window_cols.count, strict=True)
        for r in range(top, top + rows)
        for c in range(left, left + cols)
    }
    tokens: dict[int, set[Token]] = {content: set(pooled) for content in steps.final}
    cells: dict[int, set[Token]] = {}
    for s in reversed(range(len(steps.summaries))):
        for r, c in tokens.get(~s, ()):
            source = steps.summaries[s].sources[r // h * 2 + c // w]
            cell = (r % h, c % w)
            cells.setdefault(source, set()).add(cell)
            tokens.setdefault(source, set()).update(
                (row, col) for row in cell_tokens(H, cell[0]) for col in cell_tokens(W, cell[1])
            )
    return cells


def assert_needs(plan: GridPlan) -> None:
    expected = brute_force(plan)
    found = needed_cells(plan, Schedule.of(plan))
    assert {
        content: {(i, j) for i, count in enumerate(counts) for j in range(count)} for content, counts in found.items()
    } == expected


@plans
def test_needed_cells(counts: list[int], H: int, W: int, arguments: dict[str, Any]) -> None:
    assert_needs(grid_plan(counts, H, W, **arguments))


@given(
    counts=st.lists(st.integers(0, 40), max_size=2),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    frame_strides=st.lists(st.integers(1, 4), max_size=4),
    sampling=st.sampled_from(["last", "first"]),
    ceil_mode=st.booleans(),
)
def test_needed_cells_at_random(
    counts: list[int], H: int, W: int, frame_strides: list[int], sampling: str, ceil_mode: bool
) -> None:
    ceil_mode = ceil_mode or min(H, W) < 2
    assert_needs(grid_plan(counts, H, W, frame_strides=frame_strides, sampling=sampling, ceil_mode=ceil_mode))


@plans
def test_contents_follow_the_levels(counts: list[int], H: int, W: int, arguments: dict[str, Any]) -> None:
    """The frames that make up a summary, summaries taken apart, are those that running the levels one by one gives."""
    plan = grid_plan(counts, H, W, **arguments)
    steps = Schedule.of(plan)
    made: list[Any] = []
    for summary in steps.summaries:
        made.append(tuple(source if source >= 0 else made[~source] for source in summary.sources))
    frames: list[Any] = list(range(sum(counts)))
    for level in plan.levels:
        groups = [tuple(frames[frame] for frame in sources) for sources in level.sources]
        for target, group in zip(level.targets, groups, strict=True):
            frames[target] = group
    assert [content if content >= 0 else made[~content] for content in steps.final] == frames


def test_summaries_that_nothing_depends_on_are_left_out() -> None:
    """Both levels replace frame 3, and the second reads only frames as they were given."""
    plan = grid_plan([4], 4, 4, frame_strides=(1, 2), grid_shape=(2, 2, 1, 1), sampling="first")
    kept = Schedule.of(plan).summaries
    assert [(summary.level, summary.target, summary.sources) for summary in kept] == [(1, 1, (0,)), (1, 3, (2,))]


def test_nothing_is_scheduled_without_gridding() -> None:
    plan = grid_plan([3, 4], 5, 7, frame_strides=())
    assert Schedule.of(plan) == Schedule.none(plan) == Schedule((), tuple(range(7)))


@pytest.mark.parametrize(
    ("size", "arguments", "pairs"),
    [
        (8, {}, True),
        (9, {}, True),
        (9, {"ceil_mode": True}, True),
        (8, {"output_size": 4}, True),
        (8, {"stride": 2}, True),
        (9, {"output_size": 5}, False),
        (8, {"stride": 1}, False),
        (8, {"padding": 1}, False),
        (8, {"kernel_size": 3}, False),
        (8, {"kernel_size": (2, 1)}, False),
    ],
    ids=str,
)
def test_which_windows_are_pairs(size: int, arguments: dict[str, Any], pairs: bool) -> None:
    assert pools_pairs(grid_plan([1], size, size, **arguments)) == pairs


@pytest.mark.parametrize(
    ("arguments", "halves"),
    [
        ({}, True),
        ({"frame_strides": ()}, True),
        ({"resize": "bilinear"}, False),
        ({"grid_shape": (2, 1)}, False),
        ({"frame_strides": (2, 4), "grid_shape": (2, 2, 3, 3)}, False),
        ({"frame_strides": (2, 40), "grid_shape": (2, 2, 3, 3)}, False),
    ],
    ids=str,
)
def test_which_summaries_share_miniatures(arguments: dict[str, Any], halves: bool) -> None:
    """By the settings: whether these videos are long enough for every level does not matter."""
    assert shrinks_by_halves(grid_plan([64], 8, 8, **arguments)) == halves
