"""Functions that the kernels share: loads of blocks of tokens into registers, their norms, and their weighted sums.

A block, `tile` in the code, has shape (tokens, BLOCK); tokens that are not taken and channels from C on are 0.
Arithmetic is float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tokens(NamedTuple):
    """A tensor (…, T, H, W, C) in memory: a pointer to its first element, and strides in elements.

    video: distance between the videos of a batch, 0 where frames are equally far apart throughout the tensor. A stride
    that is a multiple of 16 is compiled as such, since tokens can then be read 16 bytes at a time.
    """

    pointer: Any
    video: Any
    frame: Any
    row: Any
    col: Any
    channel: Any = 1


class Size(NamedTuple):
    """Sizes that kernels are compiled for: H × W of a frame, h × w of its thumbnail, and the number of channels, C."""

    H: int
    W: int
    h: int
    w: int
    C: int

    @classmethod
    def of(cls, H: int, W: int, C: int) -> Size:
        """Return the sizes of frames of H × W tokens with C channels."""
        return cls(H, W, -(-H // 2), -(-W // 2), C)


class Weights(NamedTuple):
    """Arguments of a window's weights that kernels are not compiled for.

    channels: number of channels of the norm, None for all. It is a float since Triton compiles for integers in a tuple
    that are 1 or a multiple of 16, even if it is told not to for the tuple.
    """

    temperature: float
    channels: float | None


class Norm(NamedTuple):
    """The norm that kernels are compiled for.

    kind: how |t|^p is computed: "l1", "l2" and "max" need no power, "power" does. mean: whether it has the mean over
    channels, and not the sum. p: the exponent of "power", else 0.
    """

    kind: str
    mean: bool
    p: float

    @classmethod
    def of(cls, norm_type: float, normalize_norm: bool) -> Norm:
        """Return the norm of a call with these arguments."""
        kind = {1.0: "l1", 2.0: "l2", math.inf: "max"}.get(norm_type, "power")
        return cls(kind, normalize_norm, norm_type if kind == "power" else 0.0)


@triton.jit
def frame_places(frames, T, x):
    """Return the places where frames of x start, which are numbered through all videos, of T frames each.

    Where T is None, all frames are `x.frame` apart.
    """
    if T is None:
        places = frames.to(tl.int64) * x.frame
    else:
        places = (frames // T).to(tl.int64) * x.video + (frames % T).to(tl.int64) * x.frame
    return places


@triton.jit
def token_places(frames, rows, cols, T, x):
    """Return the places where tokens of x start."""
    return frame_places(frames, T, x) + rows.to(tl.int64) * x.row + cols.to(tl.int64) * x.col


@triton.jit
def channel_places(places, channels, x):
    """Return the places of channels of tokens of x that start at `places`: (tokens, channels)."""
    return places[:, None] + channels.to(tl.int64)[None, :] * x.channel


@triton.jit
def stored_places(nodes, rows, cols, SIZE: tl.constexpr):
    """Return the places where tokens of summaries ~0, ~1, … start in an array of full summaries: (S, H, W, C)."""
    return (((-1 - nodes).to(tl.int64) * SIZE.H + rows) * SIZE.W + cols) * SIZE.C


@triton.jit
def load_tokens(x, summaries, nodes, rows, cols, taken, channels, T, SIZE: tl.constexpr, SUMMARIES: tl.constexpr):
    """Return tokens (row, col) of nodes in x.dtype. Node t ≥ 0 is frame t of x, ~s is full summary s, if SUMMARIES."""
    wanted = taken[:, None] & (channels < SIZE.C)[None, :]
    places = channel_places(token_places(nodes, rows, cols, T, x), channels, x)
    if SUMMARIES:
        given = (nodes >= 0)[:, None]
        of_x = tl.load(x.pointer + places, mask=wanted & given, other=0.0)
        places = stored_places(nodes, rows, cols, SIZE)[:, None] + channels[None, :]
        of_summaries = tl.load(summaries + places, mask=wanted & (nodes < 0)[:, None], other=0.0)
        tokens = tl.where(given, of_x, of_summaries)
    else:
        tokens = tl.load(x.pointer + places, mask=wanted, other=0.0)
    return tokens


@triton.jit
def in_norm(values, channels, weights):
    """Return the values of a block, with 0 in channels that the norm does not run over."""
    if weights.channels is not None:
        values = tl.where((channels < tl.cast(weights.channels, tl.int32))[None, :], values, 0.0)
    return values


@triton.jit
def partial_norms(tile, channels, weights, NORM: tl.constexpr):
    """Return Σ_c |t_c|^p of every token, or the bits of max_c |t_c|, to be joined over channels and then finished."""
    tile = in_norm(tile, channels, weights)
    if NORM.kind == "l2":
        partial = tl.sum(tile * tile, 1)
    elif NORM.kind == "l1":
        partial = tl.sum(tl.abs(tile), 1)
    elif NORM.kind == "max":
        # without their sign, floats are in the order of their bits, and NaN is above infinity: no maximum loses it
        partial = tl.max(tl.abs(tile).to(tl.int32, bitcast=True), 1)
    else:
        # what log2 and exp2 lose where |t|^p is far from 1 would be seen in float32
        powers = tl.exp2(NORM.p * tl.log2(tl.abs(tile).to(tl.float64)))
        partial = tl.sum(powers.to(tl.float32), 1)
    return partial


@triton.jit
def no_norms(TOKENS: tl.constexpr, NORM: tl.constexpr):
    """Return the `partial_norms` of no channels."""
    return tl.zeros((TOKENS,), tl.int32 if NORM.kind == "max" else tl.float32)


@triton.jit
def join_norms(left, right, NORM: tl.constexpr):
    """Return the `partial_norms` of two sets of channels together."""
    return tl.maximum(left, right) if NORM.kind == "max" else left + right


@triton.jit
def finish_norms(total, weights, C: tl.constexpr, NORM: tl.constexpr, EXACT: tl.constexpr):
    """Return ‖t‖ = (mean_c |t_c|^p)^(1/p), or the sum in place of the mean, from `partial_norms` of all channels.

    EXACT: division and root round correctly. They call functions then, for which a kernel that holds a window of tokens
    has no registers left; for weights, an error in the last place or two does as well.
    """
    if NORM.kind == "max":
        norms = total.to(tl.float32, bitcast=True)
    else:
        if not NORM.mean:
            norms = total
        elif EXACT:
            norms = tl.div_rn(
                total, tl.full(total.shape, C if weights.channels is None else weights.channels, tl.float32)
            )
        elif weights.channels is None:
            norms = total * (1.0 / C)
        else:
            norms = total * reciprocal(tl.cast(weights.channels, tl.float32))
        if NORM.kind == "l2":
            norms = tl.sqrt_rn(norms) if EXACT else tl.sqrt(norms)
        elif NORM.kind == "power":
            norms = tl.exp2(tl.log2(norms.to(tl.float64)) / NORM.p).to(tl.float32)
    return norms


@triton.jit
def softmax(logits, taken):
    """Return e^l / Σ e^l over the tokens taken, and 0 for the others."""
    logits = tl.where(taken, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits))
    return powers / tl.sum(powers)  # to round this division correctly would take registers


@triton.jit
def softmax_of_tile(logits, taken):
    """Return e^l / Σ e^l over the tokens taken of one tile, and 0 for the others, as a column: (tokens, 1).

    A vector would be moved to other threads and back for it, through shared memory and two barriers (Triton 3.6).
    """
    logits = tl.where(taken[:, None], logits[:, None], float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 0)[None, :])
    return powers / tl.sum(powers, 0)[None, :]


@triton.jit
def logits_of(norms, weights):
    """Return temperature · ‖t‖, rounded, as the sum of a product and 0.

    The compiler fuses a plain product with the subtraction of the largest logit where it can prove that a token is
    taken, and rounds it elsewhere: bits would depend on how a row is cut. To fuse it everywhere is no way out: the
    rounding of the largest alone would be left, and e to the power of half an ulp of 10¹⁰ is beyond float32.
    """
    return tl.fma(norms, weights.temperature, 0.0)


@triton.jit
def reciprocal(n):
    """Return 1 / n for an integer or for integers, rounded once."""
    n = n.to(tl.float32)
    return tl.div_rn(n * 0 + 1, n)


@triton.jit
def weigh_tile(tile, taken, channels, weights, C: tl.constexpr, NORM: tl.constexpr):
    """Return α = softmax(temperature · ‖t‖) of the tokens taken, and 0 of the others: (tokens, 1)."""
    total = partial_norms(tile, channels, weights, NORM)
    norms = finish_norms(total, weights, C, NORM, False)
    return softmax_of_tile(logits_of(norms, weights), taken)


@triton.jit
def store_token(out, frame, row, col, T, channels, mask, token):
    """Store token at out[frame, row, col], with T frames per video.

    No kernel reads it again, so that it is the first to leave the cache, in favour of values that are.
    """
    places = token_places(frame, row, col, T, out) + channels.to(tl.int64) * out.channel
    tl.store(out.pointer + places, token.to(out.pointer.dtype.element_ty), mask=mask, eviction_policy="evict_first")
