"""Remarks on inputs that are pooled without an error, but perhaps not as was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def remarks(frame_counts: Sequence[int], not_finite: int, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the remarks on tokens that were pooled, each in one line.

    frame_counts: number of frames of each video. not_finite: number of tokens with a NaN or infinite value. options:
    arguments of `grid_pool`.
    """
    longest, strides, sides = max(frame_counts, default=0), options["frame_strides"], options["grid_shape"]
    if longest and len(strides):
        sides = sides if len(sides) > 2 else [*sides] * len(strides)
        needed = min(stride * rows * cols for stride, rows, cols in zip(strides, sides[::2], sides[1::2], strict=True))
        if longest < needed:
            video = f"a video of {'at most ' * (len(frame_counts) > 1)}{longest} frame{'s' * (longest > 1)}"
            yield f"{video} is too short for temporal gridding ({needed} frames): frames are pooled one by one"
    if not_finite:
        yield f"{not_finite} tokens have a NaN or infinite value, and so may results that they are part of"


def count_not_finite(x: Tensor) -> int:
    """Return the number of tokens in x (..., C) with a NaN or infinite value."""
    low, high = x.aminmax(dim=-1)  # both are NaN if a value is
    return int((~(low.isfinite() & high.isfinite())).sum())
