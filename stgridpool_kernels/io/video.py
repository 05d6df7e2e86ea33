"""Reading of video frames with PyAV, which ships its own FFmpeg and is imported on first use.

A video is decoded once, from start to end, and only the requested frames are kept, at their final size. Frames that
cannot be decoded are left out, with a `VideoWarning`.
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

VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".360", ".amv", ".apng", ".asf", ".av1", ".avi", ".divx", ".dv", ".dvr-ms", ".evo", ".f4v", ".flv",
    ".gif", ".gxf", ".h261", ".h263", ".h264", ".264", ".h265", ".265", ".h266", ".266", ".hevc", ".insv", ".ismv",
    ".ivf", ".lrv", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mod",
    ".mov", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nsv", ".nut", ".obu", ".ogm", ".ogv",
    ".qt", ".rm", ".rmvb", ".tod", ".trp", ".ts", ".vob", ".vro", ".vvc", ".webm", ".wmv", ".wtv", ".xvid", ".y4m",
)  # fmt: skip
"""Suffixes by which videos are found in a folder, in lower case; upper case is found too.

Animations are among them. Still pictures are not, which often are thumbnails. Other files can be videos too.
"""


class VideoError(ValueError):
    """Error about a file or stream without a frame that can be decoded. The message gives its name and the cause."""


class VideoWarning(UserWarning):
    """Warning that fewer frames of a video can be decoded than its packets or header announce; these are used."""


def sample_indices(total: int, num_frames: int) -> list[int]:
    """Return the indices, in order and from 0, of the frames that are read of a clip of `total` frames.

    Sample `k` is frame `floor(k * (total - 1) / (num_frames - 1))`, from the first to the last; a single sample is
    frame 0. A clip of at most `num_frames` frames is read whole. Raises ValueError if `num_frames` is below 1 or
    `total` is negative.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if total < 0:
        raise ValueError(f"total must not be negative, got {total}")
    if total <= num_frames:
        return list(range(total))
    return [k * (total - 1) // max(1, num_frames - 1) for k in range(num_frames)]


def count_frames(path: str | os.PathLike[str]) -> int:
    """Return the number of frames that a video file's packets announce, without decoding. Raises as `read_frames`."""
    with _opened(os.fspath(path)) as (container, stream):
        return sum(packet is not None and _shows_frame(packet) for packet in _packets(container, stream))


def read_frames(
    path: str | os.PathLike[str],
    num_frames: int,
    *,
    size: tuple[int, int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """Read the frames of a clip that `sample_indices` selects with `total` = `count_frames`, which are evenly spread.

    Args:
        path: a local file. Its best video stream is read; a rotation recorded in the stream is applied.
        num_frames: maximum number of frames to return.
        size: `(height, width)` in pixels of the returned frames. They are resized by swscale's bilinear filter, which
            averages when it shrinks; the aspect ratio is not kept. None keeps the clip's own size.
        progress: called as `progress(done, total)` after each sampled frame.

    Returns:
        uint8 `(T, H, W, 3)` RGB with `T = min(num_frames, frames in the clip)`, or fewer if some cannot be decoded.

    Warns:
        VideoWarning: fewer frames can be decoded than the file announces. In formats made for streaming (Matroska,
            MPEG-TS, raw H.264), a file that is cut short announces only the frames it has, so nothing is missing.

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
    """Yield every frame of a clip as uint8 `(H, W, 3)` RGB of `size` = `(H, W)`. Raises and warns as `read_frames`.

    source: bytes that may be endless, and not seekable if the container format allows it (Matroska, MPEG-TS, fragmented
        MP4). name: its name in error messages.
    """
    with _opened(name, source) as (container, stream):
        for frame in _frames(container, stream, name):
            yield _to_rgb(frame, size)


def _frames(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Yield every frame of the stream that can be decoded; warn at the end if fewer were decoded than announced."""
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
    """Yield the stream's packets in the order of the container, None for one that is corrupt or cannot be read."""
    try:
        for packet in container.demux(stream):
            yield None if packet.is_corrupt else packet
    except _import_av().FFmpegError:
        yield None


def _shows_frame(packet: Any) -> bool:
    """Return whether a packet announces a frame. The one that ends a stream is empty; edit lists discard packets."""
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
    """Yield container and best video stream of the file `name`, or of `source`; FFmpeg's errors become VideoError."""
    av = _import_av()
    try:
        # "file:" keeps a colon in the name from being read as a protocol.
        with av.open(source or f"file:{name}") as container:
            stream = container.streams.best("video")
            # FFmpeg would render a text file as a video of its characters.
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
