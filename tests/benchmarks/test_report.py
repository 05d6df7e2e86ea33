"""Tables of results: what the cells say, what is left out, and names and reasons that hold markup."""

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
    compare_warning,
    is_ours,
    machine_line,
    markdown_table,
    show_number,
    show_percent,
    show_ratio,
    show_time,
    title_of,
    workload_table,
    workload_title,
)
from benchmarks.results import Results, compare
from tests.benchmarks.rows import RUN, make_row

ROWS = [
    make_row("ceiling", 8_000.0),
    make_row("copy", 11_000.0),
    make_row("norm_pool:cpu:out", 9_900.0, percent_of_copy=111.1, percent_of_ceiling=80.8, extra_peak_bytes=0),
    make_row("grid_pool:cpu", 29_000.0, percent_of_copy=37.9, percent_of_ceiling=27.6, extra_peak_bytes=41_000_000),
    make_row("llava_avg_pool", 376_000.0, percent_of_copy=2.93, percent_of_ceiling=2.13, extra_peak_bytes=418_000_000),
    make_row("naive_grid_pool", check="failed: out of [bold]memory[/bold] | at\x1b[31m once"),
    make_row("grid_pool:reference", check="skipped: takes too long"),
]
for each in ROWS:
    each.baseline, each.times_baseline = "llava_avg_pool", 376_000 / each.p50_us if each.p50_us else None


def printed(table: Table, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


def cells(text: str, title: str) -> list[str]:
    """Of the row of a provider, in a table that was printed."""
    (line,) = [line for line in text.splitlines() if re.match(rf" *{re.escape(title)}  ", line)]
    return re.split(r"  +", line.strip())[1:]


# ---- names and numbers ----


@pytest.mark.parametrize(
    ("provider", "title", "ours"),
    [
        ("norm_pool:cpu:out", "norm_pool, out=", True),
        ("norm_pool:cpu", "norm_pool", True),
        ("grid_pool:triton", "grid_pool, triton", True),
        ("grid_pool:reference", "grid_pool, reference", False),
        ("llava_avg_pool", "LLaVA avg pooling", False),
        ("naive_grid_pool", "naive grid_pool", False),
        ("compiled_grid_pool", "torch.compile grid_pool", False),
        ("compiled_grid_pool:max-autotune", "torch.compile, max-autotune", False),
        ("copy", "torch copy", False),
        ("something_new:fast", "something_new, fast", False),
    ],
)
def test_titles(provider: str, title: str, ours: bool) -> None:
    assert (title_of(provider), is_ours(provider)) == (title, ours)


def test_numbers() -> None:
    assert [show_number(value) for value in (0, 0.0123, 0.456, 9.994, 9.996, 12.34, 99.96, 2513.4)] == [
        "0", "0.012", "0.46", "9.99", "10.0", "12.3", "100", "2513",
    ]  # fmt: skip
    assert [show_time(us) for us in (29.1, 999.4, 9_900, 1_673_000)] == ["29.1 µs", "999 µs", "9.90 ms", "1673 ms"]
    assert [show_percent(value) for value in (0, 0.62, 9.94, 9.96, 98.4)] == ["0", "0.6", "9.9", "10", "98"]
    assert [show_ratio(value) for value in (0.976, 1, 9.994, 9.996, 168.9)] == ["0.98", "1.00", "9.99", "10", "169"]


def test_workload_titles() -> None:
    row = make_row("copy", settings={"output_size": [15, 15], "ceil_mode": True}, dtype="torch.float16")
    assert workload_title(row) == "llava-video-7b: 64 × 27 × 27 × 3584 float16, output_size=[15, 15], ceil_mode=True"
    assert workload_title(replace(row, settings={}), name=False) == "64 × 27 × 27 × 3584 float16"
    # a workload that is named by its shape is not named twice
    row = make_row("copy", workload="64x27x27x3584", settings={"frame_counts": list(range(8, 129, 8))})
    assert workload_title(row) == "64 × 27 × 27 × 3584 bfloat16, frame_counts=[8, 16, … 128] (16)"


def test_machine_lines() -> None:
    line = "Some CPU, 4 cores, 1 thread, avx512, torch 2.13.0, 2026-11-22, commit 7cc5a8a"
    assert machine_line(RUN) == line
    changed = replace(RUN, source=RUN.source | {"dirty": True}, settings={"quick": True})
    assert machine_line(changed) == f"{line} with changes, quick"
    gpu = replace(RUN, device={"type": "cuda", "name": "NVIDIA H200", "driver": "570.86"}, source={"commit": None})
    assert machine_line(gpu) == "NVIDIA H200, driver 570.86, torch 2.13.0, CUDA 13.0, Triton 3.9.0, 2026-11-22"
    assert machine_line(replace(RUN, device={}, versions={}, source={})) == "unknown device, 2026-11-22"


# ---- one workload ----


def test_values_in_a_terminal() -> None:
    text = printed(workload_table(ROWS))
    assert text.splitlines()[0].rstrip() == "llava-video-7b: 64 × 27 × 27 × 3584 bfloat16"
    head = " ".join(text.splitlines()[2:4]).split()
    assert [head.count(word) for word in ("ms", "µs", "GB/s", "ceiling", "MB", "launches", "overhead")] == [
        2, 0, 1, 1, 1, 0, 0,
    ]  # fmt: skip
    assert cells(text, "norm_pool, out=") == ["9.90", "9.80–10.1", "38.7", "111", "81", "38", "0"]
    assert cells(text, "grid_pool") == ["29.0", "28.7–29.6", "13.2", "38", "28", "13", "41.0"]
    assert cells(text, "LLaVA avg pooling") == ["376", "372–384", "1.02", "2.9", "2.1", "1.00", "418"]
    assert cells(text, "ceiling probe") == ["8.00", "7.92–8.16", "47.9", "–", "–", "47", "–"]
    assert cells(text, "naive grid_pool") == ["failed", *"––––––"]
    assert cells(text, "grid_pool, reference") == ["skipped", *"––––––"]
    assert "GB/s: the fewest bytes that the op must move, over p50." in text
    assert "× base: time of LLaVA avg pooling over this one's; above 1 is faster." in text
    # markup is shown as it is, and what a terminal would act on is not passed on
    assert "naive grid_pool: failed: out of [bold]memory[/bold] | at [31m once" in text
    assert "grid_pool, reference: skipped: takes too long" in text
    assert "\x1b" not in text


def test_columns_without_a_value_are_left_out() -> None:
    rows = [make_row("norm_pool:triton", 66.0, launches=1, overhead_us=21.4, others_cores=0.02)]
    text = printed(workload_table(rows))
    assert [word for line in text.splitlines()[2:4] for word in line.split()] == [
        "p50", "p20–p80", "overhead", "provider", "µs", "µs", "GB/s", "launches", "µs",
    ]  # fmt: skip
    assert "cores" not in text  # as few do not disturb
    assert cells(text, "norm_pool, triton") == ["66.0", "65.3–67.3", "5805", "1", "21.4"]


def test_notes_and_disturbance_are_told() -> None:
    rows = [make_row("naive_norm_pool", 9.0, note="pools to [13, 13]", others_cores=0.31), make_row("copy", 8.0)]
    text = printed(workload_table(rows))
    assert "naive norm_pool: pools to [13, 13]" in text
    assert "Other processes used up to 0.3 cores meanwhile." in " ".join(text.split())


def test_workload_without_any_time() -> None:
    text = printed(workload_table([make_row("grid_pool:cuda", check="wrong: off by 3, 0.1 is allowed")]))
    assert cells(text, "grid_pool, cuda") == ["wrong"]
    assert "grid_pool, cuda: wrong: off by 3, 0.1 is allowed" in " ".join(text.split())


def test_a_terminal_of_100_columns_is_enough() -> None:
    values = {"percent_of_copy": 100.0, "percent_of_ceiling": 100.0, "times_baseline": 1.0, "baseline": "copy"}
    more = {"extra_peak_bytes": 4_000_000_000, "launches": 100, "overhead_us": 31.4}
    row = make_row("compiled_grid_pool", 14_500_000.0, **values, **more)
    text = printed(workload_table([row, make_row("copy", 1_100.0)]))
    assert max(map(len, map(str.rstrip, text.splitlines()))) <= 100
    assert "…" not in text
    assert "14355–14790" in text


# ---- two runs ----


@pytest.fixture
def runs() -> tuple[Results, Results]:
    """norm_pool is 20 % slower, grid_pool 10 % faster, copy 1 % slower where the noise is 6 %."""
    times = {"norm_pool:cpu": (10_000.0, 12_000.0), "grid_pool:cpu": (20_000.0, 18_000.0), "copy": (900.0, 909.0)}
    both = [[make_row(provider, pair[i]) for provider, pair in times.items()] for i in (0, 1)]
    both[1].append(make_row("avg_pool2d", 5.0))
    return Results(RUN, both[0]), Results(replace(RUN, run="20261123T090000Z"), both[1])


def test_values_of_a_comparison(runs: tuple[Results, Results]) -> None:
    before, after = runs
    changes = compare(before, after)
    text = printed(compare_table(changes, before.run, after.run))
    assert text.splitlines()[0].rstrip() == "20261122T183000Z → 20261123T090000Z"
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines() if line.strip().startswith("llava")]
    assert lines == [
        ["llava-video-7b", "norm_pool", "10.0 ms", "12.0 ms", "1.200", "± 6.0 %", "slower"],
        ["llava-video-7b", "grid_pool", "20.0 ms", "18.0 ms", "0.900", "± 6.0 %", "faster"],
        ["llava-video-7b", "torch copy", "900 µs", "909 µs", "1.010", "± 6.0 %", "within noise"],
    ]
    assert compare_summary(changes) == (
        "1 faster, 1 slower, 1 within the noise; geometric mean of the ratios 1.029"  # (1.2 · 0.9 · 1.01)^(1/3)
    )
    assert compare_summary([]) == "nothing was measured in both runs"


def test_verdicts_are_coloured(runs: tuple[Results, Results]) -> None:
    before, after = runs
    (*_, verdicts) = compare_table(compare(before, after), before.run, after.run).columns
    assert [str(cell.style) for cell in verdicts.cells] == ["bold red", "bold green", "dim"]


def test_warning_where_the_machine_differs() -> None:
    assert compare_warning(RUN, replace(RUN, utc="2027-01-01", source={})) == ""
    other = replace(RUN, device=RUN.device | {"threads": 8}, versions={"torch": "2.14.1"})
    assert compare_warning(RUN, other) == (
        "the runs differ in more than the code: threads 1 → 8; torch 2.13.0+cu130 → 2.14.1"
    )
    gpu = replace(RUN, device={"type": "cuda", "name": "NVIDIA H200"})
    assert "device Some CPU → NVIDIA H200; threads 1 → unknown" in compare_warning(RUN, gpu)


# ---- Markdown ----


def test_markdown() -> None:
    sweep = make_row("copy", 5.0, workload="8x27x27x896", groups=("T-896",))
    text = markdown_table(Results(replace(RUN, settings={"quick": True}), [*ROWS, sweep]))
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### llava-video-7b"]
    assert (
        "64 × 27 × 27 × 3584 bfloat16. `norm_pool` must read 306 MB and write 77.5 MB, `grid_pool` must read 306 MB and"
        in text
    )
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == ("|  | p50 ms | p20–p80 ms | GB/s | % of copy | % of ceiling | × LLaVA avg pooling | extra MB |")
    assert "| **norm_pool, out=** | 9.90 | 9.80–10.1 | 38.7 | 111 | 81 | 38 | 0 |" in table
    assert "| LLaVA avg pooling | 376 | 372–384 | 1.02 | 2.9 | 2.1 | 1.00 | 418 |" in table
    assert "| naive grid_pool | failed |  |  |  |  |  |  |" in table
    assert {line.count("|") for line in table} == {9}
    where = "*Some CPU, 4 cores, 1 thread, avx512, torch 2.13.0, 2026-11-22, commit 7cc5a8a, quick. Run 2026"
    assert where in text
    assert text.index(table[-1]) < text.index(where)
    assert "- naive grid_pool: failed: out of \\[bold\\]memory\\[/bold\\] \\| at \\[31m once" in lines


def test_markdown_of_workloads_that_are_not_main_ones() -> None:
    text = markdown_table(Results(RUN, [make_row("norm_pool:cpu", 5.0, workload="a|b<c", groups=("T-896",))]))
    assert "### a\\|b&lt;c" in text
    assert "| **norm_pool** | 5.00 | 4.95–5.10 |" in text
