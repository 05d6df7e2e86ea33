"""Strategies of hypothesis for random arguments and inputs of the ops."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.cases import LAYOUTS, Arguments, Size, laid_out, tokens


@st.composite
def gridding_arguments(draw: st.DrawFn) -> Arguments:
    levels = draw(st.sampled_from([2, 1, 3, 2, 0, 3]))
    frame_strides = draw(st.lists(st.sampled_from([1, 2, 3, 1, 4, 2, 5, 8]), min_size=levels, max_size=levels))
    entries = 2 * levels if levels > 1 and draw(st.booleans()) else 2
    return {
        "frame_strides": frame_strides,
        "grid_shape": draw(st.lists(st.sampled_from([2, 1, 2, 3]), min_size=entries, max_size=entries)),
        "sampling": draw(st.sampled_from(["last", "first"])),
        "resize": draw(st.sampled_from(["area", "bilinear"])),
    }


def one_or_both(draw: st.DrawFn, first: int, second: int) -> int | tuple[int, int]:
    return first if first == second and draw(st.booleans()) else (first, second)


@st.composite
def window_arguments(draw: st.DrawFn, height: int, width: int) -> Arguments:
    if draw(st.sampled_from(["kernel", "kernel", "adaptive", "kernel"])) == "adaptive":
        return {"output_size": one_or_both(draw, draw(st.integers(1, height)), draw(st.integers(1, width)))}
    arguments: Arguments = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
    kernels, paddings = [], []
    for size in (height, width):
        kernel = draw(st.sampled_from([2, 3, 1, 4, 5]))
        padding = draw(st.integers(0, kernel // 2))
        kernels.append(min(kernel, size + 2 * padding))
        paddings.append(padding)
    arguments["kernel_size"] = one_or_both(draw, *kernels)
    arguments["padding"] = one_or_both(draw, *paddings)
    if draw(st.booleans()):
        arguments["stride"] = one_or_both(draw, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return arguments


@st.composite
def norm_arguments(draw: st.DrawFn, C: int) -> Arguments:
    return {
        "norm_type": draw(st.sampled_from([2.0, 1.0, 0.5, 3.0, math.inf])),
        "normalize_norm": draw(st.booleans()),
        "norm_channels": draw(st.none() | st.integers(1, C)),
    }


temperatures = st.sampled_from([1.0, 0.0, -1.5, 1.7, 8.0, 40.0])


@st.composite
def inputs(draw: st.DrawFn, dtype: torch.dtype, device: torch.device, size: Size) -> Tensor:
    """Draw tokens (T, H, W, C) or (B, T, H, W, C)."""
    lead = draw(st.sampled_from([(), (), (), (2,), (), (1,), (), (0,), (2,)]))
    most = (64 if size[0] > 10 else 17) // max(1, *lead, 1)
    T = draw(st.sampled_from([T for T in (13, 16, 24, 19, 8, 32, 0, 5, 17, 3, 21, 1) if most >= T]))
    H, W = draw(st.integers(1, size[2])), draw(st.integers(1, size[2]))
    C = draw(st.sampled_from([3, 8, 1, 5, 16, 19]))
    content = draw(st.sampled_from(["usual", "outlier", "usual", "equal", "usual"]))
    x = tokens(*lead, T, H, W, C, content=content, dtype=dtype, device=device, seed=draw(st.integers(0, 9)))
    return laid_out(x, draw(st.sampled_from(LAYOUTS)))


@st.composite
def packings(draw: st.DrawFn, x: Tensor) -> Arguments:
    """Draw the argument frame_counts for x, possibly with zeros, or no argument."""
    if x.dim() == 5 or draw(st.booleans()):
        return {}
    cuts = sorted(draw(st.lists(st.integers(0, len(x)), max_size=2)))
    return {"frame_counts": [stop - start for start, stop in zip([0, *cuts], [*cuts, len(x)], strict=True)]}
