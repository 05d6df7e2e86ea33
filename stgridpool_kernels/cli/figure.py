"""The figure of an `Inspection`: a page laid out in inches, one function per panel.

It draws what was measured, from the plan's own tables. matplotlib and Pillow, which comes with it, are imported on
first use, and no global state of theirs is touched.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..functional import temporal_grid
from ..io.token_files import atomic_write, refuse_existing
from ..plan import GridPlan
from .inspection import (
    WEIGHT_BINS,
    Inspection,
    Summary,
    choose_frames,
    counted_windows,
    gridding_options,
    list_summaries,
    plural,
    quantile,
    show_number,
    show_shape,
    show_weight,
    window_weights,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from PIL.Image import Image

__all__ = ["check_picture", "draw", "save_figure"]

_DPI = 100
_LARGE_PNG = 300_000  # bytes
_WIDTH = 15.0
_EDGE = 0.35
_SHOWN_FRAMES = 8
_DIAGRAM_FRAMES = 64
_MOSAIC_LEVELS = 4
_MOSAIC_SOURCES = 6
_THUMBNAIL_WIDTH = 168

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY = "#CC79A7", "#56B4E9"
_LEVEL_COLOURS = (_SKY, _ORANGE, _GREEN, _PURPLE, _BLUE, _VERMILLION)
_UNTOUCHED, _GREY, _MISSING = "#E8E8E8", "#666666", "#BBBBBB"

_SMALL, _NORMAL, _HEADING, _TITLE = 8.5, 9.5, 11.0, 14.0

_CAPTION = (
    "A high norm is not the same as an important token: compare the heat maps with the frames. "
    "Norms differ between encoders, so a temperature that suits one does not carry over to another."
)


@dataclass(frozen=True)
class _Page:
    """A figure on which places are given in inches from the left and top edges."""

    figure: Figure
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / _WIDTH, 1 - (top + height) / self.height, width / _WIDTH, height / self.height)
        )

    def text(self, left: float, top: float, text: str, size: float = _NORMAL, **style: Any) -> None:
        style = {"ha": "left", "va": "top", "parse_math": False, **style}  # names may hold dollar signs
        self.figure.text(left / _WIDTH, 1 - top / self.height, text, fontsize=size, **style)

    def heading(self, left: float, top: float, letter: str, text: str, note: str = "") -> None:
        self.text(left, top, letter, _HEADING, weight="bold")
        self.text(left + 0.22, top, text, _HEADING, weight="bold")
        if note:
            self.text(left + 0.22, top + 0.22, note, _SMALL, color=_GREY)


@dataclass(frozen=True)
class _Panel:
    """A part of the page: its height in inches and a function that draws it with its left and top edges there."""

    height: float
    draw: Callable[[_Page, float, float], None]


@dataclass(frozen=True)
class _Material:
    """What the panels share: the inspection, thumbnails (stages, T, h, w, 3) in [0, 1] or None, and the norms' range.

    Stage k of the thumbnails is the RGB frames as k levels of temporal gridding leave them.
    """

    inspection: Inspection
    thumbnails: np.ndarray | None
    low: float
    high: float
    aspect: float  # height over width of a picture

    def picture(self, page_axes: Axes, frame: int, stage: int) -> AxesImage | None:
        """Draws a frame as it is after `stage` levels: its thumbnail, or else its norms, which are returned."""
        if self.thumbnails is None:
            return self.heat(page_axes, self.inspection.stage_norms[stage, frame])
        _bare(page_axes)
        page_axes.imshow(self.thumbnails[stage, frame], aspect="auto")
        return None

    def heat(self, axes: Axes, norms: np.ndarray) -> AxesImage:
        _bare(axes)
        return axes.imshow(
            norms, cmap=_colour_map("viridis"), vmin=self.low, vmax=self.high, aspect="auto", interpolation="nearest"
        )

    def colour_bar(self, page: _Page, image: AxesImage, left: float, top: float, height: float) -> None:
        norms = self.inspection.stage_norms
        finite = norms[np.isfinite(norms)]
        below, above = finite.min(initial=self.low) < self.low, finite.max(initial=self.high) > self.high
        extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
        bar = page.figure.colorbar(
            image, cax=page.axes(left, top, 0.13, height), extend=extend[bool(below), bool(above)]
        )
        _tidy_bar(bar, self.inspection.norm_name)


def draw(inspection: Inspection, frames: np.ndarray | None = None, *, name: str = "", credit: str = "") -> Figure:
    """The figure of an inspection, 1500 pixels wide at its own dpi.

    frames: uint8 (T, h, w, 3) RGB, the frames behind the tokens, at any size; without them norms stand in.
    name: what the title calls the input. credit: whose pictures these are, written at the bottom.

    Raises ImportError if matplotlib is missing, ValueError if frames do not go with the tokens.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    material = _material(inspection, frames)
    panels = [
        _title(material, name),
        _frames_panel(material),
        _side_by_side(_weights_panel(material), _mosaic_panel(material), _WIDTH / 2 + 0.1),
        _diagram_panel(inspection),
        _histograms(material),
        _advice_panel(inspection, credit),
    ]
    height = sum(panel.height for panel in panels)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    page = _Page(figure, height)
    top = 0.0
    for panel in panels:
        panel.draw(page, _EDGE, top)
        top += panel.height
    return figure


def _material(inspection: Inspection, frames: np.ndarray | None) -> _Material:
    T, H, W, _ = inspection.shape
    aspect = H / W
    thumbnails = None
    if frames is not None:
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames must be uint8 (T, h, w, 3), got {frames.dtype} {frames.shape}")
        if len(frames) != T:
            raise ValueError(f"there must be one frame for each of the {T} token frames, got {len(frames)}")
        aspect = frames.shape[1] / frames.shape[2]
        thumbnails = _gridded_thumbnails(frames, inspection.plan)
    norms = inspection.stage_norms[np.isfinite(inspection.stage_norms)]
    # a few outlying tokens, which may be 50 times the others, must not take the whole colour scale
    low, lower, upper, high = (quantile(norms, q) for q in (0.002, 0.25, 0.75, 0.998))
    if high > 3 * upper > 3 * lower:
        high = min(high, upper + 3 * (upper - lower))
    if not high > low:
        low, high = (low - 0.5, low + 0.5) if math.isfinite(low) else (0.0, 1.0)
    return _Material(inspection, thumbnails, low, high, min(max(aspect, 0.3), 2.0))


def _gridded_thumbnails(frames: np.ndarray, plan: GridPlan) -> np.ndarray:
    """uint8 (levels + 1, T, h, w, 3): small frames, and what each level of temporal gridding makes of them."""
    from PIL import Image

    rows, cols = math.lcm(*(level.rows for level in plan.levels)), math.lcm(*(level.cols for level in plan.levels))
    width = _THUMBNAIL_WIDTH
    height = min(max(round(width * frames.shape[1] / frames.shape[2]), 24), 2 * width)
    # sizes that the grids divide, so that no tile is cropped in the picture
    size = (_round_up(width, cols), _round_up(height, rows))
    small = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])
    stages = [small]
    pixels = torch.from_numpy(small).float()
    for level in range(1, len(plan.levels) + 1):
        if plan.levels[level - 1].targets:
            gridded = temporal_grid(pixels, **gridding_options(plan, level))
            stages.append(gridded.round().clamp(0, 255).byte().numpy())
        else:
            stages.append(stages[-1])
    return np.stack(stages)


def _round_up(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor if divisor <= size else size


# ---- panels ----


def _title(material: _Material, name: str) -> _Panel:
    inspection, plan = material.inspection, material.inspection.plan
    shapes = f"{show_shape(inspection.shape)} {inspection.dtype} → {show_shape(inspection.pooled_shape)}"
    overwritten = f"{len(inspection.overwritten)} of {inspection.shape[0]} frames overwritten"
    title = "ST-GridPool"
    if name:
        title += f" on {name if len(name) <= 32 else f'{name[:15]}…{name[-16:]}'}"
    windows = (
        f"output_size {_times(plan.output_size)}"
        if plan.output_size is not None
        else f"kernel_size {_times(plan.kernel_size)}"
        + (f", stride {_times(plan.stride)}" if plan.stride is not None else "")
        + (f", padding {_times(plan.padding)}" if any(plan.padding) else "")
        + (", ceil_mode" if plan.ceil_mode else "")
        + ("" if plan.count_include_pad else ", padding not counted")
    )
    settings = (
        f"frame_strides {list(plan.frame_strides)}, grid_shape {list(plan.grid_shape)}, sampling {plan.sampling}, "
        f"resize {plan.resize}  ·  {windows}  ·  temperature {inspection.temperature:g}, norm: {inspection.norm_name}"
    )

    def draw(page: _Page, left: float, top: float) -> None:
        page.text(left, top + 0.25, title, _TITLE, weight="bold")
        page.text(_WIDTH - _EDGE, top + 0.25, f"{shapes}  ·  {overwritten}", _TITLE, ha="right")
        page.text(left, top + 0.6, settings, _NORMAL, color=_GREY)

    return _Panel(0.95, draw)


def _frames_panel(material: _Material) -> _Panel:
    """Frames, and below each the norms of its tokens as they come."""
    inspection = material.inspection
    shown = choose_frames(inspection.shape[0], _SHOWN_FRAMES, inspection.overwritten)
    slot = (_WIDTH - 2 * _EDGE - 0.75) / _SHOWN_FRAMES
    width, height = _fit(slot - 0.08, 1.75, material.aspect)
    rows = 1 if material.thumbnails is None else 2
    first = 0.75  # heading, note, frame numbers
    note = f"{inspection.norm_name} of each token, on one colour scale; {len(shown)} of {inspection.shape[0]} frames"
    if inspection.nonfinite:
        note += "; grey is NaN or infinite"

    def draw(page: _Page, left: float, top: float) -> None:
        page.heading(left, top, "a", "Token norms of the input", note)
        image = None
        for place, frame in enumerate(shown):
            x = left + place * slot
            overwritten = frame in inspection.overwritten
            label = f"frame {frame}" + (", overwritten" if overwritten else "")
            colour = _VERMILLION if overwritten else "black"
            page.text(x + width / 2, top + first - 0.05, label, _SMALL, ha="center", va="bottom", color=colour)
            for row in range(rows):
                axes = page.axes(x, top + first + row * (height + 0.06), width, height)
                if row < rows - 1:
                    material.picture(axes, frame, 0)
                else:
                    image = material.heat(axes, inspection.norms[frame])
                if overwritten:
                    _frame(axes, _VERMILLION)
        assert image is not None
        bar = top + first + (rows - 1) * (height + 0.06)
        material.colour_bar(page, image, left + len(shown) * slot + 0.02, bar, height)

    return _Panel(first + rows * (height + 0.06) + 0.3, draw)


def _weights_panel(material: _Material) -> _Panel:
    """For an untouched and an overwritten frame: picture, norms, and weights at one or two temperatures."""
    inspection, plan = material.inspection, material.inspection.plan
    last = len(plan.levels)
    frames = _two_frames(inspection)
    norms = [inspection.gridded_norms[frame] for frame in frames]
    temperatures = {f"temperature {inspection.temperature:g}": inspection.temperature}
    if inspection.target_temperature is not None:
        temperatures.setdefault(f"temperature {inspection.target_temperature:.2g}", inspection.target_temperature)
    weights = {
        label: [window_weights(frame_norms, plan, temperature) for frame_norms in norms]
        for label, temperature in temperatures.items()
    }
    columns = ([] if material.thumbnails is None else ["picture"]) + ["norms", *weights]
    slot = 6.2 / 4
    width, height = _fit(slot - 0.1, 1.5, material.aspect)
    first = 0.85
    note = "weight of each token over the uniform weight of its window; white is average pooling"
    if np.isnan(list(weights.values())).any():
        note += ", grey has no weight"

    def draw(page: _Page, left: float, top: float) -> None:
        page.heading(left, top, "b", "From norms to weights, after temporal gridding", note)
        image = None
        for column, content in enumerate(columns):
            x = left + 0.2 + column * slot
            page.text(x + width / 2, top + first - 0.24, content, _SMALL, ha="center", va="bottom")
            for row, frame in enumerate(frames):
                axes = page.axes(x, top + first + row * (height + 0.25), width, height)
                if content == "picture":
                    material.picture(axes, frame, last)
                elif content == "norms":
                    material.heat(axes, norms[row])
                else:
                    image = _weight_map(axes, weights[content][row])
                overwritten = frame in inspection.overwritten
                if overwritten:
                    _frame(axes, _VERMILLION)
                if column == 0:
                    label = f"frame {frame}" + (", a summary now" if overwritten else "")
                    colour = _VERMILLION if overwritten else "black"
                    y = top + first + row * (height + 0.25) - 0.04
                    page.text(x, y, label, _SMALL, va="bottom", color=colour)
        assert image is not None
        x = left + 0.2 + len(columns) * slot + 0.02
        bar = page.figure.colorbar(image, cax=page.axes(x, top + first, 0.13, height), extend="max", ticks=[0, 1, 2])
        _tidy_bar(bar, "weight / uniform")

    return _Panel(first + len(frames) * (height + 0.25) + 0.2, draw)


def _two_frames(inspection: Inspection) -> list[int]:
    """A frame near the middle that is left as it was, and one that is overwritten, as far as there are such frames."""
    middle = inspection.shape[0] // 2
    overwritten = set(inspection.overwritten)
    groups = [set(range(inspection.shape[0])) - overwritten, overwritten]
    return [min(group, key=lambda frame: (abs(frame - middle), frame)) for group in groups if group]


def _weight_map(axes: Axes, weights: np.ndarray) -> AxesImage:
    _bare(axes)
    # always 0 … 2, so that pictures at different temperatures and of different inputs compare
    return axes.imshow(weights, cmap=_colour_map("PuOr_r"), vmin=0, vmax=2, aspect="auto", interpolation="nearest")


def _mosaic_panel(material: _Material) -> _Panel:
    """One group of each level: its sources, as the levels before left them, and the summary."""
    inspection = material.inspection
    examples = _one_summary_per_level(inspection.plan)[:_MOSAIC_LEVELS]
    slots = max((min(len(example.sources), _MOSAIC_SOURCES) for example in examples), default=1) + 1
    slot = min(6.0 / slots, 1.6)
    width, height = _fit(slot - 0.08, 1.3, material.aspect)
    first, row_height = 0.8, height + 0.25

    def draw(page: _Page, left: float, top: float) -> None:
        note = "norms stand in for pictures" if material.thumbnails is None else "gridding applied to the pictures"
        if len(examples) == _MOSAIC_LEVELS:
            note += f"; {_MOSAIC_LEVELS} levels at most"
        page.heading(left, top, "c", "One summary of each level", note if examples else "")
        if not examples:
            page.text(left + 0.22, top + 0.5, _nothing_overwritten(inspection), _NORMAL)
        for row, example in enumerate(examples):
            y = top + first + row * row_height
            colour = _level_colour(example.level)
            page.text(left + 0.22, y + height / 2, f"level {example.level}", _SMALL, va="center", weight="bold")
            x = left + 0.85
            for frame in _abridged(example.sources):
                if frame is None:
                    page.text(x + width / 2, y + height / 2, "…", _HEADING, ha="center", va="center")
                else:
                    axes = page.axes(x, y, width, height)
                    material.picture(axes, frame, example.level - 1)
                    nested = frame in example.nested
                    if nested:
                        _frame(axes, _level_colour(_level_of(inspection.plan, frame, example.level)))
                    label = f"{frame}, a summary" if nested and width > 0.8 else f"{frame}"
                    page.text(x + width / 2, y - 0.04, label, _SMALL, ha="center", va="bottom")
                x += slot
            page.text(x + 0.07, y + height / 2, "→", _TITLE, ha="center", va="center")
            axes = page.axes(x + 0.22, y, width, height)
            material.picture(axes, example.target, example.level)
            _frame(axes, colour)
            label = f"new frame {example.target}" if width > 0.8 else f"new {example.target}"
            page.text(x + 0.22 + width / 2, y - 0.04, label, _SMALL, ha="center", va="bottom")

    return _Panel(first + len(examples) * row_height + 0.2, draw)


def _one_summary_per_level(plan: GridPlan) -> list[Summary]:
    """The first summary of every level that has one."""
    first: dict[int, Summary] = {}
    for summary in list_summaries(plan):
        first.setdefault(summary.level, summary)
    return list(first.values())


def _abridged(sources: tuple[int, ...]) -> list[int | None]:
    """Sources in at most `_MOSAIC_SOURCES` places; None stands for those left out."""
    if len(sources) <= _MOSAIC_SOURCES:
        return list(sources)
    return [*sources[: _MOSAIC_SOURCES - 2], None, sources[-1]]


def _level_of(plan: GridPlan, frame: int, level: int) -> int:
    """The last level before `level` that wrote this frame."""
    return max(number for number in range(1, level) if frame in plan.levels[number - 1].targets)


def _diagram_panel(inspection: Inspection) -> _Panel:
    """Temporal gridding as a diagram: a row of frames before the first level and after each, sources to targets."""
    plan = inspection.plan
    total = inspection.shape[0]
    frames = min(total, _DIAGRAM_FRAMES)
    levels = plan.levels
    lane, first, label = 0.62, 0.5, 2.0
    height = lane * (len(levels) + 1)

    def draw(page: _Page, left: float, top: float) -> None:
        note = f", the first {frames} of {total} frames" if frames < total else ""
        page.heading(left, top, "d", f"Temporal gridding{note}")
        axes = page.axes(left + label, top + first, _WIDTH - 2 * _EDGE - label, height)
        axes.set(xlim=(-0.6, max(frames, 16) - 0.4), ylim=(len(levels) + 0.5, -0.5))
        axes.axis("off")
        _draw_lanes(axes, plan, frames)
        for row in range(len(levels) + 1):
            y = top + first + (row + 0.5) * lane
            page.text(left + 0.22, y, _lane_label(plan, row), _SMALL, va="center", linespacing=1.3)
        if any(level.targets for level in levels):
            axes.legend(
                handles=_diagram_legend(), loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False,
                fontsize=_SMALL, borderaxespad=0.4, handlelength=1.6, columnspacing=1.6,
            )  # fmt: skip

    return _Panel(first + height + 0.25, draw)


def _lane_label(plan: GridPlan, row: int) -> str:
    if row == 0:
        return "input frames" if plan.levels else "input frames, all kept"
    level = plan.levels[row - 1]
    count = len(level.targets)
    groups = plural(count, "group") if count else "no whole group"
    return f"after level {row}: {groups}\nstride {level.frame_stride}, grid {level.rows} × {level.cols}"


def _draw_lanes(axes: Axes, plan: GridPlan, frames: int) -> None:
    from matplotlib.patches import Rectangle

    half = 0.17  # of a cell's height, where lanes are 1 apart
    summaries = list_summaries(plan, frames)
    written: dict[int, int] = {}
    for row in range(len(plan.levels) + 1):
        new = {summary.target: summary for summary in summaries if summary.level == row}
        for summary in new.values():
            for source in summary.sources:
                nested = source in summary.nested
                axes.plot(
                    (source, summary.target), (row - 1 + half, row - half), color=_level_colour(row),
                    linewidth=2.4 if nested else 1.0, solid_capstyle="butt", zorder=2.5 if nested else 1,
                    marker="o" if nested else None, markersize=4, markevery=[0],
                )  # fmt: skip
        written.update(dict.fromkeys(new, row))
        for frame in range(frames):
            colour = _level_colour(written[frame]) if frame in written else _UNTOUCHED
            edge = "black" if frame in new else "none"
            axes.add_patch(
                Rectangle((frame - 0.43, row - half), 0.86, 2 * half, facecolor=colour, edgecolor=edge, zorder=2)
            )
            if row == 0 or frame in new:
                ink = "white" if colour == _BLUE else "black"
                axes.text(frame, row, str(frame), fontsize=7.5, ha="center", va="center", color=ink, zorder=3)
        if row and not new and plan.levels[row - 1].targets:
            text = f"the first summary is frame {plan.levels[row - 1].targets[0]}, beyond this picture"
            axes.text(0, row + half, text, fontsize=_SMALL, color=_GREY, va="top")


def _diagram_legend() -> Sequence[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=_UNTOUCHED, label="frame as it came"),
        Patch(facecolor=_SKY, edgecolor="black", label="summary written here (colour: level)"),
        Line2D([], [], color=_GREY, linewidth=1.0, label="source → target"),
        Line2D([], [], color=_GREY, linewidth=2.4, marker="o", markersize=4, label="source that is a summary itself"),
    ]


def _histograms(material: _Material) -> _Panel:
    inspection = material.inspection
    top, p50, p95 = inspection.max_over_median, inspection.spread_p50, inspection.spread_p95
    notes = (
        f"largest is {show_number(top)} × the median" if math.isfinite(top) else "the median is zero or not finite",
        f"(largest − smallest) / mean: p50 {p50:.2g} (solid), p95 {p95:.2g} (dashed)",
        "by temperature: histogram, bar from p5 to p95, dot at p50",
    )
    panels = (
        ("e", "Token norms", _norm_histogram),
        ("f", "Spread of norms inside windows", _spread_histogram),
        ("g", "Largest weight of a window", _weight_ridges),
    )
    slot = (_WIDTH - 2 * _EDGE) / len(panels)

    def draw(page: _Page, left: float, top: float) -> None:
        for place, ((letter, text, panel), note) in enumerate(zip(panels, notes, strict=True)):
            x = left + place * slot
            page.heading(x, top, letter, text, note)
            axes = page.axes(x + 0.65, top + 0.55, slot - 0.95, 2.2)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.tick_params(labelsize=_SMALL)
            panel(axes, inspection)

    return _Panel(3.35, draw)


def _norm_histogram(axes: Axes, inspection: Inspection) -> None:
    stages = {"input": inspection.norms}
    if inspection.overwritten:
        stages["after temporal gridding"] = inspection.gridded_norms
    finite = {label: norms[np.isfinite(norms)].astype(np.float64) for label, norms in stages.items()}
    low, high, rest = _range(np.concatenate(list(finite.values())))
    for (label, norms), colour in zip(finite.items(), (_BLUE, _VERMILLION), strict=False):
        counts, edges = np.histogram(norms.clip(low, high), bins=60, range=(low, high))
        filled = colour == _BLUE
        axes.stairs(counts, edges, fill=filled, alpha=0.6 if filled else 1, color=colour, linewidth=1.2, label=label)
    axes.set_xlabel(inspection.norm_name + rest, fontsize=_NORMAL)
    axes.set_ylabel("tokens", fontsize=_NORMAL)
    if len(finite) > 1:
        axes.set_ylim(0, 1.18 * axes.get_ylim()[1])  # room for the legend above the bars
        axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=_SMALL, borderaxespad=0)


def _spread_histogram(axes: Axes, inspection: Inspection) -> None:
    _, high, rest = _range(inspection.spread)
    counts, edges = np.histogram(inspection.spread.clip(0, high), bins=60, range=(0, high))
    axes.stairs(counts, edges, fill=True, color=_BLUE, alpha=0.6)
    for value, style in ((inspection.spread_p50, "-"), (inspection.spread_p95, "--")):
        if math.isfinite(value):
            axes.axvline(value, color="black", linewidth=1, linestyle=style)
    axes.set_xlabel("relative spread" + rest, fontsize=_NORMAL)
    axes.set_ylabel("windows", fontsize=_NORMAL)
    axes.set_ylim(bottom=0)


def _weight_ridges(axes: Axes, inspection: Inspection) -> None:
    rows = list(inspection.largest_weights)
    for row, weights in enumerate(rows):
        peak = weights.counts.max(initial=0)
        if peak:
            axes.stairs(
                row - 0.75 * weights.counts / peak, WEIGHT_BINS, baseline=row, fill=True, color=_BLUE, alpha=0.6
            )
            axes.plot((weights.p5, weights.p95), (row + 0.1, row + 0.1), color="black", linewidth=1.5)
            axes.plot(weights.p50, row + 0.1, "o", color="black", markersize=4)
    uniform = 1 / inspection.window_size
    axes.axvline(uniform, color=_VERMILLION, linewidth=1.2, linestyle="--")
    # inside the axes on whichever side of the line has room
    side, shift = ("left", 4) if uniform < 0.6 else ("right", -4)
    axes.annotate(
        f"uniform {show_weight(uniform)}", (uniform, 1), (shift, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha=side, va="bottom", fontsize=_SMALL, color=_VERMILLION,
    )  # fmt: skip
    axes.set(xlim=(0, 1.01), ylim=(len(rows) - 0.65, -0.85), xticks=np.linspace(0, 1, 6))
    labels = [f"{weights.temperature:g}" for weights in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=_SMALL)
    for tick, weights in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if weights.temperature == inspection.temperature else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"largest weight ({counted_windows(inspection)})", fontsize=_NORMAL)
    axes.set_ylabel("temperature", fontsize=_NORMAL)


def _advice_panel(inspection: Inspection, credit: str) -> _Panel:
    lines = textwrap.wrap(inspection.advice, 160)
    small = [*textwrap.wrap(_CAPTION, 215), *textwrap.wrap(credit, 215)]

    def draw(page: _Page, left: float, top: float) -> None:
        page.text(left, top, "\n".join(lines), _NORMAL + 0.5, weight="bold", linespacing=1.4)
        page.text(left, top + 0.22 * len(lines) + 0.04, "\n".join(small), _SMALL, color=_GREY, linespacing=1.4)

    return _Panel(0.22 * len(lines) + 0.18 * len(small) + 0.25, draw)


def _nothing_overwritten(inspection: Inspection) -> str:
    if not inspection.plan.levels:
        return "Temporal gridding is off (frame_strides is empty): every frame is kept."
    return f"No group is complete with {plural(inspection.shape[0], 'frame')}: every frame is kept."


# ---- small helpers of the panels ----


def _side_by_side(left_panel: _Panel, right_panel: _Panel, offset: float) -> _Panel:
    def draw(page: _Page, left: float, top: float) -> None:
        left_panel.draw(page, left, top)
        right_panel.draw(page, offset, top)

    return _Panel(max(left_panel.height, right_panel.height), draw)


def _fit(width: float, height: float, aspect: float) -> tuple[float, float]:
    """The largest (width, height) of this aspect within a slot."""
    return (width, width * aspect) if width * aspect <= height else (height / aspect, height)


def _range(values: np.ndarray) -> tuple[float, float, str]:
    """Limits of a histogram, and a note if a few outlying values are drawn in its last bar."""
    if not values.size:
        return 0.0, 1.0, ""
    low, high, top = float(values.min()), float(values.max()), quantile(values, 0.995)
    note = ""
    if high - low > 2 * (top - low) > 0:
        note = f" (last bar: {top:.2g} to {high:.2g})"
        high = top
    if not high - low > 1e-6 * abs(high):
        low, high = low - 0.5, high + 0.5
    return low, high, note


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(axes: Axes, colour: str) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=2.5)


def _tidy_bar(bar: Colorbar, label: str) -> None:
    bar.set_label(label, fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL, length=2)
    outline: Any = bar.outline  # which some versions' type hints take for something else
    outline.set_visible(False)


def _colour_map(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=_MISSING)


def _level_colour(level: int) -> str:
    return _LEVEL_COLOURS[(level - 1) % len(_LEVEL_COLOURS)]


def _times(pair: Sequence[int]) -> str:
    return " × ".join(map(str, pair))


def require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the figure needs matplotlib: pip install "stgridpool_kernels[demo]"', name=error.name
        ) from error


# ---- files ----


def save_figure(
    inspection: Inspection,
    frames: np.ndarray | None,
    output: Path,
    *,
    force: bool,
    name: str = "",
    credit: str = "",
) -> None:
    """Draws an inspection (see `draw`) into the PNG file `output`.

    Raises FileExistsError for a file that is there already unless `force`, ValueError unless its name ends in .png.
    """
    check_picture(output, force)
    png = _png(draw(inspection, frames, name=name, credit=credit))
    with atomic_write(output, force=force) as file:
        file.write(png)


def check_picture(output: Path, force: bool) -> None:
    if output.suffix.lower() != ".png":
        raise ValueError(f"the figure is a PNG: give a name that ends in .png, got {output}")
    refuse_existing(output, force)


def _png(figure: Figure) -> bytes:
    """The figure as a PNG; of 256 colours if it shows so many frames that full colour would be large."""
    from PIL import Image

    canvas: Any = figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    picture = Image.fromarray(pixels.copy())
    png = _encoded(picture)
    if len(png) > _LARGE_PNG:
        # a ninth of the pixels finds as good a palette nine times faster; maximum coverage keeps rare colours in it
        sample = Image.fromarray(pixels[::3, ::3].copy())
        palette = sample.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        png = _encoded(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    return png


def _encoded(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, dpi=(_DPI, _DPI))
    return file.getvalue()
