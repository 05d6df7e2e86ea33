"""grid_pool and norm_pool with any windows, over the frames of x and the summaries that replace some of them."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...plan.tables import Header
from .config import tile_config
from .launch import Arguments, CallSpec, Launch, PreparedCall
from .summaries import launch_summaries, summary_elements
from .tiles import (
    finish_norms,
    join_norms,
    load_tokens,
    logits_of,
    no_norms,
    partial_norms,
    softmax,
    store_token,
    weigh_tile,
)

OUTPUTS: tl.constexpr = tl.constexpr(Header._fields.index("outputs"))
WINDOW_ROWS: tl.constexpr = tl.constexpr(Header._fields.index("window_rows"))
WINDOW_COLS: tl.constexpr = tl.constexpr(Header._fields.index("window_cols"))
"""Places in the header of the tables, counted in int32, where kernels find the offsets that depend on the videos."""


@triton.jit(do_not_specialize=["T", "weights"])  # one compilation serves all values of these
def norm_pool_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, OH, OW, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    T,
    OH: tl.constexpr,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    SUMMARIES: tl.constexpr,
):
    """out[t, i, j] = Σ α·x[t, r, c] over window (i, j), α = softmax(temperature · ‖x[t, r, c]‖). One window a program.

    A window's tokens are read TOKENS at a time, their channels BLOCK at a time. Where that is one step, they are read
    once and stay in registers; else a second pass reads them again, from the caches, with all weights known.
    SUMMARIES: some frames may end with a summary.
    """
    frame, i, j, node, window = find_window(tables, OH, OW, SUMMARIES)
    image = (x, scratch, node, T)
    size = window[2] * window[3]
    position = tl.arange(0, TOKENS)
    channels = tl.arange(0, BLOCK)

    if STEPS == 1 and CHUNKS == 1:
        tile = load_window(image, window, position, channels, SIZE, SUMMARIES)
        shares = weigh_tile(tile, position < size, channels, weights, SIZE.C, NORM)
        store_token(out, frame, i, j, T, channels, channels < SIZE.C, tl.sum(shares * tile, 0))
    else:
        step_of = tl.arange(0, STEPS)
        norms = tl.zeros((STEPS, TOKENS), tl.float32)
        steps = tl.cdiv(size, TOKENS)
        for step in range(steps):
            total = no_norms(TOKENS, NORM)
            for chunk in range(CHUNKS):
                here = chunk * BLOCK + channels
                part = load_window(image, window, step * TOKENS + position, here, SIZE, SUMMARIES)
                total = join_norms(total, partial_norms(part, here, weights, NORM), NORM)
            found = finish_norms(total, weights, SIZE.C, NORM, False)
            norms = tl.where((step_of == step)[:, None], found[None, :], norms)
        number = step_of[:, None] * TOKENS + position[None, :]
        shares = softmax(logits_of(norms, weights), number < size)

        for chunk in range(CHUNKS):
            here = chunk * BLOCK + channels
            pooled = tl.zeros((BLOCK,), tl.float32)
            for step in range(steps):
                share = tl.sum(tl.where((step_of == step)[:, None], shares, 0.0), 0)
                again = load_window(image, window, step * TOKENS + position, here, SIZE, SUMMARIES)
                pooled += tl.sum(share[:, None] * again, 0)
            store_token(out, frame, i, j, T, here, here < SIZE.C, pooled)


@triton.jit
def find_window(tables, OH: tl.constexpr, OW: tl.constexpr, SUMMARIES: tl.constexpr):
    """Return this program's frame and window (i, j), the frame's node, and (top, left, height, width) of the window."""
    program = tl.program_id(0)
    frame, i, j = program // (OH * OW), program // OW % OH, program % OW
    node = tl.load(tables + tl.load(tables + OUTPUTS) + frame) if SUMMARIES else frame
    rows, cols = tables + tl.load(tables + WINDOW_ROWS) + i, tables + tl.load(tables + WINDOW_COLS) + j
    return frame, i, j, node, (tl.load(rows), tl.load(cols), tl.load(rows + OH), tl.load(cols + OW))


@triton.jit
def load_window(image, window, number, channels, SIZE: tl.constexpr, SUMMARIES: tl.constexpr):
    """Return tokens of these numbers in a (top, left, height, width) window as float32; those in the padding are 0."""
    x, summaries, node, T = image
    top, left, height, width = window
    rows, cols = top + number // width, left + number % width
    taken = (number < height * width) & (rows >= 0) & (rows < SIZE.H) & (cols >= 0) & (cols < SIZE.W)
    return load_tokens(x, summaries, node + 0 * number, rows, cols, taken, channels, T, SIZE, SUMMARIES).to(tl.float32)


def window_arguments(spec: CallSpec) -> tuple[Arguments, int]:
    """Return the arguments of kernels with a window a program, and the warps of each."""
    header, (OH, OW) = Header.of(spec.words), spec.pooled_size
    config = tile_config(spec.size.C, header.largest_window)
    arguments = spec.arguments() | {"OH": OH, "OW": OW, "SUMMARIES": spec.gridded}
    arguments |= {"BLOCK": config.block, "CHUNKS": config.chunks, "TOKENS": config.tokens}
    arguments |= {"STEPS": triton.next_power_of_2(triton.cdiv(header.largest_window, config.tokens))}
    return arguments, config.num_warps


def prepare(spec: CallSpec) -> PreparedCall:
    """Return the launches of the summaries of every level in full, then one launch with a program per window."""
    arguments, num_warps = window_arguments(spec)
    grid = (math.prod(spec.x.shape[:-3]) * math.prod(spec.pooled_size), 1, 1)
    launches = [*launch_summaries(spec), Launch(norm_pool_kernel, grid, arguments, **spec.options(num_warps))]
    return PreparedCall(spec.plan, launches, summary_elements(spec), spec.tables)
