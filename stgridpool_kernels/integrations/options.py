"""This module reads options of `grid_pool` from command lines, model arguments and environment variables.

A value is JSON or a shorter form: integers are `2,4,8`, `2:4:8`, `2x4x8`, `2 4 8` or `[2, 4, 8]`, a word needs no
quotes, and `none` is an empty list for an argument that takes any number of integers, else None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from .. import ops  # noqa: F401  Importing `ops` registers the schema from which options are read.

_KINDS: dict[str, tuple[str, Any]] = {
    argument.name: (str(argument.type).removeprefix("Optional[").split("[")[0].rstrip("]"), argument)
    for argument in torch.ops.stgp.grid_pool.default._schema.arguments
    if argument.kwarg_only
}
"""These are the kind and the argument of the schema for each option but `backend`, by the name of the option."""

_SEPARATOR = r"\s*[,:xX×]\s*|\s+"
"""This regular expression matches what may stand between two integers."""

OPTIONS = (*_KINDS, "backend")
"""These are the names of the options that are read."""

ARGUMENT_PREFIX = "stgp_"
"""Options have this prefix among the arguments of a model of an evaluation."""


def read_options(given: str | Mapping[str, Any], prefix: str = "", words: Collection[str] = ()) -> dict[str, Any]:
    """Return options by name, with values of the types that `grid_pool` takes.

    given: NAME=VALUE entries separated by commas; or the text of a JSON object; or values by name.
    prefix: prefix of the names in `given`, which is removed.
    words: names of options that `grid_pool` does not have, and whose values are words.

    Raises TypeError for an unknown name; ValueError for text of another form, for a name that is given twice and for a
    value of another type. `grid_pool` checks the ranges of values.
    """
    options: dict[str, Any] = {}
    for shown, value in given.items() if isinstance(given, Mapping) else _pairs(given):
        name = shown.removeprefix(prefix)
        if name in options:
            raise ValueError(f"{shown} must be given once, got {shown}={options[name]!r} and {shown}={value!r}")
        options[name] = _word(shown, value) if name in words else read_option(name, value, shown)
    return options


def split_arguments(
    arguments: Mapping[str, Any], check: Callable[..., object], defaults: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Split the arguments of a model of an evaluation into the options that are among them and the others.

    The name of an option is `stgp_` followed by an argument of `grid_pool`, except `frame_counts` and `out`;
    `read_options` reads its value. `stgp=False` selects the model without ST-GridPool, with None for the options.

    check: a function that is called with the options; the error that it raises is passed on with their names. defaults:
    values, by name, of options that `grid_pool` does not have, such as a mode. They are words, and always among the
    options.

    Raises ValueError or TypeError naming the argument, its value and what is allowed.
    """
    given = {name: value for name, value in arguments.items() if name.startswith(ARGUMENT_PREFIX)}
    others = {name: value for name, value in arguments.items() if name not in given}
    wanted = others.pop("stgp", True)
    if not isinstance(wanted, bool):
        raise TypeError(f"stgp must be True or False, got {wanted!r}")
    names = ", ".join(given)
    if not wanted:
        if given:
            raise ValueError(f"stgp must not be False where {names} is given")
        return None, others
    options = {**(defaults or {}), **read_options(given, ARGUMENT_PREFIX, words=tuple(defaults or ()))}
    try:
        check(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"model arguments {names}: {error}") from None
    return options, others


def read_option(name: str, value: Any, shown: str) -> Any:
    """Return the value of an argument of `grid_pool`, in its type, from text or from a value of a Python or JSON type.

    name: an argument, except `out`. shown: its name in error messages. Raises as `read_options`.
    """
    if name == "backend":
        return _word(shown, value)
    if name not in _KINDS:
        raise TypeError(f"there must be an option {shown}, among {', '.join(OPTIONS)}, got {shown}={value!r}")
    kind, argument = _KINDS[name]
    if kind == "List":
        optional = str(argument.type).startswith("Optional")
        return _pair(shown, value, optional) if argument.N else _list(shown, value, optional)
    return {"float": _number, "int": _integer, "bool": _boolean, "str": _word}[kind](shown, value)


def read_grid(value: Any, shown: str) -> tuple[int, int]:
    """Return the rows and columns in `value`, as 18x32, which is also 18,32, 18:32 or 18 32.

    shown: name of the option in error messages. Raises ValueError for any other value.
    """
    numbers = read_integers(value) or ()
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"{shown} must be rows and columns like 18x32, both at least 1, got {value!r}")
    return numbers[0], numbers[1]


def read_integers(value: Any) -> tuple[int, ...] | None:
    """Return the integers in `value`, which may be text or have Python's types, or None if it is anything else."""
    if isinstance(value, str):
        bracketed = re.fullmatch(r"\s*[\[(](.*)[\])]\s*", value)
        text = (bracketed[1] if bracketed else value).strip()
        if bracketed and not text:
            return ()
        separators = {found.strip() for found in re.findall(_SEPARATOR, text)}
        entries = re.split(_SEPARATOR, text)
        # Python converts at most 4300 digits into an integer.
        integers = all(re.fullmatch(r"[+-]?\d{1,4000}", entry) for entry in entries)
        return tuple(map(int, entries)) if len(separators) <= 1 and integers else None
    entries = [value] if isinstance(value, int) else value
    if isinstance(entries, list | tuple) and all(
        isinstance(entry, int) and not isinstance(entry, bool) for entry in entries
    ):
        return tuple(entries)
    return None


def _pairs(text: str) -> list[tuple[str, Any]]:
    if text.lstrip().startswith("{"):
        try:
            pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"options must be a JSON object, got {text[:200]!r}: {error}") from None
        return pairs
    entries = re.split(r",(?=\s*\w+\s*=)", text) if text.strip() else []
    for entry in entries:
        if not re.match(r"\s*\w+\s*=", entry):
            raise ValueError(f"options must be like temperature=2,frame_strides=2:4:8, or a JSON object, got {entry!r}")
    return [(name.strip(), value.strip()) for name, value in (entry.split("=", 1) for entry in entries)]


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))


def _list(shown: str, value: Any, optional: bool) -> tuple[int, ...] | None:
    if _is_none(value):
        return None if optional else ()
    numbers = read_integers(value)
    if numbers is None:
        raise ValueError(f"{shown} must be integers like 2,4,8, or none, got {value!r}")
    return numbers


def _pair(shown: str, value: Any, optional: bool) -> int | tuple[int, ...] | None:
    if optional and _is_none(value):
        return None
    numbers = read_integers(value) or ()
    if len(numbers) not in (1, 2):
        raise ValueError(f"{shown} must be one integer or two like 2,2{', or none' if optional else ''}, got {value!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def _integer(shown: str, value: Any) -> int | None:
    if _is_none(value):
        return None
    numbers = read_integers(value) or ()
    if len(numbers) != 1:
        raise ValueError(f"{shown} must be an integer, or none, got {value!r}")
    return numbers[0]


def _number(shown: str, value: Any) -> float:
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{shown} must be a number, got {value!r}")


def _boolean(shown: str, value: Any) -> bool:
    words = {"true": True, "false": False}
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError(f"{shown} must be True or False, got {value!r}")


def _word(shown: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown} must be a word, got {value!r}")
    return value.strip().strip('"')
