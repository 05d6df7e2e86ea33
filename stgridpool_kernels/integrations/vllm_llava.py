"""This module puts ST-GridPool in place of the pooling of video tokens of the LLaVA models of vLLM.

A batch may then contain videos of different lengths, and the process that makes the engine refuses options unless
they leave as many tokens as prompts have placeholders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import require_size
from .vllm_models import PooledInfo, PooledModel


class LlavaInfo(PooledInfo):
    """This mixin checks options against the placeholders that prompts have."""

    stgp_modes = ("pool",)

    def check_options(self) -> None:
        """Raise ValueError unless the options leave as many tokens per frame as prompts have placeholders."""
        super().check_options()
        config = self.ctx.model_config.hf_config
        pixels = config.vision_config.image_size
        # tokens that a video has once, such as a newline, cancel out between one frame and none
        none, one = (self.get_num_video_tokens(image_width=pixels, image_height=pixels, num_frames=n) for n in (0, 1))  # type: ignore[attr-defined]
        name = f"vLLM's prompt for {config.model_type}"
        require_size(name, _grid(config), one - none, self.stgp_options.pool_options)


class LlavaNextVideoInfo(LlavaInfo):
    """This mixin is for a model that pools before its projector."""

    def stgp_channels(self) -> int:
        return int(self.ctx.model_config.hf_config.vision_config.hidden_size)


class _Llava(PooledModel):
    """This mixin pools the tokens of frames that are packed."""

    stgp_shortens = False
    config: Any
    vision_tower: Any
    multi_modal_projector: Any

    def stgp_grid(self) -> tuple[int, int]:
        return _grid(self.config)

    def _pool(self, features: Tensor, frames: Sequence[int]) -> Tensor:
        tokens = features.unflatten(1, self.stgp_grid())
        return self.stgp_options.apply(tokens, frame_counts=frames).flatten(1, 2)


class LlavaOnevision(_Llava):
    """LLaVA-OneVision pools after the projector: F frames of g × g tokens become F·⌈g/2⌉² tokens and a newline."""

    image_newline: Tensor

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        pixels, frames = _packed(inputs["pixel_values_videos"])
        features = self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, pixels))  # type: ignore[attr-defined]
        videos = self._pool(features, frames).split(frames)
        return [torch.cat((video.flatten(0, 1), self.image_newline[None])) for video in videos]


class LlavaNextVideo(_Llava):
    """LLaVA-NeXT-Video pools before the projector: F frames of g × g tokens become F·⌈g/2⌉² tokens."""

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        pixels, frames = _packed(inputs["pixel_values_videos"])
        features = self.vision_tower(pixels, feature_select_strategy=self.config.vision_feature_select_strategy)
        pooled = self._pool(features, frames)
        return [video.flatten(0, 1) for video in self.multi_modal_projector(pooled).split(frames)]


def _packed(videos: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the frames of all videos, (ΣF, 3, height, width), and the number of frames of each video.

    videos: the videos of all requests in a step of the engine, as a tensor if they have one length, else as a sequence.
    """
    frames = [len(video) for video in videos]
    return videos.flatten(0, 1) if isinstance(videos, Tensor) else torch.cat(list(videos)), frames


def _grid(config: Any) -> tuple[int, int]:
    """Return rows and columns of tokens of a frame before pooling."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side
