"""Prints how many products and sums each fused launch fuses, and how many sums subtract, as JSON.

`python -m tests.tools.compile_cuts H W` runs it in a process where kernels are compiled and not interpreted. Rows of W
tokens are cut in several ways. Counts are those of the PTX. Each kernel has one place where a window is pooled.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from tools.compile_report import Case, compile_call, configured

CUTS: tuple[dict[str, Any], ...] = (
    {},
    *({"frame_cells": cells, "mosaic_cells": cells} for cells in (1, 5)),
    {"stages": 1},
)


def main(H: int, W: int) -> None:
    x = torch.empty(64, H, W, 512, dtype=torch.bfloat16, device="meta")
    found = {}
    for op in ("grid_pool", "norm_pool"):
        for cut in CUTS:
            with configured(cut):
                kernels = compile_call(Case(op, {}), x, 90)
            for kernel in kernels[:3]:  # rows, windows, and the mosaics of one level
                counts = [kernel.asm["ptx"].count(name) for name in ("fma.rn.f32", "sub.f32")]
                found[f"{op}: {kernel.name}, {cut}"] = counts
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
