"""Why the package has no compiled library, and what to do about it, in words."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

PACKAGE = __name__.rsplit(".", 2)[0]
"""Name of the package that this module is part of, under which a copy of it may have been loaded."""

RECORD = "left_out.txt"
"""File of the package in which setup.py writes why a build left the library out."""


@cache
def why_missing() -> str:
    """Return why the compiled library cannot be found, with a remedy."""
    package = files(PACKAGE)
    folder = Path(str(package))
    # Other copies of the package, which this one hides, may have a library for this Python.
    others = [os.path.join(entry, PACKAGE) for entry in sys.path if isinstance(entry, str)]
    hidden = PathFinder.find_spec(f"{PACKAGE}._C", others) or _of_another_checkout()
    if hidden is not None and hidden.origin:
        return (
            f"{folder} has none, and hides {Path(hidden.origin).parent}, which has one: run from another folder, or "
            "build the checkout (pip install -e .)"
        )
    if not folder.is_dir():
        return f"libraries cannot be loaded out of {folder.parent}: install the package"
    of_other_pythons = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if of_other_pythons:
        tag = sys.implementation.cache_tag
        return f"{of_other_pythons[0]} in {folder} is not of this Python, {tag}: install the package with this Python"
    record = package.joinpath(RECORD)
    if record.is_file():
        first, *_ = record.read_bytes().decode(errors="replace").splitlines() or [""]
        return f"the build left it out: {first[:200]}"
    return f"it was never built in {folder}: pip install -e . in the checkout builds it"


def _of_another_checkout() -> ModuleSpec | None:
    """Return where the library of an editable installation is, None if there is none."""
    with suppress(ImportError, AttributeError, ValueError):
        return find_spec(f"{PACKAGE}._C")
    return None
