"""The command `stgp demo`: encode a real video, pool its tokens by `grid_pool`, and show a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .machine import busy_note, device_name, others_cores, threads_of
from .picture import check_picture, require_matplotlib

NUM_FRAMES = 32
"""Number of frames that are encoded, evenly spread over the clip."""

GRID = (18, 32)
"""Rows and columns of tokens per encoded frame."""

Pool = Callable[[Tensor], Tensor]

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


def time_calls(functions: Sequence[Pool], x: Tensor) -> tuple[list[float], str, str]:
    """Return the time of a call of every function on x (T, H, W, C) in milliseconds, and notes on x and on other use.

    x is repeated along T until a call of the first function takes 5 ms, or x has 1 GB: the start of threads, and not
    the pooling, would take most of the time of a shorter call. The time is the median, or, if other processes used the
    CPU meanwhile, the minimum; then the second note says so.
    """
    frames, others = len(x), others_cores()
    while _times(functions[0], x, 0.2).min() < _LEAST_SECONDS and x.nbytes < _MOST_BYTES:
        x = torch.cat([x, x])
    found = [_times(function, x, 0.5) for function in functions]
    busy = busy_note(others())
    name, choose = ("minimum", np.min) if busy else ("median", np.median)
    dtype = str(x.dtype).removeprefix("torch.")
    note = f"Times: {name} of calls on {len(x) // frames} × the tokens, {dtype}, {device_name(x.device)}"
    return [float(choose(times)) * 1e3 for times in found], f"{note}{threads_of(x.device)}.", busy


_LEAST_SECONDS, _MOST_BYTES = 5e-3, 10**9


def _times(function: Pool, x: Tensor, seconds: float) -> np.ndarray:
    """Return times of function(x) in seconds, measured for at least `seconds`, on torch's current number of threads."""
    names = {"function": function, "x": x}
    timer = Timer("function(x)", globals=names, num_threads=torch.get_num_threads())
    return np.array(timer.blocked_autorange(min_run_time=seconds).times)


def demo_command(output: Path, *, offline_tokens: bool, device: torch.device, force: bool, console: Console) -> None:
    """Run the demo, print its table and write its picture. Raises as `encoded_clip` and `check_picture`.

    device: device that pools and is timed.
    """
    try:
        require_matplotlib()
        check_picture(output, force)
        drawable = True
    except ImportError:
        drawable = False
    clip = packaged_clip() if offline_tokens else encoded_clip(console)
    x = clip.tokens.to(device)
    times, note, busy = time_calls([torch.ops.stgp.grid_pool, *_BASELINES.values()], x)
    console.print(_table(clip.origin, x, times))
    change = "Change: frames that no summary overwrites. Error: against the oracle in float64 on the same tokens."
    console.print("\n".join([change, note, CREDIT]), style="dim", highlight=False, markup=False)
    if busy:
        console.print(busy, style="yellow", highlight=False, soft_wrap=True)
    if drawable:
        inspection = inspect_tokens(x)
        save_figure(inspection, clip.frames, output, force=force, name="bigbuckbunny.mp4", credit=CREDIT)
        console.print(f"picture: {output.resolve()}", soft_wrap=True, highlight=False)
    else:
        console.print('no picture without matplotlib: pip install "stgridpool_kernels[demo]"', markup=False)


_BASELINES: dict[str, Pool] = {
    "LLaVA-style average pooling": llava_avg_pool,
    "naive eager ST-GridPool": naive_grid_pool,
}


def _table(origin: str, x: Tensor, times: Sequence[float]) -> Table:
    """Return the table of the demo. times: milliseconds of `grid_pool` and of the baselines."""
    plan = grid_plan((len(x),), x.shape[1], x.shape[2])
    pooled = torch.ops.stgp.grid_pool(x)

    table = Table(title="torch.ops.stgp.grid_pool(x)", show_header=False)
    table.add_row("video", origin)
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
    ours, *others = times
    table.add_row(f"grid_pool, {choose_backend(x, plan).name}", f"{ours:.1f} ms")
    for name, time in zip(_BASELINES, others, strict=True):
        table.add_row(name, f"{time:.1f} ms, {time / ours:.2f} × grid_pool's")
    return table


def _shape(x: Tensor) -> str:
    return " × ".join(map(str, x.shape))


def _difference(x: Tensor, pooled: Tensor, plan: GridPlan) -> str:
    kept = sorted(set(range(len(x))) - set(plan.overwritten))
    average = llava_avg_pool(x[kept])
    relative = (pooled[kept] - average).norm(dim=-1) / average.norm(dim=-1)
    median, high = (100 * relative.flatten().cpu().quantile(torch.tensor([0.5, 0.95]))).tolist()
    return f"{median:.1f} % median, {high:.1f} % p95 per token"
