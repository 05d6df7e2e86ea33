"""Random calls of the backend `cpu`, as many as take seconds, with every set of vector instructions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.instructions import restored
from tools import fuzz

pytestmark = pytest.mark.needs("library")


def test_random_calls(capability: str) -> None:
    with restored():
        for seed in range(120):
            call = fuzz.draw_call(seed, capability)
            try:
                call.check()
            except AssertionError as error:
                raise AssertionError(f"{call!r}.check()") from error


LARGE_LOGITS: dict[str, dict[str, Any]] = {
    "2000": {
        "shape": (2, 6, 5, 12, 512),
        "content": "usual",
        "arguments": {"frame_strides": (1,), "output_size": (4, 4), "temperature": 1.7},
    },
    "6000": {
        "shape": (64, 7, 6, 105),
        "content": "outlier",
        "arguments": {"frame_strides": (5, 4), "resize": "bilinear", "output_size": (9, 7), "temperature": 40.0},
    },
}


@pytest.mark.parametrize("case", LARGE_LOGITS.values(), ids=LARGE_LOGITS.keys())
def test_gradient_of_large_logits(case: dict[str, Any], capability: str) -> None:
    """In float32 their last bits are worth something, and a lane that adds up many channels loses some."""
    sums = {"norm_type": 1.0, "normalize_norm": False}
    call = fuzz.RandomCall(
        **{"op": "grid_pool", "dtype": "float32", "spoilt": 0, "layout": "contiguous", "out_layout": "contiguous"},
        **{"threads": 2, "capability": capability, "seed": 4},
        **(case | {"arguments": case["arguments"] | sums}),
    )
    with restored():
        call.check()


def test_random_wrong_tables() -> None:
    with restored():
        assert sum(map(fuzz.wrong_tables, range(200))) > 100
