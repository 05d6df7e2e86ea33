"""Checks a build with CUDA kernels where there may be no GPU: it links with torch's CUDA libraries and loads.

    python -m tools.check_cuda_link [PYTHON]

PYTHON has a torch built for CUDA, rich, safetensors, setuptools, cmake, ninja, pybind11, pytest and hypothesis; nvcc is
in CUDA_HOME or on PATH. It builds a wheel for the default architectures. The library has to hold machine code for each
of them and PTX of the last, and CUDA kernels behind every private op; its backend `cpu` has to pass the suite. No
kernel runs on a GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.support.wheels import ROOT, build_wheel, compiled_library, copy_tests, environment, run, run_backend_tests

INSIDE = """
import torch
from stgridpool_kernels.backends import backend_reasons, compiled
from tests.support.compiled_results import PRIVATE_OPS

info, devices, reason = compiled.LIBRARY.build_info(), torch.cuda.device_count(), backend_reasons()["cuda"]
for op in PRIVATE_OPS:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"stgp::{op}", key), (op, key)
print(f"torch {torch.__version__} loads it, with {devices} GPUs; on CPU and CUDA: {', '.join(PRIVATE_OPS)}")
print(f"build_info: CUDA {info['cuda']}, architectures {info['cuda architectures']}; backend cuda: {reason}")
assert info["cuda"] and reason == (None if devices else "no CUDA device")
"""


def default_architectures() -> list[str]:
    """Return the architectures that CMakeLists.txt builds for by default."""
    found = re.search(r'STGP_CUDA_ARCHITECTURES "([\d;]+)"', (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    return found[1].split(";")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("python", type=Path, nargs="?", default=Path(sys.executable), help="default: this one")
    python = parser.parse_args().python.absolute()
    architectures = default_architectures()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        wheel = build_wheel(python, folder, CMAKE_ARGS="-DSTGP_CUDA=ON")
        library = compiled_library(wheel, folder)
        needed = re.findall(r"\(NEEDED\).*\[(libtorch\S+)\]", run("readelf", "--wide", "-d", library))
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, needs {', '.join(needed)}")

        installed = folder / "installed"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(installed)
        copy_tests(folder)
        env = environment(PYTHONPATH=f"{installed}:{folder}", COLUMNS="120")
        where = "from tools.machine_code import find_tool; print(find_tool('cuobjdump'))"
        tool = run(python, "-c", where, cwd=folder, env=env).strip()
        found = {}
        for kind, ending in (("elf", "cubin"), ("ptx", "ptx")):
            listed = run(tool, f"--list-{kind}", library)
            found[kind] = sorted(set(re.findall(rf"\.sm_(\d+)\.{ending}", listed)), key=int)
        print(f"machine code for {', '.join(found['elf'])}; PTX of {', '.join(found['ptx'])}")
        if found != {"elf": architectures, "ptx": architectures[-1:]}:
            raise SystemExit(f"expected code for {', '.join(architectures)} and PTX of {architectures[-1]}")

        print(run(python, "-c", INSIDE, cwd=folder, env=env), end="")
        print(run(python, "-m", "stgridpool_kernels", "info", cwd=folder, env=env))
        print(f"tests of the backend cpu: {run_backend_tests(python, folder, env)}")


if __name__ == "__main__":
    main()
