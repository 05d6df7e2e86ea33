"""Goals of the performance on CPUs and GPUs, and their evaluation on results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import Results
from benchmarks.workloads import WORKLOADS

GOALS = [name for name, workload in WORKLOADS.items() if workload.goal]
MAIN = [name for name, workload in WORKLOADS.items() if "main" in workload.groups]
PLAIN = [name for name, workload in WORKLOADS.items() if "plain" in workload.groups]
T16, T64, ONE_FRAME = "16x27x27x3584", "llava-video-7b", "1x9x9x384"

AS_FAST_FROM = {"norm_pool": (384, 1e6), "grid_pool": (896, 8e6)}
"""Channels and bytes of x from which on a CPU's kernel is to be as fast as a plain average."""
FRESH_BYTES = 32e6
"""Size of a result in bytes from which on the cost of fresh memory is limited."""
SMALL = {"8x27x27x896": 10, "16x27x27x896": 14}
"""Limits of the time in µs of grid_pool on a GPU, by workload."""
EMPTY_CALLS = {"empty:op": 16, "empty:op, inference mode": 12, "empty:function": 20}
"""Limits of the time in µs of calls on a video of no frames, by provider."""


@dataclass(frozen=True)
class Goal:
    """A goal and its evaluation.

    status: "met", "not met" or "not measured". detail: how many values are within the limit, and the worst and its
    place.
    """

    name: str
    status: str
    detail: str

    @staticmethod
    def of(name: str, values: Mapping[str, float | None], limit: float, unit: str, at_most: bool = False) -> Goal:
        """Evaluate a goal on values by shape, with None for missing ones.

        It is not met if any value is beyond the limit, met if none is beyond it and none is missing, else not measured.
        """
        measured = {where: value for where, value in values.items() if value is not None}
        missing = len(values) - len(measured)
        if not measured:
            return Goal(name, "not measured", f"{missing} not measured")
        within = sum(value <= limit if at_most else value >= limit for value in measured.values())
        status = "not met" if within < len(measured) else "not measured" if missing else "met"
        where = (max if at_most else min)(measured, key=measured.__getitem__)
        detail = f"{within} of {len(measured)}, worst {measured[where]:.3g}{unit} at {where}"
        return Goal(name, status, f"{detail}; {missing} not measured" if missing else detail)


def goals(results: Results) -> list[Goal]:
    """Evaluate the goals of the device that results were measured on."""
    return gpu_goals(results) if results.run.device["type"] == "cuda" else cpu_goals(results)


def value(results: Results, workload: str, provider: str, key: str) -> float | None:
    """Return a value of a row whose result was right, None if there is none."""
    row = results.find(workload, provider)
    found: float | None = None if row is None else getattr(row, key)
    return found


def time_us(results: Results, workload: str, provider: str) -> float | None:
    return value(results, workload, provider, "p50_us")


def speedup(results: Results, workload: str, other: str, ours: Sequence[str]) -> float | None:
    """Return the time of another provider over that of the slowest of ours, None if one was not timed."""
    times = [time_us(results, workload, name) for name in (other, *ours)]
    known = [time for time in times if time is not None]
    return known[0] / max(known[1:]) if len(known) == len(times) else None


def memory(results: Results, provider: str) -> dict[str, float | None]:
    """Return the memory beyond input and result in percent of the input, on the shapes of goals."""
    extra = {name: value(results, name, provider, "extra_peak_bytes") for name in GOALS}
    return {name: None if b is None else 100 * b / WORKLOADS[name].input_bytes for name, b in extra.items()}


def cpu_goals(results: Results) -> list[Goal]:
    pool, grid, both = "norm_pool:cpu:out", "grid_pool:cpu:out", (T16, T64)
    llava = {f"{T64} {ours}": speedup(results, T64, "llava_avg_pool", [ours]) for ours in (pool, "norm_pool:cpu")}
    eager = {
        op: {T64: speedup(results, T64, f"naive_{op}", [ours])}
        for op, ours in (("norm_pool", pool), ("grid_pool", grid))
    }
    ceiling = {name: value(results, name, pool, "percent_of_ceiling") for name in both}
    summaries = {name: speedup(results, name, grid, [pool]) for name in both}
    extra = memory(results, "grid_pool:cpu")
    return [
        *plain_goals(results),
        Goal.of("fresh results from 32 MB on at most 1.4 times out=", fresh(results), 1.4, "x", at_most=True),
        Goal.of("norm_pool, out=, reaches 80 % of the ceiling, 16 and 64 frames", ceiling, 80, " %"),
        Goal.of("grid_pool, out=, at most 1.3 times norm_pool, out=, there", summaries, 1.3, "x", at_most=True),
        Goal.of("norm_pool 15 times as fast as LLaVA's call", llava, 15, "x"),
        Goal.of("norm_pool, out=, 100 times as fast as eager", eager["norm_pool"], 100, "x"),
        Goal.of("grid_pool, out=, 100 times as fast as eager", eager["grid_pool"], 100, "x"),
        Goal.of("grid_pool takes at most 20 % of x more", extra, 20, " %", at_most=True),
        *overhead_goals(results),
    ]


def plain_goals(results: Results) -> list[Goal]:
    """Evaluate the time of the ops next to avg_pool2d's on a channels-last view, fresh with fresh and given with given.

    The sweep of the group "plain" must be measured; of the main workloads those count that were.
    """
    from_on, elsewhere = {op: dict[str, float | None]() for op in AS_FAST_FROM}, dict[str, float | None]()
    for name in [*PLAIN, *(name for name in MAIN if results.find(name, "avg_pool2d"))]:
        workload = WORKLOADS[name]
        for op, (channels, size) in AS_FAST_FROM.items():
            for out in ("", ":out"):
                ours, plain = f"{op}:cpu{out}", f"avg_pool2d{out}"
                if workload.channels >= channels and workload.input_bytes >= size:
                    from_on[op][f"{name} {ours}"] = speedup(results, name, plain, [ours])
                else:
                    us, plain_us = time_us(results, name, ours), time_us(results, name, plain)
                    elsewhere[f"{name} {ours}"] = None if us is None or plain_us is None else (us - 20) / plain_us
    return [
        Goal.of("norm_pool as fast as avg_pool2d from 384 channels and 1 MB on", from_on["norm_pool"], 1, "x"),
        Goal.of("grid_pool as fast as avg_pool2d from 896 channels and 8 MB on", from_on["grid_pool"], 1, "x"),
        Goal.of("elsewhere in these workloads at most 1.5 times its time + 20 us", elsewhere, 1.5, "x", at_most=True),
    ]


def fresh(results: Results) -> dict[str, float | None]:
    """Return the time of a call with a fresh result over that with given memory, for large results."""
    names = [*PLAIN, *(name for name in MAIN if results.find(name, "norm_pool:cpu"))]
    large = [name for name in names if WORKLOADS[name].result_bytes >= FRESH_BYTES]
    ops = [f"{op}:cpu" for op in AS_FAST_FROM]
    return {f"{name} {op}": speedup(results, name, op, [f"{op}:out"]) for name in large for op in ops}


def overhead_goals(results: Results) -> list[Goal]:
    """Evaluate the time of calls on a video of no frames, on warm caches and after other work has filled them."""
    cold = {name: speedup(results, "empty", name, ["empty:python op"]) for name in EMPTY_CALLS}
    found = []
    for name, limit in EMPTY_CALLS.items():
        title = f"{name.replace(':', ' ')}: a warm call takes at most {limit} us"
        warm = value(results, "empty", name, "overhead_us")
        found.append(Goal.of(title, {name: warm}, limit, " us", at_most=True))
    title = "empty: a cold call takes at most 1.5 times an empty Python op"
    return [*found, Goal.of(title, cold, 1.5, "x", at_most=True)]


def gpu_goals(results: Results) -> list[Goal]:
    ours = norm_pool, grid_pool = "norm_pool:triton", "grid_pool:triton"
    plain = ("llava_avg_pool", "avg_pool2d", "naive_grid_pool")

    def of_copy(provider: str) -> dict[str, float | None]:
        return {name: value(results, name, provider, "percent_of_copy") for name in GOALS}

    def faster(workloads: Iterable[str], others: Iterable[str], ours: Sequence[str] = ours) -> dict[str, float | None]:
        pairs = [(workload, other) for other in others for workload in workloads]
        return {f"{workload} {other}": speedup(results, workload, other, ours) for workload, other in pairs}

    def fastest(workload: str) -> dict[str, float | None]:
        times = (time_us(results, workload, f"grid_pool:{backend}") for backend in ("triton", "cuda"))
        return {workload: min((time for time in times if time is not None), default=None)}

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
        *(Goal.of(f"grid_pool on {name} within {us} us", fastest(name), us, " us", True) for name, us in SMALL.items()),
    ]
