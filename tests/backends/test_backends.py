"""What every backend must compute: golden values, random calls against brute force, and properties that hold exactly.

A test that takes `backend`, `device` and `dtype` runs on every triple that exists on this machine (support/triples.py).
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels import grid_plan
from tests.support import eager, golden
from tests.support.cases import CALLS, GRIDDING_CALLS, LAYOUTS, Arguments, Size, laid_out, run, tokens
from tests.support.strategies import (
    gridding_arguments,
    inputs,
    norm_arguments,
    packings,
    temperatures,
    window_arguments,
)
from tests.support.tolerance import (
    assert_accurate,
    assert_golden,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    error,
    oracle,
    published_errors,
)
from tests.support.triples import OPS, each, only, pairs

pytestmark = pytest.mark.filterwarnings("error")

HALVES = (torch.bfloat16, torch.float16)
EVERY_CALL = {"op, arguments": CALLS}
EVERY_GRIDDING = {"op, arguments": GRIDDING_CALLS}


# ---- golden values ----

GOLDEN = sorted(Path(__file__).parents[1].joinpath("data").glob("*.npz"))

SMALL_GOLDEN = ("few_frames", "kernel3", "no_grid", "odd_frames", "rectangular")
"""Cases that take Triton's interpreter less than 5 seconds."""


def most_square(size: int) -> tuple[int, int]:
    """(rows, cols) of a grid of `size` frames, rows ≥ cols."""
    rows = min(rows for rows in range(1, size + 1) if size % rows == 0 and rows * rows >= size)
    return rows, size // rows


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow_interpreted] * (path.stem not in SMALL_GOLDEN))
        for path in GOLDEN
    ],
)
def test_golden_values(path: Path, backend: str, device: torch.device) -> None:
    with np.load(path) as data:
        meta = json.loads(str(data["meta"]))
        dtype = getattr(torch, meta["dtype"])
        x, grid, out = (torch.from_numpy(data[name]).to(device, dtype) for name in ("x", "grid", "out"))
    shapes = [most_square(size) for size in meta["grid_sizes"]] or [(2, 2)]
    gridding = {"frame_strides": meta["freqs"], "grid_shape": [entry for shape in shapes for entry in shape]}
    pooling = {
        "kernel_size": meta["kernel"],
        "padding": meta["padding"],
        "temperature": meta["temperature"],
        "norm_type": float(meta["p"]),
        "norm_channels": meta.get("norm_channels"),
    }
    found = run(backend, "temporal_grid", x, **gridding)
    assert_golden(found, grid)
    assert_golden(run(backend, "norm_pool", found, **pooling), out)
    assert_golden(run(backend, "grid_pool", x, **gridding, **pooling), out)


def test_golden_values_are_all_there() -> None:
    assert len(GOLDEN) == 15 + len(golden.CASES)


@pytest.mark.parametrize("name", golden.CASES)
def test_golden_values_of_the_reference_are_made_by_a_command(name: str) -> None:
    """The files hold what the command makes, and norms that differ from those of all channels."""
    meta, arrays = golden.make(name)
    with np.load(golden.DATA / f"{name}.npz") as data:
        assert json.loads(str(data["meta"])) == meta
        for key, array in arrays.items():
            assert_golden(torch.from_numpy(data[key]), array)
    norms = [stgridpool_kernels.token_norm(arrays["x"], norm_channels=n) for n in (meta["norm_channels"], None)]
    assert (norms[0] / norms[1] - 1).abs().mean() > 0.1


# ---- random calls against brute force ----


@given(data=st.data())
def test_random_grid_pool(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(gridding_arguments()) | data.draw(packings(x)) | data.draw(norm_arguments(x.shape[-1]))
    arguments |= data.draw(window_arguments(*x.shape[-3:-1])) | {"temperature": data.draw(temperatures)}
    assert_accurate(run(backend, "grid_pool", x, **arguments), "grid_pool", x, **arguments)


@given(data=st.data())
def test_random_temporal_grid(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(gridding_arguments()) | data.draw(packings(x))
    assert_accurate(run(backend, "temporal_grid", x, **arguments), "temporal_grid", x, **arguments)


@given(data=st.data())
def test_random_norm_pool(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(window_arguments(*x.shape[-3:-1])) | data.draw(norm_arguments(x.shape[-1]))
    arguments |= {"temperature": data.draw(temperatures)}
    result = run(backend, "norm_pool", x, **arguments)
    # arithmetic is float32 for 16-bit tokens too, so only the result is rounded
    assert_accurate(result, "norm_pool", x, published_dtype=torch.promote_types(dtype, torch.float32), **arguments)


@given(data=st.data())
def test_random_token_norm(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(norm_arguments(x.shape[-1]))
    result = run(backend, "token_norm", x, **arguments)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert_accurate(result, "token_norm", x, **arguments)


# ---- norms of some channels ----

NORMS: dict[str, Arguments] = {
    "l2": {},
    "l1": {"norm_type": 1.0, "normalize_norm": False},
    "max": {"norm_type": math.inf},
    "power": {"norm_type": 3.0},
}
WEIGHED: dict[str, tuple[str, Arguments]] = {
    "fused": ("grid_pool", {"frame_strides": (1, 2), "ceil_mode": True}),
    "general": ("grid_pool", {"frame_strides": (1,), "resize": "bilinear", "temperature": 3.0}),
    "padding": ("norm_pool", {"kernel_size": 3, "stride": 2, "padding": 1}),
    "norms": ("token_norm", {}),
}


def channels_of(name: str, result: Tensor, channels: int) -> Tensor:
    """Return the first channels of pooled tokens, or norms as they are."""
    return result if name == "token_norm" else result[..., :channels]


def rounds_as_alone(n: int, C: int, backend: str, device: torch.device, gridded: bool = True) -> bool:
    """Return whether a backend rounds the first n of C channels, pooled by norms of these, as it does n channels alone.

    On a GPU, Triton spreads the channels of a block over threads, and the block follows C. In the reference, torch
    shrinks frames: it averages the last channels, which do not fill a vector, by other instructions.
    """

    def block(channels: int) -> int:
        return 1 << max(4, (channels - 1).bit_length())

    if backend == "reference":
        return not gridded or n % 16 == 0
    return backend != "triton" or device.type == "cpu" or block(n) == block(C)


@pairs({"C, norm_channels": [(13, 6), (40, 16), (130, 69), (24, 1), (70, 65)], "norm": NORMS, "layout": LAYOUTS})
def test_norms_of_some_channels_are_those_of_a_slice(
    C: int,
    norm_channels: int,
    norm: Arguments,
    layout: str,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    size: Size,
) -> None:
    x = laid_out(tokens(*size, C, dtype=dtype, device=device), layout)
    for name, arguments in WEIGHED.values():
        found = run(backend, name, x, norm_channels=norm_channels, **arguments, **norm)
        if rounds_as_alone(norm_channels, C, backend, device, gridded="frame_strides" in arguments):
            alone = run(backend, name, x[..., :norm_channels], **arguments, **norm)
            assert_same_bits(channels_of(name, found, norm_channels), alone)
        else:
            assert_accurate(found, name, x, norm_channels=norm_channels, **arguments, **norm)


@each({"call": WEIGHED, "norm": NORMS})
def test_norm_of_all_channels_by_their_number(
    call: tuple[str, Arguments], norm: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    (name, arguments), x = call, tokens(*size, 20, dtype=dtype, device=device)
    assert_same_bits(
        run(backend, name, x, norm_channels=20, **arguments, **norm), run(backend, name, x, **arguments, **norm)
    )


@each({"call": WEIGHED, "norm": NORMS})
def test_what_is_in_other_channels_stays_there(
    call: tuple[str, Arguments], norm: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """A NaN, an infinity or a large value in a channel that the norm does not run over changes no other channel."""
    (name, arguments), x = call, tokens(*size, 21, dtype=dtype, device=device)
    expected = run(backend, name, x, norm_channels=13, **arguments, **norm)
    x[0, 0, 0, 13], x[1, 1, 1, 14], x[2, 2, 2, 20] = math.nan, math.inf, 60000
    found = run(backend, name, x, norm_channels=13, **arguments, **norm)
    if name == "token_norm":
        assert_same_bits(found, expected)
    else:
        for kept in (slice(0, 13), slice(15, 20)):
            assert_same_bits(found[..., kept], expected[..., kept])
        assert found[..., 13].isnan().any()
        assert found[..., 14].isinf().any()
        assert not found[..., 14].isnan().any()


def test_norms_of_some_channels_of_tokens_that_no_block_holds(backend: str, device: torch.device) -> None:
    """Four levels of Qwen3-VL-8B have 4 · 4096 channels, more than a block holds; the norm runs over the first 4096."""
    x = tokens(8, 2, 2, 4 * 4096, dtype=torch.bfloat16, device=device)
    arguments: Arguments = {"frame_strides": (1, 2), "temperature": 4.0}
    found = run(backend, "grid_pool", x, norm_channels=4096, **arguments)
    if rounds_as_alone(4096, x.shape[-1], backend, device):
        assert_same_bits(found[..., :4096], run(backend, "grid_pool", x[..., :4096], **arguments))
    assert_accurate(found, "grid_pool", x, norm_channels=4096, **arguments)


# ---- 16-bit tokens ----


@pairs({"shape": [(8, 5, 7, 3584), (16, 9, 9, 100)], "content": ["usual", "outlier", "equal", "zero"]})
@only(*HALVES)
def test_realistic_tokens(
    shape: tuple[int, ...], content: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = tokens(*shape, content=content, dtype=dtype, device=device)
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    result = run(backend, "grid_pool", x, **arguments)
    assert_accurate(result, "grid_pool", x, **arguments)
    if content in ("equal", "zero"):
        assert_same_bits(result, x[:, :1, :1].expand(result.shape))


@only(*HALVES)
def test_summaries_are_stored_in_the_dtype_of_x(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Means of four numbers with few digits are exact in float32, so that only the rounding of each summary is left."""
    unit = 8 * torch.finfo(dtype).eps
    x = (tokens(32, 8, 6, 24, device=device) / unit).round().mul(unit).clamp(unit - 8, 8 - unit).to(dtype)

    def round_to(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values.astype(np.float64)).to(dtype).double().numpy()

    grid = oracle("temporal_grid", x, round_to=round_to)
    assert_same_bits(run(backend, "temporal_grid", x), grid.to(dtype))
    assert not torch.equal(grid.to(dtype), oracle("temporal_grid", x).to(dtype))
    assert_rounded_once(run(backend, "grid_pool", x), oracle("grid_pool", x, round_to=round_to))


# ---- meaning ----

AVERAGES: dict[str, Arguments] = {
    "2": {"kernel_size": 2},
    "2-ceil": {"kernel_size": 2, "ceil_mode": True},
    "3-stride2-pad1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x2-pad1-exclude": {"kernel_size": (3, 2), "padding": (1, 1), "count_include_pad": False},
    "4x3-stride3x2-ceil": {"kernel_size": (4, 3), "stride": (3, 2), "padding": (2, 1), "ceil_mode": True},
    "adaptive": {"output_size": (3, 4)},
    "adaptive-whole": {"output_size": (7, 5)},
}


@each({"windows": AVERAGES})
def test_temperature_0_averages(windows: Arguments, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = tokens(3, 7, 8, 13, dtype=dtype, device=device)
    average = F.adaptive_avg_pool2d if "output_size" in windows else F.avg_pool2d
    exact = average(x.double().permute(0, 3, 1, 2), **windows).permute(0, 2, 3, 1)
    result = run(backend, "norm_pool", x, temperature=0.0, **windows)
    assert_within(result, exact, 2 * error(eager.norm_pool(x, temperature=0.0, **windows), exact))


@each({"windows": AVERAGES, "norm": NORMS})
def test_norm_pool_is_grid_pool_without_levels(
    windows: Arguments, norm: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(*size, 13, dtype=dtype, device=device)
    arguments = {"temperature": 0.7, **norm, **windows}
    if "output_size" in windows:
        arguments["output_size"] = (2, 3)
    gridded = run(backend, "grid_pool", x, frame_strides=(), **arguments)
    assert_same_bits(run(backend, "norm_pool", x, **arguments), gridded)
    assert_same_bits(run(backend, "norm_pool", x[None], **arguments), gridded[None])


@pairs({"temperature": [1.0, 0.0, -3.0, 50.0], "windows": [{}, {"ceil_mode": True}, {"output_size": (4, 2)}]})
def test_constant_tokens_stay(
    windows: Arguments, temperature: float, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = tokens(16, 5, 7, 20, content="equal", dtype=dtype, device=device)
    arguments = {"frame_strides": (1, 2), "temperature": temperature, **windows}
    result = run(backend, "grid_pool", x, **arguments)
    exact = x[:, :1, :1].expand(result.shape).double()
    assert_within(result, exact, 2 * error(eager.grid_pool(x, **arguments), exact))


def test_padding_has_norm_0(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """One token alone in a 2 × 2 window with three zeros: e^‖t‖ / (e^‖t‖ + 3) of it is left."""
    x = torch.ones(1, 1, 1, 8, device=device, dtype=dtype) * 2
    included = run(backend, "norm_pool", x, padding=1, kernel_size=2)
    share = math.exp(2) / (math.exp(2) + 3)
    assert_within(included, torch.full_like(included, 2 * share, dtype=torch.float64))
    excluded = run(backend, "norm_pool", x, padding=1, kernel_size=2, count_include_pad=False)
    assert torch.equal(excluded, torch.full_like(excluded, 2))


@each(EVERY_GRIDDING)
def test_frames_that_are_not_replaced_stay(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    gridding = {
        key: arguments[key] for key in ("frame_strides", "grid_shape", "sampling", "resize") if key in arguments
    }
    x = laid_out(tokens(*size, 11, dtype=dtype, device=device), "sliced")
    kept = [frame for frame in range(size[0]) if frame not in grid_plan(size[:1], *size[1:], **gridding).overwritten]
    assert_same_bits(run(backend, "temporal_grid", x, **gridding)[kept], x[kept])


OUTSIDE_GROUPS: dict[str, tuple[str, Arguments]] = {
    f"{op}-{name}": (op, arguments)
    for op in ("temporal_grid", "grid_pool")
    for name, arguments in {
        "last": {"frame_strides": (4, 8)},
        "first": {"frame_strides": (4, 8), "sampling": "first"},
        "mixed": {"frame_strides": (5, 3), "grid_shape": (1, 2, 3, 1), "resize": "bilinear"},
    }.items()
}


@each({"op, arguments": OUTSIDE_GROUPS})
def test_order_of_frames_outside_groups(op: str, arguments: Arguments, backend: str, device: torch.device) -> None:
    """Frames that no group reads or replaces can change places; their results change places with them."""
    plan = grid_plan([37], 5, 7, **arguments)
    used = {frame for level in plan.levels for group in level.sources for frame in group} | set(plan.overwritten)
    free = [frame for frame in range(37) if frame not in used]
    assert len(free) > 15
    order = torch.arange(37)
    order[free] = order[free].roll(1)
    x = tokens(37, 5, 7, 11, device=device)
    assert_same_bits(run(backend, op, x[order], **arguments), run(backend, op, x, **arguments)[order])


@each({"T": [0, 1, 3, 7]})
def test_too_few_frames_for_a_group(T: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = tokens(T, 5, 7, 11, dtype=dtype, device=device)
    assert_same_bits(run(backend, "temporal_grid", x), x)
    assert_accurate(run(backend, "grid_pool", x), "norm_pool", x)


@each(EVERY_CALL | {"lead": [(0,), (0, 4), (3, 0), (0, 0)]})
def test_no_frames(lead: tuple[int, ...], op: str, arguments: Arguments, backend: str, device: torch.device) -> None:
    x = tokens(*lead, 5, 7, 11, dtype=torch.bfloat16, device=device)
    result = run(backend, op, x, **arguments)
    assert result.shape == oracle(op, x, **arguments).shape
    assert result.dtype == (torch.float32 if op == "token_norm" else torch.bfloat16)


@each(EVERY_GRIDDING)
def test_no_videos(op: str, arguments: Arguments, backend: str, device: torch.device) -> None:
    x = tokens(0, 5, 7, 11, device=device)
    for frame_counts in ([], [0], [0, 0, 0]):
        assert_same_bits(run(backend, op, x, frame_counts=frame_counts, **arguments), run(backend, op, x, **arguments))


# ---- bitwise properties ----


@pytest.mark.slow_interpreted  # one thread runs one program after the other there
@each(EVERY_CALL)
def test_runs_are_repeatable(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(2, *size, 11, dtype=dtype, device=device)
    first = run(backend, op, x, **arguments)
    for _ in range(3):
        assert_same_bits(run(backend, op, x, **arguments), first)


@each(EVERY_GRIDDING)
def test_packed_videos_equal_each_alone(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    frame_counts = [9, 0, size[0], 3, 0, 16, 1]
    x = tokens(sum(frame_counts), *size[1:], 11, dtype=dtype, device=device)
    packed = run(backend, op, x, frame_counts=frame_counts, **arguments)
    alone = [run(backend, op, video, **arguments) for video in x.split(frame_counts)]
    assert_same_bits(packed, torch.cat(alone))


def test_packed_with_a_longer_video_that_other_kernels_take(
    dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """The second level's grid is no 2 × 2, and only the longer video reaches it."""
    arguments = {"frame_strides": (1, 4), "grid_shape": (2, 2, 3, 1)}
    x = tokens(21, *size[1:], 11, dtype=dtype, device=device)
    packed = run(backend, "grid_pool", x, frame_counts=[9, 12], **arguments)
    alone = [run(backend, "grid_pool", video, **arguments) for video in x.split([9, 12])]
    assert_same_bits(packed, torch.cat(alone))


@each(EVERY_CALL)
def test_batched_videos_equal_each_alone(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = laid_out(tokens(3, *size, 11, dtype=dtype, device=device), "sliced")
    batched = run(backend, op, x, **arguments)
    assert_same_bits(batched, torch.stack([run(backend, op, video, **arguments) for video in x]))


def memory_of(tensor: Tensor) -> Tensor:
    """Everything in the storage of a tensor, what is between its elements included."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


OUT_LAYOUTS = ("fresh", "contiguous", "sliced", "channels first", "misaligned")


@cache
def call_and_exact(name: str, dtype: torch.dtype, size: Size) -> tuple[Tensor, Tensor]:
    """Return tokens for the call of that name, and its exact result."""
    op, arguments = CALLS[name]
    x = tokens(*size, 11, dtype=dtype)
    return x, oracle(op, x, **arguments)


@pairs({"op": OPS, "layout": LAYOUTS, "out_layout": OUT_LAYOUTS})
def test_layouts_of_x_and_out(
    op: str, layout: str, out_layout: str, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """Any two of op, layout, dtype and out= meet: results are right, x is only read, out alone is written."""
    for call in (call for call in CALLS if CALLS[call][0] == op):
        arguments = CALLS[call][1]
        values, exact = call_and_exact(call, dtype, size)
        x = laid_out(values.to(device), layout)
        before, version = memory_of(x).clone(), x._version
        fresh = run(backend, op, x, **arguments)
        errors = published_errors(op, values, arguments, exact)
        assert_within(fresh, exact.to(device), (2 * found for found in errors))
        if out_layout != "fresh":
            out = laid_out(torch.full_like(fresh, math.nan), out_layout)
            assert memory_of(out).isnan().all()
            assert run(backend, op, x, out=out, **arguments) is out
            assert_same_bits(out, fresh)
            assert memory_of(out).isnan().sum() == memory_of(out).numel() - out.numel()
        assert_same_bits(memory_of(x), before)
        assert x._version == version


@each(EVERY_CALL)
def test_expanded_input(op: str, arguments: Arguments, backend: str, device: torch.device) -> None:
    """Strides of 0 in every dimension but the channels."""
    x = tokens(11, device=device).expand(16, 5, 7, 11)
    assert_accurate(run(backend, op, x, **arguments), op, x, **arguments)


@each(EVERY_CALL | {"layout": ["contiguous", "channels first"]})
def test_result_is_new_and_contiguous(
    layout: str, op: str, arguments: Arguments, backend: str, device: torch.device, size: Size
) -> None:
    x = laid_out(tokens(*size, 11, device=device), layout)
    first, second = (run(backend, op, x, **arguments) for _ in range(2))
    assert first.is_contiguous()
    assert first.storage_offset() == 0
    assert first._base is None
    assert len({tensor.untyped_storage().data_ptr() for tensor in (x, first, second)}) == 3
    assert first.device == x.device


@each(EVERY_CALL)
def test_autocast_changes_nothing(
    op: str, arguments: Arguments, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(*size, 11, device=device)
    plain = run(backend, op, x, **arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_same_bits(run(backend, op, x, **arguments), plain)


# ---- NaN, infinity, overflow ----

SPOILED: dict[str, tuple[str, Arguments]] = {
    name: CALLS[name]
    for name in ("grid_pool-published", "grid_pool-paper", "grid_pool-overlapping", "grid_pool-exclude_pad")
} | {"grid_pool-adaptive": CALLS["grid_pool-adaptive"], "norm_pool-padding": CALLS["norm_pool-padding"]}


@pairs({"op, arguments": SPOILED, "value": [math.nan, math.inf, -math.inf]})
def test_spoiled_token_touches_its_own_windows(
    value: float, op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """One bad channel spoils what the formula says, and leaves every other window as it is, bit by bit."""
    x = tokens(*size, 11, dtype=dtype, device=device)
    clean, clean_exact = run(backend, op, x, **arguments), oracle(op, x, **arguments)
    x[[0, 3], 1, 2, 5] = value
    result, exact = run(backend, op, x, **arguments), oracle(op, x, **arguments)
    assert_accurate(result, op, x, **arguments)
    if math.isnan(value):
        assert torch.equal(exact.isnan().any(-1), exact.isnan().all(-1))
    untouched = (exact == clean_exact).all(-1)
    assert 0 < untouched.sum() < untouched.numel()
    assert_same_bits(result[untouched], clean[untouched])


@pairs(
    {
        "norm_type": [2.0, 3.0, 0.5, math.inf],
        "temperature": [1.0, 0.0, -1.0],
        "whole_window": {"one token": False, "whole window": True},
    }
)
@only(torch.bfloat16, torch.float32, torch.float64)
def test_overflowing_norms(
    dtype: torch.dtype, whole_window: bool, temperature: float, norm_type: float, backend: str, device: torch.device
) -> None:
    """A norm that overflows the arithmetic is infinite: NaN where the formula says so, weight 0 at temperature < 0."""
    x = tokens(2, 6, 8, 11, dtype=dtype, device=device)
    arguments = {"temperature": temperature, "norm_type": norm_type}
    clean, wide = run(backend, "norm_pool", x, **arguments), torch.promote_types(dtype, torch.float32)
    errors = [error(eager.norm_pool(x.to(wide), **arguments), oracle("norm_pool", x, **arguments))]
    rows, cols = (slice(2, 4), slice(4, 6)) if whole_window else (2, 5)
    x[1, rows, cols] *= 1e200 if dtype == torch.float64 else 1e30
    result = run(backend, "norm_pool", x, **arguments)
    published, window = eager.norm_pool(x.to(wide), **arguments), (1, 1, 2)
    exact = oracle("norm_pool", x, **arguments).masked_fill(published.isnan(), math.nan)
    errors.append(error(published[window], exact[window]))
    assert_within(result[window], exact[window], 2 * max(errors))
    overflows = norm_type in (2.0, 3.0)
    assert exact[window].isnan().all() == (overflows and (whole_window or temperature >= 0))
    result[window] = clean[window]
    assert_same_bits(result, clean)


@pytest.mark.parametrize("temperature", [1e38, -1e38])
def test_overflowing_logits(temperature: float, backend: str, device: torch.device) -> None:
    """temperature · ‖t‖ beyond float32: the maximum is infinite, and so is what is subtracted from it."""
    x = tokens(2, 5, 7, 11, device=device)
    x[0] *= 10
    x[1] /= 100
    result = run(backend, "norm_pool", x, temperature=temperature)
    assert result[0].isnan().all()
    assert_accurate(result[1:], "norm_pool", x[1:], temperature=temperature)


@each(EVERY_CALL)
def test_arguments_reach_every_backend_through_torch_ops(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """`torch.ops.stgp.*` under `use_backend` is the public function with `backend=`."""
    x = tokens(*size, 11, dtype=dtype, device=device)
    expected = run(backend, op, x, **arguments)
    with stgridpool_kernels.use_backend(backend):
        assert_same_bits(getattr(torch.ops.stgp, op)(x, **arguments), expected)
