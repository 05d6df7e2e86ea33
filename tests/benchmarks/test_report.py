"""Tables of results hold values, reasons and warnings, and nothing that acts on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from benchmarks.report import (
    compare_summary,
    compare_table,
    markdown_table,
    remarks,
    workload_table,
)
from benchmarks.results import Results, add_rates, compare
from tests.benchmarks.rows import RUN, make_row

ROWS = [
    make_row("copy", 11_000.0),
    make_row("ceiling", 8_000.0),
    make_row("norm_pool:cpu:out", 9_900.0, extra_peak_bytes=0),
    make_row("llava_avg_pool", 376_000.0, extra_peak_bytes=418_000_000, note="pools to [13, 13]", others_cores=0.31),
    make_row("naive_grid_pool", check="failed: out of [bold]memory[/bold] | at\x1b[31m once"),
]
add_rates(ROWS, "llava_avg_pool")


def printed(table: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_values_reasons_and_remarks_are_shown() -> None:
    """Columns without a value are left out. Markup is shown as it is, and escapes do not reach a terminal."""
    lines = printed(workload_table(ROWS))
    assert "norm_pool, out= 9.90 9.80–10.1 38.7 111 80.8 38.0 0" in lines
    text = "\n".join(lines)
    assert "naive grid_pool: failed: out of [bold]memory[/bold] | at [31m once" in text
    assert "LLaVA avg pooling: pools to [13, 13]" in text
    assert "\x1b" not in text
    assert remarks(ROWS)[-1] == "Other processes used up to 0.3 cores meanwhile."
    lines = markdown_table(ROWS).splitlines()
    assert "| **norm_pool, out=** | 9.90 | 9.80–10.1 | 38.7 | 111 | 80.8 | 38.0 | 0 |" in lines
    assert {line.count("|") for line in lines} == {9}


def test_comparisons() -> None:
    """norm_pool gets 20 % slower, grid_pool 10 % faster, and copy 1 % slower, which is within the noise of 6 %."""
    times = {"norm_pool:cpu": (10_000.0, 12_000.0), "grid_pool:cpu": (20_000.0, 18_000.0), "copy": (900.0, 909.0)}
    before, after = ([make_row(provider, pair[i]) for provider, pair in times.items()] for i in (0, 1))
    changes = compare(Results(RUN, before), Results(RUN, after))
    lines = printed(compare_table(changes, RUN, RUN))
    assert "llava-video-7b norm_pool 10.0 ms 12.0 ms 1.200 ± 6.0 % slower" in lines
    assert "llava-video-7b torch copy 900 µs 909 µs 1.010 ± 6.0 % within noise" in lines
    summary = "1 faster, 1 slower, 1 within the noise; geometric mean of the ratios 1.029"  # (1.2 · 0.9 · 1.01)^(1/3)
    assert compare_summary(changes, RUN, RUN) == summary
    other = replace(RUN, device=RUN.device | {"threads": 8}, versions={"torch": "2.14.1"})
    warning = "the runs differ in more than the code: threads 1 → 8; torch 2.13.0+cu130 → 2.14.1"
    assert compare_summary(changes, RUN, other) == f"{summary}\n{warning}"
