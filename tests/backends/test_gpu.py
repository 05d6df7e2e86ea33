"""What only a GPU can show of the triton and cuda backends: graphs, streams, compiled code, memory, large sizes."""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

import stgridpool_kernels as stgp
from stgridpool_kernels.backends import compiled
from tests.support.tolerance import assert_same_bits, assert_within, ulp
from tests.support.triples import TRIPLES

pytestmark = pytest.mark.gpu

Arguments = dict[str, Any]

GENERAL: Arguments = {
    "frame_strides": (1, 3),
    "grid_shape": (1, 2, 3, 1),
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
    "norm_type": 3.0,
}
BILINEAR: Arguments = {"sampling": "first", "resize": "bilinear", "output_size": (3, 2), "frame_strides": (1, 2)}
CALLS: dict[str, tuple[str, tuple[int, ...], Arguments]] = {
    "grid_pool-odd": ("grid_pool", (32, 9, 7, 200), {}),
    "grid_pool-even": ("grid_pool", (32, 8, 6, 200), {}),
    "grid_pool-ceil": ("grid_pool", (32, 9, 8, 200), {"ceil_mode": True}),
    "grid_pool-wide": ("grid_pool", (16, 9, 7, 3584), {}),
    "grid_pool-packed": ("grid_pool", (41, 9, 7, 200), {"frame_counts": (9, 0, 32)}),
    "grid_pool-videos": ("grid_pool", (3, 16, 9, 7, 200), {}),
    "grid_pool-general": ("grid_pool", (21, 9, 7, 200), GENERAL),
    "grid_pool-bilinear": ("grid_pool", (21, 9, 7, 200), BILINEAR),
    "temporal_grid": ("temporal_grid", (32, 9, 7, 200), {}),
    "temporal_grid-off": ("temporal_grid", (8, 9, 7, 200), {"frame_strides": ()}),
    "norm_pool": ("norm_pool", (21, 9, 7, 200), {}),
    "norm_pool-padding": ("norm_pool", (21, 9, 7, 200), {"kernel_size": 3, "padding": 1}),
    "token_norm": ("token_norm", (21, 9, 7, 200), {}),
}
calls = pytest.mark.parametrize(("op", "shape", "arguments"), CALLS.values(), ids=CALLS.keys())


ON_GPU = sorted({triple.backend for triple in TRIPLES if triple.device == "cuda"} - {"reference"}) or ["none"]
_tested = ""


@pytest.fixture(autouse=True, params=ON_GPU, ids="by_{}".format)
def tested(request: pytest.FixtureRequest) -> str:
    """The backend that `run` takes, in every thread."""
    global _tested
    _tested = request.param
    return request.param


def run(op: str, x: Tensor, backend: str = "", **arguments: Any) -> Tensor:
    return getattr(stgp, op)(x, backend=backend or _tested, **arguments)


def random_tokens(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Tokens of unequal norms, drawn where they are wanted: the main shapes take a CPU seconds."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return x.mul_(2 + 0.3 * torch.randn((*shape[:-1], 1), dtype=dtype, device=device, generator=generator))


def on_gpu(*shape: int, seed: int = 0) -> Tensor:
    return random_tokens(shape, torch.bfloat16, "cuda", seed)


def assert_near_reference(result: Tensor, op: str, x: Tensor, **arguments: Any) -> None:
    """At most one rounding of a summary and one of the result apart; float32 norms within their own arithmetic."""
    expected = run(op, x, backend="reference", **arguments)
    largest = expected.abs().max().item()
    allowed = 1e-6 * largest if expected.dtype == torch.float32 else ulp(largest, expected.dtype)
    assert_within(result, expected.double(), allowed)


def free_bytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def needs_memory(gigabytes: float) -> None:
    if free_bytes() < gigabytes * 1e9:
        pytest.skip(f"no GPU memory: it takes {gigabytes} GB of free device memory, {free_bytes() / 1e9:.1f} are there")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """torch raises an error where one of its functions would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- what is asked first ----

MAIN_SHAPES = ((64, 27, 27, 3584), (64, 24, 24, 4096))


@pytest.mark.parametrize("op", ["norm_pool", "grid_pool"])
@pytest.mark.parametrize("shape", MAIN_SHAPES, ids=str)
def test_smoke_main_shapes(shape: tuple[int, ...], op: str) -> None:
    """32 frames, the longest segment, at a time: no summary takes frames of two."""
    x = on_gpu(*shape)
    result = run(op, x)
    for part, frames in zip(result.split(32), x.split(32), strict=True):
        assert_near_reference(part, op, frames)


def test_smoke_graph() -> None:
    x = on_gpu(*MAIN_SHAPES[0])
    graph, result = capture(lambda: run("grid_pool", x))
    x.copy_(x.flip(0))
    graph.replay()
    assert_same_bits(result, run("grid_pool", x))


def special_tokens(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """8 frames, of which the odd ones are sampled: a NaN in a row and in a column that two cells average, and
    infinities; −0 and subnormal numbers in two frames each, one of which is sampled."""
    x = random_tokens((8, *size, 64), dtype, "cpu", 0)
    x[1, 1, 4, 5], x[1, 4, 1, 7], x[3, 3, 2, 0], x[3, 4, 4, 63] = math.nan, math.nan, math.inf, -math.inf
    x[0] = x[5] = -0.0
    x[[2, 7]] *= torch.finfo(dtype).tiny / 4
    return x


@pytest.mark.parametrize("op", ["norm_pool", "grid_pool"])
@pytest.mark.parametrize("size", [(9, 7), (8, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_smoke_special_values(dtype: torch.dtype, size: tuple[int, int], op: str) -> None:
    """NaN and infinities are where the formula has them on the CPU, and nowhere else; 0 and small numbers are small."""
    x = special_tokens(size, dtype)
    expected = run(op, x, backend="reference")
    finite = expected.isfinite()
    assert (~finite).any()
    result = run(op, x.cuda()).cpu()
    assert torch.equal(result.masked_fill(finite, 0).nan_to_num(3), expected.masked_fill(finite, 0).nan_to_num(3))
    for found, of_frame in zip(result.masked_fill(~finite, 0), expected.masked_fill(~finite, 0).double(), strict=True):
        largest = of_frame.abs().max().item()
        # float32 arithmetic may take for 0 what is subnormal there
        allowed = ulp(largest, dtype) if largest >= torch.finfo(torch.float32).tiny else largest
        assert_within(found, of_frame, allowed)


SMALL = {
    **{name: call for name, call in CALLS.items() if name not in ("grid_pool-wide", "grid_pool-videos")},
    "grid_pool-ceil-l1": ("grid_pool", (32, 9, 7, 100), {"ceil_mode": True, "norm_type": 1.0}),
    "grid_pool-several-warps": ("grid_pool", (8, 5, 5, 3584), {"frame_strides": (1, 2)}),
    "grid_pool-in-chunks": ("grid_pool", (8, 4, 5, 9000), {"frame_strides": (1, 2)}),
    "norm_pool-in-chunks": ("norm_pool", (8, 4, 5, 9000), {}),
    "token_norm-max": ("token_norm", (21, 9, 7, 100), {"norm_type": math.inf}),
}


@pytest.mark.parametrize(("op", "shape", "arguments"), SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_small_calls(dtype: torch.dtype, op: str, shape: tuple[int, ...], arguments: Arguments) -> None:
    """Calls are small, for a slow tool that checks every access to memory."""
    x = random_tokens(shape, dtype, "cuda", 0)
    expected = run(op, x.cpu(), backend="reference", **arguments)
    largest = expected.abs().max().item()
    allowed = 1e-6 * largest if expected.dtype == torch.float32 else ulp(largest, expected.dtype)
    assert_within(run(op, x, **arguments).cpu(), expected.double(), allowed)


# ---- configurations ----

TRITON_CHOICES: tuple[dict[str, Any], ...] = (
    *({"frame_cells": cells, "mosaic_cells": cells} for cells in (1, 2, 5, 99)),
    {"window_registers": 80, "even_registers": 80, "odd_registers": 96},
    {"window_registers": None, "even_registers": None, "odd_registers": 168},
    {"stages": 1},
    {"stages": 3},
)


@pytest.mark.parametrize(
    ("size", "C", "dtype"),
    [
        ((5, 11), 3584, torch.bfloat16),
        ((4, 12), 3584, torch.bfloat16),
        ((4, 11), 208, torch.float32),
        ((5, 12), 208, torch.float16),
        ((5, 11), 200, torch.float16),
    ],
    ids=str,
)
def test_configurations_change_no_bit(
    size: tuple[int, int], C: int, dtype: torch.dtype, tested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients have the same bits by every configuration, whether or not frames are shrunk. NaN and frames
    of −0 tell what is added to them; a temperature other than 1 tells whether its product is rounded alike."""
    x = random_tokens((40, *size, C), dtype, "cuda", 0)
    x[0], x[1, 1, size[1] // 2] = -0.0, math.nan
    plan = stgp.grid_plan([40], *size)

    def results() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        pooled = run("grid_pool", leaf, temperature=0.7)
        upstream = random_tokens(tuple(pooled.shape), dtype, "cuda", 1)
        (of_x,) = torch.autograd.grad(pooled, leaf, upstream)
        return [pooled.detach(), run("norm_pool", x, temperature=0.7), run("grid_pool", x[:6], temperature=0.7), of_x]

    expected = results()
    assert_same_bits(expected[1][:6], expected[2])
    if tested == "cuda":
        op = torch.ops.stgp._grid_pool_by_tables.default
        for cells in (1, 2, 4, 5, 7, 99):
            out = torch.full_like(expected[0], math.nan)
            compiled._run(op, (x,), plan, 0.7, 2.0, True, x.shape[-1], out, cells)
            assert_same_bits(out, expected[0])
        return
    from stgridpool_kernels.backends.triton_kernels import fused, launch

    configured = fused.fused_config
    for choice in TRITON_CHOICES:
        launch._calls.clear()
        changed = lambda *given, choice=choice: dataclasses.replace(configured(*given), **choice)  # noqa: E731
        monkeypatch.setattr(fused, "fused_config", changed)
        for found, unchanged in zip(results(), expected, strict=True):
            assert_same_bits(found, unchanged)
    launch._calls.clear()


# ---- CUDA graphs ----


def capture(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call that was made before, and its result."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@calls
@pytest.mark.parametrize("given_out", [False, True], ids=["new result", "out"])
def test_replayed_graph_equals_eager(given_out: bool, op: str, shape: tuple[int, ...], arguments: Arguments) -> None:
    x = on_gpu(*shape)
    given = arguments | ({"out": torch.full_like(run(op, x, **arguments), math.nan)} if given_out else {})
    graph, result = capture(lambda: run(op, x, **given))
    for seed in (1, 2):
        x.copy_(on_gpu(*shape, seed=seed))
        result.fill_(math.nan)
        graph.replay()
        assert_same_bits(result, run(op, x, **arguments))
        assert_near_reference(result, op, x, **arguments)


@pytest.mark.parametrize("op", ["grid_pool", "temporal_grid", "norm_pool", "token_norm"])
def test_first_call_under_capture_raises(op: str, tested: str) -> None:
    needs_nothing = (op, tested) == ("token_norm", "cuda")  # neither tables nor compiling
    x = on_gpu(19, 5, 11, 48)
    refusal = nullcontext() if needs_nothing else pytest.raises(RuntimeError, match="warm up first")
    with refusal, torch.cuda.graph(torch.cuda.CUDAGraph()):
        run(op, x)
    assert_near_reference(run(op, x), op, x)
    graph, result = capture(lambda: run(op, x))
    graph.replay()
    assert_near_reference(result, op, x)


def test_graph_outlives_the_caches() -> None:
    """Plans, prepared calls and tables of the captured call are long gone, and their memory used again."""
    most_calls = 256  # of every cache
    x, arguments = on_gpu(32, 5, 7, 16), {"frame_counts": (17, 15)}
    graph, result = capture(lambda: run("grid_pool", x, **arguments))
    other = on_gpu(most_calls + 50, 2, 2, 16)
    for first in range(most_calls + 44):
        run("grid_pool", other, frame_counts=(first, len(other) - first))
    gc.collect()
    torch.cuda.synchronize()
    overwritten = [torch.full((size,), -1, dtype=torch.int32, device="cuda") for size in range(64, 4096, 64)]
    x.copy_(on_gpu(32, 5, 7, 16, seed=1))
    for _ in range(3):
        result.fill_(math.nan)
        graph.replay()
        assert_near_reference(result, "grid_pool", x, **arguments)
    assert_same_bits(result, run("grid_pool", x, **arguments))
    del overwritten


def test_one_graph_of_several_calls() -> None:
    """Two plans and a norm, one after the other in one graph: they share no scratch that is still live."""
    x = on_gpu(32, 9, 7, 200)

    def pools() -> list[Tensor]:
        packed = run("grid_pool", x, frame_counts=(8, 24))
        return [run("grid_pool", x), packed, run("grid_pool", x, **GENERAL), run("token_norm", packed)]

    pools()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = pools()
    x.copy_(on_gpu(32, 9, 7, 200, seed=1))
    graph.replay()
    for result, expected in zip(results, pools(), strict=True):
        assert_same_bits(result, expected)


# ---- streams and devices ----


def keep_busy(stream: torch.cuda.Stream) -> None:
    """Some 50 ms of work."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)


def test_two_streams_at_once() -> None:
    """Different inputs and plans, alternating; every result is that of a call alone."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    xs = [on_gpu(32, 27, 27, 896, seed=1), on_gpu(40, 27, 27, 896, seed=2)]
    settings: list[Arguments] = [{}, {"frame_counts": (8, 32), "ceil_mode": True}]
    expected = [run("grid_pool", x, **given) for x, given in zip(xs, settings, strict=True)]
    torch.cuda.synchronize()
    results: list[tuple[int, Tensor]] = []
    for _ in range(40):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((i, run("grid_pool", xs[i], **settings[i])))
    torch.cuda.synchronize()
    for i, result in results:
        assert_same_bits(result, expected[i])


@pytest.mark.parametrize("op", ["grid_pool", "temporal_grid"])
def test_other_stream_right_after_the_first_call(op: str) -> None:
    """Tables of a new plan are uploaded behind other work on one stream; another stream waits for them."""
    x = on_gpu(64, 9, 7, 200)
    run(op, x, frame_counts=(31, 33))  # compiles, so that the calls below come at once
    side = torch.cuda.Stream()
    for first in range(9, 25):
        torch.cuda.synchronize()
        keep_busy(torch.cuda.current_stream())
        here = run(op, x, frame_counts=(first, 64 - first))
        with torch.cuda.stream(side):
            there = run(op, x, frame_counts=(first, 64 - first))
            side.synchronize()
            assert_near_reference(there, op, x, frame_counts=(first, 64 - first))
        torch.cuda.synchronize()
        assert_same_bits(here, there)


def test_captured_on_another_stream_right_after_the_first_call() -> None:
    """A graph, too, reads tables only once they are there."""
    x = on_gpu(64, 9, 7, 200)
    run("grid_pool", x, frame_counts=(31, 33))
    expected = run("grid_pool", x, backend="reference", frame_counts=(25, 39))
    run("grid_pool", x, frame_counts=(25, 39))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run("grid_pool", x, frame_counts=(25, 39))
    graph.replay()
    assert_within(result, expected.double(), ulp(expected.abs().max().item(), expected.dtype))


@calls
def test_repeatable_while_another_stream_works(op: str, shape: tuple[int, ...], arguments: Arguments) -> None:
    x, load = on_gpu(*shape), torch.cuda.Stream()
    a = torch.randn(2048, 2048, device="cuda")
    b = torch.empty(1 << 26, device="cuda")
    first = run(op, x, **arguments)
    torch.cuda.synchronize()
    results = []
    for i in range(20):
        with torch.cuda.stream(load):
            torch.mm(a, a)
            b.fill_(i)
        results.append(run(op, x, **arguments))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no GPU beside the first")
@calls
def test_second_device(op: str, shape: tuple[int, ...], arguments: Arguments) -> None:
    x = on_gpu(*shape)
    expected = run(op, x, **arguments)
    result = run(op, x.to("cuda:1"), **arguments)
    assert result.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_same_bits(result.to("cuda:0"), expected)


@calls
def test_nothing_waits_for_the_device(op: str, shape: tuple[int, ...], arguments: Arguments) -> None:
    """Neither the first call with given arguments nor a later one."""
    x = on_gpu(*shape[:-1], 104)  # a size of no other test
    with no_synchronisation():
        first = run(op, x, **arguments)
        second = run(op, x, **arguments)
    assert_same_bits(first, second)
    assert_near_reference(first, op, x, **arguments)


def test_later_call_is_queued_behind_other_work() -> None:
    """A call returns long before the work before it is done."""
    x = on_gpu(32, 9, 7, 200)
    expected = run("grid_pool", x)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)
    done.record()
    result = run("grid_pool", x)
    assert not done.query()
    assert_same_bits(result, expected)


# ---- memory ----


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
def test_extra_memory(ceil_mode: bool) -> None:
    """At most a fifth of x beyond the result, in the first call and later."""
    needs_memory(4)
    x = torch.randn(64, 27, 27, 3584, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run("grid_pool", x, ceil_mode=ceil_mode)
        extra = torch.cuda.max_memory_allocated() - before - result.nbytes
        assert extra <= 0.2 * x.nbytes
        del result


def test_no_memory_is_kept() -> None:
    """Beyond tables, which are small."""
    x = on_gpu(64, 27, 27, 896)
    run("grid_pool", x)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        run("grid_pool", x)
    assert torch.cuda.memory_allocated() == before


# ---- sizes and offsets beyond 32 bits ----


@pytest.fixture
def alone() -> Iterator[None]:
    """Let one process at a time run a test on a GPU that several share, since each test takes 12 GB and more."""
    with Path(tempfile.gettempdir(), f"stgp-gpu-memory-{os.getuid()}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        free_bytes()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("grid_pool", {}),
        ("grid_pool", {"ceil_mode": True}),
        ("grid_pool", {"kernel_size": 3, "stride": 2, "padding": 1, "resize": "bilinear"}),
        ("temporal_grid", {}),
        ("norm_pool", {}),
        ("norm_pool", {"output_size": (10, 10)}),
        ("token_norm", {}),
    ],
    ids=str,
)
def test_more_than_2_31_elements(op: str, arguments: Arguments) -> None:
    """No summary depends on frames outside its segment of 32, so that a part can be computed alone."""
    needs_memory(24)
    x = torch.empty(1024, 27, 27, 3584, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 1 << 31
    x.normal_(generator=torch.Generator("cuda").manual_seed(0))
    result = run(op, x, **arguments)
    for first in (0, 480, 800, 832, 992):  # element 2³¹ is in frame 821
        part = slice(first, first + 32)
        assert_near_reference(result[part], op, x[part], **arguments)
        assert_same_bits(result[part], run(op, x[part], **arguments))


FAR: dict[str, tuple[int, int, int, int]] = {
    "frames": ((1 << 31) // 20, 7 * 24, 24, 1),
    "rows": (7 * 24, (1 << 31) // 4 + 64, 24, 1),
    "columns": (5 * 24, 24, (1 << 31) // 4, 1),
    "channels": (5 * 7, 7, 1, (1 << 31) // 20),
}
"""Strides of (32, 5, 7, 24) tokens, the last of which are more than 2³¹ elements from the first."""


def far_apart(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The values of x, which may be shorter along the first dimension, in memory of these strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    assert span > 1 << 31
    return x.new_empty(span).as_strided(x.shape, strides).copy_(x)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("strides", FAR.values(), ids=FAR.keys())
@pytest.mark.parametrize(
    ("op", "arguments"),
    [("grid_pool", {}), ("grid_pool", GENERAL), ("temporal_grid", {}), ("norm_pool", {}), ("token_norm", {})],
    ids=["grid_pool", "grid_pool-general", "temporal_grid", "norm_pool", "token_norm"],
)
def test_offsets_beyond_2_31(op: str, arguments: Arguments, strides: tuple[int, ...]) -> None:
    needs_memory(12)
    x = on_gpu(32, 5, 7, 24)
    assert_near_reference(run(op, far_apart(x, strides), **arguments), op, x, **arguments)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("arguments", [{}, GENERAL], ids=["published", "general"])
def test_out_beyond_2_31(arguments: Arguments, axis: int) -> None:
    needs_memory(12)
    x = on_gpu(32, 5, 7, 24)
    expected = run("grid_pool", x, **arguments)
    strides = [0, 0, 0, 0]
    strides[axis] = (1 << 31) // (expected.shape[axis] - 1) + 64
    step = 1
    for other in (3, 2, 1, 0):
        if other != axis:
            strides[other], step = step, step * expected.shape[other]
    out = far_apart(torch.full_like(expected, math.nan), tuple(strides))
    run("grid_pool", x, out=out, **arguments)
    assert_near_reference(out, "grid_pool", x, **arguments)


# ---- launches ----


@pytest.mark.parametrize(
    ("op", "shape", "arguments", "most"),
    [
        ("grid_pool", (64, 27, 27, 896), {}, 5),
        ("grid_pool", (64, 24, 24, 896), {"ceil_mode": True}, 5),
        ("grid_pool", (64, 9, 7, 200), {"frame_counts": (32, 0, 32)}, 5),
        ("grid_pool", (21, 9, 7, 200), GENERAL, 4),
        ("temporal_grid", (64, 9, 7, 200), {}, 5),
        ("norm_pool", (64, 27, 27, 896), {}, 1),
        ("token_norm", (64, 27, 27, 896), {}, 1),
    ],
    ids=str,
)
def test_number_of_launches(op: str, shape: tuple[int, ...], arguments: Arguments, most: int, tested: str) -> None:
    """At most two and one a level, one without levels; nothing is filled or copied besides. In CUDA C++, norms for
    general windows are a launch of their own."""
    most += tested == "cuda" and arguments is GENERAL
    x = on_gpu(*shape)
    run(op, x, **arguments)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run(op, x, **arguments)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    names = [name for name in names if not name.startswith("Activity Buffer")]
    if not names:
        pytest.skip("no GPU events: the profiler saw none")
    assert len(names) <= most, names
    assert all("_kernel" in name for name in names), names


# ---- torch.compile ----


def test_compiled_once_for_every_number_of_frames(tested: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    pool = torch.compile(
        lambda x: torch.ops.stgp.grid_pool(x.relu()) * 2, fullgraph=True, dynamic=True, backend=counter
    )
    with stgp.use_backend(tested):
        for T in (8, 16, 33):
            x = on_gpu(T, 9, 7, 200)
            assert_same_bits(pool(x), run("grid_pool", x.relu()) * 2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("called_before", [True, False], ids=["called before", "first call"])
def test_compiled_with_cuda_graphs(called_before: bool, tested: str) -> None:
    """mode="reduce-overhead" captures the op as part of a graph of its own, whose memory is used for nothing else."""
    torch._dynamo.reset()
    pool = torch.compile(lambda x: torch.ops.stgp.grid_pool(x * 2) + 1, fullgraph=True, mode="reduce-overhead")
    shape = (16, 9, 7, 200 if called_before else 216)
    if called_before:
        run("grid_pool", on_gpu(*shape))
    with stgp.use_backend(tested):
        found = [pool(on_gpu(*shape, seed=seed)).clone() for seed in range(5)]
    for seed, result in enumerate(found):
        assert_same_bits(result, run("grid_pool", on_gpu(*shape, seed=seed) * 2) + 1)
