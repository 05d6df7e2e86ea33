"""Patches of Triton's interpreter, which runs kernels on the CPU with NumPy, for accuracy, speed and counts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def use_interpreter() -> None:
    """Make kernels that are imported later run in the interpreter if there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def repair_interpreter() -> None:
    """Make conversions between float32 and bfloat16 round to nearest even, as on GPUs; the interpreter truncates."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (bfloat16, float32):
            return (values.view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
        if (source, target) == (float32, bfloat16):
            flat = torch.from_numpy(np.array(values, dtype=np.float32, ndmin=1))
            return flat.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        return convert(values, source, target, rounding)

    interpreter._convert_float = convert_float


def hasten_interpreter() -> None:
    """Speed up the interpreter.

    It then patches `triton.language` once per launch for every module of device functions, not at each call, and does
    not check int32 operations for overflow, which takes half of the time; `check_integers` turns the check on.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    def launch_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def keep_results(self: Any, *args: Any) -> None:
        """Skip copying tensors back after a launch, since tensors on the CPU are not copied before it."""

    interpreter.InterpretedFunction.__call__ = call_device_function
    interpreter.GridExecutor.__call__ = launch_kernel
    interpreter.GridExecutor._restore_args_dev = keep_results
    check_integers(False)


@dataclasses.dataclass
class Requests:
    """Numbers of bytes that kernels loaded and stored, counting every access."""

    loaded: int = 0
    stored: int = 0


@contextmanager
def counted_traffic() -> Iterator[Requests]:
    """Count the bytes of all unmasked loads and stores of the interpreter, with those of tables."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Requests()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def check_integers(check: bool) -> None:
    """Set whether the interpreter raises an error if an int32 result overflows."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=check)
