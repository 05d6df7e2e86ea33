"""Gradients of grid_pool, norm_pool and temporal_grid with respect to x. Backwards recompute all values from x.

The gradient G(c) of a node c (frame t ≥ 0, or summary ~s), of shape (H, W, C), adds the gradient own(c) of the output
that c is, if any, and shares of G(~s) of the summaries s that consume c,

    G(c)[r, q] = own(c)[r, q] + Σ_(s, tile) Σ_(i, j) G(~s)[i, j] / (rows · columns that token (i, j) of s averages)

over the tokens (i, j) of s that average token (r, q) of c. Let α, t and n be the weights, tokens and norms of a window,
g its upstream gradient, and d = g·t. Then

    own[k] = Σ_windows α_k g + γ_k ∂n_k/∂t_k,    γ_k = τ α_k (d_k − Σ_l α_l d_l)

One launch per level, from the last to the first, computes G of its summaries in float32; a last launch computes G of
all frames of x and rounds it once. One program gathers each gradient in a fixed order, without atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ...plan import Runs
from ...plan.dataflow import consumers, inverse_runs
from ..device_tables import tables_on
from .config import channelwise_config, fused_block, fused_config, tile_config
from .fused import Shrunk, frame_of, inverse, launch_cells, load_tile, places_in
from .launch import TENSORS, CallSpec, Launch, PreparedCall
from .pool import load_window
from .summaries import launch_summaries
from .tiles import (
    finish_norms,
    in_norm,
    join_norms,
    load_tokens,
    logits_of,
    no_norms,
    partial_norms,
    reciprocal,
    softmax,
    softmax_of_tile,
    token_places,
)


@triton.jit
def norm_slopes(
    tile, norms, largest, norm_channels, C: tl.constexpr, MEAN: tl.constexpr, NORM: tl.constexpr, P: tl.constexpr
):
    """∂‖t‖/∂t_c, of channels that the norm runs over, of tokens with these norms: 0 where ‖t‖ or t_c is.

    largest: how many elements are as large as the norm, for "max".
    """
    M: tl.constexpr = C if MEAN and norm_channels is None else 1
    if NORM == "l2":
        slopes = tile * (1 / tl.where(norms > 0, norms * M, float("inf")))[:, None]
    else:
        signs = tl.where(tile > 0, 1.0, tl.where(tile < 0, -1.0, 0.0))
        if NORM == "l1":
            slopes = signs * (1.0 / M)
        elif NORM == "max":
            slopes = tl.where(tl.abs(tile) == norms[:, None], signs * (1 / largest.to(tl.float32))[:, None], 0.0)
        else:
            logarithms = tl.log2(tl.abs(tile).to(tl.float64)) - tl.log2(norms.to(tl.float64))[:, None]
            powers = tl.exp2((P - 1) * logarithms).to(tl.float32)
            slopes = tl.where((tile != 0) & (norms > 0)[:, None], signs * powers * (1.0 / M), 0.0)
    if norm_channels is not None and MEAN and NORM != "max":
        slopes *= reciprocal(norm_channels)
    return slopes


@triton.jit
def count_largest(tile, norms, channels, norm_channels, C: tl.constexpr):
    """The number of elements, among those that the norm runs over, that are as large as the norm, the maximum."""
    taken = channels < C if norm_channels is None else channels < norm_channels
    return tl.sum(((tl.abs(tile) == norms[:, None]) & taken[None, :]).to(tl.int32), 1)


# ---- the published settings ----

ENTRY: tl.constexpr = tl.constexpr(9)
"""Number of int32 in an entry of the tables: the node, the frame that ends with it or −1, the offset of its consumers
and their number, the four slots that a mosaic is tiled from, and the offset of its row counts of live cells; the
gradient of other cells' tokens through summaries is 0. A consumer is a summary and a tile of its mosaic."""


@triton.jit(do_not_specialize=["entries", "T", "norm_channels"])  # one compilation serves all values of these
def pair_gradient_kernel(
    x,  # (…, T, H, W, C)
    out,  # gradient in x: (…, T, H, W, C)
    scratch,  # thumbnails: (slots, h, w, C)
    tables,
    grad,  # (…, T, OH, OW, C)
    gradients,  # of summaries, float32: (S, H, W, C)
    entries,  # where in `tables` those of this launch start
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
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
    grad_video: tl.int64,
    grad_frame,
    grad_row,
    grad_col,
    grad_channel,
    temperature,
    norm_channels,  # channels of the norm, None for all
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ODD_H: tl.constexpr,
    ODD_W: tl.constexpr,
    MOSAIC: tl.constexpr,
    PLAIN: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    P: tl.constexpr,
):
    """G(c) of the four tokens of window (i, j), which stay in registers. One window of one node a program.

    They are averaged by cell (i, j) of the thumbnail of c, where H is odd the lower two by cell (i + 1, j) also, where
    W is odd the right two by cell (i, j + 1).

    MOSAIC: nodes are summaries, tiled from thumbnails; else frames of x. PLAIN: no frame goes into a summary, and
    there is no table.
    """
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    out_strides = (out_video, out_frame, out_row, out_col, out_channel)
    channels = tl.arange(0, BLOCK)
    token = tl.arange(0, 4)
    program = tl.program_id(0)
    i, j = program // w % h, program % w
    node = program // (h * w)
    target = node
    entry = tables
    if not PLAIN:
        entry = tables + entries + node * ENTRY
        node, target = tl.load(entry), tl.load(entry + 1)
    rows, cols = 2 * i + token // 2, 2 * j + token % 2
    inside = (rows < H) & (cols < W)

    found = tl.zeros((4, BLOCK), tl.float32)
    if (target >= 0) & (i < OH) & (j < OW):
        image = scratch if MOSAIC else frame_of(x, node, T, x_strides)
        window = places_in(rows, cols, entry, h, w, x_strides, C, MOSAIC)
        tile = load_tile(image, window, inside, channels, x_strides, C, MOSAIC)
        place = token_places(target, i, j, T, (grad_video, grad_frame, grad_row, grad_col))
        places = place + channels.to(tl.int64) * grad_channel
        upstream = tl.load(grad + places, mask=channels < C, other=0.0, eviction_policy="evict_first").to(tl.float32)
        total = partial_norms(tile, channels, norm_channels, NORM, P)
        norms = finish_norms(total, C, norm_channels, MEAN, NORM, P, False)
        dots = tl.sum(tile * upstream[None, :], 1)[:, None]
        weights = softmax_of_tile(logits_of(norms, temperature), inside)
        factors = temperature * weights * (dots - tl.sum(weights * dots, 0)[None, :])
        largest = count_largest(tile, norms, channels, norm_channels, C) if NORM == "max" else 0
        slopes = norm_slopes(tile, norms, largest, norm_channels, C, MEAN, NORM, P)
        found = weights * upstream[None, :] + in_norm(factors * slopes, channels, norm_channels)

    if not PLAIN:
        consumer, live = tables + tl.load(entry + 2), tables + tl.load(entry + 8)
        CELLS: tl.constexpr = (1 + ODD_H) * (1 + ODD_W)
        for step in tl.range(tl.load(entry + 3) * CELLS, num_stages=1):  # one loop: it is not unrolled
            s, tile_number = tl.load(consumer + step // CELLS * 2), tl.load(consumer + step // CELLS * 2 + 1)
            below, beside = step % CELLS // (1 + ODD_W), step % (1 + ODD_W)
            down, right = i + below, j + beside
            row, col = tile_number // 2 * h + down, tile_number % 2 * w + right
            sampled = (right < tl.load(live + down, mask=down < h, other=0)) & (row < H) & (col < W)
            top, left = tl.maximum(2 * down - ODD_H, 0), tl.maximum(2 * right - ODD_W, 0)
            size = inverse(tl.minimum(2 * down + 2, H) - top) * inverse(tl.minimum(2 * right + 2, W) - left)
            place = ((s.to(tl.int64) * H + row) * W + col) * C
            of_cell = tl.load(gradients + place + channels, mask=channels < tl.where(sampled, C, 0), other=0.0)
            averaged = (token // 2 >= below) & (token % 2 >= beside)
            found += tl.where(averaged[:, None], (of_cell * size)[None, :], 0.0)

    mask = inside[:, None] & (channels < C)[None, :]
    if MOSAIC:
        places = (((-1 - node).to(tl.int64) * H + rows) * W + cols) * C
        tl.store(gradients + places[:, None] + channels[None, :], found, mask=mask)
    else:
        places = token_places(node, rows, cols, T, out_strides)
        places = places[:, None] + channels.to(tl.int64)[None, :] * out_channel
        tl.store(out + places, found.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def prepare_pairs(request: CallSpec) -> PreparedCall:
    """Return the launches at the published settings: for thumbnails, for the levels from last to first, and for x."""
    H, W, C = request.x.shape[-3:]
    h, w = -(-H // 2), -(-W // 2)
    OH, OW = request.plan.pooled_size
    graph = request.graph
    config = fused_config(C, request.x.element_size(), request.capability)
    shared = request.sizes() | request.weights() | {"h": h, "w": w, "OH": OH, "OW": OW, "BLOCK": fused_block(C)}
    # depends on the settings only, not on whether these videos are long enough for a summary: a video must give the
    # same bits alone and packed with a longer one
    shared |= {"ODD_H": H % 2, "ODD_W": W % 2, "PLAIN": not request.gridded}

    shrunk = launch_cells(request, {}) if graph.summaries else Shrunk([], [], {}, {}, 0)
    launches, tables, slots = shrunk.launches, shrunk.tables, shrunk.slots
    ends = {node: frame for frame, node in enumerate(graph.outputs)}
    consumed_by = consumers(graph)

    def launch(nodes: Sequence[int], mosaic: bool) -> Launch:
        entries: list[int] = []
        for node in nodes if request.gridded else ():
            sources = graph.summaries[~node].sources if mosaic else ()
            # a node without live cells gets no gradient through summaries
            of_node = consumed_by[node] if node in shrunk.counts else []
            entries += (node, ends.get(node, -1), len(tables), len(of_node))
            entries += [slots.get(source, -1) for source in sources] or [-1] * 4
            entries.append(shrunk.counts.get(node, -1))
            tables.extend(number for consumer in of_node for number in consumer)
        arguments = shared | {"entries": len(tables), "MOSAIC": mosaic}
        tables.extend(entries)
        grid = (len(nodes) * h * w, 1, 1)
        return Launch(pair_gradient_kernel, grid, arguments, len(TENSORS), num_warps=config.num_warps)

    launches += [launch([~s for s in level], True) for level in reversed(graph.by_level())]
    launches.append(launch(range(len(graph.outputs)), False))
    gradients = max(len(graph.summaries), int(request.gridded)) * H * W * C
    scratch = max(shrunk.scratch, int(request.gridded) * h * w * C)
    return PreparedCall(request.plan, launches, scratch, tables_on(request.x.device, tables), gradients)


# ---- any settings ----


@triton.jit(
    do_not_specialize=["row_starts", "of_windows", "T", "norm_channels"]
)  # one compilation serves all values of these
def window_weights_kernel(
    x,  # (…, T, H, W, C)
    out,  # unused
    scratch,  # summaries: (S, H, W, C)
    tables,
    grad,  # (…, T, OH, OW, C)
    gradients,  # from `of_windows` on, α and γ of a window's tokens: (frames, OH, OW, room, 2)
    row_starts,  # where in `tables`: OH starts of windows, OH counts, OW starts, OW counts
    of_windows,
    room,  # tokens of the largest window
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
    grad_video: tl.int64,
    grad_frame,
    grad_row,
    grad_col,
    grad_channel,
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
    """α and γ of the tokens of window (i, j), row by row. One window a program.

    They are computed here only: where one token has all the weight, its g·t − Σ α g·t is 0, and would not be if the two
    products were summed in different orders; τ may be large. TOKENS at a time, their channels BLOCK at a time.
    SUMMARIES: some frames end as summaries; `tables` starts with what each ends with.
    """
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    program = tl.program_id(0)
    i, j = program // OW % OH, program % OW
    frame = program // (OH * OW)
    node = tl.load(tables + frame) if SUMMARIES else frame
    top, height = tl.load(tables + row_starts + i), tl.load(tables + row_starts + OH + i)
    left, width = tl.load(tables + row_starts + 2 * OH + j), tl.load(tables + row_starts + 2 * OH + OW + j)
    image = (x, scratch, node, T, H, W, x_strides)
    window = (top, left, height, width)
    upstream = grad + token_places(frame, i, j, T, (grad_video, grad_frame, grad_row, grad_col))
    position = tl.arange(0, TOKENS)
    step_of = tl.arange(0, STEPS)
    norms = tl.zeros((STEPS, TOKENS), tl.float32)
    dots = tl.zeros((STEPS, TOKENS), tl.float32)
    for step in range(tl.cdiv(height * width, TOKENS)):
        total = no_norms(TOKENS, NORM)
        product = tl.zeros((TOKENS,), tl.float32)
        for chunk in range(CHUNKS):
            channels = chunk * BLOCK + tl.arange(0, BLOCK)
            part = load_window(image, window, step * TOKENS + position, channels, C, SUMMARIES)
            g = tl.load(upstream + channels.to(tl.int64) * grad_channel, mask=channels < C, other=0.0).to(tl.float32)
            total = join_norms(total, partial_norms(part, channels, norm_channels, NORM, P), NORM)
            product += tl.sum(part * g[None, :], 1)
        found = finish_norms(total, C, norm_channels, MEAN, NORM, P, False)
        norms = tl.where((step_of == step)[:, None], found[None, :], norms)
        dots = tl.where((step_of == step)[:, None], product[None, :], dots)
    number = step_of[:, None] * TOKENS + position[None, :]
    taken = number < height * width
    weights = softmax(logits_of(norms, temperature), taken)
    # in float64: of equal products the mean is exactly one of them, and a temperature magnifies what is not
    mean = (tl.sum(weights.to(tl.float64) * dots) / tl.sum(weights.to(tl.float64))).to(tl.float32)
    place = gradients + of_windows + (program.to(tl.int64) * room + number) * 2
    tl.store(place, weights, mask=taken)
    tl.store(place + 1, temperature * weights * (dots - mean), mask=taken)


# one compilation serves all values of these
@triton.jit(do_not_specialize=["first", "nodes", "row_starts", "of_windows", "windows", "T", "norm_channels"])
def token_gradient_kernel(
    x,  # (…, T, H, W, C)
    out,  # gradient in x: (…, T, H, W, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    grad,  # (…, T, OH, OW, C)
    gradients,  # of summaries, float32: (S, H, W, C); from `of_windows` on, as above
    first,  # the first node of this launch; they count down if MOSAIC, up if not
    nodes,  # where in `tables`, 3 integers each: frame that ends with it or −1, where its consumers start, their number
    row_starts,  # as above
    of_windows,
    room,
    windows,  # where in `tables`: start and number of the windows that cover each of H rows, then of W columns
    highest,  # largest number of them for a row
    widest,  # and for a column
    summary_highest,  # the same for the tokens of a summary that average a row
    summary_widest,  # and a column
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
    grad_video: tl.int64,
    grad_frame,
    grad_row,
    grad_col,
    grad_channel,
    temperature,
    norm_channels,  # channels of the norm, None for all
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    MOSAIC: tl.constexpr,
    PLAIN: tl.constexpr,
    POOLED: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    P: tl.constexpr,
):
    """G(c) of TOKENS tokens of one node a program, BLOCK of their channels at a time.

    MOSAIC: nodes are summaries, else frames of x. PLAIN: no frame goes into a summary, and every frame ends as
    itself. POOLED: the result is pooled by windows, else `grad` is that of the frames as they end.
    """
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    out_strides = (out_video, out_frame, out_row, out_col, out_channel)
    grad_strides = (grad_video, grad_frame, grad_row, grad_col)
    programs = tl.cdiv(H * W, TOKENS)
    k = tl.program_id(0) // programs
    number = tl.program_id(0) % programs * TOKENS + tl.arange(0, TOKENS)
    inside = number < H * W
    rows, cols = number // W, number % W
    node = first - k if MOSAIC else first + k
    target = node
    consumer_start, consumer_count = 0, 0
    if not PLAIN:
        entry = tables + nodes + 3 * k
        target, consumer_start, consumer_count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    ends = inside & (target + 0 * number >= 0)

    if POOLED:
        of_rows, of_cols = tables + windows + 2 * rows, tables + windows + 2 * (H + cols)
        top, height = tl.load(of_rows, mask=ends, other=0), tl.load(of_rows + 1, mask=ends, other=0)
        left, width = tl.load(of_cols, mask=ends, other=0), tl.load(of_cols + 1, mask=ends, other=0)
        pooled = ends & (height > 0) & (width > 0)
        total = no_norms(TOKENS, NORM)
        for chunk in range(CHUNKS):
            channels = chunk * BLOCK + tl.arange(0, BLOCK)
            tile = load_tokens(
                x, scratch, node + 0 * number, rows, cols, pooled, channels, T, H, W, x_strides, C, MOSAIC
            ).to(tl.float32)
            total = join_norms(total, partial_norms(tile, channels, norm_channels, NORM, P), NORM)
        norms = finish_norms(total, C, norm_channels, MEAN, NORM, P, False)
        largest = tl.zeros((TOKENS,), tl.int32)
        if NORM == "max":
            for chunk in range(CHUNKS):
                channels = chunk * BLOCK + tl.arange(0, BLOCK)
                tile = load_tokens(
                    x, scratch, node + 0 * number, rows, cols, pooled, channels, T, H, W, x_strides, C, MOSAIC
                ).to(tl.float32)
                largest += count_largest(tile, norms, channels, norm_channels, C)
        factors = tl.zeros((TOKENS,), tl.float32)
        for n in range(highest * widest):
            down, right = n // widest, n % widest
            covered = pooled & (down < height) & (right < width)
            place = places_in_windows(
                tables + row_starts, target, top + down, left + right, rows, cols, covered, room, OH, OW
            )
            factors += tl.load(gradients + of_windows + place + 1, mask=covered, other=0.0)

    for chunk in range(CHUNKS):
        channels = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = inside[:, None] & (channels < C)[None, :]
        if POOLED:
            found = tl.zeros((TOKENS, BLOCK), tl.float32)
            for n in range(highest * widest):
                down, right = n // widest, n % widest
                covered = pooled & (down < height) & (right < width)
                g = load_upstream(
                    grad, target, top + down, left + right, covered, channels, T, grad_strides, grad_channel, C
                )
                place = places_in_windows(
                    tables + row_starts, target, top + down, left + right, rows, cols, covered, room, OH, OW
                )
                found += tl.load(gradients + of_windows + place, mask=covered, other=0.0)[:, None] * g
            tile = load_tokens(
                x, scratch, node + 0 * number, rows, cols, pooled, channels, T, H, W, x_strides, C, MOSAIC
            ).to(tl.float32)
            share = factors[:, None] * norm_slopes(tile, norms, largest, norm_channels, C, MEAN, NORM, P)
            found += in_norm(share, channels, norm_channels)
        else:
            found = load_upstream(grad, target, rows, cols, ends, channels, T, grad_strides, grad_channel, C)

        if not PLAIN:
            for number_of_consumer in range(consumer_count):
                # summary; where, by rows of the mosaic from this tile's first on, the tokens that average them start
                # and how many; how many rows each token of the summary averages; then the same for columns
                consumer = tables + consumer_start + 5 * number_of_consumer
                s = tl.load(consumer)
                of_rows, of_cols = tables + tl.load(consumer + 1) + 2 * rows, tables + tl.load(consumer + 3) + 2 * cols
                averaged_rows, averaged_cols = tables + tl.load(consumer + 2), tables + tl.load(consumer + 4)
                row, row_count = tl.load(of_rows, mask=inside, other=0), tl.load(of_rows + 1, mask=inside, other=0)
                col, col_count = tl.load(of_cols, mask=inside, other=0), tl.load(of_cols + 1, mask=inside, other=0)
                for n in range(summary_highest * summary_widest):
                    down, right = n // summary_widest, n % summary_widest
                    sampled = inside & (down < row_count) & (right < col_count)
                    size = tl.load(averaged_rows + row + down, mask=sampled, other=1)
                    size *= tl.load(averaged_cols + col + right, mask=sampled, other=1)
                    place = ((s.to(tl.int64) * H + row + down) * W + col + right) * C
                    wanted = sampled[:, None] & (channels < C)[None, :]
                    of_token = tl.load(gradients + place[:, None] + channels[None, :], mask=wanted, other=0.0)
                    found += of_token * (1 / size.to(tl.float32))[:, None]

        if MOSAIC:
            places = (((-1 - node).to(tl.int64) * H + rows) * W + cols) * C
            tl.store(gradients + places[:, None] + channels[None, :], found, mask=mask)
        else:
            places = token_places(node + 0 * number, rows, cols, T, out_strides)
            places = places[:, None] + channels.to(tl.int64)[None, :] * out_channel
            tl.store(out + places, found.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_upstream(grad, frame, rows, cols, taken, channels, T, strides, channel_stride, C: tl.constexpr):
    """The gradient of tokens (row, col) of the result's frame as float32, 0 where not taken."""
    places = token_places(frame + 0 * rows, rows, cols, T, strides)
    places = places[:, None] + channels.to(tl.int64)[None, :] * channel_stride
    return tl.load(grad + places, mask=taken[:, None] & (channels < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def places_in_windows(row_starts, frame, i, j, rows, cols, taken, room, OH, OW):
    """Where α of tokens (row, col) in windows (i, j) of a frame is; γ follows it."""
    top = tl.load(row_starts + i, mask=taken, other=0)
    left = tl.load(row_starts + 2 * OH + j, mask=taken, other=0)
    width = tl.load(row_starts + 2 * OH + OW + j, mask=taken, other=0)
    number = (rows - top) * width + cols - left
    return (((frame * OH + i) * OW + j).to(tl.int64) * room + number) * 2


def prepare_tokens(request: CallSpec) -> PreparedCall:
    """Return the launches at any settings: if tokens are pooled, those for summaries in full and for α and γ of every
    window; then those for the levels from last to first, and for x."""
    H, W, C = request.x.shape[-3:]
    plan, graph = request.plan, request.graph
    pooled = request.op != "temporal_grid"
    OH, OW = plan.pooled_size if pooled else (H, W)
    frames = len(graph.outputs)
    values = max(len(graph.summaries), int(request.gridded)) * H * W * C
    shared = request.sizes() | request.weights() | {"OH": OH, "OW": OW, "of_windows": values}
    shared |= {"row_starts": 0, "room": 0, "windows": 0, "highest": 0, "widest": 0}

    launches: list[Launch] = []
    tables: list[int] = []
    scratch = room = 0
    if pooled:
        launches, tables, scratch = launch_summaries(request)
        room = max(plan.window_rows.count) * max(plan.window_cols.count)
        config = tile_config(C, room)
        shared |= {"row_starts": len(tables), "room": room}
        arguments = shared | {"SUMMARIES": request.gridded}
        arguments |= {"BLOCK": config.block, "CHUNKS": config.chunks, "TOKENS": config.tokens}
        arguments |= {"STEPS": triton.next_power_of_2(triton.cdiv(room, config.tokens))}
        for runs in (plan.window_rows, plan.window_cols):
            tables += (*runs.start, *runs.count)
        grid = (frames * OH * OW, 1, 1)
        launches.append(Launch(window_weights_kernel, grid, arguments, len(TENSORS), num_warps=config.num_warps))

        of_rows, of_cols = inverse_runs(plan.window_rows, H), inverse_runs(plan.window_cols, W)
        shared |= {"windows": len(tables), "highest": max(of_rows.count), "widest": max(of_cols.count)}
        tables += _pairs(of_rows) + _pairs(of_cols)

    of_levels: list[tuple[int, int, int, int]] = []  # table offsets of a consumer at the first tile of each level
    largest_counts = [(1, 1)]
    for level in plan.levels if request.gridded else ():
        by_row, by_col = inverse_runs(level.row_runs, level.rows * H), inverse_runs(level.col_runs, level.cols * W)
        largest_counts.append((max(by_row.count), max(by_col.count)))
        places: list[int] = []
        for numbers in (_pairs(by_row), level.row_runs.count, _pairs(by_col), level.col_runs.count):
            places.append(len(tables))
            tables += numbers
        of_levels.append((places[0], places[1], places[2], places[3]))
    shared["summary_highest"], shared["summary_widest"] = map(max, zip(*largest_counts, strict=True))

    ends = {node: frame for frame, node in enumerate(graph.outputs)}
    consumed_by = consumers(graph)
    config = channelwise_config(C)
    shared |= {"BLOCK": config.block, "CHUNKS": config.chunks, "TOKENS": config.tokens}
    shared |= {"PLAIN": not request.gridded, "POOLED": pooled}

    registers = 168 if request.x.element_size() == 2 else 240  # with fewer, the compiler spills

    def launch(nodes: Sequence[int], mosaic: bool) -> Launch:
        entries: list[int] = []
        for node in nodes if request.gridded else ():
            of_node = consumed_by.get(node, [])
            entries += (ends.get(node, -1), len(tables), len(of_node))
            for s, tile in of_node:
                number = graph.summaries[s].level
                row, col = divmod(tile, plan.levels[number].cols)
                of_rows, averaged_rows, of_cols, averaged_cols = of_levels[number]
                tables.extend((s, of_rows + 2 * row * H, averaged_rows, of_cols + 2 * col * W, averaged_cols))
        arguments = shared | {"first": nodes[0], "nodes": len(tables), "MOSAIC": mosaic}
        tables.extend(entries)
        grid = (len(nodes) * triton.cdiv(H * W, config.tokens), 1, 1)
        options = {"num_warps": 2 * config.num_warps, "maxnreg": registers}
        return Launch(token_gradient_kernel, grid, arguments, len(TENSORS), **options)

    launches += [launch([~s for s in level], True) for level in reversed(graph.by_level())]
    launches.append(launch(range(frames), False))
    gradients = values + 2 * frames * OH * OW * room
    return PreparedCall(plan, launches, scratch, tables_on(request.x.device, tables), gradients)


def _pairs(runs: Runs) -> list[int]:
    return [number for pair in zip(runs.start, runs.count, strict=True) for number in pair]
