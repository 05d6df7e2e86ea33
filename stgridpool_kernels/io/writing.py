"""Atomic writing: files appear complete, or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def refuse_existing(path: str | os.PathLike[str], force: bool) -> None:
    """Raise if `atomic_write` would refuse to write `path`. Call it before the work whose result is to be written.

    Raises:
        FileExistsError: the file exists, which includes a dangling link, and `force` is False.
        OSError: whatever `force` is, `path` is a folder or no regular file, or its folder is missing or not writable.
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{file}: is a folder, cannot be written as a file")
    if os.path.lexists(file) and not force:
        raise FileExistsError(f"{file}: exists already; give another name, or --force to overwrite it")
    if file.exists() and not file.is_file():
        raise OSError(f"{file}: not a regular file, is not overwritten")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"{file}: the folder {file.parent} is not writable")


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, force: bool) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes so that it appears complete, or not at all.

        with atomic_write(path, force=False) as file:
            figure.savefig(file, format="png")

    Bytes are written to a temporary file in the same folder. At the end of the block it is flushed to disk and renamed
    to `path`; if any exception, Ctrl-C included, leaves the block, it is removed and an existing file is unchanged.
    Without `force`, a file that appears meanwhile is not overwritten. With `force`, a link stays and its target is
    replaced. The new file has the mode and extended attributes of the one that it replaces, from its first byte, and
    the owner and group where the operating system allows it; otherwise its mode follows the umask.

    Raises:
        FileExistsError, OSError: as `refuse_existing`, or from the operating system.
    """
    file = Path(path)
    refuse_existing(file, force)
    target = Path(os.path.realpath(file))
    temporary = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.tmp")
    try:
        # the tempfile module would ignore the umask: its files have mode 0600
        with open(temporary, "xb") as out:
            if target.exists():
                _copy_permissions(target, temporary)
            yield out
            out.flush()
            os.fsync(out.fileno())
        if force:
            os.replace(temporary, target)
        else:
            _claim(temporary, target)
    except OSError as error:
        if error.filename in (None, os.fspath(temporary)) and error.errno is not None:
            error.filename = os.fspath(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _copy_permissions(source: Path, target: Path) -> None:
    """Give `target` the mode, extended attributes and, where that is allowed, the owner and group of `source`."""
    status = os.stat(source)
    mode = stat.S_IMODE(status.st_mode)
    with suppress(OSError):
        os.chown(target, status.st_uid, -1)
    try:
        os.chown(target, -1, status.st_gid)
    except OSError:
        mode &= ~stat.S_IRWXG  # what the old group may do is not for another one
    shutil.copystat(source, target)
    os.chmod(target, mode)


def _claim(temporary: Path, target: Path) -> None:
    """Rename a finished file to `target`. Raises FileExistsError if that exists by now."""
    try:
        try:
            os.link(temporary, target)
        except OSError:  # `target` exists, or the file system has no hard links: an empty file then reserves the name
            open(target, "xb").close()
            os.replace(temporary, target)
    except FileExistsError as error:
        raise FileExistsError(f"{target}: appeared while it was being made, and was left alone") from error


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove temporary files that killed processes left when writing `path`, if `path` exists."""
    file = Path(path)
    if file.exists():
        for name in glob.glob(f"{glob.escape(_prefix(file))}*.tmp", root_dir=file.parent):
            (file.parent / name).unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.name[:40]}."
