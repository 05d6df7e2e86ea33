"""The command `stgp bench`, in process: what it prints and writes, and what it refuses before anything is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import command, devices
from benchmarks.devices import Cpu
from benchmarks.machine import describe
from benchmarks.measure import LATE, LOST, take_turns
from benchmarks.providers import Provider, chosen
from benchmarks.results import encode, file_name, load
from benchmarks.workloads import QUICK, WORKLOADS
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.cli.main import main

pytestmark = pytest.mark.usefixtures("caches")

SHAPE = "4x5x5x64"
FAST = ["--device", "cpu", "--shape", SHAPE, "--provider", "llava_avg_pool", "norm_pool:reference", "--samples", "2"]


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; threads may be on any core, and little is warmed up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(devices, "pin_threads", lambda count: [])
    monkeypatch.setattr(devices._median_us, "__defaults__", (lambda: None, 5, 0.01))
    monkeypatch.setattr(take_turns, "__defaults__", (lambda share: None, 0.0))
    monkeypatch.setattr(Cpu, "fp32_gflops", lambda device: 123.5)
    monkeypatch.setattr(Cpu, "others_cores", lambda device: lambda: 0.0)


def bench(*arguments: str) -> int:
    return main(["bench", *arguments])


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def spoilt(monkeypatch: pytest.MonkeyPatch, name: str, call: Any) -> None:
    """Puts `call` in place of what a provider does."""

    def chosen_and_spoilt(*arguments: Any) -> list[Provider]:
        return [replace(p, call=call) if p.name == name else p for p in chosen(*arguments)]

    monkeypatch.setattr(command, "chosen", chosen_and_spoilt)


# ---- measuring ----


def test_results_are_printed_and_appended(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--quick", *FAST, "-o", "new/results.jsonl") == 0
    printed = capsys.readouterr().out
    assert "4 × 5 × 5 × 64 bfloat16" in printed
    assert "LLaVA avg pooling" in printed
    assert "appended to new/results.jsonl" in printed
    assert files() == ["new/results.jsonl"]
    before = Path("new/results.jsonl").read_bytes()

    (results,) = load(Path("new/results.jsonl"))
    run = results.run
    assert (run.device["type"], run.peaks) == ("cpu", {"fp32_gflops": 123.5})
    assert run.settings == {
        "quick": True,
        "baseline": "llava_avg_pool",
        "shapes": [SHAPE],
        "providers": ["llava_avg_pool", "norm_pool:reference"],
        "skipped": [],
        "pinned_to": [],
    }
    rows = {row.provider: row for row in results.rows}
    assert set(rows) - {"read", "ceiling"} == {"copy", "llava_avg_pool", "norm_pool:reference"}
    assert {(row.run, row.workload, row.check, row.samples) for row in rows.values()} == {(run.run, SHAPE, "ok", 2)}

    assert bench(*FAST, "--shape", "3x4x4x64:fp32", "-o", "new/results.jsonl", "--baseline", "copy") == 0
    assert Path("new/results.jsonl").read_bytes().startswith(before)
    first, second = load(Path("new/results.jsonl"))
    assert len(first.rows) == len(rows)
    assert second.workloads == [SHAPE, "3x4x4x64:fp32"]
    assert second.run.settings["quick"] is False
    assert {row.baseline for row in second.rows} == {"copy"}


@pytest.mark.skipif(compiled.LIBRARY is None, reason="the compiled library was not built")
def test_our_kernels_are_timed() -> None:
    assert bench("--device", "cpu", "--shape", SHAPE, "--provider", "grid_pool", "--skip", "*:reference",
                 "--samples", "3", "--threads", "1", "-o", "a.jsonl") == 0  # fmt: skip
    (results,) = load(Path("a.jsonl"))
    assert [row.provider for row in results.rows if row.op] == ["grid_pool:cpu:out", "grid_pool:cpu"]
    assert results.run.device["threads"] == 1
    assert results.run.settings["skipped"] == ["*:reference"]


@pytest.mark.parametrize("folder", [None, "benchmarks/results"])
def test_results_go_to_the_file_of_the_machine(folder: str | None) -> None:
    if folder is not None:
        Path(folder).mkdir(parents=True)
    assert bench(*FAST) == 0
    name = file_name(describe("cpu")["device"])
    assert files() == [f"{folder}/{name}" if folder else name]


def test_quick_results_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--quick", *FAST) == 0
    assert "quick results are not kept" in capsys.readouterr().out
    assert files() == []


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--quick", *FAST, "--json", "-o", "a.jsonl") == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["kind"] for line in lines] == ["run", *["row"] * (len(lines) - 1)]
    assert printed.out == Path("a.jsonl").read_text()
    assert "torch" in printed.err
    assert bench("--quick", *FAST, "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(lines)


def test_rows_are_written_as_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a later workload leaves those before it."""
    measured = command.measure

    def measure(workload: Any, *arguments: Any, **given: Any) -> Any:
        if workload.name != SHAPE:
            raise KeyboardInterrupt
        return measured(workload, *arguments, **given)

    monkeypatch.setattr(command, "measure", measure)
    assert bench(*FAST, "--shape", "3x4x4x64", "-o", "a.jsonl") == 130
    (results,) = load(Path("a.jsonl"))
    assert results.workloads == [SHAPE]


def test_an_interrupted_run_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file has of the same code, versions and device is passed over, right or wrong; what ended a process, on
    other shapes too; not what there was no time for."""
    arguments = [*FAST, "--continue", "--times-only", "-o", "r.jsonl"]
    assert bench(*arguments) == 0
    (first,) = load(Path("r.jsonl"))
    assert {row.provider: (row.check, row.launches) for row in first.rows}["norm_pool:reference"] == ("ok", None)
    assert bench(*arguments) == 0
    assert bench(*arguments, "--quick") == 0
    assert [len(results.rows) for results in load(Path("r.jsonl"))] == [len(first.rows), 0, len(first.rows)]

    spoilt(monkeypatch, "avg_pool2d", lambda x: pytest.fail("called"))
    lost = replace(first.rows[-1], provider="avg_pool2d", workload="2x5x5x64", check=LOST, p50_us=None)
    with Path("r.jsonl").open("a") as file:
        file.write(encode(lost) + "\n")
    assert bench(*arguments, "--provider", "avg_pool2d", "max_pool2d") == 0
    (timed,) = (row for row in load(Path("r.jsonl"))[-1].rows if row.provider == "max_pool2d")
    late = replace(timed, check=LATE, p50_us=None)
    with Path("r.jsonl").open("a") as file:
        file.write(encode(late) + "\n")
    assert bench(*arguments, "--provider", "avg_pool2d", "max_pool2d") == 0
    assert {row.provider for row in load(Path("r.jsonl"))[-1].rows} >= {"max_pool2d"}
    monkeypatch.setattr(command, "describe", lambda *given: describe(*given) | {"versions": {"torch": "another"}})
    assert bench(*arguments) == 0
    assert [row.provider for row in load(Path("r.jsonl"))[-1].rows] == [row.provider for row in first.rows]


def test_rows_are_written_before_a_process_may_end_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(x: Tensor) -> Tensor:
        raise SystemExit(3)

    spoilt(monkeypatch, "llava_avg_pool", ends)
    with pytest.raises(SystemExit):
        bench(*FAST, "--continue", "-o", "r.jsonl")
    found = {row.provider: (row.check, row.p50_us) for row in load(Path("r.jsonl"))[0].rows}
    assert found == {"norm_pool:reference": ("ok", None), "llava_avg_pool": (LOST, None)}


def test_who_else_used_the_machine_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--quick", *FAST) == 0
    assert "NOT QUIET" not in capsys.readouterr().out
    monkeypatch.setattr(Cpu, "others_cores", lambda device: lambda: 0.52)
    assert bench("--quick", *FAST) == 0
    assert "NOT QUIET: others used up to 0.52 cores meanwhile" in capsys.readouterr().out


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert bench("--quick", *FAST, "-o", "a.jsonl") == 0
    assert "no ceiling: ceiling.cpp: " in capsys.readouterr().out
    (results,) = load(Path("a.jsonl"))
    assert "ceiling" not in {row.provider for row in results.rows}


def test_the_process_is_left_as_it_was() -> None:
    threads = torch.get_num_threads()
    assert bench("--quick", *FAST, "--threads", "1") == 0
    assert bench("--quick", *FAST, "--threads", "3", "--baseline", "nobody") == 1
    assert torch.get_num_threads() == threads


# ---- results that are not right ----


@pytest.mark.parametrize(
    ("call", "check"),
    [(lambda x: x[:, :2, :2] * 0, "wrong: off by "), (lambda x: x.no_such_method(), "failed: AttributeError: ")],
    ids=["wrong", "failed"],
)
def test_wrong_results_are_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: Any, check: str
) -> None:
    spoilt(monkeypatch, "llava_avg_pool", call)
    assert bench(*FAST, "-o", "a.jsonl") == 1
    assert check.partition(":")[0] in capsys.readouterr().out
    (results,) = load(Path("a.jsonl"))
    found = {row.provider: row for row in results.rows}
    assert found["llava_avg_pool"].check.startswith(check)
    assert found["llava_avg_pool"].p50_us is None
    assert found["norm_pool:reference"].check == "ok"


def test_what_does_not_fit_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Cpu, "free_bytes", lambda device: 0)
    assert bench(*FAST, "-o", "a.jsonl") == 0
    assert "skipped" in capsys.readouterr().out
    (results,) = load(Path("a.jsonl"))
    assert all(row.check.startswith("skipped: takes ") for row in results.rows)


def test_a_process_that_hangs_is_ended() -> None:
    """And one that does not is let be."""
    code = (
        "import time\n"
        "from benchmarks.command import _limited\n"
        "with _limited(1): pass\n"
        "with _limited(None): time.sleep(1.5)\n"
        "print('still there', flush=True)\n"
        "with _limited(1): time.sleep(60)\n"
        "print('too late')\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (1, "still there\n")
    assert "Timeout" in done.stderr
    assert "in <module>" in done.stderr


# ---- refused before anything is timed ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "4x5x5"], ["shape must be TxHxWxC", "llava-video-7b", "got '4x5x5'"]),
        (["--provider", "nope"], ["provider must be among", "grid_pool:reference", "llava_avg_pool", "got 'nope'"]),
        (["--provider", "grid_pool:triton"], ["provider must be among", "got 'grid_pool:triton'"]),
        (["--skip", "nope*"], ["provider must be among", "got 'nope*'"]),
        (["--baseline", "nope"], ["baseline must be copy, ceiling or one of", "llava_avg_pool", "got 'nope'"]),
        (["--device", "tpu"], ["device must be cpu, cuda or cuda:N, got 'tpu'"]),
        (["--device", "cuda", "--threads", "2"], ["--threads is for the CPU"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_mistakes_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], said: Sequence[str]
) -> None:
    monkeypatch.setattr(command, "measure", lambda *arguments, **given: pytest.fail("something was timed"))
    assert bench(*FAST, "-o", "new/a.jsonl", *arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("stgp bench: ")
    assert len(printed.err.splitlines()) == 1
    assert [text for text in said if text not in printed.err] == []
    assert printed.out == ""
    assert files() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [["--list"], FAST], ids=["list", "measure"])
def test_a_device_that_there_is_not(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> None:
    assert bench(*arguments, "--device", "cuda") == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "stgp bench: device cuda: 0 CUDA devices can be used\n")


@pytest.mark.parametrize(
    "arguments",
    [["--samples", "0"], ["--threads", "x"], ["--limit", "-1"], ["--shape"], ["--list", "--load", "a"],
     ["--compare", "a"], ["--provid", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(*arguments)
    assert caught.value.code == 2


def test_the_usual_baseline_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no output_size."""
    monkeypatch.setattr(command, "measure", lambda *arguments, **given: [])
    monkeypatch.setattr(command, "workload_table", lambda rows, width: "")
    assert bench("--device", "cpu", "--quick", "--shape", "budget-10x10") == 0


def test_what_is_skipped_may_be_missing_anyway() -> None:
    """torch.compile is timed on the shapes of goals alone."""
    assert bench("--quick", *FAST, "--skip", "compiled_grid_pool") == 0


# ---- pictures ----


def test_pictures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert bench("--quick", *FAST, "-o", "a.jsonl", "--plot", "plots/new") == 0
    drawn = [name for name in files() if name.startswith("plots/new/")]
    assert "plots/new/roofline.png" in drawn
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    assert [f"picture: {name}" for name in drawn] == sorted(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("picture: ")
    )
    before = {name: Path(name).read_bytes() for name in files()}
    with monkeypatch.context() as patch:
        patch.setattr(command, "measure", lambda *arguments, **given: pytest.fail("something was timed"))
        assert bench("--quick", *FAST, "-o", "a.jsonl", "--plot", "plots/new") == 1
    assert "exists already" in capsys.readouterr().err
    assert bench("--load", "a.jsonl", "--plot", "plots/new") == 1
    assert "exists already" in capsys.readouterr().err
    assert {name: Path(name).read_bytes() for name in files()} == before

    for name in drawn:
        Path(name).write_text("old")
    assert bench("--load", "a.jsonl", "--plot", "plots/new", "--force") == 0
    assert {name: Path(name).read_bytes() for name in files()} == before
    capsys.readouterr()
    assert bench("--quick", *FAST, "--plot", "plots/new", "--force", "--json") == 0
    printed = capsys.readouterr()
    assert {json.loads(line)["kind"] for line in printed.out.splitlines()} == {"run", "row"}
    assert printed.err.count("picture: ") == len(drawn)


# ---- results that are there ----


def test_results_are_shown_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench(*FAST, "-o", "a.jsonl") == 0
    first = capsys.readouterr().out
    assert bench(*FAST, "-o", "a.jsonl", "--shape", "3x4x4x64") == 0
    second = capsys.readouterr().out
    names = [results.run.run for results in load(Path("a.jsonl"))]
    monkeypatch.setattr(command, "measure", lambda *arguments, **given: pytest.fail("something was timed"))
    for argument, shown in (("a.jsonl", second), (f"a.jsonl@{names[0]}", first), (f"a.jsonl@{names[1]}", second)):
        assert bench("--load", argument) == 0
        printed = capsys.readouterr().out.strip()
        assert printed.startswith("4 × 5 × 5 × 64 bfloat16")
        assert printed in shown
    assert files() == ["a.jsonl"]
    assert bench("--load", "b.jsonl") == 1
    assert capsys.readouterr().err == "stgp bench: b.jsonl: No such file or directory\n"
    assert bench("--load", "a.jsonl@1999") == 1
    assert "no run whose name begins with '1999'" in capsys.readouterr().err


def test_results_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*FAST, "-o", "a.jsonl") == 0
    text = Path("a.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    for line in lines[1:]:
        factor = 100.0 if line["provider"] == "llava_avg_pool" else 1.0
        line |= dict.fromkeys(("p20_us", "p50_us", "p80_us"), factor)
    lines[0]["device"]["name"] = "Another CPU"
    Path("b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for line in lines[1:]:
        line |= dict.fromkeys(("p20_us", "p50_us", "p80_us"), 1.0)
    Path("c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    capsys.readouterr()
    assert bench("--compare", "c.jsonl", "b.jsonl") == 0
    printed = capsys.readouterr().out
    assert printed.count("slower") == 2  # in the row, and in the summary
    assert "1 slower" in printed
    assert f"{len(lines) - 2} within the noise" in printed
    assert "differ" not in printed
    assert bench("--compare", "a.jsonl", "b.jsonl") == 0
    assert "→ Another CPU" in capsys.readouterr().out

    for line in lines[1:]:
        line["workload"] = "another one"
    Path("d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert bench("--compare", "a.jsonl", "d.jsonl") == 1
    assert "a.jsonl and d.jsonl have no provider on no workload in common" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert bench("--list", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    shown = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│")}
    assert list(shown) == list(WORKLOADS)
    assert [name for name, line in shown.items() if "quick" in line] == [name for name in WORKLOADS if name in QUICK]
    assert "64 × 27 × 27 × 3584 │ bfloat16 │ 13 × 13" in " ".join(shown["llava-video-7b"].split())
    known = printed.split("providers on cpu: ")[1].strip().split(", ")
    assert {"norm_pool:reference", "llava_avg_pool", "naive_grid_pool", "compiled_grid_pool"} < set(known)
    assert ("grid_pool:cpu" in known) == (compiled.LIBRARY is not None)
    assert files() == []
    assert bench("--list", "--device", "tpu") == 1
    printed = capsys.readouterr()
    assert (printed.out, "got 'tpu'" in printed.err) == ("", True)


def test_without_a_shape_all_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def measure(workload: Any, timed: Sequence[Provider], *arguments: Any, **given: Any) -> list[Any]:
        asked.append((workload.name, [provider.name for provider in timed]))
        return []

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "workload_table", lambda rows, width: "")
    monkeypatch.setattr(command.gc, "collect", lambda: 0)  # which takes longer than all else here
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    assert bench("--device", "cpu", "--skip", "compiled_grid_pool", "-o", "a.jsonl") == 0
    assert asked == [
        (w.name, [p.name for p in chosen(w, "cpu", [], ["compiled_grid_pool"])]) for w in WORKLOADS.values()
    ]
    asked.clear()
    assert bench("--device", "cpu", "--quick", "--provider", "max_pool2d") == 0
    assert asked == [(name, ["max_pool2d"]) for name in QUICK]
