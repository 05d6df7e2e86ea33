"""What every backend must compute: golden values, random calls against brute force, and properties that hold exactly.

A test takes the names `backend` and `device` from conftest; a call that a backend refuses is skipped with its reason.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import eager
import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import (
    assert_accurate,
    assert_golden,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    error,
    oracle,
)
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends import BACKENDS

pytestmark = pytest.mark.filterwarnings("error")

Arguments = dict[str, Any]
Size = tuple[int, int, int]

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
HALVES = DTYPES[:2]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def run(backend: str, op: str, x: Tensor, **arguments: Any) -> Tensor:
    """`op(x, **arguments)` on `backend`; skips a test, or discards an example, that the backend refuses."""
    try:
        return getattr(stgridpool_kernels, op)(x, backend=backend, **arguments)
    except RuntimeError as refusal:
        if "cannot run this call" not in str(refusal):
            raise
        if hypothesis.currently_in_test_context():
            hypothesis.reject()
        pytest.skip(str(refusal))


def skip_refused(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Skips a test of random calls if the backend takes none of that dtype."""
    reason = next(known for known in BACKENDS if known.name == backend).why_not(
        torch.empty(1, 1, 1, 8, dtype=dtype, device=device), None
    )
    if reason is None and backend == "triton" and device.type == "cpu" and dtype == torch.float16:
        reason = "in the interpreter, random calls take minutes, and bfloat16 stands for both 16-bit types"
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def tokens(
    *shape: int,
    content: str = "usual",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Tokens (…, C) of RMS 2 ± 0.3, one of them 50 times larger and one 0 ("outlier"), all "equal" or all "zero"."""
    generator = torch.Generator().manual_seed(seed)
    *positions, C = shape
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-3)
    x = x * (2 + 0.3 * torch.randn(*positions, 1, generator=generator, dtype=torch.float64))
    if x.numel():
        if content == "outlier":
            large, zero = torch.randint(math.prod(positions), (2,), generator=generator)
            x.view(-1, C)[zero] = 0
            x.view(-1, C)[large] *= 50
        elif content == "equal":
            x = x.view(-1, C)[0].expand(shape)
        elif content == "zero":
            x = torch.zeros_like(x)
    return x.to(dtype).contiguous().to(device)


LAYOUTS = ("contiguous", "sliced", "every second channel", "channels first", "misaligned", "frames inside")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in other memory; what surrounds them there is NaN."""
    if layout == "sliced":
        base = x.new_full([2 * size + 3 for size in x.shape], math.nan)
        inner = base[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape[:-1]) + (slice(3, 3 + x.shape[-1]),)]
        return inner.copy_(x)
    if layout == "every second channel":
        return x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)[..., ::2].copy_(x)
    if layout == "channels first":
        return x.movedim(-1, -3).contiguous().movedim(-3, -1)
    if layout == "misaligned":
        return x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape).copy_(x)
    if layout == "frames inside":
        return x.transpose(-4, -2).contiguous().transpose(-4, -2)
    return x.clone(memory_format=torch.contiguous_format)


# Calls for the properties. Shapes are odd on purpose; videos of 21 (or 10) frames leave incomplete groups.
CALLS: dict[str, tuple[str, Arguments]] = {
    "grid_pool-published": ("grid_pool", {}),
    "grid_pool-ceil": ("grid_pool", {"ceil_mode": True}),
    "grid_pool-paper": ("grid_pool", {"sampling": "first", "resize": "bilinear", "normalize_norm": False}),
    "grid_pool-overlapping": (
        "grid_pool",
        {"frame_strides": (1, 3), "grid_shape": (1, 2, 3, 1), "kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "grid_pool-exclude_pad": (
        "grid_pool",
        {
            "kernel_size": (3, 2),
            "padding": (1, 1),
            "count_include_pad": False,
            "temperature": -1.5,
            "norm_type": 3.0,
        },
    ),
    "grid_pool-adaptive": ("grid_pool", {"frame_strides": (1, 2), "output_size": (3, 9), "norm_type": math.inf}),
    "temporal_grid-published": ("temporal_grid", {}),
    "temporal_grid-mixed": ("temporal_grid", {"frame_strides": (2, 1, 3), "grid_shape": (2, 1, 3, 2, 1, 1)}),
    "temporal_grid-bilinear": ("temporal_grid", {"resize": "bilinear", "frame_strides": (1, 2)}),
    "temporal_grid-off": ("temporal_grid", {"frame_strides": ()}),
    "norm_pool-published": ("norm_pool", {}),
    "norm_pool-identity": ("norm_pool", {"kernel_size": 1}),
    "norm_pool-padding": ("norm_pool", {"kernel_size": 2, "padding": 1, "norm_type": 3.0, "temperature": 4.0}),
    "token_norm-published": ("token_norm", {}),
    "token_norm-p1": ("token_norm", {"norm_type": 1.0, "normalize_norm": False}),
}
calls = pytest.mark.parametrize(("op", "arguments"), CALLS.values(), ids=CALLS.keys())
GRIDDING = ("frame_strides", "grid_shape", "sampling", "resize")
gridding_calls = pytest.mark.parametrize(
    ("op", "arguments"),
    [call for call in CALLS.values() if call[0] in ("grid_pool", "temporal_grid")],
    ids=[name for name, call in CALLS.items() if call[0] in ("grid_pool", "temporal_grid")],
)


# ---- golden values ----

GOLDEN = sorted(Path(__file__).with_name("data").glob("*.npz"))


def most_square(size: int) -> tuple[int, int]:
    """(rows, cols) of a grid of `size` frames, rows ≥ cols."""
    rows = min(rows for rows in range(1, size + 1) if size % rows == 0 and rows * rows >= size)
    return rows, size // rows


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
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
    }
    found = run(backend, "temporal_grid", x, **gridding)
    assert_golden(found, grid)
    assert_golden(run(backend, "norm_pool", found, **pooling), out)
    assert_golden(run(backend, "grid_pool", x, **gridding, **pooling), out)


def test_golden_values_are_all_there() -> None:
    assert len(GOLDEN) == 15


# ---- random calls against brute force ----


@st.composite
def gridding_arguments(draw: st.DrawFn) -> Arguments:
    levels = draw(st.sampled_from([2, 1, 3, 2, 0, 3]))
    frame_strides = draw(st.lists(st.sampled_from([1, 2, 3, 1, 4, 2, 5, 8]), min_size=levels, max_size=levels))
    entries = 2 * levels if levels > 1 and draw(st.booleans()) else 2
    return {
        "frame_strides": frame_strides,
        "grid_shape": draw(st.lists(st.sampled_from([2, 1, 2, 3]), min_size=entries, max_size=entries)),
        "sampling": draw(st.sampled_from(["last", "first"])),
        "resize": draw(st.sampled_from(["area", "bilinear"])),
    }


def one_or_both(draw: st.DrawFn, first: int, second: int) -> int | tuple[int, int]:
    return first if first == second and draw(st.booleans()) else (first, second)


@st.composite
def window_arguments(draw: st.DrawFn, height: int, width: int) -> Arguments:
    if draw(st.sampled_from(["kernel", "kernel", "adaptive", "kernel"])) == "adaptive":
        return {"output_size": one_or_both(draw, draw(st.integers(1, 9)), draw(st.integers(1, 9)))}
    arguments: Arguments = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
    kernels, paddings = [], []
    for size in (height, width):
        kernel = draw(st.sampled_from([2, 3, 1, 4, 5]))
        padding = draw(st.integers(0, kernel // 2))
        kernels.append(min(kernel, size + 2 * padding))
        paddings.append(padding)
    arguments["kernel_size"] = one_or_both(draw, *kernels)
    arguments["padding"] = one_or_both(draw, *paddings)
    if draw(st.booleans()):
        arguments["stride"] = one_or_both(draw, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return arguments


@st.composite
def norm_arguments(draw: st.DrawFn) -> Arguments:
    return {
        "norm_type": draw(st.sampled_from([2.0, 1.0, 0.5, 3.0, math.inf])),
        "normalize_norm": draw(st.booleans()),
    }


temperatures = st.sampled_from([1.0, 0.0, -1.5, 1.7, 8.0, 40.0])


@st.composite
def inputs(draw: st.DrawFn, dtype: torch.dtype, device: torch.device, size: Size) -> Tensor:
    """(T, H, W, C) or (B, T, H, W, C)"""
    lead = draw(st.sampled_from([(), (), (), (2,), (), (1,), (), (0,), (2,)]))
    most = (64 if size[0] > 10 else 17) // max(1, *lead, 1)
    T = draw(st.sampled_from([T for T in (13, 16, 24, 19, 8, 32, 0, 5, 17, 3, 21, 1) if most >= T]))
    H, W = draw(st.integers(1, size[2])), draw(st.integers(1, size[2]))
    C = draw(st.sampled_from([3, 8, 1, 5, 16, 19]))
    content = draw(st.sampled_from(["usual", "outlier", "usual", "equal", "usual"]))
    x = tokens(*lead, T, H, W, C, content=content, dtype=dtype, device=device, seed=draw(st.integers(0, 9)))
    return laid_out(x, draw(st.sampled_from(LAYOUTS)))


@st.composite
def packings(draw: st.DrawFn, x: Tensor) -> Arguments:
    """frame_counts, some of them 0, or none."""
    if x.dim() == 5 or draw(st.booleans()):
        return {}
    cuts = sorted(draw(st.lists(st.integers(0, len(x)), max_size=2)))
    return {"frame_counts": [stop - start for start, stop in zip([0, *cuts], [*cuts, len(x)], strict=True)]}


@dtypes
@given(data=st.data())
def test_random_grid_pool(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    skip_refused(backend, dtype, device)
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(gridding_arguments()) | data.draw(packings(x)) | data.draw(norm_arguments())
    arguments |= data.draw(window_arguments(*x.shape[-3:-1])) | {"temperature": data.draw(temperatures)}
    assert_accurate(run(backend, "grid_pool", x, **arguments), "grid_pool", x, **arguments)


@dtypes
@given(data=st.data())
def test_random_temporal_grid(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    skip_refused(backend, dtype, device)
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(gridding_arguments()) | data.draw(packings(x))
    assert_accurate(run(backend, "temporal_grid", x, **arguments), "temporal_grid", x, **arguments)


@dtypes
@given(data=st.data())
def test_random_norm_pool(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    skip_refused(backend, dtype, device)
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(window_arguments(*x.shape[-3:-1])) | data.draw(norm_arguments())
    arguments |= {"temperature": data.draw(temperatures)}
    result = run(backend, "norm_pool", x, **arguments)
    assert_accurate(result, "norm_pool", x, **arguments)
    # 16-bit tokens are worth float32 arithmetic: only the result is rounded
    assert_accurate(result, "norm_pool", x, published_dtype=torch.promote_types(dtype, torch.float32), **arguments)


@dtypes
@given(data=st.data())
def test_random_token_norm(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    skip_refused(backend, dtype, device)
    x, arguments = data.draw(inputs(dtype, device, size)), data.draw(norm_arguments())
    result = run(backend, "token_norm", x, **arguments)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert_accurate(result, "token_norm", x, **arguments)


# ---- 16-bit tokens ----


@halves
@pytest.mark.parametrize("content", ["usual", "outlier", "equal", "zero"])
@pytest.mark.parametrize("shape", [(8, 5, 7, 3584), (16, 9, 9, 100)], ids=str)
def test_realistic_tokens(
    shape: tuple[int, ...], content: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = tokens(*shape, content=content, dtype=dtype, device=device)
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    result = run(backend, "grid_pool", x, **arguments)
    assert_accurate(result, "grid_pool", x, **arguments)
    if content in ("equal", "zero"):
        assert_same_bits(result, x[:, :1, :1].expand(result.shape))


@halves
def test_summaries_are_stored_in_the_dtype_of_x(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Means of four numbers with few digits are exact in float32, so that only the rounding of each summary is left."""
    unit = 8 * torch.finfo(dtype).eps
    x = (tokens(32, 8, 6, 24, device=device) / unit).round().mul(unit).clamp(unit - 8, 8 - unit).to(dtype)

    def round_to(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).to(dtype).double().numpy()

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
    "adaptive-larger": {"output_size": (11, 13)},
}


@dtypes
@pytest.mark.parametrize("windows", AVERAGES.values(), ids=AVERAGES.keys())
def test_temperature_0_averages(windows: Arguments, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = tokens(3, 7, 8, 13, dtype=dtype, device=device)
    average = F.adaptive_avg_pool2d if "output_size" in windows else F.avg_pool2d
    exact = average(x.double().permute(0, 3, 1, 2), **windows).permute(0, 2, 3, 1)
    result = run(backend, "norm_pool", x, temperature=0.0, **windows)
    assert_within(result, exact, 2 * error(eager.norm_pool(x, temperature=0.0, **windows), exact))


@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.0, -3.0, 50.0])
@pytest.mark.parametrize("windows", [{}, {"ceil_mode": True}, {"output_size": (9, 2)}], ids=str)
def test_constant_tokens_stay(
    windows: Arguments, temperature: float, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = tokens(16, 5, 7, 20, content="equal", dtype=dtype, device=device)
    arguments = {"frame_strides": (1, 2), "temperature": temperature, **windows}
    result = run(backend, "grid_pool", x, **arguments)
    exact = x[:, :1, :1].expand(result.shape).double()
    assert_within(result, exact, 2 * error(eager.grid_pool(x, **arguments), exact))


@dtypes
def test_padding_has_norm_0(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """One token alone in a 2 × 2 window with three zeros: e^‖t‖ / (e^‖t‖ + 3) of it is left."""
    x = torch.ones(1, 1, 1, 8, device=device, dtype=dtype) * 2
    included = run(backend, "norm_pool", x, padding=1, kernel_size=2)
    share = math.exp(2) / (math.exp(2) + 3)
    assert_within(included, torch.full_like(included, 2 * share, dtype=torch.float64))
    excluded = run(backend, "norm_pool", x, padding=1, kernel_size=2, count_include_pad=False)
    assert torch.equal(excluded, torch.full_like(excluded, 2))


@dtypes
@gridding_calls
def test_frames_that_are_not_replaced_stay(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    gridding = {
        key: arguments[key] for key in ("frame_strides", "grid_shape", "sampling", "resize") if key in arguments
    }
    x = laid_out(tokens(*size, 11, dtype=dtype, device=device), "sliced")
    kept = [frame for frame in range(size[0]) if frame not in grid_plan(size[:1], *size[1:], **gridding).overwritten]
    assert_same_bits(run(backend, "temporal_grid", x, **gridding)[kept], x[kept])


@pytest.mark.parametrize("op", ["temporal_grid", "grid_pool"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"frame_strides": (4, 8)},
        {"frame_strides": (4, 8), "sampling": "first"},
        {"frame_strides": (5, 3), "grid_shape": (1, 2, 3, 1), "resize": "bilinear"},
    ],
    ids=["last", "first", "mixed"],
)
def test_order_of_frames_outside_groups(arguments: Arguments, op: str, backend: str, device: torch.device) -> None:
    """Frames that no group reads or replaces can change places; their results change places with them."""
    plan = grid_plan([37], 5, 7, **arguments)
    used = {frame for level in plan.levels for group in level.sources for frame in group} | set(plan.overwritten)
    free = [frame for frame in range(37) if frame not in used]
    assert len(free) > 15
    order = torch.arange(37)
    order[free] = order[free].roll(1)
    x = tokens(37, 5, 7, 11, device=device)
    assert_same_bits(run(backend, op, x[order], **arguments), run(backend, op, x, **arguments)[order])


@pytest.mark.parametrize("T", [0, 1, 3, 7])
@dtypes
def test_too_few_frames_for_a_group(T: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = tokens(T, 5, 7, 11, dtype=dtype, device=device)
    assert_same_bits(run(backend, "temporal_grid", x), x)
    assert_accurate(run(backend, "grid_pool", x), "norm_pool", x)


@calls
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 0), (0, 0)], ids=str)
def test_no_frames(lead: tuple[int, ...], op: str, arguments: Arguments, backend: str, device: torch.device) -> None:
    x = tokens(*lead, 5, 7, 11, dtype=torch.bfloat16, device=device)
    result = run(backend, op, x, **arguments)
    assert result.shape == oracle(op, x, **arguments).shape
    assert result.dtype == (torch.float32 if op == "token_norm" else torch.bfloat16)


@gridding_calls
def test_no_videos(op: str, arguments: Arguments, backend: str, device: torch.device) -> None:
    x = tokens(0, 5, 7, 11, device=device)
    for frame_counts in ([], [0], [0, 0, 0]):
        assert_same_bits(run(backend, op, x, frame_counts=frame_counts, **arguments), run(backend, op, x, **arguments))


# ---- bitwise properties ----


@dtypes
@calls
def test_runs_are_repeatable(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(2, *size, 11, dtype=dtype, device=device)
    first = run(backend, op, x, **arguments)
    for _ in range(3):
        assert_same_bits(run(backend, op, x, **arguments), first)


@dtypes
@gridding_calls
def test_packed_videos_equal_each_alone(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    frame_counts = [9, 0, size[0], 3, 0, 16, 1]
    x = tokens(sum(frame_counts), *size[1:], 11, dtype=dtype, device=device)
    packed = run(backend, op, x, frame_counts=frame_counts, **arguments)
    alone = [run(backend, op, video, **arguments) for video in x.split(frame_counts)]
    assert_same_bits(packed, torch.cat(alone))


@dtypes
def test_packed_with_a_longer_video_that_other_kernels_take(
    dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """The second level's grid is no 2 × 2, and only the longer video reaches it."""
    arguments = {"frame_strides": (1, 4), "grid_shape": (2, 2, 3, 1)}
    x = tokens(21, *size[1:], 11, dtype=dtype, device=device)
    packed = run(backend, "grid_pool", x, frame_counts=[9, 12], **arguments)
    alone = [run(backend, "grid_pool", video, **arguments) for video in x.split([9, 12])]
    assert_same_bits(packed, torch.cat(alone))


@dtypes
@calls
def test_batched_videos_equal_each_alone(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = laid_out(tokens(3, *size, 11, dtype=dtype, device=device), "sliced")
    batched = run(backend, op, x, **arguments)
    assert_same_bits(batched, torch.stack([run(backend, op, video, **arguments) for video in x]))


@calls
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(
    layout: str, op: str, arguments: Arguments, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(2, *size, 11, dtype=torch.bfloat16, device=device)
    other = laid_out(x, layout)
    assert torch.equal(other, x)
    assert_accurate(run(backend, op, other, **arguments), op, x, **arguments)


@calls
def test_expanded_input(op: str, arguments: Arguments, backend: str, device: torch.device) -> None:
    """Strides of 0 in every dimension but the channels."""
    x = tokens(11, device=device).expand(16, 5, 7, 11)
    assert_accurate(run(backend, op, x, **arguments), op, x, **arguments)


@calls
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_is_not_modified(
    layout: str, op: str, arguments: Arguments, backend: str, device: torch.device, size: Size
) -> None:
    x = laid_out(tokens(*size, 11, dtype=torch.float16, device=device), layout)
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    before, version = memory.clone(), x._version
    run(backend, op, x, **arguments)
    assert_same_bits(memory, before)
    assert x._version == version


@calls
@pytest.mark.parametrize("layout", ["contiguous", "channels first"])
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


@dtypes
@calls
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels first", "misaligned"])
def test_out_equals_a_fresh_result(
    layout: str, op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(*size, 11, dtype=dtype, device=device)
    fresh = run(backend, op, x, **arguments)
    out = laid_out(torch.full_like(fresh, math.nan), layout)
    memory = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    assert memory.isnan().all()
    assert run(backend, op, x, out=out, **arguments) is out
    assert_same_bits(out, fresh)
    assert memory.isnan().sum() == memory.numel() - out.numel()


@calls
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
spoiled = pytest.mark.parametrize(("op", "arguments"), SPOILED.values(), ids=SPOILED.keys())


@dtypes
@spoiled
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
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


@pytest.mark.parametrize("norm_type", [2.0, 3.0, 0.5, math.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("whole_window", [False, True], ids=["one token", "whole window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
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


@dtypes
@calls
def test_arguments_reach_every_backend_through_torch_ops(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """`torch.ops.stgp.*` under `use_backend` is the public function with `backend=`."""
    x = tokens(*size, 11, dtype=dtype, device=device)
    expected = run(backend, op, x, **arguments)
    with stgridpool_kernels.use_backend(backend):
        assert_same_bits(getattr(torch.ops.stgp, op)(x, **arguments), expected)
