"""Shrinking the tokens of videos before a model of transformers is called, without a patch.

`compress` takes what the processor returned and gives what `generate` takes: videos that are encoded and shrunk
already, which the library calls `mm_encoder_outputs`, grids of their new size, from which the model makes positions,
and prompts with as many placeholders. It works from transformers 5.23 on, for the models of `qwen_vl` and `glm_v`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import glm_v, qwen_vl
from .base import require
from .modes import ModeOptions, mode_options
from .pooled_class import is_pooled
from .video_grid import VIDEO, Family, merge_size, shrink_grids, shrink_outputs, token_channels, token_grids

_FAMILY = Family((*qwen_vl.FAMILY.models, *glm_v.FAMILY.models))

_PADDING = {"mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100}
"""What stands at places of padding, for the inputs that have one entry per token besides ids and mask."""

_UNFIT = ("position_ids", "cache_position", "cache", "past_key_values", "inputs_embeds", "mm_encoder_outputs")
"""Inputs that do not fit prompts which get shorter."""


@torch.no_grad()
def compress(model: nn.Module, inputs: Mapping[str, Any], *, mode: str = "pool", **options: Any) -> dict[str, Any]:
    """Return inputs in which every video is encoded, and shrunk by `grid_pool`; nothing is patched, no gradient kept.

    model: a model of transformers that `qwen_vl` or `glm_v` can patch, not patched, from transformers 5.23 on.
    inputs: what its processor returned for one or more prompts, on the device of the model. They are not modified.
    mode, options: as in `qwen_vl.patch`.

    The result goes to `model.generate(**result)` or `model(**result)`. It has `mm_encoder_outputs` in place of
    `pixel_values` and `pixel_values_videos`, `video_grid_thw` of the pooled size, and prompts without the placeholders
    that no token is left for; these are padded anew, on the side where they were padded, or else on the left. Inputs
    without videos come back as they are. A search with beams changes `mm_encoder_outputs`, and a second one raises
    RuntimeError: inputs are compressed anew for it.

    Raises TypeError if there is no such model in `model`; RuntimeError if it is patched or transformers is older;
    ValueError for inputs that lack something or do not fit together, and for options as `mode_options` and `grid_pool`.
    """
    inner = _checked(model)
    chosen = mode_options(mode, **options)
    chosen.check_channels(token_channels(inner))
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping, as a processor returns it, got {type(inputs).__name__}")
    if inputs.get("pixel_values_videos") is None:
        return dict(inputs)
    _check_inputs(inputs)
    grids = inputs["video_grid_thw"]
    kept = _kept_tokens(inner, inputs, chosen)
    small = {name: value for name, value in inputs.items() if name not in ("pixel_values_videos", "pixel_values")}
    small |= _without(inputs, kept, inner.config)
    small["video_grid_thw"] = shrink_grids(grids, merge_size(inner), chosen)
    video = inner.get_video_features(inputs["pixel_values_videos"], grids, return_dict=True)
    shrink_outputs(video, token_grids(inner, grids), chosen)
    encoded = {"video": video}
    if inputs.get("pixel_values") is not None:  # the library takes no pixels beside outputs of the encoder
        encoded["image"] = inner.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    stock: Any = type(video)
    video.__class__ = _used_once(stock)
    return {**small, "mm_encoder_outputs": encoded}


@functools.cache
def _used_once(base: Any) -> Any:
    """Return a class of outputs of an encoder that raises at a second search with beams.

    The library repeats the tokens of every prompt in place for its beams. It would repeat them again, and where prompts
    have equally many tokens, it would give some prompt the video of another without an error.
    """

    class Outputs(base):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "pooler_output":
                if self.__dict__.get("_stgp_repeated"):
                    raise RuntimeError(
                        "mm_encoder_outputs were changed by a search with beams: compress the inputs anew"
                    )
                self.__dict__["_stgp_repeated"] = True
            super().__setattr__(name, value)

        def __reduce__(self) -> Any:
            _, *rest = super().__reduce__()
            return base, *rest

    Outputs.__name__, Outputs.__qualname__, Outputs.__module__ = base.__name__, base.__qualname__, base.__module__
    return Outputs


def _checked(model: nn.Module) -> Any:
    if any(type(module).__name__ == "InternVLModel" for module in model.modules()):
        raise TypeError(
            "model must not be an InternVL model, whose inputs do not say which rows of pixel_values are frames of "
            "videos: integrations.internvl.patch(model, processor) does it"
        )
    inner, of = _FAMILY.find(model)
    forward = f"{of.module}:{of.inner}.forward"
    signatures = {**of.tested["signatures"], forward: "self, input_ids, ..., mm_encoder_outputs"}
    try:
        require(**{**of.tested, "at_least": "5.23", "signatures": signatures})
    except RuntimeError as error:
        raise RuntimeError(f"compress needs mm_encoder_outputs, which models take from 5.23 on: {error}") from None
    if is_pooled(inner):
        raise RuntimeError(f"model is patched, with {inner.stgp_options}: unpatch it first, or leave out compress")
    return inner


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError unless inputs have what is needed for videos, as tensors, and nothing that does not fit."""
    needed = ["input_ids", "mm_token_type_ids", "video_grid_thw"]
    needed += ["image_grid_thw"] * (inputs.get("pixel_values") is not None)
    for name in needed:
        if inputs.get(name) is None:
            given = ", ".join(other for other, value in inputs.items() if value is not None)
            raise ValueError(f"inputs must have {name}, as the processor returns it, got {given}")
    for name in _UNFIT:
        if inputs.get(name) is not None:
            raise ValueError(f"inputs must not have {name}, which does not fit shorter prompts")
    for name in ("pixel_values_videos", "video_grid_thw"):
        if not isinstance(inputs[name], Tensor):
            raise ValueError(f"{name} must be a tensor, as with return_tensors='pt', got {type(inputs[name]).__name__}")
    ids = inputs["input_ids"]
    for name in ("input_ids", "attention_mask", *_PADDING):
        value = inputs.get(name)
        if value is not None and not (isinstance(value, Tensor) and value.dim() == 2 and value.shape == ids.shape):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor (prompts, tokens) of the shape of input_ids, got {got}")
    mask = inputs.get("attention_mask")
    if mask is not None and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"attention_mask must have entries 0 and 1 alone, got {int(mask.max())} as the largest")


def _kept_tokens(inner: Any, inputs: Mapping[str, Any], options: ModeOptions) -> Tensor:
    """Return which tokens of the prompts are kept, as truth values of their shape: of every frame the first are."""
    runs = []
    for frames, rows, cols in token_grids(inner, inputs["video_grid_thw"]):
        left_rows, left_cols = options.frame_size((rows, cols))
        runs.append((torch.arange(rows * cols) < left_rows * left_cols).repeat(frames))
    of_videos = inputs["mm_token_type_ids"] == VIDEO
    wanted, found = sum(map(len, runs)), int(of_videos.sum())
    if found != wanted:
        raise ValueError(
            f"inputs must have {wanted} placeholders of videos, as many as video_grid_thw has tokens, got {found}"
        )
    kept = torch.ones_like(of_videos)
    kept[of_videos] = torch.cat(runs).to(kept.device)
    return kept


def _without(inputs: Mapping[str, Any], kept: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the inputs that have an entry per token, without the tokens that are not kept, padded anew."""
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    kept = kept & mask.bool()
    padded = (mask == 0).any(0)
    right = bool(padded[-1]) and not bool(padded[0])
    padding_ids = [getattr(one, "pad_token_id", None) for one in (config, config.get_text_config())]
    padding = {**_PADDING, "input_ids": next((one for one in padding_ids if one is not None), 0)}
    shorter = {"attention_mask": _pad(torch.ones_like(mask), kept, 0, right)}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "attention_mask":
            if name not in padding:
                raise ValueError(f"inputs must not have {name}, of which it is not known what stands for padding")
            shorter[name] = _pad(value, kept, padding[name], right)
    return shorter


def _pad(value: Tensor, kept: Tensor, padding: int, right: bool) -> Tensor:
    """Return the kept entries of every row, padded to equal length on the right, or else on the left."""
    rows = [row[which] for row, which in zip(value, kept, strict=True)]
    side = "right" if right else "left"
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side)
