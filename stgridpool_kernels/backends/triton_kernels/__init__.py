"""Triton kernels for every op, and the choice of kernels for a call. Each file has kernels, then their launches.

fused has the kernels of grid_pool and norm_pool at the published settings, fused_backward those of their gradient.
With any settings, summaries has those of temporal_grid, pool those of grid_pool and norm_pool, token_norm those of
token_norm, and backward those of gradients. They share the arithmetic in tiles and slopes, the block sizes in config,
and the execution of prepared calls in launch.
"""

from __future__ import annotations

import triton

from ...plan import GridPlan
from ..weighting import Weighting
from . import backward, config, fused, fused_backward, pool, summaries, token_norm
from .launch import CallSpec, PreparedCall, run

__all__ = [
    "INTERPRETED",
    "can_fuse",
    "prepare_grid_pool",
    "prepare_grid_pool_backward",
    "prepare_temporal_grid",
    "prepare_temporal_grid_backward",
    "prepare_token_norm",
    "run",
]

INTERPRETED = not isinstance(fused.rows_kernel, triton.JITFunction)
"""True if the kernels run in Triton's interpreter on the CPU, because TRITON_INTERPRET=1 was set on import."""


def can_fuse(plan: GridPlan, weighting: Weighting) -> bool:
    """Return whether the fused kernels take a fusable plan: a block holds the norm, and a launch has room for a row."""
    return weighting.norm_channels <= config.MAX_BLOCK and plan.width <= 2 * config.MAX_ROW_PROGRAMS


def is_fused(spec: CallSpec) -> bool:
    """Return whether the kernels of the published settings run a call. A gradient also needs a token in one block."""
    if spec.chunk is not None:
        return True
    assert spec.plan is not None
    assert spec.weighting is not None
    return spec.plan.fusable and can_fuse(spec.plan, spec.weighting)


def prepare_grid_pool(spec: CallSpec) -> PreparedCall:
    """Return the launches of grid_pool, of norm_pool, or of a chunk of streams."""
    return fused.prepare(spec) if is_fused(spec) else pool.prepare(spec)


def prepare_grid_pool_backward(spec: CallSpec) -> PreparedCall:
    """Return the launches of the gradient of grid_pool or of norm_pool."""
    in_a_block = spec.size.C <= config.MAX_BLOCK
    return fused_backward.prepare(spec) if is_fused(spec) and in_a_block else backward.prepare(spec)


prepare_temporal_grid = summaries.prepare
prepare_temporal_grid_backward = backward.prepare
prepare_token_norm = token_norm.prepare
