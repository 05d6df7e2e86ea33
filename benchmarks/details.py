"""The page of details: for every workload a table of every call that was timed on it, with spread and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals import T64
from benchmarks.report import PROBES, filled, machine_line, markdown_table, remarks, show_number, workload_title
from benchmarks.results import BenchRow, Results, last_states

GROUPS = ("main", "overhead", "stream", "gradients", "pruning")
"""Groups of workloads that have details."""
HEAD = """\
# Details of performance

Every call that was timed on the main workloads, on one small frame and in streams, gradients and pruning, with its
spread and its memory.
[performance.md](../performance.md) says what it means and how it is measured.

Times are medians of a call; p20–p80 is where the middle three fifths of the samples lie. GB/s counts, for every row
alike, the fewest bytes that the op must move. % of copy and of ceiling: those GB/s as a share of the rate at which
`torch` copies, and at which a compiled loop moves the same bytes without arithmetic, in between the same samples. × a
provider: its time over this one's; above 1 is faster. Extra MB: memory in use at most during the call, beyond input and
result. State MB: the most memory that a stream keeps between two pushes. Bold rows are this package's kernels.
"""


def details(files: Sequence[Path]) -> str:
    """Return the text of the page of details, from the files of all machines."""
    parts = [HEAD]
    for group in GROUPS:
        for results in last_states(files, T64 if group == "main" else group):
            parts += [part for rows in results.of(group).values() for part in workload_details(results, rows)]
    return "\n".join(parts).rstrip() + "\n"


def workload_details(results: Results, rows: Sequence[BenchRow]) -> list[str]:
    """Return a title, the table of a workload, its machine, and remarks."""
    bounds = {row.op: row for row in rows if row.op}
    moved = [
        f"`{op}` must read {show_number(row.read_bytes / 1e6)} MB and write {show_number(row.write_bytes / 1e6)} MB"
        for op, row in bounds.items()
        if op != "push"
    ]
    title = ". ".join([workload_title(rows[0]), *([", ".join(moved)] if moved else [])])
    parts = [f"## {rows[0].workload}, {results.run.device['name']}\n", f"{filled(f'{title}.')}\n"]
    parts.append(f"{markdown_table(sorted(rows, key=lambda row: in_details(row.provider)))}\n")
    parts.append(f"{filled(f'*{machine_line(results.run)}. Run {rows[0].run}.*')}\n")
    parts += ["\n".join(f"- {remark}" for remark in remarks(rows)) + "\n"] if remarks(rows) else []
    return parts


def in_details(provider: str) -> int:
    """Return the place of a provider's row: probes, channels-last avg_pool2d, then the others in their own order."""
    return 0 if provider in PROBES else 1 if provider.startswith("avg_pool2d") else 2
