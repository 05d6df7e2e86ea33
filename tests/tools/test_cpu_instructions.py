"""Counted instructions of the CPU kernels: the log of QEMU is read as it is meant, and float16 costs little on Arm."""

from __future__ import annotations

import pytest

from tools.cpu_instructions import count_instructions, measure

LOG = """----------------
IN: start
0x0040:  d503201f  nop
0x0044:  97ffeeac  bl       #0x80

Trace 0: 0x7fd0a8000100 [0000000001009331/0000000000000040/00000001/00000200] start
----------------
IN: loop
0x0080:  48 c7 84 24 90 00 00 00  movq     $0x37f, 0x90(%rsp)
0x0088:  7f 03 00 00
0x008c:  48 89 e5                 movq     %rsp, %rbp
0x008f:  75 ef                    jne      0x80

Trace 0: 0x7fd0a8000240 [0000000001009331/0000000000000080/00000001/00000200] loop
Trace 0: 0x7fd0a8000240 [0000000001009331/0000000000000080/00000001/00000200] loop
Trace 0: 0x7fd0a8000100 [0000000001009331/0000000000000040/00000001/00000200] start
a line of the program itself
"""


def test_blocks_count_as_often_as_they_are_executed() -> None:
    assert count_instructions(LOG.splitlines(keepends=True)) == 2 + 3 + 3 + 2
    assert count_instructions([]) == 0


@pytest.mark.aarch64
@pytest.mark.slow
def test_float16_is_converted_by_instructions_on_aarch64() -> None:
    """Conversions of 16 channels are 4 instructions for each token of a window, and 4 for the result.

    Loads and stores of half as many bytes make up for some of them. Code that converts one number after the other would
    execute more than ten times as many.
    """
    name = "norm_pool, a window"
    found = measure(["aarch64"], [name], ["float16", "float32"])
    assert 0 < found[name, "float16", "aarch64"] < 1.3 * found[name, "float32", "aarch64"]
