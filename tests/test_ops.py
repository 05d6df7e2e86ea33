"""The ops as torch sees them: schema, fake tensors, compilation, export, gradients, backend choice, bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
import re
import threading
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import stgridpool_kernels as stgp
from stgridpool_kernels import backends, ops
from stgridpool_kernels.ops import ARGUMENTS

NAMES = list(ARGUMENTS)
CONFIGURATIONS = {
    "grid_pool": [
        {},
        {"frame_counts": [5, 0, 4], "frame_strides": [1, 2], "sampling": "first", "resize": "bilinear"},
        {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 1], "ceil_mode": True, "count_include_pad": False},
        {"output_size": [2, 2], "temperature": -2.5, "norm_type": math.inf},
        {"frame_strides": [1, 1], "grid_shape": [3, 1, 1, 2], "norm_type": 0.5, "normalize_norm": False},
        {"norm_channels": 2},
    ],
    "temporal_grid": [{}, {"frame_strides": [1, 2], "grid_shape": [1, 2], "frame_counts": [4, 5]}],
    "norm_pool": [{}, {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1]}, {"output_size": [1, 2]}],
    "token_norm": [{}, {"norm_type": 3.0, "normalize_norm": False, "norm_channels": 1}],
}
CASES = [
    pytest.param(name, arguments, id=f"{name}-{'-'.join(arguments) or 'defaults'}")
    for name, configurations in CONFIGURATIONS.items()
    for arguments in configurations
]


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def op(name: str):
    return getattr(torch.ops.stgp, name)


# ---- schema ----


def test_public_schemas_are_the_documented_ones():
    ptg = 'int[] frame_strides=[2,4,8], int[] grid_shape=[2,2], str sampling="last", str resize="area"'
    nsp = (
        "int[2] kernel_size=[2,2], int[2]? stride=None, int[2] padding=[0,0], bool ceil_mode=False, "
        "bool count_include_pad=True, int[2]? output_size=None, "
        "float temperature=1.0, float norm_type=2.0, bool normalize_norm=True, SymInt? norm_channels=None"
    )
    expected = {
        "grid_pool": f"{ptg}, {nsp}, SymInt[]? frame_counts=None",
        "temporal_grid": f"{ptg}, SymInt[]? frame_counts=None",
        "norm_pool": nsp,
        "token_norm": "float norm_type=2.0, bool normalize_norm=True, SymInt? norm_channels=None",
    }
    for name, arguments in expected.items():
        schema = torch._C.parse_schema(f"stgp::{name}(Tensor x, *, {arguments}) -> Tensor")
        assert op(name).default._schema == schema


@pytest.mark.parametrize("name", NAMES)
def test_python_functions_have_the_arguments_of_the_schema(name):
    schema = {a.name: a.default_value for a in op(name).default._schema.arguments if a.kwarg_only}
    parameters = inspect.signature(getattr(stgp, name)).parameters
    python = {key: p.default for key, p in parameters.items() if key not in ("x", "out", "backend")}
    assert list(python) == list(schema)
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in python.items()} == schema


@pytest.mark.parametrize(
    ("shape", "requires_grad"), [((9, 6, 7, 3), False), ((2, 9, 6, 7, 3), True)], ids=["4d", "5d with gradient"]
)
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_opcheck(name, arguments, requires_grad, shape):
    if len(shape) == 5 and "frame_counts" in arguments:
        arguments = {key: value for key, value in arguments.items() if key != "frame_counts"}
    x = tokens(*shape).requires_grad_(requires_grad)
    torch.library.opcheck(op(name).default, (x,), arguments)


LAYOUTS = {
    "permuted": lambda: tokens(9, 3, 6, 7).permute(0, 2, 3, 1),
    "expanded": lambda: tokens(9, 1, 7, 3).expand(9, 6, 7, 3),
    "sliced": lambda: tokens(18, 6, 9, 3)[::2, :, 1:-1],
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[pytest.mark.slow] * (number % len(LAYOUTS) != other))
        for number, name in enumerate(NAMES)
        for other, layout in enumerate(LAYOUTS)
    ],
)
def test_opcheck_of_other_layouts(name, layout):
    """Outside the slow tests, each op gets one of the layouts."""
    x = LAYOUTS[layout]()
    torch.library.opcheck(op(name).default, (x,))
    torch.library.opcheck(op(name).default, (x.requires_grad_(),))
    backward = op(f"_{name}_backward").default
    torch.library.opcheck(backward, (op(name)(x.detach()), x.detach(), torch.tensor(0)))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, arguments, marks=[pytest.mark.slow] * bool(number), id=f"{name}-{number}")
        for name, configurations in CONFIGURATIONS.items()
        for number, arguments in enumerate(configurations)
    ],
)
def test_opcheck_of_the_private_ops(name, arguments):
    """Outside the slow tests, each op gets its default arguments. All arguments go through the public ops above."""
    x = tokens(9, 6, 7, 3)
    out = op(name)(x, **arguments)
    torch.library.opcheck(op(f"_{name}_out").default, (x,), arguments | {"out": torch.empty_like(out)})
    torch.library.opcheck(op(f"_{name}_recorded").default, (x.requires_grad_(),), arguments)
    x = x.detach()
    torch.library.opcheck(op(f"_{name}_backward").default, (tokens(*out.shape), x, torch.tensor(0)), arguments)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_give_the_shape_without_computing(name):
    x = torch.empty(64, 27, 27, 3584, device="meta", dtype=torch.bfloat16)
    result = op(name)(x)
    expected = {"grid_pool": (64, 13, 13, 3584), "norm_pool": (64, 13, 13, 3584), "temporal_grid": x.shape}
    assert result.device.type == "meta"
    assert result.shape == expected.get(name, (64, 27, 27))
    assert result.dtype == (torch.float32 if name == "token_norm" else torch.bfloat16)


# ---- checkpointing ----


def recorded(name):
    return op(f"_{name}_recorded").default


def save_by_function(name):
    save, recompute = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE
    return lambda context, called, *inputs, **options: save if called is recorded(name) else recompute


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy", [lambda name: [recorded(name)], save_by_function], ids=["list", "function"])
@pytest.mark.parametrize("name", ["grid_pool", "norm_pool"])
def test_selective_checkpointing_saves_a_result_by_the_op_that_gradients_record(name, policy, compiled, monkeypatch):
    """docs/get-started.md names the op, since a policy does not see the public one."""
    torch._dynamo.reset()
    ran, run = [], ops._run
    monkeypatch.setattr(ops, "_run", lambda called, *arguments: ran.append(called) or run(called, *arguments))
    contexts = partial(create_selective_checkpoint_contexts, policy(name))

    def pooled(x, context_fn):
        return checkpoint(lambda x: op(name)(x.sin()).sin(), x, use_reentrant=False, context_fn=context_fn).sum()

    step = torch.compile(pooled, fullgraph=True, backend="aot_eager") if compiled else pooled
    x = tokens(9, 6, 7, 3).requires_grad_()
    step(x, contexts).backward()
    assert ran == [name]
    found, x.grad = x.grad, None
    op(name)(x.sin()).sin().sum().backward()
    torch.testing.assert_close(found, x.grad)


# ---- compilation and export ----


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_changing_frame_counts(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: op(name)(x) * 2, fullgraph=True, dynamic=True, backend=counter)
    for T in (8, 16, 33, 64):
        x = tokens(T, 6, 7, 5)
        assert torch.equal(compiled(x), op(name)(x) * 2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "marked"])
@pytest.mark.parametrize("pool", [stgp.GridPool(ceil_mode=True), stgp.grid_pool], ids=["module", "function"])
def test_module_and_function_are_compiled_once(pool, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool, fullgraph=True, dynamic=dynamic, backend=counter)
    compiled_after_the_first = None
    for T in (8, 16, 33, 64):
        x = tokens(T, 6, 7, 5)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), pool(x))
        compiled_after_the_first = compiled_after_the_first or counter.frame_count
    assert counter.frame_count == compiled_after_the_first


@pytest.mark.parametrize("arguments", [{}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"output_size": 2}], ids=str)
def test_compiled_public_function(arguments):
    x = tokens(16, 6, 7, 5)
    compiled = torch.compile(lambda x: stgp.grid_pool(x, **arguments), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), stgp.grid_pool(x, **arguments))


def test_compiled_with_packed_videos():
    def pool(x, first, second):
        return torch.ops.stgp.grid_pool(x, frame_counts=[first, second])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend=counter)
    for first, second in ((8, 16), (33, 9), (20, 31)):
        x = tokens(first + second, 6, 7, 5)
        assert torch.equal(compiled(x, first, second), pool(x, first, second))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["grid_pool", "norm_pool", "token_norm"])
def test_one_graph_for_changing_norm_channels(name):
    def norm(x, channels):
        return op(name)(x, norm_channels=channels) * 2

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend=counter)
    for channels in (2, 9, 4):
        x = tokens(16, 6, 7, 9)
        assert torch.equal(compiled(x, channels), norm(x, channels))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for leaf, run in zip(leaves, (compiled, norm), strict=True):
            run(leaf, channels).sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count == 2  # without a gradient and with one
    with pytest.raises(ValueError, match="norm_channels must be from 1 to C = 9, got 10"):
        norm(x, 10)


def test_norm_channels_may_be_known_at_run_time_only():
    def pool(x, channels):
        return torch.ops.stgp.grid_pool(x, norm_channels=channels.item())

    x = tokens(16, 6, 7, 9)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
        for channels in (5, 1, 9):
            assert torch.equal(compiled(x, torch.tensor(channels)), pool(x, torch.tensor(channels)))


def test_compiled_with_out():
    def pool(x, out):
        return stgp.grid_pool(x, out=out) + 1

    x, out = tokens(16, 6, 7, 5), torch.full((16, 3, 3, 5), math.nan)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, out), stgp.grid_pool(x) + 1)
    assert torch.equal(out, stgp.grid_pool(x))


def test_compiled_gradient_equals_eager():
    x, grad = tokens(17, 6, 7, 5), tokens(17, 3, 3, 5, seed=1)
    gradients = []
    for run in (stgp.grid_pool, torch.compile(stgp.grid_pool, fullgraph=True, dynamic=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.needs("compiler")
def test_inductor():
    """Inductor compiles C++ on a CPU."""
    x = tokens(16, 6, 7, 5)
    compiled = torch.compile(lambda x: torch.ops.stgp.grid_pool(x.relu()) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.ops.stgp.grid_pool(x.relu()) * 2)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_frames(strict):
    frames = torch.export.Dim("frames", min=2, max=4096)
    program = torch.export.export(
        stgp.GridPool(), (tokens(16, 6, 7, 5),), dynamic_shapes={"x": {0: frames}}, strict=strict
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.stgp.grid_pool.default]
    for T in (8, 33):
        x = tokens(T, 6, 7, 5)
        assert torch.equal(program.module()(x), stgp.grid_pool(x))


def test_errors_appear_when_compiling():
    compiled = torch.compile(lambda x: torch.ops.stgp.grid_pool(x, sampling="middle"), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="sampling must be one of 'last', 'first', got 'middle'"):
        compiled(tokens(8, 6, 7, 5))


# ---- gradients ----


@pytest.mark.parametrize("shape", [(9, 3, 4, 2), (2, 8, 2, 3, 2)], ids=["4d", "5d"])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_gradcheck(name, arguments, shape):
    if len(shape) == 5 and "frame_counts" in arguments:
        arguments = {key: value for key, value in arguments.items() if key != "frame_counts"}
    x = tokens(*shape, dtype=torch.float64).requires_grad_()
    # the whole Jacobian where it is cheap, its products with random vectors elsewhere
    whole = len(shape) == 4 and not arguments
    assert torch.autograd.gradcheck(lambda x: op(name)(x, **arguments), x, fast_mode=not whole)


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("name", ["norm_pool", "token_norm"])
def test_gradient_is_finite_at_zero_tokens_and_zero_elements(name, norm_type):
    x = tokens(3, 4, 4, 6)
    x[0] = 0
    x[1, 1] = 0
    x[2, :, :, ::2] = 0
    x.requires_grad_()
    out = op(name)(x, norm_type=norm_type)
    (gradient,) = torch.autograd.grad(out, x, tokens(*out.shape, seed=1))
    assert gradient.isfinite().all()
    if name == "token_norm":
        # the gradient of the norm: 0 at a zero token, and for p < 1 at zero elements too
        assert (gradient[0] == 0).all()
        assert (gradient[1, 1] == 0).all()
        assert (gradient[2, :, :, ::2] == 0).all()
        assert (gradient[2, :, :, 1::2] != 0).any()


def test_overwritten_frames_pass_their_gradient_to_their_sources():
    x = tokens(8, 4, 4, 2, dtype=torch.float64).requires_grad_()
    stgp.temporal_grid(x, frame_strides=[2])[7].sum().backward()
    # each token of the summary is the mean of 4 tokens of one of the frames 1, 3, 5, 7
    expected = torch.zeros(8, 4, 4, 2, dtype=torch.float64)
    expected[1::2] = 0.25
    assert torch.allclose(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradient(dtype):
    exact = tokens(16, 5, 5, 8, dtype=dtype).double().requires_grad_()
    x = exact.detach().to(dtype).requires_grad_()
    for leaf in (exact, x):
        stgp.grid_pool(leaf).sum().backward()
    assert x.grad.dtype == dtype
    assert (x.grad - exact.grad).norm() / exact.grad.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (0, 8, 4, 4, 2), (2, 0, 4, 4, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_no_frames(name, shape):
    x = torch.zeros(shape, requires_grad=True)
    op(name)(x).sum().backward()
    assert x.grad.shape == shape


def test_double_backward_raises():
    x = tokens(8, 4, 4, 2, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(stgp.grid_pool(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_forward_mode_raises_instead_of_being_zero():
    x = tokens(8, 4, 4, 2)
    for name in NAMES:
        with pytest.raises(RuntimeError, match=f"stgp::{name} has no forward-mode derivative"):
            torch.func.jvp(op(name), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_other_layouts(layout):
    x = LAYOUTS[layout]().double()
    results = []
    for run in (stgp.grid_pool, torch.compile(stgp.grid_pool, fullgraph=True, backend="aot_eager")):
        leaf = x.detach().requires_grad_()
        run(leaf).square().sum().backward()
        results.append(leaf.grad)
    contiguous = x.contiguous().requires_grad_()
    stgp.grid_pool(contiguous).square().sum().backward()
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], contiguous.grad, rtol=1e-12, atol=1e-12)


# ---- backends ----


@contextlib.contextmanager
def changed_backends():
    """Restores the list of backends, which is changed in place as every module holds the same one."""
    kept = list(backends.BACKENDS)
    try:
        yield
    finally:
        backends.BACKENDS[:] = kept


@pytest.fixture
def recorder():
    """Two backends: the reference, and one before it that computes the same and notes what it ran."""
    calls: list[str] = []

    def note(name):
        function = getattr(backends.REFERENCE, name)

        def run(*arguments):
            calls.append(name)
            return function(*arguments)

        return run

    methods = [name for name in NAMES if name != "norm_pool"]  # which is grid_pool by a plan without levels
    functions = {name: note(name) for method in methods for name in (method, f"{method}_backward")}
    recorder = dataclasses.replace(backends.REFERENCE, name="recorder", **functions)
    with changed_backends():
        backends.BACKENDS[:] = [recorder, backends.REFERENCE]
        yield calls


def test_auto_takes_the_first_that_can_run_and_logs_why(recorder, caplog):
    first, second = backends.BACKENDS
    caplog.set_level(logging.DEBUG, "stgridpool_kernels")
    stgp.grid_pool(tokens(8, 4, 4, 2))
    assert recorder == ["grid_pool"]
    backends.BACKENDS[0] = dataclasses.replace(first, unsupported_reason=lambda x, plan: "no such device")
    stgp.grid_pool(tokens(8, 4, 4, 2))
    assert recorder == ["grid_pool"]
    assert caplog.messages == ["recorder runs", "recorder passed over: no such device", "reference runs"]
    assert stgp.available_backends() == [second.name]
    with pytest.raises(RuntimeError, match="backend 'recorder' cannot run this call: no such device"):
        stgp.grid_pool(tokens(8, 4, 4, 2), backend="recorder")


def test_precedence_is_argument_then_context_then_environment(recorder, monkeypatch):
    x = tokens(8, 4, 4, 2)
    monkeypatch.setenv("STGP_BACKEND", "reference")
    stgp.norm_pool(x)
    assert recorder == []
    with stgp.use_backend("recorder"):
        stgp.norm_pool(x)
        assert recorder == ["grid_pool"]
        stgp.norm_pool(x, backend="reference")
        assert recorder == ["grid_pool"]
        with stgp.use_backend("reference"):
            stgp.token_norm(x)
            stgp.token_norm(x, backend="recorder")
        assert recorder == ["grid_pool", "token_norm"]
        stgp.temporal_grid(x)
        assert recorder == ["grid_pool", "token_norm", "temporal_grid"]
    stgp.norm_pool(x)
    with stgp.use_backend("auto"):  # stands above the environment
        stgp.norm_pool(x)
    assert recorder == ["grid_pool", "token_norm", "temporal_grid", "grid_pool"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_backward_uses_the_backend_of_its_forward(recorder, compiled):
    pool = torch.compile(stgp.grid_pool, fullgraph=True, backend="aot_eager") if compiled else stgp.grid_pool
    x = tokens(8, 4, 4, 2).requires_grad_()
    # compiled while the other backend is in use: nothing of that may stick to the graph
    with stgp.use_backend("reference"):
        pool(x).sum().backward()
        assert recorder == []
    with stgp.use_backend("recorder"):
        result = pool(x)
    with stgp.use_backend("reference"):
        result.sum().backward()
    assert recorder == ["grid_pool", "grid_pool_backward"]


def test_backward_in_another_thread_uses_the_backend_of_its_forward(recorder):
    x = tokens(8, 4, 4, 2).requires_grad_()
    with stgp.use_backend("recorder"):
        loss = stgp.grid_pool(x).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert recorder == ["grid_pool", "grid_pool_backward"]
    assert x.grad.isfinite().all()


def test_use_backend_holds_for_its_own_thread_only(recorder):
    inside, done = threading.Event(), threading.Event()

    def other():
        with stgp.use_backend("reference"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    stgp.grid_pool(tokens(8, 4, 4, 2))
    done.set()
    thread.join()
    assert recorder == ["grid_pool"]


def test_one_use_backend_serves_several_threads(recorder):
    shared, turns = stgp.use_backend("reference"), [threading.Event() for _ in range(4)]
    failures: list[BaseException] = []

    def enter_and_leave(enter, entered, leave, left):
        try:
            assert enter.wait(10)
            with shared:
                entered.set()
                assert leave.wait(10)
                assert backends.requested_backend() == "reference"
            assert backends.requested_backend() == "auto"
            left.set()
        except BaseException as failure:
            failures.append(failure)

    start = threading.Event()
    # the first enters, the second enters, the first leaves, the second leaves
    first = threading.Thread(target=enter_and_leave, args=(start, turns[0], turns[1], turns[2]))
    second = threading.Thread(target=enter_and_leave, args=(turns[0], turns[1], turns[2], turns[3]))
    first.start()
    second.start()
    start.set()
    first.join(30)
    second.join(30)
    assert not failures
    assert all(turn.is_set() for turn in turns)


def test_use_backend_around_a_compiled_function(recorder):
    compiled = torch.compile(stgp.grid_pool, fullgraph=True, backend="aot_eager")
    x = tokens(8, 4, 4, 2)
    with stgp.use_backend("reference"):
        compiled(x)
    assert recorder == []
    with stgp.use_backend("recorder"):
        compiled(x)
    assert recorder == ["grid_pool"]


def test_choosing_a_backend_inside_a_compiled_function_raises():
    def with_argument(x):
        return stgp.grid_pool(x, backend="reference")

    def with_context(x):
        with stgp.use_backend("reference"):
            return stgp.grid_pool(x)

    for function in (with_argument, with_context):  # torch 2.10 refuses the context variable before it comes to ours
        with pytest.raises(Exception, match=r"chosen outside compiled functions|`get` of class `ContextVar`"):
            torch.compile(function, fullgraph=True, backend="eager")(tokens(8, 4, 4, 2))


def test_use_backend_restores_after_an_error_and_can_be_entered_again():
    chosen = stgp.use_backend("reference")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), chosen:
            1 / (backends.requested_backend() != "reference")
        assert backends.requested_backend() == "auto"
    with chosen, chosen:
        assert backends.requested_backend() == "reference"
    assert backends.requested_backend() == "auto"


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda x: stgp.grid_pool(x, backend="opencl"), id="argument"),
        pytest.param(lambda x: stgp.use_backend("opencl"), id="context"),
    ],
)
def test_unknown_backend_lists_the_known_ones(ask):
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*'reference', got 'opencl'"):
        ask(tokens(8, 4, 4, 2))


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("STGP_BACKEND", "opencl")
    with pytest.raises(ValueError, match=r"STGP_BACKEND must be one of 'auto', .*'reference', got 'opencl'"):
        stgp.grid_pool(tokens(8, 4, 4, 2))


# ---- the module ----


def test_module_repr():
    assert repr(stgp.GridPool()) == (
        "GridPool(frame_strides=(2, 4, 8), grid_shape=(2, 2), kernel_size=(2, 2), temperature=1.0)"
    )
    assert repr(stgp.GridPool(output_size=[5, 6], temperature=2, frame_strides=[], norm_type=math.inf)) == (
        "GridPool(frame_strides=(), grid_shape=(2, 2), output_size=(5, 6), temperature=2.0, norm_type=inf)"
    )


def test_module_equals_the_function_and_has_no_state():
    arguments = {"frame_strides": [1, 2], "kernel_size": 3, "padding": 1, "temperature": 2.0}
    module = stgp.GridPool(**arguments)
    x = tokens(12, 6, 7, 5)
    assert torch.equal(module(x), stgp.grid_pool(x, **arguments))
    assert torch.equal(module(x, frame_counts=[5, 7]), stgp.grid_pool(x, frame_counts=[5, 7], **arguments))
    assert not module.state_dict()


def test_module_takes_every_argument_of_the_function():
    left_out = {"x", "frame_counts", "out", "backend"}
    expected = [name for name in inspect.signature(stgp.grid_pool).parameters if name not in left_out]
    assert list(inspect.signature(stgp.GridPool).parameters) == expected
    with pytest.raises(TypeError, match="kernel"):
        stgp.GridPool(kernel=3)


# ---- bad input ----

GRIDDING_ERRORS = [
    ({"frame_strides": [2, 0]}, r"frame_strides must be at least 1, got \[2, 0\]"),
    ({"frame_strides": [-1]}, r"frame_strides must be at least 1, got \[-1\]"),
    ({"grid_shape": [2, 0]}, r"grid_shape must have rows and cols of at least 1, got \[2, 0\]"),
    ({"grid_shape": [2, 2, 3]}, r"grid_shape must have 2 entries \(rows, cols\) or 6 .*, got \[2, 2, 3\]"),
    ({"grid_shape": []}, r"grid_shape must have 2 entries .*, got \[\]"),
    ({"sampling": "middle"}, "sampling must be one of 'last', 'first', got 'middle'"),
    ({"resize": "cubic"}, "resize must be one of 'area', 'bilinear', got 'cubic'"),
]
WINDOW_ERRORS = [
    ({"kernel_size": [0, 2]}, r"kernel_size must be 2 integers .* at least 1, got \[0, 2\]"),
    ({"kernel_size": [2, 2, 2]}, r"kernel_size must be 2 integers .*, got \[2, 2, 2\]"),
    ({"kernel_size": [9, 2]}, r"kernel_size=\[9, 2\] .* leaves no window on a 6 × 7 frame"),
    ({"kernel_size": [2, 9], "padding": [0, 0]}, r"kernel_size=\[2, 9\] .* leaves no window"),
    ({"stride": [2, 0]}, r"stride must be 2 integers .* at least 1, got \[2, 0\]"),
    ({"padding": [-1, 0]}, r"padding must be 2 integers .* at least 0, got \[-1, 0\]"),
    ({"padding": [0, 2]}, r"padding must be at most half of kernel_size=\[2, 2\], got \[0, 2\]"),
    ({"output_size": [0, 2]}, r"output_size must be 2 integers .* at least 1, got \[0, 2\]"),
    ({"output_size": [7, 2]}, r"output_size must not exceed the frame of 6 × 7 tokens, got \[7, 2\]"),
    ({"output_size": [2, 99999999999]}, r"output_size must not exceed the frame of 6 × 7 .*, got \[2, 99999999999\]"),
    (
        {"kernel_size": [1 << 30] * 2, "padding": [1 << 29] * 2},
        r"kernel_size=\[1073741824, .* 1073741824 tokens: it must",
    ),
    ({"kernel_size": [60000] * 2, "padding": [30000] * 2}, r"kernel_size=\[60000, .* a window of 60000 × 60000 tokens"),
    (
        {"kernel_size": [1 << 30] * 2, "padding": [30000] * 2, "ceil_mode": True},
        r"kernel_size=.* a window of 60001 × 60001",
    ),
    ({"output_size": [2, 2], "kernel_size": [3, 3]}, r"output_size=\[2, 2\] .* got kernel_size=\[3, 3\]"),
    ({"output_size": [2, 2], "stride": [2, 2]}, r"output_size=\[2, 2\] .* stride=\[2, 2\]"),
    ({"output_size": [2, 2], "padding": [1, 0]}, r"output_size=\[2, 2\] .* padding=\[1, 0\]"),
    ({"output_size": [2, 2], "ceil_mode": True}, r"output_size=\[2, 2\] .* ceil_mode=True"),
    ({"output_size": [2, 2], "count_include_pad": False}, r"output_size=\[2, 2\] .* count_include_pad=False"),
]
NORM_ERRORS = [
    ({"norm_type": 0.0}, "norm_type must be greater than 0 .*, got 0.0"),
    ({"norm_type": -1.0}, "norm_type must be greater than 0 .*, got -1.0"),
    ({"norm_type": math.nan}, "norm_type must be greater than 0 .*, got nan"),
    ({"norm_channels": 0}, "norm_channels must be .*, got 0"),
    ({"norm_channels": -2}, "norm_channels must be .*, got -2"),
]
CHANNEL_ERRORS = [
    ({"norm_channels": n}, f"norm_channels must be from 1 to C = 3, got {n}") for n in (-1, 0, 4, 1 << 40)
]
TEMPERATURE_ERRORS = [
    ({"temperature": math.inf}, "temperature must be finite in float32 arithmetic, got inf"),
    ({"temperature": math.nan}, "temperature must be finite in float32 arithmetic, got nan"),
    ({"temperature": -1e300}, r"temperature must be finite in float32 arithmetic, got -1e\+300"),
]
COUNT_ERRORS = [
    ({"frame_counts": [4, -1, 6]}, r"frame_counts must not be negative, got \[4, -1, 6\]"),
    ({"frame_counts": [4, 4]}, r"frame_counts must sum to T = 9, got \[4, 4\] with sum 8"),
    ({"frame_counts": []}, r"frame_counts must sum to T = 9, got \[\] with sum 0"),
]
ERRORS = {
    "grid_pool": GRIDDING_ERRORS + WINDOW_ERRORS + NORM_ERRORS + CHANNEL_ERRORS + TEMPERATURE_ERRORS + COUNT_ERRORS,
    "temporal_grid": GRIDDING_ERRORS + COUNT_ERRORS,
    "norm_pool": WINDOW_ERRORS + NORM_ERRORS + CHANNEL_ERRORS + TEMPERATURE_ERRORS,
    "token_norm": NORM_ERRORS + CHANNEL_ERRORS,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        pytest.param(name, arguments, message, id=f"{name}-{arguments}")
        for name, errors in ERRORS.items()
        for arguments, message in errors
    ],
)
def test_bad_arguments(name, arguments, message, device):
    x = torch.zeros(9, 6, 7, 3, device=device)
    with pytest.raises(ValueError, match=message):
        op(name)(x, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(arguments, message, id=str(arguments))
        for arguments, message in GRIDDING_ERRORS + WINDOW_ERRORS + NORM_ERRORS + TEMPERATURE_ERRORS
        if not re.search("leaves no window|exceed the frame|1e", message)  # these depend on x
    ],
)
def test_module_refuses_bad_arguments_at_once(arguments, message):
    with pytest.raises(ValueError, match=message.replace("float32", "float64")):
        stgp.GridPool(**arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        pytest.param(torch.zeros(6, 7, 3), ValueError, r"x must have shape .* got \(6, 7, 3\)", id="rank 3"),
        pytest.param(torch.zeros(1, 1, 1, 6, 7, 3), ValueError, r"x must have shape .* got", id="rank 6"),
        pytest.param(torch.zeros(8, 0, 7, 3), ValueError, r"H, W and C of at least 1, got shape \(8, 0, 7", id="H = 0"),
        pytest.param(torch.zeros(8, 6, 0, 3), ValueError, "H, W and C of at least 1", id="W = 0"),
        pytest.param(torch.zeros(2, 8, 6, 7, 0), ValueError, "H, W and C of at least 1", id="C = 0"),
        pytest.param(torch.zeros(8, 6, 7, 3, dtype=torch.int32), TypeError, "got torch.int32", id="integer"),
        pytest.param(torch.zeros(8, 6, 7, 3, dtype=torch.complex64), TypeError, "got torch.complex64", id="complex"),
        pytest.param(torch.zeros(8, 6, 7, 3).to_sparse(), TypeError, "got layout torch.sparse_coo", id="sparse"),
    ],
)
def test_bad_tokens(name, x, error, message):
    with pytest.raises(error, match=message):
        op(name)(x)


@pytest.mark.parametrize("name", ["grid_pool", "temporal_grid"])
def test_frame_counts_do_not_go_with_a_batch(name):
    with pytest.raises(ValueError, match=r"frame_counts packs videos .* got \[9\]"):
        op(name)(torch.zeros(1, 9, 6, 7, 3), frame_counts=[9])


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        pytest.param(torch.empty(9, 3, 3, 4), ValueError, r"out must have shape \(9, 3, 3, 3\), got \(9, 3, 3, 4\)"),
        pytest.param(torch.empty(9, 3, 3, 3, dtype=torch.float64), TypeError, "out must have dtype torch.float32, got"),
        pytest.param(torch.empty(9, 3, 3, 3, device="meta"), ValueError, "out must be on cpu as x is, got meta"),
        pytest.param(torch.empty(9, 3, 3, 1).expand(9, 3, 3, 3), ValueError, "out must not overlap itself"),
        pytest.param(
            torch.empty(300).as_strided((9, 3, 3, 3), (5, 1, 9, 3)),
            ValueError,
            r"itself, got .* strides \(5, 1, 9, 3\)",
        ),
        pytest.param(torch.zeros(9, 3, 3, 3).to_sparse(), TypeError, "out must be .* got layout torch.sparse_coo"),
        pytest.param(5, TypeError, "out must be a tensor, got int"),
    ],
    ids=["shape", "dtype", "device", "expanded", "overlapping itself", "sparse", "no tensor"],
)
def test_bad_out(out, error, message):
    with pytest.raises(error, match=message):
        stgp.grid_pool(torch.zeros(9, 6, 7, 3), out=out)


@pytest.mark.parametrize("first", [0, 100, 9 * 6 * 7 * 3 - 1], ids=["start", "middle", "last element"])
def test_out_overlapping_x(first):
    storage = torch.zeros(4000)
    x = storage[: 9 * 6 * 7 * 3].view(9, 6, 7, 3)
    with pytest.raises(ValueError, match="out must not overlap x"):
        stgp.grid_pool(x, out=storage[first : first + 9 * 3 * 3 * 3].view(9, 3, 3, 3))
    assert (storage == 0).all()
    beside = storage[x.numel() : x.numel() + 9 * 3 * 3 * 3].view(9, 3, 3, 3)
    assert stgp.grid_pool(x, out=beside) is beside


@pytest.mark.parametrize("name", NAMES)
def test_out_while_a_gradient_is_required(name):
    x = tokens(9, 6, 7, 3)
    out = torch.empty_like(op(name)(x))
    with pytest.raises(RuntimeError, match="out cannot be given while a gradient is required"):
        getattr(stgp, name)(x.clone().requires_grad_(), out=out)
    with pytest.raises(RuntimeError, match="out cannot be given while a gradient is required"):
        getattr(stgp, name)(x, out=out.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(getattr(stgp, name)(x.clone().requires_grad_(), out=out), op(name)(x))


def test_nothing_is_computed_before_the_checks(recorder):
    for name, errors in ERRORS.items():
        for arguments, message in errors:
            with pytest.raises(ValueError, match=message):
                op(name)(torch.zeros(9, 6, 7, 3), **arguments)
    assert recorder == []
