"""The command `stgp inspect`: read the tokens of a file or a video, measure them, print a table, may draw a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..io.inputs import load_input
from .figure import save_figure
from .inspection import Inspection, inspect_tokens
from .options import check_grid
from .picture import check_picture, require_matplotlib
from .terminal import printable


def inspect_command(
    path: Path,
    output: Path | None,
    *,
    options: dict[str, Any],
    num_frames: int,
    grid: tuple[int, int] | None,
    tap: str,
    key: str | None,
    device: torch.device,
    force: bool,
    console: Console,
) -> None:
    """Inspect the tokens of a token file or of a video; print a table and, where `output` is given, write a figure.

    options: arguments of `grid_pool` except `out`. num_frames, grid, tap, key: arguments of `load_input`, which reads
    the file. device: device that pools. Of a batch (B, T, H, W, C) and of packed videos (`frame_counts`) only the first
    video with frames is inspected, and the output says so.

    Raises FileExistsError, ImportError, TypeError or ValueError before anything is written.
    """
    if output is not None:
        check_picture(output, force)
        require_matplotlib()
    name = printable(path.name)
    with console.status(f"reading {escape(name)}") as status:
        x, frames = load_input(
            path, key=key, num_frames=num_frames, grid=grid, tap=tap,
            progress=lambda step, done, total: status.update(f"{step}: {done} of {total} frames"),
        )  # fmt: skip
    check_grid(grid, tuple(x.shape), [path])
    if x.dim() == 3 and grid is not None:  # flattened tokens
        x = x.unflatten(1, grid)
    options = dict(options)
    x, frames, which = _first_video(x, frames, options.pop("frame_counts", None))
    inspection = inspect_tokens(x.to(device), **options)
    if output is not None:
        save_figure(inspection, frames, output, force=force, name=name)
    console.print(_table(inspection, device, f"{name}{which}"))
    console.print(inspection.advice, markup=False, highlight=False)
    if output is not None:
        console.print(f"figure: {printable(str(output))}", style="bold", markup=False, highlight=False, soft_wrap=True)


def _first_video(
    x: Tensor, frames: np.ndarray | None, frame_counts: Sequence[int] | None
) -> tuple[Tensor, np.ndarray | None, str]:
    """Choose the first video of a batch (B, T, H, W, C), or the first of packed videos that has frames.

    Returns its tokens (T, H, W, C), its frames if frames are given, and its place among several videos in words.
    Raises ValueError if frame_counts do not add up to the frames of x.
    """
    if frame_counts is not None:
        if x.dim() != 4 or not frame_counts or sum(frame_counts) != len(x) or min(frame_counts) < 0:
            raise ValueError(
                f"frame_counts must pack the frames of a (T, H, W, C) tensor, got {list(frame_counts)} for shape "
                f"{tuple(x.shape)}"
            )
        number, videos = next((k for k, count in enumerate(frame_counts) if count), 0), len(frame_counts)
        first = frame_counts[number]
        x, frames = x[:first], None if frames is None else frames[:first]
    elif x.dim() == 5 and len(x):
        number, videos, x = 0, len(x), x[0]  # a batch comes from a token file, which has no frames
    else:
        return x, frames, ""
    return x, frames, f", video {number + 1} of {videos}" if videos > 1 else ""


def _table(inspection: Inspection, device: torch.device, name: str) -> Table:
    table = Table(title=Text(name), title_justify="left", show_header=False)
    table.add_row("tokens", f"{inspection.shape} {inspection.dtype} → {inspection.pooled_shape}")
    table.add_row("pooled on", str(device))
    table.add_row("frames overwritten", f"{len(inspection.plan.overwritten)} of {inspection.shape[0]}")
    if math.isfinite(inspection.max_over_median):
        table.add_row(f"norm ({inspection.norm_name})", f"largest is {inspection.max_over_median:.3g} × the median")
    if inspection.nonfinite:
        table.add_row("NaN or infinite norms", f"{inspection.nonfinite} of {inspection.stage_norms[0].size} tokens")
    if inspection.counted:
        quantiles = np.quantile(inspection.spread, (0.5, 0.95))
        table.add_row("spread inside windows", "p50 {:.3g}, p95 {:.3g}".format(*quantiles))
        for temperature, weights in inspection.largest_weights.items():
            quantiles = np.quantile(weights, (0.05, 0.5, 0.95))
            table.add_row(f"largest weight at {temperature:g}", "p5 {:.2f}, p50 {:.2f}, p95 {:.2f}".format(*quantiles))
    counted = f"{inspection.counted} of {inspection.windows} windows"
    table.add_row("counted", f"{counted}: those of {inspection.window_size} positions and finite norms")
    return table
