"""The providers of every kind of workload, and which of them are timed."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from benchmarks import poolings, prefill, stream
from benchmarks.provider import Provider
from benchmarks.workloads import Workload

BASELINE = "llava_avg_pool"
"""The provider whose time others are compared with by default."""
PATIENCE_BYTES = 100_000_000
"""Size of the tokens in bytes, up to which slow providers are timed too where nobody asks for them."""

PROVIDERS = {
    "pooling": poolings.poolings,
    "gradients": poolings.gradients,
    "stream": stream.pushes,
    "prefill": prefill.prefills,
}


def providers(workload: Workload, device: str) -> list[Provider]:
    """All providers of a workload on a device ("cpu" or "cuda")."""
    return PROVIDERS[workload.kind](workload, device)


def chosen(workload: Workload, device: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[Provider]:
    """The providers that `select` picks. If none is wanted by name, those that are slow on large tokens are left out,
    except on shapes that goals are set for."""
    known = {provider.name: provider for provider in providers(workload, device)}
    found = [known[name] for name in select(list(known), wanted, unwanted)]
    patient = bool(wanted) or workload.goal or workload.input_bytes <= PATIENCE_BYTES
    return [provider for provider in found if patient or not provider.slow]


def select(names: Sequence[str], wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[str]:
    """The names that are wanted, or all if nothing is, without the unwanted.

    A name, the part of it before a colon (`grid_pool` for every backend) and a pattern (`*avg*`) stand for it.
    """

    def among(name: str, patterns: Sequence[str]) -> bool:
        return any(name == p or name.startswith(f"{p}:") or fnmatch.fnmatchcase(name, p) for p in patterns)

    return [name for name in names if (not wanted or among(name, wanted)) and not among(name, unwanted)]
