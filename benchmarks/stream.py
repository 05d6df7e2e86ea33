"""Providers of a stream: pushes of chunks of frames, next to grid_pool of the whole video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.lower_bound import Traffic
from benchmarks.poolings import backends, our_ops
from benchmarks.provider import SEGMENT, Provider
from benchmarks.workloads import Workload
from stgridpool_kernels import GridPoolStream, grid_pool

PUSHES = ((1, 1), (4, 1), (32, 1), (1, 4))
"""Kinds of pushes: number of frames for each stream, and number of streams."""


def pushes(workload: Workload, device: str) -> list[Provider]:
    """Return providers of every kind of push, and of the op on the whole video, on a device ("cpu" or "cuda").

    Raises ValueError unless the workload is one video of whole segments.
    """
    w = workload
    if w.batch is not None or len(w.frame_counts) > 1 or w.frames % SEGMENT:
        raise ValueError(f"a stream is timed on one video of a multiple of {SEGMENT} frames, got {w.name}")
    found = [provider for provider in our_ops(w, device) if provider.op == "grid_pool"]
    bound = w.bound("grid_pool")
    for backend in backends(device):
        for frames, streams in PUSHES if backend != "reference" else ():
            pusher = Pusher(frames, streams, w.settings | {"backend": backend})
            share = frames * streams / w.frames
            found.append(
                Provider(
                    f"push:{frames}{f'x{streams}' if streams > 1 else ''}:{backend}",
                    "push",
                    pusher.push,
                    pusher.whole,
                    ulps=0,
                    checked=pusher.push_all,
                    moved=Traffic(round(bound.read_bytes * share), round(bound.write_bytes * share)),
                    period=SEGMENT // frames,
                    captures=False,  # a part of a stream's state is in Python
                    state_bytes=lambda pusher=pusher: pusher.most_kept,  # type: ignore[misc]
                    settings={"frames": frames, "streams": streams},
                )
            )
    return found


class Pusher:
    """Stream that x (T, H, W, C) is pushed to repeatedly, `frames` frames at a time to each of `streams` streams.

    The streams take turns: the first gets the first frames of x, the second the next ones.
    """

    def __init__(self, frames: int, streams: int, settings: dict[str, Any]) -> None:
        self.frames, self.streams, self.settings = frames, streams, settings
        self.stream, self.start, self.most_kept = self._new_stream(), 0, 0

    def _new_stream(self) -> GridPoolStream:
        return GridPoolStream(streams=range(self.streams), **self.settings)

    def push(self, x: Tensor) -> Tensor:
        """Push the next frames, which are the first frames of x after the last ones."""
        begin = self.start % len(x)
        self.start = begin + self.frames * self.streams
        return self.stream.push(x[begin : self.start], frame_counts=[self.frames] * self.streams)

    def push_all(self, x: Tensor) -> Tensor:
        """Push x once to new streams; return the results in the order of x, and record the largest state in bytes."""
        self.stream, self.start, parts = self._new_stream(), 0, list[Tensor]()
        while self.start < len(x):
            parts.append(self.push(x))
            self.most_kept = max(self.most_kept, self.stream.state_bytes)
        return torch.cat(parts)

    def whole(self, x: Tensor) -> Tensor:
        """Return the results of grid_pool on the videos of the streams, in the order of x."""
        each = len(x) // self.streams
        videos = x.unflatten(0, (-1, self.streams, self.frames)).transpose(0, 1).flatten(0, 2)
        pooled = grid_pool(videos, frame_counts=[each] * self.streams, **self.settings)
        in_order: Tensor = pooled.unflatten(0, (self.streams, -1, self.frames)).transpose(0, 1).flatten(0, 2)
        return in_order
