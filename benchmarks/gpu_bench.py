"""Timing on a GPU. `benchmarks.gpu_check` runs this in processes of its own.

Every result is compared with its definition before it is timed. A sample is one replay of a CUDA graph of calls on
rotating inputs and outputs that together exceed the L2 cache by far; all contenders of a shape and a plain copy of as
many bytes take turns, and what they reach is reported as a share of what the copy reached between them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

import stgridpool_kernels as stgp

from .contenders import WORKLOADS, Contender, Workload, contenders, mismatch, random_tokens, variants
from .lower_bound import Traffic

ROUNDS = 25
SLOW_US, SLOW_ROUNDS = 20_000, 7
JOB_SECONDS = 75
"""After which a job's process is ended; the other jobs run in a new one."""

COUNTED_CALLS = 3
SMALL_CALLS_RIGHT = "small calls: all right"

Run = Callable[[], object]


@dataclass(eq=False)
class Row:
    """What was found for one contender on one shape; None where it was not measured."""

    workload: str
    contender: str
    dtype: str
    shape: tuple[int, ...]
    frame_counts: tuple[int, ...]
    ceil_mode: bool
    input_bytes: int
    lower_bound_read_bytes: int
    lower_bound_write_bytes: int
    check: str = "not reached"
    note: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    lower_bound_gb_per_s: float | None = None
    percent_of_copy: float | None = None
    copy_gb_per_s: float | None = None
    samples: int | None = None
    calls_per_sample: int | None = None
    rotating_sets: int | None = None
    eager_wall_us: float | None = None
    extra_peak_bytes: int | None = None
    kernel_launches: int | None = None
    do_bench_p50_p20_p80_us: list[float] = field(default_factory=list)

    @staticmethod
    def of(workload: Workload, contender: str, bound: Traffic, note: str = "") -> Row:
        return Row(
            workload=workload.name,
            contender=contender,
            dtype=str(workload.dtype).removeprefix("torch."),
            shape=workload.shape,
            frame_counts=workload.frame_counts,
            ceil_mode=workload.ceil_mode,
            input_bytes=workload.input_bytes,
            lower_bound_read_bytes=bound.read_bytes,
            lower_bound_write_bytes=bound.write_bytes,
            note=note,
        )

    def add_times(self, samples_us: Sequence[float], copy_bytes_per_us: float, sets: int) -> None:
        """Times, and what the lower bound's bytes over the median time are, next to a copy's bytes over its time."""
        self.p20_us, self.p50_us, self.p80_us = (float(np.quantile(samples_us, q)) for q in (0.2, 0.5, 0.8))
        reached = (self.lower_bound_read_bytes + self.lower_bound_write_bytes) / self.p50_us
        self.lower_bound_gb_per_s, self.copy_gb_per_s = reached / 1e3, copy_bytes_per_us / 1e3
        self.percent_of_copy = 100 * reached / copy_bytes_per_us
        self.samples, self.rotating_sets = len(samples_us), sets

    def forget_times(self) -> None:
        self.p20_us = self.p50_us = self.p80_us = self.lower_bound_gb_per_s = self.percent_of_copy = None


class Device(Protocol):
    """What measuring needs of a device: a GPU, or a stand-in for tests."""

    name: str
    l2_bytes: int

    def sampler(self, calls: Sequence[Run]) -> Callable[[], float]: ...
    def wall_us(self, calls: Sequence[Run]) -> float: ...
    def extra_peak_bytes(self, call: Callable[[], Tensor]) -> int: ...
    def do_bench_us(self, call: Run) -> list[float]: ...
    def check_alive(self) -> None: ...


class Gpu:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self.l2_bytes: int = torch.cuda.get_device_properties(0).L2_cache_size

    def sampler(self, calls: Sequence[Run]) -> Callable[[], float]:
        """Captures the calls, made before, in a CUDA graph; a function that returns its time per call in µs."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind

        def sample() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / len(calls)

        return sample

    def wall_us(self, calls: Sequence[Run]) -> float:
        """Median time of a call from Python to its end on the device; the calls' inputs evict one another."""
        times = []
        for i in range(12):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            calls[i % len(calls)]()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times[2:])

    def extra_peak_bytes(self, call: Callable[[], Tensor]) -> int:
        """Memory in use at most during a call, beyond what was before and the result."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - result.untyped_storage().nbytes()

    def do_bench_us(self, call: Run) -> list[float]:
        from triton.testing import do_bench

        return [float(ms) * 1e3 for ms in do_bench(call, quantiles=[0.5, 0.2, 0.8])]

    def check_alive(self) -> None:
        """Raises if an earlier error has made the device unusable for this process."""
        torch.cuda.synchronize()


def measure(workload: Workload, timed: Sequence[Contender], device: Device, emit: Callable[[Row], None]) -> None:
    """Emits a row for every contender once its result is checked, and again with what was measured."""
    w, bound = workload, workload.bound("grid_pool")
    sets = max(2, math.ceil(5 * device.l2_bytes / (w.input_bytes + bound.write_bytes)))
    xs = [random_tokens(w.shape, w.dtype, device.name, seed) for seed in range(sets)]
    copy = Row.of(w, "copy", bound)
    copy.check = "ok"
    samplers = {copy: prepare_sampler(copies(bound.total_bytes, sets, device.name), copy, device)}
    racers = {}
    for contender in timed:
        row = Row.of(w, contender.name, w.bound(contender.op), note=contender.note)
        with reporting(row, device, emit):
            racer = Racer(contender, xs)
            row.check = "ok"
            emit(row)
            row.extra_peak_bytes = device.extra_peak_bytes(partial(contender.call, xs[0]))
            samplers[row] = prepare_sampler(racer.calls, row, device)
            racers[row] = racer

    times = take_turns({row.contender: sampler for row, sampler in samplers.items()})
    copy_us = statistics.median(times["copy"])
    for row in samplers:
        row.add_times(times[row.contender], bound.total_bytes / copy_us, sets)
    emit(copy)
    for row, racer in racers.items():
        with reporting(row, device, emit):
            racer.check()  # what the graph left
            if row.contender == "grid_pool":
                row.do_bench_p50_p20_p80_us = device.do_bench_us(racer.calls[0])
            emit(row)


class Wrong(Exception):
    """A result that is not what the contender's definition says."""


class Racer:
    """A contender's calls on every input, and what they return."""

    def __init__(self, contender: Contender, xs: Sequence[Tensor]) -> None:
        """Calls it once on every input, into memory that held NaN, and raises Wrong if a result is not right."""
        self.contender, self.xs = contender, xs
        self.expected = contender.definition(xs[0])
        self.results = [torch.full_like(self.expected, math.nan) for _ in xs]
        self.calls: list[Run] = [partial(self.call, i) for i in range(len(xs))]
        if not contender.takes_out:
            contender.call(xs[0])  # compiles, and allocates what it keeps: the next result may get the poisoned memory
            self.results = [torch.empty(0) for _ in xs]
        for call in self.calls:
            call()
        self.check()

    def call(self, i: int) -> None:
        given = {"out": self.results[i]} if self.contender.takes_out else {}
        self.results[i] = self.contender.call(self.xs[i], **given)

    def check(self) -> None:
        reason = mismatch(self.results[0], self.expected, self.contender.ulps)
        if reason is not None:
            raise Wrong(reason)


@contextmanager
def reporting(row: Row, device: Device, emit: Callable[[Row], None]) -> Iterator[None]:
    """Puts an error into the row in place of times, and goes on unless it has made the device unusable."""
    try:
        yield
    except Wrong as error:
        row.check = f"wrong: {error}"
    except Exception as error:
        row.check = f"failed: {first_line(error)}"
    if row.check != "ok":
        row.forget_times()
        emit(row)
        device.check_alive()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def copies(total_bytes: int, sets: int, device: str) -> list[Run]:
    """Plain copies that read and write `total_bytes` together."""
    sources = [torch.randn(total_bytes // 4, dtype=torch.bfloat16, device=device) for _ in range(sets)]
    return [partial(torch.empty_like(source).copy_, source) for source in sources]


def prepare_sampler(calls: Sequence[Run], row: Row, device: Device) -> Callable[[], float]:
    """Measures single calls, then has as many captured as take some 2 ms together, and every input at least once."""
    row.eager_wall_us = device.wall_us(calls)
    repeats = min(max(1, math.ceil(2000 / (row.eager_wall_us * len(calls)))), 8)
    row.calls_per_sample = repeats * len(calls)
    return device.sampler(list(calls) * repeats)


def take_turns(samplers: dict[str, Callable[[], float]], warm_up_s: float = 0.3) -> dict[str, list[float]]:
    """µs per call of every sampler, sampled in turns so that clocks and neighbours favour none; fewer of slow ones."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_up_s:
        samplers["copy"]()
    rounds = {name: ROUNDS if sample() < SLOW_US else SLOW_ROUNDS for name, sample in samplers.items()}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(ROUNDS):
        for name, sample in samplers.items():
            if turn < rounds[name]:
                times[name].append(sample())
    return times


# ---- processes of their own ----


def jobs() -> list[str]:
    """All shapes, those that goals are set for first; torch.compile, which takes long to get ready; last the profiler,
    after which a process may be slower."""
    compiled = [f"{name}+compile" for name, workload in WORKLOADS.items() if workload.goal]
    return [*WORKLOADS, *compiled, "launches"]


def tune_jobs() -> list[str]:
    """The two main shapes, one with odd sizes and one with even ones."""
    return [f"{name}+tune" for name in ("64x27x27x3584", "64x24x24x4096")]


def time_jobs(names: Sequence[str], rows: Path) -> None:
    """Appends to `rows` a line when a job begins, one for every row, and one when it is done."""
    with rows.open("a", encoding="utf-8") as file:

        def write(line: object) -> None:
            print(json.dumps(line), file=file, flush=True)

        for name in names:
            signal.alarm(JOB_SECONDS)  # ends this process, stuck or not
            write({"job": name, "state": "begun"})
            if name == "launches":
                count_launches(write)
            else:
                shape, _, kind = name.partition("+")
                workload = WORKLOADS[shape]
                timed = variants(workload) if kind == "tune" else contenders(workload, compiled=kind == "compile")
                measure(workload, timed, Gpu(), lambda row: write(asdict(row)))
                del timed
            write({"job": name, "state": "done"})
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
        signal.alarm(0)


def count_launches(write: Callable[[object], None]) -> None:
    """Writes how many kernels each contender launches on each shape."""
    for workload in WORKLOADS.values():
        x = random_tokens(workload.shape, workload.dtype, "cuda", 0)
        for contender in contenders(workload, compiled=False):
            contender.call(x)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                contender.call(x)
                torch.cuda.synchronize()
            names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
            kernels = sum(not name.startswith(("Memcpy", "Memset", "Activity Buffer")) for name in names)
            write({"launches_of": [workload.name, contender.name], "kernels": kernels or None})


SMALL_CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("grid_pool", {}),
    ("grid_pool", {"ceil_mode": True, "norm_type": 1.0, "frame_counts": (20, 12)}),
    ("grid_pool", {"frame_strides": (1, 3), "grid_shape": (1, 2), "kernel_size": 3, "stride": 2, "padding": 1}),
    ("grid_pool", {"resize": "bilinear", "sampling": "first", "output_size": (3, 3)}),
    ("temporal_grid", {}),
    ("norm_pool", {}),
    ("norm_pool", {"kernel_size": 2, "padding": 1, "norm_type": 3.0}),
    ("token_norm", {}),
    ("token_norm", {"norm_type": math.inf}),
)
WIDE_CALLS: tuple[tuple[str, dict[str, Any]], ...] = (("grid_pool", {"frame_strides": (1, 2)}), ("norm_pool", {}))
SMALL_INPUTS = (
    ((32, 9, 7, 100), torch.bfloat16, SMALL_CALLS),
    ((32, 6, 8, 64), torch.float32, SMALL_CALLS[:2]),
    ((8, 5, 5, 3584), torch.bfloat16, WIDE_CALLS),
    ((8, 4, 5, 9000), torch.bfloat16, WIDE_CALLS),
)
"""Odd and even sizes; several warps to a token; more channels than registers hold."""


def run_small_calls() -> None:
    """Small calls of every op, compared with the reference on the CPU: for a memory checker to watch."""
    for shape, dtype, calls in SMALL_INPUTS:
        x = random_tokens(shape, dtype, "cpu", 0)
        on_device = x.cuda()
        for op, arguments in calls:
            expected = getattr(stgp, op)(x, backend="reference", **arguments)
            for backend in {"triton", "cuda"} & set(stgp.available_backends()):
                found = getattr(stgp, op)(on_device, backend=backend, **arguments).cpu()
                reason = mismatch(found, expected, 2 if found.dtype == torch.bfloat16 else 64)
                if reason is not None:
                    sys.exit(f"{op} of {shape} {dtype} with {arguments} by {backend}: {reason}")
    print(SMALL_CALLS_RIGHT)


def run_counted_calls(op: str) -> None:
    """COUNTED_CALLS calls of an op on as many inputs, between profiler marks: for a profiler to count bytes of."""
    workload = next(iter(WORKLOADS.values()))
    (contender,) = (c for c in contenders(workload, compiled=False) if c.name == op)
    xs = [random_tokens(workload.shape, workload.dtype, "cuda", seed) for seed in range(COUNTED_CALLS)]
    racer = Racer(contender, xs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in racer.calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("time", help="time shapes, one JSON line per row")
    timing.add_argument("rows", type=Path)
    timing.add_argument("jobs", nargs="+", choices=[*jobs(), *tune_jobs()], metavar="job")
    commands.add_parser("small", help="a few small calls of every op")
    commands.add_parser("counted", help="a few large calls of one op").add_argument("op")
    given = parser.parse_args(arguments)
    if given.command == "time":
        time_jobs(given.jobs, given.rows)
    elif given.command == "small":
        run_small_calls()
    else:
        run_counted_calls(given.op)


if __name__ == "__main__":
    main()
