"""`python -m benchmarks` in process: what it prints and writes, and what it refuses before anything is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import machine, measure, page, run
from benchmarks.__main__ import main
from benchmarks.devices import Cpu
from benchmarks.measure import LATE, LOST, take_turns
from benchmarks.provider import Provider
from benchmarks.providers import chosen
from benchmarks.results import Writer, encode, file_name, load
from benchmarks.workloads import QUICK, WORKLOADS
from tests.benchmarks.rows import RUN, make_row

pytestmark = pytest.mark.usefixtures("caches")

SHAPE = "4x5x5x64"
FAST = ["--device", "cpu", "--shape", SHAPE, "--provider", "llava_avg_pool", "norm_pool:reference", "--samples", "2"]


@pytest.fixture(autouse=True)
def _fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in an empty folder, do not warm up, and find that no other process disturbs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(run, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(take_turns, "__defaults__", (0.0,))
    monkeypatch.setattr(Cpu, "others_cores", lambda device: lambda: 0.0)


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def spoilt(monkeypatch: pytest.MonkeyPatch, name: str, call: Any) -> None:
    """Puts `call` in place of a provider's."""

    def chosen_and_spoilt(*arguments: Any) -> list[Provider]:
        return [replace(p, call=call) if p.name == name else p for p in chosen(*arguments)]

    monkeypatch.setattr(run, "chosen", chosen_and_spoilt)


# ---- run ----


def test_results_are_printed_and_appended(capsys: pytest.CaptureFixture[str]) -> None:
    """They go to the file that is named, else to that of the machine; quick ones go to none."""
    assert main([*FAST, "-o", "new/results.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert f"{SHAPE}: 4 × 5 × 5 × 64 bfloat16" in printed
    assert "appended to new/results.jsonl" in printed
    assert files() == ["new/results.jsonl"]
    (results,) = load(Path("new/results.jsonl"))
    settings = {"quick": False, "shape": [SHAPE], "provider": ["llava_avg_pool", "norm_pool:reference"]}
    assert results.run.settings.items() >= settings.items()
    rows = {row.provider: row for row in results.rows}
    assert set(rows) - {"read", "ceiling"} == {"copy", "llava_avg_pool", "norm_pool:reference"}
    assert {(row.run, row.workload, row.check, row.samples) for row in rows.values()} == {
        (results.run.run, SHAPE, "ok", 2)
    }
    assert main(["run", *FAST, "--shape", "3x4x4x64:fp32", "--baseline", "copy"]) == 0
    kept = Path("kept") / file_name(machine.describe("cpu")["device"])
    assert files() == [str(kept), "new/results.jsonl"]
    assert load(kept)[0].workloads == [SHAPE, "3x4x4x64:fp32"]
    capsys.readouterr()
    assert main([*FAST, "--quick"]) == 0
    assert "quick results are not kept" in capsys.readouterr().out
    assert len(files()) == 2


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAST, "--json", "-o", "a.jsonl"]) == 0
    printed = capsys.readouterr()
    assert printed.out == Path("a.jsonl").read_text()
    assert [json.loads(line)["kind"] for line in printed.out.splitlines()][:2] == ["run", "row"]
    assert "torch" in printed.err


def test_rows_are_written_as_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end of the process in a later workload leaves those before it."""
    measured = measure.measure

    def interrupted(workload: Any, *arguments: Any, **given: Any) -> Any:
        if workload.name != SHAPE:
            raise KeyboardInterrupt
        return measured(workload, *arguments, **given)

    monkeypatch.setattr(run, "measure", interrupted)
    assert main([*FAST, "--shape", "3x4x4x64", "-o", "a.jsonl"]) == 130
    assert load(Path("a.jsonl"))[0].workloads == [SHAPE]


def test_an_interrupted_run_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the same code, versions and device are passed over, right or wrong, and so is a provider that ended a
    process, on other shapes too; not one that there was no time for."""
    arguments = [*FAST, "--continue", "--times-only", "-o", "r.jsonl"]
    assert main(arguments) == 0
    (first,) = load(Path("r.jsonl"))
    assert main(arguments) == 0
    assert main([*arguments, "--quick"]) == 0
    assert [len(results.rows) for results in load(Path("r.jsonl"))] == [len(first.rows), 0, len(first.rows)]

    spoilt(monkeypatch, "avg_pool2d", lambda x: pytest.fail("called"))
    lost = replace(first.rows[-1], provider="avg_pool2d", workload="2x5x5x64", check=LOST, p50_us=None)
    late = replace(first.rows[-1], provider="max_pool2d", check=LATE, p50_us=None)
    with Path("r.jsonl").open("a") as file:
        file.write(f"{encode(lost)}\n{encode(late)}\n")
    assert main([*arguments, "--provider", "avg_pool2d", "max_pool2d"]) == 0
    timed = {row.provider for row in load(Path("r.jsonl"))[-1].rows}
    assert ("max_pool2d" in timed, "avg_pool2d" in timed) == (True, False)
    monkeypatch.setattr(machine, "_versions", lambda: {"torch": "another"})
    assert main(arguments) == 0
    assert len(load(Path("r.jsonl"))[-1].rows) == len(first.rows)


@pytest.mark.parametrize(
    ("call", "check"),
    [(lambda x: x[:, :2, :2] * 0, "wrong: off by "), (lambda x: x.no_such_method(), "failed: AttributeError: ")],
    ids=["wrong", "failed"],
)
def test_wrong_results_are_the_exit_code(monkeypatch: pytest.MonkeyPatch, call: Any, check: str) -> None:
    spoilt(monkeypatch, "llava_avg_pool", call)
    assert main([*FAST, "-o", "a.jsonl"]) == 1
    found = {row.provider: row for row in load(Path("a.jsonl"))[0].rows}
    assert found["llava_avg_pool"].check.startswith(check)
    assert not found["llava_avg_pool"].is_timed
    assert found["norm_pool:reference"].is_timed


def test_what_disturbs_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Other processes, and a missing compiler. Too little memory is no failure."""
    monkeypatch.setattr(Cpu, "others_cores", lambda device: lambda: 0.52)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([*FAST, "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "NOT QUIET: others used up to 0.52 cores meanwhile" in printed
    assert "no ceiling: ceiling.cpp: " in printed
    monkeypatch.setattr(Cpu, "free_bytes", lambda device: 0)
    assert main([*FAST, "--quick"]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_process_that_hangs_is_ended() -> None:
    """A process that does not hang goes on."""
    code = (
        "import time\n"
        "from benchmarks.run import limited\n"
        "with limited(1): pass\n"
        "with limited(None): time.sleep(1.5)\n"
        "print('still there', flush=True)\n"
        "with limited(1): time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=page.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "still there\n")
    assert "in <module>" in done.stderr


def test_threads_are_pinned_by_openmp() -> None:
    code = "import os, runpy; runpy.run_module('benchmarks', {}, 'loaded'); print(os.environ['OMP_PROC_BIND'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=page.ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "true\n", done.stderr


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


def test_what_is_timed_without_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """All poolings, or the quick ones. The default baseline, and a provider that is skipped, may be missing."""
    asked: list[tuple[str, list[str]]] = []

    def measured(workload: Any, timed: Sequence[Provider], *arguments: Any, **given: Any) -> list[Any]:
        asked.append((workload.name, [provider.name for provider in timed]))
        return []

    monkeypatch.setattr(run, "measure", measured)
    monkeypatch.setattr(run, "workload_table", lambda rows: "")
    monkeypatch.setattr(run.gc, "collect", lambda: 0)  # which takes longer than all else here
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    poolings = [workload for workload in WORKLOADS.values() if workload.kind == "pooling"]
    assert main(["--device", "cpu", "--skip", "compiled_grid_pool"]) == 0
    assert asked == [(w.name, [p.name for p in chosen(w, "cpu", [], ["compiled_grid_pool"])]) for w in poolings]
    asked.clear()
    assert main(["--device", "cpu", "--quick", "--provider", "max_pool2d"]) == 0
    assert asked == [(name, ["max_pool2d"]) for name in QUICK]
    assert main(["--device", "cpu", "--quick", "--shape", "budget-10x10", "--skip", "compiled_grid_pool"]) == 0


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    shown = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│")}
    assert list(shown) == list(WORKLOADS)
    assert [name for name, line in shown.items() if "quick" in line] == [name for name in WORKLOADS if name in QUICK]
    for kind in ("pooling", "gradients", "stream", "prefill"):
        assert f"\n{kind} on cpu: " in printed


# ---- results that are there ----


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file with two runs; the second took 10 % longer."""
    path = tmp_path / "kept.jsonl"
    writer = Writer(path)
    for name, time in (("a", 100.0), ("b", 110.0)):
        writer.write(replace(RUN, run=name))
        writer.write(make_row("norm_pool:cpu", time, run=name))
        writer.write(make_row("avg_pool2d", 2 * time, run=name))
    writer.close()
    return path


def test_results_are_shown_compared_and_drawn(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{kept}@a"]) == 0
    assert "99.0–102" in capsys.readouterr().out
    assert main(["compare", f"{kept}@a", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "a → b" in printed
    assert "0 faster, 2 slower, 0 within the noise; geometric mean of the ratios 1.100" in printed
    assert main(["plot", str(kept), "plots"]) == 0
    assert "picture: plots/ratios.png" in capsys.readouterr().out
    assert main(["plot", str(kept), "plots"]) == 1
    assert main(["plot", str(kept), "plots", "--force"]) == 0
    capsys.readouterr()
    assert main(["show", "nowhere.jsonl"]) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_goals(kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["goals", "--tables", str(kept)]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("Some CPU, 4 cores, 1 thread")
    assert "not measured norm_pool, out=, 1.2 times as fast as avg_pool2d: 0 of 1" in printed
    assert "109–112" in printed
    monkeypatch.setattr(command, "machine_files", list)
    assert main(["goals"]) == 1
    assert "there are no results in" in capsys.readouterr().err


def test_a_text_that_is_not_up_to_date_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "texts", lambda: {page.ROOT / "docs" / "nowhere.md": "text"})
    assert main(["page", "--check"]) == 1
    assert capsys.readouterr().out == "docs/nowhere.md is not what the results say\n"
    assert not (page.ROOT / "docs" / "nowhere.md").exists()
