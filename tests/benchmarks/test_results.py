"""Files of results: nothing is lost or overwritten, and two of them are compared with their noise in mind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.machine import describe
from benchmarks.results import Results, Row, Run, Writer, compare, encode, file_name, load, pick, with_ratios
from tests.benchmarks.rows import RUN, make_row


def run_named(name: str, **values: Any) -> Run:
    return replace(RUN, run=name, **values)


def write(path: Path, *lines: Run | Row) -> None:
    writer = Writer(path)
    for line in lines:
        writer.write(line)
    writer.close()


# ---- files ----


def test_lines_are_what_was_written(tmp_path: Path) -> None:
    """A folder is made for them; what is None is left out."""
    path = tmp_path / "new" / "folder" / "results.jsonl"
    row = make_row("norm_pool:cpu", 10.0, groups=("main", "C"), settings={"output_size": [3, 4]}, launches=1)
    write(path, RUN, row)
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["kind"], second["kind"]) == ("run", "row")
    assert first.keys() - {"kind"} == asdict(RUN).keys()
    assert second.keys() - {"kind"} == {name for name, value in asdict(row).items() if value is not None}
    assert "cold_us" not in second
    assert json.loads(encode(row)) == second
    (results,) = load(path)
    assert results.run == RUN
    assert [asdict(found) for found in results.rows] == [asdict(row)]


def test_the_last_row_of_a_provider_counts(tmp_path: Path) -> None:
    """It may be written before it is timed, and it may be timed again."""
    path = tmp_path / "results.jsonl"
    begun, timed = make_row("grid_pool:triton", 1.0, check="failed: the process ended in it"), make_row("copy", 2.0)
    write(path, RUN, begun, timed, make_row("grid_pool:triton", 3.0))
    (results,) = load(path)
    assert [(row.provider, row.p50_us) for row in results.rows] == [("grid_pool:triton", 3.0), ("copy", 2.0)]


def test_files_are_only_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, run_named("a"), make_row("copy", 1.0, run="a"))
    before = path.read_bytes()
    write(path, run_named("b"), make_row("copy", 2.0, run="b"))
    assert path.read_bytes().startswith(before)
    assert [(results.run.run, [row.p50_us for row in results.rows]) for results in load(path)] == [
        ("a", [1.0]),
        ("b", [2.0]),
    ]


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    writer = Writer(path)
    writer.write(RUN)
    writer.write(make_row("copy", 1.0))
    (results,) = load(path)
    assert len(results.rows) == 1
    writer.close()


@pytest.mark.parametrize("left", [1, 40, -3])
def test_a_line_that_was_cut_costs_no_other(tmp_path: Path, left: int) -> None:
    path = tmp_path / "results.jsonl"
    write(path, run_named("a"), make_row("copy", 1.0, run="a"))
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:left])
    assert [len(results.rows) for results in load(path)] == [1]
    write(path, run_named("b"), make_row("copy", 2.0, run="b"))
    assert [(results.run.run, len(results.rows)) for results in load(path)] == [("a", 1), ("b", 1)]


def test_rows_belong_to_their_runs(tmp_path: Path) -> None:
    """Also where two runs wrote at a time; rows of a run that is not there are passed over, as other lines are."""
    path = tmp_path / "results.jsonl"
    times = (("a", "copy", 1.0), ("b", "copy", 2.0), ("a", "avg_pool2d", 3.0), ("c", "copy", 4.0))
    rows = [make_row(provider, time, run=run) for run, provider, time in times]
    write(path, run_named("a"), run_named("b"), *rows)
    with path.open("ab") as file:
        file.write(b'\n[1]\n7\n{"kind": "note"}\nnull\n\xff\xfe{\n')
    found = {results.run.run: [row.p50_us for row in results.rows] for results in load(path)}
    assert found == {"a": [1.0, 3.0], "b": [2.0]}


def test_fields_that_are_not_known_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run, row = (json.loads(encode(line)) | {"later": 1} for line in (RUN, make_row("copy", 1.0)))
    path.write_text(f"{json.dumps(run)}\n{json.dumps(row)}\n")
    (results,) = load(path)
    assert (results.run, results.rows[0].p50_us) == (RUN, 1.0)


def test_no_results(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(FileNotFoundError):
        load(path)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl: holds no results of stgp bench"):
        load(path)


def test_runs_are_picked_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    names = ["20261121T000000Z-aaaa", "20261122T000000Z-bbbb", "20261122T100000Z-cccc", "20261123T000000Z-dddd"]
    write(path, *map(run_named, names))
    picked = {argument: pick(f"{path}{argument}").run.run for argument in ("", "@", "@20261122", f"@{names[0]}")}
    assert picked == {"": names[3], "@": names[3], "@20261122": names[2], f"@{names[0]}": names[0]}
    with pytest.raises(ValueError, match="holds no run whose name begins with '2027'"):
        pick(f"{path}@2027")
    at = tmp_path / "me@home.jsonl"
    at.write_bytes(path.read_bytes())
    assert pick(str(at)).run.run == names[3]
    assert pick(f"{at}@20261121").run.run == names[0]


def test_names_of_files() -> None:
    name = "AMD EPYC(tm) 9B14 96-Core Processor "
    assert file_name({"type": "cpu", "name": name}) == "cpu-amd-epyc-tm-9b14-96-core-processor.jsonl"
    assert file_name({"type": "cuda", "name": "NVIDIA H200"}) == "cuda-nvidia-h200.jsonl"


def test_rows_that_are_right_are_found() -> None:
    rows = [make_row("copy", check="skipped: x"), make_row("copy", 1.0, workload="b"), make_row("read", 2.0)]
    results = Results(RUN, [*rows, make_row("copy", 3.0)])
    assert results.find("llava-video-7b", "copy") is results.rows[3]
    assert results.find("b", "read") is None
    assert results.workloads == ["llava-video-7b", "b"]


def test_frames_and_spread() -> None:
    row = make_row("copy", 100.0)
    assert row.spread == pytest.approx(0.03)
    assert (row.frames, make_row("copy", shape=(8, 32, 27, 27, 896)).frames) == (64, 256)
    assert make_row("copy").spread is None


def test_ratios_to_a_baseline() -> None:
    rows = [make_row("a", 10.0), make_row("b", 4.0), make_row("c", check="wrong: x")]
    assert [row.times_baseline for row in with_ratios(rows, "a")] == [1.0, 2.5, None]
    assert [row.times_baseline for row in with_ratios(rows, "c")] == [None] * 3
    assert {row.baseline for row in rows} == {"c"}


# ---- comparison ----


def results(**times: float | None) -> Results:
    return Results(RUN, [make_row(name, time) for name, time in times.items()])


def test_changes_within_the_noise_are_none() -> None:
    """The spread of either run is 3 %."""
    before = results(same=100.0, slower=100.0, faster=100.0, little_slower=100.0, little_faster=100.0)
    after = results(same=100.0, slower=106.1, faster=94.2, little_slower=105.9, little_faster=94.4)
    found = {change.provider: change for change in compare(before, after)}
    assert list(found) == ["same", "slower", "faster", "little_slower", "little_faster"]
    assert {name: change.verdict for name, change in found.items()} == {
        "same": "", "slower": "slower", "faster": "faster", "little_slower": "", "little_faster": "",
    }  # fmt: skip
    assert found["slower"].ratio == pytest.approx(1.061)
    assert found["slower"].noise == pytest.approx(0.06)
    assert (found["slower"].before.p50_us, found["slower"].after.p50_us) == (100.0, 106.1)


def test_more_noise_hides_more() -> None:
    before, after = results(copy=100.0), results(copy=120.0)
    assert [change.verdict for change in compare(before, after)] == ["slower"]
    before.rows[0].p80_us = 120.0
    assert [change.verdict for change in compare(before, after)] == [""]


def test_what_only_one_run_measured_is_left_out() -> None:
    before, after = results(copy=100.0, read=None, old=1.0), results(new=1.0, read=100.0, copy=50.0)
    before.rows[1].check = "failed: x"
    assert [change.provider for change in compare(before, after)] == ["copy"]
    after.rows[2].check = "wrong: x"
    assert compare(before, after) == []


# ---- where they were measured ----


def test_description_of_this_machine() -> None:
    found = describe("cpu", 3)
    assert json.loads(json.dumps(found)) == found
    run = Run(run="", utc="", settings={}, **found)
    assert run.device["type"] == "cpu"
    assert run.device["threads"] == 3
    assert run.device["cores"] >= 1
    assert run.device["name"]
    assert run.versions["torch"]
    assert len(run.source["package_sha256"]) == 64


def test_the_source_is_part_of_the_description(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is changed in the package; the commit where the package is in a checkout, or where it is told."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(machine, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    first = describe("cpu")["source"]
    assert (first["commit"], first["dirty"]) == (None, None)
    assert describe("cpu")["source"] == first
    (tmp_path / "package" / "a.py").write_text("a = 2\n")
    assert describe("cpu")["source"]["package_sha256"] != first["package_sha256"]
    assert first["library_sha256"] is None
    (tmp_path / "package" / "_C.so").touch()
    assert len(describe("cpu")["source"]["library_sha256"]) == 64
    monkeypatch.setenv("STGP_COMMIT", "")
    assert describe("cpu")["source"]["commit"] is None
    monkeypatch.setenv("STGP_COMMIT", "7cc5a8a")
    assert (describe("cpu")["source"]["commit"], describe("cpu")["source"]["dirty"]) == ("7cc5a8a", None)


@pytest.mark.parametrize("uuid", ["5a3f-01", "GPU-5a3f-01"])
def test_the_driver_is_asked_for_by_the_gpu(uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its uuid as nvidia-smi has it; where that is refused, by no GPU in particular."""
    asked: list[list[str]] = []
    answers = {"--id=GPU-5a3f-01": "580.1", "--format=csv,noheader": "580.2\n580.2"}

    def output_of(command: list[str]) -> str | None:
        asked.append(command)
        return answers.get(command[-1])

    monkeypatch.setattr(machine, "output_of", output_of)
    assert machine._driver(uuid) == "580.1"
    assert len(asked) == 1
    del answers["--id=GPU-5a3f-01"]
    assert machine._driver(uuid) == "580.2"
    answers.clear()
    assert machine._driver(uuid) is None


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


def test_a_program_that_there_is_not_says_nothing() -> None:
    assert machine.output_of(["no-such-program"]) is None
    assert machine.output_of(["sh", "-c", "echo x; exit 1"]) is None
    assert machine.output_of(["sh", "-c", "echo x"]) == "x"
