"""Latency of `GridPoolStream`: what a push takes, next to grid_pool of the whole video.

    python -m benchmarks.stream                              # the published settings, 27 × 27 × 3584 in bfloat16
    python -m benchmarks.stream --size 24x24x1152 --chunk 1 8 --streams 1 4 --backend cpu
    python -m benchmarks.stream --options output_size=10 temperature=2           # of grid_pool, lists like 2:4:8

Every row is first compared with grid_pool, bit by bit. Times are medians, 20th and 80th percentiles, of one push, over
`--periods` periods of 32 frames after one that warms up. Frames are taken in turn from a buffer of 64 for each stream.
Results are appended to a file in benchmarks/results: a line of `Run`, then one of `Push` for every row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.results import Run, Writer, file_name
from stgridpool_kernels import GridPoolStream, grid_pool
from stgridpool_kernels.backends import backend_names
from stgridpool_kernels.integrations.options import READERS, read_option

RESULTS = Path(__file__).with_name("results")

Options = dict[str, Any]
"""Arguments of grid_pool that a stream takes too."""

PERIOD = 32
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Push:
    """What a push of `chunk` frames to each of `streams` streams takes, in µs, and the bytes kept at most between two.

    frame_us: the median for one frame; grid_pool_frame_us: the same of grid_pool of all frames at once.
    """

    run: str
    chunk: int
    streams: int
    p20_us: float
    p50_us: float
    p80_us: float
    frame_us: float
    grid_pool_frame_us: float
    kept_bytes: int


def timed(x: Tensor, options: Options, periods: int) -> float:
    """The median time in µs that grid_pool of x takes for one of its frames."""
    found = []
    for _ in range(periods + 1):
        finish(x)
        begin = time.perf_counter()
        grid_pool(x, **options)
        finish(x)
        found.append((time.perf_counter() - begin) * 1e6 / len(x))
    return quantiles(found[1:])[1]


def check(x: Tensor, whole: Tensor, chunk: int, streams: int, options: Options) -> None:
    """Raises SystemExit where pushes do not give the bits of `whole`."""
    server = GridPoolStream(streams=range(streams), **options)
    for start in range(0, len(x), chunk):
        out = server.push(packed(x, start, chunk, streams), frame_counts=[chunk] * streams)
        if not torch.equal(out, packed(whole, start, chunk, streams)):
            raise SystemExit(f"pushes of {chunk} frames to {streams} streams differ from grid_pool")


def times(x: Tensor, chunk: int, streams: int, options: Options, periods: int) -> tuple[list[float], int]:
    """Microseconds of each push; and bytes kept at most."""
    server = GridPoolStream(streams=range(streams), **options)
    found, kept = [], 0
    for start in range(0, (1 + periods) * PERIOD, chunk):
        frames = packed(x, start % len(x), chunk, streams)
        finish(x)
        begin = time.perf_counter()
        server.push(frames, frame_counts=[chunk] * streams)
        finish(x)
        if start >= PERIOD:
            found.append((time.perf_counter() - begin) * 1e6)
        kept = max(kept, server.state_bytes)
    return found, kept


def packed(x: Tensor, start: int, chunk: int, streams: int) -> Tensor:
    part = x[start : start + chunk]
    return part if streams == 1 else torch.cat([part] * streams)


def finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def quantiles(found: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = torch.tensor(found).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return round(low, 2), round(middle, 2), round(high, 2)


def size(text: str) -> tuple[int, int, int]:
    H, W, C = map(int, text.split("x"))
    if min(H, W) < 2 or C < 1:
        raise ValueError
    return H, W, C


def option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in READERS or name == "backend":
        raise ValueError
    read_option(name, value, name)
    return name, value


def refusal(options: Options, H: int, W: int) -> str | None:
    """Why a stream of frames of H × W tokens cannot be held against grid_pool, or None."""
    try:
        stream = GridPoolStream(**options)
        stream.push(torch.zeros(2 * PERIOD, H, W, 1))
    except (TypeError, ValueError) as error:
        return str(error)
    if not stream.matches_offline():
        return f"frame_strides must divide {2 * PERIOD}, the frames of the whole video, got {options['frame_strides']}"
    return None


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def divisor(text: str) -> int:
    if PERIOD % count(text):
        raise ValueError
    return count(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description="Latency of GridPoolStream")
    parser.add_argument("--options", type=option, nargs="+", default=[], metavar="NAME=VALUE", help="of grid_pool")
    parser.add_argument("--size", type=size, default="27x27x3584", help="HxWxC of a frame (default: 27x27x3584)")
    parser.add_argument("--chunk", type=divisor, nargs="+", default=[1, 4, 32], help="frames of a push, divisors of 32")
    parser.add_argument("--streams", type=count, nargs="+", default=[1], help="that share a push")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--backend", choices=backend_names(), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--periods", type=count, default=4)
    parser.add_argument("-o", "--output", type=Path, help="where results go (default: a file in benchmarks/results)")
    parser.add_argument("--no-save", action="store_true", help="only print them")
    given = parser.parse_args(argv)
    given.options = dict(given.options)
    options: Options = {name: read_option(name, value, name) for name, value in given.options.items()}
    reason = refusal(options, *given.size[:2])
    if reason is not None:
        parser.error(reason)
    options["backend"] = given.backend
    x = torch.randn(2 * PERIOD, *given.size, device=given.device).to(getattr(torch, given.dtype))
    now = datetime.now(timezone.utc)
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "no_save", "device")}
    about = describe(given.device)
    run = Run(f"{now:%Y%m%d-%H%M%S}-stream", now.isoformat(timespec="seconds"), **about, settings=settings)

    whole = grid_pool(x, **options)
    offline = timed(x, options, given.periods)
    rows = []
    for chunk in given.chunk:
        for streams in given.streams:
            check(x, whole, chunk, streams, options)
            found, kept = times(x, chunk, streams, options, given.periods)
            spread = quantiles(found)
            rows.append(Push(run.run, chunk, streams, *spread, round(spread[1] / chunk / streams, 2), offline, kept))

    shape = " × ".join(map(str, given.size))
    named = "".join(f", {name}={value}" for name, value in given.options.items())
    table = Table(title=f"{shape} {given.dtype}{named}, {given.device}, {torch.get_num_threads()} threads, µs")
    for name in ("frames", "streams", "p20", "median", "p80", "median of a frame", "kept, MB"):
        table.add_column(name, justify="right")
    table.add_row("grid_pool", "", "", "", "", f"{offline:.0f}", "")
    for row in rows:
        spent = (f"{us:.0f}" for us in (row.p20_us, row.p50_us, row.p80_us, row.frame_us))
        table.add_row(str(row.chunk), str(row.streams), *spent, f"{row.kept_bytes / 1e6:.1f}")
    Console().print(table)
    if not given.no_save:
        path = given.output or RESULTS / f"stream-{file_name(run.device)}"
        writer = Writer(path)
        for line in (run, *rows):
            writer.write(line)
        writer.close()
        print(f"appended to {path}")


if __name__ == "__main__":
    main()
