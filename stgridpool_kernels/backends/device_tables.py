"""Tables on a device, uploaded once and asynchronously, and shared by calls, CUDA streams and captured graphs."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

import torch


class Tables:
    """A plan's tables on a device, as int32, uploaded asynchronously.

    Every CUDA stream that uses them waits for the upload unless it is known to be complete, and is recorded so that
    their memory is not reused too early. A captured graph reads them at every replay, so they are kept from then on.
    """

    def __init__(self, values: Sequence[int], device: torch.device) -> None:
        self.tensor = torch.tensor(values, dtype=torch.int32, device="cpu")  # overrides torch.set_default_device
        self.uploaded: torch.cuda.Event | None = None
        self.streams: set[int] = set()
        if device.type == "cuda":
            # While torch.compile records a CUDA graph, allocations of its thread belong to the graph and must not
            # outlive it, so another thread allocates.
            with ThreadPoolExecutor(1) as other:
                other.submit(self._upload, torch.cuda.current_stream(device)).result()

    def _upload(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self.tensor = self.tensor.pin_memory().to(stream.device, non_blocking=True)
            self.uploaded = torch.cuda.Event(external=True)  # captures that do not contain it may wait for it
            self.uploaded.record(stream)
        self.streams.add(stream.cuda_stream)

    def use(self, stream: int, capturing: bool) -> None:
        """Make work that is queued later on the current stream, whose handle is `stream`, wait for the upload."""
        uploaded = self.uploaded
        if capturing:
            _captured.add(self)
            if uploaded is not None:
                torch.cuda.current_stream(self.tensor.device).wait_event(uploaded)
            return
        if uploaded is not None and self not in _captured and uploaded.query():
            uploaded = self.uploaded = None  # kept after a capture: the event must outlive the graph that waits for it
        if stream not in self.streams:
            current = torch.cuda.current_stream(self.tensor.device)
            if uploaded is not None:
                current.wait_event(uploaded)
            self.tensor.record_stream(current)
            self.streams.add(stream)

    def use_now(self) -> torch.Tensor:
        """Return the tensor after `use` on the current stream. The tables' device must be the current device."""
        if self.tensor.is_cuda:
            self.use(torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing())
        return self.tensor


_lock = threading.Lock()
_tables: WeakValueDictionary[Hashable, Tables] = WeakValueDictionary()
_captured: set[Tables] = set()


def tables_on(device: torch.device, values: Sequence[int]) -> Tables | None:
    """Return tables of these values on a device, None if there are no values. Calls with equal tables share them."""
    if not values:
        return None
    key = (device, tuple(values))
    with _lock:
        tables = _tables.get(key)
        if tables is None:
            tables = _tables[key] = Tables(values, device)
        return tables
