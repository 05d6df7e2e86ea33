"""The one command for GPUs, as far as no GPU is needed: deadlines, restarts, what tools print, and what it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bench_report import RUN, make_row

import stgridpool_kernels as stgp
from benchmarks import gpu_bench, gpu_check
from benchmarks.goals import GOALS
from benchmarks.gpu_bench import CHOICES, variants
from benchmarks.gpu_check import (
    Finished,
    Outcome,
    Pass,
    Stage,
    keep_rows,
    load_rows,
    new_results_file,
    passes,
    read_bench,
    run_limited,
    run_passes,
    run_stages,
    save,
)
from stgridpool_kernels.bench import command
from stgridpool_kernels.bench.providers import mismatch
from stgridpool_kernels.bench.results import Results, Row, Writer, load
from stgridpool_kernels.bench.workloads import WORKLOADS, Workload, random_tokens
from stgridpool_kernels.cli import build_parser

ROOT = Path(__file__).parents[1]
GPU = replace(RUN, device={"type": "cuda", "name": "Some GPU"})

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="triton is not installed, or runs on a GPU",
)

# ---- results ----


def test_reports_are_never_overwritten(tmp_path: Path) -> None:
    utc = datetime(2026, 11, 22, 12, 0, 0, tzinfo=timezone.utc)
    paths = [new_results_file(tmp_path / "results", "NVIDIA H200", utc) for _ in range(3)]
    assert [path.name for path in paths] == [
        "gpu-nvidia-h200-20261122T120000Z.json",
        "gpu-nvidia-h200-20261122T120000Z-2.json",
        "gpu-nvidia-h200-20261122T120000Z-3.json",
    ]
    out = tmp_path / "out"
    out.mkdir()
    save({"bars": []}, paths[1], out)
    save({"bars": [1]}, paths[1], out)
    assert json.loads(paths[1].read_text()) == {"bars": [1]} == json.loads((out / paths[1].name).read_text())
    assert paths[0].read_text() == paths[2].read_text() == ""
    assert len(list((tmp_path / "results").iterdir())) == 3


def write(path: Path, *lines: Any) -> None:
    writer = Writer(path)
    for line in lines:
        writer.write(line)
    writer.close()


def test_timings_of_every_kind_are_appended(tmp_path: Path) -> None:
    """To files that are there; a line that was cut in either costs no other."""
    logs, kept = tmp_path / "logs", tmp_path / "results"
    kept.mkdir()
    for name in ("cuda-some-gpu.jsonl", "prefill-cuda-some-gpu.jsonl", "tune.jsonl"):
        write(logs / name, replace(GPU, run=name), make_row("copy", 1.0, run=name))
    rows = logs / "cuda-some-gpu.jsonl"
    rows.write_text(rows.read_text() + '{"kind": "ro')
    write(kept / rows.name, replace(GPU, run="before"), make_row("copy", 2.0, run="before"))
    keep_rows(rows, kept, None)
    keep_rows(rows, kept, kept)  # they are there already
    found = {path.name: [(each.run.run, len(each.rows)) for each in load(path)] for path in kept.iterdir()}
    assert found == {
        "cuda-some-gpu.jsonl": [("before", 1), ("cuda-some-gpu.jsonl", 1)],
        "prefill-cuda-some-gpu.jsonl": [("prefill-cuda-some-gpu.jsonl", 1)],
        "tune-cuda-some-gpu.jsonl": [("tune.jsonl", 1)],
    }
    write(tmp_path / "next.jsonl", replace(GPU, run="next"), make_row("copy", 3.0, run="next"))
    keep_rows(tmp_path / "next.jsonl", kept, None)
    assert [each.run.run for each in load(kept / "next.jsonl")] == ["next"]
    (tmp_path / "next.jsonl").rename(tmp_path / rows.name)
    keep_rows(tmp_path / rows.name, kept, None)
    assert [len(each.rows) for each in load(kept / rows.name)] == [1, 1, 1]


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
) -> tuple[int, list[str]]:
    ran: list[str] = []

    def fake(name: str) -> Stage:
        def run(seconds: float, logs: Path) -> Outcome:
            ran.append(name)
            if name == "bench":
                rows = [make_row("grid_pool:triton", 100.0, percent_of_copy=90.0), make_row("copy", 90.0)]
                write(gpu_check.rows_file(logs), GPU, *rows)
            return Outcome(outcome, "said so", {"more": 1})

        return Stage(name, 10, run)

    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (tmp_path / "results").mkdir(exist_ok=True)
    monkeypatch.setattr(gpu_check, "STAGES", [fake(stage.name) for stage in gpu_check.STAGES])
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    device = {"type": "cuda", "name": "Some GPU"}
    monkeypatch.setattr(gpu_check, "describe", lambda name: {"device": device, "versions": {"torch": "2"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OUT", str(out))
    return gpu_check.main(arguments), ran


def test_all_stages_run_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, ran = run_main(monkeypatch, tmp_path)
    assert (code, ran) == (0, ["build", "tests", "sanitizer", "bench", "counters"])
    path, rows = sorted((tmp_path / "results").iterdir(), reverse=True)
    report = json.loads(path.read_text())
    assert report == json.loads((tmp_path / "out" / path.name).read_text())
    assert path.name.startswith("gpu-some-gpu-")
    assert report["device"]["name"] == "Some GPU"
    assert report["stages"]["bench"].items() >= {"status": "passed", "summary": "said so", "more": 1}.items()
    assert report["bars"][1] == {
        "name": "grid_pool reaches 85 % of a copy",
        "status": "not measured",
        "detail": "1 of 4, worst 90 % at llava-video-7b",
    }
    assert rows.name == "cuda-some-gpu.jsonl"
    assert [len(each.rows) for each in load(rows)] == [2]
    printed = capsys.readouterr().out
    assert "grid_pool, triton" in printed
    assert "not measured grid_pool reaches 85 % of a copy: 1 of 4, worst 90 % at llava-video-7b" in printed


def test_chosen_stages_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    code, ran = run_main(monkeypatch, tmp_path, "--stage", "tune", "tests", "--json", str(path), outcome="unfinished")
    assert (code, ran) == (1, ["tests", "tune"])
    report = json.loads(path.read_text())
    assert set(report["stages"]) == {"tests", "tune"}
    assert report["bars"] == []
    assert list((tmp_path / "results").iterdir()) == []
    with pytest.raises(SystemExit):
        run_main(monkeypatch, tmp_path, "--json", str(path))
    assert json.loads(path.read_text()) == report


@pytest.mark.parametrize(("outcome", "code"), [("skipped", 0), ("passed", 0), ("failed", 1), ("unfinished", 1)])
def test_skipped_stages_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: str, code: int
) -> None:
    assert run_main(monkeypatch, tmp_path, outcome=outcome)[0] == code


def test_all_stages_but_those_that_are_asked_for_fit_into_the_limit() -> None:
    stages = {stage.name: stage for stage in gpu_check.STAGES}
    assert set(gpu_check.ASKED_FOR) < set(stages)
    usual = [stage.seconds for name, stage in stages.items() if name not in gpu_check.ASKED_FOR]
    assert sum(usual) <= gpu_check.LIMIT_SECONDS


def test_a_step_gets_what_earlier_ones_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = FakeTime()
    monkeypatch.setattr(gpu_check.time, "monotonic", now)
    clock = gpu_check.Clock(100)
    assert clock.left(0.4) == pytest.approx(40)
    now.seconds += 10
    assert clock.left(0.3) == pytest.approx(60)
    now.seconds += 70
    assert clock.left(0.3) == pytest.approx(20)
    assert clock.left() == pytest.approx(20)


def test_the_worst_status() -> None:
    assert gpu_check.worst(["passed", "skipped"]) == "passed"
    assert gpu_check.worst(["passed", "unfinished", "skipped"]) == "unfinished"
    assert gpu_check.worst(["unfinished", "failed"]) == "failed"
    assert gpu_check.worst(["skipped"]) == "skipped"


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
    found = gpu_check.per_call(kernels, WORKLOADS["8x27x27x896"].bound("grid_pool"))
    assert (found["kernel_launches"], found["read_bytes"], found["write_bytes"]) == (2, 40e6, 11e6)
    assert gpu_check.read_counters("==ERROR== no permission\n") == []


# ---- timing ----


def bench_options(command: Sequence[str]) -> Any:
    """What `stgp bench` makes of a command that is run."""
    assert list(command[:3]) == [sys.executable, "-m", "stgridpool_kernels"]
    return build_parser().parse_args(list(command[3:]))


class Bench:
    """Stands in for processes of `stgp bench`. Each takes the next of `ends`: how many workloads it finishes, None for
    not even the first line, and its exit code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: tuple[int | None, int | None]) -> None:
        self.ends, self.commands = iter(ends), []
        monkeypatch.setattr(gpu_check, "run_limited", self.run)

    def run(self, command: Sequence[str], seconds: float, log: Path) -> Finished:
        assert seconds > gpu_check.LEAST_SECONDS
        given = bench_options(command)
        self.commands.append(given)
        workloads, code = next(self.ends)
        name = f"run {len(self.commands)}"
        lines: list[Any] = [] if workloads is None else [replace(GPU, run=name)]
        for workload in given.shape[: workloads or 0]:
            lines += [make_row(who, 5.0, run=name, workload=workload) for who in ("copy", "grid_pool:triton")]
        write(given.output, *lines)
        return Finished(code, "the last words\n")


def finished(rows: Path) -> list[tuple[str, list[str]]]:
    """Workloads of every run that was kept."""
    return [(each.run.run, each.workloads) for each in load(rows)]


SOME = list(WORKLOADS)[:5]


def test_all_workloads_of_a_pass_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, (3, 0), (2, 1))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("of an earlier check\n")
    wanted = [Pass(SOME[:3], ["--skip", "avg_pool2d"]), Pass(SOME[3:], ["--baseline", "copy"])]
    outcome = run_passes(wanted, 100, rows, tmp_path / "log")
    assert [(given.shape, given.skip, given.baseline) for given in bench.commands] == [
        (SOME[:3], ["avg_pool2d"], "llava_avg_pool"),
        (SOME[3:], [], "copy"),
    ]
    assert {(given.device, given.limit) for given in bench.commands} == {("cuda", gpu_check.WORKLOAD_SECONDS)}
    assert finished(rows) == [("run 1", SOME[:3]), ("run 2", SOME[3:])]
    assert list(tmp_path.iterdir()) == [rows]
    assert outcome == Outcome(
        "passed",
        "5 workloads, 10 rows, 0 of them without a right result",
        {"not_right": [], "unfinished": [], "ends": []},
    )


@pytest.mark.parametrize("code", [-11, 1], ids=["a signal", "--limit, or an error"])
def test_after_a_process_that_ended_early_comes_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    """It begins behind the workload that the first ended in, which is not tried again. Nothing that was found is
    lost."""
    bench = Bench(monkeypatch, (1, code), (0, code), (2, 0))
    rows = tmp_path / "rows.jsonl"
    outcome = run_passes([Pass(SOME)], 100, rows, tmp_path / "log")
    assert [given.shape for given in bench.commands] == [SOME, SOME[2:], SOME[3:]]
    assert finished(rows) == [("run 1", SOME[:1]), ("run 2", []), ("run 3", SOME[3:])]
    assert outcome.status == "unfinished"
    assert outcome.details["unfinished"] == SOME[1:3]
    assert outcome.details["ends"] == [f"exit code {code} in {name}: the last words" for name in SOME[1:3]]


def test_a_process_that_does_not_begin_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, (None, 1), (2, 0))
    outcome = run_passes([Pass(SOME[:2]), Pass(SOME[2:4])], 100, tmp_path / "rows.jsonl", tmp_path / "log")
    assert [given.shape for given in bench.commands] == [SOME[:2], SOME[2:4]]
    assert (outcome.status, outcome.details["unfinished"]) == ("unfinished", SOME[:2])
    bench = Bench(monkeypatch, (1, -9), (None, 1), (2, 0))
    run_passes([Pass(SOME[:4]), Pass(SOME[4:])], 100, tmp_path / "rows.jsonl", tmp_path / "log")
    assert [given.shape for given in bench.commands] == [SOME[:4], SOME[2:4], SOME[4:]]


def test_workloads_wait_for_another_day_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = FakeTime()
    monkeypatch.setattr(gpu_check.time, "monotonic", now)
    bench = Bench(monkeypatch, (1, None))
    run = bench.run

    def takes_all(*arguments: Any) -> Finished:
        now.seconds += 96
        return run(*arguments)

    monkeypatch.setattr(gpu_check, "run_limited", takes_all)
    outcome = run_passes([Pass(SOME[:2]), Pass(SOME[2:])], 100, tmp_path / "rows.jsonl", tmp_path / "log")
    assert len(bench.commands) == 1
    assert outcome.status == "unfinished"
    assert outcome.details["unfinished"] == SOME[1:]


def test_a_line_that_was_cut_costs_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, (1, 0), (1, 0))
    run = bench.run

    def cut(command: Sequence[str], *arguments: Any) -> Finished:
        done = run(command, *arguments)
        part = bench_options(command).output
        part.write_text(part.read_text() + '{"kind": "row", "ru')
        return done

    monkeypatch.setattr(gpu_check, "run_limited", cut)
    rows = tmp_path / "rows.jsonl"
    run_passes([Pass(SOME[:1]), Pass(SOME[1:2])], 100, rows, tmp_path / "log")
    assert finished(rows) == [("run 1", SOME[:1]), ("run 2", SOME[1:2])]


def test_every_workload_is_timed_once_and_those_of_goals_first() -> None:
    first, gradients, compiled, sweeps = passes()
    assert sorted([*first.shapes, *sweeps.shapes]) == sorted(WORKLOADS)
    assert list(first.shapes[: len(GOALS)]) == list(compiled.shapes) == list(gradients.shapes) == GOALS


@pytest.mark.parametrize("number", range(4))
def test_passes_are_understood(number: int) -> None:
    """Also where only the last of its workloads are left."""
    wanted = passes()[number]
    for shapes in (wanted.shapes, wanted.shapes[-1:]):
        given = build_parser().parse_args(["bench", *wanted.options, "--shape", *shapes])
        request = command.Request(providers=given.provider, skipped=given.skip, baseline=given.baseline)
        command._check_providers(request, [WORKLOADS[name] for name in given.shape], SimpleNamespace(type="cpu"))


def outcome_of(*rows: Row, ends: Sequence[str] = (), unfinished: Sequence[str] = ()) -> str:
    return read_bench([Results(GPU, list(rows))], ends, unfinished).status


def test_outcomes_of_timing() -> None:
    right = make_row("grid_pool:triton", 7.0)
    assert outcome_of(right) == "passed"
    assert outcome_of(right, unfinished=["batch-8"]) == "unfinished"
    assert outcome_of(right, ends=["exit code -11"]) == "unfinished"
    assert outcome_of(right, make_row("llava_avg_pool", check="wrong: off by 1")) == "failed"
    assert outcome_of(right, make_row("naive_grid_pool", check="failed: OutOfMemoryError: 3 GB")) == "passed"
    assert outcome_of(right, make_row("norm_pool:cuda", check="failed: RuntimeError: x")) == "failed"
    assert outcome_of(right, make_row("norm_pool:cuda", check="skipped: takes 9 GB")) == "passed"
    assert outcome_of(make_row("copy", 7.0)) == "failed"  # none of ours
    assert outcome_of() == "failed"
    bad = make_row("norm_pool:cuda", check="failed: RuntimeError: x")
    assert read_bench([Results(GPU, [right, bad])], [], []).details["not_right"] == [
        "llava-video-7b norm_pool:cuda: failed: RuntimeError: x"
    ]


@pytest.mark.parametrize(
    ("checks", "code", "status"),
    [
        ({}, 0, "passed"),
        ({}, -11, "unfinished"),
        ({"spread": "wrong: off by 1"}, 0, "failed"),
        ({"stages 3": "failed: OutOfResources: shared memory"}, 0, "failed"),
        (None, 1, "failed"),
    ],
    ids=str,
)
def test_outcomes_of_tuning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: dict[str, str] | None, code: int, status: str
) -> None:
    def run(command: Sequence[str], seconds: float, log: Path) -> Finished:
        assert command[1:4] == ["-m", "benchmarks.gpu_bench", "tune"]
        if checks is not None:
            rows = [make_row(name, 5.0, **({"check": checks[name]} if name in checks else {})) for name in CHOICES]
            write(Path(command[4]), GPU, make_row("copy", 4.0), *rows)
        return Finished(code, "the last words\n")

    monkeypatch.setattr(gpu_check, "run_limited", run)
    outcome = gpu_check.run_tune(60, tmp_path)
    assert outcome.status == status
    assert len(outcome.details["times"]) == (0 if checks is None else 1 + len(CHOICES))
    assert load_rows(tmp_path / "nothing") == []


# ---- what runs on the GPU, on a CPU ----

TINY = Workload("tiny", (16,), (5, 5), 40)


@needs_interpreter
def test_every_choice_of_configuration_pools_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is what is run, from one preparation for all calls."""
    from stgridpool_kernels import triton_kernels
    from stgridpool_kernels.triton_kernels import fused

    configured, prepared, used = fused.fused_config, triton_kernels.prepare, []

    def prepare(*arguments: Any) -> Any:
        used.append(fused.fused_config(40, 2, (8, 0)))
        return prepared(*arguments)

    monkeypatch.setattr(triton_kernels, "prepare", prepare)
    workload = Workload("", (16, 9), (5, 5), 40)
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    timed = variants(workload)
    assert [provider.name for provider in timed] == list(CHOICES)
    results = [provider.call(x) for provider in timed]
    assert all(torch.equal(result, results[0]) for result in results)
    assert mismatch(results[0], timed[0].definition(x), 2) is None
    out = torch.empty_like(results[0])
    assert timed[1].call(x, out=out) is out
    assert torch.equal(out, results[0])
    assert used == [replace(configured(40, 2, (8, 0)), **choice) for choice in CHOICES.values()]
    assert fused.fused_config is configured


class Marks:
    """torch.cuda, as far as calls are counted between its profiler's marks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        for name in ("start", "stop"):
            monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: self.calls.append(name))


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Marks:
    monkeypatch.setattr(gpu_bench, "WORKLOADS", {gpu_bench.COUNTED_ON: TINY})
    return Marks(monkeypatch)


DEVICE = SimpleNamespace(type="cuda", torch_device="cpu")


@pytest.mark.parametrize("provider", gpu_bench.COUNTED)
def test_counted_calls(monkeypatch: pytest.MonkeyPatch, marks: Marks, provider: str) -> None:
    """As many as are said, after one on each of the inputs, which differ."""
    inputs = []

    def op(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        inputs.append(x)
        marks.calls.append("call")
        return out.copy_(right.definition(x))

    (right,) = command.chosen(TINY, "cuda", [f"{provider.partition(':')[0]}:reference"])

    def chosen(*arguments: Any) -> list[Any]:
        assert arguments == (TINY, "cuda", [provider])
        return [replace(right, call=op, takes_out=True)]

    monkeypatch.setattr(gpu_bench, "chosen", chosen)
    gpu_bench.run_counted_calls(provider, DEVICE)
    count = gpu_bench.COUNTED_CALLS
    assert marks.calls == ["call"] * count + ["start"] + ["call"] * count + ["stop"]
    assert [id(x) for x in inputs[:count]] == [id(x) for x in inputs[count:]]
    assert len({x.flatten()[0].item() for x in inputs}) == count


def test_counted_calls_must_be_right(monkeypatch: pytest.MonkeyPatch, marks: Marks) -> None:
    (right,) = command.chosen(TINY, "cuda", ["grid_pool:reference"])
    wrong = replace(right, call=lambda x, out: out.zero_(), takes_out=True)
    monkeypatch.setattr(gpu_bench, "chosen", lambda *arguments: [wrong])
    with pytest.raises(Exception, match="off by"):
        gpu_bench.run_counted_calls("grid_pool:triton", DEVICE)
    assert marks.calls == []


@pytest.fixture
def _small_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [((8, 5, 3, 20), dtype, calls) for _, dtype, calls in gpu_bench.SMALL_INPUTS if dtype == torch.bfloat16]
    monkeypatch.setattr(gpu_bench, "SMALL_INPUTS", inputs[1:])
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)


@needs_interpreter
@pytest.mark.usefixtures("_small_on_the_cpu")
def test_small_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert "triton" in stgp.available_backends()
    gpu_bench.main(["small"])
    assert capsys.readouterr().out == f"{gpu_bench.SMALL_CALLS_RIGHT}\n"


@needs_interpreter
@pytest.mark.usefixtures("_small_on_the_cpu")
def test_small_calls_that_are_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    norm_pool = stgp.norm_pool

    def wrong(x: torch.Tensor, backend: str, **arguments: Any) -> torch.Tensor:
        return norm_pool(x, backend="reference", **arguments) + (backend == "triton")

    monkeypatch.setattr(stgp, "norm_pool", wrong)
    with pytest.raises(SystemExit, match=r"norm_pool of \(8, 5, 3, 20\) torch.bfloat16 with .* by triton: off by"):
        gpu_bench.main(["small"])
    assert gpu_bench.SMALL_CALLS_RIGHT not in capsys.readouterr().out


def test_small_calls_have_arguments_that_there_are() -> None:
    """On inputs that they fit."""
    for shape, dtype, calls in gpu_bench.SMALL_INPUTS:
        for op, arguments in calls:
            x = torch.empty(shape, dtype=dtype, device="meta")
            assert getattr(stgp, op)(x, **arguments).numel() > 0
