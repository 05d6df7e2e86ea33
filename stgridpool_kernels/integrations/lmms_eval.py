"""This integration gives lmms-eval models with ST-GridPool, which lmms-eval finds by an entry point.

The name of each is that of lmms-eval's own model with `_stgp` at the end, and it has the variants of that model, simple
or chat. Options are model arguments with the prefix `stgp_`:

    python -m lmms_eval --model qwen3_vl_stgp --model_args pretrained=…,stgp_temperature=2,stgp_frame_strides=1:2:4 …
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import internvl, lmms_eval_llava, lmms_eval_transformers, qwen_vl
from .base import require


@dataclass(frozen=True)
class _Model:
    """This is a model of lmms-eval that is adapted.

    class_name: name of its class, which both variants have. variants: "simple" asks it by text and media, "chat" by
    messages. members: function that returns what a subclass of its class overrides, by name.
    """

    class_name: str
    variants: tuple[str, ...]
    members: Callable[[Any], dict[str, Any]]


_QWEN = functools.partial(lmms_eval_transformers.members, family=qwen_vl.FAMILY)
_INTERNVL = functools.partial(lmms_eval_transformers.members_that_raise, family=internvl.FAMILY)

MODELS = {
    "llava_vid": _Model("LlavaVid", ("simple",), lmms_eval_llava.members),
    "llava_onevision": _Model("Llava_OneVision", ("simple",), lmms_eval_llava.members),
    "qwen2_5_vl": _Model("Qwen2_5_VL", ("simple", "chat"), _QWEN),
    "qwen3_vl": _Model("Qwen3_VL", ("simple", "chat"), _QWEN),
    "qwen3_5": _Model("Qwen3_5", ("simple", "chat"), _QWEN),
    "internvl_hf": _Model("InternVLHf", ("chat",), _INTERNVL),
}
"""These are the models, by lmms-eval's name for each, which is also the name of its module."""

CLASSES = {
    f"{model.class_name}{'Chat' if variant == 'chat' else ''}Stgp": (name, variant)
    for name, model in MODELS.items()
    for variant in model.variants
}
"""These are the classes of this module, each with the name and the variant of the model that it is made of."""


def manifests() -> list[Any]:
    """Return one ModelManifest per model. lmms-eval finds this function in the entry point group `lmms_eval.models`."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    paths: dict[str, dict[str, str]] = {}
    for class_name, (name, variant) in CLASSES.items():
        paths.setdefault(name, {})[f"{variant}_class_path"] = f"{__name__}.{class_name}"
    return [registry.ModelManifest(f"{name}_stgp", **given) for name, given in paths.items()]


def tested(class_name: str) -> dict[str, Any]:
    """Return the arguments of `require` for one of `CLASSES`.

    They name the module of that class alone, since modules of other models may import packages that are not installed.
    """
    name, variant = CLASSES[class_name]
    base = f"lmms_eval.models.{variant}.{name}:{MODELS[name].class_name}"
    methods = ("loglikelihood", "generate_until", "generate_until_multi_round")
    return {
        "package": "lmms_eval",
        "at_least": "0.7.3",
        "below": "0.7.4",
        "signatures": {f"{base}.{method}": "self, requests" for method in methods},
    }


def __getattr__(name: str) -> Any:
    """Return a model class. Classes are made on demand, since their bases import the engines of the models."""
    if name not in CLASSES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _pooled_class(name)


@functools.cache
def _pooled_class(class_name: str) -> type:
    require(**tested(class_name))
    name, variant = CLASSES[class_name]
    base: Any = getattr(importlib.import_module(f"lmms_eval.models.{variant}.{name}"), MODELS[name].class_name)
    about = {
        "__module__": __name__,
        "__qualname__": class_name,
        "__doc__": f"This is lmms-eval's {variant} model {name} with ST-GridPool; see docs/integrations/lmms_eval.md.",
    }
    return type(class_name, (base,), about | MODELS[name].members(base))
