"""Triton kernels for every op, and the choice of kernels for a call. Each file has kernels, then their launches.

fused: grid_pool and norm_pool at the published settings. summaries: temporal_grid with any settings. pool: grid_pool
and norm_pool with any settings. token_norm: token_norm. backward: gradients of all ops but token_norm. The kernels
share the arithmetic in tiles, the block sizes in config, and the execution of prepared calls in launch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...plan import GridPlan, grid_plan
from ...plan.dataflow import Dataflow, is_2x2_area, is_2x2_pooling
from ...plan.tables import Chunk
from ..weighting import Weighting
from . import backward, config, fused, pool, summaries, token_norm
from .launch import CallSpec, PreparedCall, run

INTERPRETED = not isinstance(fused.grid_pool_kernel, triton.JITFunction)
"""True if the kernels run in Triton's interpreter on the CPU, because TRITON_INTERPRET=1 was set on import."""

NO_PLAN = grid_plan((), 1, 1, frame_strides=(), kernel_size=1)
"""Placeholder plan of token_norm, which depends on no plan."""


def execute(op: str, x: Tensor, plan: GridPlan | None, weighting: Weighting | None, out: Tensor) -> None:
    """Write `op` of x by the plan into out. weighting: None for temporal_grid."""
    layout = (x.shape, x.stride(), out.stride(), x.data_ptr() % 16, out.data_ptr() % 16)
    key = (op, id(plan), weighting, layout, x.dtype, x.device)
    run(key, lambda: prepare(op, x, plan, weighting, out), x, out)


def execute_backward(
    op: str, grad: Tensor, x: Tensor, plan: GridPlan, weighting: Weighting | None, grad_x: Tensor
) -> None:
    """Write the gradient of any op but token_norm with respect to x into grad_x. grad: gradient of the op's result."""
    aligned = (x.data_ptr() % 16, grad.data_ptr() % 16, grad_x.data_ptr() % 16)
    layout = (x.shape, x.stride(), grad.stride(), grad_x.stride(), aligned)
    key = (f"gradient of {op}", id(plan), weighting, layout, x.dtype, grad.dtype, x.device)
    run(key, lambda: prepare_backward(op, grad, x, plan, weighting, grad_x), x, grad_x, grad=grad)


def takes_fused(plan: GridPlan, channels: int) -> bool:
    """Return whether grid_pool takes the fused kernel. It depends on the settings and the number of channels alone."""
    return is_2x2_pooling(plan) and is_2x2_area(plan) and channels <= config.MAX_BLOCK


def pool_chunk(x: Tensor, chunk: Chunk, weighting: Weighting, slots: Tensor, out: Tensor) -> None:
    """Write a pooled chunk of streams into out. slots: the streams' thumbnails, which are read and written."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    layout = (x.shape, x.stride(), out.stride(), x.data_ptr() % 16, out.data_ptr() % 16)
    key = ("chunk", chunk.words, weighting, layout, x.dtype, x.device)

    def prepare_chunk() -> PreparedCall:
        request = CallSpec("grid_pool", x, out, chunk.plan, Dataflow.none(chunk.plan), weighting, capability)
        return fused.prepare_chunk(request, chunk)

    run(key, prepare_chunk, x, out, slots)


def prepare(
    op: str,
    x: Tensor,
    plan: GridPlan | None,
    weighting: Weighting | None,
    out: Tensor,
    capability: tuple[int, int] | None = None,
) -> PreparedCall:
    """Return the launches of `op` for tensors like these. capability: compute capability, by default of x's device."""
    if capability is None:
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    plan = plan or NO_PLAN
    graph = Dataflow.of(plan) if op in ("grid_pool", "temporal_grid") else Dataflow.none(plan)
    request = CallSpec(op, x, out, plan, graph, weighting, capability)
    if op == "token_norm":
        return token_norm.prepare(request)
    if op == "temporal_grid":
        return summaries.prepare(request)
    if takes_fused(plan, x.shape[-1]):
        return fused.prepare(request)
    return pool.prepare(request)


def prepare_backward(
    op: str,
    grad: Tensor,
    x: Tensor,
    plan: GridPlan,
    weighting: Weighting | None,
    grad_x: Tensor,
    capability: tuple[int, int] | None = None,
) -> PreparedCall:
    """Return the launches of the gradient of `op` for tensors like these. capability: as in `prepare`."""
    if capability is None:
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    graph = Dataflow.none(plan) if op == "norm_pool" else Dataflow.of(plan)
    request = CallSpec(op, x, grad_x, plan, graph, weighting, capability, grad)
    if op != "temporal_grid" and takes_fused(plan, x.shape[-1]):
        return backward.prepare_pairs(request)
    return backward.prepare_tokens(request)
