"""Which goals results reach, on times that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals
from benchmarks.goals import GOALS, MAIN, T16, T64, Bar, bars, last_state, main, newest
from benchmarks.results import Results, Row, Run, Writer
from benchmarks.workloads import WORKLOADS
from tests.benchmarks.rows import RUN

CPU = RUN
GPU = replace(RUN, device={"type": "cuda", "name": "Some GPU"})

Found = Mapping[tuple[str, str], Mapping[str, Any]]
"""What was measured of a provider on a workload."""


def row(workload: str, provider: str, **found: Any) -> Row:
    known = WORKLOADS[workload]
    facts = {"dtype": "bfloat16", "shape": known.shape, "settings": {}, "groups": known.groups, "check": "ok"}
    return Row(
        run=RUN.run, workload=workload, provider=provider, op="norm_pool", input_bytes=known.input_bytes,
        read_bytes=0, write_bytes=0, **{**facts, **found},
    )  # fmt: skip


def results(run: Run, found: Found) -> Results:
    return Results(run, [row(workload, provider, **values) for (workload, provider), values in found.items()])


def statuses(run: Run, found: Found) -> list[str]:
    return [bar.status for bar in bars([results(run, found)])]


def changed(found: Found, where: tuple[str, str], **values: Any) -> Found:
    return {**found, where: {**found[where], **values}}


# ---- a bar ----


@pytest.mark.parametrize(
    ("values", "at_most", "bar"),
    [
        ({"a": 2.0, "b": 3.0}, False, Bar("x", "met", "2 of 2, worst 2x at a")),
        ({"a": 2.0, "b": 1.99}, False, Bar("x", "not met", "2 of 2, worst 1.99x at b")),
        ({"a": 2.0, "b": None}, False, Bar("x", "not measured", "1 of 2, worst 2x at a")),
        ({"a": 1.0, "b": None}, False, Bar("x", "not met", "1 of 2, worst 1x at a")),
        ({"a": None, "b": None}, False, Bar("x", "not measured", "0 of 2")),
        ({}, False, Bar("x", "not measured", "0 of 0")),
        ({"a": 2.0, "b": 1.0}, True, Bar("x", "met", "2 of 2, worst 2x at a")),
        ({"a": 2.1, "b": 1.0}, True, Bar("x", "not met", "2 of 2, worst 2.1x at a")),
        ({"a": 0.0}, True, Bar("x", "met", "1 of 1, worst 0x at a")),
    ],
    ids=str,
)
def test_the_worst_value_decides(values: dict[str, float | None], at_most: bool, bar: Bar) -> None:
    assert Bar.of("x", values, 2.0, "x", at_most) == bar


# ---- CPU ----

POOL, GRID = "norm_pool:cpu:out", "grid_pool:cpu:out"
OURS = (POOL, GRID, "norm_pool:cpu", "grid_pool:cpu")
BUDGET = "budget-10x10"
ON_CPU: Found = {
    (T16, POOL): {"p50_us": 4_000.0, "percent_of_ceiling": 82.0},
    (T16, "avg_pool2d"): {"p50_us": 4_900.0},
    **{(name, "grid_pool:cpu"): {"p50_us": 25_000.0, "extra_peak_bytes": 1000, "overhead_us": 30.0} for name in GOALS},
    (T64, POOL): {"p50_us": 16_000.0, "percent_of_ceiling": 81.0, "overhead_us": 20.0},
    (T64, "norm_pool:cpu"): {"p50_us": 40_000.0, "overhead_us": 20.0},
    (T64, GRID): {"p50_us": 21_000.0, "overhead_us": 30.0},
    (T64, "avg_pool2d"): {"p50_us": 41_000.0},
    (T64, "llava_avg_pool"): {"p50_us": 500_000.0},
    (T64, "naive_norm_pool"): {"p50_us": 1_700_000.0},
    (T64, "naive_grid_pool"): {"p50_us": 4_000_000.0},
    ("llava-video-7b-fp32", POOL): {"p50_us": 30_000.0},
    ("llava-video-7b-fp32", "avg_pool2d"): {"p50_us": 30_001.0},
    (BUDGET, POOL): {"p50_us": 30_000.0},
}
"""With which every goal is met."""


def test_all_goals_of_a_cpu_are_met() -> None:
    assert statuses(CPU, ON_CPU) == ["met"] * 11
    assert statuses(CPU, {}) == ["not measured"] * 11


@pytest.mark.parametrize(
    ("where", "found", "missed"),
    [
        ((T16, "avg_pool2d"), {"p50_us": 4_799.0}, [0]),
        ((T64, "avg_pool2d"), {"p50_us": 39_999.0}, [1]),
        (("llava-video-7b-fp32", "avg_pool2d"), {"p50_us": 29_999.0}, [2]),
        ((T64, "llava_avg_pool"), {"p50_us": 239_999.0}, [3]),
        ((T64, "naive_grid_pool"), {"p50_us": 2_099_999.0}, [4]),
        ((T64, "naive_norm_pool"), {"p50_us": 1_599_999.0}, [5]),
        ((T64, POOL), {"percent_of_ceiling": 79.9}, [6]),
        ((T16, POOL), {"percent_of_ceiling": 79.9}, [7]),
        ((T64, GRID), {"p50_us": 21_601.0}, [8]),
        *(((T64, name), {"overhead_us": 80.1}, [9]) for name in OURS),
        *(((name, "grid_pool:cpu"), {"extra_peak_bytes": WORKLOADS[name].input_bytes // 4}, [10]) for name in GOALS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_goal_of_a_cpu_that_is_missed(where: tuple[str, str], found: dict[str, float], missed: list[int]) -> None:
    of = statuses(CPU, changed(ON_CPU, where, **found))
    assert of == ["not met" if number in missed else "met" for number in range(11)]


@pytest.mark.parametrize(
    ("where", "missing"),
    [
        ((T16, "avg_pool2d"), [0]),
        ((T64, "naive_norm_pool"), [5]),
        ((T64, POOL), [1, 3, 5, 6, 8, 9]),
        ((T64, "norm_pool:cpu"), [9]),
        (("llava-onevision-7b", "grid_pool:cpu"), [10]),
    ],
    ids=str,
)
@pytest.mark.parametrize("check", [None, "wrong: off by 1", "skipped: takes 3 GB"])
def test_what_is_missing_or_wrong_is_not_measured(
    where: tuple[str, str], missing: list[int], check: str | None
) -> None:
    found = {key: value for key, value in ON_CPU.items() if key != where}
    if check is not None:
        found[where] = {**ON_CPU[where], "check": check}
    of = statuses(CPU, found)
    assert [number for number, status in enumerate(of) if status != "met"] == missing
    assert {of[number] for number in missing} == {"not measured"}


def test_memory_is_a_share_of_the_input() -> None:
    at = {"extra_peak_bytes": WORKLOADS[T64].input_bytes // 5}
    assert bars([results(CPU, changed(ON_CPU, (T64, "grid_pool:cpu"), **at))])[10] == Bar(
        "grid_pool takes at most 20 % of x more", "met", f"4 of 4, worst 20 % at {T64}"
    )


# ---- GPU ----

PLAIN = ("llava_avg_pool", "avg_pool2d", "naive_grid_pool")
TIMES = {"grid_pool:triton": 9.0, "norm_pool:triton": 8.0, "grid_pool:cuda": 9.9, "norm_pool:cuda": 8.8,
         "llava_avg_pool": 20.0, "avg_pool2d": 20.0, "naive_grid_pool": 95.0, "compiled_grid_pool": 30.0}  # fmt: skip
ON_GPU: Found = {
    (workload, provider): {"p50_us": time, "percent_of_copy": 95.0, "extra_peak_bytes": 1000}
    for workload in MAIN
    for provider, time in TIMES.items()
    if provider != "compiled_grid_pool" or workload in GOALS
}
GOAL, OTHER = "llava-video-7b-ceil", "batch-8"


def test_all_goals_of_a_gpu_are_met() -> None:
    assert statuses(GPU, ON_GPU) == ["met"] * 7
    assert statuses(GPU, {}) == ["not measured"] * 7
    assert bars([results(GPU, {})])[0] == Bar("norm_pool reaches 92 % of a copy", "not measured", "0 of 4")


@pytest.mark.parametrize(
    ("where", "found", "missed"),
    [
        ((GOAL, "norm_pool:triton"), {"percent_of_copy": 91.9}, [0]),
        ((GOAL, "grid_pool:triton"), {"percent_of_copy": 84.9}, [1]),
        ((GOAL, "llava_avg_pool"), {"p50_us": 9.0}, [2, 3]),
        ((OTHER, "llava_avg_pool"), {"p50_us": 8.5}, [2, 3]),
        ((OTHER, "avg_pool2d"), {"p50_us": 8.5}, [3]),
        ((GOAL, "compiled_grid_pool"), {"p50_us": 8.9}, [3]),
        ((GOAL, "naive_grid_pool"), {"p50_us": 89.0}, [4]),
        ((OTHER, "naive_grid_pool"), {"p50_us": 89.0}, []),
        ((GOAL, "grid_pool:triton"), {"extra_peak_bytes": WORKLOADS[GOAL].input_bytes // 4}, [5]),
        ((GOAL, "norm_pool:cuda"), {"p50_us": 8.9}, [6]),
        ((GOAL, "grid_pool:cuda"), {"p50_us": 10.1}, [6]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_goal_of_a_gpu_that_is_missed(where: tuple[str, str], found: dict[str, float], missed: list[int]) -> None:
    of = bars([results(GPU, changed(ON_GPU, where, **found))])
    assert [bar.status for bar in of] == ["not met" if number in missed else "met" for number in range(7)]
    assert all(where[0] in of[number].detail for number in missed)


def test_a_gpu_without_some_results() -> None:
    found = changed(ON_GPU, (GOAL, "norm_pool:triton"), check="wrong: off by 1")
    found = {where: values for where, values in found.items() if where != (GOAL, "compiled_grid_pool")}
    assert statuses(GPU, found) == [
        "not measured", "met", "not measured", "not measured", "met", "met", "not measured",
    ]  # fmt: skip
    found = changed(found, ("llava-next-video-7b", "norm_pool:triton"), percent_of_copy=10.0)
    assert statuses(GPU, found)[0] == "not met"


def test_of_several_runs_the_last_counts() -> None:
    """Each may have measured a part."""
    items = list(ON_GPU.items())
    parts = [results(GPU, dict(items[::2])), results(GPU, dict(items[1::2]))]
    assert [bar.status for bar in bars(parts)] == ["met"] * 7
    again = results(GPU, {(GOAL, "norm_pool:triton"): {"p50_us": 8.0, "percent_of_copy": 10.0}})
    assert bars([*parts, again])[0].status == "not met"
    assert bars([again, *parts])[0].status == "met"


# ---- files of results ----


def write(path: Path, *found: Results) -> None:
    writer = Writer(path)
    for each in found:
        writer.write(each.run)
        for one in each.rows:
            writer.write(replace(one, run=each.run.run))
    writer.close()


def named(name: str, run: Run, found: Found, **settings: Any) -> Results:
    return results(replace(run, run=name, settings=settings), found)


def test_the_newest_of_every_machine(tmp_path: Path) -> None:
    """No quick ones, nor any without rows, nor those of other benchmarks."""
    assert newest(tmp_path) == []
    write(
        tmp_path / "cpu-b.jsonl",
        named("old", CPU, ON_CPU),
        named("new", CPU, ON_CPU, quick=False),
        named("quick", CPU, ON_CPU, quick=True),
        named("empty", CPU, {}),
    )
    write(tmp_path / "cpu-a.jsonl", named("quick", CPU, ON_CPU, quick=True))
    write(tmp_path / "cuda-c.jsonl", named("gpu", GPU, ON_GPU))
    write(tmp_path / "prefill-cuda-c.jsonl", named("prefill", GPU, ON_GPU))
    write(tmp_path / "tune-cuda-c.jsonl", named("tune", GPU, ON_GPU))
    (tmp_path / "cpu-b.json").write_text("{}")
    found = newest(tmp_path)
    assert [each.run.run for each in found] == ["new", "gpu"]
    assert [len(each.rows) for each in found] == [len(ON_CPU), len(ON_GPU)]


def test_a_library_that_is_built_later_belongs_to_the_same_code(tmp_path: Path) -> None:
    """Another one does not."""
    without, first, second = (
        replace(GPU, source={"package_sha256": "a", "library_sha256": library}) for library in (None, "b", "c")
    )
    path = tmp_path / "cuda-c.jsonl"
    triton, cuda = {(T64, "norm_pool:triton"): {"p50_us": 2.0}}, {(T64, "norm_pool:cuda"): {"p50_us": 3.0}}
    write(path, named("before", without, triton), named("built", first, cuda))
    last = last_state(path)
    assert last is not None
    assert [each.provider for each in last.rows] == ["norm_pool:triton", "norm_pool:cuda"]
    write(path, named("again", second, {(T64, "copy"): {"p50_us": 1.0}}))
    last = last_state(path)
    assert last is not None
    assert [each.provider for each in last.rows] == ["norm_pool:triton", "copy"]


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(goals, "newest", lambda: newest(tmp_path))
    missed = changed(ON_CPU, (T64, "avg_pool2d"), p50_us=39_999.0)
    path = tmp_path / "cpu-a.jsonl"
    write(path, named("met", CPU, ON_CPU), named("missed", CPU, missed), named("quick", CPU, {}, quick=True))
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("Some CPU, 4 cores, 1 thread")
    assert [line for line in lines if line.startswith("not met")] == [
        f"not met      norm_pool, out=, 2.5 times as fast as avg_pool2d: 1 of 1, worst 2.5x at {T64}"
    ]
    assert main([f"{path}@met"]) == 0
    assert main([f"{path}@quick"]) == 1
    capsys.readouterr()
    write(tmp_path / "cuda-b.jsonl", named("gpu", GPU, ON_GPU))
    assert main([f"{path}@met", str(tmp_path / "cuda-b.jsonl")]) == 0
    assert "Some GPU" in capsys.readouterr().out


def test_no_results_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(goals, "newest", lambda: newest(tmp_path / "none"))
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "there are no results in" in capsys.readouterr().err
