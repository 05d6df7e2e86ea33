"""These hooks pool videos of SGLang's LlavaLlamaForCausalLM, LlavaQwenForCausalLM and LlavaMistralForCausalLM.

They wrap methods of the common base class, whose `forward` pools videos in the middle of other work, frame by frame,
without the boundaries of videos. The hook of `pad_input_ids`, which has the prompt, therefore marks the frames of each
video; that of `forward` hides videos from SGLang's own pooling; and that of `encode_images` returns features that are
pooled when `forward` splits them.
"""

from __future__ import annotations

import contextvars
import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .base import PoolOptions, pool_flat, require_size
from .modes import ModeOptions

_CLASS = "LlavaBaseForCausalLM"
_METHODS = {
    "load_weights": "self, weights",
    "pad_input_ids": "self, input_ids, image_inputs",
    "_infer_image_aspect_ratio": "mm_items",
    "encode_images": "self, pixel_values",
    "forward": "self, input_ids, positions, forward_batch",
}

SIGNATURES = {f"sglang.srt.models.llava:{_CLASS}.{name}": parameters for name, parameters in _METHODS.items()}
"""These are the parameters of each method that has a hook, by the method's module and name."""


@dataclass
class _Call:
    """One call of `forward` has this state.

    items: items of the requests that it encodes, in the order of encoding. pooled: whether their videos were pooled.
    """

    items: list[Any] = field(default_factory=list)
    pooled: bool = False


class Hooks:
    """This object has the hooks for LLaVA, each under the name of the method that it wraps."""

    def __init__(self, options: ModeOptions) -> None:
        self.mode, self.options = options.mode, options.pool_options
        self._call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("stgp_call", default=None)

    def targets(self) -> dict[str, Callable[..., Any]]:
        """Return the hook of each method in `SIGNATURES`."""
        return {path: getattr(self, path.rpartition(".")[2]) for path in SIGNATURES}

    def load_weights(self, original: Callable[..., Any], model: Any, *arguments: Any, **named: Any) -> Any:
        """Check, when the engine starts, that the options leave as many tokens as it has placeholders for."""
        if self.mode != "pool":
            raise ValueError(f"mode must be 'pool' for {type(model).__name__}, which pools videos, got {self.mode!r}")
        loaded = original(model, *arguments, **named)
        expected = math.ceil(model.image_size / model.patch_size / 2) ** 2
        require_size("SGLang", (model.num_patches_per_side,) * 2, expected, self.options)
        return loaded

    def pad_input_ids(
        self, original: Callable[..., Any], model: Any, input_ids: array[int], image_inputs: Any
    ) -> array[int]:
        """Mark the frames of each video of a request, before placeholders are made from the items' hashes."""
        kind: Any = type(model)
        hooked = next(base for base in kind.__mro__ if base.__name__ == _CLASS)
        pools = model.mm_patch_merge_type.startswith("spatial") and kind.forward is hooked.forward
        if pools:
            name_videos(input_ids, model.config.image_token_index, image_inputs.mm_items, self.options)
        padded: array[int] = original(model, input_ids, image_inputs)
        return padded

    def _infer_image_aspect_ratio(self, original: Callable[..., Any], mm_items: Sequence[Any]) -> Any:
        """Record the items of a request, since `forward` calls this method once for every request that it encodes."""
        call = self._call.get()
        if call is not None:
            call.items.extend(mm_items)
        return original(mm_items)

    def encode_images(self, original: Callable[..., Any], model: Any, pixel_values: Any) -> Any:
        """Return features that are pooled when `forward` splits them, if any item is a frame of a video."""
        features = original(model, pixel_values)
        call = self._call.get()
        if call is None or not any(map(_place, call.items)):
            return features
        return _Pooled(features, (model.num_patches_per_side,) * 2, call, self.options)

    def forward(
        self, original: Callable[..., Any], model: Any, input_ids: Any, positions: Any, forward_batch: Any
    ) -> Any:
        """Hide marked videos from SGLang's own pooling. Raises RuntimeError if they are encoded but not pooled."""
        frames = [
            item for inputs in forward_batch.mm_inputs or () if inputs for item in inputs.mm_items if _place(item)
        ]
        if not frames or not forward_batch.forward_mode.is_extend():
            return original(model, input_ids, positions, forward_batch)
        modality = frames[0].modality
        call = _Call()
        token = self._call.set(call)
        try:
            for frame in frames:  # SGLang's `forward` would pool items that are marked as videos.
                frame.modality = type(modality).IMAGE
            result = original(model, input_ids, positions, forward_batch)
        finally:
            for frame in frames:
                frame.modality = modality
            self._call.reset(token)
        if any(map(_place, call.items)) and not call.pooled:
            raise RuntimeError("SGLang encoded videos without encode_images: is this 0.5.23, with all hooks in force?")
        return result


class _Pooled:
    """This object stands for the features (ΣF, g², C) of all items.

    `torch.split` of it returns those of each item, pooled if it is a frame of a video.
    """

    def __init__(self, features: Tensor, grid: tuple[int, int], call: _Call, options: PoolOptions) -> None:
        self._features, self._grid, self._call, self._options = features, grid, call, options

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        if function is not torch.split:
            raise TypeError(f"SGLang must split the features of its items, it calls {function.__name__}")
        return arguments[0]._split(arguments[1])

    def _split(self, sizes: list[int]) -> list[Tensor]:
        items = self._call.items
        if len(sizes) != len(items):
            raise RuntimeError(f"SGLang must encode the {len(items)} items of its requests, it encodes {len(sizes)}")
        parts = list(self._features.split(sizes))
        frames = [number for number, item in enumerate(items) if _place(item)]
        starts = [at for at, number in enumerate(frames) if _place(items[number]) == 1]
        counts = [end - start for start, end in zip(starts, [*starts[1:], len(frames)], strict=True)]
        together = self._features if len(frames) == len(parts) else torch.cat([parts[number] for number in frames])
        pooled = pool_flat(together, counts, self._grid, **self._options.arguments)
        for number, frame in zip(frames, pooled.split(1), strict=True):
            parts[number] = frame
        self._call.pooled = True
        return parts


def name_videos(input_ids: Sequence[int], placeholder: int, items: Sequence[Any], options: PoolOptions) -> None:
    """Set `stgp_frame` of every frame's item to the number of the frame in its video, from 1, and set its hash.

    A video is a run of frames whose distances in the prompt, in tokens, are the smallest in this prompt, so that text
    separates videos. SGLang makes placeholders of an item's hash, and finds prefixes in its cache by it. The hash is
    that of the options and of all frames of the video, since a summary depends on both.
    """
    places = [place for place, token in enumerate(input_ids) if token == placeholder]
    frames = all(item.is_video() and item.feature.shape[0] == 1 and not _place(item) for item in items)
    if not items or not frames or len(places) != len(items):
        return
    gaps = [after - before for before, after in pairwise(places)]
    borders = [0, *(number + 1 for number, gap in enumerate(gaps) if gap > min(gaps)), len(items)]
    for start, end in pairwise(borders):
        video = items[start:end]
        about = f"{sorted(options.arguments.items())} {[item.hash for item in video]}"
        for number, item in enumerate(video, 1):
            item.stgp_frame = number
            digest = hashlib.sha256(f"{number} {about}".encode()).digest()
            item.set_hash(int.from_bytes(digest[:8], "big"))


def _place(item: Any) -> int:
    """Return the frame's number in its video, counted from 1, or 0 if `name_videos` did not mark the item."""
    place: int = getattr(item, "stgp_frame", 0)
    return place
