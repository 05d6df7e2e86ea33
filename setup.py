"""Build stgridpool_kernels._C by CMakeLists.txt if that is possible, and describe the package by README.md.

All other settings are in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.config.pyprojecttoml import load_file

PYTHON = sys.executable
ROOT = Path(__file__).resolve().parent
RECORD = "stgridpool_kernels/left_out.txt"  # read by stgridpool_kernels/backends/missing.py


def find_torch() -> Path | None:
    """Return the folder of torch, also from an isolated build, whose sys.path lacks the target environment."""
    paths = [*sys.path, *(sysconfig.get_path(name) for name in ("platlib", "purelib"))]
    spec = PathFinder.find_spec("torch", paths)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def why_left_out() -> str | None:
    """Return why the library cannot or must not be built, None if it is to be built."""
    if os.environ.get("STGP_NO_EXT") == "1":
        asked = "STGP_NO_EXT=1 was set, as it is for the wheel py3-none-any"
        return f"{asked}; install from source without it, on Linux beside torch and a C++20 compiler"
    if sys.platform != "linux":
        return f"they are built on Linux only, and this is {sys.platform}"
    torch = find_torch()
    if torch is None:
        return "it saw no torch; install again with torch there, by uv with --no-build-isolation"
    version = re.search(r"^__version__ = ['\"]((\d+)\.(\d+).*)['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    if version is None or (int(version[2]), int(version[3])) < (2, 10):
        return f"they need torch 2.10 or newer, found {version[1] if version else 'an unknown version'} in {torch}"
    compiler = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), ""))
    if not compiler or not shutil.which(compiler[0]):
        return f"no C++ compiler {' '.join(compiler) or '(c++, g++ or clang++ on PATH, or CXX)'}"
    check = [*compiler, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    works = subprocess.run(check, input=b"#include <concepts>\nstatic_assert(std::integral<int>);").returncode == 0
    return None if works else f"{' '.join(compiler)} compiles no C++20"


def build_folder() -> Path:
    """Return the folder for all that CMake remembers of a build. A second build there compiles only what changed."""
    torch = find_torch()
    choice = [sys.prefix, sys.version, torch and (torch / "version.py").read_text()]
    choice += [os.getenv(name) for name in ("CXX", "CUDA_HOME", "CUDAHOSTCXX", "CMAKE_ARGS")]
    choice += [shutil.which(tool) for tool in ("c++", "g++", "clang++", "nvcc")]
    return ROOT / "build" / f"cmake-{hashlib.sha256(repr(choice).encode()).hexdigest()[:8]}"


def description() -> str:
    """Return README.md with the links that a package index can follow."""
    repository = load_file(ROOT / "pyproject.toml")["project"]["urls"]["Repository"]
    version = run_path(str(ROOT / "stgridpool_kernels/version.py"))["__version__"]
    with_links = run_path(str(ROOT / "tools/long_description.py"))["long_description"]
    return str(with_links((ROOT / "README.md").read_text(encoding="utf-8"), repository, version))


class RecordingBuild(build_py):
    """Writes why the compiled library is left out beside the place that it would have, for the package to show."""

    def run(self) -> None:
        super().run()
        record = (ROOT if self.editable_mode else Path(self.build_lib)) / RECORD
        if self.distribution.has_ext_modules():
            record.unlink(missing_ok=True)  # of an earlier build
        else:
            record.write_text(f"{why_left_out()}\n", encoding="utf-8")

    def get_output_mapping(self) -> dict[str, str]:
        """Map the files of the package to their sources, for editable installations that link to each of them."""
        record = {} if self.distribution.has_ext_modules() else {str(Path(self.build_lib, RECORD)): RECORD}
        return super().get_output_mapping() | record


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        build = build_folder()
        # finds tools that are installed for this Python even if its environment is not active
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(PYTHON).parent)))
        cmake = [PYTHON, "-m", "cmake"] if find_spec("cmake") else [shutil.which("cmake")]
        tools = {"cmake": cmake[0], "ninja": shutil.which("ninja"), "pybind11": find_spec("pybind11")}
        missing = " ".join(name for name, tool in tools.items() if tool is None)
        if missing:
            sys.exit(f"stgridpool_kernels: compiling its kernels takes {missing}: pip install {missing}")
        options = {
            "CMAKE_INSTALL_PREFIX": Path(self.get_ext_fullpath(extension.name)).resolve().parent,
            "CMAKE_MAKE_PROGRAM": tools["ninja"],
            "Python_EXECUTABLE": PYTHON,
            "STGP_TORCH": find_torch(),
            "pybind11_DIR": subprocess.check_output([PYTHON, "-m", "pybind11", "--cmakedir"], text=True).strip(),
        }
        given = [*(f"-D{name}={value}" for name, value in options.items()), *shlex.split(os.getenv("CMAKE_ARGS", ""))]
        configure = ["-G", "Ninja", "-S", ROOT, "-B", build, *given]
        for step in (configure, ["--build", build, "--target", "_C"], ["--install", build, "--component", "python"]):
            if subprocess.run([*cmake, *step]).returncode:
                sys.exit("stgridpool_kernels: its kernels do not compile, see above; STGP_NO_EXT=1 leaves them out")


if __name__ == "__main__":
    reason = why_left_out()
    if reason is not None:
        print(f"stgridpool_kernels: the compiled CPU and CUDA kernels are left out: {reason}", file=sys.stderr)
    library = Extension("stgridpool_kernels._C", sources=[])
    setup(
        long_description=description(),
        long_description_content_type="text/markdown",
        ext_modules=[library] if reason is None else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": RecordingBuild},
    )
