"""This module makes ST-GridPool the pooling of lmms-eval's `llava_vid` and `llava_onevision`.

LLaVA-NeXT pools in a method of a class that all its models share, so this class is patched, but only while a model is
loaded or answers requests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from . import llava_next
from .base import PoolOptions, video_token_count
from .options import split_arguments

_REQUESTS = ("loglikelihood", "generate_until", "generate_until_multi_round", "generate_until_agentic")
_NEWLINES = {"no_token": "none", "one_token": "one_token", "grid": "grid", "frame": "frame"}
"""These are the values of `newline` of `video_token_count`, by the mm_newline_position of LLaVA-NeXT."""


def members(base: Any) -> dict[str, Any]:
    """Return the methods, by name, with which a subclass of a model's class pools by its `stgp_` arguments."""

    def __init__(self: Any, *positional: Any, **arguments: Any) -> None:
        self.stgp_options, others = split_arguments(arguments, PoolOptions)
        with _pooling(self):
            base.__init__(self, *positional, **others)
            _check_tokens(self)

    def request(method: Any) -> Any:
        @functools.wraps(method)
        def pooled(self: Any, *positional: Any, **arguments: Any) -> Any:
            with _pooling(self):
                return method(self, *positional, **arguments)

        return pooled

    return {"__init__": __init__} | {kind: request(getattr(base, kind)) for kind in _REQUESTS if hasattr(base, kind)}


@contextlib.contextmanager
def _pooling(model: Any) -> Iterator[None]:
    """Patch LLaVA's class only while the block runs, unless another method of `model` has patched it.

    Other models in the process, such as the baseline of a comparison, thus keep their own pooling.
    """
    if model.stgp_options is None or getattr(model, "_stgp_at_work", False):
        yield
        return
    llava_next.patch(**model.stgp_options)
    model._stgp_at_work = True
    try:
        yield
    finally:
        model._stgp_at_work = False
        llava_next.unpatch()


def _check_tokens(model: Any) -> None:
    """Pool one frame of zeros, so that options that do not fit the model raise before the first video is decoded."""
    if model.stgp_options is None:
        return
    llava, config = model.model, model.config
    side = llava.get_vision_tower().num_patches_per_side
    frame = torch.zeros(1, side * side, config.hidden_size, device=llava.device, dtype=llava.dtype)
    tokens = llava.get_2dPool(frame).shape[1]
    newline = getattr(config, "mm_newline_position", "one_token")
    pooled = (math.isqrt(tokens),) * 2 if newline == "grid" else (1, tokens)
    frames = int(model.max_frames_num)
    total = video_token_count(frames, pooled, _NEWLINES[newline], kernel_size=1)
    limit = getattr(config, "tokenizer_model_max_length", None)
    if limit is not None and total >= limit:
        raise ValueError(
            f"max_frames_num must leave room for a question: {frames} frames are {total} tokens with these options, "
            f"and LLaVA cuts a prompt at tokenizer_model_max_length, {limit}"
        )
    options = PoolOptions(**model.stgp_options)
    log = importlib.import_module("loguru").logger  # lmms-eval's logger, since it does not show Python's logging
    log.info(f"ST-GridPool: {side} × {side} → {tokens} tokens a frame, {total} for {frames} frames, {options}")
