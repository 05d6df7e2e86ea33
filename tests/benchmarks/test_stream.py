"""Every push of the providers of a stream is right, in every phase of a segment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import stgridpool_kernels as stgp
from benchmarks.provider import mismatch
from benchmarks.providers import providers
from benchmarks.stream import Pusher
from benchmarks.workloads import Workload, random_tokens

SMALL = Workload("small", (64,), (5, 7), 16, kind="stream")


@pytest.mark.needs("library")
@pytest.mark.parametrize("settings", [{}, {"output_size": (2, 3), "resize": "bilinear"}], ids=str)
def test_pushes_are_the_whole_video_bit_by_bit(settings: dict[str, object]) -> None:
    """Each push counts its share of the fewest bytes."""
    workload = replace(SMALL, **settings)
    x, bound = random_tokens(workload.shape, workload.dtype, "cpu", 0), workload.bound("grid_pool")
    pushes = [provider for provider in providers(workload, "cpu") if provider.op == "push"]
    assert [provider.name for provider in pushes] == [f"push:{size}:cpu" for size in ("1", "4", "32", "1x4")]
    for provider in pushes:
        frames, streams = provider.settings["frames"], provider.settings["streams"]
        assert mismatch(provider.checked(x), provider.definition(x), 0) is None
        assert (provider.state_bytes() > 0) == (provider.period > 1)
        assert provider.period * frames == 32
        assert provider.moved.total_bytes == pytest.approx(bound.total_bytes * frames * streams / 64, abs=1)


def test_each_stream_has_a_video_of_its_own() -> None:
    """The first of two streams gets the first frames of x and the second the next; x begins again after its end."""
    x = random_tokens(SMALL.shape, SMALL.dtype, "cpu", 0)
    pusher = Pusher(2, 2, {"backend": "reference"})
    videos = [torch.cat([x[start : start + 2] for start in range(first, 64, 4)]) for first in (0, 2)]
    first, second = (stgp.grid_pool(video, backend="reference") for video in videos)
    whole = pusher.whole(x)
    assert torch.equal(whole[8:12], torch.cat([first[4:6], second[4:6]]))
    assert torch.equal(pusher.push_all(x), whole)
    again = pusher.push(x)
    assert (len(again), pusher.start) == (4, 4)


def test_other_videos_are_refused() -> None:
    for workload in (replace(SMALL, frame_counts=(33,)), replace(SMALL, frame_counts=(32, 32), batch=2)):
        with pytest.raises(ValueError, match="one video of a multiple of 32 frames, got small"):
            providers(workload, "cpu")
