"""Dead-code elimination on a plan: which summaries, and which cells of thumbnails, the result depends on.

A *node* is a value that a frame holds at some time, as one integer: t ≥ 0 is frame t as given, ~s is summary s. A
*thumbnail* is a frame average-pooled to ⌈H/2⌉ × ⌈W/2⌉ cells. `Dataflow` and `live_cells` describe the frames of a plan,
`EndlessLiveness` describes a video that has no end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from .plan import GridPlan, Level, Runs, grid_plan

Extent = tuple[int, int]
"""(rows, cols) of a region anchored at the top-left corner of a frame, in tokens."""

MAX_CACHED_NODES = 4096
"""Number of nodes whose `Liveness` an `EndlessLiveness` caches before it begins anew."""


@dataclass(frozen=True)
class Summary:
    """The mosaic of the nodes `sources`, row-major, that level number `level` puts in frame `target`."""

    level: int
    target: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Dataflow:
    """The summaries that a result depends on, and the node that every frame ends with.

    summaries: in an order in which they can be computed, without those that are overwritten before anything reads them.
    outputs: a node for every frame.
    """

    summaries: tuple[Summary, ...]
    outputs: tuple[int, ...]

    def by_level(self) -> list[list[int]]:
        """Numbers of the summaries of each level that has any."""
        numbers = range(len(self.summaries))
        return [list(group) for _, group in groupby(numbers, key=lambda s: self.summaries[s].level)]

    @staticmethod
    def of(plan: GridPlan) -> Dataflow:
        """The dataflow of temporal gridding by `plan`."""
        nodes = list(range(sum(plan.frame_counts)))
        summaries: list[Summary] = []
        for number, level in enumerate(plan.levels):
            groups = [tuple(nodes[frame] for frame in sources) for sources in level.sources]
            for target, sources in zip(level.targets, groups, strict=True):
                nodes[target] = ~len(summaries)
                summaries.append(Summary(number, target, sources))

        live = {node for node in nodes if node < 0}
        for s in reversed(range(len(summaries))):
            if ~s in live:
                live.update(summaries[s].sources)
        kept = [s for s in range(len(summaries)) if ~s in live]
        renamed = {~s: ~new for new, s in enumerate(kept)}
        return Dataflow(
            tuple(
                Summary(summaries[s].level, summaries[s].target, tuple(renamed.get(c, c) for c in summaries[s].sources))
                for s in kept
            ),
            tuple(renamed.get(node, node) for node in nodes),
        )


def live_cells(plan: GridPlan, graph: Dataflow) -> dict[int, tuple[int, ...]]:
    """The number of live cells in each row of every thumbnail, by node. A cell is live if a pooled token depends on it.

    Not every cell is live: a mosaic is cropped, windows may leave out the last row and column, and a summary may be
    sampled itself. Live cells start at the first row and column, so that a number per row describes them.
    """
    pooled = frozenset({pooled_extent(plan)})
    tokens: dict[int, frozenset[Extent]] = dict.fromkeys(graph.outputs, pooled)
    sampled: dict[int, frozenset[Extent]] = {}
    none: frozenset[Extent] = frozenset()

    @cache  # most summaries of a level are live in the same way
    def behind(number: int, tokens: frozenset[Extent]) -> list[frozenset[Extent]]:
        level = plan.levels[number]
        return [frozenset(extents_behind(plan, level, tokens, tile)) for tile in range(level.rows * level.cols)]

    for s in reversed(range(len(graph.summaries))):
        summary = graph.summaries[s]
        for source, extents in zip(summary.sources, behind(summary.level, tokens.get(~s, none)), strict=True):
            if extents:
                sampled[source] = sampled.get(source, none) | extents
                tokens[source] = tokens.get(source, none) | extents
    counts = {extents: row_counts(plan, extents) for extents in set(sampled.values())}
    return {node: counts[extents] for node, extents in sampled.items()}


def pooled_extent(plan: GridPlan) -> Extent:
    """The extent of the tokens of a frame that the windows reach."""
    return min(_reach(plan.window_rows), plan.height), min(_reach(plan.window_cols), plan.width)


def extents_behind(plan: GridPlan, level: Level, tokens: Iterable[Extent], tile: int) -> set[Extent]:
    """The extents, in the frame at place `tile` of a mosaic, that the extents `tokens` of its summary depend on.

    The set is empty if the crop removes the whole tile.
    """
    row, col = divmod(tile, level.cols)
    extents = {
        (_rows_behind(level.row_runs, plan.height, row, rows), _rows_behind(level.col_runs, plan.width, col, cols))
        for rows, cols in _widest(tokens)
    }
    return {extent for extent in extents if min(extent) > 0}


def row_counts(plan: GridPlan, extents: Iterable[Extent]) -> tuple[int, ...]:
    """Return, for each row of a thumbnail, the number of cells that average a token of a union of extents of its frame.

    Cell i averages rows 2i and 2i + 1; in a frame of an odd size, every cell but the first averages row 2i − 1 too.
    """
    found = list(extents)
    return tuple(
        max((-(-cols // 2) for rows, cols in found if rows > 2 * i), default=0) for i in range(-(-plan.height // 2))
    )


@dataclass(frozen=True)
class Segment:
    """One level of a video without end: every `length` frames are a group, whose summary replaces its frame `target`.

    `sampled` is the number of the frame that is sampled in each stride. Both numbers count from the first frame: of the
    group, and of the stride.
    """

    stride: int
    rows: int
    cols: int
    sampled: int
    target: int

    @staticmethod
    def of(level: Level, sampling: str) -> Segment:
        stride, groups = level.frame_stride, level.rows * level.cols
        # the plan of one frame in place of a mosaic has the rule of every stride
        one = grid_plan((stride,), 1, 1, frame_strides=(stride,), grid_shape=(1, 1), sampling=sampling, kernel_size=1)
        (target,), ((sampled,),) = one.levels[0].targets, one.levels[0].sources
        return Segment(stride, level.rows, level.cols, sampled, (groups - 1) * stride + target)

    @property
    def length(self) -> int:
        return self.stride * self.rows * self.cols

    def place(self, frame: int) -> int | None:
        """The place of a frame of the video in the mosaic of its group, None where it is not sampled."""
        place, number = divmod(frame % self.length, self.stride)
        return place if number == self.sampled else None

    def target_of(self, frame: int) -> int:
        """The frame of the video that the summary of this frame's group replaces."""
        return frame - frame % self.length + self.target


@dataclass(frozen=True)
class Liveness:
    """Live parts of a node of a video without end, and the mosaics that read them.

    tokens: extents of its live tokens. cells: the number of live cells in each row of its thumbnail, () if there are
        none; they are meaningful only where `plan.is_2x2_area` holds.
    places: the mosaics that read the node, as (level, place). is_output: whether its frame ends with it, and pooling
        reads it.
    """

    tokens: frozenset[Extent]
    cells: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    is_output: bool


class EndlessLiveness:
    """Liveness of the nodes of a video without end, assuming that all groups are completed.

    plan: its settings are used, its frames are not. period: the number of frames after which all levels begin a group
        at once, and liveness repeats itself.
    """

    def __init__(self, plan: GridPlan) -> None:
        self.plan = plan
        self.segments = tuple(Segment.of(level, plan.sampling) for level in plan.levels)
        self.period = math.lcm(*(segment.length for segment in self.segments))
        self._found: dict[tuple[int, int], Liveness] = {}

    def of(self, level: int, frame: int) -> Liveness:
        """Liveness of the node that `frame` holds after level `level`; after level −1 that is the frame itself."""
        wanted = level, frame % self.period
        if wanted not in self._found:
            if len(self._found) >= MAX_CACHED_NODES:
                self._found.clear()
            nodes, reached = [wanted], {wanted}
            for node in nodes:
                for number, target, _ in self._mosaics(*node):
                    if (number, target) not in reached and (number, target) not in self._found:
                        nodes.append((number, target))
                        reached.add(nodes[-1])
            for node in sorted(nodes, reverse=True):  # the mosaics of a node are of later levels
                self._found[node] = self._of(*node)
        return self._found[wanted]

    def _mosaics(self, level: int, frame: int) -> Iterator[tuple[int, int, int]]:
        """(level, target, place) of each mosaic with the node that `frame` holds after level `level`."""
        for number in range(level + 1, len(self.segments)):
            place, target = self.segments[number].place(frame), self.segments[number].target_of(frame)
            if place is not None:
                yield number, target, place
            if frame == target:
                return

    def _of(self, level: int, frame: int) -> Liveness:
        sampled: set[Extent] = set()
        places = []
        for number, target, place in self._mosaics(level, frame):
            if behind := self._behind(number, target, place):
                places.append((number, place))
                sampled |= behind
        is_output = all(frame != segment.target_of(frame) for segment in self.segments[level + 1 :])
        tokens = sampled | {pooled_extent(self.plan)} if is_output else sampled
        return Liveness(frozenset(tokens), row_counts(self.plan, sampled) if sampled else (), tuple(places), is_output)

    def _behind(self, level: int, target: int, place: int) -> set[Extent]:
        """The extents, in the frame at one place of a mosaic, that are live through its summary in frame `target`."""
        return extents_behind(self.plan, self.plan.levels[level], self.of(level, target).tokens, place)

    def kept(self, frames: int) -> list[list[tuple[int, int]]]:
        """The nodes that frames after the first `frames` depend on, each as the (level, place) of its mosaics."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for level, segment in enumerate(self.segments):
            first, target = frames - frames % segment.length, segment.target_of(frames)
            arrived = range(first + segment.sampled, frames, segment.stride) if target >= frames else ()
            for place, frame in enumerate(arrived):
                if self._behind(level, target, place):
                    made = (n for n in range(level) if self.segments[n].target_of(frame) == frame)
                    found.setdefault((frame, max(made, default=-1)), []).append((level, place))
        return list(found.values())


def consumers(graph: Dataflow) -> dict[int, list[tuple[int, int]]]:
    """The consumers of every node that is sampled: (summary, tile) of each mosaic, in the order of computation."""
    found: dict[int, list[tuple[int, int]]] = {}
    for s, summary in enumerate(graph.summaries):
        for tile, source in enumerate(summary.sources):
            found.setdefault(source, []).append((s, tile))
    return found


def inverse_runs(runs: Runs, size: int) -> Runs:
    """The inverse of `runs`: for each of `size` positions, the consecutive runs that contain it, possibly none.

    They are consecutive since no run of a plan starts or ends before its predecessor does.
    """
    stops = [start + count for start, count in zip(runs.start, runs.count, strict=True)]
    starts = tuple(bisect_right(stops, position) for position in range(size))
    counts = (bisect_right(runs.start, position) - start for position, start in enumerate(starts))
    return Runs(starts, tuple(max(0, count) for count in counts))


def _rows_behind(runs: Runs, size: int, tile: int, first: int) -> int:
    """The number of rows of a tile that the first `first` rows of a summary depend on. Columns work the same way."""
    last = (
        min(first, bisect_left(runs.start, (tile + 1) * size)) - 1
    )  # the last of them that starts before the tile's end
    return 0 if last < 0 else min(max(runs.start[last] + runs.count[last] - tile * size, 0), size)


def _reach(runs: Runs) -> int:
    return max(start + count for start, count in zip(runs.start, runs.count, strict=True))


def _widest(extents: Iterable[Extent]) -> list[Extent]:
    """The extents that lie inside no other extent."""
    kept: list[Extent] = []
    for extent in sorted(extents, reverse=True):
        if not kept or extent[1] > kept[-1][1]:
            kept.append(extent)
    return kept
