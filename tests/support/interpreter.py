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

    It then patches `triton.language` once per launch for every module of device functions, not at each call; makes the
    types and shapes of tensors once; and does not check int32 operations for overflow, which takes half of the time.
    `check_integers` turns the check on.
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
    _share_types()
    check_integers(False)


def _share_types() -> None:
    """Let equal block types share their attributes and NumPy's dtype, and tensors of a type all but their handle.

    Types are known by their names, since not all have a hash.
    """
    from triton.language import core
    from triton.runtime import interpreter

    make_type, make_tensor, find_dtype = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    attributes: dict[Any, dict[str, Any]] = {}
    dtypes: dict[str, Any] = {}

    def share_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(type)
        return dtypes[name]

    def share_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in attributes:
            make_type(self, element_ty, shape)
            attributes[key] = self.__dict__
        self.__dict__ = attributes[key]

    def share_shape(self: Any, handle: Any, type: Any) -> None:
        if "of_tensors" not in type.__dict__:
            make_tensor(self, handle, type)
            type.of_tensors = {name: value for name, value in self.__dict__.items() if name != "handle"}
        self.__dict__.update(type.of_tensors, handle=handle)

    core.block_type.__init__, core.tensor.__init__ = share_type, share_shape
    interpreter._get_np_dtype = share_dtype


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
