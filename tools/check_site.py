"""Checks the site that `make docs` makes: it loads nothing from elsewhere, and links in it lead somewhere.

    python -m tools.check_site build/site

Links to other sites are not followed. What a page loads are scripts, style sheets, fonts, pictures and frames.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

_LOADED = {"src", "srcset", "data", "poster"}
"""Attributes that name what a page loads, whatever their element; `href` does so in a `link`."""

_NOT_LOADED = {"canonical", "next", "prev", "alternate", "license"}
"""Relations of a `link` to pages that are not loaded with this one."""

_ASKS_A_SERVER = ('data-md-component="source"',)
"""Parts of a page for which a script of the theme asks a server: the repository's stars and releases."""


@dataclass
class Html(HTMLParser):
    """The anchors of a page, what it links to and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.styles.append(given.get("style", ""))
        if tag == "link" and not _NOT_LOADED & set(given.get("rel", "").split()):
            self.loaded.append(given.get("href", ""))
        elif "href" in given:
            self.links.append(given["href"])
        for name in _LOADED & set(given):
            value = given[name]
            self.loaded += [part.split()[0] for part in value.split(",")] if name == "srcset" else [value]

    def handle_data(self, data: str) -> None:
        if (self.get_starttag_text() or "").startswith("<style"):
            self.styles.append(data)


def read(text: str) -> Html:
    page = Html()
    page.feed(text)
    return page


def loaded_by_style(text: str) -> list[str]:
    """Return what a style sheet loads."""
    found = re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", text)
    return [one or other for one, other in found]


def faults(site: Path) -> list[str]:
    """Return what is wrong with a site, as sentences; nothing if nothing is."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(site.rglob("*.html"))}
    pages = {file: read(text) for file, text in texts.items()}
    found = [
        f"{file.relative_to(site)} asks a server for {part}"
        for file, text in texts.items()
        for part in _ASKS_A_SERVER
        if part in text
    ]
    for file, page in pages.items():
        styles = [load for style in page.styles for load in loaded_by_style(style)]
        for target in [*page.loaded, *styles]:
            found += _fault(site, file, target, pages, is_loaded=True)
        for target in page.links:
            found += _fault(site, file, target, pages, is_loaded=False)
    for file in sorted(site.rglob("*.css")):
        for target in loaded_by_style(file.read_text(encoding="utf-8")):
            found += _fault(site, file, target, pages, is_loaded=True)
    return found


def _fault(site: Path, file: Path, target: str, pages: dict[Path, Html], *, is_loaded: bool) -> list[str]:
    """Return what is wrong with one thing that a file loads or links to, as at most one sentence."""
    name = file.relative_to(site)
    if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
        is_elsewhere = not target.startswith("data:")
        return [f"{name} loads {target} from elsewhere"] if is_loaded and is_elsewhere else []
    path, _, anchor = target.partition("#")
    path = unquote(path.partition("?")[0])
    start = "" if path.startswith("/") else name.parent.as_posix()
    inside = posixpath.normpath(posixpath.join(start, path.lstrip("/")))
    found = site / inside if path else file
    if found.is_dir():
        found /= "index.html"
    if inside.startswith("..") or not found.is_file():
        return [f"{name}: there is no {target}"]
    anchor = unquote(anchor)
    if anchor and found in pages and anchor not in pages[found].anchors:
        return [f"{name}: {found.relative_to(site)} has no anchor {anchor}"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path)
    site = parser.parse_args().site
    pages = len([*site.rglob("*.html")])
    if not pages:
        sys.exit(f"{site} has no pages")
    if found := faults(site):
        sys.exit("\n".join(found))
    print(f"{site}: {pages} pages load nothing from elsewhere, and their links lead somewhere")


if __name__ == "__main__":
    main()
