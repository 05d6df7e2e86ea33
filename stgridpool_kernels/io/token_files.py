"""Token tensors in files and pipes: reading without unpickling, atomic writing.

Each format is read by the library that writes it. Errors of the library become a `TokenFileError` of one line, which
names the file, the cause and what is allowed. Tokens are copies: no file stays mapped.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.lib import format as _npy
from torch import Tensor

from .writing import atomic_write

__all__ = [
    "SUFFIXES",
    "TokenFileError",
    "check_dtype",
    "check_file",
    "check_streamable",
    "format_of",
    "read_tokens",
    "stream_safetensors",
    "stream_tokens",
    "write_chunks",
    "write_tokens",
]

_ALLOWED = {
    ".npy": "an array of floats, as numpy.save writes it",
    ".npz": "arrays of floats, as numpy.savez writes them",
    ".pt": "a tensor or a dict of tensors, as torch.save writes them",
    ".safetensors": "tensors, as safetensors.torch.save_file writes them",
}

SUFFIXES = tuple(_ALLOWED)
"""Suffixes of token files in lower case; upper case is accepted too."""

# Names of the dtypes of tokens in the header of a .safetensors file, by their names in torch.
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


class TokenFileError(ValueError):
    """Error about a file without usable tokens. The message names the file, the cause and what is allowed."""


# ---- reading a file ----


def read_tokens(path: str | os.PathLike[str], key: str | None = None, *, grid: tuple[int, int] | None = None) -> Tensor:
    """Read a .npy, .npz, .pt or .safetensors file. Nothing in it is unpickled into an object that could run code.

    Args:
        path: the file.
        key: name of the tensor, in a format with names; optional if the file holds a single tensor.
        grid: `(rows, cols)` of the tokens of a frame, which flattened tokens need.

    Returns:
        `(T, H, W, C)`, `(B, T, H, W, C)` or flattened `(T, rows · cols, C)` on the CPU; bfloat16, float16, float32 or
        float64, as in the file.

    Raises:
        FileNotFoundError: there is no such file.
        TokenFileError: the file is damaged, does not fit into memory, would have to be unpickled or holds no tokens; or
            it holds several tensors (the message lists them) and no `key` is given, or none of the name `key`.
        OSError: the operating system refuses to open the file.
    """
    file = Path(path)
    suffix = _suffix(file)
    check_file(file)
    with file.open("rb") as opened, _errors_name(str(file), _ALLOWED[suffix]):
        match suffix:
            case ".npy":
                _check_no_key(key)
                tensor = _from_numpy(_npy.read_array(opened, allow_pickle=False))
                if opened.read(1):
                    raise TokenFileError("more follows its array; stgp pool --stream reads one array after another")
            case ".npz":
                tensor = _read_npz(opened, key)
            case ".pt":
                tensor = _read_pt(opened, key)
            case _:
                with _open_safetensors(file) as archive:
                    # The library's own tensor is a mapping of the file.
                    tensor = archive.get_tensor(_choose(archive.keys(), key)).clone()
        _check_dtype(_name(tensor.dtype))
        _check_shape(tuple(tensor.shape), grid)
    return tensor


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    """Yield the archive of a .safetensors file. The library takes names in UTF-8 only, so others get a link."""
    with ExitStack() as stack:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            link = Path(stack.enter_context(TemporaryDirectory()), "tokens.safetensors")
            link.symlink_to(file.absolute())
            file = link
        yield stack.enter_context(safetensors.safe_open(file, framework="pt", device="cpu"))


def _read_npz(opened: BinaryIO, key: str | None) -> Tensor:
    if not zipfile.is_zipfile(opened):  # numpy would read it as a pickle, and suggest to allow pickles
        raise TokenFileError(f"cannot be read (not a zip archive, or cut short); allowed: {_ALLOWED['.npz']}")
    opened.seek(0)
    with np.load(opened, allow_pickle=False) as archive:
        return _from_numpy(np.asarray(archive[_choose(archive.files, key)]))


def _read_pt(opened: BinaryIO, key: str | None) -> Tensor:
    try:
        loaded = torch.load(opened, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        cause = f"refused: needs unpickling of {found[1]}" if found else "not a pickle of tensors, or damaged"
        raise TokenFileError(f"{cause}; allowed: {_ALLOWED['.pt']}") from error
    if isinstance(loaded, dict):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        loaded = tensors[_choose(tensors, key)]
    else:
        _check_no_key(key)
    if not isinstance(loaded, Tensor):
        raise TokenFileError(f"holds a {type(loaded).__name__}; allowed: {_ALLOWED['.pt']}")
    if kind := _incomplete(loaded):
        raise TokenFileError(f"its tensor is {kind}; allowed: one whose elements are all in the file")
    return loaded.detach()


def _incomplete(tensor: Tensor) -> str | None:
    """Return the kind of a tensor whose elements are not all stored, None if they are."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested" if tensor.is_nested else "sparse"
    if tensor.is_meta or tensor.is_quantized:
        return "meta" if tensor.is_meta else "quantized"
    return "expanded" if tensor.nbytes > tensor.untyped_storage().nbytes() else None


def _choose(names: Collection[str], key: str | None) -> str:
    listed = ", ".join(sorted(names))
    if not names:
        raise TokenFileError("holds no tensor; allowed: one, or several by name")
    if key is None and len(names) > 1:
        raise TokenFileError(f"holds several tensors; choose one with --key: {listed}")
    if key is not None and key not in names:
        raise TokenFileError(f"holds no tensor {key!r}; it has {listed}")
    return next(iter(names)) if key is None else key


def _check_no_key(key: str | None) -> None:
    if key is not None:
        raise TokenFileError(f"its tensor has no name, so --key {key} cannot choose it")


def _from_numpy(array: np.ndarray) -> Tensor:
    """Return an array as a tensor in this machine's byte order."""
    _check_dtype(array.dtype.name)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        # NumPy has no bfloat16; other packages save it as a dtype of 2 raw bytes.
        hint = " (bfloat16? use .pt or .safetensors)" if dtype == "void16" else ""
        raise TokenFileError(f"tokens are bfloat16, float16, float32 or float64, got {dtype}{hint}")


def _check_shape(shape: tuple[int, ...], grid: tuple[int, int] | None, *, stream: bool = False) -> None:
    if len(shape) == 3 and grid is not None:
        if math.prod(grid) != shape[1]:
            got = f"{grid[0]}x{grid[1]} = {math.prod(grid)} for shape {shape}"
            raise TokenFileError(f"--grid must have the {shape[1]} tokens of a flattened frame, got {got}")
    elif len(shape) != 4 and (stream or len(shape) != 5):
        allowed = "a stream of tokens has shape" if stream else "tokens have shape (B, T, H, W, C) or"
        flat = "; flattened tokens (T, ROWS·COLS, C) need --grid ROWSxCOLS" if len(shape) == 3 else ""
        raise TokenFileError(f"{allowed} (T, H, W, C), got {shape}{flat}")
    if min(shape[1:] if len(shape) == 3 else shape[-3:]) < 1:
        raise TokenFileError(f"H, W and C must be at least 1, got shape {shape}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- writing a file ----


def write_tokens(path: str | os.PathLike[str], tensor: Tensor, *, force: bool) -> None:
    """Write a tensor of any shape and device to a file in the format of its suffix, by `atomic_write`.

    In .npz and .safetensors files the tensor is named "tokens"; a .pt file holds the tensor itself.

    Raises:
        FileExistsError: the file exists, and `force` is False.
        TokenFileError: `path` has another suffix, or the format cannot hold the dtype.
        OSError: the operating system refuses to write the file.
    """
    file = Path(path)
    check_dtype(file, tensor.dtype)
    # torch.save writes the whole storage of a view, so a tensor that does not fill its storage is copied.
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    with atomic_write(file, force=force) as out:
        match file.suffix.lower():
            case ".npy":
                np.save(out, tensor.numpy(), allow_pickle=False)
            case ".npz":
                np.savez(out, tokens=tensor.numpy())
            case ".pt":
                torch.save(tensor, out)
            case _:
                out.write(safetensors.torch.save({"tokens": tensor}))


def write_chunks(path: str | os.PathLike[str], chunks: Iterable[Tensor], *, force: bool) -> None:
    """Write chunks of tokens to one .npy or .safetensors file, as `write_tokens` writes the joined chunks.

    chunks: tokens (n, H, W, C) with any n, 0 included, and the same H, W, C and dtype.

    Raises TokenFileError if there is no chunk, since H, W, C and the dtype are unknown then; otherwise as
    `write_tokens`.
    """
    file, frames, header = Path(path), 0, None
    check_streamable(file)
    with atomic_write(file, force=force) as out:
        for tokens in chunks:
            if header is None:
                check_dtype(file, tokens.dtype)
                header = partial(_header, file.suffix.lower(), _name(tokens.dtype), tuple(tokens.shape[1:]))
                out.write(header(0))
            out.write(tokens.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            frames += len(tokens)
        if header is None:
            raise TokenFileError(f"{file}: no frame came")
        out.seek(0)
        out.write(header(frames))


def _header(suffix: str, dtype: str, shape: tuple[int, ...], frames: int) -> bytes:
    """Return the header of a file of tokens (frames, *shape), whose length is the same for every number of frames."""
    if suffix == ".npy":  # numpy leaves room for the first axis to grow
        about = {"descr": _npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
        header = io.BytesIO()
        _npy.write_array_header_1_0(header, {**about, "shape": (frames, *shape)})
        return header.getvalue()
    size = frames * math.prod(shape) * getattr(torch, dtype).itemsize
    text = json.dumps({"tokens": {"dtype": _DTYPES[dtype], "shape": [frames, *shape], "data_offsets": [0, size]}})
    return (248).to_bytes(8, "little") + text.ljust(248).encode()


def check_dtype(path: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Raise TokenFileError unless the format of `path`, given by its suffix, can hold tokens of `dtype`."""
    if _suffix(Path(path)) in (".npy", ".npz") and dtype == torch.bfloat16:
        raise TokenFileError(
            f"{path}: NumPy's formats cannot hold bfloat16: write .pt or .safetensors, or convert with --dtype float32"
        )


def check_streamable(path: str | os.PathLike[str]) -> None:
    """Raise TokenFileError unless `write_chunks` supports the suffix of `path`."""
    if Path(path).suffix.lower() not in (".npy", ".safetensors"):
        raise TokenFileError(f"{path}: --stream writes .npy and .safetensors, which can be written chunk by chunk")


# ---- reading chunk by chunk ----


def stream_tokens(
    source: io.BufferedReader, name: str, chunk: int, grid: tuple[int, int] | None = None
) -> Iterator[Tensor]:
    """Yield tokens (n, H, W, C) with n ≤ `chunk`, read from a sequence of .npy arrays; flattened ones (n, H · W, C).

    source: bytes of a file or a pipe; nothing is read ahead beyond its buffer. name: its name in error messages.
    grid: as in `read_tokens`.

    Raises TokenFileError if an array is damaged, cut short, holds no tokens, or differs in shape beyond its frames or
    in dtype from those before.
    """
    like: tuple[tuple[int, ...], np.dtype[Any]] | None = None
    with _errors_name(name, "arrays of floats, as numpy.save writes them"):
        while source.peek(1):
            is_first_version = _npy.read_magic(source) == (1, 0)
            read_header = _npy.read_array_header_1_0 if is_first_version else _npy.read_array_header_2_0
            shape, by_columns, dtype = read_header(source)
            _check_dtype(dtype.name)
            _check_shape(shape, grid, stream=True)
            if by_columns:
                raise TokenFileError(f"a stream of tokens is stored row by row, got shape {shape}, column by column")
            if like is not None and like != (shape[1:], dtype):
                raise TokenFileError(f"after (…, H, W, C) = {like[0]} of {like[1]} came {shape[1:]} of {dtype}")
            like = (shape[1:], dtype)
            for first in range(0, max(1, shape[0]), chunk):  # an array without frames yields one chunk, of 0 frames
                array = np.empty((min(chunk, shape[0] - first), *shape[1:]), dtype)
                if source.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
                    raise TokenFileError(f"cut short: {shape[0]} frames announced, {first} and a part came")
                yield _from_numpy(array)


def stream_safetensors(file: Path, chunk: int, grid: tuple[int, int] | None = None) -> Iterator[Tensor]:
    """Yield tokens as `stream_tokens` does, of a .safetensors file of one tensor, which is read in slices.

    Raises TokenFileError as `read_tokens`.
    """
    with (
        _errors_name(str(file), _ALLOWED[".safetensors"]),
        _open_safetensors(file) as archive,
    ):
        tensor = archive.get_slice(_choose(archive.keys(), None))
        shape = tuple(tensor.get_shape())
        _check_shape(shape, grid, stream=True)
        for first in range(0, max(1, shape[0]), chunk):
            frames: Tensor = tensor[first : first + chunk]
            _check_dtype(_name(frames.dtype))
            yield frames.clone()


# ---- errors ----


@contextmanager
def _errors_name(name: str, allowed: str) -> Iterator[None]:
    """Raise every error of the block as a TokenFileError of one line that names the file.

    name: name of the file. allowed: contents that it may have. Libraries raise many kinds of errors for a damaged file,
    MemoryError and OverflowError among them, since its header may announce any size.
    """
    try:
        yield
    except TokenFileError as error:
        raise TokenFileError(f"{name}: {error}") from error.__cause__
    except Exception as error:
        first_line, *_ = str(error).splitlines() or [""]
        sentences = ". ".join(first_line.split(". ")[:2])[:200]  # the rest is advice, some of it unsafe
        cause = f"{type(error).__name__}: {sentences}"
        raise TokenFileError(f"{name}: cannot be read ({cause}); allowed: {allowed}") from error


def check_file(file: Path) -> None:
    """Raise FileNotFoundError if there is no such file, TokenFileError if it is empty or not a regular file."""
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    if not file.is_file():
        raise TokenFileError(f"{file}: {'a folder' if file.is_dir() else 'not a regular file'}, give a file")
    if file.stat().st_size == 0:
        raise TokenFileError(f"{file}: the file is empty")


def format_of(file: Path) -> str | None:
    """Return the suffix of the format of tokens that the bytes of a file are in, None if they are in none."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if start.startswith(_npy.MAGIC_PREFIX):
        return ".npy"
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        is_pt = any(name.endswith("/data.pkl") for name in names)
        return ".pt" if is_pt else ".npz" if any(name.endswith(".npy") for name in names) else None
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size:
        return ".safetensors"
    return ".pt" if start.startswith(b"\x80\x02") else None  # a pickle, as torch.save wrote before its version 1.6


def _suffix(file: Path) -> str:
    if file.suffix.lower() not in SUFFIXES:
        raise TokenFileError(f"{file}: token files end in {', '.join(SUFFIXES)}, got {file.suffix or 'no suffix'}")
    return file.suffix.lower()
