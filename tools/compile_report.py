"""What the triton backend would launch, compiled for GPUs that need not be there, and what ptxas made of it.

`python -m tools.compile_report` prints a table for every shape: registers, memory that is spilled to, widths of
accesses to global memory, barriers, and how many warps fit on a multiprocessor. Launches come from the backend's own
`prepare`, and Triton compiles them as it does before a launch, for tensors that have a shape and no memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from stgridpool_kernels.backends import triton_kernels
from stgridpool_kernels.backends.triton_kernels import fused
from stgridpool_kernels.backends.triton_kernels.config import FusedConfig
from stgridpool_kernels.plan import grid_plan

Shape = tuple[int, ...]
Widths = dict[str, int]
"""Instructions by the bits that a thread moves with one."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

SHAPES = ((64, 27, 27, 3584), (64, 24, 24, 4096), (64, 27, 27, 1152))
"""(T, H, W, C) of LLaVA-Video, of a 24 × 24 tower with 4096 channels, and of SigLIP tokens before their projection."""


@dataclass(frozen=True)
class Case:
    """A call. published: with the settings that have kernels of their own, of which `limits_missed` asks most.
    gradient: of the call in x, instead of the call."""

    op: str
    arguments: Mapping[str, Any]
    published: bool = False
    gradient: bool = False

    @property
    def name(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        call = f"{self.op}({shown})" if shown else self.op
        return f"gradient of {call}" if self.gradient else call

    @property
    def of_gradient(self) -> Case:
        return replace(self, gradient=True)

    def enough_warps(self, shape: Shape, dtype: str, arch: int) -> int:
        """How many are to fit on a multiprocessor: more in the forward where no column is carried; 0 if any do."""
        if not self.published:
            return 0
        no_column = self.op == "norm_pool" or shape[2] % 2 == 0
        small = dtype != "fp32" and shape[3] <= 4096 and arch < 100
        return MORE_WARPS if small and no_column and not self.gradient else ENOUGH_WARPS


def _with_gradients(*cases: Case) -> tuple[Case, ...]:
    """token_norm has no kernel for its own."""
    return (*cases, *(case.of_gradient for case in cases if case.op != "token_norm"))


PUBLISHED = _with_gradients(
    Case("grid_pool", {}, published=True),
    Case("grid_pool", {"ceil_mode": True}, published=True),
    Case("norm_pool", {}, published=True),
)
GENERAL = _with_gradients(
    Case("grid_pool", {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case("grid_pool", {"resize": "bilinear"}),
    Case("grid_pool", {"output_size": (10, 10)}),
    Case("temporal_grid", {}),
    Case("token_norm", {}),
)
NORMS = _with_gradients(
    *(
        Case(op, {**windows, **norm})
        for op, windows in (("grid_pool", {}), ("norm_pool", {}), ("norm_pool", {"kernel_size": 3}), ("token_norm", {}))
        for norm in ({"norm_type": 1.0}, {"norm_type": float("inf")}, {"norm_type": 3.0, "normalize_norm": False})
    )
)
"""Of everything that kernels are specialised for, the one that no shape and no window brings about."""

SETTINGS: dict[str, Any] = {"temperature": 1.0, "norm_type": 2.0, "normalize_norm": True}
OTHER_HALF: dict[str, dict[str, Any]] = {"norm_pool": {"frame_strides": ()}, "temporal_grid": {"kernel_size": 1}}
"""What a plan is told of the half of grid_pool that an op leaves out."""


@dataclass(frozen=True)
class Multiprocessor:
    """What one of an architecture holds at once, by the CUDA programming guide's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10),
    86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10),
    120: Multiprocessor(48, 24, 100 << 10),
}
ARCHITECTURES = (80, 90, 100)

RESERVED = 1 << 10
"""Bytes of shared memory that the system adds to those of every block."""

ENOUGH_WARPS = 16
"""At 64 values of 16 bits a thread, these hold 64 KiB: twice what has to be on its way to hide the way to memory."""

MORE_WARPS = 24
"""What 80 registers a thread leave room for."""


@dataclass(frozen=True)
class Code:
    """Instructions, counted as they stand in the code, not as often as they are executed.

    loads, copies, stores: global memory to registers, global to shared memory, registers to global memory. spills:
    accesses to local memory. divisions: of integers, each some 20 instructions around a reciprocal of a float.
    instructions: all but those that pad the code.
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
    """One kernel for one architecture. launches: numbers of the launches that are this kernel, by call. enough_warps:
    how many are to fit on a multiprocessor, 0 for a general kernel.

    stack, local: bytes a thread. shared: bytes a block, without those reserved. warps_by_…: of one multiprocessor, if
    nothing but registers or nothing but shared memory were scarce.
    """

    launches: dict[str, list[int]]
    enough_warps: int
    kernel: str
    shape: Shape
    dtype: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    local: int
    shared: int
    code: Code
    warps_by_registers: int
    warps_by_shared: int

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> KernelUsage:
        """The row whose `asdict` was written to JSON."""
        return KernelUsage(**{**found, "shape": tuple(found["shape"]), "code": Code(**found["code"])})

    @property
    def published(self) -> bool:
        """Whether it runs the published settings."""
        return self.enough_warps > 0

    @property
    def name(self) -> str:
        return "; ".join(f"{call} {', '.join(map(str, numbers))}" for call, numbers in self.launches.items())

    @property
    def file_name(self) -> str:
        call, numbers = next(iter(self.launches.items()))
        launch = re.sub(r"\W+", "-", f"{call} {numbers[0]}")
        return f"{self.kernel}.{launch}.{show_shape(self.shape)}.{self.dtype}.sm_{self.arch}.cubin"


def limits_missed(row: KernelUsage) -> list[str]:
    """In what a kernel is not as it should be where C is a multiple of 16; empty if it is.

    No kernel may spill. Those of the published settings must move all tokens 16 bytes at a time, without atomic
    operations and without dividing integers, and enough of them must fit on a multiprocessor.
    """
    code = row.code
    missed = []
    if row.stack or row.local or code.spills:
        missed.append(f"{row.stack} bytes of stack, {row.local} of local memory, {code.spills} accesses to them")
    if not row.published:
        return missed
    # a number in a table is one load of 32 bits
    for kind, widths in (("loads", code.loads.keys() - {"32"}), ("copies", code.copies), ("stores", code.stores)):
        narrow = [int(bits) for bits in widths if int(bits) < 128]
        if narrow:
            missed.append(f"{kind} of {min(narrow)} bits")
    if not code.stores or not code.copies.keys() | code.loads.keys() - {"32"}:
        missed.append("no loads or no stores of tokens were found")
    if code.atomics:
        missed.append(f"{code.atomics} atomic operations")
    if code.divisions:
        missed.append(f"{code.divisions} divisions of integers")
    if min(row.warps_by_registers, row.warps_by_shared) < row.enough_warps:
        missed.append(f"{row.warps_by_registers} warps by registers, {row.warps_by_shared} by shared memory")
    return missed


# ---- from a call to compiled kernels ----


def configured(choice: Mapping[str, Any]) -> AbstractContextManager[object]:
    """While it is entered, fused kernels are cut as the table says but for these fields of FusedConfig."""
    usual = fused.fused_config
    return patch.object(fused, "fused_config", lambda *given: replace(usual(*given), **choice))


class AbsentDevice:
    """Stands in for Triton's driver while kernels are compiled and not run. `arch` is the number of the device too: a
    kernel asks for a device's target once and keeps it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_call(case: Case, x: Tensor, arch: int) -> list[Any]:
    """The compiled kernels of all launches of a call on tokens like x, on device "meta", in order.

    From here on Triton takes `arch` for the architecture of all devices of this process.
    """
    dtype = x.dtype
    out: Tensor = getattr(torch.ops.stgp, case.op)(x, **case.arguments)
    settings = SETTINGS | {name: value for name, value in case.arguments.items() if name in SETTINGS}
    geometry = {name: value for name, value in case.arguments.items() if name not in SETTINGS}
    T, H, W, _ = x.shape[-4:]
    counts = geometry.pop("frame_counts", [T] * math.prod(x.shape[:-4]))
    plan = None if case.op == "token_norm" else grid_plan(counts, H, W, **OTHER_HALF.get(case.op, {}), **geometry)

    values, capability = tuple(settings.values()), divmod(arch, 10)
    if case.gradient:
        grad, out = out, torch.empty_like(x)
        call = triton_kernels.prepare_backward(case.op, grad, x, plan, values, out, capability)
    else:
        grad, call = None, triton_kernels.prepare(case.op, x, plan, values, out, capability)
    scratch = torch.empty(call.scratch, dtype=dtype, device="meta") if call.scratch else None
    gradients = torch.empty(call.gradients, dtype=torch.float32, device="meta") if call.gradients else None
    tensors = (x, out, scratch, call.tables.tensor if call.tables else None, grad, gradients)
    triton.runtime.driver.set_active(AbsentDevice(arch))
    return [
        # what a launch does the first time, up to the launch itself
        launch.kernel.warmup(*tensors[: launch.tensors], *launch.arguments, grid=launch.grid, **launch.options)
        for launch in call.launches
    ]


def compile_rows(
    cases: Iterable[Case], shape: Shape, dtype: str, arch: int, cubins: Path | None = None
) -> Iterable[KernelUsage]:
    """A row for every kernel that the calls launch, where what compiles to the same code is one: a size that is a
    multiple of 16 makes Triton compile again, often without a difference. `cubins`: the folder for the code."""
    kernels: dict[bytes, Any] = {}
    launches: dict[bytes, dict[str, list[int]]] = {}
    enough: dict[bytes, int] = {}
    x = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    for case in cases:
        for number, kernel in enumerate(compile_call(case, x, arch), 1):
            cubin = kernel.kernel
            kernels.setdefault(cubin, kernel)
            launches.setdefault(cubin, {}).setdefault(case.name, []).append(number)
            enough[cubin] = max(case.enough_warps(shape, dtype, arch), enough.get(cubin, 0))

    for cubin, kernel in kernels.items():
        usage = read_usage(run_tool("cuobjdump", cubin, "--dump-resource-usage"))
        code = read_code(run_tool("nvdisasm", cubin, "-c", "-ndf"))
        # from 9.0 on, what the system adds is counted as the kernel's own
        static = max(usage["SHARED"] - (RESERVED if arch >= 90 else 0), 0)
        shared = kernel.metadata.shared + static
        num_warps = kernel.metadata.num_warps
        row = KernelUsage(
            launches[cubin],
            enough[cubin],
            kernel.name,
            shape,
            dtype,
            arch,
            num_warps,
            usage["REG"],
            usage["STACK"],
            usage["LOCAL"],
            shared,
            code,
            *resident_warps(arch, num_warps, usage["REG"], shared),
        )
        if cubins is not None:
            (cubins / row.file_name).write_bytes(cubin)
        yield row


# ---- what is in a cubin ----


@cache
def find_tool(name: str) -> str:
    """Where a program of the CUDA toolkit is: with Triton, else in PATH."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if os.access(bundled, os.X_OK) else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is neither an executable in {bundled.parent} nor in PATH")
    return found


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """What a program prints of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        done = subprocess.run([find_tool(name), *options, file], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def read_usage(report: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, … of the only function in what `cuobjdump --dump-resource-usage` prints."""
    functions = re.findall(r"^ *Function .+:\n(.+)$", report, re.MULTILINE)
    if len(functions) != 1:
        raise ValueError(f"expected the resources of one function, found {len(functions)} in {report!r}")
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", functions[0])}


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
"""An address, maybe a predicate, and the name of an instruction with its modifiers."""

KINDS = {
    "LDG": "loads",
    "LD": "loads",
    "LDGSTS": "copies",
    "STG": "stores",
    "ST": "stores",
    "ATOM": "atomics",
    "ATOMG": "atomics",
    "RED": "atomics",
    "REDG": "atomics",
    "LDL": "spills",
    "STL": "spills",
    "BAR": "barriers",
    "I2F": "divisions",
}


def read_code(listing: str) -> Code:
    """Counts in what `nvdisasm` prints. A modifier that is a number gives the width, without one it is 32 bits."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS.values()}
    instructions = [name for name in INSTRUCTION.findall(listing) if name != "NOP"]
    for instruction in instructions:
        name, *modifiers = instruction.split(".")
        # an integer that is divided by is converted to a float no smaller than it, with a rounding of its own
        if name in KINDS and (name != "I2F" or "RP" in modifiers):
            widths = [width[1] for width in (re.fullmatch(r"[US]?(\d+)", modifier) for modifier in modifiers) if width]
            found[KINDS[name]][widths[0] if widths else "32"] += 1
    loads, copies, stores = (dict(found[kind]) for kind in ("loads", "copies", "stores"))
    rest = (sum(found[kind].values()) for kind in ("atomics", "spills", "barriers", "divisions"))
    return Code(loads, copies, stores, *rest, instructions=len(instructions))


def resident_warps(arch: int, num_warps: int, registers: int, shared: int) -> tuple[int, int]:
    """How many warps, in whole blocks, are on a multiprocessor at once, by its registers and by its shared memory.

    A multiprocessor has four parts with 16384 registers each. A warp belongs to one part and takes 32 times the
    registers of a thread, rounded up to a multiple of 256. At 128 a thread that is 4096: four warps a part, 16 in all,
    two blocks of 8. A block takes its shared memory and the `RESERVED` bytes, rounded up to a multiple of 128. Both
    numbers keep to what `MULTIPROCESSORS` says of warps and blocks.
    """
    has = MULTIPROCESSORS[arch]
    most = min(has.blocks, has.warps // num_warps)
    by_registers = 16384 // _round_up(32 * registers, 256) * 4 // num_warps
    by_shared = has.shared // _round_up(shared + RESERVED, 128)
    return min(most, by_registers) * num_warps, min(most, by_shared) * num_warps


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# ---- the command ----


def show_shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def show_widths(widths: Widths) -> str:
    return ", ".join(f"{widths[bits]}×{bits}" for bits in sorted(widths, key=int))


def draw(rows: Sequence[KernelUsage]) -> Table:
    """Rows of one shape and dtype."""
    table = Table(title=f"{show_shape(rows[0].shape)} {rows[0].dtype}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("calls, and which of their launches", min_width=36)
    for name in ("sm", "warps", "registers", "stack", "spills", "shared"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("loads", "copies", "stores"):
        table.add_column(name, no_wrap=True)
    for name in ("barriers", "instructions", "resident"):
        table.add_column(name, justify="right", no_wrap=True)
    ordered = sorted(rows, key=lambda row: (not row.published, row.name))
    for (published, name), group in groupby(ordered, key=lambda row: (row.published, row.name)):
        kernels = list(group)
        lines = [
            (
                *map(str, (row.arch, row.num_warps, row.registers, row.stack + row.local, row.code.spills, row.shared)),
                *map(show_widths, (row.code.loads, row.code.copies, row.code.stores)),
                str(row.code.barriers),
                str(row.code.instructions),
                f"{row.warps_by_registers} / {row.warps_by_shared}",
            )
            for row in kernels
        ]
        table.add_row(
            name if published else f"{name} (general)",
            *map("\n".join, zip(*lines, strict=True)),
            end_section=True,
            style="red" if any(map(limits_missed, kernels)) else None,
        )
    return table


LEGEND = """\
warps: of a block. stack: bytes a thread. spills: accesses to it. shared: bytes a block. loads, copies (to shared
memory), stores: instructions × bits a thread. barriers, instructions: in the code. resident: warps of a multiprocessor,
by registers and by shared memory."""


def read_shape(text: str) -> Shape:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected T x H x W x C without spaces, as 64x27x27x3584, got {text!r}")
    return tuple(map(int, sizes))


def read_choice(text: str) -> tuple[str, int | bool | None]:
    """A field of FusedConfig and its value."""
    name, _, value = text.partition("=")
    known = {field.name for field in fields(FusedConfig)}
    with suppress(ValueError):
        read = json.loads(value.lower().replace("none", "null"))
        if name in known and (read is None or isinstance(read, int)):
            return name, read
    raise argparse.ArgumentTypeError(f"expected one of {', '.join(sorted(known))}, = and a number, got {text!r}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compile_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", type=read_shape, default=SHAPES, metavar="TxHxWxC")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--arch", nargs="+", type=int, choices=MULTIPROCESSORS, default=ARCHITECTURES)
    parser.add_argument(
        "--calls",
        choices=("grid_pool", "published", "general", "all"),
        default="general",
        help="grid_pool: that alone; published: all at the published settings; general: and some that take general "
        "kernels; all: and all norms",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        type=read_choice,
        default=[],
        metavar="FIELD=VALUE",
        help="fused kernels by another configuration, as mosaic_cells=3 (triton_kernels/config.py)",
    )
    parser.add_argument("--cubins", type=Path, metavar="DIR", help="write the machine code of every kernel there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    given = parser.parse_args(arguments)
    if triton_kernels.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing, run without it")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {given.json.absolute().parent}")
    if given.cubins is not None:
        try:
            given.cubins.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--cubins: {error}")
    general = GENERAL * (given.calls in ("general", "all")) + NORMS * (given.calls == "all")
    cases = PUBLISHED[:1] if given.calls == "grid_pool" else PUBLISHED + general

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"triton {triton.__version__}. {LEGEND}\n", highlight=False)
    every: list[KernelUsage] = []
    for shape in given.shape:
        for dtype in given.dtype:
            rows: list[KernelUsage] = []
            for arch in given.arch:
                with Console(stderr=True).status(f"compiling {show_shape(shape)} {dtype} for sm_{arch}"):
                    try:
                        with configured(dict(given.config)):
                            rows += compile_rows(cases, shape, dtype, arch, given.cubins)
                    except ValueError as error:
                        parser.error(f"{show_shape(shape)}: {error}")
            console.print(draw(rows))
            for row in rows:
                for missed in limits_missed(row):
                    console.print(f"sm_{row.arch} {row.name}: {missed}", style="red", highlight=False)
            every += rows
    if given.json is not None:
        text = json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in every]}, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
