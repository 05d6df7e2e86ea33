"""Workloads: tokens of models, long, packed and batched videos, sweeps, gradients, streams, prefills and pruning.

A sweep of small and large shapes, the group "plain", compares the ops with a plain average.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.lower_bound import Traffic, lower_bound
from stgridpool_kernels.plan import GridPlan, grid_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("pooling", "plain", "gradients", "stream", "prefill", "pruning", "empty")


@dataclass(frozen=True)
class Workload:
    """Shape and dtype of tokens, and the settings of their pooling.

    The shape is (sum(frame_counts), *grid, channels), or (batch, T, *grid, channels) if frame_counts is batch times T.
    kind: calls that are timed: the ops and the poolings that they replace, the ops and a plain average on warm caches,
    the ops' gradients, pushes to a stream, the prefill of a language model after the pooling, vLLM's pruning of tokens,
    or calls without frames. groups: "main", or the sweeps that it is a point of, or its kind. goal: whether goals are
    set for the shape. torch.compile is timed on such shapes only, since it takes long.
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
    resize: str = "area"
    kind: str = "pooling"
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
    def result_bytes(self) -> int:
        rows, cols = self.plan("norm_pool").pooled_size
        return self.frames * rows * cols * self.channels * self.dtype.itemsize

    @property
    def warm(self) -> bool:
        """True if caches are timed as the call before left them, False if other memory is read before every sample."""
        return self.kind == "plain"

    @property
    def windows(self) -> dict[str, Any]:
        """Arguments of norm_pool that are not the defaults."""
        if self.output_size is not None:
            return {"output_size": list(self.output_size)}
        settings: dict[str, Any] = {} if self.kernel_size == 2 else {"kernel_size": self.kernel_size}
        return settings | ({"ceil_mode": True} if self.ceil_mode else {})

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of grid_pool that are not the defaults."""
        packed = self.batch is None and len(self.frame_counts) > 1
        gridding = {"frame_counts": list(self.frame_counts)} if packed else {}
        return self.windows | gridding | ({} if self.resize == "area" else {"resize": self.resize})

    def plan(self, op: str) -> GridPlan:
        gridding: dict[str, Any] = {"resize": self.resize} if op == "grid_pool" else {"frame_strides": ()}
        height, width = self.grid
        return grid_plan(self.frame_counts, height, width, **gridding, **self.windows)

    def bound(self, op: str) -> Traffic:
        """Return the lower bound of an op's traffic.

        A gradient, as in "grid_pool_backward", reads the op's input and the gradient of the result, and writes that of
        x.
        """
        forward = op.removesuffix("_backward")
        bound = lower_bound(self.plan(forward), self.channels, self.dtype.itemsize)
        return bound if op == forward else Traffic(bound.total_bytes, self.input_bytes)


def _models() -> list[Workload]:
    seven, half = 3584, 896  # channels of decoders with 7 and with half a billion parameters
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
    def point(frames: int, channels: int, *groups: str, **more: Any) -> Workload:
        return Workload(f"{frames}x27x27x{channels}", (frames,), channels=channels, groups=groups, **more)

    counts = (8, 16, 32, 128, 256)
    narrow = (point(frames, 896, "T-896") for frames in counts)
    # 32 frames of 3584 channels are a point of the sweep of channels too
    wide = (point(frames, 3584, "T-3584", *(["C"] if frames == 32 else [])) for frames in counts)
    channels = (point(32, channels, "C") for channels in (128, 384, 1152, 2048, 4096, 8192))
    # windows of 3 × 3 and more take the general kernels
    windows = (
        replace(point(32, 3584, "window", kernel_size=size), name=f"window-{size}x{size}") for size in (2, 3, 4, 6, 9)
    )
    # about 50, 30, 23, 14 and 5 % of the tokens
    budgets = (
        replace(point(32, 3584, "budget", output_size=(side, side)), name=f"budget-{side}x{side}")
        for side in (19, 15, 13, 10, 6)
    )
    return [*narrow, *wide, *channels, *windows, *budgets]


def _plain() -> list[Workload]:
    return [
        Workload(
            f"{frames}x27x27x{channels}:{dtype}:plain",
            (frames,),
            channels=channels,
            dtype=DTYPES[dtype],
            kind="plain",
            groups=("plain",),
        )
        for dtype in DTYPES
        for channels in (64, 128, 384, 896, 1152, 3584, 4096)
        for frames in (1, 8, 16, 32, 64)
    ]


def _others() -> list[Workload]:
    stream = Workload("stream", (64,), channels=3584, kind="stream", groups=("stream",))
    pruning = Workload("pruning", (32,), channels=3584, kind="pruning", groups=("pruning",))
    prefill = Workload("prefill-0.5b", (8,), kind="prefill", groups=("prefill",))
    gradients = Workload("llava-video-0.5b:gradients", (64,), kind="gradients", groups=("gradients",))
    return [
        Workload("1x9x9x384", (1,), grid=(9, 9), channels=384, groups=("overhead",)),
        replace(gradients, name="32x27x27x896:gradients", frame_counts=(32,)),
        gradients,
        stream,
        replace(stream, name="stream-10x10", output_size=(10, 10)),
        replace(stream, name="stream-bilinear", resize="bilinear"),
        prefill,
        replace(prefill, name="prefill-7b", frame_counts=(64,), channels=3584),
        pruning,
        replace(pruning, name="pruning-20x36", grid=(20, 36)),  # 560 × 1008 pixels in Qwen2.5-VL
        Workload("empty", (0,), channels=3584, kind="empty", groups=("empty",)),
    ]


WORKLOADS = {workload.name: workload for workload in (*_models(), *_sweeps(), *_others(), *_plain())}

QUICK = ("16x27x27x3584", "8x27x27x896", "16x27x27x896", "32x27x27x896", "llava-video-0.5b", "1x9x9x384")
"""Names of workloads that take two minutes in total on a small machine."""


def parse_workloads(text: str) -> list[Workload]:
    """Return the workloads of the group that a text names, or else the one of `parse_workload`."""
    if text in WORKLOADS:
        return [WORKLOADS[text]]
    of_group = [workload for workload in WORKLOADS.values() if text in workload.groups]
    return of_group or [parse_workload(text)]


def parse_workload(text: str) -> Workload:
    """Return the workload that a text names.

    text: a key of WORKLOADS, or a shape like 64x27x27x3584 or 8x32x27x27x896 (a batch), each followed by any of :bf16,
    :fp16, :fp32, :ceil, :plain, :gradients, :stream, :prefill and :pruning. Raises ValueError for other texts.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    base, *flags = text.split(":")
    found = WORKLOADS.get(base) or _of_shape(base)
    kinds, dtypes = [flag for flag in flags if flag in KINDS[1:-1]], [flag for flag in flags if flag in DTYPES]
    known = {"ceil", *kinds, *dtypes}
    if found is None or not set(flags) <= known or len(kinds) > 1 or len(dtypes) > 1:
        groups = dict.fromkeys(group for workload in WORKLOADS.values() for group in workload.groups)
        names = [name for name, workload in WORKLOADS.items() if workload.kind != "plain"]
        raise ValueError(
            f"shape must be TxHxWxC or BxTxHxWxC, or one of {', '.join(names)}, followed by "
            f"{', '.join(f':{flag}' for flag in (*DTYPES, 'ceil', *KINDS[1:-1]))} if need be, "
            f"or a group among {', '.join(groups)}; got {text!r}"
        )
    kind = kinds[0] if kinds else found.kind
    return replace(
        found,
        name=text,
        dtype=DTYPES[dtypes[0]] if dtypes else found.dtype,
        ceil_mode=found.ceil_mode or "ceil" in flags,
        kind=kind,
        groups=(kind,),
        goal=False,
    )


def _of_shape(text: str) -> Workload | None:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3,4}", text):
        return None
    *batch, frames, height, width, channels = map(int, text.split("x"))
    counts = (frames,) * (batch[0] if batch else 1)
    return Workload(text, counts, (height, width), channels, batch=batch[0] if batch else None)


def random_tokens(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Return random tokens of RMS 2 ± 0.3, whose unequal norms make the weights of a window unequal."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return x.mul_(2 + 0.3 * torch.randn((*shape[:-1], 1), dtype=dtype, device=device, generator=generator))
