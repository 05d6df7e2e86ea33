"""Integration into the Qwen-VL models of transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, dense and MoE.

`patch(model, processor)` changes one loaded model and its processor, `register()` all that the library loads
afterwards. Norms are those of the tokens that the encoder's merger hands to the language model. These models encode two
frames as one, so T below counts pairs of frames: frame strides (2, 4, 8) with grids of 2 × 2 make segments of 16, 32
and 64 frames of the video, frame strides (1, 2, 4) of 8, 16 and 32.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .video_grid import Family, GridModel

_QWEN3_VL = ("qwen3_vl", "Qwen3VLProcessor")

FAMILY = Family(
    (
        GridModel("qwen2_vl", "Qwen2VL", ("qwen2_vl", "Qwen2VLProcessor")),
        GridModel("qwen2_5_vl", "Qwen2_5_VL", ("qwen2_5_vl", "Qwen2_5_VLProcessor")),
        GridModel("qwen3_vl", "Qwen3VL", _QWEN3_VL),
        GridModel("qwen3_vl_moe", "Qwen3VLMoe", _QWEN3_VL),
        GridModel("qwen3_5", "Qwen3_5", _QWEN3_VL),
        GridModel("qwen3_5_moe", "Qwen3_5Moe", _QWEN3_VL),
    )
)
"""The models that this module patches."""


def patch(model: nn.Module, processor: Any = None, *, mode: str = "pool", **options: Any) -> None:
    """Shrink, or grid, the tokens of every video between encoder and language model of a loaded model, in place.

    model: a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 model of transformers, with or without its language model head,
        or a module that contains one.
    processor: the processor that makes its prompts, which is changed in place too. Needed in mode "pool", where a video
        of T × H' × W' tokens (after the merger) becomes one of T × ⌈H'/2⌉ × ⌈W'/2⌉: its prompt gets as many
        placeholders, and positions are those of a video of that size. Not changed in mode "grid".
    mode: "pool" applies `grid_pool`; "grid" applies `temporal_grid` alone, which leaves prompts and positions as they
        are.
    options: keyword arguments of `grid_pool` except `frame_counts` and `out`, in mode "grid" those of `temporal_grid`;
        `ceil_mode` is True by default.

    Every video is treated on its own; images are not changed. In models with deepstack features, weights come from the
    norms of the main tokens, and pool all levels. Raises TypeError if there is no such model in `model`, or the
    processor is missing or another; RuntimeError if model or processor is patched already (`unpatch` it first) or
    transformers has a version that `require` refuses; ValueError for options as `mode_options` and `grid_pool`.
    """
    FAMILY.patch(model, processor, mode, options)


def unpatch(model: nn.Module, processor: Any = None) -> None:
    """Restore a model, and a processor if one is given, that were patched or loaded while `register` was in force.

    Raises RuntimeError if neither is patched, or the model was wrapped after it was, by what replaces its class
    (`fully_shard`, a parametrization); TypeError as `patch`. Both are unchanged then.
    """
    FAMILY.unpatch(model, processor)


def register(*, mode: str = "pool", **options: Any) -> None:
    """Make transformers load models of this family, and in mode "pool" their processors, as if patched by `patch`.

    It affects `from_pretrained` and `from_config`, also of the library's Auto classes, until `unregister`; what is
    loaded already does not change. Arguments are those of `patch`.

    Raises RuntimeError if it is in force already (`unregister` first) or transformers has a version that `require`
    refuses; ValueError if other code has replaced how one of the classes is loaded; for options as `patch`.
    """
    FAMILY.register(mode, options)


def unregister() -> None:
    """End `register`: what is loaded later is not patched. Raises RuntimeError if it is not in force."""
    FAMILY.unregister()
