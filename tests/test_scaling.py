"""docs/scaling.md: its Python runs, and examples/sharded.py under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.io.token_files import read_tokens, write_tokens

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_gcs_server_port_wait_time_s": "120",
}


def python(folder: Path, *arguments: str) -> str:
    """What a Python of its own prints: snippets leave a cluster or a process group behind."""
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_snippet_is_run() -> None:
    assert list(SNIPPETS) == ["dtensor", "extract", "step"]
    assert PAGE.count("```python") == len(SNIPPETS)


def test_dtensor(tmp_path: Path) -> None:
    start = "import torch.distributed as dist; dist.init_process_group('gloo', init_method='file://'"
    start += " + __import__('os').path.abspath('store'), rank=0, world_size=1)\n"
    end = "\nassert y.shape == (4, 64, 6, 6, 64) and y.placements == x.placements"
    end += "\nassert torch.equal(y.full_tensor(), stgp.grid_pool(x.full_tensor())); print('right', flush=True)"
    end += "\ndist.destroy_process_group(); __import__('os')._exit(0)  # as examples/sharded.py, which says why"
    assert python(tmp_path, "-c", start + SNIPPETS["dtensor"] + end) == "right\n"


def test_ray(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "pooled").mkdir()
    x = torch.randn(9, 4, 4, 8)
    write_tokens(tmp_path / "tokens" / "a.npy", x, force=False)
    # both on one cluster, which takes long to start
    start = "import os, ray; ray.init(include_dashboard=False)\n"
    move = "\nos.rename('pooled/a.safetensors', 'extracted.safetensors')\n"
    printed = python(tmp_path, "-c", start + SNIPPETS["extract"] + move + SNIPPETS["step"])
    assert "1 written, 0 there already\n{}\n{}\n" in printed
    assert "'state': 'written'" in printed
    for path in ("extracted.safetensors", "pooled/a.safetensors"):
        assert torch.equal(read_tokens(tmp_path / path), stgp.grid_pool(x, temperature=2.0))


def test_example(tmp_path: Path) -> None:
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = python(tmp_path, *run, str(ROOT / "examples" / "sharded.py"))
    for line, name in zip(printed.splitlines(), ("videos", "frames"), strict=True):
        assert line.startswith(f"sharded over {name}: ")
        assert line.endswith(", 0 collectives, equal to the result of one process")
