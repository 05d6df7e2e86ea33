"""Frames are upright: each of the 8 orientations that a file can record is applied."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stgridpool_kernels.io.video import iter_frames, read_frames
from tests.support.media import pictures, write_video

# What is shown of a stored picture, by the value of EXIF's Orientation, and the a, b, c, d of MP4's matrix for it.
ORIENTATIONS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int, int, int]]] = {
    1: (lambda x: x, (1, 0, 0, 1)),
    2: (lambda x: x[:, ::-1], (-1, 0, 0, 1)),
    3: (lambda x: x[::-1, ::-1], (-1, 0, 0, -1)),
    4: (lambda x: x[::-1], (1, 0, 0, -1)),
    5: (lambda x: x.swapaxes(0, 1), (0, 1, 1, 0)),
    6: (lambda x: np.rot90(x, -1), (0, 1, -1, 0)),
    7: (lambda x: np.rot90(x, 2).swapaxes(0, 1), (0, -1, -1, 0)),
    8: (lambda x: np.rot90(x), (0, -1, 1, 0)),
}


def exif(orientation: int) -> bytes:
    """Return EXIF data, which is a TIFF header and a directory of one entry."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)


def jpeg(path: Path, orientation: int) -> Path:
    write_video(path, "mjpeg", format="image2", pixels="yuvj420p", frames=1)
    data, text = path.read_bytes(), b"Exif\0\0" + exif(orientation)
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(text) + 2) + text + data[2:])
    return path


def png(path: Path, orientation: int) -> Path:
    write_video(path, "png", format="image2", pixels="rgb24", frames=1)
    data, text = path.read_bytes(), b"eXIf" + exif(orientation)
    end = data.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path.write_bytes(data[:end] + chunk + data[end:])
    return path


def mp4(path: Path, orientation: int) -> Path:
    data = bytearray(write_video(path, "libx264", frames=2).read_bytes())
    matrix, one = data.index(b"tkhd") + 44, 1 << 16
    assert struct.unpack_from(">9i", data, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    a, b, c, d = (each * one for each in ORIENTATIONS[orientation][1])
    struct.pack_into(">9i", data, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("write", [mp4, jpeg, png])
def test_the_orientation_of_a_file_is_applied(
    write: Callable[[Path, int], Path], orientation: int, tmp_path: Path
) -> None:
    path = write(tmp_path / f"clip.{write.__name__}", orientation)
    show, _ = ORIENTATIONS[orientation]
    shown = show(pictures(1)[0])
    frame = read_frames(path, 1)[0]
    assert frame.shape == shown.shape
    assert np.abs(frame.astype(int) - shown).mean() < 12
    with path.open("rb") as source:
        small = next(iter_frames(source, "-", size=(20, 30)))
    assert small.shape == (20, 30, 3)
    np.testing.assert_array_equal(read_frames(path, 1, size=(20, 30))[0], small)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert np.abs(small[row, column].astype(int) - shown[row, column]).max() < 40
