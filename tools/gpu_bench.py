"""Programs of `tools.gpu_check` besides tests: `python -m tools.gpu_bench bench … | tune … | counters …`.

They append to the file that STGP_RESULTS names. As a plugin of pytest this has every test there, as lost before it
begins and as it went, and passes over what the file has from byte STGP_SINCE on, where an earlier process has been.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.devices import open_device
from benchmarks.machine import new_run
from benchmarks.measure import LOST, QUICK, measure
from benchmarks.provider import Provider
from benchmarks.providers import chosen
from benchmarks.results import encode
from benchmarks.workloads import WORKLOADS, Workload, random_tokens
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.backends.triton_kernels import config, launch, prepare_grid_pool
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan import GridPlan
from stgridpool_kernels.plan.tables import plan_tables, stages_of
from tools.compile_report import configured
from tools.gpu_check import AXES, Lines

TUNED = ("llava-video-7b", "llava-next-video-7b")
"""The two main shapes, one with odd sizes and one with even ones, which share a row of the table of configurations."""
COUNTERS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum", "instr.": "smsp__inst_executed.sum"}


def results() -> Lines:
    return Lines(Path(os.environ["STGP_RESULTS"]), int(os.environ["STGP_SINCE"]))


def bench(*arguments: str) -> None:
    """Run `python -m benchmarks run` in this process, which ends with its exit code."""
    sys.exit(importlib.import_module("benchmarks.__main__").main(["run", *arguments]))


def tune(backend: str) -> None:
    """Try one axis at a time, in turns with the best choice so far, which another has to beat by half a percent."""
    device, lines, best = open_device("cuda"), results(), dict[str, Any]()
    how = {"baseline": "copy", "effort": QUICK, "report": lambda row: lines.append(encode(row)), "extras": False}
    run = new_run(device.torch_device, {"quick": True, "tune": True})
    lines.append(encode(run))
    for axis, values in (AXES if backend == "triton" else {"cells": [1, 2, 4, 7]}).items():
        choices, times = [best, *(best | {axis: value} for value in values)], dict[str, list[float]]()
        for workload in (WORKLOADS[name] for name in TUNED):
            if not axis.startswith("even_" if workload.grid[1] % 2 else "odd_"):
                variants = [variant(workload, backend, choice) for choice in choices]
                bad = [name for name, state in lines.states().items() if state.startswith(("failed", "wrong"))]
                timed = [each for each in variants if f"{workload.name} {each.name}" not in bad]
                rows = measure(workload, timed, device, run.run, **how)
                found = {row.provider: row.p50_us or math.inf for row in rows}
                times[workload.name] = [found.get(each.name, math.inf) for each in variants]
        together = [math.prod(each) for each in zip(*times.values(), strict=True)]
        together[0] *= 0.995 ** len(times)
        number = together.index(min(together))
        best, us = choices[number], {name: round(each[number], 1) for name, each in times.items()}
        shown = f"{backend}, after {axis}: us {us} with {best or 'the configuration as it is'}"
        found = {"kind": "tuned", "provider": f"grid_pool:{backend}", "choice": best, "us": us}
        lines.append(json.dumps(found | {"shown": shown + configuration_row(best, us) * (backend == "triton")}))


def variant(workload: Workload, backend: str, choice: dict[str, Any]) -> Provider:
    """Return grid_pool by a choice of configuration."""
    (like,) = chosen(workload, "cpu", ["grid_pool:reference"])
    plan, name = workload.plan("grid_pool"), f"grid_pool:{backend}"
    name = " ".join([name, *(f"{axis}={value}" for axis, value in choice.items())])

    def prepare(spec: launch.CallSpec) -> launch.PreparedCall:  # part of the key of a prepared call, so one per choice
        with configured(choice):
            return prepare_grid_pool(spec)

    def call(x: Tensor, out: Tensor | None = None) -> Tensor:
        out = x.new_empty((len(x), *plan.pooled_size, x.shape[-1])) if out is None else out
        weighting = Weighting(1.0, 2.0, True, x.shape[-1])
        if backend == "cuda":
            op, cells = torch.ops.stgp._grid_pool_by_tables.default, choice.get("cells", 0)
            compiled._run(op, (x,), plan, *weighting, out, cells)
        else:
            launch.run(prepare, x, out, plan, weighting)
        return out

    return replace(like, name=name, call=call, ulps=2, takes_out=True, captures=True, memory=0.5)


def configuration_row(choice: dict[str, Any], us: dict[str, float]) -> str:
    """Return a row of triton_kernels/config.py for this GPU and the larger shape, and its place in the table."""
    capability, channels = torch.cuda.get_device_capability(), max(WORKLOADS[name].channels for name in TUNED)
    like = next(row for row in config.ROWS if row.block >= channels and capability >= row.capability)
    row = replace(like, capability=capability, config=replace(like.config, **choice), reason=f"us: {us}")
    return f"\n    {row},\n    # above Row({like.block}, {like.bytes}, {like.capability}, ...)"


def counters(backend: str) -> None:
    """Run `counted` under ncu and append what ncu counted, provider by provider."""
    command = ["ncu", "--clock-control", "none", "--cache-control", "none", "--csv"]
    command += ["--profile-from-start", "off", "--print-units", "base", "--metrics", ",".join(COUNTERS.values())]
    command += [sys.executable, "-m", "tools.gpu_bench", "counted", backend]
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    print(report)
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in report.splitlines() if line.startswith('"')):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        with suppress(ValueError):  # what cannot be counted is no number
            kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    left, lines = [each for each in kernels.values() if each.keys() >= set(COUNTERS.values())], results()
    for line in [line for line in lines.read() if line.get("kind") == "counted"]:
        mine, left = left[: line["launches"]], left[line["launches"] :]
        sums = {name: sum(kernel[metric] for kernel in mine) for name, metric in COUNTERS.items()}
        shown = ", ".join(f"{value / 1e6:.1f} M {name}" for name, value in sums.items())
        more = {"kind": "counters", "kernels": mine, "shown": f"{line['workload']}, {line['provider']}: {shown}"}
        lines.append(json.dumps(line | sums | more))
        report_test(line["provider"], "passed" if len(mine) == line["launches"] else f"failed: {len(mine)} kernels")


def count_launches(plan: GridPlan, backend: str) -> int:
    """Return the number of kernels that grid_pool by a plan with the published windows and grids launches.

    That is one a stage of the tables. Triton has two for frames of which some are shrunk and others are not.
    """
    stages = stages_of(plan_tables(plan))
    both = backend == "triton" and 0 < stages[0].shrunk < stages[0].num_entries
    return len(stages) + both


def counted(backend: str) -> None:
    """Call each provider between profiler marks, after other calls, and append how many kernels it launches."""
    device, lines, workload = open_device("cuda"), results(), WORKLOADS[TUNED[0]]
    xs = [random_tokens(workload.shape, workload.dtype, device.torch_device, seed) for seed in range(3)]
    for provider in chosen(workload, device.type, [f"norm_pool:{backend}", f"grid_pool:{backend}"]):
        outs = [provider.call(x) for x in xs]
        device.finish()
        torch.cuda.profiler.start()
        provider.call(xs[0], out=outs[0])
        device.finish()
        torch.cuda.profiler.stop()
        bound, launches = workload.bound(provider.op), count_launches(workload.plan(provider.op), backend)
        found = {"kind": "counted", "workload": workload.name, "provider": provider.name, "launches": launches}
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


def report_test(name: str, check: str) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # what workers report comes to the process that started them
        results().append(json.dumps({"kind": "test", "name": name, "check": check}))


if os.environ.get("STGP_STAND_INS"):
    importlib.import_module(os.environ["STGP_STAND_INS"])

if __name__ == "__main__":
    from tools import gpu_bench  # which stand-ins have changed

    getattr(gpu_bench, sys.argv[1])(*sys.argv[2:])
