"""Integration into InternVL of transformers (InternVL3 and 3.5 in the library's own format), from transformers 5.23 on.

InternVL takes frames of videos and tiles of images in one tensor `pixel_values`, in the order of the prompt, and
nothing says which rows are frames, nor of which video. So the processor is changed in both modes: it returns one more
input, `visual_segments`, and the model takes it. Norms are those of the tokens that the projector hands to the language
model.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..plan.values import plain, shown
from .family import Family
from .modes import MODES, ModeOptions
from .pooled_class import Members, find_class, find_module

_MODELING = "transformers.models.internvl.modeling_internvl"
_PROCESSING = "transformers.models.internvl.processing_internvl"
_INNER, _HEAD, _PROCESSOR = "InternVLModel", "InternVLForConditionalGeneration", "InternVLProcessor"

IMAGE, VIDEO = 1, 2
"""The first entry of a row of `visual_segments`: whether the row describes an image or a video."""

_MODEL_SEGMENTS: ContextVar[Any] = ContextVar("visual_segments given to the model that is being called", default=None)
_PROCESSOR_SEGMENTS: ContextVar[list[list[int]]] = ContextVar("visual_segments of the processor that is being called")

TESTED: dict[str, Any] = {
    "package": "transformers",
    "at_least": "5.23",
    "below": "5.25",
    "signatures": {
        f"{_MODELING}:{_INNER}.get_image_features": "self, pixel_values, vision_feature_layer, ...",
        f"{_MODELING}:{_INNER}.forward": "self, input_ids, pixel_values, ..., mm_encoder_outputs",
        f"{_MODELING}:{_HEAD}._validate_model_kwargs": "self, model_kwargs",
        f"{_PROCESSING}:{_PROCESSOR}.replace_video_token": "self, video_inputs, video_idx, ...",
        f"{_PROCESSING}:{_PROCESSOR}.get_text_with_replacements": "self, text, ...",
    },
}
"""Arguments of `require` for this integration. Models of transformers before 5.23 take no `mm_encoder_outputs`."""


def patch(model: nn.Module, processor: Any = None, *, mode: str = "pool", **options: Any) -> None:
    """Shrink, or grid, the tokens of every video between projector and language model of a loaded model, in place.

    model: an InternVL model of transformers, or a module that contains one. Without its language model head it can be
        called, but there is no `generate`; it is patched as a whole where there is a head.
    processor: the processor that makes its prompts, which is changed in place in both modes.
    mode: "pool" applies `grid_pool`: (F, 256, C) tokens of the frames of a video, 16 × 16 each, become (F, 64, C) of
        the same dtype and device, and its prompt has 64 placeholders a frame. "grid" applies `temporal_grid`: the
        number of tokens and prompts stay.
    options: keyword arguments of `grid_pool` except `frame_counts` and `out`, in mode "grid" those of `temporal_grid`;
        `ceil_mode` is True by default.

    The processor then returns `visual_segments` as well, which model and `generate` take: an integer tensor
    (images and videos, 2) with a row [1, number of tiles] for every image and [2, number of frames] for every video, in
    the order of the prompts. Every video is treated on its own; images are not changed. The method is ST-GridPool,
    arXiv 2605.22078.

    Raises TypeError if `model` holds no such model, or if the processor is missing or another; RuntimeError if model or
    processor is patched already (`unpatch` it first), or for a version of transformers that `require` refuses;
    ValueError for invalid options, see `mode_options` and `grid_pool`. Nothing is changed then.
    """
    FAMILY.patch(model, processor, mode, options)


def unpatch(model: nn.Module, processor: Any = None) -> None:
    """Restore an InternVL model, and a processor if one is given. Errors are those of `qwen_vl.unpatch`."""
    FAMILY.unpatch(model, processor)


def register(*, mode: str = "pool", **options: Any) -> None:
    """Make transformers load InternVL models and their processors as if patched by `patch`, in both modes.

    Arguments and errors are those of `patch` and of `qwen_vl.register`.
    """
    FAMILY.register(mode, options)


def unregister() -> None:
    """End `register`: what is loaded later is not patched. Raises RuntimeError if it is not in force."""
    FAMILY.unregister()


def inner_members(base: Any, options: ModeOptions) -> dict[str, Any]:
    """Return the methods, by name, with which a subclass of the inner model's class shrinks the tokens of frames.

    `generate` calls `get_image_features` with `visual_segments`. A call of the model calls it in its `forward`, which
    hooks may have replaced on the object, so `__call__` takes the segments and leaves them in a context variable.
    """
    can_return_tuple: Any = importlib.import_module("transformers.utils").can_return_tuple

    def get_image_features(
        self: Any, pixel_values: Tensor, *arguments: Any, visual_segments: Any = None, **keywords: Any
    ) -> Any:
        given = _MODEL_SEGMENTS.get() if visual_segments is None else visual_segments
        segments = _read_segments(given, len(pixel_values))
        outputs = base.get_image_features(self, pixel_values, *arguments, return_dict=True, **keywords)
        outputs.pooler_output = shrink_tokens(outputs.pooler_output, segments, options)
        return outputs

    def __call__(self: Any, *arguments: Any, visual_segments: Any = None, **keywords: Any) -> Any:
        before = _MODEL_SEGMENTS.set(visual_segments)
        try:
            return base.__call__(self, *arguments, **keywords)
        finally:
            _MODEL_SEGMENTS.reset(before)

    signature = inspect.signature(base.get_image_features)  # generate passes only arguments that it names
    *parameters, rest = signature.parameters.values()
    segments = inspect.Parameter("visual_segments", inspect.Parameter.KEYWORD_ONLY, default=None)
    features: Any = functools.update_wrapper(can_return_tuple(get_image_features), base.get_image_features)
    features.__signature__ = signature.replace(parameters=[*parameters, segments, rest])
    return {"get_image_features": features, "__call__": __call__}


def head_members(base: Any, options: ModeOptions) -> dict[str, Any]:
    """Return the method, by name, that lets `generate` take `visual_segments`, which `forward` does not name."""

    def _validate_model_kwargs(self: Any, model_kwargs: dict[str, Any]) -> None:
        known = {name: value for name, value in model_kwargs.items() if name != "visual_segments"}
        base._validate_model_kwargs(self, known)

    return {"_validate_model_kwargs": _validate_model_kwargs}


def processor_members(base: Any, options: ModeOptions) -> dict[str, Any]:
    """Return the methods, by name, with which a subclass of the processor's class counts frames and their tokens."""

    def replace_video_token(self: Any, video_inputs: Any, video_idx: int, **keywords: Any) -> str:
        text: str = base.replace_video_token(self, video_inputs, video_idx, **keywords)
        left = frame_tokens(self.image_seq_length, options)
        return text.replace(self.image_token * self.image_seq_length, self.image_token * left)

    def get_text_with_replacements(self: Any, *arguments: Any, **keywords: Any) -> Any:
        text, offsets = base.get_text_with_replacements(self, *arguments, **keywords)
        kinds = {
            "image": (IMAGE, self.image_seq_length),
            "video": (VIDEO, frame_tokens(self.image_seq_length, options)),
        }
        for replaced in (one for row in offsets for one in row):
            kind, tokens = kinds[replaced["type"]]
            _PROCESSOR_SEGMENTS.get([]).append([kind, replaced["replacement"].count(self.image_token) // tokens])
        return text, offsets

    @functools.wraps(base.__call__)
    def __call__(self: Any, *arguments: Any, **keywords: Any) -> Any:
        noted: list[list[int]] = []
        before = _PROCESSOR_SEGMENTS.set(noted)
        try:
            inputs = base.__call__(self, *arguments, **keywords)
        finally:
            _PROCESSOR_SEGMENTS.reset(before)
        if noted:
            inputs["visual_segments"] = torch.tensor(noted)
        return inputs

    return {
        "replace_video_token": replace_video_token,
        "get_text_with_replacements": get_text_with_replacements,
        "__call__": __call__,
        "model_input_names": property(lambda self: [*base.model_input_names.fget(self), "visual_segments"]),
    }


def shrink_tokens(tokens: Tensor, segments: Sequence[Sequence[int]], options: ModeOptions) -> Tensor:
    """Return the tokens (rows, S, C) of images and frames with every video shrunk by the options.

    segments: rows of `visual_segments`. Where a frame is left with fewer tokens than a tile of an image has, the result
    is cut into (rows, n, C), n being the greatest number of tokens that divides both, so that rows end where images and
    videos do: `generate` copies whole rows for beams.
    """
    parts = list(tokens.split([length for _, length in segments]))
    videos = [index for index, (kind, _) in enumerate(segments) if kind == VIDEO]
    if not videos:
        return tokens
    side = math.isqrt(tokens.shape[1])
    frames = torch.cat([parts[index] for index in videos]).unflatten(1, (side, side))
    counts = [segments[index][1] for index in videos]
    shrunk = options.apply(frames, frame_counts=counts).flatten(1, 2)
    for index, part in zip(videos, shrunk.split(counts), strict=True):
        parts[index] = part
    common = math.gcd(*(part.shape[1] for part in parts))
    return torch.cat([part.reshape(-1, common, part.shape[2]) for part in parts])


def frame_tokens(tokens: int, options: ModeOptions) -> int:
    """Return the number of tokens that are left of a frame of `tokens` tokens, which are a square."""
    return math.prod(options.frame_size((math.isqrt(tokens),) * 2))


def _read_segments(segments: Any, rows: int) -> list[list[int]]:
    """Return `visual_segments` as lists. Raises ValueError unless it says what every row of `pixel_values` is."""
    if segments is None:
        raise ValueError(
            "visual_segments must be given with pixel_values, got None: make inputs with the processor that was patched"
        )
    read = plain(segments)
    pairs = isinstance(read, list) and all(isinstance(one, list) and [*map(type, one)] == [int, int] for one in read)
    fits = pairs and all(kind in (IMAGE, VIDEO) and length >= 0 for kind, length in read)
    if not fits or sum(length for _, length in read) != rows:
        raise ValueError(
            f"visual_segments must be rows [{IMAGE}, tiles of an image] or [{VIDEO}, frames of a video] for the {rows} "
            f"rows of pixel_values, got {shown(read)}"
        )
    return cast(list[list[int]], read)


class _InternVL(Family):
    """The family of the InternVL models."""

    processor_members = staticmethod(processor_members)
    processor_modes = MODES
    processor_purpose = "the model is not told which rows of pixel_values are frames of videos"

    def parts(self, model: nn.Module) -> list[tuple[Any, Members]]:
        inner, _ = find_module(model, {(_MODELING, _INNER): _INNER})
        heads = [module for module in model.modules() if find_class(type(module), {(_MODELING, _HEAD): _HEAD})]
        return [(inner, inner_members), *((head, head_members) for head in heads)]

    def tested(self, model: nn.Module | None) -> list[dict[str, Any]]:
        return [TESTED]

    def check(self, model: nn.Module, options: ModeOptions) -> None:
        config = self.parts(model)[0][0].config
        options.check_channels(int(config.get_text_config().hidden_size))
        frame_tokens(int(config.image_seq_length), options)

    def model_classes(self) -> list[Any]:
        return [getattr(importlib.import_module(_MODELING), name) for name in (_INNER, _HEAD)]

    def processor_classes(self) -> list[Any]:
        return [getattr(importlib.import_module(_PROCESSING), _PROCESSOR)]


FAMILY = _InternVL()
"""The model that this module patches."""
