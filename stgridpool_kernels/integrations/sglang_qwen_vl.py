"""These hooks are for SGLang's models of the Qwen-VL family: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, dense and MoE.

SGLang makes prompts in one process and encodes videos in another. The hook of the multimodal processor marks every
video of a prompt that it made, and the hook of the encoder changes the tokens of marked videos alone. A video whose
prompt came about without the hook thus keeps all its tokens, which is as many as its prompt has placeholders.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .modes import ModeOptions
from .qwen_vl import FAMILY
from .video_grid import shrink_grids, shrink_video, token_channels

_MODELS = {one.folder: f"{one.prefix}ForConditionalGeneration" for one in FAMILY.architectures}
"""Models of these types have hooks; the value is the class of each.

Models of SGLang that inherit from these classes but have other types are left alone.
"""

_PROCESSOR = "sglang.srt.multimodal.processors.qwen_vl:QwenVLImageProcessor"
_ITEM = "sglang.srt.managers.schedule_batch:MultimodalDataItem"
_OWN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The classes of these types have methods of their own; those of the other types inherit the methods of Qwen3-VL."""

SIGNATURES = {
    f"{_PROCESSOR}.__init__": "self, hf_config, server_args, _processor, ...",
    f"{_PROCESSOR}.process_and_combine_mm_data": "self, base_output, mm_tokens, ...",
    f"{_ITEM}.set_hash": "self, hash_value",
    **{f"sglang.srt.models.{kind}:{_MODELS[kind]}.__init__": "self, config, ..." for kind in _OWN},
    **{f"sglang.srt.models.{kind}:{_MODELS[kind]}.get_video_feature": "self, items" for kind in _OWN},
}
"""These are the parameters of each method that has a hook, by the method's module and name."""

CALLED = {
    f"transformers.models.{folder}.processing_{folder}:{name}.replace_video_token": "self, video_inputs, video_idx, ..."
    for folder, name in dict.fromkeys(one.processor for one in FAMILY.architectures)
}
"""These are the parameters of the methods by which processors of transformers write the placeholders of a video."""

_MARK = "stgp_options"
"""The entry of this name in an item's `model_specific_data` holds the options with which its prompt was made."""


class Hooks:
    """This object has the hooks for Qwen-VL. options: the mode and the options of the engine."""

    def __init__(self, options: ModeOptions) -> None:
        self.options = options

    def targets(self) -> dict[str, Callable[..., Any]]:
        """Return the hook of each method in `SIGNATURES`."""
        hooks: dict[str, Callable[..., Any]] = {
            f"{_PROCESSOR}.__init__": self.make_processor,
            "__init__": self.make_model,
            "process_and_combine_mm_data": self.process,
            "set_hash": self.set_hash,
            "get_video_feature": self.get_video_feature,
        }
        return {path: hooks.get(path) or hooks[path.rpartition(".")[2]] for path in SIGNATURES}

    def make_processor(self, original: Callable[..., Any], processor: Any, /, *arguments: Any, **named: Any) -> None:
        """Let the processor of transformers write as many placeholders as the options leave tokens."""
        original(processor, *arguments, **named)
        if processor.model_type in _MODELS:
            check_engine()
            FAMILY.patch_processor(processor._processor, self.options)

    def make_model(self, original: Callable[..., Any], model: Any, /, *arguments: Any, **named: Any) -> None:
        """Check, when the engine starts, that the hooks reach its videos, and that its model fits the options."""
        original(model, *arguments, **named)
        if type(model).__name__ in _MODELS.values():
            check_engine()
            self.options.check_channels(token_channels(model))

    def process(
        self, original: Callable[..., Any], processor: Any, base_output: Any, /, *arguments: Any, **named: Any
    ) -> tuple[list[Any], Any, Any]:
        """Mark the videos of a request, and return the grids that are left, from which positions are computed."""
        if processor.model_type not in _MODELS:
            return original(processor, base_output, *arguments, **named)  # type: ignore[no-any-return]
        for video in base_output.videos or ():
            if isinstance(video, dict):
                raise ValueError(
                    f"a video must be a file or frames where STGP_SGLANG is set, since the prompt is made with it, got "
                    f"format={video.get('format')!r}"
                )
        items, input_ids, outputs = original(processor, base_output, *arguments, **named)
        videos = [item for item in items if item.is_video()]
        for item in videos:
            item.model_specific_data[_MARK] = repr(self.options)
            if item.pad_value is not None:
                item.set_hash(item.hash)
        if videos:
            grids = shrink_grids(outputs["video_grid_thw"], processor.spatial_merge_size, self.options)
            outputs = {**outputs, "video_grid_thw": grids}
        return items, input_ids, outputs

    def set_hash(self, original: Callable[..., Any], item: Any, hash_value: int) -> None:
        """Let the hash of a marked video, by which caches find prompts and tokens, depend on the options."""
        if mark := item.model_specific_data.get(_MARK):
            digest = hashlib.sha256(f"{hash_value} {mark}".encode()).digest()
            hash_value = int.from_bytes(digest[:8], "big")
        original(item, hash_value)

    def get_video_feature(self, original: Callable[..., Any], model: Any, items: Sequence[Any]) -> Tensor:
        """Return what is left of the tokens of all items, (Σ T·OH·OW, C), in their order."""
        features, merge = original(model, items), model.visual.spatial_merge_size
        grids = [
            (item, (frames, rows // merge, cols // merge))
            for item in items
            for frames, rows, cols in item.video_grid_thw.tolist()
        ]
        main = features.shape[-1] // (1 + getattr(model, "num_deepstack_embeddings", 0))
        videos = features.split([frames * rows * cols for _, (frames, rows, cols) in grids])
        return torch.cat(
            [
                shrink_video(tokens, grid, self.options, main) if self._marked(item) else tokens
                for tokens, (item, grid) in zip(videos, grids, strict=True)
            ]
        )

    def _marked(self, item: Any) -> bool:
        """Return whether the hook made an item's prompt. Raises RuntimeError if it did so with other options."""
        mark = item.model_specific_data.get(_MARK)
        if mark not in (None, repr(self.options)):
            raise RuntimeError(
                f"STGP_SGLANG must be the same in all processes of an engine, got {mark} in the one that made a prompt "
                f"and {self.options} in the one that encodes its video"
            )
        return mark is not None


def check_engine() -> None:
    """Raise ValueError if the engine encodes videos, or makes prompts, in ways that the hooks do not reach."""
    context: Any = importlib.import_module("sglang.srt.runtime_context")
    workers, disaggregation = context.get_serving().tokenizer_worker_num, context.get_disagg()
    reasons = {
        f"tokenizer_worker_num must be 1, got {workers}: SGLang loads no plugins in further ones": workers > 1,
        "model_impl must not be 'transformers', whose models have no hooks": (
            str(context.get_model().model_impl).lower() == "transformers"
        ),
        "encoder_only must be off: an encoder does not know which prompts are made with the hooks": (
            disaggregation.encoder_only
        ),
        "language_only must be off: prompts for tokens of another server are made without the hooks": (
            disaggregation.language_only
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{reason} (STGP_SGLANG is set)")
