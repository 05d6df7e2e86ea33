"""What is timed: tokens of the models that pool them, long videos, packed and batched ones, and sweeps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.lower_bound import Traffic, flops, lower_bound
from stgridpool_kernels.plan import GridPlan, grid_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """Tokens and the settings they are pooled by: (sum(frame_counts), *grid, channels), or (batch, T, *grid, channels)
    where frame_counts is batch times T.

    groups: "main", and the sweeps it is a point of. goal: one of the shapes that goals are set for; torch.compile is
    timed on these only, since it takes long.
    """

    name: str
    frame_counts: tuple[int, ...]
    grid: tuple[int, int] = (27, 27)
    channels: int = 896
    dtype: torch.dtype = torch.bfloat16
    batch: int | None = None
    kernel_size: int = 2
    ceil_mode: bool = False
    output_size: tuple[int, int] | None = None
    groups: tuple[str, ...] = ("main",)
    goal: bool = False

    @property
    def frames(self) -> int:
        return sum(self.frame_counts)

    @property
    def shape(self) -> tuple[int, ...]:
        leading = (self.frames,) if self.batch is None else (self.batch, self.frames // self.batch)
        return (*leading, *self.grid, self.channels)

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def settings(self) -> dict[str, Any]:
        """norm_pool's arguments, as far as they are not the defaults."""
        if self.output_size is not None:
            return {"output_size": list(self.output_size)}
        settings: dict[str, Any] = {} if self.kernel_size == 2 else {"kernel_size": self.kernel_size}
        return settings | ({"ceil_mode": True} if self.ceil_mode else {})

    @property
    def packing(self) -> dict[str, Any]:
        """What grid_pool is given besides, where there is more than one video."""
        packed = self.batch is None and len(self.frame_counts) > 1
        return {"frame_counts": list(self.frame_counts)} if packed else {}

    def plan(self, op: str) -> GridPlan:
        frame_strides = (2, 4, 8) if op == "grid_pool" else ()
        return grid_plan(self.frame_counts, *self.grid, frame_strides=frame_strides, **self.settings)

    def bound(self, op: str) -> Traffic:
        """A gradient, "grid_pool_backward", reads what the op reads and the gradient of its result, and writes x's."""
        forward = op.removesuffix("_backward")
        bound = lower_bound(self.plan(forward), self.channels, self.dtype.itemsize)
        return bound if op == forward else Traffic(bound.total_bytes, self.input_bytes)

    def flops(self, op: str) -> int:
        """A gradient takes twice: norms and products with the result's gradient, then sums of two for each token."""
        forward = op.removesuffix("_backward")
        return flops(self.plan(forward), self.channels) * (1 if op == forward else 2)


def _models() -> list[Workload]:
    seven, half = 3584, 896  # channels of a decoder of 7 and of half a billion parameters
    video = Workload("llava-video-7b", (64,), channels=seven, groups=("main", "T-3584"), goal=True)
    return [
        video,
        replace(video, name="llava-video-7b-ceil", ceil_mode=True, groups=("main",)),
        Workload("llava-onevision-7b", (32,), channels=seven, ceil_mode=True, goal=True),
        Workload("llava-next-video-7b", (64,), grid=(24, 24), channels=4096, goal=True),
        Workload("llava-video-0.5b", (64,), channels=half, groups=("main", "T-896")),
        Workload("llava-onevision-0.5b", (32,), channels=half, ceil_mode=True),
        *(
            replace(video, name=f"llava-video-7b-{name}", dtype=DTYPES[name], groups=("main",), goal=False)
            for name in ("fp16", "fp32")
        ),
        Workload("packed-16", tuple(range(8, 129, 8)), channels=half),
        Workload("batch-8", (32,) * 8, channels=half, batch=8),
        Workload("long-512", (512,), channels=half, groups=("main", "T-896")),
        Workload("long-2048", (2048,), channels=half, groups=("main", "T-896")),
        Workload("long-512-7b", (512,), channels=seven, groups=("main", "T-3584")),
        Workload("long-2048-7b", (2048,), channels=seven, groups=("main", "T-3584")),
    ]


def _sweeps() -> list[Workload]:
    def point(frames: int, channels: int, group: str, **more: Any) -> Workload:
        return Workload(f"{frames}x27x27x{channels}", (frames,), channels=channels, groups=(group,), **more)

    wide = (point(frames, 3584, "T-3584") for frames in (8, 16, 32, 128, 256))
    narrow = (point(frames, 896, "T-896") for frames in (8, 16, 32, 128, 256))
    channels = (point(32, channels, "C") for channels in (128, 384, 1152, 2048, 3584, 4096, 8192))
    # windows of 3 × 3 and more take the general kernels; 32 frames of 7B's channels
    windows = (
        replace(point(32, 3584, "window", kernel_size=size), name=f"window-{size}x{size}") for size in (2, 3, 4, 6, 9)
    )
    # some 50, 30, 23, 14 and 5 % of the tokens
    budgets = (
        replace(point(32, 3584, "budget", output_size=(side, side)), name=f"budget-{side}x{side}")
        for side in (19, 15, 13, 10, 6)
    )
    return [*merged([*narrow, *wide, *channels]), *windows, *budgets]


def merged(workloads: Sequence[Workload]) -> list[Workload]:
    """The same, where a name that is there twice is one workload in the groups of both."""
    found: dict[str, Workload] = {}
    for workload in workloads:
        groups = found[workload.name].groups if workload.name in found else ()
        found[workload.name] = replace(workload, groups=(*groups, *workload.groups))
    return list(found.values())


WORKLOADS = {workload.name: workload for workload in (*_models(), *_sweeps())}

QUICK = ("16x27x27x3584", "8x27x27x896", "16x27x27x896", "32x27x27x896", "llava-video-0.5b")
"""For two minutes on a small machine."""


def parse_workload(text: str) -> Workload:
    """A name of WORKLOADS, or a shape as in 64x27x27x3584, 8x32x27x27x896:fp16 (a batch), 32x27x27x3584:ceil.

    Raises ValueError for anything else.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    sizes, *flags = text.split(":")
    numbers = [int(number) for number in sizes.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3,4}", sizes) else []
    unknown = set(flags) - {*DTYPES, "ceil"}
    if not numbers or unknown or len(set(flags) & set(DTYPES)) > 1:
        raise ValueError(
            f"shape must be TxHxWxC or BxTxHxWxC, followed by {', '.join(f':{name}' for name in DTYPES)} or :ceil if "
            f"need be, or one of {', '.join(WORKLOADS)}; got {text!r}"
        )
    *leading, frames, height, width, channels = numbers
    return Workload(
        text,
        (frames,) * (leading[0] if leading else 1),
        grid=(height, width),
        channels=channels,
        dtype=next((DTYPES[flag] for flag in flags if flag in DTYPES), torch.bfloat16),
        batch=leading[0] if leading else None,
        ceil_mode="ceil" in flags,
    )


def random_tokens(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Tokens of RMS 2 ± 0.3: unequal norms, so that the softmax has something to weigh."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return x.mul_(2 + 0.3 * torch.randn((*shape[:-1], 1), dtype=dtype, device=device, generator=generator))
