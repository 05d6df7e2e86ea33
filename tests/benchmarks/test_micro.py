"""The microbenchmarks run, are grouped by workload, and can be compared with an earlier run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.workloads import WORKLOADS

WORKLOAD = "8x27x27x896"


@pytest.mark.slow
def test_two_runs_can_be_compared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", f"{WORKLOAD} and (avg_pool2d or naive_norm_pool)", f"--benchmark-storage={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    for more in ("--benchmark-save=first", "--benchmark-compare"):
        done = subprocess.run(
            [*command, more], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"test_provider[{WORKLOAD}-avg_pool2d] (NOW)" in done.stdout
    assert f"test_provider[{WORKLOAD}-avg_pool2d] (0001" in done.stdout
    (kept,) = tmp_path.rglob("*first.json")
    found = json.loads(kept.read_text())["benchmarks"]
    timed = ("avg_pool2d:out", "avg_pool2d", "adaptive_avg_pool2d", "naive_norm_pool")
    names = {f"test_provider[{WORKLOAD}-{name}]" for name in timed}
    assert {each["name"] for each in found} == names
    bound = WORKLOADS[WORKLOAD].bound("norm_pool")
    for each in found:
        assert each["group"] == WORKLOAD
        assert each["extra_info"] == {"read_bytes": bound.read_bytes, "write_bytes": bound.write_bytes}
