"""Goals of the performance on CPUs and GPUs, and their evaluation on results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import Results
from benchmarks.workloads import WORKLOADS

GOALS = [name for name, workload in WORKLOADS.items() if workload.goal]
MAIN = [name for name, workload in WORKLOADS.items() if "main" in workload.groups]
T16, T64, ONE_FRAME = "16x27x27x3584", "llava-video-7b", "1x9x9x384"


@dataclass(frozen=True)
class Goal:
    """A goal and its evaluation. status: "met", "not met" or "not measured". detail: the worst value, and its place."""

    name: str
    status: str
    detail: str

    @staticmethod
    def of(name: str, values: Mapping[str, float | None], limit: float, unit: str, at_most: bool = False) -> Goal:
        """Evaluate a goal on values by shape, with None for missing ones.

        It is not met if any value is beyond the limit, met if none is beyond it and none is missing, else not measured.
        """
        measured = {where: value for where, value in values.items() if value is not None}
        if not measured:
            return Goal(name, "not measured", f"0 of {len(values)}")
        where = (max if at_most else min)(measured, key=measured.__getitem__)
        reached = measured[where] <= limit if at_most else measured[where] >= limit
        status = "not met" if not reached else "met" if len(measured) == len(values) else "not measured"
        return Goal(name, status, f"{len(measured)} of {len(values)}, worst {measured[where]:.3g}{unit} at {where}")


def goals(results: Results) -> list[Goal]:
    """Evaluate the goals of the device that results were measured on."""
    return gpu_goals(results) if results.run.device["type"] == "cuda" else cpu_goals(results)


def value(results: Results, workload: str, provider: str, key: str) -> float | None:
    """Return a value of a row whose result was right, None if there is none."""
    row = results.find(workload, provider)
    found: float | None = None if row is None else getattr(row, key)
    return found


def speedup(results: Results, workload: str, other: str, ours: Sequence[str]) -> float | None:
    """Return the time of another provider over that of the slowest of ours, None if one was not timed."""
    times = [value(results, workload, name, "p50_us") for name in (other, *ours)]
    known = [time for time in times if time is not None]
    return known[0] / max(known[1:]) if len(known) == len(times) else None


def memory(results: Results, provider: str) -> dict[str, float | None]:
    """Return the memory beyond input and result in percent of the input, on the shapes of goals."""
    extra = {name: value(results, name, provider, "extra_peak_bytes") for name in GOALS}
    return {name: None if b is None else 100 * b / WORKLOADS[name].input_bytes for name, b in extra.items()}


def cpu_goals(results: Results) -> list[Goal]:
    pool, grid = "norm_pool:cpu:out", "grid_pool:cpu:out"

    def times(workload: str, other: str, ours: str) -> dict[str, float | None]:
        return {workload: speedup(results, workload, other, [ours])}

    def of_ceiling(workload: str) -> dict[str, float | None]:
        return {workload: value(results, workload, pool, "percent_of_ceiling")}

    ours = (pool, grid, "norm_pool:cpu", "grid_pool:cpu")
    overhead = {name: value(results, ONE_FRAME, name, "overhead_us") for name in ours}
    large = [name for name in WORKLOADS if name != ONE_FRAME]
    both = [name for name in large if results.find(name, pool) and results.find(name, "avg_pool2d")]
    plain = {name: speedup(results, name, "avg_pool2d", [pool]) for name in both}
    return [
        Goal.of("norm_pool, out=, 1.2 times as fast as avg_pool2d", times(T16, "avg_pool2d", pool), 1.2, "x"),
        Goal.of("norm_pool, out=, 2.5 times as fast as avg_pool2d", times(T64, "avg_pool2d", pool), 2.5, "x"),
        Goal.of("norm_pool, out=, never slower than avg_pool2d", plain, 1, "x"),
        Goal.of("norm_pool, out=, 15 times as fast as LLaVA's", times(T64, "llava_avg_pool", pool), 15, "x"),
        Goal.of("grid_pool, out=, 100 times as fast as eager", times(T64, "naive_grid_pool", grid), 100, "x"),
        Goal.of("norm_pool, out=, 100 times as fast as eager", times(T64, "naive_norm_pool", pool), 100, "x"),
        Goal.of("norm_pool, out=, reaches 80 % of the ceiling", of_ceiling(T64), 80, " %"),
        Goal.of("and with 16 frames", of_ceiling(T16), 80, " %"),
        Goal.of("grid_pool, out=, within 1.35 of norm_pool, out=", times(T64, grid, pool), 1.35, "x", True),
        Goal.of("a call on one frame of 9 x 9 x 384 within 80 us", overhead, 80, " us", at_most=True),
        Goal.of("grid_pool takes at most 20 % of x more", memory(results, "grid_pool:cpu"), 20, " %", at_most=True),
    ]


def gpu_goals(results: Results) -> list[Goal]:
    ours = norm_pool, grid_pool = "norm_pool:triton", "grid_pool:triton"
    plain = ("llava_avg_pool", "avg_pool2d", "naive_grid_pool")

    def of_copy(provider: str) -> dict[str, float | None]:
        return {name: value(results, name, provider, "percent_of_copy") for name in GOALS}

    def faster(workloads: Iterable[str], others: Iterable[str], ours: Sequence[str] = ours) -> dict[str, float | None]:
        pairs = [(workload, other) for other in others for workload in workloads]
        return {f"{workload} {other}": speedup(results, workload, other, ours) for workload, other in pairs}

    every = faster(MAIN, plain) | faster(GOALS, ["compiled_grid_pool"])
    more = 1 + 1e-9  # equal is not faster
    cuda = {
        f"{name} {op}": speedup(results, name, f"{op}:triton", [f"{op}:cuda"])
        for op in ("grid_pool", "norm_pool")
        for name in GOALS
    }
    return [
        Goal.of("norm_pool reaches 92 % of a copy", of_copy(norm_pool), 92, " %"),
        Goal.of("grid_pool reaches 85 % of a copy", of_copy(grid_pool), 85, " %"),
        Goal.of("both faster than LLaVA's average pooling", faster(MAIN, ["llava_avg_pool"]), more, "x"),
        Goal.of("both faster than every contender", every, more, "x"),
        Goal.of("grid_pool 10 times as fast as eager code", faster(GOALS, ["naive_grid_pool"], [grid_pool]), 10, "x"),
        Goal.of("grid_pool takes at most 20 % of x more", memory(results, grid_pool), 20, " %", at_most=True),
        Goal.of("CUDA C++ reaches 90 % of Triton's speed", cuda, 0.9, "x"),
    ]
