"""Frames of a video file as an array.

`read_frames` decodes a clip front to back and keeps only the sampled frames, already at their final size.
PyAV carries its own FFmpeg, so nothing has to be installed on the system; it is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import os
    from types import ModuleType

__all__ = ["VideoError", "count_frames", "iter_frames", "read_frames", "sample_indices"]

# FFmpeg draws any .txt file as an animation of its characters; nobody means that by a video.
_TEXT_FORMATS = frozenset({"tty"})


# Containers whose header has the duration of the whole file; of others it may be estimated from its size.
_WHOLE_DURATIONS = frozenset({"matroska,webm"})


class VideoError(ValueError):
    """A file that is missing, empty, cut short, or not a video. The message gives the path and the cause."""


def sample_indices(total: int, num_frames: int) -> list[int]:
    """Return which frames of a clip of `total` frames are read, in order, counting from 0.

    The first and the last frame are always among them and the others lie evenly between: sample `k` is
    `floor(k * (total - 1) / (num_frames - 1))`. One sample is frame 0. A clip with no more than `num_frames`
    frames is taken whole.

    Raises:
        ValueError: `num_frames` is below 1 or `total` is negative.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if total < 0:
        raise ValueError(f"total must not be negative, got {total}")
    if total <= num_frames:
        return list(range(total))
    if num_frames == 1:
        return [0]
    return [k * (total - 1) // (num_frames - 1) for k in range(num_frames)]


def count_frames(path: str | os.PathLike[str]) -> int:
    """Return how many frames the first video stream of `path` decodes to. The whole clip is decoded.

    Raises:
        VideoError: as in `read_frames`.
        ImportError: PyAV is not installed.
    """
    file = _existing(path)
    return _decode(file, [], None, None)[1]


def read_frames(
    path: str | os.PathLike[str],
    num_frames: int,
    *,
    size: tuple[int, int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """Read frames spread evenly over a clip.

    Which frames: see `sample_indices`, with `total` the number of frames the clip decodes to. A container
    that does not say how many frames it holds (Matroska, MPEG-TS, fragmented MP4, raw streams) is decoded
    once more to count them, and so is one whose count turns out wrong.

    Memory: the result and a few decoded frames; the clip is never held at once.

    Args:
        path: a local file. Its best video stream is read; a rotation recorded in the stream is applied.
        num_frames: the most frames to return.
        size: `(height, width)` in pixels of the frames returned. swscale's bilinear filter does the resizing,
            which averages when it shrinks; the aspect ratio is not kept. None keeps the clip's own size.
        progress: called as `progress(done, total)` after each frame sampled; it starts again from 1 in the
            rare case that the container's frame count was wrong.

    Returns:
        uint8 `(T, H, W, 3)` RGB with `T = min(num_frames, frames in the clip)`.

    Raises:
        VideoError: the file is missing, empty, cut short, or no video. In a format made for streaming
            (MPEG-TS, raw H.264), a file cut short is just a shorter clip.
        ValueError: `num_frames` or `size` is not positive.
        ImportError: PyAV is not installed.
    """
    sample_indices(0, num_frames)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width), both positive, got {size}")
    file = _existing(path)
    with _opened(file) as (_, stream):
        total = int(stream.frames)

    if not total:
        total = count_frames(file)
    frames, found = _decode(file, sample_indices(total, num_frames), size, progress)
    if found != total:
        frames, _ = _decode(file, sample_indices(found, num_frames), size, progress)
    return frames


def iter_frames(source: str | os.PathLike[str] | BinaryIO, name: str, *, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Every frame of a clip, one after the other, as uint8 `(H, W, 3)` RGB of `size`; the rest as in `read_frames`.

    source: a local file, or a stream of bytes that need not end, nor be seekable: its container must be made for that
        (Matroska, MPEG-TS, fragmented MP4). `name` is what errors call it.
    """
    file = Path(name) if hasattr(source, "read") else _existing(source)
    with _opened(file, source if hasattr(source, "read") else None) as (container, stream):
        for frame in _frames(file, container, stream):
            yield _to_rgb(frame, size)


def _decode(
    file: Path,
    indices: list[int],
    size: tuple[int, int] | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[np.ndarray, int]:
    """Decode all of `file`; return its frames at `indices` (sorted) and the number of frames it holds."""
    frames: np.ndarray | None = None
    done = found = 0
    with _opened(file) as (container, stream):
        for found, frame in enumerate(_frames(file, container, stream), start=1):
            if done < len(indices) and found - 1 == indices[done]:
                picture = _to_rgb(frame, size)
                if frames is None:
                    frames = np.empty((len(indices), *picture.shape), np.uint8)
                    size = picture.shape[:2]  # a stream may change its size midway; the first frame decides
                frames[done] = picture
                done += 1
                if progress is not None:
                    progress(done, len(indices))
    if frames is None:
        frames = np.empty((0, *(size or (0, 0)), 3), np.uint8)
    return frames[:done], found


def _to_rgb(frame: Any, size: tuple[int, int] | None) -> np.ndarray:
    """Return a decoded frame as uint8 `(H, W, 3)`, upright and at `size`."""
    quarters = round(frame.rotation / 90) % 4
    height, width = size or (None, None)
    if quarters % 2:
        height, width = width, height
    rgb = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return np.rot90(rgb, quarters)


def _frames(file: Path, container: Any, stream: Any) -> Iterator[Any]:
    """Every frame of the stream as it is decoded; raises behind the last one if there are none, or not all."""
    declared, found = int(stream.frames), 0
    end = others = 0.0
    for packet in container.demux():
        if packet.stream.index != stream.index:
            if packet.pts is not None:
                others = max(others, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            continue
        for frame in packet.decode():
            if frame.time is not None:
                end = max(end, frame.time + float((frame.duration or 0) * frame.time_base))
            found += 1
            yield frame
    if not found:
        raise VideoError(f"{file}: no frame of its video stream can be decoded")
    _check_whole(file, container, stream, found, declared, end, others)


def _check_whole(file: Path, container: Any, stream: Any, found: int, declared: int, end: float, others: float) -> None:
    """Raise if the file announces more footage than it decodes to; `end` is the last frame's end in seconds, `others`
    that of what else is in the file.

    A frame count alone proves nothing: an edit list, as a trimmed phone clip has, hides frames that the
    container still counts. The announced duration already leaves those out.
    """
    if found == declared:
        return
    if stream.duration is not None:
        announced = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        announced = container.duration / 1e6  # microseconds
    elif container.duration is not None and container.format.name in _WHOLE_DURATIONS:
        announced = container.duration / 1e6
        end = max(end, others)  # it may be the sound that lasts so long
    else:
        return
    # Where the count is also short two frames are beyond rounding; a duration alone is a looser statement.
    slack = 2 / float(stream.average_rate or 1) if declared else 1.0
    if end < announced - slack:
        raise VideoError(
            f"{file}: the file is cut short: it announces {announced:.2f} s, its frames end at {end:.2f} s"
        )


@contextmanager
def _opened(file: Path, source: object = None) -> Iterator[tuple[Any, Any]]:
    """Open `file` and yield its container and best video stream; FFmpeg's errors become `VideoError`."""
    av = _import_av()
    try:
        # "file:" keeps a colon in the name from being read as a protocol.
        with av.open(f"file:{file}" if source is None else source) as container:
            stream = container.streams.best("video")
            if stream is None or container.format.name in _TEXT_FORMATS:
                raise VideoError(f"{file}: the file holds no video stream")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"{file}: not a video FFmpeg can read, or cut short: {error.strerror}") from error


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.exists():
        raise VideoError(f"{file}: no such file")
    if not file.is_file():
        raise VideoError(f"{file}: not a regular file")
    if file.stat().st_size == 0:
        raise VideoError(f"{file}: the file is empty")
    return file


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading video needs PyAV: pip install "stgridpool_kernels[demo]"', name="av") from error
    return av
