"""The summaries and the cells of thumbnails that are computed are those that pooled tokens depend on."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stgridpool_kernels import grid_plan
from stgridpool_kernels.plan import GridPlan, dataflow
from stgridpool_kernels.plan.dataflow import (
    MAX_CACHED_NODES,
    Dataflow,
    EndlessLiveness,
    Liveness,
    live_cells,
)
from stgridpool_kernels.plan.tables import chunk_entries
from tests.support.steps import steps

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
    """Return the rows that row i of a thumbnail averages: adaptive average pooling to ⌈size/2⌉."""
    half = -(-size // 2)
    return range(i * size // half, -(-(i + 1) * size // half))


def pooled_tokens(plan: GridPlan) -> set[Token]:
    """Return the positions of a frame that some window holds, where windows have no padding."""
    return {
        (r, c)
        for top, rows in zip(plan.window_rows.start, plan.window_rows.count, strict=True)
        for left, cols in zip(plan.window_cols.start, plan.window_cols.count, strict=True)
        for r in range(top, top + rows)
        for c in range(left, left + cols)
    }


def brute_force(plan: GridPlan) -> dict[int, set[Token]]:
    """Return the cells of every node that some pooled token depends on, following each token on its own."""
    H, W = plan.height, plan.width
    h, w = -(-H // 2), -(-W // 2)
    graph = Dataflow.of(plan)
    tokens = {node: pooled_tokens(plan) for node in graph.outputs}
    cells: dict[int, set[Token]] = {}
    for s in reversed(range(len(graph.summaries))):
        for r, c in tokens.get(~s, ()):
            source = graph.summaries[s].sources[r // h * 2 + c // w]
            cell = (r % h, c % w)
            cells.setdefault(source, set()).add(cell)
            tokens.setdefault(source, set()).update(
                (row, col) for row in cell_tokens(H, cell[0]) for col in cell_tokens(W, cell[1])
            )
    return cells


def assert_needs(plan: GridPlan) -> None:
    expected = brute_force(plan)
    found = live_cells(plan, Dataflow.of(plan))
    assert {
        node: {(i, j) for i, count in enumerate(counts) for j in range(count)} for node, counts in found.items()
    } == expected


@plans
def test_live_cells(counts: list[int], H: int, W: int, arguments: dict[str, Any]) -> None:
    assert_needs(grid_plan(counts, H, W, **arguments))


@given(
    counts=st.lists(st.integers(0, 40), max_size=2),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    frame_strides=st.lists(st.integers(1, 4), max_size=4),
    sampling=st.sampled_from(["last", "first"]),
    ceil_mode=st.booleans(),
)
def test_live_cells_at_random(
    counts: list[int], H: int, W: int, frame_strides: list[int], sampling: str, ceil_mode: bool
) -> None:
    ceil_mode = ceil_mode or min(H, W) < 2
    assert_needs(grid_plan(counts, H, W, frame_strides=frame_strides, sampling=sampling, ceil_mode=ceil_mode))


@plans
def test_nodes_follow_the_levels(counts: list[int], H: int, W: int, arguments: dict[str, Any]) -> None:
    """The frames that make up a summary, summaries taken apart, are those that running the levels one by one gives."""
    plan = grid_plan(counts, H, W, **arguments)
    graph = Dataflow.of(plan)
    made: list[Any] = []
    for summary in graph.summaries:
        made.append(tuple(source if source >= 0 else made[~source] for source in summary.sources))
    frames: list[Any] = list(range(sum(counts)))
    for level in plan.levels:
        groups = [tuple(frames[frame] for frame in sources) for sources in level.sources]
        for target, group in zip(level.targets, groups, strict=True):
            frames[target] = group
    assert [node if node >= 0 else made[~node] for node in graph.outputs] == frames


def test_summaries_that_nothing_depends_on_are_left_out() -> None:
    """Both levels replace frame 3, and the second reads only frames as they were given."""
    plan = grid_plan([4], 4, 4, frame_strides=(1, 2), grid_shape=(2, 2, 1, 1), sampling="first")
    kept = Dataflow.of(plan).summaries
    assert [(summary.level, summary.target, summary.sources) for summary in kept] == [(1, 1, (0,)), (1, 3, (2,))]


def test_nothing_is_scheduled_without_gridding() -> None:
    plan = grid_plan([3, 4], 5, 7, frame_strides=())
    assert Dataflow.of(plan) == Dataflow((), tuple(range(7)))


# ---- videos without end ----

ENDLESS: dict[str, dict[str, Any]] = {
    "published": {},
    "first": {"frame_strides": (3, 5), "sampling": "first"},
    "nested": {"frame_strides": (1, 2, 1, 4)},
    "mixed": {"frame_strides": (1, 2, 1), "grid_shape": (2, 3, 3, 1, 1, 4)},
    "first, mixed": {"frame_strides": (2, 1, 3), "grid_shape": (2, 1, 3, 2, 1, 1), "sampling": "first"},
    "overwritten": {"frame_strides": (1, 2), "grid_shape": (2, 2, 1, 1), "sampling": "first"},
    "bilinear": {"frame_strides": (1, 2), "resize": "bilinear", "grid_shape": (3, 2)},
    "frame 3 as given and as a summary": {"frame_strides": (4, 1, 2), "grid_shape": (1, 2, 1, 2, 2, 2)},
    "off": {"frame_strides": ()},
}
endless = pytest.mark.parametrize("arguments", ENDLESS.values(), ids=ENDLESS.keys())


def periods(plan: GridPlan, count: int) -> GridPlan:
    """Return the plan of `count` periods of a video. In a period, all levels begin again at once."""
    return dataclasses.replace(plan, frame_counts=(count * EndlessLiveness(plan).period,))


@endless
def test_segments_repeat_the_plan(arguments: dict[str, Any]) -> None:
    plan = periods(grid_plan((), 4, 5, **arguments), 3)
    for level, segment in zip(plan.levels, EndlessLiveness(plan).segments, strict=True):
        groups: dict[int, list[int]] = {}
        for frame in range(plan.frame_counts[0]):
            place = segment.place(frame)
            if place is not None:
                groups.setdefault(segment.target_of(frame), []).append(frame)
                assert place == len(groups[segment.target_of(frame)]) - 1
        assert level.targets == tuple(groups)
        assert level.sources == tuple(map(tuple, groups.values()))


@pytest.mark.parametrize("name", ["published", "first", "nested"])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("H", "W"), [(5, 7), (4, 6), (1, 2)])
def test_live_cells_of_a_video_without_end(H: int, W: int, ceil_mode: bool, name: str) -> None:
    plan = grid_plan((), H, W, ceil_mode=ceil_mode or H == 1, **ENDLESS[name])
    liveness, period = EndlessLiveness(plan), EndlessLiveness(plan).period
    graph = Dataflow.of(periods(plan, 1))
    live = live_cells(plan, graph)
    for frame in range(period):
        assert liveness.of(-1, frame + 3 * period).cells == live.get(frame, ())
        assert liveness.of(-1, frame).is_output == (graph.outputs[frame] == frame)
    for number, summary in enumerate(graph.summaries):
        assert liveness.of(summary.level, summary.target).cells == live.get(~number, ())


def tiles_read(plan: GridPlan) -> set[tuple[int, int, int]]:
    """Return (level, frame, place) of each frame in a mosaic of which some pooled token reads a token."""
    graph = Dataflow.of(plan)
    tokens = {node: pooled_tokens(plan) for node in graph.outputs}
    found = set()
    for s in reversed(range(len(graph.summaries))):
        summary = graph.summaries[s]
        level = plan.levels[summary.level]
        frames = level.sources[level.targets.index(summary.target)]
        for r, c in tokens.get(~s, ()):
            rows = range(level.row_runs.start[r], level.row_runs.start[r] + level.row_runs.count[r])
            cols = range(level.col_runs.start[c], level.col_runs.start[c] + level.col_runs.count[c])
            for row, col in itertools.product(rows, cols):
                place = row // plan.height * level.cols + col // plan.width
                found.add((summary.level, frames[place], place))
                tokens.setdefault(summary.sources[place], set()).add((row % plan.height, col % plan.width))
    return found


@endless
@pytest.mark.parametrize(("H", "W"), [(5, 7), (4, 2), (1, 3)])
def test_frames_that_are_needed(H: int, W: int, arguments: dict[str, Any]) -> None:
    """Frames are those that are read token by token, but a bilinear mosaic counts as reading all up to its last."""
    plan = periods(grid_plan((), H, W, ceil_mode=True, **arguments), 1)
    liveness = EndlessLiveness(plan)
    made = [(-1, frame) for frame in range(plan.frame_counts[0])]
    made += [(number, target) for number, level in enumerate(plan.levels) for target in level.targets]
    found = {(number, frame, place) for level, frame in made for number, place in liveness.of(level, frame).places}
    read = tiles_read(plan)
    assert found >= read if plan.resize == "bilinear" else found == read


@endless
def test_what_is_kept_is_what_is_needed_later(arguments: dict[str, Any]) -> None:
    """After any number of frames, nodes are kept that chunk_entries has given a slot and not yet to a summary."""
    liveness = EndlessLiveness(grid_plan((), 6, 8, ceil_mode=True, **arguments))
    groups: list[dict[int, int]] = [{} for _ in liveness.segments]
    free = itertools.count()
    for frames in range(2 * liveness.period + 1):
        held: dict[int, list[tuple[int, int]]] = {}
        for level, group in enumerate(groups):
            for place, slot in sorted(group.items()):
                held.setdefault(slot, []).append((level, place))
        assert liveness.kept(frames) == list(held.values())
        list(chunk_entries(liveness, frames, 0, groups, free))


def test_each_node_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more than a million ways by which 41 levels read one frame."""
    arguments = {"frame_strides": (1,) * 40 + (2,), "grid_shape": (1, 6, 1, 8) * 20 + (1, 1), "sampling": "first"}
    liveness = EndlessLiveness(grid_plan((), 2, 2, **arguments))
    calls: Counter[tuple[int, int]] = Counter()
    work = EndlessLiveness._of

    def counted(self: EndlessLiveness, level: int, frame: int) -> Liveness:
        calls[level, frame % self.period] += 1
        assert calls[level, frame % self.period] == 1
        return work(self, level, frame)

    monkeypatch.setattr(EndlessLiveness, "_of", counted)
    for frame in range(liveness.period):
        liveness.of(-1, frame)
    assert calls


@pytest.mark.parametrize("cached", [MAX_CACHED_NODES, 1], ids=["cached", "not cached"])
@pytest.mark.parametrize("grid_shape", [(2, 2), (1, 6, 1, 8)], ids=str)
@pytest.mark.parametrize("sampling", ["last", "first"])
def test_work_grows_with_the_levels(
    sampling: str, grid_shape: tuple[int, ...], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the levels have up to 16 times the pairs of levels, and four times the groups that a frame reaches."""
    monkeypatch.setattr(dataflow, "MAX_CACHED_NODES", cached)

    def work(levels: int) -> int:
        grids = grid_shape * (2 * levels // len(grid_shape))
        plan = grid_plan((), 8, 8, frame_strides=(1,) * levels, grid_shape=grids, sampling=sampling)
        liveness = EndlessLiveness(plan)
        return steps(lambda: [liveness.of(-1, frame) for frame in range(4)])

    assert work(48) < 4**3 * work(12)


def test_thousands_of_levels() -> None:
    """A node may be read through as many mosaics as there are levels, which is more than Python recurses."""
    liveness = EndlessLiveness(grid_plan((), 2, 2, frame_strides=(1,) * 2000))
    assert liveness.of(-1, 0).places == tuple((level, 0) for level in range(2000))
