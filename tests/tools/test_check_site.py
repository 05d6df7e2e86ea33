"""The check of the site of docs/ sees what is loaded from elsewhere, and links that lead nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_site import faults, loaded_by_style

SOUND = {
    "index.html": '<h1 id="top">a</h1> <a href="b/#part">b</a> <a href="#top">a</a> <a href="https://example.org/x">c</a>',
    "b/index.html": '<p id="part">b</p> <a href="..">a</a> <a href="/">a</a> <img src="../p.png?1">'
    '<link rel="stylesheet" href="../site.css"> <link rel="canonical" href="https://example.org/b/">',
    "site.css": "a { background: url(p.png) } b { background: url('data:image/png;base64,AA') }",
    "p.png": "",
}


def site(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_sound_site_has_no_faults(tmp_path: Path) -> None:
    assert faults(site(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('<script src="https://example.org/a.js"></script>', "loads https://example.org/a.js from elsewhere"),
        ('<img src="//example.org/a.png">', "loads //example.org/a.png from elsewhere"),
        ('<img srcset="p.png 1x, https://example.org/a.png 2x">', "loads https://example.org/a.png from elsewhere"),
        ('<link rel="preconnect" href="https://example.org">', "loads https://example.org from elsewhere"),
        ('<object data="http://example.org/a.svg">', "loads http://example.org/a.svg from elsewhere"),
        ("<style>@import 'https://example.org/a.css'</style>", "loads https://example.org/a.css from elsewhere"),
        ('<p style="background: url(https://example.org/a)">', "loads https://example.org/a from elsewhere"),
        ('<a data-md-component="source">', 'asks a server for data-md-component="source"'),
        ('<img src="q.png">', "there is no q.png"),
        ('<a href="c/">', "there is no c/"),
        ('<a href="../">', "there is no ../"),
        ('<a href="b/#other">', "b/index.html has no anchor other"),
        ('<a href="#other">', "page.html has no anchor other"),
    ],
)
def test_a_fault_of_a_page_is_named(text: str, fault: str, tmp_path: Path) -> None:
    [found] = faults(site(tmp_path / "site", SOUND | {"page.html": text}))
    assert found.startswith("page.html")
    assert found.endswith(fault)


def test_a_fault_of_a_style_sheet_is_named(tmp_path: Path) -> None:
    found = faults(site(tmp_path, SOUND | {"a/more.css": "a { src: url(q.woff2), url(https://example.org/f) }"}))
    assert found == ["a/more.css: there is no q.woff2", "a/more.css loads https://example.org/f from elsewhere"]


def test_what_a_style_loads() -> None:
    assert loaded_by_style("a{b:url( 'x y.png' )}@import \"z.css\";c{d:url(w)}") == ["x y.png", "z.css", "w"]
