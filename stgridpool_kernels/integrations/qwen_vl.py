"""Integration into the Qwen-VL models of transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, dense and MoE.

`patch(model, processor)` changes one loaded model and its processor, `register()` all that the library loads
afterwards. Norms are those of the tokens that the encoder's merger hands to the language model. These models encode two
frames as one, so T below counts pairs of frames: frame strides (2, 4, 8) with grids of 2 × 2 make segments of 16, 32
and 64 frames of the video, frame strides (1, 2, 4) of 8, 16 and 32.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .video_grid import GridArchitecture, GridFamily

_QWEN3_VL = ("qwen3_vl", "Qwen3VLProcessor")

FAMILY = GridFamily(
    GridArchitecture("qwen2_vl", "Qwen2VL", ("qwen2_vl", "Qwen2VLProcessor")),
    GridArchitecture("qwen2_5_vl", "Qwen2_5_VL", ("qwen2_5_vl", "Qwen2_5_VLProcessor")),
    GridArchitecture("qwen3_vl", "Qwen3VL", _QWEN3_VL),
    GridArchitecture("qwen3_vl_moe", "Qwen3VLMoe", _QWEN3_VL),
    GridArchitecture("qwen3_5", "Qwen3_5", _QWEN3_VL),
    GridArchitecture("qwen3_5_moe", "Qwen3_5Moe", _QWEN3_VL),
)
"""The models that this module patches."""


def patch(model: nn.Module, processor: Any = None, *, mode: str = "pool", **options: Any) -> None:
    """Shrink, or grid, the tokens of every video between encoder and language model of a loaded model, in place.

    model: a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 model of transformers, with or without its language model head,
        or a module that contains one.
    processor: the processor that makes its prompts. Mode "pool" needs it and changes it in place; mode "grid" does not.
    mode: "pool" applies `grid_pool`: (T·H'·W', C) tokens of a video, after the merger, become
        (T·⌈H'/2⌉·⌈W'/2⌉, C) of the same dtype and device, its prompt has as many placeholders, and its positions are
        those of a video of that size. "grid" applies `temporal_grid`: the number of tokens, prompts and positions stay.
    options: keyword arguments of `grid_pool` except `frame_counts` and `out`, in mode "grid" those of `temporal_grid`;
        `ceil_mode` is True by default.

    Every video is treated on its own; images are not changed. In models with deepstack features, weights come from the
    norms of the main tokens, and pool all levels. The method is ST-GridPool, arXiv 2605.22078.

    Raises TypeError if `model` holds no such model, or if the processor is missing or of no class of this family;
    RuntimeError if model or processor is patched already (`unpatch` it first), or for a version of transformers that
    `require` refuses; ValueError for invalid options, see `mode_options` and `grid_pool`. Nothing is changed then.
    """
    FAMILY.patch(model, processor, mode, options)


def unpatch(model: nn.Module, processor: Any = None) -> None:
    """Restore a model, and a processor if one is given, that were patched or loaded while `register` was in force.

    Raises RuntimeError if neither is patched, or if the class of one was replaced after patching (by `fully_shard` or a
    parametrization); TypeError as `patch`. Nothing is changed then.
    """
    FAMILY.unpatch(model, processor)


def register(*, mode: str = "pool", **options: Any) -> None:
    """Make transformers load models of this family, and in mode "pool" their processors, as if patched by `patch`.

    It affects `from_pretrained` and `from_config`, also of the library's Auto classes, until `unregister`; what is
    loaded already does not change. Arguments are those of `patch`.

    Raises RuntimeError if it is in force already (`unregister` first), or for a version of transformers that `require`
    refuses; ValueError if other code has replaced a loader of one of the classes, or for invalid options as `patch`.
    """
    FAMILY.register(mode, options)


def unregister() -> None:
    """End `register`: what is loaded later is not patched. Raises RuntimeError if it is not in force."""
    FAMILY.unregister()
