"""Options are found among model arguments, as lmms-eval's command line gives them; tests/with_lmms_eval has more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stgridpool_kernels.integrations.base import PoolOptions
from stgridpool_kernels.integrations.modes import mode_options
from stgridpool_kernels.integrations.options import split_arguments

MODE = {"mode": "pool"}


def test_options_are_told_from_other_arguments() -> None:
    arguments = {"pretrained": "a/b", "max_frames_num": 8, "stgp_temperature": 2, "stgp_sampling": "first"}
    options, others = split_arguments(arguments, PoolOptions)
    assert options == {"temperature": 2.0, "sampling": "first"}
    assert others == {"pretrained": "a/b", "max_frames_num": 8}
    assert split_arguments({"pretrained": "a/b"}, PoolOptions) == ({}, {"pretrained": "a/b"})


def test_a_mode_is_an_option_where_it_has_a_default() -> None:
    assert split_arguments({"fps": 1}, mode_options, MODE) == ({"mode": "pool"}, {"fps": 1})
    given = {"stgp_mode": "grid", "stgp_frame_strides": "1:2"}
    assert split_arguments(given, mode_options, MODE) == ({"mode": "grid", "frame_strides": (1, 2)}, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stgp_temprature": 2}, "stgp_temprature=2"),
        ({"stgp_mode": "grid"}, "there must be an option stgp_mode, "),
        ({"stgp_frame_strides": "2;4"}, "stgp_frame_strides must be integers like 2,4,8, or none, got '2;4'"),
        ({"stgp_norm_type": -1.0}, "stgp_norm_type: norm_type"),
        ({"stgp_sampling": "middle"}, "stgp_sampling: sampling"),
        ({"stgp_output_size": 7, "stgp_kernel_size": 3}, "stgp_output_size, stgp_kernel_size: "),
        ({"stgp": "no"}, "stgp must be True or False, got 'no'"),
        ({"stgp": False, "stgp_temperature": 2}, "stgp must not be False where stgp_temperature is given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_named(arguments: dict, message: str) -> None:
    assert_refused(message, arguments, PoolOptions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stgp_mode": "both"}, "model arguments stgp_mode: mode must be 'grid' or 'pool', got 'both'"),
        ({"stgp_mode": True}, "stgp_mode must be a word, got True"),
        (
            {"stgp_mode": "grid", "stgp_temperature": 2},
            "model arguments stgp_mode, stgp_temperature: temperature must not be given in mode 'grid'",
        ),
        ({"stgp": False, "stgp_mode": "pool"}, "stgp must not be False where stgp_mode is given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_is_wrong_with_a_mode_is_named(arguments: dict, message: str) -> None:
    assert_refused(message, arguments, mode_options, MODE)


def assert_refused(message: str, arguments: dict, check: Callable, *defaults: dict) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        split_arguments(arguments, check, *defaults)
    assert message in str(raised.value)


def test_no_options_where_the_models_own_pooling_is_asked_for() -> None:
    assert split_arguments({"stgp": False, "pretrained": "a/b"}, mode_options, MODE) == (None, {"pretrained": "a/b"})
