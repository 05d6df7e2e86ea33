"""Refusal to load the package a second time in a process."""

from __future__ import annotations


def refuse_second(registered: bool) -> None:
    """Raise ImportError if what a module registers with torch is there, as after a reload or purge of modules."""
    if registered:
        raise ImportError(
            "stgridpool_kernels is already loaded in this process, and torch registers its ops once: restart the "
            "process to load it again"
        )
