"""Measurement of a workload: results are checked, then all providers and a plain copy are timed in turns.

Every provider is called on the same tokens. Providers with a wrong result are not timed. The others take turns in one
process, so that changes of clocks and other load affect all alike. The copy takes turns too; its bandwidth is the unit
of theirs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.devices import Call, Device, Sampler, overhead_us
from benchmarks.lower_bound import Traffic
from benchmarks.provider import SEGMENT, Pool, Provider, Refused, mismatch
from benchmarks.results import BenchRow, add_rates
from benchmarks.workloads import Workload

LOST = "failed: the process ended in it"
"""Check of a row that is reported before the first call of its provider, and stays if the process ends in the call."""
LATE = "skipped: its time was over"
"""Check of a row that was lost because the whole process was stopped, whatever its provider did."""


@dataclass(frozen=True)
class SampleBudget:
    """Rule for the number of samples of a call: as many as fit into `seconds`, between `least` and `most`."""

    most: int = 25
    least: int = 3
    seconds: float = 4.0

    def samples(self, sample_us: float) -> int:
        return max(self.least, min(self.most, int(self.seconds * 1e6 / max(sample_us, 1e-3))))


QUICK = SampleBudget(most=15, least=3, seconds=0.6)
WARM = SampleBudget(most=201, least=7, seconds=0.15)
"""Budget of a call on warm caches, by which the sweep of the group "plain" takes minutes on a small machine."""


def measure(
    workload: Workload,
    timed: Sequence[Provider],
    device: Device,
    run: str,
    *,
    baseline: str,
    effort: SampleBudget,
    report: Callable[[BenchRow], None] = lambda row: None,
    extras: bool = True,
) -> list[BenchRow]:
    """Measure a workload; return the rows of the copy, of the probes of a CPU, and of every provider of `timed`.

    On warm caches there are no rows of the copy and the probes, whose rates are those of memory.

    report: called with each row of a provider before its first call, when its result has been checked, and when it has
    been timed, so that a process that ends early loses only the current row. extras: whether to count launches, by a
    profiler.

    Raises the error that has made the device unusable, if there is one.
    """
    free, needed = device.free_bytes(), needed_bytes(workload, device)
    if free is not None and needed > free:
        reason = f"skipped: takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return [replace(provider_row(run, workload, provider), check=reason) for provider in timed]
    others = device.others_cores()
    xs = device.inputs(workload)
    rows, samplers = ({}, {}) if workload.warm else time_limits(workload, device, run, xs)
    contenders: dict[str, Contender] = {}
    expected = Expected(xs)
    for provider in timed:
        for name, into_out in variants(provider, device.separates_out):
            row = rows[name] = replace(provider_row(run, workload, provider), provider=name)
            with reporting(row, device, report):
                refuse_without_memory(provider, xs[0], device)
                contender = Contender(provider, expected, into_out)
                contender.prepare(device, row)
                if {"overhead", "empty"} & {*workload.groups}:
                    with torch.inference_mode(provider.inference):
                        row.overhead_us = overhead_us(device, contender.calls[0])
                samplers[name], row.calls_per_sample = device.sampler(contender.calls, provider.captures, workload.warm)
                if provider.inference:
                    samplers[name] = torch.inference_mode()(samplers[name])
                if device.type == "cuda":
                    samplers[name]()  # a replay that hangs or fails must do so while its row is reported
                contenders[name] = contender
    samplers = {name: sampler for name, sampler in samplers.items() if rows[name].check == "ok"}
    periods = {name: contender.provider.period for name, contender in contenders.items()}
    turns = {name: (rows[name].calls_per_sample or 1, periods.get(name, 1)) for name in samplers}
    times = take_turns(samplers, turns, effort)
    used = others()
    for name, samples_us in times.items():
        set_times(rows[name], samples_us, len(xs), used)
    for name, contender in contenders.items():
        with reporting(rows[name], device):
            contender.check_last()
    found = list(rows.values())
    add_rates(found, baseline)
    for row in found:
        report(row)
    for name, contender in contenders.items() if extras else ():  # last: after a profiler, captures may fail
        if rows[name].check == "ok":
            with suppress(RuntimeError):  # if the profiler fails, only the number of launches is missing
                rows[name].launches = device.launches(contender.calls[0])
    return found


# ---- before the times ----


def needed_bytes(workload: Workload, device: Device) -> int:
    """Return the bytes that a workload needs for inputs, expected and computed results, and both sides of the copy."""
    bound = workload.bound("grid_pool")
    sets = 1 if device.type == "cpu" else 2
    segment = workload.input_bytes // max(workload.frames // SEGMENT, 1)
    reference = 10 * segment * 4 // workload.dtype.itemsize  # in float32
    return sets * (workload.input_bytes + 2 * bound.write_bytes + bound.total_bytes) + 2 * bound.write_bytes + reference


def time_limits(
    workload: Workload, device: Device, run: str, xs: Sequence[Tensor]
) -> tuple[dict[str, BenchRow], dict[str, Sampler]]:
    """Return rows and samplers of a copy that moves as many bytes as grid_pool must, and of the device's probes."""
    bound = workload.bound("grid_pool")
    limits = {"copy": (copies(bound.total_bytes, len(xs), device.torch_device), bound)}
    limits |= device.limits(xs[0], workload.plan("norm_pool").pooled_size)
    rows, samplers = dict[str, BenchRow](), dict[str, Sampler]()
    for name, (calls, moved) in limits.items():
        for call in calls:
            call()
        rows[name] = replace(new_row(run, workload, name, moved), check="ok")
        samplers[name], rows[name].calls_per_sample = device.sampler(calls)
    return rows, samplers


def copies(total_bytes: int, sets: int, device: str) -> list[Call]:
    """Return `sets` plain copies, each of which reads and writes `total_bytes` in total."""
    sources = [torch.randn(total_bytes // 4, dtype=torch.bfloat16, device=device) for _ in range(sets)]
    return [partial(torch.ones_like(source).copy_, source) for source in sources]


def new_row(run: str, workload: Workload, name: str, moved: Traffic) -> BenchRow:
    return BenchRow(
        run=run,
        workload=workload.name,
        provider=name,
        op="",
        dtype=str(workload.dtype).removeprefix("torch."),
        shape=workload.shape,
        settings=workload.settings,
        groups=workload.groups,
        input_bytes=workload.input_bytes,
        read_bytes=moved.read_bytes,
        write_bytes=moved.write_bytes,
    )


def provider_row(run: str, workload: Workload, provider: Provider) -> BenchRow:
    row = new_row(run, workload, provider.name, provider.moved or workload.bound(provider.op))
    return replace(row, op=provider.op, settings=row.settings | provider.settings, note=provider.note)


def variants(provider: Provider, separates_out: bool) -> list[tuple[str, bool]]:
    """Return the names under which a provider is timed, each with whether `out` is given."""
    if not provider.takes_out:
        return [(provider.name, False)]
    if not separates_out:
        return [(provider.name, True)]
    return [(f"{provider.name}:out", True), (provider.name, False)]


class Expected:
    """Expected results of all inputs. Those of the last definition are cached for the next providers that share it."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.xs, self.results = xs, list[Tensor]()
        self.definition: Pool | None = None

    def __call__(self, provider: Provider) -> list[Tensor]:
        if provider.definition is not self.definition:
            self.definition, self.results = None, []
            self.definition, self.results = provider.definition, [provider.definition(x) for x in self.xs]
        return self.results


class Contender:
    """The calls of a provider on every input, and the results that must be kept.

    On a CPU a result is freed after its call, as in practice, unless `out` is given. In a CUDA graph it is kept.
    """

    def __init__(self, provider: Provider, expected: Expected, into_out: bool) -> None:
        self.provider, self.expected, self.into_out, self.xs = provider, expected, into_out, expected.xs
        self.keeps = into_out or self.xs[0].is_cuda
        self.results = [torch.full_like(each, math.nan) if into_out else torch.empty(0) for each in expected(provider)]
        self.calls: list[Call] = [partial(self.call, i) for i in range(len(self.xs))]

    def call(self, i: int) -> Tensor | None:
        result = self.fresh_call(i)
        if not self.keeps:
            return result
        self.results[i] = result
        return None

    def fresh_call(self, i: int) -> Tensor:
        if not self.into_out:
            return self.provider.call(self.xs[i])
        self.provider.call(self.xs[i], out=self.results[i])
        return self.results[i]

    def prepare(self, device: Device, row: BenchRow) -> None:
        """Check every result and measure the memory of a call. Raises Refused if a result is wrong."""
        if self.provider.compiles or device.type == "cuda":
            self.provider.call(self.xs[0])  # compiles, and initialises libraries
        result_bytes = 0 if self.into_out else self.expected(self.provider)[0].nbytes
        row.extra_peak_bytes, first = device.extra_peak_bytes(partial(self.fresh_call, 0), result_bytes)
        for i, expected in enumerate(self.expected(self.provider)):
            if self.provider.checked is not None:
                result = self.provider.checked(self.xs[i])
            else:
                result = first if i == 0 else self.fresh_call(i)
            self.refuse_wrong(result, expected)
        for call in self.calls if self.keeps else ():
            call()
        row.state_bytes = self.provider.state_bytes() if self.provider.state_bytes else None
        row.check = "ok"

    def check_last(self) -> None:
        """Raise Refused if a result of the last timed calls is wrong."""
        if self.keeps and self.provider.checked is None:
            for result, expected in zip(self.results, self.expected(self.provider), strict=True):
                self.refuse_wrong(result, expected)

    def refuse_wrong(self, result: Tensor, expected: Tensor) -> None:
        reason = mismatch(result, expected, self.provider.ulps)
        if reason is not None:
            raise Refused(f"wrong: {reason}")


def refuse_without_memory(provider: Provider, x: Tensor, device: Device) -> None:
    free, needed = device.free_bytes(), provider.memory * x.nbytes
    if free is not None and needed > 0.9 * free:
        raise Refused(f"skipped: takes some {needed / 1e9:.1f} GB besides its input, {free / 1e9:.1f} GB are free")


@contextmanager
def reporting(row: BenchRow, device: Device, report: Callable[[BenchRow], None] = lambda row: None) -> Iterator[None]:
    """Record an error of the block in the row, in place of times; raise only if it has made the device unusable.

    The row is reported before the block, with the check `LOST`, and after it.
    """
    report(replace(row, check=LOST))
    try:
        yield
    except Refused as error:
        row.check = str(error)
    except Exception as error:
        row.check = f"failed: {type(error).__name__}: {error}".strip().splitlines()[0][:300]
    if row.check != "ok":
        row.p20_us = row.p50_us = row.p80_us = row.overhead_us = row.samples = None
        gc.collect()
    report(row)
    if row.check != "ok":
        device.finish()


# ---- times ----


def take_turns(
    samplers: dict[str, Sampler],
    turns: dict[str, tuple[int, int]],
    effort: SampleBudget,
    warm_up_s: float = 0.3,
) -> dict[str, list[float]]:
    """Sample all samplers in turns, slow ones in fewer, evenly spread turns; return times in µs per call.

    turns: for each sampler, its number of calls per sample, and a number that the number of samples is a multiple of.
    """
    if not samplers:
        return {}
    first = next(iter(samplers.values()))
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_up_s:
        first()
    rounds = {}
    for name, sample in samplers.items():
        calls, period = turns[name]
        rounds[name] = period * effort.samples(sample() * calls * period)
    times: dict[str, list[float]] = {name: [] for name in samplers}
    most = max(rounds.values())
    for turn in range(most):
        for name, sample in samplers.items():
            if (turn + 1) * rounds[name] // most > turn * rounds[name] // most:
                times[name].append(sample())
    return times


def set_times(row: BenchRow, samples_us: Sequence[float], sets: int, others_cores: float | None) -> None:
    row.p20_us, row.p50_us, row.p80_us = (round(float(np.quantile(samples_us, q)), 3) for q in (0.2, 0.5, 0.8))
    row.samples, row.rotating_sets, row.others_cores = len(samples_us), sets, others_cores
