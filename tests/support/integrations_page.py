"""Snippets of docs/integrations.md, by the names in the comments before them, and a function that runs one."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def run(name: str, names: dict[str, object], *replaced: tuple[str, str]) -> None:
    """Run a snippet with the global variables `names`. replaced: (old, new) texts; old must occur in the snippet."""
    source = SNIPPETS[name]
    for old, new in replaced:
        assert old in source
        source = source.replace(old, new)
    exec(compile(source, f"docs/integrations.md: {name}", "exec"), names)
