"""The backend `cpu`: every set of vector instructions, threads, offsets, private ops, and loading the library.

What test_backends.py asks of every backend with the instructions that this CPU prefers, part of it is asked here with
each of the others too: tests that are imported from there run with the fixtures of this module.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stgridpool_kernels as stgp
from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.plan import tables
from stgridpool_kernels.plan.tables import plan_tables
from tests.backends import test_backends
from tests.plan.test_tables import C as WORD
from tests.support.cases import CALLS, LAYOUTS, laid_out, tokens
from tests.support.instructions import known, restored
from tests.support.tolerance import assert_same_bits, assert_within, ulp

Arguments = dict[str, Any]
PACKAGE = Path(stgp.__file__).parent
CSRC = PACKAGE.parent / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

pytestmark = pytest.mark.needs("library")

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DTYPES = pytest.mark.parametrize("dtype", compiled.DTYPES, ids=str)
calls = pytest.mark.parametrize(("op", "arguments"), CALLS.values(), ids=CALLS.keys())


def run(op: str, x: Tensor, **arguments: Any) -> Tensor:
    return getattr(stgp, op)(x, backend="cpu", **arguments)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    with restored():
        yield torch.set_num_threads


# ---- instructions ----

SIZE = (21, 5, 7)
"""(T, H, W) of the tests of test_backends.py that are asked again here."""


@pytest.mark.parametrize("path", test_backends.GOLDEN, ids=lambda path: path.stem)
def test_golden_values(path: Path, capability: str) -> None:
    test_backends.test_golden_values(path, "cpu", torch.device("cpu"))


@DTYPES
def test_meaning(dtype: torch.dtype, capability: str) -> None:
    for windows in test_backends.AVERAGES.values():
        test_backends.test_temperature_0_averages(windows, dtype, "cpu", torch.device("cpu"))
    for temperature in (1e38, -1e38):
        test_backends.test_overflowing_logits(temperature, "cpu", torch.device("cpu"))


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, torch.bfloat16), (math.inf, torch.float16), (-math.inf, torch.float32)], ids=str
)
def test_spoiled_tokens(value: float, dtype: torch.dtype, capability: str) -> None:
    for call in test_backends.SPOILED.values():
        test_backends.test_spoiled_token_touches_its_own_windows(value, *call, dtype, "cpu", torch.device("cpu"), SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 3.0, 0.5, math.inf])
def test_overflowing_norms(norm_type: float, dtype: torch.dtype, capability: str) -> None:
    for whole_window, temperature in product([False, True], [1.0, 0.0, -1.0]):
        test_backends.test_overflowing_norms(dtype, whole_window, temperature, norm_type, "cpu", torch.device("cpu"))


@pytest.mark.parametrize("temperature", [1e38, -1e38])
def test_overflowing_logits_of_cut_windows(temperature: float, capability: str) -> None:
    """The largest of infinite logits is infinite, also where the frame ends within a window."""
    x = torch.full((1, 5, 7, 11), 10.0)
    assert run("norm_pool", x, ceil_mode=True, temperature=temperature).isnan().all()
    assert stgp.norm_pool(x, ceil_mode=True, temperature=temperature, backend="reference").isnan().all()


def test_unknown_instructions_are_refused() -> None:
    before = compiled.LIBRARY.cpu_capability()
    for name in ("", "AVX2", "neon"):
        with pytest.raises(ValueError, match=f"name must be one of {', '.join(known())} .* got '{name}'"):
            compiled.LIBRARY.use_cpu_capability(name)
    assert compiled.LIBRARY.cpu_capability() == before
    assert known()[-1] == "portable"


# around multiples of the blocks that vectors of 4, 8 and 16 floats make, and of four of them
CHANNELS = sorted(
    {size + delta for size in (8, 16, 32, 64, 96, 128, 160, 192) for delta in (-1, 0, 1)} | {1, 2, 3, 200}
)


@DTYPES
def test_any_number_of_channels(dtype: torch.dtype, capability: str) -> None:
    for C in CHANNELS:
        x = laid_out(tokens(8, 3, 5, C, dtype=dtype, seed=C), "sliced" if C % 2 else "misaligned")
        for op, arguments in (
            ("grid_pool", {"ceil_mode": True, "frame_strides": (1, 2)}),
            ("grid_pool", {"kernel_size": 3, "padding": 1, "norm_type": 3.0}),
            ("temporal_grid", {"frame_strides": (1, 2)}),
            ("token_norm", {"norm_type": math.inf}),
            ("token_norm", {}),
        ):
            result = run(op, x, **arguments)
            expected = getattr(stgp, op)(x, backend="reference", **arguments)
            largest = expected.abs().max().item()
            # a rounding of a summary and one of the result
            assert_within(result, expected.double(), 2e-6 * largest if dtype == torch.float32 else ulp(largest, dtype))


@HALVES
def test_every_16_bit_number_keeps_its_value(dtype: torch.dtype, capability: str) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    one_frame_groups = {"frame_strides": (1,), "grid_shape": (1, 1)}  # the mosaic of a frame is its mean, times 1
    for C in (64, 256, 1):
        x = every.view(1, -1, 32 if C > 1 else 256, C)
        assert_same_bits(run("temporal_grid", x, frame_strides=()), x)
        copied = run("temporal_grid", x, **one_frame_groups)
        assert torch.equal(copied.isnan(), x.isnan())
        assert torch.equal(copied.nan_to_num(nan=1.0, posinf=math.inf, neginf=-math.inf),
                           x.nan_to_num(nan=1.0, posinf=math.inf, neginf=-math.inf))  # fmt: skip
    # one token alone has the weight 1, if its norm is finite
    alone = run("norm_pool", x, kernel_size=1, norm_type=math.inf)
    assert torch.equal(alone.isfinite(), x.isfinite())
    finite = every[every.isfinite()]
    finite = finite[: len(finite) // 256 * 256].view(1, 1, -1, 256)
    assert torch.equal(run("norm_pool", finite, kernel_size=1, norm_type=math.inf), finite)
    norms = run("token_norm", x, norm_type=math.inf)
    assert torch.equal(norms.nan_to_num(nan=-1.0), x[..., 0].float().abs().nan_to_num(nan=-1.0))


@HALVES
def test_means_are_rounded_to_nearest_even(dtype: torch.dtype, capability: str) -> None:
    """Means of two numbers are exact in float32 here. Those of neighbours are ties; subnormal ones are among them."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()][:-512].view(-1, 256)
    magnitude = every.view(torch.int16) & 0x7FFF
    exponent_bit = 10 if dtype == torch.float16 else 7
    for distance in (1, 2, 3, 5 << (exponent_bit - 3), 3 << exponent_bit):
        # as many steps further from 0 in the order of magnitudes
        other = (magnitude + distance) | (every.view(torch.int16) & -0x8000)
        other = torch.where(magnitude + distance < magnitude, every.view(torch.int16), other).view(dtype)
        other = torch.where(other.isfinite(), other, every)
        x = torch.stack([every, other])[None]  # (1, 2, N, 256)
        exact = x.double().mean(1, keepdim=True)
        assert torch.equal(exact.float().double(), exact)
        for tail in (0, 3):  # the last channels take another way
            result = run("norm_pool", x[..., tail:], kernel_size=(2, 1), temperature=0.0, norm_type=math.inf)
            assert torch.equal(result, exact[..., tail:].to(dtype))


def test_sums_that_overflow_are_infinite(capability: str) -> None:
    """A cell sums tokens before it divides. Only bfloat16 and float32 have numbers that overflow float32 there."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.full((4, 4, 5, 67), 3e38, dtype=dtype)
        x[..., ::2] *= -1
        x[..., 5] = 1
        arguments = {"frame_strides": (1,)}
        result = run("temporal_grid", x, **arguments)
        assert_same_bits(result, stgp.temporal_grid(x, backend="reference", **arguments))
        assert result[3].isinf().any()
        pooled = run("grid_pool", x, temperature=0.0, norm_type=math.inf, **arguments)
        assert pooled[3].isnan().all()  # the norm is infinite
        assert pooled[:3].isfinite().all()


def test_results_hardly_depend_on_instructions() -> None:
    """Sums are taken in another order, nothing else."""
    x = tokens(32, 9, 7, 200)
    with restored():
        results = []
        for name in known():
            try:
                compiled.LIBRARY.use_cpu_capability(name)
            except ValueError:
                continue
            results.append(run("grid_pool", x))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)


# ---- threads ----

LARGE: dict[str, tuple[str, tuple[int, ...], Arguments]] = {
    "grid_pool": ("grid_pool", (48, 13, 12, 256), {}),
    "grid_pool-odd": ("grid_pool", (40, 13, 13, 200), {"ceil_mode": True}),
    "grid_pool-packed": ("grid_pool", (48, 12, 12, 200), {"frame_counts": (9, 0, 23, 16)}),
    "grid_pool-videos": ("grid_pool", (3, 16, 13, 12, 200), {}),
    "grid_pool-past the cache": ("grid_pool", (24, 27, 27, 512), {}),
    "grid_pool-general": ("grid_pool", (48, 13, 12, 200), CALLS["grid_pool-overlapping"][1]),
    "grid_pool-bilinear": ("grid_pool", (48, 13, 12, 200), CALLS["grid_pool-paper"][1]),
    "temporal_grid": ("temporal_grid", (48, 13, 12, 256), {}),
    "temporal_grid-past the cache": ("temporal_grid", (16, 27, 27, 256), {}),
    "norm_pool": ("norm_pool", (48, 13, 12, 256), {}),
    "norm_pool-one row": ("norm_pool", (1, 2, 2000, 256), {}),
    "norm_pool-padding": ("norm_pool", (48, 13, 12, 200), {"kernel_size": 3, "padding": 1}),
    "token_norm": ("token_norm", (48, 13, 12, 256), {"norm_type": 1.0}),
}
large = pytest.mark.parametrize(("op", "shape", "arguments"), LARGE.values(), ids=LARGE.keys())


@large
def test_threads_change_no_bit(
    op: str, shape: tuple[int, ...], arguments: Arguments, threads: Callable[[int], None]
) -> None:
    """Calls of megabytes, which get a thread for every 256 KB. More threads also take more frames in a step."""
    x = tokens(*shape, dtype=torch.bfloat16)
    threads(1)
    alone = run(op, x, **arguments)
    for count in (2, 7):
        threads(count)
        for _ in range(3):
            assert_same_bits(run(op, x, **arguments), alone)
    largest = alone.abs().max().item()
    expected = getattr(stgp, op)(x, backend="reference", **arguments)
    assert_within(alone, expected.double(), ulp(largest, torch.bfloat16) if alone.dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("size", [(13, 12), (7, 9), (1, 1), (1, 40), (40, 1)], ids=str)
@pytest.mark.parametrize("strides", [(2, 4, 8), (1,), (1, 2, 4), (3, 2)], ids=str)
def test_frames_per_step_change_no_bit(
    strides: tuple[int, ...], size: tuple[int, int], threads: Callable[[int], None]
) -> None:
    x = tokens(40, *size, 2000 // math.prod(size) + 64, dtype=torch.float16)
    plan = grid_plan([40], *size, frame_strides=strides, ceil_mode=True)
    general = grid_plan([40], *size, frame_strides=strides, grid_shape=(1, 2), ceil_mode=True)
    for plan_ in (plan, general):
        expected = None
        for frames_per_stage in (None, 1, 4, 14, 32, 100):
            words = torch.tensor(plan_tables(plan_, frames_per_stage=frames_per_stage), dtype=torch.int32)
            for count in (1, 2):
                threads(count)
                out = x.new_full((40, *plan_.pooled_size, x.shape[-1]), math.nan)
                torch.ops.stgp._grid_pool_by_tables(x, words, None, 1.0, 2.0, True, x.shape[-1], out)
                expected = out if expected is None else expected
                assert_same_bits(out, expected)
        assert not expected.isnan().any()


def test_callers_side_by_side() -> None:
    """Calls from several Python threads share the memory that is kept for scratch, one at a time."""
    with restored():
        torch.set_num_threads(1)
        jobs = [
            (op, laid_out(tokens(*shape, dtype=torch.bfloat16), layout), arguments)
            for op, shape, arguments in list(LARGE.values())[:4] + list(LARGE.values())[5:8]
            for layout in ("contiguous", "channels first")
        ]
        expected = [run(op, x, **arguments) for op, x, arguments in jobs]

        def again(n: int) -> None:
            torch.set_num_threads(1 + n % 2)  # of this Python thread
            for k in range(len(jobs)):
                op, x, arguments = jobs[(k + n) % len(jobs)]
                assert_same_bits(run(op, x, **arguments), expected[(k + n) % len(jobs)])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(again, range(6)))


# ---- memory ----


def far_apart(x: Tensor, axis: int) -> Tensor:
    """The values of x with neighbours along `axis` 2³⁰ elements apart. Pages that nothing touches take no memory."""
    strides = [1 << 30 if dim == axis else stride for dim, stride in enumerate(x.stride())]
    memory = torch.empty(((x.shape[axis] - 1) << 30) + x.numel(), dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4], ids=["videos", "frames", "rows", "columns", "channels"])
def test_offsets_beyond_32_bits(axis: int) -> None:
    shape = [2, 8, 3, 4, 40]
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    shape[axis] = 4
    x = tokens(*shape, dtype=torch.bfloat16)
    far = far_apart(x, axis)
    assert far.stride(axis) * (far.shape[axis] - 1) > 1 << 31
    for op in ("grid_pool", "temporal_grid", "token_norm"):
        given = {} if op == "token_norm" else dict(arguments)
        if op == "temporal_grid":
            del given["ceil_mode"]
        expected = run(op, x, **given)
        assert_same_bits(run(op, far, **given), expected)
    assert_same_bits(
        run("grid_pool", far, kernel_size=3, padding=1, **arguments),
        run("grid_pool", x, kernel_size=3, padding=1, **arguments),
    )
    out = far_apart(torch.zeros_like(run("temporal_grid", x, frame_strides=(1, 2))), axis)
    del far
    run("temporal_grid", x, frame_strides=(1, 2), out=out)
    assert_same_bits(out, run("temporal_grid", x, frame_strides=(1, 2)))


@calls
def test_layouts_change_no_bit(op: str, arguments: Arguments, capability: str) -> None:
    x = tokens(2, 21, 5, 7, 37, dtype=torch.float16)
    expected = run(op, x, **arguments)
    for layout in LAYOUTS:
        assert_same_bits(run(op, laid_out(x, layout), **arguments), expected)


@HALVES
@pytest.mark.parametrize("channels", [5, 64, 200, 3000])
@pytest.mark.parametrize("width", [30, 34, 67])
def test_neighbouring_windows_change_no_bit(width: int, channels: int, dtype: torch.dtype, capability: str) -> None:
    """The kernels take up to 16 windows of a row at once, and a narrow frame has one window."""
    x = tokens(2, 3, width, channels, dtype=dtype)
    arguments = {"ceil_mode": True, "temperature": 30.0}
    alone = [run("norm_pool", x[:, :, left : left + 2], **arguments) for left in range(0, width, 2)]
    assert_same_bits(run("norm_pool", x, **arguments), torch.cat(alone, dim=2))


# ---- memory of results ----

FRESH = """
import torch, stgridpool_kernels as stgp
from pathlib import Path

def advised():
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    return sum("hg" in flags.splitlines()[0].split() for flags in mappings[1:])

x = torch.ones({shape}, dtype=torch.bfloat16, requires_grad={gradient})
result = stgp.norm_pool(x.detach(), kernel_size=1)
print(advised())
del result
if {gradient}:
    stgp.norm_pool(x, kernel_size=1).backward(torch.ones_like(x))
    print(advised())
    x.grad = None
print(advised())
"""


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("shape", "expected"), [((1, 64, 64, 4096), 1), ((1, 64, 64, 2048), 0)])
def test_large_fresh_results_are_advised_to_be_in_huge_pages(shape: Any, expected: int, gradient: bool) -> None:
    """Results of 32 MiB are, those of 16 MiB are not, and no advice stays with memory that others use later."""
    code = FRESH.format(shape=shape, gradient=gradient)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = expected if Path("/sys/kernel/mm/transparent_hugepage").exists() else 0
    assert done.stdout.split() == [*[str(expected)] * (2 if gradient else 1), "0"]


def test_scratch_is_not_seen() -> None:
    """Memory of the call before is used again as it is: small after large, other ops and dtypes in between."""
    x, y = tokens(24, 9, 7, 100, dtype=torch.bfloat16), torch.full((32, 13, 12, 300), math.nan)
    for op, arguments in CALLS.values():
        expected = run(op, x, **arguments)
        for spoiler, given in CALLS.values():
            run(spoiler, y, **given)
        assert_same_bits(run(op, x, **arguments), expected)


# ---- private ops ----


MANY = 1 << 18
WHOLE = {"kernel_size": 1, "stride": MANY}
"""Windows of one token, of which a frame of MANY × MANY tokens has one."""


@pytest.mark.parametrize(
    ("op", "shape", "arguments"),
    [
        ("grid_pool", (1, MANY, MANY, 1 << 25), WHOLE | {"frame_strides": (1,), "grid_shape": (1, 1)}),  # 2⁶³ bytes
        ("grid_pool", (2, MANY, MANY, 1 << 25), WHOLE | {"frame_strides": (1,), "grid_shape": (1, 1)}),  # 2⁶⁴
        ("token_norm", (1, 1, 1, 1 << 60), {}),
        ("token_norm", (1, 1, 1, 1 << 61), {}),
    ],
)
def test_scratch_beyond_64_bits(op: str, shape: tuple[int, int, int, int], arguments: Arguments) -> None:
    """The tokens of a view may be more than memory has, and their sizes more than int64 holds."""
    _, H, W, channels = shape
    named = (
        f"no memory for {2**63 - 64} bytes of scratch or more, which frames of {H} x {W} tokens of {channels} channels"
    )
    with pytest.raises(RuntimeError, match=named):
        run(op, torch.zeros(1).expand(shape), **arguments)


def grid_pool_by_tables(x: Tensor, words: Tensor, out: Tensor) -> None:
    torch.ops.stgp._grid_pool_by_tables(x, words, None, 1.0, 2.0, True, x.shape[-1], out)


def temporal_grid_by_tables(x: Tensor, words: Tensor, out: Tensor) -> None:
    torch.ops.stgp._temporal_grid_by_tables(x, words, None, out)


def words_of(*counts: int, size: tuple[int, int] = (5, 7), **arguments: Any) -> Tensor:
    return torch.tensor(plan_tables(grid_plan(counts, *size, **arguments)), dtype=torch.int32)


def with_word(words: Tensor, name: str, value: int) -> Tensor:
    """Return a copy of tables in which one word of the header has another value."""
    changed = words.clone()
    changed[WORD[name]] = value
    return changed


X, OUT = torch.zeros(16, 5, 7, 24), torch.zeros(16, 2, 3, 24)
WORDS = words_of(16)

REFUSED: dict[str, tuple[Tensor, Tensor, Tensor, str]] = {
    "other frames": (X, words_of(17), OUT, "the tables are of another x"),
    "other rows": (X, words_of(16, size=(4, 7)), OUT, "the tables are of another x"),
    "other columns": (X, words_of(16, size=(5, 6)), OUT, "the tables are of another x"),
    "other windows": (X, words_of(16, ceil_mode=True), OUT, "the tables are of another out"),
    "other out": (X, WORDS, torch.zeros(16, 2, 3, 23), "the tables are of another out"),
    "frames of out": (X, WORDS, torch.zeros(15, 2, 3, 24), "out must have the frames of x"),
    "rank of out": (X, WORDS, OUT[None], "out must have as many dimensions as the result"),
    "dtype of out": (X, WORDS, OUT.half(), "out has a wrong dtype"),
    "rank of x": (X[0], WORDS, OUT[0], "x must have 4 or 5 dimensions"),
    "dtype of x": (X.double(), WORDS, OUT.double(), "x must have dtype bfloat16, float16 or float32"),
    "int64": (X, WORDS.long(), OUT, "tables must be contiguous int32 on the CPU"),
    "strided": (X, WORDS.repeat_interleave(2)[::2], OUT, "tables must be contiguous int32 on the CPU"),
    "2-D": (X, WORDS[None], OUT, "tables must be contiguous int32 on the CPU"),
    "empty": (X, WORDS[:0], OUT, "these are no tables of a plan"),
    "zeros": (X, torch.zeros_like(WORDS), OUT, "these are no tables of a plan"),
    "cut": (X, WORDS[:-1].clone(), OUT, "these are no tables of a plan"),
    "longer": (X, torch.cat([WORDS, WORDS[:1]]), OUT, "these are no tables of a plan"),
    "other version": (X, with_word(WORDS, "H_VERSION", tables.VERSION - 1), OUT, "these are no tables of a plan"),
}


@pytest.mark.parametrize(("x", "words", "out", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_private_ops_refuse(x: Tensor, words: Tensor, out: Tensor, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        grid_pool_by_tables(x, words, out)
    if "out" not in reason:  # which would be right here
        with pytest.raises(RuntimeError, match=reason):
            temporal_grid_by_tables(x, words, torch.empty_like(x))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (WORDS.long(), "tables must be contiguous int32 on the CPU"),
        (WORDS.repeat_interleave(2)[::2], "tables must be contiguous int32 on the CPU"),
        (WORDS[None], "tables must be contiguous int32 on the CPU"),
        (WORDS[:0], "these are no tables of a plan"),
        (with_word(WORDS, "H_MAGIC", 1), "these are no tables of a plan"),
        (with_word(WORDS, "H_VERSION", tables.VERSION - 1), "the tables have another version"),
        (WORDS[:-1].clone(), "the tables have another length"),
        (torch.cat([WORDS, WORDS[:1]]), "the tables have another length"),
    ],
)
def test_check_of_tables_refuses(words: Tensor, reason: str) -> None:
    torch.ops.stgp._check_tables(WORDS)
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.stgp._check_tables(words)


@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (2, 3, 0, 8), (0, 3, 3, 8), (0, 2, 3, 3, 8)], ids=str)
def test_norms_of_no_tokens(shape: tuple[int, ...]) -> None:
    out = torch.empty(shape[:-1])
    torch.ops.stgp._token_norm_compiled(torch.empty(shape), 2.0, True, 8, out)
    with pytest.raises(RuntimeError, match="out must"):
        torch.ops.stgp._token_norm_compiled(torch.empty(shape), 2.0, True, 8, out.new_empty((*shape[:-2], 4)))


REASONS = re.findall(r'"(.+)";', (CSRC / "tables.cpp").read_text())
REASONS += ["the tables are of another x", "the tables are of another out", "no memory for"]
REASONS += ["the tables have nothing for gradients"]
GRADIENTS = set(
    re.findall(
        r'"(.*(?:gradient|consumer|inverse runs (?!of levels)|no summary|output frames of).*)";',
        (CSRC / "tables.cpp").read_text(),
    )
)


def refusal(*call: Any) -> str | None:
    """Return why tables are refused, None if they are followed. call: an op, and its arguments up to tables and out.

    An op trusts the words that `_check_tables` has checked, as the backends do at the first use of tables.
    """
    op, *_, words, _ = call
    try:
        torch.ops.stgp._check_tables(words)
        op(*call[1:])
    except RuntimeError as error:
        return next((reason for reason in REASONS if reason in str(error)), str(error))
    return None


@pytest.mark.parametrize("value", [-(1 << 31), -7, -1, 0, 1, 3, 1000, (1 << 31) - 1])
def test_corrupted_tables(value: int) -> None:
    """Any word may be wrong: the tables are refused with a reason, or something is computed."""
    x = tokens(9, 3, 5, 8)
    reasons = set()
    for arguments in ({"frame_strides": (1, 2)}, {"frame_strides": (1, 2), "grid_shape": (1, 2), "kernel_size": 3}):
        plan = grid_plan([9], 3, 5, **arguments)
        words = torch.tensor(plan_tables(plan, frames_per_stage=2), dtype=torch.int32)
        out = x.new_empty(9, *plan.pooled_size, 8)
        for place in range(len(words)):
            changed = words.clone()
            changed[place] = value
            for op, result in ((grid_pool_by_tables, out), (temporal_grid_by_tables, torch.empty_like(x))):
                reasons.add(refusal(op, x, changed, result))
    reasons.discard(None)
    assert 3 < len(reasons & set(REASONS)) == len(reasons), reasons


def grid_pool_backward_by_tables(grad: Tensor, x: Tensor, words: Tensor, out: Tensor) -> None:
    torch.ops.stgp._grid_pool_backward_by_tables(grad, x, words, None, 1.0, 2.0, True, x.shape[-1], out)


def temporal_grid_backward_by_tables(grad: Tensor, x: Tensor, words: Tensor, out: Tensor) -> None:
    torch.ops.stgp._temporal_grid_backward_by_tables(grad, words, None, out)


@pytest.mark.parametrize("value", [-(1 << 31), -7, -1, 0, 1, 3, 1000, (1 << 31) - 1, "before", "after"])
def test_corrupted_tables_of_gradients(value: int | str) -> None:
    """The same of gradients, also with words that are off by one: every reason that check_gradient has is given."""
    x = tokens(9, 3, 5, 8)
    reasons = set()
    for arguments in ({"frame_strides": (1, 2)}, {"frame_strides": (1, 2), "grid_shape": (1, 2), "kernel_size": 3}):
        plan = grid_plan([9], 3, 5, **arguments)
        words = torch.tensor(plan_tables(plan, gradient=True), dtype=torch.int32)
        grad, out = tokens(9, *plan.pooled_size, 8), torch.empty_like(x)
        for op, of_result in ((grid_pool_backward_by_tables, grad), (temporal_grid_backward_by_tables, x)):
            assert refusal(op, of_result, x, words, out) is None
            for place in range(len(words)):
                changed = words.clone()
                changed[place] = (
                    value if isinstance(value, int) else int(words[place]) + {"before": -1, "after": 1}[value]
                )
                reasons.add(refusal(op, of_result, x, changed, out))
    reasons.discard(None)
    assert reasons <= set(REASONS), reasons - set(REASONS)
    if value == -7:  # values that are in range otherwise
        assert "an entry is of no summary" in reasons
    if isinstance(value, int) and abs(value) >= 1000:
        assert GRADIENTS - {"an entry is of no summary"} <= reasons, GRADIENTS - reasons


def level_again(words: Tensor) -> Tensor:
    """Return tables with many summaries that have their sources and runs in common, and the runs of the first level."""
    first = int(words[WORD["H_LEVELS"]])
    level = words[first : first + WORD["LEVEL_WORDS"]]
    number = len(words) // int(level[WORD["L_COUNT"]] * 4 + 20)
    levels = level.repeat(number, 1)
    levels[:, WORD["L_FIRST"]] = level[WORD["L_COUNT"]] * torch.arange(number)
    changed = torch.cat([words, levels.flatten()])
    changed[WORD["H_LEVELS"]], changed[WORD["H_NUM_LEVELS"]] = len(words), number
    changed[WORD["H_SUMMARIES"]] = number * level[WORD["L_COUNT"]]
    return changed


def stage_again(words: Tensor) -> Tensor:
    """Return tables in which the first stage comes many times."""
    first = int(words[WORD["H_STAGES"]])
    stage = words[first : first + WORD["STAGE_WORDS"]]
    number = len(words) // (int(stage[WORD["S_COUNT"]]) * WORD["ENTRY_WORDS"]) * 4
    changed = torch.cat([words, stage.repeat(number)])
    changed[WORD["H_STAGES"]], changed[WORD["H_NUM_STAGES"]] = len(words), number
    return changed


def live_rows_that_overlap(words: Tensor) -> Tensor:
    """Return tables in which the live counts of each entry of the first stage begin one word further."""
    offset, count = words[int(words[WORD["H_STAGES"]]) + torch.tensor([WORD["S_ENTRIES"], WORD["S_COUNT"]])].tolist()
    changed = torch.cat([words, torch.zeros(count + int(words[WORD["H_HEIGHT"]]), dtype=torch.int32)])
    changed[offset + WORD["E_LIVE"] : offset + count * WORD["ENTRY_WORDS"] : WORD["ENTRY_WORDS"]] = torch.arange(
        len(words), len(words) + count
    )
    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (level_again, "levels have words in common"),
        (stage_again, "stages have entries in common"),
        (live_rows_that_overlap, "rows of live cells overlap"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_in_common_are_refused(change: Callable[[Tensor], Tensor], reason: str) -> None:
    """Parts of tables are apart, so that the time of their check does not grow with the square of their size."""
    plan = grid_plan([200], 64, 2, frame_strides=(1,))
    words = torch.tensor(plan_tables(plan), dtype=torch.int32)
    torch.ops.stgp._check_tables(words)
    changed = change(words)
    changed[WORD["H_WORDS"]] = len(changed)
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.stgp._check_tables(changed)


def test_inverse_runs_in_common_are_refused() -> None:
    """A level's inverse runs have as many words as its rows and columns times those of a frame, its runs have fewer."""
    words = torch.tensor(plan_tables(grid_plan([8], 64, 2, frame_strides=(1,)), gradient=True), dtype=torch.int32)
    first, count, section = words[[WORD["H_LEVELS"], WORD["H_SUMMARIES"], WORD["H_GRADIENT"]]].tolist()
    number = len(words) // 150
    levels = words[first : first + WORD["LEVEL_WORDS"]].repeat(number, 1)
    levels[:, WORD["L_FIRST"]] = count * torch.arange(number)
    consumers = torch.full((8 + count * number + 1,), int(words[words[section]]), dtype=torch.int32)
    ends = torch.full((8 + count * number,), -1, dtype=torch.int32)
    gradient = words[section : section + WORD["G_LEVELS"]].clone()
    gradient[WORD["G_CONSUMERS"]] = len(words) + levels.numel()
    gradient[WORD["G_ENDS"]] = len(words) + levels.numel() + len(consumers)
    inverses = words[section + WORD["G_LEVELS"] :][:2].repeat(number)
    changed = torch.cat([words, levels.flatten(), consumers, ends, gradient, inverses])
    changed[[WORD["H_LEVELS"], WORD["H_NUM_LEVELS"], WORD["H_SUMMARIES"]]] = torch.tensor(
        [len(words), number, count * number], dtype=torch.int32
    )
    changed[WORD["H_GRADIENT"]] = len(words) + levels.numel() + len(consumers) + len(ends)
    changed[WORD["H_WORDS"]] = len(changed)
    with pytest.raises(RuntimeError, match="the inverse runs of levels have words in common"):
        torch.ops.stgp._check_tables(changed.int())


@pytest.mark.parametrize("end", [-2, 9, 1 << 30])
@pytest.mark.parametrize("node", [0, 8, 9, -1], ids=["first frame", "last frame", "first summary", "last summary"])
def test_damaged_ends_are_refused(node: int, end: int) -> None:
    """A node ends as one of the output frames or, if it is -1, as none."""
    words = torch.tensor(plan_tables(grid_plan([9], 3, 5, frame_strides=(1, 2)), gradient=True), dtype=torch.int32)
    frames, summaries, section = words[[WORD["H_FRAMES"], WORD["H_SUMMARIES"], WORD["H_GRADIENT"]]].tolist()
    ends = words[int(words[section + WORD["G_ENDS"]]) :][: frames + summaries]
    assert (frames, summaries) == (9, 3)
    for allowed in (-1, 8):
        ends[node] = allowed
        torch.ops.stgp._check_tables(words)
    ends[node] = end
    with pytest.raises(RuntimeError, match="the output frames of the nodes are out of range"):
        torch.ops.stgp._check_tables(words)
    for offset in (-1, 0, WORD["HEADER_WORDS"] - 1, len(words) - len(ends) + 1):
        words[section + WORD["G_ENDS"]] = offset
        with pytest.raises(RuntimeError, match="the output frames of the nodes are out of range"):
            torch.ops.stgp._check_tables(words)


def test_tables_without_gradients() -> None:
    x = tokens(9, 3, 5, 8)
    plan = grid_plan([9], 3, 5)
    words = torch.tensor(plan_tables(plan), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="the tables have nothing for gradients"):
        grid_pool_backward_by_tables(tokens(9, *plan.pooled_size, 8), x, words, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="the tables have nothing for gradients"):
        temporal_grid_backward_by_tables(x, x, words, torch.empty_like(x))


# ---- loading ----


def test_library_of_other_tables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "VERSION", tables.VERSION + 1)
    with pytest.raises(
        ImportError, match=r"of version \S+ and its ops take other arguments\. Build it again .* or remove it: /"
    ):
        compiled._load()


def test_library_from_before_dense_calls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(TABLES_VERSION=tables.VERSION, build_info=compiled.LIBRARY.build_info)
    monkeypatch.setattr(compiled.importlib.util, "module_from_spec", lambda spec: older)
    spec = SimpleNamespace(loader=SimpleNamespace(exec_module=lambda library: None), origin="/_C.so")
    monkeypatch.setattr(compiled.PathFinder, "find_spec", lambda name, path: spec)
    with pytest.raises(ImportError, match=r"its ops take other arguments\. Build it again .* or remove it: /_C\.so"):
        compiled._load()


def copied_package(folder: Path) -> Path:
    """The package without its compiled library."""
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return copy


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    # an editable installation finds, of every package of that name, what the package itself lacks
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n" + code
    environment = {name: value for name, value in os.environ.items() if name not in ("STGP_BACKEND", "PYTHONPATH")}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_library_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    (copied_package(tmp_path) / f"_C{SUFFIX}").write_bytes(b"this is no library")
    done = python(tmp_path, "import stgridpool_kernels")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ImportError: the compiled library is there but does not load: " in last
    assert f"_C{SUFFIX}: " in last  # the cause, from the loader
    assert f"Build it again with this torch ({torch.__version__}), or remove it: {tmp_path}" in last


def test_library_of_another_package_is_an_error(tmp_path: Path) -> None:
    """One that loads as a library but is no Python module of that name."""
    shutil.copy(np.random.mtrand.__file__, copied_package(tmp_path) / f"_C{SUFFIX}")
    done = python(tmp_path, "import stgridpool_kernels")
    assert done.returncode == 1
    assert "ImportError: the compiled library is there but does not load: " in done.stderr


def test_no_library_is_normal(tmp_path: Path) -> None:
    copied_package(tmp_path)
    code = """
import torch, stgridpool_kernels as stgp
from stgridpool_kernels.backends import backend_reasons
assert stgp.__file__.startswith(%r), stgp.__file__
x = torch.randn(16, 5, 7, 24)
assert backend_reasons()["cpu"] == backend_reasons()["cuda"]
assert torch.equal(torch.ops.stgp.grid_pool(x), stgp.grid_pool(x, backend="reference"))
try:
    stgp.grid_pool(x, backend="cpu")
except RuntimeError as refusal:
    print(refusal)
"""
    done = python(tmp_path, code % str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    cause = f"the compiled library is missing: it was never built in {tmp_path / PACKAGE.name}: pip install "
    assert done.stdout.startswith(f"backend 'cpu' cannot run this call: {cause}")


def test_mosaics_that_tables_cannot_hold_are_refused() -> None:
    for frames, reason in (((1 << 20) - 1, None), (1 << 20, "a mosaic has 2147483648 rows or columns of tokens")):
        x = torch.zeros(1).expand(frames, 1, 1 << 11, 1)
        plan = grid_plan([frames], 1, 1 << 11, frame_strides=(1,), grid_shape=(1, 1 << 20), kernel_size=1)
        assert (compiled.unsupported_on_cpu(x, plan) or "").startswith(reason or "")
        assert (compiled.unsupported_on_cpu(x, plan) is None) == (reason is None)


def test_sizes_that_tables_cannot_hold_are_refused() -> None:
    x = torch.empty(1, 1 << 24, 1, 1, dtype=torch.bfloat16)
    pairs = grid_plan([1], 1 << 24, 1, frame_strides=(), kernel_size=(1 << 20, 1))
    assert "fewer than 2²⁴" in str(compiled.unsupported_on_cpu(x, pairs))
    assert (
        compiled.unsupported_on_cpu(x[:, 1:], grid_plan([1], (1 << 24) - 1, 1, frame_strides=(), kernel_size=(2, 1)))
        is None
    )
