"""The table by which `auto` chooses between triton and cuda on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stgridpool_kernels as stgp
from stgridpool_kernels import backends, ops
from stgridpool_kernels.backends import gpu_choice
from stgridpool_kernels.backends.gpu_choice import OTHERS, ROWS, Row, find_row
from tests.support.cases import tokens

ANY_PLAN = stgp.grid_plan([8], 4, 4)


def on_gpu(channels: int = 3584, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a stand-in for tokens on a CUDA device."""
    return SimpleNamespace(
        is_cuda=True, device="cuda:0", shape=(8, 4, 4, channels), element_size=lambda: dtype.itemsize
    )


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows_can_be_reached_and_say_why(row: Row) -> None:
    assert row.backend in ("triton", "cuda")
    assert row.bytes in (2, 4)
    assert row.channels[0] <= row.channels[1]
    assert row.reason
    fits = [find_row(row.capability, row.bytes, C, odd) for C in row.channels for odd in (False, True)]
    assert row in fits


@pytest.mark.parametrize(
    ("capability", "value_bytes", "channels", "odd", "backend"),
    [
        ((9, 0), 2, 3584, True, "cuda"),
        ((10, 0), 2, 4096, False, "cuda"),
        ((9, 0), 2, 512, True, "triton"),
        ((9, 0), 4, 1152, True, "triton"),
        ((9, 0), 4, 1152, False, "cuda"),
        ((8, 0), 2, 3584, True, "triton"),
        ((9, 0), 2, 8193, False, "triton"),
    ],
)
def test_first_row_that_fits(
    capability: tuple[int, int], value_bytes: int, channels: int, odd: bool, backend: str
) -> None:
    assert find_row(capability, value_bytes, channels, odd).backend == backend


def test_settings_without_fused_kernels_have_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert gpu_choice.choose(on_gpu(), ANY_PLAN, 2.0).backend == "cuda"
    assert gpu_choice.choose(on_gpu(), None, 2.0) is OTHERS  # token_norm
    assert gpu_choice.choose(on_gpu(), stgp.grid_plan([8], 4, 4, kernel_size=3), 2.0) is OTHERS
    assert gpu_choice.choose(on_gpu(), ANY_PLAN, 3.0) is OTHERS  # other kernels take p = 3 in C++
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu_choice.choose(on_gpu(), ANY_PLAN, 2.0) is OTHERS


@pytest.mark.parametrize(
    ("preferred", "missing", "taken"),
    [("cuda", (), "cuda"), ("triton", (), "triton"), ("cuda", ("cuda",), "triton"), ("triton", ("triton",), "cuda")],
)
def test_auto_takes_the_preferred_backend_that_can_run(
    preferred: str, missing: tuple[str, ...], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stub(name: str) -> Any:
        reason = "not built" if name in missing else None
        return SimpleNamespace(name=name, unsupported_reason=lambda x, plan: reason, opt_in_reason=lambda: None)

    monkeypatch.setattr(backends, "BACKENDS", [stub(name) for name in ("triton", "cuda", "cpu", "reference")])
    monkeypatch.setattr(
        gpu_choice, "choose", lambda x, plan, norm_type: Row((9, 0), 2, (1, 2), None, preferred, "chosen")
    )
    with stgp.use_backend("auto"):
        assert backends.choose_backend(on_gpu(), ANY_PLAN).name == taken


def test_a_backward_chooses_by_what_its_forward_chose_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice depends on x, on the plan and on the norm alone, which are the same in both."""
    seen = []
    choose = ops.choose_backend

    def recorded(x: Any, plan: Any, norm_type: float) -> Any:
        seen.append((x.shape, x.dtype, x.device, plan, norm_type))
        return choose(x, plan, norm_type)

    monkeypatch.setattr(ops, "choose_backend", recorded)
    x = tokens(8, 4, 4, 3).requires_grad_()
    stgp.grid_pool(x, norm_type=1.0).sum().backward()
    assert len(seen) == 2
    assert seen[0] == seen[1]
