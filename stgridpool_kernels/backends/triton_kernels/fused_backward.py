"""Gradient of grid_pool and norm_pool at the published settings. The file backward.py has the formula.

The thumbnails are computed again by the kernels of the forward. Then one launch a level, from the last to the first,
computes the gradients of its summaries in float32, and a last launch those of all frames of x.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...plan.tables import CONSUMER_WORDS, Header, Stage, gradient_section, stages_of
from .config import fused_block, fused_config
from .fused import ENTRY, inverse, launch_stages, load_tile, places_in
from .launch import CallSpec, Launch, PreparedCall
from .slopes import count_largest, norm_slopes
from .tiles import (
    channel_places,
    finish_norms,
    frame_places,
    in_norm,
    logits_of,
    partial_norms,
    softmax_of_tile,
    stored_places,
    token_places,
)

CONSUMER: tl.constexpr = tl.constexpr(CONSUMER_WORDS)
"""The number of int32 in a consumer of the tables: a summary, its level, and the tile that the node is."""


@triton.jit(do_not_specialize=["entries", "consumers", "frames", "T", "weights"])  # one compilation serves all of these
def window_gradient_kernel(
    x,  # (…, T, H, W, C)
    out,  # gradient in x: (…, T, H, W, C)
    scratch,  # thumbnails: (slots, h, w, C)
    tables,
    grad,  # (…, T, OH, OW, C)
    gradients,  # of summaries, float32: (S, H, W, C)
    entries,  # where the entries of this launch start in `tables`; None for all frames of x, none of which is shrunk
    consumers,  # where in `tables` the offsets of the consumers of frame 0, frame 1, …, summary 0, … are
    frames,  # number of frames of x
    T,
    OH: tl.constexpr,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    MOSAIC: tl.constexpr,
):
    """G(c) of the four tokens of window (i, j), which stay in registers. One window of one node a program.

    They are averaged by cell (i, j) of the thumbnail of c, where H is odd the lower two by cell (i + 1, j) also, where
    W is odd the right two by cell (i, j + 1).

    MOSAIC: nodes are summaries, tiled from thumbnails; else frames of x.
    """
    channels, token = tl.arange(0, BLOCK), tl.arange(0, 4)
    program = tl.program_id(0)
    i, j = program // SIZE.w % SIZE.h, program % SIZE.w
    node = program // (SIZE.h * SIZE.w)
    target = node
    entry = tables
    if entries is not None:
        entry = tables + entries + node * ENTRY
        node, target = tl.load(entry), tl.load(entry + 1)
    rows, cols = 2 * i + token // 2, 2 * j + token % 2
    inside = (rows < SIZE.H) & (cols < SIZE.W)

    found = tl.zeros((4, BLOCK), tl.float32)
    if (target >= 0) & (i < OH) & (j < OW):
        image = scratch if MOSAIC else x.pointer + frame_places(node, T, x)
        places = places_in(i, j, token // 2, token % 2, entry, x, SIZE, MOSAIC)
        tile = load_tile(image, places, inside, channels, x, SIZE, MOSAIC)
        places = token_places(target, i, j, T, grad) + channels.to(tl.int64) * grad.channel
        upstream = tl.load(grad.pointer + places, mask=channels < SIZE.C, other=0.0, eviction_policy="evict_first")
        found = own_gradient(tile, upstream.to(tl.float32), inside, channels, weights, SIZE, NORM)
    if entries is not None:
        found = add_consumers(
            found, gradients, tables, entry, consumers + (frames - 1 - node if MOSAIC else node), i, j, channels, SIZE
        )

    mask = inside[:, None] & (channels < SIZE.C)[None, :]
    if MOSAIC:
        places = stored_places(node, rows, cols, SIZE)
        tl.store(gradients + places[:, None] + channels[None, :], found, mask=mask)
    else:
        places = channel_places(token_places(node, rows, cols, T, out), channels, out)
        tl.store(out.pointer + places, found.to(out.pointer.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def own_gradient(tile, upstream, inside, channels, weights, SIZE: tl.constexpr, NORM: tl.constexpr):
    """Return the gradient of a window's tokens, (4, BLOCK), from the gradient of its pooled token."""
    total = partial_norms(tile, channels, weights, NORM)
    norms = finish_norms(total, weights, SIZE.C, NORM, False)
    dots = tl.sum(tile * upstream[None, :], 1)[:, None]
    shares = softmax_of_tile(logits_of(norms, weights), inside)
    factors = weights.temperature * shares * (dots - tl.sum(shares * dots, 0)[None, :])
    largest = count_largest(tile, norms, channels, weights, SIZE.C) if NORM.kind == "max" else 0
    slopes = norm_slopes(tile, norms, largest, weights, SIZE.C, NORM)
    return shares * upstream[None, :] + in_norm(factors * slopes, channels, weights)


@triton.jit
def add_consumers(found, gradients, tables, entry, consumers, i, j, channels, SIZE: tl.constexpr):
    """Add to the gradients of the tokens of cell (i, j) what the summaries that average them pass on."""
    ODD_H: tl.constexpr = SIZE.H % 2
    ODD_W: tl.constexpr = SIZE.W % 2
    CELLS: tl.constexpr = (1 + ODD_H) * (1 + ODD_W)
    token = tl.arange(0, 4)
    first, last = tl.load(tables + consumers), tl.load(tables + consumers + 1)
    live = tables + tl.load(entry + 3)
    for step in tl.range((last - first) // CONSUMER * CELLS, num_stages=1):  # one loop: it is not unrolled
        consumer = tables + first + step // CELLS * CONSUMER
        s, tile_number = tl.load(consumer), tl.load(consumer + 2)
        below, beside = step % CELLS // (1 + ODD_W), step % (1 + ODD_W)
        down, right = i + below, j + beside
        row, col = tile_number // 2 * SIZE.h + down, tile_number % 2 * SIZE.w + right
        sampled = (right < tl.load(live + down, mask=down < SIZE.h, other=0)) & (row < SIZE.H) & (col < SIZE.W)
        top, left = tl.maximum(2 * down - ODD_H, 0), tl.maximum(2 * right - ODD_W, 0)
        size = inverse(tl.minimum(2 * down + 2, SIZE.H) - top) * inverse(tl.minimum(2 * right + 2, SIZE.W) - left)
        place = ((s.to(tl.int64) * SIZE.H + row) * SIZE.W + col) * SIZE.C
        of_cell = tl.load(gradients + place + channels, mask=channels < tl.where(sampled, SIZE.C, 0), other=0.0)
        averaged = (token // 2 >= below) & (token % 2 >= beside)
        found += tl.where(averaged[:, None], (of_cell * size)[None, :], 0.0)
    return found


def prepare(spec: CallSpec) -> PreparedCall:
    """Return the launches: for thumbnails, for the levels from last to first, and for x."""
    if not spec.gridded:
        return PreparedCall(spec.plan, [_launch(spec, None)], 0, None)
    header = Header.of(spec.words)
    launches = launch_stages(spec, pools=False)
    launches += [_launch(spec, stage) for stage in reversed(stages_of(spec.words))]
    scratch = max(header.slots, 1) * spec.size.h * spec.size.w * spec.size.C
    gradients = max(header.summaries, 1) * math.prod(spec.x.shape[-3:])
    return PreparedCall(spec.plan, launches, scratch, spec.tables, gradients)


def _launch(spec: CallSpec, stage: Stage | None) -> Launch:
    """Return the launch for the nodes of a stage, or for all frames where no frame goes into a summary."""
    config, (OH, OW) = fused_config(spec.size.C, spec.x.element_size(), spec.capability), spec.pooled_size
    frames = math.prod(spec.x.shape[:-3])
    arguments = spec.arguments() | {
        "OH": OH,
        "OW": OW,
        "BLOCK": fused_block(spec.size.C, spec.size.C),
        "frames": frames,
    }
    arguments |= {"MOSAIC": stage is not None and bool(stage.mosaic), "consumers": 0}
    if stage is not None:
        arguments |= {"entries": stage.entries, "consumers": gradient_section(spec.words).consumers}
    nodes = frames if stage is None else stage.num_entries
    grid = (nodes * spec.size.h * spec.size.w, 1, 1)
    return Launch(window_gradient_kernel, grid, arguments, **spec.options(config.num_warps))
