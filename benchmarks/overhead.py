"""Providers of calls on a video without frames, which take the time that a call costs besides its kernel.

They stand next to an empty op, which is written in Python like the package's ops and has the schema of grid_pool, an
autograd kernel, and a kernel that returns new memory. It checks nothing and chooses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.provider import Provider
from benchmarks.workloads import WORKLOADS, Workload
from stgridpool_kernels import functional
from stgridpool_kernels.ops import ARGUMENTS

EMPTY = WORKLOADS["empty"]
RESULT = (EMPTY.frames, *EMPTY.plan("grid_pool").pooled_size, EMPTY.channels)
"""Shape of the result of grid_pool on the workload."""


def overheads(workload: Workload, device: str) -> list[Provider]:
    """Return providers of grid_pool as an op, in inference mode and as a function, and of the empty op.

    Raises ValueError unless the workload is "empty", of any dtype.
    """
    if (workload.shape, workload.settings) != (EMPTY.shape, {}):
        raise ValueError(f'the overhead of calls is timed on the workload "empty", got {workload.name}')
    calls: dict[str, Any] = {
        "empty:op": torch.ops.stgp.grid_pool,
        "empty:op, inference mode": torch.ops.stgp.grid_pool,
        "empty:function": functional.grid_pool,
        "empty:python op": torch.ops.stgp_benchmarks.empty,
    }
    return [
        Provider(name, "grid_pool", call, _result, ulps=0, captures=False, inference="inference mode" in name)
        for name, call in calls.items()
    ]


def _result(x: Tensor, **given: Any) -> Tensor:
    return x.new_empty(RESULT)


_library = torch.library.Library("stgp_benchmarks", "DEF")
_library.define(f"empty(Tensor x, *, {ARGUMENTS['grid_pool']}) -> Tensor")
_op: Any = torch.ops.stgp_benchmarks.empty.default


def _autograd(keyset: Any, x: Tensor, **given: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _op.redispatch(keyset & torch._C._after_autograd_keyset, x, **given)


_library.impl("empty", _autograd, "Autograd", with_keyset=True)
_library.impl("empty", _result, "CompositeExplicitAutograd")
