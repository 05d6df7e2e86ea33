"""Workflows, forms, hooks, the citation and the promises of SECURITY.md are true of the tree.

`make check-meta` asks the tools of others whether these files have the right form. Here nothing but the tree is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from setuptools.config.pyprojecttoml import load_file

import stgridpool_kernels

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = load_file(ROOT / "pyproject.toml")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
PREFIX = "Programming Language :: Python :: 3."
PYTHONS = {
    f"3.{name.removeprefix(PREFIX)}" for name in SETTINGS["project"]["classifiers"] if re.match(rf"{PREFIX}\d", name)
}


def parsed(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def jobs(workflow: Path) -> dict[str, Any]:
    return dict(parsed(workflow)["jobs"])


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(workflow).values() for step in job["steps"]]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_all_files_are_read() -> None:
    assert {path.name for path in WORKFLOWS} >= {"ci.yml", "wheels.yml"}
    assert {path.name for path in FILES} >= {"bug.yml", "feature.yml", "config.yml", "dependabot.yml", "CITATION.cff"}


@pytest.mark.parametrize("file", FILES, ids=named)
def test_files_are_yaml(file: Path) -> None:
    assert isinstance(parsed(file), dict)


# ---- workflows ----


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=named)
def test_workflows_have_no_rights_and_end(workflow: Path) -> None:
    """A workflow reads the repository and does no more; one that hangs is ended, and a newer push replaces an older."""
    content = parsed(workflow)
    assert content["permissions"] == {"contents": "read"}
    assert content["concurrency"]["group"] == "${{ github.workflow }}-${{ github.ref }}"
    for job in content["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert "permissions" not in job
    for step in steps(workflow):
        action = step.get("uses", "actions/none@v0")
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", action)  # of GitHub itself, at a major version
        if action.startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        if action.startswith("actions/setup-python@"):
            assert step["with"]["cache"] == "pip"
            assert [*ROOT.glob(step["with"]["cache-dependency-path"])]


@pytest.mark.parametrize("file", [*FILES, ROOT / ".github/pull_request_template.md"], ids=named)
def test_commands_exist(file: Path) -> None:
    """Every `make …` that is named is a target, and every list of packages and module of tools is there."""
    text = file.read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^([a-z][\w -]*):", MAKEFILE, re.MULTILINE) for name in line.split()}
    assert {*re.findall(r"(?:`|run: )make ([a-z-]+)", text)} <= targets
    for path in re.findall(r"\btools/requirements/\w+\.txt", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (tools\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_continuous_integration_runs_what_a_checkout_runs() -> None:
    own = re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    run = [step["run"] for step in steps(ROOT / ".github/workflows/ci.yml") if "run" in step]
    assert own == ["make lint", "make test"]
    assert set(own) <= set(run)


def test_every_python_that_is_claimed_is_tested_and_gets_a_wheel() -> None:
    matrix = jobs(ROOT / ".github/workflows/ci.yml")["test"]["strategy"]["matrix"]["python-version"]
    assert set(matrix) == PYTHONS
    assert SETTINGS["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in matrix]
    allowed = SpecifierSet(SETTINGS["project"]["requires-python"])
    assert all(version in allowed for version in PYTHONS)
    assert not allowed.contains(f"3.{min(int(version[2:]) for version in PYTHONS) - 1}")
    settings = [step.get("with", {}) for workflow in WORKFLOWS for step in steps(workflow)]
    others = {setting["python-version"] for setting in settings if "python-version" in setting}
    assert others - {"${{ matrix.python-version }}"} <= PYTHONS


# ---- hooks ----


def test_hooks_are_the_commands_of_make_lint() -> None:
    [recipe] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    commands = [line.strip().replace("$(VENV)", ".venv").removesuffix(" $(CPP)") for line in recipe.splitlines()]
    [repository] = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_hooks_look_at_the_files_of_make_lint() -> None:
    [patterns] = re.findall(r"^CPP := \$\(wildcard (.*)\)$", MAKEFILE, re.MULTILINE)
    listed = {named(file) for pattern in patterns.split() for file in ROOT.glob(pattern) if file.is_file()}
    *whole, formatted = parsed(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    tree = {named(file) for folder in ("csrc", "tests", "tools", "examples") for file in (ROOT / folder).rglob("*.*")}
    assert {file for file in tree if re.search(formatted["files"], file) and "__pycache__" not in file} == listed
    for hook in whole:
        assert hook["pass_filenames"] is False
        assert all(re.search(hook["files"], file) for file in ("setup.py", "pyproject.toml", named(Path(__file__))))


# ---- citation ----


def test_citation_is_of_this_version() -> None:
    citation, project = parsed(ROOT / "CITATION.cff"), SETTINGS["project"]
    assert citation["version"] == stgridpool_kernels.__version__
    assert citation["title"] == project["name"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["preferred-citation"]["url"] == project["urls"]["Paper"]


def test_both_forms_of_the_citation_and_the_readme_name_the_same_paper() -> None:
    paper = parsed(ROOT / "CITATION.cff")["preferred-citation"]
    bibtex = dict(re.findall(r"^  (\w+) *= \{(.*)\}", (ROOT / "CITATION.bib").read_text(), re.MULTILINE))
    authors = [(person["given-names"], person["family-names"]) for person in paper["authors"]]
    assert bibtex["title"] == paper["title"]
    assert bibtex["author"] == " and ".join(f"{family}, {given}" for given, family in authors)
    assert bibtex["booktitle"] == paper["collection-title"]
    assert int(bibtex["year"]) == paper["year"]
    assert paper["url"].endswith(f"/{bibtex['eprint']}")
    assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{bibtex['eprint']}"}]
    credits = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert ", ".join(f"{given} {family}" for given, family in authors) in credits
    for words in (paper["title"], paper["conference"]["name"], f"arXiv {bibtex['eprint']}"):
        assert words in credits


# ---- promises ----

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
[PROMISED] = re.findall(r"^## What is promised\n(.*?)^## ", SECURITY, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("promise", re.findall(r"^- \*\*.*?(?=^- |\Z)", PROMISED, re.DOTALL | re.MULTILINE))
def test_every_promise_names_tests_that_exist(promise: str) -> None:
    tests = re.findall(r"`(test_\w+)`", promise)
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"\]\((tests/[^)]+)\)", promise))
    assert tests
    for test in tests:
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), test


def test_the_form_for_bugs_asks_for_what_is_needed() -> None:
    body = parsed(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"]
    required = {field["id"] for field in body if field.get("validations", {}).get("required")}
    assert required == {"what", "reproduction", "info", "engine"}
    [engines] = [field["attributes"]["options"] for field in body if field.get("id") == "engine"]
    pages = {file.stem.replace("_", "-") for file in (ROOT / "docs/integrations").glob("*.md")}
    assert pages - {"README", "other-engines", "hf-kernels"} <= {name.lower() for name in engines}
