"""Integration into LLaVA-NeXT: ST-GridPool replaces `get_2dPool` of LLaVA-Video and LLaVA-OneVision.

`patch()` replaces the method in the class that all models of a clone share, so it affects loaded models and later ones,
until `unpatch()`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .base import PoolOptions, pool_flat, pooled_grid, signature_fault

_MODULE = "llava.model.llava_arch"
_MODES = ("average", "max", "bilinear")


def patch(**options: Any) -> None:
    """Replace the pooling of video tokens, in every model of the clone, by ST-GridPool.

    options: keyword arguments of `grid_pool` except `frame_counts` and `out`. By default the windows leave as many
        tokens as the model was trained with: they are stride × stride, with the stride that the model passes (2), and
        `ceil_mode` is True if config.mm_spatial_pool_mode is "bilinear", False if it is "average" or "max". Other
        numbers of tokens work too, since the model makes room for them afterwards.

    It replaces `LlavaMetaForCausalLM.get_2dPool(image_feature, stride=2)`, which maps (F, g², C) of one video, after
    the projector, to (F, OH·OW, C), newly allocated. The model adds newline tokens afterwards, for every
    config.mm_newline_position.

    Raises ImportError if there is no `llava` on the path; RuntimeError if it has no such method or is patched already
    (`unpatch` first); for options as `grid_pool`. A call of the method raises ValueError if config.mm_spatial_pool_mode
    is none of the above; if config.add_faster_video is on, which interleaves a second pooling; and for OH ≠ OW if
    config.mm_newline_position is "grid", which assumes a square of tokens.
    """
    owner = _owner()
    if _is_patched(owner.get_2dPool):
        raise RuntimeError(f"llava is patched already, with {owner.get_2dPool.stgp_options}: unpatch it first")
    if fault := signature_fault(f"{_MODULE}:LlavaMetaForCausalLM.get_2dPool", "self, image_feature, stride"):
        raise RuntimeError(f"{fault}: put another clone of LLaVA-NeXT on the path")
    owner.get_2dPool = _replacement(owner.get_2dPool, PoolOptions(**options), options)


def unpatch() -> None:
    """Restore the model's own pooling.

    Raises RuntimeError if it is not patched, or if the method was wrapped after it was; ImportError as `patch`. Nothing
    is changed then.
    """
    owner = _owner()
    found = owner.get_2dPool
    if not _is_patched(found):
        raise RuntimeError("llava is not patched")
    if found.stgp_method is not found:
        raise RuntimeError(
            f"LlavaMetaForCausalLM.get_2dPool was wrapped after it was patched, it is now {found.__qualname__} of "
            f"{found.__module__}: unwrap it first"
        )
    owner.get_2dPool = found.stgp_replaced


def _replacement(replaced: Callable[..., Tensor], options: PoolOptions, given: dict[str, Any]) -> Any:
    def get_2dPool(self: Any, image_feature: Tensor, stride: int = 2) -> Tensor:
        side = self.get_vision_tower().num_patches_per_side
        arguments = {**_windows(self.config, stride, given), **given}
        _check_newlines(self.config, pooled_grid((side, side), **arguments))
        return pool_flat(image_feature, [image_feature.shape[0]], (side, side), **arguments)

    pooling: Any = get_2dPool
    pooling.stgp_options, pooling.stgp_replaced = options, replaced
    pooling.stgp_method = pooling  # functools.wraps copies the attributes to a wrapper, which is not this method
    return pooling


def _windows(config: Any, stride: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of the windows that leave as many tokens as the model's own pooling."""
    mode = config.mm_spatial_pool_mode
    if mode not in _MODES:
        raise ValueError(f"config.mm_spatial_pool_mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    if getattr(config, "add_faster_video", False):
        raise ValueError("config.add_faster_video must be off: it takes a second, coarser pooling of every frame")
    if given.get("output_size") is not None:
        return {}
    return {"kernel_size": stride, "ceil_mode": mode == "bilinear"}


def _check_newlines(config: Any, pooled: tuple[int, int]) -> None:
    if getattr(config, "mm_newline_position", None) == "grid" and pooled[0] != pooled[1]:
        raise ValueError(
            f"output must be square where config.mm_newline_position is 'grid', got {pooled[0]} × {pooled[1]}"
        )


def _owner() -> Any:
    if importlib.util.find_spec("llava") is None:
        raise ImportError("llava is not installed: put a clone of LLaVA-NeXT on the path")
    owner = getattr(importlib.import_module(_MODULE), "LlavaMetaForCausalLM", None)
    if not hasattr(owner, "get_2dPool"):
        raise RuntimeError("llava has no LlavaMetaForCausalLM.get_2dPool: this takes LLaVA-NeXT, not LLaVA")
    return owner


def _is_patched(method: Any) -> bool:
    return hasattr(method, "stgp_replaced")
