"""What `benchmarks.gpu_check` runs besides tests: `python -m benchmarks.gpu_bench tune BACKEND | counted | bench …`.

They append to the file that STGP_RESULTS names. As a plugin of pytest this has every test there, as lost before it
begins and as it went, and passes over what the file has from byte STGP_SINCE on, where an earlier process has been.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from stgridpool_kernels import cli, compiled, triton_kernels
from stgridpool_kernels.bench.devices import Device, Gpu
from stgridpool_kernels.bench.machine import describe
from stgridpool_kernels.bench.measure import LOST, QUICK, measure, new_run
from stgridpool_kernels.bench.providers import Provider, chosen
from stgridpool_kernels.bench.results import encode
from stgridpool_kernels.bench.workloads import WORKLOADS, Workload, random_tokens
from stgridpool_kernels.schedule import Schedule
from stgridpool_kernels.triton_kernels import config, fused

from .gpu_check import Lines

TUNED = ("llava-video-7b", "llava-next-video-7b")
"""The two main shapes, one with odd sizes and one with even ones."""

COUNTED = ("grid_pool:triton", "norm_pool:triton", "grid_pool:cuda", "norm_pool:cuda")
Choice = dict[str, Any]
new_device: Callable[[], Device] = Gpu


def results() -> Lines:
    return Lines(Path(os.environ["STGP_RESULTS"]), int(os.environ["STGP_SINCE"]))


def bench(*arguments: str) -> None:
    """`stgp bench`"""
    sys.exit(cli.main(["bench", *arguments]))


def axes(backend: str, odd: bool) -> dict[str, tuple[Any, ...]]:
    """What may be chosen besides the configuration as it is, in the order of the gain that is expected."""
    if backend == "cuda":
        return {"cells": (1, 2, 4, 7)}
    of_width = {"odd_registers": (80,), "stages": (1,)} if odd else {"even_registers": (128,)}
    return {"spread": (True,), "mosaic_cells": (2, 3, 5, 7), **of_width, "frame_cells": (5 if odd else 2,)}


def tune(backend: str) -> None:
    """One axis at a time, from the best choice so far, in turns with it; another one has to gain half a percent."""
    device, lines = new_device(), results()
    for name in TUNED:
        workload, best, us = WORKLOADS[name], Choice(), math.inf
        for axis, values in axes(backend, workload.grid[1] % 2 == 1).items():
            choices = [best, *(best | {axis: value} for value in values)]
            states = lines.states()
            variants = {variant(workload, backend, choice): choice for choice in choices}
            timed = [each for each in variants if states.get(f"{name} {each.name}") != LOST]
            run = new_run(describe(device.torch_device), {"quick": True, "tune": True}, {})
            lines.append(encode(run))
            report = lambda row: lines.append(encode(row))  # noqa: E731
            rows = measure(workload, timed, device, run.run, baseline="copy", effort=QUICK, report=report, extras=False)
            times = {row.provider: row.p50_us or math.inf for row in rows}
            gain = {each: 0.995 if choice == best else 1.0 for each, choice in variants.items()}
            fastest = min(variants, key=lambda each: times.get(each.name, math.inf) * gain[each])
            best, us = variants[fastest], times.get(fastest.name, math.inf)
        shown = f"{name}, {backend}: {us:.1f} us with {best or 'the configuration as it is'}"
        row = f"\n    {configuration_row(workload, best, f'{us:.1f} us for {name}')}," if backend == "triton" else ""
        lines.append(json.dumps({"kind": "tuned", "workload": name, "choice": best, "us": us, "shown": shown + row}))


def variant(workload: Workload, backend: str, choice: Choice) -> Provider:
    """grid_pool by a choice of configuration."""
    (like,) = chosen(workload, "cpu", ["grid_pool:reference"])
    plan, configured, prepared = workload.plan("grid_pool"), fused.fused_config, list[Any]()

    def call(x: Tensor, out: Tensor | None = None) -> Tensor:
        out = x.new_empty((len(x), *plan.pooled_size, x.shape[-1])) if out is None else out
        if backend == "cuda":
            op, cells = torch.ops.stgp._grid_pool_by_tables.default, choice.get("cells", 0)
            compiled._run(op, (x,), plan, Schedule.of, 1.0, 2.0, True, out, cells)
            return out
        if not prepared:
            with patch.object(fused, "fused_config", lambda *given: replace(configured(*given), **choice)):
                prepared.append(triton_kernels.prepare("grid_pool", x, plan, (1.0, 2.0, True), out))
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        prepared[0](x, out, stream, x.is_cuda and torch.cuda.is_current_stream_capturing())
        return out

    name = " ".join([f"grid_pool:{backend}", *(f"{axis}={value}" for axis, value in choice.items())])
    return replace(like, name=name, call=call, ulps=2, takes_out=True, captures=True, memory=0.5)


def configuration_row(workload: Workload, choice: Choice, reason: str) -> config.Row:
    """A row of triton_kernels/config.py for this GPU."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    like = next(row for row in config.ROWS if row.block >= workload.channels and capability >= row.capability)
    return replace(like, capability=capability, config=replace(like.config, **choice), reason=reason)


def counted() -> None:
    """A call of each provider between profiler marks, after others, and how many kernels it launches."""
    device, lines, workload = new_device(), results(), WORKLOADS[TUNED[0]]
    xs = [random_tokens(workload.shape, workload.dtype, device.torch_device, seed) for seed in range(3)]
    for provider in chosen(workload, device.type, COUNTED):
        outs = [provider.call(x) for x in xs]
        device.finish()
        torch.cuda.profiler.start()
        provider.call(xs[0], out=outs[0])
        device.finish()
        torch.cuda.profiler.stop()
        bound, levels = workload.bound(provider.op), Schedule.of(workload.plan(provider.op)).by_level()
        found = {"kind": "counted", "workload": workload.name, "provider": provider.name, "launches": 1 + len(levels)}
        lines.append(json.dumps(found | {"bound_read": bound.read_bytes, "bound_write": bound.write_bytes}))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = results().states()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    report_test(nodeid, LOST)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        said = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
        report_test(report.nodeid, ": ".join([report.outcome, *said])[:300])
        if report.failed and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(70)  # no test after this one could pass in this process


def report_test(name: str, outcome: str) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # what workers report comes to the process that started them
        results().append(json.dumps({"kind": "test", "name": name, "outcome": outcome}))


if os.environ.get("STGP_STAND_INS"):
    importlib.import_module(os.environ["STGP_STAND_INS"])

if __name__ == "__main__":
    from benchmarks import gpu_bench  # which stand-ins have changed

    {"tune": gpu_bench.tune, "counted": gpu_bench.counted, "bench": gpu_bench.bench}[sys.argv[1]](*sys.argv[2:])
