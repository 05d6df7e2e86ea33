"""These fixtures are for tests in an environment with vLLM, which `make test-vllm` runs.

Engines run in processes of their own, engine.py. The package is found on PYTHONPATH, as it is installed there, so that
an engine can be run without it too; the models that tests share with others are found in the checkout.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it into an environment of its own")
sys.path.append(str(Path(__file__).parents[2]))  # at the end, where the installed package is found first

from runner import Runner


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder where vLLM keeps what it found out about models, which is not the user's."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="session")
def settings(caches: Path) -> dict[str, str]:
    """Return the environment of an engine: no network, little memory, and one process unless a test asks for three."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(caches),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


@pytest.fixture(scope="session")
def runner(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(settings, tmp_path_factory.mktemp("engines"))
