"""Writes golden values of arguments that the published implementation lacks: `python -m tests.support.golden`.

They come from the reference, in float64. A change of the reference that moves them is seen by a test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stgridpool_kernels

DATA = Path(__file__).parents[1] / "data"

CASES: dict[str, dict[str, Any]] = {
    "norm_channels": {"T": 32, "H": 9, "W": 9, "C": 12, "norm_channels": 5},
    "norm_channels_p_inf": {"T": 16, "H": 8, "W": 8, "C": 12, "freqs": [1, 2, 4], "temperature": 5.0, "p": "inf"}
    | {"norm_channels": 4},
    "norm_channels_p1": {"T": 12, "H": 9, "W": 8, "C": 8, "freqs": [1, 2], "padding": 1, "p": 1, "norm_channels": 3},
}
"""Entries of `meta` of each case that are not those of `PUBLISHED`."""

PUBLISHED = {"freqs": [2, 4, 8], "kernel": 2, "padding": 0, "temperature": 1.0, "p": 2, "dtype": "float32"}


def make(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `meta`, and x, grid and out in float32, of a case. Both parts of a token have a log-normal norm."""
    meta = PUBLISHED | CASES[name]
    meta["grid_sizes"] = [4] * len(meta["freqs"])
    shape, generator = [meta[axis] for axis in "THWC"], torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    factors = torch.randn(*shape[:3], 2, generator=generator, dtype=torch.float64).mul(0.5).exp()
    x[..., : meta["norm_channels"]] *= factors[..., :1]
    x[..., meta["norm_channels"] :] *= factors[..., 1:]
    x = x.float().double()
    grid = stgridpool_kernels.temporal_grid(x, frame_strides=meta["freqs"], backend="reference")
    windows = {"kernel_size": meta["kernel"], "padding": meta["padding"], "temperature": meta["temperature"]}
    norm = {"norm_type": float(meta["p"]), "norm_channels": meta["norm_channels"]}
    out = stgridpool_kernels.norm_pool(grid, **windows, **norm, backend="reference")
    return meta, {"x": x.float(), "grid": grid.float(), "out": out.float()}


def main() -> None:
    for name in CASES:
        meta, arrays = make(name)
        with open(DATA / f"{name}.npz", "wb") as file:
            np.savez_compressed(file, meta=json.dumps(meta), **{key: array.numpy() for key, array in arrays.items()})


if __name__ == "__main__":
    main()
