"""Goals are met, missed or not measured as results say, here by times that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.goals import GOALS, MAIN, PLAIN, SMALL, T16, T64, Goal, goals
from benchmarks.results import Results, Run
from benchmarks.workloads import WORKLOADS
from tests.benchmarks.rows import RUN, make_row

GPU = replace(RUN, device={"type": "cuda", "name": "Some GPU"})
Found = Mapping[tuple[str, str], Mapping[str, Any]]
"""Values by workload and provider."""


def statuses(run: Run, found: Found) -> list[str]:
    rows = [make_row(p, **{"check": "ok", **values}, workload=w) for (w, p), values in found.items()]
    return [goal.status for goal in goals(Results(run, rows))]


@pytest.mark.parametrize(
    ("values", "at_most", "goal"),
    [
        ({"a": 2.0, "b": 3.0}, False, Goal("x", "met", "2 of 2, worst 2x at a")),
        ({"a": 2.0, "b": 1.99}, False, Goal("x", "not met", "1 of 2, worst 1.99x at b")),
        ({"a": 2.0, "b": None}, False, Goal("x", "not measured", "1 of 1, worst 2x at a; 1 not measured")),
        ({"a": 1.0, "b": None}, False, Goal("x", "not met", "0 of 1, worst 1x at a; 1 not measured")),
        ({"a": None}, False, Goal("x", "not measured", "1 not measured")),
        ({"a": 2.1, "b": 0.0}, True, Goal("x", "not met", "1 of 2, worst 2.1x at a")),
        ({"a": 2.0, "b": 0.0}, True, Goal("x", "met", "2 of 2, worst 2x at a")),
    ],
    ids=str,
)
def test_the_worst_value_decides(values: dict[str, float | None], at_most: bool, goal: Goal) -> None:
    assert Goal.of("x", values, 2.0, "x", at_most) == goal


POOL, GRID = "norm_pool:cpu:out", "grid_pool:cpu:out"
EMPTY_US = {"op": 16.0, "op, inference mode": 12.0, "function": 20.0, "python op": 9.0}
"""The time in µs of calls on no frames, on warm caches. On cold ones an empty Python op takes 100, the others 150."""
ON_CPU: Found = {
    **{
        (name, provider): {"p50_us": us}
        for name in PLAIN
        for op, us in (("norm_pool:cpu", 90.0), ("grid_pool:cpu", 100.0), ("avg_pool2d", 100.0))
        for provider in (op, f"{op}:out")
    },
    **{(name, "grid_pool:cpu"): {"p50_us": 25_000.0, "extra_peak_bytes": 1000} for name in GOALS},
    **{
        ("empty", f"empty:{name}"): {"p50_us": 100.0 if name == "python op" else 150.0, "overhead_us": us}
        for name, us in EMPTY_US.items()
    },
    (T16, POOL): {"p50_us": 4_000.0, "percent_of_ceiling": 82.0},
    (T16, GRID): {"p50_us": 5_200.0},
    (T64, POOL): {"p50_us": 16_000.0, "percent_of_ceiling": 81.0},
    (T64, GRID): {"p50_us": 20_800.0},
    (T64, "norm_pool:cpu"): {"p50_us": 22_000.0},
    (T64, "avg_pool2d"): {"p50_us": 25_000.0},
    (T64, "avg_pool2d:out"): {"p50_us": 21_000.0},
    (T64, "llava_avg_pool"): {"p50_us": 500_000.0},
    (T64, "naive_norm_pool"): {"p50_us": 1_700_000.0},
    (T64, "naive_grid_pool"): {"p50_us": 4_000_000.0},
}
"""These results meet every goal."""

TIMES = {"grid_pool:triton": 9.0, "norm_pool:triton": 8.0, "grid_pool:cuda": 9.9, "norm_pool:cuda": 8.8,
         "llava_avg_pool": 20.0, "avg_pool2d": 20.0, "naive_grid_pool": 95.0, "compiled_grid_pool": 30.0}  # fmt: skip
ON_GPU: Found = {
    (workload, provider): {"p50_us": time, "percent_of_copy": 95.0, "extra_peak_bytes": 1000}
    for workload in MAIN
    for provider, time in TIMES.items()
    if provider != "compiled_grid_pool" or workload in GOALS
} | {(workload, "grid_pool:triton"): {"p50_us": 9.9} for workload in SMALL}
GOAL, OTHER = "llava-video-7b-ceil", "batch-8"
LARGE, FROM_1_MB, BELOW_1_MB = "64x27x27x4096:fp32:plain", "1x27x27x896:bf16:plain", "1x27x27x384:bf16:plain"
FOURTH_MORE = {"extra_peak_bytes": WORKLOADS[GOAL].input_bytes // 4}


@pytest.mark.parametrize(
    ("run", "where", "values", "missed"),
    [
        (RUN, (LARGE, "avg_pool2d"), {"p50_us": 89.9}, [0, 1]),
        (RUN, (LARGE, "grid_pool:cpu:out"), {"p50_us": 100.1}, [1]),
        (RUN, (FROM_1_MB, "norm_pool:cpu"), {"p50_us": 100.1}, [0]),
        (RUN, (FROM_1_MB, "grid_pool:cpu"), {"p50_us": 169.9}, []),
        (RUN, (FROM_1_MB, "grid_pool:cpu"), {"p50_us": 170.1}, [2]),
        (RUN, (BELOW_1_MB, "norm_pool:cpu:out"), {"p50_us": 170.1}, [2]),
        (RUN, (T64, "avg_pool2d:out"), {"p50_us": 20_799.0}, [1]),
        (RUN, (LARGE, "norm_pool:cpu:out"), {"p50_us": 64.0}, [3]),
        (RUN, (FROM_1_MB, "norm_pool:cpu:out"), {"p50_us": 64.0}, []),
        (RUN, (T64, POOL), {"percent_of_ceiling": 79.9}, [4]),
        (RUN, (T16, GRID), {"p50_us": 5_201.0}, [5]),
        (RUN, (T64, "llava_avg_pool"), {"p50_us": 329_999.0}, [6]),
        (RUN, (T64, "naive_norm_pool"), {"p50_us": 1_599_999.0}, [7]),
        (RUN, (T64, "naive_grid_pool"), {"p50_us": 2_079_999.0}, [8]),
        (RUN, (GOAL, "grid_pool:cpu"), FOURTH_MORE, [9]),
        (RUN, ("empty", "empty:op"), {"overhead_us": 16.1}, [10]),
        (RUN, ("empty", "empty:op, inference mode"), {"overhead_us": 12.1}, [11]),
        (RUN, ("empty", "empty:function"), {"overhead_us": 20.1}, [12]),
        (RUN, ("empty", "empty:python op"), {"p50_us": 99.0}, [13]),
        (GPU, (GOAL, "norm_pool:triton"), {"percent_of_copy": 91.9}, [0]),
        (GPU, (GOAL, "llava_avg_pool"), {"p50_us": 9.0}, [2, 3]),
        (GPU, (OTHER, "avg_pool2d"), {"p50_us": 8.5}, [3]),
        (GPU, (GOAL, "compiled_grid_pool"), {"p50_us": 8.9}, [3]),
        (GPU, (GOAL, "naive_grid_pool"), {"p50_us": 89.0}, [4]),
        (GPU, (OTHER, "naive_grid_pool"), {"p50_us": 89.0}, []),
        (GPU, (GOAL, "grid_pool:triton"), FOURTH_MORE, [5]),
        (GPU, (GOAL, "norm_pool:cuda"), {"p50_us": 8.9}, [6]),
        (GPU, ("8x27x27x896", "grid_pool:triton"), {"p50_us": 10.1}, [7]),
        (GPU, ("16x27x27x896", "grid_pool:triton"), {"p50_us": 14.1}, [8]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_change_of_results_that_meet_all_goals(
    run: Run, where: tuple[str, str], values: dict[str, float], missed: list[int]
) -> None:
    found = ON_CPU if run is RUN else ON_GPU
    assert set(statuses(run, found)) == {"met"}
    changed = statuses(run, {**found, where: {**found[where], **values}})
    assert [number for number, status in enumerate(changed) if status == "not met"] == missed


@pytest.mark.parametrize("check", [None, "wrong: off by 1"])
def test_what_is_missing_or_wrong_is_not_measured(check: str | None) -> None:
    found = {key: value for key, value in ON_CPU.items() if key != (T64, POOL)}
    if check is not None:
        found[T64, POOL] = {**ON_CPU[T64, POOL], "check": check}
    unknown = [number for number, status in enumerate(statuses(RUN, found)) if status == "not measured"]
    assert unknown == [0, 3, 4, 5, 6, 7]
