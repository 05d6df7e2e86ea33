"""Pages of docs/, whose snippets are named by the comments before them, `<!-- run: name -->`, and run in tests."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs"


class Page:
    """The text of a page and its snippets by name, in the order of the page."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (FOLDER / name).read_text(encoding="utf-8")
        self.snippets = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", self.text, re.DOTALL))

    def run(self, snippet: str, names: dict[str, object], *replaced: tuple[str, str]) -> None:
        """Run a snippet with the global variables `names`. replaced: (old, new) texts; the snippet must contain old."""
        source = self.snippets[snippet]
        for old, new in replaced:
            assert old in source
            source = source.replace(old, new)
        exec(compile(source, f"docs/{self.name}: {snippet}", "exec"), names)


INTEGRATIONS, HF_KERNELS = Page("integrations/README.md"), Page("integrations/hf_kernels.md")
ENGINES = TRANSFORMERS, LLAVA_NEXT, VLLM, SGLANG, LMMS_EVAL, OTHER_ENGINES = tuple(
    Page(f"integrations/{name}.md")
    for name in ("transformers", "llava_next", "vllm", "sglang", "lmms_eval", "other_engines")
)
SCALING, STREAMING = Page("scaling.md"), Page("streaming.md")
GET_STARTED, METHOD, TEMPERATURE, COMMAND_LINE = (
    Page(f"{name}.md") for name in ("get-started", "method", "temperature", "command-line")
)
