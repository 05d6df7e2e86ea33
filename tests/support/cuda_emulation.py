"""Emulation of the CUDA kernels on a CPU: csrc/cuda, compiled by a C++ compiler, with a block's threads as fibers.

It runs the source that nvcc compiles, with small headers in tests/support/cuda_headers. They end the process if threads
of a block wait at a barrier that others never reach, and fill shared memory with NaN before every block. Time, caches
and the order in which a GPU runs warps are not emulated.

`backend()` is a `Backend` named "cuda" for tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stgridpool_kernels.backends import Backend, compiled
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan import GridPlan
from stgridpool_kernels.plan.tables import plan_tables

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "tests" / "support" / "cuda_headers"
BUILD = ROOT / "build" / "cuda_emulation"

FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-but-set-variable"),
)
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Supported dtypes, in the order of the C++ enumeration."""

OPS = ("grid_pool", "temporal_grid", "token_norm", "grid_pool_backward", "temporal_grid_backward")
"""Names of the operations, in the order of the C++ enumeration."""


class Strides(ctypes.Structure):
    """The C++ struct `stgp::Strides`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("video", "frame", "row", "col", "channel")]


class Call(ctypes.Structure):
    """The C++ struct `stgp::Call`."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("T", ctypes.c_int64),
        ("C", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_strides", Strides),
        ("out", ctypes.c_void_p),
        ("out_strides", Strides),
        ("scratch", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("norm_type", ctypes.c_double),
        ("normalize_norm", ctypes.c_bool),
        ("norm_channels", ctypes.c_int64),
        ("thumbnails", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("grad_strides", Strides),
        ("cells", ctypes.c_int32),
    ]


def find_compiler() -> str | None:
    """Return the C++ compiler: that of CXX, else g++ or c++ in PATH, None if there is none."""
    return next((found for name in (os.environ.get("CXX", "g++"), "g++", "c++") if (found := shutil.which(name))), None)


def content_hash(files: Sequence[Path], *more: str) -> str:
    """Return a digest of the names and contents of files, and of further inputs of the compilation."""
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build(sanitize: bool = False, kernels: Path = KERNELS) -> Path:
    """Compile the library unless it exists for the same sources; return its path. Processes may call it concurrently.

    sanitize: whether to use the address and undefined behaviour sanitizers, whose runtime must be preloaded.
    kernels: another copy of csrc/cuda, beside copies of the headers that it includes.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler: neither CXX nor g++ nor c++ is in PATH")
    flags = (*FLAGS, *(SANITIZERS if sanitize else ()))
    files = [*sorted(kernels.glob("*")), *sorted(kernels.parent.glob("*.h")), *sorted(HEADERS.glob("*"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    name = content_hash(files, compiler, version, *flags)
    library = BUILD / f"{name}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, flags, [*sorted(kernels.glob("*.cu")), *sorted(HEADERS.glob("*.cpp"))], library)
    return library


def _compile(compiler: str, flags: Sequence[str], files: Sequence[Path], library: Path) -> None:
    """Compile all files in parallel, link them, and rename the library to its name."""
    folder = library.with_suffix(f".{os.getpid()}")
    folder.mkdir()
    try:
        objects = [folder / f"{file.name}.o" for file in files]
        running = [
            subprocess.Popen(
                [compiler, *flags, "-I", str(HEADERS), "-x", "c++", "-c", str(file), "-o", str(target)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for file, target in zip(files, objects, strict=True)
        ]
        errors = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError("\n".join(filter(None, errors)))
        linked = folder / "library.so"
        subprocess.run([compiler, *flags, "-shared", *map(str, objects), "-o", str(linked)], check=True)
        os.replace(linked, library)
    finally:
        shutil.rmtree(folder)


@cache
def load(library: Path | None = None) -> ctypes.CDLL:
    """Load the library, which is built if None is given."""
    functions = ctypes.CDLL(str(library or build()))
    for function in (functions.stgp_scratch_bytes, functions.stgp_call_bytes):
        function.restype = ctypes.c_int64
    if functions.stgp_call_bytes() != ctypes.sizeof(Call):
        raise RuntimeError("Call here is not the Call of csrc/grid_pool.h")
    return functions


def _five(strides: Sequence[int], dimensions: int) -> Strides:
    """Return the strides of a 4-D or 5-D tensor as `Strides`, with 0 for the videos of a 4-D one."""
    return Strides(*strides) if dimensions == 5 else Strides(0, *strides)


def run(
    op: str,
    x: Tensor,
    tables: Sequence[int] | None,
    weighting: Weighting | None,
    out: Tensor,
    library: Path | None = None,
    thumbnails: Tensor | None = None,
    grad: Tensor | None = None,
    cells: int = 0,
) -> None:
    """Write `op` of x into out by tables.

    weighting: None for temporal_grid. thumbnails: those of the streams, for tables of a chunk.
    grad: gradient of the result, for backward operations. cells: cells per thread block; 0 takes the kernel's default.
    """
    functions = load(library)
    T, H, W, C = x.shape[-4:]
    strides = out.stride() if op != "token_norm" else (*out.stride(), 1)
    call = Call(
        DTYPES.index(x.dtype),
        *(T, C),
        *(x.data_ptr(), _five(x.stride(), x.dim())),
        *(out.data_ptr(), _five(strides, x.dim())),
        None,
        *(weighting or (1.0, 2.0, True, 0)),
        None if thumbnails is None else thumbnails.data_ptr(),
    )
    call.cells = cells
    if grad is not None:
        call.grad, call.grad_strides = grad.data_ptr(), _five(grad.stride(), grad.dim())
    words = None if tables is None else (ctypes.c_int32 * len(tables))(*tables)
    size = functions.stgp_scratch_bytes(OPS.index(op), words, ctypes.byref(call))
    scratch = torch.full((size + 64,), 0xFF, dtype=torch.uint8, device="cpu")  # NaN in every dtype
    call.scratch = scratch.data_ptr() + -scratch.data_ptr() % 64 if size else None
    if op == "token_norm":
        frames = math.prod(x.shape[:-3])
        error = functions.stgp_token_norm(*map(ctypes.c_int64, (frames, H, W)), ctypes.byref(call))
    else:
        error = getattr(functions, f"stgp_{op}")(words, ctypes.byref(call))
    if error:
        raise RuntimeError(f"{op} failed with CUDA error {error}")


@dataclass(frozen=True)
class LaunchRecord:
    """A launch of a kernel of csrc/cuda: its name with template arguments, its blocks, and what a block has.

    threads: number of threads of a block. shared_bytes: bytes of its dynamic shared memory.
    """

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int


def list_launches(op: str, x: Tensor, plan: GridPlan, most: int = 64) -> list[LaunchRecord]:
    """Return the launches of `op` with the default weights by `plan`, none of which is run.

    x is not read and may be of any size that can be reserved. most: limit of their number.
    """
    library = build()
    functions = load(library)
    out = torch.empty((*x.shape[:-3], *plan.pooled_size, x.shape[-1]), dtype=x.dtype)
    numbers = (ctypes.c_int64 * (4 * most))()
    functions.stgp_list_launches()
    try:
        run(op, x, plan_tables(plan), Weighting(1.0, 2.0, True, x.shape[-1]), out, library)
    finally:
        found = functions.stgp_listed_launches(numbers, ctypes.c_int64(most))
    if found > most:
        raise RuntimeError(f"{op} has {found} launches, more than {most}")
    names = _symbols(library)
    launches = (numbers[4 * n : 4 * n + 4] for n in range(found))
    return [LaunchRecord(names[kernel], *launch) for kernel, *launch in launches]


@cache
def _symbols(library: Path) -> dict[int, str]:
    """Return the demangled names of the functions of a library by their offset, without namespaces and parameters."""
    found = subprocess.run(["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = (line.split(" ", 2) for line in found.splitlines())
    return {int(offset, 16): short_kernel_name(name) for offset, kind, name in names if kind in "tT"}


def short_kernel_name(name: str) -> str:
    """Return a demangled name of a kernel without its result, namespaces and parameters."""
    return re.sub(r"^void |stgp::cuda::(\(anonymous namespace\)::)?|(?<=>)\(.*", "", name)


def grid_pool(x: Tensor, plan: GridPlan, weighting: Weighting, out: Tensor) -> None:
    run("grid_pool", x, plan_tables(plan), weighting, out)


def pool_chunk(x: Tensor, words: tuple[int, ...], weighting: Weighting, slots: Tensor, out: Tensor) -> None:
    run("grid_pool", x, words, weighting, out, thumbnails=slots)


def temporal_grid(x: Tensor, plan: GridPlan, out: Tensor) -> None:
    run("temporal_grid", x, plan_tables(plan), None, out)


def token_norm(x: Tensor, weighting: Weighting, out: Tensor) -> None:
    run("token_norm", x, None, weighting, out)


def grid_pool_backward(grad: Tensor, x: Tensor, plan: GridPlan, weighting: Weighting, grad_x: Tensor) -> None:
    run("grid_pool_backward", x, plan_tables(plan, gradient=True), weighting, grad_x, grad=grad)


def temporal_grid_backward(grad: Tensor, x: Tensor, plan: GridPlan, grad_x: Tensor) -> None:
    run("temporal_grid_backward", grad, plan_tables(plan, gradient=True), None, grad_x, grad=grad)


def unsupported_reason(x: Tensor | None, plan: GridPlan | None) -> str | None:
    """Return why the emulation cannot run a call, None if it can."""
    if find_compiler() is None:
        return "no C++ compiler to build the emulation with"
    if x is None:
        return None
    if x.device.type != "cpu":
        return f"x is on {x.device}, the emulation runs on the CPU"
    return None if x.dtype in DTYPES else f"{x.dtype} runs on the reference only"


def backend() -> Backend:
    """Return a backend named "cuda" that runs the kernels on tensors on the CPU; `auto` skips it."""
    return Backend(
        name="cuda",
        unsupported_reason=unsupported_reason,
        grid_pool=grid_pool,
        temporal_grid=temporal_grid,
        token_norm=token_norm,
        grid_pool_backward=grid_pool_backward,
        temporal_grid_backward=temporal_grid_backward,
        opt_in_reason=lambda: "the emulation runs the kernels on the CPU, slowly",
        can_fuse=compiled.can_fuse_on_cuda,
        pool_chunk=pool_chunk,
    )
