"""`GridPoolStream`: grid_pool of videos that arrive in chunks.

Whether a summary replaces a frame is known when the frame arrives, and the summary depends on no later frame. Every
pooled frame is therefore returned by the call that pushes its frame. Between calls, a stream keeps the sampled frames
of open groups that later results depend on; `EndlessLiveness` of dataflow.py determines them.

A push first lists the nodes to compute as entries of tables (`_Work`). If the backend's kernels are fused, they follow
tables of these entries, and thumbnails of the sampled frames are kept. Otherwise the frames themselves are kept, and
temporal_grid computes the summary of each group once it is complete. In both cases, grid_pool processes whole periods
within a chunk as a video of their own: a period starts and ends where every level starts a group.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import check_tensor, converted, warn_of_layout
from .backends import BACKENDS, Backend, backend_names, check_backend, choose_backend, use_backend
from .backends.weighting import Weighting
from .functional import GridPool
from .ops import check_norm_channels, check_tokens
from .plan import GridPlan, grid_plan
from .plan.dataflow import EndlessLiveness
from .plan.plan import level_shapes
from .plan.tables import ChunkEntry, chunk_entries, chunk_tables
from .plan.values import plain, shown
from .stream_state import (
    STATE_DTYPES,
    VERSION,
    States,
    StreamId,
    StreamState,
    check_kept,
    check_state,
    copied,
    expect,
    held_slots,
    is_stream_id,
    plain_arguments,
    plain_format,
    usable_device,
)

EXACT_FRAMES = 1 << 24
"""Largest number of frames for which every frame number that sampling="last" computes is exact in float32."""

SLOTS_PER_LEVEL = 6
"""Number of thumbnails that a stream has room for per level: 4 of the open group, 2 of the frame that comes next."""

Slots = Tensor | dict[int, Tensor]
"""Nodes kept for all streams, by slot: one tensor of thumbnails (slots, ⌈H/2⌉, ⌈W/2⌉, C), or frames (H, W, C)."""

_PLANNED = set(inspect.signature(grid_plan).parameters)


@dataclass(frozen=True)
class _Format:
    """Properties that all frames share while any stream has seen one.

    like: empty tensor (0, H, W, C) of the frames' dtype, on their device. plan: plan of the settings, without frames.
    backend: name of the backend, "auto" until one is chosen. fused: whether its kernels follow tables of chunks, so
    that thumbnails are kept in place of frames.
    """

    like: Tensor
    plan: GridPlan
    liveness: EndlessLiveness
    backend: str
    fused: bool = False

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that a slot holds."""
        _, H, W, C = self.like.shape
        return (-(-H // 2), -(-W // 2), C) if self.fused else (H, W, C)

    def on(self, backend: Backend, arguments: Mapping[str, Any]) -> _Format:
        """This format with `backend` chosen, for a stream with these arguments."""
        channels = self.like.shape[-1]
        fused = backend.is_fused(self.plan, channels, Weighting.of(arguments, channels))
        return replace(self, backend=backend.name, fused=fused)


@dataclass(frozen=True)
class _Work:
    """The nodes that a push computes, and the states it results in.

    states: states after the push, of the streams that get frames. whole: rows of x that form whole periods of one
    stream. stages: entries of the other rows of x, then of the summaries of each level. slots: one more than the
    highest slot in use.
    """

    states: States
    whole: list[slice]
    stages: list[list[ChunkEntry]]
    slots: int


class GridPoolStream:
    """`grid_pool` of videos that arrive in chunks: frames in, pooled frames out, with a state of bounded size.

        stream = GridPoolStream(ceil_mode=True)
        for chunk in camera:                 # (n, H, W, C), any n, also 0
            use(stream.push(chunk))          # (n, OH, OW, C): of exactly these frames
        stream.flush()                       # the next frame starts another video

    Takes the arguments of `grid_pool` except `frame_counts` and `out`; the attribute `arguments` holds them.

    streams: names, integers or strings, of the streams that are open from the start. One object serves any number of
        streams, and one call takes frames of several: see `push`. Streams can be opened, reset and closed at any time.
    backend: as in `grid_pool`. It is chosen for the first frame, and stays while any stream has seen a frame.

    While any stream has seen a frame, all frames must have the same H, W, C, dtype and device.

    **Results.** The joined results equal `grid_pool` of the whole video of T frames, bit by bit and however it is cut
    into chunks: with sampling="first" always, with "last" if the stride of every level that completes a group
    (stride · rows · cols ≤ T) divides T. Otherwise `grid_pool` spreads its samples over all T frames; a stream, which
    does not know T, samples the last frame of every stride as if T were a multiple. `matches_offline` tells which case
    applies. On `triton`, whose order of summation follows the memory layout, chunks must have the video's layout.

    **State.** A stream keeps the sampled frames of its open groups that later results depend on, in the dtype of the
    tokens. Where `grid_pool` has fused kernels (as for the published settings) it keeps their thumbnails of
    ⌈H/2⌉ × ⌈W/2⌉ tokens, with room for 6 per level and stream. Otherwise it keeps frames of H × W tokens, at most
    rows · cols − 1 per level, or rows · cols with sampling="first". A frame that several levels sample is kept once.
    `state_bytes` is the total size; its maximum depends neither on the length of a video nor on that of a chunk.

    **Limits.** A stream has no gradient, cannot be captured in a CUDA graph, and must be used by one thread and, on a
    GPU, on one CUDA stream at a time. torch.compile breaks its graph at a push and runs it uncompiled. If a call
    raises, the streams' state is unchanged.

    Raises ValueError or TypeError naming the argument, its value and what is allowed; RuntimeError if the requested
    backend cannot run the call.
    """

    def __init__(self, *, streams: Sequence[StreamId] = (0,), backend: str = "auto", **arguments: Any) -> None:
        check_backend(backend)
        self.arguments: dict[str, Any] = GridPool(**arguments).arguments
        self.backend = backend
        self._planned = {name: value for name, value in self.arguments.items() if name in _PLANNED}
        self._levels = len(self.arguments["frame_strides"])
        self._format: _Format | None = None
        self._states: States = {}
        self._slots: Slots = {}
        for stream in _names(streams, "integers or strings"):
            self.open(stream)

    # ---- streams ----

    @property
    def streams(self) -> tuple[StreamId, ...]:
        """Names of the open streams, in the order in which they were opened."""
        return tuple(self._states)

    def open(self, stream: StreamId) -> None:
        """Open a stream. Raises ValueError if it is open, TypeError unless it is an integer or a string."""
        stream = _name(stream)
        if stream in self._states:
            raise ValueError(f"stream {shown(stream)} is open already; open are {shown(list(self._states))}")
        self._states[stream] = self._new_state()

    def close(self, stream: StreamId) -> None:
        """Close a stream and free its state. Raises ValueError unless it is open."""
        closed = self._known(stream)
        states = {name: state for name, state in self._states.items() if name != closed}
        self._states, self._slots = self._compacted(states, self._slots)

    def reset(self, stream: StreamId | None = None) -> None:
        """Make the next frame of a stream start a new video; None resets all. Raises ValueError unless it is open."""
        ended = self.streams if stream is None else (self._known(stream),)
        states = self._states | {name: self._new_state() for name in ended}
        self._states, self._slots = self._compacted(states, self._slots)

    def flush(self, stream: StreamId | None = None) -> Tensor:
        """End the video of a stream, or of all streams, by `reset`; return the remaining pooled frames.

        None remain, since every pooled frame is returned by its `push`, so the result is (0, OH, OW, C), or
        (0, 0, 0, 0) before the first frame, when C is unknown. Open groups are dropped, as `grid_pool` drops them.
        """
        if stream is not None:
            self._known(stream)
        self.reset(stream)
        if self._format is None:
            return torch.empty(0, 0, 0, 0)
        like = self._format.like
        return like.new_empty((0, *self._format.plan.pooled_size, like.shape[-1]))

    def frames(self, stream: StreamId | None = None) -> int:
        """Number of frames that a stream has seen since it was opened or reset; None stands for the only stream."""
        return self._states[self._only(stream)].frames

    def matches_offline(self, stream: StreamId | None = None) -> bool:
        """Return whether `grid_pool` of all frames that a stream has seen must equal the joined results bit by bit."""
        frames = self.frames(stream)
        if self.arguments["sampling"] == "first":
            return True
        strides = self.arguments["frame_strides"]
        shapes = level_shapes(strides, *(self.arguments[name] for name in ("grid_shape", "sampling", "resize")))
        completing = [stride for stride, (m, n) in zip(strides, shapes, strict=True) if frames >= stride * m * n]
        return frames <= EXACT_FRAMES and all(frames % stride == 0 for stride in completing)

    @property
    def state_bytes(self) -> int:
        """Size in bytes of all tensors that are kept between calls."""
        kept = [self._slots] if isinstance(self._slots, Tensor) else self._slots.values()
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)

    # ---- frames ----

    def push(
        self,
        x: Tensor,
        *,
        streams: Sequence[StreamId] | None = None,
        frame_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Pool the next frames of some streams: (n, H, W, C) → (n, OH, OW, C), same dtype, contiguous, new.

        x: tokens of n frames, bfloat16, float16, float32 or float64, any strides. It is neither modified nor kept.
        streams: the streams that the frames belong to, each named once; by default all open streams.
        frame_counts: number of frames of each stream, 0 allowed, packed along the first dimension in the order of
            `streams`. They must sum to n, and may be left out for one stream.

        Raises ValueError or TypeError as `grid_pool` does, for streams that are not open, and for frames that differ in
        shape, dtype or device from those before; RuntimeError if a gradient is required or a CUDA graph is captured.
        """
        if torch.compiler.is_compiling():  # compiled, the reference rounds differently, and every T compiles again
            pushed: Tensor = torch.compiler.disable(self._push)(x, streams, frame_counts)
            return pushed
        return self._push(x, streams, frame_counts)

    def _push(self, x: Tensor, streams: Sequence[StreamId] | None, frame_counts: Sequence[int] | None) -> Tensor:
        check_tensor(x)
        _check_plain(x)
        if x.dim() != 4:
            raise ValueError(f"x must have shape (n, H, W, C), got {tuple(x.shape)}; pack streams with frame_counts")
        check_tokens(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a stream has no gradient: push x.detach(), or use torch.no_grad()")
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a stream cannot be captured in a CUDA graph: what it does next depends on its state")
        pieces = self._pieces(len(x), streams, frame_counts)
        warn_of_layout(x)
        form = self._format_of(x)
        check_norm_channels(self.arguments["norm_channels"], x)
        out = x.new_empty((len(x), *form.plan.pooled_size, x.shape[-1]))
        if len(x) == 0:
            return out
        with use_backend(form.backend) if form.backend != "auto" else nullcontext():
            backend = choose_backend(x, form.plan, self.arguments["norm_type"])
        form = form.on(backend, self.arguments)
        work = self._work(pieces, form.liveness)
        pool = self._pool_fused if form.fused else self._pool_frames
        # tensors that are kept by a call in inference mode can only be written in that mode
        with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
            x = x.detach()
            for rows in work.whole:
                self._pool(x[rows], (rows.stop - rows.start,), backend, out[rows])
            slots = pool(x, work, form, backend, out)
            states, slots = self._compacted(self._states | work.states, slots)
        self._format, self._states, self._slots = form, states, slots
        return out

    def _pieces(
        self, n: int, streams: Sequence[StreamId] | None, frame_counts: Sequence[int] | None
    ) -> dict[StreamId, tuple[int, int]]:
        """Return the first row of x and the number of rows of every stream that gets frames."""
        names = self.streams if streams is None else _names(streams, "open streams")
        for name in names:
            self._known(name)
        if len(set(names)) < len(names):
            raise ValueError(f"streams must name each stream once, got {shown(list(names))}")
        if frame_counts is None:
            if not names:
                raise ValueError("streams must name an open stream, got []")
            if len(names) != 1:
                listed = shown(list(names))
                raise ValueError(f"frame_counts must be given for {len(names)} streams, got None for {listed}")
            frame_counts = [n]
        counts = converted("frame_counts", frame_counts)
        if len(counts) != len(names) or min(counts, default=0) < 0:
            listed = shown(list(names))
            raise ValueError(
                f"frame_counts must be one number of frames for each of {listed}, got {shown(frame_counts)}"
            )
        if sum(counts) != n:
            raise ValueError(f"frame_counts must sum to n = {n}, got {shown(list(counts))} with sum {sum(counts)}")
        firsts = itertools.accumulate(counts, initial=0)
        return dict(zip(names, zip(firsts, counts, strict=False), strict=True))

    def _work(self, pieces: dict[StreamId, tuple[int, int]], liveness: EndlessLiveness) -> _Work:
        """List the nodes to compute. pieces: (first row of x, number of rows) of every stream that gets frames."""
        held = held_slots(self._states)
        free = (slot for slot in itertools.count() if slot not in held)
        stages: list[list[ChunkEntry]] = [[] for _ in range(1 + self._levels)]
        states: States = {}
        whole: list[slice] = []
        for stream, (first, count) in pieces.items():
            state = self._states[stream]
            before = min(-state.frames % liveness.period, count)
            after = before + (count - before) // liveness.period * liveness.period
            if before < after:
                whole.append(slice(first + before, first + after))
            groups = [dict(group) for group in state.groups]
            for number in (*range(before), *range(after, count)):
                for level, entry in chunk_entries(liveness, state.frames + number, first + number, groups, free):
                    stages[1 + level].append(entry)
            states[stream] = StreamState(state.frames + count, tuple(groups))
        used = held.union(entry.slot for stage in stages for entry in stage)
        return _Work(states, whole, stages, 1 + max(used, default=-1))

    def _pool(self, x: Tensor, videos: Sequence[int], backend: Backend, out: Tensor) -> None:
        """Write grid_pool of videos with these frame counts into out. Plans are cached by them, so few are used."""
        backend.grid_pool(
            x, grid_plan(videos, *x.shape[1:3], **self._planned), Weighting.of(self.arguments, x.shape[-1]), out
        )

    def _pool_fused(self, x: Tensor, work: _Work, form: _Format, backend: Backend, out: Tensor) -> Slots:
        """Pool and shrink all rows of `work.stages` in one pass; return the slots. Occupied slots are not changed."""
        slots = self._room(work.slots, form)
        if any(work.stages):
            assert backend.pool_chunk is not None
            weighting = Weighting.of(self.arguments, x.shape[-1])
            backend.pool_chunk(x, chunk_tables(form.plan, len(x), work.stages, work.slots), weighting, slots, out)
        return slots

    def _pool_frames(self, x: Tensor, work: _Work, form: _Format, backend: Backend, out: Tensor) -> Slots:
        """Pool all rows of `work.stages`, or the summaries that replace them; return the frames in all slots."""
        frames, replaced = self._summaries(x, work, form, backend)
        edges = (0, *(edge for rows in work.whole for edge in (rows.start, rows.stop)), len(x))
        for first, stop in zip(edges[::2], edges[1::2], strict=True):
            if any(row not in replaced for row in range(first, stop)):
                self._pool(x[first:stop], (1,) * (stop - first), backend, out[first:stop])
        if replaced:
            pooled = torch.empty_like(out[: len(replaced)])
            self._pool(torch.stack(list(replaced.values())), (1,) * len(replaced), backend, pooled)
            out[torch.tensor(list(replaced), device=out.device)] = pooled
        return frames

    def _summaries(
        self, x: Tensor, work: _Work, form: _Format, backend: Backend
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return the frames in all slots after the stages, and the summaries that replace rows of x, by row."""
        frames = {slot: self._slots[slot] for slot in held_slots(self._states)}
        kept = held_slots(work.states)
        for entry in work.stages[0]:
            if entry.slot >= 0:
                frame = x[entry.node]
                frames[entry.slot] = frame.clone() if entry.slot in kept else frame
        replaced: dict[int, Tensor] = {}
        for level, stage in enumerate(work.stages[1:]):
            for entry in stage:
                summary = self._summary(level, [frames.get(slot) for slot in entry.sources], form, backend)
                if entry.slot >= 0:
                    frames[entry.slot] = summary
                if entry.target >= 0:
                    replaced[entry.target] = summary
        return frames, replaced

    def _summary(self, level: int, sources: Sequence[Tensor | None], form: _Format, backend: Backend) -> Tensor:
        """Return the summary (H, W, C) of a group of frames (H, W, C); sources without live tokens are None."""
        any_frame = next(source for source in sources if source is not None)
        frames = torch.stack([any_frame if source is None else source for source in sources])
        segment = form.liveness.segments[level]
        alone = {"frame_strides": (1,), "grid_shape": (segment.rows, segment.cols), "sampling": "last"}
        plan = grid_plan((len(frames),), *frames.shape[1:3], **self._planned | alone)
        made = torch.empty_like(frames)
        backend.temporal_grid(frames, plan, made)
        return made[plan.levels[0].targets[0]].clone()  # a view would keep the memory of the whole group

    def _room(self, slots: int, form: _Format) -> Tensor:
        """Return a tensor of at least `slots` slots that contains the occupied ones."""
        kept = self._slots
        kind = (form.kept_shape, form.like.dtype, form.like.device)
        if isinstance(kept, Tensor) and _kind(kept) == kind and len(kept) >= slots:
            return kept
        room = form.like.new_empty((slots, *form.kept_shape))
        for slot in held_slots(self._states):
            room[slot] = kept[slot]
        return room

    def _compacted(self, states: States, slots: Slots) -> tuple[States, Slots]:
        """Free unoccupied slots, except those that are reserved for each stream's thumbnails."""
        held = sorted(held_slots(states))
        if isinstance(slots, dict):
            return states, {slot: slots[slot] for slot in held}
        room = len(states) * SLOTS_PER_LEVEL * self._levels
        if len(slots) <= room:
            return states, slots
        kept = slots.new_empty((max(len(held), room), *slots.shape[1:]))
        kept[: len(held)] = slots[torch.tensor(held, dtype=torch.long, device=kept.device)]
        places = {slot: place for place, slot in enumerate(held)}
        return {name: state.moved(places) for name, state in states.items()}, kept

    def _format_of(self, x: Tensor) -> _Format:
        form = self._format
        if form is None or not any(state.frames for state in self._states.values()):
            return self._new_format(x.new_empty((0, *x.shape[1:])), self.backend)
        if _kind(x) != _kind(form.like):
            raise ValueError(
                f"x must be as the frames before it, (n, {', '.join(map(str, form.like.shape[1:]))}) {form.like.dtype} "
                f"on {form.like.device}, until all streams are reset; got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
        return form

    def _new_format(self, like: Tensor, backend: str) -> _Format:
        plan = grid_plan((), *like.shape[1:3], **self._planned)
        return _Format(like, plan, EndlessLiveness(plan), backend)

    def _new_state(self) -> StreamState:
        return StreamState(0, ({},) * self._levels)

    def _known(self, stream: StreamId) -> StreamId:
        stream = _name(stream)
        if stream not in self._states:
            raise ValueError(f"stream must be open, got {shown(stream)}; open are {shown(list(self._states))}")
        return stream

    def _only(self, stream: StreamId | None) -> StreamId:
        if stream is not None:
            return self._known(stream)
        if not self._states:
            raise ValueError("streams must name an open stream, got []: none is open")
        if len(self._states) != 1:
            raise ValueError(f"stream must be named, got None; open are {shown(list(self._states))}")
        return next(iter(self._states))

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all streams, made of numbers, strings, lists, dicts and copies of tensors.

        `torch.save` writes it, `torch.load(weights_only=True)` reads it, `load_state_dict` restores it.
        """
        form = self._format
        return {
            "version": VERSION,
            "arguments": plain_arguments(self.arguments),
            "format": None if form is None else plain_format(form.like, form.backend),
            "streams": [
                {"stream": name, "frames": state.frames, "kept": [self._slots[slot].clone() for slot in state.slots()]}
                for name, state in self._states.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device | str | None = None) -> None:
        """Restore the state that `state_dict` returned. It replaces all streams and all that they keep.

        device: device of the frames to come; by default that of the state. The backend is always that of the state,
        since others round differently.

        Raises ValueError naming the entry, its value and what is allowed if the state has another version, has other
        arguments or is damaged, or if its backend or the device cannot be used. The streams' state is unchanged then.
        """
        check_state(
            state, plain_arguments(self.arguments), [self.backend] if self.backend != "auto" else backend_names()[1:]
        )
        given, form = state["format"], None
        if given is not None:
            form = self._read_format(given, device)
            check_kept(state["streams"], given["dtype"], [form.kept_shape])
        states: States = {}
        kept: list[Tensor] = []
        for number, stream in enumerate(state["streams"]):
            nodes = [] if form is None else form.liveness.kept(stream["frames"])
            found, entry = len(stream["kept"]), f"len(state['streams'][{number}]['kept'])"
            expect(found == len(nodes), entry, len(nodes), found)
            groups: list[dict[int, int]] = [{} for _ in range(self._levels)]
            for slot, places in enumerate(nodes, start=len(kept)):
                for level, place in places:
                    groups[level][place] = slot
            kept += stream["kept"]
            states[stream["stream"]] = StreamState(stream["frames"], tuple(groups))
        where = None if form is None else form.like.device
        slots = {slot: copied(tensor, where) for slot, tensor in enumerate(kept)}
        self._format, self._states, self._slots = form, states, slots

    def _read_format(self, given: dict[str, Any], device: torch.device | str | None) -> _Format:
        entry, where = ("device", device) if device is not None else ("state['format']['device']", given["device"])
        shape = (0, given["height"], given["width"], given["channels"])
        least = self.arguments["norm_channels"] or 1
        allowed = f"at least norm_channels = {least}"
        expect(given["channels"] >= least, "state['format']['channels']", allowed, given["channels"])
        like = torch.empty(shape, dtype=STATE_DTYPES[given["dtype"]], device=usable_device(where, entry))
        backend = next(known for known in BACKENDS if known.name == given["backend"])
        reason = backend.unsupported_reason(None, None)
        if reason is not None:
            raise ValueError(f"state['format']['backend'] must be able to run here, got {backend.name!r}: {reason}")
        return self._new_format(like, backend.name).on(backend, self.arguments)


def _kind(x: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Shape, dtype and device that all entries of x along its first dimension share."""
    return tuple(x.shape[1:]), x.dtype, x.device


def _check_plain(x: Tensor) -> None:
    """Raise TypeError unless x holds its own data: a stream keeps frames, and its backends read memory."""
    is_wrapper = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_wrapper or x.is_nested or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x):
        kind = "nested" if x.is_nested else "meta" if x.is_meta else "wrapped"
        raise TypeError(
            f"x must be a plain tensor with data of its own, as a stream keeps frames, got a {kind} {type(x).__name__}"
        )


def _name(stream: Any) -> StreamId:
    """Return the name of a stream as Python's integer or string. Raises TypeError unless it is one."""
    name = plain(stream)
    if not is_stream_id(name):
        raise TypeError(f"a stream must be an integer or a string, got {shown(stream)}")
    return str.__str__(name) if isinstance(name, str) else int(name)  # not a member of an enumeration


def _names(streams: Any, what: str) -> list[StreamId]:
    """Return the names in a sequence or array. Raises TypeError, with `what` it must be a sequence of, for others."""
    names = plain(streams)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"streams must be a sequence of {what}, got {shown(streams)}")
    return [_name(stream) for stream in names]
