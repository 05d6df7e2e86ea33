"""Prints, as JSON, the order of what matters to overlapping launches in the machine code of each launch of some calls.

`python -m tests.tools.compile_overlap` runs it in a process where kernels are compiled and not interpreted. A launch is
its kernel, whether it may start early, and a list: PREEXIT lets the next launch start, ACQBULK waits for the launch
before, LDG is a load of 32 bits, EXIT and BRA end or leave the block of instructions, and all other accesses to memory
are ACCESS.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.support.wheels import run
from tools.compile_report import Case, compile_call
from tools.machine_code import find_tool

ODD, EVEN, WIDE = (27, 27, 512), (12, 12, 200), (9, 9, 8208)
CALLS = (
    (Case("grid_pool", {}), ODD),
    (Case("grid_pool", {}), EVEN),
    (Case("grid_pool", {"norm_channels": 100}), ODD),
    (Case("grid_pool", {"norm_channels": 4096}), WIDE),
    (Case("grid_pool", {"norm_type": 1.0}, gradient=True), EVEN),
    (Case("norm_pool", {}), EVEN),
)
INSTRUCTION = re.compile(r"\b(PREEXIT|ACQBULK|EXIT|BRA|LDG\.E(?=\s)|LDG|LDGSTS|STG|RED|ATOM)\b")


def order(kernel: Any) -> list[str]:
    """Return the accesses and branches of a compiled kernel in the order of its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        found = INSTRUCTION.findall(run(find_tool("nvdisasm"), "-c", "-ndf", cubin))
    names = {"LDG.E": "LDG", "LDG": "ACCESS", "LDGSTS": "ACCESS", "STG": "ACCESS", "RED": "ACCESS", "ATOM": "ACCESS"}
    return [names.get(name, name) for name in found]


def main() -> None:
    found = {}
    for arch in (80, 90):
        for case, size in CALLS:
            kernels = compile_call(case, torch.empty(64, *size, dtype=torch.bfloat16, device="meta"), arch)
            launches = [(kernel.name, kernel.metadata.launch_pdl, order(kernel)) for kernel in kernels]
            found[f"sm_{arch} {case.name} {size}"] = launches
    print(json.dumps(found))


if __name__ == "__main__":
    main()
