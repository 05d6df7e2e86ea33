"""Integration into LLaVA-OneVision and LLaVA-NeXT-Video of transformers: ST-GridPool replaces their video pooling.

`patch(model)` changes one loaded model, `register()` all models that the library loads afterwards. Both replace the
class of the inner model, `LlavaOnevisionModel` or `LlavaNextVideoModel`, by a subclass that overrides
`get_video_features`. Parameters and their names, the configuration, images and the processor are unchanged.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import loading
from .base import PoolOptions, ceil_options, pool_flat, require, require_size
from .pooled_class import find_class, find_module, is_pooled, patch_class, unpatch_class

_MODELS = "transformers.models"
_ONEVISION = f"{_MODELS}.llava_onevision.modeling_llava_onevision"
_NEXT_VIDEO = f"{_MODELS}.llava_next_video.modeling_llava_next_video"

TESTED: dict[str, Any] = {
    "package": "transformers",
    "at_least": "5.17",
    "below": "5.25",
    "signatures": {
        f"{_ONEVISION}:LlavaOnevisionModel.get_video_features": "self, pixel_values*, ...",
        f"{_ONEVISION}:LlavaOnevisionModel.apply_pooling": "self, image_features",
        f"{_NEXT_VIDEO}:LlavaNextVideoModel.get_video_features": "self, pixel_values*, ...",
        f"{_NEXT_VIDEO}:LlavaNextVideoPooler.forward": "self, image_features",
    },
}
"""Arguments of `require` for this integration."""

TESTED_LOADING = {**TESTED, "signatures": {**TESTED["signatures"], **loading.SIGNATURES}}
"""Arguments of `require` for `register`, which relies on the library's functions that load models too."""


@dataclass(frozen=True)
class _Architecture:
    """An inner model of the library.

    module, name: its class. pooling: name of the method by which get_video_features pools features of shape
    (videos · frames, side², C). tokens_per_frame: number of tokens that its processor writes into a prompt for a frame
    of side × side tokens.
    """

    module: str
    name: str
    pooling: str
    tokens_per_frame: Callable[[int], int]


_ARCHITECTURES = (
    _Architecture(
        _ONEVISION,
        "LlavaOnevisionModel",
        "apply_pooling",
        lambda side: math.ceil(side / 2) ** 2,
    ),
    _Architecture(
        _NEXT_VIDEO,
        "LlavaNextVideoModel",
        "vision_resampler",
        lambda side: side * side // 4,
    ),
)


_KNOWN = {(of.module, of.name): of for of in _ARCHITECTURES}


def patch(model: nn.Module, *, tokens_per_frame: int | None = None, **options: Any) -> None:
    """Replace the pooling of video tokens of a loaded model, in place, by ST-GridPool of each video.

    model: a LLaVA-OneVision or LLaVA-NeXT-Video model of transformers, with or without its language model head, or a
        module that contains one.
    tokens_per_frame: number of placeholders per frame in prompts. The default is that of the library's processors: for
        frames of g × g tokens, ⌈g/2⌉² with LLaVA-OneVision, ⌊g²/4⌋ with LLaVA-NeXT-Video, which equals the result of
        its own pooling for even g only.
    options: keyword arguments of `grid_pool` except `frame_counts` and `out`; `ceil_mode` is True by default.

    `get_video_features` then pools (videos · frames, g², C) to (videos · frames, OH·OW, C) for the videos of
    `pixel_values_videos`, at the place of the models' own pooling: after the projector in LLaVA-OneVision, before it in
    LLaVA-NeXT-Video. Models that are patched with different options do not affect each other.

    Raises ValueError for a size that does not fit the placeholders, with both numbers; RuntimeError if the model is
    patched already (`unpatch` it first) or transformers has a version that `require` refuses; TypeError if there is no
    such model in `model`; for options as `grid_pool`.
    """
    require(**TESTED)
    inner = _inner_model(model)
    chosen = ceil_options(**options)
    _check_size(type(inner), inner.config, chosen, tokens_per_frame)
    patch_class(inner, _members, chosen, tokens_per_frame)


def unpatch(model: nn.Module) -> None:
    """Restore the own pooling of a model that was patched, or loaded while `register` was in force.

    Raises RuntimeError if it is not patched, or was wrapped after it was, by what replaces its class (`fully_shard`, a
    parametrization); TypeError as `patch`. The model is unchanged then.
    """
    unpatch_class(_inner_model(model))


def register(*, tokens_per_frame: int | None = None, **options: Any) -> None:
    """Make the library load LLaVA-OneVision and LLaVA-NeXT-Video models as if patched by `patch`.

    It affects `from_pretrained` and `from_config`, also of the library's Auto classes, until `unregister`; loaded
    models are unchanged. Arguments are those of `patch`. Loading a model raises ValueError if its size does not fit the
    placeholders.

    Raises RuntimeError if it is in force already (`unregister` first) or transformers has a version that `require`
    refuses; ValueError if other code has replaced how one of the classes is loaded; for options as `grid_pool`.
    """
    require(**TESTED_LOADING)
    chosen = ceil_options(**options)

    def change(loaded: nn.Module) -> None:
        inner = _inner_model(loaded)
        if not is_pooled(inner):
            _check_size(type(inner), inner.config, chosen, tokens_per_frame)
            patch_class(inner, _members, chosen, tokens_per_frame)

    loading.change_loaded(_classes(), change)


def unregister() -> None:
    """End `register`: models that are loaded later have their own pooling. Raises RuntimeError if not registered."""
    require(**TESTED)
    loading.stop_changing(_classes())


def _members(base: Any, options: PoolOptions, tokens_per_frame: int | None) -> dict[str, Any]:
    """Return what a subclass of an inner model's class replaces to pool with ST-GridPool."""
    of = find_class(base, _KNOWN)
    assert of is not None
    pooling = of.pooling

    signature = inspect.signature(base.get_video_features)
    first = list(signature.parameters)[1]  # pixel_values, or pixel_values_videos in later versions

    @functools.wraps(base.get_video_features)
    def get_video_features(self: Any, *arguments: Any, **keywords: Any) -> Any:
        videos, frames = signature.bind(self, *arguments, **keywords).arguments[first].shape[:2]

        def pool(features: Tensor) -> Tensor:
            return pool_flat(features, [frames] * videos, (_side(self.config),) * 2, **options.arguments)

        return base.get_video_features(_Pooling(self, pooling, pool), *arguments, **keywords)

    return {"get_video_features": get_video_features}


class _Pooling:
    """Proxy of a model for the length of one call, which replaces one attribute.

    Pooling needs the number of frames of each video, which the model does not pass to it. Storing the number in the
    model would mix up calls from several threads.
    """

    def __init__(self, model: nn.Module, name: str, pool: Callable[[Tensor], Tensor]) -> None:
        self._model = model
        setattr(self, name, pool)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _inner_model(model: nn.Module) -> Any:
    try:
        return find_module(model, _KNOWN)[0]
    except TypeError as error:
        raise TypeError(f"{error}; integrations.qwen_vl, glm_v and internvl patch other models") from None


def _classes() -> list[Any]:
    """Return the classes of the library that are loaded: models without and with a language model head."""
    return [
        getattr(importlib.import_module(of.module), of.name.removesuffix("Model") + end)
        for of in _ARCHITECTURES
        for end in ("Model", "ForConditionalGeneration")
    ]


def _side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _check_size(inner: type, config: Any, options: PoolOptions, tokens_per_frame: int | None) -> None:
    of, side = find_class(inner, _KNOWN), _side(config)
    assert of is not None
    if getattr(config, "spatial_pool_mode", None) == "conv":
        raise ValueError("spatial_pool_mode must be 'average' or 'max': what 'conv' learned cannot be replaced")
    expected = of.tokens_per_frame(side) if tokens_per_frame is None else tokens_per_frame
    require_size(f"the prompt of a {of.name}", (side, side), expected, options)
