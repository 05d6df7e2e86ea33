"""Which frames each summary reads and overwrites, and which positions each window covers.

`GridPlan` is the only place that knows the index rules of temporal gridding and the geometry of pooling windows.
It depends on sizes and arguments, never on token values; backends and drawings follow its tables.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from .values import integers, pair, shown, truth, word

SAMPLINGS = ("last", "first")
RESIZES = ("area", "bilinear")

LARGEST = 1 << 31
"""Exclusive limit of the number of frames of a call, and of tokens of a window, padding included: kernels count them
in int32."""


@dataclass(frozen=True)
class Runs:
    """Runs of consecutive positions along one axis: entry i covers start[i], …, start[i] + count[i] − 1."""

    start: tuple[int, ...]
    count: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Level:
    """One temporal scale. Group g shrinks frames `sources[g]` into the `rows × cols` mosaic that replaces `targets[g]`.

    With the frames of a group laid row-major into a mosaic of (rows·H) × (cols·W) tokens, summary token (r, c) is the
    plain mean of the mosaic over `row_runs[r] × col_runs[c]`. This holds for both resizes: an area cell averages a
    box inside one tile; a bilinear sample at an integer scale averages the one or two centre positions per axis.
    """

    frame_stride: int
    rows: int
    cols: int
    targets: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]
    row_runs: Runs
    col_runs: Runs


@dataclass(frozen=True)
class GridPlan:
    """Tables for one call; `grid_plan(...)` builds or finds it.

    The arguments identify a plan (equality, hash, repr); the tables follow from them.

    levels: in the order they run. Each reads the frames as the levels before it left them. Frame indices count from
        the first frame of the first video.
    window_rows, window_cols: the pooling windows, one run per output row and column. Positions before 0 or from the
        image's size on are zero padding that takes part in the window.
    pooled_size: rows and columns of tokens per pooled frame.
    uploads: the plan's tables in tensors, once per device and form; `device_tables` of the backends fills it.
    """

    frame_counts: tuple[int, ...]
    height: int
    width: int
    frame_strides: tuple[int, ...]
    grid_shape: tuple[int, ...]
    sampling: str
    resize: str
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] | None
    padding: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool
    output_size: tuple[int, ...] | None

    levels: tuple[Level, ...] = field(init=False, repr=False, compare=False)
    window_rows: Runs = field(init=False, repr=False, compare=False)
    window_cols: Runs = field(init=False, repr=False, compare=False)
    pooled_size: tuple[int, int] = field(init=False, repr=False, compare=False)
    uploads: dict[Hashable, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"height and width must be at least 1, got {self.height} × {self.width}")
        if max(self.height, self.width) >= LARGEST:
            sides = f"{shown(self.height)} × {shown(self.width)}"
            raise ValueError(f"height and width must be fewer than 2³¹ tokens, got {sides}")
        if any(count < 0 for count in self.frame_counts):
            raise ValueError(f"frame_counts must not be negative, got {shown(list(self.frame_counts))}")
        if sum(self.frame_counts) >= LARGEST:
            raise ValueError(f"frame_counts must sum to fewer than 2³¹ frames, got {shown(sum(self.frame_counts))}")
        shapes = level_shapes(self.frame_strides, self.grid_shape, self.sampling, self.resize)
        sizes = pooled_size(
            self.height,
            self.width,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.output_size,
        )
        rows, cols = (self._windows(axis, size) for axis, size in enumerate(sizes))
        _check_window((max(rows.count), max(cols.count)), self.kernel_size, self.padding, self.output_size)
        levels = tuple(
            self._level(frame_stride, m, n) for frame_stride, (m, n) in zip(self.frame_strides, shapes, strict=True)
        )
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "window_rows", rows)
        object.__setattr__(self, "window_cols", cols)
        object.__setattr__(self, "pooled_size", (len(rows), len(cols)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the arguments alone: what follows from them is made again."""
        return GridPlan, tuple(getattr(self, each.name) for each in fields(self) if each.init)

    @property
    def overwritten(self) -> tuple[int, ...]:
        """Frames that some summary replaces, in order."""
        return tuple(sorted({target for level in self.levels for target in level.targets}))

    @cached_property
    def is_2x2_pooling(self) -> bool:
        """Return whether the windows are 2 × 2 at stride 2, the last ones possibly cut by the frame's edge."""
        return all(
            runs.start == tuple(range(0, 2 * len(runs), 2))
            and runs.count == tuple(min(2, size - s) for s in runs.start)
            for runs, size in ((self.window_rows, self.height), (self.window_cols, self.width))
        )

    @property
    def is_2x2_area(self) -> bool:
        """Return whether every summary is tiled 2 × 2 from area-shrunk thumbnails, so that a node has one thumbnail.

        It depends on the settings alone, not on whether the videos are long enough for every level: kernels sum in
        another order where it does not hold, and a video must give the same bits alone and packed with a longer one.
        """
        return self.resize == "area" and all((level.rows, level.cols) == (2, 2) for level in self.levels)

    @property
    def fusable(self) -> bool:
        """Return whether one kernel can pool and shrink in the same pass: its tables have the fused form."""
        return self.is_2x2_pooling and self.is_2x2_area

    def _level(self, frame_stride: int, rows: int, cols: int) -> Level:
        targets: list[int] = []
        sources: list[tuple[int, ...]] = []
        for first, count in zip(accumulate(self.frame_counts, initial=0), self.frame_counts, strict=False):
            for target, frames in _groups(count, frame_stride, rows * cols, self.sampling):
                targets.append(first + target)
                sources.append(tuple(first + frame for frame in frames))
        mosaic_runs = _area_mosaic if self.resize == "area" else _bilinear_mosaic
        row_runs, col_runs = mosaic_runs(self.height, rows), mosaic_runs(self.width, cols)
        return Level(frame_stride, rows, cols, tuple(targets), tuple(sources), row_runs, col_runs)

    def _windows(self, axis: int, windows: int) -> Runs:
        size = (self.height, self.width)[axis]
        if self.output_size is not None:
            return _adaptive_runs(size, windows)
        kernel, padding = self.kernel_size[axis], self.padding[axis]
        stride = kernel if self.stride is None else self.stride[axis]
        # ceil_mode may open positions beyond the padded input; they never take part
        low, high = (-padding, size + padding) if self.count_include_pad else (0, size)
        starts = [i * stride - padding for i in range(windows)]
        stops = [min(start + kernel, high) for start in starts]
        starts = [max(start, low) for start in starts]
        return Runs(tuple(starts), tuple(map(operator.sub, stops, starts)))


def grid_plan(
    frame_counts: Sequence[int],
    height: int,
    width: int,
    *,
    frame_strides: int | Sequence[int] = (2, 4, 8),
    grid_shape: int | Sequence[int] = (2, 2),
    sampling: str = "last",
    resize: str = "area",
    kernel_size: int | Sequence[int] = (2, 2),
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    output_size: int | Sequence[int] | None = None,
) -> GridPlan:
    """The plan for videos of `frame_counts` frames of height × width tokens; arguments as in `grid_pool`.

    Plans are cached (the 256 last used). Raises ValueError for an argument that is out of range, TypeError for one that
    is not made of integers.
    """
    return cached_plan(
        integers("frame_counts", frame_counts),
        *integers("height and width", (height, width)),
        integers("frame_strides", frame_strides),
        pair("grid_shape", grid_shape),
        word("sampling", sampling),
        word("resize", resize),
        pair("kernel_size", kernel_size),
        None if stride is None else pair("stride", stride),
        pair("padding", padding),
        truth("ceil_mode", ceil_mode),
        truth("count_include_pad", count_include_pad),
        None if output_size is None else pair("output_size", output_size),
    )


cached_plan = lru_cache(maxsize=256)(GridPlan)
"""Function that builds or finds a plan from the values of its arguments, in their order, with sequences as tuples."""


def level_shapes(
    frame_strides: Sequence[int], grid_shape: Sequence[int], sampling: str, resize: str
) -> list[tuple[int, int]]:
    """(rows, cols) of every level's grid. Raises ValueError for an argument that is out of range."""
    if any(stride < 1 for stride in frame_strides):
        raise ValueError(f"frame_strides must be at least 1, got {shown(list(frame_strides))}")
    levels = len(frame_strides)
    if len(grid_shape) not in (2, 2 * levels):
        allowed = "2 entries (rows, cols)" + (f" or {2 * levels} (2 per level)" if levels > 1 else "")
        raise ValueError(f"grid_shape must have {allowed}, got {shown(list(grid_shape))}")
    if any(entry < 1 for entry in grid_shape):
        raise ValueError(f"grid_shape must have rows and cols of at least 1, got {shown(list(grid_shape))}")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {shown(sampling)}")
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(map(repr, RESIZES))}, got {shown(resize)}")
    pairs = list(zip(grid_shape[::2], grid_shape[1::2], strict=True))
    return pairs * levels if len(grid_shape) == 2 else pairs


def pooled_size(
    height: int,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None,
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    output_size: Sequence[int] | None,
) -> tuple[int, int]:
    """Rows and columns of windows, as `torch.nn.AvgPool2d` (or `AdaptiveAvgPool2d` for `output_size`) counts them.

    `height` and `width` may be symbolic. Raises ValueError for an argument that is out of range. A window that is too
    large for some frames only is refused by `GridPlan`, as is an `output_size` that exceeds a frame of symbolic size,
    where a comparison would compile again for some sizes.
    """
    if output_size is not None:
        _check_pair("output_size", output_size, 1)
        if (tuple(kernel_size), stride, tuple(padding)) != ((2, 2), None, (0, 0)) or ceil_mode or not count_include_pad:
            raise ValueError(
                f"output_size={_show(output_size)} chooses the windows by itself: kernel_size, stride, padding, "
                f"ceil_mode and count_include_pad must keep their defaults, got kernel_size={_show(kernel_size)}, "
                f"stride={_show(stride)}, padding={_show(padding)}, ceil_mode={ceil_mode}, "
                f"count_include_pad={count_include_pad}"
            )
        if any(type(size) is int and out > size for size, out in zip((height, width), output_size, strict=True)):
            raise ValueError(
                f"output_size must not exceed the frame of {height} × {width} tokens, got {_show(output_size)}"
            )
        return output_size[0], output_size[1]
    _check_pair("kernel_size", kernel_size, 1)
    _check_pair("padding", padding, 0)
    if stride is not None:
        _check_pair("stride", stride, 1)
    if any(2 * pad > kernel for pad, kernel in zip(padding, kernel_size, strict=True)):
        raise ValueError(f"padding must be at most half of kernel_size={_show(kernel_size)}, got {_show(padding)}")
    if count_include_pad:  # without padding, and with ceil_mode, a small frame cuts the windows
        least = [min(k, 2 * pad + 1) if ceil_mode else k for k, pad in zip(kernel_size, padding, strict=True)]
        _check_window(least, kernel_size, padding, None)
    steps = kernel_size if stride is None else stride
    rows, cols = (
        _num_windows(size, kernel, step, pad, ceil_mode)
        for size, kernel, step, pad in zip((height, width), kernel_size, steps, padding, strict=True)
    )
    if rows < 1 or cols < 1:
        raise ValueError(
            f"kernel_size={_show(kernel_size)} with padding={_show(padding)} leaves no window on a "
            f"{height} × {width} frame: it must not exceed the frame plus twice the padding"
        )
    return rows, cols


def _show(value: Sequence[int] | None) -> str:
    return "None" if value is None else shown(list(value))


def _check_pair(name: str, value: Sequence[int], low: int) -> None:
    if len(value) != 2 or any(entry < low for entry in value):
        raise ValueError(f"{name} must be 2 integers (rows, cols) of at least {low}, got {_show(value)}")


def _check_window(
    window: Sequence[int], kernel_size: Sequence[int], padding: Sequence[int], output_size: Sequence[int] | None
) -> None:
    """Raise ValueError, naming the arguments that choose the windows, if one of window[0] × window[1] is too large."""
    if window[0] * window[1] >= LARGEST:
        by_kernel = f"kernel_size={_show(kernel_size)} with padding={_show(padding)}"
        chosen = by_kernel if output_size is None else f"output_size={_show(output_size)}"
        raise ValueError(f"{chosen} makes a window of {window[0]} × {window[1]} tokens: it must have fewer than 2³¹")


def _num_windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    span = size + 2 * padding - kernel
    if not ceil_mode:
        return span // stride + 1
    # a last window that only opens in the padding on the far side does not count
    opened, useful = -(-span // stride) + 1, -(-(size + padding) // stride)
    return opened + (useful - opened) * (useful < opened)  # min(opened, useful), without a guard on symbolic sizes


def _groups(frames: int, stride: int, group: int, sampling: str) -> list[tuple[int, list[int]]]:
    """(target, sources) of every whole group of one video, frames counted from its first."""
    if sampling == "first":
        segment = stride * group
        firsts = range(0, frames // segment * segment, segment)
        return [(first + segment - 1, list(range(first, first + segment, stride))) for first in firsts]
    sampled = _last_of_each_stride(frames, stride)
    whole = [sampled[k : k + group] for k in range(0, len(sampled) // group * group, group)]
    return [(sources[-1], sources) for sources in whole]


def _last_of_each_stride(frames: int, stride: int) -> list[int]:
    """round_half_even(linspace(0, frames, q + 1)[1:] − 1) for q = frames // stride, in torch's float32 arithmetic.

    The published code samples this way, so float32 decides the ties where `stride` does not divide `frames`.
    torch.linspace counts from both ends, with one rounding (fused multiply-add) where it is vectorised and two where it
    is not. Up to 5000 frames that makes no difference to a frame index; beyond, this is the fused one.
    """
    q = frames // stride
    if q == 0:
        return []
    step = array("f", [frames / q])[0]  # array("f") rounds to float32; what goes into it is exact in a Python float
    half = (q + 1) // 2
    points = array("f", [step * k if k < half else frames - step * (q - k) for k in range(1, q + 1)])
    return [min(max(round(point), 0), frames - 1) for point in array("f", [point - 1 for point in points])]


def _adaptive_runs(size: int, windows: int) -> Runs:
    """Windows of `AdaptiveAvgPool2d`: i covers ⌊i·size/windows⌋ up to ⌈(i+1)·size/windows⌉, exclusive."""
    starts = [i * size // windows for i in range(windows)]
    stops = [-(-(i + 1) * size // windows) for i in range(windows)]
    return Runs(tuple(starts), tuple(map(operator.sub, stops, starts)))


@lru_cache(maxsize=32)  # levels mostly have the same grid
def _area_mosaic(size: int, tiles: int) -> Runs:
    """Mosaic positions behind each summary position when every tile is shrunk to ⌈size/tiles⌉ and the whole cropped."""
    tile = -(-size // tiles)
    cells = _adaptive_runs(size, tile)
    starts = [position // tile * size + cells.start[position % tile] for position in range(size)]
    return Runs(tuple(starts), tuple(cells.count[position % tile] for position in range(size)))


@lru_cache(maxsize=32)
def _bilinear_mosaic(size: int, tiles: int) -> Runs:
    """Mosaic positions behind each summary position: the one or two at the centre of every `tiles` positions.

    Half-pixel sampling at the integer scale `tiles` lands on position·tiles + (tiles − 1)/2: a mosaic position for odd
    `tiles`, midway between two for even.
    """
    centre, taps = (tiles - 1) // 2, 2 - tiles % 2
    return Runs(tuple(position * tiles + centre for position in range(size)), (taps,) * size)
