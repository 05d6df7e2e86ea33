"""The programs of examples/, run in this process as `python examples/NAME …` runs them."""

from __future__ import annotations

import ast
import runpy
import shlex
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: object) -> None:
    """Run a program of the folder. Raises what it raises, SystemExit among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(FOLDER / name), *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")


def docstring(name: str) -> str:
    """Return what a program says of itself."""
    return ast.get_docstring(ast.parse((FOLDER / name).read_text(encoding="utf-8"))) or ""


def commands(name: str) -> list[list[str]]:
    """Return the arguments of each command in a program's docstring that starts it."""
    lines = [shlex.split(line, comments=True) for line in docstring(name).splitlines() if f"examples/{name}" in line]
    return [words[words.index(f"examples/{name}") + 1 :] for words in lines]
