"""Models of a few thousand parameters, and prompts for them, are alike for vLLM and for transformers.

A frame has 5 × 5 tokens, and 3 × 3 places in the prompt. Weights are random, and large enough that what a model
answers depends on what it is shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

SIDE, PATCH = 5, 4
PIXELS = SIDE * PATCH
VOCABULARY = 128
END, IMAGE, VIDEO, FIRST = 0, 1, 2, 3
ANSWER = 12
"""This is the number of tokens that are asked for."""


class Prompt(NamedTuple):
    """A prompt has words, a place for each video or image among them, and the seeds and lengths to make those from."""

    ids: tuple[int, ...]
    videos: tuple[tuple[int, int], ...] = ()
    images: tuple[int, ...] = ()


PROMPTS = {
    "6 frames": Prompt((5, VIDEO, 9, 11), videos=((1, 6),)),
    "9 frames": Prompt((5, VIDEO, 9, 11), videos=((2, 9),)),
    "two videos of one length": Prompt((7, VIDEO, 20, VIDEO, 8), videos=((3, 9), (4, 9))),
    "two videos of different lengths": Prompt((7, VIDEO, 20, VIDEO, 8), videos=((5, 6), (6, 9))),
    "17 frames": Prompt((5, VIDEO, 9, 11), videos=((7, 17),)),
    "an image": Prompt((5, IMAGE, 9, 11), images=(8,)),
    "words": Prompt((5, 6, 7, 8, 9)),
}


def video(seed: int, frames: int) -> np.ndarray:
    """Return bytes (frames, height, width, 3), with a colour for each patch of each frame."""
    colours = np.random.default_rng(seed).integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)
    return colours.repeat(PATCH, axis=1).repeat(PATCH, axis=2)


def image(seed: int) -> np.ndarray:
    return video(seed, 1)[0]


def make_onevision(folder: Path) -> Path:
    """Save a LLaVA-OneVision model and its processor, and return the folder."""
    config = hf.LlavaOnevisionConfig(
        vision_config=_vision(hf.SiglipVisionConfig, vision_use_head=False),
        text_config=_text(hf.Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[PIXELS, PIXELS], [PIXELS, 2 * PIXELS]],
    )
    size = {"height": PIXELS, "width": PIXELS}
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        tokenizer=_tokenizer(),
        num_image_tokens=SIDE * SIDE,
        vision_feature_select_strategy="full",
    )
    return _save(folder, hf.LlavaOnevisionForConditionalGeneration, config, processor)


def make_next_video(folder: Path) -> Path:
    """Save a LLaVA-NeXT-Video model and its processor, and return the folder."""
    config = hf.LlavaNextVideoConfig(
        vision_config=_vision(hf.CLIPVisionConfig, projection_dim=32),
        text_config=_text(hf.LlamaConfig),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[PIXELS, PIXELS], [PIXELS, 2 * PIXELS]],
    )
    size, crop = {"shortest_edge": PIXELS}, {"height": PIXELS, "width": PIXELS}
    processor = hf.LlavaNextVideoProcessor(
        image_processor=hf.LlavaNextImageProcessor(size=size, crop_size=crop),
        video_processor=hf.LlavaNextVideoVideoProcessor(size=size, crop_size=crop),
        tokenizer=_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _save(folder, hf.LlavaNextVideoForConditionalGeneration, config, processor)


def _vision(kind: Any, **others: Any) -> Any:
    return kind(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=PIXELS,
        patch_size=PATCH,
        **others,
    )


def _text(kind: Any) -> Any:
    return kind(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 channels, the fewest that vLLM's attention for CPUs takes
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        tie_word_embeddings=False,
    )


def _tokenizer() -> Any:
    words = {"<end>": END, "<image>": IMAGE, "<video>": VIDEO}
    words |= {f"w{number}": number for number in range(FIRST, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=["<image>", "<video>"],
    )


def _save(folder: Path, kind: Any, config: Any, processor: Any) -> Path:
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weights in model.named_parameters():
        if weights.dim() > 1:
            sharp = 3 if "q_proj" in name or "k_proj" in name else 1  # attention that tells tokens apart
            torch.nn.init.normal_(weights, std=sharp * weights[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weights, std=0.1, generator=generator)
        elif name.endswith("image_newline"):
            torch.nn.init.normal_(weights, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # under the names of published checkpoints, which both libraries know
    weights = load_file(folder / "model.safetensors")
    tower = re.compile(r"^vision_tower\.(?!vision_model)")
    published = {tower.sub("vision_tower.vision_model.", name): kept for name, kept in weights.items()}
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
