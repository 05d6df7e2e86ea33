"""docs/performance.md and the README's table are what the committed results say."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import page as performance
from benchmarks.goals import RESULTS, newest
from benchmarks.page import MARK, PAGE, README, ROOT, page, readme_table, sweep, with_table
from benchmarks.results import Results, Row, Run, load

RUN = Run(
    run="20260101T000000Z-abcd",
    utc="2026-01-01T00:00:00+00:00",
    device={"type": "cpu", "name": "Some CPU", "cores": 2, "threads": 2, "capability": "avx2"},
    versions={"torch": "2.13.0+cpu"},
    source={"commit": "0123456789abcdef", "dirty": False},
    settings={"quick": False},
)


def row(workload: str, provider: str, p50_us: float, **more: object) -> Row:
    found = Row(
        run=RUN.run,
        workload=workload,
        provider=provider,
        op="norm_pool",
        dtype="bfloat16",
        shape=(16 if workload.startswith("16") else 64, 27, 27, 3584),
        settings={},
        groups=("main", "T-3584"),
        input_bytes=1000,
        read_bytes=800,
        write_bytes=200,
        check="ok",
        p20_us=p50_us,
        p50_us=p50_us,
        p80_us=p50_us,
        samples=5,
        gb_per_s=1.5,
    )
    return replace(found, **more)  # type: ignore[arg-type]


MADE_UP = Results(
    RUN,
    [
        row("llava-video-7b", "norm_pool:cpu:out", 10_000),
        row("llava-video-7b", "avg_pool2d", 31_000),
        row("16x27x27x3584", "norm_pool:cpu:out", 2_000),
        row("16x27x27x3584", "avg_pool2d", 2_600),
        row("16x27x27x3584", "llava_avg_pool", 40_000, check="wrong: off by 1"),
    ],
)


CHANGED = subprocess.run(["git", "status", "--porcelain", "--", str(RESULTS)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not newest(), reason="no results are kept")
@pytest.mark.skipif(
    bool(CHANGED.stdout), reason="there are results that are not committed, of which no text speaks yet"
)
def test_texts_are_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.skipif(not newest(), reason="no results are kept")
def test_pictures_are_there() -> None:
    for path in (PAGE, README):
        pictures = re.findall(r"\]\(([^)]+\.png)\)", path.read_text(encoding="utf-8"))
        assert pictures
        assert all((path.parent / picture).exists() for picture in pictures)


def test_readme_table() -> None:
    table = readme_table(MADE_UP)
    assert "| norm_pool, out= | 1 (2.00 ms) | 1 (10.0 ms) |" in table
    assert "| avg_pool2d | 1.30 | 3.10 |" in table
    assert "LLaVA" not in table, "what was wrong has no time"
    assert "Some CPU" in table
    assert "2026-01-01" in table
    readme = f"before\n{MARK[0]}\nold\n{MARK[1]}\nafter\n"
    assert with_table(readme, [MADE_UP]) == f"before\n{MARK[0]}\n{table}\n{MARK[1]}\nafter\n"
    assert with_table(readme, []) == readme


def test_gpu_is_only_spoken_of_where_there_are_results() -> None:
    text = page([MADE_UP], [])
    assert "No result of a GPU" in text
    assert "Not measured yet" in text
    assert "not met" in text or "not measured" in text
    gpu = Results(replace(RUN, device={"type": "cuda", "name": "Some GPU"}), [row("llava-video-7b", "avg_pool2d", 5)])
    assert "No result of a GPU" not in page([gpu], [])


def test_sweep() -> None:
    (text,) = sweep(MADE_UP, "T-3584", "Frames")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0].startswith("| | norm_pool, out= | avg_pool2d |")
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| 16x27x27x3584", "| llava-video-7b"]
    assert sweep(MADE_UP, "window", "Windows") == []


def test_check_says_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = ROOT / "docs" / "nowhere.md"
    monkeypatch.setattr(performance, "newest", lambda: [MADE_UP])
    monkeypatch.setattr(performance, "PAGE", stale)
    assert performance.main(["--check"]) == 1
    assert "docs/nowhere.md" in capsys.readouterr().err
    assert not stale.exists()


KEPT = {"": "row", "gradients-": "row", "tune-": "row", "prefill-": "prefill", "stream-": "push"}
"""How the name of a file of results begins, and the kind of its lines."""


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_results_that_are_kept_can_be_read(path: Path) -> None:
    name = re.fullmatch(r"([a-z]+-)??(cpu|cuda)-[a-z0-9-]+\.jsonl", path.name)
    assert name is not None
    kind = KEPT[name[1] or ""]
    runs: dict[str, int] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        if line["kind"] == "run":
            assert line["run"] not in runs
            runs[line["run"]] = 0
        else:
            assert line["kind"] == kind
            runs[line["run"]] += 1
    assert runs
    assert all(runs.values())
    assert len(load(path)) == len(runs)
