"""Arguments of the Python functions as callers write them, turned into what the ops take, or refused by name.

The dispatcher of torch checks types too, but its messages hold the schema and the data, and it refuses some types of
NumPy. Symbolic values pass as they are, and so does everything while torch compiles.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .plan.values import integers, is_alone, pair, shown, truth, word

WIDE_FRAME = 8
"""Ratio of the sides of a frame above which its tokens are likely to be flattened."""

_PAIR = "an integer or two (rows, cols)"
_COUNTS = "a sequence of integers, one per video"
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, torch.fx.Proxy)

warned: set[str] = set()
"""Layouts that `warn_of_layout` has warned of in this process: "channels first" and "flattened"."""


class LayoutWarning(UserWarning):
    """Warning that tokens have a shape that looks like that of another layout than the one in which they are read."""


def converted(name: str, value: Any) -> Any:
    """Return an argument of `grid_pool` or `pool_flat` in a type that the op takes.

    Integers, alone or in a sequence, an array or a tensor, may be of any type that `operator.index` takes. An integer
    alone stands for one level in `frame_strides`, and for both directions in `grid_shape` and in the arguments of the
    windows. Raises TypeError with the name, the value and what is allowed, ValueError for an integer beyond 64 bits.
    """
    if isinstance(value, _SYMBOLIC) or (isinstance(value, (list, tuple)) and any(map(_is_symbolic, value))):
        return value
    return _CONVERTERS[name](name, value)


def check_tensor(x: Any) -> None:
    """Raise TypeError, with the remedy but without the data, unless x is a tensor or a stand-in that torch traces."""
    if isinstance(x, Tensor) or hasattr(type(x), "__torch_function__"):
        return
    remedy = ""
    if hasattr(type(x), "__array__"):
        remedy = ": pass torch.from_numpy(x)"
    elif isinstance(x, (list, tuple)) and x:
        remedy = ": pass torch.stack(x), of frames of shape (H, W, C)"
        if not isinstance(x[0], Tensor):
            remedy = ": pass torch.from_numpy(numpy.stack(x)), of frames of shape (H, W, C)"
    raise TypeError(f"x must be a torch.Tensor, got {_kind(x)}{remedy}")


def check_names(given: Mapping[str, object], allowed: Collection[str], what: str) -> None:
    """Raise TypeError, with the nearest allowed name, unless all names of given arguments are allowed.

    what: what the arguments are called in the message, in the plural.
    """
    for name, value in given.items():
        if name not in allowed:
            near = get_close_matches(name, allowed, 1, cutoff=0.5)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{what} must be among {', '.join(allowed)}, got {name}={shown(value)}{meant}")


def warn_of_layout(x: Tensor) -> None:
    """Warn, once in a process for each layout, of tokens that probably do not have the shape (…, T, H, W, C)."""
    *_, H, W, C = x.shape
    if not type(H) is type(W) is type(C) is int:  # sizes are symbolic while torch traces
        return
    if (H >= C and W >= C) or H > WIDE_FRAME * W:
        layout, shape, remedy = "channels first", "(…, T, C, H, W)", "x.movedim(-3, -1)"
    elif W > WIDE_FRAME * H:
        layout, shape, remedy = "flattened", "(…, T, H·W, C)", "x.unflatten(-2, (rows, cols)), or call pool_flat"
    else:
        return
    if layout not in warned:
        warnings.warn(
            f"x of shape {tuple(x.shape)} is read as frames of {H} × {W} tokens of {C} channels; if they are {layout}, "
            f"{shape}, pass {remedy}",
            LayoutWarning,
            stacklevel=_levels_to_the_caller(),
        )
        warned.add(layout)


def _levels_to_the_caller() -> int:
    """Return the `stacklevel` of a warning in the function that calls this one, for the nearest code of a user."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith((f"{__package__}.", "torch.nn.")):
        level, frame = level + 1, frame.f_back
    return level


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, _SYMBOLIC)


def _kind(value: Any) -> str:
    """Return the type of a value, with the shape of an array or the length of a sequence."""
    size = ""
    with suppress(TypeError, ValueError, RuntimeError):  # of classes, and of objects that only look like arrays
        if hasattr(value, "shape"):
            size = f" of shape {tuple(value.shape)}"
        elif hasattr(value, "__len__"):
            size = f" of length {len(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}{size}".removeprefix("builtins.")


def _sequence(name: str, value: Any, *, allowed: str, convert: Callable[..., Any] = integers) -> tuple[int, ...]:
    entries: tuple[int, ...] = convert(name, value, allowed)
    if any(not -(1 << 63) <= entry < 1 << 63 for entry in entries):
        raise ValueError(f"{name} must fit in 64 bits, got {shown(value)}")
    return entries


def _optional(name: str, value: Any, *, allowed: str, convert: Callable[..., Any]) -> tuple[int, ...] | None:
    return None if value is None else _sequence(name, value, allowed=f"{allowed}, or None", convert=convert)


def _frame_counts(name: str, value: Any, allowed: str) -> tuple[int, ...]:
    if is_alone(value):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    return integers(name, value, allowed)


def _integer(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if not is_alone(value):
        raise TypeError(f"{name} must be an integer or None, got {shown(value)}")
    return _sequence(name, value, allowed="an integer or None")[0]


def _number(name: str, value: Any) -> float:
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{name} must be a number: it is not learned, got {_kind(value)} that requires a gradient")
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit in a float, got {shown(value)}") from None
    except (TypeError, ValueError, RuntimeError):  # a tensor of several elements raises the last
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None


_CONVERTERS: dict[str, Callable[[str, Any], Any]] = {
    "frame_strides": partial(_sequence, allowed="an integer or a sequence of integers, one per level"),
    "grid_shape": partial(_sequence, allowed=f"{_PAIR}, or two per level", convert=pair),
    "sampling": word,
    "resize": word,
    "kernel_size": partial(_sequence, allowed=_PAIR, convert=pair),
    "stride": partial(_optional, allowed=_PAIR, convert=pair),
    "padding": partial(_sequence, allowed=_PAIR, convert=pair),
    "ceil_mode": truth,
    "count_include_pad": truth,
    "output_size": partial(_optional, allowed=_PAIR, convert=pair),
    "temperature": _number,
    "norm_type": _number,
    "normalize_norm": truth,
    "norm_channels": _integer,
    "frame_counts": partial(_optional, allowed=_COUNTS, convert=_frame_counts),
    "frames_per_video": partial(_sequence, allowed=_COUNTS, convert=_frame_counts),
}
