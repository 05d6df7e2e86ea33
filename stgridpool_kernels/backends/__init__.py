"""Choice of the backend that runs a call, from a list ordered from fastest to slowest."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from ..plan import GridPlan
from ..plan.tables import Chunk
from ..plan.values import shown, word
from . import compiled, reference
from . import triton as triton_backend
from .weighting import Weighting

logger = logging.getLogger("stgridpool_kernels")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    unsupported_reason(x, plan): None if the backend can run the call, else the reason in a few words. With x None it
        tells whether the backend can run on this machine at all. plan is None for token_norm.
    grid_pool, temporal_grid, norm_pool, token_norm: write the result into `out`, a tensor of the result's shape, dtype
        and device that does not overlap x.
    backward(op, grad, x, …): returns the gradient of op(x, …) with respect to x. A backend without kernels for it uses
        the reference's.
    opt_in_reason(): why `auto` skips the backend even though it can run, or None.
    keeps_thumbnails(plan, channels, norm_type): whether grid_pool tiles summaries from thumbnails. Its results may then
        differ in some bits from those through temporal_grid, so streams use pool_chunk.
    pool_chunk(x, chunk, …, slots, out): pools and shrinks a chunk of streams in one pass. `slots` holds the streams'
        thumbnails, (slots, ⌈H/2⌉, ⌈W/2⌉, C), between calls.
    """

    name: str
    unsupported_reason: Callable[[Tensor | None, GridPlan | None], str | None]
    grid_pool: Callable[[Tensor, GridPlan, Weighting, Tensor], None]
    temporal_grid: Callable[[Tensor, GridPlan, Tensor], None]
    norm_pool: Callable[[Tensor, GridPlan, Weighting, Tensor], None]
    token_norm: Callable[[Tensor, Weighting, Tensor], None]
    backward: Callable[..., Tensor]
    opt_in_reason: Callable[[], str | None] = lambda: None
    keeps_thumbnails: Callable[[GridPlan, int, float], bool] = lambda plan, channels, norm_type: False
    pool_chunk: Callable[[Tensor, Chunk, Weighting, Tensor, Tensor], None] | None = None


def _into_out(function: Callable[..., Tensor]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        *given, out = arguments
        assert isinstance(out, Tensor)
        out.copy_(function(*given))

    return run


def with_kernels(kernels: Callable[..., None]) -> Callable[..., Tensor]:
    """Return a `Backend.backward` that calls kernels which write into their last argument.

    The gradient of token_norm is that of the reference.
    """

    def backward(op: str, grad: Tensor, x: Tensor, *arguments: object) -> Tensor:
        if op == "token_norm":
            return reference.backward(op, grad, x, *arguments)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels(op, grad, x, *arguments, grad_x)
        return grad_x

    return backward


REFERENCE = Backend(
    name="reference",
    unsupported_reason=lambda x, plan: None,
    grid_pool=_into_out(reference.grid_pool),
    temporal_grid=_into_out(reference.temporal_grid),
    norm_pool=_into_out(reference.norm_pool),
    token_norm=_into_out(reference.token_norm),
    backward=reference.backward,
)

TRITON = Backend(
    name="triton",
    unsupported_reason=triton_backend.unsupported_reason,
    grid_pool=triton_backend.grid_pool,
    temporal_grid=triton_backend.temporal_grid,
    norm_pool=triton_backend.norm_pool,
    token_norm=triton_backend.token_norm,
    backward=with_kernels(triton_backend.backward),
    opt_in_reason=triton_backend.opt_in_reason,
    keeps_thumbnails=triton_backend.keeps_thumbnails,
    pool_chunk=triton_backend.pool_chunk,
)

CUDA, CPU = (
    Backend(
        name=name,
        unsupported_reason=unsupported_reason,
        grid_pool=compiled.grid_pool,
        temporal_grid=compiled.temporal_grid,
        norm_pool=compiled.norm_pool,
        token_norm=compiled.token_norm,
        backward=with_kernels(compiled.backward),
        keeps_thumbnails=keeps_thumbnails,
        pool_chunk=compiled.pool_chunk,
    )
    for name, unsupported_reason, keeps_thumbnails in (
        ("cuda", compiled.unsupported_on_cuda, compiled.keeps_thumbnails_on_cuda),
        ("cpu", compiled.unsupported_on_cpu, compiled.keeps_thumbnails_on_cpu),
    )
)

BACKENDS: list[Backend] = [TRITON, CUDA, CPU, REFERENCE]
"""All backends, ordered from fastest to slowest. `auto` takes the first that can run the call."""

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
    """Context manager: calls inside run on the backend `name`; "auto" takes the fastest that can run.

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
    """Name of the backend that is requested now: that of `use_backend`, else of STGP_BACKEND, else "auto"."""
    used = _used.get()
    if used:
        return used[-1]
    name = os.environ.get("STGP_BACKEND")
    if not name:
        return "auto"
    check_backend(name, "STGP_BACKEND")
    return name


def choose_backend(x: Tensor | None = None, plan: GridPlan | None = None) -> Backend:
    """Return the backend that runs a call now. Raises RuntimeError with the reason if the requested one cannot."""
    requested = requested_backend()
    for backend in BACKENDS:
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


def backend_reasons() -> dict[str, str | None]:
    """Return why each backend cannot run on this machine, None if it can, in the order in which `auto` tries them."""
    return {backend.name: backend.unsupported_reason(None, None) for backend in BACKENDS}


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, in the order in which `auto` tries them."""
    return [name for name, reason in backend_reasons().items() if reason is None]
