"""Tables of results: the cells, what is left out, and names and reasons that hold markup."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.report import (
    compare_summary,
    compare_table,
    is_ours,
    machine_line,
    markdown_table,
    remarks,
    show_number,
    show_time,
    title_of,
    workload_table,
    workload_title,
)
from benchmarks.results import Results, add_rates, compare
from tests.benchmarks.rows import RUN, make_row

ROWS = [
    make_row("copy", 11_000.0),
    make_row("ceiling", 8_000.0),
    make_row("norm_pool:cpu:out", 9_900.0, extra_peak_bytes=0),
    make_row("llava_avg_pool", 376_000.0, extra_peak_bytes=418_000_000, note="pools to [13, 13]"),
    make_row("naive_grid_pool", check="failed: out of [bold]memory[/bold] | at\x1b[31m once"),
]
add_rates(ROWS, "llava_avg_pool")


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table)
    return console.file.getvalue()


def cells(text: str, title: str) -> list[str]:
    """The cells of a provider in a table that was printed."""
    (line,) = [line for line in text.splitlines() if re.match(rf" *{re.escape(title)}  ", line)]
    return re.split(r"  +", line.strip())[1:]


@pytest.mark.parametrize(
    ("provider", "title", "ours"),
    [
        ("norm_pool:cpu:out", "norm_pool, out=", True),
        ("grid_pool:triton", "grid_pool, triton", True),
        ("grid_pool_backward:cpu", "grid_pool_backward", True),
        ("grid_pool:reference", "grid_pool, reference", False),
        ("compiled_grid_pool:max-autotune", "torch.compile grid_pool, max-autotune", False),
        ("copy", "torch copy", False),
    ],
)
def test_titles(provider: str, title: str, ours: bool) -> None:
    assert (title_of(provider), is_ours(provider)) == (title, ours)


def test_numbers() -> None:
    values = (0, 0.0123, 0.456, 9.994, 9.996, 12.34, 99.96, 2513.4)
    assert [show_number(value) for value in values] == ["0", "0.012", "0.46", "9.99", "10.0", "12.3", "100", "2513"]
    assert [show_time(us) for us in (29.1, 999.4, 9_900, 1_673_000)] == ["29.1 µs", "999 µs", "9.90 ms", "1.67 s"]


def test_lines_about_workloads_and_machines() -> None:
    row = make_row("copy", settings={"ceil_mode": True, "frame_counts": list(range(8, 129, 8)), "frames": 3})
    title = "64 × 27 × 27 × 3584 bfloat16, ceil_mode=True, frame_counts=[8, 16, … 128] (16)"
    assert workload_title(row) == title
    line = "Some CPU, 4 cores, 1 thread, avx512, torch 2.13.0, 2026-11-22, commit 7cc5a8a"
    assert machine_line(RUN) == line
    changed = replace(RUN, source=RUN.source | {"dirty": True}, settings={"quick": True})
    assert machine_line(changed) == f"{line} with changes, quick"
    gpu = replace(RUN, device={"type": "cuda", "name": "NVIDIA H200", "driver": "570.86"}, source={"commit": None})
    assert machine_line(gpu) == "NVIDIA H200, driver 570.86, torch 2.13.0, CUDA 13.0, Triton 3.9.0, 2026-11-22"


def test_values_in_a_terminal() -> None:
    text = printed(workload_table(ROWS))
    assert text.splitlines()[0].rstrip() == "llava-video-7b: 64 × 27 × 27 × 3584 bfloat16"
    assert cells(text, "norm_pool, out=") == ["9.90", "9.80–10.1", "38.7", "111", "80.8", "38.0", "0"]
    assert cells(text, "ceiling probe") == ["8.00", "7.92–8.16", "47.9", "138", "100", "47.0", "–"]
    assert cells(text, "naive grid_pool") == ["failed", *"––––––"]
    # markup is shown as it is, and what a terminal would act on is not passed on
    assert "naive grid_pool: failed: out of [bold]memory[/bold] | at [31m once" in text
    assert "LLaVA avg pooling: pools to [13, 13]" in text
    assert "\x1b" not in text


def test_columns_without_a_value_are_left_out() -> None:
    rows = [make_row("norm_pool:triton", 66.0, launches=1, overhead_us=21.4, others_cores=0.02)]
    text = printed(workload_table(rows))
    head = ["overhead", "provider", "p50 µs", "p20–p80 µs", "GB/s", "launches", "µs"]
    assert sorted(" ".join(text.splitlines()[2:4]).split()) == sorted(" ".join(head).split())
    assert cells(text, "norm_pool, triton") == ["66.0", "65.3–67.3", "5805", "1", "21.4"]
    assert remarks(rows) == []
    rows[0].others_cores = 0.31
    assert remarks(rows) == ["Other processes used up to 0.3 cores meanwhile."]


def test_values_in_markdown() -> None:
    lines = markdown_table(ROWS).splitlines()
    titles = ["", "p50 ms", "p20–p80 ms", "GB/s", "% of copy", "% of ceiling", "× LLaVA avg pooling", "extra MB"]
    assert lines[0] == f"| {' | '.join(titles)} |"
    assert "| **norm_pool, out=** | 9.90 | 9.80–10.1 | 38.7 | 111 | 80.8 | 38.0 | 0 |" in lines
    assert "| naive grid_pool | failed |  |  |  |  |  |  |" in lines
    assert {line.count("|") for line in lines} == {9}


def test_comparisons() -> None:
    """norm_pool is 20 % slower, grid_pool 10 % faster, and copy 1 % slower where the noise is 6 %."""
    times = {"norm_pool:cpu": (10_000.0, 12_000.0), "grid_pool:cpu": (20_000.0, 18_000.0), "copy": (900.0, 909.0)}
    before, after = ([make_row(provider, pair[i]) for provider, pair in times.items()] for i in (0, 1))
    changes = compare(Results(RUN, before), Results(RUN, after))
    text = printed(compare_table(changes, RUN, replace(RUN, run="20261123T090000Z")))
    assert text.splitlines()[0].strip() == "20261122T183000Z → 20261123T090000Z"
    lines = [re.split(r"  +", line.strip())[1:] for line in text.splitlines() if line.strip().startswith("llava")]
    assert lines == [
        ["norm_pool", "10.0 ms", "12.0 ms", "1.200", "± 6.0 %", "slower"],
        ["grid_pool", "20.0 ms", "18.0 ms", "0.900", "± 6.0 %", "faster"],
        ["torch copy", "900 µs", "909 µs", "1.010", "± 6.0 %", "within noise"],
    ]
    summary = "1 faster, 1 slower, 1 within the noise; geometric mean of the ratios 1.029"  # (1.2 · 0.9 · 1.01)^(1/3)
    assert compare_summary(changes, RUN, RUN) == summary
    other = replace(RUN, device=RUN.device | {"threads": 8}, versions={"torch": "2.14.1"})
    warning = "the runs differ in more than the code: threads 1 → 8; torch 2.13.0+cu130 → 2.14.1"
    assert compare_summary(changes, RUN, other) == f"{summary}\n{warning}"
