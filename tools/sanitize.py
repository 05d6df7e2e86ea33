"""The C++ code under sanitizers: `python -m tools.sanitize`, in the root.

1. The library is built with the address and the undefined behaviour sanitizer, into a copy of the package in
   build/sanitize/, and there the tests of the backend `cpu`, the C++ test program and the fuzzer run. The library of
   this checkout stays as it is.
2. The source of the CUDA kernels runs on the CPU (tests/support/cuda_emulation.py), built with the same two sanitizers.
3. The C++ test program is built with the thread sanitizer and runs every op and gradient on several threads, by several
   plans.

It takes a compiler with sanitizers, cmake, ninja, and some minutes. What came out is written to benchmarks/results/.
Exit code: 0 if all is well, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import FOLDER
from stgridpool_kernels.plan import grid_plan, save_tables
from tests.support import cuda_emulation, wheels

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
COPY = BUILD / "checkout"

# Python and torch free at exit what they like, and what torch allocates in one library may be freed in another.
ADDRESS = {
    # an allocation that is too large must return no memory, as it does without a sanitizer: tests ask for one
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:abort_on_error=0"
    ":allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

# Each is (frame counts, H, W, arguments of the plan, C, dtype, arguments of the test program). They take every path.
THREADED = [
    ([64], 13, 13, {}, 200, "bfloat16", ("1", "2", "1", "0")),
    ([40], 12, 12, {}, 130, "float16", ("1", "3", "1", "77")),
    ([9, 33], 9, 7, {"ceil_mode": True}, 200, "float32", ("40", "1", "0", "50")),
    ([48], 9, 12, {"resize": "bilinear", "kernel_size": 3, "padding": 1}, 200, "bfloat16", ("-1", "inf", "1", "0")),
]


EMULATED = """
import sys
import pytest
from tests.support import cuda_emulation

library, load = cuda_emulation.build(sanitize=True), cuda_emulation.load
cuda_emulation.load = lambda other=None: load(other or library)
sys.exit(pytest.main(sys.argv[1:]))
"""
"""This program runs pytest with the emulation under sanitizers."""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return os.environ | {"PATH": path} | more


def run(name: str, command: list[str], cwd: Path = ROOT, **more: str) -> dict[str, Any]:
    """Run a command with its output in a file of the step's name, and summarise the outcome."""
    print(f"{name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    log = BUILD / "logs" / (re.sub(r"\W+", "-", name) + ".log")
    with open(log, "w") as out:
        done = subprocess.run(command, cwd=cwd, env=environment(**more), stdout=out, stderr=subprocess.STDOUT)
    text = log.read_text(errors="replace")
    reports = re.findall(r"^.*(?:ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error).*$", text, re.MULTILINE)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", (text.strip().splitlines() or [""])[-1])
    outcome = {
        "name": name,
        "ok": done.returncode == 0 and not reports,
        "exit code": done.returncode,
        "counts": ", ".join(counts),
        "reports": sorted(set(reports)),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(outcome, indent=2), flush=True)
    if not outcome["ok"]:
        print(text[-6000:], flush=True)
    return outcome


def configure(folder: Path, sanitizers: str, *definitions: str) -> list[str]:
    return [
        *("cmake", "-G", "Ninja", "-S", str(COPY), "-B", str(folder), "-DCMAKE_BUILD_TYPE=RelWithDebInfo"),
        *(f"-DSTGP_SANITIZE={sanitizers}", "-DSTGP_CUDA=OFF", "-DSTGP_TESTS=ON", *definitions),
    ]


def copy_checkout() -> None:
    """Copy the tree, so that all steps see one state of it and a library can be put beside the package.

    The copies keep their times, so that files which have not changed are not built again.
    """
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT, COPY, ignore=shutil.ignore_patterns(*wheels.BUILT, "results"))


def runtimes(compiler: str) -> str:
    """Return the runtime of the address sanitizer, which must be loaded before Python's own libraries."""
    libraries = ("libasan.so", "libstdc++.so")
    found = (wheels.run(compiler, f"-print-file-name={name}").strip() for name in libraries)
    return " ".join(path for path in found if Path(path).is_absolute())


def address(seconds: float) -> list[dict[str, Any]]:
    folder = BUILD / "address"
    pybind11 = wheels.run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    command = configure(
        folder,
        "address,undefined",
        f"-DSTGP_TORCH={Path(torch.__file__).parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}",
        f"-DCMAKE_INSTALL_PREFIX={COPY / 'stgridpool_kernels'}",
    )
    steps = [
        ("address: configure", command),
        ("address: build", ["cmake", "--build", str(folder), "--target", "_C"]),
        ("address: install", ["cmake", "--install", str(folder), "--component", "python"]),
    ]
    outcomes = []
    for name, command in steps:
        outcomes.append(run(name, command))
        if not outcomes[-1]["ok"]:
            return outcomes

    cache = (folder / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    assert compiler is not None
    more = ADDRESS | {
        "LD_PRELOAD": runtimes(compiler[1]),
        # the C++ test program is built in the copy with the same sanitizers
        "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=RelWithDebInfo -DSTGP_SANITIZE=address,undefined",
        "OMP_NUM_THREADS": "1",
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    fuzz = [sys.executable, "-m", "tools.fuzz", "--seconds", str(seconds), "--no-file"]
    tests = [
        ("address: C++ API", [*pytest, "tests/backends/test_cpp_api.py"]),
        # The allocator of the sanitizer keeps memory that is freed, with the advice that it had.
        ("address: test_cpu", [*pytest, "tests/backends/test_cpu.py", "-k", "not advised"]),
        ("address: test_backends", [*pytest, "tests/backends/test_backends.py", "-k", "cpu-cpu"]),
        ("address: test_backward", [*pytest, "tests/backends/test_backward.py", "-k", "cpu-cpu"]),
        ("address: fuzz", fuzz),
        ("address: wrong tables", [*fuzz, "--tables-only"]),
    ]
    for name, command in tests:
        outcomes.append(run(name, command, COPY, **more))
    return outcomes


def emulation() -> list[dict[str, Any]]:
    """Test the emulation in this checkout, where its library is kept from one time to the next."""
    build = "from tests.support import cuda_emulation; print(cuda_emulation.build(sanitize=True))"
    # with a sanitizer loaded into it, a compiler takes many times as long
    outcomes = [run("emulation: build", [sys.executable, "-c", build])]
    compiler = cuda_emulation.find_compiler()
    if not outcomes[0]["ok"] or compiler is None:
        return outcomes
    more = ADDRESS | {"LD_PRELOAD": runtimes(compiler), "OMP_NUM_THREADS": "1"}
    # -s: what a sanitizer says before it ends the process must not be caught
    tests = ["-q", "-s", "-p", "no:cacheprovider", "tests/backends/test_cuda_emulation.py", "-k", "not meet"]
    command = [sys.executable, "-c", EMULATED, *tests]
    return [*outcomes, run("emulation: test_cuda_emulation", command, **more)]


def thread() -> list[dict[str, Any]]:
    folder = BUILD / "thread"
    build = ["cmake", "--build", str(folder)]
    outcomes = [
        run("thread: configure", configure(folder, "thread")),
        run("thread: build", [*build, "--target", "grid_pool_test"]),
    ]
    if not all(outcome["ok"] for outcome in outcomes):
        return outcomes
    program = str(folder / "grid_pool_test")
    outcomes.append(run("thread: checks", [program]))
    for number, (counts, height, width, arguments, channels, dtype, weights) in enumerate(THREADED):
        for saved in ({}, {"frames_per_stage": 4}, {"gradient": True}):
            tables = BUILD / f"tables-{number}"
            save_tables(grid_plan(counts, height, width, **arguments), tables, **saved)
            command = [program, str(tables), "-", str(BUILD / "out"), dtype, "1", str(channels), "4", *weights]
            words = ", ".join(f"{key}={value}" for key, value in saved.items()) or "for a GPU"
            outcomes.append(run(f"thread: plan {number}, {words}", command))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz-seconds", type=float, default=30, help="how long each of the two fuzzers runs (30)")
    parser.add_argument("--only", choices=["address", "emulation", "thread"], help="one of the parts")
    given = parser.parse_args()
    (BUILD / "logs").mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    copy_checkout()
    parts = {"address": lambda: address(given.fuzz_seconds), "emulation": emulation, "thread": thread}
    outcomes = []
    for name, part in parts.items():
        if given.only in (None, name):
            outcomes += part()
    ok = all(outcome["ok"] for outcome in outcomes)
    compiler = subprocess.run(["c++", "--version"], env=environment(), capture_output=True, text=True).stdout
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "compiler": (compiler.splitlines() or ["unknown"])[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ok": ok,
        "seconds": round(time.monotonic() - start, 1),
        "steps": outcomes,
    }
    path = FOLDER / f"sanitize-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'all is well' if ok else 'something is wrong'}: {path.relative_to(ROOT)}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
