"""Baselines that ST-GridPool is compared with, in idiomatic PyTorch. They serve measurements only.

Every function takes tokens (T, H, W, C) and returns (T, OH, OW, C) in x.dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def llava_avg_pool(x: Tensor, kernel_size: int = 2, ceil_mode: bool = False) -> Tensor:
    """Average pooling as in LLaVA, through a channel-first copy."""
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2).contiguous(), kernel_size, ceil_mode=ceil_mode)
    return pooled.permute(0, 2, 3, 1).contiguous()


def llava_bilinear_pool(x: Tensor, kernel_size: int = 2) -> Tensor:
    """Bilinear pooling as in LLaVA-OneVision, to ⌈H / kernel⌉ × ⌈W / kernel⌉, through a channel-first copy."""
    size = [math.ceil(side / kernel_size) for side in x.shape[1:3]]
    pooled = F.interpolate(x.permute(0, 3, 1, 2).contiguous(), size=size, mode="bilinear")
    return pooled.permute(0, 2, 3, 1).contiguous()


def naive_grid_pool(
    x: Tensor, frame_strides: tuple[int, ...] = (2, 4, 8), temperature: float = 1.0, kernel_size: int = 2
) -> Tensor:
    """ST-GridPool at its published settings, op by op in x.dtype.

    It works channel-first, shrinks one frame at a time for summaries, and pools by `unfold` and a softmax.
    """
    frames = x.permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)
    T, C, H, W = frames.shape
    tile = ((H + 1) // 2, (W + 1) // 2)
    for frame_stride in frame_strides:
        sampled = (torch.linspace(0, T, T // frame_stride + 1)[1:] - 1).round().long().clamp(0, T - 1)
        frames = frames.clone()
        for group in sampled[: len(sampled) // 4 * 4].view(-1, 4).tolist():
            a, b, c, d = (F.interpolate(frames[frame, None], size=tile, mode="area")[0] for frame in group)
            summary = torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1)
            frames[group[-1]] = summary[:, :H, :W]
    windows = F.unfold(frames, kernel_size, stride=kernel_size).view(T, C, kernel_size**2, -1)
    norms = windows.square().mean(1, keepdim=True).sqrt()  # (T, 1, window, windows)
    pooled = (windows * (temperature * norms).softmax(2)).sum(2)
    return pooled.view(T, C, H // kernel_size, W // kernel_size).permute(0, 2, 3, 1).contiguous()
