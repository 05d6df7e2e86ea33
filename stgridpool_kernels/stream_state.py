"""The state of each stream of a `GridPoolStream`, and the checks of states given to its `load_state_dict`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .ops import DTYPES
from .plan.values import shown

StreamId = int | str

VERSION = 3
"""Version of the form of states; states of other versions are refused."""

STATE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
"""Supported dtypes of frames, by their names in a state."""


LONGEST_SIDE = 1 << 16
"""Most rows and columns of frames if a state keeps none: a plan of larger ones, which nothing shows, takes memory."""


@dataclass(frozen=True)
class StreamState:
    """The state of one stream: the number of frames it has seen, and the slots of the nodes that it keeps.

    groups: for every level, slots by places in the mosaic of the group that is open.
    """

    frames: int
    groups: tuple[dict[int, int], ...]

    def slots(self) -> list[int]:
        """All slots of the stream, each once, in the order of `EndlessLiveness.kept`."""
        return list(dict.fromkeys(slot for group in self.groups for _, slot in sorted(group.items())))

    def moved(self, slots: Mapping[int, int]) -> StreamState:
        """This state after the contents of slots were moved. slots: new slots by old ones."""
        groups = ({place: slots[slot] for place, slot in group.items()} for group in self.groups)
        return StreamState(self.frames, tuple(groups))


States = dict[StreamId, StreamState]
"""States of the open streams, by name."""


def held_slots(states: States) -> set[int]:
    """Slots that these streams occupy."""
    return {slot for state in states.values() for slot in state.slots()}


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `grid_pool` in the form of a state, with lists in place of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def plain_format(like: Tensor, backend: str) -> dict[str, Any]:
    """The format, in the form of a state, of frames like those of a tensor (n, H, W, C)."""
    _, H, W, C = like.shape
    dtype = str(like.dtype).removeprefix("torch.")
    return {"height": H, "width": W, "channels": C, "dtype": dtype, "device": str(like.device), "backend": backend}


def usable_device(where: torch.device | str, entry: str) -> torch.device:
    """Return a device with its index, as cuda:0 for cuda. Raises ValueError that names `entry` if it cannot be used."""
    try:
        return torch.empty(0, device=where).cpu().to(where).device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        usable = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        # Torch explains CUDA in a sentence; of other devices it lists every kernel that it was built with.
        cause = f" ({str(error).splitlines()[0].split('. ')[0]})" if str(where).startswith("cuda") else ""
        message = f"{entry} must be one that can be used here, got {shown(str(where))}{cause}; allowed: {usable}"
        raise ValueError(message) from error


def copied(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Return a detached contiguous copy of a tensor; with device None it stays on its device."""
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def expect(right: bool, entry: str, allowed: object, got: object) -> None:
    """Raise ValueError, naming the entry of a state, the values it may have and the one it has, unless `right`."""
    if not right:
        raise ValueError(f"{entry} must be {allowed}, got {shown(got)}")


def check_state(state: Any, arguments: Mapping[str, Any], backends: Sequence[str]) -> None:
    """Raise ValueError, naming the entry, unless a state has the form of `VERSION` and these arguments.

    Every tensor must have the dtype of frames, and the shape of a frame or of a thumbnail. The caller checks the number
    of tensors, and which of the two shapes they have, since both depend on a plan.
    """
    expect(isinstance(state, dict), "state", "what state_dict returned", state)
    expect(_equals(state.get("version"), VERSION), "state['version']", VERSION, state.get("version"))
    _check_keys(state, "state", ("version", "arguments", "format", "streams"))
    _check_keys(state["arguments"], "state['arguments']", arguments)
    for name, value in arguments.items():
        got = state["arguments"][name]
        expect(_equals(got, value), f"state['arguments'][{name!r}]", repr(value), got)
    form, streams = state["format"], state["streams"]
    if form is not None:
        _check_format(form, backends)
    _check_streams(streams, seen=form is not None)
    if form is not None:
        H, W, C = form["height"], form["width"], form["channels"]
        if not any(stream["kept"] for stream in streams):  # nothing shows that there are such frames
            allowed = f"of frames of at most {LONGEST_SIDE} rows and columns, as no tensor is kept"
            expect(max(H, W) <= LONGEST_SIDE, "state['format']", allowed, (H, W, C))
        check_kept(streams, form["dtype"], [(H, W, C), (-(-H // 2), -(-W // 2), C)])


def _check_format(form: Any, backends: Sequence[str]) -> None:
    _check_keys(form, "state['format']", ("height", "width", "channels", "dtype", "device", "backend"))
    for name in ("height", "width", "channels"):
        _check_count(form[name], f"state['format'][{name!r}]", 1)
    for name, names in (("dtype", list(STATE_DTYPES)), ("backend", backends)):
        right = any(_equals(form[name], known) for known in names)
        expect(right, f"state['format'][{name!r}]", " or ".join(map(repr, names)), form[name])
    expect(isinstance(form["device"], str), "state['format']['device']", "a string", form["device"])
    shape = form["height"], form["width"], form["channels"]
    expect(math.prod(shape) < 1 << 48, "state['format']", "of frames that fit into memory", shape)


def _check_streams(streams: Any, seen: bool) -> None:
    """Raise ValueError, naming the entry, unless `streams` has the form of a state. seen: whether it has a format."""
    expect(isinstance(streams, list), "state['streams']", "a list", streams)
    names: set[StreamId] = set()
    for number, stream in enumerate(streams):
        entry = f"state['streams'][{number}]"
        _check_keys(stream, entry, ("stream", "frames", "kept"))
        name, frames, kept = stream["stream"], stream["frames"], stream["kept"]
        right = is_stream_id(name) and name not in names
        expect(right, f"{entry}['stream']", "an integer or a string, each once", name)
        names.add(name)
        _check_count(frames, f"{entry}['frames']", 0)
        expect(seen or frames == 0, f"{entry}['frames']", "0 as state['format'] is None", frames)
        expect(isinstance(kept, list), f"{entry}['kept']", "a list", kept)


def check_kept(streams: Iterable[Mapping[str, Any]], dtype: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError, naming the entry, unless every tensor in the streams of a state has that dtype and a shape.

    Its elements must be apart in memory: an expanded tensor claims sizes that a state of a few bytes can hold.
    """
    allowed = f"a dense tensor of {STATE_DTYPES[dtype]} and shape {' or '.join(map(str, shapes))}"
    taken: Counter[int] = Counter()  # bytes by storage
    for number, stream in enumerate(streams):
        for place, tensor in enumerate(stream["kept"]):
            strided = type(tensor) is Tensor and not tensor.is_nested and tensor.layout == torch.strided
            dense = strided and not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.nbytes
            got = (tensor.dtype, tuple(tensor.shape)) if dense else type(tensor)
            right, entry = got in [(STATE_DTYPES[dtype], shape) for shape in shapes], f"['kept'][{place}]"
            expect(right, f"state['streams'][{number}]{entry}", allowed, got)
            storage = tensor.untyped_storage()
            taken[storage._cdata] += tensor.nbytes
            apart = taken[storage._cdata] <= storage.nbytes()
            expect(apart, f"state['streams'][{number}]{entry}", "apart in memory from other tensors", got)


def _check_keys(value: Any, entry: str, keys: Iterable[str]) -> None:
    right = isinstance(value, dict) and value.keys() == set(keys)
    expect(right, entry, f"a dict of {', '.join(keys)}", list(value) if isinstance(value, dict) else value)


def _check_count(value: Any, entry: str, least: int) -> None:
    expect(type(value) is int and value >= least, entry, f"an integer of at least {least}", value)


def is_stream_id(name: Any) -> bool:
    """Return whether `name` can name a stream: integers and strings can, booleans cannot."""
    return isinstance(name, (int, str)) and not isinstance(name, bool)


def _equals(value: Any, expected: Any) -> bool:
    """Return whether a value equals `expected` and is a number, a string, None or a list of them."""
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_equals, value, expected))
    return isinstance(value, (Real, str, NoneType)) and bool(value == expected)
