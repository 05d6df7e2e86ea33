"""The adapter for models of transformers that encode videos with grids, which Qwen-VL and GLM-V share.

Their processors return `pixel_values_videos` and `video_grid_thw`: for every video the number T of pairs of frames, and
rows and columns of a frame in patches. An encoder with a merger leaves T·H'·W' tokens of it, where H' and W' are rows
and columns divided by `spatial_merge_size`, in the order of a (T, H', W', C) tensor. `get_video_features` of the inner
model returns them by video, `get_rope_index` makes positions of grids, and `replace_video_token` of the processor
writes as many placeholders as there are tokens. A patch overrides these three; in mode "grid" it leaves the processor.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.values import shown
from .family import Family
from .modes import ModeOptions
from .pooled_class import Members, find_module

VIDEO = 2
"""The entry of `mm_token_type_ids` at placeholders of videos."""


@dataclass(frozen=True)
class GridArchitecture:
    """Names by which the classes of a model of transformers are found.

    folder: name of its subpackage of `transformers.models`. prefix: beginning of the names of its classes. processor:
    subpackage and name of the class of its processor.
    """

    folder: str
    prefix: str
    processor: tuple[str, str]

    @property
    def module(self) -> str:
        """The name of the module of the model."""
        return f"transformers.models.{self.folder}.modeling_{self.folder}"

    @property
    def inner(self) -> str:
        """The name of the class of the inner model, which holds encoder and language model without its head."""
        return f"{self.prefix}Model"

    @property
    def tested(self) -> dict[str, Any]:
        """Arguments of `require` for this model."""
        folder, processor = self.processor
        inner = f"{self.module}:{self.inner}"
        return {
            "package": "transformers",
            "at_least": "5.17",
            "below": "5.25",
            "signatures": {
                f"{inner}.get_video_features": "self, pixel_values_videos, video_grid_thw, ...",
                f"{inner}.get_rope_index": "self, input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, ...",
                f"{_processing(folder)}:{processor}.replace_video_token": "self, video_inputs, video_idx, ...",
            },
        }


def _processing(folder: str) -> str:
    return f"transformers.models.{folder}.processing_{folder}"


def model_members(base: Any, options: ModeOptions) -> dict[str, Any]:
    """Return the methods, by name, with which a subclass of an inner model's class shrinks the tokens of videos."""
    can_return_tuple: Any = importlib.import_module("transformers.utils").can_return_tuple
    rope = inspect.signature(base.get_rope_index)

    @functools.wraps(base.get_video_features)
    def get_video_features(self: Any, pixel_values_videos: Tensor, video_grid_thw: Any = None, **keywords: Any) -> Any:
        outputs = base.get_video_features(self, pixel_values_videos, video_grid_thw, return_dict=True, **keywords)
        shrink_outputs(outputs, token_grids(self, video_grid_thw), options)
        return outputs

    @functools.wraps(base.get_rope_index)
    def get_rope_index(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = rope.bind(self, *arguments, **keywords)
        grids = given.arguments.get("video_grid_thw")
        if grids is not None:
            _check_placeholders(given.arguments["mm_token_type_ids"], token_grids(self, grids), options)
            given.arguments["video_grid_thw"] = shrink_grids(grids, merge_size(self), options)
        return base.get_rope_index(*given.args, **given.kwargs)

    return {"get_video_features": can_return_tuple(get_video_features), "get_rope_index": get_rope_index}


def processor_members(base: Any, options: ModeOptions) -> dict[str, Any]:
    """Return the methods, by name, with which a subclass of a processor's class makes prompts for pooled videos."""

    def replace_video_token(self: Any, video_inputs: Mapping[str, Any], video_idx: int, **keywords: Any) -> Any:
        grids = shrink_grids(video_inputs["video_grid_thw"], self.video_processor.merge_size, options)
        return base.replace_video_token(self, {**video_inputs, "video_grid_thw": grids}, video_idx, **keywords)

    def _get_num_multimodal_tokens(self: Any, image_sizes: Any = None, video_sizes: Any = None, **keywords: Any) -> Any:
        if video_sizes is not None:  # the library tells the number of patches, but not rows and columns of a frame
            raise ValueError(
                f"video_sizes must be None: how many tokens of a video are left does not follow from the patches that "
                f"the library counts, got {shown(video_sizes)}"
            )
        return base._get_num_multimodal_tokens(self, image_sizes, **keywords)

    return {"replace_video_token": replace_video_token, "_get_num_multimodal_tokens": _get_num_multimodal_tokens}


class GridFamily(Family):
    """A family of models that encode videos with grids. architectures: the names of their classes."""

    processor_members = staticmethod(processor_members)
    processor_modes = ("pool",)
    processor_purpose = "it writes a placeholder for every token into prompts (mode='grid' needs none)"

    def __init__(self, *architectures: GridArchitecture) -> None:
        self.architectures = architectures

    def find(self, model: nn.Module) -> tuple[Any, GridArchitecture]:
        """Return the inner model in `model` and its architecture. Raises TypeError unless there is one."""
        return find_module(model, {(one.module, one.inner): one for one in self.architectures})

    def parts(self, model: nn.Module) -> list[tuple[Any, Members]]:
        return [(self.find(model)[0], model_members)]

    def tested(self, model: nn.Module | None) -> list[dict[str, Any]]:
        architectures = self.architectures if model is None else [self.find(model)[1]]
        return [architecture.tested for architecture in architectures]

    def check(self, model: nn.Module, options: ModeOptions) -> None:
        options.check_channels(token_channels(self.find(model)[0]))

    def model_classes(self) -> list[Any]:
        return [
            getattr(importlib.import_module(one.module), f"{one.prefix}{end}")
            for one in self.architectures
            for end in ("Model", "ForConditionalGeneration")
        ]

    def processor_classes(self) -> list[Any]:
        names = dict.fromkeys(one.processor for one in self.architectures)  # several models have the same
        return [getattr(importlib.import_module(_processing(folder)), name) for folder, name in names]


def shrink_outputs(outputs: Any, grids: Iterable[Sequence[int]], options: ModeOptions) -> None:
    """Replace the tokens of videos in what `get_video_features` returned by those that the options leave of them.

    outputs: `pooler_output` holds a (T·H'·W', C) tensor per video. Models with deepstack also have
    `deepstack_features`, which holds for every level such a tensor per video or, before transformers 5.23, one tensor
    of all videos. grids: (T, H', W') of every video.

    All levels of a token are pooled by the weight that follows from the norm of its main token.
    """
    main, deep = outputs.pooler_output, getattr(outputs, "deepstack_features", None) or []
    joined = bool(deep) and isinstance(deep[0], Tensor)
    levels = [main, *([level.split([len(tokens) for tokens in main]) if joined else level for level in deep])]
    shrunk = [_shrink_levels(tokens, grid, options) for grid, *tokens in zip(grids, *levels, strict=True)]
    outputs.pooler_output, *deeper = (tuple(level) for level in zip(*shrunk, strict=True))
    if deep:
        outputs.deepstack_features = [torch.cat(level) if joined else level for level in deeper]


def _shrink_levels(levels: Sequence[Tensor], grid: Sequence[int], options: ModeOptions) -> Sequence[Tensor]:
    """Return what is left of one video: for every level (T·OH·OW, C), views of one tensor if there are several."""
    if len(levels) == 1:
        return [shrink_video(levels[0], grid, options)]
    channels = levels[0].shape[-1]
    return list(torch.split(shrink_video(torch.cat(tuple(levels), -1), grid, options, channels), channels, -1))


def shrink_video(tokens: Tensor, grid: Sequence[int], options: ModeOptions, main: int | None = None) -> Tensor:
    """Return what is left of the tokens of one video: (T·OH·OW, C) of (T·H'·W', C).

    grid: (T, H', W'). main: number of channels of the main token, which come first, where C holds further levels.
    """
    norm_channels = main if main != tokens.shape[-1] else None
    return options.apply(tokens.unflatten(0, tuple(grid)), norm_channels=norm_channels).flatten(0, 2)


def shrink_grids(grids: Any, merge: int, options: ModeOptions) -> Tensor:
    """Return `video_grid_thw`, in patches, of the videos that the options leave: a new tensor."""
    shrunk: Tensor = torch.as_tensor(grids).clone()
    sizes = [options.frame_size((rows // merge, cols // merge)) for _, rows, cols in shrunk.tolist()]
    shrunk[:, 1:] = merge * torch.tensor(sizes, dtype=shrunk.dtype).reshape(-1, 2)
    return shrunk


def token_grids(inner: Any, grids: Any) -> list[tuple[int, int, int]]:
    """Return (T, H', W') in tokens of every row of `video_grid_thw`."""
    merge = merge_size(inner)
    return [(frames, rows // merge, cols // merge) for frames, rows, cols in grids.tolist()]


def merge_size(inner: Any) -> int:
    """Return the number of rows, and of columns, of patches that an inner model's encoder merges into one token."""
    return int(inner.config.vision_config.spatial_merge_size)


def token_channels(inner: Any) -> int:
    """Return the number C of channels of a token that an inner model's encoder hands to its language model."""
    return int(inner.config.get_text_config().hidden_size)


def _check_placeholders(types: Any, grids: Sequence[Sequence[int]], options: ModeOptions) -> None:
    """Raise ValueError unless prompts have as many placeholders as the options leave tokens of all videos."""
    expected = sum(frames * math.prod(options.frame_size((rows, cols))) for frames, rows, cols in grids)
    found = int((types == VIDEO).sum())
    if found != expected:
        processor = "the processor that was patched" if options.mode == "pool" else "a processor that is not patched"
        raise ValueError(
            f"prompts must have {expected} placeholders of videos, the tokens that {options} leaves, got {found}: make "
            f"them with {processor}"
        )
