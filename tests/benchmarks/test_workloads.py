"""Workloads have their fewest bytes, and their providers are all right and chosen by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import stgridpool_kernels as stgp
from benchmarks.lower_bound import lower_bound, tokens_read
from benchmarks.poolings import op_by_op_grid_pool
from benchmarks.provider import mismatch
from benchmarks.providers import BASELINE, chosen, providers, select
from benchmarks.workloads import QUICK, WORKLOADS, Workload, parse_workload, parse_workloads, random_tokens
from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends import compiled

VIDEO = "llava-video-7b"
TINY = Workload("tiny", (64,), (5, 7), 48)
CPU = ["cpu"] if compiled.LIBRARY is not None else []
"""This is the backend of the compiled library, where that was built."""


# ---- workloads ----


@pytest.mark.parametrize(
    ("name", "shape", "pooled", "settings"),
    [
        (VIDEO, (64, 27, 27, 3584), (13, 13), {}),
        ("llava-onevision-7b", (32, 27, 27, 3584), (14, 14), {"ceil_mode": True}),
        ("packed-16", (1088, 27, 27, 896), (13, 13), {"frame_counts": list(range(8, 129, 8))}),
        ("batch-8", (8, 32, 27, 27, 896), (13, 13), {}),
        ("stream-bilinear", (64, 27, 27, 3584), (13, 13), {"resize": "bilinear"}),
    ],
)
def test_shapes_and_settings(
    name: str, shape: tuple[int, ...], pooled: tuple[int, int], settings: dict[str, Any]
) -> None:
    workload = WORKLOADS[name]
    assert (workload.name, workload.shape, workload.settings) == (name, shape, settings)
    assert {workload.plan(op).pooled_size for op in ("grid_pool", "norm_pool")} == {pooled}
    assert [len(workload.plan(op).levels) for op in ("grid_pool", "norm_pool")] == [3, 0]
    x = torch.empty(workload.shape, dtype=workload.dtype, device="meta")
    assert stgp.grid_pool(x, **settings).shape == (*x.shape[:-3], *pooled, x.shape[-1])


def test_texts_name_workloads() -> None:
    for text, more in (
        ("4x5x6x64", {}),
        ("4x5x6x64:ceil:fp32", {"dtype": torch.float32, "ceil_mode": True}),
        ("3x4x5x6x64:fp16", {"batch": 3, "frame_counts": (4, 4, 4), "dtype": torch.float16}),
        ("4x5x6x64:stream", {"kind": "stream", "groups": ("stream",)}),
    ):
        assert parse_workload(text) == replace(Workload(text, (4,), (5, 6), 64, groups=("pooling",)), **more)
    assert parse_workload("llava-video-0.5b:gradients") is WORKLOADS["llava-video-0.5b:gradients"]
    found = parse_workload(f"{VIDEO}-ceil:gradients")
    assert (found.kind, found.groups, found.goal, found.ceil_mode) == ("gradients", ("gradients",), False, True)


def test_groups_name_all_their_workloads() -> None:
    """A workload with the name of a group comes first. The sweep next to a plain average has every size and dtype."""
    assert parse_workloads("stream") == [WORKLOADS["stream"]]
    assert parse_workloads("prefill") == [WORKLOADS["prefill-0.5b"], WORKLOADS["prefill-7b"]]
    assert parse_workloads("4x5x6x64:plain") == [parse_workload("4x5x6x64:plain")]
    found = parse_workloads("plain")
    assert all(workload.warm and workload.groups == ("plain",) for workload in found)
    assert len({(workload.frames, workload.channels, workload.dtype) for workload in found}) == 5 * 7 * 3
    assert WORKLOADS["16x27x27x384:fp32:plain"].shape == (16, 27, 27, 384)
    assert not any(workload.warm for workload in WORKLOADS.values() if workload.kind != "plain")


@pytest.mark.parametrize(
    "text", ["", "llava", "4x5x6", "0x5x6x64", "4x5x6x64:fp64", "4x5x6x64:fp16:bf16", "4x5x6x6.4", "4x5x6x64:",
             " 4x5x6x64", "4x5x6x64:stream:prefill"],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^shape must be TxHxWxC.*llava-video-7b,.*:fp16.*:ceil.*plain.*; got "
    ) as caught:
        parse_workload(text)
    assert str(caught.value).endswith(repr(text))


# ---- the fewest bytes ----


def test_fewest_bytes_by_hand() -> None:
    bound = WORKLOADS[VIDEO].bound("norm_pool")
    assert (bound.read_bytes, bound.write_bytes) == (64 * 26 * 26 * 3584 * 2, 64 * 13 * 13 * 3584 * 2)
    plan = grid_plan((3,), 5, 7, frame_strides=(), kernel_size=3, padding=1)
    assert lower_bound(plan, 10, 4).read_bytes == 3 * 5 * 7 * 10 * 4
    forward, backward = WORKLOADS[VIDEO].bound("grid_pool"), WORKLOADS[VIDEO].bound("grid_pool_backward")
    assert (backward.read_bytes, backward.write_bytes) == (forward.total_bytes, WORKLOADS[VIDEO].input_bytes)


@pytest.mark.parametrize(
    "arguments",
    [
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

CASES = {
    "odd": TINY,
    "even": replace(TINY, grid=(4, 6), dtype=torch.float16),
    "few frames": replace(TINY, frame_counts=(33,), dtype=torch.float32),
    "ceil": replace(TINY, ceil_mode=True),
    "packed": replace(TINY, frame_counts=(9, 64, 16, 8)),
    "batch": replace(TINY, frame_counts=(16, 16, 16), batch=3, grid=(6, 7), kernel_size=3, ceil_mode=True),
    "output size": replace(TINY, frame_counts=(20, 12), output_size=(3, 4), dtype=torch.float32),
}


def named(workload: Workload) -> dict[str, Any]:
    return {provider.name: provider for provider in providers(workload, "cpu")}


@pytest.mark.parametrize("workload", CASES.values(), ids=CASES)
def test_every_provider_is_right(workload: Workload) -> None:
    """Poolings and gradients are compared with their definitions, and no input is changed."""
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    before = x.clone()
    timed = [*providers(workload, "cpu"), *providers(replace(workload, kind="gradients"), "cpu")]
    ours = [f"{op}:{backend}" for op in ("norm_pool", "grid_pool") for backend in [*CPU, "reference"]]
    plain = ["avg_pool2d", "llava_avg_pool", "llava_bilinear_pool", "max_pool2d"]
    naive = ["naive_norm_pool", "naive_grid_pool"]
    others = ["adaptive_avg_pool2d"] if workload.output_size else [*plain, "adaptive_avg_pool2d", *naive]
    backward = [name.replace(":", "_backward:") for name in ours]
    assert [provider.name for provider in timed] == [*ours, *others, *ours, *backward]
    of_the_package = {name for name in ours if ":cpu" in name}
    assert {provider.name for provider in timed if provider.takes_out} == of_the_package | {"avg_pool2d"} & {*others}
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


@pytest.mark.parametrize("name", ["packed", "batch", "output size"])
def test_definitions_are_the_ops_and_their_gradients(name: str) -> None:
    workload = CASES[name]
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0).requires_grad_()
    known = named(replace(workload, kind="gradients"))
    for op, arguments in (("grid_pool", workload.settings), ("norm_pool", workload.windows)):
        result = getattr(stgp, op)(x, **arguments, backend="reference")
        assert torch.equal(known[f"{op}:reference"].definition(x.detach()), result)
        grad = torch.randn(result.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(x.dim()))
        (expected,) = torch.autograd.grad(result, x, grad)
        assert torch.equal(known[f"{op}_backward:reference"].call(x.detach()), expected)


@pytest.mark.parametrize(("name", "bilinear"), [("even", True), ("odd", False), ("ceil", False)])
def test_plain_poolings_are_what_they_are_called(name: str, bilinear: bool) -> None:
    """Averages are those of norm_pool at temperature 0, and so is the bilinear resize to half of an even size.

    Sizes that differ are noted. Naive code is held to the op without ceil_mode, as the published code has none.
    """
    workload = replace(CASES[name], dtype=torch.float32)
    x = random_tokens(workload.shape, torch.float32, "cpu", 0)
    average = stgp.norm_pool(x, temperature=0.0, ceil_mode=workload.ceil_mode, backend="reference")
    known = named(workload)
    for provider in ["llava_avg_pool", "avg_pool2d", *(["llava_bilinear_pool"] if bilinear else [])]:
        torch.testing.assert_close(known[provider].call(x), average)
    windows = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2].unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    largest = windows.amax((2, 4))
    assert torch.equal(known["max_pool2d"].call(x)[:, : largest.shape[1], : largest.shape[2]], largest)
    assert known["adaptive_avg_pool2d"].call(x).shape == average.shape
    cut = "pools to 2 × 3, without windows that the edge cuts"
    notes = {
        "odd": {"llava_bilinear_pool": "pools to 3 × 4"},
        "ceil": {f"naive_{op}_pool": cut for op in ("norm", "grid")},
    }
    assert {p: known[p].note for p in known if known[p].note} == notes.get(name, {})


def test_code_for_torch_compile_pools_right() -> None:
    """The code for torch.compile is timed on the shapes that goals are set for."""
    for name in ("odd", "ceil", "packed", "even"):
        workload = CASES[name]
        x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
        expected = stgp.grid_pool(x, **workload.settings, backend="reference")
        assert mismatch(op_by_op_grid_pool(workload.plan("grid_pool"), "cpu")(x), expected, 2) is None
        assert named(replace(workload, goal=True)).keys() - named(workload) == {"compiled_grid_pool"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plain_average_is_compared_with_the_kernels_alone(device: str) -> None:
    found = [provider.name for provider in providers(WORKLOADS["8x27x27x896:bf16:plain"], device)]
    kernels = CPU if device == "cpu" else [name for name in stgp.available_backends() if name in ("triton", "cuda")]
    assert found == [f"{op}:{name}" for op in ("norm_pool", "grid_pool") for name in kernels] + ["avg_pool2d"]


def test_providers_of_a_gpu() -> None:
    found = providers(WORKLOADS[VIDEO], "cuda")
    names = {provider.name for provider in found}
    assert {"grid_pool:reference", BASELINE, "naive_grid_pool", "compiled_grid_pool:max-autotune"} < names
    backends = set(stgp.available_backends()) - {"cpu"}
    assert {name.partition(":")[2] for name in names if name.startswith("grid_pool:")} == backends
    # the reference copies its indices from the CPU at every call
    assert {provider.name for provider in found if not provider.captures} == {n for n in names if "reference" in n}


def test_every_value_is_compared() -> None:
    expected = torch.ones((2, 35, 2, 3, 4), dtype=torch.bfloat16)
    eps = 2**-7
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


@pytest.mark.parametrize(
    ("wanted", "unwanted", "found"),
    [
        (["norm_pool"], ["norm_pool:reference"], ["norm_pool:cpu"]),
        (["avg_pool2d", "norm_pool:cpu"], [], ["norm_pool:cpu", "avg_pool2d"]),
        ([], ["*_pool:*"], ["llava_avg_pool", "avg_pool2d"]),
        (["pool", "avg", "GRID_POOL", ""], [], []),
    ],
)
def test_patterns(wanted: list[str], unwanted: list[str], found: list[str]) -> None:
    names = ["norm_pool:cpu", "norm_pool:reference", "grid_pool:cpu", "llava_avg_pool", "avg_pool2d"]
    assert select(names, wanted, unwanted) == found


def test_slow_ones_are_timed_on_large_tokens_only_if_they_are_wanted() -> None:
    """Shapes that goals are set for are excepted, and so is a GPU, where none takes seconds."""
    slow = {"norm_pool:reference", "grid_pool:reference", "naive_norm_pool", "naive_grid_pool"}
    large, goal, small = WORKLOADS["long-512"], WORKLOADS[VIDEO], WORKLOADS[QUICK[1]]

    def names(workload: Workload, *wanted: str, device: str = "cpu") -> set[str]:
        return {provider.name for provider in chosen(workload, device, wanted)}

    assert names(small) - names(large) == slow
    assert slow < names(goal)
    assert slow < names(large, device="cuda")
    assert names(large, "naive_grid_pool", "*_pool:reference") == slow - {"naive_norm_pool"}
