"""Tables on a device: made once for a plan, uploaded asynchronously, and shared by calls, streams and graphs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from ..plan import GridPlan
from ..plan.tables import plan_tables


class Tables:
    """Tables as tensors of int32: `words` on the CPU, and `tensor` on a device, which are one tensor for the CPU.

    The upload is asynchronous, except on ROCm. Every stream that uses the tables waits for it unless it is known to be
    complete, and is recorded so that their memory is not reused too early. A captured graph reads them at every replay,
    so they are kept from then on.

    checked: whether the compiled library has checked the words. Raises RuntimeError while a CUDA graph is captured.
    """

    def __init__(self, words: Sequence[int], device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "warm up first: a CUDA graph cannot capture the first call with a given plan, which uploads its "
                "tables; run it once before the capture"
            )
        self.words = torch.tensor(words, dtype=torch.int32, device="cpu")  # overrides torch.set_default_device
        self.tensor = self.words
        self.checked = False
        self.uploaded: torch.cuda.Event | None = None
        self.streams: set[int] = set()
        if device.type not in ("cpu", "cuda", "meta"):
            self.tensor = self.words.to(device)
        elif device.type == "cuda":
            # While torch.compile records a CUDA graph, allocations of its thread belong to the graph and must not
            # outlive it, so another thread allocates.
            with ThreadPoolExecutor(1) as other:
                other.submit(self._upload, torch.cuda.current_stream(device)).result()

    def _upload(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self.tensor = self.words.pin_memory().to(stream.device, non_blocking=True)
            if torch.version.hip is not None:
                stream.synchronize()  # ROCm has no external events
            else:
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


_captured: set[Tables] = set()
_lock = threading.Lock()


def tables_of(
    plan: GridPlan, device: torch.device, *, frames_per_stage: int | None = None, gradient: bool = False
) -> Tables:
    """Return the tables of a plan on a device. They live with the plan. The other arguments are as in `plan_tables`."""
    key = (device, frames_per_stage, gradient)
    tables: Tables | None = plan.uploads.get(key)
    if tables is None:
        with _lock:
            tables = plan.uploads.get(key)
            if tables is None:
                words = plan_tables(plan, frames_per_stage=frames_per_stage, gradient=gradient)
                tables = plan.uploads[key] = Tables(words, device)
    return tables


@lru_cache(maxsize=256)
def tables_of_chunk(words: tuple[int, ...], device: torch.device) -> Tables:
    """Return the tables of a chunk of streams on a device. Chunks at the same place of a period have equal tables."""
    return Tables(words, device)
