"""Machine code is read as the CUDA toolkit prints it, and a kernel that spilled or moved less would be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton")
from tools.machine_code import Code, KernelUsage, limits_missed, read_code, read_usage, resident_warps


def listing(*instructions: str) -> str:
    return "".join(f"        /*{16 * n:04x}*/              {text} ;\n" for n, text in enumerate(instructions))


NOTHING = Code(loads={}, copies={}, stores={}, atomics=0, spills=0, barriers=0, divisions=0, instructions=0)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (["MOV R1, c[0x0][0x28]", "LDS.128 R4, [R2]", "STS [R2], R3", "LDSM.16.M88 R4, [R9]", "EXIT"], {}),
        (["LDG.E R0, desc[UR4][R2.64+0xc]", "@P0 LDG.E R4, [R2.64]"], {"loads": {"32": 2}}),
        (["@!P4 LDG.E.EF.128 R8, desc[UR4][R2.64]", "LDG.E.128.CONSTANT R8, [R4.64]"], {"loads": {"128": 2}}),
        (["LDG.E.U16 R8, [R2.64]", "LDG.E.S8 R8, [R2.64]"], {"loads": {"16": 1, "8": 1}}),
        (["LD.E.64 R8, [R2.64]", "LDG.E.ENL2.256 R8, R12, [R2.64]"], {"loads": {"64": 1, "256": 1}}),
        (["@!P0 LDGSTS.E.BYPASS.LTC128B.128 [R5+0x2000], [R2.64], P1"], {"copies": {"128": 1}}),
        (["LDGSTS.E [R5], desc[UR6][R2.64]"], {"copies": {"32": 1}}),
        (["@P3 STG.E.EL.128 desc[UR18][R68.64+0x1000], R24", "ST.E.U8 [R2.64], R3"], {"stores": {"128": 1, "8": 1}}),
        (["STL [R1+0x4], R2", "@P1 LDL.LU.64 R0, [R1]"], {"spills": 2}),
        (["BAR.SYNC.DEFER_BLOCKING 0x0", "@P0 BAR.ARV 0x1, 0x100", "BSYNC B0"], {"barriers": 2}),
        (["RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R0", "@UP0 ATOMG.E.CAS PT, R5, [R2], R4, R5"], {"atomics": 2}),
        (["I2F.U32.RP R0, UR4", "I2F.RP R3, R2", "I2F.U32 R4, R5", "I2FP.F32.S32 R1, R2"], {"divisions": 2}),
    ],
)
def test_instructions_are_counted(instructions: list[str], expected: dict[str, Any]) -> None:
    expected_code = replace(NOTHING, instructions=len(instructions), **expected)
    assert read_code(listing(*instructions, "NOP")) == expected_code


def test_usage_is_read() -> None:
    head = "\nResource usage:\n Common:\n  GLOBAL:0\n"
    assert read_usage(head) == {}
    line = "REG:128 STACK:40 SHARED:1024 LOCAL:8 CONSTANT[0]:648 TEXTURE:0"
    found = read_usage(f"{head} Function some_kernel:\n  {line}\n Function another:\n  {line.replace('128', '64')}\n")
    assert {name: usage["REG"] for name, usage in found.items()} == {"some_kernel": 128, "another": 64}
    assert [found["some_kernel"][what] for what in ("STACK", "SHARED", "LOCAL")] == [40, 1024, 8]


@pytest.mark.parametrize(
    ("arch", "block_warps", "registers", "shared", "expected"),
    [
        (80, 8, 128, 49280, (16, 24)),  # 4 warps of 4096 registers in each part; 3 × 50304 of 167936 bytes
        (90, 8, 128, 49280, (16, 32)),
        (90, 8, 121, 0, (16, 64)),  # rounded up to 128
        (90, 8, 129, 0, (8, 64)),  # 3 warps in each part, 12 in all: one block
        (90, 4, 129, 0, (12, 64)),
        (86, 8, 64, 49280, (32, 16)),  # 48 warps, 100 KiB
        (90, 1, 32, 0, (32, 32)),  # 32 blocks
        (80, 8, 255, 166912, (8, 8)),  # all of the shared memory
    ],
)
def test_resident_warps(arch: int, block_warps: int, registers: int, shared: int, expected: tuple[int, int]) -> None:
    assert resident_warps(arch, block_warps, registers, shared) == expected


@pytest.fixture
def row() -> KernelUsage:
    """A kernel of the published settings that keeps all limits."""
    code = replace(NOTHING, loads={"32": 6, "128": 8}, copies={"128": 24}, stores={"128": 6}, barriers=5)
    usage = KernelUsage("kernel", 90, registers=128, stack=0, local=0, shared=49280, code=code, enough_warps=16)
    limits = {"loads of 32 bits": 10, "divisions of integers": 0}
    return replace(usage, resident={"by registers": 16, "by shared memory": 32}, limits=limits)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"stack": 8}, ["8 bytes of stack, 0 of local memory, 0 accesses to them"]),
        ({"local": 4}, ["0 bytes of stack, 4 of local memory, 0 accesses to them"]),
        ({"spills": 2}, ["0 bytes of stack, 0 of local memory, 2 accesses to them"]),
        ({"loads": {"128": 8, "16": 1}}, ["1 loads of 16 bits"]),
        ({"loads": {"128": 8, "64": 3}}, ["3 loads of 64 bits"]),
        ({"loads": {"256": 8}}, []),
        ({"copies": {"128": 8, "32": 1}}, ["1 copies of 32 bits"]),
        ({"stores": {"128": 8, "64": 1, "32": 2}}, ["1 stores of 64 bits", "2 stores of 32 bits"]),
        ({"stores": {}}, ["no stores of tokens"]),
        ({"loads": {"32": 1}}, []),
        ({"loads": {"32": 1}, "copies": {}}, ["no loads of tokens"]),
        ({"loads": {"32": 64, "128": 20}}, ["64 loads of 32 bits, more than 10"]),
        ({"loads": {"32": 64, "128": 20}, "limits": {}}, []),
        ({"atomics": 1}, ["1 atomic operations"]),
        ({"divisions": 3}, ["3 divisions of integers, more than 0"]),
        ({"divisions": 3, "limits": {}}, []),
        ({"resident": {"by registers": 8, "by shared memory": 16}}, ["room for 8 warps by registers"]),
        ({"resident": {"with 4096 channels": 15}}, ["room for 15 warps with 4096 channels"]),
        ({"enough_warps": 24}, ["room for 16 warps by registers"]),
    ],
)
def test_missed_limits_are_told(row: KernelUsage, changed: dict[str, Any], expected: list[str]) -> None:
    code = {name: value for name, value in changed.items() if hasattr(row.code, name)}
    usage = {name: value for name, value in changed.items() if name not in code}
    assert limits_missed(replace(row, **usage, code=replace(row.code, **code))) == expected


def test_general_kernels_may_do_all_but_spill_and_add_atomically(row: KernelUsage) -> None:
    code = replace(NOTHING, loads={"16": 1}, stores={"32": 1}, divisions=2, barriers=5)
    general = replace(row, enough_warps=0, resident={"by registers": 4}, code=code)
    assert limits_missed(general) == []
    assert limits_missed(replace(general, stack=8)) == ["8 bytes of stack, 0 of local memory, 0 accesses to them"]
    assert limits_missed(replace(general, code=replace(code, atomics=1))) == ["1 atomic operations"]
