"""The command `stgp demo`: encode a real video, pool its tokens by `grid_pool`, and show a table and a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from ..backends import choose_backend
from ..functional import grid_pool
from ..io.data import load_fixture
from ..plan import GridPlan, grid_plan
from .baselines import llava_avg_pool, naive_grid_pool
from .figure import save_figure
from .inspection import inspect_tokens
from .picture import check_picture, require_matplotlib

NUM_FRAMES = 32
"""Number of frames that are encoded, evenly spread over the clip."""

GRID = (18, 32)
"""Rows and columns of tokens per encoded frame."""

CREDIT = "Big Buck Bunny: © Blender Foundation | peach.blender.org, CC-BY 3.0."


@dataclass(frozen=True)
class Clip:
    """Tokens (T, H, W, C) float32, the frames that they encode, (T, h, w, 3) uint8 RGB, and their origin in words."""

    tokens: Tensor
    frames: np.ndarray
    origin: str


def packaged_clip() -> Clip:
    """Load the tokens that ship with the package, which needs no optional package."""
    tokens, frames, _ = load_fixture()
    return Clip(torch.from_numpy(tokens).float(), frames, f"{len(frames)} packaged frames of bigbuckbunny.mp4")


def encoded_clip(console: Console) -> Clip:
    """Decode and encode Big Buck Bunny. Raises ImportError or ValueError if a package or file is missing."""
    from ..io.encoder import PATCH, Encoder, find_sample_video
    from ..io.video import read_frames

    video, encoder = find_sample_video("bigbuckbunny.mp4"), Encoder()
    size = (GRID[0] * PATCH, GRID[1] * PATCH)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        decoding = progress.add_task("decode", total=NUM_FRAMES)
        encoding = progress.add_task("encode", total=NUM_FRAMES)
        frames = read_frames(
            video, NUM_FRAMES, size=size, progress=lambda done, total: progress.update(decoding, completed=done)
        )
        tokens = encoder(frames, progress=lambda done, total: progress.update(encoding, completed=done))
    origin = f"{len(frames)} frames of {video.name}, {size[0]} × {size[1]} pixels"
    return Clip(torch.from_numpy(tokens), frames, origin)


def accuracy(tokens: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Measure the error of `grid_pool` on `tokens` in `dtype`, against the reference on the same values in float64.

    Returns the norm of the error relative to the norm of the result, and the largest absolute error.
    """
    x = tokens.to(dtype)
    exact = grid_pool(x.double(), backend="reference")
    error = torch.ops.stgp.grid_pool(x).double() - exact
    return (error.norm() / exact.norm()).item(), error.abs().max().item()


def median_time(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Median time of function(x) in milliseconds, on torch's current number of threads."""
    names = {"function": function, "x": x}
    timer = Timer("function(x)", globals=names, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.5).median * 1e3)


def demo_command(output: Path, *, offline_tokens: bool, force: bool, console: Console) -> None:
    """Run the demo, print its table and write its picture. Raises as `encoded_clip` and `check_picture`."""
    try:
        require_matplotlib()
        check_picture(output, force)
        drawable = True
    except ImportError:
        drawable = False
    clip = packaged_clip() if offline_tokens else encoded_clip(console)
    console.print(_table(clip))
    notes = [
        "Change: frames that no summary overwrites. Error: against the oracle in float64 on the same tokens.",
        f"Times: medians on {torch.get_num_threads()} CPU threads, float32.",
        CREDIT,
    ]
    console.print("\n".join(notes), style="dim", highlight=False)
    if drawable:
        inspection = inspect_tokens(clip.tokens)
        save_figure(inspection, clip.frames, output, force=force, name="bigbuckbunny.mp4", credit=CREDIT)
        console.print(f"picture: {output.resolve()}", soft_wrap=True, highlight=False)
    else:
        console.print('no picture without matplotlib: pip install "stgridpool_kernels[demo]"', markup=False)


def _table(clip: Clip) -> Table:
    x = clip.tokens
    plan = grid_plan((len(x),), x.shape[1], x.shape[2])
    pooled = torch.ops.stgp.grid_pool(x)

    table = Table(title="torch.ops.stgp.grid_pool(x)", show_header=False)
    table.add_row("video", clip.origin)
    table.add_row("vision tower", "DINOv2-small (ViT-S/14), after its last LayerNorm")
    table.add_row("tokens before", f"{_shape(x)} = {x.shape[:-1].numel():,}")
    table.add_row("tokens after", f"{_shape(pooled)} = {pooled.shape[:-1].numel():,}")
    overwritten = ", ".join(map(str, plan.overwritten))
    table.add_row("frames overwritten", f"{len(plan.overwritten)} of {len(x)}: {overwritten}")
    table.add_row("change from average pooling", _difference(x, pooled, plan))
    table.add_section()
    for dtype in (torch.float32, torch.bfloat16):
        relative, largest = accuracy(x, dtype)
        name = str(dtype).removeprefix("torch.")
        table.add_row(f"error, {name}", f"{relative:.1e} of the norm, {largest:.1e} largest")
    table.add_section()
    ours = median_time(torch.ops.stgp.grid_pool, x)
    table.add_row(f"grid_pool, {choose_backend(x, plan).name}", f"{ours:.1f} ms")
    for name, function in (
        ("LLaVA-style average pooling", llava_avg_pool),
        ("naive eager ST-GridPool", naive_grid_pool),
    ):
        time = median_time(function, x)
        table.add_row(name, f"{time:.1f} ms, {time / ours:.2f} × grid_pool's")
    return table


def _shape(x: Tensor) -> str:
    return " × ".join(map(str, x.shape))


def _difference(x: Tensor, pooled: Tensor, plan: GridPlan) -> str:
    kept = sorted(set(range(len(x))) - set(plan.overwritten))
    average = llava_avg_pool(x[kept])
    relative = (pooled[kept] - average).norm(dim=-1) / average.norm(dim=-1)
    median, high = (100 * relative.flatten().quantile(torch.tensor([0.5, 0.95]))).tolist()
    return f"{median:.1f} % median, {high:.1f} % p95 per token"
