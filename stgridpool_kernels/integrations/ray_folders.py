"""Output files of `integrations.ray`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..io.token_files import SUFFIXES
from ..io.video import VIDEO_SUFFIXES


def outputs_in(folder: Path, inputs: Sequence[str | os.PathLike[str]]) -> dict[Path, Path]:
    """Return all inputs by their outputs in `folder`, which are .safetensors files of the same names.

    inputs: files, and folders, which are searched recursively for token files and videos; their outputs are in the same
    subfolders of `folder`. Hidden files are left out.

    Raises FileNotFoundError, NotADirectoryError or ValueError if inputs are missing, would share an output, or would be
    overwritten.
    """
    if not inputs:
        raise ValueError("inputs must name at least one file or folder, got none")
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"output must be a folder, got {folder}")
    outputs: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise ValueError(f"output must not be in a folder of inputs: {folder} is in {given}")
        for file in _files(given):
            target = folder / file.relative_to(given if given.is_dir() else given.parent).with_suffix(".safetensors")
            other = outputs.setdefault(target, file)
            if other.resolve() != file.resolve():
                raise ValueError(f"inputs must differ in name, {target} would be made of {other} and {file}")
            if target.resolve() == file.resolve():
                raise ValueError(f"output must not be the folder of an input, which is never overwritten: {file}")
    return outputs


def _files(given: Path) -> list[Path]:
    if not given.exists():
        raise FileNotFoundError(f"inputs must exist, there is no {given}")
    if not given.is_dir():
        return [given]
    suffixes = (*SUFFIXES, *VIDEO_SUFFIXES)
    files = [file for file in sorted(given.rglob("[!.]*")) if file.is_file() and file.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f"inputs must hold token files ({', '.join(SUFFIXES)}) or videos, {given} has none")
    return files
