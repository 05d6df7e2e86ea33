"""This integration into SGLang uses hooks of its plugin system, for models of the LLaVA and of the Qwen-VL family.

It is off unless the environment variable STGP_SGLANG is set when the engine starts: to `on`, or to options as in
`STGP_SGLANG=mode=grid,frame_strides=2:4:8`. A mode and options mean what they mean for `qwen_vl.patch`; models of the
LLaVA family, which pool by themselves, take mode "pool" alone. `sglang_llava` and `sglang_qwen_vl` have the hooks.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from . import sglang_llava, sglang_qwen_vl
from .base import require
from .modes import ModeOptions, mode_options
from .options import read_options

_VARIABLE = "STGP_SGLANG"
_REGISTRY = "sglang.srt.plugins.hook_registry"

TESTED: dict[str, Any] = {
    "package": "sglang",
    "at_least": "0.5.23",
    "below": "0.5.24",
    "signatures": {
        **sglang_llava.SIGNATURES,
        **sglang_qwen_vl.SIGNATURES,
        **sglang_qwen_vl.CALLED,
        f"{_REGISTRY}:HookRegistry.register": "target, hook, hook_type, ...",
    },
}
"""This integration calls `require` with these arguments."""


def register() -> None:
    """Register the hooks if STGP_SGLANG is set.

    SGLang finds this function in the entry point group `sglang.srt.plugins`.

    Raises SystemExit if the options are wrong or SGLang has a version that `require` refuses, since the engine would
    log any other exception and continue without the plugin.
    """
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return
    try:
        require(**TESTED)
        options = switched_options(text)
    except (ImportError, RuntimeError, TypeError, ValueError, UserWarning) as error:
        raise SystemExit(f"stgridpool_kernels: {_VARIABLE}={text}: {error}") from None
    registry = importlib.import_module(_REGISTRY)
    for hooks in (sglang_llava.Hooks(options), sglang_qwen_vl.Hooks(options)):
        for path, hook in hooks.targets().items():
            registry.HookRegistry.register(path.replace(":", "."), hook, registry.HookType.AROUND)


def switched_options(text: str) -> ModeOptions:
    """Return the mode and the options in the text of STGP_SGLANG, which is `on` or the input of `read_options`.

    The text may have an entry `mode`, which is "pool" by default. Raises as `read_options` and `mode_options`.
    """
    options = read_options("" if text == "on" else text, words=("mode",))
    return mode_options(options.pop("mode", "pool"), **options)
