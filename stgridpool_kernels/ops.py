"""START HERE. The ops `torch.ops.stgp.*`. A call goes schema → checks → `GridPlan` → backend → out.

Checks, plan and backend of a call are cached as a `PlannedCall`: calls that differ only in their data share it.

Each public op `name` is functional. Three private ops take its arguments too: `_name_out` writes into a given tensor,
`_name_recorded` replaces the public op while a gradient is required and also returns the requested backend, and
`_name_backward` computes that gradient. All ops are Python: they check the arguments, plan, and call a backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import backend_names, choose_backend, logger, requested_backend, requested_name, use_backend
from .backends.compiled import address_of, take_huge_pages
from .backends.weighting import Weighting
from .namespace import NAMESPACE, OPS
from .once import refuse_second
from .plan import GridPlan, grid_plan
from .plan.plan import cached_plan, level_shapes, pooled_size
from .plan.values import count, shown

Arguments = dict[str, Any]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Supported dtypes of x."""

# ---- schemas: the one place where arguments and defaults are written ----

_GRIDDING = 'int[] frame_strides=[2,4,8], int[] grid_shape=[2,2], str sampling="last", str resize="area"'
_WINDOWS = (
    "int[2] kernel_size=[2,2], int[2]? stride=None, int[2] padding=[0,0], bool ceil_mode=False, "
    "bool count_include_pad=True, int[2]? output_size=None"
)
_NORM = "float norm_type=2.0, bool normalize_norm=True, SymInt? norm_channels=None"
_WEIGHTS = f"float temperature=1.0, {_NORM}"
_COUNTS = "SymInt[]? frame_counts=None"

ARGUMENTS = {
    "grid_pool": f"{_GRIDDING}, {_WINDOWS}, {_WEIGHTS}, {_COUNTS}",
    "temporal_grid": f"{_GRIDDING}, {_COUNTS}",
    "norm_pool": f"{_WINDOWS}, {_WEIGHTS}",
    "token_norm": _NORM,
}

# Plan arguments that switch off gridding or pooling, in the order of the plan's arguments.
_NO_GRIDDING: Arguments = {"frame_strides": (), "grid_shape": (2, 2), "sampling": "last", "resize": "area"}
_NO_POOLING: Arguments = {
    "kernel_size": (1, 1),
    "stride": None,
    "padding": (0, 0),
    "ceil_mode": False,
    "count_include_pad": True,
    "output_size": None,
}

# norm_pool is grid_pool by a plan without levels; a backend has a method of the name of every other op.
_OF_BACKEND = {"norm_pool": "grid_pool"}
_FORWARD = {name: attrgetter(_OF_BACKEND.get(name, name)) for name in ARGUMENTS}
_BACKWARD = {name: attrgetter(f"{_OF_BACKEND.get(name, name)}_backward") for name in ARGUMENTS}

MAX_CALLS = 256
"""Maximum number of planned calls that are kept, which are the last used ones. As many plans are cached."""

refuse_second(hasattr(OPS, "grid_pool"))
_library = torch.library.Library(NAMESPACE, "DEF")
_defaults: dict[str, Arguments] = {}


# ---- checks of real and symbolic sizes ----


def check_tokens(x: Tensor) -> None:
    """Raise ValueError or TypeError unless x has a supported shape, dtype and layout."""
    shape = tuple(x.shape)
    if x.dim() not in (4, 5):
        flattened = "; if it is (T, H·W, C), pass x.unflatten(1, (rows, cols)) or call pool_flat"
        remedy = flattened if x.dim() == 3 else ""
        raise ValueError(f"x must have shape (T, H, W, C) or (B, T, H, W, C), got {shape}{remedy}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must have dtype bfloat16, float16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense (strided) tensor, got layout {x.layout}")
    if any(size < 1 for size in shape[-3:]):
        raise ValueError(f"x must have H, W and C of at least 1, got shape {shape}")


def check_norm_channels(norm_channels: int | None, x: Tensor) -> None:
    """Raise ValueError unless norm_channels is None, or from 1 to the number of channels of the tokens x."""
    if norm_channels is not None:
        for right in (norm_channels >= 1, norm_channels <= x.shape[-1]):
            torch._check_value(right, lambda: f"norm_channels must be from 1 to C = {x.shape[-1]}, got {norm_channels}")


def check_arguments(arguments: Arguments) -> None:
    """Check types, by the schema, and ranges of `grid_pool`'s arguments, except limits that depend on x."""
    if arguments.get("norm_channels") is not None:
        count("norm_channels", arguments["norm_channels"], 1)
    x = torch.empty(1, 1 << 20, 1 << 20, 1, device="meta", dtype=torch.float64)
    OPS.grid_pool(x, **arguments | {"norm_channels": None})


def _check(x: Tensor, a: Arguments) -> None:
    """Check tokens, weights and frame counts. The plan checks its own arguments."""
    check_tokens(x)
    arithmetic = _arithmetic(x)
    if "temperature" in a and not abs(a["temperature"]) <= torch.finfo(arithmetic).max:
        shown = str(arithmetic).removeprefix("torch.")
        raise ValueError(f"temperature must be finite in {shown} arithmetic, got {a['temperature']}")
    if "norm_type" in a and not a["norm_type"] > 0:
        raise ValueError(f"norm_type must be greater than 0 (inf is allowed), got {a['norm_type']}")
    check_norm_channels(a.get("norm_channels"), x)
    if a.get("frame_counts") is not None:
        _check_frame_counts(x, a["frame_counts"])


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_frame_counts(x: Tensor, frame_counts: Sequence[int]) -> None:
    if x.dim() == 5:
        raise ValueError(
            f"frame_counts packs videos along T of a (T, H, W, C) tensor and cannot go with 5-D x of shape "
            f"{tuple(x.shape)}, got {shown(frame_counts)}"
        )
    for frames in frame_counts:
        torch._check_value(frames >= 0, lambda: f"frame_counts must not be negative, got {shown(frame_counts)}")
    total = sum(frame_counts)
    torch._check_value(
        total == x.shape[0],
        lambda: f"frame_counts must sum to T = {x.shape[0]}, got {shown(frame_counts)} with sum {total}",
    )


def _check_out(out: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"out must be on {x.device} as x is, got {out.device}")
    if out.layout != torch.strided:
        raise TypeError(f"out must be a dense (strided) tensor, got layout {out.layout}")


def _check_memory(out: Tensor, x: Tensor) -> None:
    """Check that `out` neither overlaps itself nor `x`."""
    if not out.is_contiguous():
        _check_strides(out)
    (out_low, out_high), (x_low, x_high) = _extent(out), _extent(x)
    if out_low < x_high and x_low < out_high:
        raise ValueError(
            f"out must not overlap x: from first to last element, out spans {out_high - out_low} bytes from "
            f"{out_low:#x}, x {x_high - x_low} bytes from {x_low:#x}"
        )


def _check_strides(out: Tensor) -> None:
    """Check that no two elements of `out` are at one address."""
    span = 1
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride < span:
                raise ValueError(f"out must not overlap itself, got shape {tuple(out.shape)} of strides {out.stride()}")
            span += (size - 1) * stride


def _extent(t: Tensor) -> tuple[int, int]:
    """Address of the first byte that a tensor's elements span, and the address one past the last."""
    first = address_of(t)
    if t.is_contiguous():  # as a tensor without elements is
        return first, first + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return first, first + (last + 1) * t.element_size()


# ---- what each op computes ----


def _gridding(name: str, a: Arguments) -> Arguments:
    return _NO_GRIDDING if name == "norm_pool" else {key: a[key] for key in _NO_GRIDDING}


def _pooling(name: str, a: Arguments) -> Arguments:
    return _NO_POOLING if name == "temporal_grid" else {key: a[key] for key in _NO_POOLING}


def _plan(name: str, x: Tensor, a: Arguments) -> GridPlan | None:
    if name == "token_norm":
        return None
    frame_counts = a.get("frame_counts")
    if frame_counts is None:  # one video, or a batch of equal ones
        frame_counts = x.shape[:1] if x.dim() == 4 else (x.shape[1],) * x.shape[0]
    values = (*_gridding(name, a).values(), *_pooling(name, a).values())
    hashable = [tuple(value) if type(value) is list else value for value in values]
    return cached_plan(tuple(frame_counts), x.shape[-3], x.shape[-2], *hashable)


def _backend_arguments(x: Tensor, plan: GridPlan | None, a: Arguments) -> list[Any]:
    """Arguments of a backend's function between x and out."""
    arguments: list[Any] = [] if plan is None else [plan]
    if "norm_type" in a:
        arguments.append(Weighting.of(a, x.shape[-1]))
    return arguments


def _result(x: Tensor, pooled: Sequence[int] | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a result: frames of `pooled` rows and columns of tokens, or norms if `pooled` is None."""
    if pooled is None:
        return tuple(x.shape[:-1]), _arithmetic(x)
    return (*x.shape[:-3], *pooled, x.shape[-1]), x.dtype


class PlannedCall(NamedTuple):
    """A call whose arguments are checked, whose plan is made and whose backend is chosen. It holds no data of a caller.

    shape, dtype: those of the result of the op, for a gradient too. function: the backend's function. arguments: its
    arguments between x and the tensor that it writes into.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    function: Callable[..., None]
    arguments: tuple[Any, ...]


class _Slot:
    """The place of a planned call in the cache, which is empty until the call has passed its checks."""

    __slots__ = ("call",)

    def __init__(self) -> None:
        self.call: PlannedCall | None = None


@lru_cache(maxsize=MAX_CALLS)
def _slot(*key: Hashable) -> _Slot:
    """Return the slot of all calls that have this key."""
    return _Slot()


def _planned(name: str, x: Tensor, given: Arguments, requested: str, *, backward: bool = False) -> PlannedCall:
    """Return the planned call of these arguments, from the cache if there was such a call before.

    given: the arguments that the dispatcher passes on, which has turned them into the types of the schema and left out
    those that equal the default. requested: name of the requested backend. backward: whether it is the gradient.

    The key holds all that checks, plan and choice depend on and that may change in a process; the compiled library and
    the devices do not. The number of threads is in it since the tables for the CPU follow it.
    """
    settings = _hashable(given) if given else ()
    slot = _slot(name, backward, x.shape, x.dtype, x.device, x.layout, settings, requested, torch.get_num_threads())
    call = slot.call
    if call is None or logger.isEnabledFor(logging.DEBUG):  # the choice of a backend is logged at every call
        call = slot.call = _plan_call(name, x, _defaults[name] | given, requested, backward)
    return call


def _hashable(given: Arguments) -> tuple[Hashable, ...]:
    return tuple([(name, tuple(value) if type(value) is list else value) for name, value in given.items()])


def _plan_call(name: str, x: Tensor, a: Arguments, requested: str, backward: bool) -> PlannedCall:
    _check(x, a)
    plan = _plan(name, x, a)
    shape, dtype = _result(x, None if plan is None else plan.pooled_size)
    norm_type = a.get("norm_type", 2.0)
    if backward:
        with use_backend(requested):
            backend = choose_backend(x, plan, norm_type)
    else:
        backend = choose_backend(x, plan, norm_type)
    function, arguments = (_BACKWARD if backward else _FORWARD)[name](backend), tuple(_backend_arguments(x, plan, a))
    if backend.bind is not None and not backward and 0 not in shape:
        function, arguments = backend.bind(function, x, arguments)
    return PlannedCall(shape, dtype, function, arguments)


def _run(name: str, x: Tensor, given: Arguments, out: Tensor | None) -> Tensor:
    shape, dtype, function, arguments = _planned(name, x, given, requested_name())
    if out is None:
        out = _fresh(x, shape, dtype)
    else:
        _check_out(out, x, shape, dtype)
        _check_memory(out, x)
    if out.numel():
        function(x, *arguments, out)
    return out


def _fresh(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory for a result on the device of x."""
    out = x.new_empty(shape, dtype=dtype)
    take_huge_pages(out)
    return out


def _symbolic_pooled_size(name: str, x: Tensor, a: Arguments) -> tuple[int, int] | None:
    """Run the plan's checks; return its `pooled_size`, None for token_norm. A plan itself would fix symbolic sizes."""
    if name == "token_norm":
        return None
    level_shapes(**_gridding(name, a))
    return pooled_size(x.shape[-3], x.shape[-2], **_pooling(name, a))


def check_call(name: str, x: Tensor, given: Arguments) -> tuple[tuple[int, ...], torch.dtype]:
    """Check a call of a public op by sizes alone, which may be symbolic; return shape and dtype of its result."""
    a = _defaults[name] | given
    _check(x, a)
    return _result(x, _symbolic_pooled_size(name, x, a))


def gridding_plan(name: str, frame_counts: Sequence[int], given: Arguments) -> GridPlan:
    """Return the plan of a call's gridding, on frames of one token. For an op without gridding it has no levels.

    name: a public op. given: the call's arguments, already checked by `check_call`.
    """
    a = _NO_GRIDDING | _defaults[name] | given
    return grid_plan(frame_counts, 1, 1, **{key: a[key] for key in _NO_GRIDDING}, **_NO_POOLING)


# ---- registration ----

# Key sets below autograd of dense tensors on the devices for which `_implement` alone registers kernels.
_DENSE = [torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)]


def op_names(name: str) -> tuple[str, str, str, str]:
    """Return the names of a public op and of its private ops: _out, _recorded and _backward."""
    return name, f"_{name}_out", f"_{name}_recorded", f"_{name}_backward"


def _define(name: str) -> None:
    arguments = ARGUMENTS[name]
    _library.define(f"{name}(Tensor x, *, {arguments}) -> Tensor")
    _library.define(f"_{name}_out(Tensor x, *, {arguments}, Tensor(a!) out) -> ()")
    # A backward uses the backend requested for its forward. Compiled graphs save only tensors for the backward, so the
    # request is saved as one: its index in `backend_names()`.
    _library.define(f"_{name}_recorded(Tensor x, *, {arguments}) -> (Tensor out, Tensor backend)")
    _library.define(f"_{name}_backward(Tensor grad, Tensor x, Tensor backend, *, {arguments}) -> Tensor")
    schema = getattr(OPS, name).default._schema
    # the dispatcher leaves out arguments that equal their default; `_defaults[name] | given` puts them back
    _defaults[name] = {argument.name: argument.default_value for argument in schema.arguments if argument.kwarg_only}


def _implement(name: str) -> None:
    def forward(x: Tensor, **given: Any) -> Tensor:
        return _run(name, x, given, None)

    def forward_out(x: Tensor, *, out: Tensor, **given: Any) -> None:
        _run(name, x, given, out)

    def recorded(x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        requested = torch.tensor(backend_names().index(requested_backend()), device="cpu")
        return _run(name, x, given, None), requested

    def backward(grad: Tensor, x: Tensor, backend: Tensor, **given: Any) -> Tensor:
        call = _planned(name, x, given, backend_names()[int(backend)], backward=True)
        grad_x = _fresh(x, x.shape, x.dtype)
        if x.numel():
            call.function(grad, x, *call.arguments, grad_x)
        return grad_x

    for op, kernel in zip(op_names(name), (forward, forward_out, recorded, backward), strict=True):
        _library.impl(op, kernel, "CompositeExplicitAutograd")


def _fake(name: str) -> None:
    defaults = _defaults[name]

    def forward(x: Tensor, **given: Any) -> Tensor:
        shape, dtype = check_call(name, x, given)
        return x.new_empty(shape, dtype=dtype)

    def forward_out(x: Tensor, *, out: Tensor, **given: Any) -> None:
        a = defaults | given
        _check(x, a)
        _check_out(out, x, *_result(x, _symbolic_pooled_size(name, x, a)))

    def recorded(x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return forward(x, **given), torch.empty((), dtype=torch.int64, device="cpu")

    def backward(grad: Tensor, x: Tensor, backend: Tensor, **given: Any) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    fakes: tuple[Callable[..., Any], ...] = (forward, forward_out, recorded, backward)
    for op, fake in zip(op_names(name), fakes, strict=True):
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_library)


def _differentiate(name: str) -> None:
    op, _, recorded_op, backward_op = (getattr(OPS, op).default for op in op_names(name))

    def forward(keyset: Any, x: Tensor, **given: Any) -> Tensor:
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"{NAMESPACE}::{name} has no forward-mode derivative")
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, recorded_op(x, **given)[0])
        below = keyset & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if below.raw_repr() in _DENSE:  # no mode or transform is active: the dispatcher would call `_run` too
                return _run(name, x, given, None)
            return cast(Tensor, op.redispatch(below, x, **given))

    def setup_context(
        ctx: Any, inputs: tuple[Tensor], keyword_only_inputs: Arguments, output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(inputs[0], output[1])
        ctx.arguments = keyword_only_inputs

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return cast(Tensor, backward_op(grad, *ctx.saved_tensors, **ctx.arguments))

    def double_backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(f"{NAMESPACE}::{name} can be differentiated once only: its backward has no gradient")

    _library.impl(name, forward, "Autograd", with_keyset=True)
    once, twice = (f"{NAMESPACE}::_{name}_{part}" for part in ("recorded", "backward"))
    torch.library.register_autograd(once, backward, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(twice, double_backward, lib=_library)


for _name in ARGUMENTS:
    for _step in (_define, _implement, _fake, _differentiate):
        _step(_name)
