"""What the triton kernels compile to, without a GPU; and that a kernel which spilled or moved less would be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")
from stgridpool_kernels.backends import triton_kernels
from tools.compile_report import (
    ARCHITECTURES,
    GENERAL,
    NORMS,
    PUBLISHED,
    SHAPES,
    Case,
    Code,
    KernelUsage,
    limits_missed,
    main,
    read_code,
    read_usage,
    resident_warps,
)


def run(module: str, *arguments: str) -> str:
    """What a program prints in a process without the interpreter that this one may be in."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(tmp_path: Path, *arguments: str) -> list[KernelUsage]:
    """The rows that the command writes."""
    run("tools.compile_report", "--json", str(tmp_path / "rows.json"), *arguments)
    return [KernelUsage.from_json(row) for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]


def number_of_launches(case: Case) -> int:
    """For 64 frames at the published settings. A gradient shrinks the frames and two levels again, goes back through
    three levels, and comes to the frames."""
    if case.op == "norm_pool":
        return 1
    return 3 + 3 + 1 if case.gradient else 1 + 3


def test_published_settings(tmp_path):
    """No spills, tokens moved 16 bytes at a time, 16 or 24 warps on a multiprocessor, no division of integers.

    For every width and architecture.
    """
    rows = report(tmp_path, "--calls", "published")
    assert {(row.shape, row.arch) for row in rows} == {(shape, arch) for shape in SHAPES for arch in ARCHITECTURES}
    for shape in SHAPES:
        for arch in ARCHITECTURES:
            here = [row for row in rows if (row.shape, row.arch) == (shape, arch)]
            launches = [(call, n) for row in here for call, numbers in row.launches.items() for n in numbers]
            expected = [(case.name, n) for case in PUBLISHED for n in range(1, number_of_launches(case) + 1)]
            assert sorted(launches) == sorted(expected)
    assert all(row.published for row in rows)
    assert {row.kernel for row in rows} == {"grid_pool_kernel", "pair_gradient_kernel"}
    assert [(row.name, row.shape, row.arch, missed) for row in rows if (missed := limits_missed(row))] == []


def test_one_odd_side(tmp_path):
    """Odd heights of even widths and the other way round are kernels of their own, held to the same."""
    rows = report(tmp_path, "--calls", "published", "--shape", "64x27x24x3584", "64x24x27x3584", "--arch", "90")
    assert [(row.name, row.shape, missed) for row in rows if (missed := limits_missed(row))] == []


def test_general_kernels(tmp_path):
    """They do not spill either. The machine code is written where it is wanted."""
    rows = report(tmp_path, "--shape", "64x27x27x3584", "--arch", "90", "--cubins", str(tmp_path / "cubins"))
    assert {call for row in rows for call in row.launches} == {case.name for case in PUBLISHED + GENERAL}
    kernels = {"grid_pool_kernel", "norm_pool_kernel", "summary_kernel", "final_frames_kernel", "token_norm_kernel"}
    kernels |= {"pair_gradient_kernel", "window_weights_kernel", "token_gradient_kernel"}
    assert {row.kernel for row in rows} == kernels
    assert [(row.name, missed) for row in rows if (missed := limits_missed(row))] == []
    cubins = list((tmp_path / "cubins").iterdir())
    assert {file.name for file in cubins} == {row.file_name for row in rows}
    assert all(file.read_bytes().startswith(b"\x7fELF") for file in cubins)
    assert "grid_pool_kernel.grid_pool-1.64x27x27x3584.bf16.sm_90.cubin" in {file.name for file in cubins}


def test_every_norm_compiles(tmp_path):
    """The interpreter runs kernels that the compiler rejects, and every norm is compiled by itself. 512 channels are as
    many values a thread as 4096; only gradients of windows weighed by powers spill at that."""
    rows = report(tmp_path, "--shape", "16x9x8x512", "--arch", "90", "--calls", "all")
    assert {call for row in rows for call in row.launches} == {case.name for case in PUBLISHED + GENERAL + NORMS}
    spilled = [row for row in rows if row.stack or row.local or row.code.spills]
    powers = [row for row in rows if row.kernel == "pair_gradient_kernel" and "norm_type=3.0" in row.name]
    assert [row.name for row in spilled if row not in powers] == []


@pytest.mark.parametrize("size", [(27, 27), (24, 24)], ids=str)
def test_windows_are_computed_alike_however_a_row_is_cut(size: tuple[int, int]) -> None:
    """The compiler chooses which products and sums to fuse, and it has to choose alike wherever a window is pooled: in
    a walk or by itself."""
    found = json.loads(run("tests.tools.compile_cuts", *map(str, size)))
    assert len(found) >= 10
    assert len({(fused, subtracted) for fused, subtracted in found.values()}) == 1, found


def test_another_configuration(tmp_path):
    arguments = ("--shape", "16x9x9x512", "--arch", "90", "--calls", "grid_pool")
    usual, fewer = (report(tmp_path, *arguments, *more) for more in ((), ("--config", "odd_registers=96", "stages=1")))
    assert {row.name for row in usual} == {row.name for row in fewer} == {"grid_pool 1", "grid_pool 2, 3"}
    assert max(row.registers for row in fewer) <= 96 < max(row.registers for row in usual)
    assert any(row.code.copies for row in usual)
    assert not any(row.code.copies for row in fewer)


def test_other_numbers_of_frames_compile_nothing() -> None:
    """Nor do other counts of packed videos, or a batch."""
    found = json.loads(run("tests.tools.compile_other_frames"))
    assert all(first > 0 for first, *_ in found.values())
    assert {name: others for name, (_, *others) in found.items() if any(others)} == {}


def test_nothing_is_compiled_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64x27x3584"], "expected T x H x W x C without spaces, as 64x27x27x3584, got '64x27x3584'"),
        (["--shape", "64x27x27x0"], "expected T x H x W x C"),
        (["--shape", "64x1x27x8"], "64x1x27x8: kernel_size=[2, 2] with padding=[0, 0] leaves no window"),
        (["--arch", "75"], "invalid choice: 75"),
        (["--config", "mosaic=3"], "expected one of even_registers, frame_cells, mosaic_cells"),
        (["--config", "stages=many"], "= and a number, got 'stages=many'"),
        (["--json", "{file}/rows.json"], "--json: there is no folder {file}"),
        (["--cubins", "{file}"], "--cubins: [Errno 17] File exists: '{file}'"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(file=file) for argument in arguments])
    assert stopped.value.code == 2
    assert message.format(file=file) in capsys.readouterr().err


# ---- what the assertions above rest on ----


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
def test_instructions_are_counted(instructions, expected):
    expected = replace(NOTHING, instructions=len(instructions), **expected)
    assert read_code(listing(*instructions, "NOP")) == expected


def test_usage_is_read():
    head = "\nResource usage:\n Common:\n  GLOBAL:0\n"
    function = " Function some_kernel:\n  REG:128 STACK:40 SHARED:1024 LOCAL:8 CONSTANT[0]:648 TEXTURE:0\n"
    usage = read_usage(head + function)
    assert (usage["REG"], usage["STACK"], usage["SHARED"], usage["LOCAL"]) == (128, 40, 1024, 8)
    for other in (head, head + function + function):
        with pytest.raises(ValueError, match="expected the resources of one function"):
            read_usage(other)


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "expected"),
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
def test_resident_warps(arch, num_warps, registers, shared, expected):
    assert resident_warps(arch, num_warps, registers, shared) == expected


@pytest.mark.parametrize(
    ("case", "shape", "dtype", "arch", "expected"),
    [
        (Case("norm_pool", {}, published=True), (64, 27, 27, 3584), "bf16", 90, 24),
        (Case("norm_pool", {}, published=True), (64, 27, 27, 3584), "bf16", 100, 16),
        (Case("grid_pool", {}, published=True), (64, 27, 24, 4096), "fp16", 90, 24),
        (Case("grid_pool", {}, published=True), (64, 24, 27, 3584), "bf16", 90, 16),
        (Case("grid_pool", {}, published=True), (64, 24, 24, 3584), "bf16", 100, 16),
        (Case("norm_pool", {}, published=True), (64, 24, 24, 4104), "bf16", 90, 16),
        (Case("norm_pool", {}, published=True), (64, 24, 24, 1152), "fp32", 90, 16),
        (Case("norm_pool", {}, published=True, gradient=True), (64, 24, 24, 1152), "bf16", 90, 16),
        (Case("norm_pool", {"kernel_size": 3}), (64, 24, 24, 1152), "bf16", 90, 0),
    ],
    ids=str,
)
def test_enough_warps(case: Case, shape: tuple[int, ...], dtype: str, arch: int, expected: int) -> None:
    assert case.enough_warps(shape, dtype, arch) == expected


@pytest.fixture
def row() -> KernelUsage:
    """A kernel that keeps all limits."""
    code = replace(NOTHING, loads={"32": 6, "128": 8}, copies={"128": 24}, stores={"128": 6}, barriers=5)
    launches = {"grid_pool": [1]}
    return KernelUsage(launches, 16, "kernel", (8, 8, 8, 1024), "bf16", 90, 8, 128, 0, 0, 49280, code, 16, 32)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"stack": 8}, ["8 bytes of stack, 0 of local memory, 0 accesses to them"]),
        ({"local": 4}, ["0 bytes of stack, 4 of local memory, 0 accesses to them"]),
        ({"spills": 2}, ["0 bytes of stack, 0 of local memory, 2 accesses to them"]),
        ({"loads": {"128": 8, "16": 1}}, ["loads of 16 bits"]),
        ({"loads": {"128": 8, "64": 1}}, ["loads of 64 bits"]),
        ({"copies": {"128": 8, "32": 1}}, ["copies of 32 bits"]),
        ({"stores": {"128": 8, "64": 1}}, ["stores of 64 bits"]),
        ({"stores": {}}, ["no loads or no stores of tokens were found"]),
        ({"loads": {"32": 1}}, []),
        ({"loads": {"32": 1}, "copies": {}}, ["no loads or no stores of tokens were found"]),
        ({"atomics": 1}, ["1 atomic operations"]),
        ({"warps_by_registers": 8}, ["8 warps by registers, 32 by shared memory"]),
        ({"warps_by_shared": 15}, ["16 warps by registers, 15 by shared memory"]),
        ({"enough_warps": 24}, ["16 warps by registers, 32 by shared memory"]),
        ({"divisions": 3}, ["3 divisions of integers"]),
    ],
)
def test_missed_limits_are_told(row, changed, expected):
    code = {name: changed.pop(name) for name in list(changed) if hasattr(row.code, name)}
    assert limits_missed(replace(row, **changed, code=replace(row.code, **code))) == expected


def test_general_kernels_are_asked_for_no_more_than_not_to_spill(row):
    code = replace(NOTHING, loads={"16": 1}, stores={"32": 1}, atomics=1, divisions=2, barriers=5)
    general = replace(row, enough_warps=0, warps_by_registers=4, code=code)
    assert limits_missed(general) == []
    assert limits_missed(replace(general, stack=8)) == ["8 bytes of stack, 0 of local memory, 0 accesses to them"]
