"""Fixtures that tests of several engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from stgridpool_kernels.integrations import base


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Record no gradient during a test."""
    with torch.no_grad():
        yield


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes every engine seem to be installed in a version."""
    absent = base.metadata.PackageNotFoundError

    def seem_installed(version: str) -> None:
        found = SimpleNamespace(version=lambda name: version, PackageNotFoundError=absent)
        monkeypatch.setattr(base, "metadata", found)

    return seem_installed
