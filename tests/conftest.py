"""Hooks and fixtures of the suite: selection of tests and backends, and the number of examples of hypothesis.

`pytest --slow` also runs the slow tests. `--hypothesis-profile=thorough` draws many fresh examples; the default draws
few, which are the same every time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from stgridpool_kernels import arguments, ops
from stgridpool_kernels.backends import BACKENDS, compiled
from tests.support import cuda_emulation
from tests.support.instructions import restored, usable
from tests.support.interpreter import hasten_interpreter, repair_interpreter, use_interpreter
from tests.support.triples import ABSENT, ALLOWED_REASONS, ARGUMENTS, LEFT_OUT, over_triples

use_interpreter()
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    repair_interpreter()
    hasten_interpreter()

# Small tokens look as if they had another layout. The tests of this warning empty the set.
arguments.warned.update(("channels first", "flattened"))

# Without a GPU, the source of the CUDA kernels runs on the CPU.
if "gpu" in ABSENT and "compiler" not in ABSENT:
    BACKENDS[[backend.name for backend in BACKENDS].index("cuda")] = cuda_emulation.backend()

settings.register_profile("quick", max_examples=16, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=400, deadline=None)
settings.load_profile("quick")

LONGEST = (
    "test_ray.py",
    "test_dtensor.py",
    "test_scaling.py",
    "test_gpu_check.py",
    "test_compile_report.py",
    "test_demo.py",
    "test_grid_models.py",
    "test_transformers.py",
    "test_missing.py",
)
"""Files whose tests take longest. They run first, so that the processes of pytest-xdist end at the same time."""

MACHINES = ("gpu", "aarch64")
"""Markers of tests that run on another kind of machine; `pytest -m` with one of them fails where it is missing."""

left_out = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; `pytest -m gpu` runs only these")
    config.addinivalue_line(
        "markers", "aarch64: runs programs for Arm CPUs; `pytest --slow -m aarch64` runs only these"
    )
    config.addinivalue_line("markers", "slow: part of `make test-all` only; `pytest --slow` runs it")
    config.addinivalue_line("markers", "slow_interpreted: slow where Triton's interpreter runs the kernels")
    config.addinivalue_line("markers", "needs(what): left out where `ABSENT` of support/triples.py has a reason")
    config.stash[left_out] = list(LEFT_OUT)
    asked = config.option.markexpr
    for machine in MACHINES:
        if machine in ABSENT and machine in asked and f"not {machine}" not in asked:
            raise pytest.UsageError(f"-m {asked!r}: {ABSENT[machine]}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test that takes any of `ARGUMENTS` with every triple that exists on this machine."""
    given = {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    names = [name for name in ARGUMENTS if name in metafunc.fixturenames and name not in given]
    if {"backend", "device"} & {*names}:
        metafunc.parametrize(names, over_triples(names, metafunc.function))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that this machine cannot run, and slow ones unless --slow is given; begin with the longest."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    kept, dropped = [], []
    for item in items:
        needs = [what for mark in item.iter_markers("needs") for what in mark.args]
        needs += [machine for machine in MACHINES if item.get_closest_marker(machine) is not None]
        slow = not config.option.slow and _is_slow(item)
        (dropped if slow or any(what in ABSENT for what in needs) else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _is_slow(item: pytest.Item) -> bool:
    if item.get_closest_marker("slow_interpreted") is not None:
        params = item.callspec.params
        if params["backend"] == "triton" and params["device"].type == "cpu":
            return True
    return item.get_closest_marker("slow") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test that is skipped for a reason that is not allowed."""
    report = yield
    return _without_excuses(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Fail a module that is skipped for a reason that is not allowed."""
    report = yield
    return _without_excuses(report)


def _without_excuses(report: pytest.TestReport | pytest.CollectReport) -> pytest.TestReport | pytest.CollectReport:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED_REASONS):
            report.outcome, report.longrepr = "failed", f"skipped, which only {ALLOWED_REASONS} allow: {reason}"
    return report


def pytest_report_header(config: pytest.Config) -> str:
    return "left out: " + ("; ".join(config.stash[left_out]) or "nothing")


@pytest.fixture(autouse=True)
def forget_planned_calls() -> None:
    """Empty the cache of planned calls before each test, so that a test that replaces backends is asked again."""
    ops._slot.cache_clear()


@pytest.fixture(scope="module", params=usable() or ["none"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Select every usable set of vector instructions of the CPU kernels in turn, and yield its name."""
    with restored():
        compiled.LIBRARY.use_cpu_capability(request.param)
        yield request.param
