"""The programs of each launch of grid_pool in its fused form: their number, and the cells and windows that they take.

A launch has a list of `Programs`, one for each kind of its programs. Cells and windows are those that the kernels are
given: the live cells of a plan, and the windows of the frames that are pooled. How a launch divides them into programs
is read from the arguments of a prepared launch for Triton. For CUDA C++ it is what csrc/cuda/fused.cu computes, written
again; tests compare it with the launches of that code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stgridpool_kernels.backends.triton_kernels.config import LONGEST_WALK, MULTIPROCESSORS
from stgridpool_kernels.backends.triton_kernels.launch import Launch
from stgridpool_kernels.plan import GridPlan
from stgridpool_kernels.plan.dataflow import Dataflow, live_cells
from tools.instruction_count import Programs


@dataclass(frozen=True)
class Row:
    """A row of cells of a node that is shrunk, or of a summary: the numbers of its live cells and of its windows."""

    cells: int
    windows: int


@dataclass(frozen=True)
class Stage:
    """Nodes that may be computed at the same time.

    kind: "rows" for frames, "mosaics" for the summaries of a level. shrunk: the rows of the nodes with live cells, node
    by node. pooled: those of the other nodes, which are pooled alone.
    """

    kind: str
    shrunk: Sequence[Row]
    pooled: Sequence[Row]


def stages(plan: GridPlan) -> list[Stage]:
    """Return the stages of a plan in the order in which they are computed: its frames, then its levels."""
    graph = Dataflow.of(plan)
    live, outputs = live_cells(plan, graph), set(graph.outputs)
    h = -(-plan.height // 2)
    rows, cols = plan.pooled_size

    def rows_of(nodes: Iterable[int]) -> list[Row]:
        return [
            Row(live[node][i] if node in live else 0, cols if node in outputs and i < rows else 0)
            for node in nodes
            for i in range(h)
        ]

    frames = range(len(graph.outputs))
    found = []
    for kind, nodes in (("rows", frames), *(("mosaics", [~s for s in level]) for level in graph.by_level())):
        shrunk = rows_of(node for node in nodes if node in live)
        pooled = rows_of(node for node in nodes if node in outputs and node not in live)
        if kind == "rows" or shrunk or pooled:
            found.append(Stage(kind, shrunk, pooled))
    return found


def row_programs(kind: str, rows: Iterable[Row], width: int, cells: int) -> Programs:
    """Return programs that each take `cells` neighbouring cells of a row, which has `width` cells."""
    taken = [
        [min(max(number - first, 0), cells) for number in (max(row.cells, row.windows), row.windows, row.cells)]
        for row in rows
        for first in range(0, width, cells)
    ]
    steps, pooled, shrunk = map(sum, zip(*taken, strict=True)) if taken else (0, 0, 0)
    longest = max((number for number, _, _ in taken), default=0)
    busy = sum(number > 0 for number, _, _ in taken)
    return Programs(kind, len(taken), busy, steps, pooled, shrunk, longest)


def window_programs(kind: str, rows: Iterable[Row], windows: int) -> Programs:
    """Return programs that each take up to `windows` neighbouring windows of a row. Rows without one have none."""
    numbers = [row.windows for row in rows if row.windows]
    programs, steps = sum(-(-number // windows) for number in numbers), sum(numbers)
    return Programs(kind, programs, programs, steps, steps, 0, min(windows, max(numbers, default=0)))


# ---- the backend triton ----


def triton_programs(plan: GridPlan, launches: Sequence[Launch]) -> list[list[Programs]]:
    """Return the programs of each of these launches, which are all launches of a prepared call by `plan`."""
    width = -(-plan.width // 2)
    found = []
    of_launch = iter(launches)
    for stage in stages(plan):
        mosaics = stage.kind == "mosaics"
        walked = [*stage.shrunk, *(stage.pooled if mosaics else ())]
        if walked:
            launch = next(of_launch)
            arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
            found.append([row_programs(stage.kind, walked, width, arguments["cells"])])
        if stage.pooled and not mosaics:
            next(of_launch)
            found.append([window_programs("windows", stage.pooled, 1)])
    assert next(of_launch, None) is None, "a launch is of no stage"
    return found


def _with_any(*kinds: Programs) -> list[Programs]:
    return [programs for programs in kinds if programs.programs]


# ---- the backend cuda ----

CELLS = 7
"""Limit of the cells or windows that a block of csrc/cuda/fused.cu takes where it carries no column."""


@dataclass(frozen=True)
class CudaLaunch:
    """A launch of csrc/cuda/fused.cu: the kernel's name with its template arguments, and what it is launched with.

    block_warps: warps of a block. dynamic_shared: bytes of dynamic shared memory of a block.
    """

    kernel: str
    block_warps: int
    dynamic_shared: int
    programs: list[Programs]


def cuda_launches(
    plan: GridPlan, cpp_type: str, block_warps: int, multiprocessors: int = MULTIPROCESSORS[9, 0]
) -> list[CudaLaunch]:
    """Return the launches of grid_pool by `plan` at the published settings, on tokens in pieces of 16 bytes.

    cpp_type: the C++ type of a channel. block_warps: warps of a block, which follow from the type and the channels.
    multiprocessors: those of the GPU.
    """
    halo, odd_width = plan.height % 2 == 1 or plan.width % 2 == 1, plan.width % 2 == 1
    h, width, (rows, cols) = -(-plan.height // 2), -(-plan.width // 2), plan.pooled_size
    # as many warps as have room at 128 registers a thread for float, at 80 for the others
    places = multiprocessors * max((16 if cpp_type == "float" else 24) // block_warps, 1)
    every = stages(plan)
    walks = [[*stage.shrunk, *(stage.pooled if stage.kind == "mosaics" else ())] for stage in every]
    alone = every[0].pooled
    of_windows = share(len(alone) // h * rows * cols, cols, places, CELLS)

    launches: list[CudaLaunch] = []
    walked = pooled = 0
    for stage, of_stage in zip(every, walks, strict=True):
        walked += len(of_stage)
        # a launch pools the share of the windows that it has of the walks
        end = -(-len(alone) // h * walked // max(sum(map(len, walks)), 1)) if any(walks) else len(alone) // h
        cells, height = (width, h) if stage.shrunk else (cols, rows)
        most = cells if odd_width else CELLS
        length = share(len(of_stage) // h * height * cells, cells, places, most)
        programs = _with_any(
            row_programs(stage.kind, [row for n, row in enumerate(of_stage) if n % h < height], cells, length),
            window_programs("windows", alone[pooled * h : end * h], of_windows),
        )
        pooled = end
        flags = ", ".join([cpp_type, "(Access)0", "true", str(halo).lower()])
        name = {"rows": "frames_kernel", "mosaics": "level_kernel"}[stage.kind]
        kernel = f"{name}<{flags}>" if of_stage else f"windows_kernel<{cpp_type}, (Access)0, true>"
        # the carried sums of 16 channels of a thread, in float32
        shared = 16 * 4 * 32 * block_warps if halo and of_stage else 0
        if programs:
            launches.append(CudaLaunch(kernel, block_warps, shared, programs))
    return launches


def share(cells: int, row_cells: int, places: int, most: int) -> int:
    """Return how many of `cells` cells or windows a block takes, in rows of `row_cells`, as `share` of fused.cu does.

    places: number of blocks that run at once. most: limit of a block.
    """
    longest = max(1, min(-(-cells // places), row_cells, most))
    spans = -(-row_cells // longest)
    while cells // row_cells * spans < places and -(-row_cells // spans) > LONGEST_WALK:
        spans += 1
    return -(-row_cells // spans)
