"""The programs beside the tests on a GPU, without one: which configuration wins, and how counters are read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.benchmarks.rows import make_row

pytest.importorskip("triton", reason="no Triton")
from benchmarks.measure import LATE, LOST
from benchmarks.provider import Provider
from benchmarks.results import BenchRow, encode
from benchmarks.workloads import WORKLOADS
from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends.triton_kernels import config, launch, prepare_grid_pool
from stgridpool_kernels.backends.weighting import Weighting
from tools import gpu_bench
from tools.gpu_bench import COUNTERS, TUNED
from tools.gpu_check import Lines


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    (tmp_path / "results.jsonl").touch()
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # what is tested is no worker, whoever runs the test
    monkeypatch.setenv("STGP_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("STGP_SINCE", "0")
    return gpu_bench.results()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Everything that is timed, by shape and name. Gains of the two shapes are weighed against each other."""
    odd = {"": 100.0, "mosaic_cells=2": 80.0, "mosaic_cells=4": 70.0, "cells=4": 90.0}
    odd |= {"mosaic_cells=2 frame_cells=7": 79.8, "mosaic_cells=2 odd_registers=80": 200.0}
    odd |= {"mosaic_cells=2 stages=1": 60.0}
    even = {"": 50.0, "mosaic_cells=2": 50.0, "mosaic_cells=4": 65.0, "mosaic_cells=2 frame_cells=7": 50.0}
    even |= {"mosaic_cells=2 even_registers=128": 49.9, "mosaic_cells=2 stages=1": 50.0, "cells=4": 57.0}
    times, asked = dict(zip(TUNED, (odd, even), strict=True)), list[tuple[str, str]]()

    def measure(workload: Any, variants: list[Provider], *_: Any, **given: Any) -> list[BenchRow]:
        asked.extend((workload.name, variant.name) for variant in variants)
        return [make_row(v.name, times[workload.name].get(v.name.partition(" ")[2], 300.0)) for v in variants]

    monkeypatch.setattr(gpu_bench, "measure", measure)
    monkeypatch.setattr(gpu_bench, "open_device", lambda name: SimpleNamespace(torch_device="cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return asked


def found(lines: Lines, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines.read() if line["kind"] == kind]


def test_tuning_keeps_the_best_of_each_axis(lines: Lines, asked: list[tuple[str, str]]) -> None:
    """A row of the table of configurations is shown. The best so far is in the file after each axis."""
    gpu_bench.tune("triton")
    of_odd, of_even = ([name for shape, name in asked if shape == each] for each in TUNED)
    assert max(len(of_odd), len(of_even)) <= 12
    assert not any("even" in name for name in of_odd)
    assert not any("odd" in name for name in of_even)
    choices = [line["choice"] for line in found(lines, "tuned")]
    two = {"mosaic_cells": 2}
    assert choices == [two, two, two, two, {**two, "stages": 1}]
    last = found(lines, "tuned")[-1]
    assert last["us"] == dict(zip(TUNED, (60.0, 50.0), strict=True))
    row = eval(last["shown"].splitlines()[1].strip(" ,"), vars(config))
    assert (row.block, row.capability, row.config.mosaic_cells, row.config.stages) == (4096, (9, 0), 2, 1)
    like = config.fused_config(4096, 2, (9, 0))
    assert f"above Row(4096, 2, {next(r.capability for r in config.ROWS if r.config is like)}" in last["shown"]


def test_tuning_of_cuda(lines: Lines, asked: list[tuple[str, str]]) -> None:
    """A tenth faster on one shape and more than a tenth slower on the other is none."""
    gpu_bench.tune("cuda")
    assert {name for _, name in asked} == {
        "grid_pool:cuda",
        *(f"grid_pool:cuda cells={cells}" for cells in (1, 2, 4, 7)),
    }
    assert [line["choice"] for line in found(lines, "tuned")] == [{}]


def test_tuning_goes_on_without_what_was_wrong_or_ended_a_process(lines: Lines, asked: list[tuple[str, str]]) -> None:
    states = {"cells=1": LOST, "cells=2": "wrong: off by 3 ulp", "cells=4": "failed: RuntimeError", "cells=7": LATE}
    for name, check in states.items():
        lines.append(encode(make_row(f"grid_pool:cuda {name}", 1.0, workload=TUNED[0], check=check)))
    gpu_bench.tune("cuda")
    assert [name for shape, name in asked if shape == TUNED[0]] == ["grid_pool:cuda", "grid_pool:cuda cells=7"]


@pytest.mark.parametrize(
    ("frames", "arguments", "by_triton", "by_cuda"),
    [
        (64, {}, 5, 4),
        (8, {"ceil_mode": True}, 3, 2),
        (4, {"frame_strides": (1,)}, 2, 2),  # every frame is shrunk
        (7, {}, 1, 1),
        (64, {"frame_strides": ()}, 1, 1),
    ],
)
def test_number_of_launches(frames: int, arguments: dict[str, Any], by_triton: int, by_cuda: int) -> None:
    plan = grid_plan([frames], 27, 27, **arguments)
    x = torch.empty(frames, 27, 27, 64, device="meta")
    spec = launch.CallSpec(x, x.new_empty(frames, *plan.pooled_size, 64), plan, Weighting(1.0, 2.0, True, 64))
    assert gpu_bench.count_launches(plan, "triton") == by_triton == len(prepare_grid_pool(spec).launches)
    assert gpu_bench.count_launches(plan, "cuda") == by_cuda


def test_every_choice_is_prepared_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared call of another choice is not taken for one of this choice."""
    prepared: list[object] = []
    monkeypatch.setattr(launch, "run", lambda prepare, *given: prepared.append(prepare))
    workload = WORKLOADS[TUNED[0]]
    plan = workload.plan("grid_pool")
    x = torch.empty(*workload.shape, dtype=torch.bfloat16, device="meta")
    spec = launch.CallSpec(x, x.new_empty(len(x), *plan.pooled_size, x.shape[-1]), plan, Weighting(1.0, 2.0, True, 8))
    grids = []
    for choice in ({"mosaic_cells": 1}, {"mosaic_cells": 7}):
        variant = gpu_bench.variant(workload, "triton", choice)
        variant.call(x)
        variant.call(x)
        grids.append([one.grid for one in prepared[-1](spec).launches])
    assert prepared[0] is prepared[1] is not prepared[2] is prepared[3]
    assert [grid[-1] for grid in grids] == [(28, 14, 1), (28, 2, 1)]


def test_counters_are_read(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel, or one of its counters, may be missing."""
    rows = ["==PROF== Disconnected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for number in (1, 2, 3):
        rows += [f'"{number}","kernel","{metric}","byte","{number},000,000"' for metric in COUNTERS.values()]
    rows += [f'"4","kernel","{metric}","byte","(!) n/a"' for metric in COUNTERS.values()]
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: SimpleNamespace(stdout="\n".join(rows)))
    for provider, launches in (("grid_pool:triton", 2), ("norm_pool:triton", 1), ("grid_pool:cuda", 1)):
        counted = {"kind": "counted", "workload": TUNED[0], "provider": provider, "launches": launches}
        lines.append(json.dumps(counted))
    gpu_bench.counters("triton")
    counters = found(lines, "counters")
    assert [line["read"] for line in counters] == [3e6, 3e6, 0]
    assert counters[0]["shown"] == f"{TUNED[0]}, grid_pool:triton: 3.0 M read, 3.0 M written, 3.0 M instr."
    assert list(lines.states().values()) == ["passed", "passed", "failed: 0 kernels"]
