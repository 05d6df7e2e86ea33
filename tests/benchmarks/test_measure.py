"""Measuring: which providers are not timed and why, whose turn it is, and devices. All times are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import stgridpool_kernels as stgp
from benchmarks import devices, machine, measure
from benchmarks.devices import Call, Cpu, Gpu, Sampler, open_device
from benchmarks.measure import LOST, SampleBudget, copies, needed_bytes, take_turns
from benchmarks.provider import Provider
from benchmarks.providers import chosen, providers
from benchmarks.results import BenchRow
from benchmarks.workloads import WORKLOADS, Workload, random_tokens

TINY = Workload("tiny", (64,), (5, 5), 96)
SMALL = Workload("small", (9,), (5, 5), 8)
TWO = SampleBudget(most=2, least=2)

pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    """A CPU that empties no caches and does not warm up, with one thread."""
    monkeypatch.setattr(take_turns, "__defaults__", (0.0,))
    device = Cpu(1)
    device._evictor = device._evictor[:16]
    return device


def rows_on(device: Any, workload: Workload, timed: Sequence[Provider], **given: Any) -> dict[str, BenchRow]:
    options = {"baseline": "llava_avg_pool", "effort": TWO, **given}
    rows = measure.measure(workload, timed, device, "some run", **options)
    found = {row.provider: row for row in rows}
    assert len(found) == len(rows)
    return found


def pooling(name: str, call: Callable[..., Tensor] = stgp.grid_pool, **given: Any) -> Provider:
    """A provider that is held to grid_pool."""
    return Provider(name, "grid_pool", call, partial(stgp.grid_pool, backend="reference"), 2, **given)


TIMES = ("p20_us", "p50_us", "p80_us", "samples", "overhead_us", "gb_per_s", "percent_of_copy", "times_baseline")


def assert_no_times(row: BenchRow) -> None:
    assert {name: getattr(row, name) for name in TIMES} == dict.fromkeys(TIMES)


# ---- rows ----


@pytest.mark.needs("library")
def test_rows_are_complete(cpu: Cpu) -> None:
    timed = providers(TINY, "cpu")
    rows = rows_on(cpu, TINY, timed)
    names = [name for p in timed for name in ([f"{p.name}:out"] if p.takes_out else []) + [p.name]]
    probes = [] if cpu.probe is None else ["read", "ceiling"]
    assert list(rows) == ["copy", *probes, *names]
    assert {name: row.check for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    for row in rows.values():
        assert (row.run, row.workload, row.dtype, row.shape) == ("some run", "tiny", "bfloat16", (64, 5, 5, 96))
        assert (row.groups, row.input_bytes, row.baseline) == (("main",), TINY.input_bytes, "llava_avg_pool")
        assert (row.samples, row.calls_per_sample, row.rotating_sets) == (2, 1, 1)
        assert 0 < row.p20_us <= row.us <= row.p80_us
        assert min(row.gb_per_s, row.percent_of_copy, row.times_baseline) > 0
        assert row.others_cores >= 0
    for provider in timed:
        row, bound = rows[provider.name], TINY.bound(provider.op)
        assert (row.op, row.note, row.read_bytes, row.write_bytes) == (
            provider.op, provider.note, bound.read_bytes, bound.write_bytes,
        )  # fmt: skip
    bound = TINY.bound("grid_pool")
    assert (rows["copy"].read_bytes, rows["copy"].write_bytes) == (bound.read_bytes, bound.write_bytes)


def test_a_copy_moves_as_many_bytes() -> None:
    targets = [call() for call in copies(4096, 3, "cpu")]
    assert [2 * target.nbytes for target in targets] == [4096] * 3
    assert len({target.data_ptr() for target in targets}) == 3
    assert all(target.std() > 0 for target in targets)  # not the ones that were there before


def test_overhead_is_taken_of_one_workload(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "overhead_us", lambda device, call: 12.5)
    one_frame = WORKLOADS["1x9x9x384"]
    assert rows_on(cpu, one_frame, chosen(one_frame, "cpu", ["avg_pool2d"]))["avg_pool2d"].overhead_us == 12.5
    assert rows_on(cpu, SMALL, chosen(SMALL, "cpu", ["avg_pool2d"]))["avg_pool2d"].overhead_us is None


# ---- providers that are not timed ----


def returns_nan(x: Tensor) -> Tensor:
    return stgp.grid_pool(x) * float("nan")


def misses_a_value(x: Tensor) -> Tensor:
    result = stgp.grid_pool(x)
    result[-1, -1, -1, -1] += 1
    return result


@pytest.mark.parametrize("call", [stgp.norm_pool, returns_nan, misses_a_value, stgp.temporal_grid])
def test_wrong_results_are_not_timed(cpu: Cpu, call: Callable[..., Tensor]) -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return call(x)

    effort = SampleBudget(most=50, least=50)
    rows = rows_on(cpu, SMALL, [pooling("bad", counted), pooling("good")], baseline="bad", effort=effort)
    assert rows["bad"].check.startswith("wrong: ")
    assert_no_times(rows["bad"])
    assert calls < 50
    assert (rows["good"].check, rows["good"].samples, rows["good"].times_baseline) == ("ok", 50, None)


def test_output_that_is_not_written_is_wrong(cpu: Cpu) -> None:
    def writes_nothing(x: Tensor, out: Tensor | None = None) -> Tensor:
        return stgp.grid_pool(x) if out is None else out

    rows = rows_on(cpu, SMALL, [pooling("bad", writes_nothing, takes_out=True)])
    assert rows["bad:out"].check.startswith("wrong: off by nan")
    assert rows["bad"].check == "ok"


def test_results_that_go_wrong_while_timed_are_not_reported(cpu: Cpu) -> None:
    calls = 0

    def breaks(x: Tensor, out: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += out is not None
        pooled = stgp.grid_pool(x) if calls < 30 else torch.zeros_like(stgp.grid_pool(x))
        return pooled if out is None else out.copy_(pooled)

    rows = rows_on(cpu, SMALL, [pooling("bad", breaks, takes_out=True)], effort=SampleBudget(60, 60), baseline="copy")
    assert calls > 60
    assert rows["bad:out"].check.startswith("wrong: off by")
    assert_no_times(rows["bad:out"])


def test_a_part_is_timed_and_the_whole_is_checked(cpu: Cpu) -> None:
    """A push is a part of a stream, for example. Samples are whole periods."""
    part = pooling("part", lambda x: x, checked=stgp.grid_pool, period=3, state_bytes=lambda: 7)
    rows = rows_on(cpu, SMALL, [part, replace(part, name="wrong", checked=returns_nan)])
    assert (rows["part"].check, rows["part"].samples, rows["part"].state_bytes) == ("ok", 6, 7)
    assert rows["wrong"].check.startswith("wrong: ")


def test_a_failure_does_not_stop_the_others(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that has made the device useless does."""

    def fails(x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel\nfor this")

    def finish() -> None:
        raise RuntimeError("the device does not answer")

    rows = rows_on(cpu, SMALL, [pooling("bad", fails), pooling("good")])
    assert rows["bad"].check == "failed: NotImplementedError: no kernel"
    assert_no_times(rows["bad"])
    assert rows["good"].check == "ok"
    monkeypatch.setattr(cpu, "finish", finish)
    with pytest.raises(RuntimeError, match="does not answer"):
        rows_on(cpu, SMALL, [pooling("bad", fails)])


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


def test_rows_are_reported_as_they_are_found(cpu: Cpu) -> None:
    """A row is reported before the first call, which may end the process, after the check, and after the times."""
    found: list[BenchRow] = []

    def call(x: Tensor) -> Tensor:
        assert [(row.provider, row.check) for row in found[:1]] == [("good", LOST)]
        return stgp.grid_pool(x)

    timed = [pooling("good", call), pooling("bad", returns_nan)]
    rows_on(cpu, SMALL, timed, report=lambda row: found.append(replace(row)))
    of = {name: [(row.check.split(":")[0], row.is_timed) for row in found if row.provider == name] for name in
          ("good", "bad")}  # fmt: skip
    assert of["good"][:2] == [("failed", False), ("ok", False)]
    assert of["good"][-1] == ("ok", True)
    assert of["bad"] == [("failed", False), ("wrong", False), ("wrong", False)]


# ---- turns ----


def test_slow_calls_have_fewer_turns() -> None:
    assert [SampleBudget(25, 5, 8).samples(us) for us in (0, 320_000, 400_000, 1e6, 1e9)] == [25, 25, 20, 8, 5]
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


@pytest.mark.needs("compiler")
def test_probes_move_what_they_say(cpu: Cpu) -> None:
    """They take windows that the edge cuts, but no parts of cache lines. Other windows have the read probe alone."""
    assert cpu.probe is not None
    x = random_tokens((2, 5, 6, 32), torch.bfloat16, "cpu", 0)
    found = {name: (moved.read_bytes, moved.write_bytes) for name, (_, moved) in cpu.limits(x, (3, 3)).items()}
    assert found == {"read": (2 * 30 * 64, 0), "ceiling": (2 * 30 * 64, 2 * 9 * 64)}
    assert set(cpu.limits(x, (2, 2))) == {"read"}
    assert cpu.limits(x[..., :24].contiguous(), (2, 3)) == {}
    cpu.probe = None
    assert cpu.limits(x, (3, 3)) == {}


def test_a_sample_is_one_call_and_its_result_is_freed_later(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        def __del__(self) -> None:
            now[0] += 100.0

    def call() -> Result:
        now[0] += 0.25
        return Result()

    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    sample, calls = cpu.sampler([call])
    assert (sample(), calls) == (250_000, 1)
    assert now[0] == 100.25


def test_memory_of_a_call(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1 << 20)

    def call() -> Tensor:
        large = torch.ones(32 << 20, dtype=torch.uint8)
        return x + large[:1]  # 4 MB of its own

    call()  # pages of code that a first call touches would count
    found, result = cpu.extra_peak_bytes(call, 4 << 20)
    assert torch.equal(result, x + 1)
    if found is not None:
        assert abs(found - (32 << 20)) < 2 << 20
        assert cpu.extra_peak_bytes(lambda: x, 0)[0] < 2 << 20

    def unknown(field: str) -> int:
        raise OSError("no such field")

    monkeypatch.setattr(devices, "_status_bytes", unknown)
    assert cpu.extra_peak_bytes(lambda: x, 0) == (None, x)


def test_cores_that_others_used(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(100.0, 10.0, 500.0), (104.0, 16.0, 508.0), (0.0, 0.0, 0.0), (2.0, 3.0, 2.0)])
    wall, own, busy = machine.cpu_seconds()
    assert min(wall, own) > 0
    assert busy == 0 or busy > own
    monkeypatch.setattr(devices, "cpu_seconds", lambda: next(clocks))
    assert cpu.others_cores()() == 0.5
    assert cpu.others_cores()() == 0  # not negative where a core is counted twice


# ---- a GPU, without one ----


class StandIn(Gpu):
    """A CPU for a GPU; each sampler takes the next of `times_us` per call."""

    torch_device = "cpu"
    l2_bytes = 3_000

    def __init__(self, *times_us: float) -> None:
        self.times_us = iter(times_us)

    def sampler(self, calls: Sequence[Call], captures: bool = True) -> tuple[Sampler, int]:
        time_us = next(self.times_us)

        def sample() -> float:
            for call in calls:
                call()
            return time_us

        return sample, len(calls)

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int, Tensor]:
        result = call()
        return 4 * result.numel() + result_bytes, result

    def launches(self, call: Call) -> int | None:
        return 4

    def free_bytes(self) -> int | None:
        return None

    def finish(self) -> None: ...


def test_rows_of_a_gpu() -> None:
    """Inputs differ, and exceed the cache together with results."""
    device = StandIn(2.0, 4.0, 3.0)
    rows = rows_on(device, SMALL, [pooling("grid_pool:triton", takes_out=True), pooling("plain")])
    assert {name: row.check for name, row in rows.items()} == dict.fromkeys(["copy", "grid_pool:triton", "plain"], "ok")
    assert [row.percent_of_copy for row in rows.values()] == pytest.approx([100, 50, 200 / 3], rel=1e-3)
    row, bound = rows["grid_pool:triton"], SMALL.bound("grid_pool")
    assert row.p20_us == row.p50_us == row.p80_us == 4.0
    assert row.gb_per_s == pytest.approx(bound.total_bytes / 4e3, abs=1e-3)
    written = 9 * 2 * 2 * 8
    assert (row.extra_peak_bytes, rows["plain"].extra_peak_bytes) == (4 * written, 4 * written + 2 * written)
    assert (row.launches, row.others_cores, row.percent_of_ceiling) == (4, None, None)
    xs = device.inputs(SMALL)
    assert len(xs) == row.rotating_sets == row.calls_per_sample
    assert len(xs) * (SMALL.input_bytes + bound.write_bytes) >= 5 * device.l2_bytes
    assert not any(torch.equal(xs[0], x) for x in xs[1:])
    device.l2_bytes = 0
    assert len(device.inputs(SMALL)) == 2


class FakeCuda:
    """Events and graphs of torch.cuda, by which all that is timed takes 3 ms. log: replays, and for each event how many
    calls were made before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, returns_us: float) -> None:
        self.called, self.streams = 0, []
        self.log: list[str | int] = []
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append(fake.called)

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return 3.0

        @contextmanager
        def graph(captured: Graph) -> Iterator[None]:
            yield

        for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": graph, "current_stream": lambda: "before",
                            "set_stream": self.streams.append}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Gpu, "returns_us", lambda self, calls: returns_us)
        self.gpu = object.__new__(Gpu)

    def call(self) -> None:
        self.called += 1


@pytest.mark.parametrize(("us", "inputs", "repeats"), [(100.0, 4, 5), (90.0, 4, 6), (5000.0, 3, 1), (1.0, 2, 8)])
def test_a_sample_of_a_gpu_takes_about_2_ms(
    monkeypatch: pytest.MonkeyPatch, us: float, inputs: int, repeats: int
) -> None:
    """An untimed replay keeps the device busy until the timed one has arrived."""
    fake = FakeCuda(monkeypatch, us)
    sample, calls = fake.gpu.sampler([fake.call] * inputs)
    assert (calls, fake.called, fake.log) == (inputs * repeats, inputs * repeats, [])
    assert sample() == pytest.approx(3000 / calls)
    assert fake.log == ["replay", calls, "replay", calls]


def test_calls_that_no_graph_can_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are timed from Python where that is known; else the stream is left as it was."""
    fake = FakeCuda(monkeypatch, 100.0)
    sample, calls = fake.gpu.sampler([fake.call] * 4, captures=False)
    assert (calls, fake.called) == (20, 0)
    assert sample() == pytest.approx(3000 / calls)
    assert fake.log == [20, 40]
    with pytest.raises(ZeroDivisionError):
        fake.gpu.sampler([lambda: 1 // 0])
    assert fake.streams == ["before"]


def test_devices_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device cuda:2: 2 CUDA devices can be used"):
        open_device("cuda:2")
    with pytest.raises(ValueError, match="--threads is for the CPU"):
        open_device("cuda", threads=2)
