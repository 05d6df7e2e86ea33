"""Stand-ins for a GPU, for a rehearsal on a CPU: `tools.gpu_check --stand-ins tests.tools.gpu_stand_ins`.

Shapes are tiny. The Triton kernels run in Triton's interpreter, the CUDA kernels in their emulation. No time is taken:
every sample says the same. The tools in tests/gpu_tools run what they are given and report as the real ones do. What
pytest runs are a few tests that need no GPU.

STGP_FAULTS is a JSON object that gives providers faults, by name: "hangs", "dies", "wrong", or "sticky", an error after
which the device is of no use. What hangs says so in the file that STGP_HANGING names. Both are for tests, and so is
nothing else here.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["STGP_STAND_INS"] = __name__  # to the processes that are started
os.environ["OUT"] = os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu-check-")  # never among results that are kept

import torch
from torch import Tensor

from benchmarks import devices, machine, measure, providers
from benchmarks.devices import Call, Gpu, Sampler
from benchmarks.provider import Provider
from benchmarks.workloads import WORKLOADS
from stgridpool_kernels.backends import BACKENDS, compiled
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan.tables import plan_tables
from tests.support import cuda_emulation
from tests.support.interpreter import hasten_interpreter, repair_interpreter
from tools import gpu_bench, gpu_check

TOOLS = Path(__file__).with_name("gpu_tools")
KEPT = ("llava-video-0.5b", *gpu_bench.TUNED)
FAULTS: dict[str, str] = json.loads(os.environ.get("STGP_FAULTS", "{}"))


class StandIn(Gpu):
    """A CPU for a GPU, on which nothing takes time."""

    torch_device = "cpu"
    l2_bytes = 0
    useless = False

    def __init__(self, device: str = "cuda") -> None: ...

    def sampler(self, calls: Sequence[Call], captures: bool = True, warm: bool = False) -> tuple[Sampler, int]:
        for call in calls:
            call()
        return (lambda: 100.0), len(calls)

    def extra_peak_bytes(self, call: Callable[[], Tensor], result_bytes: int) -> tuple[int, Tensor]:
        return 0, call()

    def free_bytes(self) -> int | None:
        return None

    def finish(self) -> None:
        if StandIn.useless:
            raise RuntimeError("the device is of no use any more")


def faulty(provider: Provider) -> Provider:
    fault = FAULTS.get(provider.name)

    def call(x: Tensor, **given: Any) -> Tensor:
        if fault == "hangs":
            Path(os.environ["STGP_HANGING"]).write_text(str(os.getpgrp()))
            time.sleep(1000)
        elif fault == "dies":
            os.abort()
        elif fault == "sticky":
            StandIn.useless = True
            raise RuntimeError("an illegal memory access")
        return provider.call(x, **given).zero_()

    return provider if fault is None else replace(provider, call=call)


def describe(device: str, threads: int | None = None) -> dict[str, Any]:
    return describe_cpu("cpu") | {"device": {"type": "cuda", "name": "stand-in"}}


def run_emulated(op: Any, tensors: Sequence[Tensor], plan: Any, *rest: Any) -> None:
    *weighting, out, cells = rest
    cuda_emulation.run("grid_pool", tensors[0], plan_tables(plan), Weighting(*weighting), out, cells=cells)


repair_interpreter()
hasten_interpreter()
for name in list(WORKLOADS):
    if name in KEPT:
        size = (5, 7) if WORKLOADS[name].grid[0] % 2 else (4, 6)
        WORKLOADS[name] = replace(WORKLOADS[name], frame_counts=(8,), grid=size, channels=16)
    else:
        del WORKLOADS[name]
BACKENDS[[backend.name for backend in BACKENDS].index("cuda")] = cuda_emulation.backend()
every, describe_cpu = providers.providers, machine.describe
providers.providers = lambda *given: [faulty(provider) for provider in every(*given)]
measure.take_turns.__defaults__ = (0.0,)
devices.Gpu = StandIn
machine.describe = describe
compiled._run = run_emulated
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None
os.environ["PATH"] = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
gpu_check.TESTS = ("tests/plan/test_dataflow.py", "-k", "published")
