"""Options among model arguments, as lmms-eval's command line hands them over. tests/with_lmms_eval has the rest."""

from __future__ import annotations

import inspect

import pytest

import stgridpool_kernels as stgp
from stgridpool_kernels.integrations.base import PoolOptions
from stgridpool_kernels.integrations.lmms_eval import split_arguments
from stgridpool_kernels.integrations.options import READERS


def test_options_are_told_from_other_arguments() -> None:
    arguments = {"pretrained": "a/b", "max_frames_num": 8, "stgp_temperature": 2, "stgp_sampling": "first"}
    options, others = split_arguments(arguments)
    assert options == {"temperature": 2.0, "sampling": "first"}
    assert others == {"pretrained": "a/b", "max_frames_num": 8}
    assert split_arguments({"pretrained": "a/b"}) == ({}, {"pretrained": "a/b"})


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("frame_strides", "2:4:8", (2, 4, 8)),
        ("frame_strides", 4, (4,)),
        ("frame_strides", "none", ()),
        ("frame_strides", [2, 4], (2, 4)),
        ("grid_shape", "2:2:3:3:2:2", (2, 2, 3, 3, 2, 2)),
        ("kernel_size", 3, 3),
        ("stride", "none", None),
        ("stride", None, None),
        ("padding", "1:0", (1, 0)),
        ("output_size", "10:10", (10, 10)),
        ("output_size", "none", None),
        ("temperature", -1.0, -1.0),
        ("norm_type", float("inf"), float("inf")),
        ("norm_type", "inf", float("inf")),
        ("ceil_mode", True, True),
        ("ceil_mode", "true", True),
        ("backend", "reference", "reference"),
    ],
)
def test_values_as_a_command_line_gives_them(name: str, given: object, meant: object) -> None:
    options, _ = split_arguments({f"stgp_{name}": given})
    assert options == {name: meant}


def test_every_argument_of_grid_pool_can_be_given() -> None:
    named = set(inspect.signature(stgp.grid_pool).parameters) - {"x", "frame_counts", "out"}
    assert set(READERS) == named
    assert set(PoolOptions().arguments) == named


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stgp_temprature": 2}, "stgp_temprature=2"),
        ({"stgp_frame_strides": "2;4"}, "stgp_frame_strides must be integers like 2 or 2:4:8, or none, got '2;4'"),
        ({"stgp_frame_strides": 2.5}, "stgp_frame_strides must be integers"),
        ({"stgp_output_size": True}, "stgp_output_size must be integers"),
        ({"stgp_temperature": "hot"}, "stgp_temperature must be a number, got 'hot'"),
        ({"stgp_ceil_mode": 1}, "stgp_ceil_mode must be True or False, got 1"),
        ({"stgp_backend": 2}, "stgp_backend must be a word, got 2"),
        ({"stgp_norm_type": -1.0}, "stgp_norm_type: norm_type"),
        ({"stgp_sampling": "middle"}, "stgp_sampling: sampling"),
        ({"stgp_output_size": 7, "stgp_kernel_size": 3}, "stgp_output_size, stgp_kernel_size: "),
        ({"stgp": "no"}, "stgp must be True or False, got 'no'"),
        ({"stgp": False, "stgp_temperature": 2}, "stgp must not be False where stgp_temperature is given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_named(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        split_arguments(arguments)
    assert message in str(raised.value)


def test_no_options_where_the_models_own_pooling_is_asked_for() -> None:
    assert split_arguments({"stgp": False, "pretrained": "a/b"}) == (None, {"pretrained": "a/b"})
