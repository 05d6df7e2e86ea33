"""setup.py decides whether the compiled library is built, and says why not. Nothing is built here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools
import torch
from setuptools.config import pyprojecttoml

import stgridpool_kernels
from stgridpool_kernels.backends import compiled, missing

ROOT = Path(__file__).parents[1]
NO_EXT = (
    "STGP_NO_EXT=1 was set, as it is for the wheel py3-none-any; install from source without it, on Linux beside torch "
    "and a C++20 compiler"
)
"""Reason of a build with STGP_NO_EXT=1, which those read too who got the wheel from somebody else."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return setup.py as a module, which calls setup() only as a program."""
    spec = importlib.util.spec_from_file_location("stgridpool_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder on PATH, which has a compiler `c++` that accepts everything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "STGP_NO_EXT", "CMAKE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    program(folder / "c++", "exit 0")
    return folder


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def torch_in(folder: Path, version: str) -> Path:
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__all__ = ['__version__']\n{version}\ncuda = None\n")
    return package


def test_library_is_built_where_there_are_torch_and_a_compiler(script: ModuleType) -> None:
    assert script.find_torch() == Path(torch.__file__).parent
    assert script.why_left_out() is None


@pytest.mark.parametrize(("value", "left_out"), [("1", True), ("0", False), ("", False)])
def test_no_ext(value: str, left_out: bool, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STGP_NO_EXT", value)
    assert script.why_left_out() == (NO_EXT if left_out else None)


def test_another_system(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert script.why_left_out() == "they are built on Linux only, and this is darwin"


def test_no_torch(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    assert script.find_torch() is None
    assert script.why_left_out() == "it saw no torch; install again with torch there, by uv with --no-build-isolation"


def test_torch_is_found_in_the_environment_that_an_isolated_build_is_for(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = torch_in(tmp_path, "__version__ = '2.10.0'")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    assert script.find_torch() == package
    assert script.why_left_out() is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("__version__ = '2.10.0a0+git1234'", None),
        ('__version__ = "2.14.1+cu130"', None),
        ("__version__ = '3.0.0'", None),
        ("__version__ = '2.9.1+cpu'", "they need torch 2.10 or newer, found 2.9.1+cpu in"),
        ("__version__ = '1.13.1'", "they need torch 2.10 or newer, found 1.13.1 in"),
        ("__version__ = git_version", "they need torch 2.10 or newer, found an unknown version in"),
    ],
)
def test_version_of_torch(
    line: str, reason: str | None, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = torch_in(tmp_path, line)
    monkeypatch.setattr(script, "find_torch", lambda: package)
    assert script.why_left_out() == (reason and f"{reason} {package}")


def test_no_compiler(script: ModuleType, compilers: Path) -> None:
    (compilers / "c++").unlink()
    assert script.why_left_out() == "no C++ compiler (c++, g++ or clang++ on PATH, or CXX)"
    program(compilers / "clang++", "exit 0")
    assert script.why_left_out() is None


def test_compiler_that_is_named_and_missing(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++-99 -m64")
    assert script.why_left_out() == "no C++ compiler g++-99 -m64"


def test_compiler_of_an_older_standard(script: ModuleType, compilers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(compilers / "g++-7", "exit 1")
    monkeypatch.setenv("CXX", "g++-7")
    assert script.why_left_out() == "g++-7 compiles no C++20"


def test_compiler_gets_its_own_options_and_the_standard(
    script: ModuleType, compilers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(compilers / "g++-14", f'echo "$@" > {compilers}/given')
    monkeypatch.setenv("CXX", "g++-14 -m64")
    assert script.why_left_out() is None
    assert (compilers / "given").read_text().startswith("-m64 -std=c++20 ")


# ---- the build itself, up to what it runs ----

LIBRARY = setuptools.Extension("stgridpool_kernels._C", sources=[])


@pytest.fixture
def build(script: ModuleType, tmp_path: Path) -> setuptools.Command:
    """Return the command that compiles; its results go to tmp_path."""
    command = script.CMakeBuild(setuptools.Distribution({"ext_modules": [LIBRARY]}))
    command.ensure_finalized()
    command.build_lib = str(tmp_path / "lib")
    return command


def test_builds_that_differ_have_folders_of_their_own(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = script.build_folder()
    assert script.build_folder() == usual
    found = {usual}
    for name, value in (("CXX", "clang++"), ("CMAKE_ARGS", "-DSTGP_CUDA=OFF"), ("CUDA_HOME", "/cuda")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            found.add(script.build_folder())
    monkeypatch.setattr(script, "find_torch", lambda: None)
    found.add(script.build_folder())
    assert len(found) == 5
    assert {folder.parent for folder in found} == {ROOT / "build"}


def test_missing_build_tools_are_named(
    build: setuptools.Command, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"takes cmake ninja pybind11: pip install cmake ninja pybind11$"):
        build.build_extension(LIBRARY)


@pytest.fixture
def steps(script: ModuleType, compilers: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list of the commands of a build; instead of running them, all but configuring fail."""
    ran: list[list[str]] = []

    def run(command: list[object], **options: object) -> SimpleNamespace:
        ran.append([str(word) for word in command])
        return SimpleNamespace(returncode=0 if len(ran) == 1 else 1)

    for tool in ("cmake", "ninja"):
        program(compilers / tool, "exit 1")
    monkeypatch.setattr(script, "find_spec", lambda name: None if name == "cmake" else SimpleNamespace())
    monkeypatch.setattr(script.subprocess, "check_output", lambda command, **options: "/pybind11\n")
    monkeypatch.setattr(script.subprocess, "run", run)
    return ran


def test_options_of_cmake_and_those_of_the_user_after_them(
    build: setuptools.Command, steps: list[list[str]], compilers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DSTGP_CUDA=OFF '-DCMAKE_CXX_FLAGS=-g -O1'")
    with pytest.raises(SystemExit):
        build.build_extension(LIBRARY)
    configure = steps[0]
    assert configure[:3] == [str(compilers / "cmake"), "-G", "Ninja"]
    assert configure[configure.index("-S") + 1] == str(ROOT)
    assert f"-DCMAKE_MAKE_PROGRAM={compilers / 'ninja'}" in configure
    assert f"-DCMAKE_INSTALL_PREFIX={Path(build.build_lib).resolve() / 'stgridpool_kernels'}" in configure
    assert f"-DSTGP_TORCH={Path(torch.__file__).parent}" in configure
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure
    assert "-Dpybind11_DIR=/pybind11" in configure
    assert configure[-2:] == ["-DSTGP_CUDA=OFF", "-DCMAKE_CXX_FLAGS=-g -O1"]


def test_a_build_that_fails_stops_and_says_how_to_do_without(build: setuptools.Command, steps: list[list[str]]) -> None:
    with pytest.raises(SystemExit, match="its kernels do not compile, see above; STGP_NO_EXT=1 leaves them out"):
        build.build_extension(LIBRARY)
    assert ["--build" in step for step in steps] == [False, True]


@pytest.mark.parametrize("editable", [False, True])
def test_the_reason_is_written_into_the_package_and_removed_by_a_build_with_kernels(
    editable: bool, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(script, "ROOT", tmp_path / "source")
    (tmp_path / "source" / "stgridpool_kernels").mkdir(parents=True)
    place = tmp_path / ("source" if editable else "lib") / missing.PACKAGE / missing.RECORD

    def build(**settings: object) -> setuptools.Command:
        package = {"packages": [missing.PACKAGE], "script_name": "setup.py"}
        command = script.RecordingBuild(setuptools.Distribution(package | settings))
        command.ensure_finalized()
        command.build_lib, command.editable_mode = str(tmp_path / "lib"), editable
        command.run()
        return command

    monkeypatch.setenv("STGP_NO_EXT", "1")
    command = build()
    assert place.read_text() == f"{NO_EXT}\n"
    linked = str(tmp_path / "lib" / missing.PACKAGE / missing.RECORD)
    assert command.get_output_mapping()[linked] == f"{missing.PACKAGE}/{missing.RECORD}"
    assert linked not in build(ext_modules=[LIBRARY]).get_output_mapping()
    assert not place.exists()


# ---- what was built ----


def test_every_folder_of_the_package_is_installed() -> None:
    """A list of packages in pyproject.toml can leave out a folder, which a checkout does not show and a wheel does."""
    # The readme, which only setup.py gives, is missing here.
    settings = pyprojecttoml.read_configuration(ROOT / "pyproject.toml", ignore_option_errors=True)
    found = settings["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "stgridpool_kernels").rglob("*.py")}
    assert set(found) == {".".join(folder.parts) for folder in folders}


@pytest.mark.needs("library")
def test_build_info() -> None:
    info = compiled.LIBRARY.build_info()
    assert info["version"] == stgridpool_kernels.__version__
    assert info["stable ABI"] == "torch 2.10"
    assert compiled.LIBRARY.cpu_capability() in info["cpu capabilities"].split(", ")
    assert bool(info["cuda"]) == bool(info["cuda architectures"])
