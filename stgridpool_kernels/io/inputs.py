"""Reading of tokens from token files, videos and pipes, whole or in chunks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..flat import grid_size
from ..plan.values import count, shown
from .encoder import PATCH, TAPS, Encoder
from .token_files import SUFFIXES, TokenFileError, check_file, format_of, read_tokens, stream_safetensors, stream_tokens
from .video import VIDEO_SUFFIXES, VideoError, count_frames, iter_frames, read_frames

__all__ = ["VIDEO_GRID", "check_reading", "load_input", "stream_input"]

VIDEO_GRID = (18, 32)
"""Default rows and columns of tokens per frame of a video."""


def load_input(
    path: str | os.PathLike[str],
    *,
    key: str | None,
    num_frames: int,
    grid: tuple[int, int] | None,
    tap: str,
    progress: Callable[[str, int, int], object] | None = None,
) -> tuple[Tensor, np.ndarray | None]:
    """Read the tokens of a token file, or of a video, whose frames the packaged encoder turns into tokens.

    Args:
        path: a token file if its suffix is in `SUFFIXES`, else a video.
        key: as in `read_tokens`.
        num_frames: maximum number of frames taken from a video, evenly spread.
        grid: `(rows, cols)` of the tokens of a frame, which a file of flattened tokens needs; of a video by default
            `VIDEO_GRID`, where a token is 14 × 14 pixels of the resized frame.
        tap: output of the encoder, see `encoder.TAPS`.
        progress: called as `progress("decoding" or "encoding", frames_done, frames)` while a video is read.

    Returns:
        tokens: of a token file as `read_tokens` returns them, so 4-D, 5-D, or 3-D if they are flattened; of a video
            float32 `(T, H, W, 384)`.
        frames: uint8 `(T, 14·H, 14·W, 3)` RGB of a video, None for a token file.

    Raises and warns as `check_reading`, `read_tokens`, `video.read_frames` and `encoder.Encoder`; ImportError names the
    package to install.
    """
    check_reading(key=key, num_frames=num_frames, grid=grid, tap=tap)
    file = Path(path)
    if file.suffix.lower() in SUFFIXES:
        return read_tokens(file, key, grid=grid), None
    check_file(file)
    with _taken_for_a_video(file):
        encoder, size = _encoder(tap), _size(grid)
        frames = read_frames(file, num_frames, size=size, progress=progress and partial(progress, "decoding"))
        return torch.from_numpy(encoder(frames, progress=progress and partial(progress, "encoding"))), frames


def stream_input(
    path: str | os.PathLike[str], *, grid: tuple[int, int] | None, tap: str, chunk: int
) -> Iterator[Tensor]:
    """Yield the tokens of all frames of a file or pipe as chunks (n, H, W, C) with n ≤ `chunk`, as they arrive.

    Chunks of flattened tokens are (n, H·W, C). path: "-" is standard input. `stream_tokens` reads a .npy file and a
    pipe that starts like one; a .safetensors file is read in slices. All other files and pipes are read as videos,
    whose frames the packaged encoder turns into tokens. grid, tap: as in `load_input`.

    Raises and warns as `stream_tokens`, `read_tokens` and `load_input`.
    """
    file, is_stdin = Path(path), str(path) == "-"
    suffix = file.suffix.lower()
    if is_stdin and sys.stdin is None:
        raise TokenFileError("-: standard input is closed")
    if not is_stdin and not file.is_fifo():
        check_file(file)
        if suffix in (".pt", ".npz"):
            raise TokenFileError(f"{file}: --stream reads .npy, .safetensors, videos and pipes")
        if suffix == ".safetensors":
            yield from stream_safetensors(file, chunk, grid)
            return
    with open(0 if is_stdin else file, "rb", closefd=not is_stdin) as source:
        start = source.peek(1)[:1]
        if not start:
            raise TokenFileError(f"{file}: no frame came")
        if suffix == ".npy" or start == np.lib.format.MAGIC_PREFIX[:1]:
            yield from stream_tokens(source, str(file), chunk, grid)
            return
        with _taken_for_a_video(file):
            frames = iter_frames(source, str(file), size=_size(grid))
            while batch := list(islice(frames, chunk)):
                yield torch.from_numpy(_encoder(tap)(np.stack(batch)))


def check_reading(*, key: str | None, num_frames: int, grid: Sequence[int] | None, tap: str) -> None:
    """Raise TypeError or ValueError unless these are valid arguments of `load_input`."""
    if not isinstance(key, str | None):
        raise TypeError(f"key must be a name or None, got {shown(key)}")
    count("num_frames", num_frames, 1)
    if grid is not None:
        grid_size(grid)
    if tap not in tuple(TAPS):
        raise ValueError(f"tap must be one of {', '.join(TAPS)}, got {shown(tap)}")


def _size(grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return the height and width in pixels of the frames that are encoded as `grid` tokens."""
    rows, cols = VIDEO_GRID if grid is None else grid_size(grid)
    return PATCH * rows, PATCH * cols


@contextmanager
def _taken_for_a_video(file: Path) -> Iterator[None]:
    """Extend the errors of the block by the reason why a file or pipe without a video's suffix was read as a video.

    Such a file is looked at first, so that only a video asks for the packages of the encoder.
    """
    try:
        if file.suffix.lower() not in VIDEO_SUFFIXES and file.is_file():
            if suffix := format_of(file):
                raise TokenFileError(f"{file}: holds tokens in the format of {suffix}, give it that suffix")
            count_frames(file)
        yield
    except (VideoError, ImportError) as error:
        if file.suffix.lower() in VIDEO_SUFFIXES:
            raise
        why = f"token files end in {', '.join(SUFFIXES)}" if file.is_file() else "tokens in a pipe are .npy arrays"
        raise type(error)(f"{error} ({file} was taken for a video: {why})") from error


@lru_cache(maxsize=1)
def _encoder(tap: str) -> Encoder:
    """Return the encoder that all videos of a process share, since loading it takes seconds."""
    return Encoder(tap)
