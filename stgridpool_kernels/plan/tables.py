"""A plan as one array of int32, which the C++ kernels follow and `GridPlan.save` writes. csrc/tables.h has its form."""

from __future__ import annotations

import os
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

from ..io.writing import atomic_write
from .dataflow import EndlessNeeds, Schedule, Scheduling, covers, feeds, needed_cells, pools_pairs, shrinks_by_halves
from .plan import GridPlan, Runs

MAGIC = int.from_bytes(b"STGP", "little")
VERSION = 2
HEADER_WORDS = 19
STEP_WORDS = 5


@lru_cache(maxsize=256)
def plan_tables(
    plan: GridPlan,
    schedule: Scheduling = Schedule.of,
    frames_per_step: int | None = None,
    gradient: bool = False,
) -> array[int]:
    """The tables of a plan.

    schedule: what becomes of the frames; with Schedule.none, they are pooled and no more.
    frames_per_step: read at least so many frames, then make the summaries that these complete, and so on: few
        miniatures are kept at a time, for a CPU's cache. None reads all frames first, then makes the summaries level by
        level: few steps, for a GPU.
    gradient: with what a gradient follows. Every content that is shrunk has a miniature of its own then, and every
        frame an entry: one that nothing depends on has a gradient too, which is 0. frames_per_step must be None.
    """
    steps = schedule(plan)
    words = [0] * HEADER_WORDS

    final = len(words)
    words += steps.final
    records: list[int] = []
    for numbers in steps.by_level():
        level = plan.levels[steps.summaries[numbers[0]].level]
        records += (level.rows, level.cols, numbers[0], len(numbers), len(words))
        for s in numbers:
            words += steps.summaries[s].sources
        records += (_append(words, level.row_runs), _append(words, level.col_runs))
    levels = len(words)
    words += records
    window_rows, window_cols = _append(words, plan.window_rows), _append(words, plan.window_cols)

    fused: list[int] = []
    slots = 0
    if pools_pairs(plan) and shrinks_by_halves(plan):
        fused, slots = _fused(words, plan, steps, frames_per_step, gradient)
    first_step = len(words)
    words += fused
    section = _gradient(words, plan, steps) if gradient else 0

    words[:HEADER_WORDS] = (
        *(MAGIC, VERSION, len(words)),
        *(len(steps.final), plan.height, plan.width, *plan.pooled_size),
        max(plan.window_rows.count) * max(plan.window_cols.count),
        *(len(steps.summaries), final, levels, len(steps.by_level()), window_rows, window_cols),
        *(first_step, len(fused) // STEP_WORDS, slots, section),
    )
    return array("i", words)


def _gradient(words: list[int], plan: GridPlan, steps: Schedule) -> int:
    """Adds what a gradient follows; where it starts."""
    kept = steps.by_level()
    level_of = {s: number for number, summaries in enumerate(kept) for s in summaries}
    found = feeds(steps)
    contents = (*range(len(steps.final)), *(~s for s in range(len(steps.summaries))))
    starts = len(words)
    words += [0] * (len(contents) + 1)
    for number, content in enumerate(contents):
        words[starts + number] = len(words)
        for s, tile in found.get(content, ()):
            words += (s, level_of[s], tile)
    words[starts + len(contents)] = len(words)

    records: list[int] = []
    for summaries in kept:
        level = plan.levels[steps.summaries[summaries[0]].level]
        records.append(_append(words, covers(level.row_runs, level.rows * plan.height)))
        records.append(_append(words, covers(level.col_runs, level.cols * plan.width)))
    window_rows = _append(words, covers(plan.window_rows, plan.height))
    window_cols = _append(words, covers(plan.window_cols, plan.width))
    section = len(words)
    words += (starts, window_rows, window_cols, *records)
    return section


@dataclass(frozen=True)
class ChunkEntry:
    """A frame of a chunk of streams (number `content`), or a summary (any number below 0) tiled from `sources`.

    target: the frame of the result that it is pooled into, or −1. slot, needed: where its miniature is stored, and how
    many cells of each row; −1 and () where none is. sources: slots of four miniatures, −1 where none is needed. Where
    slots hold frames in place of miniatures, there is a source for each place of the mosaic.
    """

    content: int
    target: int
    slot: int
    needed: tuple[int, ...]
    sources: tuple[int, ...] = (-1,) * 4


def chunk_entries(
    needs: EndlessNeeds, frame: int, row: int, groups: list[dict[int, int]], free: Iterator[int]
) -> Iterator[tuple[int, ChunkEntry]]:
    """What becomes of the next frame of a stream, row `row` of a chunk: (level, entry) of the frame, with level −1, and
    of each summary that replaces it. A content that nothing depends on has no entry.

    groups: for every level, the slots that are kept of the open group, by the place in its mosaic; they are updated.
    free: slots that may be written to.
    """
    for level in range(-1, len(groups)):
        sources: dict[int, int] = {}
        places = 4
        if level >= 0:
            segment = needs.segments[level]
            if frame != segment.target_of(frame):
                continue
            sources, groups[level], places = groups[level], {}, segment.rows * segment.cols
        need = needs.of(level, frame)
        slot = next(free) if need.places else -1
        for later, place in need.places:
            groups[later][place] = slot
        if need.places or need.final:
            content, target = row if level < 0 else -1 - row, row if need.final else -1
            yield level, ChunkEntry(content, target, slot, need.cells, tuple(sources.get(i, -1) for i in range(places)))


@dataclass(frozen=True)
class Chunk:
    """Tables of a chunk of streams, and the steps in them: (is a mosaic, offset of the entries, how many, how many of
    them have a miniature). plan: of its settings."""

    plan: GridPlan
    words: tuple[int, ...]
    steps: tuple[tuple[int, int, int, int], ...]


def chunk_tables(plan: GridPlan, frames: int, steps: Sequence[Sequence[ChunkEntry]], slots: int) -> Chunk:
    """The tables of a chunk of streams, which have the fused form alone.

    steps: the frames of the chunk first, then the summaries of one level after the other. Slots are written once at
    most, and none that holds anything from before the chunk.
    """
    words = [0] * HEADER_WORDS
    final = len(words)
    words += range(frames)
    window_rows, window_cols = _append(words, plan.window_rows), _append(words, plan.window_cols)
    none_needed = (0,) * -(-plan.height // 2)
    rows: dict[tuple[int, ...], int] = {}
    for counts in (none_needed, *(entry.needed for step in steps for entry in step if entry.needed)):
        if counts not in rows:
            rows[counts] = len(words)
            words += counts
    records: list[int] = []
    shape: list[tuple[int, int, int, int]] = []
    for entries in filter(None, steps):
        walked = [entry for entry in entries if entry.slot >= 0]
        shape.append((int(entries[0].content < 0), len(words), len(entries), len(walked)))
        records += (*shape[-1], len(shape) - 1)
        for entry in (*walked, *(entry for entry in entries if entry.slot < 0)):
            words += (entry.content, entry.target, entry.slot, rows[entry.needed or none_needed], *entry.sources)
    first_step = len(words)
    words += records
    words[:HEADER_WORDS] = (
        *(MAGIC, VERSION, len(words)),
        *(frames, plan.height, plan.width, *plan.pooled_size),
        max(plan.window_rows.count) * max(plan.window_cols.count),
        *(0, final, first_step, 0, window_rows, window_cols),
        *(first_step, len(shape), slots, 0),
    )
    return Chunk(plan, tuple(words), tuple(shape))


def _append(words: list[int], runs: Runs) -> int:
    start = len(words)
    words += (*runs.start, *runs.count)
    return start


def _fused(
    words: list[int], plan: GridPlan, steps: Schedule, frames_per_step: int | None, gradient: bool
) -> tuple[list[int], int]:
    """Steps of the fused form, whose entries are added to `words`, and how many slots they use."""
    needed = needed_cells(plan, steps)
    ends = {content: frame for frame, content in enumerate(steps.final)}
    none_needed = (0,) * -(-plan.height // 2)
    rows: dict[tuple[int, ...], int] = {}
    for counts in (none_needed, *needed.values()):
        if counts not in rows:
            rows[counts] = len(words)
            words += counts

    def sources(content: int) -> tuple[int, ...]:
        return steps.summaries[~content].sources if content < 0 else ()

    frames = [frame for frame in range(len(steps.final)) if gradient or frame in needed or frame in ends]
    levels = [[~s for s in level if gradient or ~s in needed or ~s in ends] for level in steps.by_level()]
    if frames_per_step is None:
        order = [frames, *levels]
    else:
        order = list(_interleaved(steps, frames, levels, set(needed), frames_per_step))
    order = [contents for contents in order if contents]

    made = {content: step for step, contents in enumerate(order) for content in contents}
    last_use = {source: step for step, contents in enumerate(order) for c in contents for source in sources(c)}
    records: list[int] = []
    slot: dict[int, int] = {}
    free: list[int] = []
    freed: list[int] = []  # for every slot, how many steps must be complete before it may be written again
    for step, contents in enumerate(order):
        walked = [content for content in contents if content in needed]
        for content in walked:
            if not free:
                heappush(free, len(freed))
                freed.append(0)
            slot[content] = heappop(free)
        after = max(
            [made.get(source, -1) + 1 for content in contents for source in sources(content)]
            + [freed[slot[content]] for content in walked],
            default=0,
        )
        records += (int(contents[0] < 0), len(words), len(contents), len(walked), after)
        for content in (*walked, *(content for content in contents if content not in needed)):
            words += (content, ends.get(content, -1), slot.get(content, -1), rows[needed.get(content, none_needed)])
            words += [slot.get(source, -1) for source in sources(content)] or [-1] * 4
        for content in [content for content in slot if last_use[content] == step and not gradient]:
            freed[slot[content]] = step + 1
            heappush(free, slot.pop(content))
    return records, len(freed)


def _interleaved(
    steps: Schedule, frames: list[int], levels: list[list[int]], sampled: set[int], frames_per_step: int
) -> Iterator[list[int]]:
    """Contents in steps, each as little dependent on the step just before it as possible: no thread waits for another.

    Frames are taken in batches that end with a target. A batch is its sampled frames, which the summaries wait for,
    between others, which nothing waits for; levels follow one by one, with frames between them.
    """
    targets = sorted({summary.target for summary in steps.summaries})
    waiting: deque[list[int]] = deque()
    while frames:
        stop = next((t + 1 for t in targets if t + 1 >= frames[0] + frames_per_step), len(steps.final))
        batch, frames = [f for f in frames if f < stop], [f for f in frames if f >= stop]
        if not frames:
            stop = len(steps.final)  # a target may come after the last frame that is read
        others = [frame for frame in batch if frame not in sampled]
        first = max(0, len(others) - frames_per_step // 2)
        for part in (others[:first], [frame for frame in batch if frame in sampled], others[first:]):
            if part:
                yield part
                if waiting:
                    yield waiting.popleft()
        for level in levels:
            waiting.append([s for s in level if steps.summaries[~s].target < stop])
            level[:] = [s for s in level if steps.summaries[~s].target >= stop]
        waiting = deque(filter(None, waiting))
        if waiting:
            yield waiting.popleft()
    yield from waiting


def save_tables(
    plan: GridPlan, path: str | os.PathLike[str], *, frames_per_step: int | None = None, gradient: bool = False
) -> None:
    """Write the tables of a plan to a file, which the C++ functions of csrc/grid_pool.h take without Python.

    The file is an array of little-endian int32 and nothing else; csrc/tables.h has its form, `check_tables` of
    grid_pool.h tells whether an array has it. It depends on the plan alone: not on the number of channels, nor on
    the dtype, nor on the weights of tokens. It appears whole, or not at all; a file that is there is replaced.

    frames_per_step: for a CPU, twice the number of its threads: the least number of frames that are read before
        the summaries that these complete are made, so that what is stored in between stays in the cache. None, for
        a GPU: all frames are read first, in as few steps as there can be. Results are the same bit by bit.

    gradient: for the functions of csrc/grid_pool.h that compute gradients. frames_per_step must be None.

    Raises ValueError if frames_per_step is less than 1 or given for a gradient, OSError where `path` is a folder or
    no regular file or cannot be written, OverflowError if a number of the plan exceeds 32 bits.
    """
    if frames_per_step is not None and frames_per_step < 1:
        raise ValueError(f"frames_per_step must be None or at least 1, got {frames_per_step}")
    if frames_per_step is not None and gradient:
        raise ValueError(f"frames_per_step must be None where gradient is True, got {frames_per_step}")
    words = array("i", plan_tables(plan, frames_per_step=frames_per_step, gradient=gradient))
    if sys.byteorder == "big":
        words.byteswap()
    with atomic_write(path, force=True) as file:
        file.write(words.tobytes())
