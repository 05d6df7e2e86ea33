"""Functions that the kernels share: loads of blocks of tokens into registers, their norms, and their weighted sums.

A block, `tile` in the code, has shape (tokens, BLOCK); tokens that are not taken and channels from C on are 0.
Arithmetic is float32.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def norm_kind(norm_type: float) -> str:
    """Return how |t|^p is computed: "l1", "l2" and "max" need no power, "power" does."""
    return {1.0: "l1", 2.0: "l2", math.inf: "max"}.get(norm_type, "power")


@triton.jit
def token_places(frames, rows, cols, T, strides):
    """Where tokens start in a tensor with (video, frame, row, column, …) strides and T frames per video."""
    return frame_places(frames, T, strides) + rows.to(tl.int64) * strides[2] + cols.to(tl.int64) * strides[3]


@triton.jit
def frame_places(frames, T, strides):
    """Where frames start that are numbered through all videos of T; where T is None, all are `strides[1]` apart."""
    if T is None:
        places = frames.to(tl.int64) * strides[1]
    else:
        places = (frames // T).to(tl.int64) * strides[0] + (frames % T).to(tl.int64) * strides[1]
    return places


@triton.jit
def load_tokens(
    x,
    scratch,
    nodes,
    rows,
    cols,
    taken,
    channels,
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    x_strides,
    C: tl.constexpr,
    SUMMARIES: tl.constexpr,
):
    """Tokens (row, col) of nodes: frame t of x for t ≥ 0, summary s in scratch (…, H, W, C) for ~s. In x.dtype."""
    wanted = taken[:, None] & (channels < C)[None, :]
    places = token_places(nodes, rows, cols, T, x_strides)
    places = places[:, None] + channels.to(tl.int64)[None, :] * x_strides[4]
    if SUMMARIES:
        given = (nodes >= 0)[:, None]
        of_x = tl.load(x + places, mask=wanted & given, other=0.0)
        places = (((-1 - nodes).to(tl.int64) * H + rows) * W + cols) * C
        places = places[:, None] + channels[None, :]
        of_summaries = tl.load(scratch + places, mask=wanted & (nodes < 0)[:, None], other=0.0)
        tokens = tl.where(given, of_x, of_summaries)
    else:
        tokens = tl.load(x + places, mask=wanted, other=0.0)
    return tokens


@triton.jit
def in_norm(values, channels, norm_channels):
    """Values of a block, with 0 in channels that the norm does not run over; a norm_channels of None stands for all."""
    if norm_channels is not None:
        values = tl.where((channels < norm_channels)[None, :], values, 0.0)
    return values


@triton.jit
def partial_norms(tile, channels, norm_channels, NORM: tl.constexpr, P: tl.constexpr):
    """Σ_c |t_c|^p of every token, or the bits of max_c |t_c|: to be joined over channels, then finished."""
    tile = in_norm(tile, channels, norm_channels)
    if NORM == "l2":
        partial = tl.sum(tile * tile, 1)
    elif NORM == "l1":
        partial = tl.sum(tl.abs(tile), 1)
    elif NORM == "max":
        # without their sign, floats are in the order of their bits, and NaN is above infinity: no maximum loses it
        partial = tl.max(tl.abs(tile).to(tl.int32, bitcast=True), 1)
    else:
        # what log2 and exp2 lose where |t|^p is far from 1 would be seen in float32
        powers = tl.exp2(P * tl.log2(tl.abs(tile).to(tl.float64)))
        partial = tl.sum(powers.to(tl.float32), 1)
    return partial


@triton.jit
def no_norms(TOKENS: tl.constexpr, NORM: tl.constexpr):
    """`partial_norms` of no channels."""
    return tl.zeros((TOKENS,), tl.int32 if NORM == "max" else tl.float32)


@triton.jit
def join_norms(left, right, NORM: tl.constexpr):
    """`partial_norms` of all the channels of two."""
    return tl.maximum(left, right) if NORM == "max" else left + right


@triton.jit
def finish_norms(
    total, C: tl.constexpr, norm_channels, MEAN: tl.constexpr, NORM: tl.constexpr, P: tl.constexpr, EXACT: tl.constexpr
):
    """‖t‖ = (mean_c |t_c|^p)^(1/p), or the sum in place of the mean, from `partial_norms` of all channels.

    norm_channels: the number of channels of the norm; None stands for all.
    EXACT: division and root round correctly. They call functions then, for which a kernel that holds a window of tokens
    has no registers left; for weights, an error in the last place or two does as well.
    """
    if NORM == "max":
        norms = total.to(tl.float32, bitcast=True)
    else:
        if not MEAN:
            norms = total
        elif EXACT:
            norms = tl.div_rn(total, tl.full(total.shape, C if norm_channels is None else norm_channels, tl.float32))
        elif norm_channels is None:
            norms = total * (1.0 / C)
        else:
            norms = total * reciprocal(norm_channels)
        if NORM == "l2":
            norms = tl.sqrt_rn(norms) if EXACT else tl.sqrt(norms)
        elif NORM == "power":
            norms = tl.exp2(tl.log2(norms.to(tl.float64)) / P).to(tl.float32)
    return norms


@triton.jit
def softmax(logits, taken):
    """e^l / Σ e^l over the tokens taken, 0 for the others."""
    logits = tl.where(taken, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits))
    return powers / tl.sum(powers)  # to round this division correctly would take registers


@triton.jit
def softmax_of_tile(logits, taken):
    """e^l / Σ e^l over the tokens taken of one tile, 0 for the others, as a column: (tokens, 1).

    A vector would be moved to other threads and back for it, through shared memory and two barriers (Triton 3.6).
    """
    logits = tl.where(taken[:, None], logits[:, None], float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 0)[None, :])
    return powers / tl.sum(powers, 0)[None, :]


@triton.jit
def logits_of(norms, temperature):
    """temperature · ‖t‖, rounded, as the sum of a product and 0.

    The compiler fuses a plain product with the subtraction of the largest logit where it can prove that a token is
    taken, and rounds it elsewhere: bits would depend on how a row is cut. To fuse it everywhere is no way out: the
    rounding of the largest alone would be left, and e to the power of half an ulp of 10¹⁰ is beyond float32.
    """
    return tl.fma(norms, temperature, 0.0)


@triton.jit
def reciprocal(n):
    """1 / n of an integer or of integers, rounded once: for powers of 2 it is exact."""
    n = n.to(tl.float32)
    return tl.div_rn(n * 0 + 1, n)


@triton.jit
def pool_tile(
    tile,
    taken,
    channels,
    temperature,
    norm_channels,
    C: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    P: tl.constexpr,
):
    """Σ α·t over the tokens taken, α = softmax(temperature · ‖t‖): (BLOCK,)"""
    total = partial_norms(tile, channels, norm_channels, NORM, P)
    norms = finish_norms(total, C, norm_channels, MEAN, NORM, P, False)
    return tl.sum(softmax_of_tile(logits_of(norms, temperature), taken) * tile, 0)


@triton.jit
def store_token(out, frame, row, col, T, strides, channels, mask, token):
    """out[frame, row, col] = token, for (video, frame, row, column, channel) strides and T frames per video.

    No kernel reads it again: it makes room in the cache first, for tokens and thumbnails that will be.
    """
    places = token_places(frame, row, col, T, strides) + channels.to(tl.int64) * strides[4]
    tl.store(out + places, token.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")
