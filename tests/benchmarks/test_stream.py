"""Providers of a stream: every push is right, in every phase of a segment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import stgridpool_kernels as stgp
from benchmarks.provider import Provider, mismatch
from benchmarks.providers import providers
from benchmarks.stream import Pusher
from benchmarks.workloads import Workload, random_tokens
from stgridpool_kernels.backends import compiled

SMALL = Workload("small", (64,), (5, 7), 16, kind="stream")
BACKENDS = ["cpu"] if compiled.LIBRARY is not None else []


def pushes(workload: Workload) -> list[Provider]:
    return [provider for provider in providers(workload, "cpu") if provider.op == "push"]


@pytest.mark.parametrize("settings", [{}, {"output_size": (2, 3)}, {"resize": "bilinear"}], ids=str)
def test_pushes_are_the_whole_video_bit_by_bit(settings: dict[str, object]) -> None:
    workload = replace(SMALL, **settings)
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    names = [f"push:{size}:{backend}" for backend in BACKENDS for size in ("1", "4", "32", "1x4")]
    assert [provider.name for provider in pushes(workload)] == names
    for provider in pushes(workload):
        assert provider.checked is not None
        assert mismatch(provider.checked(x), provider.definition(x), 0) is None
        assert provider.state_bytes is not None
        assert (provider.state_bytes() > 0) == (provider.period > 1)
        assert provider.period * provider.settings["frames"] == 32


def test_each_stream_has_a_video_of_its_own() -> None:
    """The first of two gets the first frames of x, the second the next ones; behind the last comes the first again."""
    x = random_tokens(SMALL.shape, SMALL.dtype, "cpu", 0)
    pusher = Pusher(2, 2, {"backend": "reference"})
    videos = [torch.cat([x[start : start + 2] for start in range(first, 64, 4)]) for first in (0, 2)]
    first, second = (stgp.grid_pool(video, backend="reference") for video in videos)
    whole = pusher.whole(x)
    assert torch.equal(whole[8:12], torch.cat([first[4:6], second[4:6]]))
    assert torch.equal(pusher.push_all(x), whole)
    again = pusher.push(x)
    assert (len(again), pusher.start) == (4, 4)


def test_bytes_are_shared_out() -> None:
    bound = SMALL.bound("grid_pool")
    for provider in pushes(SMALL):
        share = provider.settings["frames"] * provider.settings["streams"] / 64
        assert provider.moved is not None
        assert provider.moved.total_bytes == pytest.approx(bound.total_bytes * share, abs=1)


def test_other_videos_are_refused() -> None:
    for workload in (replace(SMALL, frame_counts=(33,)), replace(SMALL, frame_counts=(32, 32), batch=2)):
        with pytest.raises(ValueError, match="one video of a multiple of 32 frames, got small"):
            providers(workload, "cpu")
