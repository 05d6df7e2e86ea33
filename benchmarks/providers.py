"""Who is timed: the package's ops and what people use instead, each next to the definition that it is held to."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Workload
from stgridpool_kernels import ops
from stgridpool_kernels.backends import available_backends, backend_names, reference
from stgridpool_kernels.cli import baselines
from stgridpool_kernels.plan import GridPlan

Pool = Callable[[Tensor], Tensor]

BASELINE = "llava_avg_pool"
"""Whose time others are compared with by default."""

SLOW_UP_TO = 100_000_000
"""Bytes of tokens on which everybody is timed."""

SEGMENT = 32
"""Frames of the longest segment at the published settings."""


@dataclass(frozen=True)
class Provider:
    """call(x), or call(x, out=…) where it takes that, does what `definition` says, at most `ulps` off at the largest
    value. op: whose lower bound it is held to, and whose operations are counted, or plain: pooling without weights,
    one operation for every value read.

    memory: what a call needs besides x, in bytes, about, for one byte of x. compiles: the first call takes long.
    captures: a CUDA graph can capture it; the reference copies its indices from the CPU at every call. slow: a call
    takes seconds on large tokens. asked: it is timed only where it is asked for by name.
    """

    name: str
    op: str
    call: Callable[..., Tensor]
    definition: Pool
    ulps: float
    takes_out: bool = False
    plain: bool = False
    compiles: bool = False
    captures: bool = True
    slow: bool = False
    asked: bool = False
    memory: float = 1.0
    note: str = ""

    def flops(self, workload: Workload) -> int:
        return workload.flops(self.op) // (4 if self.plain else 1)


def providers(workload: Workload, device: str) -> list[Provider]:
    """All that can do a workload on a device ("cpu" or "cuda")."""
    w = workload
    # float32 arithmetic in another order and rounded once, against rounding at every step
    once, every = (2, 8) if w.dtype.itemsize == 2 else (64, 64)
    wide = 4 / w.dtype.itemsize  # a copy in float32
    grid_pool, norm_pool = partial(ops.grid_pool, **w.settings, **w.packing), partial(ops.norm_pool, **w.settings)
    right = {
        "grid_pool": in_segments(w, partial(ops.grid_pool, **w.settings, backend="reference")),
        "norm_pool": in_segments(w, partial(norm_pool, backend="reference")),
    }
    found = [
        Provider(
            f"{op}:{backend}",
            op,
            partial(call, backend=backend),
            right[op],
            once,
            takes_out=backend != "reference",
            memory=8 * wide if backend == "reference" else 0.5,
            captures=backend != "reference",
            slow=backend == "reference" and device == "cpu",
        )
        for op, call in (("norm_pool", norm_pool), ("grid_pool", grid_pool))
        for backend in available_backends()
        if backend != ("cpu" if device == "cuda" else "cuda")
        and not (backend == "triton" and device == "cpu")  # in its interpreter
    ]
    found += plain_poolings(w, every)
    if w.output_size is None:
        shrunk = w.grid[0] // w.kernel_size, w.grid[1] // w.kernel_size
        cut = w.ceil_mode and w.plan("norm_pool").pooled_size != shrunk
        note = f"pools to {shrunk[0]} × {shrunk[1]}, without windows that the edge cuts" if cut else ""
        floor = {name: value for name, value in w.settings.items() if name != "ceil_mode"}
        for op, strides in (("norm_pool", ()), ("grid_pool", (2, 4, 8))):
            naive = partial(baselines.naive_grid_pool, frame_strides=strides, kernel_size=w.kernel_size)
            definition = in_segments(w, partial(getattr(ops, op), **floor, backend="reference"))
            found.append(
                Provider(
                    f"naive_{op}",
                    op,
                    video_by_video(w, naive),
                    definition if cut else right[op],
                    every,
                    memory=6.0,
                    slow=device == "cpu",
                    note=note,
                )
            )
    if w.goal:
        modes = {"compiled_grid_pool": "default"}
        if device == "cuda":  # without graphs of its own, since every call is captured in one here
            modes["compiled_grid_pool:max-autotune"] = "max-autotune-no-cudagraphs"
        for name, mode in modes.items():
            call = compiled_grid_pool(w.plan("grid_pool"), mode)
            found.append(Provider(name, "grid_pool", call, right["grid_pool"], every, compiles=True, memory=4 * wide))
    found += gradients(w, [p.name.partition(":")[2] for p in found if p.name.startswith("grid_pool:")], device)
    return found


def gradients(workload: Workload, backends: Sequence[str], device: str) -> list[Provider]:
    """The gradients alone, in the tokens, where that of the result is random: their forwards are done."""
    w, found = workload, []
    # the definition rounds the gradients of summaries too
    ulps, wide = 8 if w.dtype.itemsize == 2 else 64, 4 / w.dtype.itemsize
    for op, settings in (("norm_pool", w.settings), ("grid_pool", w.settings | w.packing)):
        of_result = cache(partial(random_gradient, op, settings))
        definition = partial(gradient_in_segments, w, op, of_result)
        for backend in backends:
            found.append(
                Provider(
                    f"{op}_backward:{backend}",
                    f"{op}_backward",
                    partial(gradient, op, backend, settings, of_result),
                    definition,
                    ulps,
                    asked=True,
                    memory=16 * wide if backend == "reference" else 0.5,
                    captures=backend != "reference",
                    slow=backend == "reference" and device == "cpu",
                )
            )
    return found


OfResult = Callable[[torch.Size, torch.dtype, torch.device], Tensor]


def random_gradient(
    op: str, settings: dict[str, Any], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """That of a result, for tokens of a shape."""
    result = getattr(ops, op)(torch.empty(shape, dtype=dtype, device="meta"), **settings)
    return torch.randn(
        result.shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(len(shape))
    )


def gradient(op: str, backend: str, settings: dict[str, Any], of_result: OfResult, x: Tensor) -> Tensor:
    return _backward(op, backend, of_result(x.shape, x.dtype, x.device), x, settings)


def gradient_in_segments(workload: Workload, op: str, of_result: OfResult, x: Tensor) -> Tensor:
    """By the reference, as `in_segments`."""
    counts, grad = list(workload.frame_counts), of_result(x.shape, x.dtype, x.device)
    parts: list[Tensor] = []
    for video, of_video in zip(x.flatten(0, -4).split(counts), grad.flatten(0, -4).split(counts), strict=True):
        length = SEGMENT if len(video) % SEGMENT == 0 else len(video)
        pairs = zip(video.split(length), of_video.split(length), strict=True)
        parts += [_backward(op, "reference", b, a, workload.settings) for a, b in pairs]
    return torch.cat(parts).view(x.shape)


def _backward(op: str, backend: str, grad: Tensor, x: Tensor, settings: dict[str, Any]) -> Tensor:
    requested = torch.tensor(backend_names().index(backend))
    found: Tensor = getattr(torch.ops.stgp, f"_{op}_backward")(grad, x, requested, **settings)
    return found


def plain_poolings(workload: Workload, ulps: float) -> list[Provider]:
    """Without weights and summaries: as engines call it, and on a channels-last view, which needs no copy."""
    w, size = workload, workload.plan("norm_pool").pooled_size

    def provider(name: str, pool: Pool, memory: float = 0.5, note: str = "") -> Provider:
        def exact(x: Tensor) -> Tensor:
            return pool(x.float()).to(x.dtype)

        framewise, oracle = (partial(on_frames, function) for function in (pool, exact))
        return Provider(name, "norm_pool", framewise, oracle, ulps, plain=True, memory=memory, note=note)

    def view(pool: Pool) -> Pool:
        return lambda x: pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    adaptive = provider("adaptive_avg_pool2d", view(partial(F.adaptive_avg_pool2d, output_size=size)))
    if w.output_size is not None:
        return [adaptive]
    k = w.kernel_size
    ceil = tuple(math.ceil(side / k) for side in w.grid)
    return [
        provider("llava_avg_pool", partial(baselines.llava_avg_pool, kernel_size=k, ceil_mode=w.ceil_mode), memory=1.5),
        provider(
            "llava_bilinear_pool",
            partial(baselines.llava_bilinear_pool, kernel_size=k),
            memory=1.5,
            note=f"pools to {ceil[0]} × {ceil[1]}" if ceil != size else "",
        ),
        provider("avg_pool2d", view(partial(F.avg_pool2d, kernel_size=k, ceil_mode=w.ceil_mode))),
        provider("max_pool2d", view(partial(F.max_pool2d, kernel_size=k, ceil_mode=w.ceil_mode))),
        adaptive,
    ]


def on_frames(pool: Pool, x: Tensor) -> Tensor:
    """`pool` on (T, H, W, C), as engines call it for a batch too."""
    pooled = pool(x.flatten(0, -4))
    return pooled.unflatten(0, x.shape[:-3]) if x.dim() == 5 else pooled


def video_by_video(workload: Workload, pool: Pool) -> Pool:
    """`pool` on each video alone, and the results put together."""

    def call(x: Tensor) -> Tensor:
        if len(workload.frame_counts) == 1 and x.dim() == 4:
            return pool(x)
        videos = x.flatten(0, -4).split(list(workload.frame_counts))
        pooled = torch.cat([pool(video) for video in videos])
        return pooled.view(*x.shape[:-3], *pooled.shape[1:])

    return call


def in_segments(workload: Workload, pool: Pool) -> Pool:
    """`pool` on each video alone; of a video of whole segments on one segment after another, which needs less memory
    and gives the same, since no summary takes frames of two."""

    def one_video(x: Tensor) -> Tensor:
        parts = x.split(SEGMENT) if len(x) % SEGMENT == 0 else (x,)
        return torch.cat([pool(part) for part in parts])

    return video_by_video(workload, one_video)


def compiled_grid_pool(plan: GridPlan, mode: str) -> Pool:
    """torch.compile of the reference's arithmetic, which it does at the first call."""

    @cache
    def compiled(device: str) -> Pool:
        return torch.compile(op_by_op_grid_pool(plan, device), dynamic=False, mode=mode)

    return lambda x: compiled(str(x.device))(x)


def op_by_op_grid_pool(plan: GridPlan, device: str) -> Pool:
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
        pooled: Tensor = (weights[..., None] * windows).sum((2, 4)).to(x.dtype)
        return pooled

    return grid_pool


def mismatch(result: Tensor, expected: Tensor, ulps: float) -> str | None:
    """Why `result` is not `expected`, or None. Looks at every value, a part at a time."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{tuple(result.shape)} {result.dtype} in place of {tuple(expected.shape)} {expected.dtype}"
    pairs = zip(result.flatten(0, -4).split(SEGMENT), expected.flatten(0, -4).split(SEGMENT), strict=True)
    found = [((a.float() - b.float()).abs().max().item(), b.abs().max().item()) for a, b in pairs]
    worst = max((error for error, _ in found), key=lambda error: (math.isnan(error), error))
    scale = max(largest for _, largest in found)
    allowed = ulps * torch.finfo(expected.dtype).eps * 2.0 ** (math.frexp(scale)[1] - 1)
    return None if worst <= allowed else f"off by {worst:.3g}, {allowed:.3g} is allowed"


def chosen(workload: Workload, device: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[Provider]:
    """Those of `providers` that `select` picks. If nothing is wanted by name, gradients are left out, and slow ones on
    large tokens other than those that goals are set for."""
    known = {provider.name: provider for provider in providers(workload, device)}
    found = [known[name] for name in select(list(known), wanted, unwanted)]
    patient = bool(wanted) or workload.goal or workload.input_bytes <= SLOW_UP_TO
    return [p for p in found if (patient or not p.slow) and (wanted or not p.asked)]


def select(names: Sequence[str], wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[str]:
    """Those of `names` that are asked for: by name, by the part before a colon (`grid_pool` is all backends'), or by a
    pattern (`*avg*`). All if nothing is asked for."""

    def among(name: str, patterns: Sequence[str]) -> bool:
        return any(name == p or name.startswith(f"{p}:") or fnmatch.fnmatchcase(name, p) for p in patterns)

    return [name for name in names if (not wanted or among(name, wanted)) and not among(name, unwanted)]
