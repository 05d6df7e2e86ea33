"""From a prepared call to the device: launches, scratch, tables, and the caches that keep the next call short."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import triton
from torch import Tensor

from ..plan import GridPlan
from ..schedule import Schedule
from .tiles import norm_kind

MAX_CALLS = 256
"""Prepared calls, and so tables, that are kept; the least recently used goes first."""


Arguments = dict[str, Any]
"""Of a kernel, by name."""


@dataclass(frozen=True)
class Request:
    """What a call is prepared for: tensors of which only shape, strides, dtype and device count, and settings."""

    op: str
    x: Tensor
    out: Tensor
    plan: GridPlan
    steps: Schedule
    temperature: float
    norm_type: float
    normalize_norm: bool
    capability: tuple[int, int]

    @property
    def gridded(self) -> bool:
        """Whether frames may end as summaries, however many there are."""
        return self.op in ("grid_pool", "temporal_grid") and bool(self.plan.levels)

    def sizes(self) -> Arguments:
        """H, W, C, T and the strides of x and out by the names that every kernel uses."""
        T, H, W, C = self.x.shape[-4:]
        found: Arguments = {"T": T, "H": H, "W": W, "C": C}
        for name, tensor in (("x", self.x), ("out", self.out)):
            strides = tensor.stride() if self.x.dim() == 5 else (0, *tensor.stride())
            axes = ("video", "frame", "row", "col", "channel")
            found |= {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=False)}
        return found

    def weights(self) -> Arguments:
        """What turns tokens into weights."""
        kind = norm_kind(self.norm_type)
        return {
            "temperature": self.temperature,
            "MEAN": self.normalize_norm,
            "NORM": kind,
            "P": self.norm_type if kind == "power" else 0.0,
        }


class Launch:
    """One launch of a kernel, whose first parameters are (x, out, scratch, tables); `arguments` names the others."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: Arguments, **options: Any) -> None:
        self.kernel = kernel
        self.grid = grid
        self.arguments = tuple(arguments[name] for name in kernel.arg_names[4:])
        self.options = {"enable_fp_fusion": True, **options}
        self._compiled: Callable[..., None] | None = None

    def __call__(self, x: Tensor, out: Tensor, scratch: Tensor | None, tables: Tensor | None, stream: int) -> None:
        # The first time, triton compiles or finds the kernel for these types, alignments and constants. The caches'
        # keys hold all of them, so what it found stays right, and finding it is most of the time of a launch.
        if self._compiled is None:
            compiled = self.kernel[self.grid](x, out, scratch, tables, *self.arguments, **self.options)
            if compiled is not None:  # the interpreter compiles nothing
                self._compiled = compiled[self.grid]
        else:
            self._compiled(x, out, scratch, tables, *self.arguments, stream=stream)


class Tables:
    """A plan's tables on a device: int32, uploaded without waiting.

    Every stream that uses them waits for the upload, until it is known to be over, and keeps their memory from being
    used again too early. A captured graph reads them whenever it is replayed, so from a capture on they are kept.
    """

    def __init__(self, values: Sequence[int], device: torch.device) -> None:
        self.tensor = torch.tensor(values, dtype=torch.int32)
        self.uploaded: torch.cuda.Event | None = None
        self.streams: set[int] = set()
        if device.type == "cuda":
            # While torch.compile records a CUDA graph, what its thread allocates belongs to the graph, and must not
            # outlive it: another thread allocates.
            with ThreadPoolExecutor(1) as other:
                other.submit(self._upload, torch.cuda.current_stream(device)).result()

    def _upload(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self.tensor = self.tensor.pin_memory().to(stream.device, non_blocking=True)
            self.uploaded = torch.cuda.Event(external=True)  # a capture that it is not part of may wait for it
            self.uploaded.record(stream)
        self.streams.add(stream.cuda_stream)

    def use(self, stream: int, capturing: bool) -> None:
        """Makes the work that is queued next on the current stream, whose handle is `stream`, see the tables."""
        uploaded = self.uploaded
        if capturing:
            _captured.add(self)
            if uploaded is not None:
                torch.cuda.current_stream(self.tensor.device).wait_event(uploaded)
            return
        if uploaded is not None and self not in _captured and uploaded.query():
            uploaded = self.uploaded = None  # but an event that a graph waits for has to outlive it
        if stream not in self.streams:
            current = torch.cuda.current_stream(self.tensor.device)
            if uploaded is not None:
                current.wait_event(uploaded)
            self.tensor.record_stream(current)
            self.streams.add(stream)


class Call:
    """All launches of a call with given sizes, strides, dtype, alignment and settings; `scratch` is in elements."""

    def __init__(self, plan: object, launches: Sequence[Launch], scratch: int, tables: Tables | None) -> None:
        self.plan = plan  # the cache knows plans by identity: this one must stay while its call is kept
        self.launches = tuple(launches)
        self.has_run = False
        self.scratch = scratch
        self.tables = tables

    def __call__(self, x: Tensor, out: Tensor, stream: int, capturing: bool) -> None:
        scratch = torch.empty(self.scratch, dtype=x.dtype, device=x.device) if self.scratch else None
        tables = None
        if self.tables is not None:
            tables = self.tables.tensor
            if x.is_cuda:
                self.tables.use(stream, capturing)
        for launch in self.launches:
            launch(x, out, scratch, tables, stream)
        self.has_run = True


_lock = threading.Lock()
_calls: OrderedDict[Hashable, Call] = OrderedDict()
_tables: WeakValueDictionary[Hashable, Tables] = WeakValueDictionary()
_captured: set[Tables] = set()


def run(key: Hashable, prepare: Callable[[], Call], x: Tensor, out: Tensor) -> None:
    """Runs the call known as `key`, which `prepare` makes the first time, on the current stream of x's device."""
    if not x.is_cuda:
        # triton's interpreter computes with NumPy, which warns of NaN and overflow
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _find(key, prepare, False)(x, out, 0, False)
        return
    other_device = x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if other_device else nullcontext():
        capturing = torch.cuda.is_current_stream_capturing()
        call = _find(key, prepare, capturing)
        call(x, out, triton.runtime.driver.active.get_current_stream(x.device.index), capturing)


def _find(key: Hashable, prepare: Callable[[], Call], capturing: bool) -> Call:
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


def tables_on(device: torch.device, values: Sequence[int]) -> Tables | None:
    """Tables with these values on a device; calls that differ in dtype, layout or settings share them."""
    if not values:
        return None
    key = (device, tuple(values))
    with _lock:
        tables = _tables.get(key)
        if tables is None:
            tables = _tables[key] = Tables(values, device)
        return tables
