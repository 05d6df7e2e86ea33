"""These fixtures are for tests on SGLang as it is published, whose modules can be imported without a GPU.

Tests are skipped where SGLang is not installed; `make test-sglang` installs it into an environment of its own.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from stgridpool_kernels.integrations import sglang, sglang_llava, sglang_qwen_vl

try:
    metadata.version("sglang")
except metadata.PackageNotFoundError:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]

Switch = Callable[[str], None]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Switch]:
    """Return a function that puts the hooks in force for a text of STGP_SGLANG, in place of those in force before.

    SGLang's own registry does so, as in every process of an engine. The hooks are removed when the test ends, and where
    the text is empty.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    stock = {}
    for path in (*sglang_llava.SIGNATURES, *sglang_qwen_vl.SIGNATURES):
        owner, _, name = path.rpartition(".")
        cls = pkgutil.resolve_name(owner)
        stock[cls, name] = vars(cls).get(name)

    def put(text: str) -> None:
        for (cls, name), method in stock.items():
            if method is not None:
                setattr(cls, name, method)
            elif name in vars(cls):
                delattr(cls, name)  # Without hooks the class inherits this method.
        HookRegistry.reset()
        if text:
            monkeypatch.setenv("STGP_SGLANG", text)
            sglang.register()
            HookRegistry.apply_hooks()
            assert len(HookRegistry._patched) == len(stock)

    yield put
    put("")
