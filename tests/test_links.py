"""Links in the Markdown files of the repository lead somewhere: to a file, and to a heading where they name one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "examples", "stgridpool_kernels", "tests")
FILES = [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]


def links(text: str) -> list[str]:
    """Return what links and pictures of a page point to, outside blocks of code."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """Return the names by which headings of a page are linked to, as GitHub makes them."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    for link in links(file.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue  # an address on another machine
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_all_pages_are_read() -> None:
    names = {str(file.relative_to(ROOT)) for file in FILES}
    assert {"README.md", "docs/kernels.md", "docs/integrations/README.md", "docs/integrations/transformers.md"} <= names


def test_what_is_a_link_and_what_an_anchor() -> None:
    page = "# C++: `a_b`, and C\n[one](x.md#y), ![two](z.png)\n```\n# not\n[three](no.md)\n```\n"
    assert links(page) == ["x.md#y", "z.png"]
    assert anchors(page) == {"c-a_b-and-c"}
