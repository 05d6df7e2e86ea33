"""docs/performance.md and the README's table are what the committed results say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.goals import ONE_FRAME, T16
from benchmarks.page import MARK, PAGE, README, with_table
from benchmarks.results import BenchRow, add_rates, append
from tests.benchmarks.rows import RUN, make_row


def test_texts_are_what_the_results_say() -> None:
    """The pictures that the texts show are there too."""
    assert page.stale() == []
    for path in (PAGE, README):
        pictures = re.findall(r"\]\(([^)]+\.png)\)", path.read_text(encoding="utf-8"))
        assert pictures
        assert all((path.parent / picture).exists() for picture in pictures)


def prefill(kind: str, label: str, ms: float, side: int) -> BenchRow:
    settings = {"pooled_by": label, "grid": [side, side], "visual_tokens": 64 * side * side}
    facts = {"op": kind, "workload": "prefill-7b", "groups": ("prefill",), "settings": settings}
    return make_row(f"{kind}:{label}", ms * 1e3, **facts)


ROWS = [
    make_row("norm_pool:cpu:out", 10_000, groups=("main", "T-3584")),
    make_row("avg_pool2d", 31_000, groups=("main", "T-3584")),
    make_row("norm_pool:cpu:out", 2_000, workload=T16, groups=("T-3584",), shape=(16, 27, 27, 3584)),
    make_row("avg_pool2d", 2_600, workload=T16, groups=("T-3584",), shape=(16, 27, 27, 3584)),
    make_row("llava_avg_pool", 40_000, workload=T16, groups=("T-3584",), check="wrong: off by 1"),
    make_row("norm_pool:cpu:out", 250, workload=ONE_FRAME, groups=("overhead",), overhead_us=26.0),
    make_row("push:1:cpu", 227, workload="stream", groups=("stream",), op="push", state_bytes=14_000_000),
    make_row(
        "evs", 9_000, workload="pruning", groups=("pruning",), op="pruning", note="vLLM 1.2: keeps 3 of 12 tokens"
    ),
    make_row("vidcom2", workload="pruning", groups=("pruning",), op="pruning", check="skipped: no vLLM"),
    prefill("prefill", "unpooled", 20_000, 27),
    prefill("pool", "grid_pool()", 1, 13),
    prefill("prefill", "grid_pool()", 3_999, 13),
]
add_rates(ROWS, "avg_pool2d")


@pytest.fixture
def of_cpu(tmp_path: Path) -> Path:
    append(tmp_path / "cpu-some-cpu.jsonl", RUN, *ROWS)
    return tmp_path / "cpu-some-cpu.jsonl"


def test_page(of_cpu: Path) -> None:
    """The page has goals, tables, streams, pruning and prefills, and says so where there are no results of a GPU."""
    text = " ".join(page.page([of_cpu]).split())
    for said in (
        "| norm_pool, out=, 1.2 times as fast as avg_pool2d | met | 1 of 1, worst 1.3x at 16x27x27x3584 |",
        "after other work filled them): norm_pool, out= 26 (250).",
        f"| {T16} | 2.00 ms, ",
        "| **push, 1** | 227 |",
        "## Pruning EVS and VidCom2 are the methods by which vLLM drops tokens",
        "`pruning` must read 306 MB and write 77.5 MB.",
        "| EVS | 9.00 |",
        "- EVS: vLLM 1.2: keeps 3 of 12 tokens - VidCom2: skipped: no vLLM",
        "| `grid_pool()` | 13 × 13 | 10,816 | 23.2 % | 1.00 ms | 4.00 s | 5.00 × | 0.025 % |",
        "No result of a GPU",
    ):
        assert said in text
    gpu = of_cpu.with_name("cuda-some-gpu.jsonl")
    append(gpu, replace(RUN, device={"type": "cuda", "name": "Some GPU"}), *ROWS)
    assert "No result of a GPU" not in page.page([gpu])
    assert with_table("as it is", [gpu]) == "as it is"


def test_readme_table(of_cpu: Path) -> None:
    text = with_table(f"before\n{MARK[0]}\nold\n{MARK[1]}\nafter\n", [of_cpu])
    assert text.startswith(f"before\n{MARK[0]}\n| time, relative to the first row | 16 frames | 64 frames |\n")
    assert text.endswith(f"\n{MARK[1]}\nafter\n")
    assert "| norm_pool, out= | 1 (2.00 ms) | 1 (10.0 ms) |\n| avg_pool2d | 1.30 | 3.10 |" in text
    assert "LLaVA" not in text  # what was wrong has no time
    assert "Some CPU" in text
