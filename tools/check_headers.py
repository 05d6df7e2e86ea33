"""Compiles every C++ file of csrc, CUDA definitions included, against the headers of several versions of torch.

    python -m tools.check_headers FOLDER [REQUIREMENT ...]

A REQUIREMENT is as pip takes it, torch==2.10.0; by default the oldest torch that is supported, and the one after it.
pip downloads each wheel for CUDA into FOLDER, from which only headers are taken, so that neither a GPU nor what torch
needs is installed. nvcc is in CUDA_HOME or on PATH. Files are compiled as the build does it, with warnings as errors;
nothing is linked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

from tests.support.wheels import ROOT, run

TORCHES = ("torch==2.10.0", "torch==2.11.0")


def headers_of(requirement: str, folder: Path) -> Path:
    """Return the folder torch of a wheel with nothing in it but headers and the version."""
    target = folder / requirement.replace("==", "-")
    if not (target / "torch").exists():
        wheels = target / "wheel"
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps")
        run(*pip, "--only-binary=:all:", "--dest", wheels, requirement)
        [wheel] = wheels.glob("*.whl")
        part = target / "part"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(("torch/include/", "torch/version.py"))]
            archive.extractall(part, names)
        (part / "torch").rename(target / "torch")
        shutil.rmtree(wheels)
    return target / "torch"


def compile_against(torch: Path, build: Path) -> list[str]:
    """Return the names of the C++ files that compile. Raises SystemExit with the compiler's words if one does not."""
    cmake = (sys.executable, "-m", "cmake")
    options = {
        "STGP_TORCH": torch,
        "STGP_CUDA": "ON",
        "STGP_CUDA_ARCHITECTURES": "90",
        "CMAKE_CXX_FLAGS": "-Werror",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": run(sys.executable, "-m", "pybind11", "--cmakedir").strip(),
    }
    given = [f"-D{name}={value}" for name, value in options.items()]
    run(*cmake, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build, *given)
    commands = json.loads((build / "compile_commands.json").read_text())
    files = {os.path.relpath(each["output"], build): Path(each["file"]).relative_to(ROOT) for each in commands}
    objects = {built: file for built, file in files.items() if file.suffix == ".cpp"}
    run(*cmake, "--build", build, "--clean-first", "--target", *objects)
    return sorted(map(str, set(objects.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where headers are kept for the next time")
    parser.add_argument("torches", nargs="*", default=TORCHES, help=f"default: {' '.join(TORCHES)}")
    given = parser.parse_args()
    for requirement in given.torches:
        torch = headers_of(requirement, given.folder.absolute())
        begin = time.monotonic()
        files = compile_against(torch, torch.parent / "build")
        print(f"{requirement}: {', '.join(files)} compile, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
