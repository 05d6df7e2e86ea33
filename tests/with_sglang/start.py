"""Load plugins as a process of SGLang does first, with SGLang's own loader: python start.py.

Print what was hooked, and the options that the hooks of Qwen-VL have.
"""

from __future__ import annotations

from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

load_plugins()
print(sorted(HookRegistry._patched))
print(*{hook.__self__.options for name, hooks in HookRegistry._hooks.items() for _, hook, _ in hooks if "Qwen" in name})
