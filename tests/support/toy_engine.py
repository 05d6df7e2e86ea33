"""Minimal engine that the example of integrations/base.py adapts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "1.2"


class VideoModel(nn.Module):
    """Model that, as in engines, counts the tokens of a video before it computes them, and pools all in one call."""

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.projector = nn.Linear(channels, channels)
        self.grid = (side, side)
        self.tokens_per_frame = math.ceil(side / 2) ** 2

    def shrink(self, features: Tensor, frames_per_video: Sequence[int]) -> Tensor:
        """Pool all frames: (ΣF, h·w, C) → (ΣF, ⌈h/2⌉·⌈w/2⌉, C)."""
        images = features.unflatten(1, self.grid).movedim(-1, 1)
        return F.avg_pool2d(images, 2, ceil_mode=True).flatten(2).mT

    def forward(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Return the tokens that replace the placeholders of each video. videos: features (F, h·w, C) of each."""
        counts = [len(video) for video in videos]
        tokens = self.shrink(self.projector(torch.cat(list(videos))), counts)
        flat = [video.flatten(0, 1) for video in tokens.split(counts)]
        for video, count in zip(flat, counts, strict=True):
            if len(video) != count * self.tokens_per_frame:
                raise ValueError(f"{count * self.tokens_per_frame} placeholders, {len(video)} tokens")
        return flat
