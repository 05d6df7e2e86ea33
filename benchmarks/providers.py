"""The providers of every kind of workload, and the choice of those that are timed."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from benchmarks import overhead, poolings, prefill, pruning, stream
from benchmarks.provider import Provider
from benchmarks.workloads import Workload

BASELINE = "avg_pool2d"
"""Provider whose time others are compared with by default."""
BASELINES = {"empty": "empty:python op"}
"""Default providers of that kind, for kinds of workloads that have others than `BASELINE`."""
PATIENCE_BYTES = 100_000_000
"""Maximum size of the tokens in bytes for which slow providers are timed by default."""

PROVIDERS = {
    "pooling": poolings.poolings,
    "plain": poolings.plain,
    "gradients": poolings.gradients,
    "stream": stream.pushes,
    "prefill": prefill.prefills,
    "pruning": pruning.prunings,
    "empty": overhead.overheads,
}


def providers(workload: Workload, device: str) -> list[Provider]:
    """Return all providers of a workload on a device ("cpu" or "cuda")."""
    return PROVIDERS[workload.kind](workload, device)


def chosen(workload: Workload, device: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[Provider]:
    """Return the providers that `select` selects.

    If none is wanted by name, slow ones are left out on more than `PATIENCE_BYTES`, except on shapes of goals.
    """
    by_name = {provider.name: provider for provider in providers(workload, device)}
    selected = [by_name[name] for name in select(list(by_name), wanted, unwanted)]
    patient = bool(wanted) or workload.goal or workload.input_bytes <= PATIENCE_BYTES
    return [provider for provider in selected if patient or not provider.slow]


def select(names: Sequence[str], wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[str]:
    """Return the wanted names, all if none is given, without the unwanted ones.

    wanted, unwanted: names, their parts before a colon (`grid_pool` for every backend), or patterns (`*avg*`).
    """

    def among(name: str, patterns: Sequence[str]) -> bool:
        return any(name == p or name.startswith(f"{p}:") or fnmatch.fnmatchcase(name, p) for p in patterns)

    return [name for name in names if (not wanted or among(name, wanted)) and not among(name, unwanted)]
