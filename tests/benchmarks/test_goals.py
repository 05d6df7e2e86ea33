"""Goals are met, missed or not measured as results say, here by times that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.goals import GOALS, MAIN, ONE_FRAME, T16, T64, Goal, goals
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
        ({"a": 2.0, "b": 1.99}, False, Goal("x", "not met", "2 of 2, worst 1.99x at b")),
        ({"a": 2.0, "b": None}, False, Goal("x", "not measured", "1 of 2, worst 2x at a")),
        ({"a": None}, False, Goal("x", "not measured", "0 of 1")),
        ({"a": 2.1, "b": 0.0}, True, Goal("x", "not met", "2 of 2, worst 2.1x at a")),
        ({"a": 2.0, "b": 0.0}, True, Goal("x", "met", "2 of 2, worst 2x at a")),
    ],
    ids=str,
)
def test_the_worst_value_decides(values: dict[str, float | None], at_most: bool, goal: Goal) -> None:
    assert Goal.of("x", values, 2.0, "x", at_most) == goal


POOL, GRID = "norm_pool:cpu:out", "grid_pool:cpu:out"
ON_CPU: Found = {
    (T16, POOL): {"p50_us": 4_000.0, "percent_of_ceiling": 82.0},
    (T16, "avg_pool2d"): {"p50_us": 4_900.0},
    **{(name, "grid_pool:cpu"): {"p50_us": 25_000.0, "extra_peak_bytes": 1000} for name in GOALS},
    **{(ONE_FRAME, p): {"p50_us": 200.0, "overhead_us": 30.0} for p in (POOL, GRID, "norm_pool:cpu", "grid_pool:cpu")},
    (T64, POOL): {"p50_us": 16_000.0, "percent_of_ceiling": 81.0},
    (T64, GRID): {"p50_us": 21_000.0},
    (T64, "avg_pool2d"): {"p50_us": 41_000.0},
    (T64, "llava_avg_pool"): {"p50_us": 500_000.0},
    (T64, "naive_norm_pool"): {"p50_us": 1_700_000.0},
    (T64, "naive_grid_pool"): {"p50_us": 4_000_000.0},
    ("llava-video-7b-fp32", POOL): {"p50_us": 30_000.0},
    ("llava-video-7b-fp32", "avg_pool2d"): {"p50_us": 30_001.0},
    (ONE_FRAME, "avg_pool2d"): {"p50_us": 20.0},
}
"""These results meet every goal. One frame is too little to be compared with avg_pool2d."""

TIMES = {"grid_pool:triton": 9.0, "norm_pool:triton": 8.0, "grid_pool:cuda": 9.9, "norm_pool:cuda": 8.8,
         "llava_avg_pool": 20.0, "avg_pool2d": 20.0, "naive_grid_pool": 95.0, "compiled_grid_pool": 30.0}  # fmt: skip
ON_GPU: Found = {
    (workload, provider): {"p50_us": time, "percent_of_copy": 95.0, "extra_peak_bytes": 1000}
    for workload in MAIN
    for provider, time in TIMES.items()
    if provider != "compiled_grid_pool" or workload in GOALS
}
GOAL, OTHER = "llava-video-7b-ceil", "batch-8"
FOURTH_MORE = {"extra_peak_bytes": WORKLOADS[GOAL].input_bytes // 4}


@pytest.mark.parametrize(
    ("run", "where", "values", "missed"),
    [
        (RUN, (T16, "avg_pool2d"), {"p50_us": 4_799.0}, [0]),
        (RUN, ("llava-video-7b-fp32", "avg_pool2d"), {"p50_us": 29_999.0}, [2]),
        (RUN, (T64, "llava_avg_pool"), {"p50_us": 239_999.0}, [3]),
        (RUN, (T64, "naive_grid_pool"), {"p50_us": 2_099_999.0}, [4]),
        (RUN, (T64, POOL), {"percent_of_ceiling": 79.9}, [6]),
        (RUN, (T64, GRID), {"p50_us": 21_601.0}, [8]),
        (RUN, (ONE_FRAME, "grid_pool:cpu"), {"overhead_us": 80.1}, [9]),
        (RUN, (GOAL, "grid_pool:cpu"), FOURTH_MORE, [10]),
        (GPU, (GOAL, "norm_pool:triton"), {"percent_of_copy": 91.9}, [0]),
        (GPU, (GOAL, "llava_avg_pool"), {"p50_us": 9.0}, [2, 3]),
        (GPU, (OTHER, "avg_pool2d"), {"p50_us": 8.5}, [3]),
        (GPU, (GOAL, "compiled_grid_pool"), {"p50_us": 8.9}, [3]),
        (GPU, (GOAL, "naive_grid_pool"), {"p50_us": 89.0}, [4]),
        (GPU, (OTHER, "naive_grid_pool"), {"p50_us": 89.0}, []),
        (GPU, (GOAL, "grid_pool:triton"), FOURTH_MORE, [5]),
        (GPU, (GOAL, "norm_pool:cuda"), {"p50_us": 8.9}, [6]),
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
    assert unknown == [1, 3, 5, 6, 8]
