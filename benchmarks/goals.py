"""Which goals results reach: python -m benchmarks.goals [--tables] [FILE | FILE@RUN ...]. Exits with 0 if all are met.

Takes what `stgp bench` wrote: of a file what was measured last of one state of the code; without a file that of every
machine in benchmarks/results. --tables prints the results first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.report import machine_line, workload_table
from benchmarks.results import Results, Row, load, pick
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).with_name("results")

GOALS = [name for name, workload in WORKLOADS.items() if workload.goal]
MAIN = [name for name, workload in WORKLOADS.items() if "main" in workload.groups]
T16, T64 = "16x27x27x3584", "llava-video-7b"


@dataclass(frozen=True)
class Bar:
    """A goal; status: met, not met or not measured."""

    name: str
    status: str
    detail: str

    @staticmethod
    def of(name: str, values: Mapping[str, float | None], limit: float, unit: str, at_most: bool = False) -> Bar:
        """One value for each shape, None where there is none: met if all are there and keep to the limit, not met as
        soon as one does not."""
        measured = {where: value for where, value in values.items() if value is not None}
        if not measured:
            return Bar(name, "not measured", f"0 of {len(values)}")
        where = (max if at_most else min)(measured, key=measured.__getitem__)
        reached = measured[where] <= limit if at_most else measured[where] >= limit
        status = "not met" if not reached else "met" if len(measured) == len(values) else "not measured"
        return Bar(name, status, f"{len(measured)} of {len(values)}, worst {measured[where]:.3g}{unit} at {where}")


def bars(results: Sequence[Results]) -> list[Bar]:
    """The goals of a device, by one or more runs on it; of what they share the last counts."""
    found = Found(results)
    return gpu_bars(found) if results[-1].run.device["type"] == "cuda" else cpu_bars(found)


class Found:
    """What was measured and right."""

    def __init__(self, results: Iterable[Results]) -> None:
        rows = [row for each in results for row in each.rows]
        self.rows: dict[tuple[str, str], Row] = {(row.workload, row.provider): row for row in rows if row.check == "ok"}

    def value(self, workload: str, provider: str, key: str) -> float | None:
        row = self.rows.get((workload, provider))
        found: float | None = None if row is None else getattr(row, key)
        return found

    def speedup(self, workload: str, other: str, ours: Sequence[str]) -> float | None:
        """How many times as fast the slowest of ours is as another one."""
        times = [self.value(workload, name, "p50_us") for name in (other, *ours)]
        known = [time for time in times if time is not None]
        return known[0] / max(known[1:]) if len(known) == len(times) else None


def cpu_bars(found: Found) -> list[Bar]:
    pool, grid = "norm_pool:cpu:out", "grid_pool:cpu:out"

    def times(workload: str, other: str, ours: str) -> dict[str, float | None]:
        return {workload: found.speedup(workload, other, [ours])}

    def of_ceiling(workload: str) -> dict[str, float | None]:
        return {workload: found.value(workload, pool, "percent_of_ceiling")}

    ours = (pool, grid, "norm_pool:cpu", "grid_pool:cpu")
    overhead = {name: found.value(T64, name, "overhead_us") for name in ours}
    both = [name for name in WORKLOADS if (name, pool) in found.rows and (name, "avg_pool2d") in found.rows]
    plain = {name: found.speedup(name, "avg_pool2d", [pool]) for name in both}
    return [
        Bar.of("norm_pool, out=, 1.2 times as fast as avg_pool2d", times(T16, "avg_pool2d", pool), 1.2, "x"),
        Bar.of("norm_pool, out=, 2.5 times as fast as avg_pool2d", times(T64, "avg_pool2d", pool), 2.5, "x"),
        Bar.of("norm_pool, out=, never slower than avg_pool2d", plain, 1, "x"),
        Bar.of("norm_pool, out=, 15 times as fast as LLaVA's", times(T64, "llava_avg_pool", pool), 15, "x"),
        Bar.of("grid_pool, out=, 100 times as fast as eager", times(T64, "naive_grid_pool", grid), 100, "x"),
        Bar.of("norm_pool, out=, 100 times as fast as eager", times(T64, "naive_norm_pool", pool), 100, "x"),
        Bar.of("norm_pool, out=, reaches 80 % of the ceiling", of_ceiling(T64), 80, " %"),
        Bar.of("and with 16 frames", of_ceiling(T16), 80, " %"),
        Bar.of("grid_pool, out=, within 1.35 of norm_pool, out=", times(T64, grid, pool), 1.35, "x", True),
        Bar.of("a call on one frame of 9 x 9 x 384 within 80 us", overhead, 80, " us", at_most=True),
        Bar.of("grid_pool takes at most 20 % of x more", memory(found, "grid_pool:cpu"), 20, " %", at_most=True),
    ]


def memory(found: Found, provider: str) -> dict[str, float | None]:
    extra = {name: found.value(name, provider, "extra_peak_bytes") for name in GOALS}
    return {name: None if b is None else 100 * b / WORKLOADS[name].input_bytes for name, b in extra.items()}


def gpu_bars(found: Found) -> list[Bar]:
    ours = norm_pool, grid_pool = "norm_pool:triton", "grid_pool:triton"
    plain = ("llava_avg_pool", "avg_pool2d", "naive_grid_pool")

    def of_copy(provider: str) -> dict[str, float | None]:
        return {name: found.value(name, provider, "percent_of_copy") for name in GOALS}

    def faster(workloads: Iterable[str], others: Iterable[str], ours: Sequence[str] = ours) -> dict[str, float | None]:
        pairs = [(workload, other) for other in others for workload in workloads]
        return {f"{workload} {other}": found.speedup(workload, other, ours) for workload, other in pairs}

    every = faster(MAIN, plain) | faster(GOALS, ["compiled_grid_pool"])
    more = 1 + 1e-9  # equal is not faster
    cuda = {
        f"{name} {op}": found.speedup(name, f"{op}:triton", [f"{op}:cuda"])
        for op in ("grid_pool", "norm_pool")
        for name in GOALS
    }
    return [
        Bar.of("norm_pool reaches 92 % of a copy", of_copy(norm_pool), 92, " %"),
        Bar.of("grid_pool reaches 85 % of a copy", of_copy(grid_pool), 85, " %"),
        Bar.of("both faster than LLaVA's average pooling", faster(MAIN, ["llava_avg_pool"]), more, "x"),
        Bar.of("both faster than every contender", every, more, "x"),
        Bar.of("grid_pool 10 times as fast as eager code", faster(GOALS, ["naive_grid_pool"], [grid_pool]), 10, "x"),
        Bar.of("grid_pool takes at most 20 % of x more", memory(found, grid_pool), 20, " %", at_most=True),
        Bar.of("CUDA C++ reaches 90 % of Triton's speed", cuda, 0.9, "x"),
    ]


def newest(folder: Path = RESULTS) -> list[Results]:
    """What was measured last of every machine, ordered by its file's name."""
    found = (last_state(path, T64) for path in sorted([*folder.glob("cpu-*.jsonl"), *folder.glob("cuda-*.jsonl")]))
    return [results for results in found if results is not None]


def last_state(path: Path, workload: str | None = None) -> Results | None:
    """All runs of a file that belong to one state of the code, the last one that this workload was timed in, with its
    library or before there was one. Quick runs are left out, and with them those of other configurations; where two
    measured the same, the later one counts."""
    states: dict[str, list[Results]] = {}
    for results in load(path):
        if results.rows and not results.run.settings.get("quick"):
            states.setdefault(str(results.run.source.get("package_sha256")), []).append(results)
    whole = [runs for runs in states.values() if workload is None or any(workload in each.workloads for each in runs)]
    if not whole:
        return None
    last = max(whole, key=lambda runs: runs[-1].run.utc)
    libraries = (None, last[-1].run.source.get("library_sha256"))
    return merged([results for results in last if results.run.source.get("library_sha256") in libraries])


def merged(runs: Sequence[Results]) -> Results:
    """Several runs as one, with the last one's name and date."""
    rows = {(row.workload, row.provider): row for results in runs for row in results.rows}
    return Results(runs[-1].run, list(rows.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--tables", action="store_true", help="print the results first")
    parser.add_argument("results", nargs="*", metavar="FILE", help="FILE, or FILE@RUN for a run that is not the last")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    asked = [pick(name) if "@" in name else last_state(Path(name)) for name in given.results]
    chosen = [results for results in asked if results is not None] if asked else newest()
    if not chosen:
        parser.error(f"there are no results in {', '.join(given.results) or RESULTS}")
    statuses = set()
    for results in chosen:
        console.print(machine_line(results.run), markup=False, soft_wrap=True)
        for name in results.workloads if given.tables else ():
            console.print(workload_table([row for row in results.rows if row.workload == name], console.width))
        for bar in bars([results]):
            statuses.add(bar.status)
            console.print(f"{bar.status:12} {bar.name}: {bar.detail}", markup=False, soft_wrap=True)
    return 0 if statuses == {"met"} else 1


if __name__ == "__main__":
    sys.exit(main())
