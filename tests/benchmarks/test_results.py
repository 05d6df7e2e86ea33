"""Files of results, the state of the code that counts, and comparisons with their noise in mind."""

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
    Writer,
    add_rates,
    compare,
    encode,
    file_name,
    last_state,
    load,
    machine_files,
    pick,
)
from tests.benchmarks.rows import RUN, make_row


def run_named(name: str, **values: Any) -> Run:
    return replace(RUN, run=name, **values)


def write(path: Path, *lines: Run | BenchRow) -> None:
    writer = Writer(path)
    for line in lines:
        writer.write(line)
    writer.close()


# ---- files ----


def test_lines_are_what_was_written(tmp_path: Path) -> None:
    """A folder is made for them, and values that are None are left out."""
    path = tmp_path / "new" / "folder" / "results.jsonl"
    row = make_row("norm_pool:cpu", 10.0, groups=("main", "C"), settings={"output_size": [3, 4]}, launches=1)
    write(path, RUN, row)
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["kind"], second["kind"]) == ("run", "row")
    assert first.keys() - {"kind"} == asdict(RUN).keys()
    assert second.keys() - {"kind"} == {name for name, value in asdict(row).items() if value is not None}
    (results,) = load(path)
    assert results.run == RUN
    assert [asdict(found) for found in results.rows] == [asdict(row)]


def test_the_last_row_of_a_provider_counts(tmp_path: Path) -> None:
    """It may be written before it is timed, and it may be timed again."""
    path = tmp_path / "results.jsonl"
    begun, timed = make_row("grid_pool:triton", check="failed: the process ended in it"), make_row("copy", 2.0)
    write(path, RUN, begun, timed, make_row("grid_pool:triton", 3.0))
    assert [(row.provider, row.p50_us) for row in load(path)[0].rows] == [("grid_pool:triton", 3.0), ("copy", 2.0)]


@pytest.mark.parametrize("left", [1, 40, -3])
def test_files_are_only_appended_to(tmp_path: Path, left: int) -> None:
    """Each line is there as soon as it is written; one that was cut costs no other."""
    path = tmp_path / "results.jsonl"
    write(path, run_named("a"), make_row("copy", 1.0, run="a"))
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:left])
    assert [len(results.rows) for results in load(path)] == [1]
    writer = Writer(path)
    writer.write(run_named("b"))
    writer.write(make_row("copy", 2.0, run="b"))
    assert [(results.run.run, len(results.rows)) for results in load(path)] == [("a", 1), ("b", 1)]
    assert path.read_text().startswith(whole)
    writer.close()


def test_rows_belong_to_their_runs(tmp_path: Path) -> None:
    """Two runs may write at a time. Lines without a run, of other kinds and with unknown fields do no harm."""
    path = tmp_path / "results.jsonl"
    times = (("a", "copy", 1.0), ("b", "copy", 2.0), ("a", "avg_pool2d", 3.0), ("c", "copy", 4.0))
    rows = [make_row(provider, time, run=run) for run, provider, time in times]
    write(path, run_named("a"), run_named("b"), *rows)
    later = json.loads(encode(make_row("read", 5.0, run="b"))) | {"later": 1}
    with path.open("ab") as file:
        file.write(b'\n[1]\n7\n{"kind": "note"}\nnull\n\xff\xfe{\n' + json.dumps(later).encode())
    found = {results.run.run: [row.p50_us for row in results.rows] for results in load(path)}
    assert found == {"a": [1.0, 3.0], "b": [2.0, 5.0]}


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl: holds no results of benchmarks"):
        load(tmp_path / "results.jsonl")


def test_runs_are_picked_by_name(tmp_path: Path) -> None:
    path = tmp_path / "me@home.jsonl"
    names = ["20261121T000000Z-aaaa", "20261122T000000Z-bbbb", "20261122T100000Z-cccc", "20261123T000000Z-dddd"]
    write(path, *map(run_named, names))
    picked = {argument: pick(f"{path}{argument}").run.run for argument in ("", "@", "@20261122", f"@{names[0]}")}
    assert picked == {"": names[3], "@": names[3], "@20261122": names[2], f"@{names[0]}": names[0]}
    with pytest.raises(ValueError, match="holds no run whose name begins with '2027'"):
        pick(f"{path}@2027")


def test_names_of_files(tmp_path: Path) -> None:
    name = "AMD EPYC(tm) 9B14 96-Core Processor "
    assert file_name({"type": "cpu", "name": name}) == "cpu-amd-epyc-tm-9b14-96-core-processor.jsonl"
    for made in ("cuda-nvidia-h200.jsonl", "cpu-b.jsonl", "cpu-b.json", "fuzz-1.jsonl"):
        (tmp_path / made).touch()
    assert [path.name for path in machine_files(tmp_path)] == ["cpu-b.jsonl", "cuda-nvidia-h200.jsonl"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jsonl")), ids=lambda path: path.name)
def test_results_that_are_kept_are_whole(path: Path) -> None:
    assert path in machine_files()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = load(path)
    assert sum(line["kind"] == "run" for line in lines) == len(found)
    assert sum(line["kind"] == "row" for line in lines) == sum(len(results.rows) for results in found) > 0
    assert all(results.rows for results in found)


# ---- the state that counts ----


def test_the_last_state_that_has_a_part(tmp_path: Path) -> None:
    """The later of two runs counts where both timed the same. Quick runs and those without rows do not count."""
    path = tmp_path / "results.jsonl"

    def run(
        name: str, day: int, package: str, rows: list[BenchRow], library: str | None = "l", **settings: Any
    ) -> None:
        source = {"package_sha256": package, "library_sha256": library}
        write(path, run_named(name, utc=f"2026-11-0{day}", source=source, settings=settings))
        write(path, *(replace(row, run=name) for row in rows))

    stream = make_row("push:1:cpu", 5.0, workload="stream", groups=("stream",))
    run("old", 1, "a", [make_row("copy", 1.0), stream])
    run("before the library", 2, "b", [make_row("copy", 2.0)], library=None)
    run("another library", 3, "b", [make_row("read", 2.5)], library="k")
    run("new", 4, "b", [make_row("grid_pool:cpu", 3.0), make_row("copy", 4.0)])
    run("quick", 5, "c", [make_row("copy", 6.0)], quick=True)
    run("empty", 6, "c", [])
    last = last_state(path)
    assert last is not None
    assert {row.provider: row.p50_us for row in last.rows} == {"copy": 4.0, "grid_pool:cpu": 3.0}
    assert last_state(path, "prefill") is None
    for part, name in (("stream", "old"), ("llava-video-7b", "new"), ("main", "new")):
        found = last_state(path, part)
        assert found is not None
        assert found.run.run == name


def test_rows_that_are_right_are_found() -> None:
    rows = [make_row("copy", check="skipped: x"), make_row("copy", 1.0, workload="b"), make_row("copy", 3.0)]
    results = Results(RUN, rows)
    assert results.find("llava-video-7b", "copy") is rows[2]
    assert results.find("b", "read") is None
    assert results.workloads == ["llava-video-7b", "b"]
    assert (rows[2].frames, make_row("copy", shape=(8, 32, 27, 27, 896)).frames) == (64, 256)
    assert (rows[2].spread, rows[0].spread) == (pytest.approx(0.03), 0)
    with pytest.raises(ValueError, match="copy on llava-video-7b was not timed"):
        _ = rows[0].us


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
    add_rates(rows, "b")
    assert {(row.baseline, row.times_baseline) for row in rows} == {("b", None)}


def results(**times: float | None) -> Results:
    return Results(RUN, [make_row(name, time) for name, time in times.items()])


def test_changes_beyond_the_noise() -> None:
    """The spread of either run is 3 %. What only one run timed is left out."""
    before = results(same=100.0, slower=100.0, faster=100.0, little=100.0, old=1.0, failed=None)
    after = results(same=100.0, slower=106.1, faster=94.2, little=105.9, new=1.0, failed=1.0)
    found = {change.provider: change for change in compare(before, after)}
    verdicts = {"same": "", "slower": "slower", "faster": "faster", "little": ""}
    assert {name: change.verdict for name, change in found.items()} == verdicts
    assert (found["slower"].ratio, found["slower"].noise) == (pytest.approx(1.061), pytest.approx(0.06))
    before.rows[1].p80_us = 120.0
    assert compare(before, after)[1].verdict == ""


# ---- where they were measured ----


def test_description_of_this_machine() -> None:
    runs = [new_run("cpu", {"quick": True}, threads=3) for _ in range(3)]
    assert len({run.run for run in runs}) == 3
    run = runs[0]
    assert json.loads(encode(run)) == {"kind": "run", **asdict(run)}
    assert run.utc.replace("-", "").replace(":", "").startswith(run.run[:15])
    assert (run.device["type"], run.device["threads"], run.settings) == ("cpu", 3, {"quick": True})
    assert min(run.device["cores"], len(run.device["name"]), len(run.versions["torch"])) >= 1
    assert len(run.source["package_sha256"]) == 64


def test_the_source_is_part_of_the_description(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has a digest of the package, and a commit in a checkout or where STGP_COMMIT says it."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(machine, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("STGP_COMMIT", "")
    first = describe("cpu")["source"]
    assert (first["commit"], first["dirty"], first["library_sha256"]) == (None, None, None)
    (tmp_path / "package" / "a.py").write_text("a = 2\n")
    (tmp_path / "package" / "_C.so").touch()
    monkeypatch.setenv("STGP_COMMIT", "7cc5a8a")
    second = describe("cpu")["source"]
    assert second["package_sha256"] != first["package_sha256"]
    assert (second["commit"], len(second["library_sha256"])) == ("7cc5a8a", 64)
    assert machine.output_of(["no-such-program"]) is None
    assert machine.output_of(["sh", "-c", "echo x; exit 1"]) is None
    assert machine.output_of(["sh", "-c", "echo x"]) == "x"


@pytest.mark.parametrize(
    ("limit", "used", "total", "available"),
    [("max", "5", 1000, 400), ("600", "500", 600, 100), ("600", "50", 600, 400), ("600", "700", 600, 0)],
)
def test_memory_is_what_the_control_group_leaves(
    monkeypatch: pytest.MonkeyPatch, limit: str, used: str, total: int, available: int
) -> None:
    def kilobytes(number: str) -> str:
        return number if number == "max" else f"{int(number) << 10}\n"

    files = {
        "/proc/meminfo": "MemTotal:   1000 kB\nMemFree:  9 kB\nMemAvailable:   400 kB\n",
        "/sys/fs/cgroup/memory.max": kilobytes(limit),
        "/sys/fs/cgroup/memory.current": kilobytes(used),
    }
    monkeypatch.setattr(Path, "read_text", lambda path, *arguments, **given: files[str(path)])
    assert machine.memory_bytes("MemTotal") == total << 10
    assert machine.memory_bytes("MemAvailable") == available << 10
    assert machine.memory_bytes("MemElse") is None
