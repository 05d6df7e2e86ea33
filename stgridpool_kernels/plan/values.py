"""Integers, words and truth values as callers write them: of Python, NumPy and torch, alone or in a sequence."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any


def plain(value: Any) -> Any:
    """Return an array or a tensor as numbers or lists of them, and any other value as it is.

    Raises TypeError for a tensor without such elements, as one that is sparse, nested or without data.
    """
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except (RuntimeError, TypeError):
        raise TypeError(f"no numbers can be read from {shown(value)}") from None


def integers(name: str, value: Any, allowed: str = "an integer or a sequence of integers") -> tuple[int, ...]:
    """Return the integers in a sequence, an array or a tensor, or an integer alone as a sequence of one.

    name: the argument, and allowed: the values that it may have, in words, both for the error message. Raises TypeError
    for anything else.
    """
    if type(value) is tuple and {int}.issuperset(map(type, value)):
        return value
    try:
        entries = plain(value)
        if isinstance(entries, (str, bytes, Mapping, AbstractSet)):
            raise TypeError
        return tuple(map(operator.index, (entries,) if hasattr(entries, "__index__") else entries))
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}") from None


def pair(name: str, value: Any, allowed: str = "an integer or two (rows, cols)") -> tuple[int, ...]:
    """Return (rows, cols) as `integers` does, with an integer alone for both. The number of entries is not checked."""
    return integers(name, value, allowed) * (2 if type(value) is not tuple and is_alone(value) else 1)


def count(name: str, value: Any, least: int = 0) -> int:
    """Return an integer of at least `least`. name: the argument. Raises TypeError or ValueError for anything else."""
    numbers = integers(name, value, "an integer")
    if not is_alone(value):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if numbers[0] < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(numbers[0])}")
    return numbers[0]


def is_alone(value: Any) -> bool:
    """Return whether a value is an integer rather than a sequence of them."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def truth(name: str, value: Any) -> bool:
    """Return a truth value, or 0 or 1, as a bool. name: the argument. Raises TypeError for anything else."""
    if value is True or value is False:
        return value
    try:
        found = plain(value)
        if isinstance(found, int) and found in (0, 1):
            return bool(found)
    except TypeError:
        pass
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def word(name: str, value: Any) -> str:
    """Return a string, or a member of an enumeration of strings, as a str. Raises TypeError for anything else."""
    if type(value) is str:
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    return str.__str__(value)


class _Short(reprlib.Repr):
    """The limited repr of the standard library, in one line, and with arrays and tensors described by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 16
        self.maxstring = self.maxother = self.maxlong = 100

    def repr1(self, x: Any, level: int) -> str:
        if getattr(x, "ndim", 0) and not isinstance(x, type):
            nested = getattr(x, "is_nested", False)  # a nested tensor has no shape
            return f"{type(x).__name__} of " + (f"{x.ndim} dimensions" if nested else f"shape {tuple(x.shape)}")
        return " ".join(super().repr1(x, level).splitlines())

    def repr_int(self, x: int, level: int) -> str:  # Python writes at most 4300 digits
        return super().repr_int(x, level) if x.bit_length() < 4300 else f"an integer of {x.bit_length()} bits"


shown = _Short().repr
"""Return a value as error messages show it: without the data of arrays, in one line, and cut where it is long."""
