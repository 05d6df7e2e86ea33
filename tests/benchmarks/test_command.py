"""The command `python -m benchmarks` prints, appends and draws results, and refuses mistakes before any is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import machine, measure, page, run
from benchmarks.__main__ import main
from benchmarks.devices import Cpu
from benchmarks.measure import LATE, LOST
from benchmarks.provider import Provider
from benchmarks.providers import chosen
from benchmarks.results import append, file_name, load
from benchmarks.workloads import QUICK, WORKLOADS
from tests.benchmarks.rows import RUN, make_row

SHAPE = "4x5x5x64"
FAST = ["--device", "cpu", "--shape", SHAPE, "--provider", "llava_avg_pool", "norm_pool:reference", "--samples", "2"]


@pytest.fixture(autouse=True)
def _fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_waiting: None) -> None:
    """Commands run in an empty folder, and find no compiler and no other process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(run, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(run.gc, "collect", lambda: 0)
    monkeypatch.setitem(vars(torch), "_dynamo", SimpleNamespace(reset=lambda: None))  # which takes seconds to import
    monkeypatch.setattr(Cpu, "others_cores", lambda device: lambda: 0.0)


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def spoilt(monkeypatch: pytest.MonkeyPatch, name: str, call: Any) -> None:
    """Put `call` in place of the function of a provider."""

    def chosen_and_spoilt(*arguments: Any) -> list[Provider]:
        return [replace(p, call=call) if p.name == name else p for p in chosen(*arguments)]

    monkeypatch.setattr(run, "chosen", chosen_and_spoilt)


# ---- run ----


def test_results_are_printed_and_appended(capsys: pytest.CaptureFixture[str]) -> None:
    """Results go to the file that is named, else to that of the machine, and quick results go to no file."""
    assert main([*FAST, "-o", "new/results.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert f"{SHAPE}: 4 × 5 × 5 × 64 bfloat16" in printed
    assert "no ceiling: ceiling.cpp: " in printed
    assert "appended to new/results.jsonl" in printed
    (results,) = load(Path("new/results.jsonl"))
    settings = {"quick": False, "shape": [SHAPE], "provider": ["llava_avg_pool", "norm_pool:reference"]}
    assert results.run.settings.items() >= settings.items()
    assert [row.provider for row in results.rows] == ["copy", "norm_pool:reference", "llava_avg_pool"]
    facts = {(row.run, row.workload, row.check, row.samples) for row in results.rows}
    assert facts == {(results.run.run, SHAPE, "ok", 2)}
    kept = Path("kept") / file_name(machine.describe("cpu")["device"])
    assert main(["run", *FAST, "--shape", "3x4x4x64:fp32", "--baseline", "copy", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out == kept.read_text()  # one JSON object a line, and all else on stderr
    assert "torch" in printed.err
    assert load(kept)[0].workloads == [SHAPE, "3x4x4x64:fp32"]
    assert main([*FAST, "--quick"]) == 0
    assert "quick results are not kept" in capsys.readouterr().out
    assert files() == [str(kept), "new/results.jsonl"]


def test_a_narrow_pipe_loses_no_digits_and_hears_of_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has as many digits in 30 columns as in 200."""
    assert main([*FAST, "--shape", "3x4x4x64:fp32", "-o", "r.jsonl"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"{SHAPE}, 1 of 2", "3x4x4x64:fp32, 2 of 2"]
    shown = []
    for columns in ("200", "30"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["show", "r.jsonl"]) == 0
        shown.append(
            [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("torch copy", "LLaVA"))]
        )
    assert len(shown[0]) == 4
    assert shown[0] == shown[1]


def test_rows_are_written_as_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the process ends in a later workload, the rows of the workloads before it are in the file."""
    measured = measure.measure

    def interrupted(workload: Any, *arguments: Any, **given: Any) -> Any:
        if workload.name != SHAPE:
            raise KeyboardInterrupt
        return measured(workload, *arguments, **given)

    monkeypatch.setattr(run, "measure", interrupted)
    assert main([*FAST, "--shape", "3x4x4x64", "-o", "a.jsonl"]) == 130
    assert load(Path("a.jsonl"))[0].workloads == [SHAPE]


def test_an_interrupted_run_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with --continue passes over results of the same code, versions and device, be they right or wrong.

    It also passes over a provider that has ended a process, on any shape, but not one that there was no time for.
    """
    arguments = [*FAST, "--continue", "--times-only", "-o", "r.jsonl"]
    assert main(arguments) == 0
    (first,) = load(Path("r.jsonl"))
    assert main(arguments) == 0
    assert main([*arguments, "--quick"]) == 0
    assert [len(results.rows) for results in load(Path("r.jsonl"))] == [len(first.rows), 0, len(first.rows)]

    spoilt(monkeypatch, "avg_pool2d", lambda x: pytest.fail("called"))
    lost = replace(first.rows[-1], provider="avg_pool2d", workload="2x5x5x64", check=LOST, p50_us=None)
    late = replace(first.rows[-1], provider="max_pool2d", check=LATE, p50_us=None)
    append(Path("r.jsonl"), lost, late)
    assert main([*arguments, "--provider", "avg_pool2d", "max_pool2d"]) == 0
    timed = {row.provider for row in load(Path("r.jsonl"))[-1].rows}
    assert ("max_pool2d" in timed, "avg_pool2d" in timed) == (True, False)
    monkeypatch.setattr(machine, "_versions", lambda: {"torch": "another"})
    assert main(arguments) == 0
    assert len(load(Path("r.jsonl"))[-1].rows) == len(first.rows)


def test_wrong_results_are_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, "llava_avg_pool", lambda x: x[:, :2, :2] * 0)
    assert main([*FAST, "-o", "a.jsonl"]) == 1
    found = {row.provider: row.check for row in load(Path("a.jsonl"))[0].rows}
    assert found["llava_avg_pool"].startswith("wrong: off by ")
    assert found["norm_pool:reference"] == "ok"


def test_what_disturbs_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Other processes are reported, and a provider that has too little memory is no failure."""
    monkeypatch.setattr(Cpu, "others_cores", lambda device: lambda: 0.52)
    assert main([*FAST, "--quick"]) == 0
    assert "NOT QUIET: others used up to 0.52 cores meanwhile" in capsys.readouterr().out
    monkeypatch.setattr(Cpu, "free_bytes", lambda device: 0)
    assert main([*FAST, "--quick"]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_process_pins_its_threads_and_ends_where_it_hangs() -> None:
    """OpenMP is told where threads run before torch loads it. A process that does not hang goes on."""
    code = (
        "import os, runpy, time\n"
        "runpy.run_module('benchmarks', {}, 'loaded')\n"
        "from benchmarks.run import limited\n"
        "with limited(1): pass\n"
        "with limited(None): time.sleep(1.5)\n"
        "print(os.environ['OMP_PROC_BIND'], flush=True)\n"
        "with limited(1): time.sleep(60)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=page.ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "true\n")
    assert "in <module>" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "4x5x5"], ["shape must be TxHxWxC", "llava-video-7b", "got '4x5x5'"]),
        (["--shape", "4x5x5x64:stream"], ["one video of a multiple of 32 frames"]),
        (["--provider", "grid_pool:triton"], ["provider must be among", "llava_avg_pool", "got 'grid_pool:triton'"]),
        (["--skip", "nope*"], ["provider must be among", "got 'nope*'"]),
        (["--baseline", "nope"], ["baseline must be copy, ceiling or one of", "llava_avg_pool", "got 'nope'"]),
        (["--device", "tpu"], ["device must be cpu, cuda or cuda:N, got 'tpu'"]),
        (["--plot", "."], ["time.png exists already; --force overwrites it"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_mistakes_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], said: Sequence[str]
) -> None:
    monkeypatch.setattr(run, "measure", lambda *arguments, **given: pytest.fail("something was timed"))
    Path("time.png").touch()
    assert main([*FAST, "-o", "new/a.jsonl", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("benchmarks run: ")
    assert [text for text in said if text not in printed.err] == []
    assert (printed.out, files()) == ("", ["time.png"])


def test_an_option_that_nobody_knows_has_the_usage_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, name, meant in (
        (["--providers", "x"], "run", "--provider"),
        (["show", "r.jsonl", "--forse"], "show", ""),
        (["plot", "r.jsonl", "plots", "--forse"], "plot", "--force"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        error = capsys.readouterr().err
        assert error.startswith(f"usage: python -m benchmarks {name} ")
        assert error.endswith(f"; did you mean {meant}?\n" if meant else "unrecognized arguments: --forse\n")


def test_what_is_timed_without_a_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All poolings are timed, or the quick ones; the default baseline and a provider that is skipped may be missing."""
    asked: list[tuple[str, list[str]]] = []

    def measured(workload: Any, timed: Sequence[Provider], *arguments: Any, **given: Any) -> list[Any]:
        asked.append((workload.name, [provider.name for provider in timed]))
        return []

    monkeypatch.setattr(run, "measure", measured)
    monkeypatch.setattr(run, "workload_table", lambda rows: "")
    poolings = [workload for workload in WORKLOADS.values() if workload.kind == "pooling"]
    assert main(["--device", "cpu", "--skip", "compiled_grid_pool"]) == 0
    assert asked == [(w.name, [p.name for p in chosen(w, "cpu", [], ["compiled_grid_pool"])]) for w in poolings]
    asked.clear()
    assert main(["--device", "cpu", "--quick", "--provider", "max_pool2d"]) == 0
    assert asked == [(name, ["max_pool2d"]) for name in QUICK]
    assert main(["--device", "cpu", "--quick", "--shape", "budget-10x10", "--skip", "compiled_grid_pool"]) == 0
    capsys.readouterr()
    asked.clear()
    assert main(["--device", "cpu", "--shape", "pruning", "prefill", "--skip", "compiled_grid_pool"]) == 0
    assert [name for name, _ in asked] == ["pruning", "prefill-0.5b", "prefill-7b"]
    capsys.readouterr()
    assert main(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("│")] == list(WORKLOADS)
    assert [kind for kind in ("pooling", "gradients", "stream", "prefill") if f"\n{kind} on cpu: " not in printed] == []


# ---- results that are there ----


def test_results_are_shown_compared_drawn_and_held_to_goals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other commands work on a file of two runs, of which the second took 10 % longer."""
    for name, time in (("a", 100.0), ("b", 110.0)):
        for line in (RUN, make_row("norm_pool:cpu", time), make_row("avg_pool2d", 2 * time)):
            append(Path("kept.jsonl"), replace(line, run=name))

    def printed(*arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        shown = capsys.readouterr()
        return shown.err if code and not shown.out else shown.out

    assert "99.0–102" in printed("show", "kept.jsonl@a")
    assert "a → b" in printed("compare", "kept.jsonl@a", "kept.jsonl")
    assert "picture: plots/ratios.png" in printed("plot", "kept.jsonl", "plots")
    assert "ratios.png exists already" in printed("plot", "kept.jsonl", "plots", code=1)
    goals = printed("goals", "--tables", "kept.jsonl", code=1)
    assert "not measured norm_pool 15 times as fast as LLaVA's call: 2 not measured" in goals
    assert "109–112" in goals
    assert "nowhere.jsonl" in printed("show", "nowhere.jsonl", code=1)
    monkeypatch.setattr(command, "machine_files", list)
    assert "there are no results in" in printed("goals", code=1)
    monkeypatch.setattr(page, "texts", lambda: {page.ROOT / "docs" / "nowhere.md": "text"})
    assert printed("page", "--check", code=1) == "docs/nowhere.md is not what the results say\n"
    assert not (page.ROOT / "docs" / "nowhere.md").exists()
