"""This module has the two modes of integrations for models whose encoder leaves a grid of tokens per frame.

Mode "grid" applies `temporal_grid` alone, which leaves as many tokens as before, so prompts and positions stay as they
are. Mode "pool" applies `grid_pool`, which leaves fewer tokens, so prompts and positions have to be made for these.
Models such as Qwen-VL and InternVL pool nothing between encoder and language model themselves, so both are right, and
the user chooses.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import grid_pool, temporal_grid
from ..arguments import check_names
from ..flat import OPTIONS
from ..plan.values import shown
from .base import PoolOptions, ceil_options, pooled_grid

MODES = ("grid", "pool")
"""These are the names of the modes."""

GRID_OPTIONS = tuple(name for name in inspect.signature(temporal_grid).parameters if name in OPTIONS)
"""These are the names of the options that mode "grid" takes, which are those of `temporal_grid`."""


@dataclass(frozen=True, repr=False)
class ModeOptions:
    """This object holds a mode and its checked options. It is immutable and hashable; `mode_options` makes it."""

    mode: str
    pool_options: PoolOptions

    @property
    def arguments(self) -> dict[str, Any]:
        """Return all arguments, with defaults, of `temporal_grid` in mode "grid" and of `grid_pool` in mode "pool"."""
        arguments = self.pool_options.arguments
        return {name: arguments[name] for name in GRID_OPTIONS} if self.mode == "grid" else arguments

    def apply(self, x: Tensor, frame_counts: Sequence[int] | None = None, norm_channels: int | None = None) -> Tensor:
        """Return what is left of tokens x (T, H, W, C): (T, H, W, C), or (T, OH, OW, C) in mode "pool", of its dtype.

        frame_counts: frames of each video packed along T. norm_channels: its value for `grid_pool` where the options
        have none. Raises as `temporal_grid` and `grid_pool`.
        """
        arguments = self.arguments
        if self.mode == "grid":
            return temporal_grid(x, frame_counts=frame_counts, **arguments)
        if arguments["norm_channels"] is None:
            arguments["norm_channels"] = norm_channels
        return grid_pool(x, frame_counts=frame_counts, **arguments)

    def frame_size(self, grid: Sequence[int]) -> tuple[int, int]:
        """Return rows and columns of tokens that are left of an (h, w) frame. Raises ValueError as `grid_pool`."""
        return pooled_grid(grid, **self.arguments) if self.mode == "pool" else (int(grid[0]), int(grid[1]))

    def check_channels(self, channels: int) -> None:
        """Raise ValueError if `norm_channels` exceeds `channels`, the number of channels of a token."""
        wanted = self.pool_options.arguments["norm_channels"]
        if wanted is not None and wanted > channels:
            raise ValueError(f"norm_channels must be at most the {channels} channels of a token, got {wanted}")

    def __repr__(self) -> str:
        given = repr(self.pool_options).partition("(")[2]
        return f"ModeOptions(mode={self.mode!r}{', ' if given != ')' else ''}{given}"


def mode_options(mode: str, **options: Any) -> ModeOptions:
    """Return checked options for a mode. In mode "pool", `ceil_mode` is True unless it or `output_size` is given.

    mode: one of `MODES`. options: keyword arguments of `grid_pool` except `frame_counts` and `out`; in mode "grid"
    only those of `temporal_grid`.

    Raises ValueError for another mode, and for an option of pooling in mode "grid"; otherwise as `PoolOptions`.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(map(repr, MODES))}, got {shown(mode)}")
    if mode == "pool":
        return ModeOptions(mode, ceil_options(**options))
    check_names(options, OPTIONS, "options")
    for name, value in options.items():
        if name not in GRID_OPTIONS:
            raise ValueError(
                f"{name} must not be given in mode 'grid', which does not pool and takes {', '.join(GRID_OPTIONS)}; "
                f"got {name}={shown(value)}"
            )
    return ModeOptions(mode, PoolOptions(**options))
