"""Printing of errors in one line, and of file names with unprintable characters escaped."""

from __future__ import annotations

import argparse
import sys


def complain(args: argparse.Namespace, message: str) -> None:
    print(printable(f"stgp {args.command}: {message}"), file=sys.stderr)


def describe(error: BaseException) -> str:
    """Describe an error in one line. Errors that inputs and options cannot cause are called unexpected."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, MemoryError):
        return f"out of memory: {message}" if message else "out of memory"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)) and message:
        return message
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


def printable(text: str) -> str:
    """Escape characters that a terminal would interpret or cannot show; file names may contain any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
