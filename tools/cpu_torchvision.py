"""Let torchvision be imported where it is a build for CUDA and torch one for the CPU.

Its library does not load then, and operators are missing that its Python part describes. This declares them; whoever
calls one still gets an error. A line in a .pth file imports it in every process of an environment, vLLM's own included.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
declared: list = []  # kept: what a library declares goes with it


class Declare(importlib.abc.MetaPathFinder):
    """This finder finds nothing, and declares operators just before torchvision describes them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision._meta_registrations":
            return
        sys.meta_path.remove(self)
        torch = importlib.import_module("torch")
        importlib.import_module("torchvision.extension")  # loads the library where it can
        declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
                declared[0].define(schema)


sys.meta_path.insert(0, Declare())
