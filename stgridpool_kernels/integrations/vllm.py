"""Plugin for vLLM: LLaVA-OneVision and LLaVA-NeXT-Video with ST-GridPool in place of their pooling of video tokens.

Installing the package is enough: vLLM calls `register`, which adds two architectures and replaces none. The arguments
of an engine select one of them, and its options:

    LLM(model, hf_overrides={
        "architectures": ["StgpLlavaOnevisionForConditionalGeneration"],
        "stgp_options": {"temperature": 2.0},  # optional
    })

Options are the keyword arguments of `grid_pool` except `frame_counts` and `out`; `ceil_mode` is True by default.
Without `stgp_options`, an engine takes them from the environment variable STGP_VLLM_OPTIONS: a JSON object, or text
like `temperature=2,frame_strides=2:4:8`. They are fixed for the lifetime of the engine, because the keys of vLLM's
caches of prompts and videos do not contain them.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from .base import PoolOptions, ceil_options, require
from .options import read_options

ARCHITECTURES = (
    "StgpLlavaOnevisionForConditionalGeneration",
    "StgpLlavaNextVideoForConditionalGeneration",
)
"""Architectures that `hf_overrides` can select. Their classes are attributes of this module, imported on first use."""

OPTIONS_VARIABLE = "STGP_VLLM_OPTIONS"
"""Environment variable that holds the options of engines without `stgp_options`."""

_MODELS = "vllm.model_executor.models"

TESTED: dict[str, Any] = {
    "package": "vllm",
    "at_least": "0.32",
    "below": "0.33",
    "signatures": {
        f"{_MODELS}.{module}:{name}{function}": names
        for module, name in (("llava_onevision", "LlavaOnevision"), ("llava_next_video", "LlavaNextVideo"))
        for function, names in (
            ("ForConditionalGeneration.__init__", "self, vllm_config, prefix"),
            ("ForConditionalGeneration._process_video_pixels", "self, inputs"),
            ("ProcessingInfo.get_num_video_tokens", "self, image_width, image_height, num_frames"),
        )
    }
    | {
        f"{_MODELS}.llava_onevision:LlavaOnevisionForConditionalGeneration._image_pixels_to_features": (
            "self, vision_tower, pixel_values, ..."
        )
    },
}
"""Arguments of `require` for this integration."""

logger = logging.getLogger("vllm.stgridpool_kernels")  # vLLM shows only loggers below its own


def register() -> None:
    """Add the names of the architectures to vLLM's registry. vLLM calls this in each of its processes.

    No model is imported. It never raises, since that would stop engines that use other models.
    """
    try:
        registry: Any = importlib.import_module("vllm").ModelRegistry
        for name in ARCHITECTURES:
            registry.register_model(name, f"{__name__}:{name}")
    except ImportError:
        logger.debug("vllm cannot be imported, nothing is registered", exc_info=True)
    except Exception:
        logger.warning("the architectures of ST-GridPool could not be registered", exc_info=True)


def pool_options(config: Any) -> PoolOptions:
    """Return an engine's options: `stgp_options` of the model's configuration, else STGP_VLLM_OPTIONS, else defaults.

    config: the model's configuration in vLLM, with `hf_overrides` applied.

    Raises ValueError, naming the source of the options, if they are invalid.
    """
    given, source = getattr(config, "stgp_options", None), "stgp_options"
    if given is None:
        given, source = os.environ.get(OPTIONS_VARIABLE, ""), OPTIONS_VARIABLE
    if not isinstance(given, dict | str):
        raise ValueError(f"{source} must be options by name, got {given!r}")
    try:
        return ceil_options(**read_options(given))
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for types it cannot convert
        raise ValueError(f"{source}: {error}") from error


def __getattr__(name: str) -> Any:
    """Return the class of one of `ARCHITECTURES`. Raises RuntimeError if vLLM has a version that `require` refuses."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require(**TESTED)
    return getattr(importlib.import_module(f"{__package__}.vllm_llava"), name)
