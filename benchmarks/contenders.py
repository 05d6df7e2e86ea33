"""What is timed: shapes, and for each the package's ops and what they are compared with, next to their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import stgridpool_kernels as stgp
from stgridpool_kernels import baselines, reference
from stgridpool_kernels.plan import GridPlan, grid_plan

from .lower_bound import Traffic, lower_bound


@dataclass(frozen=True)
class Workload:
    """Tokens (sum(frame_counts), size, size, channels) and the windows they are pooled by.

    goal: one of the shapes that goals are set for; torch.compile is timed on these only, since it takes long.
    """

    name: str
    frame_counts: tuple[int, ...]
    size: int
    channels: int
    dtype: torch.dtype = torch.bfloat16
    ceil_mode: bool = False
    goal: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (sum(self.frame_counts), self.size, self.size, self.channels)

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def packing(self) -> dict[str, Any]:
        """grid_pool's argument where there is more than one video."""
        return {"frame_counts": self.frame_counts} if len(self.frame_counts) > 1 else {}

    def plan(self, op: str) -> GridPlan:
        frame_strides = (2, 4, 8) if op == "grid_pool" else ()
        size, ceil_mode = self.size, self.ceil_mode
        return grid_plan(self.frame_counts, size, size, frame_strides=frame_strides, ceil_mode=ceil_mode)

    def bound(self, op: str) -> Traffic:
        return lower_bound(self.plan(op), self.channels, self.dtype.itemsize)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("64x27x27x3584", (64,), 27, 3584, goal=True),
        Workload("64x27x27x3584-ceil", (64,), 27, 3584, ceil_mode=True, goal=True),
        Workload("32x27x27x3584-ceil", (32,), 27, 3584, ceil_mode=True, goal=True),
        Workload("64x24x24x4096", (64,), 24, 4096, goal=True),
        Workload("512x27x27x896", (512,), 27, 896),
        Workload("packed-16x27x27x896", tuple(range(8, 129, 8)), 27, 896),
        Workload("64x27x27x3584-fp16", (64,), 27, 3584, dtype=torch.float16),
        Workload("64x27x27x3584-fp32", (64,), 27, 3584, dtype=torch.float32),
    )
}


def random_tokens(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Tokens of RMS 2 ± 0.3: unequal norms, so that the softmax has something to weigh."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return x.mul_(2 + 0.3 * torch.randn((*shape[:-1], 1), dtype=dtype, device=device, generator=generator))


# ---- contenders ----


@dataclass(frozen=True)
class Contender:
    """op: whose lower bound it is held to. definition: what it must compute, at most `ulps` off at the largest value.

    takes_out: `call` can write into a tensor given as `out`.
    """

    name: str
    op: str
    call: Callable[..., Tensor]
    definition: Callable[[Tensor], Tensor]
    ulps: float
    takes_out: bool = False
    note: str = ""


def contenders(workload: Workload, compiled: bool) -> list[Contender]:
    """Who is timed on a shape: torch.compile by itself, or all the others."""
    w, ceil_mode = workload, workload.ceil_mode
    grid_pool = partial(stgp.grid_pool, ceil_mode=ceil_mode, **w.packing)
    norm_pool = partial(stgp.norm_pool, ceil_mode=ceil_mode)
    right_grid, right_pool = (partial(op, backend="reference") for op in (grid_pool, norm_pool))
    # float32 arithmetic in another order and rounded once, against rounding at every step
    once, every = (2, 8) if w.dtype.itemsize == 2 else (64, 64)
    if compiled:
        call = torch.compile(op_by_op_grid_pool(w.plan("grid_pool"), "cuda"), dynamic=False)
        return [Contender("torch_compile_grid_pool", "grid_pool", call, right_grid, every)]

    average = partial(average_pool, ceil_mode=ceil_mode)
    right_average = partial(average_pool, ceil_mode=ceil_mode, dtype=torch.float32)
    llava = partial(baselines.llava_avg_pool, ceil_mode=ceil_mode)
    right_floor = partial(right_grid, ceil_mode=False)
    note = f"pools {w.size} to {w.size // 2}" if ceil_mode else ""
    cuda = [
        Contender(f"cuda_{op}", op, partial(call, backend="cuda"), right, once, takes_out=True)
        for op, call, right in (("grid_pool", grid_pool, right_grid), ("norm_pool", norm_pool, right_pool))
    ]
    return [
        Contender("grid_pool", "grid_pool", partial(grid_pool, backend="triton"), right_grid, once, takes_out=True),
        Contender("norm_pool", "norm_pool", partial(norm_pool, backend="triton"), right_pool, once, takes_out=True),
        *(cuda if "cuda" in stgp.available_backends() else []),
        Contender("llava_avg_pool", "norm_pool", llava, right_average, every),
        Contender("channels_last_avg_pool", "norm_pool", average, right_average, every),
        Contender("naive_grid_pool", "grid_pool", partial(naive_grid_pool, w), right_floor, every, note=note),
    ]


# What the fused kernel may do otherwise (`triton_kernels.config.FusedConfig`), timed against how it is configured.
CHOICES: dict[str, dict[str, Any]] = {
    "as configured": {},
    "spread": {"spread": True},
    "mosaic_cells 2": {"mosaic_cells": 2},
    "mosaic_cells 7": {"mosaic_cells": 7},
    "spread, mosaic_cells 2": {"spread": True, "mosaic_cells": 2},
    "stages 1": {"stages": 1},
    "stages 3": {"stages": 3},
    "num_warps 4": {"num_warps": 4, "walk_registers": 255},
    "num_warps 16": {"num_warps": 16},
    "walk_registers 168": {"walk_registers": 168},
}


def variants(workload: Workload) -> list[Contender]:
    """grid_pool as configured and with every other choice."""
    right = partial(stgp.grid_pool, ceil_mode=workload.ceil_mode, backend="reference", **workload.packing)
    ulps = 2 if workload.dtype.itemsize == 2 else 64
    return [Contender(name, "grid_pool", _with_choice(workload, name), right, ulps, takes_out=True) for name in CHOICES]


def _with_choice(workload: Workload, name: str) -> Callable[..., Tensor]:
    from stgridpool_kernels import device_tables, triton_kernels
    from stgridpool_kernels.triton_kernels import fused, launch

    plan, configured = workload.plan("grid_pool"), fused.fused_config
    prepared: list[launch.Call] = []

    def call(x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = x.new_empty((x.shape[0], *plan.pooled_size, x.shape[3]))
        if not prepared:
            device_tables._tables.clear()  # with another configuration, other tables belong to the plan
            with patch.object(fused, "fused_config", lambda *given: replace(configured(*given), **CHOICES[name])):
                prepared.append(triton_kernels.prepare("grid_pool", x, plan, (1.0, 2.0, True), out))
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        prepared[0](x, out, stream, x.is_cuda and torch.cuda.is_current_stream_capturing())
        return out

    return call


def average_pool(x: Tensor, ceil_mode: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Average pooling of a permuted view, in dtype, without a channel-first copy."""
    pooled = F.avg_pool2d(x.to(dtype or x.dtype).permute(0, 3, 1, 2), 2, ceil_mode=ceil_mode)
    return pooled.permute(0, 2, 3, 1).to(x.dtype)


def naive_grid_pool(workload: Workload, x: Tensor) -> Tensor:
    """ST-GridPool op by op, one video after another."""
    videos = [baselines.naive_grid_pool(video) for video in x.split(list(workload.frame_counts))]
    return videos[0] if len(videos) == 1 else torch.cat(videos)


def op_by_op_grid_pool(plan: GridPlan, device: str) -> Callable[[Tensor], Tensor]:
    """The reference's arithmetic at the published settings by a fixed plan: what torch.compile is given to fuse."""
    levels = [
        (level, torch.tensor(level.sources, device=device), torch.tensor(level.targets, device=device))
        for level in plan.levels
        if level.targets
    ]
    rows, cols = plan.pooled_size
    bottom, right = 2 * rows - plan.height, 2 * cols - plan.width

    def grid_pool(x: Tensor) -> Tensor:
        frames = x.clone()
        for level, sources, targets in levels:
            frames[targets] = reference._shrink(frames[sources].float(), level, plan.resize).to(x.dtype)
        windows = F.pad(frames, (0, 0, 0, right, 0, bottom))  # a negative number crops
        windows = windows.unflatten(2, (cols, 2)).unflatten(1, (rows, 2)).float()  # (T, OH, 2, OW, 2, C)
        logits = windows.square().mean(-1).sqrt()
        taken = F.pad(torch.ones_like(x[0, :, :, 0], dtype=torch.bool), (0, right, 0, bottom))
        logits = logits.masked_fill(~taken.view(rows, 2, cols, 2), -math.inf)
        weights = logits.transpose(2, 3).flatten(3).softmax(-1).unflatten(3, (2, 2)).transpose(2, 3)
        return (weights[..., None] * windows).sum((2, 4)).to(x.dtype)

    return grid_pool


def mismatch(result: Tensor, expected: Tensor, ulps: float) -> str | None:
    """Why `result` is not `expected`, or None."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{tuple(result.shape)} {result.dtype} in place of {tuple(expected.shape)} {expected.dtype}"
    worst, scale = (result - expected).abs().max().item(), expected.abs().max().item()
    allowed = ulps * torch.finfo(expected.dtype).eps * 2.0 ** (math.frexp(scale)[1] - 1)
    return None if worst <= allowed else f"off by {worst:.3g}, {allowed:.3g} is allowed"
