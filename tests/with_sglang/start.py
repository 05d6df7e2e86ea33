"""This script loads plugins by SGLang's own loader, as every process of SGLang does first.

It prints which methods have hooks, and the options of the hooks for Qwen-VL.
"""

from __future__ import annotations

from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

load_plugins()
print(sorted(HookRegistry._patched))
print(*{hook.__self__.options for name, hooks in HookRegistry._hooks.items() for _, hook, _ in hooks if "Qwen" in name})
