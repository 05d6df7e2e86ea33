"""Measurements of the effect of ST-GridPool on one input, and advice on the temperature.

Frame indices and windows come from the input's `GridPlan`; tokens pass through the public functions only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import use_backend
from ..functional import GridPool, token_norm
from ..ops import check_tokens
from ..plan import GridPlan, Runs, grid_plan

__all__ = ["Inspection", "inspect_tokens"]

TEMPERATURES = (1.0, 2.0, 5.0, 10.0)
"""Temperatures that every inspection evaluates, in addition to the one in its options."""

_TOP_SHARE = 0.05
"""Share of windows whose largest weight passes the target at the target temperature."""

_LARGEST_LOGIT = 1e5
"""Limit of |temperature · norm|. Beyond it, only norms that differ far less than a bfloat16 step would be separated."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """Measurements by `inspect_tokens` of one video of shape (T, H, W, C).

    Windows are those of norm pooling, on the tokens after temporal gridding. The counted windows are those of the most
    common size that contain finite norms only, so that all have the same uniform weight, 1 / window_size.

    shape, dtype: shape and dtype of the tokens. plan: frames and windows, as every backend follows them.
    settings: the arguments of `grid_pool` as `GridPool` prints them. temperature: the one among them.
    norm_name: name or formula of the norm.
    stage_norms: (levels + 1, T, H, W), norms of the input's tokens and of those after each level of temporal gridding.
    window_norms: float64 (counted, window_size), norms in each counted window, 0 for padding that is included.
    spread: (counted,), (max − min) / mean of the norms in each window without padding; 0 if the mean is 0.
    largest_weights: for each temperature, in ascending order, the largest softmax weight of each window, (counted,).
    target_weight, target_temperature: at target_temperature, the largest weight passes target_weight in 5 % of the
        windows; it is None if there is no such temperature.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    plan: GridPlan
    settings: str
    temperature: float
    norm_name: str
    stage_norms: np.ndarray
    window_norms: np.ndarray
    spread: np.ndarray
    largest_weights: dict[float, np.ndarray]
    target_weight: float
    target_temperature: float | None

    @property
    def pooled_shape(self) -> tuple[int, int, int, int]:
        """Shape (T, OH, OW, C) of `grid_pool`'s result."""
        return (self.shape[0], *self.plan.pooled_size, self.shape[3])

    @property
    def nonfinite(self) -> int:
        """Number of tokens of the input with a NaN or infinite norm."""
        return int((~np.isfinite(self.stage_norms[0])).sum())

    @property
    def max_over_median(self) -> float:
        """Largest over median norm of the input's tokens; NaN if the median is 0 or no norm is finite."""
        norms = self.stage_norms[0]
        finite = norms[np.isfinite(norms)]
        median = float(np.median(finite)) if finite.size else 0.0
        return float(finite.max() / median) if median > 0 else math.nan

    @property
    def windows(self) -> int:
        """Number of windows over all frames, counted or not."""
        return math.prod(self.pooled_shape[:3])

    @property
    def counted(self) -> int:
        """Number of counted windows over all frames."""
        return len(self.window_norms)

    @property
    def window_size(self) -> int:
        """Number of positions in a counted window, with zero padding that is included in the softmax."""
        return int(self.window_norms.shape[1])

    @property
    def advice(self) -> str:
        """Advice on the temperature in one or two sentences."""
        return _advice(self)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield x, (T, h, w, c) of the same T frames, then x after the first 1, 2, … levels of gridding."""
        return _stages(x, self.plan)

    def relative_weights(self, frame: int, temperature: float) -> np.ndarray:
        """Weight of each token in norm pooling relative to the uniform weight of its window, (H, W).

        1 is average pooling. A token of several windows gets the mean of its weights. NaN marks a token that is in no
        window, or in one with a norm that is not finite.
        """
        return _relative_weights(self.stage_norms[-1, frame], self.plan, temperature)


def inspect_tokens(x: Tensor, **options: Any) -> Inspection:
    """Measure the effect of `grid_pool(x, **options)` on the tokens x of one video, (T, H, W, C) of any float dtype.

    options: arguments of `grid_pool` except `frame_counts` and `out`. It needs memory for one gridded copy of x.

    Raises TypeError or ValueError for another x and for an option that is unknown or out of range.
    """
    check_tokens(x)
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"one video of at least one frame is inspected, (T, H, W, C), got shape {tuple(x.shape)}")
    backend = options.pop("backend", "auto")
    pool = GridPool(**options)
    arguments = dict(pool.arguments)
    temperature = float(arguments.pop("temperature"))
    norm = {name: arguments.pop(name) for name in ("norm_type", "normalize_norm", "norm_channels")}
    plan = grid_plan(x.shape[:1], x.shape[1], x.shape[2], **arguments)

    stages = [token_norm(stage, **norm, backend=backend) for stage in _stages(x.detach(), plan, backend)]
    stage_norms = torch.stack(stages).cpu().numpy()
    windows, is_token = _counted_windows(stage_norms[-1], plan)
    target, solved = _solve_temperature(windows, -1.0 if temperature < 0 else 1.0)
    return Inspection(
        shape=(x.shape[0], x.shape[1], x.shape[2], x.shape[3]),
        dtype=str(x.dtype).removeprefix("torch."),
        plan=plan,
        settings=pool.extra_repr(),
        temperature=temperature,
        norm_name=_norm_name(**norm),
        stage_norms=stage_norms,
        window_norms=windows,
        spread=_spread(windows, is_token),
        largest_weights={each: _largest_weight(windows, each) for each in sorted({*TEMPERATURES, temperature})},
        target_weight=target,
        target_temperature=solved,
    )


def _norm_name(norm_type: float, normalize_norm: bool, norm_channels: int | None) -> str:
    if norm_type == math.inf:
        name = "max |t|"
    elif norm_type == 2:
        name = "RMS" if normalize_norm else "L2 norm"
    else:
        name = f"({'mean' if normalize_norm else 'Σ'} |t|^{norm_type:g})^(1/{norm_type:g})"
    return name if norm_channels is None else f"{name}, norm_channels={norm_channels}"


def _stages(x: Tensor, plan: GridPlan, backend: str = "auto") -> Iterator[Tensor]:
    yield x
    for levels in range(1, len(plan.levels) + 1):
        # a grid_shape of 2 entries applies to every level, a longer one has 2 per level
        shape = plan.grid_shape if len(plan.grid_shape) == 2 else plan.grid_shape[: 2 * levels]
        with use_backend(backend):  # the op, which does not warn that pictures have few channels
            stage = torch.ops.stgp.temporal_grid(
                x, frame_strides=plan.frame_strides[:levels], grid_shape=shape, sampling=plan.sampling,
                resize=plan.resize,
            )  # fmt: skip
        yield stage


# ---- windows ----


def _positions(runs: Runs, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, each of shape (windows, longest run): positions, those that belong to their run, and those on the axis.

    Positions on the axis are the positions of a run that are not padding. Padding is clipped to the axis.
    """
    start, count = np.array(runs.start)[:, None], np.array(runs.count)[:, None]
    offset = np.arange(max(runs.count))
    position, taken = start + offset, offset < count
    return position.clip(0, size - 1), taken, taken & (position >= 0) & (position < size)


def _window_table(plan: GridPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, each of shape (OH · OW, longest window): index in H · W, whether it is included, whether it is a token.

    A position that is included in its window, but no token, is padding.
    """
    row, row_taken, row_inside = _positions(plan.window_rows, plan.height)
    col, col_taken, col_inside = _positions(plan.window_cols, plan.width)
    tables = (
        np.add.outer(row * plan.width, col),
        np.logical_and.outer(row_taken, col_taken),
        np.logical_and.outer(row_inside, col_inside),
    )
    # (OH, longest run, OW, longest run) → (OH · OW, longest window)
    index, taken, is_token = (table.swapaxes(1, 2).reshape(len(row) * len(col), -1) for table in tables)
    return index, taken, is_token


def _counted_windows(norms: np.ndarray, plan: GridPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return norms (counted, window_size) of the counted windows as float64, and a mask of those that are tokens."""
    index, taken, is_token = _window_table(plan)
    sizes = taken.sum(1)
    frequency = np.bincount(sizes)
    size = int(np.flatnonzero(frequency == frequency.max())[-1])  # the larger of two equally common sizes
    common = sizes == size
    index, is_token = index[common][taken[common]], is_token[common][taken[common]]
    values = np.where(is_token, norms.reshape(len(norms), -1)[:, index].astype(np.float64), 0.0).reshape(-1, size)
    finite = np.isfinite(values).all(1)
    return values[finite], np.tile(is_token, len(norms)).reshape(-1, size)[finite]


def _largest_weight(windows: np.ndarray, temperature: float) -> np.ndarray:
    """Return max softmax(temperature · norm) of each window: (n, size) → (n)."""
    logits = temperature * windows
    largest: np.ndarray = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    return largest


def _spread(windows: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """Return (max − min) / mean of the tokens of each window: (n, size) → (n). Every window has at least one token."""
    tokens = np.where(is_token, windows, np.nan)
    mean = np.nanmean(tokens, 1)
    extent = np.nanmax(tokens, 1) - np.nanmin(tokens, 1)
    spread: np.ndarray = np.divide(extent, mean, out=np.zeros_like(mean), where=mean > 0)
    return spread


def _relative_weights(norms: np.ndarray, plan: GridPlan, temperature: float) -> np.ndarray:
    index, taken, is_token = _window_table(plan)
    with np.errstate(invalid="ignore", over="ignore"):
        logits = temperature * np.where(is_token, norms.reshape(-1)[index].astype(np.float64), 0.0)
        logits = np.where(taken, logits, -np.inf)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        ratio = powers / powers.sum(1, keepdims=True) * taken.sum(1, keepdims=True)
        total = np.bincount(index[is_token], ratio[is_token], minlength=norms.size)
        hits = np.bincount(index[is_token], minlength=norms.size)
        mean: np.ndarray = (total / np.where(hits, hits, np.nan)).reshape(norms.shape)
    return mean


def _solve_temperature(windows: np.ndarray, sign: float) -> tuple[float, float | None]:
    """Return a target for the largest weight, and the temperature of this sign at which 5 % of the windows pass it.

    The target is 0.5, or midway between uniform and 1 for small windows, in which 0.5 is near uniform. In each window
    the largest weight grows with |temperature|, and so do its quantiles, so the temperature is found by bisection.
    """
    uniform = 1 / windows.shape[1]
    target = 0.5 if uniform < 0.4 else (1 + uniform) / 2
    scale = float(np.abs(windows).max(initial=0.0))
    if scale == 0 or windows.shape[1] == 1:
        return target, None

    def reached(temperature: float) -> bool:
        return bool(np.quantile(_largest_weight(windows, sign * temperature), 1 - _TOP_SHARE) >= target)

    low, high = 0.0, 1 / scale
    while not reached(high):
        low, high = high, 2 * high
        if high * scale > _LARGEST_LOGIT:
            return target, None
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return target, sign * high


# ---- advice ----


def _advice(found: Inspection) -> str:
    share = f"{found.nonfinite} of {found.stage_norms[0].size}"
    if not found.counted:
        return (
            f"No window is free of NaN and infinite norms ({share} tokens come with one): there is nothing to choose a "
            "temperature from. Check what the encoder puts out."
        )
    if found.window_size == 1:
        return "A window holds one token: norm pooling copies it, whatever the temperature."
    left_out = f" Tokens of a NaN or infinite norm, {share}, are left out with their windows."
    return _advice_on_weights(found) + (left_out if found.nonfinite else "")


def _advice_on_weights(found: Inspection) -> str:
    windows, uniform, target = found.window_norms, 1 / found.window_size, _show_weight(found.target_weight)
    if not windows.any():
        return "All token norms are zero: every temperature gives average pooling."
    if (windows == windows[:, :1]).all():
        return "The norms inside every window are equal: every temperature gives average pooling."
    median, top = np.quantile(found.largest_weights[found.temperature], (0.5, 1 - _TOP_SHARE))
    text = (
        f"At temperature {found.temperature:g} the largest weight of a window is {_show_weight(median)} at the median "
        f"and {_show_weight(top)} at the 95th percentile ({_show_weight(uniform)} is uniform): "
        f"{_verdict(median, top, uniform)}."
    )
    if found.target_temperature is None:
        return f"{text} No temperature lifts the largest weight to {target} in 5 % of the windows: norms tie."
    temperature = f"a temperature near {found.target_temperature:.2g}"
    return f"{text} A largest weight above {target} in 5 % of the windows takes {temperature}."


def _verdict(median: float, top: float, uniform: float) -> str:
    """Describe pooling on the scale from the mean of a window (uniform weights) to one of its tokens (weight 1)."""
    low, high = ((weight - uniform) / (1 - uniform) for weight in (median, top))
    if high < 0.15:
        return "close to average pooling"
    if low > 0.7:
        return "close to keeping one token of each window"
    return "between average pooling and keeping one token"


def _show_weight(value: float) -> str:
    return f"{value:.2f}" if value >= 0.05 else f"{value:.2g}"
