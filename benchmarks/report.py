"""Texts of results: tables for a terminal and for Markdown, and titles of providers."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import geometric_mean
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.results import BenchRow, Change, Run
from stgridpool_kernels.cli.machine import QUIET_CORES

PROBES = ("copy", "ceiling", "read")
"""Providers that move bytes and pool nothing."""

_TITLES = {
    "copy": "torch copy",
    "ceiling": "ceiling probe",
    "read": "read probe",
    "llava_avg_pool": "LLaVA avg pooling",
    "llava_bilinear_pool": "LLaVA bilinear pooling",
    "naive_norm_pool": "naive norm_pool",
    "naive_grid_pool": "naive grid_pool",
    "compiled_grid_pool": "torch.compile grid_pool",
    "evs": "EVS",
    "vidcom2": "VidCom2",
}
_VARIANTS = {"cpu": "", "out": "out="}
"""Words in titles for the variants of a provider. `cpu` has none, since a CPU has no other kernels of the package."""


# ---- names and numbers ----


def title_of(provider: str) -> str:
    """Return the title of a provider: "norm_pool:cpu:out" gives "norm_pool, out="."""
    name, *variants = provider.split(":")
    words = [_TITLES.get(name, name), *(_VARIANTS.get(variant, variant) for variant in variants)]
    return ", ".join(word for word in words if word)


def is_ours(provider: str) -> bool:
    """Return whether a provider is one of the package's kernels. The reference, in plain PyTorch, is not."""
    name, *variants = provider.split(":")
    ours = ("grid_pool", "norm_pool", "grid_pool_backward", "norm_pool_backward", "push")
    return name in ours and "reference" not in variants


def workload_title(row: BenchRow) -> str:
    """Return shape, dtype and settings of a row's workload, as "64 × 27 × 27 × 3584 bfloat16, ceil_mode=True"."""
    settings = [f"{key}={_setting(row.settings[key])}" for key in row.settings if key in _ARGUMENTS]
    return ", ".join([f"{' × '.join(map(str, row.shape))} {row.dtype}", *settings])


_ARGUMENTS = ("kernel_size", "ceil_mode", "output_size", "frame_counts", "resize")


def _setting(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:  # frames of many packed videos
        return f"[{value[0]}, {value[1]}, … {value[-1]}] ({len(value)})"
    return str(value)


def machine_line(run: Run) -> str:
    """Return device, versions, date and commit of a run in one line."""
    device, versions = run.device, run.versions
    words = [
        ("", device.get("name")),
        ("", plural(device.get("cores"), "core")),
        ("", plural(device.get("threads"), "thread")),
        ("", device.get("capability")),
        ("driver ", device.get("driver")),
        ("torch ", str(versions.get("torch") or "").partition("+")[0]),
        ("CUDA ", versions.get("cuda") if device.get("type") == "cuda" else None),
        ("Triton ", versions.get("triton") if device.get("type") == "cuda" else None),
        ("", state_line(run)),
    ]
    return ", ".join(f"{name}{value}" for name, value in words if value)


def state_line(run: Run) -> str:
    """Return date and commit of a run."""
    commit = str(run.source.get("commit") or "")[:7]
    words = [run.utc[:10], f"commit {commit}" if commit else "", "quick" if run.settings.get("quick") else ""]
    if commit and run.source.get("dirty"):
        words[1] += " with changes"
    return ", ".join(word for word in words if word)


def plural(count: int | None, noun: str) -> str:
    """Return a number of things as in "2 cores", "" if there is none."""
    return f"{count} {noun}{'s' * (count != 1)}" if count else ""


def show_number(value: float) -> str:
    """Format a number with three digits, or two below 0.1, without an exponent above 0.001."""
    size = abs(value)
    if size >= 99.95 or size == 0:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 else f"{value:.2g}"


def show_time(us: float) -> str:
    unit, scale = next(((unit, scale) for unit, scale in (("s", 1e6), ("ms", 1e3)) if us >= scale), ("µs", 1.0))
    return f"{show_number(us / scale)} {unit}"


# ---- tables ----


def table_of(rows: Sequence[BenchRow]) -> tuple[list[str], list[list[str]]]:
    """Return the titles of a workload's table, and a line of cells for each row.

    Columns without a value are left out. All times have the same unit.
    """
    unit, scale = ("ms", 1e-3) if min((row.us for row in rows if row.is_timed), default=0.0) >= 1e3 else ("µs", 1.0)

    def value(name: str, factor: float = 1.0) -> Callable[[BenchRow], str]:
        return lambda row: "" if getattr(row, name) is None else show_number(getattr(row, name) * factor)

    low, median, high = (value(name, scale) for name in ("p20_us", "p50_us", "p80_us"))
    columns: dict[str, Callable[[BenchRow], str]] = {
        f"p50 {unit}": lambda row: median(row) if row.check == "ok" else row.outcome,
        f"p20–p80 {unit}": lambda row: f"{low(row)}–{high(row)}".strip("–"),
        "GB/s": value("gb_per_s"),
        "% of copy": value("percent_of_copy"),
        "% of ceiling": value("percent_of_ceiling"),
        f"× {title_of(rows[0].baseline or '')}": value("times_baseline"),
        "extra MB": value("extra_peak_bytes", 1e-6),
        "state MB": value("state_bytes", 1e-6),
        "launches": lambda row: str(row.launches or ""),
        "overhead µs": value("overhead_us"),
    }
    shown = {title: show for title, show in columns.items() if any(show(row) for row in rows)}
    return list(shown), [[show(row) for show in shown.values()] for row in rows]


def remarks(rows: Sequence[BenchRow]) -> list[str]:
    """Return the lines below a table: reasons for missing times, notes, and the use of cores by other processes."""
    texts = [(row, text) for row in rows for text in (row.check if row.check != "ok" else "", row.note) if text]
    found = [f"{title_of(row.provider)}: {printable(text)}" for row, text in texts]
    others = max((row.others_cores or 0.0 for row in rows), default=0.0)
    return [*found, *([f"Other processes used up to {others:.1f} cores meanwhile."] if others >= QUIET_CORES else [])]


def printable(text: str) -> str:
    """Return a text in one line, without control characters, which messages of errors may contain."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def workload_table(rows: Sequence[BenchRow]) -> Table:
    """Return the table of one workload, for a terminal."""
    legend = "GB/s: the fewest bytes that the op must move, over p50. × a provider: its time over this one's."
    table = Table(
        title=Text(f"{rows[0].workload}: {workload_title(rows[0])}", style="bold"),
        title_justify="left",
        caption=Text("\n".join([legend, *remarks(rows)]), style="dim", overflow="fold"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    titles, lines = table_of(rows)
    table.add_column("provider", vertical="bottom", no_wrap=True)
    for title in titles:
        table.add_column("\n".join(title.rsplit(" ", 1)), justify="right", vertical="bottom", no_wrap=True)
    styles = {"wrong": "bold red", "failed": "bold red", "skipped": "yellow"}
    for row, cells in zip(rows, lines, strict=True):
        style = "bold" if is_ours(row.provider) else "dim" if row.provider in PROBES else ""
        table.add_row(title_of(row.provider), *(cell or "–" for cell in cells), style=styles.get(row.outcome, style))
    return table


def markdown_table(rows: Sequence[BenchRow]) -> str:
    """Return the table of one workload in Markdown."""
    titles, cells = table_of(rows)
    lines = [["", *titles], ["---", *("---:" for _ in titles)]]
    for row, line in zip(rows, cells, strict=True):
        lines.append([f"**{title_of(row.provider)}**" if is_ours(row.provider) else title_of(row.provider), *line])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str) -> str:
    """Wrap a paragraph to lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


# ---- comparisons ----


def compare_table(changes: Sequence[Change], before: Run, after: Run) -> Table:
    """Return a table of the changes between two runs, with those beyond the noise in colour."""
    table = Table(title=Text(f"{before.run} → {after.run}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload", overflow="fold")
    table.add_column("provider")
    for title in ("before", "after", "ratio", "noise"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    styles = {"faster": "bold green", "slower": "bold red", "": "dim"}
    for change in changes:
        times = [show_time(row.us) for row in (change.before, change.after)]
        verdict = Text(change.verdict or "within noise", style=styles[change.verdict])
        noise = f"± {100 * change.noise:.1f} %"
        place = change.after.workload, title_of(change.after.provider)
        table.add_row(*place, *times, f"{change.ratio:.3f}", noise, verdict)
    return table


def compare_summary(changes: Sequence[Change], before: Run, after: Run) -> str:
    """Return a summary of a comparison in one line, and a second line if the runs differ in more than the code."""
    verdicts = Counter(change.verdict for change in changes)
    mean = geometric_mean(change.ratio for change in changes)
    facts = (("device", "name"), ("device", "threads"), ("versions", "torch"))
    pairs = [(name, *(getattr(run, part).get(name) for run in (before, after))) for part, name in facts]
    differing = [f"{name} {old} → {new}" for name, old, new in pairs if old != new]
    warning = f"\nthe runs differ in more than the code: {'; '.join(differing)}" if differing else ""
    return (
        f"{verdicts['faster']} faster, {verdicts['slower']} slower, {verdicts['']} within the noise; "
        f"geometric mean of the ratios {mean:.3f}{warning}"
    )
