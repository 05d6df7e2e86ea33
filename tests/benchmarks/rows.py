"""This module has results that were not measured, for tests of what is made of results."""

from __future__ import annotations

from typing import Any

from benchmarks.results import BenchRow, Run

RUN = Run(
    run="20261122T183000Z",
    utc="2026-11-22T18:30:00+00:00",
    device={"type": "cpu", "name": "Some CPU", "cores": 4, "threads": 1, "capability": "avx512"},
    versions={"torch": "2.13.0+cu130", "cuda": "13.0", "triton": "3.9.0"},
    source={"commit": "7cc5a8a86f824b37fe3b400dce4731cfcc2bd081", "dirty": False},
    settings={},
)


def make_row(provider: str, p50_us: float | None = None, **values: Any) -> BenchRow:
    """Return a row on llava-video-7b that took `p50_us`, 1 % less at p20 and 2 % more at p80."""
    facts: dict[str, Any] = {
        "run": RUN.run,
        "workload": "llava-video-7b",
        "provider": provider,
        "op": "grid_pool" if "grid_pool" in provider else "" if provider in ("copy", "ceiling") else "norm_pool",
        "dtype": "bfloat16",
        "shape": (64, 27, 27, 3584),
        "settings": {},
        "groups": ("main",),
        "input_bytes": 334_430_208,
        "read_bytes": 305_600_000,
        "write_bytes": 77_500_000,
    }
    if p50_us is not None:
        facts |= {"check": "ok", "p20_us": 0.99 * p50_us, "p50_us": p50_us, "p80_us": 1.02 * p50_us}
        facts["gb_per_s"] = 383_100_000 / p50_us / 1e3
    return BenchRow(**facts | values)
