"""Calls, tokens and memory layouts that tests share, and a function that calls an op on a backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import stgridpool_kernels

Arguments = dict[str, Any]
Size = tuple[int, int, int]


def run(backend: str, op: str, x: Tensor, **arguments: Any) -> Tensor:
    """Return `op(x, **arguments)` on `backend`."""
    return getattr(stgridpool_kernels, op)(x, backend=backend, **arguments)


def tokens(
    *shape: int,
    content: str = "usual",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Return random tokens (…, C) of RMS 2 ± 0.3.

    content: "usual"; "outlier" with one token 50 times larger and one 0; "equal" for equal tokens; "zero" for zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    *positions, C = shape
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-3)
    x = x * (2 + 0.3 * torch.randn(*positions, 1, generator=generator, dtype=torch.float64))
    if x.numel():
        if content == "outlier":
            large, zero = torch.randint(math.prod(positions), (2,), generator=generator)
            x.view(-1, C)[zero] = 0
            x.view(-1, C)[large] *= 50
        elif content == "equal":
            x = x.view(-1, C)[0].expand(shape)
        elif content == "zero":
            x = torch.zeros_like(x)
    return x.to(dtype).contiguous().to(device)


LAYOUTS = ("contiguous", "sliced", "every second channel", "channels first", "misaligned", "frames inside")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a copy of x in another memory layout, surrounded by NaN."""
    if layout == "sliced":
        base = x.new_full([2 * size + 3 for size in x.shape], math.nan)
        inner = base[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape[:-1]) + (slice(3, 3 + x.shape[-1]),)]
        return inner.copy_(x)
    if layout == "every second channel":
        return x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)[..., ::2].copy_(x)
    if layout == "channels first":
        return x.movedim(-1, -3).contiguous().movedim(-3, -1)
    if layout == "misaligned":
        return x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape).copy_(x)
    if layout == "frames inside":
        return x.transpose(-4, -2).contiguous().transpose(-4, -2)
    return x.clone(memory_format=torch.contiguous_format)


# Calls for tests of properties. Shapes are odd on purpose; videos of 21 (or 10) frames leave incomplete groups.
CALLS: dict[str, tuple[str, Arguments]] = {
    "grid_pool-published": ("grid_pool", {}),
    "grid_pool-ceil": ("grid_pool", {"ceil_mode": True}),
    "grid_pool-paper": ("grid_pool", {"sampling": "first", "resize": "bilinear", "normalize_norm": False}),
    "grid_pool-overlapping": (
        "grid_pool",
        {"frame_strides": (1, 3), "grid_shape": (1, 2, 3, 1), "kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "grid_pool-exclude_pad": (
        "grid_pool",
        {
            "kernel_size": (3, 2),
            "padding": (1, 1),
            "count_include_pad": False,
            "temperature": -1.5,
            "norm_type": 3.0,
        },
    ),
    "grid_pool-adaptive": ("grid_pool", {"frame_strides": (1, 2), "output_size": (2, 3), "norm_type": math.inf}),
    "grid_pool-norm_channels": ("grid_pool", {"frame_strides": (1, 2), "ceil_mode": True, "norm_channels": 3}),
    "temporal_grid-published": ("temporal_grid", {}),
    "temporal_grid-mixed": ("temporal_grid", {"frame_strides": (2, 1, 3), "grid_shape": (2, 1, 3, 2, 1, 1)}),
    "temporal_grid-bilinear": ("temporal_grid", {"resize": "bilinear", "frame_strides": (1, 2)}),
    "temporal_grid-off": ("temporal_grid", {"frame_strides": ()}),
    "norm_pool-published": ("norm_pool", {}),
    "norm_pool-identity": ("norm_pool", {"kernel_size": 1}),
    "norm_pool-padding": ("norm_pool", {"kernel_size": 2, "padding": 1, "norm_type": 3.0, "temperature": 4.0}),
    "norm_pool-norm_channels": ("norm_pool", {"kernel_size": 3, "norm_type": math.inf, "norm_channels": 2}),
    "token_norm-published": ("token_norm", {}),
    "token_norm-p1": ("token_norm", {"norm_type": 1.0, "normalize_norm": False}),
    "token_norm-norm_channels": ("token_norm", {"norm_channels": 3}),
}

GRIDDING_CALLS = {name: call for name, call in CALLS.items() if call[0] in ("grid_pool", "temporal_grid")}
