"""docs/performance.md, its details and the README's table of costs are what the committed results say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.details import details
from benchmarks.goals import ONE_FRAME, T16
from benchmarks.page import DETAILS, MARK, PAGE, README, with_cost
from benchmarks.results import BenchRow, add_rates, append
from tests.benchmarks.rows import RUN, make_row


def test_texts_are_what_the_results_say() -> None:
    """The pictures and the page of details that the texts show are there too."""
    assert page.stale() == []
    assert DETAILS.relative_to(PAGE.parent).as_posix() in PAGE.read_text(encoding="utf-8")
    for path in (PAGE, README):
        pictures = re.findall(r"\]\(([^)]+\.png)\)", path.read_text(encoding="utf-8"))
        assert pictures
        assert all((path.parent / picture).exists() for picture in pictures)


def prefill(kind: str, label: str, ms: float, side: int) -> BenchRow:
    settings = {"pooled_by": label, "grid": [side, side], "visual_tokens": 64 * side * side}
    facts = {"op": kind, "workload": "prefill-7b", "groups": ("prefill",), "settings": settings}
    return make_row(f"{kind}:{label}", ms * 1e3, **facts)


SMALL = "8x27x27x384:bf16:plain"
ROWS = [
    make_row("norm_pool:cpu:out", 10_000, groups=("main", "T-3584")),
    make_row("norm_pool:cpu", 9_900, groups=("main", "T-3584")),
    make_row("avg_pool2d", 31_000, groups=("main", "T-3584")),
    make_row("norm_pool:cpu:out", 2_000, workload=T16, groups=("T-3584",), shape=(16, 27, 27, 3584)),
    make_row("avg_pool2d", 2_600, workload=T16, groups=("T-3584",), shape=(16, 27, 27, 3584)),
    make_row("llava_avg_pool", 40_000, workload=T16, groups=("T-3584",), check="wrong: off by 1"),
    make_row("norm_pool:cpu:out", 250, workload=ONE_FRAME, groups=("overhead",), overhead_us=26.0),
    make_row("grid_pool:cpu", 240, workload=ONE_FRAME, groups=("overhead",), overhead_us=29.0),
    make_row("avg_pool2d", 50, workload=ONE_FRAME, groups=("overhead",), overhead_us=6.0),
    make_row("norm_pool:cpu", 20, workload=SMALL, groups=("plain",), shape=(8, 27, 27, 384)),
    make_row("avg_pool2d", 30, workload=SMALL, groups=("plain",), shape=(8, 27, 27, 384)),
    make_row("empty:op", 90, workload="empty", groups=("empty",), overhead_us=15.0),
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
    """Three sentences come first, then tables and goals, streams, pruning, prefills and sweeps, and the method last."""
    text = " ".join(page.page([of_cpu]).split())
    places = [
        text.index(said)
        for said in (
            "# Performance On Some CPU with 1 thread, pooling 64 frames",
            "On one frame of 9 × 9 tokens of 384 channels `grid_pool` takes 29.0 µs (240 µs) where",
            "Not measured: anything on a GPU",
            "## Some CPU Some CPU, 4 cores, 1 thread, avx512,",
            "| 16 × 27 × 27 × 3584 bfloat16 | - / 2.60 | 2.00 / - |",
            "| 64 × 27 × 27 × 3584 bfloat16 (llava-video-7b) | - / 31.0 | 10.0 / 9.90 |",
            "### Next to a plain average The time of channels-last",
            "| 384 | 1.50 / - |",
            "| `torch.ops.stgp.grid_pool(x)`, no frames | 15.0 | 90.0 | - |",
            "| avg_pool2d | 6.00 | 50.0 | | norm_pool, out= | 26.0 | 250 |",
            "### Fresh memory",
            "| norm_pool 15 times as fast as LLaVA's call | not measured | 2 not measured |",
            "## Stream `push, N` gives",
            "A stream keeps at most 14.0 MB (stream) between two pushes.",
            "## Pruning EVS and VidCom2 are the methods by which vLLM drops tokens",
            "- EVS: vLLM 1.2: keeps 3 of 12 tokens - VidCom2: skipped: no vLLM",
            "| `grid_pool()` | 13 × 13 | 10,816 | 23.2 % | 1.00 ms | 4.00 s | 5.00 × | 0.025 % |",
            "### Frames, 3584 channels",
            "## How it is measured",
        )
    ]
    assert places == sorted(places)


def test_older_machines_are_shorter(of_cpu: Path) -> None:
    """The newest CPU and the newest GPU have all tables. Figures of another machine have its date and commit."""
    old = replace(RUN, device=RUN.device | {"name": "Old CPU"}, utc="2025-01-02T00:00:00+00:00")
    rows = [replace(row, p50_us=7_777_000.0) if row.p50_us else row for row in ROWS]
    append(of_cpu.with_name("cpu-old-cpu.jsonl"), old, *rows)
    gpu = of_cpu.with_name("cuda-some-gpu.jsonl")
    files = [of_cpu.with_name("cpu-old-cpu.jsonl"), of_cpu, gpu]
    append(gpu, replace(RUN, device={"type": "cuda", "name": "Some GPU"}), make_row("norm_pool:triton", 100.0))
    text = page.page(files)
    assert text.startswith("# Performance\n\nOn Some CPU")
    assert "Not measured: CPUs other than Some CPU and Old CPU and what" in " ".join(text.split())
    titles = [line for line in text.splitlines() if line.startswith("## ")][:3]
    assert titles == ["## Some CPU", "## Some GPU", "## Old CPU"]
    (short,) = [part for part in text.split("\n## ") if part.startswith("Old CPU")]
    assert "Older results than those above: Old CPU" in short
    assert "2025-01-02" in short
    assert "7777" in short
    assert "###" not in short
    assert "| 7777 |" not in text.split("\n## ")[1]
    assert page.page([gpu]).startswith("# Performance\n\nNot measured: ")


def test_figures_of_another_state_are_told_apart(of_cpu: Path) -> None:
    assert "These figures are of" not in page.page([of_cpu])
    later = replace(RUN, run="later", utc="2026-12-24T00:00:00+00:00", source={"commit": "abc", "package_sha256": "1"})
    append(of_cpu, later, make_row("norm_pool:cpu", 9_000, run="later"))
    text = " ".join(page.page([of_cpu]).split())
    assert "*These figures are of 2026-12-24, commit abc; those of the language model are of 2026-11-22, commit" in text
    assert "commit 7cc5a8a and those of all shapes are of 2026-11-22, commit 7cc5a8a.*" in text


def test_details(of_cpu: Path) -> None:
    """Every call has a row, and channels-last avg_pool2d comes before the others."""
    text = " ".join(details([of_cpu]).split())
    for said in (
        "## llava-video-7b, Some CPU 64 × 27 × 27 × 3584 bfloat16. `norm_pool` must read 306 MB and write 77.5 MB.",
        "| --- | ---: | ---: | ---: | ---: | | avg_pool2d | 31.0 | 30.7–31.6 | ",
        "## stream, Some CPU",
        "| **push, 1** | 227 |",
        "- VidCom2: skipped: no vLLM",
    ):
        assert said in text
    assert "plain" not in text


def test_readme_costs(of_cpu: Path) -> None:
    """The README's table is between its marks, with prefills where both were measured, and the machine below."""
    text = with_cost(f"before\n{MARK[0]}\nold\n{MARK[1]}\nafter\n", [of_cpu])
    assert text.startswith(f"before\n{MARK[0]}\n|  | `grid_pool` | LLaVA's own call | channels-last `avg_pool2d` |\n")
    assert text.endswith(f"noise.\n{MARK[1]}\nafter\n")
    assert "64 frames of 27 × 27 × 3584, bfloat16, into a fresh result | - | - | 31.0 ms |" in text
    assert "share of a prefill" not in text
    append(of_cpu, RUN, prefill("pool", "llava_avg_pool", 10, 13), prefill("prefill", "llava_avg_pool", 3_990, 13))
    text = with_cost(f"{MARK[0]}{MARK[1]}", [of_cpu])
    assert "| share of a prefill of 64 frames by a decoder of the shape of Qwen2-7b | 0.025 % | 0.25 % | - |" in text
    assert "| pooling and that prefill, next to a prefill of all tokens | 20.0 % | 20.0 % | - |" in text
    gpu = of_cpu.with_name("cuda-some-gpu.jsonl")
    append(gpu, replace(RUN, device={"type": "cuda", "name": "Some GPU"}), *ROWS)
    assert with_cost("as it is", [gpu]) == "as it is"
