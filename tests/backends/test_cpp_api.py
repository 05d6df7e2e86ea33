"""The C++ functions without torch and Python (tests/cpp/grid_pool_test.cpp), which must agree with the backend `cpu`.

The program is built by CMake where setup.py builds the package, with the same definitions, those that CMAKE_ARGS holds.
"""

from __future__ import annotations

import fcntl
import math
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.plan import grid_plan, save_tables
from tests.support.tolerance import assert_same_bits

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = ("avx512", "avx2", "portable")

# name: (frame counts, H, W, C, dtype, arguments)
CALLS: dict[str, tuple[list[int], int, int, int, torch.dtype, dict[str, Any]]] = {
    "published": ([64], 9, 9, 200, torch.bfloat16, {}),
    "published-even": ([40], 8, 6, 67, torch.float16, {}),
    "packed": ([9, 0, 33, 16], 5, 7, 48, torch.bfloat16, {}),
    "ceil": ([32], 7, 9, 33, torch.float32, {"ceil_mode": True}),
    "padding": (
        [21],
        5,
        7,
        19,
        torch.bfloat16,
        {"kernel_size": 3, "stride": 2, "padding": 1, "temperature": -1.5, "norm_type": 3.0, "normalize_norm": False},
    ),
    "adaptive": ([24], 7, 6, 40, torch.float16, {"output_size": (3, 5), "norm_type": math.inf}),
    "bilinear": ([64], 6, 5, 24, torch.float32, {"resize": "bilinear", "sampling": "first", "temperature": 0.5}),
    "norm_channels": ([33], 5, 8, 70, torch.bfloat16, {"norm_channels": 37}),
    "norm_channels-general": (
        [20],
        6,
        5,
        40,
        torch.float32,
        {"kernel_size": 3, "padding": 1, "norm_channels": 5, "norm_type": 0.5, "temperature": 2.0},
    ),
    "one token": ([8], 1, 1, 1, torch.float32, {"ceil_mode": True, "norm_type": 1.0}),
}
pytestmark = pytest.mark.needs("compiler")
WEIGHTS = ("temperature", "norm_type", "normalize_norm", "norm_channels")


def environment() -> dict[str, str]:
    """Of other programs: tools that were installed for this Python come first, and nothing is loaded into them."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"PATH": path}


@pytest.fixture(scope="module")
def program() -> Path:
    """Return the test program. It is linked from the objects that a build of the package has left, if there are any."""
    build: Path = runpy.run_path(str(ROOT / "setup.py"))["build_folder"]()
    build.mkdir(parents=True, exist_ok=True)
    definitions = [*shlex.split(os.environ.get("CMAKE_ARGS", "")), "-DSTGP_TESTS=ON"]
    with open(build / "lock", "w") as lock:  # the processes of pytest-xdist share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *definitions],
            ["cmake", "--build", str(build), "--target", "grid_pool_test"],
        ):
            done = subprocess.run(command, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return build / "grid_pool_test"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=120
    )


def bits_of(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def tokens(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(op: str, x: Tensor, grad: Tensor, **given: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(getattr(stgridpool_kernels, op)(leaf, backend="cpu", **given), leaf, grad)[0]


def test_checks_in_cpp(program: Path) -> None:
    done = run(program)
    assert (done.returncode, done.stdout) == (0, "all checks passed\n"), done.stderr


@pytest.mark.parametrize(
    "saved", [{}, {"frames_per_stage": 4}, {"gradient": True}], ids=["for a GPU", "for a CPU", "for gradients"]
)
@pytest.mark.parametrize(("counts", "H", "W", "C", "dtype", "arguments"), CALLS.values(), ids=CALLS.keys())
def test_saved_plan(
    counts: list[int],
    H: int,
    W: int,
    C: int,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    saved: dict[str, Any],
    program: Path,
    tmp_path: Path,
) -> None:
    """Every op, with every set of instructions and with 1 or 5 threads, gives the bits that Python's call gives.

    So do gradients, if they were saved with the plan.
    """
    geometry = {name: value for name, value in arguments.items() if name not in WEIGHTS}
    save_tables(grid_plan(counts, H, W, **geometry), tmp_path / "tables", **saved)
    x = tokens(sum(counts), H, W, C, dtype=dtype)
    (tmp_path / "x").write_bytes(bits_of(x))
    pooled = stgridpool_kernels.grid_pool(x.to("meta"), frame_counts=counts, **arguments)
    grad = tokens(*pooled.shape, dtype=dtype, seed=1)
    (tmp_path / "x.grad").write_bytes(bits_of(grad))
    temperature, norm_type, normalize, norm_channels = (
        arguments.get(name, default) for name, default in zip(WEIGHTS, (1.0, 2.0, True, 0), strict=True)
    )
    name = str(dtype).removeprefix("torch.")
    done = run(
        program,
        *(tmp_path / "tables", tmp_path / "x", tmp_path / "out", name, 1, C, 5),
        *(temperature, norm_type, int(normalize), norm_channels),
    )
    assert done.returncode == 0, done.stderr

    gridding = {key: geometry[key] for key in ("resize", "sampling") if key in geometry}
    norm = {key: arguments[key] for key in WEIGHTS[1:] if key in arguments}
    calls = {
        "grid_pool": {**arguments, "frame_counts": counts},
        "temporal_grid": {**gridding, "frame_counts": counts},
        "token_norm": norm,
    }
    before, compared = compiled.LIBRARY.cpu_capability(), 0
    try:
        for capability in CAPABILITIES:
            if not (tmp_path / f"out.grid_pool.{capability}").exists():
                with pytest.raises(ValueError, match="that this CPU runs"):
                    compiled.LIBRARY.use_cpu_capability(capability)
                continue
            compiled.LIBRARY.use_cpu_capability(capability)
            results = {op: getattr(stgridpool_kernels, op)(x, backend="cpu", **given) for op, given in calls.items()}
            if "gradient" in saved:
                results |= {
                    f"{op}_backward": gradient(op, x, of_result, **calls[op])
                    for op, of_result in (("grid_pool", grad), ("temporal_grid", x))
                }
            for op, result in results.items():
                written = bytearray((tmp_path / f"out.{op}.{capability}").read_bytes())
                found = torch.frombuffer(written, dtype=result.dtype).view(result.shape)
                assert_same_bits(found, result)
                compared += 1
    finally:
        compiled.LIBRARY.use_cpu_capability(before)
    assert compared >= (5 if "gradient" in saved else 3)


def test_batch(program: Path, tmp_path: Path) -> None:
    """Videos of a batch are the frames of the tables, one video after the other."""
    x = tokens(3, 16, 5, 7, 24, dtype=torch.bfloat16)
    save_tables(grid_plan([16] * 3, 5, 7), tmp_path / "tables", gradient=True)
    (tmp_path / "x").write_bytes(bits_of(x))
    grad = tokens(3, 16, 2, 3, 24, dtype=torch.bfloat16, seed=1)
    (tmp_path / "x.grad").write_bytes(bits_of(grad))
    done = run(program, tmp_path / "tables", tmp_path / "x", tmp_path / "out", "bfloat16", 3, 24, 2, 1, 2, 1, 0)
    assert done.returncode == 0, done.stderr
    results = {
        "grid_pool": stgridpool_kernels.grid_pool(x, backend="cpu"),
        "grid_pool_backward": gradient("grid_pool", x, grad),
        "temporal_grid_backward": gradient("temporal_grid", x, x),
    }
    for op, result in results.items():
        assert (tmp_path / f"out.{op}.{compiled.LIBRARY.cpu_capability()}").read_bytes() == bits_of(result)


def test_file_that_holds_no_tables(program: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
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
