"""What a plan leaves to compute: the summaries that a result depends on, and the cells of miniatures these depend on.

A *content* is what a frame holds at some time, as one integer: t ≥ 0 is frame t as given, ~s is summary s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from .plan import GridPlan, Runs

Box = tuple[int, int]
"""The first so many rows and columns of a frame or of a miniature."""


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
    def repeated(plan: GridPlan) -> Schedule:
        """Of one frame, which ends as the mosaic that has it in every place, by the first level of `plan`."""
        level = plan.levels[0]
        return Schedule((Summary(0, 0, (0,) * (level.rows * level.cols)),), (~0,))

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
"""`Schedule.of`, `Schedule.none` or `Schedule.repeated`."""


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
    cells: dict[int, set[Box]] = {}
    for s in reversed(range(len(steps.summaries))):
        for tile, source in enumerate(steps.summaries[s].sources):
            for box, behind in boxes_behind(plan, tokens.get(~s, ()), tile):
                cells.setdefault(source, set()).add(box)
                tokens.setdefault(source, set()).add(behind)
    counts = {boxes: stairs(plan, boxes) for boxes in map(frozenset, cells.values())}
    return {content: counts[frozenset(boxes)] for content, boxes in cells.items()}


def pooled_box(plan: GridPlan) -> Box:
    """The tokens that the windows reach."""
    return min(_reach(plan.window_rows), plan.height), min(_reach(plan.window_cols), plan.width)


def boxes_behind(plan: GridPlan, tokens: Iterable[Box], tile: int) -> list[tuple[Box, Box]]:
    """For tokens of a 2 × 2 mosaic, the cells of the miniature in place `tile`, and the tokens behind these cells.

    None where only cropped tiles show it.
    """
    rows, cols = (_cell_ends(size) for size in (plan.height, plan.width))
    h, w = len(rows), len(cols)
    cells = [(min(box[0] - tile // 2 * h, h), min(box[1] - tile % 2 * w, w)) for box in _widest(tokens)]
    return [((a, b), (rows[a - 1], cols[b - 1])) for a, b in cells if a > 0 and b > 0]


def stairs(plan: GridPlan, cells: Iterable[Box]) -> tuple[int, ...]:
    """How many cells of each row some boxes of cells have."""
    boxes = list(cells)
    return tuple(max((b for a, b in boxes if a > i), default=0) for i in range(-(-plan.height // 2)))


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


def _cell_ends(size: int) -> list[int]:
    """One past the last row that each cell of a miniature averages: adaptive average pooling to ⌈size/2⌉."""
    half = -(-size // 2)
    return [-(-(i + 1) * size // half) for i in range(half)]


def _reach(runs: Runs) -> int:
    return max(start + count for start, count in zip(runs.start, runs.count, strict=True))


def _widest(boxes: Iterable[Box]) -> list[Box]:
    """The boxes that no other box covers."""
    kept: list[Box] = []
    for box in sorted(boxes, reverse=True):
        if not kept or box[1] > kept[-1][1]:
            kept.append(box)
    return kept
