"""Workloads and their fewest bytes; providers, which all have to be right, and how they are chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stgridpool_kernels as stgp
from benchmarks.lower_bound import lower_bound, tokens_read
from benchmarks.poolings import in_segments, op_by_op_grid_pool
from benchmarks.provider import mismatch
from benchmarks.providers import BASELINE, chosen, providers, select
from benchmarks.workloads import QUICK, WORKLOADS, Workload, parse_workload, random_tokens
from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends import compiled

VIDEO = "llava-video-7b"
TINY = Workload("tiny", (64,), (5, 5), 48)
CPU = ["cpu"] if compiled.LIBRARY is not None else []
"""The backend of the compiled library, where that was built."""


# ---- workloads ----


def test_shapes_of_models() -> None:
    shapes = {
        "llava-video-7b": (64, 27, 27, 3584),
        "llava-onevision-7b": (32, 27, 27, 3584),
        "llava-next-video-7b": (64, 24, 24, 4096),
        "llava-video-0.5b": (64, 27, 27, 896),
        "batch-8": (8, 32, 27, 27, 896),
        "packed-16": (sum(range(8, 129, 8)), 27, 27, 896),
    }
    assert {name: WORKLOADS[name].shape for name in shapes} == shapes
    assert all(name == workload.name for name, workload in WORKLOADS.items())
    goals = [name for name, workload in WORKLOADS.items() if workload.goal]
    assert goals == ["llava-video-7b", "llava-video-7b-ceil", "llava-onevision-7b", "llava-next-video-7b"]
    assert set(QUICK) < set(WORKLOADS)
    assert max(WORKLOADS[name].input_bytes for name in QUICK) < 100e6
    assert WORKLOADS[f"{VIDEO}-fp32"].input_bytes == 64 * 27 * 27 * 3584 * 4


@pytest.mark.parametrize(
    ("name", "pooled", "settings"),
    [
        (VIDEO, (13, 13), {}),
        ("llava-onevision-7b", (14, 14), {"ceil_mode": True}),
        ("packed-16", (13, 13), {"frame_counts": list(range(8, 129, 8))}),
        ("batch-8", (13, 13), {}),
        ("window-6x6", (4, 4), {"kernel_size": 6}),
        ("budget-10x10", (10, 10), {"output_size": [10, 10]}),
        ("stream-bilinear", (13, 13), {"resize": "bilinear"}),
    ],
)
def test_settings(name: str, pooled: tuple[int, int], settings: dict[str, Any]) -> None:
    workload = WORKLOADS[name]
    assert workload.settings == settings
    assert {workload.plan(op).pooled_size for op in ("grid_pool", "norm_pool")} == {pooled}
    assert [len(workload.plan(op).levels) for op in ("grid_pool", "norm_pool")] == [3, 0]
    x = torch.empty(workload.shape, dtype=workload.dtype, device="meta")
    assert stgp.grid_pool(x, **settings).shape == (*x.shape[:-3], *pooled, x.shape[-1])


def test_a_sweep_varies_one_thing() -> None:
    swept = {"T-896": "frame_counts", "T-3584": "frame_counts", "C": "channels", "window": "kernel_size"}
    for group, field in (swept | {"budget": "output_size"}).items():
        points = [workload for workload in WORKLOADS.values() if group in workload.groups]
        values = [getattr(point, field) for point in points]
        assert len(set(values)) == len(values) >= 5
        same: dict[str, Any] = {"name": "", "groups": (), "goal": False, field: values[0]}
        assert {replace(point, **same) for point in points} == {replace(points[0], **same)}
    assert WORKLOADS["32x27x27x3584"].groups == ("T-3584", "C")  # a point of two sweeps is timed once


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("4x5x6x64", {}),
        ("4x5x6x64:ceil:fp32", {"dtype": torch.float32, "ceil_mode": True}),
        ("3x4x5x6x64:fp16", {"batch": 3, "frame_counts": (4, 4, 4), "dtype": torch.float16}),
        ("4x5x6x64:stream", {"kind": "stream", "groups": ("stream",)}),
    ],
)
def test_shapes_are_read(text: str, more: dict[str, Any]) -> None:
    assert parse_workload(text) == replace(Workload(text, (4,), (5, 6), 64, groups=("pooling",)), **more)


def test_names_are_read() -> None:
    assert parse_workload("budget-10x10") is WORKLOADS["budget-10x10"]
    assert parse_workload("llava-video-0.5b:gradients") is WORKLOADS["llava-video-0.5b:gradients"]
    found = parse_workload(f"{VIDEO}-ceil:gradients")
    assert (found.kind, found.groups, found.goal, found.ceil_mode) == ("gradients", ("gradients",), False, True)


@pytest.mark.parametrize(
    "text", ["", "llava", "4x5x6", "1x2x3x4x5x6", "0x5x6x64", "4x5x6x64:fp64", "4x5x6x64:fp16:bf16", "4x5x6x6.4",
             "4x5x6x64:", " 4x5x6x64", "4x5x6x64:stream:prefill", f"{VIDEO}:pooling"],
)  # fmt: skip
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^shape must be TxHxWxC.*llava-video-7b,.*:fp16.*:ceil.*; got ") as caught:
        parse_workload(text)
    assert str(caught.value).endswith(repr(text))


# ---- bytes ----


@pytest.mark.parametrize(
    ("name", "read_mb", "write_mb"),
    [(VIDEO, 305.6, 77.5), (f"{VIDEO}-ceil", 326.0, 89.9), ("llava-next-video-7b", 302.0, 75.5)],
)
def test_lower_bound(name: str, read_mb: float, write_mb: float) -> None:
    bound = WORKLOADS[name].bound("grid_pool")
    assert (round(bound.read_bytes / 1e6, 1), round(bound.write_bytes / 1e6, 1)) == (read_mb, write_mb)


def test_lower_bound_of_windows_and_of_gradients() -> None:
    bound = WORKLOADS[VIDEO].bound("norm_pool")
    assert (bound.read_bytes, bound.write_bytes) == (64 * 26 * 26 * 3584 * 2, 64 * 13 * 13 * 3584 * 2)
    plan = grid_plan((3,), 5, 7, frame_strides=(), kernel_size=3, padding=1)
    assert lower_bound(plan, 10, 4).read_bytes == 3 * 5 * 7 * 10 * 4
    forward, backward = WORKLOADS[VIDEO].bound("grid_pool"), WORKLOADS[VIDEO].bound("grid_pool_backward")
    assert (backward.read_bytes, backward.write_bytes) == (forward.total_bytes, WORKLOADS[VIDEO].input_bytes)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"ceil_mode": True},
        {"frame_counts": (20, 13)},
        {"frame_strides": (1, 2), "grid_shape": (1, 2, 3, 1), "output_size": (2, 3)},
        {"resize": "bilinear", "sampling": "first", "frame_strides": (1, 3)},
    ],
    ids=str,
)
def test_tokens_read_are_those_that_matter(arguments: dict[str, Any]) -> None:
    """NaN in a token spoils the result exactly if the token counts as read."""
    T, H, W = 33, 5, 7
    of_plan = {name: value for name, value in arguments.items() if name != "frame_counts"}
    plan = grid_plan(arguments.get("frame_counts", (T,)), H, W, **of_plan)
    needed = tokens_read(plan)
    x = random_tokens((T, H, W, 1), torch.float64, "cpu", 0)
    unread = x.masked_fill(torch.from_numpy(~needed)[..., None], float("nan"))
    pooled = stgp.grid_pool(unread, **arguments)
    assert pooled.isfinite().all()
    for place in map(tuple, np.argwhere(needed)[::37]):
        spoiled = x.clone()
        spoiled[place] = float("nan")
        assert stgp.grid_pool(spoiled, **arguments).isnan().any(), place
    bound = lower_bound(plan, 7, 2)
    assert (bound.read_bytes, bound.write_bytes) == (needed.sum() * 14, pooled.numel() * 14)


# ---- providers ----

PLAIN = ["llava_avg_pool", "llava_bilinear_pool", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"]
CASES = {
    "even": replace(TINY, grid=(4, 6)),
    "odd": replace(TINY, grid=(5, 7)),
    "fp16": replace(TINY, dtype=torch.float16),
    "fp32, few frames": replace(TINY, frame_counts=(33,), dtype=torch.float32),
    "ceil": replace(TINY, grid=(5, 7), ceil_mode=True),
    "packed": replace(TINY, frame_counts=(9, 64, 16, 8)),
    "batch": replace(TINY, frame_counts=(32, 32), batch=2),
    "batch of one, ceil": replace(TINY, frame_counts=(33,), batch=1, ceil_mode=True),
    "window 3, batch": replace(TINY, frame_counts=(16, 16, 16), batch=3, grid=(6, 7), kernel_size=3, ceil_mode=True),
    "output size, packed": replace(TINY, frame_counts=(20, 12), output_size=(3, 4)),
    "output size, fp32": replace(TINY, output_size=(4, 4), dtype=torch.float32),
}


@pytest.mark.parametrize("workload", CASES.values(), ids=CASES)
def test_every_provider_is_right(workload: Workload) -> None:
    """Gradients among them, which are held to autograd in another test. No input is changed."""
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    before = x.clone()
    timed = [*providers(workload, "cpu"), *providers(replace(workload, kind="gradients"), "cpu")]
    names = [f"{op}:{backend}" for op in ("norm_pool", "grid_pool") for backend in [*CPU, "reference"]]
    plain = [*PLAIN, "naive_norm_pool", "naive_grid_pool"] if workload.output_size is None else PLAIN[-1:]
    backward = [name.replace(":", "_backward:") for name in names]
    assert [provider.name for provider in timed] == [*names, *plain, *names, *backward]
    assert {provider.name for provider in timed if provider.takes_out} == {name for name in names if ":cpu" in name}
    wrong = {}
    for provider in timed:
        expected = provider.definition(x)
        wrong[provider.name] = mismatch(provider.call(x), expected, provider.ulps)
        if provider.takes_out:
            out = torch.full_like(expected, math.nan)
            provider.call(x, out=out)
            wrong[f"{provider.name}:out"] = mismatch(out, expected, provider.ulps)
    assert wrong == dict.fromkeys(wrong)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["odd", "packed", "window 3, batch", "output size, fp32"])
def test_definitions_are_the_ops_and_their_gradients(name: str) -> None:
    workload = CASES[name]
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0).requires_grad_()
    known = {provider.name: provider for provider in providers(replace(workload, kind="gradients"), "cpu")}
    for op, arguments in (("grid_pool", workload.settings), ("norm_pool", workload.windows)):
        result = getattr(stgp, op)(x, **arguments, backend="reference")
        assert torch.equal(known[f"{op}:reference"].definition(x.detach()), result)
        grad = torch.randn(result.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(x.dim()))
        (expected,) = torch.autograd.grad(result, x, grad)
        assert torch.equal(known[f"{op}_backward:reference"].call(x.detach()), expected)


@pytest.mark.parametrize(("name", "bilinear"), [("even", True), ("odd", False), ("ceil", False), ("batch", False)])
def test_plain_poolings_are_what_they_are_called(name: str, bilinear: bool) -> None:
    """Averages are norm_pool's at temperature 0; so is the bilinear resize to half of an even size."""
    workload = replace(CASES[name], dtype=torch.float32)
    x = random_tokens(workload.shape, torch.float32, "cpu", 0)
    average = stgp.norm_pool(x, temperature=0.0, ceil_mode=workload.ceil_mode, backend="reference")
    known = {provider.name: provider for provider in providers(workload, "cpu")}
    for provider in ["llava_avg_pool", "avg_pool2d", *(["llava_bilinear_pool"] if bilinear else [])]:
        torch.testing.assert_close(known[provider].call(x), average)
    windows = x[..., : x.shape[-3] // 2 * 2, : x.shape[-2] // 2 * 2, :].unflatten(-3, (-1, 2)).unflatten(-2, (-1, 2))
    largest = windows.amax((-4, -2))
    assert torch.equal(known["max_pool2d"].call(x)[..., : largest.shape[-3], : largest.shape[-2], :], largest)
    assert known["adaptive_avg_pool2d"].call(x).shape == average.shape


def test_sizes_that_differ_are_noted() -> None:
    """Naive code is held to the op without ceil_mode, as the published code has none."""
    notes = {provider.name: provider.note for provider in providers(CASES["odd"], "cpu") if provider.note}
    assert notes == {"llava_bilinear_pool": "pools to 3 × 4"}
    notes = {provider.name: provider.note for provider in providers(CASES["ceil"], "cpu") if provider.note}
    assert set(notes.values()) == {"pools to 2 × 3, without windows that the edge cuts"}
    assert set(notes) == {"naive_norm_pool", "naive_grid_pool"}
    assert not any(provider.note for provider in providers(replace(CASES["even"], ceil_mode=True), "cpu"))


@pytest.mark.parametrize("name", ["odd", "ceil", "packed", "even"])
def test_code_for_torch_compile_pools_right(name: str) -> None:
    workload = CASES[name]
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    expected = stgp.grid_pool(x, **workload.settings, backend="reference")
    assert mismatch(op_by_op_grid_pool(workload.plan("grid_pool"), "cpu")(x), expected, 2) is None
    assert not any(provider.compiles for provider in providers(workload, "cpu"))
    (compiled_code,) = [p for p in providers(replace(workload, goal=True), "cpu") if p.compiles]
    assert compiled_code.name == "compiled_grid_pool"


def test_providers_of_a_gpu() -> None:
    found = providers(WORKLOADS[VIDEO], "cuda")
    names = {provider.name for provider in found}
    assert {"grid_pool:reference", BASELINE, "naive_grid_pool", "compiled_grid_pool:max-autotune"} < names
    backends = set(stgp.available_backends()) - {"cpu"}
    assert {name.partition(":")[2] for name in names if name.startswith("grid_pool:")} == backends
    # the reference copies its indices from the CPU at every call
    assert {provider.name for provider in found if not provider.captures} == {n for n in names if "reference" in n}


@pytest.mark.parametrize(
    ("workload", "parts"),
    [
        (replace(TINY, frame_counts=(64,)), [32, 32]),
        (replace(TINY, frame_counts=(32, 33, 96, 5)), [32, 33, 32, 32, 32, 5]),
        (replace(TINY, frame_counts=(64, 64), batch=2), [32] * 4),
    ],
    ids=["video", "packed", "batch"],
)
def test_segments_are_the_whole_bit_by_bit(workload: Workload, parts: list[int]) -> None:
    seen: list[int] = []

    def pool(x: Tensor) -> Tensor:
        seen.append(len(x))
        return stgp.grid_pool(x, backend="reference")

    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    in_parts = in_segments(workload, pool)(x)
    assert torch.equal(in_parts, stgp.grid_pool(x, **workload.settings, backend="reference"))
    assert seen == parts


@pytest.mark.parametrize("shape", [(70, 2, 3, 4), (2, 35, 2, 3, 4)], ids=["video", "batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_value_is_compared(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    expected = torch.ones(shape, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert mismatch(expected.clone(), expected, 0) is None
    for place in (0, expected.numel() // 2, -1):
        result = expected.clone()
        result.view(-1)[place] = 1 + 2 * eps
        assert mismatch(result, expected, 2) is None
        assert mismatch(result, expected, 1) == f"off by {2 * eps:.3g}, {eps:.3g} is allowed"
        for bad in (math.nan, math.inf, -1.0):
            result.view(-1)[place] = bad
            assert mismatch(result, expected, 8) is not None
            assert mismatch(expected, result, 8) is not None
    expected.view(-1)[0] = 1000  # what is allowed goes with the largest value
    result = expected.clone()
    result.view(-1)[-1] += 512 * eps
    assert mismatch(result, expected, 1) is None
    assert "in place of" in str(mismatch(expected[:1], expected, 2))
    assert "torch.float16 in place of" in str(mismatch(expected.half(), expected, 2))


# ---- choosing ----

NAMES = ["norm_pool:cpu", "norm_pool:reference", "grid_pool:cpu", "llava_avg_pool", "avg_pool2d", "naive_grid_pool"]


@pytest.mark.parametrize(
    ("wanted", "unwanted", "found"),
    [
        ([], [], NAMES),
        (["norm_pool"], ["norm_pool:reference"], ["norm_pool:cpu"]),
        (["avg_pool2d", "norm_pool:cpu"], [], ["norm_pool:cpu", "avg_pool2d"]),
        (["*avg*"], [], ["llava_avg_pool", "avg_pool2d"]),
        ([], ["*_pool:*"], ["llava_avg_pool", "avg_pool2d", "naive_grid_pool"]),
        (["pool", "avg", "GRID_POOL", ""], [], []),
    ],
)
def test_patterns(wanted: list[str], unwanted: list[str], found: list[str]) -> None:
    assert select(NAMES, wanted, unwanted) == found


def test_slow_ones_are_timed_on_large_tokens_only_if_they_are_wanted() -> None:
    """Shapes that goals are set for are excepted, and so is a GPU, where none takes seconds."""
    slow = {"norm_pool:reference", "grid_pool:reference", "naive_norm_pool", "naive_grid_pool"}
    large, goal, small = WORKLOADS["long-512"], WORKLOADS[VIDEO], WORKLOADS["8x27x27x896"]

    def names(workload: Workload, *wanted: str, device: str = "cpu") -> set[str]:
        return {provider.name for provider in chosen(workload, device, wanted)}

    assert names(small) - names(large) == slow
    assert slow < names(goal)
    assert slow < names(large, device="cuda")
    assert names(large, "naive_grid_pool", "*_pool:reference") == slow - {"naive_norm_pool"}
    found = [provider.name for provider in chosen(replace(large, kind="gradients"), "cpu", ["grid_pool*"], ["*:cpu"])]
    assert found == ["grid_pool:reference", "grid_pool_backward:reference"]
