"""Latency of `GridPoolStream`: what a push takes, next to grid_pool of the whole video.

    python -m benchmarks.stream                              # the published settings, 27 × 27 × 3584 in bfloat16
    python -m benchmarks.stream --size 24x24x1152 --chunk 1 8 --streams 4 --backend cpu

Every row is first compared with grid_pool, bit by bit. Times are medians, 20th and 80th percentiles, of one push, over
`--periods` periods of 32 frames after one that warms up. Frames are taken in turn from a buffer larger than the caches.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stgridpool_kernels import GridPoolStream, grid_pool

PERIOD = 32


def finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def times(x: Tensor, chunk: int, streams: int, backend: str, periods: int) -> tuple[list[float], int]:
    """Microseconds of each push of `chunk` frames to each of `streams` streams; and bytes kept at most."""
    server = GridPoolStream(streams=range(streams), backend=backend)
    found, kept = [], 0
    for start in range(0, (1 + periods) * PERIOD, chunk):
        first = start % len(x)
        frames = torch.cat([x[first : first + chunk]] * streams) if streams > 1 else x[first : first + chunk]
        finish(x)
        begin = time.perf_counter()
        server.push(frames, frame_counts=[chunk] * streams)
        finish(x)
        if start >= PERIOD:
            found.append((time.perf_counter() - begin) * 1e6)
        kept = max(kept, server.state_bytes)
    return found, kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of GridPoolStream")
    parser.add_argument("--size", default="27x27x3584", help="H x W x C of a frame")
    parser.add_argument("--chunk", type=int, nargs="+", default=[1, 4, 32], help="frames of a push, divisors of 32")
    parser.add_argument("--streams", type=int, nargs="+", default=[1], help="that share a push")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--periods", type=int, default=4)
    args = parser.parse_args()
    if any(PERIOD % chunk for chunk in args.chunk):
        parser.error(f"--chunk must divide {PERIOD}, got {args.chunk}")
    H, W, C = map(int, args.size.split("x"))
    x = torch.randn(2 * PERIOD, H, W, C, device=args.device).to(getattr(torch, args.dtype))

    whole = grid_pool(x, backend=args.backend)
    finish(x)
    offline = []
    for _ in range(args.periods + 1):
        begin = time.perf_counter()
        grid_pool(x, backend=args.backend)
        finish(x)
        offline.append((time.perf_counter() - begin) * 1e6 / len(x))
    table = Table(title=f"{args.size} {args.dtype}, {args.device}, {torch.get_num_threads()} threads, µs")
    for name in ("frames", "streams", "p20", "median", "p80", "median of a frame", "kept, MB"):
        table.add_column(name, justify="right")
    table.add_row("grid_pool", "", "", "", "", f"{torch.tensor(offline[1:]).median():.0f}", "")
    for chunk in args.chunk:
        check = GridPoolStream(backend=args.backend)
        if not torch.equal(torch.cat([check.push(part) for part in x.split(chunk)]), whole):
            raise SystemExit(f"pushes of {chunk} frames differ from grid_pool")
        for streams in args.streams:
            found, kept = times(x, chunk, streams, args.backend, args.periods)
            low, middle, high = torch.tensor(found, dtype=torch.float64).quantile(
                torch.tensor([0.2, 0.5, 0.8]).double()
            )
            each = f"{middle / chunk / streams:.0f}"
            row = (chunk, streams, f"{low:.0f}", f"{middle:.0f}", f"{high:.0f}", each, f"{kept / 1e6:.1f}")
            table.add_row(*map(str, row))
    Console().print(table)


if __name__ == "__main__":
    main()
