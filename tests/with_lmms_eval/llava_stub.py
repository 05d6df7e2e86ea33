"""This is as much of LLaVA-NeXT's package `llava` as lmms-eval's models import, around a random language model.

`install()` puts it into sys.modules, `save(folder)` writes a model for `pretrained=`. `loaded` has every model that was
loaded since; each records the features of its videos before and after pooling.
"""

from __future__ import annotations

import copy
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, StoppingCriteria

from tests.support.llava_stand_in import LlavaMetaForCausalLM

IMAGE_TOKEN, IMAGE_TOKEN_INDEX, PIXELS = "<image>", -200, 6
SIDE = 9  # A frame has SIDE × SIDE tokens; SIDE is odd, so that rounding up and down differ.
loaded: list[Any] = []


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen"


class LlavaConfig(Qwen2Config):
    model_type = "llava_llama"


class VisionTower(nn.Module):
    num_patches_per_side = SIDE

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PIXELS * PIXELS, channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = F.unfold(images.float(), PIXELS, stride=PIXELS).mT
        return self.embed(patches.to(self.embed.weight.dtype))


class LlavaQwenForCausalLM(Qwen2ForCausalLM, LlavaMetaForCausalLM):
    config_class = LlavaQwenConfig

    def __init__(self, config: LlavaQwenConfig) -> None:
        super().__init__(config)
        self.model.vision_tower = VisionTower(config.hidden_size)
        self.model.image_newline = nn.Parameter(torch.randn(config.hidden_size))
        self.videos: list[tuple[torch.Tensor, torch.Tensor]] = []

    def get_model(self) -> Any:
        return self.model

    def generate(self, inputs: torch.Tensor, images: Any = None, modalities: Any = None, **arguments: Any) -> Any:
        del arguments["attention_mask"]
        features = self.get_vision_tower()(images[0])
        pooled = self.get_2dPool(features)
        self.videos.append((features, pooled))
        at = (inputs[0] == IMAGE_TOKEN_INDEX).nonzero().item()
        embed = self.get_input_embeddings()
        parts = [embed(inputs[0, :at]), self.with_newlines(pooled), embed(inputs[0, at + 1 :])]
        return super().generate(inputs_embeds=torch.cat(parts)[None], **arguments)


class KeywordsStoppingCriteria(StoppingCriteria):
    def __init__(self, keywords: list[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        pass

    def __call__(self, output_ids: torch.Tensor, scores: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return torch.zeros(len(output_ids), dtype=torch.bool)


class Conversation(SimpleNamespace):
    def copy(self) -> Conversation:
        return copy.deepcopy(self)

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append((role, message))

    def get_prompt(self) -> str:
        return "".join(f"{role}: {message or ''}\n" for role, message in self.messages)


class ImageProcessor:
    def preprocess(self, frames: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        return {"pixel_values": F.interpolate(pixels, (SIDE * PIXELS,) * 2, mode="area")}


def tokenizer_image_token(prompt: str, tokenizer: Any, image_token_index: int, return_tensors: str) -> torch.Tensor:
    before, after = (tokenizer.encode(part) for part in prompt.split(IMAGE_TOKEN))
    return torch.tensor([*before, image_token_index, *after])


def make_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=folder, eos_token="!", pad_token="~")


def load_pretrained_model(
    folder: str, base: None, name: str, overwrite_config: dict[str, Any], torch_dtype: Any = "float16", **arguments: Any
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    config = LlavaQwenConfig.from_pretrained(folder)
    for key, value in overwrite_config.items():
        setattr(config, key, value)
    model = LlavaQwenForCausalLM(config).to(getattr(torch, torch_dtype))
    loaded.append(model)
    return make_tokenizer(folder), model, ImageProcessor(), config.max_position_embeddings


def save(folder: Path, **settings: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    about = {"model_type": "llava_qwen", "mm_use_im_start_end": False, "mm_newline_position": "no_token"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**sizes, **heads, **special, **about, **settings}))


def install() -> None:
    constants = {"DEFAULT_IM_END_TOKEN": "<im_end>", "DEFAULT_IM_START_TOKEN": "<im_start>", "IGNORE_INDEX": -100}
    constants.update(DEFAULT_IMAGE_TOKEN=IMAGE_TOKEN, IMAGE_TOKEN_INDEX=IMAGE_TOKEN_INDEX)
    talk = Conversation(roles=("user", "assistant"), messages=[], sep="\n", sep2="\n", sep_style=None)
    text = {
        "KeywordsStoppingCriteria": KeywordsStoppingCriteria,
        "get_model_name_from_path": lambda path: Path(path).name,
        "process_images": None,
        "tokenizer_image_token": tokenizer_image_token,
    }
    modules: dict[str, dict[str, Any]] = {
        "llava": {"__version__": "1.7.0", "__path__": []},
        "llava.constants": constants,
        "llava.conversation": {
            "SeparatorStyle": SimpleNamespace(TWO=2),
            "conv_templates": {"plain": talk, "qwen_1_5": talk},
        },
        "llava.mm_utils": text,
        "llava.model": {"__path__": []},
        "llava.model.llava_arch": {"LlavaMetaForCausalLM": LlavaMetaForCausalLM},
        "llava.model.builder": {"load_pretrained_model": load_pretrained_model},
        "llava.model.language_model": {"__path__": []},
        "llava.model.language_model.llava_llama": {"LlavaConfig": LlavaConfig},
        "llava.model.language_model.llava_qwen": {
            "LlavaQwenConfig": LlavaQwenConfig,
            "LlavaQwenForCausalLM": LlavaQwenForCausalLM,
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    AutoConfig.register("llava_qwen", LlavaQwenConfig, exist_ok=True)
