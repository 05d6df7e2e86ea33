"""Search of folders for token files and videos, and the output file of each input."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .token_files import SUFFIXES
from .video import VIDEO_SUFFIXES


@dataclass
class Found:
    """Inputs by their outputs, and what the search left out.

    left_out: number of entries of folders that are no inputs, by their suffix in lower case, "without suffix", "hidden"
    or "linked folder(s)". unreadable: the operating system's reason for each folder that it refuses to list.
    """

    outputs: dict[Path, Path] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: dict[Path, str] = field(default_factory=dict)


def remark_on(left_out: Mapping[str, int]) -> str:
    """Return words on what was left out, as "left out of folders: 12 .jpg, 1 hidden"; empty if that is nothing."""
    counts = ", ".join(
        f"{count} {kind}" for kind, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    )
    return f"left out of folders: {counts}" if counts else ""


def find_inputs(folder: Path, inputs: Sequence[str | os.PathLike[str]], suffix_of: Callable[[Path], str]) -> Found:
    """Return all inputs by their outputs in `folder`, which have the names of the inputs and the suffix `suffix_of`.

    inputs: files, and folders, which are searched recursively for files with a suffix of tokens or videos; their
    outputs are in the same subfolders of `folder`, and keep the suffix of the input before theirs if files there differ
    in their suffix alone. What is hidden is left out, and so are links to folders, which may
    lead anywhere; links to files are followed. Files that are named need not exist.

    Raises NotADirectoryError or ValueError if `folder` is a file or in a folder of inputs, if a folder has no input, or
    if inputs would share an output or be overwritten; OSError if a folder among the inputs cannot be listed.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"output must be a folder, got {folder}")
    found = Found()
    for given in map(Path, inputs):
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise ValueError(f"output must not be in a folder of inputs: {folder} is in {given}")
        files, top = (_files(given, found), given) if given.is_dir() else ([given], given.parent)
        targets = {file: folder / file.relative_to(top).with_suffix(suffix_of(file)) for file in files}
        shared = Counter(targets.values())
        for file, target in targets.items():
            if shared[target] > 1:
                target = target.with_name(f"{file.name}{suffix_of(file)}")
            other = found.outputs.setdefault(target, file)
            if other.resolve() != file.resolve():
                raise ValueError(f"inputs must differ in name, {target} would be made of {other} and {file}")
            if target.resolve() == file.resolve():
                raise ValueError(f"output must not be the folder of an input, which is never overwritten: {file}")
    return found


def _files(folder: Path, found: Found) -> list[Path]:
    """Return the files in a folder that are inputs, in the order of their names, and count what is left out."""
    files: list[Path] = []
    left_out: Counter[str] = Counter()

    def note(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.unreadable[Path(error.filename)] = f"{error.filename}: {error.strerror}"

    for top, folders, names in os.walk(folder, onerror=note):
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        hidden = [name for name in [*folders, *names] if name.startswith(".")]
        left_out += Counter(["hidden"] * len(hidden) + ["linked folder(s)"] * len(set(links) - set(hidden)))
        folders[:] = sorted(set(folders) - {*links, *hidden})
        for file in (Path(top, name) for name in sorted(set(names) - set(hidden))):
            if file.suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES):
                files.append(file)
            else:
                left_out[file.suffix.lower() or "without suffix"] += 1
    found.left_out += left_out
    if not files and not found.unreadable:
        has_none = f"{folder} has none{f'; {remark_on(left_out)}' if left_out else ''}"
        raise ValueError(f"inputs must hold token files ({', '.join(SUFFIXES)}) or videos, {has_none}")
    return files
