"""The Triton kernels for GPUs of other makers: they compile, and nobody has run them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import pytest
import torch

from stgridpool_kernels.backends import TRITON
from stgridpool_kernels.backends import triton as triton_backend
from tests.tools.test_compile_report import run

pytest.importorskip("triton", reason="no Triton")


def test_fused_kernels_compile_for_amd() -> None:
    """No launch has an option that only NVIDIA's compiler takes, and nothing is spilled."""
    done = run("tests.tools.compile_for_amd")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    launches = [launch for launches in found.values() for launch in launches]
    assert {kernel for kernel, *_ in launches} == {
        "rows_kernel",
        "windows_kernel",
        "mosaics_kernel",
        "window_gradient_kernel",
    }
    assert all(spills == 0 for *_, spills in launches)
    assert {warps for call, of_call in found.items() if "512)" in call for _, warps, *_ in of_call} == {1}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Patches that describe another machine; what the backend remembers of one is forgotten before and after."""
    remembered = [value for value in vars(triton_backend).values() if hasattr(value, "cache_clear")]
    assert len(remembered) >= 4

    def forget() -> None:
        for function in remembered:
            function.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def test_rocm_runs_by_name_with_one_warning(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.version, "hip", "7.0")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    reason = "the kernels compile for ROCm (gfx942), and have never run there"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert TRITON.opt_in_reason() == reason  # auto passes it over, and does not warn
        assert not caught
        assert TRITON.unsupported_reason(None, None) is None
        triton_backend._kernels()
        triton_backend._kernels()
    assert [str(warning.message) for warning in caught] == [f"backend 'triton': {reason}"]


def test_xpu_is_known(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.xpu, "is_available", lambda: True)
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert TRITON.opt_in_reason() == "the kernels have never been compiled for XPU, nor run there"
    assert triton_backend._missing_here(False) in (None, "triton is not installed")
