"""The snippets of docs/integrations.md, by the name in the comment before each."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def run(name: str, names: dict[str, object], *replaced: tuple[str, str]) -> None:
    """Runs a snippet in `names`, with every (old, new) of `replaced` exchanged, which must be there."""
    source = SNIPPETS[name]
    for old, new in replaced:
        assert old in source
        source = source.replace(old, new)
    exec(compile(source, f"docs/integrations.md: {name}", "exec"), names)
