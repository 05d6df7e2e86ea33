"""Measures workloads: results first compared with the definition, then timed in turns, beside a plain copy.

Every provider of a workload is called on the same tokens. Who is wrong is not timed. All take turns in one process, so
that clocks and neighbours favour none, and the copy's turn comes as often as theirs.
"""

from __future__ import annotations

import gc
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.devices import Call, Device, Sampler
from benchmarks.lower_bound import Traffic
from benchmarks.providers import SEGMENT, Provider, mismatch, providers
from benchmarks.results import Row, Run, with_ratios
from benchmarks.workloads import Workload, random_tokens

SMALL_GRID, SMALL_CHANNELS = (9, 9), 384
"""Of the call whose time is taken for a call's overhead; it has one frame."""

Progress = Callable[[str, float], None]
"""Is told what happens, and which share of a workload is done."""

LOST = "failed: the process ended in it"
"""The check of a row that is reported before its provider is called for the first time."""
LATE = "skipped: its time was over"
"""The check of a row that was lost when the whole process was stopped, which says nothing of its provider."""


@dataclass(frozen=True)
class Effort:
    """How many samples: of quick calls `most`, of slow ones as many as take `seconds`, at least `least`."""

    most: int = 25
    least: int = 3
    seconds: float = 4.0

    def samples(self, sample_us: float) -> int:
        return max(self.least, min(self.most, int(self.seconds * 1e6 / max(sample_us, 1e-3))))


QUICK = Effort(most=15, least=3, seconds=0.6)


class Wrong(Exception):
    """A result that is not what the provider's definition says."""


class Skipped(Exception):
    """Why a provider is not timed."""


def new_run(description: dict[str, Any], settings: dict[str, Any], peaks: dict[str, float]) -> Run:
    now = datetime.now(timezone.utc)
    name = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    return Run(run=name, utc=now.isoformat(timespec="seconds"), settings=settings, peaks=peaks, **description)


def needed_bytes(workload: Workload, device: Device) -> int:
    """Least memory for a workload: inputs, an expected result and one that is made, and a copy's two sides."""
    bound = workload.bound("grid_pool")
    sets = 1 if device.type == "cpu" else 2
    segment = workload.input_bytes // max(workload.frames // SEGMENT, 1)
    reference = 10 * segment * 4 // workload.dtype.itemsize  # in float32
    return sets * (workload.input_bytes + 2 * bound.write_bytes + bound.total_bytes) + 2 * bound.write_bytes + reference


def measure(
    workload: Workload,
    timed: Sequence[Provider],
    device: Device,
    run: str,
    *,
    baseline: str,
    effort: Effort,
    progress: Progress = lambda text, share: None,
    report: Callable[[Row], None] = lambda row: None,
    extras: bool = True,
) -> list[Row]:
    """Rows of a workload: the copy, the probes of a CPU, and every provider of `timed`.

    report: is given each row of a provider before its first call, when its result has been checked, and when it has
    been timed, so that what was found until then is not lost with a process that ends early. extras: also finds what
    takes compiling for another shape or a profiler: overheads of calls and launches.

    Raises what an error that has made the device unusable raises.
    """
    progress("tokens", 0.0)
    free = device.free_bytes()
    needed = needed_bytes(workload, device)
    rows = {p.name: _row(run, workload, p, workload.bound(p.op)) for p in timed}
    if free is not None and needed > free:
        reason = f"skipped: takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return list(with_ratios([replace(row, check=reason) for row in rows.values()], baseline))
    used = device.others_cores()
    xs = device.inputs(workload)
    bound = workload.bound("grid_pool")
    samplers: dict[str, Sampler] = {}

    limits = {"copy": (copies(bound.total_bytes, len(xs), device.torch_device), bound)}
    limits |= device.limits(xs[0], workload.plan("norm_pool").pooled_size + (workload.channels,))
    found: dict[str, Row] = {}
    for name, (calls, moved) in limits.items():
        row = found[name] = _row(run, workload, None, moved, name)
        for call in calls:
            call()
        row.check = "ok"
        row.cold_us = device.cold_us(calls)
        samplers[name], row.calls_per_sample = device.sampler(calls)

    small = {provider.name: provider for provider in providers(_small(workload), device.type)}
    racers: dict[str, Racer] = {}
    expected = Expected(xs)
    for number, provider in enumerate(timed):
        progress(f"{provider.name}: check", 0.5 * number / len(timed))
        for name, into_out in variants(provider, device.separates_out):
            row = found[name] = replace(rows[provider.name], provider=name)
            with _reporting(row, device, report):
                _refuse_without_memory(provider, xs[0], device)
                racer = Racer(provider, xs, into_out, expected)
                if extras and provider.name in small and not provider.compiles:
                    small_call = racer.small_call(small[provider.name], device)
                    row.overhead_us, row.overhead_cold_us = (
                        None if time is None else round(time, 2)
                        for time in (device.returns_us(small_call), device.returns_cold_us(small_call))
                    )
                racer.prepare(device)
                row.extra_peak_bytes = racer.measure_memory(device)
                racer.run()
                racer.check()
                row.check = "ok"
                row.cold_us = device.cold_us(racer.calls)
                sampler, row.calls_per_sample = device.sampler(racer.calls, provider.captures)
                if device.type == "cuda":
                    sampler()  # a replay that hangs or fails does so here, where it is known whose it is
                samplers[name], racers[name] = sampler, racer

    def turn(share: float) -> None:
        progress("time", 0.5 + 0.5 * share)

    times = take_turns(samplers, {name: found[name].calls_per_sample or 1 for name in samplers}, effort, turn)
    others = used()
    for name in samplers:
        row = found[name]
        _add_times(row, times[name], len(xs))
        row.others_cores = others
    for name, racer in racers.items():
        if racer.keeps:
            with _reporting(found[name], device):
                racer.check()  # what the last of its calls left
    for row in found.values():
        _add_shares(row, found.get("copy"), found.get("ceiling"))
    ordered = with_ratios(found.values(), baseline)
    for row in ordered:
        report(row)
    for name, racer in racers.items() if extras else ():  # last: after a profiler, captures may fail
        # counting operators, on a CPU, keeps a call from being compiled
        if found[name].check == "ok" and (not racer.provider.compiles or device.type == "cuda"):
            with suppress(RuntimeError):  # of a profiler, which costs the number and not the times
                found[name].launches = device.launches(racer.calls[0])
    return list(ordered)


def _small(workload: Workload) -> Workload:
    batch = None if workload.batch is None else 1
    return replace(workload, frame_counts=(1,), batch=batch, grid=SMALL_GRID, channels=SMALL_CHANNELS, goal=False)


def variants(provider: Provider, separates_out: bool) -> list[tuple[str, bool]]:
    """Names of what is timed of a provider, and whether results go into memory that is given."""
    if not provider.takes_out:
        return [(provider.name, False)]
    if not separates_out:
        return [(provider.name, True)]
    return [(f"{provider.name}:out", True), (provider.name, False)]


def _row(run: str, workload: Workload, provider: Provider | None, moved: Traffic, name: str = "") -> Row:
    return Row(
        run=run,
        workload=workload.name,
        provider=name or (provider.name if provider else ""),
        op=provider.op if provider else "",
        dtype=str(workload.dtype).removeprefix("torch."),
        shape=workload.shape,
        settings=workload.settings | workload.packing,
        groups=workload.groups,
        input_bytes=workload.input_bytes,
        read_bytes=moved.read_bytes,
        write_bytes=moved.write_bytes,
        note=provider.note if provider else "",
        flops=provider.flops(workload) if provider else None,
    )


def _refuse_without_memory(provider: Provider, x: Tensor, device: Device) -> None:
    free, needed = device.free_bytes(), provider.memory * x.nbytes
    if free is not None and needed > 0.9 * free:
        raise Skipped(f"takes some {needed / 1e9:.1f} GB besides its input, {free / 1e9:.1f} GB are free")


def copies(total_bytes: int, sets: int, device: str) -> list[Call]:
    """Plain copies that read and write `total_bytes` together."""
    sources = [torch.randn(total_bytes // 4, dtype=torch.bfloat16, device=device) for _ in range(sets)]
    return [partial(torch.ones_like(source).copy_, source) for source in sources]


class Expected:
    """What a definition says of every input. The last one is kept: providers with the same follow one another."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.xs, self.results = xs, list[Tensor]()
        self.definition: Callable[[Tensor], Tensor] | None = None

    def __call__(self, provider: Provider) -> list[Tensor]:
        if provider.definition is not self.definition:
            self.definition, self.results = None, []
            self.definition, self.results = provider.definition, [provider.definition(x) for x in self.xs]
        return self.results


class Racer:
    """A provider's calls on every input, and what they return."""

    def __init__(self, provider: Provider, xs: Sequence[Tensor], into_out: bool, expected: Expected) -> None:
        self.provider, self.xs, self.into_out, self.expected = provider, xs, into_out, expected
        self.results = [torch.full_like(each, math.nan) if into_out else torch.empty(0) for each in expected(provider)]
        # on a CPU a result is freed with the call, as in use; in a graph it has to stay
        self.keeps = into_out or xs[0].is_cuda
        self.calls: list[Call] = [partial(self.call, i) for i in range(len(xs))]

    def call(self, i: int) -> Tensor | None:
        result = (
            self.provider.call(self.xs[i], out=self.results[i]) if self.into_out else self.provider.call(self.xs[i])
        )
        if not self.keeps:
            return result
        self.results[i] = result
        return None

    def small_call(self, provider: Provider, device: Device) -> Call:
        x = self.xs[0]
        leading = (1,) * (x.dim() - 3)
        tokens = random_tokens((*leading, *SMALL_GRID, SMALL_CHANNELS), x.dtype, device.torch_device, 0)
        given = {"out": provider.call(tokens)} if self.into_out else {}
        return partial(provider.call, tokens, **given)

    def prepare(self, device: Device) -> None:
        """Lets compile and start what the first call does."""
        if self.provider.compiles or device.type == "cuda":
            self.provider.call(self.xs[0])

    def measure_memory(self, device: Device) -> int | None:
        """Beyond the input and the result; also where the result goes into memory that was there before."""
        if self.into_out:
            return device.extra_peak_bytes(partial(self.provider.call, self.xs[0], out=self.results[0]), 0)[0]
        nbytes = self.expected(self.provider)[0].nbytes
        extra, self.results[0] = device.extra_peak_bytes(partial(self.provider.call, self.xs[0]), nbytes)
        return extra

    def run(self) -> None:
        """Calls it on every input, into memory that held NaN where it is given."""
        if self.into_out:
            for result in self.results:
                result.fill_(math.nan)
        for call in self.calls if self.keeps else []:
            call()

    def check(self) -> None:
        """Raises Wrong if the last result of an input is not right; lets go of it if it is not kept."""
        for i, expected in enumerate(self.expected(self.provider)):
            result = self.results[i]
            if not self.keeps:
                result = result if result.numel() else self.provider.call(self.xs[i])
                self.results[i] = torch.empty(0)
            reason = mismatch(result, expected, self.provider.ulps)
            if reason is not None:
                raise Wrong(reason)


@contextmanager
def _reporting(row: Row, device: Device, report: Callable[[Row], None] = lambda row: None) -> Iterator[None]:
    """Puts an error into the row in place of times, and goes on unless it has made the device unusable.

    The row is reported before as one that the process may have ended in, and then as it is.
    """
    report(replace(row, check=LOST))
    try:
        yield
    except Wrong as error:
        row.check = f"wrong: {error}"
    except Skipped as error:
        row.check = f"skipped: {error}"
    except Exception as error:
        row.check = f"failed: {_first_line(error)}"
    if row.check != "ok":
        row.p20_us = row.p50_us = row.p80_us = row.min_us = row.samples = None
        row.cold_us = row.overhead_us = row.overhead_cold_us = None
        gc.collect()
    report(row)
    if row.check != "ok":
        device.finish()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def take_turns(
    samplers: dict[str, Sampler],
    calls: dict[str, int],
    effort: Effort,
    turn_done: Callable[[float], None] = lambda share: None,
    warm_up_s: float = 0.3,
) -> dict[str, list[float]]:
    """µs per call of every sampler, sampled in turns; slow ones in fewer turns, spread evenly."""
    first = next(iter(samplers.values()))
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_up_s:
        first()
    rounds = {name: effort.samples(sample() * calls[name]) for name, sample in samplers.items()}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    turns = max(rounds.values())
    for turn in range(turns):
        for name, sample in samplers.items():
            if (turn + 1) * rounds[name] // turns > turn * rounds[name] // turns:
                times[name].append(sample())
        turn_done((turn + 1) / turns)
    return times


def _add_times(row: Row, samples_us: Sequence[float], sets: int) -> None:
    row.min_us, row.p20_us, row.p50_us, row.p80_us = (
        round(float(np.quantile(samples_us, q)), 3) for q in (0, 0.2, 0.5, 0.8)
    )
    row.samples, row.rotating_sets = len(samples_us), sets


def _add_shares(row: Row, copy: Row | None, ceiling: Row | None) -> None:
    """Bandwidth, and what share of the copy's and of the probe's it is."""

    def rate(of: Row | None) -> float | None:
        if of is None or of.check != "ok" or of.p50_us is None:
            return None
        return (of.read_bytes + of.write_bytes) / of.p50_us / 1e3

    reached = rate(row)
    if reached is None:
        return
    row.gb_per_s = round(reached, 3)
    for limit, name in ((copy, "percent_of_copy"), (ceiling, "percent_of_ceiling")):
        most = rate(limit)
        if most:
            setattr(row, name, round(100 * reached / most, 2))
