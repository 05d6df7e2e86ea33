"""Generation of docs/performance.md, its pictures and the README's table from the results in benchmarks/results.

For every machine and kind of workload, the last measured state of the code counts. All figures come from these results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals import ONE_FRAME, T16, T64, goals
from benchmarks.plot import save_plots
from benchmarks.report import (
    filled,
    is_ours,
    machine_line,
    markdown_table,
    remarks,
    show_number,
    show_time,
    title_of,
    workload_title,
)
from benchmarks.results import BenchRow, Results, file_name, last_state, machine_files

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
PICTURES = ROOT / "docs" / "performance"
MARK = "<!-- benchmarks -->", "<!-- /benchmarks -->"

INTRODUCTION = """\
# Performance

`make performance` (`python -m benchmarks page`) writes this page from the files in
[benchmarks/results](../benchmarks/results), to which `python -m benchmarks` appends. Each section names the machine,
the date and the commit that its figures belong to.

## How it is measured

- **Right first.** Every result is compared with its definition, on the tokens that it is timed on: this package's ops
  with the reference in plain PyTorch, others with the same operation in float32, a stream with the whole video, bit by
  bit. A provider with a wrong result is not timed.
- **In turns.** All providers of a workload and a plain copy take turns in one process, so that changes of clocks and
  other load affect all alike. Ratios within a run hold better than times across runs.
- **From memory.** On a CPU a buffer larger than the caches is read before each sample, threads are pinned to cores, and
  results that go into memory given by `out=` and into fresh memory are timed apart. The cost of fresh memory depends on
  the C library: if it still holds memory that was freed before, there is none; if not, the system hands out and clears
  every page, which can take twice as long as the pooling. On a GPU a sample is a CUDA graph of calls on rotating inputs
  and outputs of at least five times the L2 cache.
- **Against the limit.** The lower bound counts every token that the result depends on once, and the result once, for
  all providers alike. The copy moves as many bytes; the ceiling probe, on a CPU, moves pooling's bytes in pooling's
  order by a compiled loop without arithmetic. LLaVA avg pooling is the code that engines call: permute, contiguous,
  `avg_pool2d`.
- **Noise.** p20 and p80 stand beside every median; the use of the machine by other processes is recorded.

Repeat it: `python -m benchmarks` (every workload that fits into memory), `python -m benchmarks --quick` (two minutes on
a small machine), `python -m benchmarks compare A B` (the changes beyond the noise), `make bench` (microbenchmarks under
pytest-benchmark), `make prefill`, `make bench-pruning`, `python -m benchmarks --shape stream
llava-video-0.5b:gradients`, and on a machine with a GPU `make gpu-check`. `stgp bench` answers the first question in
seconds, without a checkout.

## How to read the tables

Times are medians of a call; p20–p80 is where the middle three fifths of the samples lie. GB/s counts, for every row
alike, the fewest bytes that the op must move. % of copy and of ceiling: those GB/s as a share of the rate at which
`torch` copies, and at which a compiled loop moves the same bytes without arithmetic, in between the same samples. × a
provider: its time over this one's; above 1 is faster. Extra MB: memory in use at most during the call, beyond input and
result. Bold rows are this package's kernels.
"""

SWEEPS = {
    "T-896": "Frames, 896 channels",
    "T-3584": "Frames, 3584 channels",
    "C": "Channels, 32 frames",
    "window": "Windows, 32 frames of 3584 channels; others than 2 × 2 take the general kernels",
    "budget": "Tokens by `output_size`, 32 frames of 3584 channels; general kernels",
}
KINDS = {
    "gradients": "Gradients in the tokens alone, next to the ops.",
    "stream": "`push:N` gives a stream N frames at a time, `push:1x4` one frame to each of four streams. Samples are "
    "whole periods of 32 frames, since a push that completes a segment takes longer. State: the most memory that is "
    "kept between two pushes.",
    "pruning": "EVS and VidCom2 are the methods by which vLLM drops tokens of videos (`--video-pruning-method`). Both "
    "are called at the rate q that keeps exactly as many tokens as `grid_pool` returns. With its default options that "
    "is a quarter, or less where windows of 2 × 2 leave out an odd row or column; the plugin for vLLM rounds up. A "
    "call computes vLLM's mask and gathers the tokens that it keeps. vLLM also appends positions to these tokens and "
    "corrects those of the prompt, which is not timed. Two things are checked: the kept tokens are tokens of x in "
    "their order, and in float32 the method keeps the tokens that its definition, computed in float64, keeps of the "
    "same x. (In bfloat16 most similarities of random tokens are equal, so any choice among them is right.) Both "
    "methods are plain torch and were timed on a CPU only. What a method does to answers is not measured. `make "
    "bench-pruning` runs this in an environment that has vLLM; elsewhere the two are skipped.",
}
NO_GPU = """\
## GPU

No result of a GPU is in the repository yet, so there is nothing to say about speed there.
"""
PREFILL = """\
## What pooling saves a language model

Time until a prompt of visual tokens and a short text has gone through a decoder of Qwen2's shape, which grows faster
than the number of tokens, and the time of the pooling before it. Weights are random: only times mean something. Rows
with equally many tokens differ by noise.
"""


def page(files: Sequence[Path]) -> str:
    """Return the text of the page, from the files of all machines."""
    machines = last_states(files, T64)
    parts = [INTRODUCTION, *(part for results in machines for part in section(results))]
    if not any(each.run.device["type"] == "cuda" for each in machines):
        parts.append(NO_GPU)
    for kind, text in KINDS.items():
        found = last_states(files, kind)
        parts += [f"## {kind.capitalize()}\n", f"{filled(text)}\n"] if found else []
        parts += [part for results in found for part in workload_tables(results, kind)]
    prefills = last_states(files, "prefill")
    parts += [PREFILL, *(prefill_table(results) for results in prefills)] if prefills else []
    return "\n".join(parts).rstrip() + "\n"


def last_states(files: Sequence[Path], part: str) -> list[Results]:
    """Return the results of every machine that has any of the workload or group `part`."""
    return [results for results in (last_state(path, part) for path in files) if results is not None]


def section(results: Results) -> list[str]:
    """Return the section of a machine: goals, overhead, pictures, every main workload, sweeps."""
    run, folder = results.run, PICTURES / picture_folder(results)
    parts = [f"## {run.device['name']}\n", f"{filled(machine_line(run))}.\n", "| goal | | |\n|---|---|---|"]
    parts += [f"| {goal.name} | {goal.status} | {goal.detail} |" for goal in goals(results)]
    parts += ["", *overhead(results)]
    for name, text in (("ratios", "time relative to the fastest kernel"), ("time", "time against frames")):
        if (folder / f"{name}.png").exists():
            parts.append(f"![{text}](performance/{folder.name}/{name}.png)\n")
    parts += workload_tables(results, "main")
    for group, title in SWEEPS.items():
        parts += sweep(results, group, title)
    return parts


def overhead(results: Results) -> list[str]:
    """Return a line on the overhead of calls, which dominates the time of a call on one small frame."""
    rows = [row for row in results.of("overhead").get(ONE_FRAME, []) if row.overhead_us is not None]
    found = [
        f"{title_of(row.provider)} {row.overhead_us:.0f} ({row.us:.0f})"
        for row in rows
        if row.is_timed and (is_ours(row.provider) or row.provider == "avg_pool2d")
    ]
    text = "µs of a call on one frame of 9 × 9 tokens of 384 channels on warm caches (and after other work filled them)"
    return [f"{filled(f'{text}: ' + ', '.join(found))}.\n"] if found else []


def workload_tables(results: Results, group: str) -> list[str]:
    """Return a table for every workload of a group, each with its machine and time below."""
    parts = []
    for name, rows in results.of(group).items():
        bounds = {row.op: row for row in rows if row.op}
        moved = [
            f"`{op}` must read {show_number(row.read_bytes / 1e6)} MB and write {show_number(row.write_bytes / 1e6)} MB"
            for op, row in bounds.items()
            if op != "push"
        ]
        title = ". ".join([workload_title(rows[0]), *([", ".join(moved)] if moved else [])])
        parts += [f"### {name}\n", filled(f"{title}.") + "\n", markdown_table(rows)]
        parts.append("\n" + filled(f"*{machine_line(results.run)}. Run {rows[0].run}.*") + "\n")
        parts += ["\n".join(f"- {remark}" for remark in remarks(rows)) + "\n"] if remarks(rows) else []
    return parts


def sweep(results: Results, group: str, title: str) -> list[str]:
    """Return a table of medians with a line for every workload of a group and a column for every compared provider."""
    workloads = {name: [row for row in rows if row.is_timed] for name, rows in results.of(group).items()}
    sizes = {name: (rows[0].frames, rows[0].shape[-1]) for name, rows in workloads.items() if rows}
    names = sorted(sizes, key=sizes.__getitem__)
    others = ("ceiling", "llava_avg_pool", "avg_pool2d", "adaptive_avg_pool2d")
    providers = dict.fromkeys(row.provider for name in names for row in workloads[name])
    columns = [provider for provider in providers if is_ours(provider) or provider in others]
    if not names:
        return []
    lines = [f"| | {' | '.join(map(title_of, columns))} |", f"|---|{'---:|' * len(columns)}"]
    for name in names:
        known = {row.provider: row for row in workloads[name]}
        cells = [
            f"{show_time(row.us)}, {show_number(row.gb_per_s or 0)} GB/s" if row else "-"
            for row in map(known.get, columns)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [f"### {title}\n", "\n".join(lines), f"\n*{machine_line(results.run)}.*\n"]


def prefill_table(results: Results) -> str:
    """Return a table with a line for every pooling: remaining tokens, times of pooling and decoder, and speed-up."""
    lines = ["| pooled by | grid | visual tokens | of all | pooling | prefill | both faster by | pooling's share |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    parts = []
    for workload, rows in results.of("prefill").items():
        known, table = {row.provider: row for row in rows}, list(lines)
        unpooled = known["prefill:unpooled"]
        for row in rows:
            if row.op == "prefill":
                pooling = known.get(row.provider.replace("prefill:", "pool:"))
                table.append(f"| {' | '.join(prefill_cells(row, pooling, unpooled))} |")
        about = f"{workload}: {workload_title(rows[0])}. {unpooled.note}. {machine_line(results.run)}, "
        about += f"transformers {results.run.versions.get('transformers')}."
        parts.append("\n".join([f"### {results.run.device['name']}\n", *table, "", filled(about), ""]))
    return "\n".join(parts)


def prefill_cells(row: BenchRow, pooling: BenchRow | None, unpooled: BenchRow) -> list[str]:
    rows, cols = row.settings["grid"]
    share = rows * cols / (row.shape[-3] * row.shape[-2])
    cells = [f"`{row.settings['pooled_by']}`", f"{rows} × {cols}", f"{row.settings['visual_tokens']:,}"]
    cells.append(f"{show_number(100 * share)} %")
    if not row.is_timed or (pooling is not None and not pooling.is_timed):
        return [*cells, "-" if pooling is None else pooling.outcome, row.outcome, "-", "-"]
    pooling_us = pooling.us if pooling else 0.0
    faster = f"{show_number(unpooled.us / (pooling_us + row.us))} ×" if unpooled.is_timed else "-"
    share_of_pooling = f"{show_number(100 * pooling_us / (pooling_us + row.us))} %" if pooling else "-"
    return [*cells, show_time(pooling_us) if pooling else "-", show_time(row.us), faster, share_of_pooling]


def picture_folder(results: Results) -> str:
    """Return the name of the folder of a machine's pictures, which equals that of its file of results."""
    return file_name(results.run.device).removesuffix(".jsonl")


def readme_table(results: Results) -> str:
    """Return a table of medians relative to norm_pool with `out`, for 16 and 64 frames, with the machine below."""
    ours = "norm_pool:cpu:out"
    lines = ["| time, relative to the first row | 16 frames | 64 frames |", "|---|---|---|"]
    for provider in dict.fromkeys([ours, *(row.provider for row in results.rows if row.workload == T64)]):
        cells = []
        for workload in (T16, T64):
            row, base = results.find(workload, provider), results.find(workload, ours)
            if row is None or base is None or not row.is_timed or not base.is_timed:
                cells.append("-")
            else:
                cells.append(f"1 ({show_time(base.us)})" if provider == ours else show_number(row.us / base.us))
        if cells != ["-", "-"]:
            lines.append(f"| {title_of(provider)} | {' | '.join(cells)} |")
    facts = f"Frames of 27 × 27 × 3584 in bfloat16, pooled to 13 × 13; medians. {machine_line(results.run)}."
    return "\n".join([*lines, "", filled(facts)])


def with_table(readme: str, files: Sequence[Path]) -> str:
    """Return the text of the README with the newest table of a CPU."""
    cpus = [results for results in last_states(files, T64) if results.run.device["type"] == "cpu"]
    if not cpus:
        return readme
    table = readme_table(max(cpus, key=lambda each: each.run.utc))
    before, _, rest = readme.partition(MARK[0])
    return f"{before}{MARK[0]}\n{table}\n{MARK[1]}{rest.partition(MARK[1])[2]}"


def texts() -> dict[Path, str]:
    """Return the texts of the page and the README that follow from the results."""
    files = machine_files()
    return {PAGE: page(files), README: with_table(README.read_text(encoding="utf-8"), files)}


def write() -> list[Path]:
    """Draw the pictures, write the page and the README, and return the files written."""
    machines = last_states(machine_files(), T64)
    written = [path for each in machines for path in save_plots(each, PICTURES / picture_folder(each), force=True)]
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def stale() -> list[Path]:
    """Return the files whose text differs from the one that follows from the results."""
    return [path for path, text in texts().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
