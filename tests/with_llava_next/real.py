"""`build` makes a model of few random weights of LLaVA-NeXT's own classes, as the package llavaction has them.

llavaction calls its folder `llavaction` where a clone of LLaVA-NeXT has `llava`; `as_llava` lends it that name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import llavaction
import llavaction.model
import pytest
import torch
from llavaction.constants import IMAGE_TOKEN_INDEX
from llavaction.model import llava_arch
from llavaction.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

SIDE, PATCH, CHANNELS = 5, 4, 32
PIXELS = SIDE * PATCH
VIDEO = IMAGE_TOKEN_INDEX


def as_llava(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("llava", llavaction), ("model", llavaction.model), ("model.llava_arch", llava_arch)):
        monkeypatch.setitem(sys.modules, name if name == "llava" else f"llava.{name}", module)


def save_tower(folder: Path) -> Path:
    """Save a vision tower of 5 × 5 tokens, and return its path, where models look for it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPVisionConfig(**sizes, image_size=PIXELS, patch_size=PATCH, projection_dim=16)
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return folder


def build(tower: Path, mode: str = "bilinear", newline: str = "grid", **settings: Any) -> LlavaQwenForCausalLM:
    torch.manual_seed(0)
    config = LlavaQwenConfig(
        hidden_size=CHANNELS,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=2048,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        mm_vision_tower=str(tower),
        mm_hidden_size=16,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_patch_merge_type="spatial_unpad",
        mm_spatial_pool_mode=mode,
        mm_spatial_pool_stride=2,
        mm_newline_position=newline,
        image_aspect_ratio="anyres",
        **settings,
    )
    model = LlavaQwenForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, weights in model.named_parameters():  # large enough that answers depend on what is shown
        if weights.dim() > 1:
            sharp = 3 if "q_proj" in name or "k_proj" in name else 1
            torch.nn.init.normal_(weights, std=sharp * weights[0].numel() ** -0.5, generator=generator)
        elif name.endswith(("bias", "image_newline")):
            torch.nn.init.normal_(weights, std=0.5, generator=generator)
    return model


def pixels(*frames: int) -> list[Tensor]:
    """Return random pixels (F, 3, height, width) of each video."""
    generator = torch.Generator().manual_seed(sum(frames))
    return [torch.randn(count, 3, PIXELS, PIXELS, generator=generator) for count in frames]


def embed(model: LlavaQwenForCausalLM, ids: Tensor, images: list[Tensor], modalities: list[str]) -> Tensor:
    """Return embeddings (1, tokens, C) that the model's own code makes of a prompt and its videos."""
    found = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, modalities, None)
    return found[4]
