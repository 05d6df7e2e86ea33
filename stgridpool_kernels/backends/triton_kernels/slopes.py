"""Derivatives of norms, which both kinds of gradient kernels take from here."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import reciprocal


@triton.jit
def norm_slopes(tile, norms, largest, weights, C: tl.constexpr, NORM: tl.constexpr):
    """Return ∂‖t‖/∂t_c of tokens with these norms, for channels that the norm runs over; it is 0 where ‖t‖ or t_c is 0.

    largest: number of elements that are as large as the norm, for "max".
    """
    M: tl.constexpr = C if NORM.mean and weights.channels is None else 1
    if NORM.kind == "l2":
        slopes = tile * (1 / tl.where(norms > 0, norms * M, float("inf")))[:, None]
    else:
        signs = tl.where(tile > 0, 1.0, tl.where(tile < 0, -1.0, 0.0))
        if NORM.kind == "l1":
            slopes = signs * (1.0 / M)
        elif NORM.kind == "max":
            slopes = tl.where(tl.abs(tile) == norms[:, None], signs * (1 / largest.to(tl.float32))[:, None], 0.0)
        else:
            logarithms = tl.log2(tl.abs(tile).to(tl.float64)) - tl.log2(norms.to(tl.float64))[:, None]
            powers = tl.exp2((NORM.p - 1) * logarithms).to(tl.float32)
            slopes = tl.where((tile != 0) & (norms > 0)[:, None], signs * powers * (1.0 / M), 0.0)
    if weights.channels is not None and NORM.mean and NORM.kind != "max":
        slopes *= reciprocal(tl.cast(weights.channels, tl.float32))
    return slopes


@triton.jit
def count_largest(tile, norms, channels, weights, C: tl.constexpr):
    """Return the number of elements that are as large as the norm, among those that the norm, a maximum, runs over."""
    taken = channels < C
    if weights.channels is not None:
        taken = channels < tl.cast(weights.channels, tl.int32)
    return tl.sum(((tl.abs(tile) == norms[:, None]) & taken[None, :]).to(tl.int32), 1)
