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

import math

import triton
import triton.language as tl

from ...plan.tables import CONSUMER_WORDS, GradientSection, Header, LevelRecord, gradient_section, levels_of
from .config import channelwise_config
from .launch import Arguments, CallSpec, Launch, PreparedCall
from .pool import WINDOW_COLS, WINDOW_ROWS, find_window, load_window, window_arguments
from .slopes import count_largest, norm_slopes
from .summaries import launch_summaries, summary_elements
from .tiles import (
    channel_places,
    finish_norms,
    in_norm,
    join_norms,
    load_tokens,
    logits_of,
    no_norms,
    partial_norms,
    softmax,
    stored_places,
    token_places,
)

CONSUMER: tl.constexpr = tl.constexpr(CONSUMER_WORDS)
LEVEL: tl.constexpr = tl.constexpr(len(LevelRecord._fields))
SECTION: tl.constexpr = tl.constexpr(len(GradientSection._fields))
"""The numbers of int32 in a consumer, in a level, and at the start of the gradient section of the tables."""

FRAMES: tl.constexpr = tl.constexpr(Header._fields.index("frames"))
LEVELS: tl.constexpr = tl.constexpr(Header._fields.index("levels"))
GRADIENT: tl.constexpr = tl.constexpr(Header._fields.index("gradient"))
"""Places of numbers in the header of the tables, counted in int32."""

CONSUMERS: tl.constexpr = tl.constexpr(GradientSection._fields.index("consumers"))
ENDS: tl.constexpr = tl.constexpr(GradientSection._fields.index("ends"))
ROW_WINDOWS: tl.constexpr = tl.constexpr(GradientSection._fields.index("window_rows"))
COL_WINDOWS: tl.constexpr = tl.constexpr(GradientSection._fields.index("window_cols"))
"""Places of offsets in the gradient section of the tables, counted in int32."""


@triton.jit(do_not_specialize=["of_windows", "T", "weights"])  # one compilation serves all values of these
def window_weights_kernel(
    x,  # (…, T, H, W, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    grad,  # (…, T, OH, OW, C)
    gradients,  # from `of_windows` on, α and γ of a window's tokens: (frames, OH, OW, room, 2)
    of_windows,
    room,  # tokens of the largest window
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
    """α and γ of the tokens of window (i, j), row by row. One window a program.

    They are computed here only: where one token has all the weight, its g·t − Σ α g·t is 0, and would not be if the two
    products were summed in different orders; τ may be large. TOKENS at a time, their channels BLOCK at a time.
    SUMMARIES: some frames may end with a summary.
    """
    frame, i, j, node, window = find_window(tables, OH, OW, SUMMARIES)
    image = (x, scratch, node, T)
    taken_tokens = window[2] * window[3]
    upstream = grad.pointer + token_places(frame, i, j, T, grad)
    position = tl.arange(0, TOKENS)
    step_of = tl.arange(0, STEPS)
    norms = tl.zeros((STEPS, TOKENS), tl.float32)
    dots = tl.zeros((STEPS, TOKENS), tl.float32)
    for step in range(tl.cdiv(taken_tokens, TOKENS)):
        total = no_norms(TOKENS, NORM)
        product = tl.zeros((TOKENS,), tl.float32)
        for chunk in range(CHUNKS):
            channels = chunk * BLOCK + tl.arange(0, BLOCK)
            part = load_window(image, window, step * TOKENS + position, channels, SIZE, SUMMARIES)
            g = tl.load(upstream + channels.to(tl.int64) * grad.channel, mask=channels < SIZE.C, other=0.0)
            total = join_norms(total, partial_norms(part, channels, weights, NORM), NORM)
            product += tl.sum(part * g.to(tl.float32)[None, :], 1)
        found = finish_norms(total, weights, SIZE.C, NORM, False)
        norms = tl.where((step_of == step)[:, None], found[None, :], norms)
        dots = tl.where((step_of == step)[:, None], product[None, :], dots)
    number = step_of[:, None] * TOKENS + position[None, :]
    taken = number < taken_tokens
    shares = softmax(logits_of(norms, weights), taken)
    # The mean is computed in float64, since it must be equal to products that are all equal: τ magnifies a difference.
    mean = (tl.sum(shares.to(tl.float64) * dots) / tl.sum(shares.to(tl.float64))).to(tl.float32)
    place = gradients + of_windows + (tl.program_id(0).to(tl.int64) * room + number) * 2
    tl.store(place, shares, mask=taken)
    tl.store(place + 1, weights.temperature * shares * (dots - mean), mask=taken)


# one compilation serves all values of these
@triton.jit(do_not_specialize=["first", "of_windows", "summary_rows", "summary_cols", "T", "weights"])
def token_gradient_kernel(
    x,  # (…, T, H, W, C)
    out,  # gradient in x: (…, T, H, W, C)
    scratch,  # summaries: (S, H, W, C)
    tables,
    grad,  # (…, T, OH, OW, C)
    gradients,  # of summaries, float32: (S, H, W, C); from `of_windows` on, α and γ as of window_weights_kernel
    first,  # the first node of this launch; they count down if MOSAIC, up if not
    of_windows,
    room,
    most,  # largest number of windows that read a row, and a column
    summary_rows,  # largest number of rows of a summary that average a row of a mosaic
    summary_cols,
    T,
    OH: tl.constexpr,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    MOSAIC: tl.constexpr,
    PLAIN: tl.constexpr,
    POOLED: tl.constexpr,
):
    """G(c) of TOKENS tokens of one node a program, BLOCK of their channels at a time.

    MOSAIC: nodes are summaries, else frames of x. PLAIN: no frame goes into a summary, and every frame ends as
    itself. POOLED: the result is pooled by windows, else `grad` is that of the frames as they end.
    """
    programs = tl.cdiv(SIZE.H * SIZE.W, TOKENS)
    k = tl.program_id(0) // programs
    number = tl.program_id(0) % programs * TOKENS + tl.arange(0, TOKENS)
    inside = number < SIZE.H * SIZE.W
    rows, cols = number // SIZE.W, number % SIZE.W
    node = first - k if MOSAIC else first + k
    order = tl.load(tables + FRAMES) - 1 - node if MOSAIC else node  # its number among frames and summaries
    section = tables + tl.load(tables + GRADIENT)
    target = node if PLAIN else tl.load(tables + tl.load(section + ENDS) + order)
    ends = inside & (target + 0 * number >= 0)
    image = (x, scratch, node + 0 * number, rows, cols, T)

    if POOLED:
        pooled, top, left, height, width = windows_around(tables, section, ends, rows, cols, SIZE)
        norms, largest = norms_of_tokens(image, pooled, weights, SIZE, NORM, BLOCK, CHUNKS, TOKENS, MOSAIC)
        factors = tl.zeros((TOKENS,), tl.float32)
        for n in range(most[0] * most[1]):
            down, right = n // most[1], n % most[1]
            covered = pooled & (down < height) & (right < width)
            window = (target, top + down, left + right)
            place = places_in_windows(tables, window, rows, cols, covered, room, OH, OW)
            factors += tl.load(gradients + of_windows + place + 1, mask=covered, other=0.0)

    for chunk in range(CHUNKS):
        channels = chunk * BLOCK + tl.arange(0, BLOCK)
        if POOLED:
            found = tl.zeros((TOKENS, BLOCK), tl.float32)
            for n in range(most[0] * most[1]):
                down, right = n // most[1], n % most[1]
                covered = pooled & (down < height) & (right < width)
                g = load_upstream(grad, target, top + down, left + right, covered, channels, T, SIZE)
                window = (target, top + down, left + right)
                place = places_in_windows(tables, window, rows, cols, covered, room, OH, OW)
                found += tl.load(gradients + of_windows + place, mask=covered, other=0.0)[:, None] * g
            tile = load_image(image, pooled, channels, SIZE, MOSAIC)
            share = factors[:, None] * norm_slopes(tile, norms, largest, weights, SIZE.C, NORM)
            found += in_norm(share, channels, weights)
        else:
            found = load_upstream(grad, target, rows, cols, ends, channels, T, SIZE)
        if not PLAIN:
            found = add_consumers(
                found, gradients, tables, order, inside, rows, cols, channels, (summary_rows, summary_cols), SIZE
            )

        mask = inside[:, None] & (channels < SIZE.C)[None, :]
        if MOSAIC:
            places = stored_places(node, rows, cols, SIZE)
            tl.store(gradients + places[:, None] + channels[None, :], found, mask=mask)
        else:
            places = channel_places(token_places(node + 0 * number, rows, cols, T, out), channels, out)
            tl.store(out.pointer + places, found.to(out.pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_image(image, taken, channels, SIZE: tl.constexpr, MOSAIC: tl.constexpr):
    """Return tokens of a node as float32, 0 where not taken."""
    x, summaries, nodes, rows, cols, T = image
    return load_tokens(x, summaries, nodes, rows, cols, taken, channels, T, SIZE, MOSAIC).to(tl.float32)


@triton.jit
def norms_of_tokens(
    image,
    taken,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    MOSAIC: tl.constexpr,
):
    """Return the norms of a node's tokens and, for "max", the number of elements as large as the norm, else 0."""
    total = no_norms(TOKENS, NORM)
    for chunk in range(CHUNKS):
        channels = chunk * BLOCK + tl.arange(0, BLOCK)
        tile = load_image(image, taken, channels, SIZE, MOSAIC)
        total = join_norms(total, partial_norms(tile, channels, weights, NORM), NORM)
    norms = finish_norms(total, weights, SIZE.C, NORM, False)
    largest = tl.zeros((TOKENS,), tl.int32)
    if NORM.kind == "max":
        for chunk in range(CHUNKS):
            channels = chunk * BLOCK + tl.arange(0, BLOCK)
            tile = load_image(image, taken, channels, SIZE, MOSAIC)
            largest += count_largest(tile, norms, channels, weights, SIZE.C)
    return norms, largest


@triton.jit
def windows_around(tables, section, ends, rows, cols, SIZE: tl.constexpr):
    """Return whether windows read tokens, and the first row and column of these windows with the numbers of both."""
    of_rows, of_cols = tables + tl.load(section + ROW_WINDOWS) + rows, tables + tl.load(section + COL_WINDOWS) + cols
    top, height = tl.load(of_rows, mask=ends, other=0), tl.load(of_rows + SIZE.H, mask=ends, other=0)
    left, width = tl.load(of_cols, mask=ends, other=0), tl.load(of_cols + SIZE.W, mask=ends, other=0)
    return ends & (height > 0) & (width > 0), top, left, height, width


@triton.jit
def places_in_windows(tables, window, rows, cols, taken, room, OH: tl.constexpr, OW: tl.constexpr):
    """Return the places of α of tokens (row, col) in windows (frame, i, j). γ follows α."""
    frame, i, j = window
    of_rows, of_cols = tables + tl.load(tables + WINDOW_ROWS), tables + tl.load(tables + WINDOW_COLS)
    top, left = tl.load(of_rows + i, mask=taken, other=0), tl.load(of_cols + j, mask=taken, other=0)
    width = tl.load(of_cols + OW + j, mask=taken, other=0)
    number = (rows - top) * width + cols - left
    return (((frame * OH + i) * OW + j).to(tl.int64) * room + number) * 2


@triton.jit
def load_upstream(grad, frame, rows, cols, taken, channels, T, SIZE: tl.constexpr):
    """Return the gradient of tokens (row, col) of the result's frame as float32, 0 where not taken."""
    places = channel_places(token_places(frame + 0 * rows, rows, cols, T, grad), channels, grad)
    return tl.load(grad.pointer + places, mask=taken[:, None] & (channels < SIZE.C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def add_consumers(found, gradients, tables, order, inside, rows, cols, channels, summary_most, SIZE: tl.constexpr):
    """Add to the gradients of a node's tokens what the summaries that average them pass on."""
    section = tables + tl.load(tables + GRADIENT)
    starts = tables + tl.load(section + CONSUMERS) + order
    start, stop = tl.load(starts), tl.load(starts + 1)
    for number in range((stop - start) // CONSUMER):
        consumer = tables + start + number * CONSUMER
        s, level, tile = tl.load(consumer), tl.load(consumer + 1), tl.load(consumer + 2)
        record, inverses = tables + tl.load(tables + LEVELS) + level * LEVEL, section + SECTION + 2 * level
        grid_rows, grid_cols = tl.load(record), tl.load(record + 1)
        heights, widths = tables + tl.load(record + 5) + SIZE.H, tables + tl.load(record + 6) + SIZE.W
        of_rows = tables + tl.load(inverses) + tile // grid_cols * SIZE.H + rows
        of_cols = tables + tl.load(inverses + 1) + tile % grid_cols * SIZE.W + cols
        row, row_count = (
            tl.load(of_rows, mask=inside, other=0),
            tl.load(of_rows + grid_rows * SIZE.H, mask=inside, other=0),
        )
        col, col_count = (
            tl.load(of_cols, mask=inside, other=0),
            tl.load(of_cols + grid_cols * SIZE.W, mask=inside, other=0),
        )
        for n in range(summary_most[0] * summary_most[1]):
            down, right = n // summary_most[1], n % summary_most[1]
            sampled = inside & (down < row_count) & (right < col_count)
            size = tl.load(heights + row + down, mask=sampled, other=1)
            size *= tl.load(widths + col + right, mask=sampled, other=1)
            place = ((s.to(tl.int64) * SIZE.H + row + down) * SIZE.W + col + right) * SIZE.C
            wanted = sampled[:, None] & (channels < SIZE.C)[None, :]
            of_token = tl.load(gradients + place[:, None] + channels[None, :], mask=wanted, other=0.0)
            found += of_token * (1 / size.to(tl.float32))[:, None]
    return found


def prepare(spec: CallSpec) -> PreparedCall:
    """Return the launches: if tokens are pooled, those for summaries in full and for α and γ of every window; then
    those for the levels from last to first, and for x."""
    header = Header.of(spec.words)
    pooled = spec.weighting is not None
    values = max(header.summaries, int(spec.gridded)) * math.prod(spec.x.shape[-3:])
    windows = header.frames * math.prod(spec.pooled_size) if pooled else 0
    launches: list[Launch] = []
    if pooled:
        arguments, num_warps = window_arguments(spec)
        arguments |= {"of_windows": values, "room": header.largest_window}
        weights = Launch(window_weights_kernel, (windows, 1, 1), arguments, **spec.options(num_warps))
        launches = [*launch_summaries(spec), weights]
    levels = reversed(levels_of(spec.words) if spec.gridded else [])
    launches += [_launch_nodes(spec, values, ~level.first, level.num_summaries, True) for level in levels]
    launches.append(_launch_nodes(spec, values, 0, header.frames, False))
    scratch = summary_elements(spec) if pooled else 0
    return PreparedCall(spec.plan, launches, scratch, spec.tables, values + 2 * windows * header.largest_window)


def _launch_nodes(spec: CallSpec, values: int, first: int, nodes: int, mosaic: bool) -> Launch:
    """Return the launch for nodes that count down, of summaries, or up, of frames. values: those of all summaries."""
    header, section, (OH, OW) = Header.of(spec.words), gradient_section(spec.words), spec.pooled_size
    config = channelwise_config(spec.size.C)
    arguments: Arguments = spec.arguments() | {"OH": OH, "OW": OW, "first": first, "of_windows": values}
    arguments |= {"room": header.largest_window}
    arguments |= {"most": _largest_counts(spec, section.window_rows, section.window_cols, 1, 1)}
    level_inverses = header.gradient + len(section)
    of_levels = [
        _largest_counts(
            spec, spec.words[level_inverses + 2 * n], spec.words[level_inverses + 2 * n + 1], level.rows, level.cols
        )
        for n, level in enumerate(levels_of(spec.words))
    ]
    summary_rows, summary_cols = map(max, zip((1, 1), *of_levels, strict=True))
    arguments |= {"summary_rows": summary_rows, "summary_cols": summary_cols}
    arguments |= {"BLOCK": config.block, "CHUNKS": config.chunks, "TOKENS": config.tokens}
    arguments |= {"MOSAIC": mosaic, "PLAIN": not spec.gridded, "POOLED": spec.weighting is not None}
    grid = (nodes * triton.cdiv(spec.size.H * spec.size.W, config.tokens), 1, 1)
    registers = 168 if spec.x.element_size() == 2 else 240  # with fewer, the compiler spills
    return Launch(token_gradient_kernel, grid, arguments, **spec.options(2 * config.num_warps, registers))


def _largest_counts(spec: CallSpec, by_row: int, by_col: int, rows: int, cols: int) -> tuple[int, int]:
    """Return the largest counts of the inverse runs at two offsets, for the rows and columns of rows × cols frames."""
    heights, widths = rows * spec.size.H, cols * spec.size.W
    words = spec.words
    return max(words[by_row + heights : by_row + 2 * heights]), max(words[by_col + widths : by_col + 2 * widths])
