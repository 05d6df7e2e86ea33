"""The name of the processor, for reports of times and of the installation."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path


def cpu_name() -> str:
    """Return the model name that the operating system gives, or else its name of the architecture."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
