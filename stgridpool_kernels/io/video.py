"""Frames of a video by PyAV, which carries its own FFmpeg and is imported on first use.

A video is decoded once, front to back, and only the frames asked for are kept, at their final size. Frames that cannot
be decoded are left out, with a `VideoWarning`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

__all__ = [
    "VIDEO_SUFFIXES",
    "VideoError",
    "VideoWarning",
    "count_frames",
    "iter_frames",
    "read_frames",
    "sample_indices",
]

VIDEO_SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
"""Suffixes by which videos are found in a folder. A file that is named otherwise can be a video too."""


class VideoError(ValueError):
    """A file or stream of which no frame can be decoded. The message gives its name and the cause."""


class VideoWarning(UserWarning):
    """A video of which fewer frames can be decoded than its packets or its header announce. The others are used."""


def sample_indices(total: int, num_frames: int) -> list[int]:
    """Return which frames of a clip of `total` frames are read, in order, counting from 0.

    Sample `k` is `floor(k * (total - 1) / (num_frames - 1))`, from the first frame to the last; one sample is frame 0.
    A clip with no more than `num_frames` frames is taken whole. Raises ValueError if `num_frames` is below 1 or `total`
    is negative.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if total < 0:
        raise ValueError(f"total must not be negative, got {total}")
    if total <= num_frames:
        return list(range(total))
    return [k * (total - 1) // max(1, num_frames - 1) for k in range(num_frames)]


def count_frames(path: str | os.PathLike[str]) -> int:
    """Return how many frames the packets of a video file announce. Nothing is decoded. Errors as in `read_frames`."""
    with _opened(os.fspath(path)) as (container, stream):
        return sum(packet is not None and _shows_frame(packet) for packet in _packets(container, stream))


def read_frames(
    path: str | os.PathLike[str],
    num_frames: int,
    *,
    size: tuple[int, int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """Read frames spread evenly over a clip: those of `sample_indices`, where `total` is `count_frames`.

    Args:
        path: a local file. Its best video stream is read; a rotation recorded in the stream is applied.
        num_frames: the most frames to return.
        size: `(height, width)` in pixels of the frames returned. swscale's bilinear filter does the resizing,
            which averages when it shrinks; the aspect ratio is not kept. None keeps the clip's own size.
        progress: called as `progress(done, total)` after each frame sampled.

    Returns:
        uint8 `(T, H, W, 3)` RGB with `T = min(num_frames, frames in the clip)`, less if not all can be decoded.

    Warns:
        VideoWarning: fewer frames can be decoded than the file announces. In formats made for streaming (Matroska,
            MPEG-TS, raw H.264), a file cut short announces no more than it has and is just a shorter clip.

    Raises:
        VideoError: FFmpeg cannot open the file, it has no video stream, or none of its frames can be decoded.
        ValueError: `num_frames` or `size` is not positive.
        ImportError: PyAV is not installed.
    """
    sample_indices(0, num_frames)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width), both positive, got {size}")
    name, indices = os.fspath(path), sample_indices(count_frames(path), num_frames)
    frames, done = np.empty((0, *(size or (0, 0)), 3), np.uint8), 0
    with _opened(name) as (container, stream):
        for number, frame in enumerate(_frames(container, stream, name)):
            if done < len(indices) and number == indices[done]:
                picture = _to_rgb(frame, size)
                if not done:
                    frames = np.empty((len(indices), *picture.shape), np.uint8)
                    size = picture.shape[:2]  # a stream may change its size midway; the first frame decides
                frames[done] = picture
                done += 1
                if progress is not None:
                    progress(done, len(indices))
    return frames[:done]


def iter_frames(source: BinaryIO, name: str, *, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Every frame of a clip, one after the other, as uint8 `(H, W, 3)` RGB of `size`; the rest as in `read_frames`.

    source: bytes that need not end, nor be seekable if their container is made for that (Matroska, MPEG-TS, fragmented
        MP4). `name` is what errors call them.
    """
    with _opened(name, source) as (container, stream):
        for frame in _frames(container, stream, name):
            yield _to_rgb(frame, size)


def _frames(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Every frame of the stream that can be decoded. Behind the last one, the others are counted."""
    found = announced = discarded = 0
    for packet in _packets(container, stream):
        announced += packet is None or _shows_frame(packet)
        if packet is None:
            continue
        discarded += packet.is_discard
        try:
            frames = packet.decode()
        except _import_av().FFmpegError:
            continue
        found += len(frames)
        yield from frames
    if not found:
        raise VideoError(f"{name}: no frame of its video stream can be decoded")
    announced = max(announced, stream.frames - discarded)  # the header's number, 0 if it has none
    if found < announced:
        message = f"{name}: damaged or cut short: {found} of {announced} frames can be decoded, the others are left out"
        warnings.warn(message, VideoWarning, stacklevel=2)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The stream's packets as the container has them, with None for one that cannot be read, or not whole."""
    try:
        for packet in container.demux(stream):
            yield None if packet.is_corrupt else packet
    except _import_av().FFmpegError:
        yield None


def _shows_frame(packet: Any) -> bool:
    """Whether a packet announces a frame. The one that ends a stream is empty; an edit list discards others."""
    return packet.size > 0 and not packet.is_discard


def _to_rgb(frame: Any, size: tuple[int, int] | None) -> np.ndarray:
    """Return a decoded frame as uint8 `(H, W, 3)`, upright and at `size`."""
    quarters = round(frame.rotation / 90) % 4
    height, width = size or (None, None)
    if quarters % 2:
        height, width = width, height
    rgb = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return np.rot90(rgb, quarters)


@contextmanager
def _opened(name: str, source: BinaryIO | None = None) -> Iterator[tuple[Any, Any]]:
    """Open the file `name`, or a stream, as its container and best video stream; FFmpeg's errors become VideoError."""
    av = _import_av()
    try:
        # "file:" keeps a colon in the name from being read as a protocol.
        with av.open(source or f"file:{name}") as container:
            stream = container.streams.best("video")
            # FFmpeg draws a text file as an animation of its characters; nobody means that by a video.
            if stream is None or container.format.name == "tty":
                raise VideoError(f"{name}: the file holds no video stream")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"{name}: not a video FFmpeg can read, or cut short: {error.strerror}") from error


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading video needs PyAV: pip install "stgridpool_kernels[demo]"', name="av") from error
    return av
