"""The programs of launches are those that plans, prepared calls and csrc/cuda have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton")
from stgridpool_kernels.backends import triton_kernels
from stgridpool_kernels.backends.triton_kernels.launch import CallSpec
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan import GridPlan, grid_plan
from tests.support import cuda_emulation
from tools.compile_report import configured
from tools.instruction_count import Programs
from tools.launch_programs import Row, cuda_launches, row_programs, triton_programs, window_programs

PLANS: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((27, 27), {}),
    ((24, 24), {}),
    ((9, 8), {}),
    ((8, 9), {"ceil_mode": True}),
    ((13, 13), {"frame_counts": [31, 33]}),
    ((13, 12), {"sampling": "first"}),
    ((9, 9), {"frame_counts": [5] * 12 + [4]}),
    ((9, 9), {"frame_strides": ()}),
]
plans = pytest.mark.parametrize(("size", "arguments"), PLANS, ids=str)


def make_plan(size: tuple[int, int], arguments: dict[str, Any]) -> GridPlan:
    counts = arguments.get("frame_counts", [64])
    return grid_plan(counts, *size, **{name: value for name, value in arguments.items() if name != "frame_counts"})


def prepare(plan: GridPlan, channels: int) -> list[Any]:
    """Return the launches of a prepared call by a plan of 64 frames."""
    x = torch.empty(64, plan.height, plan.width, channels, dtype=torch.bfloat16, device="meta")
    out = torch.empty(64, *plan.pooled_size, channels, dtype=x.dtype, device="meta")
    spec = CallSpec(x, out, plan, Weighting(1.0, 2.0, True, channels), capability=(9, 0))
    return list(triton_kernels.prepare_grid_pool(spec).launches)


def total(launches: Sequence[Sequence[Programs]], field: str) -> int:
    return sum(getattr(programs, field) for launch in launches for programs in launch)


def test_a_row_that_is_cut() -> None:
    """The first row has 5 live cells and 3 windows, the second fewer live cells than windows, the third neither."""
    rows = [Row(cells=5, windows=3), Row(cells=1, windows=4), Row(cells=0, windows=0)]
    assert row_programs("rows", rows, width=7, cells=7) == Programs(
        "rows", 3, 2, steps=9, pooled=7, shrunk=6, longest=5
    )
    assert row_programs("rows", rows, width=7, cells=4) == Programs(
        "rows", 6, 3, steps=9, pooled=7, shrunk=6, longest=4
    )
    assert window_programs("windows", rows, windows=3) == Programs("windows", 3, 3, 7, 7, 0, longest=3)


EMULATED = 2
"""The number of multiprocessors of the GPU that tests/support/cuda_headers imitates."""


@plans
def test_launches_of_triton(size: tuple[int, int], arguments: dict[str, Any]) -> None:
    """Launches have the grids of the prepared call. Every token of the result is one step, in any configuration."""
    plan = make_plan(size, arguments)
    found = []
    for choice in ({}, {"frame_cells": 1, "mosaic_cells": 3}, {"frame_cells": 5}):
        with configured(choice):
            launches = prepare(plan, channels=64)
            programs = triton_programs(plan, launches)
        assert [sum(kind.programs for kind in launch) for launch in programs] == [
            launch.grid[0] * launch.grid[1] for launch in launches
        ]
        assert total(programs, "pooled") == 64 * plan.pooled_size[0] * plan.pooled_size[1]
        found.append((total(programs, "steps"), total(programs, "shrunk")))
    assert len(set(found)) == 1


@pytest.mark.needs("compiler")
@plans
@pytest.mark.parametrize(
    ("dtype", "cpp_type", "warps"), [(torch.bfloat16, "__nv_bfloat16", 3), (torch.float32, "float", 4)]
)
def test_launches_of_cuda(
    size: tuple[int, int], arguments: dict[str, Any], dtype: torch.dtype, cpp_type: str, warps: int
) -> None:
    """Launches are those of csrc/cuda, compiled for the CPU: kernels, blocks, and their threads and shared memory."""
    plan = make_plan(size, arguments)
    x = torch.empty(64, *size, 1152, dtype=dtype)
    expected = [
        (launch.kernel, launch.blocks, launch.threads, launch.shared_bytes)
        for launch in cuda_emulation.list_launches("grid_pool", x, plan)
    ]
    launches = cuda_launches(plan, cpp_type, warps, multiprocessors=EMULATED)
    found = [
        (launch.kernel, sum(kind.programs for kind in launch.programs), 32 * launch.block_warps, launch.dynamic_shared)
        for launch in launches
    ]
    assert found == expected
    assert total([launch.programs for launch in launches], "pooled") == 64 * plan.pooled_size[0] * plan.pooled_size[1]


def test_both_backends_take_the_same_steps() -> None:
    for size, arguments in PLANS:
        plan = make_plan(size, arguments)
        of_triton = triton_programs(plan, prepare(plan, channels=64))
        of_cuda = [launch.programs for launch in cuda_launches(plan, "float", 1)]
        for field in ("steps", "pooled", "shrunk"):
            assert total(of_triton, field) == total(of_cuda, field)


@pytest.mark.parametrize(("size", "cropped"), [((27, 27), True), ((24, 24), False)])
def test_cells_that_nothing_depends_on_are_no_steps(size: tuple[int, int], cropped: bool) -> None:
    """Mosaics of odd frames are cropped, so that fewer cells are live than all rows have."""
    plan = make_plan(size, {})
    rows = [programs for launch in triton_programs(plan, prepare(plan, 64)) for programs in launch]
    walked = [programs for programs in rows if programs.kind != "windows"]
    cells = -(-size[1] // 2)
    full = sum(programs.programs * (cells if programs.longest > 1 else 1) for programs in walked)
    assert (sum(programs.steps for programs in walked) < full) == cropped
