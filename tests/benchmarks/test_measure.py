"""How calls are measured: who is not timed and why, whose turn it is, and the devices that time. Times are made up, or
only compared with one another where they have to be consistent."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stgridpool_kernels as stgp
from benchmarks import devices
from benchmarks.devices import Call, Cpu, Gpu, Sampler, pin_threads
from benchmarks.measure import LOST, Effort, copies, measure, needed_bytes, new_run, take_turns
from benchmarks.providers import Provider, chosen, providers
from benchmarks.results import Row
from benchmarks.workloads import WORKLOADS, Workload, random_tokens
from stgridpool_kernels.backends import compiled

TINY = Workload("tiny", (64,), (5, 5), 96)
SMALL = Workload("small", (9,), (5, 5), 8)
TWO = Effort(most=2, least=2)

pytestmark = pytest.mark.usefixtures("caches")
needs_library = pytest.mark.skipif(compiled.LIBRARY is None, reason="the compiled library was not built")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take_turns, "__defaults__", (lambda share: None, 0.0))
    monkeypatch.setattr(devices._median_us, "__defaults__", (lambda: None, 5, 0.01))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cpu]:
    """One thread, which may be on any core; caches are not emptied."""
    monkeypatch.setattr(devices, "pin_threads", lambda count: [])
    device = Cpu(1)
    device._evictor = device._evictor[:16]
    yield device
    device.close()


def rows_on(device: Any, workload: Workload, timed: Sequence[Provider], **given: Any) -> dict[str, Row]:
    rows = measure(workload, timed, device, "some run", **{"baseline": "llava_avg_pool", "effort": TWO, **given})
    found = {row.provider: row for row in rows}
    assert len(found) == len(rows)
    return found


def pooling(name: str, call: Callable[..., Tensor] = stgp.grid_pool, **given: Any) -> Provider:
    """A provider that is held to grid_pool."""
    return Provider(name, "grid_pool", call, partial(stgp.grid_pool, backend="reference"), 2, **given)


TIMES = ("min_us", "p20_us", "p50_us", "p80_us", "samples", "cold_us", "overhead_us", "overhead_cold_us", "gb_per_s",
         "percent_of_copy", "percent_of_ceiling", "times_baseline")  # fmt: skip


def assert_no_times(row: Row) -> None:
    assert {name: getattr(row, name) for name in TIMES} == dict.fromkeys(TIMES)


# ---- rows ----


@needs_library
def test_rows_are_complete(cpu: Cpu) -> None:
    told: list[tuple[str, float]] = []
    timed = providers(TINY, "cpu")
    rows = rows_on(cpu, TINY, timed, progress=lambda text, share: told.append((text, share)))
    names = [name for p in timed for name in ([f"{p.name}:out"] if p.takes_out else []) + [p.name]]
    probes = [] if cpu.probe is None else ["read", "ceiling"]
    assert list(rows) == ["copy", *probes, *names]
    assert {name: row.check for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    rate = {name: (row.read_bytes + row.write_bytes) / row.p50_us / 1e3 for name, row in rows.items()}
    for name, row in rows.items():
        assert (row.run, row.workload, row.dtype, row.shape) == ("some run", "tiny", "bfloat16", (64, 5, 5, 96))
        assert (row.groups, row.input_bytes) == (("main",), TINY.input_bytes)
        assert (row.samples, row.calls_per_sample, row.rotating_sets) == (2, 1, 1)
        assert 0 < row.min_us <= row.p20_us <= row.p50_us <= row.p80_us, name
        assert row.gb_per_s == pytest.approx(rate[name], abs=1e-3)
        assert row.percent_of_copy == pytest.approx(100 * rate[name] / rate["copy"], rel=1e-3, abs=0.01)
        assert row.times_baseline == pytest.approx(rows["llava_avg_pool"].p50_us / row.p50_us, abs=1e-3)
        assert row.baseline == "llava_avg_pool"
        assert row.others_cores >= 0
    for provider in timed:
        bound = TINY.bound(provider.op)
        for name in [f"{provider.name}:out"] * provider.takes_out + [provider.name]:
            row = rows[name]
            assert (row.op, row.flops, row.note) == (provider.op, provider.flops(TINY), provider.note)
            assert (row.read_bytes, row.write_bytes) == (bound.read_bytes, bound.write_bytes)
            assert min(row.launches, row.overhead_us, row.overhead_cold_us) > 0
    assert {rows[name].flops for name in ("copy", *probes)} == {None}
    assert rate["copy"] * rows["copy"].p50_us * 1e3 == pytest.approx(TINY.bound("grid_pool").total_bytes)
    if probes:
        token = 96 * 2
        assert (rows["read"].read_bytes, rows["read"].write_bytes) == (64 * 25 * token, 0)
        assert (rows["ceiling"].read_bytes, rows["ceiling"].write_bytes) == (64 * 16 * token, 64 * 4 * token)
        for name, row in rows.items():
            assert row.percent_of_ceiling == pytest.approx(100 * rate[name] / rate["ceiling"], rel=1e-3, abs=0.01)
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert {text.partition(":")[0] for text, _ in told if text.endswith("check")} == {
        p.name.partition(":")[0] for p in timed
    }


def test_a_copy_moves_as_many_bytes() -> None:
    calls = copies(4096, 3, "cpu")
    targets = [call() for call in calls]
    assert [2 * target.nbytes for target in targets] == [4096] * 3
    assert len({target.data_ptr() for target in targets}) == 3
    assert all(target.std() > 0 for target in targets)  # not the ones that were there before


def test_baseline_is_chosen(cpu: Cpu) -> None:
    rows = rows_on(cpu, SMALL, chosen(SMALL, "cpu", ["avg_pool2d", "max_pool2d"]), baseline="max_pool2d")
    assert (rows["max_pool2d"].times_baseline, rows["max_pool2d"].baseline) == (1, "max_pool2d")
    rows = rows_on(cpu, SMALL, chosen(SMALL, "cpu", ["avg_pool2d"]), baseline="max_pool2d")
    assert rows["avg_pool2d"].p50_us is not None
    assert rows["avg_pool2d"].times_baseline is None


@pytest.mark.parametrize(
    "workload",
    [
        replace(SMALL, frame_counts=(4, 4), batch=2),
        replace(SMALL, frame_counts=(9, 8, 16)),
        replace(SMALL, output_size=(12, 12), grid=(15, 15)),
        replace(SMALL, kernel_size=3, ceil_mode=True),
    ],
    ids=["batch", "packed", "output size", "window 3"],
)
def test_settings_of_all_kinds(cpu: Cpu, workload: Workload) -> None:
    """Also for the small call, on one frame of another size."""
    rows = rows_on(cpu, workload, providers(workload, "cpu"))
    assert {name: row.check for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert all((row.overhead_us is None) == (row.op == "") for row in rows.values())
    assert {tuple(row.settings) for row in rows.values()} == {tuple(workload.settings | workload.packing)}


def test_input_is_left_as_it_was(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, Tensor]] = []
    inputs = cpu.inputs

    def kept(workload: Workload) -> list[Tensor]:
        xs = inputs(workload)
        given.extend((x, x.clone()) for x in xs)
        return xs

    monkeypatch.setattr(cpu, "inputs", kept)
    rows_on(cpu, SMALL, providers(SMALL, "cpu"))
    assert all(torch.equal(x, before) for x, before in given)
    assert len(given) == 1


# ---- who is not timed ----


def returns_nan(x: Tensor) -> Tensor:
    return stgp.grid_pool(x) * float("nan")


def misses_a_value(x: Tensor) -> Tensor:
    result = stgp.grid_pool(x)
    result[-1, -1, -1, -1] += 1
    return result


def returns_float(x: Tensor) -> Tensor:
    return stgp.grid_pool(x).float()


@pytest.mark.parametrize(
    "call",
    [stgp.norm_pool, returns_nan, misses_a_value, returns_float, stgp.temporal_grid],
    ids=lambda call: call.__name__,
)
def test_wrong_results_are_not_timed(cpu: Cpu, call: Callable[..., Tensor]) -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return call(x)

    effort = Effort(most=50, least=50)
    rows = rows_on(cpu, SMALL, [pooling("bad", counted), pooling("good")], baseline="bad", effort=effort)
    assert rows["bad"].check.startswith("wrong: ")
    assert_no_times(rows["bad"])
    assert calls < 50
    assert rows["good"].check == "ok"
    assert (rows["good"].samples, rows["good"].times_baseline) == (50, None)


@pytest.mark.parametrize("written", [0, 1], ids=["never", "once"])
def test_output_that_is_not_written_is_wrong(cpu: Cpu, written: int) -> None:
    """By every call."""
    left = written

    def writes_little(x: Tensor, out: Tensor | None = None) -> Tensor:
        nonlocal left
        if out is None:
            return stgp.grid_pool(x)
        left -= 1
        return out if left < 0 else out.copy_(stgp.grid_pool(x))

    rows = rows_on(cpu, SMALL, [pooling("bad", writes_little, takes_out=True)])
    assert rows["bad:out"].check.startswith("wrong: off by nan")
    assert rows["bad"].check == "ok"


def test_results_that_go_wrong_while_timed_are_not_reported(cpu: Cpu) -> None:
    calls = 0

    def breaks(x: Tensor, out: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += out is not None
        pooled = stgp.grid_pool(x) if calls < 30 else torch.zeros_like(stgp.grid_pool(x))
        return pooled if out is None else out.copy_(pooled)

    rows = rows_on(
        cpu, SMALL, [pooling("bad", breaks, takes_out=True)], effort=Effort(most=60, least=60), baseline="copy"
    )
    assert calls > 60
    assert rows["bad:out"].check.startswith("wrong: off by")
    assert_no_times(rows["bad:out"])


def test_who_fails_does_not_stop_the_others(cpu: Cpu) -> None:
    def fails(x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel\nfor this")

    rows = rows_on(cpu, SMALL, [pooling("bad", fails), pooling("good")])
    assert rows["bad"].check == "failed: NotImplementedError: no kernel"
    assert_no_times(rows["bad"])
    assert rows["good"].check == "ok"


def test_a_device_that_is_broken_stops_them(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish() -> None:
        raise RuntimeError("the device does not answer")

    monkeypatch.setattr(cpu, "finish", finish)
    with pytest.raises(RuntimeError, match="does not answer"):
        rows_on(cpu, SMALL, [pooling("bad", returns_nan)])


def test_too_little_memory_for_the_tokens(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = needed_bytes(TINY, cpu)
    assert needed > TINY.input_bytes + 2 * TINY.bound("grid_pool").write_bytes
    monkeypatch.setattr(cpu, "inputs", lambda workload: pytest.fail("tokens were made"))
    monkeypatch.setattr(cpu, "free_bytes", lambda: needed - 1)
    rows = rows_on(cpu, TINY, providers(TINY, "cpu"))
    assert set(rows) == {provider.name for provider in providers(TINY, "cpu")}
    for row in rows.values():
        assert re.fullmatch(r"skipped: takes [\d.]+ GB, [\d.]+ GB are free", row.check)
        assert_no_times(row)


@pytest.mark.parametrize("free", [None, 10**9])
def test_enough_memory(cpu: Cpu, monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(cpu, "free_bytes", lambda: free)
    assert rows_on(cpu, SMALL, [pooling("good")])["good"].check == "ok"


def test_too_little_memory_for_one(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2 * needed_bytes(SMALL, cpu)
    monkeypatch.setattr(cpu, "free_bytes", lambda: free)

    def never(x: Tensor) -> Tensor:
        pytest.fail("it was called")

    many = pooling("many", never, memory=free / SMALL.input_bytes)
    rows = rows_on(cpu, SMALL, [many, pooling("few")])
    assert re.fullmatch(r"skipped: takes some [\d.]+ GB besides its input, [\d.]+ GB are free", rows["many"].check)
    assert rows["few"].check == "ok"


# ---- turns ----


def test_effort() -> None:
    effort = Effort(most=25, least=5, seconds=8)
    assert [effort.samples(us) for us in (0, 1, 320_000, 400_000, 1e6, 1e9)] == [25, 25, 25, 20, 8, 5]


def test_slow_calls_have_fewer_turns() -> None:
    order: list[str] = []
    shares: list[float] = []

    def sampler(name: str, time_us: float) -> Sampler:
        return lambda: (order.append(name), time_us)[1]

    samplers = {"copy": sampler("copy", 1.0), "fast": sampler("fast", 2.0), "slow": sampler("slow", 1e5)}
    calls = {"copy": 1, "fast": 4, "slow": 10}  # a sample of the slow one takes a second
    times = take_turns(samplers, calls, Effort(most=8, least=1, seconds=4), shares.append)
    assert times == {"copy": [1.0] * 8, "fast": [2.0] * 8, "slow": [1e5] * 4}
    assert order[:3] == ["copy", "fast", "slow"]  # for how long they take
    assert order[3:] == ["copy", "fast", "copy", "fast", "slow"] * 4
    assert shares == [turn / 8 for turn in range(1, 9)]


# ---- a CPU ----


def test_probes_move_what_they_say(cpu: Cpu) -> None:
    """With windows that the edge cuts; not where tokens are parts of cache lines; reading alone where the windows are
    not 2 × 2."""
    if cpu.probe is None:
        pytest.skip(str(cpu.why_no_probe))
    x = random_tokens((2, 5, 6, 32), torch.bfloat16, "cpu", 0)
    found = cpu.limits(x, (3, 3, 32))
    assert {name: (moved.read_bytes, moved.write_bytes) for name, (_, moved) in found.items()} == {
        "read": (2 * 30 * 64, 0),
        "ceiling": (2 * 30 * 64, 2 * 9 * 64),
    }
    (call,) = found["ceiling"][0]
    call()
    assert set(cpu.limits(x, (2, 2, 32))) == {"read"}  # windows of 3 × 3, or an output size
    assert cpu.limits(x[..., :24].contiguous(), (2, 3, 24)) == {}
    cpu.probe = None
    assert cpu.limits(x, (3, 3, 32)) == {}


def test_no_compiler_is_no_ceiling(monkeypatch: pytest.MonkeyPatch, cpu: Cpu) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    device = Cpu()
    device.close()
    assert device.probe is None
    assert "no-such-compiler" in str(device.why_no_probe)
    rows = rows_on(device, replace(SMALL, channels=32), [pooling("good")])
    assert (rows["good"].check, rows["good"].percent_of_ceiling) == ("ok", None)
    assert set(rows) == {"copy", "good"}


def test_a_sample_is_one_call_and_what_it_returns_is_freed_after_it(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        def __del__(self) -> None:
            now[0] += 100.0

    now = [0.0]

    def call() -> Result:
        now[0] += 0.25
        return Result()

    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    sample, calls = cpu.sampler([call])
    assert (sample(), calls) == (250_000, 1)
    assert now[0] == 100.25


def test_memory_of_a_call(cpu: Cpu) -> None:
    x = torch.ones(1 << 20)

    def call() -> Tensor:
        large = torch.ones(32 << 20, dtype=torch.uint8)
        return x + large[:1]  # 4 MB of its own

    call()  # pages of code that a first call touches would count; providers have been called on a small video by then
    found, result = cpu.extra_peak_bytes(call, 4 << 20)
    assert torch.equal(result, x + 1)
    if found is None:
        pytest.skip("the system does not say how much memory was in use at most")
    assert abs(found - (32 << 20)) < 2 << 20
    assert cpu.extra_peak_bytes(lambda: x, 0)[0] < 2 << 20
    assert cpu.extra_peak_bytes(lambda: x, 1 << 30)[0] == 0


def test_a_system_that_does_not_tell_the_memory(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(field: str) -> int:
        raise OSError("no such field")

    monkeypatch.setattr(devices, "_status_bytes", unknown)
    x = torch.ones(4)
    assert cpu.extra_peak_bytes(lambda: x, 0) == (None, x)
    row = rows_on(cpu, SMALL, [pooling("good")])["good"]
    assert (row.check, row.extra_peak_bytes) == ("ok", None)


def test_operators_are_counted(cpu: Cpu) -> None:
    x = torch.ones(4, 4)
    assert cpu.launches(lambda: (x + 1).mul_(2)) == 2
    assert cpu.launches(lambda: x) == 0
    if compiled.LIBRARY is not None:
        tokens = torch.ones(9, 4, 4, 8)
        assert cpu.launches(partial(stgp.grid_pool, tokens, backend="cpu")) == 1


def test_who_used_the_cores(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(100.0, 10.0, 500.0), (104.0, 16.0, 508.0), (0.0, 0.0, 0.0), (2.0, 3.0, 2.0)])
    monkeypatch.setattr(devices, "cpu_seconds", lambda: next(clocks))
    assert cpu.others_cores()() == 0.5
    assert cpu.others_cores()() == 0  # whoever is counted twice is not others


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system has no /proc")
def test_the_system_tells_who_used_the_cores() -> None:
    wall, own, busy = devices.cpu_seconds()
    assert busy > own > 0
    assert wall > 0


def test_operations_per_second(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0])  # at best 2 s
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    torch.set_float32_matmul_precision("medium")
    try:
        assert devices._matmul_gflops(100, "cpu", lambda: None) == round(2 * 100**3 / 2 / 1e9, 1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")


@needs_affinity
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_pinned_and_let_go(threads: int) -> None:
    before, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    if len(allowed) < threads:
        pytest.skip("there are fewer cores")
    device = Cpu(threads)
    try:
        assert torch.get_num_threads() == device.threads == threads
        assert len(device.pinned) == len(set(device.pinned)) == threads or threads > 1  # which may not be found
        assert set(device.pinned) <= allowed
        own = {device.pinned[0]} if device.pinned else allowed
        assert os.sched_getaffinity(0) == own
        found: list[set[int]] = []
        release = threading.Event()
        started = threading.Event()

        def later() -> None:  # is pinned as the thread that starts it
            found.append(os.sched_getaffinity(0))
            started.set()
            release.wait()
            found.append(os.sched_getaffinity(0))

        thread = threading.Thread(target=later)
        thread.start()
        started.wait()
    finally:
        device.close()
        release.set()
        thread.join()
    assert found == [own, allowed]
    assert os.sched_getaffinity(0) == allowed
    assert torch.get_num_threads() == before


@needs_affinity
def test_threads_that_are_not_found_are_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr(devices, "_threads", list)
    monkeypatch.setattr(devices, "_one_of_each_core", lambda cores: [*cores, *cores])
    assert pin_threads(2) == []
    assert os.sched_getaffinity(0) == allowed


@needs_affinity
def test_cores_of_their_own_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 7: "7"}
    read = Path.read_text

    def read_text(path: Path, *arguments: Any, **given: Any) -> str:
        cpu = re.fullmatch(r"/sys/devices/system/cpu/cpu(\d+)/topology/thread_siblings_list", str(path))
        return f"{siblings[int(cpu[1])]}\n" if cpu else read(path, *arguments, **given)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert devices._one_of_each_core([0, 1, 4, 5, 7]) == [0, 1, 7, 4, 5]


@needs_affinity
def test_more_threads_than_cores_are_not_pinned() -> None:
    allowed = os.sched_getaffinity(0)
    assert pin_threads(len(allowed) + 1) == []
    assert os.sched_getaffinity(0) == allowed


def test_no_threads() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        Cpu(0)


def test_runs_have_names_of_their_own() -> None:
    runs = [new_run({"device": {}, "versions": {}, "source": {}}, {}, {}) for _ in range(3)]
    assert len({run.run for run in runs}) == 3
    for run in runs:
        assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{4}", run.run)
        assert run.utc.replace("-", "").replace(":", "").startswith(run.run[:15])


# ---- a GPU, as far as there is none ----


class StandIn(Gpu):
    """A CPU for a GPU; each sampler takes the next of `times_us` per call."""

    torch_device = "cpu"
    l2_bytes = 3_000

    def __init__(self, *times_us: float) -> None:
        self.times_us = iter(times_us)
        self.captured: list[int] = []

    def sampler(self, calls: Sequence[Call], captures: bool = True) -> tuple[Sampler, int]:
        time_us = next(self.times_us)
        self.captured.append(len(calls))

        def sample() -> float:
            for call in calls:
                call()
            return time_us

        return sample, len(calls)

    def cold_us(self, calls: Sequence[Call]) -> float:
        return 500.0

    def returns_us(self, call: Call) -> float:
        call()
        return 30.0

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int, Tensor]:
        result = call()
        return 4 * result.numel() + result_bytes, result

    def launches(self, call: Call) -> int | None:
        return 4

    def free_bytes(self) -> int | None:
        return None

    def finish(self) -> None: ...


def test_rows_of_a_gpu() -> None:
    device = StandIn(2.0, 4.0, 3.0)
    rows = rows_on(device, SMALL, [pooling("grid_pool:reference", takes_out=True), pooling("plain")])
    assert {name: row.check for name, row in rows.items()} == dict.fromkeys(
        ["copy", "grid_pool:reference", "plain"], "ok"
    )
    assert [row.percent_of_copy for row in rows.values()] == pytest.approx([100, 50, 200 / 3], rel=1e-3)
    row, total = rows["grid_pool:reference"], SMALL.bound("grid_pool").total_bytes
    assert row.p20_us == row.p50_us == row.p80_us == 4.0
    assert row.gb_per_s == pytest.approx(total / 4e3, abs=1e-3)
    written = 9 * 2 * 2 * 8
    assert (row.samples, row.cold_us, row.launches, row.overhead_us) == (2, 500.0, 4, 30.0)
    assert (row.extra_peak_bytes, rows["plain"].extra_peak_bytes) == (4 * written, 4 * written + 2 * written)
    assert (row.others_cores, row.percent_of_ceiling, row.overhead_cold_us) == (None, None, None)


def test_rows_are_reported_as_they_are_found() -> None:
    """Before the first call, since it may end the process; when the result was checked; and when it was timed."""
    found: list[Row] = []

    def call(x: Tensor) -> Tensor:
        assert [(row.provider, row.check) for row in found[:1]] == [("good", LOST)]
        return stgp.grid_pool(x)

    providers = [pooling("good", call), pooling("bad", lambda x: x)]
    rows = rows_on(StandIn(2.0, 4.0), SMALL, providers, report=lambda row: found.append(replace(row)), extras=False)
    assert [(row.provider, row.check == LOST, row.check == "ok", row.p50_us) for row in found] == [
        ("good", True, False, None),
        ("good", False, True, None),
        ("bad", True, False, None),
        ("bad", False, False, None),
        ("copy", False, True, 2.0),
        ("good", False, True, 4.0),
        ("bad", False, False, None),
    ]
    assert rows["bad"].check.startswith("wrong: ")
    assert (rows["good"].launches, rows["good"].overhead_us) == (None, None)


def test_inputs_of_a_gpu_exceed_the_cache_and_differ() -> None:
    device = StandIn(2.0, 4.0)
    row = rows_on(device, SMALL, [pooling("plain")])["plain"]
    assert row.rotating_sets * (SMALL.input_bytes + SMALL.bound("grid_pool").write_bytes) >= 5 * device.l2_bytes
    assert device.captured == [row.rotating_sets] * 2
    assert row.calls_per_sample == row.rotating_sets
    xs = device.inputs(SMALL)
    assert len(xs) == row.rotating_sets
    assert not any(torch.equal(xs[0], x) for x in xs[1:])
    device.l2_bytes = 0
    assert len(device.inputs(SMALL)) == 2


def test_results_of_a_gpu_that_go_wrong_are_not_reported() -> None:
    calls = 0

    def breaks(x: Tensor, out: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        pooled = stgp.grid_pool(x) if calls < 40 else torch.zeros_like(stgp.grid_pool(x))
        return pooled if out is None else out.copy_(pooled)

    effort = Effort(most=20, least=20)
    row = rows_on(StandIn(2.0, 4.0), SMALL, [pooling("bad", breaks, takes_out=True)], effort=effort)["bad"]
    assert row.check.startswith("wrong: ")
    assert_no_times(row)


class FakeCuda:
    """torch.cuda, as far as graphs are concerned: what is timed takes 3 ms. log: replays and events in their order, the
    latter by how many calls were made before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cold_us: float) -> None:
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
        monkeypatch.setattr(Gpu, "cold_us", lambda self, calls: cold_us)
        self.gpu = object.__new__(Gpu)

    def call(self) -> None:
        self.called += 1


@pytest.mark.parametrize(("cold_us", "inputs", "repeats"), [(100.0, 4, 5), (90.0, 4, 6), (5000.0, 3, 1), (1.0, 2, 8)])
def test_a_sample_of_a_gpu_takes_some_2_ms(
    monkeypatch: pytest.MonkeyPatch, cold_us: float, inputs: int, repeats: int
) -> None:
    fake = FakeCuda(monkeypatch, cold_us)
    sample, calls = fake.gpu.sampler([fake.call] * inputs)
    assert calls == fake.called == inputs * repeats
    assert fake.log == []
    assert sample() == pytest.approx(3000 / calls)
    # an untimed replay keeps the device busy until the timed one has arrived
    assert fake.log == ["replay", calls, "replay", calls]


def test_calls_that_no_graph_can_capture_are_timed_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, 100.0)
    sample, calls = fake.gpu.sampler([fake.call] * 4, captures=False)
    assert (calls, fake.called) == (20, 0)
    assert sample() == pytest.approx(3000 / calls)
    assert fake.log == [20, 40]
    of_cuda = {provider.name: provider.captures for provider in providers(WORKLOADS["llava-video-7b"], "cuda")}
    eager = {name for name, captures in of_cuda.items() if not captures}
    assert eager == {name for name in of_cuda if name.endswith(":reference")} != set()


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, 100.0)

    def fails() -> None:
        raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        fake.gpu.sampler([fails])
    assert fake.streams == ["before"]


def test_a_gpu_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device cuda: 0 CUDA devices can be used"):
        Gpu("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device cuda:2: 2 CUDA devices can be used"):
        Gpu("cuda:2")


def test_median() -> None:
    finished = []
    assert devices._median_us(lambda: None, lambda: finished.append(1), samples=7, limit_s=math.inf) >= 0
    assert len(finished) == 7
    finished.clear()
    devices._median_us(lambda: None, lambda: finished.append(1), samples=7, limit_s=0.0)
    assert len(finished) == 5
