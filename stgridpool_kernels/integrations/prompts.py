"""Prompts of transformers without some of their tokens: all inputs with one entry per token get shorter together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PADDING = {"mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100}
"""Padding values of the inputs, besides `input_ids` and `attention_mask`, that have one entry per token."""

UNFIT = ("position_ids", "cache_position", "cache", "past_key_values", "inputs_embeds", "mm_encoder_outputs")
"""Names of inputs that cannot be combined with shortened prompts."""


def check_prompts(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError unless ids, mask and the like are tensors of one shape and no input is there that is `UNFIT`."""
    for name in UNFIT:
        if inputs.get(name) is not None:
            raise ValueError(f"inputs must not have {name}, which does not fit shorter prompts")
    ids = inputs["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            f"input_ids must be a tensor (prompts, tokens), as with return_tensors='pt', got {_shape(ids)}"
        )
    for name in ("attention_mask", *PADDING):
        value = inputs.get(name)
        if value is not None and (not isinstance(value, Tensor) or value.shape != ids.shape):
            raise ValueError(f"{name} must be a tensor of the shape of input_ids, {_shape(ids)}, got {_shape(value)}")
    for name, value in inputs.items():
        known = name in ("input_ids", "attention_mask", *PADDING)
        if isinstance(value, Tensor) and value.shape == ids.shape and not known:
            raise ValueError(f"inputs must not have {name}, of which it is not known what stands for padding")
    mask = inputs.get("attention_mask")
    if mask is not None and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"attention_mask must have entries 0 and 1 alone, got {int(mask.max())} as the largest")


def shorten_prompts(inputs: Mapping[str, Any], kept: Tensor, pad_token_id: int) -> dict[str, Tensor]:
    """Return the inputs that have an entry per token, without tokens that are not kept or were padding.

    inputs: as `check_prompts` accepts them. kept: a boolean tensor of the shape of `input_ids`.

    Rows are padded to equal length on the side where the inputs were padded, else on the left, where `generate` needs
    padding. The result has an `attention_mask` in any case.
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    side = "right" if bool((mask[:, -1] == 0).any()) else "left"
    kept = kept & mask.bool()

    def shorten(value: Tensor, padding: int) -> Tensor:
        rows = [row[which] for row, which in zip(value, kept, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side)

    paddings = {name: padding for name, padding in PADDING.items() if inputs.get(name) is not None}
    shorter = {name: shorten(inputs[name], padding) for name, padding in paddings.items()}
    return {"input_ids": shorten(ids, pad_token_id), "attention_mask": shorten(torch.ones_like(mask), 0), **shorter}


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
