"""The published formulas, op by op in x.dtype by PyTorch: channels first, one frame at a time, unfold, softmax.

The errors of a kernel may be at most twice those of these functions, which use no function of the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_groups(frames: int, stride: int, group: int, sampling: str) -> list[tuple[int, list[int]]]:
    """Return (target, sources) of every complete group of one video."""
    if sampling == "first":
        segment = stride * group
        return [
            (j * segment + segment - 1, [j * segment + k * stride for k in range(group)])
            for j in range(frames // segment)
        ]
    ends = torch.linspace(0, frames, frames // stride + 1, dtype=torch.float32)[1:]
    sampled = (ends - 1).round().long().clamp(0, max(frames - 1, 0))
    return [(int(sources[-1]), sources.tolist()) for sources in sampled.split(group) if len(sources) == group]


def summary(frames: list[Tensor], rows: int, cols: int, resize: str) -> Tensor:
    """Return the summary (C, H, W) of frames (C, H, W) in a rows × cols mosaic."""
    _, H, W = frames[0].shape
    if resize == "area":
        frames = [F.adaptive_avg_pool2d(frame, (math.ceil(H / rows), math.ceil(W / cols))) for frame in frames]
    bands = [torch.cat(frames[row * cols : (row + 1) * cols], dim=-1) for row in range(rows)]
    mosaic = torch.cat(bands, dim=-2)
    if resize == "area":
        return mosaic[:, :H, :W]
    return F.interpolate(mosaic[None], size=(H, W), mode="bilinear", align_corners=False)[0]


def temporal_grid(
    x: Tensor,
    frame_strides: Sequence[int] = (2, 4, 8),
    grid_shape: Sequence[int] = (2, 2),
    sampling: str = "last",
    resize: str = "area",
    frame_counts: Sequence[int] | None = None,
) -> Tensor:
    if x.dim() == 5:
        videos = [temporal_grid(video, frame_strides, grid_shape, sampling, resize) for video in x]
        return torch.stack(videos) if videos else x.clone()
    frames = x.permute(0, 3, 1, 2).clone()
    shapes = [grid_shape[i : i + 2] for i in range(0, len(grid_shape), 2)]
    shapes = shapes * len(frame_strides) if len(shapes) == 1 else shapes
    first = 0
    for count in [len(x)] if frame_counts is None else frame_counts:
        for stride, (rows, cols) in zip(frame_strides, shapes, strict=False):
            for target, sources in sampled_groups(count, stride, rows * cols, sampling):
                frames[first + target] = summary([frames[first + k] for k in sources], rows, cols, resize)
        first += count
    return frames.permute(0, 2, 3, 1).contiguous()


def token_norm(
    tokens: Tensor, norm_type: float = 2.0, normalize_norm: bool = True, norm_channels: int | None = None
) -> Tensor:
    """Return the norm of every token: (…, C) → (…)."""
    tokens = tokens[..., :norm_channels]
    if norm_type == math.inf:
        return tokens.abs().amax(-1)
    powers = tokens.abs().pow(norm_type)
    return (powers.mean(-1) if normalize_norm else powers.sum(-1)).pow(1 / norm_type)


def windows(size: int, count: int) -> list[slice]:
    """Return the windows of AdaptiveAvgPool2d along one axis."""
    return [slice(math.floor(i * size / count), math.ceil((i + 1) * size / count)) for i in range(count)]


def norm_pool(
    x: Tensor,
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
) -> Tensor:
    def pooled(tokens: Tensor, taken: Tensor | None = None) -> Tensor:
        """Pool windows of tokens: (…, window, C) → (…, C). taken: mask of the tokens that are in the window."""
        logits = temperature * token_norm(tokens, norm_type, normalize_norm, norm_channels)
        if taken is not None:
            logits = logits.masked_fill(~taken, -math.inf)
        return (logits.softmax(-1)[..., None] * tokens).sum(-2)

    *lead, H, W, C = x.shape
    frames = x.reshape(-1, H, W, C)
    T = len(frames)
    if output_size is not None:
        OH, OW = (output_size,) * 2 if isinstance(output_size, int) else output_size
        cells = [pooled(frames[:, rows, cols].flatten(1, 2)) for rows in windows(H, OH) for cols in windows(W, OW)]
        return torch.stack(cells, dim=1).view(*lead, OH, OW, C)

    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
    step = kernel if stride is None else (stride,) * 2 if isinstance(stride, int) else tuple(stride)
    pad = (padding,) * 2 if isinstance(padding, int) else tuple(padding)
    OH, OW = F.avg_pool2d(x.new_zeros(1, H, W, dtype=torch.float32), kernel, step, pad, ceil_mode).shape[1:]
    # The windows may end before the padded input, or with ceil_mode beyond it. Positions beyond it are not taken.
    border = (pad[1], pad[1], pad[0], pad[0])
    beyond = (0, (OW - 1) * step[1] + kernel[1] - W - 2 * pad[1], 0, (OH - 1) * step[0] + kernel[0] - H - 2 * pad[0])
    taken = F.pad(torch.ones(1, 1, H, W, device=x.device), border, value=float(count_include_pad))
    taken = F.unfold(F.pad(taken, beyond), kernel, stride=step) > 0
    if frames.numel() == 0:
        return x.new_empty(*lead, OH, OW, C)
    image = F.pad(F.pad(frames.permute(0, 3, 1, 2), border), beyond)
    unfolded = F.unfold(image, kernel, stride=step)
    tokens = unfolded.view(T, C, kernel[0] * kernel[1], -1).permute(0, 3, 2, 1)  # (T, OH · OW, window, C)
    return pooled(tokens, taken.mT).view(*lead, OH, OW, C)


def grid_pool(
    x: Tensor,
    frame_strides: Sequence[int] = (2, 4, 8),
    grid_shape: Sequence[int] = (2, 2),
    sampling: str = "last",
    resize: str = "area",
    frame_counts: Sequence[int] | None = None,
    **pooling: object,
) -> Tensor:
    grid = temporal_grid(x, frame_strides, grid_shape, sampling, resize, frame_counts)
    return norm_pool(grid, **pooling)  # type: ignore[arg-type]
