"""Pictures of results: the time of a call against frames, and times relative to the package's fastest kernel.

matplotlib is imported on first use, and its global state is unchanged.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.report import PROBES, is_ours, machine_line, show_number, show_time, title_of, workload_title
from benchmarks.results import BenchRow, Results
from benchmarks.tables import base_of, is_shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL, NORMAL = 7.0, 8.5
"""Font sizes in points."""
WIDTH = 9.0
"""Width of a picture in inches, about that of a page of documentation."""
COLUMNS, MOST_PANELS = 4, 8
"""Number of workloads per row, and in total, in the picture of ratios."""
BLACK, GREY, GRID, BAND = "#222222", "#666666", "#E4E4E4", "#EAF3F9"

# The palette of Okabe and Ito, which colour-blind readers can distinguish, for families of providers. Members of a
# family differ in line and marker.
_FAMILIES = {
    "#0072B2": ("grid_pool",),
    "#D55E00": ("norm_pool",),
    "#CC79A7": ("llava_avg_pool", "llava_bilinear_pool"),
    "#E69F00": ("avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"),
    "#009E73": ("naive_norm_pool", "naive_grid_pool"),
    "#56B4E9": ("compiled_grid_pool", "compiled_grid_pool:max-autotune"),
    BLACK: ("norm_pool:reference", "grid_pool:reference"),
    "#808080": ("copy", "ceiling"),
}
_LINES = (("-", "o"), ("--", "s"), (":", "v"))


def style_of(provider: str) -> dict[str, Any]:
    """Return colour, line and marker of a provider in every picture. Those of the package's kernels are filled."""
    name = provider.split(":")[0]
    styles = {member: (colour, _LINES[i]) for colour, names in _FAMILIES.items() for i, member in enumerate(names)}
    colour, (line, marker) = styles.get(provider) or styles.get(name) or (GREY, _LINES[0])
    if provider.endswith((":out", ":cuda")):
        line, marker = _LINES[1]
    fill = colour if is_ours(provider) else "white"
    return {"color": colour, "linestyle": line, "marker": marker, "markerfacecolor": fill}


def save_plots(results: Results, folder: Path, force: bool = False) -> list[Path]:
    """Draw time.png and ratios.png into a folder, which is made if needed, and return the files written.

    Pictures without results are left out. Raises FileExistsError, before anything is written, if a picture exists,
    unless `force`; ImportError without matplotlib.
    """
    refuse_existing(folder, force)
    figures = {folder / f"{name}.png": draw(results) for name, draw in PICTURES.items()}
    drawn = {path: figure for path, figure in figures.items() if figure is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for path, figure in drawn.items():
        figure.savefig(path, format="png", dpi=150, pil_kwargs={"optimize": True})
    return list(drawn)


def refuse_existing(folder: Path, force: bool) -> None:
    """Raise FileExistsError if a picture exists in the folder, unless `force`; ImportError without matplotlib."""
    import matplotlib  # noqa: F401

    for name in PICTURES:
        if (folder / f"{name}.png").exists() and not force:
            raise FileExistsError(f"{folder / name}.png exists already; --force overwrites it")


def _figure(results: Results, title: str, note: str, height: float) -> Figure:
    """Return an empty figure with a title, and with machine, date, commit and a note below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    text = "\n".join(textwrap.wrap(f"{machine_line(results.run)}. {note}", 150))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, color=GREY, parse_math=False)
    return figure


def _clean(axes: Axes, grid: Literal["both", "x"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL)


# ---- time against frames ----


def draw_times(results: Results) -> Figure | None:
    """Draw a panel for every sweep of frames; return None if there is none."""
    groups = {group for row in results.rows for group in row.groups if group.startswith("T-")}
    sweeps = [[row for rows in results.of(group).values() for row in rows if row.is_timed] for group in sorted(groups)]
    sweeps = [rows for rows in sweeps if len({row.frames for row in rows}) > 1]
    if not sweeps:
        return None
    note = "Medians, and bands from p20 to p80. Lower bound: grid_pool's fewest bytes at the rate of the probe."
    figure = _figure(results, "Time of a call against frames", note, 0.8 + 3.4 * len(sweeps))
    for rows, axes in zip(sweeps, figure.subplots(len(sweeps), squeeze=False)[:, 0], strict=True):
        _draw_sweep(axes, rows)
    return figure


def _draw_sweep(axes: Axes, rows: Sequence[BenchRow]) -> None:
    lines: dict[str, list[BenchRow]] = {}
    for row in sorted(rows, key=lambda row: row.frames):
        lines.setdefault(row.provider, []).append(row)
    compared = {name: found for name, found in lines.items() if is_drawn(name) or name == "copy"}
    for provider, found in compared.items():
        if len(found) == 1:
            continue
        frames, style = [row.frames for row in found], style_of(provider)
        if provider not in PROBES:
            width = 2.0 if is_ours(provider) else 1.0
            times = [row.us / 1e3 for row in found]
            axes.plot(frames, times, **style, label=title_of(provider), linewidth=width, markersize=3.5)
            low, high = ([(getattr(row, q) or row.us) / 1e3 for row in found] for q in ("p20_us", "p80_us"))
            axes.fill_between(frames, low, high, color=style["color"], alpha=0.2, linewidth=0)
        elif provider != "read":
            bounds = [_lower_bound_us(row, rows) / 1e3 for row in found]
            line = {"color": style["color"], "linestyle": (0, (1, 1)) if provider == "copy" else "-."}
            axes.plot(frames, bounds, **line, label=f"lower bound at the rate of {title_of(provider)}")
    first = rows[0]
    tokens = " × ".join(map(str, first.shape[-3:]))
    axes.set_title(f"frames of {tokens} {first.dtype}", loc="left", fontsize=NORMAL)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("frames", fontsize=SMALL)
    axes.set_ylabel("ms", fontsize=SMALL)
    counts = sorted({row.frames for row in rows})
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    axes.yaxis.set_major_formatter(lambda value, place: show_number(value))
    _clean(axes, "both")
    # names in the vertical order of the lines' right ends
    handles = sorted(axes.get_lines(), key=lambda line: -np.asarray(line.get_ydata())[-1])
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=SMALL, frameon=False)


def _lower_bound_us(probe: BenchRow, rows: Sequence[BenchRow]) -> float:
    """Return the time in µs of the lower bound of grid_pool, or of another op if it is missing, at a probe's rate."""
    ops = {row.op: row for row in rows if row.frames == probe.frames and row.op}
    op = ops.get("grid_pool") or next(iter(ops.values()), probe)
    return (op.read_bytes + op.write_bytes) / (probe.read_bytes + probe.write_bytes) * probe.us


# ---- ratios ----


def draw_ratios(results: Results) -> Figure | None:
    """Draw a panel for every main workload, or for all poolings if none is main; return None if nothing compares."""
    panels: list[tuple[list[BenchRow], BenchRow, dict[str, float]]] = []
    for rows in list((results.of("main") or results.of("pooling")).values())[:MOST_PANELS]:
        timed = [row for row in rows if row.is_timed and is_drawn(row.provider)]
        fastest = min((row for row in timed if is_ours(row.provider)), key=lambda row: row.us, default=None)
        if fastest is not None and len(timed) > 1:
            panels.append((rows, fastest, {row.provider: row.us / fastest.us for row in timed}))
    if not panels:
        return None
    everywhere: dict[str, list[float]] = {}
    for *_, ratios in panels:
        for provider, ratio in ratios.items():
            everywhere.setdefault(provider, []).append(ratio)
    providers = sorted(everywhere, key=lambda provider: -statistics.median(everywhere[provider]))
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    note = (
        "Medians relative to the fastest of the package's kernels (1 ×) on a logarithmic scale: longer is slower. "
        "Paler: with a fresh result. grid_pool does more than the plain poolings: it also makes the summaries. Grey: "
        "moves as many bytes as pooling must, and pools nothing. *: pools to another size."
    )
    figure = _figure(results, "Time relative to the fastest kernel", note, 1.0 + lines * (0.8 + 0.16 * len(providers)))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    longest = max(max(found) for found in everywhere.values())
    for axes, (rows, fastest, ratios) in zip(grid, panels, strict=False):
        _draw_panel(axes, rows, ratios, providers)
        unit = f"1 × = {title_of(fastest.provider)}, {show_time(fastest.us)}"
        tokens = textwrap.fill(workload_title(rows[0]).replace(" × ", "×"), 34)
        axes.set_title(f"{rows[0].workload}\n{tokens}\n{unit}", loc="left", fontsize=SMALL, parse_math=False)
        axes.set(xscale="log", xlim=(0.5, longest * 4))
        axes.xaxis.set_major_formatter(lambda value, place: show_number(value))
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    return figure


def is_drawn(provider: str) -> bool:
    """Return whether a provider is one that the ops stand in for, or a limit; tables have the others."""
    return is_shown(base_of(provider)) or provider in ("naive_grid_pool", "compiled_grid_pool")


def _draw_panel(axes: Axes, rows: Sequence[BenchRow], ratios: dict[str, float], providers: Sequence[str]) -> None:
    noted = {row.provider for row in rows if row.note}
    for place, provider in enumerate(providers):
        if is_ours(provider):
            axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0)
        if provider in ratios:
            ratio = ratios[provider]
            alpha = 0.5 if f"{provider}:out" in ratios else 1.0  # a fresh result, paler than into given memory
            bar = {"color": style_of(provider)["color"], "alpha": alpha}
            axes.barh(place, ratio - 1, left=1, height=0.66, **bar, zorder=3)
            text = f" {show_number(ratio)}{' *' if provider in noted else ''}"
            axes.text(max(ratio, 1), place, text, fontsize=SMALL, va="center", color=BLACK)
    axes.axvline(1, color=BLACK, linewidth=0.9, zorder=4)
    axes.set_yticks(range(len(providers)), [title_of(provider) for provider in providers])
    _clean(axes, "x")


PICTURES: dict[str, Callable[[Results], Any]] = {"time": draw_times, "ratios": draw_ratios}
