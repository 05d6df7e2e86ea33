"""The benchmarks time vLLM's own pruning of tokens next to grid_pool, in vLLM's environment: make test-vllm.

The command runs from the checkout, as `make bench-pruning` runs it, on small tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it into an environment of its own")

from vllm.config.multimodal import VideoPruningMethod

CHECKOUT = Path(__file__).parents[2]
SHAPES = {"8x27x27x256:pruning": 8 * 13 * 13, "12x9x10x128:pruning:fp32:ceil": 12 * 5 * 5}
"""These are workloads of few tokens, and the number of tokens that grid_pool returns for each."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("benchmarks") / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--shape", *SHAPES, "-o", str(file)]
    done = subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in map(json.loads, file.read_text().splitlines()) if line["kind"] == "row"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_keeps_the_right_tokens_and_is_timed(rows: list[dict[str, Any]], shape: str) -> None:
    """All methods that vLLM has are there, and the rows have as many tokens as those of grid_pool."""
    found = {row["provider"]: row for row in rows if row["workload"] == shape and row["op"]}
    pooled = [name for name in found if name.startswith("grid_pool:")]
    assert pooled
    assert set(found) == {*pooled, *get_args(VideoPruningMethod)}
    assert {row["check"] for row in found.values()} == {"ok"}
    assert {row["settings"]["visual_tokens"] for row in found.values()} == {SHAPES[shape]}
    assert all(row["p50_us"] > 0 for row in found.values())
    assert {row["write_bytes"] for row in found.values()} == {found[pooled[0]]["write_bytes"]}
