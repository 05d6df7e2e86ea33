"""Results as pictures: time against frames, a roofline, times relative to ours, and memory.

Sheets are laid out in inches and 9 wide, so that a README shows them about as large as they are drawn. matplotlib is
imported on first use, and no global state of it is touched.
"""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import (
    PROBES,
    is_ours,
    machine_line,
    main_workloads,
    show_number,
    show_percent,
    show_ratio,
    show_time,
    title_of,
    workload_title,
)
from benchmarks.results import Results, Row, Run
from stgridpool_kernels.cli.picture import check_picture, require_matplotlib
from stgridpool_kernels.io.writing import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Sheet", "check_plots", "save_plots", "sheets"]

_NAMES = ("time.png", "roofline.png", "ratios.png", "memory.png")

_DPI = 150
_WIDTH = 9.0
_EDGE = 0.2
_LABEL = 2.05  # width of a column of providers' names

_TINY, _SMALL, _NORMAL, _TITLE = 6.8, 7.5, 8.5, 12.0
_LINE = 0.145  # height of a line of small text
_HEAD, _FOOT = 0.26, 0.5  # above the axes of a panel for its title, below for ticks and the axis's name

_BLACK, _GREY, _PALE, _GRID = "#222222", "#666666", "#A8A8A8", "#E4E4E4"
_OURS_BAND = "#EAF3F9"

# Okabe and Ito's palette, which colour-blind readers can tell apart. A colour is a family; its members differ in line
# and marker.
_COLOURS = {
    "grid_pool": "#0072B2",
    "norm_pool": "#D55E00",
    "llava_avg_pool": "#CC79A7",
    "llava_bilinear_pool": "#CC79A7",
    "avg_pool2d": "#E69F00",
    "max_pool2d": "#E69F00",
    "adaptive_avg_pool2d": "#E69F00",
    "naive_norm_pool": "#009E73",
    "naive_grid_pool": "#009E73",
    "compiled_grid_pool": "#56B4E9",
    "copy": "#808080",
    "ceiling": "#4D4D4D",
    "read": "#BBBBBB",
}
_SECOND = ("llava_bilinear_pool", "max_pool2d", "naive_grid_pool")
_THIRD = ("adaptive_avg_pool2d",)


@dataclass(frozen=True)
class _Style:
    colour: str
    line: str
    marker: str


def _style(provider: str) -> _Style:
    """How a provider is drawn, the same on every sheet: ours in filled shapes, one of its own for each op."""
    name, *variants = provider.split(":")
    colour = _BLACK if variants == ["reference"] else _COLOURS.get(name, _GREY)
    if is_ours(provider):
        line = {"cuda": "--", "cpu": "--"}.get(variants[-1] if variants else "", "-")
        return _Style(colour, line, "D" if name == "grid_pool" else "o")
    if variants == ["reference"]:
        return _Style(colour, ":", "P" if name == "grid_pool" else "X")
    if name in _THIRD:
        return _Style(colour, ":", "v")
    second = name in _SECOND or bool(variants)
    return _Style(colour, "--" if second else "-", "s" if second else "^")


# ---- sheets ----


@dataclass(frozen=True)
class _Page:
    """A figure on which places are given in inches from the left and top edges."""

    figure: Figure
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        axes = self.figure.add_axes(
            (left / _WIDTH, 1 - (top + height) / self.height, width / _WIDTH, height / self.height)
        )
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=_SMALL, length=2.5, color=_PALE)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(_PALE)
        return axes

    def text(self, left: float, top: float, text: str, size: float = _SMALL, **style: Any) -> None:
        # names of devices may hold dollar signs
        style = {"ha": "left", "va": "top", "parse_math": False, "color": _BLACK, **style}
        self.figure.text(left / _WIDTH, 1 - top / self.height, text, fontsize=size, **style)


@dataclass(frozen=True)
class Sheet:
    """A picture to be drawn: a title, what was measured where, `height` inches that `draw` fills from `top` on, and
    a note below."""

    title: str
    run: Run
    note: str
    height: float
    draw: Callable[[_Page, float], None]

    def figure(self) -> Figure:
        require_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # DejaVu at 7.5 points takes about 0.06 inches a letter
        machine = textwrap.wrap(machine_line(self.run), 152)
        note = textwrap.wrap(self.note, 152)
        top = 0.55 + _LINE * len(machine)
        height = top + self.height + 0.1 + _LINE * len(note) + 0.1
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        page = _Page(figure, height)
        page.text(_EDGE, 0.16, self.title, _TITLE, weight="bold")
        page.text(_EDGE, 0.44, "\n".join(machine), color=_GREY, linespacing=1.35)
        self.draw(page, top)
        page.text(_EDGE, top + self.height + 0.1, "\n".join(note), color=_GREY, linespacing=1.35)
        return figure

    def png(self) -> bytes:
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=_DPI, pil_kwargs={"optimize": True})
        return file.getvalue()


def sheets(results: Results) -> dict[str, Sheet]:
    """The pictures that there are results for, by file name. Gradients are in none of them."""
    results = Results(results.run, [row for row in results.rows if not row.op.endswith("_backward")])
    made = (_time_sheet(results), _roofline_sheet(results), _ratios_sheet(results), _memory_sheet(results))
    return {name: sheet for name, sheet in zip(_NAMES, made, strict=True) if sheet is not None}


def check_plots(folder: Path, force: bool) -> None:
    """Raises what `save_plots` would, if any of its pictures is there: for before there are results."""
    require_matplotlib()
    for name in _NAMES if folder.exists() else ():
        check_picture(folder / name, force)


def save_plots(results: Results, folder: Path, force: bool) -> list[Path]:
    """Draws time.png, roofline.png, ratios.png and memory.png into a folder, which is made if needed.

    Returns what was written: a picture that there are no results for is left out.

    Raises:
        FileExistsError: one of them is there already, and not `force`; then none is written.
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    found = {folder / name: sheet for name, sheet in sheets(results).items()}
    if found:
        folder.mkdir(parents=True, exist_ok=True)
    for path in found:
        check_picture(path, force)
    pictures = {path: sheet.png() for path, sheet in found.items()}
    for path, png in pictures.items():
        with atomic_write(path, force=force) as file:
            file.write(png)
    return list(pictures)


_PROBE_WORDS = {"copy": "torch's copy", "ceiling": "the ceiling probe"}

# ---- time against frames ----


def _time_sheet(results: Results) -> Sheet | None:
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        for group in row.groups:
            if group.startswith("T-") and row.check == "ok" and row.p50_us:
                groups.setdefault(group, []).append(row)
    groups = {name: rows for name, rows in groups.items() if len({row.frames for row in rows}) > 1}
    if not groups:
        return None
    counts = [len({row.provider for row in rows}) for rows in groups.values()]
    heights = [max(3.0, 1.2 * _LINE * count + 0.7) for count in counts]

    def draw(page: _Page, top: float) -> None:
        for rows, height in zip(groups.values(), heights, strict=True):
            _time_panel(page, top + _HEAD, height, rows)
            top += _HEAD + height + _FOOT

    rates = {name for rows in groups.values() for name in _bounds(rows)}
    words = " and of ".join(_PROBE_WORDS[name] for name in _PROBE_WORDS if name in rates)
    note = (
        "Medians; bands from p20 to p80. Lower bound: the fewest bytes that grid_pool must move, at the rate of "
        f"{words} on the same workload."
    )
    total = sum(_HEAD + height + _FOOT for height in heights)
    return Sheet("Time of a call against frames", results.run, note, total, draw)


def _time_panel(page: _Page, top: float, height: float, rows: Sequence[Row]) -> None:
    axes = page.axes(_EDGE + 0.6, top, _WIDTH - 2 * _EDGE - 0.6 - _LABEL - 0.25, height)
    first = rows[0]
    tokens = f"{' × '.join(map(str, first.shape[-3:-1]))} tokens of {first.shape[-1]} channels"
    page.text(_EDGE, top - _HEAD, f"frames of {tokens}, {first.dtype.removeprefix('torch.')}", _NORMAL, weight="bold")
    _log_axis(axes, "x", [float(row.frames) for row in rows], ticks=sorted({row.frames for row in rows}))
    ends: list[_Label] = []
    times: list[float] = []
    for provider in dict.fromkeys(row.provider for row in rows if row.provider not in PROBES):
        found = sorted((row for row in rows if row.provider == provider), key=lambda row: row.frames)
        frames = [row.frames for row in found]
        p50 = [_ms(row.p50_us) for row in found]
        style, ours = _style(provider), is_ours(provider)
        axes.plot(
            frames, p50, style.line, color=style.colour, marker=style.marker, markersize=4.5 if ours else 3.5,
            linewidth=2.0 if ours else 1.1, markerfacecolor=style.colour if ours else "white", zorder=4 if ours else 3,
        )  # fmt: skip
        low = [_ms(row.p20_us or row.p50_us) for row in found]
        high = [_ms(row.p80_us or row.p50_us) for row in found]
        axes.fill_between(frames, low, high, color=style.colour, alpha=0.25, linewidth=0, zorder=2)
        ends.append(_Label(frames[-1], p50[-1], title_of(provider), style.colour, ours))
        times += low + high
    for name, points in _bounds(rows).items():
        style = _style(name)
        line, width = ("-.", 1.3) if name == "copy" else (":", 1.6)
        axes.plot(
            [frame for frame, _ in points], [time for _, time in points], line, color=style.colour, linewidth=width,
            zorder=5,
        )  # fmt: skip
        ends.append(_Label(*points[-1], f"lower bound at {name}'s rate", style.colour, False))
        times += [time for _, time in points]
    _log_axis(axes, "y", times)
    axes.set_ylabel("ms", fontsize=_SMALL)
    axes.set_xlabel("frames", fontsize=_SMALL)
    axes.grid(True, which="major", color=_GRID, linewidth=0.7)
    _label_beside(axes, ends)


def _bounds(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """By probe, (frames, ms) of grid_pool's fewest bytes, or norm_pool's where there is no grid_pool, at its rate."""
    found: dict[str, list[tuple[float, float]]] = {}
    for probe in ("copy", "ceiling"):
        for frames in sorted({row.frames for row in rows}):
            here = [row for row in rows if row.frames == frames]
            bytes_moved = {row.op: row.read_bytes + row.write_bytes for row in here if row.op}
            rate = next((row.gb_per_s for row in here if row.provider == probe), None)
            if rate and bytes_moved:
                fewest = bytes_moved.get("grid_pool") or next(iter(bytes_moved.values()))
                found.setdefault(probe, []).append((frames, fewest / rate / 1e6))
    return found


# ---- roofline ----


def _roofline_sheet(results: Results) -> Sheet | None:
    panels: dict[float, tuple[list[Row], list[Row]]] = {}  # by bytes of a value: the first, and one of another width
    for rows in main_workloads(results).values():
        points = [row for row in rows if row.check == "ok" and row.p50_us and row.flops and row.read_bytes]
        if points and _rates(rows):
            panels.setdefault(rows[0].input_bytes / math.prod(rows[0].shape), (rows, points))
    if not panels:
        return None
    shown = list(panels.values())[:2]
    heights = [max(3.0, 1.2 * _LINE * len(points) + 1.0) for _, points in shown]

    def draw(page: _Page, top: float) -> None:
        for (rows, points), height in zip(shown, heights, strict=True):
            _roofline_panel(page, top + _HEAD, height, rows, points, results.run)
            top += _HEAD + height + _FOOT

    note = (
        "Counted alike for every contender: useful FLOP, the additions and multiplications that its formula takes, "
        "over the fewest bytes that the op must move. What it computes or moves beyond that lowers its point. "
        "Percentages: its bytes per second as a share of what the probe reached in between the same samples. "
        "Filled shapes and bold names: this package's kernels."
    )
    total = sum(_HEAD + height + _FOOT for height in heights)
    return Sheet("Distance from the roofs", results.run, note, total, draw)


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    """GB/s of the probes on a workload."""
    return {
        row.provider: row.gb_per_s
        for row in rows
        if row.provider in ("copy", "ceiling") and row.check == "ok" and row.gb_per_s
    }


def _roofline_panel(
    page: _Page, top: float, height: float, rows: Sequence[Row], points: Sequence[Row], run: Run
) -> None:
    left = _EDGE + 0.6
    axes = page.axes(left, top, _WIDTH - left - _EDGE - _LABEL - 0.6, height)
    page.text(_EDGE, top - _HEAD, workload_title(rows[0]), _NORMAL, weight="bold")
    rates, peak = _rates(rows), run.peaks.get("fp32_gflops")
    found = [(row, (row.flops or math.nan) / (row.read_bytes + row.write_bytes), _gflops(row)) for row in points]
    intensities = [intensity for _, intensity, _ in found]
    ridge = peak / min(rates.values()) if peak else 0.0
    low, high = min(intensities) / 6, max(*intensities, ridge) * 5
    heights = [reached for *_, reached in found]
    highest = min(high * max(rates.values()), peak or math.inf)
    _log_axis(axes, "x", [low, high])
    _log_axis(axes, "y", [*heights, highest * 1.5])
    for name, rate in rates.items():
        style = _style(name)
        end = min(high, peak / rate) if peak else high
        axes.plot([low, end], [low * rate, end * rate], color=style.colour, linewidth=1.4, zorder=2)
        # above the highest roof, below the other
        above = rate == max(rates.values())
        (x0, y0), (x1, y1) = axes.transData.transform([(low, low * rate), (end, end * rate)])
        axes.annotate(
            f"{_PROBE_WORDS[name]}: {show_number(rate)} GB/s", (low * 1.06, low * 1.06 * rate),
            (-2, 3) if above else (2, -3), textcoords="offset points",
            rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), rotation_mode="anchor", ha="left",
            va="bottom" if above else "top", fontsize=_SMALL, color=style.colour,
        )  # fmt: skip
    if peak:
        axes.plot([peak / max(rates.values()), high], [peak, peak], color=_BLACK, linewidth=1.4, zorder=2)
        axes.annotate(
            f"fp32: {show_number(peak)} GFLOP/s", (high, peak), (0, 3), textcoords="offset points", ha="right",
            va="bottom", fontsize=_SMALL, color=_BLACK,
        )  # fmt: skip
    probe = "ceiling" if any(row.percent_of_ceiling for row in points) else "copy"
    axes.annotate(
        f"% of {_PROBE_WORDS[probe]}", (1.05, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
        fontsize=_SMALL, va="bottom", color=_GREY,
    )  # fmt: skip
    labels = []
    for row, intensity, reached in found:
        style, ours = _style(row.provider), is_ours(row.provider)
        axes.plot(
            intensity, reached, style.marker, color=style.colour, markersize=6.5 if ours else 5,
            markerfacecolor=style.colour if ours else "white", markeredgewidth=1.2, zorder=5 if ours else 4,
        )  # fmt: skip
        share = row.percent_of_ceiling if probe == "ceiling" else row.percent_of_copy
        text = title_of(row.provider) + (f"  {show_percent(share)} %" if share else "")
        labels.append(_Label(intensity, reached, text, style.colour, ours))
    axes.set_xlabel("useful FLOP per byte that must be moved", fontsize=_SMALL)
    axes.set_ylabel("useful GFLOP/s", fontsize=_SMALL)
    axes.grid(True, which="major", color=_GRID, linewidth=0.7)
    _label_beside(axes, labels)


def _gflops(row: Row) -> float:
    return (row.flops or math.nan) / (row.p50_us or math.nan) / 1e3


# ---- times relative to ours ----

_BAR = 0.165  # height of a bar's row
_COLUMNS = 4


def _ratios_sheet(results: Results) -> Sheet | None:
    panels = []
    for rows in main_workloads(results).values():
        times = {
            row.provider: row.p50_us for row in rows if row.check == "ok" and row.p50_us and row.provider != "read"
        }
        ours = {provider: time for provider, time in times.items() if is_ours(provider)}
        if ours and len(times) > 1:
            panels.append((rows, times, min(ours, key=ours.__getitem__)))
    if not panels:
        return None
    ratios: dict[str, list[float]] = {}
    for _, times, fastest in panels:
        for provider, time in times.items():
            ratios.setdefault(provider, []).append(time / times[fastest])
    providers = sorted(ratios, key=lambda provider: statistics.median(ratios[provider]))
    everything = [ratio for found in ratios.values() for ratio in found]
    columns = min(_COLUMNS, len(panels))
    head = 0.33 + 0.13 * max(len(_shape_lines(rows[0])) for rows, _, _ in panels)
    height, foot = _BAR * len(providers), 0.36

    def draw(page: _Page, top: float) -> None:
        slot = (_WIDTH - _EDGE - _LABEL - 0.1) / max(columns, 2)
        for place, (rows, times, fastest) in enumerate(panels):
            row, column = divmod(place, columns)
            y = top + head + row * (head + height + foot)
            x = _LABEL + 0.1 + column * slot
            if column == 0:
                _provider_names(page, y, _BAR, providers)
            lines = [*_shape_lines(rows[0]), f"1 × = {title_of(fastest)}, {show_time(times[fastest])}"]
            page.text(x, y - head + 0.02, rows[0].workload, _SMALL + 0.5, weight="bold")
            page.text(x, y - head + 0.18, "\n".join(lines), _TINY, color=_GREY, linespacing=1.3)
            axes = page.axes(x, y, slot - 0.12, height)
            _ratio_panel(axes, rows, times, times[fastest], providers, (min(everything), max(everything)))

    note = (
        "Times relative to the fastest of this package's kernels on the workload (1 ×), on a logarithmic scale: longer "
        "to the right is slower. grid_pool does more than norm_pool and the plain poolings: it also makes the "
        "summaries. Grey: only moves as many bytes as grid_pool must, and pools nothing."
    )
    if any(row.note for rows, times, _ in panels for row in rows if row.provider in times):
        note += " *: not quite the same task or with another note, which the tables give."
    total = -(-len(panels) // columns) * (head + height + foot)
    return Sheet("Time relative to the fastest of ours", results.run, note, total, draw)


def _ratio_panel(
    axes: Axes,
    rows: Sequence[Row],
    times: dict[str, float],
    unit: float,
    providers: Sequence[str],
    span: tuple[float, float],
) -> None:
    low, highest = min(span[0] / 1.1, 0.8), max(span[1], 2.0)
    high = highest * (highest / low) ** 0.38  # room for the number at the longest bar
    axes.set_xscale("log")
    axes.set(xlim=(low, high), ylim=(len(providers) - 0.5, -0.5), yticks=[])
    axes.spines["left"].set_visible(False)
    _plain_ticks(axes.xaxis, [tick for tick in (0.01, 0.1, 1, 10, 100, 1e3, 1e4) if low <= tick <= highest])
    axes.grid(True, axis="x", color=_GRID, linewidth=0.7)
    reasons = {row.provider: row.check.partition(":")[0] for row in rows if row.check != "ok"}
    noted = {row.provider for row in rows if row.note}
    for place, provider in enumerate(providers):
        ours = is_ours(provider)
        if ours:
            axes.axhspan(place - 0.5, place + 0.5, color=_OURS_BAND, linewidth=0, zorder=0)
        time = times.get(provider)
        if time is None:
            axes.text(1.08, place, reasons.get(provider, ""), fontsize=_TINY, color=_GREY, va="center_baseline")
            continue
        ratio = time / unit
        colour = _style(provider).colour
        axes.barh(place, ratio - 1, left=1, height=0.66, color=colour, zorder=3)
        axes.text(
            max(ratio, 1) * (high / low) ** 0.02, place, f"{show_ratio(ratio)} ×{' *' if provider in noted else ''}",
            fontsize=_TINY, va="center_baseline", color=_BLACK, weight="bold" if ours else "normal", zorder=4,
        )  # fmt: skip
    axes.axvline(1, color=_BLACK, linewidth=0.9, zorder=4)


def _shape_lines(row: Row) -> list[str]:
    return textwrap.wrap(workload_title(row, name=False).replace(" × ", "×"), 30, max_lines=3, placeholder=" …")


def _provider_names(page: _Page, top: float, step: float, providers: Sequence[str]) -> None:
    """A column of names, each with its mark, that ends where the panels begin."""
    axes = page.axes(_LABEL - 0.12, top, 0.14, step * len(providers))
    axes.set(xlim=(-1, 1), ylim=(len(providers) - 0.5, -0.5))
    axes.axis("off")
    for place, provider in enumerate(providers):
        style, ours = _style(provider), is_ours(provider)
        axes.plot(
            0, place, style.marker, color=style.colour, markersize=5 if ours else 4.2,
            markerfacecolor=style.colour if ours else "white", clip_on=False,
        )  # fmt: skip
        page.text(
            _LABEL - 0.17, top + (place + 0.5) * step, title_of(provider), ha="right", va="center",
            weight="bold" if ours else "normal",
        )  # fmt: skip


# ---- memory ----

_CELL = 0.24


def _memory_sheet(results: Results) -> Sheet | None:
    workloads = main_workloads(results)
    found = {
        (row.provider, name): 100 * row.extra_peak_bytes / row.input_bytes
        for name, rows in workloads.items()
        for row in rows
        if row.check == "ok" and row.extra_peak_bytes is not None and row.input_bytes and row.provider not in PROBES
    }
    if not found:
        return None
    names = [name for name in workloads if any(workload == name for _, workload in found)]
    shares: dict[str, list[float]] = {}
    for (provider, _), share in found.items():
        shares.setdefault(provider, []).append(share)
    providers = sorted(shares, key=lambda provider: (statistics.median(shares[provider]), not is_ours(provider)))
    head, overhang, height = 0.85, 0.9, _CELL * len(providers)

    def draw(page: _Page, top: float) -> None:
        top += head
        _provider_names(page, top, _CELL, providers)
        width = min(_WIDTH - _EDGE - _LABEL - 0.1 - overhang, 0.7 * len(names))
        axes = page.axes(_LABEL + 0.1, top, width, height)
        _memory_cells(axes, found, providers, names)
        for place, name in enumerate(names):
            page.text(
                _LABEL + 0.1 + (place + 0.5) * width / len(names) - 0.06, top - 0.06, name, ha="left", va="bottom",
                rotation=38, rotation_mode="anchor",
            )  # fmt: skip

    note = (
        "Memory in use at most during a call beyond the input and the result, as a percentage of the input's bytes. "
        "Blank: not measured."
    )
    return Sheet("Extra memory, % of the input", results.run, note, head + height, draw)


def _memory_cells(
    axes: Axes, found: dict[tuple[str, str], float], providers: Sequence[str], names: Sequence[str]
) -> None:
    import matplotlib

    colour_map = matplotlib.colormaps["Blues"]
    axes.set(xlim=(0, len(names)), ylim=(len(providers), 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (provider, name), share in found.items():
        x, y = names.index(name), providers.index(provider)
        # 0 % is the lightest, 1000 % the darkest, and a step of ten about as large everywhere above 10 %
        shade = min(math.log1p(share / 10) / math.log1p(100), 1.0)
        axes.fill_between([x + 0.02, x + 0.98], y + 0.03, y + 0.97, color=colour_map(0.06 + 0.84 * shade), linewidth=0)
        axes.text(
            x + 0.5, y + 0.5, show_percent(share), ha="center", va="center_baseline", fontsize=_SMALL,
            color="white" if shade > 0.66 else _BLACK,
        )  # fmt: skip


# ---- axes and labels ----


@dataclass(frozen=True)
class _Label:
    """A text beside a point."""

    x: float
    y: float
    text: str
    colour: str
    strong: bool


def _label_beside(axes: Axes, labels: Sequence[_Label]) -> None:
    """Texts to the right of the axes, each as near the height of its point as its neighbours allow, and joined to it.

    The limits of the axes must be set.
    """
    order = sorted(labels, key=lambda label: label.y)
    height = axes.get_window_extent().height / _DPI
    fractions = [float(axes.transAxes.inverted().transform(axes.transData.transform((label.x, label.y)))[1])
                 for label in order]  # fmt: skip
    for label, fraction in zip(order, _spread(fractions, 1.15 * _LINE / height), strict=True):
        axes.annotate(
            label.text, (label.x, label.y), (1.05, fraction), xycoords="data", textcoords="axes fraction",
            fontsize=_SMALL, va="center", ha="left", color=_BLACK, weight="bold" if label.strong else "normal",
            annotation_clip=False, parse_math=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "alpha": 0.7, "shrinkB": 3,
                        "shrinkA": 1, "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Rising places at least `gap` apart within low … high, with the least sum of squared distances from `wanted`.

    Less what the gaps below take, places may coincide: what is left is an isotonic regression, by pooling of
    neighbours that are out of order. Where there is no room for the gaps they shrink.
    """
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    pools: list[tuple[float, int]] = []
    for place, value in enumerate(wanted):
        total, count = value - place * gap, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    level = [total / count for total, count in pools for _ in range(count)]
    top = high - (len(wanted) - 1) * gap
    return [min(max(value, low), top) + place * gap for place, value in enumerate(level)]


def _log_axis(axes: Axes, side: str, values: Sequence[float], ticks: Sequence[float] = ()) -> None:
    """A logarithmic axis around `values` with plain numbers: at `ticks`, or at powers of ten and 3 times these."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.04, 1.05)
    low, high = low / room, high * room
    axes.set(**{f"{side}scale": "log", f"{side}lim": (low, high)})
    if not ticks:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 3) if len(decades) <= 5 else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    _plain_ticks(getattr(axes, f"{side}axis"), [tick for tick in ticks if low <= tick <= high])


def _plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


# ---- words ----


def _ms(us: float | None) -> float:
    return (us or math.nan) / 1e3
