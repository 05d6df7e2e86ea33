"""Description of the machine, the versions and the source that results belong to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import stgridpool_kernels
from benchmarks.results import Run
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.cli.machine import cpu_name
from stgridpool_kernels.version import __version__

PACKAGE = Path(stgridpool_kernels.__file__).parent
ROOT = Path(__file__).parents[1]


def new_run(device: str, settings: dict[str, Any], threads: int | None = None) -> Run:
    """Return a run that begins now. device: "cpu", "cuda" or "cuda:N". threads: of the CPU, by default torch's."""
    now = datetime.now(timezone.utc)
    name = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    return Run(name, now.isoformat(timespec="seconds"), **describe(device, threads), settings=settings)


def describe(device: str, threads: int | None = None) -> dict[str, Any]:
    """Return the device, versions and source of a `Run`."""
    properties = _gpu(device) if device.startswith("cuda") else _cpu(threads)
    return {"device": properties, "versions": _versions(), "source": _source()}


def _gpu(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.device(device).index or 0)
    drivers = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or ""
    return {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": next(iter(drivers.splitlines()), None),  # all GPUs of a machine share it
    }


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
    return {
        "stgridpool_kernels": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "python": platform.python_version(),
        "library": compiled.LIBRARY.build_info() if compiled.LIBRARY is not None else None,
    }


def installed(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _source() -> dict[str, Any]:
    """Return the commit of this checkout, or STGP_COMMIT in a copy without history, and digests of the package."""
    top = output_of(["git", "rev-parse", "--show-toplevel"])
    in_checkout = top is not None and Path(top) == ROOT
    changed = output_of(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]) if in_checkout else None
    return {
        "commit": output_of(["git", "rev-parse", "HEAD"]) if in_checkout else os.environ.get("STGP_COMMIT") or None,
        "dirty": None if changed is None else bool(changed),
        "package_sha256": _sha256(PACKAGE.rglob("*.py")),
        "library_sha256": _sha256(PACKAGE.glob("_C*.so")),
    }


def _sha256(paths: Iterable[Path]) -> str | None:
    """Return one digest of all files, None if there are none."""
    ordered = sorted(paths)
    return hashlib.sha256(b"".join(path.read_bytes() for path in ordered)).hexdigest() if ordered else None


def output_of(command: Sequence[str]) -> str | None:
    """Return the standard output of a command, None if it fails or does not exist."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return None


def largest_cache() -> int | None:
    """Return the size in bytes of the largest cache of the first core, None if the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=None)


def memory_bytes(field: str) -> int | None:
    """Return MemTotal or MemAvailable in bytes, limited by the process's control group, None if it is not reported."""
    found = field_bytes("/proc/meminfo", field)
    if found is None:
        return None
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = 0 if field == "MemTotal" else int((group / "memory.current").read_text())
        found = min(found, max(limit - used, 0))
    return found


def field_bytes(file: str, field: str) -> int | None:
    """Return a number of kB in a file of /proc, as in "MemTotal: 1000 kB", in bytes; None if it is not reported."""
    with suppress(OSError):
        found = re.search(rf"^{field}:\s*(\d+) kB$", Path(file).read_text(), re.MULTILINE)
        return int(found[1]) << 10 if found else None
    return None
