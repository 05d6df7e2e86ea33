"""vLLM: LLaVA-OneVision and LLaVA-NeXT-Video with ST-GridPool in place of the pooling of video tokens, as a plugin.

Installing the package is enough: vLLM calls `register`, which adds two architectures and replaces none. An engine is
told by its arguments to take one of them, and how it pools:

    LLM(model, hf_overrides={
        "architectures": ["StgpLlavaOnevisionForConditionalGeneration"],
        "stgp_options": {"temperature": 2.0},  # may be left out
    })

Options are the keyword arguments of `grid_pool` except `frame_counts` and `out`; `ceil_mode` is True unless given.
Where the engine has no `stgp_options`, the environment variable STGP_VLLM_OPTIONS holds them: a JSON object, or text
like `temperature=2,frame_strides=2:4:8`. They are fixed for the life of the engine, because vLLM finds cached prompts
and videos without regard to them.
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
"""What `hf_overrides` can select. The classes are attributes of this module, imported when they are first asked for."""

OPTIONS_VARIABLE = "STGP_VLLM_OPTIONS"

logger = logging.getLogger("vllm.stgridpool_kernels")  # below vllm, or the engine would not show it


def register() -> None:
    """Adds the architectures to those that vLLM knows, by name alone; vLLM calls it in each of its processes.

    Nothing of a model is imported. It never raises: that would stop engines that use other models.
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
    """The options of an engine: `stgp_options` of the model's configuration, else STGP_VLLM_OPTIONS, else the defaults.

    config: the model's configuration as vLLM has it, with `hf_overrides` applied.

    Raises ValueError that says where the options come from.
    """
    given, source = getattr(config, "stgp_options", None), "stgp_options"
    if given is None:
        given, source = os.environ.get(OPTIONS_VARIABLE, ""), OPTIONS_VARIABLE
    if not isinstance(given, dict | str):
        raise ValueError(f"{source} must be options by name, got {given!r}")
    try:
        return ceil_options(**read_options(given))
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch, for a type that it cannot convert
        raise ValueError(f"{source}: {error}") from error


def __getattr__(name: str) -> Any:
    """The classes of ARCHITECTURES. Raises RuntimeError where vLLM has an untested version."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("vllm", at_least="0.32", below="0.33")
    return getattr(importlib.import_module(f"{__package__}.vllm_llava"), name)
