"""`pool_flat`: grid_pool of flattened frames, as engines hold the tokens of all videos of a batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import check_names, check_tensor, converted
from .functional import grid_pool
from .plan.values import integers, shown

OPTIONS = tuple(name for name in inspect.signature(grid_pool).parameters if name not in ("x", "frame_counts", "out"))
"""Names of the arguments of `grid_pool` that are options of `pool_flat` too."""


def pool_flat(x: Tensor, frames_per_video: Sequence[int], grid: Sequence[int] | None = None, **options: Any) -> Tensor:
    """Apply ST-GridPool to all videos of a batch in the layout of engines. Groups never span two videos.

    x: (ΣF, h·w, C), the frames of all videos in order, or (ΣF, h, w, C); dtypes and strides as in `grid_pool`. It is
        not modified.
    frames_per_video: number of frames of each video, in order; they must sum to ΣF.
    grid: (h, w) in tokens; by default that of a 4-D x, or the square of h·w tokens.
    options: keyword arguments of `grid_pool` except `frame_counts` and `out`.

    Result: (ΣF, OH·OW, C), or (ΣF, OH, OW, C) for 4-D x; same dtype, contiguous, new.

    Raises ValueError or TypeError naming the argument, its value and what is allowed; otherwise as `grid_pool`.
    """
    check_names(options, OPTIONS, "options")
    check_tensor(x)
    rows, cols = _grid_of(x, grid)
    frame_counts = _frames(x, frames_per_video)
    if x.dim() == 4:
        return grid_pool(x, frame_counts=frame_counts, **options)
    return grid_pool(x.unflatten(1, (rows, cols)), frame_counts=frame_counts, **options).flatten(1, 2)


def grid_size(grid: Any) -> tuple[int, int]:
    """Return rows and columns of a `grid` argument. Raises ValueError or TypeError unless it has 2 of at least 1."""
    entries = integers("grid", grid, "2 integers (rows, cols)")
    if len(entries) != 2 or min(entries) < 1:
        raise ValueError(f"grid must be 2 integers (rows, cols) of at least 1, got {shown(grid)}")
    return entries[0], entries[1]


def _grid_of(x: Tensor, grid: Sequence[int] | None) -> tuple[int, int]:
    shape = tuple(x.shape)
    if len(shape) not in (3, 4):
        raise ValueError(f"x must have shape (ΣF, h·w, C) or (ΣF, h, w, C), got {shape}")
    if len(shape) == 4:
        if grid is not None and grid_size(grid) != shape[1:3]:
            raise ValueError(f"grid must be {shape[1:3]} as in x of shape {shape}, or None, got {grid_size(grid)}")
        return shape[1], shape[2]
    tokens = shape[1]
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"grid must be given where the {tokens} tokens of a frame are no square, got None")
        return side, side
    rows, cols = grid_size(grid)
    if rows * cols != tokens:
        raise ValueError(
            f"grid must have the {tokens} positions that a frame of x has tokens, got {rows} × {cols} = {rows * cols}"
        )
    return rows, cols


def _frames(x: Tensor, frames_per_video: Sequence[int]) -> Sequence[int]:
    counts = frames_per_video
    if not torch.compiler.is_compiling():
        counts = converted("frames_per_video", frames_per_video)
    if any(count < 0 for count in counts):
        raise ValueError(f"frames_per_video must not be negative, got {shown(list(counts))}")
    total = sum(counts)
    if total != x.shape[0]:
        raise ValueError(
            f"frames_per_video must sum to the {x.shape[0]} frames of x, got {shown(list(counts))} with sum {total}"
        )
    return counts
