"""The C++ functions without torch and Python (tests/cpp/grid_pool_test.cpp), by tables that Python has saved.

On this machine they give the bits of the backend `cpu`. The program is built by CMake where setup.py builds the
package, with the same definitions, those that CMAKE_ARGS holds. A second build is for aarch64 and runs in an emulator.
Products and sums fuse there, so that its results are held to the accuracy that every backend must have.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.plan import grid_plan, save_tables
from tests.support.cpp_programs import ROOT, Program, environment, for_aarch64, native
from tests.support.tolerance import assert_accurate, assert_gradient_accurate, assert_same_bits

CAPABILITIES = ("avx512", "avx2", "portable")
OPS = ("grid_pool", "temporal_grid", "token_norm")
WITH_GRADIENT = ("grid_pool", "temporal_grid")
"""The ops whose gradients follow the tables."""
WEIGHTS = {"temperature": 1.0, "norm_type": 2.0, "normalize_norm": True, "norm_channels": 0}
"""The arguments that no table holds, which the program takes, with their defaults."""


@dataclass(frozen=True)
class Call:
    """A call of every op on random tokens of videos of `counts` frames, which are packed, or equal ones in a batch."""

    counts: list[int]
    H: int
    W: int
    C: int
    dtype: torch.dtype
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: bool = False

    @cached_property
    def x(self) -> Tensor:
        lead = (len(self.counts), self.counts[0]) if self.batch else (sum(self.counts),)
        return tokens(*lead, self.H, self.W, self.C, dtype=self.dtype)

    def arguments_of(self, op: str) -> dict[str, Any]:
        """Return the arguments that `op` takes."""
        names = {"temporal_grid": ("resize", "sampling"), "token_norm": tuple(WEIGHTS)[1:]}.get(op, self.arguments)
        packed = {} if self.batch or op == "token_norm" else {"frame_counts": self.counts}
        return packed | {name: value for name, value in self.arguments.items() if name in names}

    def on_meta(self, op: str) -> Tensor:
        """Return a tensor without data that has the shape and dtype of the result of `op`."""
        return getattr(stgridpool_kernels, op)(self.x.to("meta"), **self.arguments_of(op))

    def grad(self, op: str) -> Tensor:
        """Return the gradient of the result of `op`, which x is for `temporal_grid`."""
        return self.x if op == "temporal_grid" else tokens(*self.on_meta(op).shape, dtype=self.dtype, seed=1)


CALLS = {
    "published": Call([64], 9, 9, 200, torch.bfloat16),
    "published-even": Call([40], 8, 6, 67, torch.float16),
    "packed": Call([9, 0, 33, 16], 5, 7, 48, torch.bfloat16),
    "batch": Call([16] * 3, 5, 7, 24, torch.bfloat16, batch=True),
    "ceil": Call([32], 7, 9, 33, torch.float32, {"ceil_mode": True}),
    "padding": Call(
        [21],
        5,
        7,
        19,
        torch.bfloat16,
        {"kernel_size": 3, "stride": 2, "padding": 1, "temperature": -1.5, "norm_type": 3.0, "normalize_norm": False},
    ),
    "adaptive": Call([24], 7, 6, 40, torch.float16, {"output_size": (3, 5), "norm_type": math.inf}),
    "bilinear": Call([64], 6, 5, 24, torch.float32, {"resize": "bilinear", "sampling": "first", "temperature": 0.5}),
    "norm_channels": Call([33], 5, 8, 70, torch.bfloat16, {"norm_channels": 37}),
    "norm_channels-general": Call(
        [20],
        6,
        5,
        40,
        torch.float32,
        {"kernel_size": 3, "padding": 1, "norm_channels": 5, "norm_type": 0.5, "temperature": 2.0},
    ),
    "one token": Call([8], 1, 1, 1, torch.float32, {"ceil_mode": True, "norm_type": 1.0}),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
saved_tables = pytest.mark.parametrize(
    "saved", [{}, {"frames_per_stage": 4}, {"gradient": True}], ids=["for a GPU", "for a CPU", "for gradients"]
)
builds = pytest.mark.parametrize(
    "program_of",
    [native, pytest.param(for_aarch64, marks=[pytest.mark.aarch64, pytest.mark.slow])],
    ids=["native", "aarch64"],
)
pytestmark = pytest.mark.needs("compiler")


def run(program: Program, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*program, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def bits_of(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def tokens(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_call(program: Program, call: Call, saved: dict[str, Any], folder: Path) -> None:
    """Run every op, and gradients if `saved` asks for them, with 1 and 5 threads; results are files in `folder`."""
    geometry = {name: value for name, value in call.arguments.items() if name not in WEIGHTS}
    save_tables(grid_plan(call.counts, call.H, call.W, **geometry), folder / "tables", **saved)
    (folder / "x").write_bytes(bits_of(call.x))
    (folder / "x.grad").write_bytes(bits_of(call.grad("grid_pool")))
    weights = (float({**WEIGHTS, **call.arguments}[name]) for name in WEIGHTS)
    done = run(
        program,
        *(folder / "tables", folder / "x", folder / "out", str(call.dtype).removeprefix("torch.")),
        *(len(call.counts) if call.batch else 1, call.C, 5, *weights),
    )
    assert done.returncode == 0, done.stderr


def written(folder: Path, name: str, capability: str, like: Tensor) -> Tensor:
    """Return a result that the program has written."""
    content = bytearray((folder / f"out.{name}.{capability}").read_bytes())
    return torch.frombuffer(content, dtype=like.dtype).view(like.shape)


def gradient(op: str, x: Tensor, grad: Tensor, **given: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(getattr(stgridpool_kernels, op)(leaf, backend="cpu", **given), leaf, grad)[0]


@pytest.mark.parametrize("target", ["grid_pool_test", "vector_test_portable"])
@builds
def test_checks_in_cpp(program_of: Callable[[str], Program], target: str) -> None:
    done = run(program_of(target))
    assert (done.returncode, done.stdout) == (0, "all checks passed\n"), done.stderr


@pytest.mark.needs("library")
def test_checks_of_vectors_in_cpp(capability: str) -> None:
    """Products and sums fuse with some instructions, so that rounding errors differ."""
    done = run(native(f"vector_test_{capability}"))
    assert (done.returncode, done.stdout) == (0, "all checks passed\n"), done.stderr


@saved_tables
@calls
def test_saved_plan(call: Call, saved: dict[str, Any], tmp_path: Path) -> None:
    """Every op, with every set of instructions and with 1 or 5 threads, gives the bits that Python's call gives.

    So do gradients, if they were saved with the plan.
    """
    run_call(native("grid_pool_test"), call, saved, tmp_path)
    before, compared = compiled.LIBRARY.cpu_capability(), 0
    try:
        for capability in CAPABILITIES:
            if not (tmp_path / f"out.grid_pool.{capability}").exists():
                with pytest.raises(ValueError, match="that this CPU runs"):
                    compiled.LIBRARY.use_cpu_capability(capability)
                continue
            compiled.LIBRARY.use_cpu_capability(capability)
            results = {
                op: getattr(stgridpool_kernels, op)(call.x, backend="cpu", **call.arguments_of(op)) for op in OPS
            }
            if "gradient" in saved:
                for op in WITH_GRADIENT:
                    results[f"{op}_backward"] = gradient(op, call.x, call.grad(op), **call.arguments_of(op))
            for name, result in results.items():
                assert_same_bits(written(tmp_path, name, capability, result), result)
                compared += 1
    finally:
        compiled.LIBRARY.use_cpu_capability(before)
    assert compared >= (5 if "gradient" in saved else 3)


@pytest.mark.aarch64
@pytest.mark.slow
@saved_tables
@calls
def test_saved_plan_on_aarch64(call: Call, saved: dict[str, Any], tmp_path: Path) -> None:
    """Results and gradients are accurate, and the program finds the same bits with 1 and 5 threads."""
    run_call(for_aarch64("grid_pool_test"), call, saved, tmp_path)
    for op in OPS:
        assert_accurate(written(tmp_path, op, "portable", call.on_meta(op)), op, call.x, **call.arguments_of(op))
    for op in WITH_GRADIENT if "gradient" in saved else ():
        found = written(tmp_path, f"{op}_backward", "portable", call.x)
        assert_gradient_accurate(found, op, call.x, call.grad(op), **call.arguments_of(op))


def test_file_that_holds_no_tables(tmp_path: Path) -> None:
    program, tables = native("grid_pool_test"), tmp_path / "tables"
    for content, reason in ((b"", "these are no tables of a plan"), (b"STGP" * 100, "another version")):
        tables.write_bytes(content)
        done = run(program, tables, "-", tmp_path / "out", "float32", 1, 8, 1, 1, 2, 1, 0)
        assert done.returncode == 1
        assert reason in done.stderr
    save_tables(grid_plan([16], 5, 7), tables)
    tables.write_bytes(tables.read_bytes()[:-4])
    done = run(program, tables, "-", tmp_path / "out", "float32", 1, 8, 1, 1, 2, 1, 0)
    assert done.returncode == 1
    assert "another length" in done.stderr


def test_the_build_quotes_paths_for_the_shell(tmp_path: Path) -> None:
    """The second download of an archive, for one, is unpacked into a folder with "(1)" in its name."""
    build = tmp_path / "build (1) ü #1 50% & 'q'"
    cmake_of_pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    torch_folder = Path(torch.__file__).parent
    definitions = [f"-DSTGP_TORCH={torch_folder}", f"-Dpybind11_DIR={cmake_of_pybind11}", "-DSTGP_CUDA=OFF"]
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    commands = ""
    for command in ([*configure, *definitions], ["ninja", "-C", str(build), "-t", "commands", "_C"]):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        commands = done.stdout
    assert "binding.cpp" in commands
    for line in commands.splitlines():
        if not line.startswith("ninja: "):
            parsed = subprocess.run(["sh", "-n", "-c", line], capture_output=True, text=True)
            assert parsed.returncode == 0, f"{parsed.stderr}{line}"
