"""Microbenchmarks of the quick workloads' providers under pytest-benchmark, for a comparison of two commits.

    make bench                             # all; results are kept in .benchmarks
    make bench ARGS=--benchmark-compare    # next to the last results
    make bench ARGS="-k norm_pool"         # a selection

Every result is compared with its definition before it is timed. A group is a workload. A round is one call: on a CPU
with cold caches, on a GPU on rotating inputs and until the device has finished.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import stgridpool_kernels
from benchmarks.devices import Cpu, Device
from benchmarks.measure import QUICK, Contender, Expected, provider_row, variants
from benchmarks.provider import Provider
from benchmarks.providers import providers
from benchmarks.workloads import QUICK as NAMES
from benchmarks.workloads import WORKLOADS, Workload
from stgridpool_kernels.backends import triton as triton_backend
from stgridpool_kernels.plan import grid_plan

KIND = "cuda" if torch.cuda.is_available() else "cpu"


def cases() -> Iterator[object]:
    for name in NAMES:
        for provider in providers(WORKLOADS[name], KIND):
            for variant, into_out in variants(provider, separates_out=KIND == "cpu"):
                yield pytest.param(name, provider.name, into_out, id=f"{name}-{variant}")


@lru_cache(maxsize=1)
def timed(workload: Workload, device: Device) -> tuple[dict[str, Provider], Expected]:
    """Return providers and expected results of a workload, cached for its other cases, which come next."""
    return {provider.name: provider for provider in providers(workload, device.type)}, Expected(device.inputs(workload))


@pytest.mark.parametrize(("workload", "provider", "into_out"), list(cases()))
def test_provider(benchmark: BenchmarkFixture, device: Device, workload: str, provider: str, into_out: bool) -> None:
    by_name, expected = timed(WORKLOADS[workload], device)
    contender = Contender(by_name[provider], expected, into_out)
    row = provider_row("", WORKLOADS[workload], by_name[provider])
    contender.prepare(device, row)
    calls = itertools.cycle(contender.calls)

    def call() -> object:
        result = next(calls)()
        device.finish()
        return result

    def prepare() -> None:
        if isinstance(device, Cpu):
            device.evict()

    begin = time.perf_counter()
    call()
    rounds = QUICK.samples((time.perf_counter() - begin) * 1e6)
    benchmark.group = workload
    benchmark.extra_info |= {"read_bytes": row.read_bytes, "write_bytes": row.write_bytes}
    benchmark.pedantic(call, setup=prepare, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    contender.check_last()


@pytest.mark.parametrize("op", ["grid_pool", "norm_pool"])
def test_before_the_launches(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Time the Python code of a warm call on the triton backend, with its result, by launches that do nothing.

    On a CPU it needs TRITON_INTERPRET=1.
    """
    x = torch.zeros(64, 9, 9, 16, dtype=torch.bfloat16, device=KIND)
    if reason := triton_backend.unsupported_reason(x, None):
        pytest.skip(reason)
    from stgridpool_kernels.backends.triton_kernels import launch

    monkeypatch.setattr(launch.Launch, "__call__", lambda *arguments: None)
    benchmark.group = "before the launches"
    with stgridpool_kernels.use_backend("triton"):
        benchmark(getattr(torch.ops.stgp, op), x)


@pytest.mark.parametrize("kept", [False, True], ids=["new", "kept"])
def test_plan(benchmark: BenchmarkFixture, kept: bool) -> None:
    """Time the creation of a plan of 4096 frames, and its look-up in the cache of plans."""
    plan = grid_plan((4096,), 27, 27)
    benchmark.group = "plan"
    if kept:
        assert benchmark(grid_plan, (4096,), 27, 27) is plan
    else:
        assert benchmark(dataclasses.replace, plan) == plan


@pytest.mark.parametrize("norm_channels", [None, 2048, 512, 100])
@pytest.mark.parametrize("op", ["grid_pool", "norm_pool"])
def test_norm_channels(benchmark: BenchmarkFixture, device: Device, op: str, norm_channels: int | None) -> None:
    """Time an op by norms of some channels: 4 levels of Qwen3-VL-2B, 2048 channels each, into given memory."""
    x = torch.randn(16, 24, 24, 4 * 2048, device=device.torch_device).bfloat16()
    pool = getattr(stgridpool_kernels, op)
    out = pool(x, norm_channels=norm_channels)

    def call() -> None:
        pool(x, norm_channels=norm_channels, out=out)
        device.finish()

    benchmark.group = f"{op} by norms of some channels"
    benchmark.pedantic(call, rounds=30, warmup_rounds=2)  # type: ignore[no-untyped-call]
