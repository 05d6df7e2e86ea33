"""This module saves the InternVL model of tests/support in the format of checkpoints that name InternVLChatModel.

transformers has no class for that format, and published checkpoints bring a file with a class of their configuration.
Here such a file is written, with what vLLM reads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tests.support import tiny_grid_models as models

_CONFIGURATION = '''"""Configuration of a checkpoint for InternVLChatModel, of what vLLM reads."""

from transformers import AutoConfig, PreTrainedConfig


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **settings):
        super().__init__(**settings)
        if llm_config is not None:
            self.vision_config = PreTrainedConfig(**vision_config)
            self.llm_config = AutoConfig.for_model(**llm_config)
'''

_NAMES = (
    (r"^model\.vision_tower\.", "vision_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"embeddings\.position_embeddings$", "embeddings.position_embedding"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"attention\.projection_layer\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"lambda_(\d)$", r"ls\1"),
)
"""These patterns in names of weights in transformers are replaced by what stands for them in these checkpoints."""


def save(folder: Path, head: int) -> Path:
    """Save the model and its tokenizer, and return the folder. head: channels of a head of the language model."""
    model, processor = models.build("internvl", head=head)
    weights = {}
    for name, kept in model.state_dict().items():
        for pattern, other in _NAMES:
            name = re.sub(pattern, other, name)
        weights[name] = kept.contiguous()
    for name in [name for name in weights if ".attention.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor.tokenizer.save_pretrained(folder)
    (folder / "configuration_internvl_chat.py").write_text(_CONFIGURATION)
    (folder / "config.json").write_text(json.dumps(_settings(model.config)))
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).llm_config.hidden_size == 2 * head
    return folder


def _settings(config: AutoConfig) -> dict:
    vision = config.vision_config
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "llm_config": config.text_config.to_dict(),
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "tie_word_embeddings": False,
        "use_thumbnail": True,
        "vision_config": {
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size[0],
            "initializer_factor": 1.0,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": vision.num_channels,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size[0],
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
        },
    }
