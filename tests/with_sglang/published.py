"""Classes of SGLang are made as an installed release has them, without what they import, which is mostly for a GPU.

`publish()` makes modules of their sources under SGLang's own names. What is missing in them is annotations, and parts
of the engine that these tests do not reach.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
import sys
from array import array
from enum import Enum
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


def source(path: str) -> Path:
    return Path(str(distribution("sglang").locate_file(f"sglang/srt/{path}")))


def definitions(path: str, names: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return functions, classes and constants of a file, run as they stand, in the file's order."""
    tree = ast.parse(source(path).read_text())
    kept = [node for node in tree.body if getattr(node, "name", None) in names or assigned(node) in names]
    assert len(kept) == len(names), f"{path} must define {names}"
    scope = {"__name__": f"sglang.srt.{path[:-3].replace('/', '.')}", **given}
    body = [ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *kept]
    module = ast.fix_missing_locations(ast.Module(body, []))
    exec(compile(module, str(source(path)), "exec"), scope)
    return scope


def assigned(node: ast.stmt) -> str | None:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else None


def load(path: str, name: str) -> ModuleType:
    """Import a file as it stands, which must import nothing of SGLang."""
    spec = spec_from_file_location(name, source(path))
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def publish(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module sglang.srt.models.llava with the classes that are tested, beside the hook registry."""
    msgspec = pytest.importorskip("msgspec")
    for name in ("sglang", "sglang.srt", "sglang.srt.models", "sglang.srt.plugins", "sglang.srt.multimodal"):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("sglang.srt.models.llava", "sglang.srt.plugins.hook_registry", "sglang.srt.multimodal.modality"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that they go when the test ends
    modality = load("multimodal/modality.py", "sglang.srt.multimodal.modality")
    registry = load("plugins/hook_registry.py", "sglang.srt.plugins.hook_registry")
    sys.modules["sglang.srt.plugins"].hook_registry = registry
    assert issubclass(modality.Modality, Enum)

    typing = {name: getattr(__import__("typing"), name) for name in ("Any", "Dict", "List", "Optional", "Tuple")}
    shared = {"torch": torch, "nn": torch.nn, "np": np, "math": math, "re": re, "array": array}
    helpers = definitions("utils/common.py", ["flatten_nested_list"], {})
    images = ["select_best_resolution", "get_anyres_image_grid_shape", "unpad_image", "unpad_image_shape"]
    grids = definitions("multimodal/mm_utils.py", images, {**shared, "ast": ast})
    masks = ["MM_PAD_SHIFT_VALUE", "_MM_HASH_MASK", "_MM_IDENTITY_BYTES", "_MM_WIDE_PAD_TAG", "_MM_WIDE_PAD_MASK"]
    given = {
        **typing,
        "msgspec": msgspec,
        "hashlib": hashlib,
        "MultimodalDataValue": object,
        "Modality": modality.Modality,
        "MultimodalInputFormat": modality.MultimodalInputFormat,
        "flatten_nested_list": helpers["flatten_nested_list"],
    }
    item = definitions("managers/schedule_batch.py", [*masks, "_compute_pad_values", "MultimodalDataItem"], given)
    scope = {**shared, **grids, "Modality": modality.Modality, "flatten_nested_list": helpers["flatten_nested_list"]}
    model = definitions("models/llava.py", ["LlavaBaseForCausalLM"], scope)
    llava = sys.modules["sglang.srt.models.llava"]
    vars(llava).update(model, MultimodalDataItem=item["MultimodalDataItem"])
    sys.modules["sglang.srt.models"].llava = llava
    for name in ("srt", "srt.models", "srt.plugins"):
        parent, _, child = f"sglang.{name}".rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[f"sglang.{name}"])
    return llava
