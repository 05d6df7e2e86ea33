"""What the kernels of the backends triton and cuda compile to, without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")
import triton

from stgridpool_kernels.backends import triton_kernels
from tests.support.cuda_emulation import KERNELS
from tools.compile_report import (
    CHANNELS,
    GENERAL,
    NORMS,
    PUBLISHED,
    SHAPES,
    WIDE,
    Case,
    block_threads,
    compile_file,
    executed_by_cuda,
    main,
    nvcc_version,
    show_shape,
    with_blocks,
)
from tools.execution_report import show
from tools.machine_code import ARCHITECTURES, Code, KernelUsage, limits_missed, search_tool


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process without the interpreter that this one may be in."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)


def report(tmp_path: Path, *arguments: str) -> list[KernelUsage]:
    """Return the rows that the command writes. Its exit code says whether they keep all limits."""
    done = run("tools.compile_report", "--json", str(tmp_path / "rows.json"), *arguments)
    assert (tmp_path / "rows.json").exists(), done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    rows = [KernelUsage(**row | {"code": Code(**row["code"])}) for row in found]
    assert done.returncode == any(map(limits_missed, rows)), done.stderr
    return rows


def missed(rows: list[KernelUsage]) -> list[tuple[str, str, int, list[str]]]:
    return [(row.title, row.name, row.arch, limits) for row in rows if (limits := limits_missed(row))]


FUSED_KERNELS = {"rows_kernel", "windows_kernel", "mosaics_kernel", "window_gradient_kernel"}
"""The Triton kernels of the published settings."""


def number_of_launches(case: Case) -> int:
    """Return the number for 64 frames at the published settings: rows, windows, and the mosaics of three levels.

    A gradient shrinks the frames and two levels again, goes back through three levels, and comes to the frames.
    """
    if case.op == "norm_pool":
        return 1
    return 3 + 3 + 1 if case.gradient else 2 + 3


@pytest.mark.parametrize(
    ("shapes", "architectures"), [(SHAPES[:1], [90]), pytest.param(SHAPES, ARCHITECTURES, marks=pytest.mark.slow)]
)
def test_published_settings(tmp_path: Path, shapes: list[tuple[int, ...]], architectures: list[int]) -> None:
    """For every width and architecture, nothing spills, tokens move by 128 bits, and 16 or 24 warps are resident."""
    given = ("--shape", *map(show_shape, shapes), "--arch", *map(str, architectures))
    rows = report(tmp_path, "--calls", "published", *given)
    launches = [(row.title, row.arch, call, n) for row in rows for call, ns in row.launches.items() for n in ns]
    assert sorted(launches) == sorted(
        (f"{show_shape(shape)} bf16", arch, case.name, n)
        for shape, arch, case in product(shapes, architectures, PUBLISHED)
        for n in range(1, number_of_launches(case) + 1)
    )
    assert all(row.published for row in rows)
    assert {row.kernel for row in rows} == FUSED_KERNELS
    assert missed(rows) == []
    assert max(row.registers for row in rows if row.name == "grid_pool 1") > 96
    assert any(row.code.copies for row in rows if row.name == "grid_pool 1")


@pytest.mark.slow
def test_tokens_of_several_blocks(tmp_path: Path) -> None:
    """The fused kernels keep their limits where tokens have more channels than a block, and the norm has 4096."""
    rows = report(tmp_path, "--calls", "published", "--shape", show_shape(WIDE), "--dtype", "bf16", "fp16")
    assert {row.kernel for row in rows if row.published} == {"rows_kernel", "windows_kernel", "mosaics_kernel"}
    assert missed(rows) == []


@pytest.mark.slow
def test_one_odd_side(tmp_path: Path) -> None:
    """Odd heights of even widths, and even heights of odd widths, have kernels of their own with the same limits."""
    rows = report(tmp_path, "--calls", "published", "--shape", "64x27x24x3584", "64x24x27x3584", "--arch", "90")
    assert missed(rows) == []


@pytest.mark.slow
def test_general_kernels(tmp_path: Path) -> None:
    """General kernels do not spill either, and the machine code is written into the folder that is given."""
    rows = report(tmp_path, "--shape", "64x27x27x3584", "--arch", "90", "--cubins", str(tmp_path / "cubins"))
    assert {call for row in rows for call in row.launches} == {case.name for case in PUBLISHED + GENERAL}
    kernels = {"norm_pool_kernel", "summary_kernel", "final_frames_kernel", "token_norm_kernel"}
    kernels |= {"window_weights_kernel", "token_gradient_kernel"}
    assert {row.kernel for row in rows} == FUSED_KERNELS | kernels
    assert missed(rows) == []
    cubins = list((tmp_path / "cubins").iterdir())
    assert Counter(file.name.split(".")[0] for file in cubins) == Counter(row.kernel for row in rows)
    assert all(file.read_bytes().startswith(b"\x7fELF") for file in cubins)
    assert "rows_kernel.grid_pool-1.64x27x27x3584.bf16.sm_90.cubin" in {file.name for file in cubins}


@pytest.mark.slow
def test_every_norm_compiles(tmp_path: Path) -> None:
    """Every norm is compiled by itself, since the interpreter runs kernels that the compiler rejects.

    512 channels give a thread as many values as 4096. Only gradients of windows weighed by powers spill then.
    """
    rows = report(tmp_path, "--shape", "16x11x10x512", "--arch", "90", "--calls", "all")
    assert {call for row in rows for call in row.launches} == {case.name for case in PUBLISHED + GENERAL + NORMS}
    spilled = [row for row in rows if row.stack or row.local or row.code.spills]
    powers = [row for row in rows if row.kernel == "window_gradient_kernel" and "norm_type=3.0" in row.name]
    assert [row.name for row in spilled if row not in powers] == []


@pytest.mark.parametrize("size", [(27, 27), pytest.param((24, 24), marks=pytest.mark.slow)], ids=str)
def test_windows_are_computed_alike_however_a_row_is_cut(size: tuple[int, int]) -> None:
    """The compiler fuses the same products and sums wherever a window is pooled, in a walk or by itself."""
    found = json.loads(run("tests.tools.compile_cuts", *map(str, size)).stdout)
    assert len(found) >= 10
    assert len({(fused, subtracted) for fused, subtracted in found.values()}) == 1, found


PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def missing_on_page(printed: str, shape: tuple[int, ...]) -> list[str]:
    """Return the lines that docs/kernels.md lacks of what the command prints of grid_pool's executed instructions."""
    start = printed.index(f"Executed by {show_shape(shape)} bf16, grid_pool:")
    end = printed.index("TB/s.\n", start) + len("TB/s.")
    lines, on_page = printed[start:end].splitlines(), PAGE.splitlines()
    assert len(lines) > 8
    return [line for line in lines if line not in on_page]


def millions_on_page(column: int) -> list[float]:
    """Return a column of the page's table of totals, whose rows are for the first shapes of `SHAPES`."""
    table = PAGE.split("\n| millions of warp instructions |", 1)[1].split("\n\n", 1)[0]
    return [float(row.split("|")[column]) for row in table.splitlines()[2:]]


def test_executed_instructions(tmp_path: Path) -> None:
    """The page has what the command prints with the Triton that is pinned, and the totals with the oldest one too.

    norm_pool executes fewer instructions than grid_pool, which executes the most where it pools the last row too.
    """
    arguments = ("--calls", "published", "--arch", "90", "--shape", *map(show_shape, SHAPES[:2]))
    done = run("tools.compile_report", "--json", str(tmp_path / "rows.json"), *arguments)
    found = json.loads((tmp_path / "rows.json").read_text())["executed"]
    forwards = [case.name for case in PUBLISHED if not case.gradient]
    assert list(found) == [f"{show_shape(shape)} bf16, {name}" for shape in SHAPES[:2] for name in forwards]
    for shape in SHAPES[:2]:
        every, with_last_row, pooled = (n for title, n in found.items() if title.startswith(show_shape(shape)))
        assert 0.4 * every < pooled < every <= with_last_row
    column = {"3.6.0": 2, "3.9.0": 3}.get(triton.__version__)
    if column is not None:
        totals = [round(found[f"{show_shape(shape)} bf16, grid_pool"] / 1e6, 1) for shape in SHAPES[:2]]
        assert totals == millions_on_page(column)
    if column == 3:
        assert [missing_on_page(done.stdout, shape) for shape in SHAPES[:2]] == [[], []]


def test_another_configuration(tmp_path: Path) -> None:
    """Neither limit holds in the usual configuration, as `test_published_settings` shows."""
    arguments = ("--shape", show_shape(SHAPES[0]), "--arch", "90", "--calls", "grid_pool")
    rows = report(tmp_path, *arguments, "--config", "odd_registers=96", "stages=1")
    assert {row.name for row in rows} == {"grid_pool 1", "grid_pool 2", "grid_pool 3, 4, 5"}
    assert max(row.registers for row in rows) <= 96
    assert not any(row.code.copies for row in rows)


def test_other_numbers_of_frames_compile_nothing() -> None:
    """Other counts of packed videos and a batch compile nothing either."""
    found = json.loads(run("tests.tools.compile_other_frames").stdout)
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
        (["--backend", "cuda", "--calls", "all"], "--calls, --config, --cubins are for the backend triton"),
        (["--backend", "cuda", "--shape", "64x1x27x8"], "64x1x27x8: kernel_size=[2, 2] with padding=[0, 0] leaves no"),
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


@pytest.mark.parametrize(
    ("case", "kernel", "shape", "dtype", "arch", "expected"),
    [
        (Case("norm_pool", {}, published=True), "windows_kernel", (64, 27, 27, 3584), "bf16", 90, 24),
        (Case("norm_pool", {}, published=True), "windows_kernel", (64, 27, 27, 3584), "bf16", 100, 16),
        (Case("grid_pool", {}, published=True), "rows_kernel", (64, 24, 24, 4096), "fp16", 90, 24),
        (Case("grid_pool", {}, published=True), "rows_kernel", (64, 27, 24, 4096), "fp16", 90, 16),
        (Case("grid_pool", {}, published=True), "mosaics_kernel", (64, 24, 27, 3584), "bf16", 90, 16),
        (Case("grid_pool", {}, published=True), "windows_kernel", (64, 24, 27, 3584), "bf16", 90, 24),
        (Case("grid_pool", {}, published=True), "rows_kernel", (64, 24, 24, 3584), "bf16", 100, 16),
        (Case("norm_pool", {}, published=True), "windows_kernel", (64, 24, 24, 4104), "bf16", 90, 16),
        (Case("norm_pool", {}, published=True), "windows_kernel", (64, 24, 24, 1152), "fp32", 90, 16),
        (Case("norm_pool", {}, published=True, gradient=True), "any", (64, 24, 24, 1152), "bf16", 90, 16),
        (Case("norm_pool", {"kernel_size": 3}), "any", (64, 24, 24, 1152), "bf16", 90, 0),
    ],
    ids=str,
)
def test_enough_warps(case: Case, kernel: str, shape: tuple[int, ...], dtype: str, arch: int, expected: int) -> None:
    assert case.enough_warps(kernel, shape, dtype, arch) == expected


# ---- the backend cuda ----

needs_nvcc = pytest.mark.skipif(search_tool("nvcc") is None, reason="no compiler: nvcc is not in PATH or CUDA_HOME")


@needs_nvcc
def test_a_cuda_kernel_keeps_the_limits() -> None:
    rows = compile_file(KERNELS / "pool.cu", 90)
    assert {re.split("[<(]", row.kernel)[0] for row in rows} == {"norm_pool_kernel"}
    assert missed(rows) == []


@pytest.mark.slow
@needs_nvcc
def test_every_cuda_kernel(tmp_path: Path) -> None:
    """No kernel misses a limit, and every architecture has every kernel."""
    rows = report(tmp_path, "--backend", "cuda")
    assert missed(rows) == []
    kernels = {"frames_kernel", "level_kernel", "windows_kernel"}
    kernels |= {"token_norm_kernel", "summary_kernel", "final_frames_kernel", "norm_pool_kernel"}
    kernels |= {"grid_pool_backward_kernel", "window_statistics_kernel", "token_gradient_kernel"}
    for arch in ARCHITECTURES:
        here = [row for row in rows if row.arch == arch]
        assert {re.split("[<(]", row.kernel)[0] for row in here} == kernels
        assert len({row.kernel for row in here}) == len(here)
        published = [row for row in here if row.published]
        walks = 2 * 3 * 2 * 2  # forward or backward, types, frames or mosaics, even or odd sizes
        assert len(published) == walks + 3  # windows alone, in every type


@pytest.mark.slow
@needs_nvcc
def test_executed_instructions_of_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    """The page has the counts of what nvcc 13.0 compiles. Every type and call has its kernels."""
    kernels = {(row.arch, row.kernel): row for row in compile_file(KERNELS / "fused.cu", 90)}
    calls = [executed_by_cuda(PUBLISHED[0], shape, "bf16", kernels) for shape in SHAPES[:2]]
    show(calls)
    printed = capsys.readouterr().out
    if "release 13.0" in nvcc_version():
        assert [missing_on_page(printed, shape) for shape in SHAPES[:2]] == [[], []]
        assert [round(call.instructions / 1e6, 1) for call in calls] == millions_on_page(4)
    for shape, dtype, case in product(SHAPES, ("bf16", "fp16", "fp32"), PUBLISHED):
        if not case.gradient:
            assert executed_by_cuda(case, shape, dtype, kernels).instructions > 1e7


def changed(folder: Path, name: str, old: str, new: str) -> Path:
    """Return fused.cu in a copy of the sources where `old` is replaced in one file."""
    shutil.copytree(KERNELS, folder / "csrc" / "cuda")
    for header in KERNELS.parent.glob("*.h"):
        shutil.copy(header, folder / "csrc")
    file = folder / "csrc" / "cuda" / name
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")
    return folder / "csrc" / "cuda" / "fused.cu"


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fused.cu", "PLAIN ? 80 : 128", "PLAIN ? 48 : 128"), "of local memory"),
        (
            (
                "tokens.cuh",
                '"{.reg .pred p; setp.ne.s32 p, %4, 0; @p ld.global" HINT ".v4.u32 {%0, %1, %2, %3}, [%5];}"',
                '"{.reg .pred p; setp.ne.s32 p, %4, 0; @p ld.global" HINT ".u32 %0, [%5];}"',
            ),
            "no loads of tokens",
        ),
    ],
    ids=["spills", "narrow loads"],
)
def test_what_is_wrong_in_cuda_is_seen(tmp_path: Path, change: tuple[str, str, str], message: str) -> None:
    rows = compile_file(changed(tmp_path, *change), 90)
    assert any(message in limit for row in rows if row.published for limit in limits_missed(row))


CODE = Code({"32": 5, "128": 20}, {}, {"128": 4}, atomics=0, spills=0, barriers=1, divisions=4, instructions=99)
WALK = "frames_kernel<__half, (Access)0, true, true>"
EVEN = "level_kernel<__half, (Access)0, true, false>"
WINDOWS = "windows_kernel<__half, (Access)0, true>"
BACKWARD = "grid_pool_backward_kernel<__half, (Access)0, true, true, true>"


def few(*warps: int) -> list[str]:
    return [f"room for {n} warps with {C} channels" for n, C in zip(warps, CHANNELS, strict=False)]


@pytest.mark.parametrize(
    ("kernel", "registers", "shared", "loads", "expected"),
    [
        (WALK, 80, 512, 10, []),
        (WALK, 80, 512, 11, ["11 loads of 32 bits, more than 10"]),
        (WALK, 88, 512, 5, ["room for 14 warps with 3584 channels"]),
        (WALK, 80, 100 << 10, 5, few(6, 7, 8)),
        (EVEN, 80, 100 << 10, 5, few(6, 14)),
        (WINDOWS, 80, 100 << 10, 5, few(6, 14)),
        (BACKWARD, 128, 512, 24, []),
        (BACKWARD, 128, 512, 25, ["25 loads of 32 bits, more than 24"]),
        (BACKWARD, 129, 512, 24, few(12, 8, 8)),
        ("norm_pool_kernel<float, (Access)1>", 255, 512, 99, []),
    ],
)
def test_cuda_limits(kernel: str, registers: int, shared: int, loads: int, expected: list[str]) -> None:
    """A walk over odd sizes carries sums in shared memory. Kernels of other settings need room for no warps."""
    code = replace(CODE, loads=CODE.loads | {"32": loads})
    assert limits_missed(with_blocks(KernelUsage(kernel, 90, registers, 0, 0, shared, code))) == expected


def test_block_threads() -> None:
    assert [block_threads(C, 2) for C in (1, 512, 513, *CHANNELS, 100000)] == [32, 32, 64, 96, 224, 256, 512]
    assert [block_threads(C, 4) for C in (1, 512, 513, *CHANNELS, 100000)] == [32, 32, 64, 128, 256, 256, 512]
