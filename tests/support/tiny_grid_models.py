"""Models of transformers whose encoder leaves a grid of tokens per frame, with few random weights.

The processors are the library's own, with its own video processors, and a tokenizer of single characters made here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stgridpool_kernels import grid_pool, temporal_grid

HIDDEN = 32
"""Channels of a token of the language models, unless `build` is told of larger heads."""

PATCH = 4
"""Rows and columns of pixels in a patch; the encoders merge 2 × 2 patches into a token."""

_TEXT = {
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": PATCH}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_DEEP = {"depth": 3, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
_MROPE = {**_ROPE, "mrope_section": [2, 3, 3]}
_INTERLEAVED = {**_MROPE, "mrope_interleaved": True}
_PARTIAL = {**_INTERLEAVED, "partial_rotary_factor": 1.0}

_QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_QWEN_SPANS = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
_GLM = {"image_token": "<|image|>", "video_token": "<|video|>"}
_GLM_SPANS = {
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
_INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

QWEN3 = {"text": {"head_dim": 16, "rope_parameters": _INTERLEAVED}, "vision": _DEEP}
QWEN3_5 = {
    "text": {"head_dim": 16, "rope_parameters": _PARTIAL, **_LINEAR},
    "vision": {"depth": 3, "num_position_embeddings": 256},
}
GLM = {
    "text": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "vision": {"depth": 2, "image_size": 64},
}
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", {"text": {"rope_parameters": _MROPE}, "vision": {"depth": 2}}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        "Qwen2_5_VL",
        {
            "text": {"rope_parameters": _MROPE},
            "vision": {"depth": 2, "window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        },
    ),
    "qwen3_vl": ("Qwen3VL", "Qwen3VL", QWEN3),
    "qwen3_vl_moe": ("Qwen3VLMoe", "Qwen3VL", {**QWEN3, "text": {**QWEN3["text"], **_MOE}}),
    "qwen3_5": ("Qwen3_5", "Qwen3VL", QWEN3_5),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        "Qwen3VL",
        {**QWEN3_5, "text": {**QWEN3_5["text"], **_MOE, "shared_expert_intermediate_size": 16}},
    ),
    "glm4v": ("Glm4v", "Glm4v", GLM),
    "glm4v_moe": (
        "Glm4vMoe",
        "Glm4v",
        {
            **GLM,
            "text": {
                **GLM["text"],
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "head_dim": 16,
            },
        },
    ),
    "glm46v": ("Glm46V", "Glm46V", GLM),
}
QWEN_KINDS = tuple(kind for kind in _KINDS if kind.startswith("qwen"))
GLM_KINDS = tuple(kind for kind in _KINDS if kind.startswith("glm"))
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
"""Arguments of `generate` for the likeliest answer, which no token ends."""

INTERNVL_SIDE = 8
"""Rows and columns of tokens of a frame, or tile, of the InternVL model."""


def build(kind: str, merge: int = 2, head: int = 16) -> tuple[Any, Any]:
    """Return a model, always with the same weights, and its processor.

    kind: one of `QWEN_KINDS` and `GLM_KINDS`, or "internvl". merge: rows, and columns, of patches that an encoder with
    grids merges into a token. head: channels of each of the two heads of the language model.
    """
    return _internvl(head) if kind == "internvl" else _with_grids(kind, merge, head)


def placeholder(kind: str, modality: str) -> str:
    """Return what stands for an image or a video in a prompt for the processor."""
    if kind == "internvl":
        return {"image": "<IMG_CONTEXT>", "video": "<video>"}[modality]
    if kind in GLM_KINDS:
        return {
            "image": "<|begin_of_image|><|image|><|end_of_image|>",
            "video": "<|begin_of_video|><|video|><|end_of_video|>",
        }[modality]
    return f"<|vision_start|><|{modality}_pad|><|vision_end|>"


def chat_template(kind: str) -> str:
    """Return a template that writes the contents of all messages one after the other."""
    given = "".join(
        f"{{% if part['type'] == '{modality}' %}}{placeholder(kind, modality)}{{% endif %}}"
        for modality in ("image", "video")
    )
    part = f"{given}{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}"
    return f"{{% for message in messages %}}{{% for part in message['content'] %}}{part}{{% endfor %}}{{% endfor %}}"


def pictures(frames: int, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return random frames (frames, 3, height, width) of uint8 that have rows × cols tokens each."""
    generator = torch.Generator().manual_seed(1000 * seed + frames)
    return torch.randint(
        0, 256, (frames, 3, 2 * PATCH * rows, 2 * PATCH * cols), generator=generator, dtype=torch.uint8
    )


def ask(
    processor: Any,
    texts: str | Sequence[str],
    videos: Sequence[Tensor],
    images: Sequence[Tensor] = (),
    frames_per_second: float = 2.0,
) -> Any:
    """Return what a processor makes of prompts with these videos and images."""
    metadata = importlib.import_module("transformers.video_utils").VideoMetadata
    given: dict[str, Any] = {"text": [texts] if isinstance(texts, str) else list(texts), "return_tensors": "pt"}
    if videos:
        given["videos"] = list(videos)
        given["video_metadata"] = [
            metadata(total_num_frames=len(video), fps=frames_per_second, frames_indices=list(range(len(video))))
            for video in videos
        ]
    if images:
        given["images"] = list(images)
    return processor(**given, padding=True, padding_side="left")


def by_hand(plain: Any, inputs: Any, mode: str, **options: Any) -> list[Tensor]:
    """Return the tokens of all videos, and of every level of deepstack, that the options leave of Qwen-VL and GLM-V."""
    raw = plain.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    sizes = [len(tokens) for tokens in raw.pooler_output]
    deep = getattr(raw, "deepstack_features", None) or []
    levels = [raw.pooler_output, *(level.split(sizes) if torch.is_tensor(level) else level for level in deep)]
    videos = []
    for (frames, rows, cols), *tokens in zip(inputs["video_grid_thw"].tolist(), *levels, strict=True):
        x = torch.cat(tokens, -1).view(frames, rows // 2, cols // 2, -1)
        if mode == "grid":
            left = temporal_grid(x, **options, backend="reference")
        else:
            left = grid_pool(x, **{"ceil_mode": True, "norm_channels": HIDDEN, **options}, backend="reference")
        videos.append(left.flatten(0, 2))
    return list(torch.cat(videos).split(HIDDEN, -1))


@functools.cache
def _tokenizer(special: tuple[str, ...], named: tuple[tuple[str, str], ...]) -> Callable[[], Any]:
    """Return a maker of tokenizers of single characters, with special tokens and attributes for some of them."""
    tokenizers = importlib.import_module("tokenizers")
    transformers = importlib.import_module("transformers")
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *special, *map(chr, range(33, 127))]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers
    made.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Split("", "isolated")])

    def make() -> Any:
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made,
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
            extra_special_tokens=dict(named),
        )
        fast.add_special_tokens({"additional_special_tokens": list(special)})
        return fast

    return make


def _text(vocabulary: int, head: int, **settings: Any) -> dict[str, Any]:
    """Return settings of a language model with two heads of `head` channels."""
    given = {**_TEXT, **settings, "vocab_size": vocabulary, "hidden_size": 2 * head}
    if "head_dim" in given:
        given["head_dim"] = head
    if "rope_parameters" in given:
        section = [head * channels // 16 for channels in given["rope_parameters"]["mrope_section"]]
        given["rope_parameters"] = {**given["rope_parameters"], "mrope_section": section}
    return given


def _with_grids(kind: str, merge: int, head: int) -> tuple[Any, Any]:
    transformers: Any = importlib.import_module("transformers")
    prefix, processing, settings = _KINDS[kind]
    named = {**_GLM, **_GLM_SPANS} if kind in GLM_KINDS else {**_QWEN, **_QWEN_SPANS}
    tokenizer = _tokenizer(tuple(named.values()), ())()
    size = {"shortest_edge": 2 * 64, "longest_edge": 10**6}
    settings = {
        "text_config": _text(len(tokenizer), head, **settings["text"]),
        "vision_config": {
            **_VISION,
            "spatial_merge_size": merge,
            "out_hidden_size": 2 * head,
            **settings["vision"],
        },
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()},
    }
    if kind == "qwen2_vl":  # its encoder has other names for these settings
        vision = settings["vision_config"]
        vision.update(embed_dim=32, mlp_ratio=1, hidden_size=2 * head)
        del vision["out_hidden_size"], vision["intermediate_size"]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    folder = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_vl", "Qwen3VL": "qwen3_vl"}.get(
        processing, processing.lower()
    )
    visual = "Qwen2VL" if processing.startswith("Qwen") else processing
    video_class = f"{'Qwen3VL' if folder == 'qwen3_vl' else visual}VideoProcessor"
    videos = getattr(importlib.import_module(f"transformers.models.{folder}.video_processing_{folder}"), video_class)
    images = {"patch_size": PATCH, "size": size, "merge_size": merge}
    if folder == "qwen3_vl":  # images of published checkpoints are normalized as videos are
        images.update(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = getattr(transformers, f"{processing}Processor")(
        image_processor=getattr(transformers, f"{visual}ImageProcessor")(**images),
        tokenizer=tokenizer,
        video_processor=videos(patch_size=PATCH, size=size, merge_size=merge, do_sample_frames=False),
    )
    return _noisy(model), processor


def _internvl(head: int) -> tuple[Any, Any]:
    transformers: Any = importlib.import_module("transformers")
    # in checkpoints of the older format, places of videos have the last token
    tokenizer = _tokenizer((*_INTERNVL.values(), "<|video_pad|>"), tuple(_INTERNVL.items()))()
    side = 2 * PATCH * INTERNVL_SIDE
    size = {"height": side, "width": side}
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": [side, side],
            "patch_size": [PATCH, PATCH],
        },
        text_config=_text(len(tokenizer), head, model_type="qwen3", head_dim=head),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=INTERNVL_SIDE**2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config)
    video_class = importlib.import_module(
        "transformers.models.internvl.video_processing_internvl"
    ).InternVLVideoProcessor
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        video_processor=video_class(size=size),
        image_seq_length=INTERNVL_SIDE**2,
    )
    return _noisy(model), processor


def _noisy(model: Any) -> Any:
    """Return a model with larger weights: with those that the library draws, answers hardly depend on videos."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        if any(part in name for part in ("embed_tokens", "lm_head", "merger", "multi_modal_projector")):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "language_model" in name:
            torch.nn.init.normal_(parameter, std=0.35)
    return model.eval()
