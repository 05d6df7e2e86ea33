"""Integrations share pooling in an engine's layout, token counts and options; the example adapter works."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import stgridpool_kernels as stgp
from stgridpool_kernels import flat
from stgridpool_kernels.integrations import base
from stgridpool_kernels.integrations.base import (
    PoolOptions,
    pool_flat,
    pooled_grid,
    require_size,
    tokens_per_frame,
    video_token_count,
)
from tests.support import toy_engine
from tests.support.pages import ENGINES, FOLDER, HF_KERNELS, INTEGRATIONS, OTHER_ENGINES
from tests.support.tolerance import assert_same_bits

CALLS = {
    "published": {},
    "ceil": {"ceil_mode": True},
    "budget": {"output_size": (3, 2), "temperature": 2.0},
    "padding": {"kernel_size": 3, "stride": 2, "padding": 1, "frame_strides": (1, 2), "sampling": "first"},
}


@pytest.fixture(params=CALLS.values(), ids=CALLS.keys())
def options(request: pytest.FixtureRequest) -> dict:
    return request.param


def tokens(frames: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(frames + 100 * rows)
    return torch.randn(frames, rows * cols, 16, generator=generator).to(dtype)


# ---- pool_flat ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_video_is_pooled_as_if_it_were_alone(options: dict, dtype: torch.dtype) -> None:
    counts = [9, 0, 16, 3]
    x = tokens(sum(counts), 5, 7, dtype)
    before = x.clone()
    together = pool_flat(x, counts, (5, 7), **options)
    alone = [stgp.grid_pool(video.unflatten(1, (5, 7)), **options).flatten(1, 2) for video in x.split(counts)]
    assert_same_bits(together, torch.cat(alone))
    assert_same_bits(x, before)
    assert together.is_contiguous()


def test_the_grid_is_the_square_by_default(options: dict) -> None:
    x = tokens(8, 6, 6)
    assert_same_bits(pool_flat(x, [8], **options), pool_flat(x, [8], (6, 6), **options))


def test_four_dimensions_stay_four(options: dict) -> None:
    x = tokens(20, 5, 7)
    frames = x.unflatten(1, (5, 7))
    pooled = pool_flat(frames, (12, 8), **options)
    assert pooled.shape[1:3] == pooled_grid((5, 7), **options)
    assert_same_bits(pooled.flatten(1, 2), pool_flat(x, (12, 8), (5, 7), **options))
    assert_same_bits(pooled, pool_flat(frames, (12, 8), (5, 7), **options))


def test_one_call_for_all_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(x: Tensor, **arguments: object) -> Tensor:
        calls.append(arguments)
        return stgp.grid_pool(x, **arguments)

    monkeypatch.setattr(flat, "grid_pool", counted)
    pool_flat(tokens(20, 4, 4), [8, 12], temperature=2.0)
    assert calls == [{"frame_counts": (8, 12), "temperature": 2.0}]


@pytest.mark.parametrize("unpooled", [{}, {"kernel_size": 1, "frame_strides": ()}], ids=["pooled", "unpooled"])
def test_the_result_is_never_the_input(unpooled: dict) -> None:
    x = tokens(4, 4, 4)
    pool_flat(x, [4], **unpooled).fill_(7)
    assert_same_bits(x, tokens(4, 4, 4))


def test_a_slice_and_another_memory_layout_are_pooled_as_they_are() -> None:
    x = tokens(9, 6, 6)
    sliced = torch.cat([x[:, :1], x], 1)[:, 1:]  # a vision tower's tokens without its class token
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not sliced.is_contiguous()
    assert not swapped.is_contiguous()
    for same in (sliced, swapped):
        assert_same_bits(pool_flat(same, [9]), pool_flat(x, [9]))


@pytest.mark.parametrize(("grid", "dynamic"), [((5, 5), True), (None, None)], ids=["dynamic", "square"])
def test_it_compiles_without_a_graph_break(grid: tuple[int, int] | None, dynamic: bool | None) -> None:
    def shrink(x: Tensor) -> Tensor:
        return pool_flat(x, [x.shape[0] // 2] * 2, grid, ceil_mode=True)

    compiled = torch.compile(shrink, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for frames in (18, 34):
        assert_same_bits(compiled(tokens(frames, 5, 5)), shrink(tokens(frames, 5, 5)))


def test_the_snippet_of_the_page_runs() -> None:
    names: dict[str, object] = {}
    OTHER_ENGINES.run("flat", names)
    assert names["y"].shape == (20, 196, 896)


def test_every_snippet_of_the_pages_is_run() -> None:
    """The tests of each integration run those of its page; two run in tests/with_vllm and tests/with_kernels."""
    pages = (INTEGRATIONS, *ENGINES, HF_KERNELS)
    assert {page.name for page in pages} == {f"integrations/{file.name}" for file in FOLDER.glob("integrations/*.md")}
    assert {name for page in pages for name in page.snippets} == {
        "flat",
        "patch",
        "budget",
        "register",
        "qwen",
        "qwen_grid",
        "qwen_register",
        "compress",
        "inspect",
        "inspect_llava",
        "internvl",
        "llava",
        "vllm",
        "hf_kernel",
    }
    for page in pages:
        assert page.text.count("```python") == len(page.snippets)


# ---- counts ----


def test_counts_are_those_of_the_result(options: dict) -> None:
    pooled = pool_flat(tokens(8, 5, 7), [8], (5, 7), **options)
    assert tokens_per_frame((5, 7), **options) == pooled.shape[1]
    assert video_token_count(8, (5, 7), **options) == pooled.shape[0] * pooled.shape[1]


@pytest.mark.parametrize("side", [1, 2, 9, 24, 27])
def test_newlines_count_as_the_engines_count_them(side: int) -> None:
    frames, half = 6, -(-side // 2)
    ceil = {"ceil_mode": True}
    if side > 1:  # no 2 × 2 window fits a frame of one token
        assert video_token_count(frames, (side, side), "one_token", **ceil) == frames * half**2 + 1
        assert video_token_count(frames, (side, side), "grid", **ceil) == frames * half * (half + 1)
        assert video_token_count(frames, (side, side), "frame", **ceil) == frames * (half**2 + 1)
        assert video_token_count(frames, (side, side), "none") == frames * (side // 2) ** 2
    assert video_token_count(frames, (side, side), "grid", output_size=(half, side)) == frames * half * (side + 1)


def test_known_counts_of_27_by_27() -> None:
    assert [video_token_count(6, (27, 27), newline) for newline in base.NEWLINES] == [1014, 1015, 1092, 1020]


# ---- options ----


def test_options_that_say_the_same_are_the_same() -> None:
    options = PoolOptions(ceil_mode=True, kernel_size=2, frame_strides=[2, 4, 8])
    assert options == PoolOptions(ceil_mode=True)
    assert hash(options) == hash(PoolOptions(ceil_mode=True))
    assert options != PoolOptions()
    assert options != PoolOptions(ceil_mode=True, backend="reference")
    assert repr(options) == "PoolOptions(ceil_mode=True)"
    assert copy.deepcopy(options) == options


def test_options_apply_to_a_call(options: dict) -> None:
    x = tokens(8, 5, 7)
    applied = pool_flat(x, [8], (5, 7), **PoolOptions(**options).arguments)
    assert_same_bits(applied, pool_flat(x, [8], (5, 7), **options))


def test_options_do_not_change() -> None:
    options = PoolOptions(temperature=2.0)
    options.arguments["temperature"] = 3.0
    assert options.arguments["temperature"] == 2.0
    with pytest.raises(AttributeError):
        options._items = ()


def test_rounding_up_is_a_default_that_options_can_change() -> None:
    assert base.ceil_options(temperature=2.0) == PoolOptions(ceil_mode=True, temperature=2.0)
    assert base.ceil_options(ceil_mode=False) == PoolOptions()
    assert base.ceil_options(output_size=(3, 3)) == PoolOptions(output_size=(3, 3))
    with pytest.raises(ValueError, match=r"output_size=\[3, 3\] .* ceil_mode=True"):
        base.ceil_options(output_size=(3, 3), ceil_mode=True)


@pytest.mark.parametrize(
    ("expected", "options", "end"),
    [
        (196, {}, r"196 tokens per frame \(14 × 14\) .* 27 × 27, .* give 169 \(13 × 13\); pass ceil_mode=True$"),
        (169, {"ceil_mode": True}, r"give 196 \(14 × 14\); pass ceil_mode=False$"),
        (196, {"kernel_size": 3}, r"give 81 \(9 × 9\); pass output_size=\(14, 14\) and no other .* windows$"),
        (100, {"output_size": (9, 9)}, r"give 81 \(9 × 9\); pass output_size=\(10, 10\) and no other"),
        (182, {}, r"expects 182 tokens per frame where .* give 169 \(13 × 13\); pass output_size=\(13, 14\) and no .*"),
        (173, {}, r"expects 173 tokens per frame where .* give 169 \(13 × 13\)$"),
    ],
)
def test_a_size_without_placeholders_is_refused_with_both_numbers(expected: int, options: dict, end: str) -> None:
    with pytest.raises(ValueError, match=end):
        require_size("an engine", (27, 27), expected, PoolOptions(**options))


def test_a_size_that_fits_passes() -> None:
    require_size("an engine", (27, 27), 196, PoolOptions(ceil_mode=True))
    require_size("an engine", (27, 27), 182, PoolOptions(output_size=(7, 26)))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: pool_flat(x[:, :24], [8]), ValueError, "grid must be given where the 24 tokens .* no square"),
        (lambda x: pool_flat(x, [8], (4, 6)), ValueError, "grid must have the 25 positions .* got 4 × 6 = 24"),
        (lambda x: pool_flat(x, [8], (25,)), ValueError, r"grid must be 2 integers .* got \(25,\)"),
        (lambda x: pool_flat(x, [8], 5), ValueError, "grid must be 2 integers .* got 5"),
        (lambda x: pool_flat(x, [8], (-5, -5)), ValueError, r"grid must be 2 integers .* at least 1, got \(-5, -5\)"),
        (
            lambda x: pool_flat(x.unflatten(1, (5, 5)), [8], (1, 25)),
            ValueError,
            r"grid must be \(5, 5\) as in x of shape \(8, 5, 5, 16\), or None, got \(1, 25\)",
        ),
        (lambda x: pool_flat(x[0], [8]), ValueError, r"x must have shape \(ΣF, h·w, C\).* got \(25, 16\)"),
        (lambda x: pool_flat(x, [4, 5]), ValueError, r"must sum to the 8 frames of x, got \[4, 5\] with sum 9"),
        (lambda x: pool_flat(x, [9, -1]), ValueError, r"frames_per_video must not be negative, got \[9, -1\]"),
        (lambda x: pool_flat(x, 8), TypeError, "frames_per_video must be a sequence .* got 8"),
        (lambda x: pool_flat(x, [8], temperatur=2), TypeError, "among frame_strides, .*, got temperatur=2"),
        (lambda x: pool_flat(x, [8], frame_counts=[8]), TypeError, "options must be among .* got frame_counts"),
        (lambda x: pool_flat(x, [8], out=x), TypeError, "options must be among .* got out"),
        (lambda x: pool_flat(x, [8], kernel_size=0), ValueError, "kernel_size must be"),
        (lambda x: pool_flat(x, [8], backend="nope"), ValueError, "backend must be one of"),
        (lambda x: video_token_count(-1, (4, 4)), ValueError, "frames must be at least 0, got -1"),
        (lambda x: video_token_count(1, (4, 4), "no"), ValueError, "newline must be one of 'none', .* got 'no'"),
        (lambda x: tokens_per_frame((4, 0)), ValueError, r"grid must be 2 integers .* got \(4, 0\)"),
        (lambda x: pooled_grid((4, 4), ceil=True), TypeError, "options must be among .* got ceil=True"),
        (lambda x: pooled_grid((1, 1)), ValueError, r"kernel_size=\[2, 2\] .* leaves no window on a 1 × 1 frame"),
        (lambda x: PoolOptions(frame_counts=[8]), TypeError, "options must be among .* got frame_counts"),
        (lambda x: PoolOptions(ceil=True), TypeError, "options must be among .* got ceil=True"),
        (lambda x: PoolOptions(temperature=float("nan")), ValueError, "temperature must be finite"),
        (lambda x: PoolOptions(kernel_size=2, padding=2), ValueError, "padding must be at most half"),
        (lambda x: PoolOptions(backend="nope"), ValueError, "backend must be one of .* got 'nope'"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(tokens(8, 5, 5))


IMPORTS = """
import sys, torch
from stgridpool_kernels.integrations import base, llava_next, sglang, transformers, vllm
print(*({"transformers", "llava", "vllm", "sglang"} & sys.modules.keys()))
vllm.register()
print(torch.cuda.is_initialized())
"""


def test_no_engine_is_imported_and_no_device_initialised_before_they_are_asked_for() -> None:
    """vLLM loads plugins in processes that it then forks, which a process that has initialised CUDA survives badly."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    assert done.stdout == "\nFalse\n"


# ---- the example of base.py ----


@pytest.fixture
def installed_toy_engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the toy engine, under the name that an adapter imports it by."""
    monkeypatch.setitem(sys.modules, "toy_engine", toy_engine)
    return toy_engine


def example() -> str:
    """Return the adapter in the module's docstring."""
    indented = [line for line in inspect.getdoc(base).splitlines() if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(indented)).strip()


@pytest.fixture
def adapter(installed_toy_engine: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """Yield the example as a module that other processes find in tmp_path."""
    (tmp_path / "adapter.py").write_text(example(), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("adapter")
    del sys.modules["adapter"]


def videos() -> list[Tensor]:
    return [tokens(9, 5, 5), tokens(17, 5, 5), tokens(3, 5, 5)]


def test_the_example_is_under_40_lines() -> None:
    assert 20 < len(example().splitlines()) < 40


@torch.no_grad()
def test_the_example_pools_every_video_alone(adapter: ModuleType) -> None:
    model = toy_engine.VideoModel(5, 16)
    names, stock = list(model.state_dict()), model(videos())
    adapter.patch(model, temperature=2.0)
    patched = model(videos())
    for video, result, before in zip(videos(), patched, stock, strict=True):
        alone = pool_flat(model.projector(video), [len(video)], ceil_mode=True, temperature=2.0)
        torch.testing.assert_close(result, alone.flatten(0, 1))
        assert result.shape == before.shape
        assert not torch.allclose(result, before)
    assert list(model.state_dict()) == names

    copied = copy.deepcopy(model)
    adapter.unpatch(model)
    assert type(model) is toy_engine.VideoModel
    for result, before in zip(model(videos()), stock, strict=True):
        assert_same_bits(result, before)
    for result, before in zip(copied(videos()), patched, strict=True):
        assert_same_bits(result, before)


def test_the_example_refuses_what_cannot_work(adapter: ModuleType) -> None:
    model = toy_engine.VideoModel(5, 16)
    with pytest.raises(ValueError, match=r"toy_engine expects 9 tokens .* give 4 .* pass ceil_mode=True"):
        adapter.patch(model, ceil_mode=False)
    with pytest.raises(TypeError, match=r"toy_engine\.VideoModel, got Linear"):
        adapter.patch(model.projector)
    with pytest.raises(RuntimeError, match="not patched"):
        adapter.unpatch(model)
    adapter.patch(model)
    with pytest.raises(RuntimeError, match=r"patched already, with PoolOptions\(ceil_mode=True\)"):
        adapter.patch(model)


def by_another_class(model: nn.Module) -> None:
    model.__class__ = type("Wrapped", (type(model),), {})


def by_a_copy_of_its_class(model: nn.Module) -> None:
    stock = type(model).__base__
    model.__class__ = type("Wrapped", (stock,), {**vars(type(model))})


def by_a_mixin(model: nn.Module) -> None:
    model.__class__ = type("Wrapped", (type("Mixin", (nn.Module,), {}), type(model)), {})


def by_a_parametrization(model: nn.Module) -> None:
    model.scale = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(model, "scale", nn.Identity())


WRAPPED = [by_another_class, by_a_copy_of_its_class, by_a_mixin, by_a_parametrization]


@torch.no_grad()
@pytest.mark.parametrize("wrap", WRAPPED, ids=lambda wrap: wrap.__name__)
def test_a_class_that_was_changed_after_the_patch_is_not_lost(
    adapter: ModuleType, wrap: Callable[[nn.Module], None]
) -> None:
    model = toy_engine.VideoModel(5, 16)
    adapter.patch(model, temperature=2.0)
    wrap(model)
    wrapped, members, patched = type(model), dict(vars(model)), model(videos())
    message = rf"wrapped after it was patched, its class is now {wrapped.__name__}: .* unpatch .* before"
    with pytest.raises(RuntimeError, match=message):
        adapter.unpatch(model)
    with pytest.raises(RuntimeError, match="patched already"):
        adapter.patch(model)
    assert type(model) is wrapped
    assert vars(model).keys() == members.keys()
    for result, before in zip(model(videos()), patched, strict=True):
        assert_same_bits(result, before)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPED if wrap is not by_a_copy_of_its_class])
def test_a_class_that_was_changed_before_the_patch_comes_back(
    adapter: ModuleType, wrap: Callable[[nn.Module], None]
) -> None:
    model = toy_engine.VideoModel(5, 16)
    stock = model(videos())
    wrap(model)
    wrapped = type(model)
    adapter.patch(model)
    assert not torch.allclose(model(videos())[0], stock[0])
    adapter.unpatch(model)
    assert type(model) is wrapped
    for result, before in zip(model(videos()), stock, strict=True):
        assert_same_bits(result, before)


def test_a_model_that_is_unwrapped_can_be_unpatched(adapter: ModuleType) -> None:
    model = toy_engine.VideoModel(5, 16)
    adapter.patch(model)
    by_a_parametrization(model)
    nn.utils.parametrize.remove_parametrizations(model, "scale")
    adapter.unpatch(model)
    assert type(model) is toy_engine.VideoModel


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.Sequential(model)])
def test_a_wrapper_of_the_model_is_refused_and_the_model_unchanged(
    adapter: ModuleType, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = toy_engine.VideoModel(5, 16)
    wrapper = wrap(model)
    with pytest.raises(TypeError, match=rf"must be a toy_engine\.VideoModel, got {type(wrapper).__name__}"):
        adapter.patch(wrapper)
    adapter.patch(model)
    patched = type(model)
    with pytest.raises(RuntimeError, match=type(wrapper).__name__):
        adapter.unpatch(wrapper)
    assert type(model) is patched
    adapter.unpatch(model)
    assert type(model) is toy_engine.VideoModel


LOADED = """
import pickle, sys, torch
from tests.support import toy_engine
sys.modules["toy_engine"] = toy_engine
for name in ("pickled", "saved"):
    model = torch.load("saved", weights_only=False) if name == "saved" else pickle.load(open(name, "rb"))
    with torch.no_grad():
        torch.save(model(torch.load("videos")), f"{name} results")
adapter = sys.modules["adapter"]
adapter.unpatch(model)
assert type(model) is toy_engine.VideoModel
"""


@torch.no_grad()
def test_a_patched_model_is_patched_in_a_process_that_it_is_sent_to(adapter: ModuleType, tmp_path: Path) -> None:
    model = toy_engine.VideoModel(5, 16)
    adapter.patch(model, temperature=2.0, frame_strides=[1, 2])
    torch.save(videos(), tmp_path / "videos")
    torch.save(model, tmp_path / "saved")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "pickled").write_bytes(pickle.dumps(model, protocol))
        assert type(pickle.loads((tmp_path / "pickled").read_bytes())) is type(model)
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    subprocess.run([sys.executable, "-c", LOADED], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    for name in ("pickled", "saved"):
        for result, expected in zip(torch.load(tmp_path / f"{name} results"), model(videos()), strict=True):
            assert_same_bits(result, expected)


@torch.no_grad()
def test_a_model_that_was_wrapped_after_the_patch_is_not_pickled_as_if_it_were_not(adapter: ModuleType) -> None:
    model = toy_engine.VideoModel(5, 16)
    adapter.patch(model)
    by_another_class(model)
    with pytest.raises((pickle.PicklingError, AttributeError), match="Wrapped"):
        pickle.dumps(model)
