"""Measurement of the time, memory and launches of calls on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.lower_bound import Traffic
from benchmarks.machine import field_bytes, largest_cache, memory_bytes
from benchmarks.probe import LINE, Probe
from benchmarks.workloads import Workload, random_tokens
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.cli.machine import others_cores

Call = Callable[[], object]
Sampler = Callable[[], float]
"""Function that makes the calls of a sample and returns the time per call in µs."""

GRAPH_US = 2000
"""Target duration in µs of a sample on a GPU, which makes at most 8 calls per input."""


class Cpu:
    """The CPU, with the threads of torch.

    A sample is one call. Before it a buffer larger than the caches is read, so that x comes from memory, and so that
    caches and threads are in the same state whatever ran before. For warm caches the same call is made before it
    instead, as in a loop of calls. The time excludes freeing the result. Under `python -m benchmarks`, OpenMP pins each
    thread to a core.
    """

    type = torch_device = "cpu"
    separates_out = True
    """True if calls with `out` and calls that allocate their result are timed separately."""

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.is_pinned = os.environ.get("OMP_PROC_BIND") == "true"
        self._evictor = torch.ones(max(2 * (largest_cache() or 0), 64 << 20) // 4, dtype=torch.int32)
        self.probe: Probe | None = None
        self.why_no_probe: str | None = None
        try:
            self.probe = Probe()
        except RuntimeError as error:
            self.why_no_probe = str(error)

    def inputs(self, workload: Workload) -> list[Tensor]:
        return [random_tokens(workload.shape, workload.dtype, "cpu", 0)]

    def limits(self, x: Tensor, pooled: tuple[int, int]) -> dict[str, tuple[list[Call], Traffic]]:
        """Return calls and traffic of the probes.

        "read" reads x. "ceiling" reads x and writes a result of `pooled` rows and columns, in the order of 2 × 2
        pooling; it is left out for other windows.
        """
        frames = x.flatten(0, -4)
        token_bytes = x.shape[-1] * x.element_size()
        if self.probe is None or token_bytes % LINE or x.data_ptr() % LINE:
            return {}
        limits: dict[str, tuple[list[Call], Traffic]] = {
            "read": ([partial(self.probe.read, frames, self.threads)], Traffic(x.nbytes, 0))
        }
        sides = list(zip(pooled, x.shape[-3:-1], strict=True))
        if all(size in (side // 2, (side + 1) // 2) for size, side in sides):
            out = torch.ones(len(frames), *pooled, x.shape[-1], dtype=x.dtype)
            covered = math.prod(min(2 * size, side) for size, side in sides)
            moved = Traffic(len(frames) * covered * token_bytes, out.nbytes)
            limits["ceiling"] = ([partial(self.probe.pool, frames, out, self.threads)], moved)
        return limits

    def sampler(self, calls: Sequence[Call], captures: bool = True, warm: bool = False) -> tuple[Sampler, int]:
        """Return a sampler, and the number of calls per sample. warm: whether caches are left as a call leaves them."""
        (call,) = calls

        def sample() -> float:
            if warm:
                call()
            else:
                self.evict()
            begin = time.perf_counter()
            result = call()
            end = time.perf_counter()
            del result
            return (end - begin) * 1e6

        return sample, 1

    def evict(self) -> None:
        """Evict the caches by reading a buffer larger than them."""
        torch.amax(self._evictor)

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int | None, Tensor]:
        """Return the peak memory in bytes of a call beyond the memory in use before and the result, and the result.

        The operating system counts every page that was touched. None if it does not report the peak.
        """
        if compiled.LIBRARY is not None:
            compiled.LIBRARY.release_scratch()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # otherwise reuse of freed memory would not be counted
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            return None, call()
        before = field_bytes("/proc/self/status", "VmRSS")
        result = call()
        peak = field_bytes("/proc/self/status", "VmHWM")
        return None if before is None or peak is None else max(peak - before - result_bytes, 0), result

    def launches(self, call: Call) -> None:
        return None

    def free_bytes(self) -> int | None:
        return memory_bytes("MemAvailable")

    def others_cores(self) -> Callable[[], float | None]:
        return others_cores()

    def finish(self) -> None:
        """Do nothing, since calls are complete when they return."""


class Gpu:
    """A CUDA device.

    A sample is one replay of a CUDA graph of calls on rotating inputs and outputs, whose total size is at least five
    times that of the L2 cache.
    """

    type = "cuda"
    separates_out = False

    def __init__(self, device: str = "cuda") -> None:
        """Select the device. Raises ValueError if there is no such device."""
        if not torch.cuda.is_available() or (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device}: {torch.cuda.device_count()} CUDA devices can be used")
        torch.cuda.set_device(torch.device(device).index or 0)
        self.torch_device = device
        self.l2_bytes: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def inputs(self, workload: Workload) -> list[Tensor]:
        moved = workload.input_bytes + workload.bound("grid_pool").write_bytes
        sets = max(2, math.ceil(5 * self.l2_bytes / moved))
        return [random_tokens(workload.shape, workload.dtype, self.torch_device, seed) for seed in range(sets)]

    def limits(self, x: Tensor, pooled: tuple[int, int]) -> dict[str, tuple[list[Call], Traffic]]:
        return {}

    def sampler(self, calls: Sequence[Call], captures: bool = True, warm: bool = False) -> tuple[Sampler, int]:
        """Return a sampler, and the number of calls per sample, a multiple of the number of `calls`.

        captures: whether to capture the calls in a CUDA graph, or else make them from Python. Every call must have been
        made before. warm: has no effect, since rotating inputs take the place of emptied caches.
        """
        repeats = min(max(1, math.ceil(GRAPH_US / (self.returns_us(calls) * len(calls)))), 8)
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
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
            run = graph.replay

        def sample() -> float:
            run()  # keeps the device busy while the timed calls are queued
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / len(repeated)

        return sample, len(repeated)

    def returns_us(self, calls: Sequence[Call]) -> float:
        """Return the median time in µs of a call until its end on the device. Rotating inputs keep caches cold."""
        times = []
        for i in range(12):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            calls[i % len(calls)]()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times[2:])

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int, Tensor]:
        """Return the peak memory in bytes of a call beyond the memory in use before and the result, and the result.

        torch's allocator counts it.
        """
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return max(peak - before - result_bytes, 0), result

    def launches(self, call: Call) -> int | None:
        """Return the number of kernels that a call launches, None if the profiler saw none."""
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

    def others_cores(self) -> Callable[[], float | None]:
        return lambda: None

    def finish(self) -> None:
        """Wait for the device. Raises the error that has made it unusable for this process, if there is one."""
        torch.cuda.synchronize()


Device = Cpu | Gpu


def open_device(name: str | None, threads: int | None = None) -> Device:
    """Return the device "cpu", "cuda" or "cuda:N", by default a GPU if there is one.

    Raises ValueError for other names, for a device that does not exist, and for threads of a GPU.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return Cpu(threads)
    if name.partition(":")[0] != "cuda":
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if threads is not None:
        raise ValueError("--threads is for the CPU")
    return Gpu(name)


def overhead_us(device: Device, call: Call) -> float:
    """Return the median time in µs until a call returns, with warm caches and an otherwise idle device."""
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(300):
        device.finish()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return round(statistics.median(times), 2)
