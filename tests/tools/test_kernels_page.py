"""docs/kernels.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.workloads import WORKLOADS
from stgridpool_kernels import grid_plan

pytest.importorskip("triton", reason="no Triton")
from stgridpool_kernels.backends import triton_kernels
from stgridpool_kernels.backends.triton_kernels import config, launch
from stgridpool_kernels.backends.weighting import Weighting

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())


def test_rows_of_the_configuration() -> None:
    found = re.findall(r"^\| (\d+) \| (\d) \| (\d+\.0 .+) \|$", PAGE, re.MULTILINE)
    rows = []
    for row in config.ROWS:
        caps = [str(cap or "any") for cap in (row.config.window_registers, row.config.even_registers)]
        capability = ".".join(map(str, row.capability))
        numbers = [capability, str(row.config.num_warps), str(row.config.stages), " / ".join(caps), row.reason]
        rows.append((str(row.block), str(row.bytes), " | ".join(numbers)))
    assert found == rows
    assert f"up to {config.MAX_BLOCK} channels" in TEXT
    assert f"The {launch.MAX_CALLS} used last are kept" in TEXT


@pytest.mark.parametrize(("path", "kernel_size"), [("fused", 2), ("general", 3)])
def test_scratch(path: str, kernel_size: int) -> None:
    plan = grid_plan([64], 27, 27, kernel_size=kernel_size)
    x = torch.empty(64, 27, 27, 896, dtype=torch.bfloat16, device="meta")
    out = torch.empty(64, *plan.pooled_size, 896, dtype=x.dtype, device="meta")
    spec = launch.CallSpec(x, out, plan, Weighting(1.0, 2.0, True, 896))
    scratch = triton_kernels.prepare_grid_pool(spec).scratch * 2
    formula, megabytes = re.findall(rf"^\| {path} \| ([\d ()+×]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)[0]
    assert eval(formula.replace("×", "*")) == scratch
    assert f"{scratch / 1e6:.1f}" == megabytes
    assert f"{scratch / (x.numel() * 2):.1%}".replace("%", " %") in TEXT


@pytest.mark.parametrize("name", ["llava-video-7b", "llava-next-video-7b"])
def test_counted_bytes_are_of_this_plan(name: str) -> None:
    """The counts themselves are those of `python -m tools.traffic`, which takes minutes."""
    bound, shape = WORKLOADS[name].bound("grid_pool"), " × ".join(map(str, WORKLOADS[name].shape))
    table = PAGE.split(f"\n{shape} bfloat16", 1)[1].split("If no column", 1)[0]
    numbers = {row: float(mb) for row, mb in re.findall(r"^\| (\S.*?): .*?\| +([\d.]+) \|", table, re.MULTILINE)}
    assert numbers["lower bound"] == numbers["estimate 1"] == round(bound.total_bytes / 1e6, 1)


@pytest.mark.parametrize("shape", ["64 × 27 × 27 × 3584", "64 × 24 × 24 × 4096"])
def test_bytes_of_a_gradient_add_up(shape: str) -> None:
    """The ratios are those of the tables, and at most 3."""
    of_call = PAGE.split(f"\n{shape} bfloat16, frames pooled", 1)[1]
    of_gradient = PAGE.split("With `--gradient`", 1)[1].split(shape, 1)[1]
    megabytes = re.search(r"^\| requests.*?\| +([\d.]+)", of_call, re.MULTILINE)
    found = re.search(r"^\| requests.*?\| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \|$", of_gradient, re.MULTILINE)
    assert megabytes is not None
    assert found is not None
    call, gradient, ratio = map(float, found.groups())
    assert call == float(megabytes[1])
    assert ratio == round(gradient / call, 2) <= 3


def test_files_and_commands_exist() -> None:
    assert (ROOT / "docs" / "kernels.svg").exists()
    for room, module in re.findall(r"python -m (\w+)\.(\w+)", PAGE):
        assert (ROOT / room / f"{module}.py").exists()
    for name in re.findall(r"`(\w+\.py)`", PAGE):
        assert list((ROOT / "stgridpool_kernels").rglob(name)), name
