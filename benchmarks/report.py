"""Results as text: tables for a terminal and for Markdown, and the names that people know providers by."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.results import Change, Results, Row, Run

__all__ = [
    "PROBES",
    "QUIET_CORES",
    "compare_summary",
    "compare_table",
    "compare_warning",
    "is_ours",
    "machine_line",
    "main_workloads",
    "markdown_table",
    "show_number",
    "show_percent",
    "show_ratio",
    "show_time",
    "title_of",
    "workload_table",
    "workload_title",
]

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
    "compiled_grid_pool:max-autotune": "torch.compile, max-autotune",
}
_VARIANTS = {"cpu": "", "out": "out="}
"""The CPU kernels are the only ones of ours on a CPU, so their backend goes without saying."""

# As many cores in use by others hardly show in the times.
QUIET_CORES = 0.1


# ---- names ----


def title_of(provider: str) -> str:
    """What people call a provider; "norm_pool:cpu:out" is "norm_pool, out="."""
    if provider in _TITLES:
        return _TITLES[provider]
    name, *variants = provider.split(":")
    words = [_TITLES.get(name, name), *(_VARIANTS.get(variant, variant) for variant in variants)]
    return _one_line(", ".join(word for word in words if word))


def is_ours(provider: str) -> bool:
    """Whether it is one of the package's kernels. Its reference, in plain PyTorch, is not."""
    name, *variants = provider.split(":")
    return name in ("grid_pool", "norm_pool") and variants != ["reference"]


def workload_title(row: Row, name: bool = True) -> str:
    """The workload of a row, e.g. "llava-video-7b: 64 × 27 × 27 × 3584 bfloat16, ceil_mode=True"."""
    shape = " × ".join(map(str, row.shape))
    settings = [f"{key}={_setting(value)}" for key, value in row.settings.items()]
    title = ", ".join([f"{shape} {row.dtype.removeprefix('torch.')}", *settings])
    return _one_line(f"{row.workload}: {title}" if name and row.workload != shape.replace(" × ", "x") else title)


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 6:  # frames of many packed videos
        return f"[{value[0]}, {value[1]}, … {value[-1]}] ({len(value)})"
    return str(value)


def machine_line(run: Run) -> str:
    """Where, with what, when and of which commit: the line without which a number means little."""
    device, versions, source = run.device, run.versions, run.source
    words = [str(device.get("name") or device.get("type") or "unknown device")]
    words += [
        f"{count} {noun if count == 1 else f'{noun}s'}"
        for noun, count in (("core", device.get("cores")), ("thread", _threads(run)))
        if count
    ]
    gpu = device.get("type") == "cuda"
    named = (
        ("", device.get("capability")),
        ("driver ", device.get("driver")),
        ("torch ", str(versions.get("torch") or "").partition("+")[0]),
        ("CUDA ", versions.get("cuda") if gpu else None),
        ("Triton ", versions.get("triton") if gpu else None),
        ("", run.utc[:10]),
        ("commit ", str(source.get("commit") or "")[:7]),
    )
    words += [f"{what}{value}" for what, value in named if value]
    if source.get("commit") and source.get("dirty"):
        words[-1] += " with changes"
    if run.settings.get("quick"):
        words.append("quick")
    return _one_line(", ".join(words))


def _threads(run: Run) -> Any:
    return run.device.get("threads") or run.settings.get("threads")


def main_workloads(results: Results) -> dict[str, list[Row]]:
    """Rows of the workloads of the group "main", by name."""
    found: dict[str, list[Row]] = {}
    for row in results.rows:
        if "main" in row.groups:
            found.setdefault(row.workload, []).append(row)
    return found


# ---- numbers ----


def show_number(value: float) -> str:
    """Three digits, fewer below 1; never an exponent for what is above 0.001."""
    size = abs(value)
    if size >= 99.95 or size == 0:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 else f"{value:.2g}"


def show_time(us: float) -> str:
    return f"{show_number(us / 1e3)} ms" if us >= 1e3 else f"{show_number(us)} µs"


def show_percent(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}"


def show_ratio(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


# ---- columns that both kinds of tables share ----


@dataclass(frozen=True)
class _Column:
    """A title and its unit, and what a row shows there; "" where it has no such value."""

    title: str
    unit: str
    show: Callable[[Row], str]


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """p50, where a row without a time says why, and those in which any row has a value.

    All times are in one unit, so that they compare at a glance.
    """
    shortest = min((row.p50_us for row in rows if row.p50_us), default=0.0)
    unit, scale = ("ms", 1e-3) if shortest >= 1e3 else ("µs", 1.0)

    def spread(row: Row) -> str:
        if row.p20_us is None or row.p80_us is None:
            return ""
        return f"{show_number(row.p20_us * scale)}–{show_number(row.p80_us * scale)}"

    def number(name: str, factor: float = 1.0, show: Callable[[float], str] = show_number) -> Callable[[Row], str]:
        def shown(row: Row) -> str:
            value = getattr(row, name)
            return "" if value is None else show(value * factor)

        return shown

    columns = [
        _Column("p50", unit, number("p50_us", scale)),
        _Column("p20–p80", unit, spread),
        _Column("", "GB/s", number("gb_per_s")),
        _Column("% of", "copy", number("percent_of_copy", show=show_percent)),
        _Column("% of", "ceiling", number("percent_of_ceiling", show=show_percent)),
        _Column("×", "base", number("times_baseline", show=show_ratio)),
        _Column("extra", "MB", number("extra_peak_bytes", 1e-6)),
        _Column("", "launches", number("launches", show=lambda count: f"{count:.0f}")),
        _Column("overhead", "µs", number("overhead_us")),
    ]
    return columns[:1] + [column for column in columns[1:] if any(column.show(row) for row in rows)]


def _outcome(row: Row) -> str:
    """ "wrong", "failed" or "skipped"; "" if all is well."""
    return "" if row.check == "ok" else _one_line(row.check.partition(":")[0])


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What a table has no room for: why there is no time, notes, and what disturbed."""
    remarks = []
    for row in rows:
        texts = [row.check if row.check != "ok" else "", row.note]
        remarks += [f"{title_of(row.provider)}: {_one_line(text)}" for text in texts if text]
    others = max((row.others_cores or 0.0 for row in rows), default=0.0)
    if others >= QUIET_CORES:
        remarks.append(f"Other processes used up to {others:.1f} cores meanwhile.")
    return remarks


def _baseline(rows: Sequence[Row]) -> str | None:
    return next((row.baseline for row in rows if row.baseline and row.times_baseline is not None), None)


def _one_line(text: str) -> str:
    """Names and reasons may hold anything; what a terminal would act on becomes a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---- terminal ----

_STYLES = {"wrong": "bold red", "failed": "bold red", "skipped": "yellow"}


WIDTH = 100


def workload_table(rows: Sequence[Row], width: int = WIDTH) -> Table:
    """All that was found on one workload, for a terminal of 100 columns; a narrower one shows neither launches nor the
    overhead of a call. Columns without a value are left out."""
    columns = [c for c in _columns(rows) if width >= WIDTH or (c.title != "overhead" and c.unit != "launches")]
    table = Table(
        title=Text(workload_title(rows[0]), style="bold") if rows else None,
        title_justify="left",
        caption=Text("\n".join(_terminal_notes(rows, columns)), style="dim", overflow="fold"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("provider", vertical="bottom", no_wrap=True)
    for column in columns:
        table.add_column(f"{column.title}\n{column.unit}", justify="right", no_wrap=True)
    for row in rows:
        cells = [column.show(row) or "–" for column in columns]
        texts = [Text(cell, style="dim" if cell == "–" else "") for cell in cells]
        outcome = _outcome(row)
        if outcome:
            texts = [Text(outcome, style=_STYLES.get(outcome, "")), *texts[1:]]
        style = "bold" if is_ours(row.provider) else "dim" if row.provider in PROBES else ""
        table.add_row(Text(title_of(row.provider)), *texts, style=style)
    return table


def _terminal_notes(rows: Sequence[Row], columns: Sequence[_Column]) -> list[str]:
    notes = []
    units = [column.unit for column in columns]
    if "GB/s" in units:
        notes.append("GB/s: the fewest bytes that the op must move, over p50.")
    baseline = _baseline(rows)
    if "base" in units and baseline:
        notes.append(f"× base: time of {title_of(baseline)} over this one's; above 1 is faster.")
    return notes + _remarks(rows)


def compare_table(changes: Sequence[Change], before: Run, after: Run) -> Table:
    """Two runs side by side. What is beyond the noise is said in a word, and coloured."""
    table = Table(
        title=Text(_one_line(f"{before.run} → {after.run}"), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("workload", overflow="fold")
    table.add_column("provider")
    for title in ("before", "after", "ratio", "noise"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    styles = {"faster": "bold green", "slower": "bold red", "": "dim"}
    for change in changes:
        table.add_row(
            Text(_one_line(change.workload)),
            Text(title_of(change.provider)),
            "" if change.before.p50_us is None else show_time(change.before.p50_us),
            "" if change.after.p50_us is None else show_time(change.after.p50_us),
            Text(f"{change.ratio:.3f}", style=styles[change.verdict]),
            f"± {100 * change.noise:.1f} %",
            Text(change.verdict or "within noise", style=styles[change.verdict]),
        )
    return table


def compare_summary(changes: Sequence[Change]) -> str:
    """One line on all of a comparison."""
    if not changes:
        return "nothing was measured in both runs"
    verdicts = Counter(change.verdict for change in changes)
    mean = math.exp(sum(math.log(change.ratio) for change in changes) / len(changes))
    return (
        f"{verdicts['faster']} faster, {verdicts['slower']} slower, {verdicts['']} within the noise; "
        f"geometric mean of the ratios {mean:.3f}"
    )


def compare_warning(before: Run, after: Run) -> str:
    """What makes two runs hard to compare: another device, number of threads or torch; "" if none of these differ."""

    def facts(run: Run) -> Mapping[str, Any]:
        name = run.device.get("name") or run.device.get("type")
        found = {"device": name, "threads": _threads(run), "torch": run.versions.get("torch")}
        return {fact: value or "unknown" for fact, value in found.items()}

    old, new = facts(before), facts(after)
    found = [f"{name} {old[name]} → {new[name]}" for name in old if old[name] != new[name]]
    return _one_line(f"the runs differ in more than the code: {'; '.join(found)}") if found else ""


# ---- Markdown ----

_HOW_TO_READ = (
    "Times are medians of a call; p20–p80 is where the middle three fifths of the samples lie. GB/s counts, for every "
    "row alike, the fewest bytes that the op must move: what its result depends on read once, the result written once. "
    "% of copy and of ceiling: those GB/s as a share of what `torch` copies, and a compiled loop that moves the same "
    "bytes without arithmetic, in between the same samples. × a provider: its time over this one's; above 1 is faster. "
    "Extra MB: memory in use at most during the call, beyond input and result. Bold rows are this package's kernels."
)


def markdown_table(results: Results) -> str:
    """One table per main workload, or per workload if none is a main one; under each where and when it was measured."""
    workloads = main_workloads(results)
    if not workloads:
        workloads = {name: [row for row in results.rows if row.workload == name] for name in results.workloads}
    parts = [_filled(_HOW_TO_READ)]
    for name, rows in workloads.items():
        parts += [f"### {_escaped(name)}", _filled(_bytes_line(rows)), _markdown_rows(rows)]
        parts.append(_filled(f"*{_escaped(f'{machine_line(results.run)}. Run {results.run.run}.')}*"))
        remarks = _remarks(rows)
        if remarks:
            parts.append("\n".join(f"- {_escaped(remark)}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def _bytes_line(rows: Sequence[Row]) -> str:
    """The workload, and its fewest bytes by op."""
    bounds = {row.op: row for row in rows if row.op}
    texts = [
        f"`{op}` must read {show_number(row.read_bytes / 1e6)} MB and write {show_number(row.write_bytes / 1e6)} MB"
        for op, row in bounds.items()
    ]
    text = f"{_escaped(workload_title(rows[0], name=False))}."
    return f"{text} {', '.join(texts)}." if texts else text


def _markdown_rows(rows: Sequence[Row]) -> str:
    baseline = _baseline(rows)
    columns = [column for column in _columns(rows) if column.title != "overhead" and column.unit != "launches"]
    titles = [
        f"× {title_of(baseline)}" if column.unit == "base" and baseline else f"{column.title} {column.unit}".strip()
        for column in columns
    ]
    lines = [_line(["", *titles]), _line(["---", *("---:" for _ in columns)])]
    for row in rows:
        outcome = _outcome(row)
        cells = [column.show(row) for column in columns]
        if outcome:
            cells = [outcome, *cells[1:]]
        title = title_of(row.provider)
        lines.append(_line([f"**{_escaped(title)}**" if is_ours(row.provider) else _escaped(title), *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|*`[]" else c for c in text)
