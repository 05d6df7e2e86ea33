"""The figure of an `Inspection`, with one function per panel. matplotlib is imported on first use."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..io.writing import atomic_write
from ..plan import GridPlan, Level
from .picture import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, check_picture, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.text import Text

    from .inspection import Inspection

__all__ = ["draw", "save_figure"]

_WIDTH, _DPI = 15.0, 100  # inches, pixels per inch
_SHOWN_FRAMES = 8
_DIAGRAM_FRAMES = 64
_MOSAIC_LEVELS = 4
_MOSAIC_SOURCES = 6
_THUMBNAIL_WIDTH = 168  # pixels

_LEVEL_COLOURS = (SKY, ORANGE, GREEN, PURPLE, BLUE, VERMILLION)
_UNTOUCHED, _MISSING = "#E8E8E8", "#BBBBBB"
_SMALL, _NORMAL, _HEADING, _TITLE = 8.5, 9.5, 11.0, 14.0  # points

_CAPTION = (
    "A high norm is not the same as an important token: compare the heat maps with the frames. "
    "Norms differ between encoders, so a temperature that suits one does not carry over to another."
)


def save_figure(
    inspection: Inspection, frames: np.ndarray | None, output: Path, *, force: bool, name: str = "", credit: str = ""
) -> None:
    """Draw an inspection (see `draw`) and write it to the PNG file `output`.

    Raises FileExistsError if the file exists, unless `force`; ValueError unless its name ends in .png.
    """
    check_picture(output, force)
    figure = draw(inspection, frames, name=name, credit=credit)
    with atomic_write(output, force=force) as file:
        figure.savefig(file, format="png", pil_kwargs={"optimize": True})


def draw(inspection: Inspection, frames: np.ndarray | None = None, *, name: str = "", credit: str = "") -> Figure:
    """Draw an inspection, 1500 pixels wide at the figure's own dpi.

    frames: uint8 (T, h, w, 3) RGB, the frames that the tokens encode, at any size; without them norms are shown.
    name: name of the input in the title. credit: attribution of the frames, written at the bottom.

    Raises ImportError if matplotlib is missing, ValueError if dtype or shape of frames do not match the tokens.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = _view(inspection, frames)
    heights = _heights(view)
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0.02, 0.01, 0.96, 0.98))  # left, bottom, width and height within the margins
    head, norms, diagram, pictures, bottom = figure.subfigures(5, height_ratios=heights)
    mosaics, weights = pictures.subfigures(1, 2, wspace=0.03)
    largest, advice = bottom.subfigures(1, 2, wspace=0.03)
    _draw_head(head, inspection, name)
    _draw_norms(norms, view)
    _draw_diagram(diagram, inspection)
    _draw_mosaics(mosaics, view)
    _draw_weights(weights, view)
    _draw_largest(largest, inspection)
    _draw_advice(advice, inspection, credit)
    return figure


# ---- elements that panels share ----


@dataclass(frozen=True)
class _View:
    """An inspection and the pictures of its frames.

    colours: map from norms to colours. thumbnails: small frames as uint8 RGB (levels + 1, T, h, w, 3), those of the
    input and those after each level of temporal gridding, or None. aspect: height over width of a picture.
    """

    inspection: Inspection
    colours: ScalarMappable
    thumbnails: np.ndarray | None
    aspect: float

    def show_frame(self, axes: Axes, frame: int, stage: int, title: str = "", edge: str | None = None) -> None:
        """Show a frame after the first `stage` levels: its picture, or its norms if there are no pictures."""
        stages = self.thumbnails if self.thumbnails is not None else self.inspection.stage_norms
        self.show(axes, stages[stage, frame], title, edge)

    def show(self, axes: Axes, image: np.ndarray, title: str = "", edge: str | None = None) -> None:
        """Show colours (h, w, 3 or 4) or norms (H, W) under a title, with an edge of the colour `edge` or without."""
        axes.imshow(image if image.ndim == 3 else self.colours.to_rgba(image), aspect="auto")
        axes.set(box_aspect=self.aspect, anchor="N", xticks=[], yticks=[])
        axes.set_axis_on()
        axes.set_title(title, fontsize=_SMALL, pad=3)
        axes.spines[:].set(visible=edge is not None, color=edge, linewidth=2.5)


def _view(inspection: Inspection, frames: np.ndarray | None) -> _View:
    T, H, W, _ = inspection.shape
    aspect, thumbnails = H / W, None
    if frames is not None:
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames must be uint8 (T, h, w, 3), got {frames.dtype} {frames.shape}")
        if len(frames) != T:
            raise ValueError(f"there must be one frame for each of the {T} token frames, got {len(frames)}")
        aspect, thumbnails = frames.shape[1] / frames.shape[2], _thumbnails(inspection, frames)
    colours = _colours("viridis", *_norm_limits(inspection.stage_norms))
    return _View(inspection, colours, thumbnails, min(max(aspect, 0.3), 2.0))


def _thumbnails(inspection: Inspection, frames: np.ndarray) -> np.ndarray:
    """Return small frames, and those after each level of temporal gridding, as uint8 (levels + 1, T, h, w, 3)."""
    from PIL import Image

    height = round(_THUMBNAIL_WIDTH * frames.shape[1] / frames.shape[2])
    size = (_THUMBNAIL_WIDTH, min(max(height, 24), 2 * _THUMBNAIL_WIDTH))
    small = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])
    stages = inspection.stages(torch.from_numpy(small).float())
    return np.stack([stage.round().clamp(0, 255).byte().numpy() for stage in stages])


def _norm_limits(norms: np.ndarray) -> tuple[float, float]:
    """Return the ends of the colour scale, robust to a few outliers, which may be 50 times as large as other norms."""
    finite = norms[np.isfinite(norms)]
    if not finite.size:
        return 0.0, 1.0
    low, lower, upper, high = np.quantile(finite.astype(np.float64), (0.002, 0.25, 0.75, 0.998)).tolist()
    if high > 3 * upper > 3 * lower:
        high = min(high, upper + 3 * (upper - lower))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _colours(name: str, low: float, high: float) -> ScalarMappable:
    """Return matplotlib's map `name` from [low, high] to colours, with grey for NaN and infinity."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), matplotlib.colormaps[name].with_extremes(bad=_MISSING))


def _heights(view: _View) -> list[float]:
    """Return the heights of the figure's five rows in inches, which depend on the aspect of the pictures."""
    plan, heading, title = view.inspection.plan, 0.7, 0.3
    norms = min(1.7 * view.aspect, 2.2) * (1 if view.thumbnails is None else 2)
    mosaics = len(_examples(plan)) * (min(1.1 * view.aspect, 1.6) + title)
    weights = len(_two_frames(view.inspection)) * (min(1.4 * view.aspect, 1.6) + title)
    return [
        0.75,
        heading + norms + title,
        heading + 0.15 + 0.6 * (len(plan.levels) + 1),
        heading + max(mosaics, weights),
        2.8,
    ]


def _heading(figure: SubFigure, title: str, note: str) -> None:
    """Write a bold title on the left, and a note on the same line."""
    text = figure.suptitle(title, x=0, ha="left", fontsize=_HEADING, weight="bold")
    _note(figure, text, (1, 0.1), (9, 0), note, va="baseline")


def _note(
    figure: SubFigure, text: Text, corner: tuple[float, float], offset: tuple[float, float], note: str, **style: Any
) -> None:
    """Write small grey text at an offset in points from a corner, a relative position in the box of another text."""
    from matplotlib.text import Annotation

    style = {"fontsize": _SMALL, "color": GREY, "parse_math": False, **style}
    figure.add_artist(Annotation(note, corner, offset, xycoords=text, textcoords="offset points", **style))


def _empty_axes(figure: SubFigure, rows: int, cols: int) -> np.ndarray:
    """Return (rows, cols) axes that are invisible until something is drawn on them."""
    grid: np.ndarray = figure.subplots(rows, cols, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return grid


def _label_row(axes: Axes, label: str, colour: str = "black") -> None:
    """Write a label on the left of a row's first picture."""
    axes.set_ylabel(label, fontsize=_SMALL, weight="bold", rotation=0, ha="right", va="center", color=colour)


def _colour_bar(figure: SubFigure, axes: Axes, colours: ScalarMappable, label: str, **style: Any) -> None:
    """Draw a colour bar on the right of a picture, with the picture's height."""
    bar = figure.colorbar(colours, cax=axes.inset_axes((1.06, 0, 0.09, 1)), **style)
    bar.set_label(label, fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL, length=2)


def _level_colour(level: int) -> str:
    return _LEVEL_COLOURS[(level - 1) % len(_LEVEL_COLOURS)]


def _written_by(plan: GridPlan, levels: int) -> dict[int, int]:
    """Return the frames that the first `levels` levels overwrite, each with the number, from 1, of the last level."""
    return {target: level for level in range(1, levels + 1) for target in plan.levels[level - 1].targets}


# ---- panels ----


def _draw_head(figure: SubFigure, inspection: Inspection, name: str) -> None:
    short = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
    title = f"ST-GridPool on {short}" if name else "ST-GridPool"
    shapes = f"{inspection.shape} {inspection.dtype} → {inspection.pooled_shape}"
    overwritten = f"{len(inspection.plan.overwritten)} of {inspection.shape[0]} frames overwritten"
    style: dict[str, Any] = {"va": "top", "parse_math": False}  # names may hold dollar signs
    figure.text(0, 0.95, title, fontsize=_TITLE, weight="bold", **style)
    figure.text(1, 0.95, f"{shapes}  ·  {overwritten}", fontsize=_TITLE, ha="right", **style)
    figure.text(0, 0.45, inspection.settings, fontsize=_NORMAL, color=GREY, **style)


def _draw_norms(figure: SubFigure, view: _View) -> None:
    """Draw some frames, and below each the norms of its tokens in the input."""
    inspection, overwritten = view.inspection, view.inspection.plan.overwritten
    shown = _choose_frames(inspection.shape[0], overwritten)
    note = f"{inspection.norm_name} of each token; {len(shown)} of {inspection.shape[0]} frames"
    if math.isfinite(inspection.max_over_median):
        note += f"; the largest norm is {inspection.max_over_median:.3g} × the median"
    if inspection.nonfinite:
        note += "; grey is NaN or infinite"
    _heading(figure, "a  Token norms of the input", note)
    grid = _empty_axes(figure, 1 if view.thumbnails is None else 2, _SHOWN_FRAMES)
    for column, frame in enumerate(shown):
        edge = VERMILLION if frame in overwritten else None
        view.show_frame(grid[0, column], frame, 0, f"frame {frame}" + (", overwritten" if edge else ""), edge)
        if view.thumbnails is not None:
            view.show(grid[1, column], inspection.stage_norms[0, frame], edge=edge)
    _colour_bar(figure, grid[-1, len(shown) - 1], view.colours, inspection.norm_name, extend="both")


def _choose_frames(total: int, overwritten: Sequence[int]) -> list[int]:
    """Choose at most `_SHOWN_FRAMES` of `total` frames, evenly spread, with an overwritten frame if there is any."""
    chosen = set(np.linspace(0, total - 1, min(total, _SHOWN_FRAMES)).astype(int).tolist())
    if overwritten and not chosen & set(overwritten):
        chosen = chosen - {max(chosen)} | {overwritten[-1]}
    return sorted(chosen)


def _draw_diagram(figure: SubFigure, inspection: Inspection) -> None:
    """Draw a diagram of temporal gridding: a lane of frames for the input and after each level, with lines between."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    plan, total = inspection.plan, inspection.shape[0]
    frames = min(total, _DIAGRAM_FRAMES)
    _heading(figure, "b  Temporal gridding", f"the first {frames} of {total} frames" if frames < total else "")
    axes = figure.subplots()
    labels = ["input frames"] + [
        f"after level {number}: {len(level.targets)} overwritten\n"
        f"stride {level.frame_stride}, grid {level.rows} × {level.cols}"
        for number, level in enumerate(plan.levels, start=1)
    ]
    axes.set(xlim=(-0.6, max(frames, 16) - 0.4), ylim=(len(plan.levels) + 0.3, -0.3), xticks=[])
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=_SMALL)
    axes.spines[:].set_visible(False)
    for lane in range(len(labels)):
        _draw_lane(axes, plan, lane, frames)
    if plan.overwritten:
        figure.legend(
            handles=[
                Patch(facecolor=_UNTOUCHED, label="frame as it came"),
                Patch(facecolor=SKY, edgecolor="black", label="summary written here (colour: level)"),
                Line2D([], [], color=GREY, linewidth=1.0, label="source → target"),
                Line2D([], [], color=GREY, linewidth=2.4, marker="o", markersize=4, label="source that is a summary"),
            ],
            loc="upper right", ncols=4, frameon=False, fontsize=_SMALL, borderaxespad=0,
        )  # fmt: skip


def _draw_lane(axes: Axes, plan: GridPlan, lane: int, frames: int) -> None:
    """Draw the frames after `lane` levels, and lines from the lane above to the summaries that are new in it."""
    half = 0.17  # half the height of a box, in units of the distance of lanes
    before, written = _written_by(plan, lane - 1), _written_by(plan, lane)
    groups = zip(plan.levels[lane - 1].targets, plan.levels[lane - 1].sources, strict=True) if lane else ()
    new = {target: sources for target, sources in groups if max(target, *sources) < frames}
    for target, sources in new.items():
        for source in sources:
            style = {"linewidth": 2.4, "marker": "o", "zorder": 2.5} if source in before else {"linewidth": 1.0}
            axes.plot(
                (source, target), (lane - 1 + half, lane - half), color=_level_colour(lane), solid_capstyle="butt",
                markersize=4, markevery=[0], **style,
            )  # fmt: skip
    colours = [_level_colour(written[frame]) if frame in written else _UNTOUCHED for frame in range(frames)]
    edges = ["black" if frame in new else "none" for frame in range(frames)]
    boxes = [(frame - 0.43, 0.86) for frame in range(frames)]
    axes.broken_barh(boxes, (lane - half, 2 * half), facecolors=colours, edgecolors=edges, zorder=2.2)
    for frame in new if lane else range(frames):
        ink = "white" if colours[frame] == BLUE else "black"
        axes.text(frame, lane, str(frame), fontsize=7.5, ha="center", va="center", color=ink, zorder=3)


def _draw_mosaics(figure: SubFigure, view: _View) -> None:
    """Draw the first summary of each level and its sources, as the levels before left them."""
    plan = view.inspection.plan
    examples = _examples(plan)
    note = "norms stand in for pictures" if view.thumbnails is None else "gridding applied to the pictures"
    _heading(figure, "c  The first summary of each level", note if examples else "")
    if not examples:
        why = "no group is complete" if plan.levels else "temporal gridding is off (frame_strides is empty)"
        figure.text(0.03, 0.8, f"Every frame is kept: {why}.", fontsize=_NORMAL)
        return
    slots = min(max(len(level.sources[0]) for level in examples.values()), _MOSAIC_SOURCES)
    grid = _empty_axes(figure, len(examples), slots + 1)
    for row, (number, level) in zip(grid, examples.items(), strict=True):
        before = _written_by(plan, number - 1)
        _label_row(row[0], f"level {number}")
        sources, target = level.sources[0], level.targets[0]
        for axes, frame in zip(row[:slots], sources, strict=False):
            edge = _level_colour(before[frame]) if frame in before else None
            title = f"{frame}, a summary" if edge and slots <= 4 else f"{frame}"
            view.show_frame(axes, frame, number - 1, title, edge)
        arrow = "→" if len(sources) <= slots else "… →"
        row[-1].text(-0.08, 0.5, arrow, fontsize=_TITLE, ha="right", va="center", transform=row[-1].transAxes)
        view.show_frame(row[-1], target, number, f"new {target}", _level_colour(number))


def _examples(plan: GridPlan) -> dict[int, Level]:
    """Return the first `_MOSAIC_LEVELS` levels that have a summary, by their numbers from 1."""
    summarising = [(number, level) for number, level in enumerate(plan.levels, start=1) if level.targets]
    return dict(summarising[:_MOSAIC_LEVELS])


def _draw_weights(figure: SubFigure, view: _View) -> None:
    """Draw picture, norms, and weights at one or two temperatures of an untouched and of an overwritten frame."""
    inspection, frames = view.inspection, _two_frames(view.inspection)
    colours = _colours("PuOr_r", 0, 2)  # a fixed scale makes pictures of different inputs comparable
    columns: dict[str, list[np.ndarray]] = {}
    if view.thumbnails is not None:
        columns["picture"] = [view.thumbnails[-1, frame] for frame in frames]
    columns["norms"] = [inspection.stage_norms[-1, frame] for frame in frames]
    note = "white is average pooling"
    for temperature in (inspection.temperature, inspection.target_temperature):
        if temperature is not None:
            weights = [inspection.relative_weights(frame, temperature) for frame in frames]
            columns[f"temperature {temperature:.3g}"] = [colours.to_rgba(of_frame) for of_frame in weights]
            note = "white is average pooling, grey has no weight" if np.isnan(weights).any() else note
    _heading(figure, "d  From norms to weights", note)
    grid = _empty_axes(figure, len(frames), max(len(columns), 4))
    for row, frame in enumerate(frames):
        edge = VERMILLION if frame in inspection.plan.overwritten else None
        _label_row(grid[row, 0], f"frame {frame}" + ("\na summary" if edge else ""), edge or "black")
        for axes, (title, images) in zip(grid[row], columns.items(), strict=False):
            view.show(axes, images[row], "" if row else title, edge)
    _colour_bar(figure, grid[0, len(columns) - 1], colours, "× uniform", extend="max", ticks=[0, 1, 2])


def _two_frames(inspection: Inspection) -> list[int]:
    """Return the untouched frame and the overwritten frame that are nearest the middle, if there are such frames."""
    middle = inspection.shape[0] // 2
    overwritten = set(inspection.plan.overwritten)
    groups = [set(range(inspection.shape[0])) - overwritten, overwritten]
    return [min(group, key=lambda frame: (abs(frame - middle), frame)) for group in groups if group]


def _draw_largest(figure: SubFigure, inspection: Inspection) -> None:
    """Draw box plots of the windows' largest weights at each temperature."""
    note = f"{inspection.counted} of {inspection.windows} windows; box from p25 to p75, lines to p5 and p95"
    _heading(figure, "e  Largest weight of a window", note)
    axes = figure.subplots()
    temperatures, uniform = list(inspection.largest_weights), 1 / inspection.window_size
    places = np.arange(len(temperatures))
    if inspection.counted:
        weights = list(inspection.largest_weights.values())
        p5, p25, p50, p75, p95 = np.quantile(weights, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
        axes.vlines(places, p5, p95, color="black", linewidth=1)
        axes.bar(places, p75 - p25, 0.4, bottom=p25, color=SKY, edgecolor="black", zorder=2)
        axes.hlines(p50, places - 0.2, places + 0.2, color="black", linewidth=2, zorder=3)
    axes.axhline(uniform, color=VERMILLION, linewidth=1.2, linestyle="--", zorder=0)
    axes.text(
        1.01, uniform, f"uniform {uniform:.2g}", fontsize=_SMALL, color=VERMILLION, va="center",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    axes.set(xlim=(-0.5, len(places) - 0.5), ylim=(0, 1.03))
    axes.set_xticks(places, [f"{temperature:g}" for temperature in temperatures])
    axes.set_xlabel("temperature", fontsize=_NORMAL)
    axes.set_ylabel("largest weight", fontsize=_NORMAL)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_advice(figure: SubFigure, inspection: Inspection, credit: str) -> None:
    style: dict[str, Any] = {"va": "top", "linespacing": 1.4, "parse_math": False}
    lines = textwrap.fill(inspection.advice, 78)
    advice = figure.text(0, 0.9, lines, fontsize=_NORMAL + 0.5, weight="bold", **style)
    caption = "\n".join([*textwrap.wrap(_CAPTION, 98), *textwrap.wrap(credit, 98)])
    _note(figure, advice, (0, 0), (0, -10), caption, **style)
