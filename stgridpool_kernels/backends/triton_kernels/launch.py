"""Execution of prepared calls: launches of kernels, allocation of scratch, and a cache of prepared calls."""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import GridPlan
from ..device_tables import Tables, tables_of, tables_of_chunk
from ..weighting import Weighting
from .tiles import Norm, Size, Tokens, Weights

MAX_CALLS = 256
"""Maximum number of cached prepared calls, each with its tables; the least recently used is dropped first."""

MAX_ELEMENTS = 1 << 60
"""Exclusive limit of the elements of a tensor of scratch, whose bytes torch counts in int64."""

TENSORS = ("x", "out", "scratch", "tables", "grad", "gradients")
"""Names of the parameters of kernels that stand for tensors, in the order in which calls pass these."""

Arguments = dict[str, Any]
"""Arguments of a kernel, by name."""


@dataclass(frozen=True)
class CallSpec:
    """Everything that a call is prepared from: settings, and shape, strides, dtype and device of tensors.

    plan: None for token_norm. weighting: None for temporal_grid. grad: gradient of the result if `out` is the gradient
    with respect to x, else None. chunk: tables of a chunk of streams, which are followed in place of the plan's.
    capability: compute capability of an NVIDIA GPU, None for any other GPU.
    """

    x: Tensor
    out: Tensor
    plan: GridPlan | None = None
    weighting: Weighting | None = None
    grad: Tensor | None = None
    chunk: tuple[int, ...] | None = None
    capability: tuple[int, int] | None = (8, 0)

    @cached_property
    def tables(self) -> Tables:
        """The tables that the kernels follow, with a gradient section for a gradient."""
        if self.chunk is not None:
            return tables_of_chunk(self.chunk, self.x.device)
        assert self.plan is not None
        return tables_of(self.plan, self.x.device, gradient=self.grad is not None)

    @cached_property
    def words(self) -> list[int]:
        """The words of the tables."""
        return self.tables.words.tolist()

    @property
    def gridded(self) -> bool:
        """Return whether the settings replace frames by summaries, even if these videos are too short for any.

        Kernels that add in another order are chosen by it rather than by whether there is a summary, because a video
        must give the same bits alone and packed with a longer one.
        """
        return self.plan is not None and bool(self.plan.levels)

    @property
    def size(self) -> Size:
        """Return the sizes that kernels are compiled for."""
        return Size.of(*self.x.shape[-3:])

    @property
    def pooled_size(self) -> tuple[int, int]:
        """Return the rows and columns of tokens of a pooled frame."""
        rows, cols = (self.out if self.grad is None else self.grad).shape[-3:-1]
        return rows, cols

    def options(self, num_warps: int, maxnreg: int | None = None, early: bool = False) -> Arguments:
        """Return options of a launch, without those that only NVIDIA's compiler knows for another GPU.

        maxnreg: maximum number of registers per thread, None for no limit. early: the launch may start before the one
        before it has ended.
        """
        if self.capability is None:
            return {"num_warps": num_warps}
        options = {"num_warps": num_warps, "maxnreg": maxnreg}
        return options | {"launch_pdl": True} if early else options

    def arguments(self) -> Arguments:
        """Return the arguments that many kernels have: strides of x, out and grad, T, SIZE, weights and NORM.

        T is None if neighbouring frames are equally far apart throughout each of these tensors, as they are without a
        batch. Kernels then avoid divisions by T, which take many instructions.
        """
        T, _, _, C = self.x.shape[-4:]
        videos = math.prod(self.x.shape[:-4])
        strides = {
            name: tensor.stride() if self.x.dim() == 5 else (0, *tensor.stride())
            for name, tensor in (("x", self.x), ("out", self.out), ("grad", self.grad))
            if tensor is not None
        }
        even = videos == 1 or all(video == T * frame for video, frame, *_ in strides.values())
        sizes = {name: getattr(self, name).shape[-len(others) :] for name, (_, *others) in strides.items()}
        arguments: Arguments = {
            name: Tokens(None, 0 if even else video, *constant_if_dense(others, sizes[name][1:]))
            for name, (video, *others) in strides.items()
        }
        temperature, norm_type, normalize_norm, norm_channels = self.weighting or Weighting(1.0, 2.0, True, C)
        return arguments | {
            "T": None if even else T,
            "SIZE": self.size,
            "weights": Weights(temperature, float(norm_channels) if norm_channels < C else None),
            "NORM": Norm.of(norm_type, normalize_norm),
        }


def constant_if_dense(strides: Sequence[int], sizes: Sequence[int]) -> list[Any]:
    """Return the strides of a frame and inside it, as constants that kernels are compiled for if there are no gaps.

    sizes: number of rows, of columns and, if there is a last stride for them, of channels. Kernels for frames without
    gaps compute places from few registers; strides of other tensors stay arguments.
    """
    dense = [math.prod(sizes[axis:]) for axis in range(len(sizes) + 1)]
    return [tl.constexpr(stride) for stride in strides] if list(strides) == dense else list(strides)


class Launch:
    """One launch of a kernel.

    arguments: those of the kernel by name, except tensors; for x, out and grad, `Tokens` with their strides. Names that
    the kernel lacks are ignored. options: Triton's launch options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: Arguments, **options: Any) -> None:
        self.kernel = kernel
        self.grid = grid
        self.arguments = [arguments.get(name) for name in kernel.arg_names]
        self.options = {"enable_fp_fusion": True, **options}
        self._tensors = [
            (place, TENSORS.index(name), arguments.get(name))
            for place, name in enumerate(kernel.arg_names)
            if name in TENSORS
        ]
        self._compiled: Any = None

    def given(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Return the arguments of the kernel with these tensors, in the order of `TENSORS`."""
        given = self.arguments.copy()
        for place, number, strides in self._tensors:
            tensor = tensors[number]
            given[place] = tensor if strides is None else Tokens(tensor, *strides[1:])
        return given

    def __call__(self, tensors: Sequence[Tensor | None], stream: int) -> None:
        given = self.given(tensors)
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

    scratch: number of elements of x.dtype to allocate, 0 if none is needed or the caller keeps it. gradients: number
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
        thumbnails: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> None:
        scratch = thumbnails
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

Prepare = Callable[[CallSpec], PreparedCall]
"""The type of the functions that prepare the launches of an op or of its gradient."""


def run(
    prepare: Prepare,
    x: Tensor,
    out: Tensor,
    plan: GridPlan | None = None,
    weighting: Weighting | None = None,
    grad: Tensor | None = None,
    chunk: tuple[int, ...] | None = None,
    thumbnails: Tensor | None = None,
) -> None:
    """Run a call on the current CUDA stream of x's device. It is prepared the first time, then found in the cache.

    prepare and the other arguments: as in `CallSpec`. thumbnails: scratch that a caller keeps, for a chunk of streams.
    """
    layouts = [
        (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
        for tensor in (x, out, grad)
        if tensor is not None
    ]
    key = (prepare, id(plan), weighting, x.device, *layouts, chunk)

    def prepared() -> PreparedCall:
        return prepare(CallSpec(x, out, plan, weighting, grad, chunk, capability_of(x.device)))

    if x.device.type == "cpu":
        with warnings.catch_warnings():  # triton's interpreter computes with NumPy, which warns of NaN and overflow
            warnings.simplefilter("ignore")
            _find(key, prepared, False)(x, out, 0, False, thumbnails, grad)
        return
    module = torch.cuda if x.is_cuda else torch.get_device_module(x.device)
    other_device = x.device.index != module.current_device()
    with module.device(x.device) if other_device else nullcontext():
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        stream = triton.runtime.driver.active.get_current_stream(x.device.index)
        _find(key, prepared, capturing)(x, out, stream, capturing, thumbnails, grad)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, None for any other GPU; for the interpreter, that of an A100."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device)
    return (8, 0) if device.type == "cpu" else None


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
