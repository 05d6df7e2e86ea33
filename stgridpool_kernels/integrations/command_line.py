"""Parts of the command lines of `stgp`, Ray's step and the benchmarks: values of several words, unknown options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .options import read_grid

SEVERAL = "integers are separated by commas, x, colons or spaces: 2,4 is 2x4, 2:4 and 2 4"
"""Help text on the values of options that take several integers."""


def join_values(argv: Sequence[str], several: Collection[str] = ()) -> list[str]:
    """Join an option with its value where argparse would take the value for something else.

    `--option -1` becomes `--option=-1`, since argparse would read -1e3, -inf and -1,2 as options. For an option in
    `several`, `--option 2 4 8` becomes `--option=2 4 8`; a file whose name is an integer is given as ./4 after it.
    """
    joined: list[str] = []
    for text in argv:
        flag, _, value = joined[-1].partition("=") if joined else ("", "", "")
        is_number = re.fullmatch(r"-(\d|\.\d|inf).*", text) and re.fullmatch(r"--[a-z-]+", flag) and not value
        is_next = flag in several and re.fullmatch(r"[+-]?\d+", text) and re.fullmatch(r"([+-]?\d+ ?)*", value)
        if is_number or is_next:
            joined[-1] += f" {text}" if value else f"={text}"
        else:
            joined.append(text)
    return joined


def refuse_unknown(
    parser: argparse.ArgumentParser, unknown: Sequence[str], others: Mapping[str, str] | None = None
) -> None:
    """End the process with the usage of `parser` and the options that may be meant, unless `unknown` is empty.

    others: forms of options that are no flags, by the flag that one may try in their place.
    """
    if not unknown:
        return
    known = {flag: flag for flag in parser._option_string_actions} | dict(others or {})
    flags = [text.partition("=")[0].replace("_", "-") for text in unknown if text.startswith("--")]
    meant = []
    for flag in flags:
        longer = [name for name in known if name.startswith(flag)]
        meant += [known[name] for name in longer[:1] or difflib.get_close_matches(flag, known, n=1)]
    hint = f"; did you mean {' and '.join(dict.fromkeys(meant))}?" if meant else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a function for argparse's `type` that shows the message of a ValueError."""

    def read_or_refuse(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_or_refuse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


positive = checked(_positive)
"""Type of an option that is an integer of at least 1."""

grid = checked(lambda text: read_grid(text, "it"))
"""Type of an option that is a number of rows and columns."""
