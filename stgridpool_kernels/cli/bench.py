"""The command `stgp bench`: times of the ops on this machine, next to the pooling that they replace.

It takes seconds. `python -m benchmarks` in a checkout measures more thoroughly: with cold caches, in turns, against
memory bandwidth, on workloads of several models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..backends import choose_backend
from ..functional import grid_pool, norm_pool
from ..integrations.options import read_integers
from ..plan import grid_plan
from ..version import __version__
from .baselines import llava_avg_pool, naive_grid_pool
from .machine import busy_note, device_name, others_cores, threads_of
from .options import DTYPES
from .terminal import print_whole

SHAPE = "32x27x27x896"
"""Default shape (T, H, W, C) of the tokens."""

ALLOWED_ULPS = {2: 8, 4: 64}
"""Allowed difference from the expected result by bytes of a value, in units in the last place of the largest value."""

Pool = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Timing:
    """Time of a call: 20th, 50th and 80th percentile in microseconds; bandwidth in GB/s, if it reads the tokens and
    writes the result once; and median time relative to that of grid_pool."""

    name: str
    p20_us: float
    p50_us: float
    p80_us: float
    gb_per_s: float
    times_grid_pool: float


def bench_command(shape: str, dtype: str, place: torch.device, as_json: bool, console: Console) -> None:
    """Time every pooling on random tokens of unequal norms; print a table, or one JSON object.

    Raises ValueError for an invalid shape, RuntimeError if a result differs too much from the expected one.
    """
    sizes = parse_shape(shape)
    norms = 2 + 0.3 * torch.randn((*sizes[:-1], 1), device=place)
    x = (norms * torch.randn(sizes, device=place)).to(DTYPES[dtype])
    others = others_cores()
    timings = time_poolings(x, Console(stderr=True, highlight=False))
    busy = others()
    if as_json:
        about = {"device": str(place), "name": device_name(place), "threads": torch.get_num_threads()}
        versions = {"stgridpool_kernels": __version__, "torch": torch.__version__}
        found = {
            **about,
            "versions": versions,
            "shape": list(sizes),
            "dtype": dtype,
            "others_cores": busy,
            "meaning": meaning(timings),
        }
        print(json.dumps(found | {"timings": [asdict(timing) for timing in timings]}))
        return
    backend = choose_backend(x, grid_plan((len(x),), *x.shape[1:3])).name
    line = f"{shape} {dtype}, {device_name(place)}{threads_of(place)}, torch {torch.__version__}, backend {backend}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    titles = ("pooling", "p20, ms", "median, ms", "p80, ms", "GB/s", "× grid_pool")
    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for each in timings:
        numbers = [each.p20_us / 1e3, each.p50_us / 1e3, each.p80_us / 1e3, each.gb_per_s]
        table.add_row(each.name, *map(_three_digits, numbers), f"{each.times_grid_pool:.2f}")
    print_whole(console, table)
    console.print(meaning(timings), highlight=False, soft_wrap=True)
    if note := busy_note(busy):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)


def parse_shape(text: str) -> tuple[int, ...]:
    """Return (T, H, W, C) of a text like 32x27x27x896. Raises ValueError for other texts and if H or W is below 2."""
    sizes = read_integers(text) or ()
    if len(sizes) != 4 or min(sizes) < 1 or min(sizes[1:3]) < 2:
        raise ValueError(f"--shape must be TxHxWxC with H and W of at least 2, as in {SHAPE}; got {text!r}")
    return sizes


def poolings(x: Tensor) -> Iterator[tuple[str, Pool, Pool]]:
    """Yield name, function, and definition (of the expected result) of every pooling that is timed on tokens like x."""

    def exact(pool: Pool) -> Pool:
        return lambda x: pool(x.float()).to(x.dtype)

    def avg_pool2d(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    reference = partial(grid_pool, backend="reference")
    yield "grid_pool", grid_pool, reference
    yield "norm_pool", norm_pool, partial(norm_pool, backend="reference")
    yield "LLaVA-style pooling", llava_avg_pool, exact(llava_avg_pool)
    yield "avg_pool2d", avg_pool2d, exact(llava_avg_pool)
    yield "naive ST-GridPool", naive_grid_pool, reference


def time_poolings(x: Tensor, progress: Console) -> list[Timing]:
    """Time all poolings of x (T, H, W, C), grid_pool first, and name each on `progress` before.

    Caches are warm: tokens that fit into a cache are read from it. Raises RuntimeError if a result is wrong, before it
    is timed.
    """
    from torch.utils.benchmark import Timer

    timings: list[Timing] = []
    asked = list(poolings(x))
    for number, (name, pool, definition) in enumerate(asked, 1):
        progress.print(f"{name}, {number} of {len(asked)}", style="dim")
        result, expected = pool(x), definition(x)
        off = (result.float() - expected.float()).abs().max().item()
        allowed = ALLOWED_ULPS[x.element_size()] * torch.finfo(x.dtype).eps * expected.abs().max().item()
        if not off <= allowed:
            raise RuntimeError(f"{name} is off by {off:.3g} on this input, {allowed:.3g} is allowed: not timed")
        timer = Timer("pool(x)", globals={"pool": pool, "x": x}, num_threads=torch.get_num_threads())
        found = [time for _ in range(3) for time in timer.blocked_autorange(min_run_time=0.1).times]
        seconds = torch.tensor(found, dtype=torch.float64)
        low, median, high = (seconds.quantile(q).item() * 1e6 for q in (0.2, 0.5, 0.8))
        rate = (x.nbytes + result.nbytes) / median / 1e3
        timings.append(Timing(name, low, median, high, rate, median / (timings[0].p50_us if timings else median)))
    return timings


def meaning(timings: list[Timing]) -> str:
    """Summarise the timings in one sentence."""
    ratio = {each.name: _three_digits(each.times_grid_pool) for each in timings}
    return (
        f"grid_pool is {ratio['LLaVA-style pooling']} times as fast as LLaVA-style pooling, which it stands in for, "
        f"and {ratio['naive ST-GridPool']} times as fast as naive ST-GridPool."
    )


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"
