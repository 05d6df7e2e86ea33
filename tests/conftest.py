"""Fixtures of the suite: every backend on every device, and how many examples hypothesis draws.

`pytest --hypothesis-profile=thorough` draws many fresh examples; the default draws a few, the same ones every time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from benchmarks import cuda_emulation
from benchmarks.interpreter import hasten_interpreter, repair_interpreter, use_interpreter
from stgridpool_kernels.backends import BACKENDS, Backend

use_interpreter()
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    repair_interpreter()
    hasten_interpreter()

# Without a GPU, the source of the CUDA kernels runs on the CPU.
if not torch.cuda.is_available() and cuda_emulation.find_compiler() is not None:
    BACKENDS[[tested.name for tested in BACKENDS].index("cuda")] = cuda_emulation.backend()

settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=400, deadline=None)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; `pytest -m gpu` runs only these")


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for caches that is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors of a test live."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The name of a backend that can run here on `device`; skipped with its own reason where it cannot."""
    tested: Backend = request.param
    reason = tested.why_not(None, None) or tested.why_not(torch.empty(1, 1, 1, 8, device=device), None)
    if reason is not None:
        pytest.skip(f"{tested.name}: {reason}")
    return tested.name


@pytest.fixture(scope="session")
def size(backend: str, device: torch.device) -> tuple[int, int, int]:
    """(T, H, W) of most tests: smaller for kernels in triton's interpreter, which takes milliseconds for a window."""
    return (10, 3, 4) if backend == "triton" and device.type == "cpu" else (21, 5, 7)
