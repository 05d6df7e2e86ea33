"""Reading of tokens from token files, videos and pipes, whole or in chunks."""

from __future__ import annotations

import operator
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

from .encoder import PATCH, TAPS, Encoder
from .token_files import SUFFIXES, TokenFileError, check_file, read_tokens, stream_safetensors, stream_tokens
from .video import VIDEO_SUFFIXES, VideoError, iter_frames, read_frames

__all__ = ["check_count", "check_reading", "load_input", "stream_input"]


def load_input(
    path: str | os.PathLike[str],
    *,
    key: str | None,
    num_frames: int,
    grid: tuple[int, int],
    tap: str,
    progress: Callable[[str, int, int], object] | None = None,
) -> tuple[Tensor, np.ndarray | None]:
    """Read the tokens of a token file, or of a video, whose frames the packaged encoder turns into tokens.

    Args:
        path: a token file if its suffix is in `SUFFIXES`, else a video.
        key: as in `read_tokens`.
        num_frames: maximum number of frames taken from a video, evenly spread.
        grid: `(rows, cols)` of tokens per frame of a video; a token is 14 × 14 pixels of the resized frame.
        tap: output of the encoder, see `encoder.TAPS`.
        progress: called as `progress("decoding" or "encoding", frames_done, frames)` while a video is read.

    Returns:
        tokens: of a token file as `read_tokens` returns them, so 4-D or 5-D; of a video float32 `(T, H, W, 384)`.
        frames: uint8 `(T, 14·H, 14·W, 3)` RGB of a video, None for a token file.

    Raises and warns as `check_reading`, `read_tokens`, `video.read_frames` and `encoder.Encoder`; ImportError names the
    package to install.
    """
    check_reading(key=key, num_frames=num_frames, grid=grid, tap=tap)
    file = Path(path)
    if file.suffix.lower() in SUFFIXES:
        return read_tokens(file, key), None
    check_file(file)
    with _taken_for_a_video(file):
        encoder, size = _encoder(tap), (PATCH * grid[0], PATCH * grid[1])
        frames = read_frames(file, num_frames, size=size, progress=progress and partial(progress, "decoding"))
        return torch.from_numpy(encoder(frames, progress=progress and partial(progress, "encoding"))), frames


def stream_input(path: str | os.PathLike[str], *, grid: tuple[int, int], tap: str, chunk: int) -> Iterator[Tensor]:
    """Yield the tokens of all frames of a file or pipe as chunks (n, H, W, C) with n ≤ `chunk`, as they arrive.

    path: "-" is standard input. `stream_tokens` reads a .npy file and a pipe that starts like one; a .safetensors file
    is read in slices. All other files and pipes are read as videos, whose frames the packaged encoder turns into
    tokens.

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
            yield from stream_safetensors(file, chunk)
            return
    with open(0 if is_stdin else file, "rb", closefd=not is_stdin) as source:
        start = source.peek(1)[:1]
        if not start:
            raise TokenFileError(f"{file}: no frame came")
        if suffix == ".npy" or start == np.lib.format.MAGIC_PREFIX[:1]:
            yield from stream_tokens(source, str(file), chunk)
            return
        with _taken_for_a_video(file):
            encoder = _encoder(tap)
            frames = iter_frames(source, str(file), size=(PATCH * grid[0], PATCH * grid[1]))
            while batch := list(islice(frames, chunk)):
                yield torch.from_numpy(encoder(np.stack(batch)))


def check_reading(*, key: str | None, num_frames: int, grid: Sequence[int], tap: str) -> None:
    """Raise TypeError or ValueError unless these are valid arguments of `load_input`."""
    if not isinstance(key, str | None):
        raise TypeError(f"key must be a name or None, got {key!r}")
    check_count("num_frames", num_frames)
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"grid must be two integers (rows, cols), got {grid!r}")
    for count in grid:
        check_count("grid's rows and cols", count)
    if tap not in tuple(TAPS):
        raise ValueError(f"tap must be one of {', '.join(TAPS)}, got {tap!r}")


def check_count(name: str, value: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least 1."""
    try:
        operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}") from error
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@contextmanager
def _taken_for_a_video(file: Path) -> Iterator[None]:
    """Extend the errors of the block by the reason why a file or pipe without a video's suffix was read as a video."""
    try:
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
