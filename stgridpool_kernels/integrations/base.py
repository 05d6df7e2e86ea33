"""Functions that engine integrations share: pooling in an engine's layout, token counts, and checks of options.

How to add an engine
--------------------

Engines hold the tokens of all videos of a batch as one (ΣF, h·w, C) tensor, and reserve placeholders in the prompt
before they compute it. An adapter therefore does three things: it finds the number of frames of each video, it passes
the tensor to `pool_flat`, and it refuses options that give another number of tokens than there are placeholders. It
imports its engine lazily, with `require`, and changes nothing until it is called. The following adapter is complete. It
is for the engine of tests/support/toy_engine.py, and tests/integrations/test_base.py executes it from this docstring:

    from stgridpool_kernels.integrations.base import ceil_options, pool_flat, require, require_size
    from stgridpool_kernels.integrations.pooled_class import patch_class, unpatch_class


    def members(base, options):
        def shrink(self, features, frames_per_video):
            return pool_flat(features, frames_per_video, self.grid, **options.arguments)

        return {"shrink": shrink}


    def patch(model, **options):
        engine = require("toy_engine", at_least="1.0", below="2.0")
        if not isinstance(model, engine.VideoModel):
            raise TypeError(f"model must be a toy_engine.VideoModel, got {type(model).__name__}")
        chosen = ceil_options(**options)
        require_size("toy_engine", model.grid, model.tokens_per_frame, chosen)
        patch_class(model, members, chosen)


    def unpatch(model):
        unpatch_class(model)

The two functions of `pooled_class` replace the model's class and put it back. Parameters and their names do not change,
models with different options do not affect each other, and patched models can be copied, pickled and saved.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from .. import GridPool, grid_plan, pool_flat, use_backend
from ..arguments import check_names
from ..flat import OPTIONS, grid_size

__all__ = [
    "NEWLINES",
    "PoolOptions",
    "ceil_options",
    "pool_flat",
    "pooled_grid",
    "require",
    "require_size",
    "tokens_per_frame",
    "video_token_count",
]

NEWLINES = ("none", "one_token", "grid", "frame")
"""Supported placements of newline tokens: none, one after the video, one after every row, one after every frame."""

_GEOMETRY = tuple(name for name in inspect.signature(grid_plan).parameters if name in OPTIONS)


def pooled_grid(grid: Sequence[int], **options: Any) -> tuple[int, int]:
    """Return rows and columns (OH, OW) of tokens that `pool_flat` leaves of an (h, w) frame. Raises as `pool_flat`."""
    check_names(options, OPTIONS, "options")
    rows, cols = grid_size(grid)
    return grid_plan((), rows, cols, **{name: options[name] for name in _GEOMETRY if name in options}).pooled_size


def tokens_per_frame(grid: Sequence[int], **options: Any) -> int:
    """Return the number OH·OW of tokens that `pool_flat` leaves of an (h, w) frame. Raises as `pool_flat`."""
    return math.prod(pooled_grid(grid, **options))


def video_token_count(frames: int, grid: Sequence[int], newline: str = "none", **options: Any) -> int:
    """Return the number of tokens of a video in the prompt, with the engine's newline tokens.

    frames: number F of frames. grid: (h, w) of a frame before pooling, in tokens. newline: "none" counts F·OH·OW;
    "one_token" F·OH·OW + 1, with one per video, as LLaVA-OneVision in transformers and vLLM; "grid" F·OH·(OW + 1), with
    one after every row; "frame" F·(OH·OW + 1), with one after every frame.

    Raises ValueError for a negative number of frames or an unknown newline; otherwise as `pool_flat`.
    """
    if frames < 0:
        raise ValueError(f"frames must not be negative, got {frames}")
    rows, cols = pooled_grid(grid, **options)
    counts = {
        "none": frames * rows * cols,
        "one_token": frames * rows * cols + 1,
        "grid": frames * rows * (cols + 1),
        "frame": frames * (rows * cols + 1),
    }
    if newline not in counts:
        raise ValueError(f"newline must be one of {', '.join(map(repr, NEWLINES))}, got {newline!r}")
    return counts[newline]


@dataclass(frozen=True, init=False, repr=False)
class PoolOptions:
    """Checked keyword arguments of `grid_pool` except `frame_counts` and `out`. Objects are immutable and hashable.

    Two objects are equal if all arguments, defaults included, are equal. `pool_flat(x, frames, grid,
    **options.arguments)` applies them. Raises as `grid_pool`, except for limits that depend on the size of x, and
    TypeError for an unknown argument.
    """

    _items: tuple[tuple[str, Any], ...]

    def __init__(self, **options: Any) -> None:
        check_names(options, OPTIONS, "options")
        backend = use_backend(options.pop("backend", "auto")).name
        arguments = {**GridPool(**options).arguments, "backend": backend}
        object.__setattr__(self, "_items", tuple(arguments.items()))

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, with defaults, and with sequences as tuples."""
        return dict(self._items)

    def __repr__(self) -> str:
        defaults = dict(PoolOptions()._items)
        shown = ", ".join(f"{name}={value!r}" for name, value in self._items if value != defaults[name])
        return f"PoolOptions({shown})"


def ceil_options(**options: Any) -> PoolOptions:
    """Return options for an engine whose own pooling rounds up, as 27 × 27 → 14 × 14: `ceil_mode` is True by default.

    An `output_size` leaves `ceil_mode` at the default of `grid_pool`. Raises as `PoolOptions`.
    """
    if options.get("output_size") is None:
        options.setdefault("ceil_mode", True)
    return PoolOptions(**options)


def require_size(engine: str, grid: Sequence[int], expected: int, options: PoolOptions) -> None:
    """Check that options leave as many tokens per frame as the engine has placeholders for.

    engine: its name in the error message. grid: (h, w) of a frame before pooling, in tokens. expected: number of tokens
    per frame after pooling.

    Raises ValueError with both numbers, and with options that fit if they are known.
    """
    arguments = options.arguments
    rows, cols = pooled_grid(grid, **arguments)
    if rows * cols == expected:
        return
    side = math.isqrt(expected)
    square = f" ({side} × {side})" if side * side == expected else ""
    height, width = grid
    raise ValueError(
        f"{engine} expects {expected} tokens per frame{square} where a frame has {height} × {width}, these options "
        f"give {rows * cols} ({rows} × {cols}){_remedy(grid, expected, arguments)}"
    )


def require(package: str, at_least: str, below: str) -> ModuleType:
    """Import an engine if the integration was tested with its version: at_least ≤ version < below.

    Raises ImportError if it is not installed, RuntimeError with its version and the tested range if it is outside.
    """
    tested = f"this integration was tested with {package} from {at_least} to before {below}"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:  # it may be a clone on the path, or a distribution of another name
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed; {tested}") from None
        version = str(getattr(importlib.import_module(package), "__version__", "unknown"))
    if not _release(at_least) <= _release(version) < _release(below):
        raise RuntimeError(f"{package} {version} is installed; {tested}")
    return importlib.import_module(package)


def _remedy(grid: Sequence[int], expected: int, arguments: dict[str, Any]) -> str:
    """Return options that fit, as the end of a message; empty if neither rounding nor a nearly square grid fits."""
    if arguments["output_size"] is None:
        flipped = {**arguments, "ceil_mode": not arguments["ceil_mode"]}
        if tokens_per_frame(grid, **flipped) == expected:
            return f"; pass ceil_mode={flipped['ceil_mode']}"
    rows = math.isqrt(expected)
    if rows and expected % rows == 0:
        return f"; pass output_size=({rows}, {expected // rows}) and no other argument of the windows"
    return ""


def _release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version without trailing zeros: "5.17.0rc1" and "5.17" give (5, 17)."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    release = [int(number) for number in numbers.group().split(".")] if numbers else []
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)
