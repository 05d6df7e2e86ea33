"""What the commands print besides results: errors in one line, and names of files whatever they hold."""

from __future__ import annotations

import argparse
import sys


def complain(args: argparse.Namespace, message: str) -> None:
    print(printable(f"stgp {args.command}: {message}"), file=sys.stderr)


def describe(error: BaseException) -> str:
    """An error in one line. Kinds that no bad input or option explains say so."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, MemoryError):
        return f"out of memory: {message}" if message else "out of memory"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)) and message:
        return message
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


def printable(text: str) -> str:
    """Names of files may hold anything; what a terminal would act on, or cannot show, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
