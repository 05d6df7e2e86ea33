"""Probe of the bandwidth of a CPU's memory: a C++ loop that moves the bytes of pooling, in its order, and only that."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from benchmarks.machine import output_of
from stgridpool_kernels.cli.machine import cpu_name

SOURCE = Path(__file__).with_name("ceiling.cpp")
LINE = 64
"""Size of a cache line in bytes. Sizes of tokens and addresses must be multiples of it."""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wall", "-Wno-psabi")
"""Options of the compiler."""


def cache_folder() -> Path:
    """Return the folder of compiled probes among the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "stgridpool_kernels")


class Probe:
    """The functions of ceiling.cpp, compiled for this machine."""

    def __init__(self) -> None:
        """Compile the functions unless they are cached. Raises RuntimeError with the reason if that fails."""
        given = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if given is None:
            raise RuntimeError("no C++ compiler")
        compiler = shlex.split(given)
        digest = hashlib.sha256(SOURCE.read_bytes())
        digest.update("\n".join([*compiler, output_of([*compiler, "--version"]) or "", *FLAGS, cpu_name()]).encode())
        library = cache_folder() / f"ceiling-{digest.hexdigest()[:16]}.so"
        try:
            if not library.exists():
                _compile(compiler, library)
            functions = ctypes.CDLL(str(library))
        except OSError as error:
            raise RuntimeError(f"{SOURCE.name}: {error}") from error
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._pool, self._read = functions.pool, functions.read
        self._pool.argtypes, self._pool.restype = [pointer, pointer, *[size] * 6, threads], None
        self._read.argtypes, self._read.restype = [pointer, size, threads], ctypes.c_uint64

    def pool(self, x: Tensor, out: Tensor, threads: int) -> None:
        """Write the bitwise or of the tokens of each 2 × 2 window of x (T, H, W, C) into out (T, OH, OW, C)."""
        token = x.shape[3] * x.element_size()
        self._pool(*_addresses(token, x, out), *x.shape[:3], *out.shape[1:3], token, threads)

    def read(self, x: Tensor, threads: int) -> int:
        """Return the bitwise or of all 64-bit words of x."""
        return int(self._read(*_addresses(x.nbytes, x), x.nbytes, threads))


def _compile(compiler: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built, linked = Path(folder, "ceiling.o"), Path(folder, "ceiling.so")
        # not linked to an OpenMP runtime, so that torch's is used: the threads of two runtimes would compete for cores
        for command in ([*FLAGS, "-c", f"{SOURCE}", "-o", f"{built}"], ["-shared", f"{built}", "-o", f"{linked}"]):
            done = subprocess.run([*compiler, *command], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr.strip()[:2000]}")
        linked.replace(library)


def _addresses(unit: int, *tensors: Tensor) -> list[int]:
    addresses = [tensor.data_ptr() for tensor in tensors]
    if unit % LINE or any(address % LINE for address in addresses) or not all(t.is_contiguous() for t in tensors):
        raise ValueError("the probe moves whole cache lines of contiguous tensors")
    return addresses
