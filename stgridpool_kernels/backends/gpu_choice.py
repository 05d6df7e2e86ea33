"""Choice of `auto` between the backends triton and cuda, from one table.

A row that was measured names its file of results. Until then the backend is taken whose kernels execute fewer warp
instructions, as `python -m tools.compile_report` counts them; where they are equal or nobody counted, it is triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..plan import GridPlan


@dataclass(frozen=True)
class Row:
    """A choice for grid_pool, norm_pool and their gradients at the settings of the fused kernels.

    capability: lowest compute capability that it is for. bytes: number of bytes of a value of x. channels: lowest and
    highest number of channels. odd: whether the frames have an odd width, None for any. backend: name of the backend.
    reason: grounds for it, which `stgp info` shows.
    """

    capability: tuple[int, int]
    bytes: int
    channels: tuple[int, int]
    odd: bool | None
    backend: str
    reason: str


_COUNTED = "fewer warp instructions: counted for bfloat16 and float32 up to 4096 channels (docs/kernels.md)"

ROWS = (
    Row((9, 0), 2, (513, 8192), None, "cuda", _COUNTED),
    Row((9, 0), 4, (2049, 4096), True, "cuda", _COUNTED),
    Row((9, 0), 4, (513, 8192), False, "cuda", _COUNTED),
)
"""Choices in order: the first row that fits a call is used, if its backend can run here."""

OTHERS = Row((0, 0), 0, (1, 1 << 62), None, "triton", "counted: no fewer warp instructions in cuda, or not counted")
"""Choice for a call that no row fits."""


def choose(x: Tensor, plan: GridPlan | None, norm_type: float) -> Row:
    """Return the row for a call on a CUDA tensor. plan: None for token_norm. norm_type: p; rows are for p = 2.

    A backward has the row of its forward, since it has the same arguments.
    """
    if plan is None or not plan.fusable or norm_type != 2.0 or torch.version.hip is not None:
        return OTHERS
    return find_row(torch.cuda.get_device_capability(x.device), x.element_size(), x.shape[-1], plan.width % 2 == 1)


@cache
def find_row(capability: tuple[int, int], value_bytes: int, channels: int, odd: bool) -> Row:
    """Return the first row of `ROWS` that fits, or `OTHERS`."""
    fits = (
        row
        for row in ROWS
        if capability >= row.capability
        and value_bytes == row.bytes
        and row.channels[0] <= channels <= row.channels[1]
        and row.odd in (None, odd)
    )
    return next(fits, OTHERS)
