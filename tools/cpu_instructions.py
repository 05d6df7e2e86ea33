"""Instructions that the CPU kernels execute for 16 channels, on emulated CPUs: `python -m tools.cpu_instructions`.

A machine with an x86-64 CPU compiles the C++ test program for that and for aarch64. QEMU runs it and logs every basic
block that it executes. Two numbers of calls and two numbers of channels are compared, so that a count holds neither the
start of the program nor what a window costs whatever its channels. It says how good the code of the compiler is, not
how fast a CPU runs it: instructions differ in width, latency and throughput. QEMU knows AVX2 from version 7.2 on, and
AVX-512 in none. All counts take some minutes.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stgridpool_kernels.plan import grid_plan, save_tables
from tests.support import cpp_programs

UNIT = 16
"""The number of channels that a count is for."""

CHANNELS = (64, 128)
"""The numbers of channels that are compared, multiples of all blocks of channels that a loop takes at once."""

DTYPES = ("bfloat16", "float16", "float32")
STATIC = ("-DSTGP_CUDA=OFF", "-DCMAKE_EXE_LINKER_FLAGS=-static")
"""Definitions for CMake: a program that is linked statically starts with fewer instructions."""


@dataclass(frozen=True)
class Target:
    """A set of vector instructions (`capability`) of a machine, as QEMU calls it, and definitions for CMake."""

    machine: str
    capability: str
    definitions: tuple[str, ...] = ()


TARGETS = {
    "aarch64": Target("aarch64", "portable", cpp_programs.AARCH64),
    "x86-64 portable": Target("x86_64", "portable"),
    "x86-64 avx2": Target("x86_64", "avx2"),
}


@dataclass(frozen=True)
class Work:
    """Calls of an op on `frames` frames of `size` tokens. units: tokens or windows of a call, which counts are per."""

    op: str
    frames: int
    size: tuple[int, int]
    units: int
    plan: dict[str, Any] = field(default_factory=dict)


WORK = {
    "token_norm, a token": Work("token_norm", 1, (4, 4), 16),
    "norm_pool, a window": Work("grid_pool", 1, (8, 8), 16, {"frame_strides": ()}),
    "grid_pool of even frames, a window": Work("grid_pool", 8, (8, 8), 8 * 16),
    "grid_pool of odd frames, a window": Work("grid_pool", 8, (9, 9), 8 * 16),
    "gradient of grid_pool of even frames, a window": Work("grid_pool_backward", 8, (8, 8), 8 * 16),
}


def count_instructions(log: Iterable[str]) -> int:
    """Count the executed instructions of a log of QEMU (`-d in_asm,exec,nochain`).

    A block is listed when it is translated, below "IN:", an instruction a line; bytes beyond the eighth have a line of
    their own. Its address follows in a line "Trace 0: host [flags/address/...]" each time that it is executed.
    """
    sizes: dict[int, int] = {}
    listed: list[int] = []
    total = 0
    for line in log:
        if line.startswith("Trace"):
            if listed:
                sizes[listed[0]] = len(listed)
                listed = []
            total += sizes[int(line.split("/")[1], 16)]
        elif line.startswith("IN:"):
            listed = []
        elif found := re.match(r"0x([0-9a-f]+):  [0-9a-f ]+  \S", line):
            listed.append(int(found[1], 16))
    return total


def execute(target: Target, program: str, *arguments: object) -> int:
    """Return the number of instructions that the program executes. Raises RuntimeError if it fails."""
    logged = ("-d", "in_asm,exec,nochain", "-cpu", "max")
    command = [cpp_programs.emulator(target.machine), *logged, program, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as running:
        assert running.stderr is not None
        total = count_instructions(running.stderr)
    if running.returncode:
        raise RuntimeError(f"failed: {' '.join(command)}")
    return total


def per_unit(target: Target, work: Work, dtype: str, program: str, tables: Path) -> float:
    """Return the instructions for `UNIT` channels of a token or window."""
    totals = {}
    for channels, times in product(CHANNELS, (1, 2)):
        call = (tables, "-", "-", dtype, 1, channels, 1, 1.0, 2.0, 1, 0, work.op, target.capability, times)
        totals[channels, times] = execute(target, program, *call)
    few, many = (totals[channels, 2] - totals[channels, 1] for channels in CHANNELS)
    return (many - few) / (CHANNELS[1] - CHANNELS[0]) * UNIT / work.units


def measure(targets: Sequence[str], names: Sequence[str], dtypes: Sequence[str]) -> dict[tuple[str, str, str], float]:
    """Return instructions by (name of `WORK`, dtype, name of `TARGETS`)."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tables = {name: Path(folder) / f"tables-{number}" for number, name in enumerate(names)}
        for name, path in tables.items():
            work = WORK[name]
            save_tables(grid_plan([work.frames], *work.size, **work.plan), path, gradient="backward" in work.op)
        for target_name in targets:
            target = TARGETS[target_name]
            build = cpp_programs.ROOT / "build" / f"instructions-{target.machine}"
            program = cpp_programs.build(build, "grid_pool_test", *target.definitions, *STATIC)
            for name, dtype in product(names, dtypes):
                found[name, dtype, target_name] = per_unit(target, WORK[name], dtype, program, tables[name])
    return found


def table(found: Mapping[tuple[str, str, str], float]) -> Table:
    targets = list(dict.fromkeys(target for _, _, target in found))
    shown = Table("", "dtype", box=box.MARKDOWN)
    for target in targets:
        shown.add_column(target, justify="right")
    for name, dtype in dict.fromkeys((name, dtype) for name, dtype, _ in found):
        shown.add_row(name, dtype, *(f"{found.get((name, dtype, target), math.nan):.1f}" for target in targets))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="CPUs (all)")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what is counted (all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of tokens (all)")
    given = parser.parse_args()
    lacks = cpp_programs.why_no_aarch64()
    if lacks is not None:
        print(lacks, file=sys.stderr)
        return 2
    Console(width=120).print(table(measure(given.target, given.work, given.dtype)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
