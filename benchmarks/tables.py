"""Tables of the page on performance, in Markdown. Each compares calls on the results of one machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.goals import MAIN, ONE_FRAME, T16
from benchmarks.pruning import RANKINGS
from benchmarks.report import is_ours, plural, show_number, show_time, title_of, workload_title
from benchmarks.results import BenchRow, Results

SUMMARY = ("8x27x27x896", "16x27x27x896", T16, *MAIN)
"""Names of the workloads of the first table."""
PLAIN, LLAVA = "avg_pool2d", "llava_avg_pool"
EMPTY_TITLES = {
    "empty:op": "`torch.ops.stgp.grid_pool(x)`, no frames",
    "empty:op, inference mode": "the same under `torch.inference_mode()`",
    "empty:function": "`stgridpool_kernels.grid_pool(x)`, no frames",
    "empty:python op": "an empty Python op of the same schema",
}


def table(titles: Sequence[str], lines: Iterable[Sequence[str]], of_numbers: bool = True) -> str:
    """Return a table. of_numbers: whether all columns but the first hold numbers, which are aligned on the right."""
    head = [titles, ["---", *("---:" if of_numbers else "---" for _ in titles[1:])]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*head, *lines])


def named_title(row: BenchRow) -> str:
    """Return shape, dtype and settings of a row's workload, and its name if that says more."""
    title = workload_title(row)
    return title if row.workload[0].isdigit() else f"{title} ({row.workload})"


# ---- given and fresh memory side by side ----


def times_table(results: Results, names: Iterable[str], columns: Sequence[str] = ()) -> str:
    """Return a table of times in ms, a line for every workload that was measured and a column for every provider.

    A cell has the time with given memory, then that with a fresh result, or the only one where there is no choice.
    columns: providers without ":out"; by default those of `is_shown`, the plain averages first, LLaVA's own call last.
    """
    workloads = {name: [row for row in results.rows if row.workload == name] for name in names}
    measured = {name: rows for name, rows in workloads.items() if rows}
    found = dict.fromkeys(base_of(row.provider) for rows in measured.values() for row in rows if row.is_timed)
    shown = [name for name in columns or sorted(filter(is_shown, found), key=place) if name in found]
    separates = {base_of(row.provider) for row in results.rows if row.provider.endswith(":out")}
    separates |= {PLAIN} if separates else set()  # older results lack its time with given memory
    lines = []
    for name, rows in measured.items():
        cells = [time_cell(results, name, column, column in separates) for column in shown]
        if any(cell != "-" for cell in cells):
            lines.append([named_title(rows[0]), *cells])
    return table(["ms", *map(title_of, shown)], lines)


def base_of(provider: str) -> str:
    return provider.removesuffix(":out")


def is_shown(provider: str) -> bool:
    """Return whether a provider is compared with others outside the page of details."""
    return is_ours(provider) or provider in ("ceiling", PLAIN, "adaptive_avg_pool2d", LLAVA, *RANKINGS)


def place(provider: str) -> int:
    """Return the place of a provider's column."""
    starts = ("ceiling", PLAIN, "adaptive", "norm_pool", "grid_pool", "push")
    known = next((i for i, start in enumerate(starts) if provider.startswith(start)), len(starts))
    return len(starts) + 1 if provider.startswith("llava") else known


def time_cell(results: Results, workload: str, provider: str, separates: bool) -> str:
    """Return the times in ms with given memory and with a fresh result, "-" for one that is missing."""
    given, fresh = (results.find(workload, name) for name in (f"{provider}:out", provider))
    shown = [show_number(row.us / 1e3) if row is not None and row.is_timed else "-" for row in (given, fresh)]
    if not separates or shown == ["-", "-"]:
        return shown[1]
    return " / ".join(shown)


def summary_table(results: Results) -> str:
    """Return the first table of a machine: the main workloads and a few small ones, next to both plain averages."""
    ours = [name for name in dict.fromkeys(row.provider for row in results.rows) if is_compared(name)]
    return times_table(results, SUMMARY, [PLAIN, *ours, LLAVA])


def is_compared(provider: str) -> bool:
    """Return whether a provider is norm_pool or grid_pool on a kernel of the package."""
    return is_ours(provider) and provider.startswith(("norm_pool:", "grid_pool:"))


def fresh_table(results: Results) -> str:
    """Return a table of the time of a call with a fresh result over that with given memory, by size of the result."""
    groups = ("T-896", "T-3584", "main")
    rows = {name: found[0] for group in groups for name, found in results.of(group).items()}
    columns = (PLAIN, "norm_pool:cpu", "grid_pool:cpu")
    lines = {}
    for name, row in rows.items():
        pairs = [(results.find(name, column), results.find(name, f"{column}:out")) for column in columns]
        ratios = [fresh.us / given.us if fresh and given else None for fresh, given in pairs]
        if any(ratios):
            shown = ["-" if ratio is None else show_number(ratio) for ratio in ratios]
            megabytes = next(fresh.write_bytes for fresh, _ in pairs if fresh) / 1e6
            lines[megabytes, name] = [named_title(row), show_number(megabytes), *shown]
    titles = ["tokens", "result, MB", *map(title_of, columns)]
    return table(titles, [lines[key] for key in sorted(lines)]) if lines else ""


# ---- the sweep next to a plain average ----


def plain_tables(results: Results) -> list[str]:
    """Return a table for every dtype and for both kinds of memory, with channels down and frames across."""
    rows = [row for found in results.of("plain").values() for row in found if row.is_timed]
    parts = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        for out, memory in ((":out", "given memory"), ("", "fresh results")):
            of_table = {(row.shape, row.provider): row.us for row in rows if row.dtype == dtype}
            shapes = sorted({shape for shape, _ in of_table}, key=lambda shape: (shape[-1], shape[0]))
            frames = sorted({shape[0] for shape in shapes})
            lines = []
            for channels in dict.fromkeys(shape[-1] for shape in shapes):
                row = {shape[0]: shape for shape in shapes if shape[-1] == channels}
                lines.append([str(channels), *(ratios(of_table, row.get(count), out) for count in frames)])
            parts.append(
                f"{dtype}, {memory}:\n\n" + table(["channels", *(plural(count, "frame") for count in frames)], lines)
            )
    return parts


def ratios(times: dict[tuple[tuple[int, ...], str], float], shape: tuple[int, ...] | None, out: str) -> str:
    """Return a plain average's time over those of norm_pool and of grid_pool, in bold where it is faster than they."""
    shown = []
    for op in ("norm_pool", "grid_pool"):
        ours = next((time for (at, name), time in times.items() if at == shape and is_variant(name, op, out)), None)
        plain = None if shape is None else times.get((shape, f"{PLAIN}{out}"))
        ratio = None if ours is None or plain is None else plain / ours
        shown.append("-" if ratio is None else f"**{ratio:.2f}**" if ratio < 0.995 else f"{ratio:.2f}")
    return " / ".join(shown)


def is_variant(provider: str, op: str, out: str) -> bool:
    return provider.startswith(f"{op}:") and provider.endswith(":out") == bool(out)


# ---- small calls ----


def empty_table(results: Results) -> str:
    """Return a table of calls on a video of no frames: on warm caches, on cold ones, and next to an empty op."""
    rows = {row.provider: row for row in results.of("empty").get("empty", []) if row.is_timed}
    unit = rows.get("empty:python op")
    lines = []
    for row in rows.values():
        relative = show_number(row.us / unit.us) if unit else "-"
        lines.append([EMPTY_TITLES.get(row.provider, title_of(row.provider)), *warm_and_cold(row), relative])
    return table(["µs", "warm", "cold", "cold, × an empty op"], lines)


def one_frame_table(results: Results) -> str:
    """Return a table of calls on one small frame, on warm and on cold caches."""
    rows = [row for row in results.of("overhead").get(ONE_FRAME, []) if row.is_timed and row.overhead_us is not None]
    shown = [row for row in sorted(rows, key=lambda row: place(row.provider)) if is_next_to_ours(row.provider)]
    return table(["µs", "warm", "cold"], ([title_of(row.provider), *warm_and_cold(row)] for row in shown))


def is_next_to_ours(provider: str) -> bool:
    return is_ours(provider) or base_of(provider) in (PLAIN, LLAVA)


def warm_and_cold(row: BenchRow) -> list[str]:
    return ["-" if row.overhead_us is None else show_number(row.overhead_us), show_number(row.us)]


# ---- what pooling saves a language model ----


def prefill_table(rows: Sequence[BenchRow]) -> str:
    """Return a table with a line for every pooling: remaining tokens, times of pooling and decoder, and speed-up."""
    titles = ["pooled by", "grid", "visual tokens", "of all", "pooling", "prefill", "both faster by", "pooling's share"]
    known = {row.provider: row for row in rows}
    unpooled = known["prefill:unpooled"]
    prefills = [row for row in rows if row.op == "prefill"]
    pairs = [(row, known.get(row.provider.replace("prefill:", "pool:"))) for row in prefills]
    return table(titles, (prefill_cells(row, pooling, unpooled) for row, pooling in pairs))


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
