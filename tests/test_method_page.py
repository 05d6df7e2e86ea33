"""The program of docs/method.md computes what the ops compute, for any length and size of a video."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stgridpool_kernels as stgp
from tests.support.pages import METHOD


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    METHOD.run("program", names)
    return names


@pytest.mark.parametrize(("T", "H", "W"), [(15, 9, 11), (64, 6, 6), (33, 5, 4), (7, 3, 3), (100, 4, 7), (1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_program_is_the_op(page: dict[str, Any], T: int, H: int, W: int, dtype: torch.dtype) -> None:
    x = torch.randn(T, H, W, 32, generator=torch.Generator().manual_seed(T)).to(dtype)
    gridded, pooled = page["temporal_grid"](x), page["norm_pool"](page["temporal_grid"](x), 3.0)
    torch.testing.assert_close(stgp.temporal_grid(x), gridded)
    torch.testing.assert_close(stgp.grid_pool(x, temperature=3.0), pooled)


def test_what_the_page_says_of_its_own_call(page: dict[str, Any]) -> None:
    assert page["y"].shape == (15, 4, 5, 64)
    torch.testing.assert_close(stgp.grid_pool(page["x"]), page["y"])


def test_the_example_of_sampled_frames() -> None:
    (level,) = stgp.grid_plan((15,), 9, 11, frame_strides=2, grid_shape=1).levels
    assert level.targets == (1, 3, 5, 8, 10, 12, 14)
    assert "they are 1, 3, 5, 8, 10, 12, 14" in " ".join(METHOD.text.split())
