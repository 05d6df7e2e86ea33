"""Integration into the GLM-V models of transformers: GLM-4.1V, GLM-4.5V (MoE) and GLM-4.6V.

The functions are those of `qwen_vl`, and so is the adapter. T counts pairs of frames. Norms are those of the tokens
that the encoder's merger hands to the language model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .video_grid import GridArchitecture, GridFamily

_GLM4V = ("glm4v", "Glm4vProcessor")

FAMILY = GridFamily(
    GridArchitecture("glm4v", "Glm4v", _GLM4V),
    GridArchitecture("glm4v_moe", "Glm4vMoe", _GLM4V),
    GridArchitecture("glm46v", "Glm46V", ("glm46v", "Glm46VProcessor")),
)
"""The models that this module patches."""


def patch(model: nn.Module, processor: Any = None, *, mode: str = "pool", **options: Any) -> None:
    """Shrink, or grid, the tokens of every video of a loaded GLM-V model, in place.

    Arguments and errors are those of `qwen_vl.patch`.
    """
    FAMILY.patch(model, processor, mode, options)


def unpatch(model: nn.Module, processor: Any = None) -> None:
    """Restore a GLM-V model, and a processor if one is given. Errors are those of `qwen_vl.unpatch`."""
    FAMILY.unpatch(model, processor)


def register(*, mode: str = "pool", **options: Any) -> None:
    """Make transformers load GLM-V models, and in mode "pool" their processors, as if patched by `patch`.

    Arguments and errors are those of `qwen_vl.register`.
    """
    FAMILY.register(mode, options)


def unregister() -> None:
    """End `register`: what is loaded later is not patched. Raises RuntimeError if it is not in force."""
    FAMILY.unregister()
