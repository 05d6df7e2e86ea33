"""`GridPlan` against torch: sampled frames, windows, mosaics; and what makes it usable as a key."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stgridpool_kernels import GridPlan, grid_plan
from stgridpool_kernels.plan import Runs
from stgridpool_kernels.plan.plan import _last_of_each_stride, cached_plan
from tests.support.steps import steps

# ---- sampled frames ----


def published_samples(frames: int, samples: int) -> list[float]:
    points = torch.linspace(0, frames, samples + 1, dtype=torch.float32)[1:]
    return points.sub_(1).round_().clamp_(0, frames - 1).tolist()


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([*range(1, 200), *range(200, 5001, 41)], id="some"),
        pytest.param(range(1, 5001), id="all", marks=pytest.mark.slow),
    ],
)
def test_sampled_frames_equal_torch(counts: Sequence[int]) -> None:
    """Up to 5000 frames and every stride up to 64 are compared: samples depend on T and T // stride alone."""
    wrong = []
    for frames in counts:
        for samples, stride in {frames // stride: stride for stride in range(1, 65) if stride <= frames}.items():
            if _last_of_each_stride(frames, stride) != published_samples(frames, samples):
                wrong.append((frames, stride))
    assert wrong == []


def test_sampled_frames_of_a_plan_equal_torch() -> None:
    drawn = random.Random(0)
    for _ in range(300):
        frames, stride, rows, cols = drawn.randint(0, 5000), *(drawn.randint(1, high) for high in (64, 4, 4))
        plan = grid_plan([frames], 4, 4, frame_strides=[stride], grid_shape=[rows, cols])
        (level,) = plan.levels
        samples = published_samples(frames, frames // stride) if frames >= stride else []
        group = rows * cols
        groups = [tuple(samples[k : k + group]) for k in range(0, len(samples) - group + 1, group)]
        assert level.sources == tuple(groups)
        assert level.targets == tuple(sources[-1] for sources in groups)


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
@pytest.mark.parametrize("grid_shape", [(1, 1), (2, 2), (3, 1), (2, 4)], ids=str)
def test_first_sampling_follows_the_formula(stride: int, grid_shape: tuple[int, int]) -> None:
    group = grid_shape[0] * grid_shape[1]
    segment = stride * group
    for frames in range(70):
        (level,) = grid_plan([frames], 4, 4, frame_strides=[stride], grid_shape=grid_shape, sampling="first").levels
        segments = range(frames // segment)
        assert level.sources == tuple(tuple(j * segment + k * stride for k in range(group)) for j in segments)
        assert level.targets == tuple((j + 1) * segment - 1 for j in segments)


def test_published_settings_overwrite_every_eighth_frame() -> None:
    plan = grid_plan([64], 27, 27)
    assert plan.overwritten == tuple(range(7, 64, 8))
    assert [level.targets for level in plan.levels] == [tuple(range(K - 1, 64, K)) for K in (8, 16, 32)]
    assert [level.sources[0] for level in plan.levels] == [(1, 3, 5, 7), (3, 7, 11, 15), (7, 15, 23, 31)]


@pytest.mark.parametrize("sampling", ["last", "first"])
def test_levels_keep_their_order_and_shape(sampling: str) -> None:
    plan = grid_plan([40], 5, 6, frame_strides=[4, 1, 2], grid_shape=[1, 2, 3, 1, 2, 2], sampling=sampling)
    assert [(level.frame_stride, level.rows, level.cols) for level in plan.levels] == [(4, 1, 2), (1, 3, 1), (2, 2, 2)]
    assert all(len(sources) == level.rows * level.cols for level in plan.levels for sources in level.sources)


@pytest.mark.parametrize("sampling", ["last", "first"])
@pytest.mark.parametrize("counts", [[9, 17, 33], [0, 40, 0, 0, 3], [64], [], [0], [1] * 20], ids=str)
def test_packed_plan_is_the_shifted_single_plans(counts: list[int], sampling: str) -> None:
    options = {"frame_strides": [1, 3, 2], "grid_shape": [2, 1], "sampling": sampling}
    packed = grid_plan(counts, 5, 4, **options)
    for index, level in enumerate(packed.levels):
        targets, sources, first = [], [], 0
        for count in counts:
            single = grid_plan([count], 5, 4, **options).levels[index]
            targets += [first + target for target in single.targets]
            sources += [tuple(first + frame for frame in group) for group in single.sources]
            first += count
        assert level.targets == tuple(targets)
        assert level.sources == tuple(sources)


# ---- windows ----

Axis = tuple[int, int, int, int]  # size, kernel, stride, padding

AXES: list[Axis] = list(product(range(1, 9), range(1, 6), range(1, 5), range(4)))


def axis_pairs() -> list[tuple[Axis, Axis]]:
    """Return every axis once as rows and once as columns, with another one across."""
    others = AXES.copy()
    random.Random(0).shuffle(others)
    return list(zip(AXES, others, strict=True))


def covered(runs: Runs, size: int) -> tuple[list[list[int]], list[int]]:
    """Return the positions of every run inside the image, and the length of every run with the padding."""
    positions = [range(start, start + count) for start, count in zip(runs.start, runs.count, strict=True)]
    return [[p for p in run if 0 <= p < size] for run in positions], [len(run) for run in positions]


def one_hot(height: int, width: int) -> torch.Tensor:
    """Return images (height · width, 1, height, width), of which image i is 1 at position i and 0 elsewhere."""
    return torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)


def membership(rows: list[list[int]], cols: list[list[int]], height: int, width: int) -> torch.Tensor:
    """Return a tensor (height · width, OH, OW) that is 1 where window (r, c) holds position i and 0 elsewhere."""
    of_row, of_col = torch.zeros(len(rows), height), torch.zeros(len(cols), width)
    for matrix, members in ((of_row, rows), (of_col, cols)):
        for index, positions in enumerate(members):
            matrix[index, positions] = 1
    return torch.einsum("ah,bw->hwab", of_row, of_col).flatten(0, 1).double()


@pytest.mark.parametrize("count_include_pad", [True, False], ids=["include_pad", "exclude_pad"])
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
def test_windows_equal_avg_pool(ceil_mode: bool, count_include_pad: bool) -> None:
    """Members, share of padding and count of windows agree, and the same geometries are refused."""
    accepted = 0
    for (height, *by_row), (width, *by_col) in axis_pairs():
        kernel_size, stride, padding = zip(by_row, by_col, strict=True)
        options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
        options["count_include_pad"] = count_include_pad
        try:
            means = torch.nn.AvgPool2d(**options)(one_hot(height, width))[:, 0]
        except RuntimeError:
            with pytest.raises(ValueError, match=r"padding must be at most half|leaves no window"):
                grid_plan([], height, width, **options)
            continue
        plan = grid_plan([], height, width, **options)
        assert plan.pooled_size == tuple(means.shape[1:])
        rows, row_lengths = covered(plan.window_rows, height)
        cols, col_lengths = covered(plan.window_cols, width)
        members = membership(rows, cols, height, width)
        assert torch.equal(means > 0, members > 0), options
        area = torch.tensor(row_lengths).outer(torch.tensor(col_lengths))
        torch.testing.assert_close(means, members / area, rtol=1e-12, atol=0)
        if not count_include_pad:
            assert torch.equal(members.sum(0), area.double()), options
        accepted += 1
    assert accepted > 100


@pytest.mark.parametrize(
    ("windows", "size"),
    [
        ({"kernel_size": 46340, "stride": 4, "padding": 23170}, (2, 2)),  # 46340² < 2³¹ < 46341²
        ({"kernel_size": (1, (1 << 31) - 1), "padding": (0, (1 << 30) - 1)}, (5, 1)),
        ({"kernel_size": 1 << 62, "ceil_mode": True}, (1, 1)),
        ({"kernel_size": 1 << 62, "padding": 1 << 61, "count_include_pad": False}, (1, 1)),
        ({"kernel_size": 1 << 62, "padding": 23167, "ceil_mode": True}, (1, 1)),
    ],
    ids=str,
)
def test_windows_below_the_limit(windows: dict[str, Any], size: tuple[int, int]) -> None:
    """The tokens that take part count: windows end with the padded frame, or with the frame if padding is excluded."""
    assert grid_plan([1], 5, 4, **windows).pooled_size == size


@pytest.mark.parametrize(
    ("size", "windows", "named"),
    [
        ((5, 4), {"kernel_size": 46341, "padding": 23170}, "kernel_size=[46341, 46341] with padding=[23170, 23170]"),
        ((5, 4), {"kernel_size": 1 << 30, "padding": 1 << 29}, "kernel_size=[1073741824, 1073741824]"),
        ((5, 4), {"kernel_size": (1 << 31, 1), "padding": (1 << 30, 0)}, "kernel_size=[2147483648, 1]"),
        ((46340, 3), {"kernel_size": 1 << 40, "padding": 23171, "ceil_mode": True}, "kernel_size=[1099511627776, "),
        ((1 << 16, 1 << 15), {"kernel_size": 1 << 40, "ceil_mode": True}, "kernel_size=[1099511627776, "),
        ((1 << 16, 1 << 15), {"kernel_size": (1 << 16, 1 << 15), "count_include_pad": False}, "kernel_size=[65536, "),
        ((1 << 16, 1 << 15), {"output_size": 1}, "output_size=[1, 1]"),
    ],
    ids=str,
)
def test_windows_above_the_limit(size: tuple[int, int], windows: dict[str, Any], named: str) -> None:
    with pytest.raises(
        ValueError, match=f"{re.escape(named)}.* makes a window of .* tokens: it must have fewer than 2³¹"
    ):
        grid_plan([1], *size, frame_strides=(), **windows)


def test_more_frames_than_kernels_count() -> None:
    with pytest.raises(ValueError, match="frame_counts must sum to fewer than 2³¹ frames, got 1099511627776"):
        grid_plan([1 << 39] * 2, 1, 1, frame_strides=(1,), kernel_size=1)


def test_stride_is_the_kernel_by_default() -> None:
    default, given = (grid_plan([], 11, 7, kernel_size=(3, 2), stride=stride) for stride in (None, (3, 2)))
    assert (default.window_rows, default.window_cols) == (given.window_rows, given.window_cols)


def test_adaptive_windows_equal_adaptive_avg_pool() -> None:
    for size, windows in product(range(1, 13), range(1, 13)):
        height, out_height = 13 - size, 13 - windows
        if windows > size or out_height > height:
            with pytest.raises(ValueError, match=f"output_size must not exceed the frame of {height} × {size} tokens"):
                grid_plan([], height, size, output_size=(out_height, windows))
            continue
        means = F.adaptive_avg_pool2d(one_hot(height, size), (out_height, windows))[:, 0]
        plan = grid_plan([], height, size, output_size=(out_height, windows))
        (rows, _), (cols, _) = covered(plan.window_rows, height), covered(plan.window_cols, size)
        assert plan.pooled_size == (out_height, windows)
        members = membership(rows, cols, height, size)
        torch.testing.assert_close(means, members / members.sum(0), rtol=1e-12, atol=0)


# ---- mosaics ----


def mean_over_runs(mosaic: torch.Tensor, rows: Runs, cols: Runs) -> torch.Tensor:
    """Return the mean of a mosaic (mH, nW) over every pair of a row run and a column run, (H, W)."""
    cells = [
        mosaic[top : top + height, left : left + width].mean()
        for top, height in zip(rows.start, rows.count, strict=True)
        for left, width in zip(cols.start, cols.count, strict=True)
    ]
    return torch.stack(cells).view(len(rows), len(cols))


@pytest.mark.parametrize("resize", ["area", "bilinear"])
@pytest.mark.parametrize("grid_shape", [(1, 1), (2, 2), (3, 2), (1, 4), (5, 3)], ids=str)
def test_mean_over_runs_is_the_shrunk_mosaic(grid_shape: tuple[int, int], resize: str) -> None:
    m, n = grid_shape
    generator = torch.Generator().manual_seed(0)
    for H, W in [(1, 1), (2, 7), (3, 4), (4, 2), (5, 5), (6, 9), (7, 3), (8, 1), (9, 8), (27, 14)]:
        frames = torch.randn(m * n, H, W, generator=generator, dtype=torch.float64)
        mosaic = frames.view(m, n, H, W).transpose(1, 2).reshape(m * H, n * W)
        if resize == "area":
            h, w = -(-H // m), -(-W // n)
            tiles = F.adaptive_avg_pool2d(frames[:, None], (h, w))
            expected = tiles.view(m, n, h, w).transpose(1, 2).reshape(m * h, n * w)[:H, :W]
        else:
            expected = F.interpolate(mosaic[None, None], size=(H, W), mode="bilinear", align_corners=False)[0, 0]
        (level,) = grid_plan([], H, W, frame_strides=[1], grid_shape=grid_shape, resize=resize, kernel_size=1).levels
        torch.testing.assert_close(mean_over_runs(mosaic, level.row_runs, level.col_runs), expected)


# ---- which kernels take a plan ----


@pytest.mark.parametrize(
    ("size", "arguments", "pairs"),
    [
        (8, {}, True),
        (9, {}, True),
        (9, {"ceil_mode": True}, True),
        (8, {"output_size": 4}, True),
        (8, {"stride": 2}, True),
        (9, {"output_size": 5}, False),
        (8, {"stride": 1}, False),
        (8, {"padding": 1}, False),
        (8, {"kernel_size": 3}, False),
        (8, {"kernel_size": (2, 1)}, False),
    ],
    ids=str,
)
def test_which_windows_are_pairs(size: int, arguments: dict[str, Any], pairs: bool) -> None:
    assert grid_plan([1], size, size, **arguments).is_2x2_pooling == pairs


@pytest.mark.parametrize(
    ("arguments", "halves"),
    [
        ({}, True),
        ({"frame_strides": ()}, True),
        ({"resize": "bilinear"}, False),
        ({"grid_shape": (2, 1)}, False),
        ({"frame_strides": (2, 4), "grid_shape": (2, 2, 3, 3)}, False),
        ({"frame_strides": (2, 40), "grid_shape": (2, 2, 3, 3)}, False),
    ],
    ids=str,
)
def test_which_summaries_share_thumbnails(arguments: dict[str, Any], halves: bool) -> None:
    """The settings decide, and not whether these videos are long enough for every level."""
    assert grid_plan([64], 8, 8, **arguments).is_2x2_area == halves


# ---- a plan as a value ----


def test_equal_arguments_make_equal_plans() -> None:
    plan, same = (dataclasses.replace(grid_plan([8, 5], 9, 9)) for _ in range(2))
    assert plan is not same
    assert plan == same
    assert hash(plan) == hash(same)
    assert {plan: "found"}[same] == "found"


@pytest.mark.parametrize(
    "changed",
    [
        {"frame_counts": (5, 8)},
        {"height": 8},
        {"width": 8},
        {"frame_strides": (2, 4)},
        {"grid_shape": (1, 2)},
        {"sampling": "first"},
        {"resize": "bilinear"},
        {"kernel_size": (3, 3)},
        {"stride": (2, 2)},
        {"padding": (1, 1)},
        {"ceil_mode": True},
        {"count_include_pad": False},
        {"output_size": (4, 4)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_argument_tells_plans_apart(changed: dict[str, object]) -> None:
    plan = grid_plan([8, 5], 9, 9)
    other = dataclasses.replace(plan, **changed)
    assert plan != other
    assert len({plan, other}) == 2


def test_plans_are_found_again() -> None:
    plan = grid_plan([8], 9, 9, kernel_size=3)
    assert grid_plan((8,), 9, 9, kernel_size=[3, 3], frame_strides=[2, 4, 8]) is plan


def test_cache_is_bounded() -> None:
    for frames in range(300):
        grid_plan([frames], 2, 2)
    assert cached_plan.cache_info().currsize == 256


def test_plans_are_frozen() -> None:
    plan = grid_plan([8], 9, 9)
    for value, name in ((plan, "levels"), (plan, "height"), (plan.levels[0], "targets"), (plan.window_rows, "start")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, ())


def test_repr_is_short_and_complete() -> None:
    plan = grid_plan([4096], 27, 27)
    assert len(repr(plan)) < 300
    assert eval(repr(plan), {"GridPlan": GridPlan}) == plan


@pytest.mark.parametrize("frames", [1024, 4096, 16384])
def test_a_plan_is_made_in_a_few_lines_a_frame(frames: int) -> None:
    """A new plan runs fewer than six lines a frame and 500 more; a kept one is found in fewer than 50.

    Python 3.14 counts 5.7 a frame and 410 more, Python 3.11 counts 4.8 and 420.

    `make bench ARGS="-k plan"` takes times.
    """
    plan = grid_plan((frames,), 27, 27)
    assert frames < steps(lambda: dataclasses.replace(plan), lines=True) < 6 * frames + 500
    assert steps(lambda: grid_plan((frames,), 27, 27), lines=True) < 50
