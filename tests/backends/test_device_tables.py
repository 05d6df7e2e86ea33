"""Tables on devices: they are made once and checked once, live as long as their plan, and streams wait for them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import pickle
import pkgutil
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stgridpool_kernels import GridPlan, backends, grid_plan, plan
from stgridpool_kernels.backends import device_tables
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan.tables import ChunkEntry, chunk_tables
from tests.support.cases import tokens

pytestmark = pytest.mark.filterwarnings("error", "ignore:Conversion of an array:DeprecationWarning")

KERNELS_ON_CPU = [
    pytest.param("triton", marks=pytest.mark.needs("interpreter")),
    pytest.param("cpu", marks=pytest.mark.needs("library")),
]
ARGUMENTS = pytest.mark.parametrize("arguments", [{}, {"resize": "bilinear"}], ids=["fused", "general"])


@pytest.fixture(autouse=True)
def forget_tables() -> Iterator[None]:
    """Forget after each test what calls of it left in caches."""
    yield
    forget_calls()
    device_tables._captured.clear()
    device_tables.tables_of_chunk.cache_clear()


def forget_calls() -> None:
    """Drop the prepared calls of the Triton backend, each of which keeps its plan and its tables."""
    launch = sys.modules.get("stgridpool_kernels.backends.triton_kernels.launch")
    if launch is not None:
        launch._calls.clear()


def new_plan(**arguments: Any) -> GridPlan:
    """Return a plan of 4 frames and one summary that the cache of `grid_plan` does not keep."""
    return dataclasses.replace(grid_plan([4], 2, 3, frame_strides=(1,), **arguments))


def call_every_op(backend: str, plan: GridPlan, x: Tensor) -> None:
    """Run grid_pool, temporal_grid and the gradients of both by one plan."""
    kernels = next(known for known in backends.BACKENDS if known.name == backend)
    weighting = Weighting(1.0, 2.0, True, x.shape[-1])
    pooled, like_x = x.new_zeros(len(x), *plan.pooled_size, x.shape[-1]), torch.empty_like(x)
    kernels.grid_pool(x, plan, weighting, pooled)
    kernels.temporal_grid(x, plan, like_x)
    kernels.grid_pool_backward(pooled, x, plan, weighting, like_x)
    kernels.temporal_grid_backward(x, x, plan, like_x)


def various_tokens() -> Iterator[Tensor]:
    """Yield tokens that are called by the same plan."""
    for dtype in (torch.float32, torch.bfloat16):
        for channels in (3, 5):
            yield tokens(4, 2, 3, channels, dtype=dtype)


# ---- tables of a plan ----


@ARGUMENTS
@pytest.mark.parametrize("backend", KERNELS_ON_CPU)
def test_tables_are_made_once_for_a_plan(
    arguments: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that differ in anything but the plan, the device and the form of its tables share them."""
    made: Counter[str] = Counter()
    make = device_tables.plan_tables

    def counted(plan: GridPlan, **form: Any) -> Any:
        made[str(form)] += 1
        return make(plan, **form)

    monkeypatch.setattr(device_tables, "plan_tables", counted)
    first = new_plan(**arguments)
    for x in various_tokens():
        call_every_op(backend, first, x)
    assert list(made.values()) == [1, 1], made  # for forwards and for gradients
    assert len(first.uploads) == 2
    second = new_plan(**arguments)
    assert second == first
    call_every_op(backend, second, x)
    assert list(made.values()) == [2, 2], made
    assert not {id(tables) for tables in first.uploads.values()} & {id(tables) for tables in second.uploads.values()}


def test_tables_are_made_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GridPlan] = []
    make = device_tables.plan_tables

    def slow(plan: GridPlan, **form: Any) -> Any:
        made.append(plan)
        time.sleep(0.05)
        return make(plan, **form)

    monkeypatch.setattr(device_tables, "plan_tables", slow)
    shared = new_plan()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: device_tables.tables_of(shared, torch.device("cpu")), range(8)))
    assert len(made) == 1
    assert len({id(tables) for tables in found}) == 1


def test_every_form_has_tables_of_its_own() -> None:
    forms: list[dict[str, Any]] = [{}, {"frames_per_stage": 4}, {"frames_per_stage": 8}, {"gradient": True}]
    shared = new_plan()
    for form in forms:
        for device in ("cpu", "meta"):
            tables = device_tables.tables_of(shared, torch.device(device), **form)
            assert tables is device_tables.tables_of(shared, torch.device(device), **form)
            assert tables.words.tolist() == list(plan.tables.plan_tables(shared, **form))
    assert len({id(tables) for tables in shared.uploads.values()}) == 2 * len(forms)


@pytest.mark.needs("library")
def test_copies_of_a_plan_have_no_tables() -> None:
    """Tables belong to one process and its devices: copies make their own."""
    used = new_plan()
    call_every_op("cpu", used, tokens(4, 2, 3, 3))
    assert used.uploads
    pickled = pickle.dumps(used)
    assert len(pickled) < 1000
    for other in (pickle.loads(pickled), copy.deepcopy(used), copy.copy(used), dataclasses.replace(used)):
        assert other is not used
        assert other == used
        assert other.uploads == {}
        assert (other.levels, other.window_rows, other.pooled_size) == (used.levels, used.window_rows, used.pooled_size)


# ---- caches ----


@ARGUMENTS
@pytest.mark.parametrize("backend", KERNELS_ON_CPU)
def test_a_plan_that_is_dropped_takes_its_tables_along(arguments: dict[str, Any], backend: str) -> None:
    """Nothing but the cache of `grid_plan` and prepared calls keeps a plan, and nothing else its tables."""
    dropped = new_plan(**arguments)
    for x in various_tokens():
        call_every_op(backend, dropped, x)
    kept = [weakref.ref(dropped), *(weakref.ref(tables) for tables in dropped.uploads.values())]
    assert len(kept) == 3
    forget_calls()
    del dropped
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3


def modules_that_know_plans() -> Iterator[ModuleType]:
    """Yield the modules of the package that may use `GridPlan`: integrations and commands use the public API alone."""
    for name in ("plan", "backends"):
        package = importlib.import_module(f"stgridpool_kernels.{name}")
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(found.name)
    for name in ("ops", "dtensor", "functional", "stream"):
        yield importlib.import_module(f"stgridpool_kernels.{name}")


@pytest.mark.needs("interpreter")
def test_a_plan_has_three_caches() -> None:
    """They are the cache of `grid_plan`, the cuts of DTensors, and the tables in the plan itself.

    Prepared calls are a cache of calls. All else that a plan holds are its arguments, what follows from them, and one
    boolean.
    """
    cached = [value for module in modules_that_know_plans() for value in vars(module).values()]
    functions = [value.__wrapped__ for value in cached if hasattr(value, "cache_info")]
    found = {
        f"{function.__module__}.{function.__qualname__}"
        for function in functions
        if function is GridPlan or "GridPlan" in str(getattr(function, "__annotations__", ""))
    }
    assert found == {"stgridpool_kernels.plan.plan.GridPlan", "stgridpool_kernels.dtensor.cut_counts"}
    used = new_plan()
    for backend in ("triton", "cpu"):
        call_every_op(backend, used, tokens(4, 2, 3, 3))
    fields = {field.name for field in dataclasses.fields(used)}
    assert vars(used).keys() - fields == {"is_2x2_pooling"}
    assert isinstance(used.is_2x2_pooling, bool)


# ---- checks ----


class Watched(TorchDispatchMode):
    """Mode that records the tables that ops of the compiled library check and follow."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[int] = []
        self.followed: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "stgp::_check_tables":
            self.checked.append(args[0].data_ptr())
        elif name.endswith("_by_tables"):
            tables = args[[argument.name for argument in func._schema.arguments].index("tables")]
            assert tables.data_ptr() in self.checked, f"{name} follows tables that nothing has checked"
            self.followed.append(tables.data_ptr())
        return func(*args, **(kwargs or {}))


@ARGUMENTS
@pytest.mark.needs("library")
def test_every_table_is_checked_once(arguments: dict[str, Any]) -> None:
    """Tables are checked before an op follows them for the first time, and not again."""
    used = [new_plan(**arguments), new_plan(**arguments)]
    with Watched() as watched:
        for x in various_tokens():
            for each in used:
                call_every_op("cpu", each, x)
    tables = [tables.words.data_ptr() for each in used for tables in each.uploads.values()]
    assert len(tables) == 4
    assert sorted(watched.checked) == sorted(tables)
    assert len(watched.followed) == 4 * 2 * 4


@pytest.mark.needs("library")
def test_tables_of_a_chunk_are_checked_once() -> None:
    words = chunk_tables(grid_plan((), 4, 4), 2, [[ChunkEntry(0, 0, 3, (2, 2)), ChunkEntry(1, 1, -1, ())]], 4)
    x, out, weighting = torch.ones(2, 4, 4, 3), torch.empty(2, 2, 2, 3), Weighting(1.0, 2.0, True, 3)
    with Watched() as watched:
        for _ in range(3):
            backends.CPU.pool_chunk(x, words, weighting, torch.empty(4, 2, 2, 3), out)
    assert len(watched.checked) == 1
    assert watched.followed == watched.checked * 3


@pytest.mark.needs("library")
def test_damaged_tables_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails each time that damaged tables are used, and nothing is computed by them."""
    damaged = new_plan()
    make = device_tables.plan_tables

    def spoil(plan: GridPlan, **form: Any) -> list[int]:
        words = list(make(plan, **form))
        words[-1] = -7
        return words

    monkeypatch.setattr(device_tables, "plan_tables", spoil)
    for _ in range(2):
        with Watched() as watched, pytest.raises(RuntimeError, match="out of range"):
            call_every_op("cpu", damaged, tokens(4, 2, 3, 3))
        assert (len(watched.checked), watched.followed) == (1, [])


# ---- streams ----


class FakeEvent:
    """Imitation of an event of torch.cuda. `over` tells whether the work before it has ended."""

    def __init__(self, log: list[Any], **options: bool) -> None:
        self.log, self.over = log, False
        assert options == {"external": True}

    def record(self, stream: Any) -> None:
        self.log.append(("record", stream.cuda_stream))

    def query(self) -> bool:
        return self.over


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace torch.cuda as Tables uses it; return the current stream's number, and a log of what streams were told."""
    log: list[Any] = []
    fake = SimpleNamespace(current=7, log=log)

    def current_stream(device: Any) -> SimpleNamespace:
        number = fake.current
        wait = lambda event: log.append(("wait", number))  # noqa: E731
        synchronize = lambda: log.append(("synchronize", number))  # noqa: E731
        return SimpleNamespace(cuda_stream=number, device=device, wait_event=wait, synchronize=synchronize)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: FakeEvent(log, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: log.append("pin") or self)
    monkeypatch.setattr(
        Tensor,
        "to",
        lambda self, device, non_blocking: log.append(("upload", non_blocking)) or self,
    )
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append(("keep", stream.cuda_stream)))
    return fake


def test_streams_wait_for_the_upload_of_tables(streams: SimpleNamespace) -> None:
    tables = device_tables.Tables([1, 2, 3], torch.device("cuda", 0))
    assert streams.log == ["pin", ("upload", True), ("record", 7)]
    streams.log.clear()
    tables.use(7, capturing=False)
    assert streams.log == []  # the stream that uploads is in order by itself
    streams.current = 8
    tables.use(8, capturing=False)
    tables.use(8, capturing=False)
    assert streams.log == [("wait", 8), ("keep", 8)]
    streams.log.clear()
    tables.uploaded.over = True
    streams.current = 9
    tables.use(9, capturing=False)
    assert streams.log == [("keep", 9)]
    assert tables.uploaded is None


def test_captured_tables_are_kept(streams: SimpleNamespace) -> None:
    """A graph may be replayed on any stream, so it waits by itself while the upload may still be under way."""
    tables = device_tables.Tables([1, 2, 3], torch.device("cuda", 0))
    streams.log.clear()
    tables.use(7, capturing=True)
    assert streams.log == [("wait", 7)]
    assert tables in device_tables._captured
    tables.uploaded.over = True
    tables.use(7, capturing=False)
    assert tables.uploaded is not None, "the graph waits for it at every replay"


@pytest.mark.parametrize("of_chunk", [False, True], ids=["plan", "chunk"])
def test_first_tables_under_capture_are_refused(of_chunk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload would end the capture with an error of CUDA that does not say why."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(device_tables.Tables, "_upload", lambda *_: pytest.fail("tables were uploaded"))
    device, refused = torch.device("cuda", 0), new_plan()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="warm up first"):
            device_tables.tables_of_chunk((1, 2, 3), device) if of_chunk else device_tables.tables_of(refused, device)
    assert refused.uploads == {}


def test_on_rocm_an_upload_is_complete_at_once(streams: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm refuses external events, and a capture may not wait for any other event from outside of it."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: pytest.fail("an event was made"))
    tables = device_tables.Tables([1, 2, 3], torch.device("cuda", 0))
    assert streams.log == ["pin", ("upload", True), ("synchronize", 7)]
    streams.log.clear()
    streams.current = 8
    tables.use(8, capturing=False)
    tables.use(8, capturing=True)
    assert streams.log == [("keep", 8)]
