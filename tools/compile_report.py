"""Report of what the kernels of the backends triton and cuda compile to, for GPUs that need not be there.

`python -m tools.compile_report` compiles what calls would launch, and prints a table for every shape: registers,
spills, shared memory, widths of accesses to global memory, barriers, and how many warps fit on a multiprocessor. The
launches are those of the backend's own `prepare`. Triton compiles them as it does before a launch, for tensors that
have a shape and no memory. `--backend cuda` prints what nvcc makes of all kernels in csrc/cuda. Either prints how many
warp instructions the calls at the published settings execute on GPUs of compute capability 9.0.

The exit code is 1 if a kernel misses a limit, and such a kernel is red; otherwise it is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich.console import Console
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.workloads import DTYPES
from stgridpool_kernels.backends import triton_kernels
from stgridpool_kernels.backends.triton_kernels import fused
from stgridpool_kernels.backends.triton_kernels.config import MAX_BLOCK, FusedConfig
from stgridpool_kernels.backends.triton_kernels.launch import CallSpec, PreparedCall
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan import GridPlan, grid_plan
from tests.support.cuda_emulation import KERNELS, ROOT, content_hash, short_kernel_name
from tests.support.wheels import run
from tools.execution_report import EXECUTION_LEGEND, PREDICTED_ARCH, ExecutedCall, ExecutedLaunch, show
from tools.launch_programs import cuda_launches, triton_programs
from tools.machine_code import (
    ARCHITECTURES,
    LEGEND,
    MULTIPROCESSORS,
    KernelUsage,
    draw,
    find_tool,
    limits_missed,
    read_cubin,
    resident_warps,
)

Shape = tuple[int, ...]

SHAPES = ((64, 27, 27, 3584), (64, 24, 24, 4096), (64, 27, 27, 1152))
"""The (T, H, W, C) of LLaVA-Video, of a 24 × 24 tower with 4096 channels, and of SigLIP tokens before projection."""

WIDE = (32, 20, 36, 16384)
"""The (T, H, W, C) of Qwen3-VL-8B, whose tokens are joined with those of three levels along the channels."""

WIDE_NORM = 4096
"""The number of channels of the norm in calls on tokens that have more channels than a block of the fused kernels."""

ENOUGH_WARPS, MORE_WARPS = 16, 24
"""With 64 values of 16 bits a thread, 16 warps hold 64 KiB: twice what has to be in flight to hide memory latency.

80 registers a thread leave room for 24.
"""


@dataclass(frozen=True)
class Case:
    """A call, or its gradient in x. A published call has the settings that the specialised kernels are for."""

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

    def enough_warps(self, kernel: str, shape: Shape, dtype: str, arch: int) -> int:
        """Return how many warps of a kernel have to fit on a multiprocessor: more in a forward without a halo."""
        if not self.published:
            return 0
        no_halo = kernel == "windows_kernel" or (shape[1] % 2 == 0 and shape[2] % 2 == 0)
        small = dtype != "fp32" and shape[3] <= 4096 and arch < 100
        return MORE_WARPS if small and no_halo and not self.gradient else ENOUGH_WARPS


def _with_gradients(*cases: Case) -> tuple[Case, ...]:
    """Add the gradients of all cases except token_norm, whose gradient has no kernel."""
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
        for norm in (
            {"norm_type": 1.0},
            {"norm_type": float("inf")},
            {"norm_type": 3.0, "normalize_norm": False},
            *({"norm_type": p, "norm_channels": 8} for p in (2.0, 1.0, float("inf"), 3.0)),
        )
    )
)
"""Kernels are specialised for the norm too, and for whether it runs over all channels, whatever the shape and windows.

The number of channels of the norm is an argument of a kernel: another number compiles nothing.
"""

SETTINGS: dict[str, Any] = {"temperature": 1.0, "norm_type": 2.0, "normalize_norm": True, "norm_channels": None}
OTHER_HALF: dict[str, dict[str, Any]] = {"norm_pool": {"frame_strides": ()}, "temporal_grid": {"kernel_size": 1}}
"""Arguments of a plan that switch off the half of grid_pool which an op leaves out."""


# ---- the backend triton ----


def configured(choice: Mapping[str, Any]) -> AbstractContextManager[object]:
    """Replace these fields of FusedConfig, whatever its table says, while the context is entered."""
    usual = fused.fused_config
    return patch.object(fused, "fused_config", lambda *given: replace(usual(*given), **choice))


def prepare_call(case: Case, x: Tensor, capability: tuple[int, int] | None) -> tuple[PreparedCall, list[Tensor | None]]:
    """Return a call on tokens like x, a tensor on the device "meta", and the tensors that its launches take.

    capability: compute capability of an NVIDIA GPU, None for any other GPU.
    """
    dtype = x.dtype
    out: Tensor = getattr(torch.ops.stgp, case.op)(x, **case.arguments)
    settings = SETTINGS | {name: value for name, value in case.arguments.items() if name in SETTINGS}
    plan = plan_of(case, x.shape)
    weighting = None if case.op == "temporal_grid" else Weighting.of(settings, x.shape[-1])
    grad, out = (out, torch.empty_like(x)) if case.gradient else (None, out)
    name = "grid_pool" if case.op == "norm_pool" else case.op
    prepare = getattr(triton_kernels, f"prepare_{name}_backward" if case.gradient else f"prepare_{name}")
    call = prepare(CallSpec(x, out, plan, weighting, grad, capability=capability))
    scratch = torch.empty(call.scratch, dtype=dtype, device="meta") if call.scratch else None
    gradients = torch.empty(call.gradients, dtype=torch.float32, device="meta") if call.gradients else None
    return call, [x, out, scratch, call.tables.tensor if call.tables else None, grad, gradients]


def plan_of(case: Case, shape: Sequence[int]) -> GridPlan | None:
    """Return the plan of a call on tokens of this shape, None for token_norm."""
    if case.op == "token_norm":
        return None
    T, H, W, _ = shape[-4:]
    geometry = {name: value for name, value in case.arguments.items() if name not in SETTINGS}
    counts = geometry.pop("frame_counts", [T] * math.prod(shape[:-4]))
    return grid_plan(counts, H, W, **OTHER_HALF.get(case.op, {}), **geometry)


def compile_call(case: Case, x: Tensor, arch: int) -> list[Any]:
    """Compile all launches of a call on tokens like x, a tensor on the device "meta", and return them in order.

    From here on Triton takes `arch` for the architecture of all devices of this process.
    """
    return compile_launches(*prepare_call(case, x, divmod(arch, 10)), GPUTarget("cuda", arch, 32), arch)


def compile_launches(call: PreparedCall, tensors: Sequence[Tensor | None], target: GPUTarget, device: int) -> list[Any]:
    """Compile all launches of a prepared call for a target, and return them in order.

    device: number of the device that Triton takes for the current one, another for each target of this process, since a
    kernel asks for the target of a device once.
    """
    driver = SimpleNamespace(get_current_device=lambda: device, get_current_stream=lambda device: 0)
    driver.get_current_target = lambda: target
    triton.runtime.driver.set_active(driver)
    return [
        # a warmup is what a launch does the first time, up to the launch itself
        launch.kernel.warmup(*launch.given(tensors), grid=launch.grid, **launch.options)
        for launch in call.launches
    ]


def compile_rows(
    cases: Sequence[Case], shape: Shape, dtype: str, arch: int, cubins: Path
) -> tuple[list[KernelUsage], list[ExecutedCall]]:
    """Return a row for every kernel that the calls launch, and what published calls execute.

    The machine code of every kernel is left in the folder `cubins`. Kernels with the same code are one: Triton compiles
    again for a size that is a multiple of 16, often without a difference.
    """
    compiled: dict[str, list[Any]] = {}
    kernels: dict[bytes, tuple[Any, list[tuple[Case, int]]]] = {}  # by machine code
    x = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    for case in cases:
        compiled[case.name] = compile_call(case, x, arch)
        for number, kernel in enumerate(compiled[case.name], 1):
            kernels.setdefault(kernel.kernel, (kernel, []))[1].append((case, number))

    rows: dict[bytes, KernelUsage] = {}
    for cubin, (kernel, runs) in kernels.items():
        launches: dict[str, list[int]] = {}
        for case, number in runs:
            launches.setdefault(case.name, []).append(number)
        first = re.sub(r"\W+", "-", f"{runs[0][0].name} {runs[0][1]}")
        file = cubins / f"{kernel.name}.{first}.{show_shape(shape)}.{dtype}.sm_{arch}.cubin"
        file.write_bytes(cubin)
        (row,) = read_cubin(file, arch)
        warps, shared = kernel.metadata.num_warps, row.shared + kernel.metadata.shared
        fit = resident_warps(arch, warps, row.registers, shared)
        rows[cubin] = replace(
            row,
            shared=shared,
            title=f"{show_shape(shape)} {dtype}",
            launches=launches,
            block_warps=[warps],
            resident=dict(zip(("by registers", "by shared memory"), fit, strict=True)),
            enough_warps=max(case.enough_warps(kernel.name, shape, dtype, arch) for case, _ in runs),
            limits={"divisions of integers": 0},
        )
    calls = [
        executed(case, x, [rows[kernel.kernel] for kernel in compiled[case.name]])
        for case in counted(cases, shape, arch)
    ]
    return list(rows.values()), calls


def counted(cases: Iterable[Case], shape: Shape, arch: int) -> list[Case]:
    """Return the calls whose executed instructions are counted: those of the fused form at the published settings."""
    return [
        case
        for case in cases
        if case.published and not case.gradient and arch == PREDICTED_ARCH and shape[3] <= MAX_BLOCK
    ]


def executed(case: Case, x: Tensor, rows: Sequence[KernelUsage]) -> ExecutedCall:
    """Return what a call on tokens like x executes. rows: those of the kernels of its launches, in order."""
    plan, (call, _) = plan_of(case, x.shape), prepare_call(case, x, divmod(PREDICTED_ARCH, 10))
    launches = [
        ExecutedLaunch.of(row.kernel, row.listing, row.block_warps[0], min(row.resident.values()), programs)
        for row, programs in zip(rows, triton_programs(plan, call.launches), strict=True)
    ]
    return ExecutedCall(f"{rows[0].title}, {case.name}", plan, x.shape[-1], x.element_size(), launches)


def wide(cases: Iterable[Case]) -> list[Case]:
    """Return calls on tokens of more channels than a block: the published ones with a norm that the fused kernels take.

    The gradients of these take general kernels, and are left out.
    """
    norm = {"norm_channels": WIDE_NORM}
    published = [case for case in cases if case.published and not case.gradient]
    others = [case for case in cases if not case.published]
    return [*(replace(case, arguments={**case.arguments, **norm}) for case in published), *others]


def triton_tables(
    given: argparse.Namespace, parser: argparse.ArgumentParser
) -> Iterator[tuple[list[KernelUsage], list[ExecutedCall]]]:
    """Yield the rows and the executed calls of each shape and dtype."""
    if triton_kernels.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing, run without it")
    general = GENERAL * (given.calls in ("general", "all")) + NORMS * (given.calls == "all")
    cases = PUBLISHED[:1] if given.calls == "grid_pool" else PUBLISHED + general
    with tempfile.TemporaryDirectory() as temporary, configured(dict(given.config)):
        cubins = given.cubins or Path(temporary)
        try:
            cubins.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--cubins: {error}")
        for shape, dtype in product(given.shape, given.dtype):
            of_shape = wide(cases) if shape[3] > MAX_BLOCK else cases
            try:
                with Console(stderr=True).status(f"compiling {show_shape(shape)} {dtype}"):
                    found = [compile_rows(of_shape, shape, dtype, arch, cubins) for arch in given.arch]
            except ValueError as error:
                parser.error(f"{show_shape(shape)}: {error}")
            yield [row for rows, _ in found for row in rows], [call for _, calls in found for call in calls]


# ---- the backend cuda ----

BUILD = ROOT / "build" / "cuda_check"
FLAGS = ("-std=c++17", "-O3", "-cubin")

CHANNELS = (1152, 3584, 4096)
"""The channels of SigLIP, of LLaVA-Video and of a 24 × 24 tower, for whose blocks warps are counted."""

FUSED = re.compile(
    r"(frames|level|windows|grid_pool_backward)_kernel<(\w+), \(Access\)0, true"
    r"(?:, (true|false))?(?:, (?:true|false))?>"
)
"""Matches the kernels of the published settings on tokens in 128-bit pieces.

Template arguments say that p is 2 and norms run over all channels, whether the nodes of a backward are summaries, and
whether cells have a halo.
"""


def with_blocks(row: KernelUsage) -> KernelUsage:
    """Add the blocks and the limits of a kernel of the published settings."""
    found = FUSED.fullmatch(row.kernel)
    if found is None:
        return row
    kernel, dtype, halo = found.groups()
    backward = kernel == "grid_pool_backward"
    # blocks of the backward have a power of two of warps whatever the type
    warps = {C: block_threads(C, 4 if backward or dtype == "float" else 2) // 32 for C in CHANNELS}
    # the carried sums of a walk over odd sizes take 64 bytes a thread
    carried = 0 if backward or halo != "true" else 64 * 32
    fit = {C: min(resident_warps(row.arch, n, row.registers, row.shared + carried * n)) for C, n in warps.items()}
    return replace(
        row,
        block_warps=list(warps.values()),
        resident={f"with {C} channels": n for C, n in fit.items()},
        enough_warps=ENOUGH_WARPS,
        # these read tables, in which the backward looks up consumers several times; tokens take 128 bits
        limits={"loads of 32 bits": 24 if backward else 10},
    )


def block_threads(C: int, value_bytes: int) -> int:
    """Return what `block_threads` of csrc/cuda/launch.cuh does."""
    warps = -(-min(C, 8192) // 512)
    if value_bytes == 4:
        warps = 1 << (warps - 1).bit_length()
    return 32 * warps


@cache
def nvcc_version() -> str:
    return run(find_tool("nvcc"), "--version")


def compile_file(source: Path, arch: int) -> list[KernelUsage]:
    """Return a row for every kernel of a file, which is compiled unless the same sources have been before."""
    headers = [file for folder in (source.parent, source.parent.parent) for file in folder.glob("*.*h")]
    name = content_hash([source, *sorted(headers)], nvcc_version(), *FLAGS, str(arch))
    cubin = BUILD / f"{source.stem}.sm_{arch}.{name}.cubin"
    if not cubin.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        made = cubin.with_suffix(f".{os.getpid()}")
        run(find_tool("nvcc"), *FLAGS, f"-arch=sm_{arch}", "-o", made, source)
        os.replace(made, cubin)
    rows = read_cubin(cubin, arch)
    if not rows:
        return []  # without arguments c++filt would read the standard input
    names = run(find_tool("c++filt"), *(row.kernel for row in rows)).splitlines()
    named = (
        replace(row, kernel=short_kernel_name(name), title="csrc/cuda") for row, name in zip(rows, names, strict=True)
    )
    return [with_blocks(row) for row in named]


def cuda_tables(
    given: argparse.Namespace, parser: argparse.ArgumentParser
) -> Iterator[tuple[list[KernelUsage], list[ExecutedCall]]]:
    """Yield the rows of all files, with two compilers at a time, and what published calls execute."""
    for shape in given.shape:
        try:
            grid_plan([shape[0]], *shape[1:3])
        except ValueError as error:
            parser.error(f"{show_shape(shape)}: {error}")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: compile_file(*job), product(sorted(KERNELS.glob("*.cu")), given.arch))
        rows = [row for rows in found for row in rows]
    kernels = {(row.arch, row.kernel): row for row in rows}
    yield (
        rows,
        [
            executed_by_cuda(case, shape, dtype, kernels)
            for arch, shape, dtype in product(given.arch, given.shape, given.dtype)
            for case in counted(PUBLISHED, shape, arch)
            if shape[3] % 8 == 0
        ],
    )


CPP_TYPES = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float"}
"""The C++ type of a channel by the name of the dtype in this report."""


def executed_by_cuda(
    case: Case, shape: Shape, dtype: str, kernels: Mapping[tuple[int, str], KernelUsage]
) -> ExecutedCall:
    """Return what the launches of csrc/cuda/fused.cu for a call on contiguous tokens execute."""
    plan, value_bytes = plan_of(case, shape), DTYPES[dtype].itemsize
    launches = []
    for launch in cuda_launches(plan, CPP_TYPES[dtype], block_threads(shape[3], value_bytes) // 32):
        row = kernels[PREDICTED_ARCH, launch.kernel]
        fit = resident_warps(row.arch, launch.block_warps, row.registers, row.shared + launch.dynamic_shared)
        name = re.sub(r"\(Access\)0, |__nv_", "", row.kernel)
        launches.append(ExecutedLaunch.of(name, row.listing, launch.block_warps, min(fit), launch.programs))
    return ExecutedCall(f"{show_shape(shape)} {dtype}, {case.name}", plan, shape[3], value_bytes, launches)


# ---- the command ----


def show_shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def read_shape(text: str) -> Shape:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected T x H x W x C without spaces, as 64x27x27x3584, got {text!r}")
    return tuple(map(int, sizes))


def read_choice(text: str) -> tuple[str, int | bool | None]:
    """Read a field of FusedConfig and its value."""
    name, _, value = text.partition("=")
    known = {field.name for field in fields(FusedConfig)}
    with suppress(ValueError):
        read = json.loads(value.lower().replace("none", "null"))
        if name in known and (read is None or isinstance(read, int)):
            return name, read
    raise argparse.ArgumentTypeError(f"expected one of {', '.join(sorted(known))}, = and a number, got {text!r}")


TRITON_ONLY = ("calls", "config", "cubins")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compile_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--arch", nargs="+", type=int, choices=MULTIPROCESSORS, default=ARCHITECTURES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there, and the executed instructions")
    parser.add_argument("--shape", nargs="+", type=read_shape, default=(*SHAPES, WIDE), metavar="TxHxWxC")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    add = parser.add_argument_group("backend triton").add_argument
    calls = "grid_pool alone; all at the published settings; these and some others; these and all norms"
    add("--calls", choices=("grid_pool", "published", "general", "all"), default="general", help=calls)
    choice = "fused kernels by another configuration, as mosaic_cells=3 (triton_kernels/config.py)"
    add("--config", nargs="+", type=read_choice, default=[], metavar="FIELD=VALUE", help=choice)
    add("--cubins", type=Path, metavar="DIR", help="write the machine code of every kernel there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {given.json.absolute().parent}")
    cuda = given.backend == "cuda"
    if cuda and any(getattr(given, name) != parser.get_default(name) for name in TRITON_ONLY):
        parser.error(f"--{', --'.join(TRITON_ONLY)} are for the backend triton")
    version = nvcc_version().splitlines()[-2] if cuda else f"triton {triton.__version__}"
    resident = f"{' / '.join(map(str, CHANNELS))} channels" if cuda else "registers / shared memory"
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(f"{version}. {LEGEND}, by {resident}.\n{EXECUTION_LEGEND}\n", highlight=False)
    every: list[KernelUsage] = []
    executed_calls: list[ExecutedCall] = []
    for rows, calls in cuda_tables(given, parser) if cuda else triton_tables(given, parser):
        console.print(draw(rows))
        show(calls)
        for row in rows:
            for missed in limits_missed(row):
                console.print(f"sm_{row.arch} {row.name}: {missed}", style="red", highlight=False)
        every += rows
        executed_calls += calls
    if given.json is not None:
        counted_calls = {call.title: call.instructions for call in executed_calls}
        found = {
            "compiler": version,
            "executed": counted_calls,
            "rows": [asdict(replace(row, listing="")) for row in every],
        }
        text = json.dumps(found, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")
    return 1 if any(map(limits_missed, every)) else 0


if __name__ == "__main__":
    sys.exit(main())
