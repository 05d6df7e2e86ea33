"""The microbenchmarks: they run, are right, are grouped by workload, and two runs can be compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]


def micro(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", "8x27x27x896 and (avg_pool2d or naive_norm_pool)", f"--benchmark-storage={folder}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_runs_can_be_compared(tmp_path: Path) -> None:
    micro(tmp_path, "--benchmark-save=first")
    (kept,) = tmp_path.rglob("*first.json")
    found = {each["name"]: each for each in json.loads(kept.read_text())["benchmarks"]}
    assert set(found) == {
        f"test_provider[8x27x27x896-{name}]" for name in ("avg_pool2d", "adaptive_avg_pool2d", "naive_norm_pool")
    }
    bound = WORKLOADS["8x27x27x896"].bound("norm_pool")
    for each in found.values():
        assert each["group"] == "8x27x27x896"
        assert each["extra_info"] == {"read_bytes": bound.read_bytes, "write_bytes": bound.write_bytes}
        assert each["stats"]["rounds"] >= 3
    text = micro(tmp_path, "--benchmark-compare")
    assert "test_provider[8x27x27x896-avg_pool2d] (NOW)" in text
    assert "test_provider[8x27x27x896-avg_pool2d] (0001" in text
