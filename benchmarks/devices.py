"""How a CPU and a GPU take the time of calls, and count their memory and launches."""

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
from benchmarks.machine import cpu_seconds, largest_cache, memory_bytes
from benchmarks.probe import LINE, Probe
from benchmarks.workloads import Workload, random_tokens
from stgridpool_kernels.backends import compiled

Call = Callable[[], object]
Sampler = Callable[[], float]
"""Makes calls and returns the time of one, in µs."""

GRAPH_US = 2000
"""Time in µs that the calls of a sample on a GPU take together, about. They are at most 8 turns through the inputs."""


class Cpu:
    """The threads of torch.

    A sample is one call. Before it a buffer larger than the caches is read, so that x comes from memory, and so that
    what is in the caches and which threads are awake does not depend on whose turn it was. Freeing the result is not
    part of the time. `python -m benchmarks` has OpenMP pin each thread to a core.
    """

    type = torch_device = "cpu"
    separates_out = True
    """Results that go into given memory and into fresh memory are timed apart."""

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
        """The read probe reads x. The ceiling probe reads x and writes a result of `pooled` rows and columns, in the
        order of 2 × 2 pooling; it is left out for other windows."""
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

    def sampler(self, calls: Sequence[Call], captures: bool = True) -> tuple[Sampler, int]:
        """A sampler, and the number of calls that a sample makes."""
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

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int | None, Tensor]:
        """The most memory in use during a call beyond what was in use before and the result; and the result.

        It is what the operating system counts: every page that was touched. None where it does not say.
        """
        if compiled.LIBRARY is not None:
            compiled.LIBRARY.release_scratch()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, and kept, would not be counted again
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
            before = _status_bytes("VmRSS")
            result = call()
            peak = _status_bytes("VmHWM")
        except OSError:
            return None, call()
        return max(peak - before - result_bytes, 0), result

    def launches(self, call: Call) -> None:
        return None

    def free_bytes(self) -> int | None:
        return memory_bytes("MemAvailable")

    def others_cores(self) -> Callable[[], float | None]:
        """A function that returns how many cores other processes and the hypervisor have used since now."""
        before = cpu_seconds()

        def used() -> float:
            wall, own, busy = (b - a for a, b in zip(before, cpu_seconds(), strict=True))
            return round(max(busy - own, 0.0) / max(wall, 1e-9), 3)

        return used

    def finish(self) -> None:
        """Nothing is left to do when a call has returned."""


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


class Gpu:
    """A CUDA device.

    A sample is one replay of a CUDA graph of calls on rotating inputs and outputs, which together are at least five
    times as large as the L2 cache.
    """

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

    def limits(self, x: Tensor, pooled: tuple[int, int]) -> dict[str, tuple[list[Call], Traffic]]:
        return {}

    def sampler(self, calls: Sequence[Call], captures: bool = True) -> tuple[Sampler, int]:
        """A sampler, and the number of calls that a sample makes: whole turns through `calls`, captured in a graph or
        else made from Python. All must have been made before."""
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

    def returns_us(self, calls: Sequence[Call]) -> float:
        """The median time of a call from Python to its end on the device, in µs. The inputs evict one another."""
        times = []
        for i in range(12):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            calls[i % len(calls)]()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times[2:])

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int, Tensor]:
        """The most memory in use during a call beyond what was in use before and the result, as torch's allocator
        counts it; and the result."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return max(peak - before - result_bytes, 0), result

    def launches(self, call: Call) -> int | None:
        """The number of kernels that a call launches."""
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
        """Waits for the device. Raises the error that has made it unusable for this process, if there is one."""
        torch.cuda.synchronize()


Device = Cpu | Gpu


def open_device(name: str | None, threads: int | None = None) -> Device:
    """The device "cpu", "cuda" or "cuda:N", by default a GPU if there is one.

    Raises ValueError for other names, for a device that there is not, and for threads of a GPU.
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
    """The median time until a call returns, in µs; caches are warm and the device has nothing else to do."""
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(300):
        device.finish()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return round(statistics.median(times), 2)
