"""Frames of videos and pictures, which `formats.opened` opens.

A video is decoded from start to end, and only the requested frames are kept, upright and at their final size. Of a file
that is cut short, the frames that are there are used, with a `VideoWarning`. A damaged packet is an error, unless the
decoder conceals the damage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from .decoding import Clip, Packets, VideoWarning
from .formats import VideoError, import_av, opened
from .orientation import orientation

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
    """Return the number of frames that a video file's packets announce, without decoding. Raises as `read_frames`.

    It is the number of frames that are decoded, except in formats where some packets are not shown (VP8 in WebM) or
    cannot be decoded because the clip begins between two keyframes. A chunk of AVI that is empty, which repeats the
    frame before it, is no frame.
    """
    with opened(os.fspath(path)) as (container, stream, source):
        packets = Packets(container, stream, source)
        return sum(packet is not None and not packet.is_discard for packet in packets)


def read_frames(
    path: str | os.PathLike[str],
    num_frames: int,
    *,
    size: tuple[int, int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """Read frames of a clip, evenly spread: those that `sample_indices` selects of all its frames.

    Args:
        path: a local file, in a format that holds its pictures itself (docs/streaming.md lists them). Its best video
            stream is read; the orientation recorded in the file is applied, mirrored ones included. Neither its name
            nor its tags matter.
        num_frames: maximum number of frames to return.
        size: `(height, width)` in pixels of the returned frames. They are resized by swscale's bilinear filter, which
            averages when it shrinks; the aspect ratio is not kept. None keeps the clip's own size.
        progress: called as `progress(done, total)` after each sampled frame.

    Returns:
        uint8 `(T, H, W, 3)` RGB with `T = min(num_frames, frames in the clip)`.

    Warns:
        VideoWarning: the file is cut short. In formats made for streaming (Matroska, MPEG-TS, raw H.264), such a file
            announces only the frames it has, so nothing is missing.

    Raises:
        VideoError: the file cannot be opened, is in another format, has no video stream or one that FFmpeg has no
            decoder for, or none of its frames can be decoded; or a packet before the last one is damaged, whose frame
            the message names, and the decoder does not conceal that.
        ValueError: `num_frames` or `size` is not positive.
        ImportError: PyAV is not installed.
    """
    sample_indices(0, num_frames)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width), both positive, got {size}")
    name, total = os.fspath(path), count_frames(path)
    frames, clip = _read_samples(name, sample_indices(total, num_frames), size, progress)
    if clip.found != total:
        frames, clip = _read_samples(name, sample_indices(clip.found, num_frames), size, progress)
    clip.warn_if_cut_short(stacklevel=3)
    return frames


def iter_frames(source: BinaryIO, name: str, *, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield every frame of a clip as uint8 `(H, W, 3)` RGB of `size` = `(H, W)`. Raises and warns as `read_frames`.

    source: bytes that may be endless, and not seekable if the container format allows it (Matroska, MPEG-TS, fragmented
        MP4). name: its name in error messages.
    """
    with opened(name, source) as (container, stream, unnamed):
        clip, convert = Clip(container, stream, unnamed, name), _Converter(name, size)
        for frame in clip:
            yield convert(frame)
        clip.warn_if_cut_short(stacklevel=3)


def _read_samples(
    name: str, indices: list[int], size: tuple[int, int] | None, progress: Callable[[int, int], object] | None
) -> tuple[np.ndarray, Clip]:
    """Decode a file and return its frames at `indices`, which are sorted, and what was found out about the clip."""
    frames, done = np.empty((0, *(size or (0, 0)), 3), np.uint8), 0
    with opened(name) as (container, stream, source):
        clip, convert = Clip(container, stream, source, name), _Converter(name, size)
        for number, frame in enumerate(clip):
            if done < len(indices) and number == indices[done]:
                picture = convert(frame)
                if not done:
                    frames = np.empty((len(indices), *picture.shape), np.uint8)
                    convert.size = picture.shape[:2]  # a stream may change its size midway; the first frame decides
                frames[done] = picture
                done += 1
                if progress is not None:
                    progress(done, len(indices))
    return frames[:done], clip


class _Converter:
    """Conversion of decoded frames of a clip to uint8 `(H, W, 3)` RGB, upright.

    size: `(height, width)` of the pictures; None is the size of each frame. name: name of the clip in errors.
    """

    def __init__(self, name: str, size: tuple[int, int] | None) -> None:
        self._name, self.size = name, size
        self._reformat = import_av().video.reformatter.VideoReformatter().reformat
        self._rotation: int | None = None

    def __call__(self, frame: Any) -> np.ndarray:
        # PyAV keeps a frame whose display matrix was read until garbage is collected, so it is read again only if the
        # rotation changes.
        if frame.rotation != self._rotation:
            self._rotation = frame.rotation
            self._swapped, self._turn = orientation(frame)
        height, width = self.size or (None, None)
        if self._swapped:
            height, width = width, height
        try:
            picture: np.ndarray = self._reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
        except (import_av().FFmpegError, ValueError) as error:
            kind = frame.format.name
            raise VideoError(f"{self._name}: pixels of the format {kind} cannot be converted to RGB") from error
        return self._turn(picture)
