"""The one command for GPUs, as far as no GPU is needed: bounds, goals, reports, deadlines, and timing on a stand-in."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stgridpool_kernels as stgp
from benchmarks import gpu_bench, gpu_check, gpu_report
from benchmarks.contenders import (
    CHOICES,
    WORKLOADS,
    Contender,
    Workload,
    contenders,
    mismatch,
    op_by_op_grid_pool,
    random_tokens,
    variants,
)
from benchmarks.gpu_bench import Row, Run, measure, take_turns
from benchmarks.gpu_check import Finished, Outcome, Stage, run_limited, run_stages
from benchmarks.gpu_report import Bar, bars, format_table, new_results_file, save
from benchmarks.lower_bound import lower_bound, tokens_read
from stgridpool_kernels import grid_plan

ROOT = Path(__file__).parents[1]

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="triton is not installed, or runs on a GPU",
)


# ---- lower bound ----


@pytest.mark.parametrize(
    ("name", "read_mb", "write_mb"),
    [
        ("64x27x27x3584", 305.6, 77.5),
        ("64x27x27x3584-ceil", 326.0, 89.9),
        ("32x27x27x3584-ceil", 163.0, 45.0),
        ("64x24x24x4096", 302.0, 75.5),
    ],
)
def test_lower_bound(name: str, read_mb: float, write_mb: float) -> None:
    bound = WORKLOADS[name].bound("grid_pool")
    assert (round(bound.read_bytes / 1e6, 1), round(bound.write_bytes / 1e6, 1)) == (read_mb, write_mb)


def test_lower_bound_of_norm_pool_is_its_windows() -> None:
    bound = WORKLOADS["64x27x27x3584"].bound("norm_pool")
    assert (bound.read_bytes, bound.write_bytes) == (64 * 26 * 26 * 3584 * 2, 64 * 13 * 13 * 3584 * 2)
    plan = grid_plan((3,), 5, 7, frame_strides=(), kernel_size=3, padding=1)
    assert lower_bound(plan, 10, 4).read_bytes == 3 * 5 * 7 * 10 * 4


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"ceil_mode": True},
        {"frame_strides": (1, 2), "grid_shape": (1, 2, 3, 1), "output_size": (2, 3)},
        {"resize": "bilinear", "sampling": "first", "frame_strides": (1, 3)},
    ],
    ids=str,
)
def test_tokens_read_are_those_that_matter(arguments: dict[str, Any]) -> None:
    """NaN in any token spoils the result exactly if the token counts as read."""
    T, H, W = 33, 5, 7
    needed = tokens_read(grid_plan((T,), H, W, **arguments))
    x = random_tokens((T, H, W, 1), torch.float64, "cpu", 0)
    unread = x.masked_fill(torch.from_numpy(~needed)[..., None], float("nan"))
    assert stgp.grid_pool(unread, **arguments).isfinite().all()
    for place in map(tuple, np.argwhere(needed)[::37]):
        spoiled = x.clone()
        spoiled[place] = float("nan")
        assert stgp.grid_pool(spoiled, **arguments).isnan().any(), place


# ---- timing, on a stand-in for a device ----


class StandIn:
    """A CPU whose clock is made up: each sampler takes the next of `times_us` per call."""

    name = "cpu"
    l2_bytes = 3_000

    def __init__(self, *times_us: float) -> None:
        self.times_us = iter(times_us)
        self.captured: list[int] = []
        self.broken = False

    def sampler(self, calls: Sequence[Run]) -> Callable[[], float]:
        time_us = next(self.times_us)
        self.captured.append(len(calls))

        def sample() -> float:
            for call in calls:
                call()
            return time_us

        return sample

    def wall_us(self, calls: Sequence[Run]) -> float:
        return 500.0

    def extra_peak_bytes(self, call: Callable[[], Tensor]) -> int:
        return 4 * call().numel()

    def do_bench_us(self, call: Run) -> list[float]:
        return [3.0, 2.0, 4.0]

    def check_alive(self) -> None:
        if self.broken:
            raise RuntimeError("the device does not answer")


SMALL = Workload("small", (9,), 5, 8)


def pooling(name: str, call: Callable[..., Tensor] = stgp.grid_pool, **given: Any) -> Contender:
    return Contender(name, "grid_pool", call, stgp.grid_pool, 2, **given)


def measured(device: StandIn, *timed: Contender) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    measure(SMALL, timed, device, lambda row: rows.update({row.contender: row}))
    return rows


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take_turns, "__defaults__", (0.0,))
    monkeypatch.setattr(gpu_bench, "ROUNDS", 8)


def test_rows_of_right_contenders() -> None:
    device = StandIn(2.0, 4.0, 3.0)
    rows = measured(device, pooling("grid_pool", takes_out=True), pooling("eager"))
    bound = SMALL.bound("grid_pool")
    total = bound.read_bytes + bound.write_bytes
    assert {name: row.check for name, row in rows.items()} == {"copy": "ok", "grid_pool": "ok", "eager": "ok"}
    assert [rows[name].percent_of_copy for name in ("copy", "grid_pool", "eager")] == pytest.approx([100, 50, 200 / 3])
    row = rows["grid_pool"]
    assert row.p20_us == row.p50_us == row.p80_us == 4.0
    assert row.lower_bound_gb_per_s == pytest.approx(total / 4e3)
    assert row.copy_gb_per_s == pytest.approx(total / 2e3)
    assert (row.samples, row.eager_wall_us, row.extra_peak_bytes) == (8, 500.0, 4 * 9 * 2 * 2 * 8)
    assert row.do_bench_p50_p20_p80_us == [3.0, 2.0, 4.0]
    assert json.loads(json.dumps(asdict(row)))["shape"] == [9, 5, 5, 8]


def test_inputs_exceed_the_cache_and_all_are_in_a_graph() -> None:
    device = StandIn(2.0, 4.0)
    row = measured(device, pooling("grid_pool"))["grid_pool"]
    assert row.rotating_sets is not None
    assert row.rotating_sets * (SMALL.input_bytes + SMALL.bound("grid_pool").write_bytes) >= 5 * device.l2_bytes
    assert row.calls_per_sample == device.captured[1]
    assert device.captured[1] % row.rotating_sets == 0


def returns_nan(x: Tensor) -> Tensor:
    return stgp.grid_pool(x) * float("nan")


def misses_a_frame(x: Tensor) -> Tensor:
    result = stgp.grid_pool(x)
    result[4] = 0
    return result


def writes_nothing(x: Tensor, out: Tensor | None = None) -> Tensor:
    return stgp.grid_pool(x) if out is None else out


@pytest.mark.parametrize(
    "call", [stgp.norm_pool, returns_nan, misses_a_frame, stgp.temporal_grid], ids=lambda call: call.__name__
)
def test_wrong_results_are_not_timed(call: Callable[..., Tensor]) -> None:
    rows = measured(StandIn(2.0, 4.0), pooling("bad", call), pooling("grid_pool"))
    assert rows["bad"].check.startswith("wrong: ")
    assert rows["bad"].p50_us is None
    assert rows["grid_pool"].p50_us == 4.0


def test_unwritten_output_is_wrong() -> None:
    rows = measured(StandIn(2.0), pooling("bad", writes_nothing, takes_out=True))
    assert rows["bad"].check.startswith("wrong: off by nan")


def test_results_that_go_wrong_while_timed_are_not_reported() -> None:
    count = 0

    def breaks(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return stgp.grid_pool(x) if count < 30 else torch.zeros_like(stgp.grid_pool(x))

    row = measured(StandIn(2.0, 4.0), pooling("bad", breaks))["bad"]
    assert row.check.startswith("wrong: ")
    assert (row.p50_us, row.percent_of_copy) == (None, None)


def test_a_failing_contender_does_not_stop_the_others() -> None:
    def fails(x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel\nfor this")

    rows = measured(StandIn(2.0, 4.0), pooling("bad", fails), pooling("grid_pool"))
    assert rows["bad"].check == "failed: NotImplementedError: no kernel"
    assert rows["grid_pool"].check == "ok"


def test_a_broken_device_stops_them() -> None:
    device = StandIn(2.0)
    device.broken = True
    with pytest.raises(RuntimeError, match="does not answer"):
        measured(device, pooling("bad", returns_nan))


def test_slow_samplers_have_fewer_turns() -> None:
    order: list[str] = []

    def sampler(name: str, time_us: float) -> Callable[[], float]:
        return lambda: (order.append(name), time_us)[1]

    times = take_turns({"copy": sampler("copy", 1.0), "fast": sampler("fast", 2.0), "slow": sampler("slow", 1e5)})
    assert {name: len(found) for name, found in times.items()} == {"copy": 8, "fast": 8, "slow": 7}
    assert order[3:9] == ["copy", "fast", "slow"] * 2


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("frame_counts", [(33,), (9, 16, 8)], ids=["one video", "packed"])
def test_contenders_compute_their_definitions(frame_counts: tuple[int, ...], ceil_mode: bool) -> None:
    """All but the ones that need a GPU, and what torch.compile is given."""
    workload = Workload("odd", frame_counts, 7, 24, ceil_mode=ceil_mode)
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    for contender in contenders(workload, compiled=False)[2:]:
        assert mismatch(contender.call(x), contender.definition(x), contender.ulps) is None, contender.name
    expected = stgp.grid_pool(x, ceil_mode=ceil_mode, **workload.packing)
    assert mismatch(op_by_op_grid_pool(workload.plan("grid_pool"), "cpu")(x), expected, 2) is None


# ---- goals and table ----


def row(workload: str, contender: str, **found: Any) -> dict[str, Any]:
    made = Row.of(WORKLOADS[workload], contender, WORKLOADS[workload].bound("norm_pool"))
    return asdict(made) | {"check": "ok", **found}


def all_rows() -> gpu_report.Rows:
    """Timings with which every goal is met."""
    times = {"grid_pool": 9.0, "norm_pool": 8.0, "torch_compile_grid_pool": 30.0, "naive_grid_pool": 95.0}
    times |= {"cuda_grid_pool": 9.9, "cuda_norm_pool": 8.8}
    names = (*gpu_report.OURS, *gpu_report.CUDA, *gpu_report.PLAIN, "torch_compile_grid_pool")
    return {
        (w, name): row(w, name, p50_us=times.get(name, 20.0), percent_of_copy=95.0, extra_peak_bytes=1000)
        for w in WORKLOADS
        for name in names
    }


def statuses(rows: gpu_report.Rows) -> list[str]:
    return [bar.status for bar in bars(rows)]


def test_all_goals_met() -> None:
    assert statuses(all_rows()) == ["met"] * 7


def test_nothing_measured() -> None:
    assert statuses({}) == ["not measured"] * 7
    assert bars({})[0] == Bar("norm_pool reaches 92 % of a copy", "not measured", "0 of 4")


GOAL = "64x27x27x3584-ceil"


@pytest.mark.parametrize(
    ("contender", "found", "missed"),
    [
        ("norm_pool", {"percent_of_copy": 91.9}, [0]),
        ("grid_pool", {"percent_of_copy": 84.9}, [1]),
        ("llava_avg_pool", {"p50_us": 9.0}, [2, 3]),
        ("torch_compile_grid_pool", {"p50_us": 8.9}, [3]),
        ("naive_grid_pool", {"p50_us": 89.0}, [4]),
        ("grid_pool", {"extra_peak_bytes": WORKLOADS[GOAL].input_bytes // 4}, [5]),
        ("cuda_norm_pool", {"p50_us": 8.9}, [6]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_one_shape_below_a_goal(contender: str, found: dict[str, Any], missed: list[int]) -> None:
    rows = all_rows()
    rows[GOAL, contender] |= found
    assert [i for i, status in enumerate(statuses(rows)) if status == "not met"] == missed
    assert all(GOAL in bars(rows)[i].detail for i in missed)


def test_missing_and_wrong_results_are_not_measured() -> None:
    rows = all_rows()
    rows[GOAL, "norm_pool"]["check"] = "wrong: off by 1"
    del rows[GOAL, "torch_compile_grid_pool"]
    assert statuses(rows) == ["not measured", "met", "not measured", "not measured", "met", "met", "not measured"]
    rows["64x24x24x4096", "norm_pool"]["percent_of_copy"] = 10.0
    assert statuses(rows)[0] == "not met"


def test_table() -> None:
    name = "64x24x24x4096"
    times = {
        "p50_us": 100.04,
        "p20_us": 99.0,
        "p80_us": 101.0,
        "lower_bound_gb_per_s": 3773.4,
        "percent_of_copy": 87.64,
    }
    found = {"eager_wall_us": 180.0, "extra_peak_bytes": 60_200_000, "kernel_launches": 4}
    rows = {
        (name, "copy"): row(name, "copy"),
        (name, "grid_pool"): row(name, "grid_pool", **times, **found, do_bench_p50_p20_p80_us=[103.0, 102.0, 105.5]),
        (name, "norm_pool"): row(name, "norm_pool", check="wrong: off by 3"),
    }
    assert format_table(rows).splitlines() == [
        "64x24x24x4096 bfloat16",
        "                             p50 us      p20      p80   GB/s  % copy  eager us  extra MB  kernels",
        "  grid_pool                   100.0     99.0    101.0   3773    87.6     180.0      60.2        4",
        "    do_bench: 103.0 us (102.0 to 105.5)",
        "  norm_pool                       -        -        -      -       -         -         -        -",
        "    wrong: off by 3",
        "  copy                            -        -        -      -       -         -         -        -",
    ]


# ---- results ----


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    utc = datetime(2026, 11, 22, 12, 0, 0, tzinfo=timezone.utc)
    paths = [new_results_file(tmp_path / "results", "NVIDIA H200", utc) for _ in range(3)]
    assert [path.name for path in paths] == [
        "gpu-nvidia-h200-20261122T120000Z.json",
        "gpu-nvidia-h200-20261122T120000Z-2.json",
        "gpu-nvidia-h200-20261122T120000Z-3.json",
    ]
    out = tmp_path / "out"
    out.mkdir()
    save({"rows": []}, paths[1], out)
    save({"rows": [1]}, paths[1], out)
    assert json.loads(paths[1].read_text()) == {"rows": [1]} == json.loads((out / paths[1].name).read_text())
    assert paths[0].read_text() == paths[2].read_text() == ""
    assert len(list((tmp_path / "results").iterdir())) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu() -> None:
    before = set(gpu_check.RESULTS.glob("*"))
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stage", "bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "no CUDA device: nothing was measured\n"
    assert set(gpu_check.RESULTS.glob("*")) == before


# ---- stages ----


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_stages_share_the_time(tmp_path: Path) -> None:
    """A stage gets its own and what is left over; one that overruns takes from the last, one that fails nothing."""
    now, given, reported = FakeTime(), [], []

    def stage(name: str, seconds: float, takes: float, outcome: Outcome | Exception) -> Stage:
        def run(allowed: float, logs: Path) -> Outcome:
            given.append(round(allowed))
            now.seconds += takes
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return Stage(name, seconds, run)

    passed = Outcome("passed", "")
    stages = [
        stage("a", 30, 10, passed),
        stage("b", 20, 1, KeyError("x")),
        stage("c", 30, 85, passed),
        stage("d", 10, 1, passed),
    ]
    run_stages(stages, 90, tmp_path, lambda stage, outcome, took: reported.append((outcome.status, took)), now)
    assert given == [30, 40, 69]
    assert reported == [("passed", 10), ("failed", 1), ("passed", 85), ("unfinished", 0)]


def run_main(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, outcome: str = "passed"
) -> tuple[int, Any]:
    ran: list[str] = []

    def fake(name: str) -> Stage:
        def run(seconds: float, logs: Path) -> Outcome:
            ran.append(name)
            rows = [row(GOAL, "grid_pool", percent_of_copy=90.0)] if name == "bench" else []
            return Outcome(outcome, "said so", {"rows": rows})

        return Stage(name, 10, run)

    monkeypatch.setattr(gpu_check, "STAGES", [fake(stage.name) for stage in gpu_check.STAGES])
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "describe", lambda: {"device": {"name": "Some GPU"}, "versions": {"torch": "2"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OUT", str(tmp_path))
    return gpu_check.main(arguments), ran


def test_all_stages_run_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, ran = run_main(monkeypatch, tmp_path)
    assert (code, ran) == (0, ["build", "tests", "sanitizer", "bench", "counters"])
    (path,) = (tmp_path / "results").iterdir()
    report = json.loads(path.read_text())
    assert report == json.loads((tmp_path / path.name).read_text())
    assert path.name.startswith("gpu-some-gpu-")
    assert report["stages"]["bench"]["status"] == "passed"
    assert report["rows"][0]["percent_of_copy"] == 90.0
    assert report["bars"][1]["status"] == "not measured"


def test_chosen_stages_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    code, ran = run_main(monkeypatch, tmp_path, "--stage", "bench", "tests", "--json", str(path), outcome="unfinished")
    assert (code, ran) == (1, ["tests", "bench"])
    assert set(json.loads(path.read_text())["stages"]) == {"tests", "bench"}
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path, "--json", str(path))


def test_skipped_stages_are_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_main(monkeypatch, tmp_path, outcome="skipped")[0] == 0
    assert run_main(monkeypatch, tmp_path, outcome="failed")[0] == 1


# ---- processes ----


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_and_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("earlier\n")
    done = run_limited(python("import os; print(os.environ['A']); raise SystemExit(3)"), 20, log, {"A": "b"})
    assert done == Finished(3, "b\n")
    assert log.read_text() == "earlier\nb\n"


def test_a_process_that_overruns_may_say_how_far_it_came(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('12 passed')"
    begin = time.monotonic()
    assert run_limited(python(code), 20, tmp_path / "log", patience=17) == Finished(None, "12 passed\n")
    assert time.monotonic() - begin < 15


def test_a_process_that_does_not_listen_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid); {child}"
    begin = time.monotonic()
    done = run_limited(python(code), 3.5, tmp_path / "log", patience=0.5)
    assert done.code is None
    assert time.monotonic() - begin < 15
    for _ in range(50):  # until whoever has inherited it has noticed
        state = Path(f"/proc/{done.output.strip()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(int(done.output), signal.SIGKILL)
        pytest.fail("the child is alive")


# ---- what tools print ----

PYTEST = """tests/test_gpu.py::test_a[x y] PASSED                     [ 30%]
[gw1] [ 60%] FAILED tests/test_gpu.py::test_b
tests/test_gpu.py::test_c SKIPPED (one CUDA device only)  [100%]
"""
SUMMARY = """FAILED tests/test_gpu.py::test_b - assert 1 == 2
======== 1 failed, 1 passed, 1 skipped, 7 deselected, 2 warnings in 61.20s (0:01:01) ========
"""


def test_pytest_summary_is_read() -> None:
    found = gpu_check.read_pytest(Finished(1, PYTEST + SUMMARY))
    assert found["status"] == "failed"
    assert found["counts"] == {"failed": 1, "passed": 1, "skipped": 1}
    assert found["failures"] == ["tests/test_gpu.py::test_b - assert 1 == 2"]


def test_pytest_that_was_killed_is_counted() -> None:
    found = gpu_check.read_pytest(Finished(None, PYTEST.replace("FAILED", "PASSED")))
    assert (found["status"], found["summary"]) == ("unfinished", "2 passed, 1 skipped until the time was over")


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "==== 5 passed in 1.00s ====\n", "passed"),
        (None, "==== 5 passed in 1.00s ====\n", "unfinished"),
        (0, "==== 5 skipped in 1.00s ====\n", "failed"),
        (5, "==== no tests ran in 1.00s ====\n", "failed"),
        (4, "ERROR: file or directory not found: tests/x.py\n", "failed"),
        (1, "==== 5 passed, 1 error in 1.00s ====\n", "failed"),
        (-11, "==== 5 passed in 1.00s ====\nSegmentation fault\n", "failed"),
    ],
)
def test_pytest_outcomes(code: int | None, output: str, status: str) -> None:
    assert gpu_check.read_pytest(Finished(code, output))["status"] == status


RIGHT = gpu_bench.SMALL_CALLS_RIGHT


@pytest.mark.parametrize(
    ("check", "code", "output", "status"),
    [
        ("memcheck", 0, f"{RIGHT}\n========= ERROR SUMMARY: 0 errors\n", "passed"),
        ("memcheck", 86, f"{RIGHT}\n========= Invalid __global__ read\n========= ERROR SUMMARY: 2 errors\n", "failed"),
        ("memcheck", 1, "========= ERROR SUMMARY: 0 errors\n", "failed"),
        ("memcheck", 1, "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error\n", "skipped"),
        ("memcheck", 1, "unrecognised option '--padding'\n", "skipped"),
        ("memcheck", None, "", "unfinished"),
        (
            "racecheck",
            0,
            f"{RIGHT}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            "passed",
        ),
        (
            "racecheck",
            86,
            f"{RIGHT}\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
            "failed",
        ),
    ],
)
def test_sanitizer_outcomes(check: str, code: int | None, output: str, status: str) -> None:
    assert gpu_check.read_sanitizer(check, Finished(code, output)).status == status


def counted(calls: int) -> str:
    """What ncu prints of calls that launch two kernels; the first call reads 10 MB more."""
    lines = [
        "==PROF== Connected to process 7",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
    ]
    for number in range(2 * calls):
        read = 30_000_000 if number < 2 else 20_000_000
        lines.append(f'"{number}","grid_pool_kernel","Counters","dram__bytes_read.sum","byte","{read:,}"')
        lines.append(f'"{number}","grid_pool_kernel","Counters","dram__bytes_write.sum","Mbyte","5.5"')
    return "\n".join(lines)


def test_counters_are_read() -> None:
    kernels = gpu_check.read_counters(counted(3))
    assert len(kernels) == 6
    found = gpu_check.per_call(kernels, SMALL.bound("grid_pool"))
    assert (found["kernel_launches"], found["read_bytes"], found["write_bytes"]) == (2, 40e6, 11e6)
    assert gpu_check.read_counters("==ERROR== no permission\n") == []


def test_bench_lines_are_read(tmp_path: Path) -> None:
    """The last row of a contender counts; launches come later; a line that was cut is left out."""
    names = gpu_bench.jobs()
    done = [{"job": job, "state": "done"} for job in names]
    lines = [
        row(GOAL, "grid_pool", p50_us=None),
        row(GOAL, "grid_pool", p50_us=7.0),
        {"launches_of": [GOAL, "grid_pool"], "kernels": 4},
        *done,
    ]
    path = tmp_path / "rows"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"workload": "cu')
    read = gpu_check.read_lines(path)
    outcome = gpu_check.read_bench(read, [], names)
    assert outcome.status == "passed"
    assert [(found["p50_us"], found["kernel_launches"]) for found in outcome.details["rows"]] == [(7.0, 4)]

    def status(*lines: dict[str, Any]) -> str:
        return gpu_check.read_bench(lines, [], names).status

    assert status(*read[:-1]) == "unfinished"
    assert status(*read, row(GOAL, "copy", check="wrong: off by 1")) == "failed"
    assert status(*read, row(GOAL, "eager", check="failed: OutOfMemoryError")) == "passed"
    assert status(*read, row(GOAL, "norm_pool", check="failed: RuntimeError")) == "failed"
    assert status(*read, row(GOAL, "spread", check="wrong: off by 1")) == "failed"
    assert status(*done) == "failed"


@needs_interpreter
def test_every_choice_of_configuration_pools_alike() -> None:
    workload = Workload("", (20, 13), 5, 40)
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    results = [contender.call(x) for contender in variants(workload)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert mismatch(results[0], variants(workload)[0].definition(x), 2) is None
    assert set(CHOICES) == {contender.name for contender in variants(workload)}
