"""Models of transformers with few random weights, and prompts for them, to run real code paths in milliseconds."""

from __future__ import annotations

import importlib
import string
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


def processor(model: Any) -> Any:
    """Return the library's own processor for one of these models, with a tokenizer of single characters."""
    transformers: Any = importlib.import_module("transformers")
    kind, vision = model.config.model_type, model.config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    if kind == "llava_onevision":
        prefix, images = "LlavaOnevision", "LlavaOnevisionImageProcessor"
        settings = {"num_image_tokens": (vision.image_size // vision.patch_size) ** 2}
    else:
        prefix, images, settings = "LlavaNextVideo", "LlavaNextImageProcessor", {"patch_size": vision.patch_size}
    videos = getattr(
        importlib.import_module(f"transformers.models.{kind}.video_processing_{kind}"), f"{prefix}VideoProcessor"
    )
    contents = "{% if part['type'] == 'video' %}<video>{% else %}{{ part['text'] }}{% endif %}"
    return getattr(transformers, f"{prefix}Processor")(
        image_processor=getattr(transformers, images)(size=size, crop_size=size),
        video_processor=videos(size=size, crop_size=size),
        tokenizer=_tokenizer(transformers),
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        chat_template=f"{{% for part in messages[0]['content'] %}}{contents}{{% endfor %}}",
        **settings,
    )


def _tokenizer(transformers: Any) -> Any:
    """Return a tokenizer whose words are the letters, with the special tokens of the models' configurations."""
    tokenizers = importlib.import_module("tokenizers")
    special = {"<pad>": 0, "<bos>": 1, "<unk>": 2, "<image>": IMAGE, "<video>": VIDEO, "<eos>": 63}
    words = {letter: 3 + number for number, letter in enumerate(string.ascii_letters)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({**special, **words}, unk_token="<unk>"))
    split = tokenizers.pre_tokenizers
    made.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Split("", "isolated")])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    return tokenizer
