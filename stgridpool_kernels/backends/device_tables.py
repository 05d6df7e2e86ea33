"""Tables on a device: uploaded once without waiting, shared by calls, streams and captured graphs."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

import torch


class Tables:
    """A plan's tables on a device: int32, uploaded without waiting.

    Every stream that uses them waits for the upload, until it is known to be over, and keeps their memory from being
    used again too early. A captured graph reads them whenever it is replayed, so from a capture on they are kept.
    """

    def __init__(self, values: Sequence[int], device: torch.device) -> None:
        self.tensor = torch.tensor(values, dtype=torch.int32, device="cpu")  # whatever torch.set_default_device says
        self.uploaded: torch.cuda.Event | None = None
        self.streams: set[int] = set()
        if device.type == "cuda":
            # While torch.compile records a CUDA graph, what its thread allocates belongs to the graph, and must not
            # outlive it: another thread allocates.
            with ThreadPoolExecutor(1) as other:
                other.submit(self._upload, torch.cuda.current_stream(device)).result()

    def _upload(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self.tensor = self.tensor.pin_memory().to(stream.device, non_blocking=True)
            self.uploaded = torch.cuda.Event(external=True)  # a capture that it is not part of may wait for it
            self.uploaded.record(stream)
        self.streams.add(stream.cuda_stream)

    def use(self, stream: int, capturing: bool) -> None:
        """Makes the work that is queued next on the current stream, whose handle is `stream`, see the tables."""
        uploaded = self.uploaded
        if capturing:
            _captured.add(self)
            if uploaded is not None:
                torch.cuda.current_stream(self.tensor.device).wait_event(uploaded)
            return
        if uploaded is not None and self not in _captured and uploaded.query():
            uploaded = self.uploaded = None  # but an event that a graph waits for has to outlive it
        if stream not in self.streams:
            current = torch.cuda.current_stream(self.tensor.device)
            if uploaded is not None:
                current.wait_event(uploaded)
            self.tensor.record_stream(current)
            self.streams.add(stream)

    def use_now(self) -> torch.Tensor:
        """`use` for the stream that is current on the tables' device, which must be the current device."""
        if self.tensor.is_cuda:
            self.use(torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing())
        return self.tensor


_lock = threading.Lock()
_tables: WeakValueDictionary[Hashable, Tables] = WeakValueDictionary()
_captured: set[Tables] = set()


def tables_on(device: torch.device, values: Sequence[int]) -> Tables | None:
    """Tables with these values on a device; calls that differ in dtype, layout or settings share them."""
    if not values:
        return None
    key = (device, tuple(values))
    with _lock:
        tables = _tables.get(key)
        if tables is None:
            tables = _tables[key] = Tables(values, device)
        return tables
