"""An engine with a draft model (EAGLE-3) answers as one without: speculative decoding changes no answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import questions
import torch
from runner import Runner, assert_same_answers, selected
from safetensors.torch import save_file

KIND = "qwen3_vl"
OPTIONS = {"mode": "pool", "temperature": 2.0}


def save_draft(folder: Path, target: Path) -> Path:
    """Save a draft model of random weights that reads three layers of a target, and return the folder."""
    text = json.loads((target / "config.json").read_text())["text_config"]
    words, channels = text["vocab_size"], text["hidden_size"]
    shapes = {
        "fc": (channels, 3 * channels),
        "lm_head": (words, channels),
        **{f"midlayer.self_attn.{name}_proj": (channels, 2 * channels) for name in "qkv"},
        "midlayer.self_attn.o_proj": (channels, channels),
        **{f"midlayer.mlp.{name}_proj": (channels, channels) for name in ("gate", "up", "down")},
    }
    norms = ("norm", *(f"midlayer.{name}_layernorm" for name in ("input", "post_attention")), "midlayer.hidden_norm")
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights | {f"{name}.weight": torch.ones(channels) for name in norms}, folder / "model.safetensors")
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": words,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "head_dim": channels // 2,
        "hidden_size": channels,
        "intermediate_size": channels,
        "max_position_embeddings": text["max_position_embeddings"],
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": words,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_draft_model(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> None:
    """vLLM finds the placeholders of a target model, for its drafts, by the name of its class."""
    target = questions.save(KIND, tmp_path_factory.mktemp(KIND))
    draft = save_draft(tmp_path_factory.mktemp("draft"), target)
    engine = {
        "arguments": {
            "model": str(target),
            "max_model_len": 2048,
            "speculative_config": {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2},
            **selected(f"Stgp{questions.KINDS[KIND]}", **OPTIONS),
        },
        "batches": [[questions.given(KIND, *prompt) for prompt in questions.PROMPTS.items()]],
    }
    [result] = runner([engine], questions.media(KIND))
    expected = questions.expected(KIND, OPTIONS)
    assert_same_answers(result["answers"], {name: expected[name] for name in questions.PROMPTS})
