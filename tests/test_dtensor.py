"""The ops on DTensors, in four processes that talk over gloo: bit by bit the result of one process."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from tests.support import sharded_calls


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What went wrong, by case, in every process."""
    folder = tmp_path_factory.mktemp("processes")
    # imported once for all processes
    multiprocessing.set_forkserver_preload([sharded_calls.__name__, "torch.fx.experimental.symbolic_shapes"])
    torch.multiprocessing.start_processes(
        sharded_calls.run, (str(folder),), nprocs=sharded_calls.WORLD, start_method="forkserver"
    )
    return [json.loads(Path(folder, f"outcomes-{rank}.json").read_text()) for rank in range(sharded_calls.WORLD)]


@pytest.mark.parametrize("name", sharded_calls.CASES)
def test_sharded(outcomes: list[dict[str, str | None]], name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] is None, f"process {rank}: {outcome[name]}"
