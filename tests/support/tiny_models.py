"""Models of transformers with few random weights, and prompts for them, to run real code paths in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO = 60, 61
"""Ids of the placeholder tokens of images and of videos."""

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 63,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def onevision(side: int = 27) -> Any:
    """Return a LlavaOnevisionForConditionalGeneration with frames of side × side tokens."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tower = {"model_type": "siglip_vision_model", "image_size": 2 * side, "patch_size": 2, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        vision_config={**_VISION, **tower},
        text_config={**_TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return _build(LlavaOnevisionForConditionalGeneration, config)


def next_video(side: int = 24, **settings: Any) -> Any:
    """Return a LlavaNextVideoForConditionalGeneration with frames of side × side tokens."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model", "image_size": 2 * side, "patch_size": 2},
        text_config={**_TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        **settings,
    )
    return _build(LlavaNextVideoForConditionalGeneration, config)


def _build(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        # with the default initialisation, the part that all frames share would dominate text
        if "embed_tokens" in name or "lm_head" in name or "multi_modal_projector" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def pixels(model: Any, videos: int, frames: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random pixels (videos, frames, 3, height, width) for a model."""
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(100 * videos + frames)
    return torch.randn(videos, frames, 3, size, size, generator=generator).to(dtype)


def prompt(placeholders: Sequence[int]) -> Tensor:
    """Return the ids (1, tokens) of a prompt: text, then the placeholders of every video, each followed by text.

    placeholders: number of placeholders of each video.
    """
    ids = [1, 7]
    for video, count in enumerate(placeholders):
        ids += [VIDEO] * count + [8 + video, 9]
    return torch.tensor([ids])
