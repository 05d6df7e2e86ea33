"""What the triton backend promises besides right results: traffic, launches, memory, caches, offsets, refusals."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels import backends, grid_plan
from stgridpool_kernels.backends import triton as triton_backend
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan.tables import CONSUMER_WORDS, ENTRY_WORDS, Header, Stage, gradient_section, stages_of
from tests.backends.test_backward import CALLS as GRADIENT_CALLS
from tests.backends.test_backward import gradient, like_result
from tests.support.cases import CALLS, Arguments, tokens
from tests.support.interpreter import check_integers, counted_traffic
from tests.support.tolerance import assert_accurate, assert_gradient_accurate, assert_same_bits

pytest.importorskip("triton", reason="no Triton")
from stgridpool_kernels.backends import triton_kernels
from stgridpool_kernels.backends.triton_kernels import (
    backward,
    config,
    fused,
    fused_backward,
    launch,
    pool,
    summaries,
    tiles,
    token_norm,
)
from stgridpool_kernels.backends.triton_kernels.tiles import Tokens

pytestmark = [
    # The interpreter of Triton 3.6 takes arrays of one element for numbers.
    pytest.mark.filterwarnings("error", "ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.needs("interpreter"),
]


def run(op: str, x: Tensor, **arguments: Any) -> Tensor:
    return getattr(stgridpool_kernels, op)(x, backend="triton", **arguments)


@pytest.fixture(autouse=True)
def forget_calls() -> Iterator[None]:
    """Prepared calls of one test, whose limits may be changed, are not for the next."""
    yield
    launch._calls.clear()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory that is allocated for scratch and for results with NaN."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: fill(new_empty(*args, **kwargs)))


def calls(given: dict[str, tuple[str, Arguments]]) -> pytest.MarkDecorator:
    """Runs a test on every call; outside the slow tests, on the first of each op."""
    first = {op: name for name, (op, _) in reversed(given.items())}
    return pytest.mark.parametrize(
        ("op", "arguments"),
        [pytest.param(*call, id=name, marks=slow_unless(first[call[0]] == name)) for name, call in given.items()],
    )


def slow_unless(fast: bool) -> list[pytest.MarkDecorator]:
    return [] if fast else [pytest.mark.slow]


PARITIES = [(H, W) for H in range(1, 6) for W in range(1, 6)]
parities = pytest.mark.parametrize(
    ("H", "W"),
    [pytest.param(*size, marks=slow_unless(size in [(1, 2), (3, 3), (2, 3), (3, 2), (2, 2)])) for size in PARITIES],
)


def prepared(
    op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, gradient: bool = False, **arguments: Any
) -> launch.PreparedCall:
    """Return the launches of a call with tensors of that shape, or of its gradient, without allocating memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return prepare(op, x, gradient, **arguments)


NO_POOLING: Arguments = {"kernel_size": 1}
NO_GRIDDING: Arguments = {"frame_strides": ()}


def prepare(
    op: str,
    x: Tensor,
    gradient: bool = False,
    capability: tuple[int, int] = (8, 0),
    norm_type: float = 2.0,
    **arguments: Any,
) -> launch.PreparedCall:
    """Return the launches of a call with x, or of its gradient."""
    arguments |= {"temporal_grid": NO_POOLING, "norm_pool": NO_GRIDDING}.get(op, {})
    plan = grid_plan(arguments.pop("frame_counts", x.shape[:1]), *x.shape[1:3], **arguments)
    result = torch.empty(x.shape[0], *plan.pooled_size, x.shape[3], dtype=x.dtype, device="meta")
    weighting = None if op == "temporal_grid" else Weighting(1.0, norm_type, True, x.shape[-1])
    out, grad = (torch.empty_like(x, device="meta"), result) if gradient else (result, None)
    name = "temporal_grid" if op == "temporal_grid" else "grid_pool"
    prepare_call = getattr(triton_kernels, f"prepare_{name}_backward" if gradient else f"prepare_{name}")
    return prepare_call(launch.CallSpec(x, out, plan, weighting, grad, capability=capability))


# ---- results where the common suite does not look ----


@calls(CALLS)
def test_scratch_is_written_before_it_is_read(op: str, arguments: Arguments, poisoned_memory: None) -> None:
    x = tokens(33, 3, 5, 11)
    assert_accurate(run(op, x, **arguments), op, x, **arguments)


@parities
def test_every_parity_of_height_and_width(H: int, W: int, poisoned_memory: None) -> None:
    x = tokens(16, H, W, 3)
    for ceil_mode in (False, True):
        if ceil_mode or min(H, W) > 1:
            assert_accurate(run("grid_pool", x, ceil_mode=ceil_mode), "grid_pool", x, ceil_mode=ceil_mode)


@calls(CALLS)
def test_no_integer_overflows(op: str, arguments: Arguments) -> None:
    """The interpreter compares every int32 result with the int64 one."""
    check_integers(True)
    try:
        run(op, tokens(12, 3, 4, 5), **arguments)
    finally:
        check_integers(False)


@calls(CALLS)
def test_tokens_longer_than_a_tile(
    op: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """Channels in chunks and windows in steps, as for more than 8192 channels."""
    monkeypatch.setattr(config, "MAX_BLOCK", 16)
    monkeypatch.setattr(config, "TILE", 64)
    x = tokens(17, 3, 5, 37, dtype=torch.bfloat16)
    assert_accurate(run(op, x, **arguments), op, x, **arguments)


@pytest.mark.parametrize("norm_channels", [13, 40])
@pytest.mark.parametrize("size", [(3, 5), (4, 3), (5, 4)], ids=str)
def test_norms_of_some_channels_of_tokens_of_several_blocks(
    size: tuple[int, int], norm_channels: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """The first block of channels holds the norm, the others follow: as for more than 8192 channels."""
    monkeypatch.setattr(config, "MAX_BLOCK", 64)
    monkeypatch.setattr(config, "LONG_BLOCK", 16)
    launch._calls.clear()
    x = tokens(9, *size, 100)
    for arguments in ({"frame_counts": [8, 1]}, {"ceil_mode": True, "frame_counts": [9]}):
        given: Arguments = {"frame_strides": (1, 2), "temperature": 3.0, "norm_channels": norm_channels, **arguments}
        assert_accurate(run("grid_pool", x, **given), "grid_pool", x, **given)
    kernels = {each.kernel for call in launch._calls.values() for each in call.launches}
    assert kernels == {fused.rows_kernel, fused.windows_kernel, fused.mosaics_kernel}


@pytest.mark.parametrize("C", [20, 100], ids=["one block", "several blocks"])
@pytest.mark.parametrize("size", [(3, 5), (5, 4)], ids=str)
def test_nothing_is_written_beside_the_results(size: tuple[int, int], C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk goes on behind the last window of its row, where cells are live; programs there may run in any order."""
    monkeypatch.setattr(config, "MAX_BLOCK", 64)
    monkeypatch.setattr(config, "LONG_BLOCK", 16)
    launch._calls.clear()
    x = tokens(9, *size, C)
    arguments: Arguments = {"frame_strides": (1, 2), "frame_counts": [8, 1], "norm_channels": 13}
    OH, OW = grid_plan([9], *size).pooled_size
    room = torch.full((9, OH + 1, OW + 1, C + 1), 7.0)
    out = room[:, :OH, :OW, :C]
    stgridpool_kernels.grid_pool(x, out=out, backend="triton", **arguments)
    assert_accurate(out, "grid_pool", x, **arguments)
    out.fill_(7.0)
    assert torch.equal(room, torch.full_like(room, 7.0))


CUTS: list[dict[str, Any]] = [
    {"frame_cells": 1, "mosaic_cells": 2},
    {"frame_cells": 2, "mosaic_cells": 5},
    {"frame_cells": 5, "mosaic_cells": 6},
    {"frame_cells": 6, "mosaic_cells": 1},
]


@pytest.mark.parametrize(
    "size",
    [pytest.param(size, id=str(size), marks=slow_unless(size == (2, 11))) for size in [(5, 11), (2, 11), (3, 10)]],
)
def test_cuts_change_no_bit(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """A row may be cut into walks anywhere."""
    arguments = {"frame_strides": (1, 2), "frame_counts": [8, 1], "temperature": 0.7}
    x = tokens(9, *size, 64)
    x[1, 1, size[1] // 2] = math.nan
    grad = like_result("grid_pool", x, **arguments)
    pooled = run("grid_pool", x, **arguments)
    unpooled = gradient("triton", "grid_pool", x, grad, **arguments)
    chosen = config.fused_config
    for cut in CUTS:
        launch._calls.clear()
        monkeypatch.setattr(fused, "fused_config", lambda *args, cut=cut: dataclasses.replace(chosen(*args), **cut))
        assert_same_bits(run("grid_pool", x, **arguments), pooled)
        if cut.get("frame_cells", 2) == 2:  # a gradient makes the same thumbnails, and takes twice as long
            assert_same_bits(gradient("triton", "grid_pool", x, grad, **arguments), unpooled)


def test_registers_are_limited_where_that_fits_more_warps() -> None:
    """Gradients, powers and tokens that are not read 16 bytes at a time have no such limit, since some would spill."""

    def limits(op: str, x: Tensor, **arguments: Any) -> dict[str, int | None]:
        call = prepare(op, x, capability=(9, 0), **arguments)
        kernels = (fused.rows_kernel, fused.windows_kernel, fused.mosaics_kernel)
        return {one.kernel.__name__: one.options["maxnreg"] for one in call.launches if one.kernel in kernels}

    def video(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    def everywhere(rows: int | None, windows: int | None, mosaics: int | None) -> dict[str, int | None]:
        return {"rows_kernel": rows, "windows_kernel": windows, "mosaics_kernel": mosaics}

    odd, even = video(16, 27, 27, 3584), video(16, 24, 24, 4096)
    assert limits("norm_pool", odd) == limits("norm_pool", even) == {"windows_kernel": 80}
    assert limits("grid_pool", even) == everywhere(80, 80, 80)
    assert limits("grid_pool", odd) == everywhere(128, 80, 128)
    assert limits("grid_pool", odd, gradient=True) == {"rows_kernel": 128, "mosaics_kernel": 128}
    assert limits("grid_pool", even, gradient=True) == {"rows_kernel": None, "mosaics_kernel": None}
    for x in (odd, even):
        assert limits("grid_pool", x, norm_type=3.0) == everywhere(None, None, None)
        assert limits("norm_pool", x, norm_type=3.0) == {"windows_kernel": None}
    for x in (video(16, 24, 24, 1000), video(16, 1152, 24, 24).permute(0, 2, 3, 1)):
        assert limits("grid_pool", x) == everywhere(None, None, None)
        assert limits("norm_pool", x) == {"windows_kernel": None}


def test_tables_of_other_kernels_for_the_same_plan() -> None:
    """The fused kernels or the general ones follow the same plan, by the number of channels."""
    long = tokens(8, 2, 2, config.MAX_BLOCK + 1)
    for x in (long[..., :3].contiguous(), long):
        assert_accurate(run("grid_pool", x), "grid_pool", x)


def test_channels_beyond_a_tile() -> None:
    x = tokens(4, 2, 3, config.MAX_BLOCK + 1, dtype=torch.bfloat16)
    assert_accurate(run("grid_pool", x, frame_strides=(1,)), "grid_pool", x, frame_strides=(1,))
    assert prepared("grid_pool", (8, 4, 4, 8192)).launches[0].kernel is fused.rows_kernel
    assert prepared("grid_pool", (8, 4, 4, 8193)).launches[-1].kernel is pool.norm_pool_kernel


def test_rows_of_more_cells_than_a_launch_has_room_for() -> None:
    """Rows are shared along the second dimension of a launch, of which CUDA allows 65535 blocks."""
    widest = prepared("grid_pool", (8, 2, 131070, 1))
    assert widest.launches[0].kernel is fused.rows_kernel
    assert max(launch.grid[1] for launch in widest.launches) == 65535
    assert prepared("grid_pool", (8, 2, 131071, 1)).launches[-1].kernel is pool.norm_pool_kernel


axes = pytest.mark.parametrize("axis", range(4), ids=["frame", "row", "column", "channel"])


def far_apart(like: Tensor, axis: int) -> Tensor:
    """Return a tensor of the same shape of which one stride leads past 2³¹ elements. Memory between is not touched."""
    strides = list(like.contiguous().stride())
    strides[axis] = (1 << 31) // (like.shape[axis] - 1) + 8
    return torch.empty((1 << 31) + 4000, dtype=like.dtype).as_strided(like.shape, strides)


@functools.cache
def near(op: str, one_level: bool = False) -> tuple[Tensor, Arguments, Tensor]:
    """Return tokens without gaps, the arguments of a call, and its result.

    The last frame stays as it is, or, with one level of gridding, is a source of a summary.
    """
    name, arguments = CALLS[op]
    if one_level and "grid" in name:
        arguments = arguments | {"frame_strides": (1,), "grid_shape": (2, 2)}
    x = tokens(4 if one_level else 9, 4, 4, 3, dtype=torch.bfloat16)
    return x, arguments, run(name, x, **arguments)


@pytest.mark.parametrize("op", ["grid_pool-published", "grid_pool-overlapping", "temporal_grid-mixed", "token_norm-p1"])
@axes
def test_offsets_beyond_32_bits(axis: int, op: str) -> None:
    x, arguments, expected = near(op, one_level=True)
    x = far_apart(x, axis).copy_(x)
    assert_same_bits(run(CALLS[op][0], x, **arguments), expected)


@pytest.mark.parametrize("op", ["grid_pool-published", "grid_pool-overlapping"])
def test_frames_of_a_batch_beyond_32_bits(op: str) -> None:
    name, arguments, x = CALLS[op][0], near(op, one_level=True)[1], tokens(2, 4, 4, 4, 3, dtype=torch.bfloat16)
    assert_same_bits(run(name, far_apart(x, 1).copy_(x), **arguments), run(name, x, **arguments))


@pytest.mark.parametrize("op", ["grid_pool-published", "grid_pool-overlapping", "temporal_grid-mixed"])
@axes
def test_results_beyond_32_bits(axis: int, op: str) -> None:
    x, arguments, expected = near(op)
    out = far_apart(expected, axis)
    assert_same_bits(run(CALLS[op][0], x, out=out, **arguments), expected)


def entries_of(tables: Tensor, stage: Stage) -> Tensor:
    """Return the entries of a stage as a view of the tables: (entries, ENTRY_WORDS)."""
    return tables[stage.entries :][: stage.num_entries * ENTRY_WORDS].view(-1, ENTRY_WORDS)


@pytest.mark.parametrize("kernel_size", [2, 3], ids=["thumbnails", "summaries"])
def test_scratch_beyond_32_bits(kernel_size: int) -> None:
    """Slots of thumbnails, or numbers of summaries, so high that their places pass 2³¹."""
    x = tokens(16, 5, 5, 3, dtype=torch.bfloat16)
    expected = run("grid_pool", x, kernel_size=kernel_size)
    launch._calls.clear()
    found = torch.empty_like(expected)
    plan = dataclasses.replace(grid_plan([16], 5, 5, kernel_size=kernel_size))  # no other call uses its tables
    call = triton_kernels.prepare_grid_pool(launch.CallSpec(x, found, plan, Weighting(1.0, 2.0, True, x.shape[-1])))
    tables, size = call.tables.tensor, (3 * 3 if kernel_size == 2 else 5 * 5) * 3
    far = (1 << 31) // size + 1
    call.scratch += far * size
    if kernel_size == 2:
        for stage in stages_of(tables.tolist()):
            entries = entries_of(tables, stage)
            slots = entries[:, [2, 4, 5, 6, 7]]
            entries[:, [2, 4, 5, 6, 7]] = torch.where(slots >= 0, slots + far, slots)
    else:
        tables[tables < 0] -= far
        for one in call.launches[:-1]:
            one.arguments[one.kernel.arg_names.index("first")] += far
    call(x, found, 0, capturing=False)
    assert_same_bits(found, expected)


# ---- gradients where the common suite does not look ----

GRADIENTS = {name: call for name, call in GRADIENT_CALLS.items() if call[0] != "token_norm"}


def assert_gradient(op: str, x: Tensor, **arguments: Any) -> None:
    grad = like_result(op, x, **arguments)
    assert_gradient_accurate(gradient("triton", op, x, grad, **arguments), op, x, grad, **arguments)


@calls(GRADIENTS)
def test_gradients_are_written_before_they_are_read(op: str, arguments: Arguments, poisoned_memory: None) -> None:
    assert_gradient(op, tokens(19, 3, 5, 11), **arguments)


@parities
def test_gradients_of_every_parity_of_height_and_width(H: int, W: int, poisoned_memory: None) -> None:
    x = tokens(16, H, W, 3)
    for ceil_mode in (False, True):
        if ceil_mode or min(H, W) > 1:
            assert_gradient("grid_pool", x, ceil_mode=ceil_mode)


@calls(GRADIENTS)
def test_no_integer_of_a_gradient_overflows(op: str, arguments: Arguments) -> None:
    x = tokens(12, 3, 4, 5)
    grad = like_result(op, x, **arguments)
    check_integers(True)
    try:
        gradient("triton", op, x, grad, **arguments)
    finally:
        check_integers(False)


@calls(GRADIENTS)
def test_gradients_of_tokens_longer_than_a_tile(
    op: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    monkeypatch.setattr(config, "MAX_BLOCK", 16)
    monkeypatch.setattr(config, "TILE", 64)
    assert_gradient(op, tokens(9, 3, 4, 21, dtype=torch.bfloat16), **arguments)


@functools.cache
def near_gradient(op: str) -> tuple[dict[str, Tensor], Callable[..., None]]:
    """Return tensors of a call without gaps, and a function that writes its gradient into grad_x."""
    name, arguments = GRADIENT_CALLS[op]
    x = tokens(9, 4, 4, 3, dtype=torch.bfloat16)
    plan = grid_plan([9], 4, 4, **(arguments | ({"kernel_size": 1} if "temporal" in name else {})))

    def write(x: Tensor, grad: Tensor, grad_x: Tensor) -> None:
        if name == "temporal_grid":
            triton_backend.temporal_grid_backward(grad, x, plan, grad_x)
        else:
            triton_backend.grid_pool_backward(grad, x, plan, Weighting(1.0, 2.0, True, 3), grad_x)

    tensors = {"x": x, "grad": like_result(name, x, **arguments), "grad_x": torch.empty_like(x)}
    write(**tensors)
    return tensors, write


@pytest.mark.parametrize(
    ("op", "which", "axis"),
    [
        pytest.param(op, which, axis, marks=slow_unless(op != "grid_pool-overlapping" or axis % 3 == number))
        for op in ("grid_pool-published", "grid_pool-overlapping", "temporal_grid-mixed")
        for number, which in enumerate(["x", "grad", "grad_x"])
        for axis in range(4)
        if (op, which) != ("temporal_grid-mixed", "x")  # it is linear: its gradient does not read x
    ],
)
def test_gradients_beyond_32_bits(axis: int, which: str, op: str) -> None:
    tensors, write = near_gradient(op)
    given = {"x": tensors["x"], "grad": tensors["grad"], "grad_x": torch.full_like(tensors["x"], math.nan)}
    given[which] = far_apart(given[which], axis).copy_(given[which])
    write(**given)
    assert_same_bits(given["grad_x"], tensors["grad_x"])


def test_gradients_of_summaries_beyond_32_bits() -> None:
    """Numbers of summaries so high that the places of their gradients pass 2³¹."""
    x = tokens(16, 4, 5, 3, dtype=torch.bfloat16)
    grad = like_result("grid_pool", x)
    expected = gradient("triton", "grid_pool", x, grad)
    launch._calls.clear()
    found = torch.empty_like(x)
    plan = dataclasses.replace(grid_plan([16], 4, 5))  # no other call uses its tables
    weighting = Weighting(1.0, 2.0, True, x.shape[-1])
    call = triton_kernels.prepare_grid_pool_backward(launch.CallSpec(x, found, plan, weighting, grad))
    far = (1 << 31) // (4 * 5 * 3) + 1
    call.gradients += far * 4 * 5 * 3
    tables = call.tables.tensor
    words = tables.tolist()
    for stage in stages_of(words):
        if stage.mosaic:
            entries_of(tables, stage)[:, 0] -= far
    offsets = words[gradient_section(words).consumers :][: 16 + Header.of(words).summaries + 1]
    consumers = tables[offsets[0] : offsets[-1]].view(-1, CONSUMER_WORDS)
    consumers[:, 0] += far
    moved = len(consumers)
    for one in call.launches:
        if one.kernel is fused_backward.window_gradient_kernel and one.arguments[one.kernel.arg_names.index("MOSAIC")]:
            # offsets are found by the number of a summary
            one.arguments[one.kernel.arg_names.index("consumers")] -= far
    assert moved > 0
    call(x, found, 0, capturing=False, grad=grad)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("frame_counts", [[64], [32, 8, 24], [4] * 16], ids=str)
@pytest.mark.parametrize("levels", range(4))
def test_launches_of_a_gradient(levels: int, frame_counts: list[int]) -> None:
    """At most those of the call again, one for each level back, and one for the frames."""
    arguments = {"frame_strides": (2, 4, 8)[:levels], "frame_counts": frame_counts}
    shape = (sum(frame_counts), 27, 27, 3584)
    for kernel_size in (2, 3):
        forward = len(prepared("grid_pool", shape, kernel_size=kernel_size, **arguments).launches)
        backward = len(prepared("grid_pool", shape, gradient=True, kernel_size=kernel_size, **arguments).launches)
        assert backward <= forward + levels + 1
    assert len(prepared("norm_pool", shape, gradient=True, frame_counts=frame_counts).launches) == 1


def test_scratch_of_a_gradient() -> None:
    """As docs/kernels.md has it: the call's, a frame of float32 a summary, 2 numbers per token of a general window."""
    shape, frames = (64, 27, 27, 896), 14 * 27 * 27 * 896
    call = prepared("grid_pool", shape, gradient=True)
    assert (call.scratch, call.gradients) == ((32 + 8 + 4) * 14 * 14 * 896, frames)
    call = prepared("grid_pool", shape, gradient=True, kernel_size=3, stride=1)
    assert (call.scratch, call.gradients) == (frames, frames + 64 * 25 * 25 * 9 * 2)
    call = prepared("temporal_grid", shape, gradient=True, kernel_size=1)
    assert (call.scratch, call.gradients) == (0, frames)
    call = prepared("norm_pool", shape, gradient=True)
    assert (call.scratch, call.gradients) == (0, 0)


# ---- traffic, launches, scratch ----


@pytest.mark.parametrize(("size", "limit"), [pytest.param(8, 1.45, marks=pytest.mark.slow), (9, 1.75)])
def test_traffic(size: int, limit: float) -> None:
    """Bytes loaded and stored, tables included, to bytes of x and of the result."""
    x = tokens(32, size, size, 128, dtype=torch.bfloat16)
    with counted_traffic() as traffic:
        out = run("grid_pool", x)
    assert traffic.loaded > x.nbytes * (0.7 if size == 9 else 1)
    assert traffic.stored > out.nbytes
    assert traffic.loaded + traffic.stored <= limit * (x.nbytes + out.nbytes)


def test_norm_pool_reads_every_token_once() -> None:
    x = tokens(4, 8, 8, 128, dtype=torch.bfloat16)
    with counted_traffic() as traffic:
        out = run("norm_pool", x)
    assert (traffic.loaded, traffic.stored) == (x.nbytes, out.nbytes)
    with counted_traffic() as traffic:
        run("norm_pool", x[:, :7, :7])
    assert traffic.loaded == x[:, :6, :6].numel() * 2


@pytest.mark.parametrize("op", ["grid_pool", "norm_pool"])
def test_tokens_of_several_blocks_ask_for_the_same_bytes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that carry no column load and store every channel as often as a block that holds all channels does."""
    x = tokens(32, 4, 6, 100, dtype=torch.bfloat16)
    with counted_traffic() as in_a_block:
        run(op, x, norm_channels=10)
    launch._calls.clear()
    monkeypatch.setattr(config, "MAX_BLOCK", 16)
    monkeypatch.setattr(config, "LONG_BLOCK", 16)
    with counted_traffic() as in_blocks:
        run(op, x, norm_channels=10)
    (call,) = launch._calls.values()
    assert {one.kernel for one in call.launches} <= {fused.rows_kernel, fused.windows_kernel, fused.mosaics_kernel}
    assert in_blocks == in_a_block


@pytest.mark.parametrize("frame_counts", [[64], [32, 8, 24], [4] * 16, [256]], ids=str)
@pytest.mark.parametrize("levels", range(4))
def test_launches(levels: int, frame_counts: list[int]) -> None:
    """At most one for rows, one for windows and one for each level; one where no frame is shrunk."""
    arguments = {"frame_strides": (2, 4, 8)[:levels], "frame_counts": frame_counts}
    shape = (sum(frame_counts), 27, 27, 3584)
    kernels = [one.kernel for one in prepared("grid_pool", shape, **arguments).launches]
    assert kernels.count(fused.mosaics_kernel) <= levels
    assert len(kernels) <= (2 + levels if levels else 1)
    assert len(prepared("grid_pool", shape, kernel_size=3, **arguments).launches) <= 1 + levels
    assert len(prepared("norm_pool", shape, frame_counts=frame_counts).launches) == 1


def scratch_bytes(op: str, shape: tuple[int, ...], **arguments: Any) -> int:
    return prepared(op, shape, **arguments).scratch * 2


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((64, 27, 27, 3584), {}),
        ((64, 27, 27, 3584), {"ceil_mode": True}),
        ((32, 27, 27, 3584), {"ceil_mode": True}),
        ((64, 24, 24, 4096), {}),
    ],
    ids=str,
)
def test_scratch_is_at_most_a_fifth_of_the_input(shape: tuple[int, ...], arguments: Arguments) -> None:
    assert 0 < scratch_bytes("grid_pool", shape, **arguments) <= 0.2 * math.prod(shape) * 2


def test_scratch_formulas() -> None:
    """The formulas of docs/kernels.md: a thumbnail per slot, or a frame per summary."""
    h, w, C = 14, 14, 896
    # 32 frames are sampled, then 8 summaries of level 1; the 4 of level 2 take slots that level 1 has read
    assert scratch_bytes("grid_pool", (64, 27, 27, C)) == (32 + 8) * h * w * C * 2
    # every summary that is not replaced unread: 8 + 4 + 2
    assert scratch_bytes("grid_pool", (64, 27, 27, C), kernel_size=3) == 14 * 27 * 27 * C * 2
    assert scratch_bytes("temporal_grid", (64, 27, 27, C)) == 14 * 27 * 27 * C * 2
    assert scratch_bytes("norm_pool", (64, 27, 27, C)) == 0
    assert scratch_bytes("grid_pool", (7, 27, 27, C)) == 0


def test_launches_depend_on_nothing_that_packing_changes() -> None:
    """A video's frames go through the same kernels, tiles and walks whatever comes with it."""

    varying = {
        *("entries", "cells", "T", "weights", "consumers", "frames", "of_windows", "first", "count", "level"),
        *("summary_rows", "summary_cols"),
    }

    def recipe(call: launch.PreparedCall) -> list[Any]:
        found = []
        for one in call.launches:
            names = one.kernel.arg_names
            # compiled code must not depend on them either
            assert set(one.kernel.kwargs["do_not_specialize"]) == varying & set(names)
            arguments = dict(zip(names, one.arguments, strict=True))
            strides = {name: given[2:] for name, given in arguments.items() if isinstance(given, Tokens)}
            found.append({name: given for name, given in (arguments | strides).items() if name not in varying})
        return found

    alone = recipe(prepared("grid_pool", (32, 27, 27, 3584)))
    assert recipe(prepared("grid_pool", (1600, 27, 27, 3584), frame_counts=[32] * 50)) == alone
    alone = recipe(prepared("temporal_grid", (32, 27, 27, 3584)))
    assert recipe(prepared("temporal_grid", (1600, 27, 27, 3584), frame_counts=[32] * 50)) == alone
    # a video too short for a summary, beside one that has some
    alone = recipe(prepared("grid_pool", (3, 27, 27, 3584), kernel_size=3))
    assert recipe(prepared("grid_pool", (35, 27, 27, 3584), kernel_size=3, frame_counts=[3, 32]))[-1:] == alone
    for kernel_size in (2, 3):
        alone = recipe(prepared("grid_pool", (3, 27, 27, 3584), gradient=True, kernel_size=kernel_size))
        packed = {"kernel_size": kernel_size, "frame_counts": [3, 32]}
        assert recipe(prepared("grid_pool", (35, 27, 27, 3584), gradient=True, **packed))[-1:] == alone[-1:]


# ---- configuration ----


@pytest.mark.parametrize("C", [1, 3, 11, 64, 512, 896, 1152, 3584, 4096, 8192, 8193, 20000])
@pytest.mark.parametrize("value_bytes", [2, 4])
def test_configurations_fit(C: int, value_bytes: int) -> None:
    for one in [config.tile_config(C, wanted) for wanted in (1, 4, 9, 729)] + [config.channelwise_config(C)]:
        assert one.block & (one.block - 1) == 0 == one.tokens & (one.tokens - 1)
        assert one.block * one.chunks >= C > one.block * (one.chunks - 1)
        assert one.num_warps in (1, 2, 4, 8, 16)
        assert one.tokens * one.block <= 64 * 32 * one.num_warps
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        if C <= config.MAX_BLOCK:
            chosen = config.fused_config(C, value_bytes, capability)
            block = config.fused_block(C, C)
            assert C <= block <= max(16, 2 * C)
            assert 4 * block <= 64 * 32 * chosen.num_warps


def test_rows_say_why() -> None:
    assert all(row.reason for row in config.ROWS)


@pytest.mark.parametrize("row_cells", [1, 2, 5, 6, 7, 14, 40])
@pytest.mark.parametrize("rows", [1, 3, 14, 112, 264, 265, 448, 1568, 100_000])
def test_cells_of_a_program(rows: int, row_cells: int) -> None:
    """Programs are few enough to run at once, unless some would walk far while the GPU has places left."""
    for places in (1, 132, 264, 264 * 8):
        cells = config.FusedConfig(8).cells(rows, row_cells, places, False)
        programs = rows * -(-row_cells // cells)
        assert cells == config.FusedConfig(8).cells(rows, row_cells, places, True)
        assert 1 <= cells <= row_cells
        one_wave = min(max(1, -(-rows * row_cells // places)), row_cells)
        if one_wave <= config.LONGEST_WALK:
            assert cells == one_wave
        else:
            assert cells <= config.LONGEST_WALK or programs >= places
            # a walk is shortened no further than that takes
            assert cells == one_wave or rows * -(-row_cells // (cells + 1)) < places


def test_given_cells_of_a_program() -> None:
    given = config.FusedConfig(8, frame_cells=3, mosaic_cells=99)
    assert [given.cells(1000, 14, 264, mosaic) for mosaic in (False, True)] == [3, 14]


KERNELS = {
    name: value
    for module in (backward, fused, fused_backward, pool, summaries, token_norm)
    for name, value in vars(module).items()
    if name.endswith("_kernel")
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_few_parameters(name: str) -> None:
    assert 5 < len(KERNELS[name].arg_names) <= 25


def test_every_kernel_is_known() -> None:
    """Every kernel of the folder is among those whose parameters are counted."""
    sources = "".join(file.read_text() for file in Path(launch.__file__).parent.glob("*.py"))
    assert sorted(KERNELS) == sorted(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


# ---- between the call and the device ----


def entered_before_the_launch(monkeypatch: pytest.MonkeyPatch, call: str) -> list[Path]:
    """Return the file of every function that a warm call enters, from the op up to its first launch."""
    entered: list[Path] = []
    before_the_launch: list[Path] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            entered.append(Path(frame.f_code.co_filename))

    def reach(*given: Any) -> None:
        before_the_launch.extend(entered if not before_the_launch else ())

    monkeypatch.setattr(launch.Launch, "__call__", reach)
    op, arguments = CALLS[call]
    x = tokens(64, 9, 9, 16, dtype=torch.bfloat16)
    public = getattr(torch.ops.stgp, op)
    arguments = {k: [v] * 2 if k in ("kernel_size", "stride", "padding") else v for k, v in arguments.items()}
    with stgridpool_kernels.use_backend("triton"):
        public(x, **arguments)
        before_the_launch.clear()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            public(x, **arguments)
        finally:
            sys.setprofile(before)
    return before_the_launch


warm_calls = pytest.mark.parametrize("call", ["grid_pool-published", "grid_pool-overlapping", "norm_pool-published"])


@warm_calls
def test_a_warm_call_is_short_before_its_first_launch(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm call enters few functions, a number that does not depend on the load of the machine.

    `TRITON_INTERPRET=1 make bench ARGS="-k launches"` takes times.
    """
    entered = entered_before_the_launch(monkeypatch, call)
    print(f"{call}: {len(entered)} function calls")
    assert 0 < len(entered) <= 60


@warm_calls
def test_a_warm_call_passes_through_few_files(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader follows a warm call through at most 8 files of the package, with at most 8 moves from file to file.

    Two of them, and two moves, are those of the kernel: its own file and that of the functions it calls, tiles.py.
    """
    package = Path(stgridpool_kernels.__file__).parent
    kernel = fused if call.endswith("published") else pool
    entered = [*entered_before_the_launch(monkeypatch, call), Path(kernel.__file__), Path(tiles.__file__)]
    files = [str(file.relative_to(package)) for file in entered if package in file.parents]
    moves = [file for file, _ in groupby(files)]
    print(f"{call}: {' → '.join(moves)}")
    assert moves[0] == "ops.py"
    assert len(set(moves)) <= 8, moves
    assert len(moves) - 1 <= 8, moves


def test_prepared_calls_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MAX_CALLS", 3)
    for T in (8, 9, 10, 8, 11):
        run("grid_pool", tokens(T, 2, 2, 3))
    kept = [call.plan.frame_counts for call in launch._calls.values()]
    assert kept == [(10,), (8,), (11,)]  # 9 was used longest ago


def test_calls_share_the_tables_of_a_plan() -> None:
    x = tokens(8, 2, 2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        for temperature in (1.0, 2.0):
            run("grid_pool", x.to(dtype), temperature=temperature)
    assert (len(launch._calls), len({call.tables for call in launch._calls.values()})) == (4, 1)


def test_a_prepared_call_is_for_one_layout() -> None:
    """Kernels are compiled for the alignment and the strides of tensors, and run without another look at them."""
    room = torch.zeros(4096, dtype=torch.bfloat16)
    start = -room.data_ptr() % 64 // 2

    def view(offset: int, *strides: int) -> Tensor:
        return room.as_strided((1, 2, 2, 16), strides or (64, 32, 16, 1), start + offset)

    def run_into(x: Tensor, offset: int) -> int:
        out = room.as_strided((1, 1, 1, 16), (16, 16, 16, 1), start + 1024 + offset)
        stgridpool_kernels.grid_pool(x, out=out, backend="triton")
        return len(launch._calls)

    launch._calls.clear()
    assert run_into(view(0), 0) == 1
    assert run_into(view(32), 8) == 1  # other memory, as well aligned
    assert run_into(view(1), 0) == 2
    assert run_into(view(0), 1) == 3
    assert run_into(view(0, 128, 64, 16, 1), 0) == 4


def test_call_that_failed_is_no_warm_up() -> None:
    call = launch.PreparedCall(None, [], 0, None)
    launch._find("failed", lambda: call, capturing=False)
    with pytest.raises(RuntimeError, match="warm up first"):
        launch._find("failed", lambda: call, capturing=True)
    call(tokens(1, 2, 2, 3), tokens(1, 2, 2, 3), 0, capturing=False)
    assert launch._find("failed", lambda: call, capturing=True) is call


def test_first_call_under_capture_is_refused() -> None:
    never: Callable[[], Any] = lambda: pytest.fail("prepared under capture")  # noqa: E731
    with pytest.raises(RuntimeError, match="warm up first"):
        launch._find("unseen", never, capturing=True)


class FakeKernel:
    """A kernel and what it is compiled to, which tell how they were launched."""

    arg_names = ("x", "out", "scratch", "tables", "size")
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., FakeKernel]:
        return lambda *given, **options: self.log.append((grid, given, options)) or self

    def run(self, *given: Any) -> None:
        self.log.append(given)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_hear_of_launches_where_they_are_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And cost nothing where they are not: then the compiled kernel is run without them."""
    kernel, tensors = FakeKernel(), ("x", "out", None, "tables", "grad")
    one = launch.Launch(kernel, (3, 1, 1), {"size": 7}, num_warps=2)
    given, chain = (*tensors[:4], 7), getattr(launch.triton.knobs.runtime, name)

    def hook(metadata: Any) -> None: ...

    one(tensors, 5)
    one(tensors, 5)
    chain.add(hook)
    try:
        one(tensors, 5)
    finally:
        chain.remove(hook)
    monkeypatch.setattr(launch.triton.knobs.runtime, name, hook)
    one(tensors, 5)
    monkeypatch.setattr(launch.triton.knobs.runtime, name, None)
    one(tensors, 5)
    without = (3, 1, 1, 5, "function", "metadata", None, None, None, *given)
    hooked = ((3, 1, 1), given, {"stream": 5})
    assert kernel.log == [((3, 1, 1), given, one.options), without, hooked, hooked, without]


# ---- which calls it takes ----


def test_auto_leaves_the_interpreter_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "stgridpool_kernels"):
        assert backends.choose_backend(tokens(1, 2, 2, 3)).name != "triton"
    assert "triton passed over: TRITON_INTERPRET=1 runs the kernels on the CPU, slowly" in caplog.text


@pytest.mark.parametrize(
    ("x", "arguments", "reason"),
    [
        (torch.empty(1, 2, 2, 3, dtype=torch.float64), {}, "float64 runs on the reference only"),
        (torch.empty(1, 2, 2, 3, device="meta"), {}, "x is on meta"),
        (torch.empty(1).expand(1 << 15, 1 << 8, 1 << 8, 3), {}, "has 2147483648 tokens"),
        (torch.empty(1).expand(1, 257, 256, 1), {"output_size": (1, 1)}, "a window has 65792 tokens"),
        (
            torch.empty(1, 1, 1, 1).expand(1 << 29, 1, 1, 1),
            {"kernel_size": 2, "stride": 1, "padding": 1},
            "the result has 2147483648 tokens",
        ),
    ],
    ids=["float64", "device", "tokens", "window", "result"],
)
def test_refusals_name_the_reason(x: Tensor, arguments: Arguments, reason: str) -> None:
    plan = grid_plan(x.shape[:1], *x.shape[1:3], frame_strides=(), **arguments)
    assert reason in triton_backend.unsupported_reason(x, plan)


@pytest.mark.parametrize("sizes", [{"scratch": 1 << 64}, {"scratch": 0, "gradients": 1 << 63}], ids=str)
def test_scratch_beyond_64_bits(sizes: dict[str, int]) -> None:
    elements = max(sizes.values())
    with pytest.raises(RuntimeError, match=f"no memory for {elements} elements of scratch, fewer than 2⁶⁰"):
        launch.PreparedCall(None, [], tables=None, **sizes)


def test_refused_call_raises() -> None:
    x = tokens(1, 2, 2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call: float64 runs on the reference only"):
        stgridpool_kernels.grid_pool(x, backend="triton")
    assert stgridpool_kernels.grid_pool(x).dtype == torch.float64


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.5.1", "triton 3.5.1 is older than 3.6"),
        ("3.6.0", None),
        ("4.0.0+git", None),
        ("3.7rc1", None),
        (None, "not installed"),
    ],
)
def test_versions_of_triton(version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> str:
        if version is None:
            raise triton_backend.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(triton_backend.importlib.metadata, "version", found)
    said = triton_backend._missing_here.__wrapped__(True)
    assert said == reason or (reason is not None and reason in said)


def test_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend._missing_here.__wrapped__(False) == "no CUDA device"
