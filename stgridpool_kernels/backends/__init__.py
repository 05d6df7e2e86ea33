"""Choice of the backend that runs a call, from a list ordered from fastest to slowest."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..plan import GridPlan
from ..plan.values import shown, word
from . import compiled, gpu_choice, reference
from . import triton as triton_backend
from .weighting import Weighting

logger = logging.getLogger("stgridpool_kernels")


Bind = Callable[[Callable[..., None], Tensor, tuple[Any, ...]], tuple[Callable[..., None], tuple[Any, ...]]]
"""Type of a function that takes a function, x and arguments, and returns a function and arguments that do the same."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    unsupported_reason(x, plan): None if the backend can run the call, else the reason in a few words. With x None it
        tells whether the backend can run on this machine at all. plan is None for token_norm.
    grid_pool, temporal_grid, token_norm: write the result into `out`, a tensor of the result's shape, dtype and device
        that does not overlap x. With a plan without levels, grid_pool is norm_pool.
    grid_pool_backward, temporal_grid_backward, token_norm_backward: write the gradient with respect to x into `grad_x`,
        a contiguous tensor like x, from the gradient `grad` of the result.
    bind(function, x, arguments): takes `grid_pool`, `temporal_grid` or `token_norm`, x, and the arguments between x and
        out; returns what does the same for tokens of the shape and dtype of x with fewer look-ups, while the number of
        threads is that of now. None if nothing does.
    opt_in_reason(): why `auto` skips the backend even though it can run, or None.
    can_fuse(plan, channels, weighting): whether the fused kernels take tokens of this many channels by a plan that is
        `fusable`.
    pool_chunk(x, words, …, slots, out): pools and shrinks a chunk of streams in one pass, by tables of a chunk. `slots`
        holds the streams' thumbnails, (slots, ⌈H/2⌉, ⌈W/2⌉, C), between calls. It is None without fused kernels.
    """

    name: str
    unsupported_reason: Callable[[Tensor | None, GridPlan | None], str | None]
    grid_pool: Callable[[Tensor, GridPlan, Weighting, Tensor], None]
    temporal_grid: Callable[[Tensor, GridPlan, Tensor], None]
    token_norm: Callable[[Tensor, Weighting, Tensor], None]
    grid_pool_backward: Callable[[Tensor, Tensor, GridPlan, Weighting, Tensor], None]
    temporal_grid_backward: Callable[[Tensor, Tensor, GridPlan, Tensor], None]
    token_norm_backward: Callable[[Tensor, Tensor, Weighting, Tensor], None] = reference.token_norm_backward
    bind: Bind | None = None
    opt_in_reason: Callable[[], str | None] = lambda: None
    can_fuse: Callable[[GridPlan, int, Weighting], bool] = lambda plan, channels, weighting: False
    pool_chunk: Callable[[Tensor, tuple[int, ...], Weighting, Tensor, Tensor], None] | None = None

    def is_fused(self, plan: GridPlan, channels: int, weighting: Weighting) -> bool:
        """Return whether grid_pool tiles summaries from thumbnails, by the settings and the number of channels alone.

        Its results may then differ in some bits from those through temporal_grid, so streams use `pool_chunk`.
        """
        return plan.fusable and self.can_fuse(plan, channels, weighting)


def _into_out(function: Callable[..., Tensor]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        *given, out = arguments
        assert isinstance(out, Tensor)
        out.copy_(function(*given))

    return run


REFERENCE = Backend(
    name="reference",
    unsupported_reason=lambda x, plan: None,
    grid_pool=_into_out(reference.grid_pool),
    temporal_grid=_into_out(reference.temporal_grid),
    token_norm=_into_out(reference.token_norm),
    grid_pool_backward=reference.grid_pool_backward,
    temporal_grid_backward=reference.temporal_grid_backward,
)

TRITON = Backend(
    name="triton",
    unsupported_reason=triton_backend.unsupported_reason,
    grid_pool=triton_backend.grid_pool,
    temporal_grid=triton_backend.temporal_grid,
    token_norm=triton_backend.token_norm,
    grid_pool_backward=triton_backend.grid_pool_backward,
    temporal_grid_backward=triton_backend.temporal_grid_backward,
    opt_in_reason=triton_backend.opt_in_reason,
    can_fuse=triton_backend.can_fuse,
    pool_chunk=triton_backend.pool_chunk,
)

CUDA, CPU = (
    Backend(
        name=name,
        unsupported_reason=unsupported_reason,
        grid_pool=compiled.grid_pool,
        temporal_grid=compiled.temporal_grid,
        token_norm=compiled.token_norm,
        grid_pool_backward=compiled.grid_pool_backward,
        temporal_grid_backward=compiled.temporal_grid_backward,
        can_fuse=can_fuse,
        pool_chunk=compiled.pool_chunk,
        bind=bind,
    )
    for name, unsupported_reason, can_fuse, bind in (
        ("cuda", compiled.unsupported_on_cuda, compiled.can_fuse_on_cuda, None),
        ("cpu", compiled.unsupported_on_cpu, compiled.can_fuse_on_cpu, compiled.bind_on_cpu),
    )
)

BACKENDS: list[Backend] = [TRITON, CUDA, CPU, REFERENCE]
"""All backends. `auto` takes the first that can run the call, and on a GPU first tries that of `gpu_choice`."""

_used: ContextVar[tuple[str, ...]] = ContextVar("stgridpool_kernels.backends", default=())


def backend_names() -> list[str]:
    """Names that a call can request: "auto", then every backend in the order in which `auto` tries them."""
    return ["auto", *(backend.name for backend in BACKENDS)]


def check_backend(name: str, argument: str = "backend") -> None:
    """Raise ValueError or TypeError unless `name` is one of `backend_names()`. argument: its name in the message."""
    names = backend_names()
    if word(argument, name) not in names:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, names))}, got {shown(name)}")


class use_backend:
    """Context manager: calls inside run on the backend `name`; "auto" takes the first that can run.

    It is a context variable: it holds for the current thread or asyncio task and for copies of its context. It may
    surround a call to a compiled function; entered inside one, it raises RuntimeError. Unknown names raise ValueError
    at once; a call that the backend cannot run raises RuntimeError with the reason.

    A backward uses the backend of its forward. Activation checkpointing runs the forward, and chooses its backend,
    again during the backward: put the backward inside too.
    """

    def __init__(self, name: str) -> None:
        check_backend(name)
        self.name = name

    def __enter__(self) -> use_backend:
        if torch.compiler.is_compiling():
            raise RuntimeError("the backend is chosen outside compiled functions: put use_backend around the call")
        _used.set((*_used.get(), self.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _used.set(_used.get()[:-1])


def requested_backend() -> str:
    """Name of the backend that is requested now: that of `use_backend`, else of STGP_BACKEND, else "auto".

    Raises ValueError if STGP_BACKEND is not the name of a backend.
    """
    name = requested_name()
    if not _used.get():
        check_backend(name, "STGP_BACKEND")
    return name


def requested_name() -> str:
    """Return what `requested_backend` returns, without a check of STGP_BACKEND."""
    used = _used.get()
    if used:
        return used[-1]
    if "STGP_BACKEND" in os.environ:  # `get` is slow where a variable is not set: it raises and catches KeyError
        return os.environ["STGP_BACKEND"] or "auto"
    return "auto"


def choose_backend(x: Tensor | None = None, plan: GridPlan | None = None, norm_type: float = 2.0) -> Backend:
    """Return the backend that runs a call now. norm_type: p of the call's norm; any number for a call without one.

    Raises RuntimeError with the reason if the requested backend cannot run the call.
    """
    requested = requested_backend()
    for backend in _tried(x, plan, norm_type) if requested == "auto" else BACKENDS:
        if requested not in ("auto", backend.name):
            continue
        reason = backend.unsupported_reason(x, plan)
        if requested == "auto":
            reason = reason or backend.opt_in_reason()
        if reason is None:
            logger.debug("%s runs", backend.name)
            if backend is REFERENCE and requested == "auto" and x is not None:
                compiled.warn_if_missing(x, plan)
            return backend
        if requested == backend.name:
            raise RuntimeError(f"backend {requested!r} cannot run this call: {reason}")
        logger.debug("%s passed over: %s", backend.name, reason)
    raise RuntimeError("no backend can run this call")


def _tried(x: Tensor | None, plan: GridPlan | None, norm_type: float) -> list[Backend]:
    """Return the backends in the order in which `auto` tries them for a call."""
    if x is None or not x.is_cuda:
        return BACKENDS
    first = gpu_choice.choose(x, plan, norm_type).backend
    return sorted(BACKENDS, key=lambda backend: backend.name != first)


def backend_reasons() -> dict[str, str | None]:
    """Return why each backend cannot run on this machine, None if it can, in the order in which `auto` tries them."""
    return {backend.name: backend.unsupported_reason(None, None) for backend in BACKENDS}


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, in the order in which `auto` tries them."""
    return [name for name, reason in backend_reasons().items() if reason is None]
