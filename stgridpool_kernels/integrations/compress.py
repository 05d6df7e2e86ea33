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

from . import glm_v, internvl, qwen_vl
from .base import require
from .modes import ModeOptions, mode_options
from .pooled_class import is_pooled
from .prompts import check_prompts, shorten_prompts
from .video_grid import VIDEO, GridFamily, merge_size, shrink_grids, shrink_outputs, token_channels, token_grids

_FAMILY = GridFamily(*qwen_vl.FAMILY.architectures, *glm_v.FAMILY.architectures)


@torch.no_grad()
def compress(model: nn.Module, inputs: Mapping[str, Any], *, mode: str = "pool", **options: Any) -> dict[str, Any]:
    """Return inputs in which every video is encoded, and shrunk by `grid_pool`; nothing is patched, no gradient kept.

    model: a model of transformers that `qwen_vl` or `glm_v` can patch, not patched, from transformers 5.23 on.
    inputs: what its processor returned for one or more prompts, on the device of the model. They are not modified.
    mode, options: as in `qwen_vl.patch`.

    The result, a plain dictionary, goes to `model.generate(**result)` or `model(**result)`. It has `mm_encoder_outputs`
    in place of `pixel_values` and `pixel_values_videos`, `video_grid_thw` of the pooled size, and prompts without the
    placeholders that no token is left for; these are padded anew, on the side where they were padded, or else on the
    left. Inputs without videos come back as they are. The library changes `mm_encoder_outputs` where `num_beams` or
    `num_return_sequences` is above 1; another such call then raises RuntimeError: inputs are compressed anew for it.

    Raises TypeError if `model` holds no such model; RuntimeError if it is patched or transformers is older; ValueError
    for inputs that lack something or do not fit together, and for invalid options as `qwen_vl.patch`.
    """
    inner = _checked(model)
    chosen = mode_options(mode, **options)
    chosen.check_channels(token_channels(inner))
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping, as a processor returns it, got {type(inputs).__name__}")
    if inputs.get("pixel_values_videos") is None:
        return dict(inputs)
    _check_videos(inputs)
    check_prompts(inputs)
    grids = inputs["video_grid_thw"]
    prompts = shorten_prompts(inputs, _kept_tokens(inner, inputs, chosen), _pad_token_id(inner.config))
    video = inner.get_video_features(inputs["pixel_values_videos"], grids, return_dict=True)
    shrink_outputs(video, token_grids(inner, grids), chosen)
    stock: Any = type(video)
    video.__class__ = _repeated_once(stock)
    encoded = {"video": video}
    if inputs.get("pixel_values") is not None:  # the library takes no pixels beside outputs of the encoder
        encoded["image"] = inner.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    others = {name: value for name, value in inputs.items() if name not in ("pixel_values_videos", "pixel_values")}
    small = {"video_grid_thw": shrink_grids(grids, merge_size(inner), chosen), "mm_encoder_outputs": encoded}
    return {**others, **prompts, **small}


def _checked(model: nn.Module) -> Any:
    """Return the inner model in `model`. Raises as `compress` unless its videos can be compressed."""
    try:
        inner, architecture = _FAMILY.find(model)
    except TypeError as error:
        try:
            internvl.FAMILY.parts(model)
        except TypeError:
            raise error from None
        raise TypeError(
            "model must not be an InternVL model, whose inputs do not say which rows of pixel_values are frames of "
            "videos: call integrations.internvl.patch(model, processor)"
        ) from None
    forward = f"{architecture.module}:{architecture.inner}.forward"
    signatures = {**architecture.tested["signatures"], forward: "self, input_ids, ..., mm_encoder_outputs"}
    try:
        require(**{**architecture.tested, "at_least": "5.23", "signatures": signatures})
    except RuntimeError as error:
        raise RuntimeError(f"compress needs mm_encoder_outputs, which models take from 5.23 on: {error}") from None
    if is_pooled(inner):
        raise RuntimeError(f"model is patched, with {inner.stgp_options}: unpatch it first, or leave out compress")
    return inner


def _check_videos(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError unless inputs have what belongs to videos, and to images if there are any."""
    needed = ["input_ids", "mm_token_type_ids", "video_grid_thw"]
    needed += ["image_grid_thw"] * (inputs.get("pixel_values") is not None)
    for name in needed:
        if inputs.get(name) is None:
            given = ", ".join(other for other, value in inputs.items() if value is not None)
            raise ValueError(f"inputs must have {name}, as the processor returns it, got {given}")
    for name in ("pixel_values_videos", "video_grid_thw"):
        if not isinstance(inputs[name], Tensor):
            raise ValueError(f"{name} must be a tensor, as with return_tensors='pt', got {type(inputs[name]).__name__}")


def _kept_tokens(inner: Any, inputs: Mapping[str, Any], options: ModeOptions) -> Tensor:
    """Return a boolean tensor (prompts, tokens) of the tokens to keep: of every frame the first OH·OW placeholders."""
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


def _pad_token_id(config: Any) -> int:
    found = [getattr(one, "pad_token_id", None) for one in (config, config.get_text_config())]
    return next((one for one in found if one is not None), 0)


@functools.cache
def _repeated_once(base: Any) -> Any:
    """Return a class of outputs of an encoder that raises when their tokens are repeated a second time.

    The library repeats the tokens of every prompt in place, for beams and for several answers. A second time it would
    repeat the repeated ones, and where prompts have equally many tokens, it would give a prompt the video of another
    without an error.
    """

    class Outputs(base):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "pooler_output":
                if self.__dict__.get("_stgp_repeated"):
                    raise RuntimeError(
                        "mm_encoder_outputs were repeated by an earlier generate with num_beams or "
                        "num_return_sequences above 1: call compress again"
                    )
                self.__dict__["_stgp_repeated"] = True
            super().__setattr__(name, value)

        def __reduce__(self) -> Any:
            _, *rest = super().__reduce__()
            return base, *rest

    Outputs.__name__, Outputs.__qualname__, Outputs.__module__ = base.__name__, base.__qualname__, base.__module__
    return Outputs
