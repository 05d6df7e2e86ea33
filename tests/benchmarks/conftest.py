"""Fixtures for tests that measure on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import devices
from benchmarks.devices import Cpu
from benchmarks.measure import take_turns


@pytest.fixture
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU empty no caches, and let it not warm up."""
    monkeypatch.setattr(take_turns, "__defaults__", (0.0,))
    monkeypatch.setattr(devices, "largest_cache", lambda: 0)
    monkeypatch.setattr(Cpu, "evict", lambda device: None)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set the folder of caches to a temporary one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield
