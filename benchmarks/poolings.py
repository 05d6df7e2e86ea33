"""Providers that pool tokens: the package's ops on every backend, the poolings that they replace, and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provider import SEGMENT, Pool, Provider
from benchmarks.workloads import Workload
from stgridpool_kernels import functional
from stgridpool_kernels.backends import available_backends, backend_names
from stgridpool_kernels.cli import baselines
from stgridpool_kernels.plan import GridPlan

OPS = ("norm_pool", "grid_pool")


def poolings(workload: Workload, device: str) -> list[Provider]:
    """Return all providers that pool the tokens of a workload on a device ("cpu" or "cuda")."""
    found = [*our_ops(workload, device), *plain_poolings(workload)]
    if workload.output_size is None:
        found += naive_code(workload, device)
    if workload.goal:
        found += compiled_code(workload, device)
    return found


def plain(workload: Workload, device: str) -> list[Provider]:
    """Return the ops on the package's own kernels, and the plain average of the same windows, `avg_pool2d`."""
    ours = [provider for provider in our_ops(workload, device) if not provider.name.endswith(":reference")]
    return [*ours, *(provider for provider in plain_poolings(workload) if provider.name == "avg_pool2d")]


def gradients(workload: Workload, device: str) -> list[Provider]:
    """Return the ops, and providers of their gradients with respect to x for a random gradient of the result."""
    w, found = workload, our_ops(workload, device)
    wide = 4 / w.dtype.itemsize  # the reference copies to float32
    for op, settings in zip(OPS, (w.windows, w.settings), strict=True):
        of_result = cache(partial(_random_gradient, w, op))
        definition = partial(_gradient_in_segments, w, op, of_result)
        for backend in backends(device):
            is_reference = backend == "reference"
            found.append(
                Provider(
                    f"{op}_backward:{backend}",
                    f"{op}_backward",
                    partial(_gradient, op, backend, settings, of_result),
                    definition,
                    op_by_op_ulps(w),  # the definition also rounds the gradients of summaries
                    memory=16 * wide if is_reference else 0.5,
                    captures=not is_reference,
                    slow=is_reference and device == "cpu",
                )
            )
    return found


def backends(device: str) -> list[str]:
    """Return the package's backends that are timed on a device: those that run on it natively."""
    others = {"cpu": ("triton", "cuda"), "cuda": ("cpu",)}[device]
    return [backend for backend in available_backends() if backend not in others]


# ---- the package ----


def our_ops(workload: Workload, device: str) -> list[Provider]:
    w, wide = workload, 4 / workload.dtype.itemsize  # the reference copies to float32
    calls = (partial(functional.norm_pool, **w.windows), partial(functional.grid_pool, **w.settings))
    return [
        Provider(
            f"{op}:{backend}",
            op,
            partial(call, backend=backend),
            by_reference(w, op),
            2 if w.dtype.itemsize == 2 else 64,
            takes_out=backend != "reference",
            memory=8 * wide if backend == "reference" else 0.5,
            captures=backend != "reference",  # the reference copies indices from the CPU at every call
            slow=backend == "reference" and device == "cpu",
        )
        for op, call in zip(OPS, calls, strict=True)
        for backend in backends(device)
    ]


@cache
def by_reference(workload: Workload, op: str) -> Pool:
    """Return the definition of an op. All providers of the op share the object, so that its results are cached."""
    own = {name: value for name, value in workload.settings.items() if name != "frame_counts"}
    settings = own if op == "grid_pool" else workload.windows
    pool = partial(getattr(functional, op), **settings, backend="reference")

    def definition(x: Tensor) -> Tensor:
        pooled = torch.cat([pool(part) for part in segments(workload, x)])
        return pooled.view(*x.shape[:-3], *pooled.shape[1:])

    return definition


def _random_gradient(workload: Workload, op: str, device: torch.device) -> Tensor:
    """Return a random gradient of the op's result."""
    shape = (*workload.shape[:-3], *workload.plan(op).pooled_size, workload.channels)
    generator = torch.Generator(device).manual_seed(len(shape))
    return torch.randn(shape, dtype=workload.dtype, device=device, generator=generator)


OfResult = Callable[[torch.device], Tensor]
"""Function that returns the gradient of the result on a device."""


def _gradient(op: str, backend: str, settings: dict[str, Any], of_result: OfResult, x: Tensor) -> Tensor:
    return _backward(op, backend, of_result(x.device), x, settings)


def _gradient_in_segments(workload: Workload, op: str, of_result: OfResult, x: Tensor) -> Tensor:
    """Return the gradient by the reference, segment by segment."""
    pairs = zip(segments(workload, of_result(x.device)), segments(workload, x), strict=True)
    return torch.cat([_backward(op, "reference", *pair, workload.windows) for pair in pairs]).view(x.shape)


def _backward(op: str, backend: str, grad: Tensor, x: Tensor, settings: dict[str, Any]) -> Tensor:
    requested = torch.tensor(backend_names().index(backend))
    found: Tensor = getattr(torch.ops.stgp, f"_{op}_backward")(grad, x, requested, **settings)
    return found


# ---- other poolings ----


def plain_poolings(workload: Workload) -> Iterator[Provider]:
    """Yield poolings without weights and summaries: on channels-last views without a copy, and as engines call them."""
    w, size = workload, workload.plan("norm_pool").pooled_size

    def provider(name: str, pool: Callable[..., Tensor], memory: float = 0.5, **more: Any) -> Provider:
        def exact(x: Tensor) -> Tensor:
            return pool(x.float()).to(x.dtype)

        framewise, oracle = (partial(on_frames, function) for function in (pool, exact))
        return Provider(name, "norm_pool", framewise, oracle, op_by_op_ulps(w), memory=memory, **more)

    def view(pool: Pool) -> Pool:
        return lambda x: pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    if w.output_size is None:
        k, ceil = w.kernel_size, tuple(math.ceil(side / w.kernel_size) for side in w.grid)
        settings: dict[str, Any] = {"kernel_size": k, "ceil_mode": w.ceil_mode}
        note = f"pools to {ceil[0]} × {ceil[1]}" if ceil != size else ""
        yield provider("avg_pool2d", partial(channels_last_avg_pool, **settings), takes_out=True)
        yield provider("llava_avg_pool", partial(baselines.llava_avg_pool, **settings), 1.5)
        yield provider("llava_bilinear_pool", partial(baselines.llava_bilinear_pool, kernel_size=k), 1.5, note=note)
        yield provider("max_pool2d", view(partial(F.max_pool2d, **settings)))
    yield provider("adaptive_avg_pool2d", view(partial(F.adaptive_avg_pool2d, output_size=size)))


def channels_last_avg_pool(x: Tensor, kernel_size: int, ceil_mode: bool, out: Tensor | None = None) -> Tensor:
    """Return the plain averages of the windows of x (T, H, W, C), by `avg_pool2d` on a view without a copy.

    out: contiguous memory of the result, (T, OH, OW, C); without it the result is new.
    """
    average: Callable[..., Tensor] = F.avg_pool2d  # its types leave out `out`, which it takes
    if out is None:
        return average(x.permute(0, 3, 1, 2), kernel_size, ceil_mode=ceil_mode).permute(0, 2, 3, 1)
    average(x.permute(0, 3, 1, 2), kernel_size, ceil_mode=ceil_mode, out=out.permute(0, 3, 1, 2))
    return out


def naive_code(workload: Workload, device: str) -> Iterator[Provider]:
    """Yield ST-GridPool op by op. Like the published code, it has no ceil_mode."""
    w, floor = workload, replace(workload, ceil_mode=False)
    size = floor.plan("norm_pool").pooled_size
    is_cut = size != w.plan("norm_pool").pooled_size
    note = f"pools to {size[0]} × {size[1]}, without windows that the edge cuts" if is_cut else ""
    for op in OPS:
        strides = (2, 4, 8) if op == "grid_pool" else ()
        naive = partial(baselines.naive_grid_pool, frame_strides=strides, kernel_size=w.kernel_size)
        yield Provider(
            f"naive_{op}",
            op,
            video_by_video(w, naive),
            by_reference(floor if is_cut else w, op),
            op_by_op_ulps(w),
            memory=6.0,
            slow=device == "cpu",
            note=note,
        )


def compiled_code(workload: Workload, device: str) -> Iterator[Provider]:
    """Yield the formulas op by op, with precomputed indices, under torch.compile, which compiles at the first call."""
    modes = {"compiled_grid_pool": "default"}
    if device == "cuda":  # without torch's own CUDA graphs, since the benchmark captures every call in a graph
        modes["compiled_grid_pool:max-autotune"] = "max-autotune-no-cudagraphs"
    for name, mode in modes.items():
        yield Provider(
            name,
            "grid_pool",
            compiled_grid_pool(workload.plan("grid_pool"), mode),
            by_reference(workload, "grid_pool"),
            op_by_op_ulps(workload),
            compiles=True,
            memory=16 / workload.dtype.itemsize,
        )


def op_by_op_ulps(workload: Workload) -> float:
    """Return the tolerance in ulps for code that rounds at every step. The package's ops round once."""
    return 8 if workload.dtype.itemsize == 2 else 64


def on_frames(pool: Callable[..., Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
    """Apply `pool`, which takes (T, H, W, C), to the frames of a video or a batch at once, as engines do.

    out: memory of the result; only for a `pool` that takes `out`.
    """
    if out is not None:
        pool(x.flatten(0, -4), out=out.flatten(0, -4))
        return out
    pooled = pool(x.flatten(0, -4))
    return pooled.unflatten(0, x.shape[:-3]) if x.dim() == 5 else pooled


def video_by_video(workload: Workload, pool: Pool) -> Pool:
    """Return a function that applies `pool` to each video and joins the results."""

    def call(x: Tensor) -> Tensor:
        if len(workload.frame_counts) == 1 and x.dim() == 4:
            return pool(x)
        videos = x.flatten(0, -4).split(list(workload.frame_counts))
        pooled = torch.cat([pool(video) for video in videos])
        return pooled.view(*x.shape[:-3], *pooled.shape[1:])

    return call


def segments(workload: Workload, x: Tensor) -> list[Tensor]:
    """Return the videos of x, those of whole segments as their segments.

    To pool these one by one takes less memory and gives the same bits, since groups never span two segments.
    """
    videos = x.flatten(0, -4).split(list(workload.frame_counts))
    return [part for video in videos for part in (video.split(SEGMENT) if len(video) % SEGMENT == 0 else [video])]


def compiled_grid_pool(plan: GridPlan, mode: str) -> Pool:
    @cache
    def compiled(device: str) -> Pool:
        return torch.compile(op_by_op_grid_pool(plan, device), dynamic=False, mode=mode)

    return lambda x: compiled(str(x.device))(x)


def op_by_op_grid_pool(plan: GridPlan, device: str) -> Pool:
    """Return grid_pool at the published settings op by op, with indices from a plan, as input of torch.compile."""
    levels = [
        (torch.tensor(level.sources, device=device), torch.tensor(level.targets, device=device))
        for level in plan.levels
        if level.targets
    ]
    rows, cols = plan.pooled_size
    bottom, right = 2 * rows - plan.height, 2 * cols - plan.width
    tile = math.ceil(plan.height / 2), math.ceil(plan.width / 2)

    def mosaics(groups: Tensor) -> Tensor:  # (G, 4, H, W, C) → (G, H, W, C)
        channels_first = groups.float().flatten(0, 1).permute(0, 3, 1, 2)
        tiles = F.adaptive_avg_pool2d(channels_first, tile).permute(0, 2, 3, 1).unflatten(0, (-1, 2, 2))
        mosaic = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        cropped: Tensor = mosaic[:, : plan.height, : plan.width].to(groups.dtype)
        return cropped

    def grid_pool(x: Tensor) -> Tensor:
        frames = x.clone()
        for sources, targets in levels:
            frames[targets] = mosaics(frames[sources])
        windows = F.pad(frames, (0, 0, 0, right, 0, bottom))  # negative padding crops
        windows = windows.unflatten(2, (cols, 2)).unflatten(1, (rows, 2)).float()  # (T, OH, 2, OW, 2, C)
        logits = windows.square().mean(-1).sqrt()
        taken = F.pad(torch.ones_like(x[0, :, :, 0], dtype=torch.bool), (0, right, 0, bottom))
        logits = logits.masked_fill(~taken.view(rows, 2, cols, 2), -math.inf)
        weights = logits.transpose(2, 3).flatten(3).softmax(-1).unflatten(3, (2, 2)).transpose(2, 3)
        pooled: Tensor = (weights[..., None] * windows).sum((2, 4)).to(x.dtype)
        return pooled

    return grid_pool
