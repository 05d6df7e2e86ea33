"""Draw docs/method.png: what ST-GridPool does to the first segment of the packaged frames, from before to after.

python -m tools.banner
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

import stgridpool_kernels as stgp
from stgridpool_kernels.cli.picture import GREY, SKY, VERMILLION
from stgridpool_kernels.io.data import load_fixture
from stgridpool_kernels.io.writing import atomic_write

PICTURE = Path(__file__).parents[1] / "docs" / "method.png"
WIDTH, HEIGHT, DPI = 15.0, 4.2, 100
"""Size of the picture in inches, and pixels per inch."""

LEFT, MIDDLE = 12, 910
"""Left ends of the two halves of the picture, in pixels."""

SEGMENT = 8
"""Number of frames that are shown: those of the shortest segment, which the first level makes a mosaic of."""

CREDIT = "Frames: Big Buck Bunny, © Blender Foundation | peach.blender.org, CC-BY 3.0. Tokens: DINOv2-small."


def draw() -> Figure:
    """Draw the picture: gridding on the left, the pooling of one window on the right."""
    tokens, frames, _ = load_fixture()
    x = torch.from_numpy(tokens[:SEGMENT]).float()
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    draw_gridding(figure, frames[:SEGMENT])
    draw_pooling(figure, x, frames[:SEGMENT])
    write(figure, LEFT, 22, CREDIT, fontsize=8, color=GREY)
    return figure


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return axes without ticks, whose place is given in pixels from the lower left corner."""
    pixels = (WIDTH * DPI, HEIGHT * DPI)
    axes = figure.add_axes((left / pixels[0], bottom / pixels[1], width / pixels[0], height / pixels[1]))
    axes.set(xticks=[], yticks=[])
    return axes


def show(axes: Axes, image: np.ndarray, edge: str | None = None, title: str = "") -> None:
    """Show a picture with an edge of the colour `edge`, or without one, below a title."""
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize=9, pad=3)
    axes.spines[:].set(visible=edge is not None, color=edge, linewidth=2.5)


def write(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    """Write text below and to the right of a place in pixels."""
    figure.text(left / (WIDTH * DPI), top / (HEIGHT * DPI), text, va="top", linespacing=1.5, **style)


def heading(figure: Figure, left: float, title: str, note: str) -> None:
    """Write a bold title at the top of the picture, and a note below it."""
    write(figure, left, 408, title, fontsize=13, weight="bold")
    write(figure, left, 382, note, fontsize=9.5, color=GREY)


# ---- temporal gridding ----


def draw_gridding(figure: Figure, frames: np.ndarray) -> None:
    """Draw the frames of a segment before and after the first level of temporal gridding, with lines between."""
    note = "The last frame of every segment becomes a mosaic of four frames of that segment. No token is added."
    heading(figure, LEFT, "1  Temporal gridding", note)
    (level,) = stgp.grid_plan((SEGMENT,), *frames.shape[1:3], frame_strides=(2,)).levels
    (target,), (sources,) = level.targets, level.sources
    pixels = torch.from_numpy(frames).float()  # the op itself, which takes three channels without a warning
    gridded = torch.ops.stgp.temporal_grid(pixels, frame_strides=[2]).round().byte().numpy()
    width, height, step, left = 98, 55, 102, 66
    places = [
        [axes_at(figure, left + step * i, bottom, width, height) for i in range(SEGMENT)] for bottom in (262, 122)
    ]
    for frame, (before, after) in enumerate(zip(*places, strict=True)):
        show(before, frames[frame], SKY if frame in sources else None, f"frame {frame}")
        show(after, gridded[frame], VERMILLION if frame == target else None)
    for frame in sources:
        line = ConnectionPatch(
            xyA=(0.5, -0.04), xyB=(0.5, 1.04), coordsA="axes fraction", coordsB="axes fraction",
            axesA=places[0][frame], axesB=places[1][target], color=SKY, linewidth=1.6, arrowstyle="-|>",
            mutation_scale=9,
        )  # fmt: skip
        figure.add_artist(line)
    for row, name in zip(places, ("before", "after"), strict=True):
        row[0].set_ylabel(name, fontsize=10, weight="bold", rotation=0, ha="right", va="center", labelpad=6)
    levels = (
        f"This is the first of three levels, with segments of {SEGMENT} frames. The next two do the same with segments "
        f"of {2 * SEGMENT} and {4 * SEGMENT}\nframes; where these divide a video evenly, their mosaics contain those "
        "of the level before."
    )
    write(figure, left, 104, levels, fontsize=9.5, color=GREY)


# ---- norm-based pooling ----


def draw_pooling(figure: Figure, x: torch.Tensor, frames: np.ndarray) -> None:
    """Draw the window with the largest weight: where it is, its tokens' norms, their weights, the pooled token."""
    note = "Every 2 × 2 tokens become one: their mean, weighted by a softmax of their norms."
    heading(figure, MIDDLE, "2  Norm-based pooling", note)
    norms = stgp.token_norm(x)
    frame, row, col = most_decided(norms[:-1])  # the last frame is the one that gridding replaces
    tokens, size = norms.shape[1:], frames.shape[1] // norms.shape[1]
    picture, heat = axes_at(figure, MIDDLE, 218, 200, 112), axes_at(figure, MIDDLE, 66, 200, 112)
    show(picture, frames[frame], title=f"frame {frame}: {tokens[0]} × {tokens[1]} tokens")
    show(heat, norms[frame].numpy(), title="norm of every token")
    for axes, scale in ((picture, size), (heat, 1)):
        corner = (2 * col * scale - 0.5, 2 * row * scale - 0.5)
        axes.add_patch(Rectangle(corner, 2 * scale, 2 * scale, fill=False, edgecolor=VERMILLION, linewidth=2))

    inside = slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2)
    patch = frames[frame, 2 * row * size : 2 * (row + 1) * size, 2 * col * size : 2 * (col + 1) * size]
    show(axes_at(figure, MIDDLE + 222, 220, 108, 108), patch, VERMILLION, "a window of it")
    limits = {"vmin": float(norms[frame].min()), "vmax": float(norms[frame].max())}
    weights = draw_weights(figure, norms[frame][inside], limits)
    terms = " + ".join(f"{weight:.2f} t{k}" for k, weight in zip("₁₂₃₄", weights.flatten().tolist(), strict=True))
    write(figure, MIDDLE + 222, 196, f"pooled token = {terms}", fontsize=9, weight="bold")
    pooled = stgp.norm_pool(x).shape[1:3]
    explained = (
        "A plain average has 0.25 four times. This is the least\n"
        "even window of these frames: at temperature 1, as here,\n"
        f"the largest weight of half of them is below {median(norms):.2f}. A high\n"
        "norm is not the same as an important token.\n"
        f"The {tokens[0]} × {tokens[1]} tokens of a frame become {pooled[0]} × {pooled[1]}."
    )
    write(figure, MIDDLE + 222, 172, explained, fontsize=9, color=GREY)


def draw_weights(figure: Figure, norms: torch.Tensor, limits: dict[str, Any]) -> torch.Tensor:
    """Draw the norms (2, 2) of a window within the limits of their colours, and their weights, which are returned."""
    weights = torch.softmax(norms.flatten(), 0).view(2, 2)
    squares(axes_at(figure, MIDDLE + 344, 220, 108, 108), norms, "its norms", "white", **limits)
    scale = {"vmin": 0, "vmax": 0.6, "cmap": "Oranges"}
    squares(axes_at(figure, MIDDLE + 466, 220, 108, 108), weights, "its weights", "black", **scale)
    return weights


def squares(axes: Axes, values: torch.Tensor, title: str, colour: str, **scale: Any) -> None:
    """Show numbers (2, 2) as coloured squares, and write each into its square."""
    axes.imshow(values.numpy(), aspect="auto", **scale)
    axes.set_title(title, fontsize=9, pad=3)
    axes.spines[:].set_visible(False)
    for row, col in itertools.product(range(2), range(2)):
        text, style = f"{values[row, col]:.2f}", {"fontsize": 11, "weight": "bold", "ha": "center", "va": "center"}
        is_light = colour == "white" and axes.images[0].norm(values[row, col]) > 0.8
        axes.text(col, row, text, color="black" if is_light else colour, **style)


def largest_weights(norms: torch.Tensor) -> torch.Tensor:
    """Return the largest weight of each 2 × 2 window by the norms (T, H, W)."""
    return torch.softmax(norms.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3), -1).amax(-1)


def median(norms: torch.Tensor) -> float:
    """Return the median of the windows' largest weights, rounded up to two digits."""
    return math.ceil(100 * float(largest_weights(norms).median())) / 100


def most_decided(norms: torch.Tensor) -> tuple[int, int, int]:
    """Return frame, row and column of the 2 × 2 window with the largest weight by the norms (T, H, W)."""
    largest = largest_weights(norms)
    place = int(largest.argmax())
    frame, rest = divmod(place, largest[0].numel())
    return frame, *divmod(rest, largest.shape[2])


def save(path: Path = PICTURE) -> None:
    """Write the picture as PNG."""
    with atomic_write(path, force=True) as file:
        draw().savefig(file, format="png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    save()
