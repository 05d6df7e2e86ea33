"""Load plugins as a process of SGLang does first, with SGLang's own loader as published: python start.py.

Print what was hooked, and the options that the hooks have. The classes that are hooked are those of published.py: the
module that they come from imports what is for a GPU.
"""

from __future__ import annotations

import sys

import published
import pytest

with pytest.MonkeyPatch.context() as patch:
    published.publish(patch)
    registry = sys.modules["sglang.srt.plugins.hook_registry"].HookRegistry
    published.load("environ.py", "sglang.srt.environ")
    plugins = published.load("plugins/__init__.py", "sglang.srt.plugins")
    plugins.load_plugins()
    print(sorted(name.rpartition(".")[2] for name in registry._patched))
    print([hook.__self__.options for hooks in registry._hooks.values() for _, hook, _ in hooks][:1])
