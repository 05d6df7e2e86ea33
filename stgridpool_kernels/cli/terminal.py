"""Printing of errors in one line, and of file names with unprintable characters escaped."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from ..io import failures


def complain(args: argparse.Namespace, message: str) -> None:
    print(printable(f"stgp {args.command}: {message}"), file=sys.stderr)


def describe(error: BaseException) -> str:
    """Describe an error in one line."""
    return failures.describe(error, " (--debug shows where)")


def printable(text: str) -> str:
    """Escape characters that a terminal would interpret or cannot show; file names may contain any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_whole(console: Console, table: Table) -> None:
    """Print a table with all of its digits, in lines longer than the terminal or pipe is wide if it has to be."""
    width = console.width
    needed = console.measure(table, options=console.options.update(max_width=_UNLIMITED)).maximum
    console.width = max(width, needed)
    try:
        console.print(table)
    finally:
        console.width = width


_UNLIMITED = 10_000
"""Number of characters that no line of a table has."""
