"""Builds the compiled library for a machine with a GPU and without network; docs/gpu-check.md says where it goes.

    python -m tools.gpu_library FOLDER [--torch torch==2.11.0] [--arch 90]

It is for the Python that runs this, which needs setuptools, cmake, ninja and pybind11, and for any torch from 2.10 on;
of the torch that is named only headers are taken, out of a wheel that pip downloads into FOLDER. nvcc is in CUDA_HOME
or on PATH. The file is named by the version of Python, so that it does not get into the way of another one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.support.wheels import ROOT
from tools.check_headers import TORCHES, headers_of


def add_stand_ins(torch: Path) -> None:
    """Make empty libraries to link with. Only their names matter, since torch is loaded before this library."""
    (torch / "__init__.py").touch()  # setup.py finds torch by it
    (torch / "lib").mkdir(exist_ok=True)
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        command = ["c++", "-shared", "-x", "c++", os.devnull, "-o", str(torch / "lib" / name), f"-Wl,-soname,{name}"]
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where headers are kept for the next time")
    parser.add_argument("--torch", default=TORCHES[-1], help="as pip takes it (%(default)s)")
    parser.add_argument("--arch", default="90", help="compute capability (%(default)s)")
    given = parser.parse_args()
    torch = headers_of(given.torch, given.folder.absolute())
    add_stand_ins(torch)
    # nothing of the stand-ins is used that a linker can see, and it leaves out what is not used
    options = f"-DSTGP_CUDA=ON -DSTGP_CUDA_ARCHITECTURES={given.arch} -DCMAKE_MODULE_LINKER_FLAGS=-Wl,--no-as-needed"
    environment = {"PYTHONPATH": str(torch.parent), "CMAKE_ARGS": options}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode)


if __name__ == "__main__":
    main()
