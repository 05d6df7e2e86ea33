"""Prints, as JSON, what the fused kernels compile to for gfx942: per launch its kernel, warps, registers and spills.

`python -m tests.tools.compile_for_amd` runs it in a process where kernels are compiled and not interpreted.
"""

from __future__ import annotations

import json
import re

import torch
from triton.backends.compiler import GPUTarget

from tools.compile_report import Case, compile_launches, prepare_call

SIZES = ((27, 27, 3584), (24, 24, 4096), (9, 9, 512), (9, 8, 200))
"""Sizes of frames. Up to 512 channels a block is one wave, which has 64 threads on this GPU."""

CASES = (Case("grid_pool", {}), Case("grid_pool", {}, gradient=True), Case("norm_pool", {}))


def main() -> None:
    found = {}
    for size in SIZES:
        for case in CASES:
            x = torch.empty(32, *size, dtype=torch.bfloat16, device="meta")
            kernels = compile_launches(*prepare_call(case, x, None), GPUTarget("hip", "gfx942", 64), 0)
            launches = []
            for kernel in kernels:
                code = kernel.asm["amdgcn"]
                registers, spills = (
                    int(re.findall(rf"{name}: *(\d+)", code)[0]) for name in ("vgpr_count", "vgpr_spill_count")
                )
                launches.append((kernel.name, kernel.metadata.num_warps, registers, spills))
            found[f"{case.name} {size}"] = launches
    print(json.dumps(found))


if __name__ == "__main__":
    main()
