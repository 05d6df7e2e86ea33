"""Comparison of a copy of the package, which tools/hf_kernel.py wrote, with the package in the same process.

    python -m tests.support.kernel_copy FOLDER ID BACKEND

loads the copy as the package `kernels` does, by its id as the name of the module, and prints what was compared.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import stgridpool_kernels as stgp
from tests.support.interpreter import hasten_interpreter

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "published": ("grid_pool", {}),
    "packed, ceil mode": ("grid_pool", {"frame_counts": [2, 8], "ceil_mode": True}),
    "paper": ("grid_pool", {"sampling": "first", "resize": "bilinear", "normalize_norm": False, "temperature": 3.0}),
    "gridding": ("temporal_grid", {"frame_strides": (1, 2)}),
    "pooling": ("norm_pool", {"output_size": (2, 3), "norm_channels": 5}),
    "norms": ("token_norm", {"norm_type": 1.0}),
}


def load(folder: Path, name: str) -> ModuleType:
    """Import the package in a folder under another name."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(package: ModuleType, backend: str) -> Iterator[tuple[str, Tensor]]:
    """Yield results and gradients of the package's functions, module and stream, on tokens that are the same always."""
    tokens = torch.randn(10, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16,) if backend == "triton" else (torch.bfloat16, torch.float32):
        for name, (op, arguments) in CALLS.items():
            x = tokens.to(dtype).requires_grad_()
            y = getattr(package, op)(x, **arguments, backend=backend)
            yield f"{name}, {dtype}", y.detach()
            y.float().square().sum().backward()
            yield f"gradient of {name}, {dtype}", x.grad
    with package.use_backend(backend), torch.no_grad():
        x = tokens.bfloat16()
        yield "module", package.GridPool(temperature=2.0)(x, frame_counts=[8, 2])
        yield "flat", package.pool_flat(x.flatten(1, 2), [2, 8], (3, 4))
        stream = package.GridPoolStream()
        yield "stream", torch.cat([stream.push(x[:5]), stream.push(x[5:6]), stream.push(x[6:])])
        yield "compiled", torch.compile(package.grid_pool, backend="aot_eager", fullgraph=True)(x)


def check_same_bits(copy: ModuleType, backend: str) -> list[str]:
    """Return what was compared. Raises AssertionError unless the copy and the package give the same bits."""
    compared = []
    of_copy, of_package = list(results(copy, backend)), list(results(stgp, backend))
    for (name, found), (_, expected) in zip(of_copy, of_package, strict=True):
        assert torch.isfinite(expected).all(), name
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
        compared.append(name)
    return compared


def main() -> None:
    folder, name, backend = sys.argv[1:]
    if backend == "triton":
        hasten_interpreter()
    print(*check_same_bits(load(Path(folder), name), backend), sep="\n")


if __name__ == "__main__":
    main()
