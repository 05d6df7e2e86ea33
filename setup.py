"""Builds stgridpool_kernels._C by CMakeLists.txt, where that is possible. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# tools that were installed for this Python come first, whether or not its environment is active
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def find_torch() -> Path | None:
    """The folder of torch. An isolated build hides the environment that it is for: there the library is looked up."""
    paths = [*sys.path, *(sysconfig.get_path(name) for name in ("platlib", "purelib"))]
    spec = PathFinder.find_spec("torch", paths)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def why_left_out() -> str | None:
    """None if the library is to be built, else why not."""
    if os.environ.get("STGP_NO_EXT") == "1":
        return "STGP_NO_EXT=1"
    torch = find_torch()
    if torch is None or not (torch / "include/torch/csrc/stable/library.h").exists():
        return "no torch 2.10 or newer in this environment (install it first; uv needs --no-build-isolation)"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return "no C++ compiler"
    check = [*shlex.split(compiler), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    try:
        subprocess.run(check, input=b"#include <concepts>\nstatic_assert(std::integral<int>);", check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"{compiler} compiles no C++20"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        options = {
            "CMAKE_INSTALL_PREFIX": library.parent,
            "Python_EXECUTABLE": sys.executable,
            "STGP_TORCH": find_torch(),
            "pybind11_DIR": subprocess.check_output(
                [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
            ).strip(),
        }
        given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *definitions, *given], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C"], check=True)
        subprocess.run(["cmake", "--install", build, "--component", "python"], check=True)


reason = why_left_out()
if reason is not None:
    print(f"stgridpool_kernels: the compiled CPU and CUDA kernels are left out: {reason}", file=sys.stderr)
setup(
    ext_modules=[] if reason is not None else [Extension("stgridpool_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
