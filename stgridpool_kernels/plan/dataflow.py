"""What a plan leaves to compute: the summaries that a result depends on, and the cells of miniatures these depend on.

A *content* is what a frame holds at some time, as one integer: t ≥ 0 is frame t as given, ~s is summary s. `Schedule`
and `needed_cells` are about the frames of a plan, `EndlessNeeds` is about a video that has no end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from .plan import GridPlan, Level, Runs, grid_plan

Box = tuple[int, int]
"""(rows, cols): the tokens of a frame in its first `rows` rows and first `cols` columns."""

MOST_NEEDS = 4096
"""Largest number of contents whose needs an `EndlessNeeds` remembers."""


@dataclass(frozen=True)
class Summary:
    """The mosaic of the contents `sources`, row-major, that level number `level` puts in frame `target`."""

    level: int
    target: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """summaries: in the order they can be computed, without those that are overwritten before anything reads them.
    final: the content that every frame ends with.
    """

    summaries: tuple[Summary, ...]
    final: tuple[int, ...]

    def by_level(self) -> list[list[int]]:
        """Numbers of the summaries of each level that has any."""
        numbers = range(len(self.summaries))
        return [list(group) for _, group in groupby(numbers, key=lambda s: self.summaries[s].level)]

    @staticmethod
    def none(plan: GridPlan) -> Schedule:
        """Without temporal gridding."""
        return Schedule((), tuple(range(sum(plan.frame_counts))))

    @staticmethod
    def of(plan: GridPlan) -> Schedule:
        """Of temporal gridding by `plan`."""
        contents = list(range(sum(plan.frame_counts)))
        summaries: list[Summary] = []
        for number, level in enumerate(plan.levels):
            groups = [tuple(contents[frame] for frame in sources) for sources in level.sources]
            for target, sources in zip(level.targets, groups, strict=True):
                contents[target] = ~len(summaries)
                summaries.append(Summary(number, target, sources))

        live = {content for content in contents if content < 0}
        for s in reversed(range(len(summaries))):
            if ~s in live:
                live.update(summaries[s].sources)
        kept = [s for s in range(len(summaries)) if ~s in live]
        renamed = {~s: ~new for new, s in enumerate(kept)}
        return Schedule(
            tuple(
                Summary(summaries[s].level, summaries[s].target, tuple(renamed.get(c, c) for c in summaries[s].sources))
                for s in kept
            ),
            tuple(renamed.get(content, content) for content in contents),
        )


Scheduling = Callable[[GridPlan], Schedule]
"""`Schedule.of` or `Schedule.none`."""


def pools_pairs(plan: GridPlan) -> bool:
    """Whether the windows are 2 × 2 at stride 2, the last ones possibly cut by the frame's edge."""
    return all(
        runs.start == tuple(range(0, 2 * len(runs), 2)) and runs.count == tuple(min(2, size - s) for s in runs.start)
        for runs, size in ((plan.window_rows, plan.height), (plan.window_cols, plan.width))
    )


def shrinks_by_halves(plan: GridPlan) -> bool:
    """Whether every summary is tiled 2 × 2 from area-shrunk miniatures, of which a content has only one then.

    It follows from the settings, whether or not these videos are long enough for every level: kernels sum in another
    order where it does not hold, and a video must give the same bits alone and packed with a longer one.
    """
    return plan.resize == "area" and all((level.rows, level.cols) == (2, 2) for level in plan.levels)


def needed_cells(plan: GridPlan, steps: Schedule) -> dict[int, tuple[int, ...]]:
    """For every content that is shrunk: how many cells of each row of its miniature a pooled token depends on.

    A miniature has ⌈H/2⌉ × ⌈W/2⌉ cells. The mosaic is cropped, windows may leave out the last row and column, and a
    summary may be sampled itself, so that not every cell is needed. Needs start at the first row and column always.
    """
    pooled = pooled_box(plan)
    tokens: dict[int, set[Box]] = {content: {pooled} for content in steps.final}
    sampled: dict[int, set[Box]] = {}
    for s in reversed(range(len(steps.summaries))):
        level = plan.levels[steps.summaries[s].level]
        for tile, source in enumerate(steps.summaries[s].sources):
            behind = boxes_behind(plan, level, tokens.get(~s, ()), tile)
            if behind:
                sampled.setdefault(source, set()).update(behind)
                tokens.setdefault(source, set()).update(behind)
    counts = {boxes: cell_counts(plan, boxes) for boxes in map(frozenset, sampled.values())}
    return {content: counts[frozenset(boxes)] for content, boxes in sampled.items()}


def pooled_box(plan: GridPlan) -> Box:
    """The tokens of a frame that the windows reach."""
    return min(_reach(plan.window_rows), plan.height), min(_reach(plan.window_cols), plan.width)


def boxes_behind(plan: GridPlan, level: Level, tokens: Iterable[Box], tile: int) -> set[Box]:
    """The boxes of tokens, in the frame in place `tile` of a mosaic, that boxes of tokens of its summary depend on.

    Empty where the crop removes that tile.
    """
    row, col = divmod(tile, level.cols)
    boxes = {
        (_extent(level.row_runs, plan.height, row, rows), _extent(level.col_runs, plan.width, col, cols))
        for rows, cols in _widest(tokens)
    }
    return {box for box in boxes if min(box) > 0}


def cell_counts(plan: GridPlan, boxes: Iterable[Box]) -> tuple[int, ...]:
    """How many cells of each row of a miniature boxes of tokens of its frame are averaged in. Boxes end where cells do.

    Cell i averages rows 2i and 2i + 1, and in a frame of an odd size one before them, except for the first.
    """
    found = list(boxes)
    return tuple(
        max((-(-cols // 2) for rows, cols in found if rows > 2 * i), default=0) for i in range(-(-plan.height // 2))
    )


@dataclass(frozen=True)
class Segment:
    """One level of a video without end: every `length` frames are one group, whose summary replaces frame `target`.

    Frames are counted from the first of the segment. Of every `stride` of them, number `sampled` is sampled.
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
class Need:
    """What depends on a content of a video without end.

    tokens: boxes of its tokens. cells: how many cells of each row of its miniature, () for none; they mean something
    only where `shrinks_by_halves`. places: the mosaics that it becomes part of, as (level, place). final: whether its
    frame ends with it, so that it is pooled.
    """

    tokens: frozenset[Box]
    cells: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    final: bool


class EndlessNeeds:
    """What the contents of a video without end are needed for, where every group is completed in time.

    plan: of any frames; its settings count. period: number of frames after which all levels begin again at once, and
    needs repeat themselves.
    """

    def __init__(self, plan: GridPlan) -> None:
        self.plan = plan
        self.segments = tuple(Segment.of(level, plan.sampling) for level in plan.levels)
        self.period = math.lcm(*(segment.length for segment in self.segments))
        self._found: dict[tuple[int, int], Need] = {}

    def of(self, level: int, frame: int) -> Need:
        """The need of what frame number `frame` holds after level number `level`; after level −1 it is as given."""
        key = (level, frame % self.period)
        found = self._found.get(key)
        if found is None:
            found = self._of(level, frame)
            if len(self._found) >= MOST_NEEDS:
                self._found.clear()
            self._found[key] = found
        return found

    def _of(self, level: int, frame: int) -> Need:
        sampled: set[Box] = set()
        places = []
        final = True
        for number in range(level + 1, len(self.segments)):
            place, target = self.segments[number].place(frame), self.segments[number].target_of(frame)
            if place is not None and (behind := self._behind(number, target, place)):
                places.append((number, place))
                sampled |= behind
            if frame == target:
                final = False
                break
        tokens = sampled | {pooled_box(self.plan)} if final else sampled
        return Need(frozenset(tokens), cell_counts(self.plan, sampled) if sampled else (), tuple(places), final)

    def _behind(self, level: int, target: int, place: int) -> set[Box]:
        """The tokens of the frame in one place of a mosaic that its summary, in frame `target`, needs."""
        return boxes_behind(self.plan, self.plan.levels[level], self.of(level, target).tokens, place)

    def kept(self, frames: int) -> list[list[tuple[int, int]]]:
        """The contents of the first so many frames that later ones depend on, each as its (level, place) in mosaics."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for level, segment in enumerate(self.segments):
            first, target = frames - frames % segment.length, segment.target_of(frames)
            arrived = range(first + segment.sampled, frames, segment.stride) if target >= frames else ()
            for place, frame in enumerate(arrived):
                if self._behind(level, target, place):
                    made = (n for n in range(level) if self.segments[n].target_of(frame) == frame)
                    found.setdefault((frame, max(made, default=-1)), []).append((level, place))
        return list(found.values())


def feeds(steps: Schedule) -> dict[int, list[tuple[int, int]]]:
    """Where every content that is sampled goes: (summary, tile) of each mosaic, in the order these are computed."""
    found: dict[int, list[tuple[int, int]]] = {}
    for s, summary in enumerate(steps.summaries):
        for tile, source in enumerate(summary.sources):
            found.setdefault(source, []).append((s, tile))
    return found


def covers(runs: Runs, size: int) -> Runs:
    """Which of the runs cover each of `size` positions, the converse of `runs`: consecutive ones, or none.

    They are consecutive since no run of a plan starts or ends before the one before it does.
    """
    stops = [start + count for start, count in zip(runs.start, runs.count, strict=True)]
    starts = tuple(bisect_right(stops, position) for position in range(size))
    counts = (bisect_right(runs.start, position) - start for position, start in enumerate(starts))
    return Runs(starts, tuple(max(0, count) for count in counts))


def _extent(runs: Runs, size: int, tile: int, first: int) -> int:
    """How many rows of a tile the first `first` rows of a summary depend on. Columns are alike."""
    last = min(first, bisect_left(runs.start, (tile + 1) * size)) - 1  # of these, the last that starts before its end
    return 0 if last < 0 else min(max(runs.start[last] + runs.count[last] - tile * size, 0), size)


def _reach(runs: Runs) -> int:
    return max(start + count for start, count in zip(runs.start, runs.count, strict=True))


def _widest(boxes: Iterable[Box]) -> list[Box]:
    """The boxes that no other box covers."""
    kept: list[Box] = []
    for box in sorted(boxes, reverse=True):
        if not kept or box[1] > kept[-1][1]:
            kept.append(box)
    return kept
