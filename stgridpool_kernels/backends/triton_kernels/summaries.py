"""temporal_grid with any settings: one kernel computes the summaries of a level, another writes the result."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device_tables import tables_on
from .config import channelwise_config
from .launch import CallSpec, Launch, PreparedCall
from .tiles import load_tokens, reciprocal, token_places


@triton.jit(do_not_specialize=["n", "first", "sources", "runs", "T"])  # arguments that vary with the videos
def summary_kernel(
    x,  # (…, T, H, W, C)
    out,  # unused
    scratch,  # summaries: (S, H, W, C)
    tables,
    n,  # summaries of this level
    first,  # number of the first of them
    sources,  # where in `tables`: the `rows × cols` nodes of each
    runs,  # and H starts of runs of mosaic rows, H counts, W starts, W counts
    highest,  # largest count of rows
    widest,  # and of columns
    rows,  # of the grid
    cols,
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    x_video: tl.int64,
    x_frame,
    x_row,
    x_col,
    x_channel,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMMARIES: tl.constexpr,
):
    """scratch[s, r, c] = mean of the mosaic of s over a run of rows × a run of columns.

    TOKENS of them and BLOCK of their channels a program. SUMMARIES: some nodes are summaries of earlier levels.
    """
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    number = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = number < n * H * W
    s, r, c = number // (H * W), number // W % H, number % W
    top = tl.load(tables + runs + r)
    height = tl.load(tables + runs + H + r)
    left = tl.load(tables + runs + 2 * H + c)
    width = tl.load(tables + runs + 2 * H + W + c)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for k in range(highest * widest):
        down, right = k // widest, k % widest
        taken = some & (down < height) & (right < width)
        row, col = top + down, left + right
        tile = row // H * cols + col // W
        nodes = tl.load(tables + sources + s * (rows * cols) + tile, mask=taken, other=0)
        tokens = load_tokens(x, scratch, nodes, row % H, col % W, taken, channels, T, H, W, x_strides, C, SUMMARIES)
        total += tokens.to(tl.float32)
    mean = total * reciprocal(height * width)[:, None]
    places = (((first + s).to(tl.int64) * H + r) * W + c) * C
    mask = some[:, None] & (channels < C)[None, :]
    tl.store(scratch + places[:, None] + channels[None, :], mean.to(scratch.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "T"])  # arguments that vary with the videos
def final_frames_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, H, W, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    n,  # frames
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    x_video: tl.int64,
    x_frame,
    x_row,
    x_col,
    x_channel,
    out_video: tl.int64,
    out_frame,
    out_row,
    out_col,
    out_channel,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMMARIES: tl.constexpr,
):
    """out[t, r, c] = x[t, r, c], or the summary that frame t ends with: `tables` starts with what each ends with.

    TOKENS of them and BLOCK of their channels a program.
    """
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    out_strides = (out_video, out_frame, out_row, out_col, out_channel)
    number = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = number < n * H * W
    frames, rows, cols = number // (H * W), number // W % H, number % W
    nodes = tl.load(tables + frames, mask=some, other=0) if SUMMARIES else frames
    tokens = load_tokens(x, scratch, nodes, rows, cols, some, channels, T, H, W, x_strides, C, SUMMARIES)
    places = token_places(frames, rows, cols, T, out_strides)[:, None] + channels.to(tl.int64)[None, :] * out_channel
    tl.store(out + places, tokens, mask=some[:, None] & (channels < C)[None, :])


def launch_summaries(request: CallSpec) -> tuple[list[Launch], list[int], int]:
    """Return one launch per level, which write all summaries to scratch; their tables, which start with the node that
    each frame ends with; and the number of elements of scratch. All are empty without gridding."""
    H, W, C = request.x.shape[-3:]
    graph = request.graph
    config = channelwise_config(C)
    launches: list[Launch] = []
    tables = list(graph.outputs) if request.gridded else []
    for numbers in graph.by_level():
        level = request.plan.levels[graph.summaries[numbers[0]].level]
        arguments = request.sizes() | {"n": len(numbers), "first": numbers[0], "rows": level.rows, "cols": level.cols}
        arguments |= {"highest": max(level.row_runs.count), "widest": max(level.col_runs.count)}
        arguments |= {"BLOCK": config.block, "TOKENS": config.tokens, "SUMMARIES": numbers[0] > 0}
        arguments["sources"] = len(tables)
        for s in numbers:
            tables += graph.summaries[s].sources
        arguments["runs"] = len(tables)
        for runs in (level.row_runs, level.col_runs):
            tables += (*runs.start, *runs.count)
        grid = (triton.cdiv(len(numbers) * H * W, config.tokens), config.chunks, 1)
        launches.append(Launch(summary_kernel, grid, arguments, num_warps=config.num_warps))
    return launches, tables, max(len(graph.summaries), int(request.gridded)) * H * W * C


def prepare(request: CallSpec) -> PreparedCall:
    """Return one launch per level for its summaries, then one that writes the result."""
    H, W, C = request.x.shape[-3:]
    n = len(request.graph.outputs)
    config = channelwise_config(C)
    launches, tables, scratch = launch_summaries(request)
    arguments = request.sizes() | {"n": n, "SUMMARIES": request.gridded, "BLOCK": config.block, "TOKENS": config.tokens}
    grid = (triton.cdiv(n * H * W, config.tokens), config.chunks, 1)
    launches.append(Launch(final_frames_kernel, grid, arguments, num_warps=config.num_warps))
    return PreparedCall(request.plan, launches, scratch, tables_on(request.x.device, tables))
