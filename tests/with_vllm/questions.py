"""This module has the questions that tests ask models in vLLM, and finds out what transformers answers to them."""

from __future__ import annotations

import functools
import itertools
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import internvl_chat
import numpy as np
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stgridpool_kernels.integrations import qwen_vl
from stgridpool_kernels.integrations.modes import mode_options
from tests.support import tiny_grid_models as models

HEAD = 32
"""These are the fewest channels of a head that vLLM's attention for CPUs takes."""

KINDS = {
    **{one.folder: f"{one.prefix}ForConditionalGeneration" for one in qwen_vl.FAMILY.architectures},
    "internvl": "InternVLForConditionalGeneration",
    "interns1": "InternS1ForConditionalGeneration",
    "internvl_chat": "InternVLChatModel",
}
"""These are vLLM's architectures, by the kind of model that each is for."""

PROMPTS = {
    "a video": "h i {long} w h a t ?",
    "an image between videos": "h i {odd} s e e {image} a n d {narrow} w h a t ?",
    "short": "o n e {small}",
    "an image": "l o o k {image}",
    "words": "w h a t ?",
}
AGAIN = {"the video again": "h i {long} w h y ?"}
"""This prompt begins as another one, with its video, and is asked after it."""

SHOWING = [name for name, text in {**PROMPTS, **AGAIN}.items() if "{" in text and name != "an image"]
"""The prompts of these names have videos."""

_QWEN = {"long": (34, 5, 7), "odd": (19, 5, 5), "narrow": (9, 3, 11), "small": (17, 3, 3), "image": (1, 6, 6)}
_INTERNVL = {"long": (17, 8, 8), "odd": (9, 8, 8), "narrow": (5, 8, 8), "small": (4, 8, 8), "image": (1, 8, 8)}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def sizes(kind: str) -> dict[str, tuple[int, int, int]]:
    """Return frames, and rows and columns of tokens of a frame, of each video, and of the image.

    Most are odd, and round up when pooled. InternVL has frames of one size.
    """
    return _INTERNVL if kind.startswith("intern") else _QWEN


@functools.cache
def picture(kind: str, name: str) -> Tensor:
    """Return the frames of a video, or the one of the image, (frames, 3, height, width) of bytes."""
    return models.pictures(*sizes(kind)[name], seed=list(_QWEN).index(name))


def media(kind: str) -> dict[str, np.ndarray]:
    """Return videos and the image as vLLM takes them."""
    shown = {name: picture(kind, name).permute(0, 2, 3, 1).numpy() for name in sizes(kind)}
    return {**shown, "image": shown["image"][0]}


def videos_of(text: str) -> list[str]:
    """Return the names of the videos that a prompt shows, in order."""
    return [name for name in (part.partition("}")[0] for part in text.split("{")[1:]) if name != "image"]


def metadata(frames: int) -> dict[str, Any]:
    """Return what vLLM is told of a video, which has two frames a second and has been sampled."""
    return {
        "total_num_frames": frames,
        "fps": 2.0,
        "duration": frames / 2,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def prompt_text(kind: str, text: str) -> str:
    """Return a prompt with the placeholders of the model."""
    image, video = (
        ("<image>", "<video>")
        if kind == "internvl_chat"
        else (
            models.placeholder("internvl" if kind == "interns1" else kind, modality) for modality in ("image", "video")
        )
    )
    return text.format(image=image, **dict.fromkeys(videos_of(text), video))


def given(kind: str, name: str, text: str) -> dict[str, Any]:
    """Return a prompt as engine.py takes it."""
    videos = videos_of(text)
    prompt = {
        "name": name,
        "text": prompt_text(kind, text),
        "videos": videos,
        "images": ["image"] * text.count("{image}"),
    }
    if kind.startswith("qwen") and kind != "qwen2_vl":
        prompt["metadata"] = [metadata(sizes(kind)[one][0]) for one in videos]
    return prompt


def save(kind: str, folder: Path) -> Path:
    """Save a model as vLLM reads it, and return the folder."""
    if kind == "internvl_chat":
        return internvl_chat.save(folder, HEAD)
    model, processor = _internvl() if kind.startswith("intern") else models.build(kind, head=HEAD)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind == "qwen3_vl_moe":  # published checkpoints have experts transposed, and say that their weights add up to 1
        weights = load_file(folder / "model.safetensors")
        for name, kept in weights.items():
            if ".experts." in name:
                weights[name] = kept.transpose(1, 2).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["norm_topk_prob"] = True
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def expected(kind: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Return what transformers answers with the same weights and options, prompt by prompt."""
    answer = _answer_internvl if kind.startswith("intern") else _answer_qwen
    return {name: answer(kind, text, options) for name, text in {**PROMPTS, **AGAIN}.items()}


def _generated(model: Any, places: int, **inputs: Any) -> dict[str, Any]:
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            **models.GREEDY,
            max_new_tokens=tiny.ANSWER,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, -tiny.ANSWER :].tolist()
    logprobs = [step.log_softmax(-1)[0, token].item() for step, token in zip(output.logits, tokens, strict=True)]
    return {"places": places, "tokens": tokens, "logprobs": logprobs}


# ---- Qwen-VL ----


@functools.cache
def _qwen(kind: str, options: str) -> tuple[Any, Any]:
    model, processor = models.build(kind, head=HEAD)
    if json.loads(options) is not None:
        qwen_vl.patch(model, processor, **json.loads(options))
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        model.model.get_rope_index = types.MethodType(positions_of_vllm, model.model)
    return model, processor


def _answer_qwen(kind: str, text: str, options: dict[str, Any] | None) -> dict[str, Any]:
    model, processor = _qwen(kind, json.dumps(options))
    images = [picture(kind, "image")[0]] * text.count("{image}")
    inputs = models.ask(processor, prompt_text(kind, text), [picture(kind, one) for one in videos_of(text)], images)
    return _generated(model, inputs["input_ids"].shape[1], **inputs)


def answer_to_video(
    kind: str, video: Tensor, options: dict[str, Any] | None, text: str = "h i {long} w h a t ?"
) -> dict[str, Any]:
    """Return what transformers answers to a question about a video (F, 3, height, width) of one frame a second."""
    model, processor = _qwen(kind, json.dumps(options))
    inputs = models.ask(processor, prompt_text(kind, text), [video], frames_per_second=1.0)
    return _generated(model, inputs["input_ids"].shape[1], **inputs)


def positions_of_vllm(
    inner: Any,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Return positions of a prompt as vLLM has them for Qwen2-VL and Qwen2.5-VL.

    What follows a video has positions from the largest one of the video on. transformers 5 goes on at its number of
    rows or columns, so that the positions of what follows a long video are among those of the video.
    """
    options = getattr(inner, "stgp_options", None)
    grids = {1: _token_grids(image_grid_thw), 2: _token_grids(video_grid_thw, options)}
    seconds = others.get("second_per_grid_ts")
    steps = iter([] if seconds is None else [inner.config.vision_config.tokens_per_second * float(s) for s in seconds])
    found: list[np.ndarray] = []
    start = 0
    for modality, run in itertools.groupby(mm_token_type_ids[0].tolist()):
        length = len(list(run))
        part = np.broadcast_to(np.arange(length), (3, length))
        if modality:
            part = np.indices(next(grids[modality])).reshape(3, -1)
        if modality == 2:
            part[0] = part[0] * next(steps, 1.0)
        found.append(part + start)
        start = int(found[-1].max()) + 1
    together = torch.from_numpy(np.concatenate(found, axis=1))[:, None]
    return together, torch.tensor([[start - input_ids.shape[1]]])


def _token_grids(rows: Tensor | None, options: Any = None) -> Iterator[tuple[int, int, int]]:
    """Yield frames, rows and columns of tokens that are left of every image or video."""
    for frames, *patches in [] if rows is None else rows.tolist():
        size = tuple(count // 2 for count in patches)
        yield (frames, *(size if options is None else options.frame_size(size)))


# ---- InternVL ----


@functools.cache
def _internvl() -> tuple[Any, Any]:
    return models.build("internvl", head=HEAD)


def _answer_internvl(kind: str, text: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the model answers to embeddings that are pooled by hand, frame by frame of a written prompt.

    Its integration needs a later transformers than vLLM has.
    """
    model, processor = _internvl()
    chosen = None if options is None else mode_options(**options, backend="reference")
    features, asked = [], text
    with torch.inference_mode():
        for name in ["image" if part.startswith("image") else part.partition("}")[0] for part in text.split("{")[1:]]:
            tokens = model.model.get_image_features(_pixels(kind, processor, name)).pooler_output
            left = tokens.unflatten(1, (models.INTERNVL_SIDE,) * 2)
            if name != "image" and chosen is not None:
                left = chosen.apply(left)
            features.append(left.flatten(0, 2))
            places = [f"<img>{'<IMG_CONTEXT>' * (frame.shape[0] * frame.shape[1])}</img>" for frame in left]
            frames = [f"Frame{number}: {place}" for number, place in enumerate(places, 1)]
            asked = asked.replace(f"{{{name}}}", places[0] if name == "image" else "\n".join(frames), 1)
        ids = torch.tensor([processor.tokenizer.encode(asked)])
        embeddings = model.get_input_embeddings()(ids)
        if features:
            mask = (ids == model.config.image_token_id)[..., None]
            embeddings = embeddings.masked_scatter(mask, torch.cat(features))
    return _generated(model, ids.shape[1], inputs_embeds=embeddings, attention_mask=torch.ones_like(ids))


def _pixels(kind: str, processor: Any, name: str) -> Tensor:
    normalized = _IMAGENET if kind == "internvl_chat" else {}
    if name == "image":
        return processor.image_processor([picture(kind, name)[0]], return_tensors="pt", **normalized)["pixel_values"]
    videos = processor.video_processor([picture(kind, name)], return_tensors="pt", **normalized)
    return videos["pixel_values_videos"].flatten(0, 1)
