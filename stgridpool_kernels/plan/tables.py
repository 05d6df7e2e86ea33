"""A plan as one array of int32, which all kernels follow and `save_tables` writes. csrc/tables.h defines its words."""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from ..io.writing import atomic_write
from .dataflow import Dataflow, EndlessLiveness, consumers, inverse_runs, live_cells
from .plan import GridPlan, Runs

MAGIC = int.from_bytes(b"STGP", "little")
VERSION = 4
"""Version of the tables, and of the private ops that take them: a library of another version is not loaded."""

Words = Sequence[int]
"""Tables: an array of int32. An offset is the index of a word."""


class Header(NamedTuple):
    """The first words of all tables, as `Header` of csrc/tables.h describes them."""

    magic: int
    version: int
    words: int
    frames: int
    height: int
    width: int
    out_rows: int
    out_cols: int
    largest_window: int
    summaries: int
    outputs: int
    levels: int
    num_levels: int
    window_rows: int
    window_cols: int
    stages: int
    num_stages: int
    slots: int
    gradient: int

    @classmethod
    def of(cls, words: Words) -> Header:
        """Return the header of tables."""
        return cls(*words[: len(cls._fields)])


class LevelRecord(NamedTuple):
    """A level that has summaries, as `Level` of csrc/tables.h describes it."""

    rows: int
    cols: int
    first: int
    num_summaries: int
    sources: int
    row_runs: int
    col_runs: int


class Stage(NamedTuple):
    """A set of entries that may be computed at the same time, as `Stage` of csrc/tables.h describes it."""

    mosaic: int
    entries: int
    num_entries: int
    shrunk: int
    after: int


class GradientSection(NamedTuple):
    """The first words of the gradient section, as `Gradient` of csrc/tables.h describes them.

    After them come two offsets for every level: of the inverses of its row runs and of its column runs.
    """

    consumers: int
    ends: int
    window_rows: int
    window_cols: int


HEADER_WORDS = len(Header._fields)
ENTRY_WORDS = 8
CONSUMER_WORDS = 3
"""The numbers of words of the header, of an entry and of a consumer, as in csrc/tables.h."""


def levels_of(words: Words) -> list[LevelRecord]:
    """Return the records of the levels in tables, in the order in which they run."""
    header = Header.of(words)
    size = len(LevelRecord._fields)
    starts = range(header.levels, header.levels + header.num_levels * size, size)
    return [LevelRecord(*words[start : start + size]) for start in starts]


def stages_of(words: Words) -> list[Stage]:
    """Return the records of the stages in tables, none if they lack the fused form."""
    header = Header.of(words)
    size = len(Stage._fields)
    starts = range(header.stages, header.stages + header.num_stages * size, size)
    return [Stage(*words[start : start + size]) for start in starts]


def gradient_section(words: Words) -> GradientSection:
    """Return the first words of the gradient section of tables, which must have one."""
    start = Header.of(words).gradient
    return GradientSection(*words[start : start + len(GradientSection._fields)])


def plan_tables(plan: GridPlan, *, frames_per_stage: int | None = None, gradient: bool = False) -> array[int]:
    """Return the tables of a plan.

    frames_per_stage: the least number of frames that a stage reads before the summaries that they complete are made.
        Few thumbnails are kept at a time then, which suits a CPU's cache. With None all frames are read first and
        summaries are made level by level: few stages, which suits a GPU.
    gradient: whether to append the gradient section. Every node that is shrunk has a thumbnail of its own then, and
        every frame has an entry, since a frame that nothing depends on has a gradient too: 0. frames_per_stage must be
        None.
    """
    graph = Dataflow.of(plan)
    words = [0] * HEADER_WORDS

    outputs = len(words)
    words += graph.outputs
    records: list[int] = []
    for numbers in graph.by_level():
        level = plan.levels[graph.summaries[numbers[0]].level]
        sources = len(words)
        for s in numbers:
            words += graph.summaries[s].sources
        runs = (_append(words, level.row_runs), _append(words, level.col_runs))
        records += LevelRecord(level.rows, level.cols, numbers[0], len(numbers), sources, *runs)
    levels = len(words)
    words += records
    window_rows, window_cols = _append(words, plan.window_rows), _append(words, plan.window_cols)

    stages: list[Stage] = []
    slots = 0
    if plan.fusable:
        stages, slots = _fused(words, plan, graph, frames_per_stage, gradient)
    first_stage = len(words)
    for stage in stages:
        words += stage
    section = _gradient(words, plan, graph) if gradient else 0
    _write_header(
        words,
        plan,
        frames=len(graph.outputs),
        summaries=len(graph.summaries),
        outputs=outputs,
        levels=levels,
        num_levels=len(graph.by_level()),
        window_rows=window_rows,
        window_cols=window_cols,
        stages=first_stage,
        num_stages=len(stages),
        slots=slots,
        gradient=section,
    )
    return array("i", words)


def _write_header(words: list[int], plan: GridPlan, **others: int) -> None:
    """Write the header over the first words. others: the fields of `Header` that neither plan nor length determine."""
    words[:HEADER_WORDS] = Header(
        magic=MAGIC,
        version=VERSION,
        words=len(words),
        height=plan.height,
        width=plan.width,
        out_rows=plan.pooled_size[0],
        out_cols=plan.pooled_size[1],
        largest_window=max(plan.window_rows.count) * max(plan.window_cols.count),
        **others,
    )


def _gradient(words: list[int], plan: GridPlan, graph: Dataflow) -> int:
    """Append the gradient section; return its offset."""
    kept = graph.by_level()
    level_of = {s: number for number, summaries in enumerate(kept) for s in summaries}
    found = consumers(graph)
    nodes = (*range(len(graph.outputs)), *(~s for s in range(len(graph.summaries))))
    starts = len(words)
    words += [0] * (len(nodes) + 1)
    for number, node in enumerate(nodes):
        words[starts + number] = len(words)
        for s, tile in found.get(node, ()):
            words += (s, level_of[s], tile)
    words[starts + len(nodes)] = len(words)
    frame_of = {node: frame for frame, node in enumerate(graph.outputs)}
    ends = len(words)
    words += (frame_of.get(node, -1) for node in nodes)

    records: list[int] = []
    for summaries in kept:
        level = plan.levels[graph.summaries[summaries[0]].level]
        records.append(_append(words, inverse_runs(level.row_runs, level.rows * plan.height)))
        records.append(_append(words, inverse_runs(level.col_runs, level.cols * plan.width)))
    window_rows = _append(words, inverse_runs(plan.window_rows, plan.height))
    window_cols = _append(words, inverse_runs(plan.window_cols, plan.width))
    section = len(words)
    words += (*GradientSection(starts, ends, window_rows, window_cols), *records)
    return section


@dataclass(frozen=True)
class ChunkEntry:
    """A frame of a chunk of streams (number `node`), or a summary (any number below 0) tiled from `sources`.

    target: the frame of the result that it is pooled into, or −1. slot, live: where its thumbnail is stored, and the
        number of live cells in each of its rows; −1 and () without a thumbnail.
    sources: slots of the four thumbnails, −1 for one without live cells. Where slots hold frames in place of
        thumbnails, there is a source for each place of the mosaic.
    """

    node: int
    target: int
    slot: int
    live: tuple[int, ...]
    sources: tuple[int, ...] = (-1,) * 4


def chunk_entries(
    liveness: EndlessLiveness, frame: int, row: int, groups: list[dict[int, int]], free: Iterator[int]
) -> Iterator[tuple[int, ChunkEntry]]:
    """Yield (level, entry) of the next frame of a stream, with level −1, and of each summary that replaces that frame.

    A node that nothing depends on has no entry. row: the frame's row in the chunk. groups: for every level, the slots
    that the open group occupies, by place in its mosaic; they are updated. free: slots that may be written to.
    """
    for level in range(-1, len(groups)):
        sources: dict[int, int] = {}
        places = 4
        if level >= 0:
            segment = liveness.segments[level]
            if frame != segment.target_of(frame):
                continue
            sources, groups[level], places = groups[level], {}, segment.rows * segment.cols
        live = liveness.of(level, frame)
        slot = next(free) if live.places else -1
        for later, place in live.places:
            groups[later][place] = slot
        if live.places or live.is_output:
            node, target = row if level < 0 else -1 - row, row if live.is_output else -1
            yield level, ChunkEntry(node, target, slot, live.cells, tuple(sources.get(i, -1) for i in range(places)))


def chunk_tables(plan: GridPlan, frames: int, stages: Sequence[Sequence[ChunkEntry]], slots: int) -> tuple[int, ...]:
    """Return the tables of a chunk of streams, which have the fused form alone.

    plan: a plan of the streams' settings, whose frames are not used. stages: the frames of the chunk first, then the
    summaries level by level. A slot is written at most once, and never if it holds a thumbnail from before the chunk.
    slots: one more than the highest slot.
    """
    words = [0] * HEADER_WORDS
    outputs = len(words)
    words += range(frames)
    window_rows, window_cols = _append(words, plan.window_rows), _append(words, plan.window_cols)
    rows = _append_live_rows(words, plan, (entry.live for stage in stages for entry in stage if entry.live))
    records: list[Stage] = []
    for entries in filter(None, stages):
        shrunk = [entry for entry in entries if entry.slot >= 0]
        records.append(Stage(int(entries[0].node < 0), len(words), len(entries), len(shrunk), after=len(records)))
        for entry in (*shrunk, *(entry for entry in entries if entry.slot < 0)):
            words += (entry.node, entry.target, entry.slot, rows[entry.live], *entry.sources)
    first_stage = len(words)
    for record in records:
        words += record
    _write_header(
        words,
        plan,
        frames=frames,
        summaries=0,
        outputs=outputs,
        levels=first_stage,
        num_levels=0,
        window_rows=window_rows,
        window_cols=window_cols,
        stages=first_stage,
        num_stages=len(records),
        slots=slots,
        gradient=0,
    )
    return tuple(words)


def _append_live_rows(words: list[int], plan: GridPlan, live: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Append every different tuple of counts of live cells once; return their offsets. () stands for no live cells."""
    none_live = (0,) * -(-plan.height // 2)
    rows: dict[tuple[int, ...], int] = {}
    for counts in (none_live, *live):
        if counts not in rows:
            rows[counts] = len(words)
            words += counts
    return rows | {(): rows[none_live]}


def _append(words: list[int], runs: Runs) -> int:
    start = len(words)
    words += (*runs.start, *runs.count)
    return start


def _fused(
    words: list[int], plan: GridPlan, graph: Dataflow, frames_per_stage: int | None, gradient: bool
) -> tuple[list[Stage], int]:
    """Append the entries of the fused form; return its stages and the number of slots."""
    live = live_cells(plan, graph)
    ends = {node: frame for frame, node in enumerate(graph.outputs)}
    rows = _append_live_rows(words, plan, live.values())

    def sources(node: int) -> tuple[int, ...]:
        return graph.summaries[~node].sources if node < 0 else ()

    frames = [frame for frame in range(len(graph.outputs)) if gradient or frame in live or frame in ends]
    levels = [[~s for s in level if gradient or ~s in live or ~s in ends] for level in graph.by_level()]
    if frames_per_stage is None:
        order = [frames, *levels]
    else:
        order = list(_interleaved(graph, frames, levels, set(live), frames_per_stage))
    order = [nodes for nodes in order if nodes]

    made = {node: stage for stage, nodes in enumerate(order) for node in nodes}
    last_use = {source: stage for stage, nodes in enumerate(order) for c in nodes for source in sources(c)}
    last_used: defaultdict[int, list[int]] = defaultdict(list)
    for node, stage in last_use.items():
        last_used[stage].append(node)
    stages: list[Stage] = []
    slot: dict[int, int] = {}
    free: list[int] = []
    freed: list[int] = []  # per slot: how many stages must be complete before it may be written again
    for stage, nodes in enumerate(order):
        shrunk = [node for node in nodes if node in live]
        for node in shrunk:
            if not free:
                heappush(free, len(freed))
                freed.append(0)
            slot[node] = heappop(free)
        after = max(
            [made.get(source, -1) + 1 for node in nodes for source in sources(node)]
            + [freed[slot[node]] for node in shrunk],
            default=0,
        )
        stages.append(Stage(int(nodes[0] < 0), len(words), len(nodes), len(shrunk), after))
        for node in (*shrunk, *(node for node in nodes if node not in live)):
            words += (node, ends.get(node, -1), slot.get(node, -1), rows[live.get(node, ())])
            words += [slot.get(source, -1) for source in sources(node)] or [-1] * 4
        for node in last_used[stage]:
            if node in slot and not gradient:
                freed[slot[node]] = stage + 1
                heappush(free, slot.pop(node))
    return stages, len(freed)


def _interleaved(
    graph: Dataflow, frames: list[int], levels: list[list[int]], sampled: set[int], frames_per_stage: int
) -> Iterator[list[int]]:
    """Order the nodes in stages that rarely depend on the stage just before them, so that threads seldom wait.

    Frames are taken in batches that end with a target. In a batch, the sampled frames, which summaries wait for, stand
    between the other frames, which nothing waits for. Levels follow one by one, with frames between them.
    """
    targets = sorted({summary.target for summary in graph.summaries})
    targets_of = [[graph.summaries[~s].target for s in level] for level in levels]
    taken = [0] * len(levels)  # number of the summaries of each level that earlier batches complete
    waiting: deque[list[int]] = deque()
    first = 0
    while first < len(frames):
        ends = bisect_left(targets, frames[first] + frames_per_stage - 1)
        stop = targets[ends] + 1 if ends < len(targets) else len(graph.outputs)
        last = bisect_left(frames, stop)
        if last == len(frames):
            stop = len(graph.outputs)  # a target may come after the last frame that is read
        batch, first = frames[first:last], last
        others = [frame for frame in batch if frame not in sampled]
        leading = max(0, len(others) - frames_per_stage // 2)
        for part in (others[:leading], [frame for frame in batch if frame in sampled], others[leading:]):
            if part:
                yield part
                if waiting:
                    yield waiting.popleft()
        for number, level in enumerate(levels):
            completed = bisect_left(targets_of[number], stop)
            if taken[number] < completed:
                waiting.append(level[taken[number] : completed])
                taken[number] = completed
        if waiting:
            yield waiting.popleft()
    yield from waiting


def save_tables(
    plan: GridPlan, path: str | os.PathLike[str], *, frames_per_stage: int | None = None, gradient: bool = False
) -> None:
    """Write the tables of a plan to a file, which the C++ functions of csrc/grid_pool.h take without Python.

    The file is an array of little-endian int32 and nothing else; csrc/tables.h has its form, `check_tables` of
    grid_pool.h tells whether an array has it. It depends on the plan alone: not on the number of channels, nor on
    the dtype, nor on the weights of tokens. It appears whole, or not at all; a file that is there is replaced.

    frames_per_stage: for a CPU, twice the number of its threads: the least number of frames that are read before
        the summaries that these complete are made, so that what is stored in between stays in the cache. None, for
        a GPU: all frames are read first, in as few stages as there can be. Results are the same bit by bit.

    gradient: for the functions of csrc/grid_pool.h that compute gradients. frames_per_stage must be None.

    Raises ValueError if frames_per_stage is less than 1 or given for a gradient, OSError where `path` is a folder or
    no regular file or cannot be written, OverflowError if a number of the plan exceeds 32 bits.
    """
    if frames_per_stage is not None and frames_per_stage < 1:
        raise ValueError(f"frames_per_stage must be None or at least 1, got {frames_per_stage}")
    if frames_per_stage is not None and gradient:
        raise ValueError(f"frames_per_stage must be None where gradient is True, got {frames_per_stage}")
    words = array("i", plan_tables(plan, frames_per_stage=frames_per_stage, gradient=gradient))
    if sys.byteorder == "big":
        words.byteswap()
    with atomic_write(path, force=True) as file:
        file.write(words.tobytes())
