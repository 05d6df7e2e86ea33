"""Decoding of a video stream, in which damage is told from an end that is missing."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from .formats import Bytes, VideoError, import_av

__all__ = ["Clip", "Packets", "VideoWarning"]

_REORDERED = 64
"""Number of packets in which a frame is looked for that is shown before the one of an earlier packet."""


class VideoWarning(UserWarning):
    """Warning that a video is cut short: it announces more frames than can be decoded, and those are used."""


class Packets:
    """Packets of a video stream in the order of the container, and None behind the last one.

    A packet that is flagged as incomplete is left out if nothing follows it, since the file is cut short there. Then,
    or if the container cannot be read to its end, `cut_short` is True, and `missing` is 1 for a packet of this stream.
    """

    def __init__(self, container: Any, stream: Any, source: Bytes) -> None:
        self._container, self._index, self._source = container, stream.index, source
        self.cut_short, self.missing = False, 0

    def __iter__(self) -> Iterator[Any]:
        incomplete = None
        try:
            for packet in self._container.demux():
                self._source.check()
                if not packet.size:  # PyAV ends every stream with an empty packet
                    continue
                if incomplete is not None and incomplete.stream_index == self._index:
                    yield incomplete
                incomplete = packet if packet.is_corrupt else None
                if incomplete is None and packet.stream_index == self._index:
                    yield packet
            if incomplete is not None:
                self.cut_short, self.missing = True, int(incomplete.stream_index == self._index)
        except import_av().FFmpegError:
            self.cut_short, self.missing = True, 1
        self._source.check()
        yield None


class Clip:
    """Decoded frames of a video stream, in the order in which they are shown.

    found: number of frames that were decoded so far. `warn_if_cut_short` compares it with what the container announces.
    """

    def __init__(self, container: Any, stream: Any, source: Bytes, name: str) -> None:
        # With a thread for each frame, FFmpeg can wait for ever for a picture that a damaged HEVC stream refers to, and
        # an error does not tell which packet it is about.
        stream.codec_context.thread_count = 1
        self._container, self._stream, self._name = container, stream, name
        self._packets = Packets(container, stream, source)
        self._shown = self._discarded = self._incomplete = 0
        self.found = 0

    def __iter__(self) -> Iterator[Any]:
        """Yield every frame. Raises VideoError if a packet is damaged, or if there is no frame."""
        packets, times = iter(self._packets), deque[int](maxlen=_REORDERED)
        begins_late, last = False, None
        for packet in packets:
            if packet is not None:
                begins_late |= not (self._shown or self._discarded or packet.is_keyframe)
                self._shown += not packet.is_discard
                self._discarded += packet.is_discard
                times.extend(_times([packet]))
            try:
                frames = self._stream.decode(packet)
            except import_av().FFmpegError as error:
                if begins_late and not self.found:
                    continue  # what comes before the first keyframe refers to pictures that are not there
                if self.found == 1 and self._container.format.name.endswith("_pipe"):
                    return  # bytes behind a still picture, as motion photos have
                following = list(islice(packets, _REORDERED))
                if any(following):
                    waiting = _between(last, packet.pts, [*times, *_times(following)])
                    number = f"frame {self.found + waiting}, counted from 0, cannot be decoded"
                    raise VideoError(f"{self._name}: damaged packet: {number}") from error
                self._incomplete, frames = 1, self._rest() if following else []
            for frame in frames:
                self.found += 1
                last = frame.pts
                yield frame
        if not self.found:
            raise VideoError(f"{self._name}: no frame of its video stream can be decoded")

    def warn_if_cut_short(self, stacklevel: int) -> None:
        """Warn if the container announces more frames than were decoded. To be called after the last frame.

        The number of frames in a header proves nothing: many recorders write it before they record, and AVI counts
        repeats. The table of samples of MP4 and MOV is different, since it says where each of them is.
        """
        cut_short = self._packets.cut_short or self._incomplete
        announced, kind = self.found + self._packets.missing + self._incomplete, self._container.format.name
        if "mov" in kind or (kind == "avi" and cut_short):
            announced = max(announced, self._shown + self._packets.missing, self._stream.frames - self._discarded)
        if self.found < announced:
            count = f"{self.found} of {announced} frames can be decoded, the others are left out"
            message = f"{self._name}: damaged or cut short: {count}"
            warnings.warn(message, VideoWarning, stacklevel=stacklevel)

    def _rest(self) -> list[Any]:
        """Return the frames that the decoder still holds after an error."""
        try:
            return list(self._stream.decode(None))
        except import_av().FFmpegError:
            return []


def _times(packets: Iterable[Any]) -> list[int]:
    return [packet.pts for packet in packets if packet and packet.pts is not None and not packet.is_discard]


def _between(first: int | None, last: int | None, times: Iterable[int]) -> int:
    return sum((first is None or first < time) and last is not None and time < last for time in times)
