"""The machine code of a kernel: what the programs of the CUDA toolkit say of it, and the limits that it has to keep."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton
from rich import box
from rich.table import Table

from tests.support.wheels import run

Widths = dict[str, int]
"""The number of instructions for each number of bits that one of them moves per thread."""


MULTIPROCESSORS = {
    80: (64, 32, 164 << 10),
    86: (48, 16, 100 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}
"""The warps, blocks and bytes of shared memory that a multiprocessor holds, from the CUDA programming guide."""

ARCHITECTURES = (80, 90, 100)
"""The architectures that kernels are compiled for by default."""

RESERVED = 1 << 10
"""The system adds this many bytes of shared memory to those of every block."""


@dataclass(frozen=True)
class Code:
    """Instructions are counted as they stand in the code, not as often as they are executed.

    `loads` go from global memory to registers, `copies` from global to shared memory, `stores` from registers to global
    memory, and `spills` to or from local memory. `divisions` are of integers: each is some 20 instructions around a
    reciprocal of a float. `instructions` are all but those that pad the code.
    """

    loads: Widths
    copies: Widths
    stores: Widths
    atomics: int
    spills: int
    barriers: int
    divisions: int
    instructions: int


@dataclass(frozen=True)
class KernelUsage:
    """One kernel, compiled for one architecture.

    `stack` and `local` are bytes per thread, `shared` are bytes per block without those that the system reserves.
    `title` says what the kernel is compiled for. `launches` holds, for every call, the numbers of its launches that run
    this kernel. `block_warps` are the warps of a block. `resident` holds the warps that fit on a multiprocessor under
    several conditions. At least `enough_warps` have to fit, or any number if this is 0, for a general kernel. `limits`
    holds the highest count that is allowed of some instructions. `listing` is what nvdisasm prints of the kernel.
    """

    kernel: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    code: Code
    title: str = ""
    launches: dict[str, list[int]] = field(default_factory=dict)
    block_warps: list[int] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)
    enough_warps: int = 0
    limits: dict[str, int] = field(default_factory=dict)
    listing: str = ""

    @property
    def published(self) -> bool:
        """Return whether the kernel runs the published settings."""
        return self.enough_warps > 0

    @property
    def name(self) -> str:
        """The calls and their launches, or else the name of the kernel."""
        return "; ".join(f"{call} {', '.join(map(str, n))}" for call, n in self.launches.items()) or self.kernel


def limits_missed(row: KernelUsage) -> list[str]:
    """Describe the limits that a kernel misses where C is a multiple of 16.

    No kernel may spill or use atomic operations. Those of the published settings must move tokens by 128 bits or more,
    and enough of their warps must fit on a multiprocessor. A number in a plan's table is one load of 32 bits.
    """
    code, missed = row.code, []
    if row.stack or row.local or code.spills:
        missed.append(f"{row.stack} bytes of stack, {row.local} of local memory, {code.spills} accesses to them")
    if code.atomics:
        missed.append(f"{code.atomics} atomic operations")
    if not row.published:
        return missed
    loads = {bits: number for bits, number in code.loads.items() if bits != "32"}
    for kind, widths in (("loads", loads), ("copies", code.copies), ("stores", code.stores)):
        missed += [f"{number} {kind} of {bits} bits" for bits, number in widths.items() if int(bits) < 128]
    missed += ["no loads of tokens"] * (not loads | code.copies) + ["no stores of tokens"] * (not code.stores)
    counts = {"loads of 32 bits": code.loads.get("32", 0), "divisions of integers": code.divisions}
    missed += [f"{counts[what]} {what}, more than {most}" for what, most in row.limits.items() if counts[what] > most]
    few = {condition: warps for condition, warps in row.resident.items() if warps < row.enough_warps}
    return missed + [f"room for {warps} warps {condition}" for condition, warps in few.items()]


# ---- from a cubin ----


def search_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit beside Triton, in PATH or in CUDA_HOME."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    folders = (str(bundled), os.environ.get("PATH", os.defpath), f"{os.environ.get('CUDA_HOME', '')}/bin")
    return shutil.which(name, path=os.pathsep.join(folders))


def find_tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit. Raises SystemExit if there is none."""
    found = search_tool(name)
    if found is None:
        raise SystemExit(f"{name} is neither beside Triton nor in PATH nor in CUDA_HOME")
    return found


def read_cubin(cubin: Path, arch: int) -> list[KernelUsage]:
    """Return a row for every kernel in a file of machine code."""
    # the code of a kernel follows its label, and what precedes the first label belongs to no kernel
    _, *parts = re.split(r"^\.text\.(\S+):$", run(find_tool("nvdisasm"), "-c", "-ndf", cubin), flags=re.MULTILINE)
    listings = dict(zip(parts[::2], parts[1::2], strict=True))
    # from 9.0 on, the bytes that the system reserves are counted as the kernel's own
    reserved = RESERVED if arch >= 90 else 0
    rows = []
    for name, has in read_usage(run(find_tool("cuobjdump"), "--dump-resource-usage", cubin)).items():
        code, shared = read_code(listings[name]), max(has["SHARED"] - reserved, 0)
        row = KernelUsage(name, arch, has["REG"], has["STACK"], has["LOCAL"], shared, code, listing=listings[name])
        rows.append(row)
    return rows


def read_usage(report: str) -> dict[str, dict[str, int]]:
    """Read REG, STACK, SHARED, LOCAL and others of every kernel from the output of cuobjdump."""
    kernels = re.findall(r"^ *Function (\S+):\n(.+)$", report, re.MULTILINE)
    return {name: {what: int(n) for what, n in re.findall(r"(\w+):(\d+)", line)} for name, line in kernels}


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
"""Matches an address, a predicate if there is one, and the name of an instruction with its modifiers."""

KINDS = {
    **dict.fromkeys(("LDG", "LD"), "loads"),
    "LDGSTS": "copies",
    **dict.fromkeys(("STG", "ST"), "stores"),
    **dict.fromkeys(("ATOM", "ATOMG", "RED", "REDG"), "atomics"),
    **dict.fromkeys(("LDL", "STL"), "spills"),
    "BAR": "barriers",
    "I2F": "divisions",
}


def read_code(listing: str) -> Code:
    """Count the instructions in the output of nvdisasm.

    A modifier that is a number gives the width of an access, which is 32 bits if there is no such modifier.
    """
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS.values()}
    instructions = [name for name in INSTRUCTION.findall(listing) if name != "NOP"]
    for instruction in instructions:
        name, *modifiers = instruction.split(".")
        # a divisor is converted to a float that is no smaller, which takes a rounding mode that nothing else uses
        if name in KINDS and (name != "I2F" or "RP" in modifiers):
            widths = [width[1] for width in (re.fullmatch(r"[US]?(\d+)", modifier) for modifier in modifiers) if width]
            found[KINDS[name]][widths[0] if widths else "32"] += 1
    loads, copies, stores = (dict(found[kind]) for kind in ("loads", "copies", "stores"))
    rest = (found[kind].total() for kind in ("atomics", "spills", "barriers", "divisions"))
    return Code(loads, copies, stores, *rest, instructions=len(instructions))


def resident_warps(arch: int, block_warps: int, registers: int, shared: int) -> tuple[int, int]:
    """Return how many warps, in whole blocks, fit on a multiprocessor by its registers and by its shared memory.

    A multiprocessor has four parts with 16384 registers each. A warp belongs to one part and takes 32 times the
    registers of a thread, rounded up to a multiple of 256. At 128 a thread that is 4096: four warps a part, 16 in all,
    two blocks of 8. A block takes its shared memory and the `RESERVED` bytes, rounded up to a multiple of 128. Both
    numbers keep to the warps and blocks in `MULTIPROCESSORS`.
    """
    all_warps, all_blocks, all_shared = MULTIPROCESSORS[arch]
    most = min(all_blocks, all_warps // block_warps)
    by_registers = 16384 // (256 * math.ceil(32 * registers / 256)) * 4 // block_warps
    by_shared = all_shared // (128 * math.ceil((shared + RESERVED) / 128))
    return min(most, by_registers) * block_warps, min(most, by_shared) * block_warps


# ---- a table ----

COLUMNS: dict[str, Callable[[KernelUsage], object]] = {
    "sm": lambda row: row.arch,
    "warps": lambda row: " / ".join(map(str, row.block_warps)),
    "registers": lambda row: row.registers,
    "local": lambda row: row.stack + row.local,
    "spills": lambda row: row.code.spills,
    "shared": lambda row: row.shared,
    "loads": lambda row: show_widths(row.code.loads),
    "copies": lambda row: show_widths(row.code.copies),
    "stores": lambda row: show_widths(row.code.stores),
    "barriers": lambda row: row.code.barriers,
    "instructions": lambda row: row.code.instructions,
    "resident": lambda row: " / ".join(map(str, row.resident.values())),
}
LEGEND = """\
warps: of a block. local: bytes of local memory a thread, stack included. spills: accesses to it. shared: bytes a block.
loads, copies (to shared memory), stores: instructions × bits a thread; loads of 32 bits read tables too. barriers,
instructions: in the code. resident: warps of a multiprocessor"""


def show_widths(widths: Widths) -> str:
    return ", ".join(f"{widths[bits]}×{bits}" for bits in sorted(widths, key=int))


def draw(rows: Sequence[KernelUsage]) -> Table:
    """Draw a table of rows that have one title. A kernel that misses a limit is red."""
    table = Table(title=rows[0].title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("kernel, or calls and which of their launches", min_width=36)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("loads", "copies", "stores") else "right", no_wrap=True)
    names = {(not row.published, row.name): row.name + " (general)" * (not row.published) for row in rows}
    for key, name in sorted(names.items()):
        kernels = [row for row in rows if (not row.published, row.name) == key]
        cells = ("\n".join(str(show(row)) for row in kernels) for show in COLUMNS.values())
        table.add_row(name, *cells, end_section=True, style="red" if any(map(limits_missed, kernels)) else None)
    return table
