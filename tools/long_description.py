"""Makes the long description that a package index shows of README.md, whose links lead into the repository.

An index shows the text alone: a link to docs/building.md or a picture beside the text would lead nowhere there. So each
gets the address that it has in the repository, at the tag of the version. Code stays as it is. setup.py loads this file
by its path, since nothing else of the tree can be imported where a package is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_CODE = re.compile(r"^ *```.*?^ *```$|(?<!`)(`+)(?!`)(?:(?!\n *\n).)+?(?<!`)\1(?!`)", re.DOTALL | re.MULTILINE)
_PICTURE = re.compile(r"(!\[[^\]]*\]\(<?)([^)\s>]+)|(<(?:img|source)\b[^>]*?\bsrc(?:set)?=\")([^\"\s]+)")
_LINK = re.compile(
    r"(\]\(<?)([^)\s>]+)|(^ {0,3}\[[^\]]+\]: +<?)([^\s>]+)|(<a\b[^>]*?\bhref=\")([^\"\s]+)", re.MULTILINE
)
_ABSOLUTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//")


def long_description(readme: str, repository: str, version: str) -> str:
    """Return a README in Markdown, the file in the root of the repository, with absolute links.

    readme: its text. repository: the address of the repository, in the form that GitHub gives files and pictures below
    it. version: what follows `v` in the name of the tag.
    """
    pages, files = (f"{repository}/{kind}/v{version}" for kind in ("blob", "raw"))

    def absolute(prose: str) -> str:
        prose = _PICTURE.sub(_after(f"{files}/"), prose)
        return _LINK.sub(_after(f"{pages}/"), prose)

    described, start = [], 0
    for code in _CODE.finditer(readme):
        described += [absolute(readme[start : code.start()]), code[0]]
        start = code.end()
    return "".join([*described, absolute(readme[start:])])


def _after(address: str) -> Callable[[re.Match[str]], str]:
    """Return a replacement that puts an address before a relative link. One to a heading is a link into README.md."""

    def replaced(match: re.Match[str]) -> str:
        before, link = (group for group in match.groups() if group is not None)
        if _ABSOLUTE.match(link):
            return match[0]
        return f"{before}{address}{'README.md' if link.startswith('#') else ''}{link.removeprefix('./')}"

    return replaced
