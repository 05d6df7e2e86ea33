"""The package `kernels` loads the folder that tools/hf_kernel.py writes, offline and beside the installed package."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import kernels
import pytest
import torch

import stgridpool_kernels as stgp
from tests.support.interpreter import hasten_interpreter
from tests.support.kernel_copy import CALLS, check_same_bits
from tests.support.pages import HF_KERNELS

VARIANT = "build/torch-universal"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> ModuleType:
    return kernels.get_local_kernel(folder)


def test_it_is_loaded_under_its_id(loaded: ModuleType, folder: Path) -> None:
    [kernel] = [kernel for kernel in kernels.get_loaded_kernels() if kernel.module is loaded]
    assert str(kernel.metadata.name) == "stgridpool-kernels"
    assert Path(loaded.__file__) == folder / VARIANT / "__init__.py"
    assert loaded is sys.modules[kernel.metadata.id]
    assert kernel.metadata.id == loaded.namespace.NAMESPACE
    assert loaded is not stgp
    assert loaded.available_backends()[-1] == "reference"
    assert loaded.__version__ == stgp.__version__


def test_it_is_loaded_once_by_any_way(loaded: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.get_local_kernel(folder) is loaded
    monkeypatch.setenv("LOCAL_KERNELS", f"somebody/stgridpool-kernels={folder}")
    assert kernels.get_kernel("somebody/stgridpool-kernels", version=0) is loaded


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_it_gives_the_bits_of_the_package(backend: str, loaded: ModuleType) -> None:
    if backend == "triton":
        hasten_interpreter()
    compared = check_same_bits(loaded, backend)
    assert {f"{name}, torch.bfloat16" for name in CALLS} < {*compared}
    assert {"gradient of published, torch.bfloat16", "module", "flat", "stream", "compiled"} < {*compared}


def test_a_second_kernel_is_loaded_beside_the_first(loaded: ModuleType, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    for name in ("namespace.py", "metadata.json"):
        file = other / VARIANT / name
        file.write_text(file.read_text().replace(loaded.namespace.NAMESPACE, "_stgridpool_kernels_other"))
    second = kernels.get_local_kernel(other)
    assert second is not loaded
    x = torch.randn(16, 4, 6, 8)
    assert torch.equal(torch.ops._stgridpool_kernels_other.grid_pool(x), loaded.grid_pool(x))


def test_the_page(folder: Path, loaded: ModuleType) -> None:
    names: dict[str, object] = {}
    HF_KERNELS.run("hf_kernel", names, ('"build/hf_kernel"', repr(str(folder))))
    assert names["stgp"] is loaded
    assert names["y"].shape == (64, 13, 13, 896)
