"""Lower bound of memory traffic: every token that a result depends on is read once, the result is written once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stgridpool_kernels.plan import GridPlan, Runs


@dataclass(frozen=True)
class Traffic:
    """Numbers of bytes that are read from and written to the memory of a device."""

    read_bytes: int
    write_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.read_bytes + self.write_bytes


def lower_bound(plan: GridPlan, channels: int, value_bytes: int) -> Traffic:
    """Return the lower bound of grid_pool by `plan`, or of norm_pool if the plan has no levels.

    Intermediate results do not count, since at best they stay in caches.
    """
    rows, cols = plan.pooled_size
    token_bytes = channels * value_bytes
    written = sum(plan.frame_counts) * rows * cols
    return Traffic(int(tokens_read(plan).sum()) * token_bytes, written * token_bytes)


def tokens_read(plan: GridPlan) -> NDArray[np.bool_]:
    """Return a mask (T, H, W) of the tokens of x that the pooled tokens depend on.

    It is computed backwards from the result. Windows read tokens of the gridded frames. If a frame is a summary, its
    tokens depend on tokens of its sources after the previous levels, and not on the frame that it replaces. Only a part
    of a frame is read if tiles are cropped, or if windows leave out the last row and column.
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


def _covered(runs: Runs, size: int) -> NDArray[np.bool_]:
    """Return a mask (runs, size) of the positions that each run covers, without padding."""
    position, start = np.arange(size), np.array(runs.start)[:, None]
    covered: NDArray[np.bool_] = (start <= position) & (position < start + np.array(runs.count)[:, None])
    return covered
