"""The modes "grid" and "pool": which options they take, and what they leave."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from stgridpool_kernels import grid_pool, temporal_grid
from stgridpool_kernels.integrations.modes import GRID_OPTIONS, mode_options
from tests.support.tolerance import assert_same_bits

X = torch.randn(20, 5, 7, 16, generator=torch.Generator().manual_seed(0))
POOLING = (
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "output_size",
    "temperature",
    "norm_type",
    "normalize_norm",
    "norm_channels",
)


def test_every_option_is_of_gridding_or_of_pooling() -> None:
    """An argument that is added to `grid_pool` has to be put on one of the two sides here."""
    names = set(inspect.signature(grid_pool).parameters) - {"x", "frame_counts", "out"}
    assert names == {*GRID_OPTIONS, *POOLING}
    assert not {*GRID_OPTIONS} & {*POOLING}


@pytest.mark.parametrize("name", POOLING)
def test_mode_grid_refuses_each_option_of_pooling_by_name(name: str) -> None:
    default = inspect.signature(grid_pool).parameters[name].default
    with pytest.raises(ValueError, match=f"^{name} must not be given in mode 'grid'.* got {name}="):
        mode_options("grid", **{name: default})


def test_what_the_modes_leave() -> None:
    assert_same_bits(mode_options("grid").apply(X), temporal_grid(X))
    assert_same_bits(
        mode_options("grid", frame_strides=1).apply(X, [12, 8]), temporal_grid(X, frame_strides=1, frame_counts=[12, 8])
    )
    assert_same_bits(mode_options("pool").apply(X), grid_pool(X, ceil_mode=True))
    assert_same_bits(mode_options("pool", output_size=(2, 3)).apply(X), grid_pool(X, output_size=(2, 3)))
    assert_same_bits(mode_options("pool", ceil_mode=False).apply(X, [12, 8]), grid_pool(X, frame_counts=[12, 8]))


def test_norm_channels_of_a_call_hold_where_the_options_have_none() -> None:
    assert_same_bits(mode_options("pool").apply(X, norm_channels=8), grid_pool(X, ceil_mode=True, norm_channels=8))
    given = mode_options("pool", norm_channels=4)
    assert_same_bits(given.apply(X, norm_channels=8), grid_pool(X, ceil_mode=True, norm_channels=4))
    assert_same_bits(mode_options("grid").apply(X, norm_channels=8), temporal_grid(X))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"mode": "grid"}, (5, 7)),
        ({"mode": "pool"}, (3, 4)),
        ({"mode": "pool", "ceil_mode": False}, (2, 3)),
        ({"mode": "pool", "output_size": (4, 2)}, (4, 2)),
    ],
)
def test_the_size_of_a_frame(options: dict[str, Any], size: tuple[int, int]) -> None:
    assert mode_options(**options).frame_size((5, 7)) == size == tuple(mode_options(**options).apply(X).shape[1:3])


def test_options_are_compared_and_shown() -> None:
    assert mode_options("pool") == mode_options("pool", ceil_mode=True, temperature=1)
    assert mode_options("pool") != mode_options("grid")
    assert len({mode_options("grid"), mode_options("grid", frame_strides=[2, 4, 8])}) == 1
    assert repr(mode_options("grid")) == "ModeOptions(mode='grid')"
    assert repr(mode_options("grid", frame_strides=[1, 2])) == "ModeOptions(mode='grid', frame_strides=(1, 2))"
    assert repr(mode_options("pool", temperature=2)) == "ModeOptions(mode='pool', ceil_mode=True, temperature=2.0)"


@pytest.mark.parametrize("mode", ["", "Pool", "both", 0, None, ["grid"]])
def test_other_modes_are_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match="mode must be 'grid' or 'pool', got "):
        mode_options(mode)
