"""Functions that checks of built wheels share: building a wheel of a clean copy of the tree, and running commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
"""Patterns of the files that are no part of the tree: hidden ones and build outputs."""
COMPILERS = ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
"""Environment variables that name a compiler."""


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its stdout. Raises SystemExit with its output if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(**changes: str | None) -> dict[str, str]:
    """Return this process's environment with changes, where None removes a variable.

    Variables that could select another copy of the package are removed by default.
    """
    changes = {"PYTHONPATH": None, "STGP_BACKEND": None, "PYTHONDONTWRITEBYTECODE": "1", **changes}
    kept = {name: value for name, value in os.environ.items() if name not in changes}
    return kept | {name: value for name, value in changes.items() if value is not None}


def build_wheel(python: Path, folder: Path, **variables: str) -> Path:
    """Build a wheel by `python`, with its torch and tools, of a copy of the tree without build outputs."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "wheel")
    run(
        *pip,
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        folder,
        source,
        env=environment(STGP_NO_EXT=None, **variables),
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def compiled_library(wheel: Path, folder: Path) -> Path:
    """Extract the compiled library of a wheel into `folder`. Raises SystemExit unless the wheel has exactly one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"stgridpool_kernels/_C\..*so", name)]
        if len(names) != 1:
            raise SystemExit(f"{wheel.name} holds {len(names)} compiled libraries")
        return Path(archive.extract(names[0], folder))


def copy_tests(folder: Path) -> None:
    """Copy the tests and the modules that they import, without the package."""
    for name in ("tests", "benchmarks", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_backend_tests(python: Path, folder: Path, env: dict[str, str], backend: str = "cpu") -> str:
    """Run the tests of a backend, with golden values, on the package of `python`; return pytest's last line.

    backend: `cpu`, or `reference` of a package without a library.
    """
    others = {"cpu": "triton or cuda or reference", "reference": "triton or cuda"}[backend]
    selected = ("tests/backends/test_backends.py", "-k", f"{backend} and not ({others})")
    shown = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, cwd=folder, env=env)
    return shown.strip().splitlines()[-1]
