"""Programmatic dependent launch of the Triton kernels: what overlapping launches wait for, in their machine code."""

from __future__ import annotations

import json

import pytest

from tests.tools.test_compile_report import run

pytest.importorskip("triton", reason="no Triton")

Launches = dict[str, list[tuple[str, bool, list[str]]]]


@pytest.fixture(scope="module")
def compiled() -> Launches:
    """Return the launches of some calls, as `tests.tools.compile_overlap` prints them."""
    found: Launches = json.loads(run("tests.tools.compile_overlap").stdout)
    return found


def test_no_launch_touches_thumbnails_before_the_launch_before_it_has_ended(compiled: Launches) -> None:
    """Before the wait, which every program of such a kernel reaches, tables alone are read and nothing is written."""
    overlapping = {call: launches for call, launches in compiled.items() if call.startswith("sm_90 ")}
    chains = 0
    for call, launches in overlapping.items():
        chain = [launch for launch in launches if launch[0] in ("rows_kernel", "windows_kernel", "mosaics_kernel")]
        chains += len(chain) > 1
        for number, (kernel, early, order) in enumerate(chain):
            assert early == (number > 0), call
            if len(chain) == 1:
                assert "PREEXIT" not in order
                assert "ACQBULK" not in order
                continue
            assert order.count("PREEXIT") == order.count("ACQBULK") == 1, (call, kernel)
            before = order[: order.index("ACQBULK")]
            if kernel == "windows_kernel":  # it has no pointer to thumbnails, and its last program alone waits
                assert before.count("EXIT") == 1, (call, kernel)
            else:
                assert set(before) == {"PREEXIT", "LDG"}, (call, kernel)
        for kernel, early, order in launches[len(chain) :]:  # gradients of nodes follow in order
            assert not early, (call, kernel)
            assert "PREEXIT" not in order
    assert chains == 5


def test_no_launch_overlaps_below_compute_capability_9(compiled: Launches) -> None:
    launches = [launch for call, launches in compiled.items() if call.startswith("sm_80 ") for launch in launches]
    assert launches
    assert not any(early or {"PREEXIT", "ACQBULK"} & set(order) for _, early, order in launches)
