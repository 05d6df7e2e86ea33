"""What nvcc makes of csrc/cuda, for GPUs that need not be there.

`python -m tools.cuda_check` compiles every file for several architectures and prints registers, local memory,
shared memory, widths of accesses to global memory and resident warps of every kernel. It fails if one spills, or if a
kernel of the published settings moves tokens in other than 128-bit pieces or leaves room for too few warps.

Kernels read numbers of the plan's tables too: these are loads of 32 bits, at most `TABLE_LOADS` of a kernel. If tokens
were loaded by 32 bits, there would be one for every word of a thread's 64 channels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.support.cuda_emulation import KERNELS, ROOT, content_hash
from tools.compile_report import (
    ARCHITECTURES,
    ENOUGH_WARPS,
    MULTIPROCESSORS,
    RESERVED,
    Code,
    find_tool,
    read_code,
    resident_warps,
    show_widths,
)

BUILD = ROOT / "build" / "cuda_check"
FLAGS = ("-std=c++17", "-O3", "-cubin")

TABLE_LOADS = {"grid_pool_kernel": 10, "grid_pool_backward_kernel": 24}
"""Maximum number of 32-bit loads in a kernel of the published settings. The backward reads consumers several times."""

CHANNELS = (1152, 3584, 4096)
"""Of SigLIP, of LLaVA-Video, and of a 24 × 24 tower: for their blocks, warps are counted."""

FUSED = re.compile(
    r"\b(?P<name>grid_pool_kernel|grid_pool_backward_kernel)<(?P<type>\w+), \(stgp::cuda::Access\)(?P<access>\d), "
    r"(?P<l2>true|false), (?P<mosaic>true|false), (?P<halo>true|false)>"
)
"""Kernels of the fused form by their template arguments. Access 0 is by pieces of 128 bits."""


@dataclass(frozen=True)
class KernelUsage:
    """One kernel for one architecture. stack, local: bytes a thread. shared: static bytes a block."""

    kernel: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    code: Code

    @property
    def published(self) -> bool:
        """Whether it runs the published settings on tokens in 128-bit pieces."""
        found = FUSED.search(self.kernel)
        return found is not None and found["access"] == "0" and found["l2"] == "true"

    def warps(self, C: int) -> int:
        """How many are on a multiprocessor at once, in blocks for tokens of C channels."""
        found = FUSED.search(self.kernel)
        backward = found is not None and found["name"] == "grid_pool_backward_kernel"
        # blocks of the backward are of a power of two of warps whatever the type
        threads = block_threads(C, 4 if backward or "<float" in self.kernel else 2)
        # the carried sums of a walk over odd sizes, 64 bytes a thread
        walks = found is not None and not backward and found["mosaic"] == "false" and found["halo"] == "true"
        return min(resident_warps(self.arch, threads // 32, self.registers, self.shared + 64 * threads * walks))


def block_threads(C: int, value_bytes: int) -> int:
    """`block_threads` of csrc/cuda/launch.cuh."""
    warps = -(-min(C, 8192) // 512)
    if value_bytes == 4:
        warps = 1 << (warps - 1).bit_length()
    return 32 * warps


def limits_missed(row: KernelUsage) -> list[str]:
    """In what a kernel is not as it should be; empty if it is."""
    code, missed = row.code, []
    if row.stack or row.local or code.spills:
        missed.append(f"{row.stack} bytes of stack, {row.local} of local memory, {code.spills} accesses to them")
    if code.atomics:
        missed.append(f"{code.atomics} atomic operations")
    found = FUSED.search(row.kernel)
    if found is None or not row.published:
        return missed
    for kind, widths in (("loads", code.loads), ("stores", code.stores)):
        if not widths.get("128"):
            missed.append(f"no {kind} of 128 bits")
        allowed = {"128", "32"} if kind == "loads" else {"128"}
        missed += [f"{widths[bits]} {kind} of {bits} bits" for bits in sorted(widths.keys() - allowed)]
    if code.loads.get("32", 0) > TABLE_LOADS[found["name"]]:
        missed.append(f"{code.loads['32']} loads of 32 bits, tables need at most {TABLE_LOADS[found['name']]}")
    for C in CHANNELS:
        if row.warps(C) < ENOUGH_WARPS:
            missed.append(f"room for {row.warps(C)} warps with {C} channels")
    return missed


def find_nvcc() -> str | None:
    """nvcc in PATH, or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def compile_file(source: Path, arch: int) -> Path:
    """A file's machine code, compiled unless what it is made of has been before."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc is neither in PATH nor in CUDA_HOME")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    headers = [file for folder in (source.parent, source.parent.parent) for file in folder.glob("*.*h")]
    name = content_hash([source, *sorted(headers)], version, *FLAGS, str(arch))
    cubin = BUILD / f"{source.stem}.sm_{arch}.{name}.cubin"
    if not cubin.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        made = cubin.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [nvcc, *FLAGS, f"-arch=sm_{arch}", "-o", made, source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            raise SystemExit(f"nvcc failed:\n{done.stdout.decode()}")
        os.replace(made, cubin)
    return cubin


def read_rows(cubin: Path, arch: int) -> list[KernelUsage]:
    """A row for every kernel in a cubin."""
    usage = _output(find_tool("cuobjdump"), "--dump-resource-usage", cubin)
    listing = _output(find_tool("nvdisasm"), "-c", "-ndf", cubin)
    # every kernel's code follows a label; what is before the first is none's
    _, *parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    codes = dict(zip(parts[::2], map(read_code, parts[1::2]), strict=True))
    rows = []
    for name, resources in re.findall(r"^ *Function (\S+):\n(.+)$", usage, re.MULTILINE):
        found = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", resources)}
        shared = max(found["SHARED"] - (RESERVED if arch >= 90 else 0), 0)
        kernel = _output(find_tool("c++filt"), name).strip().removeprefix("void ").split(">(")[0] + ">"
        kernel = re.sub(r"stgp::cuda::\(anonymous namespace\)::", "", kernel)
        rows.append(KernelUsage(kernel, arch, found["REG"], found["STACK"], found["LOCAL"], shared, codes[name]))
    return rows


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def check(sources: Iterable[Path], architectures: Iterable[int], jobs: int = 2) -> list[KernelUsage]:
    """Rows of all kernels in all files."""
    architectures = list(architectures)
    work = [(source, arch) for source in sources for arch in architectures]
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda job: read_rows(compile_file(*job), job[1]), work)
        return [row for rows in found for row in rows]


def draw(rows: Sequence[KernelUsage]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("kernel", min_width=36)
    for name in ("sm", "registers", "stack", "local", "spills", "shared"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("loads", "stores"):
        table.add_column(name, no_wrap=True)
    table.add_column("warps", justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (not row.published, row.kernel, row.arch)):
        table.add_row(
            row.kernel.replace("stgp::cuda::", ""),
            *map(str, (row.arch, row.registers, row.stack, row.local, row.code.spills, row.shared)),
            *map(show_widths, (row.code.loads, row.code.stores)),
            " / ".join(str(row.warps(C)) for C in CHANNELS) if row.published else "",
            style="red" if limits_missed(row) else None,
        )
    return table


LEGEND = """\
stack, local: bytes a thread. spills: accesses to them. shared: static bytes a block. loads, stores: instructions × bits
a thread; loads of 32 bits read tables too. warps: resident on a multiprocessor, for """


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cuda_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=MULTIPROCESSORS, default=ARCHITECTURES)
    parser.add_argument("--sources", nargs="+", type=Path, default=sorted(KERNELS.glob("*.cu")), metavar="FILE")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    given = parser.parse_args(arguments)

    rows = check(given.sources, given.arch, given.jobs)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(LEGEND + ", ".join(map(str, CHANNELS)) + " channels.", highlight=False)
    console.print(draw(rows))
    missed = [(row, what) for row in rows for what in limits_missed(row)]
    for row, what in missed:
        console.print(f"sm_{row.arch} {row.kernel}: {what}", style="red", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
