"""Execution of prepared calls: launches of kernels, allocation of scratch, and a cache of prepared calls."""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ...plan import GridPlan
from ...plan.dataflow import Dataflow
from ..device_tables import Tables
from ..weighting import Weighting
from .tiles import norm_kind

MAX_CALLS = 256
"""Maximum number of cached prepared calls, each with its tables; the least recently used is dropped first."""

MAX_ELEMENTS = 1 << 60
"""Exclusive limit of the elements of a tensor of scratch, whose bytes torch counts in int64."""

TENSORS = ("x", "out", "scratch", "tables", "grad", "gradients")
"""Leading pointer arguments of every kernel. Forward kernels take the first 4, backward kernels all 6."""

Arguments = dict[str, Any]
"""Arguments of a kernel, by name."""


@dataclass(frozen=True)
class CallSpec:
    """Everything that a call is prepared from: settings, and shape, strides, dtype and device of tensors."""

    op: str
    x: Tensor
    out: Tensor
    plan: GridPlan
    graph: Dataflow
    weighting: Weighting | None
    capability: tuple[int, int]
    grad: Tensor | None = None
    """Gradient of the op's result if `out` is the gradient with respect to x, else None."""

    @property
    def gridded(self) -> bool:
        """Return whether the settings replace frames by summaries, even if these videos are too short for any."""
        return self.op in ("grid_pool", "temporal_grid") and bool(self.plan.levels)

    def sizes(self) -> Arguments:
        """H, W, C, T and the strides of x, out and grad in elements, by the names that every kernel uses.

        T is None if neighbouring frames are equally far apart throughout each of these tensors, as they are without a
        batch. Kernels then avoid divisions by T, which take many instructions.
        """
        T, H, W, C = self.x.shape[-4:]
        videos = math.prod(self.x.shape[:-4])
        strides = {
            name: tensor.stride() if self.x.dim() == 5 else (0, *tensor.stride())
            for name, tensor in (("x", self.x), ("out", self.out), ("grad", self.grad))
            if tensor is not None
        }
        even = videos == 1 or all(video == T * frame for video, frame, *_ in strides.values())
        sizes: Arguments = {"T": None if even else T, "H": H, "W": W, "C": C}
        for name, (video, *others) in strides.items():
            sizes[f"{name}_video"] = 0 if even else video
            axes = ("frame", "row", "col", "channel")
            sizes |= {f"{name}_{axis}": stride for axis, stride in zip(axes, others, strict=False)}
        return sizes

    def weights(self) -> Arguments:
        """Arguments from which kernels compute the weights of tokens. norm_channels is None if it is C."""
        C = self.x.shape[-1]
        temperature, norm_type, normalize_norm, norm_channels = self.weighting or Weighting(1.0, 2.0, True, C)
        kind = norm_kind(norm_type)
        return {
            "temperature": temperature,
            "norm_channels": norm_channels if norm_channels < C else None,
            "MEAN": normalize_norm,
            "NORM": kind,
            "P": norm_type if kind == "power" else 0.0,
        }


class Launch:
    """One launch of a kernel.

    tensors: number of leading parameters that are those of `TENSORS`, 4 in the forward and all in the backward.
    arguments: the other parameters by name; names that the kernel lacks are ignored. options: Triton's launch options.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], arguments: Arguments, tensors: int = 4, **options: Any
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.tensors = tensors
        self.arguments = tuple(arguments[name] for name in kernel.arg_names[tensors:])
        self.options = {"enable_fp_fusion": True, **options}
        self._compiled: Any = None

    def __call__(self, tensors: Sequence[Tensor | None], stream: int) -> None:
        given = (*tensors[: self.tensors], *self.arguments)
        compiled = self._compiled
        if compiled is None:
            # Triton compiles or looks up the kernel for these types, alignments and constants. They are all part of the
            # key of a prepared call, so the kernel is stored: the look-up takes most of the time of a launch. The
            # interpreter returns None.
            self._compiled = self.kernel[self.grid](*given, **self.options)
        elif _launch_hooks_are_set():
            compiled[self.grid](*given, stream=stream)
        else:  # skips the hooks, which take one or two microseconds even if none are set
            compiled.run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given)


def _launch_hooks_are_set() -> bool:
    """Return whether a launch hook is set, as profilers do. Triton's knobs hold a chain of hooks or a single hook."""
    knobs = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (knobs.launch_enter_hook, knobs.launch_exit_hook))


class PreparedCall:
    """All launches of a call with given sizes, strides, dtype, alignment and settings.

    scratch: number of elements of x.dtype to allocate, 0 if none is needed or the caller provides it. gradients: number
    of float32 elements to allocate for gradients of nodes and windows. Raises RuntimeError if one exceeds all memory.
    """

    def __init__(
        self, plan: object, launches: Sequence[Launch], scratch: int, tables: Tables | None, gradients: int = 0
    ) -> None:
        for elements in (scratch, gradients):
            if elements >= MAX_ELEMENTS:
                raise RuntimeError(f"no memory for {elements} elements of scratch, fewer than 2⁶⁰ can be addressed")
        self.plan = plan  # cache keys identify plans by id(), so the plan must live as long as its call
        self.launches = tuple(launches)
        self.has_run = False
        self.scratch = scratch
        self.tables = tables
        self.gradients = gradients

    def __call__(
        self,
        x: Tensor,
        out: Tensor,
        stream: int,
        capturing: bool,
        kept: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> None:
        scratch = kept
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=x.dtype, device=x.device)
        gradients = None
        if self.gradients:
            gradients = torch.empty(self.gradients, dtype=torch.float32, device=x.device)
        tables = None
        if self.tables is not None:
            tables = self.tables.tensor
            if x.is_cuda:
                self.tables.use(stream, capturing)
        tensors = (x, out, scratch, tables, grad, gradients)
        for launch in self.launches:
            launch(tensors, stream)
        self.has_run = True


_lock = threading.Lock()
_calls: OrderedDict[Hashable, PreparedCall] = OrderedDict()


def run(
    key: Hashable,
    prepare: Callable[[], PreparedCall],
    x: Tensor,
    out: Tensor,
    kept: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    """Run the cached call of `key` on the current CUDA stream of x's device; `prepare` makes it the first time.

    kept: scratch that the caller provides, for a call that allocates none. grad: gradient of the op's result, if out is
    the gradient with respect to x.
    """
    if not x.is_cuda:
        # triton's interpreter computes with NumPy, which warns of NaN and overflow
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _find(key, prepare, False)(x, out, 0, False, kept, grad)
        return
    other_device = x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if other_device else nullcontext():
        capturing = torch.cuda.is_current_stream_capturing()
        call = _find(key, prepare, capturing)
        call(x, out, triton.runtime.driver.active.get_current_stream(x.device.index), capturing, kept, grad)


def _find(key: Hashable, prepare: Callable[[], PreparedCall], capturing: bool) -> PreparedCall:
    with _lock:
        call = _calls.get(key)
        if call is not None:
            _calls.move_to_end(key)
    if call is not None and (call.has_run or not capturing):
        return call
    if capturing:
        raise RuntimeError(
            "warm up first: a CUDA graph cannot capture the first call with a given plan, shape, layout, dtype and "
            "settings, which compiles kernels and uploads tables; run it once before the capture"
        )
    call = prepare()
    with _lock:
        _calls[key] = call
        while len(_calls) > MAX_CALLS:
            _calls.popitem(last=False)
    return call
