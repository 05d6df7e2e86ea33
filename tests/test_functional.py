"""The Python functions as callers use them: types of arguments, what is refused and how, and probable mistakes."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import stgridpool_kernels as stgp
from stgridpool_kernels import arguments as arguments_module
from stgridpool_kernels import functional
from stgridpool_kernels.integrations.base import PoolOptions, require_size, tokens_per_frame, video_token_count
from tests.support.cases import tokens

FORMS = [
    ("kernel_size", (3, 3), [3, np.int64(3), np.array([3, 3]), [np.uint8(3)] * 2, torch.tensor(3), range(3, 4)[0]]),
    (
        "kernel_size",
        (2, 3),
        [[2, 3], np.array([2, 3], np.int16), torch.tensor([2, 3]), range(2, 4), torch.Size([2, 3])],
    ),
    ("stride", (1, 2), [np.array([1, 2]), [1, np.int32(2)]]),
    ("padding", (1, 1), [1, np.int8(1), torch.tensor([1, 1])]),
    ("output_size", (2, 2), [2, np.int64(2), np.array([2, 2])]),
    ("frame_strides", (2,), [2, [2], np.int64(2), np.array(2), np.array([2]), torch.tensor([2])]),
    ("frame_strides", (), [[], np.array([], int)]),
    ("grid_shape", (3, 3), [3, np.int64(3), np.array([3, 3]), torch.tensor([3, 3])]),
    ("grid_shape", (1, 2, 2, 1, 1, 1), [np.array([1, 2, 2, 1, 1, 1])]),
    ("temperature", 2.0, [2, np.float32(2), np.float64(2), np.array(2.0), torch.tensor(2.0), Fraction(2)]),
    ("norm_type", math.inf, [np.inf, np.float16(np.inf), torch.tensor(math.inf)]),
    ("ceil_mode", True, [np.True_, np.array(True), torch.tensor(True), 1]),
    ("norm_channels", 5, [np.int64(5), np.array(5), torch.tensor(5), torch.tensor([5]).sum()]),
    ("sampling", "first", [np.str_("first")]),
]
"""Arguments with their values as the ops take them, and other forms of these."""

REFUSED = [
    ({"temperature": "3"}, "temperature must be a number, got '3'"),
    ({"temperature": 2j}, "temperature must be a number, got 2j"),
    ({"temperature": None}, "temperature must be a number, got None"),
    ({"temperature": [1.0]}, r"temperature must be a number, got \[1.0\]"),
    ({"temperature": torch.zeros(2, 9)}, r"temperature must be a number, got Tensor of shape \(2, 9\)"),
    ({"temperature": nn.Parameter(torch.tensor(1.0))}, "temperature must be a number: it is not learned"),
    ({"norm_type": torch.ones(1, requires_grad=True)}, "norm_type must be a number: it is not learned"),
    ({"norm_type": "inf"}, "norm_type must be a number, got 'inf'"),
    ({"kernel_size": 2.0}, r"kernel_size must be an integer or two \(rows, cols\), got 2.0"),
    ({"kernel_size": (2.5, 2)}, r"kernel_size must be an integer or two \(rows, cols\), got \(2.5, 2\)"),
    ({"kernel_size": np.ones((9, 9))}, r"kernel_size must be an integer .*, got ndarray of shape \(9, 9\)"),
    ({"kernel_size": None}, "kernel_size must be an integer .*, got None"),
    ({"stride": "2,2"}, r"stride must be an integer or two \(rows, cols\), or None, got '2,2'"),
    ({"output_size": {2, 3}}, r"output_size must be an integer .*, or None, got \{2, 3\}"),
    ({"frame_strides": "248"}, "frame_strides must be an integer or a sequence of integers, one per level, got '248'"),
    ({"frame_strides": [2, None]}, r"frame_strides must be .*, got \[2, None\]"),
    ({"grid_shape": b"22"}, "grid_shape must be an integer .* two per level, got b'22'"),
    ({"grid_shape": [(2, 2), (3, 3)]}, r"grid_shape must be an integer .*, got \[\(2, 2\), \(3, 3\)\]"),
    ({"ceil_mode": "yes"}, "ceil_mode must be True or False, got 'yes'"),
    ({"normalize_norm": 2}, "normalize_norm must be True or False, got 2"),
    ({"norm_channels": 5.0}, "norm_channels must be an integer or None, got 5.0"),
    ({"norm_channels": "5"}, "norm_channels must be an integer or None, got '5'"),
    ({"norm_channels": [5]}, r"norm_channels must be an integer or None, got \[5\]"),
    ({"norm_channels": np.ones((9, 9))}, r"norm_channels must be an integer or None, got ndarray of shape \(9, 9\)"),
    ({"sampling": None}, "sampling must be a string, got None"),
    ({"resize": b"area"}, "resize must be a string, got b'area'"),
]
UNREADABLE = [
    torch.ones(2, dtype=torch.int64, device="meta"),
    torch.ones(2, dtype=torch.int64).to_sparse(),
    torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
]
"""Tensors without elements that can be read one by one."""

TOO_LARGE = [
    ({"kernel_size": 1 << 70}, "kernel_size"),
    ({"frame_strides": [1 << 63]}, "frame_strides"),
    ({"norm_channels": 1 << 64}, "norm_channels"),
]
COUNTS_REFUSED = [8, 8.0, "8", [4.0, 4.0], [[4], [4]], {4: 4}, np.int64(8), torch.tensor(8), np.ones((8, 100))]


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [pytest.param(name, value, form, id=f"{name}-{form!r}") for name, value, forms in FORMS for form in forms],
)
def test_arguments_may_have_the_types_of_numpy_and_torch(name: str, value: Any, form: Any) -> None:
    given = {"kernel_size": 3, name: form} if name == "padding" else {name: form}
    plain = {**given, name: value}
    x = tokens(18, 6, 7, 9)
    expected = torch.ops.stgp.grid_pool(x, **plain)
    assert torch.equal(stgp.grid_pool(x, **given), expected)
    module = stgp.GridPool(**given)
    assert torch.equal(module(x), expected)
    assert type(module.arguments[name]) is type(value)
    assert module.arguments[name] == value
    assert PoolOptions(**given) == PoolOptions(**plain)
    assert torch.equal(stgp.GridPoolStream(**given).push(x[:0]), expected[:0])
    if name in ("frame_strides", "grid_shape", "kernel_size", "stride", "padding", "output_size"):
        assert stgp.grid_plan([18], 6, 7, **given) == stgp.grid_plan([18], 6, 7, **plain)


OTHER_THAN_DEFAULT: dict[str, Any] = {
    "frame_strides": (3,),
    "grid_shape": (1, 2),
    "sampling": "first",
    "resize": "bilinear",
    "kernel_size": (3, 2),
    "stride": (1, 3),
    "padding": (1, 0),
    "ceil_mode": True,
    "count_include_pad": False,
    "output_size": (2, 3),
    "temperature": 3.0,
    "norm_type": 4.0,
    "normalize_norm": False,
    "norm_channels": 5,
    "frame_counts": (7, 2),
}


@pytest.mark.parametrize("name", ["grid_pool", "temporal_grid", "norm_pool", "token_norm"])
@pytest.mark.parametrize("with_out", [False, True], ids=["new", "out"])
def test_arguments_reach_the_op_by_name_unless_they_are_the_default(
    name: str, with_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, reached = tokens(9, 6, 7, 9), list[dict[str, Any]]()
    monkeypatch.setitem(functional._OPS, name, lambda x, **given: reached.append(given) or x)
    monkeypatch.setitem(functional._OUT_OPS, name, lambda x, out, **given: reached.append(given))
    function = getattr(stgp, name)
    names = [key for key in inspect.signature(function).parameters if key in OTHER_THAN_DEFAULT]
    every = {key: OTHER_THAN_DEFAULT[key] for key in names}
    for given in ({}, every, *({key: value} for key, value in every.items())):
        result = function(x, **given, **({"out": x} if with_out else {}))
        assert result is x
        assert reached.pop() == given
    assert not reached


@pytest.mark.parametrize(
    "form", [[8, 10], np.array([8, 10]), torch.tensor([8, 10]), (np.int32(8), 10), range(8, 11, 2)]
)
def test_frame_counts_and_grids_may_have_the_types_of_numpy_and_torch(form: Any) -> None:
    x = tokens(18, 6, 7, 9)
    expected = torch.ops.stgp.grid_pool(x, frame_counts=[8, 10])
    assert torch.equal(stgp.grid_pool(x, frame_counts=form), expected)
    assert torch.equal(stgp.GridPool()(x, frame_counts=form), expected)
    assert stgp.grid_plan(form, np.int64(6), 7) == stgp.grid_plan([8, 10], 6, 7)
    grid = np.array([6, 7])
    assert torch.equal(stgp.pool_flat(x.flatten(1, 2), form, grid), expected.flatten(1, 2))
    assert tokens_per_frame(grid) == 9


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(list(given)) for given, _ in REFUSED])
def test_wrong_types_name_the_argument_in_one_line(given: dict[str, Any], message: str) -> None:
    x = tokens(8, 6, 7, 9)
    calls: list[Callable[..., Any]] = [stgp.GridPool, stgp.GridPoolStream, PoolOptions]
    for call in (*calls, lambda **given: stgp.grid_pool(x, **given), lambda **given: stgp.pool_flat(x, [8], **given)):
        with pytest.raises(TypeError, match=f"^{message}") as raised:
            call(**given)
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize("value", UNREADABLE, ids=["meta", "sparse", "nested"])
@pytest.mark.parametrize("name", ["frame_strides", "grid_shape", "kernel_size", "output_size", "ceil_mode"])
def test_tensors_that_hold_no_numbers_are_refused_by_name(name: str, value: Any) -> None:
    for call in (stgp.GridPool, lambda **given: stgp.grid_plan([8], 4, 4, **given)):
        with pytest.raises(TypeError, match=f"^{name} must be .*, got .*Tensor"):
            call(**{name: value})
    with pytest.raises(TypeError, match=r"^frame_counts must be a sequence of integers"):
        stgp.grid_pool(tokens(8, 6, 7, 9), frame_counts=value)


class Word(str, Enum):
    LAST = "last"


def test_words_may_be_members_of_an_enumeration() -> None:
    assert stgp.GridPool(sampling=Word.LAST) is not None
    assert stgp.GridPool(sampling=Word.LAST).arguments == stgp.GridPool().arguments


@pytest.mark.parametrize(
    "backend", [3, None, np.arange(5), torch.zeros(4, 1000)], ids=["int", "None", "array", "tensor"]
)
def test_a_backend_that_is_no_string_is_refused_without_data(backend: Any) -> None:
    x = tokens(8, 6, 7, 9)
    calls: list[Callable[..., Any]] = [
        lambda: stgp.grid_pool(x, backend=backend),
        lambda: stgp.pool_flat(x, [8], backend=backend),
        lambda: stgp.use_backend(backend),
        lambda: stgp.GridPoolStream(backend=backend),
        lambda: PoolOptions(backend=backend),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"^backend must be a string, got .{0,60}$"):
            call()


def test_arguments_of_plans_and_token_counts_are_named() -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        (r"sampling must be a string, got \['a'\]", lambda: stgp.grid_plan((), 4, 4, sampling=["a"])),
        ("ceil_mode must be True or False, got ndarray", lambda: stgp.grid_plan((), 4, 4, ceil_mode=np.ones(3))),
        ("height and width must be fewer than 2³¹ tokens", lambda: stgp.grid_plan((), 2**70, 4)),
        ("frame_counts must sum to fewer than 2³¹ frames", lambda: stgp.grid_plan([10**5000], 4, 4)),
        ("frames must be an integer, got 2.5", lambda: video_token_count(2.5, (4, 4))),
        ("frames must be an integer, got ndarray", lambda: video_token_count(np.ones(2, int), (4, 4))),
        (r"newline must be one of .*, got \['x'\]", lambda: video_token_count(2, (4, 4), newline=["x"])),
        ("expected must be an integer, got None", lambda: require_size("engine", (4, 4), None, PoolOptions())),
    ]
    for message, call in calls:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()
    assert video_token_count(np.int64(3), np.array([4, 4])) == 12


@pytest.mark.parametrize(("given", "name"), TOO_LARGE)
def test_integers_beyond_64_bits_are_refused(given: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must fit in 64 bits, got"):
        stgp.grid_pool(tokens(8, 6, 7, 9), **given)


@pytest.mark.parametrize("counts", COUNTS_REFUSED, ids=repr)
def test_counts_that_are_no_sequence_of_integers_are_refused(counts: Any) -> None:
    x = tokens(8, 6, 7, 9)
    for name, call in (("frame_counts", stgp.grid_pool), ("frame_counts", stgp.temporal_grid)):
        with pytest.raises(TypeError, match=rf"^{name} must be a sequence of integers, one per video, or None, got"):
            call(x, frame_counts=counts)
    with pytest.raises(TypeError, match=r"^frames_per_video must be a sequence of integers, one per video, got"):
        stgp.pool_flat(x, counts)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((64, 27, 27, 896)), r"numpy.ndarray of shape \(64, 27, 27, 896\): pass torch.from_numpy\(x\)$"),
        ([torch.zeros(27, 27, 896)] * 64, r"list of length 64: pass torch.stack\(x\), of frames of shape \(H, W, C\)$"),
        ((torch.zeros(27, 27, 8),), r"tuple of length 1: pass torch.stack\(x\)"),
        ([np.zeros((27, 27, 8))] * 2, r"list of length 2: pass torch.from_numpy\(numpy.stack\(x\)\)"),
        (None, "NoneType$"),
        ("tokens.pt", "str of length 9$"),
        (3.5, "float$"),
        (torch.Tensor, r"torch._C._TensorMeta$"),
        ({"x": torch.zeros(4, 4)}, "dict of length 1$"),
    ],
    ids=["array", "list", "tuple", "arrays", "None", "path", "number", "class", "dict"],
)
@pytest.mark.parametrize(
    "name", ["grid_pool", "temporal_grid", "norm_pool", "token_norm", "pool_flat", "module", "push"]
)
def test_what_is_no_tensor_is_refused_without_its_data(x: Any, message: str, name: str) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "pool_flat": lambda x: stgp.pool_flat(x, [64]),
        "module": stgp.GridPool(),
        "push": stgp.GridPoolStream().push,
    }
    with pytest.raises(TypeError, match=f"^x must be a torch.Tensor, got {message}"):
        calls.get(name, getattr(stgp, name, None))(x)


@pytest.mark.parametrize("shape", [(16, 729, 64), (729, 64), (64,), (1, 1, 1, 27, 27, 64)], ids=str)
def test_flattened_tokens_are_refused_with_the_remedy(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^x must have shape \(T, H, W, C\)") as raised:
        stgp.grid_pool(torch.zeros(shape))
    remedy = "; if it is (T, H·W, C), pass x.unflatten(1, (rows, cols)) or call pool_flat"
    assert str(raised.value).endswith(remedy) == (len(shape) == 3)


def test_data_and_long_values_are_not_printed() -> None:
    x = torch.zeros(20, 9, 9, 8)
    messages = {
        r"options must be among .*, got out=Tensor of shape \(20, 9, 9, 8\)$": lambda: stgp.pool_flat(x, [20], out=x),
        r"frame_counts must sum to T = 20, got \[1, 1, .*\.\.\.\] with sum 9999$": lambda: stgp.grid_pool(
            x, frame_counts=[1] * 9999
        ),
        r"frames_per_video must sum .*\.\.\.\] with sum 9999$": lambda: stgp.pool_flat(x, [1] * 9999),
        r"grid_shape must have 2 entries .*\.\.\.\]$": lambda: stgp.grid_pool(x, grid_shape=[2] * 9999),
        r"grid must be 2 integers \(rows, cols\), got Tensor of shape \(9, 9\)$": lambda: stgp.pool_flat(
            x.flatten(1, 2), [20], torch.zeros(9, 9)
        ),
    }
    for message, call in messages.items():
        with pytest.raises((TypeError, ValueError), match=message) as raised:
            call()
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("name", "meant"),
    [("temprature", "; did you mean temperature?"), ("kernel", "; did you mean kernel_size?"), ("alpha", "")],
)
def test_unknown_arguments_are_refused_with_the_nearest_name(name: str, meant: str) -> None:
    for call in (stgp.GridPool, PoolOptions, lambda **given: stgp.pool_flat(tokens(8, 6, 7, 9), [8], **given)):
        with pytest.raises(
            TypeError, match=rf"must be among frame_strides, .*, got {name}=2{meant.replace('?', '[?]')}$"
        ):
            call(**{name: 2})


@pytest.mark.parametrize("name", ["temperature", "kernel_size", "frame_strides", "ceil_mode"])
def test_arguments_of_a_module_cannot_be_assigned(name: str) -> None:
    module = stgp.GridPool()
    with pytest.raises(AttributeError, match=rf"{name} of a GridPool is fixed: make a new one, GridPool\({name}=…\)"):
        setattr(module, name, 5)
    with pytest.raises(AttributeError):
        module.arguments = {}
    module.arguments[name] = 5  # of a copy
    module.note = 5  # other attributes are as those of every module
    assert module.arguments == stgp.GridPool().arguments


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_checks_of_a_module_do_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    """A temperature of 1e200 is finite in the arithmetic of float64 tokens, and refused with those of float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        module = stgp.GridPool(temperature=1e200)
        with pytest.raises(ValueError, match="temperature must be finite"):
            stgp.GridPool(temperature=math.inf)
    finally:
        torch.set_default_dtype(before)
    x = tokens(4, 4, 4, 8)
    assert module(x.double()).isfinite().all()
    with pytest.raises(ValueError, match="temperature must be finite in float32 arithmetic"):
        module(x.float())


# ---- compiled and traced ----


def test_one_graph_for_changing_frame_counts() -> None:
    def pooled(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        counts = [first, x.shape[0] - first]
        return stgp.grid_pool(x, frame_counts=counts), stgp.pool_flat(x.flatten(1, 2), counts, (6, 7))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(pooled, backend=counter, fullgraph=True, dynamic=True)
    for T, first in ((12, 4), (20, 3), (33, 16)):
        x = tokens(T, 6, 7, 9)
        for got, expected in zip(compiled(x, first), pooled(x, first), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_counts_of_dynamic_frames(strict: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stgp.pool_flat(x.flatten(1, 2), [x.shape[0] - 3, 3], (6, 7), temperature=2.0)

    frames = torch.export.Dim("T", min=4, max=4096)
    program = torch.export.export(Model(), (tokens(16, 6, 7, 9),), dynamic_shapes=({0: frames},), strict=strict)
    x = tokens(27, 6, 7, 9)
    assert torch.equal(program.module()(x), Model()(x))


def test_symbolic_sizes_pass_as_they_are() -> None:
    def pooled(x: Tensor) -> Tensor:
        return stgp.grid_pool(x, frame_counts=[x.shape[0] - 2, 2], kernel_size=np.int64(2))

    traced = make_fx(pooled, tracing_mode="symbolic")(tokens(16, 6, 7, 9))
    x = tokens(27, 6, 7, 9)
    assert torch.equal(traced(x), pooled(x))
    assert torch.equal(torch.fx.symbolic_trace(stgp.GridPool())(x), stgp.grid_pool(x))


# ---- tokens in another layout than they are read in ----

UNUSUAL = [
    pytest.param((2, 8, 729, 64), "flattened", id="batch of flattened frames"),
    pytest.param((2, 3, 1, 9, 16), "flattened", id="batch"),
    pytest.param((16, 64, 27, 27), "channels first", id="channels first, square"),
    pytest.param((2, 8, 896, 18, 32), "channels first", id="channels first, wide"),
    pytest.param((4, 24, 24, 3), "channels first", id="pixels"),
]
USUAL = [(2, 8, 64, 65), (2, 27, 27, 28), (1, 1, 1, 2), (1, 4, 32, 8), (2, 27, 27, 896)]


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments_module, "warned", set())


def twice(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    call(x)
    call(x)


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize(("shape", "layout"), UNUSUAL)
@pytest.mark.parametrize("name", ["grid_pool", "temporal_grid", "norm_pool", "token_norm", "pool_flat", "push"])
def test_an_unusual_layout_warns_once(shape: tuple[int, ...], layout: str, name: str) -> None:
    x = torch.zeros(shape)
    if name in ("pool_flat", "push"):
        x = x.flatten(0, -4)
    calls: dict[str, Callable[..., Any]] = {
        "pool_flat": lambda x: stgp.pool_flat(x, [len(x)], kernel_size=1),
        "push": stgp.GridPoolStream(kernel_size=1).push,
        "grid_pool": lambda x: stgp.grid_pool(x, kernel_size=1),
        "norm_pool": lambda x: stgp.norm_pool(x, kernel_size=1),
    }
    call = calls.get(name, getattr(stgp, name, None))
    with pytest.warns(UserWarning, match=rf"^x of shape .* {x.shape[-1]} channels; if they are {layout}") as caught:
        twice(call, x)
    assert len(caught) == 1


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("shape", USUAL, ids=str)
def test_a_usual_layout_does_not_warn(shape: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stgp.grid_pool(torch.zeros(shape), kernel_size=1)


@pytest.mark.usefixtures("unwarned")
def test_neither_ops_nor_compiled_functions_warn() -> None:
    torch._dynamo.reset()
    x = torch.zeros(2, 8, 729, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.stgp.grid_pool(x)
        torch.compile(stgp.grid_pool, backend="eager", fullgraph=True)(x)


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("call", [stgp.grid_pool, stgp.GridPool(), lambda x: stgp.pool_flat(x, [2])])
def test_the_warning_points_to_the_caller(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.warns(UserWarning, match="flattened") as caught:
        call(torch.zeros(2, 8, 729, 64))
    assert caught[0].filename == __file__
