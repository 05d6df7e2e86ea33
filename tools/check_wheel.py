"""Checks a wheel as a user would meet it: what it holds, what it needs, and that it works where there is no compiler.

    python -m tools.check_wheel dist/*.whl [--torch "torch==…"]

It holds the package of this tree and no more. Its library finds torch by name alone, and needs no newer system than the
name of the wheel says. Then the wheel is installed into a fresh environment, with the pinned versions, where no
compiler is on PATH; there `stgp info` and the suite of the backend `cpu` run on the installed package.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import zipfile
from pathlib import Path

from tests.support.wheels import COMPILERS, ROOT, compiled_library, copy_tests, environment, run, run_backend_tests
from tools.environment import make

NEEDED = re.compile(r"libtorch_cpu|libtorch_cuda|libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+")
"""Matches what a library may need: torch, and what a manylinux wheel may expect of a system."""


def check_content(wheel: Path, pure: bool) -> None:
    """Raise SystemExit unless the wheel holds the files of this tree's package, and what wheels hold besides."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    package = ROOT / "stgridpool_kernels"
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".npz", ".md", ".typed", ".cpp")]
    expected = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}
    name, version = wheel.name.split("-")[:2]
    about = f"{name}-{version}.dist-info"
    expected[f"{about}/licenses/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    made = {f"{about}/{file}" for file in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    if pure:
        made.add("stgridpool_kernels/left_out.txt")
    else:
        made |= {file for file in held if re.fullmatch(r"stgridpool_kernels/_C\..*so", file)}
    print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB:")
    for file, content in sorted(held.items()):
        print(f"  {len(content):9,} {file}")
    for text, found in (
        ("does not belong", held.keys() - expected.keys() - made),
        ("is missing", (expected.keys() | made) - held.keys()),
        ("is not what the tree holds", {file for file in expected if held.get(file, expected[file]) != expected[file]}),
    ):
        if found:
            raise SystemExit(f"in {wheel.name} {text}: {', '.join(sorted(found))}")


def check_library(library: Path, tags: list[str]) -> None:
    """Raise SystemExit unless the library runs where `tags`, of Python, ABI and platform, say that it does."""
    python, _, platform = tags
    header, dynamic, versions = (run("readelf", "--wide", option, library) for option in ("-h", "-d", "-V"))
    if f".{python.replace('cp', 'cpython-')}-" not in library.name:
        raise SystemExit(f"{library.name} is not of {python}")
    machine = {"x86_64": "X86-64", "aarch64": "AArch64"}[re.sub(r"^(manylinux_\d+_\d+|linux)_", "", platform)]
    if machine not in header:
        raise SystemExit(f"{library.name} is not of {platform}")
    if "RPATH" in dynamic or "RUNPATH" in dynamic:
        raise SystemExit(f"{library.name} looks for libraries in a folder of its own: {dynamic}")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    strange = [name for name in needed if not re.fullmatch(rf"(?:{NEEDED.pattern})\.so[.\d]*", name)]
    if strange or "libtorch_cpu.so" not in needed:
        raise SystemExit(f"{library.name} needs {', '.join(needed)}")
    newest = {
        name: max(tuple(map(int, found.split("."))) for found in re.findall(rf"\b{name}_([\d.]+)", versions))
        for name in ("GLIBC", "GLIBCXX", "CXXABI")
    }
    print(f"{library.name}: no rpath, needs {', '.join(needed)}")
    print(f"  of {', '.join(f'{name} {dotted(version)}' for name, version in newest.items())}; platform tag {platform}")
    promised = re.match(r"manylinux_(\d+)_(\d+)_", platform)
    if promised and newest["GLIBC"] > (int(promised[1]), int(promised[2])):
        raise SystemExit(f"{platform} promises an older glibc than {dotted(newest['GLIBC'])}")


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def check_installed(wheel: Path, torch: str, pure: bool) -> None:
    """Raise SystemExit unless the wheel works in a fresh environment without a compiler."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        suite = ROOT / "tools/requirements/suite.txt"
        make(folder / "fresh", suite, torch)
        python = folder / "fresh/bin/python"
        env = environment(PATH=str(python.parent), **dict.fromkeys(COMPILERS))
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index")
        run(*pip, wheel, env=env)  # what it requires is there already
        copy_tests(folder)
        where = "from stgridpool_kernels.backends import compiled; print(compiled.__file__, compiled.LIBRARY)"
        imported, library = run(python, "-c", where, cwd=folder, env=env).strip().split(" ", 1)
        if not imported.startswith(str(folder / "fresh")) or (library == "None") != pure:
            raise SystemExit(f"{imported} was imported, with the library {library}")
        info = run(python.with_name("stgp"), "info", cwd=folder, env={**env, "COLUMNS": "120"})
        print(f"installed beside {torch}, without a compiler:\n{info}")
        if pure != ("missing: the build left it out" in info):
            raise SystemExit("stgp info does not say whether the compiled library is there")
        print(f"tests of the backend cpu: {'none' if pure else run_backend_tests(python, folder, env)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path)
    pinned = re.search(r"^torch==.*$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    parser.add_argument("--torch", default=pinned[0], help=f"what is installed beside it (default: {pinned[0]})")
    args = parser.parse_args()
    tags = args.wheel.stem.split("-")[2:]
    pure = tags == ["py3", "none", "any"]
    check_content(args.wheel, pure)
    with tempfile.TemporaryDirectory() as folder:
        if not pure:
            check_library(compiled_library(args.wheel, Path(folder)), tags)
    check_installed(args.wheel.absolute(), args.torch, pure)


if __name__ == "__main__":
    main()
