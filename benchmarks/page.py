"""Writes docs/performance.md, its pictures, and the README's table from benchmarks/results: make performance.

Of every machine the last measured state of the code counts. Nothing is measured here; no figure has another source.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks import prefill
from benchmarks.goals import RESULTS, T16, T64, bars, newest
from benchmarks.plot import save_plots
from benchmarks.report import is_ours, machine_line, markdown_table, show_number, show_time, title_of
from benchmarks.results import Results, Row
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
PICTURES = ROOT / "docs" / "performance"
MARK = "<!-- stgp bench -->", "<!-- /stgp bench -->"

INTRODUCTION = """\
# Performance

`make performance` writes this page from the files in [benchmarks/results](../benchmarks/results), to which `stgp bench`
and `make prefill` append. Each section names the machine, the date and the commit that its figures belong to.

## How it is measured

- **Right first.** Every result is compared with its definition, on the tokens that it is timed on: this package's ops
  with the reference in plain PyTorch, others with the same operation in float32. Who is wrong is not timed.
- **In turns.** All providers of a workload and a plain copy take turns in one process, so that clocks and neighbours
  favour none. Ratios within a run hold better than times across runs.
- **From memory.** On a CPU a buffer larger than the caches is read before each sample; threads are pinned, and results
  that go into memory given by `out=` and into fresh memory are timed apart. What fresh memory costs depends on whether
  the C library still holds as much of what was freed before; if not, the system hands out and clears every page, which
  can take twice as long as the pooling. On a GPU a sample is a CUDA graph of calls on rotating inputs and outputs of at
  least five times the L2 cache.
- **Against the limit.** The lower bound counts every token that the result depends on once, and the result once, for
  everybody alike. The copy moves as many bytes; the ceiling probe, on a CPU, moves pooling's bytes in pooling's order
  by a compiled loop without arithmetic. LLaVA avg pooling is what engines call: permute, contiguous, `avg_pool2d`.
- **Honest noise.** p20 and p80 stand beside every median; other processes' use of the machine is recorded.

Repeat it: `stgp bench` (everything that fits into memory), `stgp bench --quick` (two minutes on a small machine),
`stgp bench --compare A B` (what changed beyond the noise), `make bench` (microbenchmarks under pytest-benchmark),
`make prefill`, and on a machine with a GPU `make gpu-check`.
"""

SWEEPS = {
    "T-896": "Frames, 896 channels",
    "T-3584": "Frames, 3584 channels",
    "C": "Channels, 32 frames",
    "window": "Windows, 32 frames of 3584 channels; others than 2 × 2 take the general kernels",
    "budget": "Tokens by `output_size`, 32 frames of 3584 channels; general kernels",
}
NO_GPU = """\
## GPU

No result of a GPU is in the repository yet, so there is nothing to say about speed there.
"""


def page(results: Sequence[Results], prefills: Sequence[tuple[str, str, str]]) -> str:
    """The whole page. prefills: of each machine the name, the Markdown and the picture's path from the page."""
    parts = [INTRODUCTION]
    for each in results:
        parts += section(each)
    if not any(each.run.device["type"] == "cuda" for each in results):
        parts.append(NO_GPU)
    parts.append("## What it saves a language model\n")
    parts.append(
        textwrap.fill(
            "Time until a prompt of visual tokens and some text has gone through a decoder, which grows faster than "
            "the number of tokens, and the time of the pooling before it. Weights are random: only times mean "
            "something. Rows with as many tokens differ by noise.",
            120,
        )
        + "\n"
    )
    for name, text, picture in prefills:
        parts.append(f"### {name}\n\n{text}\n\n![prefill time against visual tokens]({picture})\n")
    if not prefills:
        parts.append("Not measured yet.\n")
    return "\n".join(parts).rstrip() + "\n"


def section(results: Results) -> list[str]:
    """Of one machine: goals, pictures, every main workload, sweeps."""
    run = results.run
    folder = f"performance/{picture_folder(results)}"
    parts = [f"## {run.device['name']}\n", textwrap.fill(f"{machine_line(run)}. Run {run.run}.", 120) + "\n"]
    parts.append("| goal | | |\n|---|---|---|")
    parts += [f"| {bar.name} | {bar.status} | {bar.detail} |" for bar in bars([results])]
    overhead = overhead_line(results)
    if overhead:
        parts.append("\n" + textwrap.fill(overhead, 120))
    parts.append("")
    for name, text in (
        ("ratios", "time relative to the fastest of ours"),
        ("time", "time against the number of frames, with the lower bound"),
        ("roofline", "arithmetic against bytes: how far from the roofs"),
        ("memory", "peak extra memory"),
    ):
        if (PICTURES / picture_folder(results) / f"{name}.png").exists():
            parts.append(f"![{text}]({folder}/{name}.png)\n")
    parts.append(markdown_table(results))
    for group, title in SWEEPS.items():
        parts += sweep(results, group, title)
    return parts


def overhead_line(results: Results) -> str:
    """What a call costs before it computes."""
    found = []
    for provider in ("norm_pool:cpu:out", "grid_pool:cpu:out", "norm_pool:triton", "grid_pool:triton", "avg_pool2d"):
        row = results.find(T64, provider)
        if row is not None and row.overhead_us is not None:
            cold = "" if row.overhead_cold_us is None else f" ({row.overhead_cold_us:.0f})"
            found.append(f"{title_of(provider)} {row.overhead_us:.0f}{cold}")
    if not found:
        return ""
    cold = "; in brackets after other work has filled the caches" if "(" in "".join(found) else ""
    return f"µs until a call on one frame of 9 × 9 tokens of 384 channels returns{cold}: {', '.join(found)}."


def sweep(results: Results, group: str, title: str) -> list[str]:
    """A table of medians: a line for every workload of a group, a column for every provider worth a comparison."""
    rows = [row for row in results.rows if group in row.groups and row.check == "ok"]
    names = sorted(dict.fromkeys(row.workload for row in rows), key=lambda name: sort_key(rows, name))
    columns = [
        provider
        for provider in dict.fromkeys(row.provider for row in rows)
        if (is_ours(provider) or provider in ("ceiling", "llava_avg_pool", "avg_pool2d", "adaptive_avg_pool2d"))
    ]
    if not names:
        return []
    lines = [
        f"### {title}\n",
        f"| | {' | '.join(map(title_of, columns))} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name in names:
        cells = []
        for provider in columns:
            row = results.find(name, provider)
            reached = row.gb_per_s if row is not None else None
            cells.append("-" if row is None else f"{show_time(row.p50_us or 0)}, {show_number(reached or 0)} GB/s")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\n*{machine_line(results.run)}.*\n")
    return ["\n".join(lines)]


def sort_key(rows: Sequence[Row], name: str) -> tuple[int, int, int]:
    row = next(row for row in rows if row.workload == name)
    known = WORKLOADS.get(name)
    out = (known.output_size or (0, 0))[0] if known else 0
    return row.frames, row.shape[-1], -out


def picture_folder(results: Results) -> str:
    """As the file of results is named."""
    return re.sub(r"[^a-z0-9]+", "-", f"{results.run.device['type']}-{results.run.device['name']}".lower()).strip("-")


def readme_table(results: Results) -> str:
    """Medians relative to norm_pool's into given memory, with 16 and 64 frames, and on which machine."""
    ours = "norm_pool:cpu:out"
    lines = ["| time, relative to the first row | 16 frames | 64 frames |", "|---|---|---|"]
    providers = dict.fromkeys([ours, *(row.provider for row in results.rows if row.workload == T64)])
    for provider in providers:
        cells = []
        for workload in (T16, T64):
            row, base = results.find(workload, provider), results.find(workload, ours)
            if row is None or base is None or row.p50_us is None or base.p50_us is None:
                cells.append("-")
            else:
                ratio = row.p50_us / base.p50_us
                shown = f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"
                cells.append(f"1 ({show_time(base.p50_us)})" if provider == ours else shown)
        if cells != ["-", "-"]:
            lines.append(f"| {title_of(provider)} | {' | '.join(cells)} |")
    facts = f"Frames of 27 × 27 × 3584 in bfloat16, pooled to 13 × 13; medians. {machine_line(results.run)}."
    return "\n".join([*lines, "", textwrap.fill(facts, 120)])


def with_table(readme: str, results: Sequence[Results]) -> str:
    """The README with the newest table of a CPU."""
    cpus = [each for each in results if each.run.device["type"] == "cpu"]
    if not cpus:
        return readme
    table = readme_table(max(cpus, key=lambda each: each.run.utc))
    before, _, rest = readme.partition(MARK[0])
    _, _, after = rest.partition(MARK[1])
    return f"{before}{MARK[0]}\n{table}\n{MARK[1]}{after}"


def prefill_sections(folder: Path, pictures: Path | None) -> list[tuple[str, str, str]]:
    """Of every machine, by the newest run that is not a quick one; draws into `pictures` unless None."""
    found = []
    for path in sorted(folder.glob("prefill-*.jsonl")):
        runs = [(run, rows) for run, rows in prefill.load(path) if rows and not run.settings.get("quick")]
        if not runs:
            continue
        run, rows = runs[-1]
        name = f"{path.stem}.png"
        if pictures is not None:
            prefill.plot(run, rows, pictures / name)
        found.append((str(run.device["name"]), prefill.markdown(run, rows), f"performance/{name}"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if texts are not up to date")
    given = parser.parse_args(arguments)
    results = newest()
    if not results:
        parser.error(f"there are no results in {RESULTS}")
    if not given.check:
        PICTURES.mkdir(exist_ok=True)
        for each in results:
            for path in save_plots(each, PICTURES / picture_folder(each), force=True):
                print(path.relative_to(ROOT))
    prefills = prefill_sections(RESULTS, None if given.check else PICTURES)
    texts = {PAGE: page(results, prefills), README: with_table(README.read_text(encoding="utf-8"), results)}
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if given.check:
            print(f"{path.relative_to(ROOT)} is not what the results say: make performance", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
