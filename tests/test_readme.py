"""The README and the pages that a new user reads are right: Python runs, the table is the schema, commands exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

from stgridpool_kernels.cli.main import build_parser, main
from tests.support.pages import COMMAND_LINE, GET_STARTED, TEMPERATURE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {"README.md": README} | {page.name: page.text for page in (GET_STARTED, COMMAND_LINE, TEMPERATURE)}
COMMANDS = [
    (name, command) for name, text in TEXTS.items() for command in re.findall(r"^stgp ([^#\n]+)", text, re.MULTILINE)
]
MOST_LINES = 130
"""Maximum number of lines of the README, whose reader decides on it in a minute."""


def run_by_line(snippet: str, names: dict[str, object]) -> None:
    """Run the lines of a snippet one by one, and compare shapes with those that comments name."""
    for line in snippet.splitlines():
        exec(line, names)
        shape = re.search(r"# \((\d+), (\d+), (\d+), (\d+)\)", line)
        if shape:
            assert names["y"].shape == tuple(map(int, shape.groups()))
        grid = re.search(r"27 × 27 → (\d+) × (\d+)", line)
        if grid:
            assert names["y"].shape[1:3] == tuple(map(int, grid.groups()))
        flat = re.search(r"→ \(ΣF, (\d+), (\d+)\)", line)
        if flat:
            assert names["y"].shape[1:] == tuple(map(int, flat.groups()))
    assert names["grid"].shape == names["x"].shape
    assert names["norms"].shape == names["x"].shape[:-1]


def test_python_of_the_readme_runs() -> None:
    *blocks, engine = sorted(re.findall(r"```python\n(.*?)```", README, re.DOTALL), key=lambda block: "patch(" in block)
    assert len(blocks) == 2
    page = (ROOT / "docs" / "integrations" / "transformers.md").read_text(encoding="utf-8")
    assert all(line.split("  #")[0].split("(")[0] in page for line in engine.splitlines())
    run_by_line("".join(blocks), {})


def test_python_of_get_started_runs() -> None:
    assert list(GET_STARTED.snippets) == ["first", "more", "gpu"]
    assert GET_STARTED.text.count("```python") == 3
    names: dict[str, object] = {}
    run_by_line(GET_STARTED.snippets["first"] + GET_STARTED.snippets["more"], names)
    for dtype, stated in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)):
        exec(
            GET_STARTED.snippets["gpu"].replace("print(", "error = ("), names | {"x": names["x"].to(dtype)}, found := {}
        )
        assert found["error"] < stated


def test_python_of_the_home_page_is_that_of_the_readme() -> None:
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", home, re.DOTALL)
    assert [line.split("  #")[0] for line in snippet.splitlines()] == [
        line.split("  #")[0] for line in re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0].splitlines()
    ]


def test_advice_on_a_temperature_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page shows the last lines of the command for the packaged tokens, which its snippet saves."""
    monkeypatch.chdir(tmp_path)
    TEMPERATURE.run("tokens", {})
    command, *_ = re.findall(r"^stgp ([^#\n]+)", TEMPERATURE.text, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    (advice,) = re.findall(r"<!-- printed -->\n```\n(.*?)```", TEMPERATURE.text, re.DOTALL)
    assert " ".join(advice.split()) in " ".join(capsys.readouterr().out.split())


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_table_of_arguments_is_the_schema() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ", GET_STARTED.text, re.MULTILINE)
    schema = torch.ops.stgp.grid_pool.default._schema
    arguments = {argument.name: argument.default_value for argument in schema.arguments if argument.kwarg_only}
    assert {name: ast.literal_eval(default) for name, default in rows} == arguments


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_understood(page: str, command: str) -> None:
    build_parser().parse_args(shlex.split(command))


def test_every_command_is_shown() -> None:
    shown = {command.split()[0] for page, command in COMMANDS if page == COMMAND_LINE.name}
    assert shown == {"info", "pool", "inspect", "demo", "bench"}
    assert {page for page, _ in COMMANDS} == set(TEXTS)
