"""This plugin for vLLM adds models with ST-GridPool between their vision encoder and their language model.

Installing the package is enough: vLLM calls `register`, which adds an architecture for each of `ARCHITECTURES` and
replaces none. The arguments of an engine select one of them, and its options:

    LLM(model, hf_overrides={
        "architectures": ["StgpQwen3VLForConditionalGeneration"],
        "stgp_options": {"mode": "pool", "temperature": 2.0},  # may be left out
    })

Options are `mode` ("pool", the default, or "grid") and the keyword arguments of `grid_pool` except `frame_counts` and
`out`, in mode "grid" those of `temporal_grid`; `ceil_mode` is True by default. LLaVA models take mode "pool" alone,
since ST-GridPool replaces their own pooling. Without `stgp_options`, an engine takes its options from the environment
variable STGP_VLLM_OPTIONS: a JSON object, or text like `mode=pool,temperature=2,frame_strides=2:4:8`. They are fixed
for the lifetime of the engine.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import require
from .modes import MODES, ModeOptions, mode_options
from .options import read_options

OPTIONS_VARIABLE = "STGP_VLLM_OPTIONS"
"""This environment variable holds the options of engines without `stgp_options`."""

_VERSION = "__vllm_"
"""The version of vLLM follows this in the names under which classes are registered."""

_PROCESSOR = "vllm.multimodal.processing:BaseMultiModalProcessor"
_SHARED = {
    "vllm.multimodal.hasher:MultiModalHasher.hash_kwargs": "algorithm, kwargs",
    f"{_PROCESSOR}._get_mm_hashes": "self, inputs",
    f"{_PROCESSOR}._get_prompt_updates": "self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs",
    f"{_PROCESSOR}.get_dummy_mm_inputs": "self, mm_counts, ...",
    "vllm.multimodal.registry:MultiModalRegistry.register_processor": "self, processor, info, dummy_inputs",
}
"""The plugin replaces or calls these functions for every architecture; the values are names of their parameters."""


@dataclass(frozen=True)
class Family:
    """A family is a set of vLLM's architectures that one module of this package adapts.

    adapter: name of the module. mixins: names of its mixins, by the arguments of `make_class`. methods: parameters of
    the methods of a model that they replace or call. classes: module and name of vLLM's class of each architecture.
    """

    adapter: str
    mixins: Mapping[str, str]
    methods: Mapping[str, str]
    classes: Mapping[str, tuple[str, str]]

    def tested(self, base: str) -> dict[str, Any]:
        """Return the arguments of `require` for an architecture of vLLM."""
        module, name = self.classes[base]
        path = f"vllm.model_executor.models.{module}:{name}"
        methods = {f"{path}.{method}": parameters for method, parameters in self.methods.items()}
        return {"package": "vllm", "at_least": "0.32", "below": "0.34", "signatures": methods | _SHARED}


def _generation(**modules: str) -> dict[str, tuple[str, str]]:
    """Return module and name of the class of each architecture PREFIXForConditionalGeneration, of modules by PREFIX."""
    return {
        f"{prefix}ForConditionalGeneration": (module, f"{prefix}ForConditionalGeneration")
        for prefix, module in modules.items()
    }


FAMILIES = (
    Family(
        "vllm_qwen_vl",
        {"model": "QwenModel", "processor": "QwenProcessor"},
        {
            "__init__": "self, vllm_config, prefix",
            "_process_video_input": "self, video_input",
            "get_mrope_input_positions": "self, input_tokens, mm_features",
            "get_encoder_cudagraph_config": "self",
        },
        _generation(
            Qwen2VL="qwen2_vl",
            Qwen2_5_VL="qwen2_5_vl",
            Qwen3VL="qwen3_vl",
            Qwen3VLMoe="qwen3_vl_moe",
            Qwen3_5="qwen3_5",
            Qwen3_5Moe="qwen3_5",
        ),
    ),
    Family(
        "vllm_internvl",
        {"model": "InternVLModel", "processor": "InternVLProcessor", "info": "InternVLInfo"},
        {
            "__init__": "self, vllm_config, prefix",
            "_process_vision_input": "self, image_input",
            "embed_multimodal": "self, kwargs",
            "extract_feature": "self, pixel_values",
        },
        {
            "InternVLChatModel": ("internvl", "InternVLChatModel"),
            # vLLM serves InternVL in the format of transformers by its class for Intern-S1
            "InternVLForConditionalGeneration": ("interns1", "InternS1ForConditionalGeneration"),
            **_generation(InternS1="interns1"),
        },
    ),
    Family(
        "vllm_llava",
        {"model": "LlavaOnevision", "info": "LlavaInfo"},
        {
            "__init__": "self, vllm_config, prefix",
            "_process_video_pixels": "self, inputs",
            "_image_pixels_to_features": "self, vision_tower, pixel_values, ...",
        },
        _generation(LlavaOnevision="llava_onevision"),
    ),
    Family(
        "vllm_llava",
        {"model": "LlavaNextVideo", "info": "LlavaNextVideoInfo"},
        {
            "__init__": "self, vllm_config, prefix",
            "_process_video_pixels": "self, inputs",
        },
        _generation(LlavaNextVideo="llava_next_video"),
    ),
)

ARCHITECTURES = {f"Stgp{base}": (family, base) for family in FAMILIES for base in family.classes}
"""`hf_overrides` can select these architectures, each with its family and the architecture of vLLM it is made from.

The classes are attributes of this module, made on first use.
"""

logger = logging.getLogger("vllm.stgridpool_kernels")  # the name begins as vLLM's, since it shows no others


def register() -> None:
    """Add the names of the architectures to vLLM's registry, with the settings that vLLM has for their bases.

    vLLM calls this in each of its processes, maybe several times. No model is imported. It never raises, since that
    would stop engines that use other models.
    """
    try:
        engine: Any = importlib.import_module("vllm")
    except ImportError:
        logger.debug("vllm cannot be imported, nothing is registered", exc_info=True)
        return
    try:
        registry = engine.ModelRegistry
        settings: Any = importlib.import_module("vllm.model_executor.models.config").MODELS_CONFIG_MAP
        for name, (_, base) in ARCHITECTURES.items():
            if base in settings:  # vLLM looks settings up by the name of an architecture
                settings[name] = settings[base]
            # vLLM keeps what it found out about a class, for later engines, by this name
            registry.register_model(name, f"{__name__}:{name}{_VERSION}{engine.__version__}")
    except Exception:
        logger.warning("the architectures of ST-GridPool could not be registered", exc_info=True)


def engine_options(config: Any, modes: Sequence[str] = MODES) -> ModeOptions:
    """Return an engine's options: `stgp_options` of the model's configuration, else STGP_VLLM_OPTIONS, else defaults.

    config: the model's configuration in vLLM, with `hf_overrides` applied. modes: the modes that the model has.

    Raises ValueError, naming the source of the options, if they are invalid.
    """
    given, source = getattr(config, "stgp_options", None), "stgp_options"
    if given is None:
        given, source = os.environ.get(OPTIONS_VARIABLE, ""), OPTIONS_VARIABLE
    if not isinstance(given, dict | str):
        raise ValueError(f"{source} must be options by name, got {given!r}")
    try:
        options = read_options(given, words=("mode",))
        chosen = mode_options(options.pop("mode", "pool"), **options)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for types it cannot convert
        raise ValueError(f"{source}: {error}") from error
    if chosen.mode not in modes:
        raise ValueError(
            f"{source}: mode must be 'pool' for a model whose own pooling is replaced, got {chosen.mode!r}"
        )
    return chosen


def __getattr__(name: str) -> Any:
    """Return the class of one of `ARCHITECTURES`. Raises RuntimeError if vLLM has a version that `require` refuses."""
    architecture = name.partition(_VERSION)[0]
    if architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _pooled_class(architecture)


@functools.cache
def _pooled_class(architecture: str) -> Any:
    family, base = ARCHITECTURES[architecture]
    require(**family.tested(base))
    adapter = importlib.import_module(f"{__package__}.{family.adapter}")
    make_class = importlib.import_module(f"{__package__}.vllm_models").make_class
    return make_class(base, **{kind: getattr(adapter, name) for kind, name in family.mixins.items()})
