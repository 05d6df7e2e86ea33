"""Integrations take the versions of engines that were tested, warn of newer ones, and refuse what does not fit.

The engines are stand-ins that have the functions which an integration declares. The tests of each engine, in its own
environment, call the same check on the real ones.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stgridpool_kernels.integrations import base, glm_v, internvl, lmms_eval, qwen_vl, ray, sglang, transformers, vllm
from stgridpool_kernels.integrations.base import require, signature_fault
from tests.support import pages

ROOT = Path(__file__).parents[2]
INTEGRATIONS = {
    "transformers": transformers.TESTED,
    "transformers, later models": transformers.TESTED_LOADING,
    **{
        f"transformers, {one.folder}": one.tested
        for one in (*qwen_vl.FAMILY.architectures, *glm_v.FAMILY.architectures)
    },
    "transformers, internvl": internvl.TESTED,
    **{f"vllm, {base}": family.tested(base) for family, base in vllm.ARCHITECTURES.values()},
    "sglang": sglang.TESTED,
    "ray": ray.TESTED,
    **{name: lmms_eval.tested(name) for name in lmms_eval.CLASSES},
}
CHANGES = {"another": "self, entirely, different", "fewer": "", "one more": "{}, one_more"}


@pytest.fixture(params=INTEGRATIONS)
def tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what an integration passes to `require`; stand-ins of the functions that it names can be imported."""
    arguments = INTEGRATIONS[request.param]
    publish(monkeypatch, arguments["package"], arguments["signatures"])
    return arguments


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_WARNED", set())
    monkeypatch.delenv("STGP_ALLOW_UNTESTED", raising=False)


def publish(monkeypatch: pytest.MonkeyPatch, package: str, signatures: Mapping[str, str]) -> None:
    """Make an engine, and others that it needs, of functions with these parameters, in place of what is installed."""
    packages = {package, *(path.partition(":")[0].split(".")[0] for path in signatures)}
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    make_module(monkeypatch, package)
    for path, expected in signatures.items():
        set_function(monkeypatch, path, function(expected))


def make_module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    if name not in sys.modules:
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(make_module(monkeypatch, parent), child, module)
    return sys.modules[name]


def set_function(monkeypatch: pytest.MonkeyPatch, path: str, made: Callable[..., None]) -> None:
    module, _, name = path.partition(":")
    owner, *inner = (make_module(monkeypatch, module), *name.split("."))
    for part in inner[:-1]:
        if not hasattr(owner, part):
            setattr(owner, part, type(part, (), {}))
        owner = getattr(owner, part)
    setattr(owner, inner[-1], staticmethod(made) if isinstance(owner, type) else made)


def function(expected: str) -> Callable[..., None]:
    """Return a function that has the expected parameters, and an optional one where more may follow."""
    first, *others = expected.replace("*", "").split("...")
    names = [name for name in first.split(", ") if name]
    names += [f"{name}=None" for part in (*others, ", more" if others else "") for name in part.split(", ") if name]
    scope: dict[str, Any] = {}
    exec(f"def made({', '.join(names)}): ...", scope)
    return scope["made"]


def adapter(tested: dict[str, Any]) -> ModuleType:
    """Call `require` as a function of an integration does, so that warnings point to the caller of this function."""
    return require(**tested)


def advice(tested: dict[str, Any]) -> str:
    name = tested.get("install", tested["package"])
    at_least, below = tested["at_least"], tested["below"]
    return f'{at_least} to before {below}: pip install "{name}>={at_least},<{below}"'


@pytest.mark.parametrize("suffix", ["", ".post1", "+cpu", ".dev0", "rc1"])
def test_a_tested_version_is_imported(tested: dict[str, Any], suffix: str, install: Callable[[str], None]) -> None:
    install(tested["at_least"] + suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert require(**tested) is sys.modules[tested["package"]]


@pytest.mark.parametrize(
    "version", ["{below}", "{below}.1", "{below}rc1", "{below}.dev0+g1234", "99", "", "of a clone"]
)
def test_a_newer_or_unknown_version_that_fits_is_warned_of_once(
    tested: dict[str, Any], version: str, install: Callable[[str], None]
) -> None:
    install(version.format(**tested))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert adapter(tested) is sys.modules[tested["package"]]
    [warning] = caught
    assert issubclass(warning.category, UserWarning)
    assert warning.filename == __file__
    assert str(warning.message).startswith(f"{tested['package']} {version.format(**tested)}")
    assert advice(tested) in str(warning.message)


@pytest.mark.parametrize("version", ["0.0.1", "0", "0.0.1rc1+cu130"])
def test_an_older_version_is_refused_unless_a_variable_allows_it(
    tested: dict[str, Any], version: str, monkeypatch: pytest.MonkeyPatch, install: Callable[[str], None]
) -> None:
    install(version)
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv("STGP_ALLOW_UNTESTED", value)
        with pytest.raises(
            RuntimeError, match=f"{tested['package']} .* is installed; .*STGP_ALLOW_UNTESTED=1"
        ) as refused:
            require(**tested)
        assert advice(tested) in str(refused.value)
    monkeypatch.setenv("STGP_ALLOW_UNTESTED", "1")
    with pytest.warns(UserWarning, match="this integration was tested with"):
        require(**tested)


@pytest.mark.parametrize(
    ("version", "allowed"),
    [("{at_least}", "0"), ("{at_least}", "1"), ("{below}", "0"), ("99", "1"), ("of a clone", "0"), ("0.0.1", "1")],
)
def test_a_signature_that_differs_is_refused_in_every_version(
    tested: dict[str, Any], version: str, allowed: str, monkeypatch: pytest.MonkeyPatch, install: Callable[[str], None]
) -> None:
    install(version.format(**tested))
    monkeypatch.setenv("STGP_ALLOW_UNTESTED", allowed)
    for path, expected in tested["signatures"].items():
        for changed in CHANGES.values():
            names = changed.format(expected.split(", ...")[0].replace("*", "")).removeprefix("..., ")
            if names == expected or (expected == "..." and not names):
                continue
            set_function(monkeypatch, path, function(names))
            with pytest.raises(RuntimeError, match=r"must take \(") as refused:
                require(**tested)
            assert path.partition(":")[2] in str(refused.value)
            assert advice(tested) in str(refused.value)
        set_function(monkeypatch, path, function(expected))


def test_functions_and_modules_that_are_gone_are_named(
    tested: dict[str, Any], monkeypatch: pytest.MonkeyPatch, install: Callable[[str], None]
) -> None:
    install("99")
    for path, expected in tested["signatures"].items():
        module, _, name = path.partition(":")
        if name.endswith("__init__"):
            continue  # every class has one
        owner = sys.modules[module]
        for part in name.split(".")[:-1]:
            owner = getattr(owner, part)
        delattr(owner, name.rpartition(".")[2])
        with pytest.raises(RuntimeError, match=f"{module} has no {name}; this integration was tested"):
            require(**tested)
        set_function(monkeypatch, path, function(expected))
    module = next(iter(tested["signatures"])).partition(":")[0]
    if module != tested["package"]:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RuntimeError, match=f"but there is no {module}; this integration was tested"):
            require(**tested)


@pytest.mark.parametrize(
    ("parameters", "expected", "fits"),
    [
        ("self, x", "self, x", True),
        ("self, x, y=1", "self, x", False),
        ("self", "self, x", False),
        ("self, y", "self, x", False),
        ("x, self", "self, x", False),
        ("self, *x", "self, x", True),
        ("", "", True),
        ("x=1", "", False),
        ("self, x, y=1, *z, **w", "self, x, ...", True),
        ("self, x", "self, x, ...", True),
        ("self, x, y", "self, x, ...", False),
        ("self, *, x", "self, x, ...", True),
        ("self, *, size, colour=1", "self, ..., size", True),
        ("self, *, colour=1", "self, ..., size", False),
        ("self, *, size, colour", "self, ..., size", False),
        ("size, self", "self, ..., size", False),
        ("pixel_values_videos", "pixel_values*", True),
        ("pixels", "pixel_values*", False),
        ("**options", "...", True),
        ("x", "...", False),
    ],
)
def test_which_signatures_fit(parameters: str, expected: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scope: dict[str, Any] = {}
    exec(f"def f({parameters}): ...", scope)
    monkeypatch.setitem(sys.modules, "toy_engine", SimpleNamespace(f=scope["f"], number=3))
    assert (signature_fault("toy_engine:f", expected) is None) == fits
    assert signature_fault("toy_engine:number", expected) == "number must be a function with known parameters"


def test_what_a_module_of_the_engine_lacks_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "engine_without_parts.py").write_text("import a_part_that_is_not_installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_part_that_is_not_installed"):
        signature_fault("engine_without_parts:f", "")


# ---- what is written about them ----


def test_the_page_names_the_tested_versions_and_quotes_the_refusal(install: Callable[[str], None]) -> None:
    page = pages.INTEGRATIONS.text
    for name, tested in {
        "transformers": transformers.TESTED,
        "vLLM": vllm.FAMILIES[0].tested("Qwen2VLForConditionalGeneration"),
        "SGLang": sglang.TESTED,
        "lmms-eval": lmms_eval.tested("LlavaVidStgp"),
        "Ray": ray.TESTED,
    }.items():
        assert f"| {name} | from {tested['at_least']} to before {tested['below']} |" in page
    install("5.16.1")
    with pytest.raises(RuntimeError) as refused:
        require(**transformers.TESTED)
    assert str(refused.value) in " ".join(page.split())


def test_the_bounds_of_the_extras_are_those_of_the_integrations() -> None:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    extras = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["ray"] == [f"ray[data]>={ray.TESTED['at_least']},<{ray.TESTED['below']}"]
    assert f"transformers>={transformers.TESTED['at_least']}" in extras["bench"]


# ---- what is installed ----


def test_a_clone_without_metadata_has_the_version_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ModuleType("toy_engine")
    monkeypatch.setitem(sys.modules, "toy_engine", engine)
    with pytest.warns(UserWarning, match="toy_engine of unknown version is installed"):
        require("toy_engine", at_least="1.2", below="2")
    for version, context in {
        "1.1.9": pytest.raises(RuntimeError, match=r"toy_engine 1\.1\.9 is installed"),
        "1.2.0": contextlib.nullcontext(),
        "1.10.3": contextlib.nullcontext(),
    }.items():
        engine.__version__ = version
        with context:
            require("toy_engine", at_least="1.2.0", below="2")


def test_an_older_version_is_refused_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, install: Callable[[str], None]
) -> None:
    install("0.9")
    monkeypatch.setitem(sys.modules, "engine_that_fails", None)  # importing it raises ImportError
    with pytest.raises(RuntimeError, match=r"engine_that_fails 0\.9 is installed"):
        require("engine_that_fails", at_least="1", below="2")


def test_a_missing_engine_is_named() -> None:
    with pytest.raises(ImportError, match=r'no_such_engine is not installed; .* pip install "no_such_engine>=1,<2"'):
        require("no_such_engine", at_least="1", below="2")


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("sglang", sglang.register),
        *(("lmms_eval", functools.partial(getattr, lmms_eval, name)) for name in lmms_eval.CLASSES),
        ("vllm", lambda: vllm.StgpLlavaNextVideoForConditionalGeneration),
        ("transformers", transformers.register),
        ("transformers", lambda: transformers.patch(None)),
    ],
)
def test_each_way_in_asks_for_the_version(
    package: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, install: Callable[[str], None]
) -> None:
    install("0.0.1")
    monkeypatch.setenv("STGP_SGLANG", "on")
    with pytest.raises((RuntimeError, SystemExit), match=rf"{package} 0\.0\.1 is installed.*pip install"):
        call()


FORKED = """
import os, sys, types
from stgridpool_kernels.integrations.base import require
sys.modules["toy_engine"] = types.ModuleType("toy_engine")
require("toy_engine", at_least="1", below="2")
worker = os.fork()
require("toy_engine", at_least="1", below="2")
if worker:
    assert os.waitpid(worker, 0)[1] == 0
"""


def test_forked_workers_do_not_warn_again() -> None:
    command = [sys.executable, "-W", "always", "-c", FORKED]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr.count("toy_engine of unknown version is installed") == 1
