"""The orientation in which a file says that its pictures are shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from .formats import import_av

__all__ = ["orientation"]


def orientation(frame: Any) -> tuple[bool, Callable[[np.ndarray], np.ndarray]]:
    """Return how a decoded frame of PyAV is shown upright, by the display matrix that FFmpeg attaches to it.

    The matrix maps the pixel (x, y) to (a·x + c·y, b·x + d·y), so each of the 8 orientations, mirrored or not, is flips
    behind a swap of the axes or none. Other angles are taken for the nearest quarter turn.

    Returns:
        swapped: True if rows become columns.
        turn: function that turns a picture `(H, W, 3)` upright, as a view of it.
    """
    matrix = _side_data(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return False, lambda picture: picture
    (a, b), (c, d) = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    from_x, from_y = (c, b) if swapped else (a, d)
    steps = -1 if from_y < 0 else 1, -1 if from_x < 0 else 1

    def turn(picture: np.ndarray) -> np.ndarray:
        upright = picture.swapaxes(0, 1) if swapped else picture
        return upright[:: steps[0], :: steps[1]]

    return swapped, turn


def _side_data(frame: Any) -> Any:
    """Return the side data of a frame by type, without types that PyAV does not list.

    PyAV raises if there are any, EXIF among them, so a filter of FFmpeg deletes them first.
    """
    while True:
        try:
            return frame.side_data
        except ValueError as error:
            unlisted = re.match(r"(\d+) is not a valid Type", str(error))
            if unlisted is None:
                raise
            frame = _without_side_data(frame, int(unlisted[1]))


def _without_side_data(frame: Any, number: int) -> Any:
    graph = import_av().filter.Graph()
    size = {"width": frame.width, "height": frame.height}
    source = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base or Fraction(1, 1000))
    graph.link_nodes(source, graph.add("sidedata", f"mode=delete:type={number}"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()
