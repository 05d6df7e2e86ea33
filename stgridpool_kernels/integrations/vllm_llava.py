"""The model classes of vllm.py, which imports this module if one is selected and `require` accepts vLLM.

Both differ from their base class in three respects: ST-GridPool pools video tokens; a batch may contain videos of
different lengths; and the process that makes the engine refuses options unless they leave as many tokens as prompts
have placeholders. Weights, images and the processor are unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_next_video, llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from .base import PoolOptions, pool_flat, pooled_grid, require_size
from .vllm import logger, pool_options


class StgpLlavaOnevisionProcessingInfo(llava_onevision.LlavaOnevisionProcessingInfo):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _require_placeholders(self)


@MULTIMODAL_REGISTRY.register_processor(
    llava_onevision.LlavaOnevisionMultiModalProcessor,
    info=StgpLlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class StgpLlavaOnevisionForConditionalGeneration(llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that pools after the projector: F frames of g × g tokens become F·⌈g/2⌉² tokens and a newline."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.stgp_options = _announced(self.config)

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        pixels, frames = _packed(inputs["pixel_values_videos"])
        features = self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, pixels))
        videos = pool_flat(features, frames, _grid(self.config), **self.stgp_options.arguments).split(frames)
        return [torch.cat((video.flatten(0, 1), self.image_newline[None])) for video in videos]


class StgpLlavaNextVideoProcessingInfo(llava_next_video.LlavaNextVideoProcessingInfo):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _require_placeholders(self)


@MULTIMODAL_REGISTRY.register_processor(
    llava_next_video.LlavaNextVideoMultiModalProcessor,
    info=StgpLlavaNextVideoProcessingInfo,
    dummy_inputs=llava_next_video.LlavaNextVideoDummyInputsBuilder,
)
class StgpLlavaNextVideoForConditionalGeneration(llava_next_video.LlavaNextVideoForConditionalGeneration):
    """LLaVA-NeXT-Video that pools before the projector, as its base: F frames of g × g become F·⌈g/2⌉² tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.stgp_options = _announced(self.config)

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        pixels, frames = _packed(inputs["pixel_values_videos"])
        features = self.vision_tower(pixels, feature_select_strategy=self.config.vision_feature_select_strategy)
        pooled = pool_flat(features, frames, _grid(self.config), **self.stgp_options.arguments)
        return [video.flatten(0, 1) for video in self.multi_modal_projector(pooled).split(frames)]


def _packed(videos: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the frames of all videos, (ΣF, 3, height, width), and the number of frames of each video.

    videos: the videos of all requests in a step of the engine, as a tensor if they have one length, else as a sequence.
    """
    frames = [len(video) for video in videos]
    return videos.flatten(0, 1) if isinstance(videos, Tensor) else torch.cat(list(videos)), frames


def _grid(config: Any) -> tuple[int, int]:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def _announced(config: Any) -> PoolOptions:
    options = pool_options(config)
    (height, width), (rows, cols) = _grid(config), pooled_grid(_grid(config), **options.arguments)
    logger.info("ST-GridPool: frames of videos from %d × %d to %d × %d tokens, %s", height, width, rows, cols, options)
    return options


def _require_placeholders(info: Any) -> None:
    """Raise RuntimeError unless the engine's options leave as many tokens per frame as prompts have placeholders."""
    config = info.get_hf_config()
    pixels = config.vision_config.image_size
    # the difference excludes tokens that a video gets once, such as a newline
    none, one = (info.get_num_video_tokens(image_width=pixels, image_height=pixels, num_frames=n) for n in (0, 1))
    try:
        require_size(f"vLLM's prompt for {config.model_type}", _grid(config), one - none, pool_options(config))
    except ValueError as error:
        # vLLM would interpret a ValueError as a missing processor, and continue with text only
        raise RuntimeError(str(error)) from error
