"""In the one command for GPUs a fault costs what it is in, and nothing that was found is lost."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.benchmarks.rows import make_row

pytest.importorskip("triton", reason="no Triton")
from benchmarks.goals import GOALS
from benchmarks.measure import LATE, LOST
from benchmarks.results import FOLDER, encode, load
from tools import gpu_check
from tools.gpu_check import Check, Lines, Stage

PYTHON = (sys.executable, "-c")
SHAPE = "llava-video-7b"
HANG = "import os, time; open(os.environ['STGP_HANGING'], 'w').write(str(os.getpgrp())); time.sleep(1000)"


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Its clock goes on only while the process lives that STGP_HANGING's file names: by ten seconds at each look."""
    hanging, looks = tmp_path / "hanging", [0.0]

    def monotonic() -> float:
        if hanging.exists() and Path("/proc", hanging.read_text()).exists():
            looks.append(looks[-1] + 10)
        return looks[-1]

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # what is tested is no worker, whoever runs the test
    monkeypatch.setenv("STGP_HANGING", str(hanging))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=monotonic))
    (tmp_path / "results.jsonl").touch()
    return Check(tmp_path / "results.jsonl", tmp_path / "log", 600)


def append(name: str, check: str = "passed") -> str:
    """Return Python code that appends how a test went."""
    line = json.dumps({"kind": "test", "name": name, "check": check})
    return f"import os; open(os.environ['STGP_RESULTS'], 'a').write({line + chr(10)!r});"


@pytest.mark.needs("no gpu")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(FOLDER.glob("*"))
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "no CUDA device: nothing was measured\n")
    assert set(FOLDER.glob("*")) == before


def test_lines_say_how_all_stands(tmp_path: Path) -> None:
    """The last line of a name counts, from a byte on. Lines of other kinds and cut ones are passed over."""
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "test", "name": "before", "check": "passed"}\n')
    lines = Lines(path)
    untimed = replace(make_row("", 1.0), p50_us=None)
    rows = [make_row("a", 1.0, check=LOST), make_row("a", 2.0), replace(untimed, provider="b", check=LOST)]
    for row in (*rows, replace(untimed, provider="c")):
        lines.append(encode(row))
    lines.append('{"kind": "test", "name": "tests/x.py::y", "check": "skipped"}')
    lines.append('{"kind": "stage", "name": "smoke"}')
    lines.append('{"kind": "te')
    states = {f"{SHAPE} a": "ok", f"{SHAPE} b": LOST, f"{SHAPE} c": "checked", "tests/x.py::y": "skipped"}
    assert lines.states() == states
    lines.forgive()
    states[f"{SHAPE} b"] = LATE
    assert lines.states() == states
    assert Lines(path, 0).states() == {"before": "passed", **states}


def test_a_process_that_falls_silent_is_killed_with_its_children(check: Check) -> None:
    """It does not matter which signals the processes ignore, and what they have printed is in the log."""
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{ignore}; import time; time.sleep(1000)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    assert check.run_process((*PYTHON, f"{ignore}; {code}; {HANG}"), 1e9, patience=30) is None
    state = Path(f"/proc/{check.log.read_text().split()[-1]}/stat")
    for _ in range(600):  # until whoever has inherited it has noticed
        if alive := state.exists() and state.read_text().split()[2] != "Z":
            time.sleep(0.1)
    assert not alive


def test_a_process_that_goes_on_appending_may_take_longer(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something is appended every two seconds, and the process ends after 40."""
    looks = [0.0]

    def monotonic() -> float:
        Lines(check.results).append("over" if looks[-1] == 40 else "{}")
        looks.append(looks[-1] + 2)
        return looks[-1]

    monkeypatch.setattr(gpu_check.time, "monotonic", monotonic)
    code = f"import time\nwhile 'over' not in open({str(check.results)!r}).read(): time.sleep(0.1)\nraise SystemExit(7)"
    assert check.run_process((*PYTHON, code), 1e9, patience=7) == 7


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (append("a") + append("b", "skipped"), ("passed", [0])),
        (append("a", "failed: assert 1 == 2") + "raise SystemExit(1)", ("failed", [1, 1])),
        (append("a") + "os.abort()", ("failed", [-6, -6])),
        ("raise SystemExit(86)", ("failed", [86])),
        ("pass", ("passed", [0])),
    ],
)
def test_how_a_stage_went(code: str, expected: tuple[str, list[int]], check: Check) -> None:
    """A process that fails is started again, until it gets no further."""
    found = check.run_stage(Stage("some", 60, (*PYTHON, code)), 60)
    assert (found["status"], found["codes"]) == expected


def test_who_had_no_more_time_is_not_to_blame(check: Check) -> None:
    found = check.run_stage(Stage("some", 60, (*PYTHON, append("a") + append("b", LOST) + HANG), patience=1e9), 60)
    assert (found["status"], found["codes"]) == ("unfinished", [None])
    assert Lines(check.results, 0).states() == {"a": "passed", "b": LATE}


def test_stages_run_while_there_is_time(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage may take what later ones are not promised, and without CUDA kernels their stages are left out."""
    check.why_no_cuda = "no library"
    nothing = (*PYTHON, "pass")
    stages = [Stage("a", 1, (*PYTHON, append("x"))), Stage("b", 1, nothing, cuda=True), Stage("c", 1000, nothing)]
    assert check.run_stages([*stages, Stage("d", 1, nothing)]) == ["unfinished", "skipped", "passed", "passed"]
    assert check.run_stages(stages[:2]) == ["passed", "skipped"]
    written = [(line["name"], line["status"]) for line in Lines(check.results, 0).read() if line["kind"] == "stage"]
    assert written[-2:] == [("a", "passed"), ("b", "skipped")]
    assert "b: skipped, 0 s: no library" in capsys.readouterr().out


def test_promises_fit_into_the_time(check: Check) -> None:
    stages = gpu_check.all_stages(check, "90")
    assert sum(stage.seconds for stage in stages if stage.fast) <= gpu_check.FAST_SECONDS - 20
    assert sum(stage.seconds for stage in stages) <= gpu_check.ALL_SECONDS - 20
    names = [stage.name for stage in stages]
    assert names[:6] == ["smoke", "goals", "goals, cuda", "tune", "tune, cuda", "counters"]
    assert [stage.fast for stage in stages] == [True] * 7 + [False] * (len(stages) - 7)
    assert names[-1] == "build"
    check.why_no_cuda = "no library"
    names = [stage.name for stage in gpu_check.all_stages(check, "90")]
    assert names.index("build") < names.index("goals, cuda")


def test_a_faulty_provider_costs_its_own_times(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """One provider is wrong, and then one dies, one hangs and one makes the device useless: each costs a process."""
    faults = {"norm_pool:triton": "wrong", "llava_avg_pool": "hangs", "avg_pool2d": "dies", "naive_grid_pool": "sticky"}
    said = {"wrong": "wrong: off by", "hangs": LOST, "dies": LOST, "sticky": "failed: RuntimeError"}
    monkeypatch.setenv("STGP_STAND_INS", "tests.tools.gpu_stand_ins")
    monkeypatch.setenv("STGP_FAULTS", json.dumps(faults))
    (stage,) = [stage for stage in gpu_check.all_stages(check, "90") if stage.name == "goals"]
    assert {*GOALS, "--provider", "llava_avg_pool"} < {*stage.command}
    command = (*stage.command[: stage.command.index("--shape") + 1], SHAPE, "--provider", *faults, "max_pool2d")
    found = check.run_stage(Stage("goals", 45, command), 500)
    assert (found["status"], found["codes"]) == ("failed", [-6, None, 1, 0]), check.log.read_text()
    last = {row.provider: row for results in load(check.results) for row in results.rows}
    for name, fault in faults.items():
        assert last.pop(name).check.startswith(said[fault])
    times = {name: (row.check, row.p50_us) for name, row in last.items()}
    assert times == dict.fromkeys(["copy", "max_pool2d"], ("ok", 100.0))


TESTS = f"""
import os, pytest, torch
def test_before(): pass
def test_hangs(): {HANG}
def test_between(): assert 1 == 2
def test_dies(): os.abort()
def test_left_out(): pytest.skip("not here")
def test_makes_the_device_useless(monkeypatch):
    def fails(): raise RuntimeError("an illegal memory access")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fails
    fails()
def test_after(): pass
"""


@pytest.mark.parametrize("name", ["smoke", pytest.param("test_gpu, triton", marks=pytest.mark.slow)])
def test_a_faulty_test_costs_itself(name: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in one process, or in several, of which one dies and the others go on."""
    (tmp_path / "test_faulty.py").write_text(TESTS)
    monkeypatch.setattr(gpu_check, "TESTS", (str(tmp_path / "test_faulty.py"), "-c", os.devnull))
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 4)
    (stage,) = [stage for stage in gpu_check.all_stages(check, "90") if stage.name == name]
    found = check.run_stage(Stage("tests", 60, stage.command), 500)
    states = {name.split("::")[-1]: state.split(":")[0] for name, state in Lines(check.results, 0).states().items()}
    faulty = ("test_hangs", "test_between", "test_dies", "test_makes_the_device_useless")
    others = {"test_before": "passed", "test_after": "passed", "test_left_out": "skipped"}
    assert states == {**dict.fromkeys(faulty, "failed"), **others}, check.log.read_text()
    assert (found["status"], found["codes"][0]) == ("failed", None)  # what hangs hangs on while another process dies
    assert found["codes"] == [None, -6, 70, 0] or name != "smoke"


def test_a_library_that_does_not_load_is_renamed(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "stgridpool_kernels"
    (package / "backends").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "backends" / "__init__.py").touch()
    (package / "_C.cpython-312.so").touch()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (package / "backends" / "compiled.py").write_text("raise ImportError('undefined symbol')")
    check.probe_library()
    assert check.why_no_cuda == "the compiled library does not load, exit code 1"
    assert [path.name for path in package.glob("_C*")] == ["_C.cpython-312.so.does-not-load"]
    for library, reason in (("None", "there is no compiled library with CUDA kernels"), ("Library", None)):
        (package / "backends" / "compiled.py").write_text(
            f"class Library:\n    build_info = lambda: {{'cuda': '13.0'}}\nLIBRARY = {library}"
        )
        check.probe_library()
        assert check.why_no_cuda == reason
