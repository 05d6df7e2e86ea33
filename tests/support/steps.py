"""A count of the work that Python code does, which is the same on every machine and in every run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def steps(function: Callable[[], object], *, lines: bool = False) -> int:
    """Call a function; return the number of bytecode instructions that it and the Python functions it calls executed.

    Every pass of a loop counts, in comprehensions too. Loops inside C functions, such as `max` of a list, do not.
    lines: count lines of source in place of instructions, which differ between versions of Python less.
    """
    count, counted = 0, "line" if lines else "opcode"

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = not lines, lines
        count += event == counted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count
