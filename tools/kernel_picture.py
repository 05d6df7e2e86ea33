"""The picture of docs/kernels.md: which program of the fused kernel reads and writes what.

`python -m tools.kernel_picture -o docs/kernels.png`. All of it is drawn from a plan, its schedule, and the
launches that are prepared for it; only the sizes, and the step that is shown in detail, are chosen here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stgridpool_kernels.plan import GridPlan, Runs, grid_plan
from stgridpool_kernels.plan.dataflow import Schedule, needed_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAN = grid_plan((32,), 9, 9)
STEP = (2, 2)
"""Row of cells, and cell in it, that is shown in detail."""

WIDTH, HEIGHT, DPI = 10.0, 7.8, 150
BLUE, ORANGE, PURPLE = "#0072B2", "#E69F00", "#CC79A7"
BAND, TOKEN, EDGE, GREY = "#DDEBF5", "#F6F6F6", "#C8C8C8", "#666666"
SMALL, NORMAL, HEADING = 7.2, 7.6, 9.5

Place = tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """What a launch does with a frame of x, or with a summary in its place."""

    content: int
    frame: int
    shrunk: bool
    pooled: bool


@dataclass(frozen=True)
class Step:
    """A launch: its entries, and its programs in words."""

    entries: tuple[Entry, ...]
    programs: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What a grid_pool call by `plan` computes."""

    plan: GridPlan

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.of(self.plan)

    @cached_property
    def needed(self) -> dict[int, tuple[int, ...]]:
        return needed_cells(self.plan, self.schedule)

    @cached_property
    def launches(self) -> list[Step]:
        """As the tables of a prepared call have them."""
        from stgridpool_kernels.backends import triton_kernels
        from stgridpool_kernels.backends.triton_kernels.fused import ENTRY

        x = torch.empty(sum(self.plan.frame_counts), self.plan.height, self.plan.width, 1, dtype=torch.bfloat16)
        out = torch.empty(len(x), *self.plan.pooled_size, 1, dtype=x.dtype)
        call = triton_kernels.prepare("grid_pool", x, self.plan, (1.0, 2.0, True), out)
        assert call.tables is not None
        (h, w), (OH, OW) = self.miniature, self.plan.pooled_size
        launches = []
        for launch in call.launches:
            given = dict(zip(launch.kernel.arg_names[4:], launch.arguments, strict=True))
            cells = given["CELLS"] if given["SPLIT"] else w
            walks = h * -(-w // cells)
            windows = (launch.grid[0] - given["walked"] * walks) // (OH * OW)
            table = call.tables.tensor[given["entries"] :][: (given["walked"] + windows) * ENTRY.value]
            entries = tuple(
                Entry(content, self.frame(content), slot >= 0, target >= 0)
                for content, target, slot, *_ in table.view(-1, ENTRY.value).tolist()
            )
            programs = [
                f"{given['walked']} × {h} × {walks // h} walks" if cells < w else f"{given['walked']} × {h} walks"
            ]
            programs += [f"{windows} × {OH * OW} windows"] if windows else []
            launches.append(Step(entries, tuple(programs)))
        return launches

    @property
    def miniature(self) -> Place:
        """Rows and columns of cells."""
        return -(-self.plan.height // 2), -(-self.plan.width // 2)

    def frame(self, content: int) -> int:
        """The frame that holds a content."""
        return content if content >= 0 else self.schedule.summaries[~content].target

    def cell(self, i: int, j: int) -> set[Place]:
        """Tokens that a cell averages: the first tile of a mosaic is the miniature of a frame."""
        level = self.plan.levels[0]
        return _box(level.row_runs, i, level.col_runs, j)

    def window(self, i: int, j: int) -> set[Place]:
        return _box(self.plan.window_rows, i, self.plan.window_cols, j)


def _box(rows: Runs, i: int, cols: Runs, j: int) -> set[Place]:
    return {
        (r, c)
        for r in range(rows.start[i], rows.start[i] + rows.count[i])
        for c in range(cols.start[j], cols.start[j] + cols.count[j])
    }


def draw(work: Work) -> Figure:
    """1500 pixels wide; legible at two thirds of that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    page.axis("off")
    _walk(page, work, 0.25, 0.2)
    _windows(page, work, 5.3, 0.2)
    _mosaic(page, work, 7.55, 0.2)
    _launches(page, work, 0.25, 4.05)
    return figure


# ---- panels: places are in inches from the left and top edges ----


def _walk(page: Axes, work: Work, left: float, top: float) -> None:
    """A row of cells of a frame that is sampled, and one step along it."""
    (i, j), (h, w), (OH, OW) = STEP, work.miniature, work.plan.pooled_size
    size, x, y = 0.27, left + 0.3, top + 0.78
    _heading(page, left, top, "a  Walk", "one program for each row of cells, of a frame that is shrunk")
    window, cell = work.window(i, j), work.cell(i, j)
    carried, carried_next = cell & work.cell(i, j - 1), cell & work.cell(i, j + 1)
    halo = cell - window - carried
    band = {place for column in range(w) for place in work.cell(i, column)}
    rows = sorted({r for r, _ in band})

    _frame(page, work, x, y, size)
    _fill(page, x, y, size, band, BAND)
    _fill(page, x, y, size, window, BLUE)
    _fill(page, x, y, size, halo, ORANGE)
    _fill(page, x, y, size, carried, PURPLE)
    _outline(page, x, y, size, carried_next, PURPLE, 2.2, inset=0.045)
    _outline(page, x, y, size, cell, "black", 2.0)
    for r in range(work.plan.height):
        _text(page, x - 0.07, y + (r + 0.5) * size, str(r), SMALL, ha="right", va="center", color=GREY)
    for c in range(work.plan.width):
        _text(page, x + (c + 0.5) * size, y - 0.05, str(c), SMALL, ha="center", va="bottom", color=GREY)
    middle = y + (rows[0] + len(rows) / 2) * size
    right = x + (max(c for _, c in cell) + 1) * size
    _arrow(page, (right + 0.12, middle), (x + work.plan.width * size - 0.06, middle), "black")

    columns = [sorted({c for _, c in places})[0] for places in (carried, carried_next)]
    above = ", ".join(str(r) for r in sorted({r for r, _ in halo}))
    entries = (
        (BAND, "", f"rows {rows[0]} to {rows[-1]}: all that walk {i} reads,", "from left to right"),
        ("", "black", f"step {j}: cell ({i}, {j}), {len(cell)} tokens,", f"their mean is D[{i}, {j}]"),
        (BLUE, "", f"window ({i}, {j}): pooled into out[{i}, {j}]", "unless the frame is replaced"),
        (ORANGE, "", f"halo: row {above}, which walk {i - 1}", "reads as well"),
        (PURPLE, "", f"column {columns[0]}: its sum is carried", f"from step {j - 1}, not read again"),
        ("", PURPLE, f"column {columns[1]}: its sum is carried on", f"to step {j + 1}"),
    )
    swatch, line = x + work.plan.width * size + 0.2, y + 0.02
    for number, (fill, edge, *lines) in enumerate(entries):
        place = line + number * 0.405
        _swatch(page, swatch, place, fill, edge)
        _text(page, swatch + 0.25, place - 0.015, "\n".join(lines), linespacing=1.25)
    note = f"{h} walks a frame, {OH} × {OW} pooled tokens, {h} × {w} cells of D"
    _text(page, x, y + work.plan.height * size + 0.1, note, color=GREY)


def _windows(page: Axes, work: Work, left: float, top: float) -> None:
    """The windows of a frame that is not sampled."""
    (OH, OW), plan = work.plan.pooled_size, work.plan
    size, x, y = 0.2, left + 0.2, top + 0.78
    _heading(page, left, top, "b  Window", "one program for each, of\na frame that is not shrunk")
    _frame(page, work, x, y, size)
    for i in range(OH):
        for j in range(OW):
            _fill(page, x, y, size, work.window(i, j), BLUE if (i, j) == STEP else BAND)
            _outline(page, x, y, size, work.window(i, j), BLUE, 1.2, inset=0.02)
    read = {place for i in range(OH) for j in range(OW) for place in work.window(i, j)}
    rows, cols = (
        [str(position) for position in range(total) if position not in {place[axis] for place in read}]
        for axis, total in enumerate((plan.height, plan.width))
    )
    lines = [f"{OH * OW} programs a frame"]
    if rows or cols:
        lines += [f"row {', '.join(rows)} and column {', '.join(cols)} are", "in no window: not read"]
    _text(page, x, y + plan.height * size + 0.1, "\n".join(lines), color=GREY, linespacing=1.3)


def _mosaic(page: Axes, work: Work, left: float, top: float) -> None:
    """The miniatures that the last summary is tiled from, and their cells that are computed."""
    summary = work.schedule.summaries[-1]
    (h, w), (H, W) = work.miniature, (work.plan.height, work.plan.width)
    size, x, y = 0.2, left + 0.2, top + 0.78
    _heading(
        page,
        left,
        top,
        "c  Miniatures",
        f"four are tiled into the last summary,\nwhich replaces frame {summary.target}",
    )
    for tile, source in enumerate(summary.sources):
        down, right = tile // 2 * h, tile % 2 * w
        counts = work.needed.get(source, (0,) * h)
        places = {(i, j) for i in range(h) for j in range(w)}
        stored = {(i, j) for i, j in places if j < counts[i]}
        _fill(page, x, y, size, {(down + i, right + j) for i, j in places - stored}, "white", EDGE)
        _fill(page, x, y, size, {(down + i, right + j) for i, j in stored}, ORANGE)
        _outline(page, x, y, size, {(down, right), (down + h - 1, right + w - 1)}, GREY, 0.8)
        label = f"D of {work.frame(source)}"
        _text(page, x + (right + 1.5) * size, y + (down + 1.5) * size, label, ha="center", va="center", weight="bold")
    _outline(page, x, y, size, {(0, 0), (H - 1, W - 1)}, "black", 1.6)
    lines = ("orange: stored, as a pooled token", "depends on it, here or elsewhere", f"black: cropped to {H} × {W}")
    _text(page, x, y + 2 * h * size + 0.1, "\n".join(lines), color=GREY, linespacing=1.3)


def _launches(page: Axes, work: Work, left: float, top: float) -> None:
    """Every launch, from top to bottom, with what it does to the content of each frame."""
    frames = sum(work.plan.frame_counts)
    pitch, box, first, y, gap, height = 0.246, 0.196, left + 1.62, top + 0.68, 0.72, 0.26
    _heading(
        page,
        left,
        top,
        f"d  Launches of a call with {frames} frames",
        "box: a frame of x, or a summary in its place; line: a miniature that is read",
    )
    key = ((ORANGE, "its miniature is stored", 5.3), (BLUE, "it is pooled", 7.1), ("white", "neither: not read", 8.2))
    for fill, text, place in key:
        _swatch(page, left + place, top + 0.22, fill, EDGE)
        _text(page, left + place + 0.22, top + 0.205, text)
    row_of = {entry.content: row for row, step in enumerate(work.launches) for entry in step.entries}
    middle = [first + (frame + 0.5) * pitch for frame in range(frames)]
    for frame, x in enumerate(middle):
        _text(page, x, y - 0.03, str(frame), SMALL, ha="center", va="bottom", color=GREY)
        if frame not in row_of:
            _content(page, (x - box / 2, y), box, height, False, False)
    for number, summary in enumerate(work.schedule.summaries):
        for source in set(summary.sources) & work.needed.keys():
            ends = (y + row_of[source] * gap + height, y + row_of[~number] * gap)
            page.plot((middle[work.frame(source)], middle[summary.target]), ends, color=ORANGE, linewidth=1.1, zorder=1)
    for row, step in enumerate(work.launches):
        of = "summaries" if min(entry.content for entry in step.entries) < 0 else "frames of x"
        _text(page, left + 0.2, y + row * gap - 0.06, f"launch {row + 1}: {of}", weight="bold")
        _text(page, left + 0.2, y + row * gap + 0.1, "\n".join(step.programs), SMALL, color=GREY, linespacing=1.25)
        for entry in step.entries:
            corner = (middle[entry.frame] - box / 2, y + row * gap)
            _content(page, corner, box, height, entry.shrunk, entry.pooled)
    below = y + len(work.launches) * gap - 0.1
    _text(page, left + 0.2, below, "out", weight="bold", va="center")
    _text(page, left + 0.47, below, "pooled by launch", SMALL, color=GREY, va="center")
    for x, content in zip(middle, work.schedule.final, strict=True):
        weight = "bold" if content < 0 else "normal"
        _text(page, x, below, str(row_of[content] + 1), ha="center", va="center", color=BLUE, weight=weight)


def _content(page: Axes, place: tuple[float, float], width: float, height: float, shrunk: bool, pooled: bool) -> None:
    from matplotlib.patches import Rectangle

    x, y = place
    for half, colour in ((0, ORANGE if shrunk else "white"), (1, BLUE if pooled else "white")):
        page.add_patch(Rectangle((x, y + half * height / 2), width, height / 2, facecolor=colour, linewidth=0))
    page.add_patch(Rectangle(place, width, height, fill=False, edgecolor=GREY, linewidth=0.7))


# ---- small helpers ----


def _frame(page: Axes, work: Work, x: float, y: float, size: float) -> None:
    tokens = ((r, c) for r in range(work.plan.height) for c in range(work.plan.width))
    _fill(page, x, y, size, tokens, TOKEN, EDGE)


def _fill(
    page: Axes, x: float, y: float, size: float, places: Iterable[Place], colour: str, edge: str = "white"
) -> None:
    from matplotlib.patches import Rectangle

    for r, c in places:
        corner = (x + c * size, y + r * size)
        page.add_patch(Rectangle(corner, size, size, facecolor=colour, edgecolor=edge, linewidth=0.7))


def _outline(
    page: Axes, x: float, y: float, size: float, places: set[Place], colour: str, width: float, inset: float = 0.0
) -> None:
    from matplotlib.patches import Rectangle

    rows, cols = ({place[axis] for place in places} for axis in (0, 1))
    corner = (x + min(cols) * size + inset, y + min(rows) * size + inset)
    across, down = ((max(taken) - min(taken) + 1) * size - 2 * inset for taken in (cols, rows))
    page.add_patch(Rectangle(corner, across, down, fill=False, edgecolor=colour, linewidth=width))


def _swatch(page: Axes, x: float, y: float, fill: str, edge: str) -> None:
    from matplotlib.patches import Rectangle

    width = 0.7 if fill else 1.8
    page.add_patch(Rectangle((x, y), 0.15, 0.12, facecolor=fill or "none", edgecolor=edge or "none", linewidth=width))


def _arrow(page: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    page.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.3})


def _heading(page: Axes, left: float, top: float, text: str, note: str) -> None:
    _text(page, left, top, text, HEADING, weight="bold")
    _text(page, left + 0.2, top + 0.2, note, color=GREY, linespacing=1.25)


def _text(page: Axes, x: float, y: float, text: str, size: float = NORMAL, **style: Any) -> None:
    page.text(x, y, text, fontsize=size, **{"ha": "left", "va": "top", "parse_math": False, **style})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kernel_picture", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="replaced if it exists")
    draw(Work(PLAN)).savefig(parser.parse_args(arguments).output, format="png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
