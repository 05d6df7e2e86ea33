"""Random calls of the backend `cpu` until a time is over: `python -m tools.fuzz --seconds 300`, in the root.

Each seed stands for one call, and for one set of tables with wrong words in it. A call is right if

- its result is as near to the reference in float64 as float32 arithmetic gets, or else as `tolerance` allows;
- another memory layout of x and of out, and another number of threads, give the same bits, and nothing beside out is
  written;
- its gradient, unless x holds a NaN or an infinity, is as near to the reference's in float64 as `tolerance` allows, and
  another memory layout of x and of the result's gradient, and another number of threads, give the same bits. For p < 1
  only the latter: the derivative of a norm has no bound near 0, and so magnifies what rounding does to a summary whose
  elements cancel, in the reference as well.

Wrong tables have to be refused with RuntimeError, or to give something: any other end is a failure (best seen with the
address sanitizer, see tools/sanitize.py). A failure ends the run; it is printed as a line to run again. After a crash,
build/fuzz-seed has the seed: `--first SEED --calls 1` repeats it.

The outcome is written to benchmarks/results/. Exit code: 0 if every call was right, 1 if not, 2 without the library.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import math
import platform
import random
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from math import inf  # noqa: F401  # the repr of a call has it
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stgridpool_kernels as stgp
from benchmarks.results import FOLDER
from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.plan.tables import HEADER_WORDS, plan_tables
from tests.support.cases import LAYOUTS, laid_out, tokens
from tests.support.instructions import usable
from tests.support.tolerance import (
    assert_gradient_accurate,
    assert_same_bits,
    assert_within,
    oracle,
    published_errors,
    ulp,
)

ROOT = Path(__file__).resolve().parents[1]
OPS = ("grid_pool", "grid_pool", "grid_pool", "temporal_grid", "norm_pool", "token_norm")
NORM = ("norm_type", "normalize_norm", "norm_channels")
EPS = torch.finfo(torch.float32).eps


@dataclass
class RandomCall:
    """A random call. Its repr, with `from math import inf`, makes it again.

    `spoilt` is the number of tokens that hold a NaN or an infinity, in a channel of the norm: in another one, a weight
    that is 0 in float32 and not in float64 would make NaN of an infinity.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    content: str
    spoilt: int
    layout: str
    out_layout: str
    threads: int
    capability: str
    seed: int
    arguments: dict[str, Any] = field(default_factory=dict)

    def x(self) -> Tensor:
        x = tokens(*self.shape, content=self.content, dtype=getattr(torch, self.dtype), seed=self.seed)
        draw, C = random.Random(self.seed), x.shape[-1]
        for _ in range(self.spoilt if x.numel() else 0):
            channel = draw.randrange(self.arguments.get("norm_channels") or C)
            x.view(-1, C)[draw.randrange(x.numel() // C), channel] = draw.choice([math.nan, math.inf, -math.inf])
        return x

    def run(self, x: Tensor, backend: str = "cpu", **more: Any) -> Tensor:
        return getattr(stgp, self.op)(x, backend=backend, **self.arguments, **more)

    def check(self) -> None:
        """Raise AssertionError where the call is wrong. The capability and the number of threads stay changed."""
        compiled.LIBRARY.use_cpu_capability(self.capability)
        torch.set_num_threads(1)
        x = self.x()
        result = self.run(x)
        exact = self.run(x.double(), backend="reference")
        try:
            assert_within(result, exact, self.allowed(x))
        except AssertionError:
            # The published formulas multiply what is spoilt by weights of 0, so their error says nothing there: what
            # they are allowed without it holds.
            clean = replace(self, spoilt=0).x()
            errors = published_errors(self.op, clean, self.arguments, oracle(self.op, clean, **self.arguments))
            assert_within(result, oracle(self.op, x, **self.arguments), (2 * found for found in errors))

        torch.set_num_threads(self.threads)
        out = laid_out(torch.full_like(result, math.nan), self.out_layout)
        memory = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
        self.run(laid_out(x, self.layout), out=out)
        assert_same_bits(out, result)
        assert memory.isnan().sum() == memory.numel() - out.numel() + out.isnan().sum(), (
            "something beside out is written"
        )
        if self.op != "token_norm" and not self.spoilt:  # the gradient of norms alone is the reference's
            self.check_gradient(x, result)

    def check_gradient(self, x: Tensor, result: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        grad = torch.randn(result.shape, generator=generator).to(result.dtype)
        torch.set_num_threads(1)
        found = self.gradient(x, grad)
        if self.op == "temporal_grid" or self.arguments.get("norm_type", 2.0) >= 1:
            assert_gradient_accurate(found, self.op, x, grad, **self.arguments)
        torch.set_num_threads(self.threads)
        again = self.gradient(laid_out(x, self.layout), laid_out(grad, self.out_layout))
        assert_same_bits(again, found)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(self.run(leaf), leaf, grad)[0]

    def allowed(self, x: Tensor) -> float:
        """Return the error beside one ulp of the result: of sums, norms and logits in float32, and of summaries."""
        finite = x[x.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        p, strides = self.arguments.get("norm_type", 2.0), self.arguments.get("frame_strides", (2, 4, 8))
        norm = {name: self.arguments[name] for name in NORM if name in self.arguments}
        norms = stgp.token_norm(x, **norm).double()
        largest_norm = norms[norms.isfinite()].max().item() if norms.isfinite().any() else 0.0
        norm_error = 4 * EPS * max(1, 1 / p) * largest_norm
        if self.op == "token_norm":
            return norm_error
        rounded = 0.0
        if self.op != "norm_pool":
            rounded = min(len(strides), 3) * ulp(largest, x.dtype)
        if self.op == "temporal_grid":
            return rounded
        if rounded and x.dtype != torch.float32:
            # what rounding does to weights is left to the error of the published formulas
            return rounded + 4 * EPS * largest
        logits = abs(self.arguments.get("temperature", 1.0)) * (norm_error + EPS * largest_norm)
        return rounded + (8 * EPS + 2 * logits) * largest


def draw_gridding(draw: random.Random) -> dict[str, Any]:
    if draw.random() < 0.4:  # the fused form
        return {"frame_strides": draw.choice([(2, 4, 8), (1, 2), (1,), (2, 4), (1, 2, 4), (3, 2), ()])}
    levels = draw.randrange(4)
    strides = tuple(draw.choice([1, 2, 3, 4, 5, 8]) for _ in range(levels))
    entries = 2 * levels if levels > 1 and draw.random() < 0.5 else 2
    return {
        "frame_strides": strides,
        "grid_shape": tuple(draw.choice([2, 1, 2, 3]) for _ in range(entries)),
        "sampling": draw.choice(["last", "first"]),
        "resize": draw.choice(["area", "bilinear"]),
    }


def draw_windows(draw: random.Random, height: int, width: int) -> dict[str, Any]:
    kind = draw.random()
    if kind < 0.2:
        return {"output_size": (draw.randint(1, height), draw.randint(1, width))}
    if kind < 0.6:
        return {"ceil_mode": True} if min(height, width) < 2 or draw.random() < 0.5 else {}
    kernels, paddings = [], []
    for size in (height, width):
        kernel = draw.choice([1, 2, 2, 3, 4, 5])
        paddings.append(draw.randint(0, kernel // 2))
        kernels.append(min(kernel, size + 2 * paddings[-1]))
    arguments: dict[str, Any] = {"kernel_size": tuple(kernels), "padding": tuple(paddings)}
    arguments |= {"ceil_mode": draw.random() < 0.5, "count_include_pad": draw.random() < 0.5}
    if any(2 * padding > kernel for padding, kernel in zip(paddings, kernels, strict=True)):
        return {"ceil_mode": True}
    return arguments | ({"stride": (draw.randint(1, 4), draw.randint(1, 4))} if draw.random() < 0.5 else {})


def draw_call(seed: int, capability: str | None = None) -> RandomCall:
    """Return the call of a seed, with these vector instructions or drawn ones."""
    draw = random.Random(seed)
    op = draw.choice(OPS)
    H, W = (draw.choice([1, 2, 3, 5, 6, 7, 9, 12]) for _ in range(2))
    C = draw.choice([draw.randint(1, 20), draw.randint(20, 140), draw.choice([64, 128, 200, 384, 512])])
    lead = draw.choice([(), (), (), (), (1,), (2,), (3,), (0,)])
    most = max(1, 400_000 // (H * W * C * max(1, *lead, 1)))
    T = min(most, draw.choice([0, 1, 3, 8, 9, 13, 16, 21, 32, 33, 40, 64, 70]))
    arguments: dict[str, Any] = {}
    if op in ("grid_pool", "temporal_grid"):
        arguments |= draw_gridding(draw)
        if not lead and draw.random() < 0.4:
            cuts = sorted(draw.randint(0, T) for _ in range(draw.randrange(4)))
            arguments["frame_counts"] = tuple(b - a for a, b in itertools.pairwise([0, *cuts, T]))
    if op in ("grid_pool", "norm_pool"):
        arguments |= draw_windows(draw, H, W)
        arguments["temperature"] = draw.choice([1.0, 1.0, 0.0, -1.5, 1.7, 8.0, 40.0])
    if op != "temporal_grid":
        arguments["norm_type"] = draw.choice([2.0, 2.0, 1.0, 0.5, 3.0, 2.5, math.inf])
        arguments["normalize_norm"] = draw.random() < 0.7
        arguments["norm_channels"] = draw.choice([None, draw.randint(1, C)])
    return RandomCall(
        op,
        (*lead, T, H, W, C),
        draw.choice(["bfloat16", "float16", "float32"]),
        draw.choice(["usual", "usual", "usual", "outlier", "equal", "zero"]),
        draw.choice([0, 0, 0, 0, 1, 5]),
        draw.choice(LAYOUTS),
        draw.choice(["contiguous", "sliced", "every second channel", "channels first", "misaligned"]),
        draw.choice([1, 2, 2, 3, 7]),
        capability or draw.choice(usable()),
        draw.randrange(10),
        arguments,
    )


def wrong_tables(seed: int) -> bool:
    """Call the private ops with tables in which some words are wrong; return whether one of the ops refused."""
    draw = random.Random(seed)
    H, W, C = (draw.choice([1, 2, 3, 5, 8]), draw.choice([1, 2, 3, 5, 8]), draw.choice([1, 5, 8, 40]))
    T = draw.choice([1, 9, 16, 33])
    plan = grid_plan([T], H, W, **draw_gridding(draw), **draw_windows(draw, H, W))
    gradient = draw.random() < 0.5
    frames_per_stage = None if gradient else draw.choice([None, 1, 4, 14])
    words = torch.tensor(plan_tables(plan, frames_per_stage=frames_per_stage, gradient=gradient), dtype=torch.int32)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        place = draw.randrange(len(words)) if draw.random() < 0.7 else draw.randrange(HEADER_WORDS)
        near = int(words[place]) % (1 << 30) + draw.choice([-2, -1, 1, 2])
        any_word = int(words[draw.randrange(len(words))])
        words[place] = draw.choice([near, near, any_word, -1, 0, draw.randint(-40, 40), -(1 << 31), (1 << 31) - 1])
    compiled.LIBRARY.use_cpu_capability(draw.choice(usable()))
    torch.set_num_threads(draw.choice([1, 2]))
    dtype = getattr(torch, draw.choice(["bfloat16", "float16", "float32"]))
    x = laid_out(tokens(T, H, W, C, dtype=dtype), draw.choice(["contiguous", "channels first"]))
    pooled, like_x = (torch.empty(T, *size, C, dtype=dtype) for size in (plan.pooled_size, (H, W)))
    weights, refused = (1.0, draw.choice([2.0, 2.0, 1.0, 3.0, math.inf]), True, draw.randint(1, C)), False
    calls = [
        lambda: torch.ops.stgp._grid_pool_by_tables(x, words, None, *weights, pooled),
        lambda: torch.ops.stgp._temporal_grid_by_tables(x, words, None, like_x),
    ]
    if gradient:
        grad = tokens(T, *plan.pooled_size, C, dtype=dtype, seed=1)
        calls += [
            lambda: torch.ops.stgp._grid_pool_backward_by_tables(grad, x, words, None, *weights, like_x),
            lambda: torch.ops.stgp._temporal_grid_backward_by_tables(x, words, None, like_x),
        ]
    try:
        torch.ops.stgp._check_tables(words)
    except RuntimeError:
        return True  # the other ops trust what this one has checked
    for call in calls:
        try:
            call()
        except RuntimeError:
            refused = True
    return refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (60)")
    parser.add_argument("--first", type=int, help="the first seed (by the clock)")
    parser.add_argument("--calls", type=int, default=1 << 62, help="how many seeds at most")
    parser.add_argument("--tables-only", action="store_true", help="wrong tables, and no calls")
    parser.add_argument("--no-file", action="store_true", help="write no outcome")
    given = parser.parse_args()
    if compiled.LIBRARY is None:
        print(f"cpu: {compiled.unsupported_on_cpu(None, None)}")
        return 2
    faulthandler.enable()
    first = int(time.time()) * 1000 if given.first is None else given.first
    progress = ROOT / "build" / "fuzz-seed"
    progress.parent.mkdir(exist_ok=True)
    start, seed, refused, failure = time.monotonic(), first, 0, None
    while seed - first < given.calls and time.monotonic() - start < given.seconds and failure is None:
        progress.write_text(f"{seed}\n")
        call = None if given.tables_only else draw_call(seed)
        try:
            if call is not None:
                call.check()
            refused += wrong_tables(seed)
        except Exception as error:
            failure = f"seed {seed}: {type(error).__name__}: {error}"
            print(failure)
            print(f"python -m tools.fuzz --first {seed} --calls 1")
            print(f'python -c "from tools.fuzz import *; {call!r}.check()"')
        seed += 1
    outcome = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "library": compiled.LIBRARY.build_info(),
        "capabilities": usable(),
        "seconds": round(time.monotonic() - start, 1),
        "first seed": first,
        "calls": 0 if given.tables_only else seed - first,
        "wrong tables": seed - first,
        "refused": refused,
        "failure": failure,
    }
    print(json.dumps(outcome, indent=2))
    if not given.no_file:
        file = FOLDER / f"fuzz-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
        file.write_text(json.dumps(outcome, indent=2) + "\n")
    return 0 if failure is None else 1


if __name__ == "__main__":
    sys.exit(main())
