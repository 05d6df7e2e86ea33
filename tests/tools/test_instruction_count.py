"""Executed instructions are counted as by hand, from listings of nvdisasm."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")
from tests.support.wheels import run
from tools.instruction_count import Programs, count_instructions, read_graph
from tools.machine_code import ARCHITECTURES, find_tool, read_cubin, search_tool

HERE = Path(__file__).parent
LISTING = (HERE / "small_kernel.sm_90.sass").read_text(encoding="utf-8")
"""The listing that nvdisasm prints of small_kernel.cu, compiled by nvcc 13.0 for sm_90."""

ROWS = Programs("rows", programs=10, busy=8, steps=50, pooled=20, shrunk=30, longest=7)
"""The programs of a kernel, two of which have no step. Some of their steps do not pool, or do not shrink."""


def test_a_kernel_counted_by_hand() -> None:
    """The numbers are those of small_kernel.sm_90.sass, whose addresses count instructions of 16 bytes."""
    every_program = 4  # 0000 to 0030, where programs without a step end
    busy = 10 + 1  # 0040 to 00d0 before the loop, 0430 behind it
    step = 10 + 5 + 6  # 00e0 to 0170, 0280 to 02c0, 03d0 to 0420
    pools = 7 + 4 + 1 + 1  # 0180 to 01e0, the root at 0220 to 0250, 0260, the store at 0270; not its call from 01f0 on
    shrinks = 5 + 4 + 1 + 3  # 02d0 to 0310, the division at 0350 to 0380, 0390, 03a0 to 03c0; not the call from 0320 on
    graph = read_graph(LISTING)
    for pooled, shrunk in ((20, 30), (0, 30), (20, 0), (50, 50), (0, 0)):
        expected = 10 * every_program + 8 * busy + 50 * step + pooled * pools + shrunk * shrinks
        assert count_instructions(graph, replace(ROWS, pooled=pooled, shrunk=shrunk)) == expected
    assert count_instructions(graph, replace(ROWS, busy=0, steps=0, pooled=0, shrunk=0)) == 10 * every_program


def between(listing: str, first: str, last: str) -> int:
    """Return the number of instructions that are listed between two pieces of text, the first of which may be ""."""
    start = listing.index(first) + len(first)
    return len(re.findall(r"^ +/\*[0-9a-f]{4}\*/", listing[start : listing.index(last, start)], re.MULTILINE))


@pytest.mark.skipif(search_tool("nvcc") is None, reason="no compiler: nvcc is not in PATH or CUDA_HOME")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_kernel_that_is_compiled_now(tmp_path: Path, arch: int) -> None:
    """Instructions between labels are counted in the text of the listing, without basic blocks."""
    cubin = tmp_path / "small.cubin"
    run(find_tool("nvcc"), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-o", cubin, HERE / "small_kernel.cu")
    (row,) = read_cubin(cubin, arch)
    listing = row.listing
    calls = [between(listing, f"BRA `(.L_x_{n}) ;\n", f".L_x_{n}:") for n in (2, 6)]
    pools, shrinks = (between(listing, f"BRA `(.L_x_{n}) ;\n", f".L_x_{n}:") for n in (0, 4))
    every = between(listing, "", ".weak")
    every_program, busy = between(listing, "", "EXIT"), between(listing, "", ".L_x_8:")
    behind = between(listing, "BRA `(.L_x_8) ;\n", ".weak")
    assert min(pools, shrinks) > 4 * max(calls) / 3 > 0
    graph = read_graph(listing)
    step = every - busy - behind - pools - shrinks
    expected = 10 * every_program + 8 * (busy - every_program + behind) + 50 * step
    expected += 20 * (pools - calls[0]) + 30 * (shrinks - calls[1])
    assert count_instructions(graph, ROWS) == expected


def listing(*lines: str) -> str:
    """Return a listing of these instructions and labels, which end with a colon."""
    return "".join(line + "\n" if line.endswith(":") else f"        /*0000*/        {line} ;\n" for line in lines)


DISPATCH = (
    *("S2R R0, SR_CTAID.X", "@P0 BRA `(.L_windows)"),
    *("LDG.E R4, [R2.64]", "@!P0 EXIT", ".L_loop:", "FADD R1, R1, R2", "@!P1 BRA `(.L_shrink)"),
    *("MUFU.EX2 R1, R1", "STG.E.EF.128 [R2.64], R4", ".L_shrink:", "@!P2 BRA `(.L_next)", "STG.E.EL.128 [R6.64], R4"),
    *(".L_next:", "@P3 BRA `(.L_loop)", "EXIT"),
    *(".L_windows:", "LDG.E.128 R4, [R2.64]", "MUFU.EX2 R1, R1", "STG.E.EF.128 [R2.64], R4", "EXIT"),
    *(".L_end:", "BRA `(.L_end)", "NOP"),
)
"""A kernel whose first blocks walk rows and whose other blocks take a window each."""


def test_kinds_of_programs_are_told_apart() -> None:
    graph = read_graph(listing(*DISPATCH))
    windows = Programs("windows", programs=7, busy=7, steps=7, pooled=7, shrunk=0, longest=1)
    assert count_instructions(graph, windows) == 7 * (2 + 4)
    assert count_instructions(graph, ROWS) == 10 * (2 + 2) + 8 * 1 + 50 * (2 + 1 + 1) + 20 * 2 + 30 * 1


def test_one_loop_for_both_kinds() -> None:
    """In code that does not tell windows from rows, a window counts as a step of the loop that stores no cell."""
    graph = read_graph(listing(*DISPATCH[2:15], *DISPATCH[-3:]))
    windows = Programs("windows", programs=7, busy=7, steps=20, pooled=20, shrunk=0, longest=3)
    assert count_instructions(graph, windows) == 7 * 2 + 7 * 1 + 20 * (2 + 1 + 1 + 2)


def test_stores_with_a_predicate_are_issued_in_every_step() -> None:
    lines = (
        ".L_loop:",
        "FADD R1, R1, R2",
        "@!P4 STG.E.128 [R2.64], R4",
        "@P5 STG.E.EF [R4.64], R4",
        "@P3 BRA `(.L_loop)",
    )
    assert count_instructions(read_graph(listing("MOV R1, R2", *lines, "EXIT")), ROWS) == 8 * (1 + 1) + 50 * 4


def test_programs_of_one_step_have_no_loop() -> None:
    """A program without a step skips both stores. It is not known how, so all that leads past them counts."""
    cell = ("@!P1 BRA `(.L_pool)", "STG.E.128 [R2.64], R4", ".L_pool:")
    token = ("@P2 EXIT", "MUFU.EX2 R1, R1", "STG.E.EF [R4], R4", "EXIT")
    rows = replace(ROWS, steps=8, pooled=3, shrunk=6)
    for early in ((), ("@P0 EXIT",)):
        graph = read_graph(listing("MOV R1, R2", *early, "FADD R1, R1, R2", *cell, *token))
        assert count_instructions(graph, rows) == 10 * (4 + len(early)) + 6 * 1 + 3 * 3


def test_programs_that_exit_before_their_step() -> None:
    lines = ("MOV R1, R2", "@P0 EXIT", "FADD R1, R1, R2", "@!P1 STG.E.128 [R2.64], R4", "@P2 EXIT", "MUFU.EX2 R1, R1")
    rows = replace(ROWS, steps=8, pooled=3, shrunk=6)
    graph = read_graph(listing(*lines, "STG.E.EF [R4], R4", "EXIT"))
    assert count_instructions(graph, rows) == 10 * 2 + 8 * 3 + 3 * 3


def test_the_longer_side_of_a_condition_counts() -> None:
    first = ("@P0 BRA `(.L_else)", "FADD R1, R1, R2", "BRA `(.L_end)", ".L_else:", "FMUL R1, R1, R2", "FMUL R1, R1, R2")
    graph = read_graph(listing(*first, "FMUL R1, R1, R2", ".L_end:", "STG.E.EF [R2], R1", "EXIT"))
    assert count_instructions(graph, replace(ROWS, programs=8, steps=8, pooled=8, shrunk=0)) == 8 * (1 + 3 + 2)


def test_a_step_that_is_compiled_with_and_without_a_token() -> None:
    """Both sides of the loop store a cell under a condition. One is for steps that pool, one for those that do not."""
    cell = ("@!P2 BRA `(.L_{0})", "STG.E.128 [R6.64], R4", ".L_{0}:")
    pools = ("FADD R1, R1, R2", "MUFU.EX2 R1, R1", "STG.E.EF.128 [R2.64], R4", *(line.format("a") for line in cell))
    plain = (*["FMUL R1, R1, R2"] * 9, *(line.format("b") for line in cell))
    loop = (".L_loop:", "@!P1 BRA `(.L_plain)", *pools, "BRA `(.L_next)", ".L_plain:", *plain, ".L_next:")
    graph = read_graph(listing(*loop, "@P3 BRA `(.L_loop)", "EXIT"))
    rows = replace(ROWS, steps=50, pooled=30, shrunk=35)  # 15 steps do both
    assert count_instructions(graph, rows) == 8 * 1 + 50 * 2 + 30 * 5 + 20 * (9 + 1) + 35 * 1


def test_a_loop_inside_a_step_counts_once_a_step() -> None:
    inner = (".L_inner:", "FADD R1, R1, R2", "@P1 BRA `(.L_inner)")
    graph = read_graph(listing(".L_loop:", *inner, "STG.E.EF [R2], R1", "@P3 BRA `(.L_loop)", "EXIT"))
    assert count_instructions(graph, replace(ROWS, pooled=50, shrunk=0)) == 8 * 1 + 50 * 4


def test_paths_that_warps_do_not_take() -> None:
    """Nothing behind a trap counts, and no code for a warp that has diverged at a shuffle."""
    graph = read_graph(
        listing(
            *("BRA.DIV UR4, `(.L_slow)", "SHFL.BFLY R1, R2, 0x1", ".L_back:", "STG.E.EF [R2], R1", "EXIT"),
            *(".L_slow:", "WARPSYNC.COLLECTIVE R5, `(.L_more)", ".L_more:", "BRA `(.L_back)"),
            *("BPT.TRAP 0x1", "MOV R1, R2", "EXIT"),
        )
    )
    assert count_instructions(graph, replace(ROWS, programs=8, steps=8, pooled=8)) == 8 * 4
    trapped = read_graph(listing("MOV R1, R2", "BPT.TRAP 0x1", "STG.E.EF [R2], R1", "EXIT"))
    assert count_instructions(trapped, ROWS) == 0


def test_a_call_that_no_path_leads_past_counts() -> None:
    graph = read_graph(
        listing("CALL.REL.NOINC `(f)", "STG.E.EF [R2], R1", "EXIT", "f:", "MOV R1, R2", "RET.REL R1 `(k)")
    )
    assert count_instructions(graph, replace(ROWS, programs=8, steps=8, pooled=8)) == 8 * 3


def test_an_indirect_branch_has_the_targets_that_are_listed() -> None:
    branch = 'BRX R2 -0x30 (*"BRANCH_TARGETS .L_a,.L_b"*)'
    graph = read_graph(listing(branch, "MOV R1, R2", ".L_a:", "EXIT", ".L_b:", "NOP", "EXIT"))
    assert graph[0].successors == (2, 3)
    conditional = read_graph(listing("BRA.U !UP0, `(.L_a)", "MOV R1, R2", ".L_a:", "EXIT"))
    assert conditional[0].successors == (2, 1)


@pytest.mark.parametrize("branch", ["BRX R2 -0x30", "BRA `(.L_a)"])
def test_a_target_that_is_not_listed(branch: str) -> None:
    with pytest.raises(ValueError, match="no label in the listing is the target of BR"):
        read_graph(listing(branch, "EXIT"))
