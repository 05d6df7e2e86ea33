"""ST-GridPool implemented from its definition by plain loops in NumPy, in extended precision.

It is an independent check for the tests: it shares no code with the package, is slow, and expects small arrays.
Every function implements one part of the definition: the sampled frames, the rows that a cell averages, the
positions of a window, those of its padding, the norm of a token.

Arrays are `(T, H, W, C)` or `(B, T, H, W, C)`. Results are always of type `Exact`. Norms that overflow only in narrower
types do not overflow here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Exact = np.longdouble
"""Type of all values, wider than float64, since float64 results of the package are compared with these."""

Round = Callable[[Array], Array]
Group = tuple[int, list[int]]

silent = np.errstate(all="ignore")  # NaN, infinities and overflow are valid results


# ---------------------------------------------------------------------------------------------- token norm


def norm_of(token: Array, norm_type: float, normalize_norm: bool, norm_channels: int | None) -> float:
    """Return the norm of one token, a vector over the channels, by the first `norm_channels` of them."""
    magnitudes = np.abs(token[:norm_channels])
    if norm_type == math.inf:
        return magnitudes.max()
    powers = magnitudes**norm_type
    total = powers.sum()
    if normalize_norm:
        total = total / len(magnitudes)
    return total ** (Exact(1) / norm_type)


@silent
def token_norm(
    x: Array, norm_type: float = 2.0, normalize_norm: bool = True, norm_channels: int | None = None
) -> Array:
    """Return the norm of every token, of shape `x.shape[:-1]`."""
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive, not {norm_type}")
    x = np.asarray(x, dtype=Exact)
    norms = np.empty(x.shape[:-1], Exact)
    for position in np.ndindex(*norms.shape):
        norms[position] = norm_of(x[position], norm_type, normalize_norm, norm_channels)
    return norms


# --------------------------------------------------------------------------------- which frames are sampled


def float32_linspace(end: int, steps: int) -> list[np.float32]:
    """Compute `torch.linspace(0, end, steps, dtype=torch.float32)`.

    The first half counts up from 0, the second half counts down from `end`, and `step` is rounded to float32.
    PyTorch's vectorised CPU code fuses the product and the sum (one rounding), its plain code does not (two).
    This function fuses them, since the product is exact in float64. Values may differ in the last bit, but the
    rounded frame numbers are equal for every T <= 4096 and stride <= 16.
    """
    if steps == 1:
        return [np.float32(0)]
    step = np.float32(end) / np.float32(steps - 1)
    values = []
    for i in range(steps):
        if i < steps // 2:
            values.append(np.float32(float(step) * i))
        else:
            values.append(np.float32(float(end) - float(step) * (steps - 1 - i)))
    return values


def sampled_groups(T: int, f: int, S: int, sampling: str = "last") -> list[Group]:
    """Return the groups of one level, each as `(target frame, [S source frames])`."""
    if f < 1 or S < 1:
        raise ValueError(f"stride {f} and grid size {S} must be positive")
    groups: list[Group] = []

    if sampling == "last":
        q = T // f
        line = float32_linspace(T, q + 1)
        frames = []
        for k in range(q):
            frame = int(np.rint(line[k + 1] - np.float32(1)))  # rint rounds halves to even
            frames.append(min(max(frame, 0), T - 1))
        for first in range(0, q - S + 1, S):
            sources = frames[first : first + S]
            groups.append((sources[-1], sources))
        return groups

    if sampling == "first":
        K = f * S
        for j in range(T // K):
            groups.append((j * K + K - 1, [j * K + k * f for k in range(S)]))
        return groups

    raise ValueError(f"sampling must be 'last' or 'first', not {sampling!r}")


# ------------------------------------------------------------------------------------------- shrinking frames


def adaptive_run(i: int, size: int, cells: int) -> list[int]:
    """Return the positions that cell `i` of `cells` covers in adaptive average pooling."""
    start = math.floor(i * size / cells)
    end = math.ceil((i + 1) * size / cells)
    return list(range(start, end))


def area_summary(frames: list[Array], m: int, n: int) -> Array:
    """Shrink every frame to (ceil(H/m), ceil(W/n)), join the tiles, and crop the mosaic to (H, W)."""
    H, W, C = frames[0].shape
    h, w = math.ceil(H / m), math.ceil(W / n)
    summary = np.empty((H, W, C), Exact)
    for y in range(H):
        for x in range(W):
            frame = frames[(y // h) * n + x // w]  # tiles are laid row by row
            rows = adaptive_run(y % h, H, h)
            columns = adaptive_run(x % w, W, w)
            total = np.zeros(C, Exact)
            for r in rows:
                for c in columns:
                    total = total + frame[r, c]
            summary[y, x] = total / (len(rows) * len(columns))
    return summary


def bilinear_taps(i: int, size_in: int, size_out: int) -> list[tuple[int, float]]:
    """Return the `(position, weight)` pairs of output `i` with half-pixel centres, without weights of 0."""
    source = max((i + 0.5) * size_in / size_out - 0.5, 0.0)
    lower = math.floor(source)
    upper = min(lower + 1, size_in - 1)
    fraction = source - lower
    return [(position, weight) for position, weight in ((lower, 1 - fraction), (upper, fraction)) if weight]


def bilinear_summary(frames: list[Array], m: int, n: int) -> Array:
    """Resize the (m*H, n*W) mosaic of the frames to (H, W)."""
    H, W, C = frames[0].shape
    summary = np.zeros((H, W, C), Exact)
    for y in range(H):
        for x in range(W):
            for r, row_weight in bilinear_taps(y, m * H, H):
                for c, column_weight in bilinear_taps(x, n * W, W):
                    frame = frames[(r // H) * n + c // W]
                    summary[y, x] += row_weight * column_weight * frame[r % H, c % W]
    return summary


def level_shapes(grid_shape: Sequence[int], levels: int) -> list[tuple[int, int]]:
    """Return (m, n) of every level. Two numbers apply to all levels; otherwise there are two per level."""
    if len(grid_shape) == 2:
        m, n = grid_shape
        return [(m, n)] * levels
    if len(grid_shape) != 2 * levels:
        raise ValueError(f"grid_shape needs 2 or {2 * levels} entries, not {len(grid_shape)}")
    return [(grid_shape[2 * level], grid_shape[2 * level + 1]) for level in range(levels)]


@silent
def temporal_grid(
    x: Array,
    frame_strides: Sequence[int] = (2, 4, 8),
    grid_shape: Sequence[int] = (2, 2),
    sampling: str = "last",
    resize: str = "area",
    frame_counts: Sequence[int] | None = None,
    round_to: Round | None = None,
) -> Array:
    """Pyramid temporal gridding.

    frame_counts: numbers of frames of the videos packed along T, the same in every batch entry. round_to: rounds a
    summary as storing it in the dtype of the tensor does.
    """
    x = np.asarray(x, dtype=Exact)
    if x.ndim == 5:
        options = (frame_strides, grid_shape, sampling, resize, frame_counts, round_to)
        return np.array([temporal_grid(clip, *options) for clip in x]).reshape(x.shape)
    if x.ndim != 4:
        raise ValueError(f"x must have 4 or 5 dimensions, not {x.ndim}")
    if sampling not in ("last", "first"):
        raise ValueError(f"sampling must be 'last' or 'first', not {sampling!r}")
    if resize not in ("area", "bilinear"):
        raise ValueError(f"resize must be 'area' or 'bilinear', not {resize!r}")
    shrink = area_summary if resize == "area" else bilinear_summary

    if frame_counts is None:
        frame_counts = [len(x)]
    if min(frame_counts, default=0) < 0 or sum(frame_counts) != len(x):
        raise ValueError(f"frame_counts {list(frame_counts)} do not add up to {len(x)} frames")

    videos = []
    first = 0
    for count in frame_counts:
        video = x[first : first + count].copy()
        first += count
        for f, (m, n) in zip(frame_strides, level_shapes(grid_shape, len(frame_strides)), strict=True):
            before = video.copy()  # a level reads frames as the levels before it left them
            for target, sources in sampled_groups(count, f, m * n, sampling):
                summary = shrink([before[frame] for frame in sources], m, n)
                video[target] = summary if round_to is None else round_to(summary)
        videos.append(video)
    return np.concatenate(videos) if videos else x.copy()


# ------------------------------------------------------------------------------------------------- pooling


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return rows, columns


def window_positions(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> list[list[int]]:
    """Return the positions of every window along one axis of `size` tokens.

    Positions below 0 and from `size` on are padding. Positions beyond the padding are left out.
    """
    if kernel < 1 or stride < 1 or padding < 0:
        raise ValueError(f"no windows with kernel {kernel}, stride {stride}, padding {padding}")
    if 2 * padding > kernel:
        raise ValueError(f"padding {padding} exceeds half the kernel {kernel}")
    room = size + 2 * padding - kernel  # how far the first window can move inside the padded input
    if ceil_mode:
        count = math.ceil(room / stride) + 1
        if (count - 1) * stride >= size + padding:  # the last window has to start inside input or left padding
            count -= 1
    else:
        count = math.floor(room / stride) + 1
    if count < 1:
        raise ValueError(f"kernel {kernel} does not fit {size} positions with padding {padding}")

    windows = []
    for i in range(count):
        start = i * stride - padding
        windows.append([p for p in range(start, start + kernel) if p < size + padding])
    return windows


def pool_window(
    frame: Array,
    rows: list[int],
    columns: list[int],
    count_include_pad: bool,
    temperature: float,
    norm_type: float,
    normalize_norm: bool,
    norm_channels: int | None,
) -> Array:
    """Return the softmax-weighted sum of one window's tokens."""
    H, W, C = frame.shape
    tokens: list[Array] = []
    norms: list[float] = []
    for r in rows:
        for c in columns:
            if 0 <= r < H and 0 <= c < W:
                tokens.append(frame[r, c])
                norms.append(norm_of(frame[r, c], norm_type, normalize_norm, norm_channels))
            elif count_include_pad:
                tokens.append(np.zeros(C, Exact))
                norms.append(0.0)

    scores = temperature * np.array(norms, Exact)
    weights = np.exp(scores - scores.max())
    weights = weights / weights.sum()
    result = np.zeros(C, Exact)
    for weight, token in zip(weights, tokens, strict=True):
        result = result + weight * token
    return result


@silent
def norm_pool(
    x: Array,
    kernel_size: int | Sequence[int] = (2, 2),
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    output_size: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    norm_type: float = 2.0,
    normalize_norm: bool = True,
    norm_channels: int | None = None,
) -> Array:
    """Norm-based spatial pooling."""
    x = np.asarray(x, dtype=Exact)
    if x.ndim not in (4, 5):
        raise ValueError(f"x must have 4 or 5 dimensions, not {x.ndim}")
    if not math.isfinite(temperature):
        raise ValueError(f"temperature must be finite, not {temperature}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive, not {norm_type}")
    *lead, H, W, C = x.shape

    if output_size is not None:
        defaults = pair(kernel_size) == (2, 2) and stride is None and pair(padding) == (0, 0)
        if not defaults or ceil_mode or not count_include_pad:
            raise ValueError("output_size replaces kernel_size, stride, padding, ceil_mode, count_include_pad")
        OH, OW = pair(output_size)
        if OH < 1 or OW < 1:
            raise ValueError(f"output_size must be positive, not {output_size}")
        if OH > H or OW > W:
            raise ValueError(f"output_size must not exceed {H} × {W}, not {output_size}")
        row_windows = [adaptive_run(i, H, OH) for i in range(OH)]
        column_windows = [adaptive_run(i, W, OW) for i in range(OW)]
    else:
        kernel, pad = pair(kernel_size), pair(padding)
        step = kernel if stride is None else pair(stride)
        row_windows = window_positions(H, kernel[0], step[0], pad[0], ceil_mode)
        column_windows = window_positions(W, kernel[1], step[1], pad[1], ceil_mode)

    out = np.empty((*lead, len(row_windows), len(column_windows), C), Exact)
    for index in np.ndindex(*lead):
        for i, rows in enumerate(row_windows):
            for j, columns in enumerate(column_windows):
                out[(*index, i, j)] = pool_window(
                    x[index], rows, columns, count_include_pad, temperature, norm_type, normalize_norm, norm_channels
                )
    return out


# ---------------------------------------------------------------------------------------------- both together


def grid_pool(
    x: Array,
    frame_strides: Sequence[int] = (2, 4, 8),
    grid_shape: Sequence[int] = (2, 2),
    sampling: str = "last",
    resize: str = "area",
    kernel_size: int | Sequence[int] = (2, 2),
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    output_size: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    norm_type: float = 2.0,
    normalize_norm: bool = True,
    norm_channels: int | None = None,
    frame_counts: Sequence[int] | None = None,
    round_to: Round | None = None,
) -> Array:
    """Pyramid temporal gridding, then norm-based spatial pooling."""
    grid = temporal_grid(x, frame_strides, grid_shape, sampling, resize, frame_counts, round_to)
    return norm_pool(
        grid,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        output_size,
        temperature,
        norm_type,
        normalize_norm,
        norm_channels,
    )
