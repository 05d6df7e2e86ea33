"""The triples (backend, device, dtype) that exist on this machine, reasons for missing ones, and tests over them.

A test that takes any of the arguments `backend`, `device`, `dtype` and `size` runs on every triple that exists
(conftest.py). `each` and `pairs` add the test's own factors without their full product.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby, product
from typing import Any

import pytest
import torch

from stgridpool_kernels.backends import compiled
from tests.support import cpp_programs, cuda_emulation
from tests.support.pairwise import pairwise

OPS = ("grid_pool", "temporal_grid", "norm_pool", "token_norm")

KERNELS = ("triton", "cuda", "cpu")
"""Backends other than the reference."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that kernels support; the reference also supports float64."""

INTERPRETER_DTYPE = torch.bfloat16
"""Dtype of the interpreter's tests that are not slow. Conversions and products round in it."""

NO_GPU, NO_EXTENSION, NO_COMPILER, NO_TRITON = "no GPU", "STGP_NO_EXT=1", "no compiler", "no Triton"
NO_TORCHVISION, NO_ENCODER_OUTPUTS = "no torchvision", "transformers before 5.23"
ALLOWED_REASONS = (NO_GPU, NO_EXTENSION, NO_COMPILER, NO_TRITON)
"""Prefixes of the allowed reasons for skipping a test; a test that is skipped for another reason fails."""


@dataclass(frozen=True)
class Triple:
    """A backend, the device type of its tensors, and their dtype."""

    backend: str
    device: str
    dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W) of most tests: odd, and smaller for the interpreter, which takes milliseconds per window."""
        return (10, 3, 4) if self.interpreted else (21, 5, 7)

    @property
    def interpreted(self) -> bool:
        """Return whether Triton's interpreter runs the kernels."""
        return self.backend == "triton" and self.device == "cpu"


def absent() -> dict[str, str]:
    """Return the reasons, by the names of needs (`needs` in conftest.py) that this machine does not meet."""
    found = {}
    if torch.cuda.is_available():
        found["no gpu"] = "there is a GPU"
    else:
        found["gpu"] = f"{NO_GPU}: torch.cuda.is_available() is False"
    if cuda_emulation.find_compiler() is None:
        found["compiler"] = NO_COMPILER
    if (reason := cpp_programs.why_no_aarch64()) is not None:
        found["aarch64"] = reason
    if compiled.LIBRARY is None and os.environ.get("STGP_NO_EXT"):
        found["library"] = NO_EXTENSION
    elif compiled.LIBRARY is None and "compiler" in found:
        found["library"] = NO_COMPILER
    if importlib.util.find_spec("triton") is None:
        found["triton"] = found["interpreter"] = NO_TRITON
    elif "gpu" not in found:
        found["interpreter"] = "kernels run on the GPU"
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("transformers") is None:
        found["torchvision"] = NO_TORCHVISION
    elif tuple(map(int, metadata.version("transformers").split(".")[:2])) < (5, 23):
        found["encoder outputs"] = NO_ENCODER_OUTPUTS
    return found


ABSENT = absent()

ACCELERATOR = "cpu" if "gpu" in ABSENT else "cuda"
"""The device type of the backends for GPUs. Without a GPU, the interpreter runs triton and the emulation runs cuda."""

PLACES: dict[str, tuple[str, str | None]] = {
    "triton": (ACCELERATOR, "triton"),
    "cuda": (ACCELERATOR, "library" if ACCELERATOR == "cuda" else "compiler"),
    "cpu": ("cpu", "library"),
}
"""For every backend besides the reference: its device type, and the entry of `ABSENT` that leaves it out."""


def find_triples() -> tuple[list[Triple], list[str]]:
    """Return the triples that can run on this machine, and one line for each kind that cannot.

    If the compiled library is missing although it could have been built, its triples are included, and fail.
    """
    gpu = "gpu" not in ABSENT
    reasons = {backend: ABSENT[lack] for backend, (_, lack) in PLACES.items() if lack in ABSENT}
    if gpu and compiled.LIBRARY is not None and not compiled.LIBRARY.build_info()["cuda"]:
        reasons["cuda"] = f"{NO_COMPILER}: the library was built without nvcc"
    pairs = [(backend, device) for backend, (device, _) in PLACES.items() if backend not in reasons]
    left_out = [f"{backend}: {reason}" for backend, reason in reasons.items()]
    if not gpu:
        left_out.append(f"GPU tests: {NO_GPU}")
    left_out += [f"{what}: {ABSENT[what]}" for what in ("torchvision", "encoder outputs", "aarch64") if what in ABSENT]
    triples = [Triple(*pair, dtype) for pair, dtype in product(pairs, KERNEL_DTYPES)]
    devices = ["cpu", "cuda"] if gpu else ["cpu"]
    triples += [Triple("reference", *rest) for rest in product(devices, (*KERNEL_DTYPES, torch.float64))]
    return triples, left_out


TRIPLES, LEFT_OUT = find_triples()


# ---- tests over triples ----

ARGUMENTS = ("backend", "device", "dtype", "size")
"""Arguments of a test that a triple provides."""

Factors = Mapping[str, Mapping[str, Any] | Sequence[Any]]
"""Values by the name of an argument, or of several separated by commas. Keys of a mapping are names of the values."""


def param(triple: Triple, names: Sequence[str], values: Sequence[Any], words: Sequence[str], slow: bool) -> Any:
    """Return the parameters of one test: those of `names` from the triple, then `values`. words: rest of its id."""
    given = {name: getattr(triple, name) for name in ARGUMENTS if name in names}
    words = [*(str(value).removeprefix("torch.") for name, value in given.items() if name != "size"), *words]
    if "device" in given:
        given["device"] = torch.device(triple.device)
    marks = [pytest.mark.gpu] * (triple.device == "cuda") + [pytest.mark.slow] * slow
    return pytest.param(*given.values(), *values, marks=marks, id="-".join(words))


def over_triples(names: Sequence[str], test: Any) -> list[Any]:
    """Return the parameters of a test that takes `names` of `ARGUMENTS`, without duplicates.

    On the interpreter, random calls and all dtypes but `INTERPRETER_DTYPE` are slow.
    """
    random = getattr(test, "is_hypothesis_test", False)
    found = {}
    for triple in selected(test):
        slow = triple.interpreted and (random or ("dtype" in names and triple.dtype != INTERPRETER_DTYPE))
        one = param(triple, names, (), (), slow)
        found.setdefault(one.id, one)
    return list(found.values())


def only(*dtypes: torch.dtype, backends: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Restrict a test to some dtypes or backends. Apply this decorator before `each` or `pairs`."""

    def decorate(test: Any) -> Any:
        test.only = dtypes, backends
        return test

    return decorate


def selected(test: Any) -> list[Triple]:
    """Return the triples that a test runs on."""
    dtypes, backends = getattr(test, "only", ((), ()))
    return [
        triple
        for triple in TRIPLES
        if (not dtypes or triple.dtype in dtypes) and (not backends or triple.backend in backends)
    ]


def each(factors: Factors) -> Callable[[Any], Any]:
    """Parametrize a test so that each backend runs with each value of every factor; dtypes take turns.

    It is for properties that do not depend on combinations of these values.
    """

    def rows(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[Any, ...]]:
        named = [list(_named(values)) for values in factors.values()]
        for number in range(max(map(len, named))):
            yield dtypes[number % len(dtypes)], *(values[number % len(values)] for values in named)

    return _over_rows(factors, rows)


def pairs(factors: Factors) -> Callable[[Any], Any]:
    """Parametrize a test so that, on each backend, any two values of two factors or of the dtypes occur together."""

    def rows(dtypes: Sequence[torch.dtype]) -> Iterable[tuple[Any, ...]]:
        numbers = [range(len(values)) for values in factors.values()]
        named = [list(_named(values)) for values in factors.values()]
        for dtype, *chosen in pairwise(range(len(dtypes)), *numbers):
            yield dtypes[dtype], *(values[number] for values, number in zip(named, chosen, strict=True))

    return _over_rows(factors, rows)


def _named(values: Mapping[str, Any] | Sequence[Any]) -> Iterable[tuple[str, Any]]:
    return values.items() if isinstance(values, Mapping) else ((str(value), value) for value in values)


def _over_rows(
    factors: Factors, rows: Callable[[Sequence[torch.dtype]], Iterable[tuple[Any, ...]]]
) -> Callable[[Any], Any]:
    """Return a decorator for rows of a dtype and, for each factor, (name, value).

    On the interpreter, all rows are slow except the first row of an op in `INTERPRETER_DTYPE`.
    """

    def decorate(test: Any) -> Any:
        own = [part.strip() for name in factors for part in name.split(",")]
        wanted = [name for name in ARGUMENTS if name in inspect.signature(test).parameters and name not in own]
        found = []
        for _, group in groupby(selected(test), key=lambda triple: (triple.backend, triple.device)):
            triples = {triple.dtype: triple for triple in group}
            ops: set[Any] = set()
            for dtype, *chosen in rows(list(triples)):
                op = next(
                    (
                        op
                        for _, value in chosen
                        for op in OPS
                        if op in (value, *(value if isinstance(value, tuple) else ()))
                    ),
                    None,
                )
                slow = triples[dtype].interpreted and (dtype != INTERPRETER_DTYPE or op in ops)
                if not slow:
                    ops.add(op)
                values = [
                    part
                    for name, (_, value) in zip(factors, chosen, strict=True)
                    for part in (value if "," in name else (value,))
                ]
                words = [name for name, _ in chosen]
                found.append(param(triples[dtype], wanted, values, words, slow))
        return pytest.mark.parametrize((*wanted, *own), found)(test)

    return decorate
