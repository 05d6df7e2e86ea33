"""Descriptions of exceptions in one line, and a test for those that say that memory ran out."""

from __future__ import annotations

import errno
import re

import torch


def describe(error: BaseException, hint: str = "") -> str:
    """Describe an error in one line. Errors that inputs and options cannot cause are called unexpected, with `hint`."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
        place = " of the GPU" if isinstance(error, torch.OutOfMemoryError) else ""
        size = re.search(r"allocate (\d[\d.]* [A-Za-z]+)", str(error))
        return f"out of memory{place}{f': cannot allocate {size[1]}' if size else ''}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)) and message:
        return message
    return f"unexpected {type(error).__name__}: {message}{hint}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or one that it was raised from, says that there is not enough memory.

    Of torch's allocators, that of a GPU raises OutOfMemoryError, and that of the CPU a RuntimeError with a text.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if re.search(r"allocate memory|not enough memory|out of memory|bad.alloc", str(error), re.IGNORECASE):
        return not isinstance(error, (ValueError, TypeError))
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
