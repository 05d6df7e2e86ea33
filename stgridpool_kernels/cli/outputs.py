"""Output files of the commands: the file for each input, and checks that it may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..io.folders import Found, find_inputs
from ..io.token_files import SUFFIXES
from ..io.writing import refuse_existing


def outputs_of(inputs: Sequence[Path], out: str, file_format: str | None) -> Found:
    """Return the inputs, those in folders included, by their outputs.

    out: the argument of -o. file_format: suffix of files in a folder without its dot, by default that of the input, or
    safetensors for videos. Raises ValueError if these disagree, and as `find_inputs`.
    """
    path = Path(out)
    is_folder = out.endswith(os.sep) or path.is_dir()
    several = len(inputs) > 1 or any(source.is_dir() for source in inputs)
    if path.suffix.lower() in SUFFIXES and not is_folder:
        if several:
            given = f"{len(inputs)} inputs" if len(inputs) > 1 else "a folder of inputs"
            raise ValueError(f"-o {out} names a file, but there are {given}: name a folder")
        if file_format and path.suffix.lower() != f".{file_format}":
            raise ValueError(f"-o {out} and --format {file_format} disagree")
        return Found({path: inputs[0]})
    if path.suffix and not several and not is_folder:
        raise ValueError(f"-o {out}: files end in {', '.join(SUFFIXES)}; for a folder of that name give {out}{os.sep}")

    def suffix_of(source: Path) -> str:
        if file_format:
            return f".{file_format}"
        return source.suffix.lower() if source.suffix.lower() in SUFFIXES else ".safetensors"

    return find_inputs(path, inputs, suffix_of)


def check_outputs(inputs: Sequence[Path], outputs: Sequence[Path], *, made: bool, force: bool) -> None:
    """Raise OSError or ValueError if an output cannot be written, exists without `force`, or is one of the inputs.

    made: whether missing folders of the outputs will be made.
    """
    taken = {(status.st_dev, status.st_ino): path for path in inputs if path.exists() for status in [path.stat()]}
    for output in outputs:
        if output.exists():
            status = output.stat()
            source = taken.get((status.st_dev, status.st_ino))
            if source is not None:
                raise ValueError(f"{output}: is the input {source}, which is never overwritten")
        folder = output.parent
        if not made or folder.is_dir():
            refuse_existing(output, force)
            continue
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise NotADirectoryError(f"{output}: {folder} is not a folder where one can be made")
