"""The site of docs/ has every page, and its API reference names what there is."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import stgridpool_kernels
from stgridpool_kernels.ops import ARGUMENTS
from tools.docs_text import ROOT, ROOT_PAGES, source_of
from tools.environment import canonical, read_pins

DOCS = ROOT / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
OBJECTS = [
    (page.name, found)
    for page in sorted((DOCS / "api").glob("*.md"))
    for found in re.findall(r"^::: (\S+)\n((?: .*\n)*)", page.read_text(encoding="utf-8") + "\n", re.MULTILINE)
]
"""Pages of the API reference, each with the path and the options of an object that it describes."""


def pages(entries: list[Any]) -> list[str]:
    """Return the pages of a navigation, in order."""
    found: list[str] = []
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages(target) if isinstance(target, list) else [target]
    return found


NAVIGATION = pages(CONFIG["nav"])


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(NAVIGATION) == sorted([*ROOT_PAGES, *(str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md"))])


@pytest.mark.parametrize("page", NAVIGATION)
def test_a_page_begins_with_its_only_heading_of_the_first_level(page: str) -> None:
    text = (ROOT / source_of(page)).read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert text.startswith("# ")
    assert len(re.findall(r"^# .", prose, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("page", "described"), OBJECTS, ids=lambda value: value[0] if isinstance(value, tuple) else None
)
def test_what_the_reference_describes_is_there_and_has_a_docstring(page: str, described: tuple[str, str]) -> None:
    path, options = described
    [names] = re.findall(r"members: \[(.*)\]", options, re.DOTALL) or [""]
    found = pkgutil.resolve_name(path)
    for one in [found, *(getattr(found, name) for name in re.findall(r"\w+", names))]:
        assert one.__doc__


def test_the_reference_describes_every_public_name() -> None:
    described = {path.rpartition(".")[2] for _, (path, _) in OBJECTS}
    assert {*stgridpool_kernels.__all__} - {"__version__"} <= described


def test_the_reference_has_the_schemas() -> None:
    text = (DOCS / "api" / "ops.md").read_text(encoding="utf-8")
    shown = [" ".join(code.split()) for code in re.findall(r"```text\n(.*?)```", text, re.DOTALL)]
    assert shown == [f"stgp::{name}(Tensor x, *, {arguments}) -> Tensor" for name, arguments in ARGUMENTS.items()]


def test_the_pinned_versions_are_within_the_bounds_of_the_extra() -> None:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    extra = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    pins = read_pins(ROOT / "tools" / "requirements" / "docs.txt")
    for bound in map(Requirement, extra):
        [line] = pins[canonical(bound.name)]
        assert line.partition("==")[2] in bound.specifier
