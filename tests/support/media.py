"""Small videos and pictures that tests write with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

HEIGHT, WIDTH = 48, 64


def pictures(count: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> list[np.ndarray]:
    """Return `count` pictures uint8 `(H, W, 3)` of four quadrants, three of them coloured, with a square that moves."""
    height, width = size
    background = np.full((height, width, 3), 40, np.uint8)
    background[: height // 2, : width // 2] = 220, 30, 30
    background[height // 2 :, width // 2 :] = 30, 30, 220
    background[: height // 2, width // 2 :] = 30, 200, 30
    found = []
    for number in range(count):
        picture = background.copy()
        left = 5 * number % (width - 8)
        picture[4:12, left : left + 8] = 255
        found.append(picture)
    return found


def write_video(
    path: Path,
    codec: str = "mpeg4",
    *,
    format: str | None = None,
    pixels: str = "yuv420p",
    frames: Sequence[np.ndarray] | int = 5,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    sound: bool = False,
) -> Path:
    """Write a video of 25 frames a second and return its path.

    format: name of FFmpeg's muxer, by default that of the suffix. frames: pictures, or how many of `pictures`. options,
    muxer: options of the encoder and of the muxer. tags: of the file and of its video stream. sound: add silence.
    """
    import av

    shown = pictures(frames) if isinstance(frames, int) else frames
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1", **(options or {})})
        stream.height, stream.width, _ = shown[0].shape
        stream.pix_fmt = pixels
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        container.metadata.update(tags or {})
        stream.metadata.update(tags or {})
        for number, picture in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            container.mux(stream.encode(frame))
            if audio is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), format="s16", layout="mono")
                silence.sample_rate, silence.pts = 8000, 320 * number
                container.mux(audio.encode(silence))
        container.mux(stream.encode())
    return path
