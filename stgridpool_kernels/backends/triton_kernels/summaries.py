"""temporal_grid with any settings: one kernel computes the summaries of a level, another writes the result."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...plan.tables import Header, LevelRecord, levels_of
from .config import channelwise_config
from .launch import CallSpec, Launch, PreparedCall
from .tiles import channel_places, load_tokens, reciprocal, stored_places, token_places

SOURCES: tl.constexpr = tl.constexpr(LevelRecord._fields.index("sources"))
ROW_RUNS: tl.constexpr = tl.constexpr(LevelRecord._fields.index("row_runs"))
COL_RUNS: tl.constexpr = tl.constexpr(LevelRecord._fields.index("col_runs"))
"""Places in the record of a level, in int32, of the offsets of its nodes, its runs of rows and its runs of columns."""


@triton.jit(do_not_specialize=["count", "first", "level", "T"])  # arguments that vary with the videos
def summary_kernel(
    x,  # (…, T, H, W, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    count,  # number of summaries of this level
    first,  # number of the first of them
    level,  # where in `tables` the record of this level is
    most,  # largest counts of rows and of columns
    grid,  # rows and columns of the mosaic
    T,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMMARIES: tl.constexpr,
):
    """scratch[s, r, c] = mean of the mosaic of s over a run of rows × a run of columns.

    TOKENS of them and BLOCK of their channels a program. SUMMARIES: some nodes are summaries of earlier levels.
    """
    H: tl.constexpr = SIZE.H
    W: tl.constexpr = SIZE.W
    record = tables + level
    sources, row_runs = tables + tl.load(record + SOURCES), tables + tl.load(record + ROW_RUNS)
    col_runs = tables + tl.load(record + COL_RUNS)
    number = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = number < count * H * W
    s, r, c = number // (H * W), number // W % H, number % W
    top, height = tl.load(row_runs + r), tl.load(row_runs + H + r)
    left, width = tl.load(col_runs + c), tl.load(col_runs + W + c)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for k in range(most[0] * most[1]):
        down, right = k // most[1], k % most[1]
        taken = some & (down < height) & (right < width)
        row, col = top + down, left + right
        tile = row // H * grid[1] + col // W
        nodes = tl.load(sources + s * (grid[0] * grid[1]) + tile, mask=taken, other=0)
        tokens = load_tokens(x, scratch, nodes, row % H, col % W, taken, channels, T, SIZE, SUMMARIES)
        total += tokens.to(tl.float32)
    mean = total * reciprocal(height * width)[:, None]
    places = stored_places(-1 - (first + s), r, c, SIZE)
    mask = some[:, None] & (channels < SIZE.C)[None, :]
    tl.store(scratch + places[:, None] + channels[None, :], mean.to(scratch.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "T"])  # arguments that vary with the videos
def final_frames_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, H, W, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    outputs,  # where in `tables`: the node that each frame ends with
    count,  # number of frames
    T,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMMARIES: tl.constexpr,
):
    """out[t, r, c] = x[t, r, c], or the token of the summary that frame t ends with.

    TOKENS of them and BLOCK of their channels a program. SUMMARIES: some frames may end with one.
    """
    number = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = number < count * SIZE.H * SIZE.W
    frames, rows, cols = number // (SIZE.H * SIZE.W), number // SIZE.W % SIZE.H, number % SIZE.W
    nodes = tl.load(tables + outputs + frames, mask=some, other=0) if SUMMARIES else frames
    tokens = load_tokens(x, scratch, nodes, rows, cols, some, channels, T, SIZE, SUMMARIES)
    places = channel_places(token_places(frames, rows, cols, T, out), channels, out)
    tl.store(out.pointer + places, tokens, mask=some[:, None] & (channels < SIZE.C)[None, :])


def launch_summaries(spec: CallSpec) -> list[Launch]:
    """Return one launch per level, which write all its summaries to scratch; none without gridding."""
    if not spec.gridded:
        return []
    H, W, C = spec.x.shape[-3:]
    config = channelwise_config(C)
    shared = spec.arguments() | {"BLOCK": config.block, "TOKENS": config.tokens}
    launches: list[Launch] = []
    first_level = Header.of(spec.words).levels
    for number, level in enumerate(levels_of(spec.words)):
        counts = (
            spec.words[runs + size : runs + 2 * size] for runs, size in ((level.row_runs, H), (level.col_runs, W))
        )
        arguments = shared | {"count": level.num_summaries, "first": level.first, "grid": (level.rows, level.cols)}
        arguments |= {"level": first_level + number * len(level), "most": tuple(map(max, counts))}
        arguments |= {"SUMMARIES": level.first > 0}
        grid = (triton.cdiv(level.num_summaries * H * W, config.tokens), config.chunks, 1)
        launches.append(Launch(summary_kernel, grid, arguments, **spec.options(config.num_warps)))
    return launches


def summary_elements(spec: CallSpec) -> int:
    """Return the number of elements of all summaries in full; at least of one for settings with levels."""
    if not spec.gridded:
        return 0
    return max(Header.of(spec.words).summaries, 1) * math.prod(spec.x.shape[-3:])


def prepare(spec: CallSpec) -> PreparedCall:
    """Return the launches of temporal_grid: one per level for its summaries, then one that writes the result."""
    count, H, W = math.prod(spec.x.shape[:-3]), *spec.x.shape[-3:-1]
    config = channelwise_config(spec.size.C)
    arguments = spec.arguments() | {"outputs": Header.of(spec.words).outputs, "count": count, "SUMMARIES": spec.gridded}
    arguments |= {"BLOCK": config.block, "TOKENS": config.tokens}
    grid = (triton.cdiv(count * H * W, config.tokens), config.chunks, 1)
    launches = [*launch_summaries(spec), Launch(final_frames_kernel, grid, arguments, **spec.options(config.num_warps))]
    return PreparedCall(spec.plan, launches, summary_elements(spec), spec.tables)
