"""The picture of the kernels is drawn, from what a prepared call would launch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tools import kernel_picture
from tools.kernel_picture import PLAN, STEP, Work

pytest.importorskip("triton", reason="no Triton")


def test_picture_is_a_small_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kernel_picture.main(["-o", str(tmp_path / "kernels.png")])
    png = (tmp_path / "kernels.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 1500
    assert len(png) < 300_000


def test_launches_in_the_picture() -> None:
    """Every frame is pooled by one launch, and every miniature that is needed is stored by one."""
    work = Work(PLAN)
    entries = [entry for launch in work.launches for entry in launch.entries]
    assert Counter(entry.frame for entry in entries if entry.pooled) == Counter(range(32))
    assert Counter(entry.content for entry in entries if entry.shrunk) == Counter(work.needed.keys())
    assert all(entry.content in work.schedule.final for entry in entries if entry.pooled)


def test_step_in_the_picture() -> None:
    """Its window is part of its cell, which shares a column with either neighbour."""
    i, j = STEP
    work = Work(PLAN)
    assert work.window(i, j) == {(4, 4), (4, 5), (5, 4), (5, 5)}
    assert work.cell(i, j) == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}
    assert work.cell(i, j) & work.cell(i, j - 1) == {(3, 3), (4, 3), (5, 3)}
