"""A plan as one array of int32, which C++ kernels follow and `save_tables` writes. csrc/tables.h defines its words."""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

from ..io.writing import atomic_write
from .dataflow import (
    Dataflow,
    EndlessLiveness,
    MakeDataflow,
    consumers,
    inverse_runs,
    is_2x2_area,
    is_2x2_pooling,
    live_cells,
)
from .plan import GridPlan, Runs

MAGIC = int.from_bytes(b"STGP", "little")
VERSION = 3
"""Version of the tables, and of the private ops that take them: a library of another version is not loaded."""

HEADER_WORDS = 19
STAGE_WORDS = 5


@lru_cache(maxsize=256)
def plan_tables(
    plan: GridPlan,
    dataflow: MakeDataflow = Dataflow.of,
    frames_per_stage: int | None = None,
    gradient: bool = False,
) -> array[int]:
    """The tables of a plan.

    dataflow: `Dataflow.of`, or `Dataflow.none` for spatial pooling alone.
    frames_per_stage: the least number of frames that a stage reads before the summaries that they complete are made.
        Few thumbnails are kept at a time then, which suits a CPU's cache. With None all frames are read first and
        summaries are made level by level: few stages, which suits a GPU.
    gradient: whether to append the gradient section. Every node that is shrunk has a thumbnail of its own then, and
        every frame has an entry, since a frame that nothing depends on has a gradient too: 0. frames_per_stage must be
        None.
    """
    graph = dataflow(plan)
    words = [0] * HEADER_WORDS

    outputs = len(words)
    words += graph.outputs
    records: list[int] = []
    for numbers in graph.by_level():
        level = plan.levels[graph.summaries[numbers[0]].level]
        records += (level.rows, level.cols, numbers[0], len(numbers), len(words))
        for s in numbers:
            words += graph.summaries[s].sources
        records += (_append(words, level.row_runs), _append(words, level.col_runs))
    levels = len(words)
    words += records
    window_rows, window_cols = _append(words, plan.window_rows), _append(words, plan.window_cols)

    fused: list[int] = []
    slots = 0
    if is_2x2_pooling(plan) and is_2x2_area(plan):
        fused, slots = _fused(words, plan, graph, frames_per_stage, gradient)
    first_stage = len(words)
    words += fused
    section = _gradient(words, plan, graph) if gradient else 0

    words[:HEADER_WORDS] = (
        *(MAGIC, VERSION, len(words)),
        *(len(graph.outputs), plan.height, plan.width, *plan.pooled_size),
        max(plan.window_rows.count) * max(plan.window_cols.count),
        *(len(graph.summaries), outputs, levels, len(graph.by_level()), window_rows, window_cols),
        *(first_stage, len(fused) // STAGE_WORDS, slots, section),
    )
    return array("i", words)


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

    records: list[int] = []
    for summaries in kept:
        level = plan.levels[graph.summaries[summaries[0]].level]
        records.append(_append(words, inverse_runs(level.row_runs, level.rows * plan.height)))
        records.append(_append(words, inverse_runs(level.col_runs, level.cols * plan.width)))
    window_rows = _append(words, inverse_runs(plan.window_rows, plan.height))
    window_cols = _append(words, inverse_runs(plan.window_cols, plan.width))
    section = len(words)
    words += (starts, window_rows, window_cols, *records)
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
    """(level, entry) of the next frame of a stream, with level −1, and of each summary that replaces that frame.

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


@dataclass(frozen=True)
class Chunk:
    """Tables of a chunk of streams, and the stages in them.

    plan: a plan of the streams' settings. stages: for each, whether its nodes are summaries, the offset of its entries,
    their number, and how many of them have a thumbnail.
    """

    plan: GridPlan
    words: tuple[int, ...]
    stages: tuple[tuple[int, int, int, int], ...]


def chunk_tables(plan: GridPlan, frames: int, stages: Sequence[Sequence[ChunkEntry]], slots: int) -> Chunk:
    """The tables of a chunk of streams. They have the fused form alone.

    stages: the frames of the chunk first, then the summaries level by level. A slot is written at most once, and never
    if it holds a thumbnail from before the chunk. slots: one more than the highest slot.
    """
    words = [0] * HEADER_WORDS
    outputs = len(words)
    words += range(frames)
    window_rows, window_cols = _append(words, plan.window_rows), _append(words, plan.window_cols)
    none_live = (0,) * -(-plan.height // 2)
    rows: dict[tuple[int, ...], int] = {}
    for counts in (none_live, *(entry.live for stage in stages for entry in stage if entry.live)):
        if counts not in rows:
            rows[counts] = len(words)
            words += counts
    records: list[int] = []
    shape: list[tuple[int, int, int, int]] = []
    for entries in filter(None, stages):
        shrunk = [entry for entry in entries if entry.slot >= 0]
        shape.append((int(entries[0].node < 0), len(words), len(entries), len(shrunk)))
        records += (*shape[-1], len(shape) - 1)
        for entry in (*shrunk, *(entry for entry in entries if entry.slot < 0)):
            words += (entry.node, entry.target, entry.slot, rows[entry.live or none_live], *entry.sources)
    first_stage = len(words)
    words += records
    words[:HEADER_WORDS] = (
        *(MAGIC, VERSION, len(words)),
        *(frames, plan.height, plan.width, *plan.pooled_size),
        max(plan.window_rows.count) * max(plan.window_cols.count),
        *(0, outputs, first_stage, 0, window_rows, window_cols),
        *(first_stage, len(shape), slots, 0),
    )
    return Chunk(plan, tuple(words), tuple(shape))


def _append(words: list[int], runs: Runs) -> int:
    start = len(words)
    words += (*runs.start, *runs.count)
    return start


def _fused(
    words: list[int], plan: GridPlan, graph: Dataflow, frames_per_stage: int | None, gradient: bool
) -> tuple[list[int], int]:
    """Append the entries of the fused form; return the records of its stages and the number of slots."""
    live = live_cells(plan, graph)
    ends = {node: frame for frame, node in enumerate(graph.outputs)}
    none_live = (0,) * -(-plan.height // 2)
    rows: dict[tuple[int, ...], int] = {}
    for counts in (none_live, *live.values()):
        if counts not in rows:
            rows[counts] = len(words)
            words += counts

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
    records: list[int] = []
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
        records += (int(nodes[0] < 0), len(words), len(nodes), len(shrunk), after)
        for node in (*shrunk, *(node for node in nodes if node not in live)):
            words += (node, ends.get(node, -1), slot.get(node, -1), rows[live.get(node, none_live)])
            words += [slot.get(source, -1) for source in sources(node)] or [-1] * 4
        for node in last_used[stage]:
            if node in slot and not gradient:
                freed[slot[node]] = stage + 1
                heappush(free, slot.pop(node))
    return records, len(freed)


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
