"""For the microbenchmarks: the device that they run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.devices import Cpu, Device, Gpu


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    if torch.cuda.is_available():
        yield Gpu()
        return
    cpu = Cpu()
    yield cpu
    cpu.close()
