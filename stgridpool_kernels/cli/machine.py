"""The processor's name and its use by other processes, for reports of times and of the installation."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def cpu_name() -> str:
    """Return the model name that the operating system gives, or else its name of the architecture."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else str(device)


def threads_of(device: torch.device) -> str:
    """Return torch's number of threads as the end of a list, ", 4 threads", for a CPU; empty for another device."""
    count = torch.get_num_threads()
    return f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""


QUIET_CORES = 0.1
"""Number of cores that other processes may use without a noticeable effect on times."""


def others_cores() -> Callable[[], float]:
    """Return a function that returns the mean number of cores used since now by others, with the hypervisor."""
    before = _cpu_seconds()

    def used() -> float:
        wall, own, busy = (b - a for a, b in zip(before, _cpu_seconds(), strict=True))
        return round(max(busy - own, 0.0) / max(wall, 1e-9), 3)

    return used


def busy_note(cores: float) -> str:
    """Return a note on the cores that others used meanwhile, empty if the machine was quiet."""
    return f"NOT QUIET: others used up to {cores:.2f} cores meanwhile" if cores > QUIET_CORES else ""


def _cpu_seconds() -> tuple[float, float, float]:
    """Return wall time, CPU time of this process, and CPU time of all processes and the hypervisor, in seconds.

    The last is 0 if the system has no /proc/stat.
    """
    busy = 0.0
    with suppress(OSError):
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = (int(t) / os.sysconf("SC_CLK_TCK") for t in fields[1:9])
        busy = user + nice + system + irq + softirq + steal
    return time.perf_counter(), time.process_time(), busy
