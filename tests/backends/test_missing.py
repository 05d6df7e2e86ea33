"""A package without compiled kernels says why, and a call that would have been much faster with them warns."""

from __future__ import annotations

import importlib.resources
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.backends import BACKENDS, compiled, missing
from stgridpool_kernels.cli.main import main

SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is taken for the package, on a path of its own."""
    folder = tmp_path / "here" / missing.PACKAGE
    folder.mkdir(parents=True)
    monkeypatch.setattr(missing, "files", lambda name: folder)
    monkeypatch.setattr(missing, "_of_another_checkout", lambda: None)  # that of this package
    monkeypatch.setattr(sys, "path", [str(folder.parent)])
    return folder


def why() -> str:
    return missing.why_missing.__wrapped__()


def test_a_package_that_was_never_built(package: Path) -> None:
    assert why() == f"it was never built in {package}: pip install -e . in the checkout builds it"


def test_the_reason_of_the_build(package: Path) -> None:
    (package / missing.RECORD).write_text("no C++ compiler\n")
    assert why() == "the build left it out: no C++ compiler"


def test_a_library_of_another_python(package: Path) -> None:
    (package / missing.RECORD).touch()
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    cause = f"_C.cpython-39-x86_64-linux-gnu.so in {package} is not of this Python, {sys.implementation.cache_tag}: "
    assert why() == f"{cause}install the package with this Python"


def test_a_checkout_that_hides_an_installed_package(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed" / missing.PACKAGE
    installed.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed.parent)])
    assert "never built" in why()
    (installed / f"_C{SUFFIX}").touch()
    (package / missing.RECORD).touch()
    assert why().startswith(f"{package} has none, and hides {installed}, which has one: run from another folder")


@pytest.mark.needs("library")
def test_a_checkout_does_not_take_the_library_of_an_installed_one(tmp_path: Path) -> None:
    """The finder of an editable installation would find it by its name, and other kernels would run."""
    copy = shutil.copytree(
        Path(stgp.__file__).parent, tmp_path / missing.PACKAGE, ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    code = "from stgridpool_kernels.backends import compiled; print(compiled.LIBRARY, compiled.missing_library())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"None the compiled library is missing: {copy} has none, and hides ")


def test_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{missing.PACKAGE}/__init__.py", "")
        file.writestr(f"{missing.PACKAGE}/{missing.RECORD}", "no C++ compiler")
        monkeypatch.setattr(missing, "_of_another_checkout", lambda: None)
        monkeypatch.setattr(missing, "files", lambda name: zipfile.Path(file, f"{name}/"))
        monkeypatch.setattr(sys, "path", [str(archive)])
        assert why() == f"libraries cannot be loaded out of {archive}: install the package"


# ---- the warning ----

LARGE = torch.zeros(8, 64, 64, 16)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the backends cpu and reference, the first without its library."""
    monkeypatch.setattr(compiled, "LIBRARY", None)
    monkeypatch.setattr(compiled, "why_missing", lambda: "it rained")
    monkeypatch.setattr("stgridpool_kernels.backends.BACKENDS", BACKENDS[-2:])
    compiled._warn.cache_clear()
    yield
    compiled._warn.cache_clear()


EXPECTED = "calls run on the reference, .* slower than the kernels: the compiled library is missing: it rained$"


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(
    "call",
    [stgp.grid_pool, stgp.token_norm, torch.ops.stgp.norm_pool, stgp.GridPoolStream().push],
    ids=["grid_pool", "token_norm", "op", "stream"],
)
def test_a_large_call_that_lacks_kernels_warns_once(call: object) -> None:
    with pytest.warns(RuntimeWarning, match=EXPECTED):
        call(LARGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(LARGE)
        stgp.temporal_grid(LARGE)


@pytest.mark.usefixtures("without_kernels")
def test_a_gradient_that_lacks_kernels_warns() -> None:
    x = LARGE.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = stgp.grid_pool(x)
    compiled._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=EXPECTED):
        y.sum().backward()


@pytest.mark.usefixtures("without_kernels")
def test_calls_that_kernels_would_not_have_taken_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stgp.grid_pool(LARGE.double())
        stgp.grid_pool(LARGE, backend="reference")
        stgp.grid_pool(LARGE[:4, :32])  # as small as the limit, but a view of more
        stgp.grid_pool(torch.empty(1 << 10, 27, 27, 896, device="meta"))
        torch.export.export(stgp.GridPool(), (LARGE,))
        with stgp.use_backend("reference"):
            stgp.grid_pool(LARGE)


@pytest.mark.usefixtures("without_kernels")
def test_a_compiled_call_warns_when_it_runs_and_not_when_it_is_traced() -> None:
    torch._dynamo.reset()
    pool = torch.compile(stgp.grid_pool, backend="eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match=EXPECTED) as found:
        pool(LARGE)
    assert len(found) == 1


@pytest.mark.needs("library")
def test_no_call_warns_where_there_is_a_library() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stgp.grid_pool(LARGE)


def test_a_call_on_a_gpu_lacks_the_kernels_that_the_library_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "unsupported_on_cuda", lambda x, plan: compiled.NO_CUDA_KERNELS)
    compiled._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"built without CUDA kernels, .* docs/building\.md"):
        compiled.warn_if_missing(LARGE, None)
    compiled._warn.cache_clear()


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.filterwarnings("default::RuntimeWarning")
@pytest.mark.parametrize("color", [False, True])
def test_commands_say_it_in_a_red_line(
    color: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if color else "NO_COLOR", "1")
    assert main(["bench", "--shape", "17x16x16x64", "--dtype", "float32"]) == 0
    line = "stgp bench: calls run on the reference, which is many times slower than the kernels: the compiled library"
    [said] = [each for each in capsys.readouterr().err.splitlines() if line in each]
    assert said.endswith("it rained\x1b[0m" if color else "it rained")
    assert said.startswith("\x1b[1;31m" if color else "stgp bench")


IMPORTED = """
import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; sys.path = %r + sys.path
import stgridpool_kernels
from stgridpool_kernels.cli.main import main
raise SystemExit(main(["demo", "--offline-tokens", "-o", sys.argv[1]]))
"""


def test_the_demo_runs_out_of_a_zip_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = importlib.resources.files(stgp)
    shutil.copytree(str(folder), tmp_path / "tree" / folder.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    archive = shutil.make_archive(str(tmp_path / "package"), "zip", tmp_path / "tree")
    command = [sys.executable, "-I", "-c", IMPORTED % [archive], str(tmp_path / "demo.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").exists()
    assert "16 packaged frames of bigbuckbunny.mp4" in done.stdout
    assert f"the compiled library is missing: libraries cannot be loaded out of {archive}: install" in done.stderr
