"""Program that prints build information and results of the compiled library as JSON, for `tools/check_abi.py`.

It needs torch, NumPy and the package. Inputs come from NumPy, whose generators give the same values everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels.backends.compiled import DTYPES, LIBRARY
from tests.support.tolerance import assert_golden

PRIVATE_OPS = ("_grid_pool_by_tables", "_temporal_grid_by_tables", "_token_norm_compiled")
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "published": ("grid_pool", {}),
    "ceil mode": ("grid_pool", {"ceil_mode": True}),
    "packed": ("grid_pool", {"frame_counts": [9, 0, 24]}),
    "paper": ("grid_pool", {"sampling": "first", "resize": "bilinear", "normalize_norm": False}),
    "overlapping": ("grid_pool", {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 1]}),
    "adaptive": ("grid_pool", {"output_size": [3, 5], "temperature": 3.0, "norm_type": math.inf}),
    "gridding": ("temporal_grid", {"grid_shape": [2, 3]}),
    "pooling": ("norm_pool", {"temperature": -1.0, "norm_type": 3.0}),
    "norms": ("token_norm", {"norm_type": 1.0}),
    "norms of some channels": ("grid_pool", {"norm_channels": 3}),
}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def check_golden_values() -> int:
    """Check the golden values on the backend `cpu`; return their number. Raises AssertionError if one is missed."""
    paths = sorted(Path(__file__).parents[1].joinpath("data").glob("*.npz"))
    for path in paths:
        with np.load(path) as data:
            meta = json.loads(str(data["meta"]))
            dtype = getattr(torch, meta["dtype"])
            x, grid, out = (torch.from_numpy(data[name]).to(dtype) for name in ("x", "grid", "out"))
        shape: list[int] = []
        for size in meta["grid_sizes"]:  # the most square grid of `size` frames with rows ≥ cols
            rows = next(rows for rows in range(1, size + 1) if size % rows == 0 and rows * rows >= size)
            shape += (rows, size // rows)
        gridding = {"frame_strides": meta["freqs"], "grid_shape": shape or [2, 2]}
        pooling = {"kernel_size": meta["kernel"], "padding": meta["padding"]}
        weights = {"temperature": meta["temperature"], "norm_type": float(meta["p"])}
        weights["norm_channels"] = meta.get("norm_channels")
        assert_golden(stgridpool_kernels.temporal_grid(x, **gridding, backend="cpu"), grid)
        assert_golden(stgridpool_kernels.grid_pool(x, **gridding, **pooling, **weights, backend="cpu"), out)
    return len(paths)


def results() -> Iterator[tuple[str, Tensor]]:
    """Yield the results of every call in every dtype, on contiguous tokens and on every second channel of others."""
    values = np.random.default_rng(0).standard_normal((33, 9, 11, 70), dtype=np.float32)
    for dtype in DTYPES:
        base = torch.from_numpy(values).to(dtype)
        for layout, x in (("contiguous", base[..., :37].contiguous()), ("every second", base[..., ::2])):
            for name, (op, arguments) in CALLS.items():
                yield f"{name}, {dtype}, {layout}", getattr(stgridpool_kernels, op)(x, **arguments, backend="cpu")


def main() -> None:
    assert LIBRARY is not None, "the compiled library was not built"
    assert LIBRARY.__file__ is not None
    info = LIBRARY.build_info()
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    digests = {}
    golden, capabilities = 0, []
    for capability in info["cpu capabilities"].split(", "):
        try:
            LIBRARY.use_cpu_capability(capability)
        except ValueError:  # this CPU lacks the instructions
            continue
        capabilities.append(capability)
        golden += check_golden_values()
        digests |= {f"{capability}, {name}": digest(result) for name, result in results()}
    report = {
        "torch": torch.__version__,
        "library": LIBRARY.__file__,
        "sha256": hashlib.sha256(Path(LIBRARY.__file__).read_bytes()).hexdigest(),
        "build_info": info,
        "ops": [key for key in ("CPU", "CUDA") if all(registered(f"stgp::{op}", key) for op in PRIVATE_OPS)],
        "golden": golden,
        "capabilities": ", ".join(capabilities),
        "digests": digests,
    }
    assert "CPU" in report["ops"], "private ops are not registered for the CPU"
    assert ("CUDA" in report["ops"]) == bool(info["cuda"]), "private ops are not registered for CUDA as build_info says"
    print(json.dumps(report))


if __name__ == "__main__":
    main()
