"""Integration into lmms-eval: the models `llava_vid_stgp` and `llava_onevision_stgp`, found by its entry point group.

They are lmms-eval's own `llava_vid` and `llava_onevision`, with ST-GridPool during loading and during every request.
Options are model arguments with the prefix `stgp_`:

    python -m lmms_eval --model llava_vid_stgp --model_args pretrained=…,stgp_temperature=2,stgp_frame_strides=2:4:8 …
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from .base import PoolOptions, require, video_token_count
from .options import read_options

_PREFIX = "stgp_"
_MODELS = "lmms_eval.models.simple"
_CLASSES = {
    "LlavaVidStgp": ("llava_vid", "LlavaVid"),
    "LlavaOnevisionStgp": ("llava_onevision", "Llava_OneVision"),
}
_REQUESTS = ("loglikelihood", "generate_until", "generate_until_multi_round", "generate_until_agentic")
_NEWLINES = {"no_token": "none", "one_token": "one_token", "grid": "grid", "frame": "frame"}
"""The `newline` of `video_token_count` for each mm_newline_position of LLaVA-NeXT."""


def manifests() -> list[Any]:
    """Entry point of the group `lmms_eval.models`: return one ModelManifest per model."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return [
        registry.ModelManifest(f"{module}_stgp", simple_class_path=f"{__name__}.{name}")
        for name, (module, _) in _CLASSES.items()
    ]


def tested(name: str) -> dict[str, Any]:
    """Return the arguments of `require` for a model class. The other's module would import what only that one needs."""
    module, base = _CLASSES[name]
    methods = ("loglikelihood", "generate_until", "generate_until_multi_round")
    return {
        "package": "lmms_eval",
        "at_least": "0.7.3",
        "below": "0.7.4",
        "signatures": {f"{_MODELS}.{module}:{base}.{method}": "self, requests" for method in methods},
    }


def split_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Split model arguments into the options of `grid_pool` and the others.

    The name of an option is `stgp_` followed by an argument of `grid_pool`, except `frame_counts` and `out`;
    `read_options` reads its value. `stgp=False` selects the model's own pooling, with None for the options.

    Raises ValueError or TypeError naming the argument, its value and what is allowed.
    """
    given = {name: value for name, value in arguments.items() if name.startswith(_PREFIX)}
    others = {name: value for name, value in arguments.items() if name not in given}
    wanted = others.pop("stgp", True)
    if not isinstance(wanted, bool):
        raise TypeError(f"stgp must be True or False, got {wanted!r}")
    if not wanted:
        if given:
            raise ValueError(f"stgp must not be False where {', '.join(given)} is given")
        return None, others
    options = read_options(given, _PREFIX)
    try:
        PoolOptions(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"model arguments {', '.join(given)}: {error}") from None
    return options, others


def __getattr__(name: str) -> Any:
    """Return a model class. Classes are made on demand, since their bases import all of LLaVA."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _pooled_class(name)


@functools.cache
def _pooled_class(name: str) -> type:
    require(**tested(name))
    module, base_name = _CLASSES[name]
    base: Any = getattr(importlib.import_module(f"{_MODELS}.{module}"), base_name)

    def __init__(self: Any, *positional: Any, **arguments: Any) -> None:
        self.stgp_options, others = split_arguments(arguments)
        with _pooling(self):
            base.__init__(self, *positional, **others)
            _check_tokens(self)

    def request(method: Any) -> Any:
        @functools.wraps(method)
        def pooled(self: Any, *positional: Any, **arguments: Any) -> Any:
            with _pooling(self):
                return method(self, *positional, **arguments)

        return pooled

    members: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"lmms-eval's {base_name} with ST-GridPool; see `split_arguments` for its options.",
        "__init__": __init__,
    }
    for kind in _REQUESTS:
        if hasattr(base, kind):
            members[kind] = request(getattr(base, kind))
    return type(name, (base,), members)


@contextlib.contextmanager
def _pooling(model: Any) -> Iterator[None]:
    """Patch LLaVA's class for the length of the block only, unless `model` is at work already.

    Other models in the process, such as the baseline of a comparison, thus keep their own pooling.
    """
    if model.stgp_options is None or getattr(model, "_stgp_at_work", False):
        yield
        return
    llava_next = importlib.import_module("stgridpool_kernels.integrations.llava_next")
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
