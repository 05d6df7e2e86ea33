"""Real tokens packaged with the library: encoded frames of Big Buck Bunny. Loading them needs only NumPy."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from typing import Any

import numpy as np

__all__ = ["FIXTURE", "load_fixture"]

FIXTURE = files(__name__) / "bigbuckbunny_tokens.npz"
"""File of the packaged tokens, which may be in a zip."""


def load_fixture() -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Load 16 encoded frames of Big Buck Bunny.

    (c) Blender Foundation | peach.blender.org, CC-BY 3.0: credit it wherever the frames are shown.

    Returns:
        tokens: float16 `(16, 9, 16, 384)`, DINOv2-small after its final LayerNorm.
        frames: uint8 `(16, 63, 112, 3)` RGB, the same frames in a small size of 7 x 7 pixels per token.
        meta: origin of both: `source`, `credit`, `licence`, `model`, `frame_indices`, and more.
    """
    with as_file(FIXTURE) as path, np.load(path, allow_pickle=False) as archive:
        return archive["tokens"], archive["frames"], json.loads(str(archive["meta"]))
