"""What nvcc makes of the CUDA kernels; and that a kernel which spilled or moved less would be seen."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")
from tests.support.cuda_emulation import KERNELS
from tools.compile_report import ARCHITECTURES, Code
from tools.cuda_check import CHANNELS, KernelUsage, block_threads, check, find_nvcc, limits_missed, main

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no compiler: nvcc is neither in PATH nor in CUDA_HOME")


@needs_nvcc
def test_every_kernel(capsys):
    """No spills anywhere; 128-bit pieces and 16 warps where it counts. Every kernel is there for every architecture."""
    assert main([]) == 0, capsys.readouterr().out
    rows = check(sorted(KERNELS.glob("*.cu")), ARCHITECTURES)
    kernels = {"grid_pool_kernel", "token_norm_kernel", "summary_kernel", "final_frames_kernel", "norm_pool_kernel"}
    kernels |= {"grid_pool_backward_kernel", "window_statistics_kernel", "token_gradient_kernel", "ends_kernel"}
    for arch in ARCHITECTURES:
        here = [row for row in rows if row.arch == arch]
        assert {re.split("[<(]", row.kernel)[0] for row in here} == kernels
        assert len({row.kernel for row in here}) == len(here)
        published = [row for row in here if row.published]
        assert len(published) == 2 * 3 * 2 * 2  # forward or backward, types, frames or mosaics, even or odd sizes


def changed(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """fused.cu in a copy of the sources in which (file, old, new) are replaced."""
    shutil.copytree(KERNELS, folder / "csrc" / "cuda")
    for header in KERNELS.parent.glob("*.h"):
        shutil.copy(header, folder / "csrc")
    for name, old, new in changes:
        file = folder / "csrc" / "cuda" / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")
    return folder / "csrc" / "cuda" / "fused.cu"


@needs_nvcc
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fused.cu", "A == Access::vector ? 80 : 128", "A == Access::vector ? 48 : 128"), "of local memory"),
        (
            (
                "tokens.cuh",
                "piece = same_bits<Piece>(U == CacheHint::stream ? __ldcs(from) : *from);",
                "for (int w = 0; w < WORDS; ++w) piece.word[w] = reinterpret_cast<const uint32_t*>(from)[w];",
            ),
            "no loads of 128 bits",
        ),
    ],
    ids=["spills", "narrow loads"],
)
def test_what_is_wrong_is_seen(tmp_path, change, message):
    source = changed(tmp_path, change)
    missed = [what for row in check([source], [90]) if row.published for what in limits_missed(row)]
    assert any(message in what for what in missed)


# ---- what the assertions above rest on ----

GOOD = KernelUsage(
    "grid_pool_kernel<__half, (stgp::cuda::Access)0, true, false, true>",
    *(90, 80, 0, 0, 512),
    Code(
        loads={"32": 5, "128": 20},
        copies={},
        stores={"128": 4},
        atomics=0,
        spills=0,
        barriers=1,
        divisions=0,
        instructions=99,
    ),
)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD, None),
        (replace(GOOD, stack=8), "8 bytes of stack"),
        (replace(GOOD, local=4), "4 of local memory"),
        (replace(GOOD, code=replace(GOOD.code, spills=2)), "2 accesses"),
        (replace(GOOD, code=replace(GOOD.code, atomics=1)), "1 atomic operations"),
        (replace(GOOD, code=replace(GOOD.code, loads={"32": 64, "128": 20})), "64 loads of 32 bits"),
        (replace(GOOD, code=replace(GOOD.code, loads={"64": 1, "128": 20})), "1 loads of 64 bits"),
        (replace(GOOD, code=replace(GOOD.code, loads={"32": 5})), "no loads of 128 bits"),
        (replace(GOOD, code=replace(GOOD.code, stores={"32": 1, "128": 4})), "1 stores of 32 bits"),
        (replace(GOOD, registers=88), "room for 14 warps with 3584 channels"),
        (replace(GOOD, shared=100 << 10), "room for"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits(row, message):
    assert GOOD.published
    missed = limits_missed(row)
    assert missed == [] if message is None else any(message in what for what in missed)


def test_limits_of_other_kernels():
    """They may move what they like, as long as they do not spill."""
    other = replace(
        GOOD,
        kernel="norm_pool_kernel<float, (stgp::cuda::Access)1>",
        registers=255,
        code=Code(
            loads={"16": 9}, copies={}, stores={"16": 9}, atomics=0, spills=0, barriers=1, divisions=0, instructions=99
        ),
    )
    assert limits_missed(other) == []
    assert limits_missed(replace(other, stack=16)) != []


def test_block_threads():
    assert [block_threads(C, 2) for C in (1, 512, 513, *CHANNELS, 100000)] == [32, 32, 64, 96, 224, 256, 512]
    assert [block_threads(C, 4) for C in (1, 512, 513, *CHANNELS, 100000)] == [32, 32, 64, 128, 256, 256, 512]
