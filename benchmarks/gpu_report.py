"""What `benchmarks.gpu_check` reports: which goals are met, a table, and one JSON file per run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .contenders import WORKLOADS

ROOT = Path(__file__).parents[1]
OURS = ("grid_pool", "norm_pool")
CUDA = tuple(f"cuda_{op}" for op in OURS)
"""The same by the cuda backend, where it is built."""

Rows = dict[tuple[str, str], dict[str, Any]]
"""Of `gpu_bench.Row`, by workload and contender."""

# ---- goals ----

GOALS = [name for name, workload in WORKLOADS.items() if workload.goal]
PLAIN = ("llava_avg_pool", "channels_last_avg_pool", "naive_grid_pool")


@dataclass(frozen=True)
class Bar:
    """A goal; status: met, not met or not measured."""

    name: str
    status: str
    detail: str

    @staticmethod
    def of(name: str, values: Mapping[str, float | None], limit: float, unit: str, at_most: bool = False) -> Bar:
        """One value for each shape, None where there is none: met if all are there and keep to the limit, not met as
        soon as one does not."""
        measured = {where: value for where, value in values.items() if value is not None}
        if not measured:
            return Bar(name, "not measured", f"0 of {len(values)}")
        where = (max if at_most else min)(measured, key=measured.__getitem__)
        reached = measured[where] <= limit if at_most else measured[where] >= limit
        status = "not met" if not reached else "met" if len(measured) == len(values) else "not measured"
        return Bar(name, status, f"{len(measured)} of {len(values)}, worst {measured[where]:.3g}{unit} at {where}")


def bars(rows: Rows) -> list[Bar]:
    """The goals, by what was timed."""

    def value(workload: str, contender: str, key: str) -> float | None:
        row = rows.get((workload, contender))
        return None if row is None or row["check"] != "ok" else row[key]

    def speedup(workload: str, contender: str, ours: Sequence[str]) -> float | None:
        times = [value(workload, name, "p50_us") for name in (contender, *ours)]
        known = [time for time in times if time is not None]
        return known[0] / max(known[1:]) if len(known) == len(times) else None

    def compared(
        workloads: Iterable[str], others: Iterable[str], ours: Sequence[str] = OURS
    ) -> dict[str, float | None]:
        pairs = [(workload, other) for other in others for workload in workloads]
        return {f"{workload} {other}": speedup(workload, other, ours) for workload, other in pairs}

    def memory(workload: str) -> float | None:
        extra = value(workload, "grid_pool", "extra_peak_bytes")
        return None if extra is None else 100 * extra / WORKLOADS[workload].input_bytes

    norm_pool, grid_pool = ({w: value(w, op, "percent_of_copy") for w in GOALS} for op in ("norm_pool", "grid_pool"))
    every = compared(WORKLOADS, PLAIN) | compared(GOALS, ["torch_compile_grid_pool"])
    faster = 1 + 1e-9  # equal is not faster
    cuda = {f"{w} {op}": speedup(w, op, [f"cuda_{op}"]) for op in OURS for w in GOALS}
    return [
        Bar.of("norm_pool reaches 92 % of a copy", norm_pool, 92, " %"),
        Bar.of("grid_pool reaches 85 % of a copy", grid_pool, 85, " %"),
        Bar.of("both faster than LLaVA's average pooling", compared(WORKLOADS, ["llava_avg_pool"]), faster, "x"),
        Bar.of("both faster than every contender", every, faster, "x"),
        Bar.of(
            "grid_pool 10 times as fast as eager code", compared(GOALS, ["naive_grid_pool"], ["grid_pool"]), 10, "x"
        ),
        Bar.of("grid_pool takes at most 20 % of x more", {w: memory(w) for w in GOALS}, 20, " %", at_most=True),
        Bar.of("CUDA C++ reaches 90 % of Triton's speed", cuda, 0.9, "x"),
    ]


# ---- report ----


COLUMNS = (
    ("p50 us", "p50_us", 9, 1, 1.0),
    ("p20", "p20_us", 9, 1, 1.0),
    ("p80", "p80_us", 9, 1, 1.0),
    ("GB/s", "lower_bound_gb_per_s", 7, 0, 1.0),
    ("% copy", "percent_of_copy", 8, 1, 1.0),
    ("eager us", "eager_wall_us", 10, 1, 1.0),
    ("extra MB", "extra_peak_bytes", 10, 1, 1e-6),
    ("kernels", "kernel_launches", 9, 0, 1.0),
)
"""Title, key of a row, width, digits, unit."""


def format_table(rows: Rows) -> str:
    """One block per shape, at most 100 columns."""
    head = " " * 26 + "".join(f"{title:>{width}}" for title, _, width, _, _ in COLUMNS)
    lines = []
    for workload in dict.fromkeys(workload for workload, _ in rows):
        here = [row for (name, _), row in rows.items() if name == workload]
        lines += [f"{workload} {here[0]['dtype']}", head]
        for row in sorted(here, key=lambda row: row["contender"] not in (*OURS, *CUDA)):
            cells = [
                f"{'-' if row[key] is None else f'{row[key] * unit:.{digits}f}':>{width}}"
                for _, key, width, digits, unit in COLUMNS
            ]
            lines.append(f"  {row['contender']:24}{''.join(cells)}")
            remarks = [row["note"]] if row["check"] == "ok" else [row["check"], row["note"]]
            if row["do_bench_p50_p20_p80_us"]:
                p50, p20, p80 = row["do_bench_p50_p20_p80_us"]
                remarks.append(f"do_bench: {p50:.1f} us ({p20:.1f} to {p80:.1f})")
            lines += [f"    {remark}"[:100] for remark in remarks if remark]
    return "\n".join(lines)


def describe() -> dict[str, Any]:
    """The device, versions and source that results belong to."""
    properties = torch.cuda.get_device_properties(0)
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
    changed = output_of(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    triton = None
    with suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    sources = hashlib.sha256()
    for path in sorted([*(ROOT / "stgridpool_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]):
        sources.update(path.read_bytes())
    return {
        "device": {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": driver,
        },
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton,
            "python": platform.python_version(),
        },
        "source": {
            "commit": output_of(["git", "rev-parse", "HEAD"]),
            "dirty": None if changed is None else bool(changed),
            "package_sha256": sources.hexdigest(),
        },
    }


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints, or None if it cannot be run."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return None


def new_results_file(folder: Path, device: str, utc: datetime) -> Path:
    """Creates an empty file named by device and time; never one that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{utc:%Y%m%dT%H%M%SZ}"
    for number in range(1, 1000):
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.json"
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise FileExistsError(f"{folder / name}.json and 998 more exist")


def save(report: Mapping[str, Any], path: Path, out: Path | None) -> None:
    """Writes the report whole, and a copy into the folder `out`."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    if out is not None and not out.samefile(path.parent):
        shutil.copy(path, out)
