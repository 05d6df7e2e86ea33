"""Changes to the text of a page or a docstring on its way into the site of docs/. Nothing here needs MkDocs."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files at the root of the repository, by their name in the site."""

_CODE_OR_LINK = re.compile(r"(^ *```.*?^ *```$|`[^`]+`)|(?<=\]\()[^)\s]+(?=\))", re.DOTALL | re.MULTILINE)
_ARGUMENT = re.compile(r"(?:^|(?<=\. ))([a-z_]\w*(?:, [a-z_]\w*)*): ")


def anchor(heading: str, separator: str = "-") -> str:
    """Return the name by which a heading is linked to, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def source_of(page: str) -> str:
    """Return the path in the repository of a page of the site."""
    return ROOT_PAGES.get(page, f"docs/{page}")


def site_links(text: str, page: str, repository: str) -> str:
    """Return the text of a page with links that lead to other pages, or else to files in the repository.

    In the repository, links lead from file to file. page: the name of the page in the site. repository: its address.
    """
    source, folder = source_of(page), posixpath.dirname(page)
    pages = {file: name for name, file in ROOT_PAGES.items()}

    def target(found: re.Match[str]) -> str:
        link = found[0]
        if found[1] or re.match(r"[a-z]+:|#", link):
            return link
        path, *anchors = link.split("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        is_folder = (ROOT / file).is_dir()
        if file in pages or file.startswith("docs/"):
            name = pages.get(file) or file.removeprefix("docs/") + ("/README.md" if is_folder else "")
            return "#".join([posixpath.relpath(name, folder or "."), *anchors])
        return "#".join([f"{repository}/{'tree' if is_folder else 'blob'}/main/{file}", *anchors])

    return _CODE_OR_LINK.sub(target, text)


def deep_lists(text: str) -> str:
    """Return the text of a page in which what belongs to an item of a list is indented by four spaces.

    Python-Markdown asks for four; in the repository, the width of "- " or "1. " is enough.
    """
    lines, width, in_code = [], 0, False
    for line in text.split("\n"):
        item = re.match(r"(?:[-*]|\d+\.) +", line)
        if width and line.startswith(" " * width):
            line = "    " + line[width:]
        elif line and not in_code:
            width = len(item[0]) if item else 0
        in_code ^= line.lstrip().startswith("```")
        lines.append(line)
    return "\n".join(lines)


def structure(html: str) -> Counter[str]:
    """Return how often a page has each element that Markdown makes, by its name."""
    return Counter(re.findall(r"<(h[1-6]|p|ol|ul|li|table|tr|th|td|pre|code|em|strong|img|blockquote|hr)\b", html))


def docstring_markdown(text: str) -> str:
    """Return a docstring with a list of its arguments in place of paragraphs `name: text`, and with fences around code.

    A paragraph of arguments may have a line for each, or several in a line: `name: text. other: text`.
    """
    converted = "".join(map(_paragraph_markdown, re.split(r"(\n\n+)", text)))
    return re.sub(r"\n```(\n\n+)```python\n", r"\1", converted)  # code around empty lines is one block


def _paragraph_markdown(text: str) -> str:
    if all(line.startswith("    ") for line in text.split("\n")):
        code = re.sub("^ {4}", "", text, flags=re.MULTILINE)
        return f"```python\n{code}\n```"
    if not _ARGUMENT.match(text):
        return text
    _, *parts = _ARGUMENT.split(" ".join(text.split()))
    names, meanings = parts[::2], parts[1::2]
    return "\n".join(
        f"- {', '.join(f'`{name}`' for name in listed.split(', '))}: {meaning.strip()}"
        for listed, meaning in zip(names, meanings, strict=True)
    )
