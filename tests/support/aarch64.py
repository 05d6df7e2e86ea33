"""A build of the C++ test programs for aarch64 by a cross compiler, and the command that runs them under QEMU."""

from __future__ import annotations

import shutil

LIBRARIES = "/usr/aarch64-linux-gnu"
"""The folder of the C and C++ libraries for aarch64 that Debian's cross compiler brings."""

COMPILER = "aarch64-linux-gnu-g++"

DEFINITIONS = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={COMPILER}",
    "-DSTGP_CUDA=OFF",
)
"""Definitions for CMake that make it compile for aarch64."""


def emulator() -> str | None:
    """Return the program that runs programs for aarch64, None if there is none on PATH."""
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def run_command() -> tuple[str, ...]:
    """Return the words that come before a program for aarch64. Raises FileNotFoundError without an emulator."""
    found = emulator()
    if found is None:
        raise FileNotFoundError(why_absent())
    return (found, "-L", LIBRARIES)


def why_absent() -> str | None:
    """Return what to install before programs for aarch64 can be compiled and run, None if nothing is missing."""
    lacks = {"g++-aarch64-linux-gnu": shutil.which(COMPILER), "qemu-user": emulator()}
    packages = " ".join(package for package, found in lacks.items() if found is None)
    return f"no compiler or emulator for aarch64: install Debian's {packages}" if packages else None
