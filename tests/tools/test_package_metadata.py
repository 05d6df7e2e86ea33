"""A distribution has the description and the metadata that a package index shows, and links that lead somewhere."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from setuptools.config.pyprojecttoml import load_file

import stgridpool_kernels
from tests.support.wheels import BUILT
from tools.long_description import long_description

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = load_file(ROOT / "pyproject.toml")["project"]
REPOSITORY: str = PROJECT["urls"]["Repository"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TAG = f"v{stgridpool_kernels.__version__}"
BUILD = """
import sys
from setuptools import build_meta
print("made:", getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def built(hook: str, tree: Path, folder: Path) -> Path:
    """Run a hook of the build backend in a tree, as pip does, and return what it makes in `folder`."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD, hook, str(folder)]
    environment["STGP_NO_EXT"] = "1"
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().rpartition("made: ")[2]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Message:
    """Return the metadata of a wheel of a source distribution of a copy of the tree."""
    folder = tmp_path_factory.mktemp("distribution")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*BUILT))
    archive = built("build_sdist", folder / "tree", folder / "dist")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    assert email.message_from_bytes((unpacked / "PKG-INFO").read_bytes())["Name"] == "stgridpool_kernels"
    about = built("prepare_metadata_for_build_wheel", unpacked, folder / "about")
    return email.message_from_string((about / "METADATA").read_text(encoding="utf-8"))


def targets(page: str) -> list[str]:
    """Return what the links and pictures of a page point to, those in HTML too, as a parser of Markdown sees them."""
    found = []

    def walk(tokens: Any) -> None:
        for token in tokens:
            found.extend(str(token.attrs[name]) for name in ("href", "src") if name in token.attrs)
            if token.type.startswith("html"):
                found.extend(re.findall(r'\b(?:href|src|srcset)="([^"]+)"', token.content))
            walk(token.children or ())

    walk(MarkdownIt("commonmark").enable("table").parse(page))
    return found


def code(page: str) -> list[str]:
    """Return the blocks of code of a page."""
    return [token.content for token in MarkdownIt("commonmark").parse(page) if token.type in ("fence", "code_block")]


def test_description_is_the_readme_with_links_that_lead_somewhere(metadata: Message) -> None:
    description = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert code(description) == code(README)
    pages, files = f"{REPOSITORY}/blob/{TAG}/", f"{REPOSITORY}/raw/{TAG}/"
    own = [link for link in targets(description) if link.startswith((pages, files))]
    assert own
    assert all(re.match("[a-z]+://", link) for link in targets(description))
    for link in own:
        path = re.sub("#.*", "", link.removeprefix(pages).removeprefix(files))
        assert (ROOT / path).exists()
        assert link.startswith(pages) or path.endswith((".png", ".svg"))
    without = description.replace(f"{pages}README.md#", "#").replace(pages, "").replace(files, "")
    assert without == README


def test_pictures_are_files_and_what_they_link_to_are_pages() -> None:
    page = "[![a picture\nin a link](docs/a.png)](docs/a.png 'title') ![another](./b.svg)"
    assert targets(long_description(page, "https://host/one", "2.0")) == [
        "https://host/one/blob/v2.0/docs/a.png",
        "https://host/one/raw/v2.0/docs/a.png",
        "https://host/one/raw/v2.0/b.svg",
    ]


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("[x](docs/y.md#z)", ["https://h/blob/v1/docs/y.md#z"]),
        ("[x](#z)", ["https://h/blob/v1/README.md#z"]),
        ("[x](<docs/y.md>)", ["https://h/blob/v1/docs/y.md"]),
        ("[x][1]\n\n[1]: docs/y.md\n", ["https://h/blob/v1/docs/y.md"]),
        ('<a href="y.md"><img alt="x" src="a.png"></a>', ["https://h/blob/v1/y.md", "https://h/raw/v1/a.png"]),
        ('<picture><source media="m" srcset="a.png"></picture>', ["https://h/raw/v1/a.png"]),
        ("one ` alone\n\n[x](y.md)\n\nanother `", ["https://h/blob/v1/y.md"]),
        (
            "[x](https://other/y.md) <https://other> [m](mailto:a@b)",
            ["https://other/y.md", "https://other", "mailto:a@b"],
        ),
    ],
)
def test_every_way_to_write_a_link(page: str, expected: list[str]) -> None:
    assert targets(long_description(page, "https://h", "1")) == expected


@pytest.mark.parametrize("page", ["```\n[x](y)\n```\n", "`[x](y)`", "``a ` [x](y)``", "`one\n[x](y)`"])
def test_code_stays_as_it_is(page: str) -> None:
    assert long_description(page, "https://h", "1") == page


def test_metadata_is_that_of_the_project(metadata: Message) -> None:
    assert metadata["Version"] == stgridpool_kernels.__version__
    assert metadata["Author"] == "The stgridpool_kernels authors"
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert urls == PROJECT["urls"]
    assert {"Repository", "Documentation", "Changelog", "Issues", "Paper"} <= urls.keys()
    assert all(
        url.startswith((f"{REPOSITORY}/", "https://arxiv.org/")) for name, url in urls.items() if name != "Repository"
    )


def test_the_address_of_the_repository_is_written_in_one_table() -> None:
    """Files that need the address read it there, so that a move of the repository changes one table."""
    mine = Path(__file__).resolve()
    tree = [ROOT / ".github", *(entry for entry in ROOT.iterdir() if not any(map(entry.match, BUILT)))]
    files = [file for entry in tree for file in (entry.rglob("*") if entry.is_dir() else [entry]) if file.is_file()]
    found = [file for file in files if file != mine and REPOSITORY.encode() in file.read_bytes()]
    assert found == [ROOT / "pyproject.toml"]
