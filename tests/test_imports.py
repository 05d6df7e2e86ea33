"""Imports run one way: from a higher floor of the package to a lower one, without circles, inside functions too."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "stgridpool_kernels"
FLOORS = [
    ("version", "namespace", "once", "plan", "io.writing"),
    ("backends",),
    ("ops",),
    ("dtensor",),
    ("arguments", "functional"),
    ("flat", "stream", "stream_state"),
    ("",),
    ("io",),
    ("integrations",),
    ("cli", "__main__"),
]
"""These are the parts of the package from the ground up, by their names in it; "" is the package's own file."""


def module_name(path: Path) -> str:
    """Return the dotted name of a file below the root."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (ROOT / PACKAGE).rglob("*.py")}


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node but those that are there for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from nodes_that_run(node)


@cache
def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports: modules of the package, else the modules that names are in."""
    name = module_name(path)
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes_that_run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(folder.split(".")[: len(folder.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            members = {f"{module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else module for member in members}
    return found


def floor(module: str) -> int:
    """Return the floor of the longest part that the module belongs to."""
    inside = module.removeprefix(PACKAGE).removeprefix(".")
    parts = [
        (len(part), number)
        for number, level in enumerate(FLOORS)
        for part in level
        if f"{inside}.".startswith(f"{part}.")
    ]
    return max(parts)[1] if parts else FLOORS.index(("",))


def test_every_module_has_a_floor() -> None:
    tops = {module.split(".")[1] for module in MODULES if module != PACKAGE}
    assert tops == {part.split(".")[0] for level in FLOORS for part in level if part}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_goes_up(module: str) -> None:
    wanted = {name for name in imported(MODULES[module]) if name.split(".")[0] == PACKAGE}
    assert {name for name in wanted if floor(name) > floor(module)} == set()


def test_no_circles() -> None:
    graph = {module: (imported(path) & MODULES.keys()) - {module} for module, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


AGAIN = """
import importlib, sys, torch
import stgridpool_kernels as stgp
import stgridpool_kernels.dtensor
x = torch.randn(16, 4, 4, 8, requires_grad=True)

def again(load, *arguments):
    try:
        load(*arguments)
    except ImportError as error:
        assert "already loaded in this process" in str(error), error
        assert "restart the process" in str(error)
        return True
    return False

def purge():
    for name in [name for name in sys.modules if name.split(".")[0] == "stgridpool_kernels"]:
        del sys.modules[name]
    importlib.import_module("stgridpool_kernels")

names = [name for name in sys.modules if name.split(".")[0] == "stgridpool_kernels"]
print(*(name for name in names if again(importlib.reload, sys.modules[name])))
print(again(purge), again(purge))
stgp.grid_pool(x).sum().backward()
stgp.grid_pool(x.detach(), backend="reference")
"""


def test_a_second_load_in_a_process_is_refused_and_the_first_goes_on() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # the Triton kernels are imported when they are first used
    done = subprocess.run([sys.executable, "-c", AGAIN], check=True, capture_output=True, text=True, env=environment)
    refused, purged = done.stdout.splitlines()
    assert {*refused.split()} == {f"{PACKAGE}.{name}" for name in ("backends.compiled", "ops", "dtensor")}
    assert purged == "True True"


def test_files_are_read_by_the_command_line_and_one_integration() -> None:
    readers = {
        module
        for module, path in MODULES.items()
        if floor(module) == floor(f"{PACKAGE}.integrations") and any(".io" in name for name in imported(path))
    }
    assert readers <= {f"{PACKAGE}.integrations.ray"}


def test_ops_that_a_backend_calls_are_declared_beside_it() -> None:
    """A backend that called an op of ops.py would know at run time what is above it."""
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if floor(module) < floor(f"{PACKAGE}.ops"):
            assert set(re.findall(r"\bOPS\.(\w+)", text)) <= set(re.findall(r'"(_\w+)\(Tensor', text))


def test_tests_import_no_benchmarks_and_no_tools() -> None:
    """Tests of benchmarks and of tools import what they test."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] not in ("benchmarks", "tools"):
            tops = {name.split(".")[0] for name in imported(path)}
            assert not tops & {"benchmarks", "tools"}, path
