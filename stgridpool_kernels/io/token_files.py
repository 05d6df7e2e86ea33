"""Token tensors in files: reading without unpickling, writing all or nothing, and videos as tokens.

A file is judged before it is read: the sizes its header claims must be the sizes it has, so a damaged or hostile file
is refused with its cause and nothing is allocated for it. Every message names the file.
"""

from __future__ import annotations

import io
import json
import math
import mimetypes
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..ops import DTYPES
from .video import VideoError, iter_frames, read_frames
from .writing import atomic_write, refuse_existing

if TYPE_CHECKING:
    from .encoder import Encoder

__all__ = [
    "SUFFIXES",
    "TokenFileError",
    "TokenWriter",
    "atomic_write",
    "check_dtype",
    "check_streamable",
    "load_input",
    "read_tokens",
    "refuse_existing",
    "stream_input",
    "stream_tokens",
    "write_tokens",
]

SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")
"""Of files that hold tokens. Their case does not matter."""

KEY = "tokens"
"""The name a written tensor gets in formats that name their tensors."""

# A .npy header is a line of text; NumPy itself reads none above 10 000 bytes.
_NPY_HEADER = 1 << 16

_READ_AT_ONCE = 1 << 24

# Tokens hardly compress. Larger arrays than this many bytes may be at most this many times larger than in the file.
_UNPACKED_FREELY, _UNPACKED_RATIO = 1 << 28, 100


class TokenFileError(ValueError):
    """A file that holds no tokens that can be used. The message gives the path, the cause and what is allowed."""


def read_tokens(path: str | os.PathLike[str], key: str | None = None) -> Tensor:
    """Read a .npy, .npz, .pt or .safetensors file. Nothing in it is ever unpickled into an object.

    A .pt file is one that torch.save has written since torch 1.6 and holds a tensor or a dict of tensors.

    Args:
        path: the file.
        key: which tensor, in a format that names them; may be left out where there is one only.

    Returns:
        `(T, H, W, C)` or `(B, T, H, W, C)` on the CPU; bfloat16, float16, float32 or float64, as in the file.

    Raises:
        FileNotFoundError: there is no such file.
        TokenFileError: it is empty, damaged, cut short, claims other sizes than it has, would have to be unpickled,
            has several tensors (the message lists them) or not the one asked for, or holds something else than
            tokens: another rank, another dtype, no element in H, W or C.
        OSError: the system does not let it be read.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise TokenFileError(f"{file}: token files end in {', '.join(SUFFIXES)}, got {file.suffix or 'no suffix'}")
    _check_file(file)
    tensor = reader(file, key)
    if tensor.dtype not in DTYPES:
        raise TokenFileError(_wrong_dtype(file, tensor.dtype))
    _check_shape(file, tuple(tensor.shape))
    return tensor


def write_tokens(path: str | os.PathLike[str], tensor: Tensor, *, force: bool) -> None:
    """Write a tensor of any shape and device to a file in the format of its suffix, all or nothing.

    In .npz and .safetensors it is called "tokens"; a .pt file holds the tensor itself.

    Raises:
        FileExistsError: the file exists, and not `force`.
        TokenFileError: another suffix, or a dtype that the format cannot hold.
        OSError: the system does not let it be written.
    """
    file = Path(path)
    check_dtype(file, tensor.dtype)
    # torch.save writes all of a view's storage, so only a tensor that fills its own is written as it is
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    with atomic_write(file, force=force) as out:
        match file.suffix.lower():
            case ".npy":
                np.save(out, tensor.numpy(), allow_pickle=False)
            case ".npz":
                np.savez(out, allow_pickle=False, **{KEY: tensor.numpy()})
            case ".pt":
                torch.save(tensor, out)
            case _:
                out.write(safetensors.torch.save({KEY: tensor}))


def check_dtype(path: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Raise TokenFileError unless the format of `path` (by its suffix) can hold tokens of `dtype`."""
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise TokenFileError(f"{file}: token files end in {', '.join(SUFFIXES)}, got {file.suffix or 'no suffix'}")
    if dtype == torch.bfloat16 and suffix in (".npy", ".npz"):
        raise TokenFileError(
            f"{file}: NumPy's formats cannot hold bfloat16: write .pt or .safetensors, or convert with --dtype float32"
        )


def load_input(
    path: str | os.PathLike[str],
    *,
    key: str | None,
    num_frames: int,
    grid: tuple[int, int],
    tap: str,
    progress: Callable[[str, int, int], object] | None = None,
) -> tuple[Tensor, np.ndarray | None]:
    """Tokens of a token file, or of a video that the packaged encoder turns into tokens. The suffix decides.

    Args:
        path: a file; one whose suffix is not in `SUFFIXES` is taken for a video.
        key: as in `read_tokens`.
        num_frames: the most frames taken from a video, evenly spread.
        grid: `(rows, cols)` of tokens per frame of a video; a token is 14 × 14 pixels of the resized frame.
        tap: which tokens of the encoder, see `encoder.TAPS`.
        progress: called as `progress("decoding" or "encoding", frames_done, frames)` while a video is read.

    Returns:
        tokens: of a file as `read_tokens` gives them, so 4-D or 5-D; of a video float32 `(T, H, W, 384)`.
        frames: uint8 `(T, 14·H, 14·W, 3)` RGB of a video, None for a token file.

    Raises:
        As `read_tokens`, `video.read_frames` and `encoder.Encoder`; ImportError says what to install.
    """
    file = Path(path)
    if file.suffix.lower() in SUFFIXES:
        return read_tokens(file, key), None
    _check_file(file)
    if min(grid) < 1:
        raise ValueError(f"grid must be (rows, cols) of at least 1, got {grid}")
    encoder = _encoder(tap)
    decoding = None if progress is None else lambda done, total: progress("decoding", done, total)
    encoding = None if progress is None else lambda done, total: progress("encoding", done, total)
    try:
        frames = read_frames(file, num_frames, size=(14 * grid[0], 14 * grid[1]), progress=decoding)
    except VideoError as error:
        if (mimetypes.guess_type(file.name)[0] or "").startswith("video/"):
            raise
        raise VideoError(f"{error} (it was taken for a video: token files end in {', '.join(SUFFIXES)})") from error
    return torch.from_numpy(encoder(frames, progress=encoding)), frames


def stream_input(path: str | os.PathLike[str], *, grid: tuple[int, int], tap: str, chunk: int) -> Iterator[Tensor]:
    """Tokens (n, H, W, C) with n ≤ `chunk` of all frames of a file or a pipe ("-" is standard input), as they come.

    What starts as a .npy array is read as such arrays one after another (`stream_tokens`); a .safetensors file is read
    from the file; all else is taken for a video, each frame of which the packaged encoder turns into tokens.

    Raises as `stream_tokens`, `read_tokens` and `load_input`.
    """
    file = Path(path)
    if str(path) != "-" and not file.is_fifo():
        _check_file(file)
        if file.suffix.lower() == ".safetensors":
            yield from _stream_safetensors(file, chunk)
            return
        if file.suffix.lower() in (".pt", ".npz"):
            raise TokenFileError(f"{file}: --stream reads .npy, .safetensors, videos and pipes")
    with ExitStack() as stack:
        if str(path) == "-" and sys.stdin is None:
            raise TokenFileError("-: standard input is closed")
        pipe = sys.stdin.buffer if str(path) == "-" else stack.enter_context(file.open("rb"))
        if not isinstance(pipe, io.BufferedReader):
            pipe = io.BufferedReader(pipe)
        if pipe.peek(1)[:1] == b"":
            raise TokenFileError(f"{file}: no frame came")
        if pipe.peek(1)[:1] == b"\x93":
            yield from stream_tokens(pipe, str(path), chunk)
            return
        encoder = _encoder(tap)
        size = (14 * grid[0], 14 * grid[1])
        frames = iter_frames(pipe, str(path), size=size)
        while some := list(islice(frames, chunk)):
            yield torch.from_numpy(encoder(np.stack(some)))


def _stream_safetensors(file: Path, chunk: int) -> Iterator[Tensor]:
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as archive:
            tensor = archive.get_slice(_choose(file, archive.keys(), None))
            shape = tuple(tensor.get_shape())
            _check_shape(file, shape)
            if len(shape) != 4:
                raise TokenFileError(f"{file}: a stream of tokens has shape (T, H, W, C), got {shape}")
            for first in range(0, max(1, shape[0]), chunk):  # no frames have H, W and C too
                frames: Tensor = tensor[first : first + chunk]
                if frames.dtype not in DTYPES:
                    raise TokenFileError(_wrong_dtype(file, frames.dtype))
                yield frames
    except safetensors.SafetensorError as error:
        raise TokenFileError(f"{file}: not in .safetensors format, damaged or cut short: {_line(error)}") from error


@lru_cache(maxsize=1)
def _encoder(tap: str) -> Encoder:
    """Loading the encoder takes seconds, so the videos of one command share it."""
    from .encoder import Encoder

    return Encoder(tap)


# ---- bit by bit ----


def stream_tokens(source: BinaryIO, name: str, chunk: int) -> Iterator[Tensor]:
    """Tokens (n, H, W, C) with n ≤ `chunk`, read from .npy arrays that follow one another.

    Nothing is read ahead beyond what `source` buffers, so a pipe will do. `name` is what errors call it.

    Raises TokenFileError where an array is damaged, cut short, holds no tokens or other ones than those before.
    """
    file, like = Path(name), None
    while (start := source.read(1)) != b"":
        head = io.BytesIO(start + _read_header(source, file))
        shape, dtype, by_columns = _parse_header(file, head)
        _check_shape(file, shape)
        if len(shape) != 4 or by_columns:
            order = ", column by column" if by_columns else ""
            raise TokenFileError(f"{file}: a stream of tokens has shape (T, H, W, C), row by row, got {shape}{order}")
        if shape[0] < 0:
            raise TokenFileError(f"{file}: not in .npy format, damaged or cut short: its shape is {shape}")
        if like not in (None, (shape[1:], dtype)):
            raise TokenFileError(f"{file}: after (…, H, W, C) = {like[0]} of {like[1]} came {shape[1:]} of {dtype}")
        like = (shape[1:], dtype)
        frame_bytes = math.prod(shape[1:]) * dtype.itemsize
        for first in range(0, max(1, shape[0]), chunk):  # an array of no frames has H, W and C too
            frames = min(chunk, shape[0] - first)
            data = _read_bytes(source, frames * frame_bytes)
            if len(data) < frames * frame_bytes:
                raise TokenFileError(f"{file}: cut short: {shape[0]} frames announced, {first} and a part came")
            array = np.frombuffer(data, dtype).reshape(frames, *shape[1:])
            yield torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def _read_header(source: BinaryIO, file: Path) -> bytes:
    """The header of a .npy array without its first byte."""
    head = source.read(9)
    if len(head) == 9 and head[5] == 2:
        head += source.read(2)
    size = int.from_bytes(head[7:], "little")
    if len(head) < 9 or size > _NPY_HEADER:
        raise TokenFileError(f"{file}: not in .npy format, damaged or cut short")
    return head + source.read(size)


def _read_bytes(source: BinaryIO, size: int) -> bytearray:
    """So many bytes, or fewer where the source ends. A header may claim any size: memory is taken for what comes."""
    data = bytearray()
    while len(data) < size and (part := source.read(min(size - len(data), _READ_AT_ONCE))):
        data += part
    return data


class TokenWriter:
    """Writes tokens bit by bit into an open file, as .npy or .safetensors: what `write_tokens` writes at once.

    Their number stands in the header, which is therefore written last: the file must be seekable.
    """

    def __init__(self, path: str | os.PathLike[str], out: BinaryIO) -> None:
        self.path, self.out = Path(path), out
        self.frames = 0
        self._like: tuple[tuple[int, ...], torch.dtype] | None = None

    def write(self, tokens: Tensor) -> None:
        """(n, …), n may be 0; all but n as before."""
        tokens = tokens.detach().cpu().contiguous()
        if self._like is None:
            check_dtype(self.path, tokens.dtype)
            self._like = (tuple(tokens.shape[1:]), tokens.dtype)
            self.out.write(self._header(0))
        assert self._like == (tuple(tokens.shape[1:]), tokens.dtype)
        self.out.write(tokens.view(torch.uint8).numpy().data)
        self.frames += len(tokens)

    def finish(self) -> None:
        """Writes the header. Raises TokenFileError if there was no frame to tell shape and dtype by."""
        if self._like is None:
            raise TokenFileError(f"{self.path}: no frame came")
        self.out.seek(0)
        self.out.write(self._header(self.frames))

    def _header(self, frames: int) -> bytes:
        """Of the same length for every number of frames."""
        assert self._like is not None
        shape, dtype = self._like
        if self.path.suffix.lower() == ".npy":
            kind = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
            text = repr({"descr": kind, "fortran_order": False, "shape": (frames, *shape)})
            text = text.ljust(245) + "\n"  # 256 bytes with what is before it: a file that is mapped has aligned numbers
            return np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text.encode()
        name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}[dtype]
        bytes_ = frames * math.prod(shape) * dtype.itemsize
        entry = {"dtype": name, "shape": [frames, *shape], "data_offsets": [0, bytes_]}
        text = json.dumps({KEY: entry}).ljust(248)
        return len(text).to_bytes(8, "little") + text.encode()


def check_streamable(path: str | os.PathLike[str]) -> None:
    """Raises TokenFileError unless `TokenWriter` writes files that end as `path` does."""
    if Path(path).suffix.lower() not in (".npy", ".safetensors"):
        raise TokenFileError(f"{path}: --stream writes .npy and .safetensors, which can be written bit by bit")


# ---- reading ----


def _check_file(file: Path) -> None:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    if not file.is_file():
        raise TokenFileError(f"{file}: {'a folder' if file.is_dir() else 'not a regular file'}, give a file")
    if file.stat().st_size == 0:
        raise TokenFileError(f"{file}: the file is empty")


def _check_shape(file: Path, shape: tuple[int, ...]) -> None:
    if len(shape) not in (4, 5):
        raise TokenFileError(f"{file}: tokens have shape (T, H, W, C) or (B, T, H, W, C), got {shape}")
    if min(shape[-3:]) < 1:
        raise TokenFileError(f"{file}: H, W and C must be at least 1, got shape {shape}")


def _wrong_dtype(file: Path, dtype: object) -> str:
    return f"{file}: tokens are bfloat16, float16, float32 or float64, got {str(dtype).removeprefix('torch.')}"


def _choose(file: Path, names: Collection[str], key: str | None) -> str:
    listed = ", ".join(sorted(names))
    if not names:
        raise TokenFileError(f"{file}: holds no tensor; allowed are a tensor, or several by name")
    if key is not None:
        if key not in names:
            raise TokenFileError(f"{file}: holds no tensor {key!r}; it has {listed}")
        return key
    if len(names) > 1:
        raise TokenFileError(f"{file}: holds several tensors; choose one with --key: {listed}")
    return next(iter(names))


def _unnamed(file: Path, key: str | None) -> None:
    if key is not None:
        raise TokenFileError(f"{file}: its tensor has no name, so --key {key} cannot choose it")


def _read_npy(file: Path, key: str | None) -> Tensor:
    _unnamed(file, key)
    return _read_array(file, lambda: file.open("rb"), file.stat().st_size)


def _read_npz(file: Path, key: str | None) -> Tensor:
    with file.open("rb") as opened:  # outside the try: what the system refuses is no damage
        return _read_member(file, opened, key)


def _read_member(file: Path, opened: BinaryIO, key: str | None) -> Tensor:
    try:
        with zipfile.ZipFile(opened) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            info = members[_choose(file, members, key)]
            packed = min(info.compress_size, file.stat().st_size)
            if info.file_size > max(_UNPACKED_FREELY, _UNPACKED_RATIO * packed):
                raise TokenFileError(
                    f"{file}: {info.filename} would unpack {packed} bytes to {info.file_size}: refused above "
                    f"{_UNPACKED_RATIO} times"
                )
            return _read_array(file, lambda: archive.open(info), info.file_size)  # type: ignore[arg-type, return-value]
    except TokenFileError:
        raise
    except Exception as error:  # zipfile and its decompressors have a dozen kinds, some undocumented
        raise TokenFileError(f"{file}: not a .npz archive, damaged or cut short: {_line(error)}") from error


def _read_array(file: Path, opened: Callable[[], BinaryIO], size: int) -> Tensor:
    """An array in .npy format, once its header agrees with the `size` in bytes of what holds it."""
    with opened() as stream:
        head = io.BytesIO(stream.read(_NPY_HEADER))
    shape, dtype, _ = _parse_header(file, head)
    claimed, found = math.prod(shape) * dtype.itemsize, size - head.tell()
    if min(shape, default=0) < 0 or claimed != found:
        raise TokenFileError(
            f"{file}: damaged or cut short: shape {shape} of {dtype} takes {claimed} bytes, the file has {found}"
        )
    _check_shape(file, shape)
    with opened() as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _parse_header(file: Path, head: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape and dtype of an array of floats in .npy format, and whether its columns come first."""
    try:
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format is not used for numbers")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(head)
    except Exception as error:  # the header is a Python literal; damaged ones fail in any part of its parser
        raise TokenFileError(f"{file}: not in .npy format, damaged or cut short: {_line(error)}") from error
    if dtype.hasobject:
        raise TokenFileError(f"{file}: refused: needs unpickling of {dtype} elements; save an array of floats")
    if dtype.kind != "f" or dtype.itemsize > 8:
        # NumPy has no bfloat16; what other packages add is saved as bare bytes
        hint = " (bfloat16? use .pt or .safetensors)" if dtype.str[1:] == "V2" else ""
        raise TokenFileError(_wrong_dtype(file, dtype) + hint)
    return shape, dtype, by_columns


def _read_safetensors(file: Path, key: str | None) -> Tensor:
    # opening compares every size in the header with the file's own
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as archive:
            tensor: Tensor = archive.get_tensor(_choose(file, archive.keys(), key))
            return tensor
    except safetensors.SafetensorError as error:
        raise TokenFileError(f"{file}: not in .safetensors format, damaged or cut short: {_line(error)}") from error


def _read_pt(file: Path, key: str | None) -> Tensor:
    with file.open("rb") as opened:
        records = _record_sizes(file, opened)
        opened.seek(0)
        loaded = _load(file, opened)
    if isinstance(loaded, dict):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        loaded = tensors[_choose(file, tensors, key)]
    else:
        _unnamed(file, key)
    if not isinstance(loaded, Tensor):
        raise TokenFileError(f"{file}: holds a {type(loaded).__name__}; allowed are a tensor or a dict of tensors")
    tensor = loaded.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise TokenFileError(f"{file}: holds a sparse, quantized or empty (meta) tensor; save a dense one")
    # torch.load believes the sizes that the pickle claims; they are checked before any element is touched
    storage = tensor.untyped_storage().nbytes()
    if storage not in records or tensor.nbytes > storage:
        raise TokenFileError(
            f"{file}: damaged, or an expanded tensor: shape {tuple(tensor.shape)} takes {tensor.nbytes} bytes, "
            f"which the file does not have"
        )
    return tensor


def _record_sizes(file: Path, opened: BinaryIO) -> set[int]:
    """Sizes in bytes of the storages in a .pt archive, which torch.save never compresses."""
    try:
        with zipfile.ZipFile(opened) as archive:
            members = archive.infolist()
    except Exception as error:
        raise TokenFileError(
            f"{file}: not a file that torch.save has written since torch 1.6, or cut short: {_line(error)}"
        ) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > file.stat().st_size
    ):
        raise TokenFileError(f"{file}: claims more bytes than it has: compressed, damaged or cut short")
    return {member.file_size for member in members if member.filename.split("/")[1:2] == ["data"]}


def _load(file: Path, opened: BinaryIO) -> Any:
    try:
        return torch.load(opened, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        cause = f"refused: needs unpickling of {found[1]}" if found else "its pickle is damaged or holds other objects"
        raise TokenFileError(f"{file}: {cause}; allowed are a tensor or a dict of tensors") from error
    except Exception as error:  # a damaged pickle fails in any way
        raise TokenFileError(f"{file}: not a file of torch.save, or damaged: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The first sentence of an error of another library, which may go on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_READERS: dict[str, Callable[[Path, str | None], Tensor]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
}
