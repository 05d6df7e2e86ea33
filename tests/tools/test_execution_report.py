"""The instructions of a call are added up over its launches, and times follow from them as the page says."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="no Triton")
from stgridpool_kernels.plan import grid_plan
from tools.execution_report import ExecutedCall, ExecutedLaunch, show
from tools.instruction_count import Programs

ROWS = Programs("rows", programs=4, busy=3, steps=9, pooled=5, shrunk=8, longest=4)
WINDOWS = Programs("windows", programs=6, busy=6, steps=6, pooled=6, shrunk=0, longest=1)
LISTING = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   STG.E.EF.128 [R2.64], R4 ;
        /*0020*/                   EXIT ;
"""


def test_instructions_are_those_of_all_warps() -> None:
    """A block of 8 warps takes three instructions a warp, whichever kind its program is of."""
    launch = ExecutedLaunch.of("kernel", LISTING, block_warps=8, resident_warps=24, programs=[ROWS, WINDOWS])
    assert launch.instructions == [8 * 3 * 3, 8 * 3 * 6]
    assert launch.bytes_in_flight(token_bytes=7168) == 84 << 10


def test_times_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    """579.15 million instructions take a millisecond at 2.5 a cycle, of 132 multiprocessors at 1.755 GHz."""
    launches = [
        ExecutedLaunch("first", 8, 16, [ROWS, WINDOWS], [400_000_000, 100_000_000]),
        ExecutedLaunch("second", 8, 16, [ROWS], [79_150_000]),
    ]
    plan = grid_plan([64], 24, 24)
    call = ExecutedCall("64x24x24x4096 bf16, grid_pool", plan, channels=4096, value_bytes=2, launches=launches)
    assert call.issue_seconds == pytest.approx(1e-3)
    assert call.moved_bytes == 64 * (24 * 24 + 12 * 12) * 4096 * 2
    show([call])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["1", "first", "4 rows", "9", "5", "8", "4", "400.00", "64"] in rows
    assert ["1", "first", "6 windows", "6", "6", "0", "1", "100.00", "64"] in rows
    assert ["all", "", "14", "24", "16", "16", "4", "579.15", ""] in rows
    assert call.summary() == (
        "579.1 million warp instructions: 1000 µs at 2.5 a cycle and multiprocessor. 377.5 MB: 126 µs on H100 at "
        "3.0 TB/s, 88 µs on H200 at 4.3 TB/s."
    )
