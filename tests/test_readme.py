"""The README is right: its Python runs, its table is the schema, its commands exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

import stgridpool_kernels  # noqa: F401  # registers the ops
from stgridpool_kernels.cli.main import build_parser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^stgp ([^#\n]+)", README, re.MULTILINE)


def test_python_runs_and_shapes_are_as_commented():
    *blocks, engine = sorted(re.findall(r"```python\n(.*?)```", README, re.DOTALL), key=lambda block: "patch(" in block)
    assert len(blocks) == 2
    page = (Path(__file__).parents[1] / "docs" / "integrations" / "transformers.md").read_text(encoding="utf-8")
    assert all(line.split("  #")[0].split("(")[0] in page for line in engine.splitlines())
    names: dict[str, object] = {}
    for line in "".join(blocks).splitlines():
        exec(line, names)
        shape = re.search(r"# \((\d+), (\d+), (\d+), (\d+)\)", line)
        if shape:
            assert names["y"].shape == tuple(map(int, shape.groups()))
        grid = re.search(r"27 × 27 → (\d+) × (\d+)", line)
        if grid:
            assert names["y"].shape[1:3] == tuple(map(int, grid.groups()))
    assert names["grid"].shape == names["x"].shape
    assert names["norms"].shape == names["x"].shape[:-1]


def test_table_of_arguments_is_the_schema():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ", README, re.MULTILINE)
    schema = torch.ops.stgp.grid_pool.default._schema
    arguments = {argument.name: argument.default_value for argument in schema.arguments if argument.kwarg_only}
    assert {name: ast.literal_eval(default) for name, default in rows} == arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    build_parser().parse_args(shlex.split(command))


def test_every_command_is_shown():
    assert {command.split()[0] for command in COMMANDS} == {"info", "pool", "inspect", "demo", "bench"}
