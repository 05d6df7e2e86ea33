"""Real tokens packaged with the library: encoded frames of Big Buck Bunny. Loading them needs only NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FIXTURE", "load_fixture"]

FIXTURE = Path(__file__).with_name("bigbuckbunny_tokens.npz")
"""File of the packaged tokens."""


def load_fixture() -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Load 16 encoded frames of Big Buck Bunny.

    (c) Blender Foundation | peach.blender.org, CC-BY 3.0: credit it wherever the frames are shown.

    Returns:
        tokens: float16 `(16, 9, 16, 384)`, DINOv2-small after its final LayerNorm.
        frames: uint8 `(16, 63, 112, 3)` RGB, the same frames in a small size of 7 x 7 pixels per token.
        meta: origin of both: `source`, `credit`, `licence`, `model`, `frame_indices`, and more.
    """
    with np.load(FIXTURE, allow_pickle=False) as archive:
        return archive["tokens"], archive["frames"], json.loads(str(archive["meta"]))
