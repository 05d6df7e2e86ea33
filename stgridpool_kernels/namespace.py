"""The namespace of the ops in torch, which registers every op of a namespace once in a process.

A copy of the package that is loaded beside it has a namespace of its own: `python -m tools.hf_kernel` writes it here.
"""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "stgp"
"""Name of the namespace, which is an attribute of `torch.ops`."""

OPS: Any = getattr(torch.ops, NAMESPACE)
"""The namespace as an object, whose attributes are the ops."""
