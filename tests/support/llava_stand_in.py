"""Stand-in for `llava.model.llava_arch` of LLaVA-NeXT, between projector and language model, with the original's names.

With it, the tests of integrations/llava_next.py need no LLaVA-NeXT; `make test-llava-next` compares the two. Like the
original, its pooling returns views of the projector's result if possible.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LlavaMetaForCausalLM:
    def get_vision_tower(self) -> Any:
        return self.get_model().vision_tower

    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        side, mode = self.get_vision_tower().num_patches_per_side, self.config.mm_spatial_pool_mode
        images = image_feature.view(len(image_feature), side, side, -1).movedim(-1, 1)
        if mode == "bilinear":
            images = F.interpolate(images, size=[math.ceil(side / stride)] * 2, mode="bilinear")
        elif mode in ("average", "max"):
            images = (F.avg_pool2d if mode == "average" else F.max_pool2d)(images, stride)
        else:
            raise ValueError(f"unknown mode {mode}")
        return images.flatten(2).mT

    def video_tokens(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Pool the frames of each video, (F, g², C) → (tokens, C) with newlines."""
        projected = self.get_model().mm_projector(torch.cat(list(videos))).split([len(video) for video in videos])
        return [self.with_newlines(self.get_2dPool(video)) for video in projected]

    def with_newlines(self, pooled: Tensor) -> Tensor:
        """Add newlines to pooled frames: (F, P², C) → (tokens, C)."""
        newline, frames, channels = self.get_model().image_newline, len(pooled), pooled.shape[-1]
        position = self.config.mm_newline_position
        if position == "grid":
            side = int(math.sqrt(pooled.shape[1]))
            rows = pooled.reshape(frames * side, side, channels)
            return torch.cat([rows, newline.expand(frames * side, 1, channels)], 1).flatten(0, 1)
        if position == "frame":
            return torch.cat([pooled, newline.expand(frames, 1, channels)], 1).flatten(0, 1)
        tokens = pooled.flatten(0, 1)
        return torch.cat([tokens, newline[None]]) if position == "one_token" else tokens


class LlavaQwenForCausalLM(LlavaMetaForCausalLM):
    """Model of a clone of LLaVA-NeXT, which inherits the pooling from its base class."""

    def __init__(self, side: int = 27, channels: int = 16, mode: str = "bilinear", newline: str = "grid") -> None:
        torch.manual_seed(0)
        self.config = SimpleNamespace(mm_spatial_pool_mode=mode, mm_newline_position=newline, add_faster_video=False)
        self.model = SimpleNamespace(
            vision_tower=SimpleNamespace(num_patches_per_side=side),
            mm_projector=nn.Linear(channels, channels),
            image_newline=torch.randn(channels),
        )

    def get_model(self) -> Any:
        return self.model


def install(monkeypatch: pytest.MonkeyPatch, owner: type = LlavaMetaForCausalLM) -> None:
    """Make `import llava.model.llava_arch` find the stand-in until the test ends."""
    for name in ("llava", "llava.model", "llava.model.llava_arch"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["llava.model.llava_arch"].LlavaMetaForCausalLM = owner
