"""The adapter for models of transformers that encode videos with grids, which Qwen-VL and GLM-V share.

Their processors return `pixel_values_videos` and `video_grid_thw`: for every video the number T of pairs of frames, and
rows and columns of a frame in patches. An encoder with a merger leaves T·H'·W' tokens of it, where H' and W' are rows
and columns divided by `spatial_merge_size`, in the order of a (T, H', W', C) tensor. `get_video_features` of the inner
model returns them by video, `get_rope_index` makes positions of grids, and `replace_video_token` of the processor
writes as many placeholders as there are tokens. These three methods are replaced, in mode "grid" the first alone.
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

from . import loading
from .base import require
from .modes import ModeOptions, mode_options
from .pooled_class import (
    check_free,
    check_processor,
    find_module,
    is_pooled,
    patch_class,
    patch_processor,
    unpatch_classes,
)

VIDEO = 2
"""The entry of `mm_token_type_ids` at placeholders of videos."""


@dataclass(frozen=True)
class GridModel:
    """A model of the library, by the names of its classes.

    folder: of `transformers.models`. prefix: what names of its classes begin with. processor: folder and class of the
    processor.
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

    def model_classes(self) -> list[Any]:
        """Return the library's classes of the model, without and with a language model head."""
        module = importlib.import_module(self.module)
        return [getattr(module, f"{self.prefix}{end}") for end in ("Model", "ForConditionalGeneration")]

    def processor_class(self) -> Any:
        """Return the library's class of the processor."""
        folder, name = self.processor
        return getattr(importlib.import_module(_processing(folder)), name)


def _processing(folder: str) -> str:
    return f"transformers.models.{folder}.processing_{folder}"


@dataclass(frozen=True)
class Family:
    """Models with one adapter. The methods are what the module of a family offers, which documents them."""

    models: tuple[GridModel, ...]

    def patch(self, model: nn.Module, processor: Any, mode: str, options: Mapping[str, Any]) -> None:
        inner, of = self.find(model)
        require(**of.tested)
        chosen = mode_options(mode, **options)
        chosen.check_channels(token_channels(inner))
        if processor is not None:
            check_processor(processor, self._processors())
            check_free(processor, chosen)
        elif chosen.mode == "pool":
            raise TypeError(
                "processor must be given in mode 'pool', since it writes a placeholder for every token into prompts, "
                "as patch(model, processor); mode='grid' needs none"
            )
        patch_class(inner, model_members, chosen)
        if chosen.mode == "pool":
            patch_processor(processor, processor_members, chosen)

    def unpatch(self, model: nn.Module, processor: Any) -> None:
        inner, _ = self.find(model)
        if processor is not None:
            check_processor(processor, self._processors())
        unpatch_classes([inner, processor])

    def register(self, mode: str, options: Mapping[str, Any]) -> None:
        for of in self.models:
            require(**{**of.tested, "signatures": {**of.tested["signatures"], **loading.SIGNATURES}})
        chosen = mode_options(mode, **options)

        def change(loaded: Any) -> None:
            if isinstance(loaded, nn.Module):
                inner, _ = self.find(loaded)
                chosen.check_channels(token_channels(inner))
                if not is_pooled(inner):
                    patch_class(inner, model_members, chosen)
            elif chosen.mode == "pool":
                patch_processor(loaded, processor_members, chosen)

        loading.change_loaded(self._classes(), change)

    def unregister(self) -> None:
        for of in self.models:
            require(**of.tested)
        loading.stop_changing(self._classes())

    def find(self, model: nn.Module) -> tuple[Any, GridModel]:
        """Return the inner model in `model` and what is known of it. Raises TypeError unless there is one."""
        return find_module(model, {(of.module, of.inner): of for of in self.models})

    def _classes(self) -> list[Any]:
        """Return the classes of the library that `register` is for."""
        return [*(cls for of in self.models for cls in of.model_classes()), *self._processors()]

    def _processors(self) -> list[Any]:
        """Return the classes of processors. A checkpoint may come with that of another model of its family."""
        return list(dict.fromkeys(of.processor_class() for of in self.models))


def model_members(base: Any, options: ModeOptions) -> dict[str, Any]:
    """Return what a subclass of an inner model's class replaces to shrink the tokens of videos."""
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

    def extra_repr(self: Any) -> str:
        return f"videos: {options}"

    members = {"get_video_features": can_return_tuple(get_video_features), "extra_repr": extra_repr}
    return members if options.mode == "grid" else {**members, "get_rope_index": get_rope_index}


def processor_members(base: Any, options: ModeOptions) -> dict[str, Any]:
    """Return what a subclass of a processor's class replaces to write as many placeholders as `grid_pool` leaves."""

    def replace_video_token(self: Any, video_inputs: Mapping[str, Any], video_idx: int, **keywords: Any) -> Any:
        grids = shrink_grids(video_inputs["video_grid_thw"], self.video_processor.merge_size, options)
        return base.replace_video_token(self, {**video_inputs, "video_grid_thw": grids}, video_idx, **keywords)

    def _get_num_multimodal_tokens(self: Any, image_sizes: Any = None, video_sizes: Any = None, **keywords: Any) -> Any:
        if video_sizes is not None:  # the library counts patches of a video, not rows and columns of its frames
            raise NotImplementedError("a patched processor does not count the tokens of videos that it has not seen")
        return base._get_num_multimodal_tokens(self, image_sizes, **keywords)

    return {"replace_video_token": replace_video_token, "_get_num_multimodal_tokens": _get_num_multimodal_tokens}


def shrink_outputs(outputs: Any, grids: Iterable[Sequence[int]], options: ModeOptions) -> None:
    """Replace the tokens of videos in what `get_video_features` returned by those that the options leave of them.

    outputs: with `pooler_output`, the (T·H'·W', C) tokens of every video, and in models with deepstack with
    `deepstack_features`, which has for every level such tokens, by video or, before transformers 5.23, of all videos in
    one tensor. grids: (T, H', W') of every video. One weight, that of the main token, is for all levels of a token.
    """
    main, deep = outputs.pooler_output, getattr(outputs, "deepstack_features", None) or []
    joined = bool(deep) and isinstance(deep[0], Tensor)
    levels = [main, *([level.split([len(tokens) for tokens in main]) if joined else level for level in deep])]
    shrunk = [_shrink_video(tokens, grid, options) for grid, *tokens in zip(grids, *levels, strict=True)]
    outputs.pooler_output, *deeper = (tuple(level) for level in zip(*shrunk, strict=True))
    if deep:
        outputs.deepstack_features = [torch.cat(level) if joined else level for level in deeper]


def _shrink_video(levels: Sequence[Tensor], grid: Sequence[int], options: ModeOptions) -> Sequence[Tensor]:
    """Return what is left of one video: for every level (T·OH·OW, C), views of one tensor if there are several."""
    if len(levels) == 1:
        return [options.apply(levels[0].unflatten(0, tuple(grid))).flatten(0, 2)]
    channels = levels[0].shape[-1]
    together = torch.cat(tuple(levels), -1).unflatten(0, tuple(grid))
    return list(torch.split(options.apply(together, norm_channels=channels).flatten(0, 2), channels, -1))


def shrink_grids(grids: Any, merge: int, options: ModeOptions) -> Tensor:
    """Return a new `video_grid_thw`, in patches, of videos whose frames have what the options leave of their tokens."""
    shrunk: Tensor = torch.as_tensor(grids).clone()
    sizes = [options.frame_size((rows // merge, cols // merge)) for _, rows, cols in shrunk.tolist()]
    shrunk[:, 1:] = merge * torch.tensor(sizes, dtype=shrunk.dtype).reshape(-1, 2)
    return shrunk


def token_grids(inner: Any, grids: Any) -> list[tuple[int, int, int]]:
    """Return (T, H', W') in tokens of every row of `video_grid_thw`."""
    merge = merge_size(inner)
    return [(frames, rows // merge, cols // merge) for frames, rows, cols in grids.tolist()]


def merge_size(inner: Any) -> int:
    """Return how many rows, and columns, of patches an inner model merges into one of tokens."""
    return int(inner.config.vision_config.spatial_merge_size)


def token_channels(inner: Any) -> int:
    """Return the number C of channels of a token that an inner model's encoder hands to its language model."""
    return int(inner.config.get_text_config().hidden_size)


def _check_placeholders(types: Any, grids: Sequence[Sequence[int]], options: ModeOptions) -> None:
    """Raise ValueError unless prompts have as many placeholders as the options leave tokens of all videos."""
    expected = sum(frames * math.prod(options.frame_size((rows, cols))) for frames, rows, cols in grids)
    found = int((types == VIDEO).sum())
    if found != expected:
        raise ValueError(
            f"prompts must have {expected} placeholders of videos, the tokens that {options} leaves, got {found}: make "
            f"them with the processor that was patched"
        )
