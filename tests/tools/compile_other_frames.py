"""Prints how many kernels calls compile at first, and then for other numbers of frames, counts, batches and channels.

The output is JSON.

`python -m tests.tools.compile_other_frames` runs it in a process where kernels are compiled and not interpreted.
"""

from __future__ import annotations

import json

import torch
import triton
from torch import Tensor

from tools.compile_report import Case, compile_call

GENERAL = {"kernel_size": 3, "stride": 2, "padding": 1}
FORWARD = (Case("grid_pool", {}), Case("norm_pool", {}), Case("grid_pool", GENERAL))
CASES = (*FORWARD, *(case.of_gradient for case in FORWARD), Case("token_norm", {}))
NORM_CHANNELS = (128, 1, 100, 16, 199)
"""Numbers of channels of a norm. Unless told otherwise, Triton compiles apart for 1 and for multiples of 16."""


def video(*frames: int, channels: int) -> Tensor:
    return torch.empty(*frames, 9, 7, channels, dtype=torch.bfloat16, device="meta")


def others(case: Case) -> list[tuple[Case, Tensor]]:
    """Calls that differ from the one on 40 frames in nothing but how many frames and videos there are."""
    calls = [(case, video(*frames, channels=200)) for frames in ((33,), (1000,), (2, 40), (2, 33), (1, 36))]
    if case.op == "grid_pool":
        for counts in ([33, 40], [7, 64, 5]):
            packed = Case(case.op, {**case.arguments, "frame_counts": counts}, gradient=case.gradient)
            calls.append((packed, video(sum(counts), channels=200)))
    return calls


def main() -> None:
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found["key"])

    def added(case: Case, x: Tensor) -> int:
        before = len(compiled)
        compile_call(case, x, 90)
        return len(compiled) - before

    # of 200 channels, since frames of them start at no multiple of 16 elements
    found = {
        case.name: [added(case, video(40, channels=200)), *(added(*call) for call in others(case))] for case in CASES
    }
    # the first half of every video of a batch: there is a gap between videos
    found["grid_pool with gaps"] = [added(CASES[0], video(2, 2 * T, channels=64)[:, :T]) for T in (40, 33, 1000)]
    for case in CASES:
        of_norms = [
            Case(case.op, {**case.arguments, "norm_channels": n}, gradient=case.gradient) for n in NORM_CHANNELS
        ]
        found[f"{case.name} by norm_channels"] = [added(of_norm, video(40, channels=200)) for of_norm in of_norms]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
