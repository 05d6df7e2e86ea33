"""Measuring times what is right, in turns, on a CPU or a GPU, and says why anything else has no time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import stgridpool_kernels as stgp
from benchmarks import devices, measure
from benchmarks.devices import Cpu, Gpu, Sampler, open_device
from benchmarks.measure import SampleBudget, copies, needed_bytes, take_turns
from benchmarks.provider import Provider
from benchmarks.providers import chosen, providers
from benchmarks.results import BenchRow
from benchmarks.workloads import WORKLOADS, Workload
from stgridpool_kernels.backends.compiled import LIBRARY

ROOT = Path(__file__).parents[2]
TINY = Workload("tiny", (64,), (5, 5), 96)
SMALL = Workload("small", (9,), (5, 5), 8)
TWO = SampleBudget(most=2, least=2)

pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture
def cpu(without_waiting: None) -> Cpu:
    """Return a CPU with one thread."""
    return Cpu(1)


def rows_on(device: Any, workload: Workload, timed: Sequence[Provider], **given: Any) -> dict[str, BenchRow]:
    options = {"baseline": "llava_avg_pool", "effort": TWO, **given}
    rows = measure.measure(workload, timed, device, "some run", **options)
    found = {row.provider: row for row in rows}
    assert len(found) == len(rows)
    return found


def pooling(name: str, call: Callable[..., Tensor] = stgp.grid_pool, **given: Any) -> Provider:
    """Return a provider whose result is compared with grid_pool."""
    return Provider(name, "grid_pool", call, partial(stgp.grid_pool, backend="reference"), 2, **given)


def assert_no_times(row: BenchRow) -> None:
    names = ("p20_us", "p50_us", "p80_us", "samples", "overhead_us", "gb_per_s", "percent_of_copy", "times_baseline")
    assert {getattr(row, name) for name in names} == {None}


# ---- rows ----


@pytest.mark.needs("library")
def test_rows_are_complete(cpu: Cpu) -> None:
    timed = providers(TINY, "cpu")
    rows = rows_on(cpu, TINY, timed)
    names = [name for p in timed for name in ([f"{p.name}:out"] if p.takes_out else []) + [p.name]]
    assert list(rows) == ["copy", *([] if cpu.probe is None else ["read", "ceiling"]), *names]
    for row in rows.values():
        assert (row.run, row.workload, row.check, row.shape) == ("some run", "tiny", "ok", (64, 5, 5, 96))
        assert (row.groups, row.input_bytes, row.baseline) == (("main",), TINY.input_bytes, "llava_avg_pool")
        assert (row.samples, row.calls_per_sample, row.rotating_sets, row.overhead_us) == (2, 1, 1, None)
        assert 0 < row.p20_us <= row.us <= row.p80_us
        assert min(row.gb_per_s, row.percent_of_copy, row.times_baseline) > 0
    if cpu.probe is not None:
        assert (rows["read"].read_bytes, rows["read"].write_bytes) == (TINY.input_bytes, 0)
        assert rows["ceiling"].write_bytes == TINY.bound("norm_pool").write_bytes
    for row, op in [(rows["copy"], "grid_pool"), *((rows[provider.name], provider.op) for provider in timed)]:
        bound = TINY.bound(op)
        assert (row.read_bytes, row.write_bytes) == (bound.read_bytes, bound.write_bytes)


def test_a_copy_moves_as_many_bytes() -> None:
    targets = [call() for call in copies(4096, 3, "cpu")]
    assert [2 * target.nbytes for target in targets] == [4096] * 3
    assert len({target.data_ptr() for target in targets}) == 3
    assert all(target.std() > 0 for target in targets)  # not the ones that were there before


def test_no_copy_is_timed_on_warm_caches(cpu: Cpu) -> None:
    """Memory that is given is given to all, and a workload of which nothing is right has no times."""
    workload = replace(SMALL, kind="plain")
    rows = rows_on(cpu, workload, providers(workload, "cpu"), baseline="avg_pool2d")
    ours = [f"{op}:cpu" for op in ("norm_pool", "grid_pool") if LIBRARY is not None]
    assert list(rows) == [f"{name}{out}" for name in (*ours, "avg_pool2d") for out in (":out", "")]
    assert {row.check for row in rows.values()} == {"ok"}
    assert_no_times(rows_on(cpu, workload, [pooling("bad", returns_nan)])["bad"])


def test_overhead_is_taken_of_one_workload(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "overhead_us", lambda device, call: 12.5)
    one_frame = WORKLOADS["1x9x9x384"]
    assert rows_on(cpu, one_frame, chosen(one_frame, "cpu", ["avg_pool2d"]))["avg_pool2d"].overhead_us == 12.5


# ---- providers that are not timed ----


def returns_nan(x: Tensor) -> Tensor:
    return stgp.grid_pool(x) * float("nan")


def misses_a_value(x: Tensor) -> Tensor:
    result = stgp.grid_pool(x)
    result[-1, -1, -1, -1] += 1
    return result


def fails(x: Tensor) -> Tensor:
    raise NotImplementedError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("call", "check"),
    [(misses_a_value, "wrong: off by 1, "), (stgp.temporal_grid, "wrong: (9, 5, 5, 8)"), (fails, "failed: NotImpl")],
)
def test_what_is_wrong_or_fails_has_no_times(cpu: Cpu, call: Callable[..., Tensor], check: str) -> None:
    """A provider that is wrong or fails does not stop the others."""
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return call(x)

    effort = SampleBudget(most=20, least=20)
    rows = rows_on(cpu, SMALL, [pooling("bad", counted), pooling("good")], baseline="bad", effort=effort)
    assert rows["bad"].check.startswith(check)
    assert "\n" not in rows["bad"].check
    assert_no_times(rows["bad"])
    assert calls < 20
    assert (rows["good"].check, rows["good"].samples, rows["good"].times_baseline) == ("ok", 20, None)


def test_results_in_given_memory_are_checked_before_and_after(cpu: Cpu) -> None:
    """A provider is caught that does not write its output, and one that goes wrong while it is timed."""
    calls = 0

    def writes_nothing(x: Tensor, out: Tensor | None = None) -> Tensor:
        return stgp.grid_pool(x) if out is None else out

    def breaks(x: Tensor, out: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += out is not None
        pooled = stgp.grid_pool(x) if calls < 10 else torch.zeros_like(stgp.grid_pool(x))
        return pooled if out is None else out.copy_(pooled)

    timed = [pooling("idle", writes_nothing, takes_out=True), pooling("breaks", breaks, takes_out=True)]
    rows = rows_on(cpu, SMALL, timed, effort=SampleBudget(20, 20), baseline="copy")
    assert rows["idle:out"].check.startswith("wrong: off by nan")
    assert rows["idle"].check == "ok"
    assert calls > 20
    assert rows["breaks:out"].check.startswith("wrong: off by")
    assert_no_times(rows["breaks:out"])


def test_a_part_is_timed_and_the_whole_is_checked(cpu: Cpu) -> None:
    """A call may compute a part of the result, as a push to a stream does, and its samples are whole periods."""
    part = pooling("part", lambda x: x, checked=stgp.grid_pool, period=3, state_bytes=lambda: 7)
    rows = rows_on(cpu, SMALL, [part, replace(part, name="wrong", checked=returns_nan)])
    assert (rows["part"].check, rows["part"].samples, rows["part"].state_bytes) == ("ok", 6, 7)
    assert rows["wrong"].check.startswith("wrong: ")


def test_too_little_memory_is_a_reason(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be too little for the tokens or for one provider. A system that does not say has enough."""
    free = 2 * needed_bytes(SMALL, cpu)
    monkeypatch.setattr(cpu, "free_bytes", lambda: free)
    many = pooling("many", lambda x: pytest.fail("it was called"), memory=free / SMALL.input_bytes)
    rows = rows_on(cpu, SMALL, [many, pooling("few")])
    assert rows["many"].check.startswith("skipped: takes some ")
    assert rows["few"].check == "ok"
    monkeypatch.setattr(cpu, "free_bytes", lambda: None)
    assert rows_on(cpu, SMALL, [pooling("good")])["good"].check == "ok"
    monkeypatch.setattr(cpu, "free_bytes", lambda: needed_bytes(SMALL, cpu) - 1)
    monkeypatch.setattr(cpu, "inputs", lambda workload: pytest.fail("tokens were made"))
    (row,) = rows_on(cpu, SMALL, [many]).values()
    assert row.check.startswith("skipped: takes ")
    assert_no_times(row)


# ---- turns ----


def test_slow_calls_have_fewer_turns() -> None:
    assert [SampleBudget(25, 5, 8).samples(us) for us in (0, 400_000, 1e6, 1e9)] == [25, 20, 8, 5]
    order: list[str] = []

    def sampler(name: str, time_us: float) -> Sampler:
        return lambda: (order.append(name), time_us)[1]

    samplers = {"copy": sampler("copy", 1.0), "fast": sampler("fast", 2.0), "slow": sampler("slow", 1e5)}
    turns = {"copy": (1, 1), "fast": (2, 2), "slow": (10, 1)}  # a sample of the slow one takes a second
    times = take_turns(samplers, turns, SampleBudget(most=4, least=1, seconds=2), warm_up_s=0.0)
    assert times == {"copy": [1.0] * 4, "fast": [2.0] * 8, "slow": [1e5] * 2}
    assert order[:3] == ["copy", "fast", "slow"]  # for how long they take
    assert order[3:] == ["fast", "copy", "fast", "fast", "copy", "fast", "slow"] * 2


# ---- a CPU ----


def test_a_sample_is_one_call_on_empty_caches(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a sample includes neither emptying the caches nor freeing the result."""

    def passes(seconds: float) -> None:
        now[0] += seconds

    class Result:
        def __del__(self) -> None:
            passes(100)

    def call() -> Result:
        assert now[0] == 1000
        passes(0.25)
        return Result()

    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cpu, "evict", lambda: passes(1000))
    sample, calls = cpu.sampler([call])
    assert (sample(), calls) == (250_000, 1)
    assert now[0] == 1100.25


def test_a_sample_on_warm_caches_is_the_second_of_two_calls(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5])
    calls: list[str] = []
    monkeypatch.setattr(devices.time, "perf_counter", lambda: (calls.append("clock"), next(now))[1])
    monkeypatch.setattr(cpu, "evict", lambda: pytest.fail("caches were emptied"))
    sample, _ = cpu.sampler([lambda: calls.append("call")], warm=True)
    assert (sample(), calls) == (500_000, ["call", "clock", "call", "clock"])


MEMORY_OF_A_CALL = """
import torch
from benchmarks.devices import Cpu

x = torch.ones(1 << 20)

def call():
    large = torch.ones(32 << 20, dtype=torch.uint8)
    return x + large[:1]  # 4 MB of its own

call()  # pages of code that a first call touches would count
found, result = object.__new__(Cpu).extra_peak_bytes(call, 4 << 20)  # without the memory that evicts caches
assert torch.equal(result, x + 1)
print(found)
"""


def test_memory_of_a_call() -> None:
    """A process of its own has no memory of other tests, which the system may take back or give meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_A_CALL], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n" or abs(int(done.stdout) - (32 << 20)) < 2 << 20


def test_memory_that_the_system_does_not_report(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1 << 20)
    monkeypatch.setattr(devices, "field_bytes", lambda file, field: None)
    assert cpu.extra_peak_bytes(lambda: x, 0) == (None, x)


# ---- a GPU, without one ----


def test_inputs_of_a_gpu_exceed_its_cache() -> None:
    gpu: Any = object.__new__(Gpu)
    gpu.torch_device, gpu.l2_bytes = "cpu", 3_000
    xs = gpu.inputs(SMALL)
    assert len(xs) * (SMALL.input_bytes + SMALL.bound("grid_pool").write_bytes) >= 5 * gpu.l2_bytes
    assert not any(torch.equal(xs[0], x) for x in xs[1:])


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize(("us", "inputs", "repeats"), [(90.0, 4, 6), (5000.0, 3, 1), (1.0, 2, 8)])
def test_a_sample_of_a_gpu_takes_2_ms(
    monkeypatch: pytest.MonkeyPatch, us: float, inputs: int, repeats: int, captures: bool
) -> None:
    """An untimed turn keeps the device busy until the timed one has arrived.

    What no graph can capture is called from Python where that is known. Otherwise the stream is left as it was.
    """
    log: list[str] = []
    fakes: dict[str, Any] = {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        "Event": lambda enable_timing: SimpleNamespace(
            record=lambda: log.append("event"), synchronize=lambda: None, elapsed_time=lambda end: 3.0
        ),
        "graph": nullcontext,
        "current_stream": lambda: "the stream before",
        "set_stream": log.append,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Gpu, "returns_us", lambda self, calls: us)
    gpu, turn = object.__new__(Gpu), ["call"] * inputs * repeats
    sample, calls = gpu.sampler([lambda: log.append("call")] * inputs, captures)
    assert calls == inputs * repeats
    assert log == ([*turn, "the stream before"] if captures else [])
    log.clear()
    assert sample() == pytest.approx(3000 / calls)
    again = ["replay"] if captures else turn
    assert log == [*again, "event", *again, "event"]
    log.clear()
    with pytest.raises(ZeroDivisionError):
        gpu.sampler([lambda: 1 // 0])
    assert log == ["the stream before"]


def test_devices_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device cuda:2: 2 CUDA devices can be used"):
        open_device("cuda:2")
    with pytest.raises(ValueError, match="--threads is for the CPU"):
        open_device("cuda", threads=2)
