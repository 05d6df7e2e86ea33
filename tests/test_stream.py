"""Streams: whatever the chunks, what comes out is what grid_pool gives for the whole video, bit by bit."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels import GridPoolStream, grid_plan, stream
from stgridpool_kernels.backends import BACKENDS, compiled
from stgridpool_kernels.plan.dataflow import Schedule, needed_cells
from stgridpool_kernels.plan.tables import chunk_tables
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
calls = pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS.keys())


def small(backend: str, device: torch.device) -> tuple[int, int]:
    """H and W of a frame: odd, and few where Triton's interpreter runs."""
    return (3, 5) if backend == "triton" and device.type == "cpu" else (5, 7)


def pushed(stream: GridPoolStream, chunks: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([stream.push(chunk) for chunk in chunks])


# ---- the same bits ----


@calls
@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_chunks_give_the_bits_of_the_whole_video(
    dtype: torch.dtype, chunk: int, arguments: Arguments, backend: str, device: torch.device
) -> None:
    x = tokens(24, *small(backend, device), 11, dtype=dtype, device=device)
    whole = run(backend, "grid_pool", x, **arguments)
    stream = GridPoolStream(backend=backend, **arguments)
    assert_same_bits(pushed(stream, x.split(chunk)), whole)
    assert stream.matches_offline()
    assert stream.frames() == 24


@settings(max_examples=25)
@given(data=st.data())
def test_any_chunking_of_any_call(data: st.DataObject, backend: str, device: torch.device) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    most = 4 if backend == "triton" and device.type == "cpu" else 9
    H, W = data.draw(st.integers(1, most)), data.draw(st.integers(1, most))
    arguments = data.draw(st.sampled_from([{}, None, {"sampling": "first"}]))
    if arguments is None:
        arguments = data.draw(gridding_arguments()) | data.draw(window_arguments(H, W)) | data.draw(norm_arguments())
        arguments |= {"temperature": data.draw(temperatures)}
    elif min(H, W) == 1 or data.draw(st.booleans()):
        arguments = arguments | {"ceil_mode": True}
    strides = arguments.get("frame_strides", (2, 4, 8))
    T = data.draw(st.integers(0, 40))
    if arguments.get("sampling", "last") == "last":
        T -= T % math.lcm(*strides)
    x = tokens(T, H, W, data.draw(st.sampled_from([3, 16, 1])), dtype=dtype, device=device)
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=6)))
    chunks = [x[start:stop] for start, stop in zip([0, *cuts], [*cuts, T], strict=True)]
    stream = GridPoolStream(backend=backend, **arguments)
    result = pushed(stream, chunks)
    assert stream.matches_offline()
    assert_same_bits(result, run(backend, "grid_pool", x, **arguments))


LAYOUTS = {"channels first": (0, 3, 1, 2), "frames last": (3, 1, 2, 0), "columns first": (0, 2, 1, 3)}


@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", ["published", "nested", "overlapping", "bilinear"])
def test_chunks_of_a_permuted_video(name: str, order: tuple[int, ...], backend: str, device: torch.device) -> None:
    T = 12 if backend == "triton" else 24
    x = tokens(T, *small(backend, device), 11, device=device)
    x = x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
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
    T = 12 if backend == "triton" else 24  # the strides of every level that completes a group divide both
    videos = {name: tokens(T, H, W, 8, device=device, seed=seed) for seed, name in enumerate(["a", 7, "c"])}
    whole = {name: run(backend, "grid_pool", video, **arguments) for name, video in videos.items()}
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


@calls
def test_nan_goes_where_it_goes_in_the_whole_video(
    arguments: Arguments, poisoned: None, backend: str, device: torch.device
) -> None:
    H, W = small(backend, device)
    x = tokens(24, H, W, 8, device=device)
    for number, value in enumerate([math.nan, math.inf, -math.inf, math.nan]):
        x[5 * number + 1, number % H, -1 - number % W, number] = value
    whole = run(backend, "grid_pool", x, **arguments)
    result = pushed(GridPoolStream(backend=backend, **arguments), x.split([1, 0, 5, 2, 1, 15]))
    torch.testing.assert_close(result, whole, rtol=0, atol=0, equal_nan=True)
    assert whole.isnan().any()
    assert not whole.isnan().all()


@pytest.mark.parametrize("T", [9, 21, 30, 39])
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


@pytest.mark.parametrize("arguments", [{}, {"frame_strides": (3, 5), "sampling": "first"}, CALLS["nested"]], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("H", "W"), [(5, 7), (4, 6), (1, 2)])
def test_needs_are_those_of_a_whole_period(H: int, W: int, ceil_mode: bool, arguments: Arguments) -> None:
    arguments = arguments | {"ceil_mode": ceil_mode or H == 1}
    stream = GridPoolStream(backend="reference", **arguments)
    known = stream._make_format(H, W, 1, torch.float32, torch.device("cpu"), "cpu")
    period = math.lcm(*(segment.length for segment in known.segments))
    plan = grid_plan([period], H, W, **arguments)
    schedule = Schedule.of(plan)
    needed = needed_cells(plan, schedule)
    for frame in range(period):
        assert known.need(-1, frame + 3 * period).cells == needed.get(frame, ())
        assert known.need(-1, frame).final == (schedule.final[frame] == frame)
    for number, summary in enumerate(schedule.summaries):
        assert known.need(summary.level, summary.target).cells == needed.get(~number, ())


def test_segments_repeat_the_plan() -> None:
    for arguments in CALLS.values():
        known = GridPoolStream(backend="reference", **arguments)._make_format(
            5, 7, 1, torch.float32, torch.device("cpu"), "cpu"
        )
        T = 4 * math.lcm(1, *(segment.length for segment in known.segments))
        gridding = {name: value for name, value in arguments.items() if name in ("frame_strides", "grid_shape")}
        plan = grid_plan([T], 5, 7, sampling=arguments.get("sampling", "last"), **gridding)
        for level, segment in zip(plan.levels, known.segments, strict=True):
            firsts = range(0, T, segment.length)
            assert level.targets == tuple(first + segment.target for first in firsts)
            assert level.sources == tuple(tuple(first + source for source in segment.sources) for first in firsts)


# ---- memory ----


@calls
def test_state_is_bounded(arguments: Arguments, backend: str, device: torch.device) -> None:
    H, W = small(backend, device)
    C, chunk = 4, 3
    stream = GridPoolStream(backend=backend, **arguments)
    plan = grid_plan((), H, W, **{key: value for key, value in arguments.items() if key in stream._planned})
    miniature = -(-H // 2) * -(-W // 2) * C * 4
    edges = sum(level.rows * level.cols * (H + W) * C * 4 for level in plan.levels)
    mosaics = len(plan.levels) * H * W * C * 4 + (edges if arguments.get("resize") == "bilinear" else 0)
    most = max(len(plan.levels) * stream_slots() * miniature, mosaics)
    x = tokens(18 if backend == "triton" else 96, H, W, C, device=device)
    for part in x.split(chunk):
        try:
            stream.push(part)
        except RuntimeError as refusal:
            pytest.skip(str(refusal))
        assert stream.state_bytes <= most
    stream.push(x)
    assert stream.state_bytes <= most
    assert not any(x.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in kept(stream))


def stream_slots() -> int:
    return stream.SLOTS_PER_LEVEL


def kept(stream: GridPoolStream) -> list[Tensor]:
    groups = [group for state in stream._states.values() for group in state.groups if group]
    return [t for group in groups for t in group.tensors()] + ([] if stream._slots is None else [stream._slots])


OPS = ("grid_pool", "temporal_grid", "repeat_in_grid", "norm_pool", "pool_chunk")


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


@pytest.mark.parametrize("arguments", [{}, {"ceil_mode": True}, {"sampling": "first", "norm_type": 1.0}], ids=str)
def test_whole_periods_of_a_chunk_are_a_video(
    arguments: Arguments, called: list[tuple[str, Any]], backend: str, device: torch.device
) -> None:
    """The levels begin again every 32 frames: grid_pool takes what is between, if a chunk has it all."""
    x = tokens(104, *small(backend, device), 8, device=device)
    whole = run(backend, "grid_pool", x, **arguments)
    chunks = x.split([3, 93, 8])
    stream = GridPoolStream(backend=backend, **arguments)
    for _ in range(2):  # the second time, with the memory of the first
        called.clear()
        assert_same_bits(pushed(stream, chunks), whole)
        stream.flush()
        if backend != "reference":
            assert [name for name, _ in called] == ["pool_chunk", "grid_pool", "pool_chunk", "pool_chunk"]
            assert called[1][1].frame_counts == (64,)


def test_whole_periods_where_kernels_are_not_fused(
    called: list[tuple[str, Any]], backend: str, device: torch.device
) -> None:
    """The same with a period of 8: the frames of it are not shrunk one by one."""
    x = tokens(26, *small(backend, device), 8, device=device)
    arguments = CALLS["adaptive"]
    stream = GridPoolStream(backend=backend, **arguments)
    first = stream.push(x[:5])
    called.clear()
    second = stream.push(x[5:])
    # sampled are each of the frames 5, 6, 7, 24, 25 and then every other: 5, 7, 25
    assert [name for name, _ in called] == ["repeat_in_grid"] * 8 + ["grid_pool"] * 4
    # frame 7 ends as a summary, which is pooled apart
    assert [plan.frame_counts for name, plan in called if name == "grid_pool"] == [(1, 1, 1), (16,), (1, 1), (1,)]
    assert_same_bits(torch.cat([first, second]), run(backend, "grid_pool", x, **arguments))


# ---- state_dict ----


@pytest.mark.parametrize("name", ["published", "paper", "bilinear-mixed", "overlapping"])
@pytest.mark.parametrize("at", [0, 1, 13])
def test_state_goes_through_a_file(at: int, name: str, backend: str, device: torch.device) -> None:
    x = tokens(24, *small(backend, device), 8, device=device)
    first = GridPoolStream(backend=backend, streams=["s", 1], **CALLS[name])
    before = first.push(x[:at], streams=["s"])
    first.push(x[:7], streams=[1])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = GridPoolStream(**CALLS[name])
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.streams == ("s", 1)
    whole = run(backend, "grid_pool", x, **CALLS[name])
    for restored in (first, second):
        assert_same_bits(torch.cat([before, restored.push(x[at:], streams=["s"])]), whole)
        assert_same_bits(restored.push(x[7:], streams=[1]), whole[7:])


def test_state_is_a_copy(backend: str, device: torch.device) -> None:
    x = tokens(16, *small(backend, device), 8, device=device)
    stream = GridPoolStream(backend=backend)
    stream.push(x[:6])
    state = stream.state_dict()
    expected = copy.deepcopy(state)
    stream.push(x[6:])
    again = GridPoolStream()
    again.load_state_dict(state)
    again.push(tokens(10, *small(backend, device), 8, device=device, seed=3))
    assert str(state) == str(expected)


def damaged(state: dict[str, Any], change: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    match change:
        case "version":
            state["version"] = 99
        case "arguments":
            state["arguments"]["temperature"] = 2.0
        case "no streams":
            del state["streams"]
        case "tiles":
            state["streams"][0]["tiles"][0][1] = 5
        case "frames":
            state["streams"][0]["frames"] += 1
        case "miniatures":
            state["miniatures"][0] = state["miniatures"][0][:1]
        case "mosaic":
            state["streams"][0]["groups"][0] = {"mosaic": torch.zeros(5, 7, 8), "edges": {}}
        case "argument list":
            state["arguments"] = []
        case "backend":
            state["format"]["backend"] = "auto"
        case "device":
            state["format"]["device"] = "abacus"
        case "stream":
            state["streams"][0]["stream"] = True
    return state


@pytest.mark.needs("library")
@pytest.mark.parametrize(
    "change",
    ["version", "arguments", "argument list", "no streams", "stream", "tiles", "frames", "miniatures"]
    + ["mosaic", "backend", "device", "nothing at all"],
)
def test_damaged_state_is_refused(change: str) -> None:
    x = tokens(16, 5, 7, 8)
    stream = GridPoolStream(backend="cpu")
    stream.push(x[:5])
    state = stream.state_dict()
    with pytest.raises(ValueError, match="state"):
        stream.load_state_dict({} if change == "nothing at all" else damaged(state, change))
    assert_same_bits(stream.push(x[5:]), stgridpool_kernels.grid_pool(x, backend="cpu")[5:])


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


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (TypeError, "x must be a tensor, got list", lambda s: s.push([1])),
        (ValueError, r"x must have shape \(n, H, W, C\), got", lambda s: s.push(torch.ones(1, 2, 4, 4, 3))),
        (TypeError, "x must have dtype", lambda s: s.push(torch.ones(2, 4, 4, 3).int())),
        (RuntimeError, "no gradient", lambda s: s.push(torch.ones(2, 4, 4, 3, requires_grad=True))),
        (ValueError, "stream must be open, got 'c'; open are", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=["c"])),
        (ValueError, "once", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=["a", "a"], frame_counts=[1, 1])),
        (TypeError, "streams must be a sequence", lambda s: s.push(torch.ones(2, 4, 4, 3), streams="a")),
        (ValueError, "frame_counts must be given for 2 streams", lambda s: s.push(torch.ones(2, 4, 4, 3))),
        (ValueError, "sum to n = 2, got", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=[1, 2])),
        (ValueError, "one number of frames", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=[3, -1])),
        (ValueError, r"frame_counts must be .*, got \[2\]", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=[2])),
        (TypeError, "frame_counts must be", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=[1.0, 1.0])),
        (TypeError, "frame_counts must be", lambda s: s.push(torch.ones(2, 4, 4, 3), frame_counts=2)),
        (ValueError, r"x must have shape \(n, H, W, C\), got \(4, 4, 3\)", lambda s: s.push(torch.ones(4, 4, 3))),
        (TypeError, r"an integer or a string, got \[1\]", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=[[1]])),
        (TypeError, "an integer or a string, got True", lambda s: s.push(torch.ones(2, 4, 4, 3), streams=[True])),
        (TypeError, "an integer or a string, got {}", lambda s: s.close({})),
        (TypeError, "an integer or a string, got {}", lambda s: s.frames({})),
        (ValueError, "open already", lambda s: s.open("a")),
        (TypeError, "integer or a string", lambda s: s.open(1.5)),
        (ValueError, "stream must be open", lambda s: s.close("c")),
        (ValueError, "stream must be open", lambda s: s.reset("c")),
        (ValueError, "stream must be open", lambda s: s.flush("c")),
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


def test_no_stream_is_open() -> None:
    stream = GridPoolStream(streams=[])
    with pytest.raises(ValueError, match=r"streams must name an open stream, got \[\]"):
        stream.push(torch.ones(2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"streams must name an open stream"):
        stream.frames()


@pytest.mark.parametrize("counts", [np.array([1, 2]), torch.tensor([1, 2]), (np.int64(1), 2)], ids=type)
def test_frame_counts_of_any_integers(counts: Any) -> None:
    server = GridPoolStream(streams=["a", "b"])
    assert server.push(torch.ones(3, 4, 4, 3), frame_counts=counts).shape == (3, 2, 2, 3)
    assert [server.frames("a"), server.frames("b")] == [1, 2]
    assert all(type(server.frames(name)) is int for name in server.streams)


@pytest.mark.parametrize("method", ["close", "reset", "flush", "frames"])
def test_unknown_names_where_none_is_open(method: str) -> None:
    with pytest.raises(ValueError, match="stream must be open, got 'c'; open are"):
        getattr(GridPoolStream(streams=[]), method)("c")


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


@pytest.mark.parametrize("failing", ["grid_pool", "pool_chunk", "temporal_grid", "repeat_in_grid"])
def test_failed_push_leaves_the_state(
    failing: str, monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device
) -> None:
    """Kernels that have written all they write, and then fail."""
    x = tokens(16, *small(backend, device), 8, device=device)
    settings: dict[str, Arguments] = {"pool_chunk": {}, "repeat_in_grid": {"output_size": 2}}
    arguments = settings.get(failing, {"resize": "bilinear"})
    number = next(n for n, known in enumerate(BACKENDS) if known.name == backend)
    work = getattr(BACKENDS[number], failing)
    if work is None:
        pytest.skip(f"{backend} has no {failing}")
    whole = run(backend, "grid_pool", x, **arguments)
    stream = GridPoolStream(backend=backend, **arguments)
    stream.push(x[:5])
    before = stream.state_bytes

    def fail(*given: Any) -> None:
        work(*given)
        raise RuntimeError("cannot go on")

    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS[number].__dict__, failing, fail)
        for chunk in (torch.cat([x, x, x[5:].flip(0)]), x[5:6]):
            with pytest.raises(RuntimeError, match="cannot go on"):
                stream.push(chunk)
    assert stream.frames() == 5
    assert stream.state_bytes == before
    assert_same_bits(stream.push(x[5:]), whole[5:])


@pytest.mark.needs("library")
def test_a_push_that_cannot_give_memory_back_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long chunk took is given back last: where that fails, the push has not happened."""
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


@calls
def test_input_is_not_modified_nor_kept(arguments: Arguments, backend: str, device: torch.device) -> None:
    x = tokens(24, *small(backend, device), 8, device=device)
    stream = GridPoolStream(backend=backend, **arguments)
    whole = run(backend, "grid_pool", x, **arguments)
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


@pytest.mark.parametrize("name", ["published", "bilinear"])
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


@pytest.mark.parametrize("name", ["published", "bilinear"])
def test_default_device_is_not_used(name: str, backend: str, device: torch.device) -> None:
    """What a stream keeps is where its frames are; 13 channels, as tables of an earlier call may be there already."""
    T = 12 if backend == "triton" else 24
    x = tokens(T, *small(backend, device), 13, device=device)
    compiled._chunk_tables.cache_clear()
    with torch.device("meta"):
        result = pushed(GridPoolStream(backend=backend, **CALLS[name]), x.split(5))
    assert_same_bits(result, run(backend, "grid_pool", x, **CALLS[name]))


def test_first_chunk_under_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload would end the capture with an error of CUDA that does not say why."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(compiled, "tables_on", lambda *_: pytest.fail("tables were uploaded"))
    with pytest.raises(RuntimeError, match="warm up first"):
        compiled._chunk_tables((1, 2, 3), torch.device("cuda", 0))


@pytest.mark.filterwarnings("default")  # of torch.compile
@pytest.mark.parametrize("name", ["published", "bilinear"])
def test_torch_compile_goes_round_a_push(name: str, backend: str, device: torch.device) -> None:
    """It compiles what is before and behind, and nothing of the stream, whose bits stay."""
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


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["published", "bilinear"])
def test_a_copy_goes_its_own_way(name: str, copied: str, backend: str, device: torch.device) -> None:
    x = tokens(16, *small(backend, device), 8, device=device)
    stream = GridPoolStream(backend=backend, **CALLS[name])
    stream.push(x[:5])
    other = copy.deepcopy(stream) if copied == "deepcopy" else pickle.loads(pickle.dumps(stream))
    stream.push(x[5:].flip(0))
    assert_same_bits(other.push(x[5:]), run(backend, "grid_pool", x, **CALLS[name])[5:])


@pytest.mark.needs("library")
def test_tables_of_a_chunk_are_checked() -> None:
    plan = grid_plan((), 4, 4)
    chunk = chunk_tables(plan, 2, [[stream.ChunkEntry(0, 0, 3, (2, 2)), stream.ChunkEntry(1, 1, -1, ())]], 4)
    x, out = torch.ones(2, 4, 4, 3), torch.empty(2, 2, 2, 3)
    for slots in (torch.empty(3, 2, 2, 3), torch.empty(4, 2, 2, 4), torch.empty(4, 2, 2, 3).half()):
        with pytest.raises(RuntimeError, match="of other miniatures"):
            compiled.pool_chunk(x, chunk, 1.0, 2.0, True, slots, out)
    compiled.pool_chunk(x, chunk, 1.0, 2.0, True, torch.empty(4, 2, 2, 3), out)
    assert torch.equal(out, torch.ones_like(out))
