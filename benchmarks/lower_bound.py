"""The fewest bytes that a call must move: every token the result depends on read once, the result written once; and the
operations that the formula takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stgridpool_kernels.plan import GridPlan, Runs


@dataclass(frozen=True)
class Traffic:
    """Bytes to and from device memory."""

    read_bytes: int
    write_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.read_bytes + self.write_bytes


def lower_bound(plan: GridPlan, channels: int, value_bytes: int) -> Traffic:
    """Of grid_pool by `plan`, or of norm_pool if it has no levels. What is in between stays in caches at best."""
    rows, cols = plan.pooled_size
    token_bytes = channels * value_bytes
    written = sum(plan.frame_counts) * rows * cols
    return Traffic(int(tokens_read(plan).sum()) * token_bytes, written * token_bytes)


def tokens_read(plan: GridPlan) -> NDArray[np.bool_]:
    """(T, H, W): the tokens of x that a pooled token depends on.

    From the result backwards: the windows need tokens of what a frame ends with. Where that is a summary, it needs
    tokens of its sources as the levels before left them, and nothing of the frame that it replaces. Tiles are cropped
    and windows may leave out the last row and column, so that a replaced frame is often needed in part only.
    """
    rows, cols = _covered(plan.window_rows, plan.height), _covered(plan.window_cols, plan.width)
    needed = np.tile(np.outer(rows.any(0), cols.any(0)), (sum(plan.frame_counts), 1, 1))
    for level in reversed(plan.levels):
        targets = list(level.targets)
        summaries = needed[targets].astype(np.float32)  # (G, H, W)
        needed[targets] = False
        rows = _covered(level.row_runs, level.rows * plan.height).astype(np.float32)  # (H, mosaic rows)
        cols = _covered(level.col_runs, level.cols * plan.width).astype(np.float32)
        mosaics = (rows.T @ summaries @ cols) > 0  # (G, mosaic rows, mosaic columns)
        tiles = mosaics.reshape(len(targets), level.rows, plan.height, level.cols, plan.width).transpose(0, 1, 3, 2, 4)
        for sources, group in zip(level.sources, tiles, strict=True):
            for source, tile in zip(sources, group.reshape(len(sources), plan.height, plan.width), strict=True):
                needed[source] |= tile
    return needed


def flops(plan: GridPlan, channels: int) -> int:
    """Multiplications and additions of grid_pool by `plan`, or of norm_pool if it has no levels, for p = 2.

    Two for a norm and two for a weighted sum at every channel that a window covers, one at every channel that goes into
    a summary. What there is once for a token or a window (softmax, roots) is not counted, nor what is repeated.
    """
    rows, cols = _covered(plan.window_rows, plan.height), _covered(plan.window_cols, plan.width)
    pooling = 4 * sum(plan.frame_counts) * int(rows.sum()) * int(cols.sum())
    shrinking = sum(len(level.targets) * sum(level.row_runs.count) * sum(level.col_runs.count) for level in plan.levels)
    return (pooling + shrinking) * channels


def _covered(runs: Runs, size: int) -> NDArray[np.bool_]:
    """(runs, size): which positions each run covers; those in the padding are not there."""
    position, start = np.arange(size), np.array(runs.start)[:, None]
    covered: NDArray[np.bool_] = (start <= position) & (position < start + np.array(runs.count)[:, None])
    return covered
