"""Prints of fused launches how many products and sums are fused, and how many sums subtract, as JSON.

`python -m tests.tools.compile_cuts H W` runs it in a process where kernels are compiled and not interpreted. Rows of W
tokens are cut in several ways. Counts are those of the PTX, per place in the code where a window is pooled.
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
    {"spread": True},
    {"stages": 1},
)


def main(H: int, W: int) -> None:
    x = torch.empty(64, H, W, 512, dtype=torch.bfloat16, device="meta")
    found = {}
    for op in ("grid_pool", "norm_pool"):
        for cut in CUTS:
            with configured(cut):
                kernels = compile_call(Case(op, {}), x, 90)
            # walks and windows in the first launch, one of them in all others unless windows are shared out
            for number, kernel in enumerate(kernels[:2]):
                places = 2 if op == "grid_pool" and (number == 0 or cut.get("spread")) else 1
                counts = [kernel.asm["ptx"].count(name) / places for name in ("fma.rn.f32", "sub.f32")]
                found[f"{op} {number}, {cut}"] = counts
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
