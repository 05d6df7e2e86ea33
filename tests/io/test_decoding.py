"""Damage is told from an end that is missing, and what a header announces from what is there."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stgridpool_kernels.io.video import VideoError, VideoWarning, count_frames, iter_frames, read_frames, sample_indices
from tests.support.media import write_video

SIZE = (14, 14)


def by_path(path: Path) -> np.ndarray:
    return read_frames(path, 99, size=SIZE)


def by_stream(path: Path) -> np.ndarray:
    return np.stack(list(iter_frames(io.BytesIO(path.read_bytes()), str(path), size=SIZE)))


READERS = [by_path, by_stream]

readers = pytest.mark.parametrize("reader", READERS)


def packets(path: Path) -> list[Any]:
    import av

    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def damage(path: Path, number: int, *, first: int = 0, last: int | None = None) -> int:
    """Overwrite bytes `first` to `last` of a packet, by its number in the file; return its frame's number as shown."""
    found, data = packets(path), bytearray(path.read_bytes())
    packet = found[number]
    at = data.index(bytes(packet))
    body = range(packet.size)[first:last]
    data[at + body.start : at + body.stop] = np.random.default_rng(0).bytes(len(body))
    path.write_bytes(data)
    return sorted(each.pts for each in found).index(packet.pts)


# ---- damaged packets ----


@readers
@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mp4", "mpeg4", "yuv420p"),
        ("a.mkv", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.ivf", "libvpx", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mov", "png", "rgb24"),
        ("a.mov", "prores_ks", "yuv422p10le"),
    ],
)
def test_a_damaged_packet_is_an_error_that_names_its_frame(
    name: str, codec: str, pixels: str, reader: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, codec, pixels=pixels, frames=20)
    number = damage(path, 11)
    with pytest.raises(
        VideoError, match=f"^{path}: damaged packet: frame {number}, counted from 0, cannot be decoded$"
    ):
        reader(path)


@readers
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_that_the_decoder_conceals(
    codec: str, reader: Callable[[Path], np.ndarray], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write_video(tmp_path / "a.mov", codec, frames=20, options={"g": "20", "bf": "0"})
    damage(path, 11, first=-4)
    assert len(reader(path)) == count_frames(path) == 20
    assert not warned(recwarn)


@readers
@pytest.mark.parametrize(("name", "codec"), [("a.mov", "png"), ("a.mjpeg", "mjpeg")])
def test_a_damaged_end_is_left_out(name: str, codec: str, reader: Callable[[Path], np.ndarray], tmp_path: Path) -> None:
    """Formats without sizes do not tell a damaged last packet from an end that is missing."""
    pixels = "rgb24" if codec == "png" else "yuvj420p"
    path = write_video(tmp_path / name, codec, pixels=pixels, format="mjpeg" if codec == "mjpeg" else None, frames=8)
    whole = reader(path)
    if name == "a.mov":
        damage(path, 7)
    else:
        path.write_bytes(path.read_bytes()[: -packets(path)[7].size * 9 // 10])
    with pytest.warns(VideoWarning, match=f"^{path}: damaged or cut short: 7 of 8 frames can be decoded"):
        np.testing.assert_array_equal(reader(path), whole[:7])


# ---- what is announced ----


def warned(records: Iterable[Any]) -> list[str]:
    return [str(each.message) for each in records if issubclass(each.category, VideoWarning)]


@readers
def test_a_number_of_frames_that_a_recorder_wrote_before_it_recorded(
    reader: Callable[[Path], np.ndarray], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write_video(tmp_path / "a.ivf", "libvpx", frames=10)
    data = bytearray(path.read_bytes())
    assert struct.unpack_from("<I", data, 24) == (10,)
    struct.pack_into("<I", data, 24, 900)
    path.write_bytes(data)
    assert len(reader(path)) == count_frames(path) == 10
    assert not warned(recwarn)


@readers
def test_a_duration_that_lasts_longer_than_the_frames(
    reader: Callable[[Path], np.ndarray], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write_video(tmp_path / "a.webm", "libvpx", frames=10)
    data = bytearray(path.read_bytes())
    duration = data.index(b"\x44\x89\x88") + 3
    assert struct.unpack_from(">d", data, duration) == (400.0,)
    struct.pack_into(">d", data, duration, 26000.0)
    path.write_bytes(data)
    assert len(reader(path)) == 10
    assert not warned(recwarn)


@readers
@pytest.mark.parametrize("repeats", [(7, 8, 9), (3, 4, 8)])
def test_chunks_of_avi_that_repeat_a_frame_are_none(
    repeats: tuple[int, ...], reader: Callable[[Path], np.ndarray], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write_video(tmp_path / "a.avi", "mjpeg", pixels="yuvj420p", frames=10)
    whole = reader(path)
    data = path.read_bytes()
    first = data.index(b"movi") + 4
    chunks, index, at = b"", b"", first
    for number in range(10):
        [size] = struct.unpack_from("<I", data, at + 4)
        body = b"" if number in repeats else data[at + 8 : at + 8 + size + size % 2]
        index += b"00dc" + struct.pack("<III", 16, 4 + len(chunks), size if body else 0)
        chunks += b"00dc" + struct.pack("<I", size if body else 0) + body
        at += 8 + size + size % 2
    assert data[at : at + 4] == b"idx1"
    data = data[: first - 8] + struct.pack("<I", 4 + len(chunks)) + b"movi" + chunks
    path.write_bytes(data + b"idx1" + struct.pack("<I", len(index)) + index)
    kept = [number for number in range(10) if number not in repeats]
    np.testing.assert_array_equal(reader(path), whole[kept])
    assert count_frames(path) == len(kept)
    assert not warned(recwarn)


# ---- parts of files ----


@readers
@pytest.mark.parametrize("kind", ["video", "audio"])
def test_an_avi_file_is_cut_short_if_its_last_chunk_is(
    kind: str, reader: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    import av

    path = write_video(tmp_path / "a.avi", "mjpeg", pixels="yuvj420p", frames=10, sound=True)
    whole = reader(path)
    with av.open(str(path)) as container:
        chunks = [
            (packet.stream.type, packet.pos + 8 + packet.size // 2) for packet in container.demux() if packet.size
        ]
    number = next(number for number in range(10, 20) if chunks[number][0] == kind)
    shown = sum(each == "video" for each, _ in chunks[:number])
    path.write_bytes(path.read_bytes()[: chunks[number][1]])
    with pytest.warns(VideoWarning, match=f"damaged or cut short: {shown} of 10 frames can be decoded"):
        np.testing.assert_array_equal(reader(path), whole[:shown])


@readers
def test_a_program_stream_cut_short_is_a_shorter_clip(reader: Callable[[Path], np.ndarray], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mpg", "mpeg2video", frames=40)
    whole = reader(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    frames = reader(path)
    assert 5 < len(frames) < 40
    np.testing.assert_array_equal(frames[:5], whole[:5])


@readers
def test_a_stream_joined_in_the_middle_begins_with_a_keyframe(
    reader: Callable[[Path], np.ndarray], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write_video(tmp_path / "a.ts", "libx264", frames=40, options={"g": "10", "bf": "0", "sc_threshold": "0"})
    whole = reader(path)
    data = path.read_bytes()
    path.write_bytes(data[packets(path)[5].pos :])
    np.testing.assert_array_equal(reader(path), whole[10:])
    np.testing.assert_array_equal(read_frames(path, 7, size=SIZE), whole[10:][sample_indices(30, 7)])
    assert not warned(recwarn)


# ---- reading that fails ----


class Broken(io.BytesIO):
    """A file that raises an exception when half of it was read."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(data)
        self.error, self.half = error, len(data) // 2

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.half:
            raise self.error
        return super().read(min(size or 0, 1000))


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.avi", "a.mp4"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(3), SystemExit),
        (OSError(5, "Input/output error"), VideoError),
    ],
    ids=["Ctrl-C", "exit", "failing disk"],
)
def test_what_a_read_raises_ends_the_reading(
    name: str, error: BaseException, expected: type[BaseException], tmp_path: Path
) -> None:
    """PyAV prints an exception in a read, and takes the bytes for ended."""
    data = write_video(tmp_path / name, "mpeg2video" if name == "a.ts" else "mpeg4").read_bytes()
    message = "^a: cannot be read: Input/output error$" if expected is VideoError else None
    with pytest.raises(expected, match=message):
        list(iter_frames(Broken(data, error), "a", size=SIZE))


@readers
@pytest.mark.parametrize("codec", ["png", "mjpeg"])
@pytest.mark.parametrize("tail", [b"\0", b"text" * 2000, bytes(range(256)) * 40], ids=["zero", "text", "bytes"])
@pytest.mark.filterwarnings("error")
def test_bytes_behind_a_still_picture_do_not_matter(
    codec: str, tail: bytes, reader: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Phones and editors append data to pictures."""
    path = write_video(tmp_path / "a.mov", codec, pixels="rgb24" if codec == "png" else "yuvj420p", frames=1)
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"".join(bytes(packet) for packet in packets(path)) + tail)
    assert len(reader(picture)) == 1
