"""The table by which `auto` chooses a backend on a GPU against the warp instructions that are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")
from stgridpool_kernels.backends.gpu_choice import find_row
from tests.tools.test_compile_report import run
from tools.machine_code import search_tool


@pytest.mark.slow
@pytest.mark.skipif(search_tool("nvcc") is None, reason="no compiler: nvcc is not in PATH or CUDA_HOME")
def test_counts_agree_with_the_table(tmp_path: Path) -> None:
    """The backend of the table executes fewer warp instructions than the other, or as many if it is triton."""
    shapes = [f"64x{size}x{size}x{C}" for size in (27, 24) for C in (512, 896, 1152, 3584, 4096)]
    counts: dict[str, dict[str, int]] = {}
    for backend in ("triton", "cuda"):
        file = tmp_path / f"{backend}.json"
        calls = ["--calls", "grid_pool"] if backend == "triton" else []
        common = [
            "--backend",
            backend,
            "--arch",
            "90",
            "--shape",
            *shapes,
            "--dtype",
            "bf16",
            "fp32",
            "--json",
            str(file),
        ]
        run("tools.compile_report", *common, *calls)
        counts[backend] = json.loads(file.read_text())["executed"]
    for shape in shapes:
        for dtype, value_bytes in (("bf16", 2), ("fp32", 4)):
            call = f"{shape} {dtype}, grid_pool"
            fewer = "cuda" if counts["cuda"][call] < counts["triton"][call] else "triton"
            _, size, _, C = map(int, shape.split("x"))
            assert find_row((9, 0), value_bytes, C, size % 2 == 1).backend == fewer, (call, counts)
