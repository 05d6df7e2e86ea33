"""Streams: whatever the chunks, what comes out is what grid_pool gives for the whole video, bit by bit."""

from __future__ import annotations

import copy
import functools
import io
import math
import operator
import pickle
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from decimal import Decimal
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import stgridpool_kernels
from stgridpool_kernels import GridPoolStream, grid_plan, stream
from stgridpool_kernels.backends import BACKENDS, compiled, device_tables
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan.tables import ChunkEntry, chunk_tables
from stgridpool_kernels.stream import SLOTS_PER_LEVEL
from tests.support.cases import run, tokens
from tests.support.strategies import gridding_arguments, norm_arguments, temperatures, window_arguments
from tests.support.tolerance import assert_same_bits

pytestmark = pytest.mark.filterwarnings("error")

Arguments = dict[str, Any]

# With sampling "first" any number of frames is right; with "last" the strides divide 24.
CALLS: dict[str, Arguments] = {
    "published": {},
    "published-ceil": {"ceil_mode": True},
    "published-first": {"sampling": "first"},
    "published-p3": {"norm_type": 3.0},
    "paper": {"sampling": "first", "resize": "bilinear", "normalize_norm": False},
    "bilinear": {"resize": "bilinear", "frame_strides": (1, 2)},
    "bilinear-mixed": {"resize": "bilinear", "frame_strides": (1, 2, 1), "grid_shape": (2, 3, 2, 1, 1, 2)},
    "overlapping": {"frame_strides": (1, 3), "grid_shape": (1, 2, 3, 1), "kernel_size": 3, "stride": 2, "padding": 1},
    "whole frames": {"frame_strides": (2, 1, 3), "grid_shape": (2, 1, 3, 2, 1, 1), "sampling": "first"},
    "overwritten": {"frame_strides": (1, 2), "grid_shape": (2, 2, 1, 1), "sampling": "first"},
    "nested": {"frame_strides": (1, 2, 1, 4)},
    "adaptive": {"frame_strides": (1, 2), "output_size": (3, 4), "norm_type": math.inf},
    "off": {"frame_strides": ()},
}
FEW = ("published", "bilinear-mixed", "overlapping", "adaptive")
"""The calls that Triton's interpreter runs outside the slow tests: fused kernels, other grids, other windows, both."""


def named(*names: str) -> Any:
    """Parametrizes a test over calls by their names, all by default."""
    slow = pytest.mark.slow_interpreted
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[slow] * (name not in FEW)) for name in names or CALLS]
    )


two_calls = pytest.mark.parametrize("name", ["published", "bilinear"])  # fused kernels, and others


def small(backend: str, device: torch.device) -> tuple[int, int]:
    """H and W of a frame: odd, and few where Triton's interpreter runs."""
    return (3, 5) if backend == "triton" and device.type == "cpu" else (5, 7)


def video(backend: str, device: torch.device, dtype: torch.dtype = torch.float32, C: int = 8) -> Tensor:
    """24 frames, 12 in the interpreter: multiples of the strides of every level of `CALLS` that completes a group."""
    T = 12 if backend == "triton" and device.type == "cpu" else 24
    return tokens(T, *small(backend, device), C, dtype=dtype, device=device)


def pushed(stream: GridPoolStream, chunks: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([stream.push(chunk) for chunk in chunks])


# ---- the same bits ----


@pytest.mark.parametrize(
    "cuts",
    [pytest.param([1] * 6, id="frames", marks=pytest.mark.slow_interpreted), pytest.param([5, 0, 1], id="chunks")],
)
@named()
def test_chunks_give_the_bits_of_the_whole_video(
    name: str, cuts: list[int], backend: str, device: torch.device
) -> None:
    dtype = (torch.bfloat16, torch.float32)[(list(CALLS).index(name) + len(cuts)) % 2]
    x = video(backend, device, dtype, C=11)
    whole = run(backend, "grid_pool", x, **CALLS[name])
    stream = GridPoolStream(backend=backend, **CALLS[name])
    assert_same_bits(pushed(stream, x.split(cuts * (len(x) // 6))), whole)
    assert stream.matches_offline()
    assert stream.frames() == len(x)


@pytest.mark.parametrize("name", CALLS)
def test_float64(name: str) -> None:
    arguments = CALLS[name]
    x = tokens(24, 5, 7, 11, dtype=torch.float64)
    whole = stgridpool_kernels.grid_pool(x, **arguments)
    assert_same_bits(pushed(GridPoolStream(**arguments), x.split(5)), whole)


@settings(max_examples=20)
@given(data=st.data())
def test_any_chunking_of_any_call(data: st.DataObject, backend: str, device: torch.device) -> None:
    interpreted = backend == "triton" and device.type == "cpu"
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, *[torch.float16] * (not interpreted)]))
    most = 3 if interpreted else 9
    H, W = data.draw(st.integers(1, most)), data.draw(st.integers(1, most))
    C = data.draw(st.sampled_from([3, 16, 1]))
    arguments = data.draw(st.sampled_from([{}, None, {"sampling": "first"}]))
    if arguments is None:
        arguments = data.draw(gridding_arguments()) | data.draw(window_arguments(H, W)) | data.draw(norm_arguments(C))
        arguments |= {"temperature": data.draw(temperatures)}
    elif min(H, W) == 1 or data.draw(st.booleans()):
        arguments = arguments | {"ceil_mode": True}
    strides = arguments.get("frame_strides", (2, 4, 8))
    T = data.draw(st.integers(0, 12 if interpreted else 40))
    if arguments.get("sampling", "last") == "last":
        T -= T % math.lcm(*strides)
    x = tokens(T, H, W, C, dtype=dtype, device=device)
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=6)))
    chunks = [x[start:stop] for start, stop in zip([0, *cuts], [*cuts, T], strict=True)]
    stream = GridPoolStream(backend=backend, **arguments)
    result = pushed(stream, chunks)
    assert stream.matches_offline()
    assert_same_bits(result, run(backend, "grid_pool", x, **arguments))


LAYOUTS = {"channels first": (0, 3, 1, 2), "frames last": (3, 1, 2, 0), "columns first": (0, 2, 1, 3)}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("published", "channels first"),
        ("overlapping", "frames last"),
        *(
            pytest.param(*others, marks=pytest.mark.slow_interpreted)
            for others in (
                *(("published", layout) for layout in ("frames last", "columns first")),
                *(("nested", "frames last"), ("overlapping", "channels first"), ("bilinear", "columns first")),
            )
        ),
    ],
)
def test_chunks_of_a_permuted_video(name: str, layout: str, backend: str, device: torch.device) -> None:
    order = LAYOUTS[layout]
    x = video(backend, device, C=11).permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    whole = run(backend, "grid_pool", x, **CALLS[name])
    assert_same_bits(pushed(GridPoolStream(backend=backend, **CALLS[name]), x.split(5)), whole)
    if backend != "triton":  # whose sums follow the layout
        contiguous = [part.contiguous() for part in x.split(5)]
        assert_same_bits(pushed(GridPoolStream(backend=backend, **CALLS[name]), contiguous), whole)


@settings(max_examples=12)
@given(data=st.data())
def test_streams_packed_in_one_call(data: st.DataObject, backend: str, device: torch.device) -> None:
    """Streams that are opened, reset and closed as they like give each what they give alone."""
    arguments = data.draw(st.sampled_from([{}, {"sampling": "first"}, CALLS["overlapping"], CALLS["bilinear"]]))
    H, W = small(backend, device)
    T = 8 if backend == "triton" else 24  # the strides of every level that completes a group divide both
    videos = {name: tokens(T, H, W, 8, device=device, seed=seed) for seed, name in enumerate(["a", 7, "c"])}
    whole: dict[int | str, Tensor] = {}
    server = GridPoolStream(streams=["a", 7], backend=backend, **arguments)
    for _ in range(2 if backend == "triton" else 12):
        match data.draw(st.sampled_from(["push"] * 5 + ["toggle", "reset"])):
            case "toggle":
                name = data.draw(st.sampled_from(list(videos)))
                server.close(name) if name in server.streams else server.open(name)
            case "reset" if server.streams:
                server.reset(data.draw(st.sampled_from(server.streams)))
            case "push" if server.streams:
                names = data.draw(st.permutations(server.streams))
                seen = {name: server.frames(name) for name in names}
                counts = {name: data.draw(st.integers(0, min(9, T - seen[name]))) for name in names}
                parts = [videos[name][seen[name] : seen[name] + counts[name]] for name in names]
                out = server.push(torch.cat(parts), streams=names, frame_counts=list(counts.values()))
                for name, piece in zip(names, out.split(list(counts.values())), strict=True):
                    if name not in whole:
                        whole[name] = run(backend, "grid_pool", videos[name], **arguments)
                    assert_same_bits(piece, whole[name][seen[name] : seen[name] + counts[name]])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory, deterministic = before
    torch.use_deterministic_algorithms(deterministic)


@named("published", "bilinear-mixed", "overlapping", "whole frames", "nested", "adaptive")
def test_nan_goes_where_it_goes_in_the_whole_video(
    name: str, poisoned: None, backend: str, device: torch.device
) -> None:
    x = video(backend, device)
    for number, value in enumerate([math.nan, math.inf, -math.inf, math.nan]):
        x[5 * number + 1 - len(x), number % x.shape[1], -1 - number, number] = value
    whole = run(backend, "grid_pool", x, **CALLS[name])
    result = pushed(GridPoolStream(backend=backend, **CALLS[name]), x.split([1, 0, 5, 2, 1, len(x) - 9]))
    torch.testing.assert_close(result, whole, rtol=0, atol=0, equal_nan=True)
    assert whole.isnan().any()
    assert not whole.isnan().all()


@pytest.mark.parametrize("T", [9, 30])
def test_what_differs_where_strides_do_not_divide(T: int, backend: str, device: torch.device) -> None:
    """A stream samples the last frame of every stride, as grid_pool of the video with more frames behind it does, up to
    a multiple; grid_pool of T frames does not."""
    x = tokens(T, *small(backend, device), 8, device=device)
    stream = GridPoolStream(backend=backend)
    result = pushed(stream, x.split(4))
    assert not stream.matches_offline()
    longer = torch.cat([x, x[-1:].expand(-T % 32, *x.shape[1:])])
    assert_same_bits(result, run(backend, "grid_pool", longer)[:T])
    whole = run(backend, "grid_pool", x)
    assert_same_bits(result[:7], whole[:7])
    assert not torch.equal(result, whole)


def test_matches_offline_says_when() -> None:
    stream = GridPoolStream(frame_strides=(2, 5), grid_shape=(2, 2))
    found = []
    for T in range(1, 31):
        stream.push(torch.ones(1, 2, 2, 1))
        found += [T] if stream.matches_offline() else []
    assert found == [*range(1, 8), 8, 10, 12, 14, 16, 18, 20, 30]
    assert GridPoolStream(sampling="first").matches_offline()


# ---- memory ----


@pytest.mark.slow_interpreted
@named()
def test_state_is_bounded(name: str, backend: str, device: torch.device) -> None:
    arguments = CALLS[name]
    H, W = small(backend, device)
    x = tokens(12 if backend == "triton" else 96, H, W, 4, device=device)
    run(backend, "grid_pool", x[:1], **arguments)  # skips what the backend refuses
    stream = GridPoolStream(backend=backend, **arguments)
    levels = grid_plan((), H, W, **{key: value for key, value in arguments.items() if key in stream._planned}).levels
    frames = sum(level.rows * level.cols - (arguments.get("sampling") != "first") for level in levels)
    thumbnails = SLOTS_PER_LEVEL * len(levels) * -(-H // 2) * -(-W // 2)
    for part in (*x.split(3), x):
        stream.push(part)
        fused = isinstance(stream._slots, Tensor)
        assert stream.state_bytes <= (thumbnails if fused else frames * H * W) * 4 * 4
        kept = [stream._slots] if isinstance(stream._slots, Tensor) else stream._slots.values()
        assert not any(x.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for tensor in kept)


def kept_frames(frames: int, H: int = 4, W: int = 6, **arguments: Any) -> list[float]:
    """Return how many frames a stream keeps after each of `frames` frames, where they are kept as they are."""
    stream = GridPoolStream(backend="reference", **arguments)
    found = []
    for frame in tokens(frames, H, W, 2):
        stream.push(frame[None])
        found.append(stream.state_bytes / frame.nbytes)
    return found


def test_sampled_frames_of_open_groups_are_kept() -> None:
    """Each once, though frames 1 and 5 are sampled by both levels; frame 3 as the summary that replaced it."""
    assert kept_frames(8, frame_strides=(1, 2)) == [1, 2, 3, 2, 3, 4, 5, 0]
    assert kept_frames(9, frame_strides=(2,), grid_shape=(1, 2), sampling="first") == [1, 1, 2, 0, 1, 1, 2, 0, 1]


def test_frames_that_no_result_depends_on_are_not_kept() -> None:
    """Tiles that the crop removes, rows that no window reaches, and a summary that is replaced before it is read."""
    late = {"frame_strides": (2,), "sampling": "first"}  # the summary comes one frame after the last that it reads
    assert kept_frames(6, H=4, grid_shape=(3, 1), **late) == [1, 1, 2, 2, 2, 0]
    assert kept_frames(4, H=3, grid_shape=(2, 1), **late) == [1, 1, 1, 0]
    assert kept_frames(4, H=3, grid_shape=(2, 1), ceil_mode=True, **late) == [1, 1, 2, 0]
    assert kept_frames(4, **CALLS["overwritten"]) == [1, 0, 1, 0]


OPS = ("grid_pool", "temporal_grid", "pool_chunk")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[tuple[str, Any]]:
    """Every call of one of the backend's `OPS`: its name, and what comes behind x."""
    number = next(n for n, known in enumerate(BACKENDS) if known.name == backend)
    found: list[tuple[str, Any]] = []
    for name in OPS:
        work = getattr(BACKENDS[number], name)

        def noted(*given: Any, name: str = name, work: Any = work) -> None:
            found.append((name, given[1]))
            work(*given)

        monkeypatch.setitem(BACKENDS[number].__dict__, name, noted)
    return found


def test_a_push_is_one_pass_where_kernels_are_fused(
    called: list[tuple[str, Any]], backend: str, device: torch.device
) -> None:
    """At the published settings, whatever it completes, without a whole period: one call of pool_chunk, no other."""
    x = tokens(17, *small(backend, device), 8, device=device)
    stream = GridPoolStream(backend=backend)
    for part in x.split([1, 7, 9]):
        stream.push(part)
    assert ([name for name, _ in called] == ["pool_chunk"] * 3) == (backend != "reference")


def test_norm_of_some_of_many_channels(backend: str, device: torch.device) -> None:
    """Tokens may have more channels than a block of the fused kernels holds, if the norm runs over fewer."""
    x = tokens(5, 2, 3, 8200, device=device)
    arguments = {"frame_strides": (1,), "norm_channels": 8}
    stream = GridPoolStream(backend=backend, **arguments)
    assert_same_bits(pushed(stream, x.split([3, 2])), run(backend, "grid_pool", x, **arguments))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("arguments", [{"frame_strides": (1, 2)}, CALLS["adaptive"]], ids=["fused", "not fused"])
def test_whole_periods_of_a_chunk_are_a_video(
    arguments: Arguments, called: list[tuple[str, Any]], backend: str, device: torch.device
) -> None:
    """The levels begin again every 8 frames: grid_pool takes what is between, if a chunk has it all."""
    x = tokens(26, *small(backend, device), 2, device=device)
    whole = run(backend, "grid_pool", x, **arguments)
    stream = GridPoolStream(backend=backend, **arguments)
    for _ in range(2):  # the second time, with the memory of the first
        first = stream.push(x[:5])
        called.clear()
        assert_same_bits(torch.cat([first, stream.push(x[5:])]), whole)
        stream.flush()
        assert called[0][0] == "grid_pool"
        assert called[0][1].frame_counts == (16,)
        if arguments is CALLS["adaptive"] or backend == "reference":
            # the groups of both levels that end with frame 7; the last call pools their summary
            assert [name for name, _ in called[1:]] == ["temporal_grid"] * 2 + ["grid_pool"] * 3
            assert [plan.frame_counts for _, plan in called[1:]] == [(4,), (4,), (1, 1, 1), (1, 1), (1,)]
        else:
            assert [name for name, _ in called[1:]] == ["pool_chunk"]


# ---- state_dict ----


@pytest.mark.parametrize(
    ("name", "at"),
    [
        pytest.param("published", 0, marks=pytest.mark.slow_interpreted),
        ("bilinear-mixed", 1),
        ("published", 11),
        *(pytest.param(name, 11, marks=pytest.mark.slow_interpreted) for name in ("paper", "nested", "overlapping")),
    ],
)
def test_state_goes_through_a_file(name: str, at: int, backend: str, device: torch.device) -> None:
    x = video(backend, device)
    whole = run(backend, "grid_pool", x, **CALLS[name])
    first = GridPoolStream(backend=backend, streams=["s", 1], **CALLS[name])
    before = first.push(x[:at], streams=["s"])
    first.push(x[:7], streams=[1])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = GridPoolStream(**CALLS[name])
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.streams == ("s", 1)
    assert second.state_bytes <= first.state_bytes
    for restored in (first, second):
        assert_same_bits(torch.cat([before, restored.push(x[at:], streams=["s"])]), whole)
        assert_same_bits(restored.push(x[7:], streams=[1]), whole[7:])


@two_calls
def test_state_is_a_copy(name: str, backend: str, device: torch.device) -> None:
    x = video(backend, device)
    stream = GridPoolStream(backend=backend, **CALLS[name])
    stream.push(x[:6])
    state = stream.state_dict()
    expected = copy.deepcopy(state)
    again = GridPoolStream(**CALLS[name])
    again.load_state_dict(state)
    rest = stream.push(x[6:])
    assert str(state) == str(expected)
    for tensor in state["streams"][0]["kept"]:
        tensor.fill_(math.nan)
    assert_same_bits(again.push(x[6:]), rest)


DAMAGED: list[tuple[tuple[Any, ...], str]] = [
    (("version", 1), "['version'] must be 3, got 1"),
    (("version", torch.ones(2)), "['version'] must be 3, got Tensor of shape (2,)"),
    (("slots", []), "state must be a dict of version, arguments, format, streams, got ["),
    (("arguments", "temperature", 2.0), "['arguments']['temperature'] must be 1.0, got 2.0"),
    (("arguments", "frame_strides", [2, torch.ones(2), 8]), "['arguments']['frame_strides'] must be [2, 4, 8], got"),
    (("format", None), "['streams'][0]['frames'] must be 0 as state['format'] is None, got 5"),
    (("format", "height", math.inf), "['format']['height'] must be an integer of at least 1, got inf"),
    (("format", "dtype", "float16"), "[0]['kept'][0] must be a dense tensor of torch.float16 and shape (5, 7, 8) or"),
    (("format", "backend", "cpu"), "['format']['backend'] must be 'reference', got 'cpu'"),
    (("format", "device", "abacus"), "['format']['device'] must be one that can be used here, got 'abacus'"),
    (("streams", 1, "stream", 0), "['streams'][1]['stream'] must be an integer or a string, each once, got 0"),
    (("streams", 0, "frames", -1), "['streams'][0]['frames'] must be an integer of at least 0, got -1"),
    (("streams", 0, "frames", 6), "len(state['streams'][0]['kept']) must be 3, got 2"),
    (("streams", 0, "kept", 1, torch.ones(4, 7, 8)), "or (3, 4, 8), got (torch.float32, (4, 7, 8))"),
    (("streams", 0, "kept", 1, torch.ones(3, 4, 8)), "shape (5, 7, 8), got (torch.float32, (3, 4, 8))"),
    (("streams", 0, "kept", 0, torch.ones(5, 7, 8).to_sparse()), "['kept'][0] must be a dense tensor of"),
    (("streams", 0, "kept", 0, torch.ones(5, 7, 8, device="meta")), "['kept'][0] must be a dense tensor of"),
    (("streams", 0, "kept", 0, torch.ones(1).expand(5, 7, 8)), "['kept'][0] must be a dense tensor of"),
    (("arguments", "norm_type", Decimal("sNaN")), "['arguments']['norm_type'] must be 2.0, got Decimal('sNaN')"),
    (("streams", 0, "frames", 10**5000), "len(state['streams'][0]['kept']) must be 0, got 2"),
    (("streams", 0, "frames", -(10**5000)), "must be an integer of at least 0, got an integer of 16610 bits"),
]


@pytest.mark.parametrize(
    ("path", "message"), DAMAGED, ids=lambda value: ".".join(map(str, value[:-1])) if isinstance(value, tuple) else ""
)
def test_state_that_is_damaged_is_refused(path: tuple[Any, ...], message: str) -> None:
    x = tokens(16, 5, 7, 8)
    stream = GridPoolStream(backend="reference", streams=[0, "other"])
    stream.push(x[:5], streams=[0])
    state = stream.state_dict()
    *way, last, value = path
    functools.reduce(operator.getitem, way, state)[last] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        stream.load_state_dict(state)
    assert stream.streams == (0, "other")
    assert_same_bits(stream.push(x[5:], streams=[0]), stgridpool_kernels.grid_pool(x, backend="reference")[5:])


def test_a_state_cannot_claim_one_memory_for_several_frames() -> None:
    """A small file must not take the memory of many frames that share its only tensor."""
    stream = GridPoolStream(backend="reference", streams=[0, 1])
    stream.push(tokens(10, 5, 7, 8), frame_counts=[5, 5])
    state = stream.state_dict()
    stream.load_state_dict(state)
    state["streams"][1]["kept"][0] = state["streams"][0]["kept"][0]
    with pytest.raises(
        ValueError, match=r"\['streams'\]\[1\]\['kept'\]\[0\] must be apart in memory from other tensors"
    ):
        stream.load_state_dict(state)


class Name(IntEnum):
    FIRST = 1


def test_names_of_an_enumeration_are_kept_as_integers() -> None:
    stream = GridPoolStream(streams=[Name.FIRST])
    assert [type(name) for name in stream.streams] == [int]


@pytest.mark.parametrize("side", ["height", "width"])
def test_a_state_that_keeps_nothing_cannot_claim_any_size(side: str) -> None:
    """A state without frames proves no size, and a plan for a size that it merely claims could take all memory."""
    stream = GridPoolStream(frame_strides=[])
    stream.push(tokens(5, 5, 7, 8))
    state = stream.state_dict()
    state["format"][side] = 65536
    stream.load_state_dict(state)
    state["format"][side] = 10**9
    with pytest.raises(
        ValueError, match=r"format'\] must be of frames of at most 65536 rows and columns, as no tensor"
    ):
        stream.load_state_dict(state)


def nested(depth: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


ODD = [
    *(None, True, 0, -1, 10**9, 1 << 64, 10**5000, 0.5, math.inf, math.nan, 1j, "", "meta", "\ud800", b"", [], {}, ()),
    *(torch.ones(2), torch.tensor(5), torch.ones(5, 7, 8).to_sparse(), torch.ones(5, 7, 8, device="meta")),
    *(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), torch.ones(1).expand(5, 7, 8)),
    *(
        torch.nn.Parameter(torch.ones(5, 7, 8)),
        np.ones(3),
        np.int64(5),
        Decimal("sNaN"),
        object(),
        torch.float32,
        nested(10**4),
    ),
]


def entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each dict and list of a state, with the key or index of each of its entries."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from entries(value[key])


@pytest.mark.parametrize("seeds", [range(120), pytest.param(range(120, 1200), marks=pytest.mark.slow)], ids=str)
def test_states_with_random_damage(seeds: range) -> None:
    """A state is loaded, or refused by the name of its entry; then nothing has changed."""
    stream = GridPoolStream(backend="reference", streams=[0, "other"])
    stream.push(tokens(5, 5, 7, 8), streams=[0])
    before, refusals = stream.state_dict(), []
    for seed in seeds:
        draw = random.Random(seed)
        state = copy.deepcopy(before)
        for container, key in draw.sample(list(entries(state)), draw.randint(1, 2)):
            container[key] = draw.choice(ODD)
        try:
            stream.load_state_dict(state)
        except ValueError as refusal:
            refusals.append(str(refusal))
        else:
            stream.load_state_dict(before)
        assert str(stream.state_dict()) == str(before)
    assert all(re.fullmatch(r"(len\()?state.+", refusal) for refusal in refusals)  # in one line
    assert len(refusals) > len(seeds) / 2


@pytest.mark.parametrize("state", [{}, [], None, {"version": 3}, "state"], ids=repr)
def test_state_that_is_none(state: Any) -> None:
    with pytest.raises(ValueError, match=r"^state"):
        GridPoolStream().load_state_dict(state)


def test_nothing_is_built_for_frames_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of 10⁸ rows would take minutes, and the memory of this machine."""
    source = GridPoolStream()
    source.push(tokens(3, 5, 7, 8))
    state = source.state_dict()
    state["format"]["height"] = 10**8
    monkeypatch.setattr(stream, "grid_plan", lambda *_, **__: pytest.fail("a plan was built"))
    with pytest.raises(ValueError, match=r"\['kept'\]\[0\] must be .* \(100000000, 7, 8\)"):
        GridPoolStream().load_state_dict(state)


def test_state_of_a_backend_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    source = GridPoolStream(backend="reference")
    source.push(tokens(3, 5, 7, 8))
    number = next(n for n, known in enumerate(BACKENDS) if known.name == "reference")
    monkeypatch.setitem(BACKENDS[number].__dict__, "unsupported_reason", lambda x, plan: "no such machine")
    with pytest.raises(ValueError, match=r"\['backend'\] must be able to run here, got 'reference': no such machine"):
        GridPoolStream().load_state_dict(source.state_dict())


@pytest.mark.parametrize("where", ["abacus", "cuda:99", "mps:7"])
def test_state_for_a_device_that_is_not_there(where: str) -> None:
    x = tokens(16, 5, 7, 8)
    stream = GridPoolStream()
    stream.push(x[:5])
    with pytest.raises(ValueError, match=f"device must be one that can be used here, got '{where}'"):
        stream.load_state_dict(stream.state_dict(), device=where)
    assert stream.frames() == 5


def test_state_for_a_device_by_any_of_its_names(device: torch.device) -> None:
    """A frame is on cuda:0, whether one says so or says cuda."""
    x = tokens(16, 5, 7, 8, device=device)
    stream = GridPoolStream()
    first = stream.push(x[:5])
    again = GridPoolStream()
    again.load_state_dict(stream.state_dict(), device=f"{device.type}:0")
    assert_same_bits(again.push(x[5:]), stream.push(x[5:]))
    again.load_state_dict(stream.state_dict(), device=device.type)
    assert again.flush().device == first.device


PROCESS = """
import sys, torch
from stgridpool_kernels import GridPoolStream
stream = GridPoolStream(frame_strides=(1, 3), resize="bilinear")
stream.load_state_dict(torch.load(sys.argv[1], weights_only=True))
torch.save(stream.push(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    x = tokens(24, 5, 7, 8)
    arguments = {"frame_strides": (1, 3), "resize": "bilinear"}
    stream = GridPoolStream(**arguments)
    stream.push(x[:10])
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    torch.save(x[10:].clone(), tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("state.pt", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", PROCESS, *files], check=True)
    assert_same_bits(torch.load(tmp_path / "y.pt"), stgridpool_kernels.grid_pool(x, **arguments)[10:])


# ---- reset, flush, errors ----


def test_flush_ends_a_video(backend: str, device: torch.device) -> None:
    x = tokens(16, *small(backend, device), 8, device=device)
    stream = GridPoolStream(backend=backend)
    assert stream.flush().shape == (0, 0, 0, 0)
    for frames in (16, 5, 16):
        out = pushed(stream, x[:frames].split(4))
        rest = stream.flush()
        assert rest.shape == (0, *out.shape[1:])
        assert (rest.dtype, rest.device) == (out.dtype, out.device)
        assert stream.frames() == 0
    assert_same_bits(out, run(backend, "grid_pool", x))


def test_another_format_needs_a_reset() -> None:
    stream = GridPoolStream(backend="reference")
    stream.push(torch.ones(2, 4, 4, 3))
    for other in (torch.ones(1, 4, 6, 3), torch.ones(1, 4, 4, 3).half(), torch.ones(1, 4, 4, 5)):
        with pytest.raises(ValueError, match=r"x must be as the frames before it, \(n, 4, 4, 3\) torch.float32 on cpu"):
            stream.push(other)
        assert stream.frames() == 2
    stream.reset()
    assert stream.push(torch.ones(1, 4, 6, 3).half()).shape == (1, 2, 3, 3)


def test_norm_of_more_channels_than_there_are() -> None:
    stream = GridPoolStream(backend="reference", norm_channels=4)
    for _ in range(2):
        with pytest.raises(ValueError, match="norm_channels must be from 1 to C = 3, got 4"):
            stream.push(torch.ones(2, 4, 4, 3))
        assert stream.frames() == 0
    stream.push(torch.ones(2, 4, 4, 5))
    with pytest.raises(ValueError, match="x must be as the frames before it"):
        stream.push(torch.ones(2, 4, 4, 3))
    state = stream.state_dict()
    state["format"]["channels"] = 3
    for kept in state["streams"]:
        kept["kept"] = [tensor[..., :3].clone() for tensor in kept["kept"]]
    with pytest.raises(ValueError, match=r"\['channels'\] must be at least norm_channels = 4, got 3"):
        stream.load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, got list of length 1", lambda s: s.push([1])),
        (ValueError, r"x must have shape \(n, H, W, C\), got", lambda s: s.push(torch.ones(1, 2, 4, 4, 3))),
        (TypeError, "x must have dtype", lambda s: s.push(torch.ones(2, 4, 4, 3).int())),
        (RuntimeError, "no gradient", lambda s: s.push(torch.ones(2, 4, 4, 3, requires_grad=True))),
        (ValueError, "stream must be open, got 'c'; open are", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=["c"])),
        (ValueError, "once", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=["a", "a"], frame_counts=[1, 1])),
        (TypeError, "streams must be a sequence", lambda s: s.push(torch.ones(2, 4, 4, 3), streams="a")),
        (ValueError, "frame_counts must be given for 2 streams", lambda s: s.push(torch.ones(2, 4, 4, 3))),
        (ValueError, "sum to n = 2, got", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=[1, 2])),
        (ValueError, "one number of frames", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=[3, -1])),
        (TypeError, "frame_counts must be", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=[1.0, 1.0])),
        (TypeError, "frame_counts must be", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=2)),
        (TypeError, r"an integer or a string, got \[1\]", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=[[1]])),
        (TypeError, "an integer or a string, got True", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=[True])),
        (TypeError, "an integer or a string, got {}", lambda s: s.close({})),
        (ValueError, "open already", lambda s: s.open("a")),
        (TypeError, "integer or a string", lambda s: s.open(1.5)),
        (ValueError, "stream must be named", lambda s: s.frames()),
    ],
)
def test_bad_calls_are_named_and_change_nothing(kind: type[Exception], message: str, call: Any) -> None:
    x = tokens(16, 4, 4, 3)
    stream = GridPoolStream(streams=["a", "b"], backend="reference")
    stream.push(x[:3], streams=["a"])
    with pytest.raises(kind, match=message):
        call(stream)
    assert stream.streams == ("a", "b")
    assert_same_bits(stream.push(x[3:], streams=["a"]), stgridpool_kernels.grid_pool(x, backend="reference")[3:])


def test_tensors_without_data_of_their_own_are_refused() -> None:
    x = tokens(4, 4, 4, 8)
    stream = GridPoolStream()
    stream.push(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, for nested tensors
        nested = [torch.nested.nested_tensor([x[0], x[1]], layout=kind) for kind in (torch.strided, torch.jagged)]
    others = {
        "nested": nested,
        "meta": [x.to("meta")],
        "wrapped": [fake, TwoTensor(x, x)],
    }
    for kind, tensors in others.items():
        for other in tensors:
            with pytest.raises(TypeError, match=f"x must be a plain tensor with data of its own, .* got a {kind} "):
                stream.push(other)
    with pytest.raises(TypeError, match=r"x must be a plain tensor .* got a wrapped Tensor"):
        torch.vmap(stream.push)(x.expand(2, *x.shape))
    assert stream.frames() == 4
    assert stream.push(nn.Parameter(x, requires_grad=False)).shape == (4, 2, 2, 8)
    assert stream.push(x.as_subclass(type("Tokens", (torch.Tensor,), {}))).shape == (4, 2, 2, 8)


@pytest.mark.parametrize(
    "call", [lambda s: s.push(torch.ones(2, 4, 4, 3)), lambda s: s.frames()], ids=["push", "frames"]
)
def test_no_stream_is_open(call: Any) -> None:
    with pytest.raises(ValueError, match="streams must name an open stream, got "):
        call(GridPoolStream(streams=[]))


@pytest.mark.parametrize("counts", [np.array([1, 2]), torch.tensor([1, 2]), (np.int64(1), 2)], ids=type)
def test_frame_counts_of_any_integers(counts: Any) -> None:
    server = GridPoolStream(streams=["a", "b"])
    assert server.push(torch.ones(3, 4, 4, 3), frame_counts=counts).shape == (3, 2, 2, 3)
    assert [server.frames("a"), server.frames("b")] == [1, 2]
    assert all(type(server.frames(name)) is int for name in server.streams)


@pytest.mark.parametrize("names", [np.arange(2), torch.arange(2), (np.int64(0), 1)], ids=type)
def test_names_of_any_integers(names: Any) -> None:
    server = GridPoolStream(streams=names)
    server.push(torch.ones(3, 4, 4, 3), streams=names, frame_counts=[1, 2])
    assert [server.frames(0), server.frames(names[1])] == [1, 2]
    assert all(type(name) is int for name in server.streams)


@pytest.mark.parametrize("method", ["close", "reset", "flush", "frames"])
def test_unknown_names(method: str) -> None:
    for streams in ([], ["a", "b"]):
        with pytest.raises(ValueError, match="stream must be open, got 'c'; open are"):
            getattr(GridPoolStream(streams=streams), method)("c")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ValueError, {"sampling": "middle"}),
        (ValueError, {"backend": "abacus"}),
        (TypeError, {"frame_counts": [1]}),
        (TypeError, {"streams": 3}),
        (ValueError, {"streams": [1, 1]}),
    ],
    ids=str,
)
def test_bad_arguments_raise_at_once(kind: type[Exception], arguments: Arguments) -> None:
    with pytest.raises(kind, match=next(iter(arguments)).rstrip("s")):
        GridPoolStream(**arguments)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("failing", ["grid_pool", "pool_chunk", "temporal_grid"])
def test_failed_push_leaves_the_state(
    failing: str, monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device
) -> None:
    """Kernels that have written all they write, and then fail."""
    x = tokens(16, *small(backend, device), 8, device=device)
    arguments: Arguments = {} if failing == "pool_chunk" else {"output_size": 2}
    number = next(n for n, known in enumerate(BACKENDS) if known.name == backend)
    work = getattr(BACKENDS[number], failing)
    if work is None:
        assert (backend, failing) == ("reference", "pool_chunk")
        return
    whole = run(backend, "grid_pool", x, **arguments)
    stream = GridPoolStream(backend=backend, **arguments)
    stream.push(x[:5])
    before = stream.state_bytes

    def fail(*given: Any) -> None:
        work(*given)
        raise RuntimeError("cannot go on")

    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS[number].__dict__, failing, fail)
        for chunk in (torch.cat([x[5:], x, x]), x[5:8]):
            with pytest.raises(RuntimeError, match="cannot go on"):
                stream.push(chunk)
    assert stream.frames() == 5
    assert stream.state_bytes == before
    assert_same_bits(stream.push(x[5:]), whole[5:])


@pytest.mark.needs("library")
def test_a_push_that_cannot_give_memory_back_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a long chunk is given back last, and if that fails, the state is that from before the push."""
    x = tokens(128, 5, 7, 8)
    stream = GridPoolStream(backend="cpu")
    stream.push(x[:5])
    before = stream.state_bytes

    def fail(*given: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_compacted", fail)
        with pytest.raises(MemoryError):
            stream.push(x[5:])
    assert (stream.frames(), stream.state_bytes) == (5, before)
    assert_same_bits(stream.push(x[5:]), stgridpool_kernels.grid_pool(x, backend="cpu")[5:])


@named("published", "bilinear-mixed", "whole frames")
def test_input_is_not_modified_nor_kept(name: str, backend: str, device: torch.device) -> None:
    x = video(backend, device)
    stream = GridPoolStream(backend=backend, **CALLS[name])
    whole = run(backend, "grid_pool", x, **CALLS[name])
    results = []
    for part in x.split(5):
        mine = part.clone()
        results.append(stream.push(mine))
        assert_same_bits(mine, part)
        mine.fill_(math.nan)  # a decoder's buffer is used again
    assert_same_bits(torch.cat(results), whole)


def test_the_backend_stays(backend: str, device: torch.device) -> None:
    x = tokens(16, *small(backend, device), 8, device=device)
    stream = GridPoolStream()
    with stgridpool_kernels.use_backend(backend):
        first = stream.push(x[:5])
    with stgridpool_kernels.use_backend("reference"):
        second = stream.push(x[5:])
    assert_same_bits(torch.cat([first, second]), run(backend, "grid_pool", x))


def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    x = tokens(16, *small(backend, device), 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = pushed(GridPoolStream(backend=backend), x.split(3))
    assert_same_bits(result, run(backend, "grid_pool", x))


@two_calls
def test_inference_mode_may_come_and_go(name: str, backend: str, device: torch.device) -> None:
    x = tokens(16, *small(backend, device), 8, device=device)
    whole = run(backend, "grid_pool", x, **CALLS[name])
    stream = GridPoolStream(backend=backend, **CALLS[name])
    with torch.inference_mode():
        first = stream.push(x[:1].clone())
        other = GridPoolStream(backend=backend, **CALLS[name])
        other.load_state_dict(stream.state_dict())
    second = stream.push(x[1:2])
    with torch.inference_mode():
        third = stream.push(x[2:].clone())
    assert_same_bits(torch.cat([first, second, third]), whole)
    assert_same_bits(other.push(x[1:]), whole[1:])


@two_calls
def test_default_device_is_not_used(name: str, backend: str, device: torch.device) -> None:
    """A stream keeps thumbnails where its frames are, whatever the default device is."""
    x = video(backend, device, C=13)  # so that no call of another test has been prepared for it
    device_tables.tables_of_chunk.cache_clear()
    with torch.device("meta"):
        result = pushed(GridPoolStream(backend=backend, **CALLS[name]), x.split(5))
    assert_same_bits(result, run(backend, "grid_pool", x, **CALLS[name]))


@two_calls
def test_torch_compile_goes_round_a_push(name: str, backend: str, device: torch.device) -> None:
    """It compiles what is before and behind, and nothing of the stream, whose bits stay."""
    warnings.simplefilter("default")  # torch.compile has warnings of its own, as about Python 3.13.0
    x = tokens(8, *small(backend, device), 8, device=device)
    stream = GridPoolStream(backend=backend, **CALLS[name])
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda frames: stream.push(frames + 1) * 2, backend=counter)
    result = torch.cat([step(part) for part in x.split(2)])
    assert_same_bits(result, 2 * run(backend, "grid_pool", x + 1, **CALLS[name]))
    assert counter.frame_count == 2
    stream.reset()
    push = torch.compile(stream.push, backend=counter)
    assert_same_bits(torch.cat([push(part) for part in x.split(3)]), run(backend, "grid_pool", x, **CALLS[name]))
    assert counter.frame_count == 2


@two_calls
def test_a_copy_goes_its_own_way(name: str, backend: str, device: torch.device) -> None:
    x = video(backend, device)
    whole = run(backend, "grid_pool", x, **CALLS[name])
    stream = GridPoolStream(backend=backend, **CALLS[name])
    stream.push(x[:5])
    copies = copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))
    stream.push(x[5:].flip(0))
    for other in copies:
        assert_same_bits(other.push(x[5:]), whole[5:])


@pytest.mark.needs("library")
def test_tables_of_a_chunk_for_other_thumbnails_are_refused() -> None:
    plan = grid_plan((), 4, 4)
    chunk = chunk_tables(plan, 2, [[ChunkEntry(0, 0, 3, (2, 2)), ChunkEntry(1, 1, -1, ())]], 4)
    x, out, weighting = torch.ones(2, 4, 4, 3), torch.empty(2, 2, 2, 3), Weighting(1.0, 2.0, True, 3)
    for slots in (torch.empty(3, 2, 2, 3), torch.empty(4, 2, 2, 4), torch.empty(4, 2, 2, 3).half()):
        with pytest.raises(RuntimeError, match="of other thumbnails"):
            compiled.pool_chunk(x, chunk, weighting, slots, out)
    compiled.pool_chunk(x, chunk, weighting, torch.empty(4, 2, 2, 3), out)
    assert torch.equal(out, torch.ones_like(out))
