"""The sets of vector instructions of the compiled CPU kernels, and a context manager that restores the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from stgridpool_kernels.backends import compiled


def known() -> list[str]:
    return [] if compiled.LIBRARY is None else compiled.LIBRARY.build_info()["cpu capabilities"].split(", ")


@contextmanager
def restored() -> Iterator[None]:
    """Restore the set of instructions in use, and the number of threads, after the block."""
    before, threads = compiled.LIBRARY.cpu_capability(), torch.get_num_threads()
    try:
        yield
    finally:
        compiled.LIBRARY.use_cpu_capability(before)
        torch.set_num_threads(threads)


def usable() -> list[str]:
    """Return the sets of instructions that the library contains and this CPU supports."""
    found = []
    for name in known():
        with restored(), suppress(ValueError):
            compiled.LIBRARY.use_cpu_capability(name)
            found.append(name)
    return found
