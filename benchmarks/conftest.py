"""Fixture of the device that microbenchmarks run on: a GPU if there is one, else the CPU with pinned threads."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # OpenMP reads these when torch loads it
os.environ.setdefault("OMP_PLACES", "cores")

import pytest

from benchmarks.devices import Device, open_device


@pytest.fixture(scope="session")
def device() -> Device:
    return open_device(None)
