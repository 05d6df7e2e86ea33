"""`GridPoolStream`: grid_pool of videos that arrive in chunks.

For every frame it is known on arrival whether a summary replaces it, and all that the summary is made of came before.
So every pooled frame leaves with the call that brings its frame. What is kept between calls are the sampled frames of
the groups that are open, shrunk. Which frames these are is asked of the plan of one segment: from segment to segment a
level repeats itself.

There are two ways to keep them, since results must have the bits of `grid_pool`. Where its kernels tile summaries from
miniatures, a stream has them follow tables whose miniatures are kept. Elsewhere summaries are means over a mosaic,
which fills up place by place, each a part of what the backend's repeat_in_grid makes of its frame (temporal_grid, where
a token of the mosaic mixes two). Either way, where a chunk reaches from one frame at which all levels begin again to
another, grid_pool takes what is between as a video.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, backend_names, check_backend, choose_backend, use_backend
from .functional import GridPool
from .ops import DTYPES, check_tokens
from .plan import GridPlan, Runs, grid_plan
from .plan.dataflow import Box, boxes_behind, pooled_box, stairs
from .plan.tables import ChunkEntry, chunk_tables

StreamId = int | str

VERSION = 1
"""Of what `state_dict` returns."""

MOST_NEEDS = 4096
"""Contents of a period whose needs are remembered."""

EXACT_FRAMES = 1 << 24
"""Up to so many frames, float32 holds every frame number that sampling="last" computes."""

SLOTS_PER_LEVEL = 6
"""Miniatures of a stream that there is room for between calls: four of an open group, and what one more frame makes."""

_PLANNED = set(inspect.signature(grid_plan).parameters)


@dataclass(frozen=True)
class _Band:
    """Rows (or columns) of summaries whose last source row lies in one row of tiles: first, …, stop − 1."""

    first: int
    stop: int


@dataclass(frozen=True)
class _Segment:
    """One level of an endless video, which repeats itself every `length` frames.

    plan: of one group alone, its sources as the frames 0, 1, … of a video.
    place: which place of the mosaic takes a frame, by its number in the segment.
    rows, cols: the part of a summary that is complete once the tiles up to a row, or column, of tiles are there.
    row_seams, col_seams: rows and columns of tiles of which some summary token mixes the last line with the next tile.
    """

    length: int
    target: int
    sources: tuple[int, ...]
    place: dict[int, int]
    plan: GridPlan
    rows: tuple[_Band, ...]
    cols: tuple[_Band, ...]
    row_seams: frozenset[int]
    col_seams: frozenset[int]

    @staticmethod
    def of(plan: GridPlan, number: int) -> _Segment:
        """Of level number `number` of a plan."""
        level = plan.levels[number]
        shape = (level.rows, level.cols)
        S = level.rows * level.cols
        length = level.frame_stride * S
        whole = replace(plan, frame_counts=(length,), frame_strides=(level.frame_stride,), grid_shape=shape).levels[0]
        alone = replace(plan, frame_counts=(S,), frame_strides=(1,), grid_shape=shape, sampling="last")
        assert alone.levels[0].sources == (tuple(range(S)),)
        (target,), (sources,) = whole.targets, whole.sources
        return _Segment(
            length,
            target,
            sources,
            {source: place for place, source in enumerate(sources)},
            alone,
            _bands(whole.row_runs, plan.height, level.rows),
            _bands(whole.col_runs, plan.width, level.cols),
            _seams(whole.row_runs, plan.height),
            _seams(whole.col_runs, plan.width),
        )

    def part(self, place: int) -> tuple[slice, slice]:
        """The rows and columns of a summary that the tile in `place` completes."""
        row, col = self.rows[place // len(self.cols)], self.cols[place % len(self.cols)]
        return slice(row.first, row.stop), slice(col.first, col.stop)

    def keeps_edges(self, place: int) -> bool:
        row, col = divmod(place, len(self.cols))
        return row in self.row_seams or col in self.col_seams


def _bands(runs: Runs, size: int, tiles: int) -> tuple[_Band, ...]:
    owners = [(start + count - 1) // size for start, count in zip(runs.start, runs.count, strict=True)]
    return tuple(_Band(sum(o < tile for o in owners), sum(o <= tile for o in owners)) for tile in range(tiles))


def _seams(runs: Runs, size: int) -> frozenset[int]:
    ends = ((start, start + count - 1) for start, count in zip(runs.start, runs.count, strict=True))
    return frozenset(first // size for first, last in ends if first // size != last // size)


@dataclass(frozen=True)
class _Group:
    """On the way by mosaics, what is kept of the open group of a level: its mosaic as far as it is filled, and by place
    the last row and the last column of sources that share summary tokens with tiles still to come."""

    mosaic: Tensor
    edges: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def tensors(self) -> Iterator[Tensor]:
        yield self.mosaic
        for edge in self.edges.values():
            yield from edge


@dataclass(frozen=True)
class _State:
    """Of one stream: how many frames it has seen, and what is kept of the open group of each level.

    groups: None where nothing is kept. tiles: on the way by miniatures, the slots of its four, −1 where none is kept.
    """

    frames: int
    groups: tuple[_Group | None, ...]
    tiles: tuple[tuple[int, ...], ...]

    def slots(self) -> set[int]:
        return {slot for tiles in self.tiles for slot in tiles} - {-1}

    def moved(self, held: Sequence[int]) -> _State:
        """With what is in the slots `held` in the slots 0, 1, …"""
        places = {slot: place for place, slot in enumerate(held)} | {-1: -1}
        return replace(self, tiles=tuple(tuple(places[slot] for slot in of_level) for of_level in self.tiles))


@dataclass(frozen=True)
class _Need:
    """What depends on a content: tokens of it, cells of its miniature, the places of mosaics that it takes as (level,
    place), and whether its frame ends with it."""

    tokens: frozenset[Box]
    cells: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    final: bool


@dataclass(frozen=True)
class _Format:
    """What all frames of all streams share, as long as any stream has seen one."""

    height: int
    width: int
    channels: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    plan: GridPlan  # of no frames
    segments: tuple[_Segment, ...]
    miniatures: bool = False  # which way the backend takes, as soon as it is chosen
    needs: dict[tuple[int, int], _Need] = field(default_factory=dict, repr=False, compare=False)

    def same_tokens(self, x: Tensor) -> bool:
        return (*x.shape[1:], x.dtype, x.device) == (self.height, self.width, self.channels, self.dtype, self.device)

    @property
    def period(self) -> int:
        """Frames after which all levels begin again at once."""
        return math.lcm(*(segment.length for segment in self.segments))

    def whole_periods(self, seen: int, count: int) -> tuple[int, int]:
        """Of the next `count` frames of a stream, how many come before whole periods, and how many make these up.

        Whole periods are a video that `grid_pool` takes as it is: no group is open at either end.
        """
        before = min(-seen % self.period, count)
        return before, (count - before) // self.period * self.period

    def _later(self, level: int, frame: int) -> tuple[list[tuple[int, int, int]], bool]:
        """Who samples what `frame` holds after `level` (−1: as given) until it is overwritten: levels, with the place
        in their mosaic and its target; and whether the frame ends with it."""
        found = []
        for number in range(level + 1, len(self.segments)):
            segment = self.segments[number]
            first = frame - frame % segment.length
            if frame - first in segment.place:
                found.append((number, segment.place[frame - first], first + segment.target))
            if frame - first == segment.target:
                return found, False
        return found, True

    def used(self, level: int, target: int) -> bool:
        """Whether anything depends on the summary that a level puts into frame `target`."""
        later, final = self._later(level, target)
        return final or any(self.used(number, later_target) for number, _, later_target in later)

    def need(self, level: int, frame: int) -> _Need:
        """Of what `frame` holds after `level`, if every group to come is completed; on the way by miniatures."""
        key = (level, frame % self.period)
        found = self.needs.get(key)
        if found is not None:
            return found
        later, final = self._later(level, frame)
        tokens: set[Box] = {pooled_box(self.plan)} if final else set()
        cells: set[Box] = set()
        places = []
        for number, place, target in later:
            behind = boxes_behind(self.plan, self.need(number, target).tokens, place)
            if behind:
                places.append((number, place))
                cells.update(box for box, _ in behind)
                tokens.update(box for _, box in behind)
        found = _Need(frozenset(tokens), stairs(self.plan, cells) if cells else (), tuple(places), final)
        if len(self.needs) >= MOST_NEEDS:
            self.needs.clear()
        self.needs[key] = found
        return found


class GridPoolStream:
    """`grid_pool` of videos that arrive bit by bit: frames in, pooled frames out, memory that does not grow.

        stream = GridPoolStream(ceil_mode=True)
        for chunk in camera:                 # (n, H, W, C), any n, also 0
            use(stream.push(chunk))          # (n, OH, OW, C): of exactly these frames
        stream.flush()                       # the next frame starts another video

    Takes the arguments of `grid_pool` except `frame_counts` and `out`; `arguments` holds them.

    streams: the streams that are open from the start, by any integers or strings. Several share one object, and one
        call takes frames of several: see `push`. More can be opened, and each be reset and closed, at any time.
    backend: as in `grid_pool`. It is chosen by the first frame, and stays while any stream has seen a frame.

    All frames have one H, W, C, dtype and device while any stream has seen a frame.

    **What comes out** is, joined, what `grid_pool` gives for the whole video of T frames, bit by bit and however it is
    cut into chunks: with sampling="first" always, with "last" where the stride of every level that completes a group
    (stride · rows · cols frames at most T) divides T. Otherwise `grid_pool` spreads its samples over all of T, which
    a stream cannot know: it samples the last frame of every `stride`, as if T were a multiple. `matches_offline` says
    which it is. On `triton`, whose sums follow the layout in memory, this holds for chunks of the video's layout.

    **What is kept** of a stream are the sampled frames of its open groups, shrunk, in the dtype of the tokens. Where
    `grid_pool` has fused kernels (the published settings) these are miniatures of ⌈H/2⌉ × ⌈W/2⌉ tokens, and there is
    room for 6 per level and stream. Elsewhere it is at most one mosaic of H × W tokens per level, and, with
    resize="bilinear" and mosaics whose tiles share tokens, the last row and column of these frames. `state_bytes`
    counts them. How many it is at most depends on neither the length of a video nor that of a chunk.

    No gradient, no CUDA graph, one thread at a time, and on a GPU one CUDA stream at a time. torch.compile leaves a
    push as it is, and breaks its graph there. A call that raises leaves everything as it was.

    Raises ValueError or TypeError naming the argument, its value and what is allowed; RuntimeError if the backend asked
    for cannot run the call.
    """

    def __init__(self, *, streams: Sequence[StreamId] = (0,), backend: str = "auto", **arguments: Any) -> None:
        check_backend(backend)
        self.arguments: dict[str, Any] = GridPool(**arguments).arguments
        self.backend = backend
        self._planned = {name: value for name, value in self.arguments.items() if name in _PLANNED}
        self._settings: tuple[float, float, bool] = (
            self.arguments["temperature"],
            self.arguments["norm_type"],
            self.arguments["normalize_norm"],
        )
        self._levels = len(self.arguments["frame_strides"])
        self._format: _Format | None = None
        self._states: dict[StreamId, _State] = {}
        self._slots: Tensor | None = None  # (slots, ⌈H/2⌉, ⌈W/2⌉, C)
        if isinstance(streams, str) or not isinstance(streams, Sequence):
            raise TypeError(f"streams must be a sequence of integers or strings, got {streams!r}")
        for stream in streams:
            self.open(stream)

    # ---- streams ----

    @property
    def streams(self) -> tuple[StreamId, ...]:
        """The open streams, in the order in which they were opened."""
        return tuple(self._states)

    def open(self, stream: StreamId) -> None:
        """Opens a stream. Raises ValueError if it is open, TypeError unless it is an integer or a string."""
        _check_name(stream)
        if stream in self._states:
            raise ValueError(f"stream {stream!r} is open already; open are {list(self._states)}")
        self._states[stream] = self._new_state()

    def close(self, stream: StreamId) -> None:
        """Drops a stream and all that is kept of it. Raises ValueError unless it is open."""
        closed = self._known(stream)
        states = {name: state for name, state in self._states.items() if name != closed}
        self._states, self._slots = self._compacted(states, self._slots)

    def reset(self, stream: StreamId | None = None) -> None:
        """Has the next frame of a stream, or of all, start a new video. Raises ValueError unless it is open."""
        ended = self.streams if stream is None else (self._known(stream),)
        states = self._states | {name: self._new_state() for name in ended}
        self._states, self._slots = self._compacted(states, self._slots)

    def flush(self, stream: StreamId | None = None) -> Tensor:
        """Ends the video of a stream, or of all: the pooled frames that are still to come, then `reset`.

        There are none, as every frame leaves with its `push`: (0, OH, OW, C). Groups that are still open are dropped,
        as `grid_pool` drops them. Before any frame, when C is not known, (0, 0, 0, 0).
        """
        if stream is not None:
            self._known(stream)
        known = self._format
        self.reset(stream)
        if known is None:
            return torch.empty(0, 0, 0, 0)
        return torch.empty(0, *known.plan.pooled_size, known.channels, dtype=known.dtype, device=known.device)

    def frames(self, stream: StreamId | None = None) -> int:
        """How many frames a stream has seen since it was opened or reset; None stands for the only one."""
        return self._states[self._only(stream)].frames

    def matches_offline(self, stream: StreamId | None = None) -> bool:
        """Whether `grid_pool` of the frames that a stream has seen is sure to give what came out, bit by bit."""
        frames = self.frames(stream)
        if self.arguments["sampling"] == "first":
            return True
        known = grid_plan((), 1, 1, **{**self._planned, "kernel_size": (1, 1), "output_size": None, **_PLAIN_WINDOWS})
        completing = [level for level in known.levels if frames >= level.frame_stride * level.rows * level.cols]
        return all(frames % level.frame_stride == 0 for level in completing) and frames <= EXACT_FRAMES

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors that are kept until the next call."""
        tensors = (t for state in self._states.values() for group in state.groups if group for t in group.tensors())
        slots = 0 if self._slots is None else self._slots.untyped_storage().nbytes()
        return slots + sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    # ---- frames ----

    def push(
        self,
        x: Tensor,
        *,
        streams: Sequence[StreamId] | None = None,
        frame_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """The next frames of some streams: (n, H, W, C) → (n, OH, OW, C), same dtype, contiguous, new.

        x: tokens of n frames, bfloat16, float16, float32 or float64, any strides. It is not modified, nor kept.
        streams: which streams they belong to, each named once; all that are open by default.
        frame_counts: how many frames of each, packed along the first dimension in this order; may be left out for one
            stream. 0 is allowed. sum(frame_counts) == n.

        Raises ValueError or TypeError as `grid_pool` does, or for streams that are not open and frames unlike those
        before; RuntimeError if a gradient is required, or under capture of a CUDA graph.
        """
        if torch.compiler.is_compiling():  # compiled, the reference has other bits, and a push for every T its own code
            pushed: Tensor = torch.compiler.disable(self._push)(x, streams, frame_counts)
            return pushed
        return self._push(x, streams, frame_counts)

    def _push(self, x: Tensor, streams: Sequence[StreamId] | None, frame_counts: Sequence[int] | None) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"x must have shape (n, H, W, C), got {tuple(x.shape)}; pack streams with frame_counts")
        check_tokens(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a stream has no gradient: push x.detach(), or use torch.no_grad()")
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a stream cannot be captured in a CUDA graph: what it does next depends on its state")
        pieces = self._pieces(len(x), streams, frame_counts)
        known = self._format_of(x)
        out = x.new_empty((len(x), *known.plan.pooled_size, x.shape[-1]))
        if len(x) == 0:
            return out
        with use_backend(known.backend) if known.backend != "auto" else nullcontext():
            backend = choose_backend(x, known.plan)
        miniatures = backend.keeps_miniatures(known.plan, x.shape[-1], self._settings[1]) and self._levels > 0
        known = replace(known, backend=backend.name, miniatures=miniatures)
        push = self._push_miniatures if miniatures else self._push_mosaics
        # what is kept by a call in inference mode can only be written to in that mode
        with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
            states, slots = push(x.detach(), pieces, known, backend, out)
            states, slots = self._compacted(self._states | states, slots)
        self._format, self._states, self._slots = known, states, slots
        return out

    def _push_miniatures(
        self,
        x: Tensor,
        pieces: dict[StreamId, tuple[int, int]],
        known: _Format,
        backend: Backend,
        out: Tensor,
    ) -> tuple[dict[StreamId, _State], Tensor | None]:
        """Pools and shrinks x, in one go but for whole periods; the streams' new states, and all slots. Those that held
        something before the call are not written to."""
        held = _held(self._states)
        free = (slot for slot in itertools.count() if slot not in held)
        steps: list[list[ChunkEntry]] = [[] for _ in range(1 + self._levels)]
        states: dict[StreamId, _State] = {}
        used = 1 + max(held, default=-1)
        for stream, (first, count) in pieces.items():
            state = self._states[stream]
            tiles = [list(of_level) for of_level in state.tiles]
            before, whole = known.whole_periods(state.frames, count)
            if whole:
                rows = slice(first + before, first + before + whole)
                backend.grid_pool(x[rows], self._videos_plan(known, (whole,)), *self._settings, out[rows])
            for number in (*range(before), *range(before + whole, count)):
                frame, row = state.frames + number, first + number
                for level in range(-1, self._levels):
                    sources = [-1] * 4
                    if level >= 0:
                        segment = known.segments[level]
                        if frame % segment.length != segment.target:
                            continue
                        sources, tiles[level] = tiles[level], sources
                    need = known.need(level, frame)
                    slot = next(free) if need.cells else -1
                    used = max(used, slot + 1)
                    for later, place in need.places:
                        tiles[later][place] = slot
                    if need.cells or need.final:
                        content = row if level < 0 else -1 - row
                        target = row if need.final else -1
                        steps[1 + level].append(ChunkEntry(content, target, slot, need.cells, tuple(sources)))
            states[stream] = _State(state.frames + count, state.groups, tuple(map(tuple, tiles)))
        slots = self._room(used, x, known)
        assert backend.pool_chunk is not None
        if any(steps):
            backend.pool_chunk(x, chunk_tables(known.plan, len(x), steps, used), *self._settings, slots, out)
        return states, slots

    def _room(self, slots: int, x: Tensor, known: _Format) -> Tensor:
        """At least so many slots; what they hold is in them."""
        size = _miniature_size(known)
        if self._slots is None or (*self._slots.shape[1:], self._slots.dtype, self._slots.device) != (
            *(*size, x.dtype, x.device),
        ):
            return x.new_empty((slots, *size))
        if len(self._slots) >= slots:
            return self._slots
        grown = x.new_empty((slots, *size))
        grown[: len(self._slots)] = self._slots
        return grown

    def _compacted(
        self, states: dict[StreamId, _State], slots: Tensor | None
    ) -> tuple[dict[StreamId, _State], Tensor | None]:
        """Without the memory that a long chunk took, or closed streams: what is held moves to the first slots."""
        most = len(states) * SLOTS_PER_LEVEL * self._levels
        if slots is None or len(slots) <= most:
            return states, slots
        held = sorted(_held(states))
        kept = slots.new_empty((max(len(held), most), *slots.shape[1:]))
        kept[: len(held)] = slots[torch.tensor(held, dtype=torch.long, device=kept.device)]
        return {name: state.moved(held) for name, state in states.items()}, kept

    def _push_mosaics(
        self,
        x: Tensor,
        pieces: dict[StreamId, tuple[int, int]],
        known: _Format,
        backend: Backend,
        out: Tensor,
    ) -> tuple[dict[StreamId, _State], Tensor | None]:
        """Pools x into out; the streams' new states, and no slots. States as they are may be written to only where
        nothing is yet."""
        states: dict[StreamId, _State] = {}
        ends: dict[int, Tensor] = {}  # summaries that replace frames of x, of those gridded here
        videos: list[tuple[int, ...]] = []  # as they are packed in x: whole periods, frames in between
        for stream, (first, count) in pieces.items():
            state = self._states[stream]
            before, whole = known.whole_periods(state.frames, count)
            for start, stop in ((0, before), (before + whole, count)):
                state = replace(state, frames=self._states[stream].frames + start)
                chunk = _Chunk(x[first + start : first + stop], state, known, backend)
                state = chunk.run()
                ends |= {first + start + frame: summary for frame, summary in chunk.replaced.items()}
            states[stream] = state
            videos += [(1,) * before, (whole,), (1,) * (count - before - whole)]
        first = 0
        for counts in _joined(videos):
            rows = slice(first, first + sum(counts))
            if not all(frame in ends for frame in range(rows.start, rows.stop)):
                backend.grid_pool(x[rows], self._videos_plan(known, counts), *self._settings, out[rows])
            first = rows.stop
        if ends:
            frames = torch.stack(list(ends.values()))
            pooled = torch.empty_like(out[: len(ends)])
            backend.grid_pool(frames, self._videos_plan(known, (1,) * len(ends)), *self._settings, pooled)
            out[torch.tensor(list(ends), device=out.device)] = pooled
        return states, None

    def _videos_plan(self, known: _Format, videos: Sequence[int]) -> GridPlan:
        """Of videos of so many frames each. Plans are cached by these: callers ask for few kinds."""
        return grid_plan(videos, known.height, known.width, **self._planned)

    def _pieces(
        self, n: int, streams: Sequence[StreamId] | None, frame_counts: Sequence[int] | None
    ) -> dict[StreamId, tuple[int, int]]:
        """(first frame, number of frames) of every stream."""
        names = self.streams if streams is None else streams
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"streams must be a sequence of open streams, got {names!r}")
        for name in names:
            self._known(name)
        if len(set(names)) < len(names):
            raise ValueError(f"streams must name each stream once, got {list(names)}")
        if frame_counts is None:
            if not names:
                raise ValueError("streams must name an open stream, got []")
            if len(names) != 1:
                raise ValueError(f"frame_counts must be given for {len(names)} streams, got None for {list(names)}")
            frame_counts = [n]
        allowed = f"frame_counts must be one number of frames for each of {list(names)}, got {frame_counts}"
        try:
            counts = [operator.index(count) for count in frame_counts]
        except TypeError as error:
            raise TypeError(allowed) from error
        if len(counts) != len(names) or min(counts, default=0) < 0:
            raise ValueError(allowed)
        if sum(counts) != n:
            raise ValueError(f"frame_counts must sum to n = {n}, got {counts} with sum {sum(counts)}")
        firsts = [sum(counts[:number]) for number in range(len(counts))]
        return dict(zip(names, zip(firsts, counts, strict=True), strict=True))

    def _format_of(self, x: Tensor) -> _Format:
        known = self._format
        started = any(state.frames for state in self._states.values())
        if known is not None and known.same_tokens(x) and started:
            return known
        if known is not None and started:
            raise ValueError(
                f"x must be as the frames before it, (n, {known.height}, {known.width}, {known.channels}) "
                f"{known.dtype} on {known.device}, until all streams are reset; got {tuple(x.shape)} {x.dtype} on "
                f"{x.device}"
            )
        _, H, W, C = x.shape
        return self._make_format(H, W, C, x.dtype, x.device, self.backend)

    def _make_format(self, H: int, W: int, C: int, dtype: torch.dtype, device: torch.device, backend: str) -> _Format:
        plan = grid_plan((), H, W, **self._planned)
        segments = tuple(_Segment.of(plan, number) for number in range(self._levels))
        return _Format(H, W, C, dtype, device, backend, plan, segments)

    def _new_state(self) -> _State:
        return _State(0, (None,) * self._levels, ((-1,) * 4,) * self._levels)

    def _known(self, stream: StreamId) -> StreamId:
        _check_name(stream)
        if stream not in self._states:
            raise ValueError(f"stream must be open, got {stream!r}; open are {list(self._states)}")
        return stream

    def _only(self, stream: StreamId | None) -> StreamId:
        if stream is not None:
            return self._known(stream)
        if not self._states:
            raise ValueError("streams must name an open stream, got []: none is open")
        if len(self._states) != 1:
            raise ValueError(f"stream must be named, got None; open are {list(self._states)}")
        return next(iter(self._states))

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """All that a stream needs to go on: numbers, strings, lists, dicts and copies of tensors.

        `torch.save` writes it, `torch.load(weights_only=True)` reads it.
        """
        known = self._format
        held = sorted(_held(self._states))
        return {
            "version": VERSION,
            "arguments": {name: _plain(value) for name, value in self.arguments.items()},
            "format": None
            if known is None
            else {
                "height": known.height,
                "width": known.width,
                "channels": known.channels,
                "dtype": str(known.dtype).removeprefix("torch."),
                "device": str(known.device),
                "backend": known.backend,
                "miniatures": known.miniatures,
            },
            "miniatures": [] if self._slots is None else list(self._slots[held].unbind()),
            "streams": [
                {
                    "stream": stream,
                    "frames": state.frames,
                    "groups": [
                        group
                        and {
                            "mosaic": group.mosaic.clone(),
                            "edges": {place: [t.clone() for t in edge] for place, edge in group.edges.items()},
                        }
                        for group in state.groups
                    ],
                    "tiles": [list(tiles) for tiles in state.moved(held).tiles],
                }
                for stream, state in self._states.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device | str | None = None) -> None:
        """Goes on where `state_dict` was called: replaces all streams and what is kept of them.

        device: where the frames to come will be; by default where they were. The backend stays what it was, since
        another one has other bits.

        Raises ValueError for a state of another version, of other arguments, or a damaged one, and for a device that is
        not there; nothing has changed then.
        """
        try:
            version, arguments = state["version"], state["arguments"]
            arguments = dict(arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("state must be what state_dict returned: version or arguments are missing") from error
        if version != VERSION:
            raise ValueError(f"state must be of version {VERSION}, got {version!r}")
        mine = {name: _plain(value) for name, value in self.arguments.items()}
        for name, value in mine.items():
            if arguments.get(name) != value:
                raise ValueError(f"state must be of {name}={value!r}, got {arguments.get(name)!r}")
        try:
            known, states, slots = self._read(state, device)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"state is damaged: {type(error).__name__}: {error}") from error
        self._format, self._states, self._slots = known, states, slots

    def _read(
        self, state: dict[str, Any], device: torch.device | str | None
    ) -> tuple[_Format | None, dict[StreamId, _State], Tensor | None]:
        given, known, slots = state["format"], None, None
        if given is not None:
            sizes = [int(given[name]) for name in ("height", "width", "channels")]
            dtype = getattr(torch, given["dtype"])
            if dtype not in DTYPES or given["backend"] not in backend_names()[1:]:
                raise ValueError(f"state is damaged: dtype {given['dtype']!r}, backend {given['backend']!r}")
            if self.backend not in ("auto", given["backend"]):
                raise ValueError(f"state must be of backend={self.backend!r}, got {given['backend']!r}")
            asked = (given["device"], "the state's device") if device is None else (device, "device")
            where = usable_device(*asked)
            known = self._make_format(sizes[0], sizes[1], sizes[2], dtype, where, given["backend"])
            known = replace(known, miniatures=bool(given["miniatures"]))
            kept = [_read_tensor(tensor, known, *_miniature_size(known)) for tensor in state["miniatures"]]
            slots = torch.stack(kept) if kept else None
        held: set[int] = set()
        states: dict[StreamId, _State] = {}
        for entry in state["streams"]:
            frames, groups = entry["frames"], []
            _check_name(entry["stream"])
            if entry["stream"] in states:
                raise ValueError(f"state is damaged: stream {entry['stream']!r} is there twice")
            if not isinstance(frames, int) or frames < 0 or len(entry["groups"]) != self._levels:
                raise ValueError(f"state is damaged: stream {entry['stream']!r} has frames {frames!r}")
            for number, group in enumerate(entry["groups"]):
                if (group is not None) != (known is not None and _keeps(known, number, frames)):
                    raise ValueError(f"state is damaged: stream {entry['stream']!r} misses level {number}, or has it")
                groups.append(None if group is None or known is None else _read_group(group, known, number, frames))
            tiles = tuple(tuple(int(slot) for slot in of_level) for of_level in entry["tiles"])
            expected = _places(known, frames) if known is not None and known.miniatures else [set()] * self._levels
            if [{place for place, slot in enumerate(of_level) if slot >= 0} for of_level in tiles] != expected:
                raise ValueError(f"state is damaged: stream {entry['stream']!r} has tiles {entry['tiles']}")
            states[entry["stream"]] = _State(frames, tuple(groups), tiles)
            held |= states[entry["stream"]].slots()
        if held != set(range(len(state["miniatures"]))) or any(
            len(of_level) != 4 for one in states.values() for of_level in one.tiles
        ):
            raise ValueError(f"state is damaged: {len(state['miniatures'])} miniatures for the slots {sorted(held)}")
        return known, states, slots


def _joined(videos: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Without those of no frames, and frames in a row in one."""
    for single, group in itertools.groupby(filter(any, videos), lambda counts: counts[0] == 1):
        counts = list(group)
        yield from [tuple(itertools.chain(*counts))] if single else counts


def _held(states: dict[StreamId, _State]) -> set[int]:
    """The slots that hold something."""
    return {slot for state in states.values() for slot in state.slots()}


def _check_name(stream: StreamId) -> None:
    if isinstance(stream, bool) or not isinstance(stream, (int, str)):
        raise TypeError(f"a stream must be an integer or a string, got {stream!r}")


_PLAIN_WINDOWS = {"stride": None, "padding": (0, 0), "ceil_mode": False, "count_include_pad": True}


def _miniature_size(known: _Format) -> tuple[int, int, int]:
    return -(-known.height // 2), -(-known.width // 2), known.channels


def _places(known: _Format, frames: int) -> list[set[int]]:
    """On the way by miniatures, the places of each level's mosaic of which one is kept after so many frames."""
    found = []
    for level, segment in enumerate(known.segments):
        first = frames - frames % segment.length
        tokens = known.need(level, first + segment.target).tokens if segment.target >= frames - first else ()
        arrived = (segment.place[source] for source in segment.sources if source < frames - first)
        found.append({place for place in arrived if boxes_behind(known.plan, tokens, place)})
    return found


def _keeps(known: _Format, level: int, frames: int) -> bool:
    """Whether a level keeps a mosaic of its open group after so many frames."""
    if known.miniatures:
        return False
    segment = known.segments[level]
    first = frames - frames % segment.length
    some = any(source < frames - first for source in segment.sources) and segment.target >= frames - first
    return some and known.used(level, first + segment.target)


def _read_group(group: dict[str, Any], known: _Format, level: int, frames: int) -> _Group:
    segment, (H, W, C) = known.segments[level], (known.height, known.width, known.channels)
    edges = {
        place: (_read_tensor(row, known, W, C), _read_tensor(col, known, H, C))
        for place, (row, col) in group["edges"].items()
    }
    filled = sum(source < frames % segment.length for source in segment.sources)
    if set(edges) != {place for place in range(filled) if segment.keeps_edges(place)}:
        raise ValueError(f"state is damaged: level {level} has edges of {sorted(edges)}")
    return _Group(_read_tensor(group["mosaic"], known, H, W, C), edges)


def _read_tensor(tensor: Tensor, known: _Format, *shape: int) -> Tensor:
    if tuple(tensor.shape) != shape or tensor.dtype != known.dtype:
        raise ValueError(f"state is damaged: {tensor.dtype} of shape {tuple(tensor.shape)}, expected {shape}")
    return tensor.to(known.device, copy=True).contiguous()


class _Chunk:
    """The next frames of one stream. `replaced` are the summaries that replace some of them."""

    def __init__(self, x: Tensor, state: _State, known: _Format, backend: Backend) -> None:
        self.x, self.state, self.known, self.backend = x, state, known, backend
        self.start, self.stop = state.frames, state.frames + len(x)
        self.replaced: dict[int, Tensor] = {}

    def run(self) -> _State:
        """Level by level, as each reads what the level before left; the stream's state after the chunk."""
        groups = tuple(self._level(number) for number in range(len(self.known.segments)))
        return _State(self.stop, groups, self.state.tiles)

    def _frame(self, frame: int) -> Tensor:
        """What a frame holds by now, counted from the start of the stream."""
        return self.replaced.get(frame - self.start, self.x[frame - self.start])

    def _level(self, number: int) -> _Group | None:
        segment, group = self.known.segments[number], self.state.groups[number]
        first = self.start - self.start % segment.length
        while first < self.stop:
            target = first + segment.target
            if self.known.used(number, target):
                group = self._take(segment, first, group)
                if self.start <= target < self.stop:
                    assert group is not None
                    self.replaced[target - self.start] = group.mosaic
                    group = None
            first += segment.length
        return group

    def _take(self, segment: _Segment, first: int, group: _Group | None) -> _Group | None:
        """The group of the segment that starts at `first`, with the sources that this chunk has of it."""
        here = {
            place: self._frame(first + source)
            for place, source in enumerate(segment.sources)
            if self.start <= first + source < self.stop
        }
        if not here:
            return group
        edges = {} if group is None else group.edges
        mosaic = None if group is None else group.mosaic
        for place, made in self._made(segment, here, edges):
            if mosaic is None:
                mosaic = made
                continue
            # Parts of places that are not there yet may hold anything: if this call fails, nobody will have read them.
            rows, cols = segment.part(place)
            mosaic[rows, cols] = made[rows, cols]
        assert mosaic is not None
        kept = {place: (frame[-1].clone(), frame[:, -1].clone()) for place, frame in here.items()}
        return _Group(mosaic, edges | {place: edge for place, edge in kept.items() if segment.keeps_edges(place)})

    def _made(
        self, segment: _Segment, here: dict[int, Tensor], edges: dict[int, tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Places of a mosaic, and summaries that are right in the part which the tile there completes."""
        if not edges and (len(here) == 1 or not (segment.row_seams or segment.col_seams)):
            for place, frame in here.items():
                made = torch.empty((1, *frame.shape), dtype=frame.dtype, device=frame.device)
                self.backend.repeat_in_grid(frame[None], segment.plan, made)
                yield place, made[0]
            return
        S = len(segment.sources)
        some = next(iter(here.values()))
        sources = torch.stack([here.get(place, some) for place in range(S)])
        for place, (row, col) in edges.items():
            sources[place, -1], sources[place, :, -1] = row, col
        made = torch.empty_like(sources)
        self.backend.temporal_grid(sources, segment.plan, made)
        summary = made[segment.plan.levels[0].targets[0]].clone()  # without the memory of the others
        yield from dict.fromkeys(here, summary).items()


def usable_device(device: torch.device | str, called: str) -> torch.device:
    """The device that tensors there say they are on: cuda is one of cuda:0, cuda:1, … ValueError if there is none."""
    try:
        return torch.empty(0, device=device).cpu().to(device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"{called} must be one that can be used here, got {str(device)!r}: {cause}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
