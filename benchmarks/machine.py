"""The machine, versions and source that results belong to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import stgridpool_kernels
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.machine import cpu_name
from stgridpool_kernels.version import __version__

PACKAGE = Path(stgridpool_kernels.__file__).parent
ROOT = Path(__file__).parents[1]
"""Of a checkout, if this is one."""


def describe(device: str, threads: int | None = None) -> dict[str, Any]:
    """device ("cpu", "cuda" or "cuda:1"), versions and source, as `results.Run` holds them."""
    return {"device": _gpu(device) if device.startswith("cuda") else _cpu(threads), **_versions(), **_source()}


def _gpu(device: str) -> dict[str, Any]:
    index = torch.device(device).index or 0
    properties = torch.cuda.get_device_properties(index)
    return {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(str(properties.uuid)),
    }


def _driver(uuid: str) -> str | None:
    """The version of the driver, which is one for all GPUs of a machine, asked for by the GPU or else for any."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    named = f"--id=GPU-{uuid.removeprefix('GPU-')}"  # torch leaves the prefix out, nvidia-smi asks for it
    found = output_of([*query, named]) or output_of(query)
    return found.splitlines()[0] if found else None


def _cpu(threads: int | None) -> dict[str, Any]:
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "type": "cpu",
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "capability": compiled.LIBRARY.cpu_capability() if compiled.LIBRARY is not None else None,
        "cache_bytes": largest_cache(),
        "memory_bytes": memory_bytes("MemTotal"),
        "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
    }


def _versions() -> dict[str, Any]:
    triton = None
    with suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return {
        "versions": {
            "stgridpool_kernels": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton,
            "python": platform.python_version(),
            "library": compiled.LIBRARY.build_info() if compiled.LIBRARY is not None else None,
        }
    }


def _source() -> dict[str, Any]:
    """commit: of the checkout that this package is in, for a copy without history what STGP_COMMIT says, or None."""
    inside = output_of(["git", "rev-parse", "--show-toplevel"])
    in_checkout = inside is not None and Path(inside) == ROOT and (ROOT / "pyproject.toml").exists()
    changed = output_of(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]) if in_checkout else None
    return {
        "source": {
            "commit": output_of(["git", "rev-parse", "HEAD"]) if in_checkout else os.environ.get("STGP_COMMIT") or None,
            "dirty": None if changed is None else bool(changed),
            "package_sha256": _sha256(PACKAGE.rglob("*.py")),
            "library_sha256": _sha256(PACKAGE.glob("_C*.so")),
        }
    }


def _sha256(paths: Iterable[Path]) -> str | None:
    """The digest of all these files together, or None if there are none."""
    ordered = sorted(paths)
    return hashlib.sha256(b"".join(path.read_bytes() for path in ordered)).hexdigest() if ordered else None


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints, or None if it cannot be run."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return None


def largest_cache() -> int | None:
    """Bytes of the largest cache that the first core has a share in; None where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=None)


def memory_bytes(field: str) -> int | None:
    """MemTotal or MemAvailable of the machine, as far as the control group of this process leaves it; None where the
    system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)
    if found is None:
        return None
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = 0 if field == "MemTotal" else int((group / "memory.current").read_text())
        found = min(found, max(limit - used, 0))
    return found
