"""How calls are timed, and their memory and launches counted, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lower_bound import Traffic
from benchmarks.machine import largest_cache, memory_bytes
from benchmarks.probe import LINE, Probe
from benchmarks.workloads import Workload, random_tokens
from stgridpool_kernels.backends import compiled

Call = Callable[[], object]
Sampler = Callable[[], float]
"""Makes calls and returns the time of one, in µs."""

GRAPH_US = 2000
"""Of a sample on a GPU, about; at most 8 turns through the inputs."""


class Device(Protocol):
    """What measuring needs of a device; `torch_device` as torch names it."""

    type: str
    torch_device: str
    separates_out: bool

    def inputs(self, workload: Workload) -> list[Tensor]: ...
    def limits(self, x: Tensor, out_shape: tuple[int, ...]) -> dict[str, tuple[list[Call], Traffic]]: ...
    def sampler(self, calls: Sequence[Call], captures: bool = True) -> tuple[Sampler, int]: ...
    def cold_us(self, calls: Sequence[Call]) -> float | None: ...
    def returns_us(self, call: Call) -> float: ...
    def returns_cold_us(self, call: Call) -> float | None: ...
    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int | None, Tensor]: ...
    def launches(self, call: Call) -> int | None: ...
    def free_bytes(self) -> int | None: ...
    def fp32_gflops(self) -> float: ...
    def others_cores(self) -> Callable[[], float | None]: ...
    def finish(self) -> None: ...


# ---- CPU ----


class Cpu:
    """Threads of torch, each pinned to a core of its own while there are as many.

    A sample is one call; before it, a buffer larger than the caches is read, so that x comes from memory, and so that
    it does not depend on whose turn it was what is in the caches and which threads are awake. The time in which a
    result is freed is not part of it.
    """

    type = torch_device = "cpu"
    separates_out = True

    def __init__(self, threads: int | None = None) -> None:
        """Raises ValueError for less than one thread."""
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._affinity, self._anywhere = _affinities(), _affinity_of_this_thread()
        self._threads_before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.pinned = pin_threads(self.threads)
        self._evictor = torch.ones(max(2 * (largest_cache() or 0), 64 << 20) // 4, dtype=torch.int32)
        self.probe: Probe | None = None
        self.why_no_probe: str | None = None
        try:
            self.probe = Probe()
        except RuntimeError as error:
            self.why_no_probe = str(error)

    def close(self) -> None:
        """As many threads as before, and all may go where they might go: those that started since, too."""
        torch.set_num_threads(self._threads_before)
        for thread in _threads() if self._anywhere else []:
            with suppress(OSError):
                os.sched_setaffinity(thread, self._affinity.get(thread, self._anywhere))

    def inputs(self, workload: Workload) -> list[Tensor]:
        return [random_tokens(workload.shape, workload.dtype, "cpu", 0)]

    def limits(self, x: Tensor, out_shape: tuple[int, ...]) -> dict[str, tuple[list[Call], Traffic]]:
        """The ceiling: reads x and writes a result of this shape as 2 × 2 pooling does."""
        frames = x.flatten(0, -4)
        if self.probe is None or x.shape[-1] * x.element_size() % LINE or x.data_ptr() % LINE:
            return {}
        limits: dict[str, tuple[list[Call], Traffic]] = {
            "read": ([partial(self.probe.read, frames, self.threads)], Traffic(x.nbytes, 0))
        }
        pooled = tuple(out_shape[-3:-1])
        if all(size in (side // 2, (side + 1) // 2) for size, side in zip(pooled, x.shape[-3:-1], strict=True)):
            out = torch.ones(len(frames), *pooled, x.shape[-1], dtype=x.dtype)
            rows, cols = (min(2 * size, side) for size, side in zip(pooled, x.shape[-3:-1], strict=True))
            moved = Traffic(len(frames) * rows * cols * x.shape[-1] * x.element_size(), out.nbytes)
            limits["ceiling"] = ([partial(self.probe.pool, frames, out, self.threads)], moved)
        return limits

    def sampler(self, calls: Sequence[Call], captures: bool = True) -> tuple[Sampler, int]:
        (call,) = calls

        def sample() -> float:
            self.evict()
            begin = time.perf_counter()
            result = call()
            end = time.perf_counter()
            del result
            return (end - begin) * 1e6

        return sample, 1

    def evict(self) -> None:
        """Reads a buffer larger than the caches."""
        torch.amax(self._evictor)

    def cold_us(self, calls: Sequence[Call]) -> None:
        return None

    def returns_us(self, call: Call) -> float:
        return _median_us(call)

    def returns_cold_us(self, call: Call) -> float:
        return _median_us(call, self.evict, samples=25)

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int | None, Tensor]:
        """By the most memory that the process had at a time, which counts whatever was touched, in steps of pages; and
        the result."""
        if compiled.LIBRARY is not None:
            compiled.LIBRARY.release_scratch()
        _return_free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
            before = _status_bytes("VmRSS")
            result = call()
            peak = _status_bytes("VmHWM")
        except OSError:
            return None, call()
        return max(peak - before - result_bytes, 0), result

    def launches(self, call: Call) -> int | None:
        """Operators that torch dispatches for the call, not those that they call."""
        with _OperatorCount() as counted:
            call()
        count: int = counted.operators
        return count

    def free_bytes(self) -> int | None:
        return memory_bytes("MemAvailable")

    def fp32_gflops(self) -> float:
        return _matmul_gflops(2048, "cpu", lambda: None)

    def others_cores(self) -> Callable[[], float]:
        """A function that says how many cores others used since now: other processes and the hypervisor."""
        before = cpu_seconds()

        def used() -> float:
            wall, own, busy = (b - a for a, b in zip(before, cpu_seconds(), strict=True))
            return round(max(busy - own, 0.0) / max(wall, 1e-9), 3)

        return used

    def finish(self) -> None:
        """Nothing runs on after a call."""


class _OperatorCount(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def pin_threads(count: int) -> list[int]:
    """Pins torch's threads, the calling one first, to a core each; which, or none where there are fewer cores than
    threads or the system cannot tell. Two threads of one core count as one core while there are others."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = _one_of_each_core(sorted(os.sched_getaffinity(0)))
    if len(cores) < count:
        return []
    main = threading.get_native_id()
    before = set(_threads())
    work = torch.ones(1 << 22)
    work.add_(1)  # starts the threads that there are not yet
    workers = [thread for thread in _threads() if thread not in before] if count > 1 else []
    if len(workers) != count - 1:  # they were there before: find them by what they do
        workers = _busy_threads(work, count - 1, main)
    if len(workers) != count - 1:
        return []
    chosen = cores[:count]
    for thread, core in zip([main, *workers], chosen, strict=True):
        with suppress(OSError):
            os.sched_setaffinity(thread, {core})
    return chosen


def _busy_threads(work: Tensor, count: int, main: int) -> list[int]:
    """Those other than `main` that work most while torch computes."""

    def ticks(thread: int) -> int:
        with suppress(OSError, IndexError):
            fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])
        return 0

    others = [thread for thread in _threads() if thread != main]
    before = {thread: ticks(thread) for thread in others}
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        work.add_(1)
    gained = {thread: ticks(thread) - before[thread] for thread in others}
    return [thread for thread in sorted(others, key=gained.__getitem__, reverse=True) if gained[thread] > 0][:count]


def _threads() -> list[int]:
    with suppress(OSError):
        return sorted(int(path.name) for path in Path("/proc/self/task").iterdir())
    return []


def _affinity_of_this_thread() -> set[int]:
    """Its cores; none where the system cannot tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _affinities() -> dict[int, set[int]]:
    found = {}
    for thread in _threads() if hasattr(os, "sched_getaffinity") else []:
        with suppress(OSError):
            found[thread] = os.sched_getaffinity(thread)
    return found


def _one_of_each_core(cpus: Sequence[int]) -> list[int]:
    """The CPUs of which no earlier one shares a core, then the others."""
    first, rest, seen = [], [], set()
    for cpu in cpus:
        with suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
            if siblings in seen:
                rest.append(cpu)
                continue
            seen.add(siblings)
        first.append(cpu)
    return [*first, *rest]


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def _return_free_memory() -> None:
    """Has the C library give back what was freed: else a call could be given it without any being counted."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cpu_seconds() -> tuple[float, float, float]:
    """On the wall, of this process on all cores, and of everybody, with what the hypervisor took; the last is 0 where
    /proc/stat is not there."""
    busy = 0.0
    with suppress(OSError):
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = (int(t) / os.sysconf("SC_CLK_TCK") for t in fields[1:9])
        busy = user + nice + system + irq + softirq + steal
    return time.perf_counter(), time.process_time(), busy


# ---- GPU ----


class Gpu:
    """A sample is one replay of a CUDA graph of calls on rotating inputs and outputs that together exceed the L2 cache
    by far, and by no less than a call's own bytes."""

    type = "cuda"
    separates_out = False

    def __init__(self, device: str = "cuda") -> None:
        """Raises ValueError where there is no such device."""
        if not torch.cuda.is_available() or (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device}: {torch.cuda.device_count()} CUDA devices can be used")
        torch.cuda.set_device(torch.device(device).index or 0)
        self.torch_device = device
        self.l2_bytes: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def inputs(self, workload: Workload) -> list[Tensor]:
        moved = workload.input_bytes + workload.bound("grid_pool").write_bytes
        sets = max(2, math.ceil(5 * self.l2_bytes / moved))
        return [random_tokens(workload.shape, workload.dtype, self.torch_device, seed) for seed in range(sets)]

    def limits(self, x: Tensor, out_shape: tuple[int, ...]) -> dict[str, tuple[list[Call], Traffic]]:
        return {}

    def sampler(self, calls: Sequence[Call], captures: bool = True) -> tuple[Sampler, int]:
        """As many calls, made before, as take some 2 ms together, and every one at least once: as a graph, or from
        Python where they cannot be captured in one."""
        repeats = min(max(1, math.ceil(GRAPH_US / (self.cold_us(calls) * len(calls)))), 8)
        repeated = list(calls) * repeats
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run() -> None:
            for call in repeated:
                call()

        if captures:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph):
                    run()
            finally:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
            run = graph.replay

        def sample() -> float:
            run()  # so that the device is busy until the timed calls have arrived
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / len(repeated)

        return sample, len(repeated)

    def cold_us(self, calls: Sequence[Call]) -> float:
        """Median time of a call from Python to its end on the device; the calls' inputs evict one another."""
        times = []
        for i in range(12):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            calls[i % len(calls)]()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times[2:])

    def returns_us(self, call: Call) -> float:
        return _median_us(call, torch.cuda.synchronize)

    def returns_cold_us(self, call: Call) -> None:
        return None

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int, Tensor]:
        """By torch's allocator; and the result."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return max(peak - before - result_bytes, 0), result

    def launches(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
        kernels = sum(not name.startswith(("Memcpy", "Memset", "Activity Buffer")) for name in names)
        return kernels or None

    def free_bytes(self) -> int | None:
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info()[0]
        return free

    def fp32_gflops(self) -> float:
        return _matmul_gflops(8192, self.torch_device, torch.cuda.synchronize)

    def others_cores(self) -> Callable[[], float | None]:
        return lambda: None

    def finish(self) -> None:
        """Waits for the device; raises if an error has made it unusable for this process."""
        torch.cuda.synchronize()


def _median_us(
    call: Call, finish: Callable[[], object] = lambda: None, samples: int = 300, limit_s: float = 0.5
) -> float:
    """The median time until a call returns, where `finish` has ended the work before it."""
    for _ in range(3):
        call()
    times: list[float] = []
    until = time.perf_counter() + limit_s
    while len(times) < samples and (len(times) < 5 or time.perf_counter() < until):
        finish()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def _matmul_gflops(size: int, device: str, finish: Callable[[], object]) -> float:
    """The most operations per second of a product of float32 matrices, in 10⁹: as near as torch comes to the units that
    the kernels use (no tensor cores)."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    best = math.inf
    with _full_float32():
        for _ in range(4):
            finish()
            begin = time.perf_counter()
            a @ b
            finish()
            best = min(best, time.perf_counter() - begin)
    return round(2 * size**3 / best / 1e9, 1)


class _full_float32:
    """Context manager: products of float32 matrices without TF32."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: Any) -> None:
        torch.set_float32_matmul_precision(self.before)
