"""Providers: functions that are timed on a workload, with the definitions that their results are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.lower_bound import Traffic

Pool = Callable[[Tensor], Tensor]

SEGMENT = 32
"""Number of frames of the longest segment at the published settings."""


@dataclass(frozen=True)
class Provider:
    """A function `call(x)`, or `call(x, out=…)` if it takes_out, whose result is compared with definition(x).

    op: the op whose lower bound is the traffic of a call, unless `moved` gives the traffic. ulps: tolerance, in units
    in the last place of the largest value. checked: function that is compared in place of `call`, if a call computes a
    part only or several results are right. period: number of successive calls that differ; samples are whole periods of
    them. memory: bytes that a call needs besides x, as a multiple of the bytes of x. compiles: whether the first call
    takes long. captures: whether a CUDA graph can capture a call. slow: whether a call takes seconds on large tokens.
    inference: whether calls are timed in inference mode. state_bytes: returns the bytes that the provider keeps between
    calls. note: remark below the table. settings: settings that distinguish the provider from others of its workload.
    """

    name: str
    op: str
    call: Callable[..., Tensor]
    definition: Pool
    ulps: float
    takes_out: bool = False
    checked: Pool | None = None
    moved: Traffic | None = None
    period: int = 1
    compiles: bool = False
    captures: bool = True
    slow: bool = False
    inference: bool = False
    memory: float = 1.0
    state_bytes: Callable[[], int] | None = None
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """Error with the check, "wrong: …" or "skipped: …", of a provider that is not timed."""


def mismatch(result: Tensor, expected: Tensor, ulps: float) -> str | None:
    """Return why a result is not the expected one, None if it is. All values are compared, a segment at a time."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{tuple(result.shape)} {result.dtype} in place of {tuple(expected.shape)} {expected.dtype}"
    if result.numel() == 0:
        return None
    pairs = zip(result.flatten(0, -4).split(SEGMENT), expected.flatten(0, -4).split(SEGMENT), strict=True)
    found = [((a.float() - b.float()).abs().max().item(), b.abs().max().item()) for a, b in pairs]
    worst = max((error for error, _ in found), key=lambda error: (math.isnan(error), error))
    scale = max(largest for _, largest in found)
    allowed = ulps * torch.finfo(expected.dtype).eps * 2.0 ** (math.frexp(scale)[1] - 1)
    return None if worst <= allowed else f"off by {worst:.3g}, {allowed:.3g} is allowed"
