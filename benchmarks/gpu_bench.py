"""What `benchmarks.gpu_check` runs in processes of its own besides `stgp bench`: other configurations of the fused
kernel, small calls for a memory checker, large ones for a profiler."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import stgridpool_kernels as stgp
from stgridpool_kernels.bench.devices import Device, Gpu
from stgridpool_kernels.bench.machine import describe
from stgridpool_kernels.bench.measure import Effort, Expected, Racer, measure, new_run
from stgridpool_kernels.bench.providers import Provider, chosen, mismatch
from stgridpool_kernels.bench.results import Writer
from stgridpool_kernels.bench.workloads import WORKLOADS, Workload, random_tokens

# ---- other configurations ----

CHOICES: dict[str, dict[str, Any]] = {
    "as configured": {},
    "spread": {"spread": True},
    "mosaic_cells 2": {"mosaic_cells": 2},
    "mosaic_cells 7": {"mosaic_cells": 7},
    "spread, mosaic_cells 2": {"spread": True, "mosaic_cells": 2},
    "stages 1": {"stages": 1},
    "stages 3": {"stages": 3},
    "num_warps 4": {"num_warps": 4, "registers": 255},
    "num_warps 16": {"num_warps": 16},
    "registers 168": {"registers": 168},
}
"""What the fused kernel may do otherwise (`triton_kernels.config.FusedConfig`)."""

TUNED = ("llava-video-7b", "llava-next-video-7b")
"""The two main shapes, one with odd sizes and one with even ones."""


def variants(workload: Workload) -> list[Provider]:
    """grid_pool as configured and with every other choice."""
    (grid_pool,) = chosen(workload, "cpu", ["grid_pool:reference"])
    ulps = 2 if workload.dtype.itemsize == 2 else 64
    return [
        replace(grid_pool, name=name, call=_with_choice(workload, name), ulps=ulps, takes_out=True, memory=0.5)
        for name in CHOICES
    ]


def _with_choice(workload: Workload, name: str) -> Callable[..., Tensor]:
    from stgridpool_kernels import device_tables, triton_kernels
    from stgridpool_kernels.triton_kernels import fused, launch

    plan, configured = workload.plan("grid_pool"), fused.fused_config
    prepared: list[launch.Call] = []

    def call(x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = x.new_empty((x.shape[0], *plan.pooled_size, x.shape[3]))
        if not prepared:
            device_tables._tables.clear()  # with another configuration, other tables belong to the plan
            with patch.object(fused, "fused_config", lambda *given: replace(configured(*given), **CHOICES[name])):
                prepared.append(triton_kernels.prepare("grid_pool", x, plan, (1.0, 2.0, True), out))
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        prepared[0](x, out, stream, x.is_cuda and torch.cuda.is_current_stream_capturing())
        return out

    return call


def tune(rows: Path, device: Device) -> None:
    """Appends a run of every configuration on both shapes to `rows`."""
    writer = Writer(rows)
    run = new_run(describe(device.torch_device), {"tune": True}, {})
    writer.write(run)
    for name in TUNED:
        workload = WORKLOADS[name]
        for row in measure(workload, variants(workload), device, run.run, baseline="as configured", effort=Effort()):
            writer.write(row)
    writer.close()


# ---- small calls ----

SMALL_CALLS_RIGHT = "small calls: all right"

SMALL_CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("grid_pool", {}),
    ("grid_pool", {"ceil_mode": True, "norm_type": 1.0, "frame_counts": (20, 12)}),
    ("grid_pool", {"frame_strides": (1, 3), "grid_shape": (1, 2), "kernel_size": 3, "stride": 2, "padding": 1}),
    ("grid_pool", {"resize": "bilinear", "sampling": "first", "output_size": (3, 3)}),
    ("temporal_grid", {}),
    ("norm_pool", {}),
    ("norm_pool", {"kernel_size": 2, "padding": 1, "norm_type": 3.0}),
    ("token_norm", {}),
    ("token_norm", {"norm_type": math.inf}),
)
WIDE_CALLS: tuple[tuple[str, dict[str, Any]], ...] = (("grid_pool", {"frame_strides": (1, 2)}), ("norm_pool", {}))
SMALL_INPUTS = (
    ((32, 9, 7, 100), torch.bfloat16, SMALL_CALLS),
    ((32, 6, 8, 64), torch.float32, SMALL_CALLS[:2]),
    ((8, 5, 5, 3584), torch.bfloat16, WIDE_CALLS),
    ((8, 4, 5, 9000), torch.bfloat16, WIDE_CALLS),
)
"""Odd and even sizes; several warps to a token; more channels than registers hold."""


def run_small_calls() -> None:
    """Small calls of every op, and gradients, compared with the reference on the CPU: for a memory checker to watch."""
    for shape, dtype, calls in SMALL_INPUTS:
        x = random_tokens(shape, dtype, "cpu", 0)
        on_device = x.cuda()
        for op, arguments in calls:
            expected = getattr(stgp, op)(x, backend="reference", **arguments)
            for backend in {"triton", "cuda"} & set(stgp.available_backends()):
                found = getattr(stgp, op)(on_device, backend=backend, **arguments).cpu()
                reason = mismatch(found, expected, 2 if found.dtype == torch.bfloat16 else 64)
                if reason is None and op != "token_norm":  # whose gradient is the reference's
                    wanted = small_gradient(op, x, "reference", arguments)
                    found = small_gradient(op, on_device, backend, arguments).cpu()
                    reason = mismatch(found, wanted, 8 if found.dtype == torch.bfloat16 else 64)
                    reason = reason and f"the gradient is {reason}"
                if reason is not None:
                    sys.exit(f"{op} of {shape} {dtype} with {arguments} by {backend}: {reason}")
    print(SMALL_CALLS_RIGHT)


def small_gradient(op: str, x: Tensor, backend: str, arguments: dict[str, Any]) -> Tensor:
    """In x, where that of the result is random."""
    leaf = x.detach().requires_grad_()
    result = getattr(stgp, op)(leaf, backend=backend, **arguments)
    grad = random_tokens(result.shape, result.dtype, "cpu", 1).to(x.device)
    return torch.autograd.grad(result, leaf, grad)[0]


# ---- counted calls ----

COUNTED_CALLS = 3
COUNTED = ("grid_pool:triton", "norm_pool:triton", "grid_pool_backward:triton")
COUNTED_ON = "llava-video-7b"


def run_counted_calls(provider: str, device: Device) -> None:
    """COUNTED_CALLS calls on as many inputs, between profiler marks: for a profiler to count bytes of."""
    workload = WORKLOADS[COUNTED_ON]
    (found,) = chosen(workload, device.type, [provider])
    xs = [random_tokens(workload.shape, workload.dtype, device.torch_device, seed) for seed in range(COUNTED_CALLS)]
    racer = Racer(found, xs, found.takes_out, Expected(xs))
    racer.run()
    racer.check()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in racer.calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tune", help="time configurations, one JSON line per row").add_argument("rows", type=Path)
    commands.add_parser("small", help="a few small calls of every op")
    commands.add_parser("counted", help="a few large calls of one op").add_argument("provider", choices=COUNTED)
    given = parser.parse_args(arguments)
    if given.command == "tune":
        tune(given.rows, Gpu())
    elif given.command == "small":
        run_small_calls()
    else:
        run_counted_calls(given.provider, Gpu())


if __name__ == "__main__":
    main()
