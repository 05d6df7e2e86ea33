"""The backend `cpu` is right on random calls with every set of vector instructions.

There are twice as many calls as hypothesis draws.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from tests.support.instructions import restored
from tools import fuzz

pytestmark = pytest.mark.needs("library")


def test_random_calls(capability: str) -> None:
    with restored():
        for seed in range(2 * settings.default.max_examples):
            call = fuzz.draw_call(seed, capability)
            try:
                call.check()
            except AssertionError as error:
                raise AssertionError(f"{call!r}.check()") from error


LARGE_LOGITS: list[dict[str, Any]] = [
    {
        "shape": (2, 6, 5, 12, 512),
        "content": "usual",
        "arguments": {"frame_strides": (1,), "output_size": (4, 4), "temperature": 1.7},
    },
    {
        "shape": (64, 7, 6, 105),
        "content": "outlier",
        "arguments": {"frame_strides": (5, 4), "resize": "bilinear", "output_size": (5, 4), "temperature": 40.0},
    },
]


@pytest.mark.parametrize("case", LARGE_LOGITS, ids=["2000", "6000"])
def test_gradient_of_large_logits(case: dict[str, Any], capability: str) -> None:
    """The last bits of large logits in float32 are worth something, and a lane that sums many channels loses some."""
    call = fuzz.RandomCall(
        op="grid_pool", dtype="float32", spoilt=0, layout="contiguous", out_layout="contiguous", threads=2,
        capability=capability, seed=4, **case,
    )  # fmt: skip
    call.arguments |= {"norm_type": 1.0, "normalize_norm": False}
    with restored():
        call.check()


def test_random_wrong_tables() -> None:
    with restored():
        assert sum(map(fuzz.wrong_tables, range(100))) > 50
