"""What `stgp bench` times: its shapes, the fewest bytes and operations that they take, and who is timed on them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stgridpool_kernels as stgp
from benchmarks.lower_bound import flops, lower_bound, tokens_read
from benchmarks.providers import (
    BASELINE,
    chosen,
    in_segments,
    mismatch,
    op_by_op_grid_pool,
    providers,
    random_gradient,
    select,
)
from benchmarks.workloads import QUICK, WORKLOADS, Workload, merged, parse_workload, random_tokens
from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends import compiled

VIDEO = "llava-video-7b"
TINY = Workload("tiny", (64,), (5, 5), 48)
CPU = ["cpu"] if compiled.LIBRARY is not None else []
"""The backend of the compiled library, where that was built."""


# ---- workloads ----


def test_names_and_shapes() -> None:
    assert {name: workload.name for name, workload in WORKLOADS.items()} == {name: name for name in WORKLOADS}
    shapes = {
        "llava-video-7b": (64, 27, 27, 3584),
        "llava-onevision-7b": (32, 27, 27, 3584),
        "llava-next-video-7b": (64, 24, 24, 4096),
        "llava-video-0.5b": (64, 27, 27, 896),
        "long-2048-7b": (2048, 27, 27, 3584),
        "batch-8": (8, 32, 27, 27, 896),
        "packed-16": (sum(range(8, 129, 8)), 27, 27, 896),
        "16x27x27x3584": (16, 27, 27, 3584),
    }
    assert {name: WORKLOADS[name].shape for name in shapes} == shapes
    goals = [name for name, workload in WORKLOADS.items() if workload.goal]
    assert goals == ["llava-video-7b", "llava-video-7b-ceil", "llava-onevision-7b", "llava-next-video-7b"]
    assert set(QUICK) < set(WORKLOADS)
    assert max(WORKLOADS[name].input_bytes for name in QUICK) < 100e6


@pytest.mark.parametrize(
    ("name", "pooled", "settings", "packed"),
    [
        (VIDEO, (13, 13), {}, False),
        (f"{VIDEO}-ceil", (14, 14), {"ceil_mode": True}, False),
        ("llava-onevision-7b", (14, 14), {"ceil_mode": True}, False),
        ("llava-next-video-7b", (12, 12), {}, False),
        ("packed-16", (13, 13), {}, True),
        ("batch-8", (13, 13), {}, False),
        ("window-6x6", (4, 4), {"kernel_size": 6}, False),
        ("budget-10x10", (10, 10), {"output_size": [10, 10]}, False),
    ],
)
def test_settings(name: str, pooled: tuple[int, int], settings: dict[str, Any], packed: bool) -> None:
    workload = WORKLOADS[name]
    assert (workload.settings, bool(workload.packing)) == (settings, packed)
    assert {workload.plan(op).pooled_size for op in ("grid_pool", "norm_pool")} == {pooled}
    assert [len(workload.plan(op).levels) for op in ("grid_pool", "norm_pool")] == [3, 0]
    x = torch.empty(workload.shape, dtype=workload.dtype, device="meta")
    assert stgp.grid_pool(x, **settings, **workload.packing).shape == (*x.shape[:-3], *pooled, x.shape[-1])


def test_sizes_in_bytes() -> None:
    assert WORKLOADS[VIDEO].input_bytes == 64 * 27 * 27 * 3584 * 2
    assert WORKLOADS[f"{VIDEO}-fp32"].input_bytes == 64 * 27 * 27 * 3584 * 4
    assert WORKLOADS["batch-8"].input_bytes == 8 * 32 * 27 * 27 * 896 * 2


@pytest.mark.parametrize(
    ("group", "swept"),
    [("T-896", "frame_counts"), ("T-3584", "frame_counts"), ("C", "channels"), ("window", "kernel_size"),
     ("budget", "output_size")],
)  # fmt: skip
def test_a_sweep_varies_one_thing(group: str, swept: str) -> None:
    points = [workload for workload in WORKLOADS.values() if group in workload.groups]
    values = [getattr(point, swept) for point in points]
    assert len(set(values)) == len(values) >= 5
    same: dict[str, Any] = {"name": "", "groups": (), "goal": False, swept: values[0]}
    assert {replace(point, **same) for point in points} == {replace(points[0], **same)}


def test_points_of_two_sweeps_are_timed_once() -> None:
    both = [w.name for w in WORKLOADS.values() if {"C", "T-3584"} <= set(w.groups)]
    assert both == ["32x27x27x3584"]
    a, b = (replace(TINY, name=name, groups=("one",)) for name in "ab")
    assert merged([a, b, replace(a, groups=("two",))]) == [replace(a, groups=("one", "two")), b]


@pytest.mark.parametrize(
    ("text", "shape", "more"),
    [
        ("4x5x6x64", (4, 5, 6, 64), {}),
        ("4x5x6x64:fp16", (4, 5, 6, 64), {"dtype": torch.float16}),
        ("4x5x6x64:ceil:fp32", (4, 5, 6, 64), {"dtype": torch.float32, "ceil_mode": True}),
        ("3x4x5x6x64:bf16", (3, 4, 5, 6, 64), {"batch": 3, "frame_counts": (4, 4, 4)}),
    ],
)
def test_shapes_are_read(text: str, shape: tuple[int, ...], more: dict[str, Any]) -> None:
    found = parse_workload(text)
    assert (found.name, found.shape) == (text, shape)
    assert found == replace(Workload(text, (4,), (5, 6), 64), **more)


def test_names_are_known() -> None:
    assert parse_workload("budget-10x10") is WORKLOADS["budget-10x10"]
    assert parse_workload("32x27x27x3584") is WORKLOADS["32x27x27x3584"]


@pytest.mark.parametrize(
    "text",
    ["", "llava", "4x5x6", "1x2x3x4x5x6", "0x5x6x64", "4x5x-6x64", "4x5x6x64:fp64", "4x5x6x64:fp16:bf16", "4x5x6x6.4",
     "4x5x6x64:", " 4x5x6x64", f"{VIDEO}:fp16"],
)  # fmt: skip
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^shape must be TxHxWxC.*:fp16.*:ceil.*llava-video-7b,.*; got ") as caught:
        parse_workload(text)
    assert str(caught.value).endswith(repr(text))


def test_random_tokens() -> None:
    x = random_tokens((4, 9, 9, 2048), torch.float32, "cpu", 0)
    norms = x.square().mean(-1).sqrt()
    assert norms.mean().item() == pytest.approx(2, abs=0.1)
    assert norms.std().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(x, random_tokens((4, 9, 9, 2048), torch.float32, "cpu", 0))
    assert not torch.equal(x, random_tokens((4, 9, 9, 2048), torch.float32, "cpu", 1))


# ---- bytes and operations ----


@pytest.mark.parametrize(
    ("name", "read_mb", "write_mb"),
    [
        (VIDEO, 305.6, 77.5),
        (f"{VIDEO}-ceil", 326.0, 89.9),
        ("llava-onevision-7b", 163.0, 45.0),
        ("llava-next-video-7b", 302.0, 75.5),
    ],
)
def test_lower_bound(name: str, read_mb: float, write_mb: float) -> None:
    bound = WORKLOADS[name].bound("grid_pool")
    assert (round(bound.read_bytes / 1e6, 1), round(bound.write_bytes / 1e6, 1)) == (read_mb, write_mb)


def test_lower_bound_of_norm_pool_is_its_windows() -> None:
    bound = WORKLOADS[VIDEO].bound("norm_pool")
    assert (bound.read_bytes, bound.write_bytes) == (64 * 26 * 26 * 3584 * 2, 64 * 13 * 13 * 3584 * 2)
    assert bound.total_bytes == bound.read_bytes + bound.write_bytes
    plan = grid_plan((3,), 5, 7, frame_strides=(), kernel_size=3, padding=1)
    assert lower_bound(plan, 10, 4).read_bytes == 3 * 5 * 7 * 10 * 4


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
    """NaN in any token spoils the result exactly if the token counts as read."""
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


def shrunk_tokens(frames: int, height: int, width: int, frame_stride: int) -> int:
    """How many tokens all summaries of a level are made from, a token as often as it is used, seen from the result: one
    channel for every token of x, which is 1 in that token and 0 elsewhere."""
    tokens = frames * height * width
    x = torch.eye(tokens).view(frames, height, width, tokens)
    gridded = stgp.temporal_grid(x, frame_strides=[frame_stride])
    changed = (gridded != x).flatten(1).any(1)
    return int(gridded[changed].count_nonzero())


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 5)])
def test_operations_of_grid_pool(height: int, width: int) -> None:
    frames, channels = 32, 3
    counted = flops(grid_plan((frames,), height, width), channels)
    shrinking = sum(shrunk_tokens(frames, height, width, stride) for stride in (2, 4, 8))
    covered = (height // 2 * 2) * (width // 2 * 2)
    assert counted == (4 * frames * covered + shrinking) * channels


@pytest.mark.parametrize(
    ("settings", "covered"),
    [
        ({"kernel_size": 2}, 4 * 6),
        ({"kernel_size": 2, "ceil_mode": True}, 5 * 7),
        ({"kernel_size": 3, "stride": 1}, 3 * 3 * 3 * 5),
        ({"kernel_size": 3, "padding": 1}, 5 * 7),
        ({"output_size": (3, 7)}, 7 * 7),  # rows 0 and 1, 1 to 3, 3 and 4
    ],
    ids=str,
)
def test_operations_of_norm_pool(settings: dict[str, Any], covered: int) -> None:
    """Two for the norm and two for the sum, at each channel of each token of each window, padding left out."""
    assert flops(grid_plan((3,), 5, 7, frame_strides=(), **settings), 10) == 4 * 3 * covered * 10


def test_operations_of_a_provider() -> None:
    workload = WORKLOADS["8x27x27x896"]
    counted = {provider.name: provider.flops(workload) for provider in providers(workload, "cpu")}
    assert counted["avg_pool2d"] == counted["max_pool2d"] == 8 * 26 * 26 * 896  # one for each value
    assert counted["norm_pool:reference"] == counted["naive_norm_pool"] == 4 * counted["avg_pool2d"]
    assert counted["grid_pool:reference"] == workload.flops("grid_pool") > counted["norm_pool:reference"]
    assert counted["grid_pool_backward:reference"] == 2 * counted["grid_pool:reference"]


def test_bytes_of_a_gradient() -> None:
    """It reads what the op reads, and the gradient of what the op writes."""
    workload = WORKLOADS[VIDEO]
    forward, backward = workload.bound("grid_pool"), workload.bound("grid_pool_backward")
    assert (backward.read_bytes, backward.write_bytes) == (forward.total_bytes, workload.input_bytes)


# ---- who is timed ----

PLAIN = ["llava_avg_pool", "llava_bilinear_pool", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"]
CASES = {
    "even": replace(TINY, grid=(4, 6)),
    "odd": replace(TINY, grid=(5, 7)),
    "few frames": replace(TINY, frame_counts=(33,)),
    "fp16": replace(TINY, dtype=torch.float16),
    "fp32": replace(TINY, dtype=torch.float32),
    "ceil": replace(TINY, grid=(5, 7), ceil_mode=True),
    "ceil, even": replace(TINY, grid=(4, 6), ceil_mode=True),
    "ceil, fp32": replace(TINY, ceil_mode=True, dtype=torch.float32),
    "packed": replace(TINY, frame_counts=(9, 64, 16, 8)),
    "packed, ceil": replace(TINY, frame_counts=(33, 16), ceil_mode=True),
    "batch": replace(TINY, frame_counts=(32, 32), batch=2),
    "batch of one": replace(TINY, frame_counts=(33,), batch=1),
    "window 3": replace(TINY, grid=(6, 7), kernel_size=3),
    "window 3, ceil": replace(TINY, grid=(7, 8), kernel_size=3, ceil_mode=True),
    "window 3, batch": replace(TINY, frame_counts=(16, 16, 16), batch=3, grid=(6, 7), kernel_size=3),
    "output size": replace(TINY, output_size=(2, 3)),
    "output size, packed": replace(TINY, frame_counts=(20, 12), output_size=(3, 4)),
    "output size, fp32": replace(TINY, output_size=(4, 4), dtype=torch.float32),
}


@pytest.mark.parametrize("workload", CASES.values(), ids=CASES)
def test_everyone_is_right(workload: Workload) -> None:
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    before = x.clone()
    timed = providers(workload, "cpu")
    names = [f"{op}:{backend}" for op in ("norm_pool", "grid_pool") for backend in [*CPU, "reference"]]
    if workload.output_size is None:
        names += [*PLAIN, "naive_norm_pool", "naive_grid_pool"]
    else:
        names += ["adaptive_avg_pool2d"]
    names += [f"{op}_backward:{backend}" for op in ("norm_pool", "grid_pool") for backend in [*CPU, "reference"]]
    assert [provider.name for provider in timed] == names
    assert [provider.name for provider in timed if provider.takes_out] == [name for name in names if "pool:cpu" in name]
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


@pytest.mark.parametrize("name", ["odd", "ceil", "packed", "batch", "window 3", "output size"])
def test_ours_are_held_to_the_ops(name: str) -> None:
    workload = CASES[name]
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    given = {"grid_pool": {**workload.settings, **workload.packing}, "norm_pool": workload.settings}
    definitions = {provider.name: provider.definition for provider in providers(workload, "cpu")}
    for op, arguments in given.items():
        expected = getattr(stgp, op)(x, **arguments, backend="reference")
        assert torch.equal(definitions[f"{op}:reference"](x), expected)


@pytest.mark.parametrize("name", ["odd", "packed", "batch", "window 3", "output size, fp32"])
def test_gradients_are_those_of_autograd(name: str) -> None:
    workload = CASES[name]
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0).requires_grad_()
    known = {provider.name: provider for provider in providers(workload, "cpu")}
    given = {"grid_pool": {**workload.settings, **workload.packing}, "norm_pool": workload.settings}
    for op, arguments in given.items():
        for backend in [*CPU, "reference"]:
            result = getattr(stgp, op)(x, **arguments, backend=backend)
            grad = random_gradient(op, arguments, x.shape, x.dtype, x.device)
            (expected,) = torch.autograd.grad(result, x, grad)
            assert torch.equal(known[f"{op}_backward:{backend}"].call(x.detach()), expected)


def test_gradients_are_timed_if_they_are_asked_for() -> None:
    assert not any("backward" in provider.name for provider in chosen(TINY, "cpu", []))
    found = [provider.name for provider in chosen(TINY, "cpu", ["grid_pool*"], ["*:cpu"])]
    assert found == ["grid_pool:reference", "grid_pool_backward:reference"]


def test_naive_code_is_held_to_the_published_settings() -> None:
    """Without ceil_mode, which the published code has not."""
    workload = CASES["ceil"]
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    naive = {provider.name: provider for provider in providers(workload, "cpu") if "naive" in provider.name}
    for op in ("grid_pool", "norm_pool"):
        provider = naive[f"naive_{op}"]
        assert torch.equal(provider.definition(x), getattr(stgp, op)(x, backend="reference"))
        assert provider.note == "pools to 2 × 3, without windows that the edge cuts"
    assert not any(provider.note for provider in providers(CASES["ceil, even"], "cpu"))


@pytest.mark.parametrize(("name", "bilinear"), [("even", True), ("odd", False), ("ceil", False), ("batch", False)])
def test_plain_poolings_are_what_they_are_called(name: str, bilinear: bool) -> None:
    """Averages are norm_pool's at temperature 0; so is the bilinear resize to half of an even size."""
    workload = replace(CASES[name], dtype=torch.float32)
    x = random_tokens(workload.shape, torch.float32, "cpu", 0)
    average = stgp.norm_pool(x, temperature=0.0, ceil_mode=workload.ceil_mode, backend="reference")
    known = {provider.name: provider for provider in providers(workload, "cpu")}
    same = ["llava_avg_pool", "avg_pool2d", *(["llava_bilinear_pool", "adaptive_avg_pool2d"] if bilinear else [])]
    for provider in same:
        torch.testing.assert_close(known[provider].call(x), average)
    size = average.shape[-3:-1]
    pooled = known["max_pool2d"].call(x)
    for i, j in itertools.product(range(size[0]), range(size[1])):
        window = x[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, :]
        assert torch.equal(pooled[..., i, j, :], window.amax((-3, -2)))
    adaptive = known["adaptive_avg_pool2d"].call(x)
    assert adaptive.shape == average.shape
    sides = zip(x.shape[-3:-1], size, strict=True)
    windows = [[(i * side // n, -(-(i + 1) * side // n)) for i in range(n)] for side, n in sides]
    for (i, rows), (j, cols) in itertools.product(*map(enumerate, windows)):
        window = x[..., slice(*rows), slice(*cols), :]
        torch.testing.assert_close(adaptive[..., i, j, :], window.mean((-3, -2)))


def test_sizes_that_differ_are_noted() -> None:
    notes = {provider.name: provider.note for provider in providers(CASES["odd"], "cpu") if provider.note}
    assert notes == {"llava_bilinear_pool": "pools to 3 × 4"}


def test_compiled_code_is_timed_on_the_shapes_of_goals() -> None:
    assert not any("compiled" in provider.name for provider in providers(TINY, "cpu"))
    (provider,) = [p for p in providers(replace(TINY, goal=True), "cpu") if p.compiles]
    assert provider.name == "compiled_grid_pool"


def test_who_runs_on_a_gpu() -> None:
    names = [provider.name for provider in providers(TINY, "cuda")]
    assert not any(":cpu" in name for name in names)
    assert {"grid_pool:reference", BASELINE, "naive_grid_pool"} < set(names)
    backends = set(stgp.available_backends()) - {"cpu"}
    assert {name.partition(":")[2] for name in names if name.startswith("grid_pool:")} == backends


@pytest.mark.parametrize("name", ["odd", "ceil", "packed", "even"])
def test_what_is_compiled_pools_right(name: str) -> None:
    workload = CASES[name]
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    expected = stgp.grid_pool(x, **workload.settings, **workload.packing, backend="reference")
    assert mismatch(op_by_op_grid_pool(workload.plan("grid_pool"), "cpu")(x), expected, 2) is None


# ---- definitions, and comparing with them ----


@pytest.mark.parametrize(
    ("workload", "parts"),
    [
        (replace(TINY, frame_counts=(64,)), [32, 32]),
        (replace(TINY, frame_counts=(40,)), [40]),
        (replace(TINY, frame_counts=(32, 33, 96, 5)), [32, 33, 32, 32, 32, 5]),
        (replace(TINY, frame_counts=(64, 64), batch=2), [32] * 4),
        (replace(TINY, frame_counts=(64,), batch=1), [32] * 2),
    ],
    ids=lambda value: str(value.frame_counts) if isinstance(value, Workload) else "",
)
def test_segments_are_the_whole_bit_by_bit(workload: Workload, parts: Sequence[int]) -> None:
    seen: list[int] = []

    def pool(x: Tensor) -> Tensor:
        seen.append(len(x))
        return stgp.grid_pool(x, backend="reference")

    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    in_parts = in_segments(workload, pool)(x)
    assert torch.equal(in_parts, stgp.grid_pool(x, **workload.packing, backend="reference"))
    assert seen == parts


def test_shape_and_dtype_must_match() -> None:
    expected = torch.ones(3, 2, 2, 4)
    assert mismatch(expected[:2], expected, 2) == "(2, 2, 2, 4) torch.float32 in place of (3, 2, 2, 4) torch.float32"
    assert "torch.float16 in place of" in str(mismatch(expected.half(), expected, 2))


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


def test_what_is_allowed_goes_with_the_largest_value() -> None:
    expected = torch.ones(40, 1, 1, 2)
    expected[39] = 1000.0  # between 512 and 1024
    eps = torch.finfo(torch.float32).eps
    result = expected.clone()
    result[0] += 512 * eps
    assert mismatch(result, expected, 1) is None
    result[0] += 512 * eps
    assert mismatch(result, expected, 1) is not None


# ---- choosing ----

NAMES = ["norm_pool:cpu", "norm_pool:reference", "grid_pool:cpu", "llava_avg_pool", "avg_pool2d", "naive_grid_pool"]


@pytest.mark.parametrize(
    ("wanted", "unwanted", "found"),
    [
        ([], [], NAMES),
        (["grid_pool"], [], ["grid_pool:cpu"]),
        (["norm_pool"], ["norm_pool:reference"], ["norm_pool:cpu"]),
        (["avg_pool2d", "norm_pool:cpu"], [], ["norm_pool:cpu", "avg_pool2d"]),
        (["*avg*"], [], ["llava_avg_pool", "avg_pool2d"]),
        (["*:cpu"], ["grid*"], ["norm_pool:cpu"]),
        ([], ["*_pool:*"], ["llava_avg_pool", "avg_pool2d", "naive_grid_pool"]),
        (["pool", "avg", "GRID_POOL", ""], [], []),
    ],
)
def test_patterns(wanted: list[str], unwanted: list[str], found: list[str]) -> None:
    assert select(NAMES, wanted, unwanted) == found


def test_slow_ones_are_timed_on_large_tokens_only_if_they_are_wanted() -> None:
    """Or where goals are set; a GPU takes no seconds."""
    slow = {"norm_pool:reference", "grid_pool:reference", "naive_norm_pool", "naive_grid_pool"}
    large, goal, small = WORKLOADS["long-512"], WORKLOADS[VIDEO], WORKLOADS["8x27x27x896"]

    def names(workload: Workload, *wanted: str, device: str = "cpu") -> set[str]:
        return {provider.name for provider in chosen(workload, device, wanted)}

    assert names(small) - names(large) == slow
    assert slow < names(goal)
    assert slow < names(large, device="cuda")
    assert names(large, "naive_grid_pool", "*_pool:reference") == slow - {"naive_norm_pool"}


def test_chosen_providers() -> None:
    found = chosen(TINY, "cpu", ["*_pool:reference", "avg_pool2d"], ["norm*"])
    assert [provider.name for provider in found] == ["grid_pool:reference", "avg_pool2d"]
    x = random_tokens(TINY.shape, TINY.dtype, "cpu", 0)
    assert torch.equal(found[0].call(x), stgp.grid_pool(x, backend="reference"))
    names = Counter(provider.name for provider in chosen(TINY, "cpu", []))
    assert set(names.values()) == {1}
    assert partial(select, list(names))(["grid_pool"]) == [f"grid_pool:{backend}" for backend in [*CPU, "reference"]]
