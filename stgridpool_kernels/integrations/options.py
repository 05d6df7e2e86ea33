"""Options of `grid_pool` as text: in the model arguments of an evaluation, in an environment variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def read_option(name: str, value: Any, shown: str) -> Any:
    """The value of one argument of `grid_pool` as that takes it, from text or from what a command line made of text.

    name: an argument, except `frame_counts` and `out`. value: several integers are written 2:4:8, none of them, or an
        argument that is None, `none`. shown: what the user called it, for messages.

    Raises TypeError for an unknown name, ValueError for another kind of value; what `grid_pool` allows is not checked.
    """
    if name not in READERS:
        raise TypeError(f"there must be an option {shown}, among {', '.join(READERS)}, got {shown}={value!r}")
    return READERS[name](shown, value)


def _integers(shown: str, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    entries = [] if value == "none" else value.split(":") if isinstance(value, str) else value
    try:
        if isinstance(entries, list | tuple):
            numbers = tuple(int(entry) for entry in entries)
            return numbers[0] if isinstance(value, str) and len(numbers) == 1 else numbers
    except ValueError:
        pass
    raise ValueError(f"{shown} must be integers like 2 or 2:4:8, or none, got {value!r}")


def _list(shown: str, value: Any) -> Any:
    entries = _integers(shown, value)
    return (entries,) if isinstance(entries, int) else entries


def _integers_or_none(shown: str, value: Any) -> Any:
    return None if value is None or value == "none" else _integers(shown, value)


def _number(shown: str, value: Any) -> float:
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{shown} must be a number, got {value!r}")


def _boolean(shown: str, value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, bool) or str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError(f"{shown} must be True or False, got {value!r}")


def _word(shown: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown} must be a word, got {value!r}")
    return value


READERS: dict[str, Callable[[str, Any], Any]] = {
    "frame_strides": _list,
    "grid_shape": _list,
    "sampling": _word,
    "resize": _word,
    "kernel_size": _integers,
    "stride": _integers_or_none,
    "padding": _integers,
    "ceil_mode": _boolean,
    "count_include_pad": _boolean,
    "output_size": _integers_or_none,
    "temperature": _number,
    "norm_type": _number,
    "normalize_norm": _boolean,
    "backend": _word,
}
