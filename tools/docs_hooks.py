"""Functions that MkDocs calls while it makes the site of docs/, and a class that reads docstrings for it.

They give the site the address of the repository, which stands in pyproject.toml, pages that are files at the root of
the repository, and the changes of docs_text.py.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import griffe
import tomllib
from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.docs_text import ROOT, ROOT_PAGES, anchor, deep_lists, docstring_markdown, site_links, source_of, structure

logger = logging.getLogger("mkdocs.hooks.docs")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url = project["urls"]["Repository"].rstrip("/")
    config.repo_name = "/".join(config.repo_url.split("/")[-2:])
    config.site_description = project["description"]
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, file in ROOT_PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    name, repository = page.file.src_uri, str(config.repo_url)
    page.edit_url = f"{repository}/edit/main/{source_of(name)}"
    return deep_lists(site_links(markdown, name, repository))


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Warn, which ends the build, of a page that Python-Markdown reads in another way than the repository shows it."""
    text = page.file.content_string
    if not re.search("^:::", text, re.MULTILINE):
        shown, made = structure(MarkdownIt("commonmark").enable("table").render(text)), structure(html)
        if differing := {name: (shown[name], made[name]) for name in shown | made if shown[name] != made[name]}:
            logger.warning(f"{page.file.src_uri}: numbers of elements in the repository and on the site: {differing}")
    return html


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, for the API reference."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = docstring_markdown(obj.docstring.value)
