"""Options are found among model arguments, as lmms-eval's command line gives them; tests/with_lmms_eval has more."""

from __future__ import annotations

import pytest

from stgridpool_kernels.integrations.lmms_eval import split_arguments


def test_options_are_told_from_other_arguments() -> None:
    arguments = {"pretrained": "a/b", "max_frames_num": 8, "stgp_temperature": 2, "stgp_sampling": "first"}
    options, others = split_arguments(arguments)
    assert options == {"temperature": 2.0, "sampling": "first"}
    assert others == {"pretrained": "a/b", "max_frames_num": 8}
    assert split_arguments({"pretrained": "a/b"}) == ({}, {"pretrained": "a/b"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stgp_temprature": 2}, "stgp_temprature=2"),
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
    with pytest.raises((TypeError, ValueError)) as raised:
        split_arguments(arguments)
    assert message in str(raised.value)


def test_no_options_where_the_models_own_pooling_is_asked_for() -> None:
    assert split_arguments({"stgp": False, "pretrained": "a/b"}) == (None, {"pretrained": "a/b"})
