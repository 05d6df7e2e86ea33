"""The public functions `grid_pool`, `temporal_grid`, `norm_pool` and `token_norm`, and the module `GridPool`."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .arguments import check_names, check_tensor, converted, warn_of_layout
from .backends import use_backend
from .namespace import OPS
from .ops import ARGUMENTS, check_arguments, op_names
from .plan.values import word

_OPS = {name: getattr(OPS, op_names(name)[0]) for name in ARGUMENTS}
_OUT_OPS = {name: getattr(OPS, op_names(name)[1]) for name in ARGUMENTS}


def _call(name: str, x: Tensor, out: Tensor | None, backend: str, given: tuple[Any, ...]) -> Tensor:
    """Check the arguments of a public function, and call its op with those that are not the default.

    given: all arguments of the op, in its order. The dispatcher takes time for each argument that is passed on.
    """
    if type(x) is not Tensor or (out is not None and type(out) is not Tensor):
        check_tensor(x)
        _support_dtensors(x, out)
    if type(backend) is not str:
        backend = word("backend", backend)
    is_compiling = torch.compiler.is_compiling()
    if backend != "auto" and is_compiling:
        raise RuntimeError(f"the backend is chosen outside compiled functions, got backend={backend!r} inside one")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out is not None and torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise RuntimeError("out cannot be given while a gradient is required: use torch.no_grad(), or leave out=None")
    names, defaults = _ARGUMENTS[name]
    if is_compiling:
        arguments = dict(zip(names, given, strict=True))
    elif all(map(operator.is_, given, defaults)):
        arguments = {}
    else:
        arguments = {
            key: converted(key, value)
            for key, value, default in zip(names, given, defaults, strict=True)
            if value is not default
        }
    if backend == "auto":
        result = _call_op(name, x, out, arguments)
    else:
        with use_backend(backend):
            result = _call_op(name, x, out, arguments)
    if not is_compiling and isinstance(x, Tensor):
        warn_of_layout(x)
    return result


def _call_op(name: str, x: Tensor, out: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    if out is None:
        return cast(Tensor, _OPS[name](x, **arguments))
    _OUT_OPS[name](x, out=out, **arguments)
    return out


def _support_dtensors(*tensors: object) -> None:
    """Register the ops on DTensors if a tensor is one, without importing torch.distributed.tensor, which is slow."""
    if sys.modules.get("torch.distributed.tensor") is not None:
        from torch.distributed.tensor import DTensor

        if any(isinstance(tensor, DTensor) for tensor in tensors):
            from . import dtensor  # noqa: F401


def grid_pool(
    x: Tensor,
    *,
    frame_strides: int | Sequence[int] = (2, 4, 8),
    grid_shape: int | Sequence[int] = (2, 2),
    sampling: str = "last",
    resize: str = "area",
    kernel_size: int | Sequence[int] = (2, 2),
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    output_size: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    norm_type: float = 2.0,
    normalize_norm: bool = True,
    norm_channels: int | None = None,
    frame_counts: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """ST-GridPool: pyramid temporal gridding (PTG), then norm-based spatial pooling (NSP) of visual tokens.

    x: (T, H, W, C) tokens of T frames, or (B, T, H, W, C) of B videos; bfloat16, float16, float32 or float64, any
        strides. It is not modified. Result: (T, OH, OW, C) or (B, T, OH, OW, C), same dtype, contiguous, new.

    PTG runs level by level; each level reads the frames as the level before it left them.

    frame_strides: sampling stride of each level, in frames. [] means no levels, an integer stands for one level.
    grid_shape: (rows, cols) of the mosaic for every level, an integer for a square one, or 2 entries per level. Every
        rows · cols sampled frames form a group, whose mosaic, shrunk to H × W, replaces the group's target frame. An
        incomplete group is dropped.
    sampling: "last" samples the last frame of each stride, and the target is the last sampled frame (published code,
        figure 2); "first" samples the first frame, and the target is the last frame of the segment (the paper's text).
    resize: "area" shrinks each frame by adaptive average pooling, then tiles and crops (published code); "bilinear"
        resizes the mosaic (the paper's text).

    NSP computes Σ α·t over the tokens t of each window, with α = softmax(temperature · ‖t‖).

    kernel_size, stride, padding, ceil_mode: windows of `torch.nn.AvgPool2d`; an integer stands for both directions.
    count_include_pad: True includes zero padding in the softmax, with norm 0; False excludes it.
    output_size: (OH, OW), at most (H, W), of the windows of `torch.nn.AdaptiveAvgPool2d`, which replace the five
        arguments above. A window of either kind has fewer than 2³¹ tokens, the padding that takes part included.
    temperature: 0 is average pooling. Larger values approach the token with the largest norm, values below 0 the token
        with the smallest.
    norm_type: p of ‖t‖ = (mean_c |t_c|^p)^(1/p), greater than 0; inf is max_c |t_c|.
    normalize_norm: True takes the mean over channels (published code), False the sum (the paper's formula).
    norm_channels: number of channels, from 1 to C, that the norm runs over; they are the first ones. None stands for
        all. All C channels are pooled by the same weights: tokens of the same places that are joined along channels, as
        those that Qwen3-VL adds at several layers, are pooled together, with weights from the first of them.

    frame_counts: numbers of frames of videos packed along T, in order, for 4-D x only; they must sum to T. Groups never
        span two videos.
    out: tensor of the result's shape, dtype and device to write into; it must not overlap x, and is returned.
    backend: "auto" or one of `available_backends()`; "auto" follows `use_backend`, then STGP_BACKEND, then takes the
        first that can run, in an order that `stgp info` shows.

    Integers, numbers and sequences of them may be those of NumPy and torch, except while torch compiles. Warns once if
    the shape of x looks like that of another layout: channels first, or flattened frames.

    Raises ValueError or TypeError naming the argument, its value and what is allowed; RuntimeError if the requested
    backend cannot run the call, or a gradient is required together with `out`. Differentiable once in x. Same as the op
    `torch.ops.stgp.grid_pool`, whose arguments are of the types in its schema.

    Source: ST-GridPool (ICLR 2026, arXiv 2605.22078), sections on PTG and NSP. The defaults are the paper's settings,
    computed as in its published code.
    """
    gridding = (frame_strides, grid_shape, sampling, resize)
    windows = (kernel_size, stride, padding, ceil_mode, count_include_pad, output_size)
    weights = (temperature, norm_type, normalize_norm, norm_channels)
    return _call("grid_pool", x, out, backend, (*gridding, *windows, *weights, frame_counts))


def temporal_grid(
    x: Tensor,
    *,
    frame_strides: int | Sequence[int] = (2, 4, 8),
    grid_shape: int | Sequence[int] = (2, 2),
    sampling: str = "last",
    resize: str = "area",
    frame_counts: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pyramid temporal gridding alone: x with the target frame of every group replaced by the group's summary.

    Arguments, errors and source are those of `grid_pool`. Result: shape and dtype of x, contiguous, new.
    """
    return _call("temporal_grid", x, out, backend, (frame_strides, grid_shape, sampling, resize, frame_counts))


def norm_pool(
    x: Tensor,
    *,
    kernel_size: int | Sequence[int] = (2, 2),
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    output_size: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    norm_type: float = 2.0,
    normalize_norm: bool = True,
    norm_channels: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Norm-based spatial pooling alone: (T, H, W, C) → (T, OH, OW, C), or 5-D.

    Arguments, errors and source are those of `grid_pool`. A NaN affects only the windows that contain it.
    """
    windows = (kernel_size, stride, padding, ceil_mode, count_include_pad, output_size)
    weights = (temperature, norm_type, normalize_norm, norm_channels)
    return _call("norm_pool", x, out, backend, (*windows, *weights))


def token_norm(
    x: Tensor,
    *,
    norm_type: float = 2.0,
    normalize_norm: bool = True,
    norm_channels: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Norm ‖t‖ of every token, from which `norm_pool` computes weights: (T, H, W, C) → (T, H, W), or 5-D → 4-D.

    Result: float32, or float64 for float64 x. Arguments, errors and source are those of `grid_pool`.
    """
    return _call("token_norm", x, out, backend, (norm_type, normalize_norm, norm_channels))


def _defaults_of(function: Callable[..., Tensor]) -> dict[str, Any]:
    """Return the arguments of the op of a public function, with their defaults, in their order."""
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter.default for name, parameter in parameters if name not in ("x", "out", "backend")}


_ARGUMENTS = {
    function.__name__: (tuple(_defaults_of(function)), tuple(_defaults_of(function).values()))
    for function in (grid_pool, temporal_grid, norm_pool, token_norm)
}
"""Names and defaults of the arguments of every op."""

_PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(grid_pool).parameters.items()
    if name not in ("x", "frame_counts", "out", "backend")
}
_ALWAYS_SHOWN = ("frame_strides", "grid_shape", "kernel_size", "temperature")


class GridPool(nn.Module):
    """`grid_pool` with fixed arguments, as a module without parameters or state: (T, H, W, C) → (T, OH, OW, C).

    Takes the arguments of `grid_pool` except `out`, `backend` and `frame_counts`; `forward` takes the last. They are
    checked at once, except for limits that depend on the size or dtype of x: errors as in `grid_pool`, TypeError for an
    unknown argument. The property `arguments` returns all of them, sequences as tuples. They cannot be changed.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        check_names(arguments, _PARAMETERS, "arguments of GridPool")
        self._arguments: dict[str, Any] = {
            name: converted(name, arguments.get(name, parameter.default)) for name, parameter in _PARAMETERS.items()
        }
        check_arguments(self._arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, with defaults, and with sequences as tuples."""
        return dict(self._arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARAMETERS:
            raise AttributeError(f"{name} of a GridPool is fixed: make a new one, GridPool({name}=…)")
        super().__setattr__(name, value)

    def forward(self, x: Tensor, frame_counts: Sequence[int] | None = None) -> Tensor:
        return grid_pool(x, frame_counts=frame_counts, **self._arguments)

    def extra_repr(self) -> str:
        shown = set(_ALWAYS_SHOWN)
        if self._arguments["output_size"] is not None:
            shown.remove("kernel_size")
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self._arguments.items()
            if name in shown or value != _PARAMETERS[name].default
        )


GridPool.__signature__ = inspect.Signature(list(_PARAMETERS.values()))  # type: ignore[attr-defined]
