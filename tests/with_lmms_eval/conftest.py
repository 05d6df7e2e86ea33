"""These fixtures make the stub `llava`, a task, and models of few random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("lmms_eval") is not None:  # Without lmms-eval the tests are skipped.
    import llava_stub
    import tiny_checkpoints
    import tiny_task


@pytest.fixture(autouse=True)
def llava(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Install the stub as `llava`, and yield its own pooling, which must be in place again after the test."""
    llava_stub.install()
    llava_stub.loaded.clear()
    own = llava_stub.LlavaMetaForCausalLM.get_2dPool
    yield own
    assert llava_stub.LlavaMetaForCausalLM.get_2dPool is own


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_task.save(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    llava_stub.save(tmp_path / "llava-qwen")
    return str(tmp_path / "llava-qwen")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that returns the folder of a checkpoint for one of lmms-eval's models of transformers."""
    return functools.cache(lambda name: tiny_checkpoints.save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tiny_checkpoints.Request]:
    """Return a list of what models of transformers are asked during the test."""
    tiny_checkpoints.decode_by_pyav(monkeypatch)
    return tiny_checkpoints.recorded(monkeypatch)
