"""The `triton` backend. Triton and the kernels are imported only once a call may run on them."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..plan import GridPlan
from .weighting import Weighting

OLDEST = (3, 6)
"""Oldest supported version of triton, as (major, minor)."""

LARGEST_WINDOW = 1 << 16
"""Maximum number of tokens of a window, since its weights are held in registers."""


def unsupported_reason(x: Tensor | None, plan: GridPlan | None) -> str | None:
    """Return why the kernels cannot run the call, or None. With x None: why they cannot run on this machine."""
    reason = _missing_here(os.environ.get("TRITON_INTERPRET") == "1")
    if reason is not None or x is None:
        return reason
    device = _device_type()
    if x.device.type != device:
        return f"x is on {x.device}, the kernels run on {device} tensors" + " (TRITON_INTERPRET=1)" * (device == "cpu")
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"{torch.cuda.get_device_name(x.device)} has a compute capability below 8.0"
    if x.dtype == torch.float64:
        return "float64 runs on the reference only"
    if x.numel() // x.shape[-1] >= 1 << 31:
        return f"x has {x.numel() // x.shape[-1]} tokens, the kernels count fewer than 2³¹"
    if plan is not None:
        windows = x.numel() // math.prod(x.shape[-3:]) * math.prod(plan.pooled_size)
        if windows >= 1 << 31:
            return f"the result has {windows} tokens, the kernels count fewer than 2³¹"
        largest = max(plan.window_rows.count) * max(plan.window_cols.count)
        if largest > LARGEST_WINDOW:
            return f"a window has {largest} tokens, at most {LARGEST_WINDOW} are supported"
    return None


@cache
def _device_type() -> str:
    """Return the type of the device of tensors that the kernels run on."""
    if _untried() is None and _kernels().INTERPRETED:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "xpu"


@cache
def _missing_here(interpret: bool) -> str | None:
    if not (interpret or torch.cuda.is_available() or torch.xpu.is_available()):
        return "no CUDA device"
    try:
        version = importlib.metadata.version(_distribution())
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"triton {version} is older than {OLDEST[0]}.{OLDEST[1]}"
    return None


def _distribution() -> str:
    """Return the name of the package that holds the module triton: builds of torch for other GPUs have their own."""
    found = importlib.metadata.packages_distributions().get("triton", []) if _untried() is not None else []
    return found[0] if found else "triton"


@cache
def _untried() -> str | None:
    """Return why nobody knows whether the kernels run on this machine's GPU, None if it is one of NVIDIA or none."""
    if torch.version.hip is not None:
        return "the kernels compile for ROCm (gfx942), and have never run there"
    if not torch.cuda.is_available() and torch.xpu.is_available():
        return "the kernels have never been compiled for XPU, nor run there"
    return None


def opt_in_reason() -> str | None:
    """Return why `auto` skips the backend even though it can run, or None."""
    if _untried() is not None:
        return _untried()
    return "TRITON_INTERPRET=1 runs the kernels on the CPU, slowly" if _kernels().INTERPRETED else None


@cache
def _kernels() -> ModuleType:
    if _untried() is not None:
        warnings.warn(f"backend 'triton': {_untried()}", RuntimeWarning, stacklevel=3)
    from . import triton_kernels

    return triton_kernels


def can_fuse(plan: GridPlan, channels: int, weighting: Weighting) -> bool:
    """Return whether grid_pool by a fusable plan is fused. A token may have more channels than its norm runs over."""
    return bool(_kernels().can_fuse(plan, weighting))


def grid_pool(x: Tensor, plan: GridPlan, weighting: Weighting, out: Tensor) -> None:
    kernels = _kernels()
    kernels.run(kernels.prepare_grid_pool, x, out, plan, weighting)


def grid_pool_backward(grad: Tensor, x: Tensor, plan: GridPlan, weighting: Weighting, grad_x: Tensor) -> None:
    kernels = _kernels()
    kernels.run(kernels.prepare_grid_pool_backward, x, grad_x, plan, weighting, grad)


def temporal_grid(x: Tensor, plan: GridPlan, out: Tensor) -> None:
    kernels = _kernels()
    kernels.run(kernels.prepare_temporal_grid, x, out, plan)


def temporal_grid_backward(grad: Tensor, x: Tensor, plan: GridPlan, grad_x: Tensor) -> None:
    kernels = _kernels()
    kernels.run(kernels.prepare_temporal_grid_backward, x, grad_x, plan, None, grad)


def token_norm(x: Tensor, weighting: Weighting, out: Tensor) -> None:
    kernels = _kernels()
    kernels.run(kernels.prepare_token_norm, x, out, None, weighting)


def pool_chunk(x: Tensor, words: tuple[int, ...], weighting: Weighting, slots: Tensor, out: Tensor) -> None:
    kernels = _kernels()
    kernels.run(kernels.prepare_grid_pool, x, out, None, weighting, None, words, slots)
