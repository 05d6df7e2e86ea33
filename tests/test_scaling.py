"""The Python of docs/scaling.md runs, and so does examples/sharded.py under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.pages import SCALING

ROOT = Path(__file__).parents[1]


def python(folder: Path, *arguments: str) -> str:
    """Return what a process of its own prints, because examples leave a process group behind."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))  # torch 2.10 tells of its connections


def test_every_snippet_is_run() -> None:
    """This file runs the snippet on DTensors, and tests/integrations/test_ray.py the two on Ray."""
    assert list(SCALING.snippets) == ["dtensor", "extract", "step"]
    assert SCALING.text.count("```python") == len(SCALING.snippets)


def test_dtensor(tmp_path: Path) -> None:
    start = "import torch.distributed as dist; dist.init_process_group('gloo', init_method='file://'"
    start += " + __import__('os').path.abspath('store'), rank=0, world_size=1)\n"
    end = "\nassert y.shape == (4, 64, 6, 6, 64) and y.placements == x.placements"
    end += "\nassert torch.equal(y.full_tensor(), stgp.grid_pool(x.full_tensor())); print('right', flush=True)"
    end += "\ndist.destroy_process_group(); __import__('os')._exit(0)  # as examples/sharded.py, which says why"
    assert python(tmp_path, "-c", start + SCALING.snippets["dtensor"] + end) == "right\n"


def test_example(tmp_path: Path) -> None:
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = python(tmp_path, *run, str(ROOT / "examples" / "sharded.py"))
    for line, name in zip(printed.splitlines(), ("videos", "frames"), strict=True):
        assert line.startswith(f"sharded over {name}: ")
        assert line.endswith(", 0 collectives, equal to the result of one process")
