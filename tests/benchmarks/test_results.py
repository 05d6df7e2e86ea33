"""Files of results lose nothing, the last state of the code counts, and comparisons know the noise."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.machine import describe, new_run
from benchmarks.results import (
    FOLDER,
    BenchRow,
    Results,
    Run,
    add_rates,
    append,
    compare,
    encode,
    file_name,
    last_state,
    last_states,
    load,
    machine_files,
    pick,
)
from tests.benchmarks.rows import RUN, make_row


def run_named(name: str, **values: Any) -> Run:
    return replace(RUN, run=name, **values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file that does not exist yet, in a folder that does not either."""
    return tmp_path / "new" / "me@home.jsonl"


# ---- files ----


def test_lines_are_what_was_written(path: Path) -> None:
    """Values that are None are left out. The last row of a provider counts: it may be written before it is timed."""
    row = make_row("norm_pool:cpu", 10.0, groups=("main", "C"), settings={"output_size": [3, 4]}, launches=1)
    append(path, RUN, row, make_row("copy", check="failed: the process ended in it"), make_row("copy", 2.0))
    first, second, *_ = map(json.loads, path.read_text().splitlines())
    assert first == {"kind": "run", **asdict(RUN)}
    assert second.keys() == {"kind", *(name for name, value in asdict(row).items() if value is not None)}
    (results,) = load(path)
    assert results.run == RUN
    assert [asdict(found) for found in results.rows] == [asdict(row), asdict(make_row("copy", 2.0))]


@pytest.mark.parametrize("left", [1, -3])
def test_files_are_only_appended_to(path: Path, left: int) -> None:
    """Each line is there as soon as it is written; one that was cut costs no other."""
    append(path, run_named("a"), make_row("copy", 1.0, run="a"))
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:left])
    assert [len(results.rows) for results in load(path)] == [1]
    append(path, run_named("b"))
    append(path, make_row("copy", 2.0, run="b"))
    assert [(results.run.run, len(results.rows)) for results in load(path)] == [("a", 1), ("b", 1)]
    assert path.read_text().startswith(whole)


def test_rows_belong_to_their_runs(path: Path) -> None:
    """Two runs may write at a time. Lines without a run, of other kinds and with unknown fields do no harm."""
    times = (("a", "copy", 1.0), ("b", "copy", 2.0), ("a", "avg_pool2d", 3.0), ("c", "copy", 4.0))
    rows = [make_row(provider, time, run=run) for run, provider, time in times]
    append(path, run_named("a"), run_named("b"), *rows)
    later = json.loads(encode(make_row("read", 5.0, run="b"))) | {"later": 1}
    with path.open("ab") as file:
        file.write(b'\n[1]\n7\n{"kind": "note"}\nnull\n\xff\xfe{\n' + json.dumps(later).encode())
    found = {results.run.run: [row.p50_us for row in results.rows] for results in load(path)}
    assert found == {"a": [1.0, 3.0], "b": [2.0, 5.0]}


def test_runs_are_picked_by_name(path: Path) -> None:
    names = ["20261121T000000Z-aaaa", "20261122T000000Z-bbbb", "20261122T100000Z-cccc", "20261123T000000Z-dddd"]
    append(path, *map(run_named, names))
    picked = {argument: pick(f"{path}{argument}").run.run for argument in ("", "@", "@20261122", f"@{names[0]}")}
    assert picked == {"": names[3], "@": names[3], "@20261122": names[2], f"@{names[0]}": names[0]}
    with pytest.raises(ValueError, match="holds no run whose name begins with '2027'"):
        pick(f"{path}@2027")
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"home\.jsonl: holds no results of benchmarks"):
        load(path)


def test_names_of_files(tmp_path: Path) -> None:
    name = "AMD EPYC(tm) 9B14 96-Core Processor "
    assert file_name({"type": "cpu", "name": name}) == "cpu-amd-epyc-tm-9b14-96-core-processor.jsonl"
    for made in ("cuda-nvidia-h200.jsonl", "cpu-b.jsonl", "cpu-b.json", "fuzz-1.jsonl"):
        (tmp_path / made).touch()
    assert [path.name for path in machine_files(tmp_path)] == ["cpu-b.jsonl", "cuda-nvidia-h200.jsonl"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jsonl")), ids=lambda path: path.name)
def test_results_that_are_kept_are_whole(path: Path) -> None:
    """Every row counts, and every run has rows."""
    assert path in machine_files()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = load(path)
    assert sum(line["kind"] == "row" for line in lines) == sum(len(results.rows) for results in found)
    assert sum(line["kind"] == "run" for line in lines) == sum(bool(results.rows) for results in found) > 0


# ---- the state that counts ----


def test_the_last_state_that_has_a_part(path: Path) -> None:
    """The later of two runs counts where both timed the same. Quick runs and those without rows do not count.

    A part is of the run that timed it, since another may have run in another environment.
    """

    def run(name: str, day: int, package: str, *rows: BenchRow, library: str | None = "l", quick: bool = False) -> None:
        source = {"package_sha256": package, "library_sha256": library}
        append(path, run_named(name, utc=f"2026-11-0{day}", source=source, settings={"quick": quick}))
        append(path, *(replace(row, run=name) for row in rows))

    run("old", 1, "a", make_row("copy", 1.0), make_row("push:1:cpu", 5.0, workload="stream", groups=("stream",)))
    run("before the library", 2, "b", make_row("copy", 2.0), library=None)
    run("another library", 3, "b", make_row("read", 2.5), library="k")
    run("new", 4, "b", make_row("grid_pool:cpu", 3.0), make_row("copy", 4.0))
    run("elsewhere", 5, "b", make_row("evs", 9.0, workload="pruning", groups=("pruning",)))
    run("quick", 6, "c", make_row("copy", 6.0), quick=True)
    run("empty", 7, "c")
    last = last_state(path)
    assert last is not None
    assert last.run.run == "elsewhere"
    assert {row.provider: row.p50_us for row in last.rows} == {"copy": 4.0, "grid_pool:cpu": 3.0, "evs": 9.0}
    found = {part: last_state(path, part) for part in ("prefill", "stream", "llava-video-7b", "main", "pruning")}
    names = {part: each and each.run.run for part, each in found.items()}
    assert names == {
        "prefill": None,
        "stream": "old",
        "llava-video-7b": "new",
        "main": "new",
        "pruning": "elsewhere",
    }


def test_the_newest_machine_comes_first(path: Path) -> None:
    other = path.with_name("another.jsonl")
    append(path, RUN, make_row("copy", 1.0))
    append(other, run_named("later", utc="2026-12-01"), make_row("copy", 2.0, run="later", groups=("main", "C")))
    assert [results.run.run for results in last_states([path, other], "main")] == ["later", RUN.run]
    assert [results.run.run for results in last_states([path, other], "C")] == ["later"]


# ---- what follows from times ----


def test_rates_and_ratios() -> None:
    rows = [make_row("copy", 10.0), make_row("ceiling", 5.0, write_bytes=0), make_row("a", 4.0), make_row("b")]
    add_rates(rows, "copy")
    copied, read = 383.1e3 / 10, 305.6e3 / 5  # KB in µs
    assert [row.gb_per_s for row in rows[:2]] == pytest.approx([copied, read])
    assert [row.percent_of_copy for row in rows[:3]] == pytest.approx([100, 100 * read / copied, 250], abs=0.01)
    assert [row.percent_of_ceiling for row in rows[:2]] == pytest.approx([100 * copied / read, 100], abs=0.01)
    assert (rows[3].gb_per_s, rows[3].percent_of_copy, rows[3].percent_of_ceiling) == (None, None, None)
    assert [row.times_baseline for row in rows] == [1.0, 2.0, 2.5, None]
    given = [make_row("a:out", 4.0), make_row("a", 8.0), make_row("b:out", 2.0), make_row("b", 2.5)]
    add_rates(given, "a")
    assert [row.times_baseline for row in given] == [1.0, 1.0, 2.0, 3.2]  # given memory is compared with given memory
    add_rates(rows, "b")
    assert {(row.baseline, row.times_baseline) for row in rows} == {("b", None)}


def test_changes_beyond_the_noise() -> None:
    """The spread of either run is 3 %. What only one run timed is left out."""

    def results(**times: float | None) -> Results:
        return Results(RUN, [make_row(name, time) for name, time in times.items()])

    before = results(same=100.0, slower=100.0, faster=100.0, little=100.0, old=1.0, failed=None)
    after = results(same=100.0, slower=106.1, faster=94.2, little=105.9, new=1.0, failed=1.0)
    found = {change.after.provider: change for change in compare(before, after)}
    verdicts = {"same": "", "slower": "slower", "faster": "faster", "little": ""}
    assert {name: change.verdict for name, change in found.items()} == verdicts
    assert (found["slower"].ratio, found["slower"].noise) == (pytest.approx(1.061), pytest.approx(0.06))


# ---- where they were measured ----


def test_a_run_describes_its_machine_and_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run records a digest of the package, and the commit in a checkout or where STGP_COMMIT says it."""
    runs = [new_run("cpu", {"quick": True}, threads=3) for _ in range(2)]
    assert runs[0].run != runs[1].run
    assert (runs[0].device["type"], runs[0].device["threads"], runs[0].settings) == ("cpu", 3, {"quick": True})
    assert json.loads(encode(runs[0])) == {"kind": "run", **asdict(runs[0])}
    (tmp_path / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(machine, "PACKAGE", tmp_path)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("STGP_COMMIT", "")
    first = describe("cpu")["source"]
    assert (first["commit"], first["dirty"], first["library_sha256"]) == (None, None, None)
    (tmp_path / "a.py").write_text("a = 2\n")
    (tmp_path / "_C.so").touch()
    monkeypatch.setenv("STGP_COMMIT", "7cc5a8a")
    second = describe("cpu")["source"]
    assert second["package_sha256"] != first["package_sha256"]
    assert (second["commit"], len(second["library_sha256"])) == ("7cc5a8a", 64)


@pytest.mark.parametrize(
    ("limit", "used", "total", "available"), [("max", 5, 1000, 400), ("600", 500, 600, 100), ("600", 700, 600, 0)]
)
def test_memory_is_what_the_control_group_leaves(
    monkeypatch: pytest.MonkeyPatch, limit: str, used: int, total: int, available: int
) -> None:
    files = {
        "/proc/meminfo": "MemTotal:   1000 kB\nMemFree:  9 kB\nMemAvailable:   400 kB\n",
        "/sys/fs/cgroup/memory.max": limit if limit == "max" else f"{int(limit) << 10}\n",
        "/sys/fs/cgroup/memory.current": f"{used << 10}\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path, *arguments, **given: files[str(path)])
    assert machine.memory_bytes("MemTotal") == total << 10
    assert machine.memory_bytes("MemAvailable") == available << 10
    assert machine.memory_bytes("MemElse") is None
