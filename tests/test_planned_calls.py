"""Checks, plan and backend of a call are cached: what calls share, what they do not, and what each call checks."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stgridpool_kernels as stgp
from stgridpool_kernels import ops
from stgridpool_kernels.backends import BACKENDS, compiled, requested_backend
from stgridpool_kernels.plan.plan import cached_plan
from tests.support.cases import tokens

Call = Callable[[], Any]

X = tokens(8, 6, 7, 5)
VIDEO = tokens(16, 6, 7, 5)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of the op of every call that is planned anew."""
    names: list[str] = []
    plan_call = ops._plan_call
    monkeypatch.setattr(ops, "_plan_call", lambda name, *given: names.append(name) or plan_call(name, *given))
    return names


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_backend(name: str) -> Tensor:
    with stgp.use_backend(name):
        return stgp.grid_pool(X)


# ---- what calls share ----


@pytest.mark.parametrize("name", ["grid_pool", "temporal_grid", "norm_pool", "token_norm"])
def test_equal_calls_are_planned_once(name: str, planned: list[str]) -> None:
    """The op, the function, the form with `out` and inference mode share what is planned. Tokens are no part of it."""
    op, function = getattr(torch.ops.stgp, name), getattr(stgp, name)
    expected = op(X)
    assert torch.equal(op(X), expected)
    assert torch.equal(function(X), expected)
    assert torch.equal(function(X, out=torch.empty_like(expected)), expected)
    assert torch.equal(op(X.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(op(X), expected)
    assert torch.equal(op(-X), -op(X) if name != "token_norm" else expected)
    assert planned == [name]


def test_other_forms_of_the_same_arguments_share_a_plan(planned: list[str]) -> None:
    forms: list[dict[str, Any]] = [
        {"kernel_size": 3, "temperature": 2, "ceil_mode": True, "frame_counts": (3, 5)},
        {"kernel_size": [3, 3], "temperature": 2.0, "ceil_mode": 1, "frame_counts": [3, 5]},
        {"frame_counts": np.array([3, 5]), "temperature": np.float32(2), "ceil_mode": np.True_, "kernel_size": (3, 3)},
        {"kernel_size": 3, "temperature": 2, "ceil_mode": True, "frame_counts": (3, 5), "padding": 0, "stride": None},
    ]
    results = [stgp.grid_pool(X, **form) for form in forms]
    assert all(torch.equal(result, results[0]) for result in results)
    assert planned == ["grid_pool"]


def test_a_gradient_is_planned_once(planned: list[str]) -> None:
    for _ in range(2):
        x = X.clone().requires_grad_()
        stgp.grid_pool(x).sum().backward()
    assert planned == ["grid_pool", "grid_pool"]  # the call and its gradient


# ---- what calls do not share ----

OTHERS: dict[str, Call] = {
    "frames": lambda: stgp.grid_pool(VIDEO),
    "height": lambda: stgp.grid_pool(X[:, :4]),
    "width": lambda: stgp.grid_pool(X[:, :, :4]),
    "channels": lambda: stgp.grid_pool(X[..., :4]),
    "batch": lambda: stgp.grid_pool(X[None]),
    "halved batch": lambda: stgp.grid_pool(X.unflatten(0, (2, 4))),
    "dtype": lambda: stgp.grid_pool(X.double()),
    "op": lambda: stgp.norm_pool(X),
    "frame counts": lambda: stgp.grid_pool(X, frame_counts=[4, 4]),
    "other frame counts": lambda: stgp.grid_pool(X, frame_counts=[8, 0]),
    "kernel": lambda: stgp.grid_pool(X, kernel_size=(2, 3)),
    "turned kernel": lambda: stgp.grid_pool(X, kernel_size=(3, 2)),
    "stride": lambda: stgp.grid_pool(X, stride=(3, 2)),
    "temperature 3": lambda: stgp.grid_pool(X, temperature=3),
    "p = 3": lambda: stgp.grid_pool(X, norm_type=3),
    "p = inf": lambda: stgp.grid_pool(X, norm_type=math.inf),
    "sampling": lambda: stgp.grid_pool(X, sampling="first"),
    "ceil mode": lambda: stgp.grid_pool(X, ceil_mode=True),
    "norm channels": lambda: stgp.grid_pool(X, norm_channels=1),
    "strides of frames": lambda: stgp.grid_pool(X, frame_strides=[1]),
    "backend": lambda: stgp.grid_pool(X, backend="reference"),
}


def test_calls_that_differ_are_planned_each(planned: list[str], threads: None) -> None:
    """Two different calls that take turns keep their own plans and results, whichever came first."""
    for count in (1, 2):
        torch.set_num_threads(count)
        first = stgp.grid_pool(X)
        found = {name: call() for name, call in OTHERS.items()}
        assert len(planned) == count * (len(OTHERS) + 1)
        assert torch.equal(stgp.grid_pool(X), first)
        for name, call in OTHERS.items():
            assert torch.equal(call(), found[name]), name
        assert len(planned) == count * (len(OTHERS) + 1)
    for name, call in OTHERS.items():
        ops._slot.cache_clear()
        assert torch.equal(call(), found[name]), name


def test_the_device_and_the_layout_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ops, "_slot", lambda *key: keys.append(key) or ops._Slot())
    stgp.grid_pool(X)
    with pytest.raises(TypeError, match="got layout"):
        torch.ops.stgp.grid_pool(X.to_sparse())
    dense, sparse = keys
    assert X.device in dense
    assert set(dense) ^ set(sparse) == {torch.strided, torch.sparse_coo}


def test_the_requested_backend_is_told_apart(planned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request by argument, context and environment is one request; none is another."""
    ran: list[str] = []
    reference = BACKENDS[-1]

    def noted(*given: Any) -> None:
        ran.append(requested_backend())
        work(*given)

    work = reference.grid_pool
    monkeypatch.setitem(reference.__dict__, "grid_pool", noted)
    monkeypatch.delenv("STGP_BACKEND", raising=False)
    for _ in range(2):
        stgp.grid_pool(X, backend="reference")
        with_backend("reference")
        monkeypatch.setenv("STGP_BACKEND", "reference")
        stgp.grid_pool(X)
        with_backend("auto")
        monkeypatch.setenv("STGP_BACKEND", "")
        stgp.grid_pool(X)
        monkeypatch.delenv("STGP_BACKEND")
        stgp.grid_pool(X)
    assert [name for name in ran if name != "auto"] == ["reference"] * 6
    assert len(planned) == 2


@pytest.mark.needs("library")
def test_tables_follow_the_number_of_threads(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables for the CPU have a number of frames in a stage that follows the threads of the call, not of the first."""
    monkeypatch.setattr(compiled, "STAGE_BYTES", 0)
    plan = stgp.grid_plan([16], 6, 7)
    plan.uploads.clear()
    forms = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        stgp.grid_pool(VIDEO, backend="cpu")
        forms.append({frames for _, frames, _ in plan.uploads})
    assert forms == [{2}, {2, 4}, {2, 4}]


@pytest.mark.needs("library")
@pytest.mark.parametrize(
    ("channels", "dtype", "frames"),
    [
        (64, torch.bfloat16, 64),
        (896, torch.bfloat16, 16),
        (896, torch.float32, 8),
        (3584, torch.bfloat16, 4),
        (40000, torch.bfloat16, 2),
    ],
    ids=str,
)
def test_tables_follow_the_size_of_frames(channels: int, dtype: torch.dtype, frames: int, threads: None) -> None:
    """A stage holds as many frames as fit into 24 MB, a power of two, from two for each thread to 64."""
    torch.set_num_threads(1)
    plan = stgp.grid_plan([1], 27, 27)
    plan.uploads.clear()
    stgp.grid_pool(torch.zeros(1, 27, 27, channels, dtype=dtype), backend="cpu")
    assert [number for _, number, _ in plan.uploads] == [frames]


# ---- what is checked at each call ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"kernel_size": 99}, ValueError, "leaves no window"),
        ({"frame_counts": [3, 4]}, ValueError, "frame_counts must sum to T = 8"),
        ({"norm_channels": 6}, ValueError, "norm_channels must be from 1 to C = 5"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run this call"),
        ({"kernel_size": 2.5}, TypeError, "kernel_size must be an integer"),
    ],
    ids=str,
)
@pytest.mark.needs("no gpu")
def test_errors_are_raised_each_time(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = next(known for known in BACKENDS if known.name == "cuda")
    monkeypatch.setitem(cuda.__dict__, "unsupported_reason", lambda x, plan: "no CUDA device")
    for _ in range(3):
        with pytest.raises(error, match=message):
            stgp.grid_pool(X, **arguments)
    assert stgp.grid_pool(X).isfinite().all()


def test_a_wrong_name_in_the_environment_is_refused_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stgp.grid_pool(X)
    monkeypatch.setenv("STGP_BACKEND", "opencl")
    for _ in range(2):
        with pytest.raises(ValueError, match="STGP_BACKEND must be one of"):
            stgp.grid_pool(X)


def test_out_is_checked_at_each_call(planned: list[str]) -> None:
    """Calls that share a plan have an `out` each, at addresses of its own."""
    storage = torch.zeros(4000)
    x = storage[: X.numel()].view(X.shape).copy_(X)
    expected = stgp.grid_pool(x)
    size = expected.numel()
    good = storage[x.numel() : x.numel() + size].view(expected.shape)
    bad: list[tuple[Tensor, type[Exception], str]] = [
        (storage[:size].view(expected.shape), ValueError, "out must not overlap x"),
        (storage[x.numel() - 1 :][:size].view(expected.shape), ValueError, "out must not overlap x"),
        (storage[2000:].as_strided(expected.shape, (3, 1, 1, 1)), ValueError, "out must not overlap itself"),
        (torch.empty(1, *expected.shape), ValueError, "out must have shape"),
        (torch.empty_like(expected, dtype=torch.float64), TypeError, "out must have dtype"),
        (torch.empty_like(expected, device="meta"), ValueError, "out must be on cpu"),
        (expected.to_sparse(), TypeError, "out must be a dense"),
    ]
    for out, error, message in bad:
        assert torch.equal(stgp.grid_pool(x, out=good), expected)
        with pytest.raises(error, match=message):
            stgp.grid_pool(x, out=out)
    assert planned == ["grid_pool"]
    assert torch.equal(x, X)


def test_results_without_elements_overlap_nothing() -> None:
    storage = torch.zeros(100)
    x = storage[:0].view(0, 6, 7, 5)
    out = storage[50:50].view(0, 3, 3, 5)
    assert stgp.grid_pool(x, out=out) is out
    with pytest.raises(ValueError, match="out must have shape"):
        stgp.grid_pool(x, out=storage[:45].view(1, 3, 3, 5))


def test_tokens_are_read_at_each_call() -> None:
    """A video that is changed in place, and another at the same address, have results of their own."""
    x = X.clone()
    before = stgp.grid_pool(x)
    x.mul_(2)
    assert torch.equal(stgp.grid_pool(x), stgp.grid_pool(X * 2))
    assert not torch.equal(stgp.grid_pool(x), before)
    assert torch.equal(stgp.grid_pool(x.copy_(X)), before)
    assert torch.equal(stgp.grid_pool(X.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)), before)


def spread(x: Tensor) -> Tensor:
    """Return tokens that equal x, of which every other one in memory is another token."""
    room = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), math.nan, dtype=x.dtype)
    return room[..., ::2, :].copy_(x)


@pytest.mark.needs("library")
@pytest.mark.parametrize("name", ["grid_pool", "norm_pool", "temporal_grid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("videos", [(8,), (2, 8)], ids=["video", "batch"])
def test_the_layout_is_that_of_each_call(
    name: str, dtype: torch.dtype, videos: tuple[int, ...], planned: list[str]
) -> None:
    """One plan serves every layout, with the same bits. Contiguous tensors skip the private op of the library."""
    function = getattr(stgp, name)
    x = tokens(*videos, 4, 10, 6).to(dtype)
    arguments = {} if name == "temporal_grid" else {"temperature": 3.0, "norm_type": 1.0, "norm_channels": 5}
    function = partial(function, backend="cpu", **arguments)
    expected = function(x)
    for given in (spread(x), x):
        for out in (spread(expected), torch.full_like(expected, math.nan)):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                function(given, out=out)
            assert torch.equal(out, expected)
            private = [event.name for event in profile.events() if event.name.endswith("_by_tables")]
            assert len(private) == (0 if given.is_contiguous() and out.is_contiguous() else 1)
            out.fill_(math.nan)
    assert planned == [name]


@pytest.mark.needs("library")
def test_a_lazy_clone_is_read_without_a_copy() -> None:
    """The address of a tensor that is only read leaves a lazy clone one, where torch has such a function."""
    x = torch._lazy_clone(X)
    expected = stgp.grid_pool(X)
    assert torch.equal(stgp.grid_pool(x, backend="cpu"), expected)
    assert torch.equal(stgp.grid_pool(x, backend="cpu", out=torch.empty_like(expected)), expected)
    assert torch._C._is_cow_tensor(x) == hasattr(Tensor, "const_data_ptr")


def test_every_call_logs_its_backend(caplog: pytest.LogCaptureFixture) -> None:
    with stgp.use_backend("reference"):
        stgp.grid_pool(X)
        for _ in range(2):
            with caplog.at_level(logging.DEBUG, "stgridpool_kernels"):
                stgp.grid_pool(X)
    assert [message for message in caplog.messages if "runs" in message] == ["reference runs"] * 2


# ---- what is kept ----


def test_a_bounded_number_of_calls_and_plans_is_kept(planned: list[str]) -> None:
    first = weakref.ref(stgp.grid_plan([8], 6, 7))
    stgp.grid_pool(X, backend="reference")
    cached_plan.cache_clear()
    gc.collect()
    assert first() is not None  # by the planned call
    x = torch.zeros(1, 2, 2, ops.MAX_CALLS)
    for channels in range(1, ops.MAX_CALLS + 1):
        stgp.token_norm(x[..., :channels])
    assert ops._slot.cache_info().currsize == ops.MAX_CALLS
    gc.collect()
    assert first() is None
    assert len(planned) == ops.MAX_CALLS + 1


def test_calls_that_fail_are_bounded_too() -> None:
    for temperature in range(ops.MAX_CALLS + 10):
        with pytest.raises(ValueError, match="leaves no window"):
            stgp.grid_pool(X, kernel_size=99, temperature=temperature)
    assert ops._slot.cache_info().currsize == ops.MAX_CALLS


def test_no_tensor_of_a_caller_is_kept() -> None:
    x, out = X.clone(), torch.empty(8, 3, 3, 5)
    counts = torch.tensor([4, 4])
    stgp.grid_pool(x, out=out)
    result = stgp.grid_pool(x, frame_counts=counts)
    leaf = x.clone().requires_grad_()
    stgp.grid_pool(leaf).sum().backward()
    kept = [weakref.ref(each) for each in (x, out, counts, result, leaf)]
    del x, out, counts, result, leaf
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_threads_share_planned_calls() -> None:
    """Many threads make equal and different calls at once, more of them than are kept."""
    videos = [tokens(frames, 4, 4, 3) for frames in range(1, 9)]
    expected = [stgp.norm_pool(x, backend="reference") for x in videos]
    lists = torch.zeros(1, 2, 2, 2 * ops.MAX_CALLS)

    def work(number: int) -> bool:
        stgp.token_norm(lists[..., : number % (2 * ops.MAX_CALLS) + 1])
        return torch.equal(stgp.norm_pool(videos[number % 8], backend="reference"), expected[number % 8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(3 * ops.MAX_CALLS)))


# ---- between autograd and the ops ----


class Seen(TorchDispatchMode):
    """Mode that records the ops of the package that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "stgp":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["grid_pool", "temporal_grid", "norm_pool", "token_norm"])
def test_modes_and_transforms_see_the_op(name: str) -> None:
    """Calls of plain tensors go straight from the autograd kernel to the op's, all others by the dispatcher."""
    op = getattr(torch.ops.stgp, name)
    expected = op(X)
    with Seen() as seen:
        assert torch.equal(op(X), expected)
        assert torch.equal(op(X.clone().requires_grad_()).detach(), expected)
    assert [called for called in seen.names if called.startswith((f"stgp::{name}", f"stgp::_{name}_recorded"))] == [
        f"stgp::{name}",
        f"stgp::_{name}_recorded",
    ]
    assert torch.equal(torch.vmap(op)(torch.stack([X, X])), torch.stack([expected, expected]))
    assert torch.equal(torch.func.functionalize(op)(X), expected)
    negated = torch.imag(torch.complex(X, -X).conj())
    assert negated.is_neg()
    assert torch.equal(op(negated), op(negated.resolve_neg()))
    assert op(X.to("meta")).is_meta


def test_a_profile_has_one_event_of_a_call() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stgp.grid_pool(X)
    assert [event.name for event in profile.events()].count("stgp::grid_pool") == 1
