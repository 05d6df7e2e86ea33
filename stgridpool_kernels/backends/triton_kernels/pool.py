"""norm_pool with any windows, over the frames of x and the summaries that replace some of them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device_tables import tables_on
from .config import tile_config
from .launch import CallSpec, Launch, PreparedCall
from .summaries import launch_summaries
from .tiles import (
    finish_norms,
    join_norms,
    load_tokens,
    logits_of,
    no_norms,
    partial_norms,
    pool_tile,
    softmax,
    store_token,
)


@triton.jit(do_not_specialize=["row_starts", "T", "norm_channels"])  # one compilation serves all values of these
def norm_pool_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, OH, OW, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    row_starts,  # where in `tables`: OH starts of windows, OH counts, OW starts, OW counts
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
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
    temperature,
    norm_channels,  # channels of the norm, None for all
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    SUMMARIES: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    P: tl.constexpr,
):
    """out[t, i, j] = Σ α·x[t, r, c] over window (i, j), α = softmax(temperature · ‖x[t, r, c]‖). One window a program.

    A window's tokens are read TOKENS at a time, their channels BLOCK at a time. Where that is one step, they are read
    once and stay in registers; else a second pass reads them again, from the caches, with all weights known.
    SUMMARIES: some frames end as summaries; `tables` starts with what each ends with.
    """
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    out_strides = (out_video, out_frame, out_row, out_col, out_channel)
    program = tl.program_id(0)
    i, j = program // OW % OH, program % OW
    frame = program // (OH * OW)
    node = tl.load(tables + frame) if SUMMARIES else frame
    top, height = tl.load(tables + row_starts + i), tl.load(tables + row_starts + OH + i)
    left, width = tl.load(tables + row_starts + 2 * OH + j), tl.load(tables + row_starts + 2 * OH + OW + j)
    image = (x, scratch, node, T, H, W, x_strides)
    window = (top, left, height, width)
    position = tl.arange(0, TOKENS)
    channels = tl.arange(0, BLOCK)

    if STEPS == 1 and CHUNKS == 1:
        tile = load_window(image, window, position, channels, C, SUMMARIES)
        result = pool_tile(tile, position < height * width, channels, temperature, norm_channels, C, MEAN, NORM, P)
        store_token(out, frame, i, j, T, out_strides, channels, channels < C, result)
    else:
        step_of = tl.arange(0, STEPS)
        norms = tl.zeros((STEPS, TOKENS), tl.float32)
        steps = tl.cdiv(height * width, TOKENS)
        for step in range(steps):
            total = no_norms(TOKENS, NORM)
            for chunk in range(CHUNKS):
                part = load_window(image, window, step * TOKENS + position, chunk * BLOCK + channels, C, SUMMARIES)
                total = join_norms(total, partial_norms(part, chunk * BLOCK + channels, norm_channels, NORM, P), NORM)
            found = finish_norms(total, C, norm_channels, MEAN, NORM, P, False)
            norms = tl.where((step_of == step)[:, None], found[None, :], norms)
        number = step_of[:, None] * TOKENS + position[None, :]
        weights = softmax(logits_of(norms, temperature), number < height * width)

        for chunk in range(CHUNKS):
            here = chunk * BLOCK + channels
            pooled = tl.zeros((BLOCK,), tl.float32)
            for step in range(steps):
                weight = tl.sum(tl.where((step_of == step)[:, None], weights, 0.0), 0)
                again = load_window(image, window, step * TOKENS + position, here, C, SUMMARIES)
                pooled += tl.sum(weight[:, None] * again, 0)
            store_token(out, frame, i, j, T, out_strides, here, here < C, pooled)


@triton.jit
def load_window(image, window, number, channels, C: tl.constexpr, SUMMARIES: tl.constexpr):
    """Tokens of these numbers in a (top, left, height, width) window as float32; those in the padding are 0."""
    x, scratch, node, T, H, W, x_strides = image
    top, left, height, width = window
    rows, cols = top + number // width, left + number % width
    taken = (number < height * width) & (rows >= 0) & (rows < H) & (cols >= 0) & (cols < W)
    nodes = node + 0 * number
    tokens = load_tokens(x, scratch, nodes, rows, cols, taken, channels, T, H, W, x_strides, C, SUMMARIES)
    return tokens.to(tl.float32)


def prepare(request: CallSpec) -> PreparedCall:
    """Return the launches of the summaries of every level in full, then one launch with a program per window."""
    plan, C = request.plan, request.x.shape[-1]
    OH, OW = plan.pooled_size
    largest = max(plan.window_rows.count) * max(plan.window_cols.count)
    config = tile_config(C, largest)
    launches, tables, scratch = launch_summaries(request)
    arguments = request.sizes() | request.weights() | {"OH": OH, "OW": OW, "row_starts": len(tables)}
    arguments |= {"BLOCK": config.block, "CHUNKS": config.chunks, "TOKENS": config.tokens}
    arguments |= {"STEPS": triton.next_power_of_2(triton.cdiv(largest, config.tokens))}
    # Code that loads from scratch may sum over channels in another order. It therefore depends on the settings only,
    # not on whether these videos are long enough for a summary: a video must give the same bits alone and packed.
    arguments["SUMMARIES"] = request.gridded
    for runs in (plan.window_rows, plan.window_cols):
        tables += (*runs.start, *runs.count)
    grid = (len(request.graph.outputs) * OH * OW, 1, 1)
    launches.append(Launch(norm_pool_kernel, grid, arguments, num_warps=config.num_warps))
    return PreparedCall(plan, launches, scratch, tables_on(request.x.device, tables))
