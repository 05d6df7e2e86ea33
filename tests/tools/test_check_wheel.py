"""tools/check_wheel.py refuses wheels that are wrong, here files that no build has made."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import check_wheel

ABOUT = "stgridpool_kernels-1.0.dist-info"
BUILT = {
    "stgridpool_kernels/__init__.py": "",
    "stgridpool_kernels/_C.cpython-311-x86_64-linux-gnu.so": "machine code",
    f"{ABOUT}/METADATA": "Name: stgridpool_kernels",
    f"{ABOUT}/WHEEL": "Tag: cp311-cp311-linux_x86_64",
    f"{ABOUT}/RECORD": "hashes",
}
REPAIRED = BUILT | {f"{ABOUT}/WHEEL": "Tag: cp311-cp311-manylinux_2_34_x86_64", f"{ABOUT}/RECORD": "other hashes"}

Make = Callable[..., Path]


@pytest.fixture
def wheel(tmp_path: Path) -> Make:
    """Return a function that writes a wheel of these files for a platform."""

    def make(platform: str, files: dict[str, str]) -> Path:
        path = tmp_path / f"stgridpool_kernels-1.0-cp311-cp311-{platform}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path

    return make


@pytest.mark.parametrize("platform", ["manylinux_2_34_x86_64", "manylinux_2_27_x86_64.manylinux_2_28_x86_64"])
def test_a_repaired_wheel_differs_in_its_names_of_platforms(platform: str, wheel: Make) -> None:
    check_wheel.check_repaired(wheel(platform, REPAIRED), wheel("linux_x86_64", BUILT))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stgridpool_kernels/_C.cpython-311-x86_64-linux-gnu.so": "with an rpath"}, "_C.cpython"),
        ({"stgridpool_kernels.libs/libtorch_cpu-1234.so": "torch"}, "libs/libtorch_cpu-1234.so"),
        ({f"{ABOUT}/METADATA": "Name: another"}, "METADATA"),
    ],
)
def test_a_repaired_wheel_that_differs_in_anything_else_is_refused(
    changes: dict[str, str], named: str, wheel: Make
) -> None:
    with pytest.raises(SystemExit, match=rf"differs from .*-linux_x86_64\.whl in \S*{named}\S*$"):
        check_wheel.check_repaired(wheel("manylinux_2_34_x86_64", REPAIRED | changes), wheel("linux_x86_64", BUILT))


def test_a_repaired_wheel_that_promises_no_system_is_refused(wheel: Make) -> None:
    with pytest.raises(SystemExit, match=r"has no platform that an index takes$"):
        check_wheel.check_repaired(wheel("linux_aarch64", REPAIRED), wheel("linux_x86_64", BUILT))


def test_a_wheel_without_a_library_is_known_by_its_name() -> None:
    assert check_wheel.is_pure(Path("dist/stgridpool_kernels-1.0-py3-none-any.whl"))
    assert not check_wheel.is_pure(Path("dist/stgridpool_kernels-1.0-cp311-cp311-linux_x86_64.whl"))


READELF = {
    "-h": "Machine: Advanced Micro Devices X86-64",
    "-d": "(NEEDED) Shared library: [libtorch_cpu.so]\n(NEEDED) Shared library: [libc.so.6]",
    "-V": "Name: GLIBC_2.14 Name: GLIBC_2.32 Name: GLIBCXX_3.4.29 Name: CXXABI_1.3.11",
}
LIBRARY = Path("_C.cpython-311-x86_64-linux-gnu.so")


@pytest.mark.parametrize(
    ("platforms", "changes", "refused"),
    [
        ("linux_x86_64", {}, None),
        ("manylinux_2_34_x86_64", {}, None),
        ("manylinux_2_32_x86_64.manylinux_2_34_x86_64", {}, None),
        ("manylinux_2_28_x86_64", {}, r"promises an older glibc than 2\.32$"),
        ("manylinux_2_28_x86_64.manylinux_2_34_x86_64", {}, r"promises an older glibc than 2\.32$"),
        ("manylinux_2_34_aarch64", {}, "is not of manylinux_2_34_aarch64$"),
        ("linux_x86_64", {"-d": f"{READELF['-d']}\n(RUNPATH) [$ORIGIN]"}, "looks for libraries in a folder of its own"),
        (
            "linux_x86_64",
            {"-d": f"{READELF['-d']}\n(NEEDED) [libc10-1a2b.so]"},
            r"needs .*libc10-1a2b\.so",
        ),
    ],
)
def test_what_a_library_may_need(
    platforms: str, changes: dict[str, str], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = READELF | changes
    monkeypatch.setattr(check_wheel, "run", lambda program, wide, option, library: shown[option])
    if refused is None:
        check_wheel.check_library(LIBRARY, ["cp311", "cp311", platforms])
    else:
        with pytest.raises(SystemExit, match=refused):
            check_wheel.check_library(LIBRARY, ["cp311", "cp311", platforms])
