"""What ST-GridPool does to one input: its numbers and one line of advice on the temperature.

`inspect_tokens` measures; `inspect_command` (`stgp inspect`) reads a file, measures, prints, and `figure.py` draws.
Frame indices and windows come from the input's `GridPlan`; tokens pass through the public functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..functional import GridPool, temporal_grid, token_norm
from ..io.token_files import load_input
from ..ops import check_tokens
from ..plan import GridPlan, Runs, grid_plan

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Inspection", "LargestWeights", "inspect_command", "inspect_tokens"]

TEMPERATURES = (1.0, 2.0, 5.0, 10.0)
"""Temperatures that every inspection looks at, next to the one in its options."""

WEIGHT_BINS = np.linspace(0, 1, 101)
"""Edges of the histograms of the largest weight."""

_TOP_SHARE = 0.05
_NORM = ("norm_type", "normalize_norm")

# Beyond this |temperature · norm| only differences far below a bfloat16 step would still separate tokens.
_LARGEST_LOGIT = 1e5


# ---- numbers ----


@dataclass(frozen=True)
class LargestWeights:
    """Distribution of the largest softmax weight of a window at one temperature.

    p5, p50, p95: quantiles over the counted windows, NaN where there is none. counts: histogram over `WEIGHT_BINS`.
    """

    temperature: float
    p5: float
    p50: float
    p95: float
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class Inspection:
    """What `inspect_tokens` found in one video of shape (T, H, W, C).

    Windows: norm pooling meets the tokens after temporal gridding, so that is where windows are taken. Counted are
    those of the commonest size that hold finite norms only, so that one uniform weight, 1 / window_size, holds for all.

    shape, dtype: of the tokens. plan: frames and windows, as every backend follows them.
    temperature, norm_type, normalize_norm: the options of `grid_pool`.
    stage_norms: (levels + 1, T, H, W), norms of the tokens as they come and after each level of temporal gridding.
    nonfinite: tokens that come with a NaN or infinite norm.
    max_over_median: largest over median norm of the tokens as they come; NaN if the median is 0.
    window_size: positions of a counted window, zero padding that takes part included.
    counted, windows: counted windows and all windows, over all frames.
    spread: (max − min) / mean of the norms in each counted window, padding left out; 0 where the mean is 0.
    largest_weights: one entry per temperature, in rising order.
    target_weight, target_temperature: at this temperature the largest weight passes target_weight in 5 % of the
        windows; None where no temperature brings that about.
    advice: one or two sentences on the temperature.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    plan: GridPlan
    temperature: float
    norm_type: float
    normalize_norm: bool
    stage_norms: np.ndarray
    nonfinite: int
    max_over_median: float
    window_size: int
    counted: int
    windows: int
    spread: np.ndarray
    largest_weights: tuple[LargestWeights, ...]
    target_weight: float
    target_temperature: float | None
    advice: str

    @property
    def norms(self) -> np.ndarray:
        """(T, H, W): norms of the tokens as they come."""
        norms: np.ndarray = self.stage_norms[0]
        return norms

    @property
    def gridded_norms(self) -> np.ndarray:
        """(T, H, W): norms of the tokens after temporal gridding, those that norm pooling weighs by."""
        norms: np.ndarray = self.stage_norms[-1]
        return norms

    @property
    def overwritten(self) -> tuple[int, ...]:
        """Frames that temporal gridding overwrites."""
        return self.plan.overwritten

    @property
    def pooled_shape(self) -> tuple[int, int, int, int]:
        """(T, OH, OW, C) of `grid_pool`'s result."""
        return (self.shape[0], *self.plan.pooled_size, self.shape[3])

    @property
    def spread_p50(self) -> float:
        return quantile(self.spread, 0.5)

    @property
    def spread_p95(self) -> float:
        return quantile(self.spread, 0.95)

    @property
    def norm_name(self) -> str:
        """What the norm is called on an axis."""
        if self.norm_type == math.inf:
            return "max |t|"
        if self.norm_type == 2:
            return "RMS" if self.normalize_norm else "L2 norm"
        mean = "mean" if self.normalize_norm else "Σ"
        return f"({mean} |t|^{self.norm_type:g})^(1/{self.norm_type:g})"


def inspect_tokens(x: Tensor, **options: Any) -> Inspection:
    """Measures what `grid_pool(x, **options)` does to the tokens x of one video, (T, H, W, C) of any float dtype.

    `options` are those of `grid_pool` without `frame_counts` and `out`. Needs, beside x, one gridded copy of it.

    Raises TypeError or ValueError for another x or for an option that is unknown or out of range.
    """
    check_tokens(x)
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"one video of at least one frame is inspected, (T, H, W, C), got shape {tuple(x.shape)}")
    backend = options.pop("backend", "auto")
    arguments = GridPool(**options).arguments
    temperature, weighting = float(arguments["temperature"]), {name: arguments[name] for name in _NORM}
    tables = {name: value for name, value in arguments.items() if name not in ("temperature", *_NORM)}
    plan = grid_plan(x.shape[:1], x.shape[1], x.shape[2], **tables)

    stage_norms = _stage_norms(x.detach(), plan, weighting, backend)
    windows, inside, total = _counted_windows(stage_norms[-1], plan)
    temperatures = sorted({*TEMPERATURES, temperature})
    largest_weights = tuple(_largest_weights(windows, temperature) for temperature in temperatures)
    target, solved = _solve_temperature(windows, -1.0 if temperature < 0 else 1.0)
    norms = stage_norms[0]
    finite = norms[np.isfinite(norms)]
    median = quantile(finite, 0.5)
    found: dict[str, Any] = {
        "nonfinite": int(norms.size - finite.size),
        "max_over_median": float(finite.max() / median) if median > 0 else math.nan,
        "window_size": windows.shape[1],
        "counted": len(windows),
        "windows": total,
        "target_weight": target,
        "target_temperature": solved,
    }
    return Inspection(
        shape=(x.shape[0], x.shape[1], x.shape[2], x.shape[3]),
        dtype=str(x.dtype).removeprefix("torch."),
        plan=plan,
        temperature=temperature,
        norm_type=float(weighting["norm_type"]),
        normalize_norm=bool(weighting["normalize_norm"]),
        stage_norms=stage_norms,
        spread=_spread(windows, inside),
        largest_weights=largest_weights,
        advice=_advice(windows, temperature, norms.size, found),
        **found,
    )


def _stage_norms(x: Tensor, plan: GridPlan, norm: dict[str, Any], backend: str) -> np.ndarray:
    """(levels + 1, T, H, W): norms of x and of what each level of temporal gridding leaves."""
    stages = [token_norm(x, **norm, backend=backend)]
    for level in range(1, len(plan.levels) + 1):
        if not plan.levels[level - 1].targets:
            stages.append(stages[-1])
            continue
        gridded = temporal_grid(x, **gridding_options(plan, level), backend=backend)
        stages.append(token_norm(gridded, **norm, backend=backend))
    return torch.stack(stages).cpu().numpy()


def gridding_options(plan: GridPlan, levels: int) -> dict[str, Any]:
    """Arguments of `temporal_grid` for the plan's first levels alone."""
    # a grid_shape of 2 entries holds for every level, a longer one has 2 for each
    shape = plan.grid_shape if len(plan.grid_shape) == 2 else plan.grid_shape[: 2 * levels]
    return {
        "frame_strides": plan.frame_strides[:levels],
        "grid_shape": shape,
        "sampling": plan.sampling,
        "resize": plan.resize,
    }


# ---- windows ----


def _positions(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Runs as (positions (windows, longest run), which of them take part)."""
    start, count = np.array(runs.start)[:, None], np.array(runs.count)[:, None]
    offset = np.arange(max(runs.count))
    return start + np.minimum(offset, count - 1), offset < count


def _window_table(plan: GridPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per window and position: row, column, whether it takes part, whether it is a token (not padding).

    Each is (OH · OW, longest window); rows and columns of padding are moved onto the frame.
    """
    rows, row_taken = _positions(plan.window_rows)
    cols, col_taken = _positions(plan.window_cols)
    shape = (len(rows), len(cols), rows.shape[1], cols.shape[1])

    def table(by_row: np.ndarray, by_col: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = by_row[:, None, :, None], by_col[None, :, None, :]
        flat = [np.broadcast_to(values, shape).reshape(shape[0] * shape[1], -1) for values in both]
        return flat[0], flat[1]

    row, col = table(rows, cols)
    taken = np.logical_and(*table(row_taken, col_taken))
    token = taken & (row >= 0) & (row < plan.height) & (col >= 0) & (col < plan.width)
    return row.clip(0, plan.height - 1), col.clip(0, plan.width - 1), taken, token


def _counted_windows(norms: np.ndarray, plan: GridPlan) -> tuple[np.ndarray, np.ndarray, int]:
    """Norms (n, window_size) of the windows of the commonest size with finite norms, in float64.

    Also which of them are tokens (the others are padding, norm 0), and the number of all windows.
    """
    row, col, taken, token = _window_table(plan)
    sizes = taken.sum(1)
    size = int(np.bincount(sizes)[::-1].argmax())
    size = len(np.bincount(sizes)) - 1 - size  # the larger of two sizes that are as common
    common = sizes == size
    order = np.argsort(~taken[common], axis=1, kind="stable")[:, :size]
    row, col, token = (np.take_along_axis(table[common], order, axis=1) for table in (row, col, token))
    values = np.where(token, norms[:, row, col].astype(np.float64), 0.0).reshape(-1, size)
    inside = np.broadcast_to(token, (len(norms), *token.shape)).reshape(-1, size)
    finite = np.isfinite(values).all(1)
    return values[finite], inside[finite], len(norms) * len(sizes)


def _largest_weight(windows: np.ndarray, temperature: float) -> np.ndarray:
    """max softmax(temperature · norm) of each window: (n, size) → (n)."""
    logits = temperature * windows
    largest: np.ndarray = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    return largest


def _largest_weights(windows: np.ndarray, temperature: float) -> LargestWeights:
    largest = _largest_weight(windows, temperature)
    p5, p50, p95 = (quantile(largest, q) for q in (0.05, 0.5, 0.95))
    # rounding may put 1 / Σ a hair above 1, outside the last bin
    return LargestWeights(temperature, p5, p50, p95, np.histogram(largest.clip(0, 1), WEIGHT_BINS)[0])


def _spread(windows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(max − min) / mean of each window's tokens: (n, size) → (n). Every window holds at least one token."""
    if not len(windows):
        return np.zeros(0)
    high = np.where(inside, windows, -np.inf).max(1)
    low = np.where(inside, windows, np.inf).min(1)
    mean = np.where(inside, windows, 0).sum(1) / inside.sum(1)
    spread: np.ndarray = np.divide(high - low, mean, out=np.zeros_like(mean), where=mean > 0)
    return spread


def quantile(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q)) if values.size else math.nan


def _solve_temperature(windows: np.ndarray, sign: float) -> tuple[float, float | None]:
    """A target for the largest weight and the temperature of this sign at which 5 % of the windows pass it.

    The target is 0.5, or midway between uniform and 1 for windows so small that 0.5 is near uniform. In each window
    the largest weight grows with |temperature|, and so does a quantile of it: bisection finds the temperature.
    """
    uniform = 1 / windows.shape[1]
    target = 0.5 if uniform < 0.4 else (1 + uniform) / 2
    scale = float(np.abs(windows).max(initial=0.0))
    if scale == 0 or windows.shape[1] == 1:
        return target, None

    def reached(temperature: float) -> bool:
        return quantile(_largest_weight(windows, sign * temperature), 1 - _TOP_SHARE) >= target

    low, high = 0.0, 1 / scale
    while not reached(high):
        low, high = high, 2 * high
        if high * scale > _LARGEST_LOGIT:
            return target, None
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return target, sign * high


def window_weights(norms: np.ndarray, plan: GridPlan, temperature: float) -> np.ndarray:
    """Each token's weight over the uniform weight of its window: norms (H, W) → (H, W); 1 is average pooling.

    A token of several windows gets their mean, a token of none (or of a window with a norm that is not finite) NaN.
    """
    row, col, taken, token = _window_table(plan)
    with np.errstate(invalid="ignore", over="ignore"):
        logits = temperature * np.where(token, norms[row, col].astype(np.float64), 0.0)
        logits = np.where(taken, logits, -np.inf)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        ratio = powers / powers.sum(1, keepdims=True) * taken.sum(1, keepdims=True)
        total, hits = np.zeros(norms.shape), np.zeros(norms.shape)
        np.add.at(total, (row[token], col[token]), ratio[token])
        np.add.at(hits, (row[token], col[token]), 1)
        mean: np.ndarray = total / np.where(hits, hits, np.nan)
    return mean


# ---- advice ----


def _advice(windows: np.ndarray, temperature: float, tokens: int, found: dict[str, Any]) -> str:
    size, counted = found["window_size"], found["counted"]
    if not counted:
        return (
            f"No window is free of NaN and infinite norms ({found['nonfinite']} of {tokens} tokens come with one): "
            "there is nothing to choose a temperature from. Check what the encoder puts out."
        )
    if size == 1:
        return "A window holds one token: norm pooling copies it, whatever the temperature."
    text = _advice_on_weights(windows, temperature, found)
    if found["nonfinite"]:
        text += f" Tokens of a NaN or infinite norm, {found['nonfinite']} of {tokens}, are left out with their windows."
    return text


def _advice_on_weights(windows: np.ndarray, temperature: float, found: dict[str, Any]) -> str:
    size, target, solved = found["window_size"], found["target_weight"], found["target_temperature"]
    uniform = 1 / size
    if not windows.any():
        return "All token norms are zero: every temperature gives average pooling."
    if (windows == windows[:, :1]).all():
        return "The norms inside every window are equal: every temperature gives average pooling."
    largest = _largest_weight(windows, temperature)
    middle, top = quantile(largest, 0.5), quantile(largest, 1 - _TOP_SHARE)
    text = (
        f"At temperature {temperature:g} the largest weight of a window is {show_weight(middle)} at the median and "
        f"{show_weight(top)} at the 95th percentile ({show_weight(uniform)} is uniform): {_verdict(middle, top, size)}."
    )
    if solved is None:
        return (
            f"{text} No temperature lifts the largest weight to {show_weight(target)} in 5 % of the windows: norms tie."
        )
    wanted = f"For a largest weight above {show_weight(target)} in 5 % of the windows"
    return f"{text} {wanted} take a temperature near {solved:.2g}."


def _verdict(middle: float, top: float, size: int) -> str:
    """Where pooling stands between the mean of a window (0) and one of its tokens (1)."""
    low, high = ((weight - 1 / size) / (1 - 1 / size) for weight in (middle, top))
    if high < 0.15:
        return "close to average pooling"
    if low > 0.7:
        return "close to keeping one token of each window"
    return "between average pooling and keeping one token"


def show_weight(value: float) -> str:
    return f"{value:.2f}" if value >= 0.05 else f"{value:.2g}"


# ---- what the diagram of temporal gridding shows ----


@dataclass(frozen=True)
class Summary:
    """One summary: `level` shrinks `sources` into frame `target`; `nested` are the sources that are summaries already.

    Levels count from 1.
    """

    level: int
    target: int
    sources: tuple[int, ...]
    nested: tuple[int, ...]


def list_summaries(plan: GridPlan, frames: int | None = None) -> list[Summary]:
    """The plan's summaries in the order they are written; with `frames`, those within that many first frames."""
    summaries = []
    written: set[int] = set()
    for number, level in enumerate(plan.levels, start=1):
        for target, sources in zip(level.targets, level.sources, strict=True):
            if frames is None or max(target, *sources) < frames:
                nested = tuple(frame for frame in sources if frame in written)
                summaries.append(Summary(number, target, sources, nested))
        written.update(level.targets)
    return summaries


def choose_frames(total: int, count: int, overwritten: Sequence[int]) -> list[int]:
    """At most `count` of `total` frames, evenly spread, with an overwritten one among them if there is any."""
    if total <= count:
        return list(range(total))
    chosen = [k * (total - 1) // (count - 1) for k in range(count)]
    if overwritten and not set(chosen) & set(overwritten):
        _, place, frame = min((abs(c - f), k, f) for k, c in enumerate(chosen) for f in overwritten)
        chosen[place] = frame
    return sorted(set(chosen))


# ---- words ----


def counted_windows(inspection: Inspection) -> str:
    if inspection.counted == inspection.windows:
        return f"{plural(inspection.windows, 'window')} of {inspection.window_size}"
    return f"{inspection.counted} of {inspection.windows} windows: {inspection.window_size} positions, finite"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def show_number(value: float) -> str:
    return f"{value:.3g}"


def show_shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


# ---- the command ----


def inspect_command(
    path: Path,
    output: Path,
    *,
    options: dict[str, Any],
    num_frames: int,
    grid: tuple[int, int],
    tap: str,
    key: str | None,
    force: bool,
    console: Console,
) -> None:
    """`stgp inspect`: inspects a file's tokens, or those of a video it is encoded into, prints and draws what it found.

    options: those of `grid_pool` except `out`. The others say how to read the file, see `load_input`. Of a batch
    (B, T, H, W, C) and of packed videos (`frame_counts`) the first with frames is inspected, and the output says so.

    Raises FileExistsError, ImportError, TypeError or ValueError before anything is written.
    """
    from rich.markup import escape

    from .figure import check_picture, require_matplotlib, save_figure

    check_picture(output, force)
    require_matplotlib()
    with console.status(f"reading {escape(path.name)}") as status:
        x, frames = load_input(
            path, key=key, num_frames=num_frames, grid=grid, tap=tap,
            progress=lambda step, done, total: status.update(f"{step}: {done} of {total} frames"),
        )  # fmt: skip
    options = dict(options)
    x, frames, which = _first_video(x, frames, options.pop("frame_counts", None))
    inspection = inspect_tokens(x, **options)
    save_figure(inspection, frames, output, force=force, name=path.name)
    _print(inspection, f"{path.name}{which}", console)
    console.print(f"figure: {output}", style="bold", markup=False, highlight=False, soft_wrap=True)


def _first_video(
    x: Tensor, frames: np.ndarray | None, frame_counts: Sequence[int] | None
) -> tuple[Tensor, np.ndarray | None, str]:
    """The first video of a batch, or of packed ones that have frames, its frames, and words for which one it is."""
    if frame_counts is not None:
        if x.dim() != 4 or not frame_counts or sum(frame_counts) != len(x) or min(frame_counts) < 0:
            raise ValueError(
                f"frame_counts must pack the frames of a (T, H, W, C) tensor, got {list(frame_counts)} for shape "
                f"{tuple(x.shape)}"
            )
        number, videos = next((k for k, count in enumerate(frame_counts) if count), 0), len(frame_counts)
        first = frame_counts[number]
        x, frames = x[:first], None if frames is None else frames[:first]
    elif x.dim() == 5 and len(x):
        number, videos = 0, len(x)
        x, frames = x[0], None if frames is None or frames.ndim != 5 else frames[0]
    else:
        return x, frames, ""
    return x, frames, f", video {number + 1} of {videos}" if videos > 1 else ""


def _print(inspection: Inspection, name: str, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(name), title_justify="left", show_header=False)
    shape, pooled = show_shape(inspection.shape), show_shape(inspection.pooled_shape)
    table.add_row("tokens", f"{shape} {inspection.dtype} → {pooled}")
    table.add_row("frames overwritten", f"{len(inspection.overwritten)} of {inspection.shape[0]}")
    if math.isfinite(inspection.max_over_median):
        largest = f"largest is {show_number(inspection.max_over_median)} × the median"
        table.add_row(f"norm ({inspection.norm_name})", largest)
    if inspection.nonfinite:
        table.add_row("NaN or infinite norms", f"{inspection.nonfinite} of {inspection.norms.size} tokens")
    if inspection.counted:
        spread = f"p50 {show_number(inspection.spread_p50)}, p95 {show_number(inspection.spread_p95)}"
        table.add_row("spread inside windows", spread)
        for weights in inspection.largest_weights:
            quantiles = f"p5 {weights.p5:.2f}, p50 {weights.p50:.2f}, p95 {weights.p95:.2f}"
            table.add_row(f"largest weight at {weights.temperature:g}", quantiles)
    table.add_row("counted", counted_windows(inspection))
    console.print(table)
    console.print(inspection.advice, markup=False, highlight=False)
