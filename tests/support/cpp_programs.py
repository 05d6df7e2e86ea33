"""The C++ test programs (tests/cpp), built by CMake for this machine or for aarch64, and the commands that run them.

Debian's cross compiler makes programs for aarch64, and QEMU's emulation of a user's program runs them.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Program = Sequence[str]
"""The words of a command that starts a program."""

COMPILER = "aarch64-linux-gnu-g++"
LIBRARIES = "/usr/aarch64-linux-gnu"
"""The folder of the C and C++ libraries for aarch64 that Debian's cross compiler brings."""

AARCH64 = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={COMPILER}",
    "-DSTGP_CUDA=OFF",
)
"""Definitions that make CMake compile for aarch64."""


def environment() -> dict[str, str]:
    """Return the environment of other programs: tools of this Python come first, and nothing is loaded into them."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"PATH": path}


def build(folder: Path, target: str, *definitions: str) -> str:
    """Build a test program in a folder of CMake and return its path. Raises RuntimeError with the output of a failure.

    Processes that share a folder wait for each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *definitions, "-DSTGP_TESTS=ON"],
            ["cmake", "--build", str(folder), "--target", target],
        ):
            done = subprocess.run(command, env=environment(), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"failed: {shlex.join(command)}\n{done.stdout}{done.stderr}")
    return str(folder / target)


@cache
def native(target: str) -> Program:
    """Build a test program for this machine, where setup.py builds the package and as CMAKE_ARGS says.

    Objects that a build of the package has left are used again.
    """
    folder: Path = runpy.run_path(str(ROOT / "setup.py"))["build_folder"]()
    return (build(folder, target, *shlex.split(os.environ.get("CMAKE_ARGS", ""))),)


@cache
def for_aarch64(target: str) -> Program:
    """Build a test program for aarch64; the command runs it in an emulator. Raises FileNotFoundError without one."""
    return (emulator("aarch64"), "-L", LIBRARIES, build(ROOT / "build" / "aarch64", target, *AARCH64))


def emulator(machine: str) -> str:
    """Return the program that runs programs for "aarch64" or "x86_64". Raises FileNotFoundError if there is none."""
    found = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if found is None:
        raise FileNotFoundError(f"no emulator for {machine}: install Debian's qemu-user")
    return found


def why_no_aarch64() -> str | None:
    """Return what to install before programs for aarch64 can be compiled and run, None if nothing is missing."""
    emulators = [shutil.which(name) for name in ("qemu-aarch64", "qemu-aarch64-static")]
    lacks = {"g++-aarch64-linux-gnu": shutil.which(COMPILER) is None, "qemu-user": not any(emulators)}
    packages = " ".join(package for package, lacking in lacks.items() if lacking)
    return f"no compiler or emulator for aarch64: install Debian's {packages}" if packages else None
