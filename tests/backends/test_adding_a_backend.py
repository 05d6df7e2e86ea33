"""The steps in CONTRIBUTING.md for a new backend, done on a copy of the tree; the backend then passes the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def steps() -> dict[str, str]:
    """The code of the section, by the file that its first line names."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a backend\n")[2].partition("\n## ")[0]
    blocks = (textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    return {name.removeprefix("# "): code for name, code in (block.split("\n", 1) for block in blocks)}


def test_the_steps_as_they_stand(tmp_path: Path) -> None:
    for folder in ("stgridpool_kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "with_*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    written, (choice, places) = (lambda new, *changed: (new, changed))(*steps().items())
    (tmp_path / written[0]).write_text(written[1])
    for (name, code), beginning in ((choice, "BACKENDS"), (places, "PLACES")):
        file = tmp_path / name
        lines = re.compile(rf"^{beginning}: .*?(?:\]|\n\}})\n", re.MULTILINE | re.DOTALL)
        changed, count = lines.subn(lambda _, code=code: code, file.read_text())
        assert count == 1
        file.write_text(changed)
    tests = ["tests/backends/test_backends.py", "tests/backends/test_backward.py"]
    selected = "eager and (golden or float32 and gradient) and not random"
    command = [sys.executable, "-m", "pytest", "-q", *tests, "-k", selected]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20
