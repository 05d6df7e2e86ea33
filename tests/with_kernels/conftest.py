"""These fixtures are for tests with Hugging Face's package `kernels`, which `make test-kernels` installs and runs."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

try:
    metadata.version("kernels")
except metadata.PackageNotFoundError:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that `python -m tools.hf_kernel` wrote."""
    out = tmp_path_factory.mktemp("kernel") / "stgridpool-kernels"
    subprocess.run([sys.executable, "-m", "tools.hf_kernel", out], cwd=ROOT, check=True)
    return out
