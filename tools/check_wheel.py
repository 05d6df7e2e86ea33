"""Checks wheels as a user would meet them: what they hold, what they need, and that they work without a compiler.

    python -m tools.check_wheel dist/*.whl [--repaired build/wheel/*.whl] [--torch "torch==…"]

A wheel holds the package of this tree and no more. Its library finds torch by name alone, and needs no newer system
than the name of the wheel says. Of a wheel that auditwheel has repaired, nothing else than its name has changed. Then
each wheel is installed into a fresh environment, with the pinned versions, where no compiler is on PATH; there
`stgp info` and the suite of the backend `cpu` run on the installed package, that of the `reference` for a wheel without
a library.
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

MACHINES = {"x86_64": "X86-64", "aarch64": "AArch64"}
"""Names of machines in those of platforms, and as readelf shows them."""

NAMING = re.compile(r"\.dist-info/(WHEEL|RECORD)$")
"""Matches the files of a wheel that hold the platforms of its name, or hashes of files that do."""

WITHOUT_LIBRARY = "STGP_NO_EXT=1 was set, as it is for the wheel py3-none-any; install from source without it"
"""Text that `stgp info` shows where a wheel without a library is installed."""


def files_of(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel by their names."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def check_content(wheel: Path, pure: bool) -> None:
    """Raise SystemExit unless the wheel holds the files of this tree's package, and what wheels hold besides."""
    held = files_of(wheel)
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


def check_repaired(wheel: Path, built: Path) -> None:
    """Raise SystemExit unless the wheel is what was built, library and all, under a name that promises systems."""
    found, expected = ({n: c for n, c in files_of(one).items() if not NAMING.search(n)} for one in (wheel, built))
    if differ := {name for name, _ in found.items() ^ expected.items()}:
        raise SystemExit(f"{wheel.name} differs from {built.name} in {', '.join(sorted(differ))}")
    if "-manylinux_" not in wheel.name:
        raise SystemExit(f"{wheel.name} has no platform that an index takes")
    print(f"{wheel.name}: every file, the library too, is that of {built.name}, but for its names of platforms")


def check_library(library: Path, tags: list[str]) -> None:
    """Raise SystemExit unless the library runs where `tags`, of Python, ABI and platforms, say that it does."""
    python, _, platforms = tags  # auditwheel may name several platforms that do not differ to it
    header, dynamic, versions = (run("readelf", "--wide", option, library) for option in ("-h", "-d", "-V"))
    if f".{python.replace('cp', 'cpython-')}-" not in library.name:
        raise SystemExit(f"{library.name} is not of {python}")
    [machine] = [machine for name, machine in MACHINES.items() if platforms.endswith(f"_{name}")]
    if machine not in header:
        raise SystemExit(f"{library.name} is not of {platforms}")
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
    print(f"  of {', '.join(f'{name} {dotted(version)}' for name, version in newest.items())}; platform {platforms}")
    promised = [tuple(map(int, version)) for version in re.findall(r"manylinux_(\d+)_(\d+)_", platforms)]
    if newest["GLIBC"] > min(promised, default=newest["GLIBC"]):
        raise SystemExit(f"{platforms} promises an older glibc than {dotted(newest['GLIBC'])}")


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def check_installed(wheels: list[Path], torch: str) -> None:
    """Raise SystemExit unless each wheel works in a fresh environment without a compiler."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        make(folder / "fresh", ROOT / "tools/requirements/suite.txt", torch)
        copy_tests(folder)
        python = folder / "fresh/bin/python"
        env = environment(PATH=str(python.parent), **dict.fromkeys(COMPILERS))
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--force-reinstall")
        for wheel in wheels:
            run(*pip, "--no-index", "--no-deps", wheel, env=env)  # what it requires is there already
            print(f"{wheel.name}, installed beside {torch}, without a compiler:")
            check_environment(python, is_pure(wheel), env, folder)


def check_environment(python: Path, pure: bool, env: dict[str, str], folder: Path) -> None:
    """Raise SystemExit unless the installed package works. folder: that of the tests, and of the environment."""
    where = "from stgridpool_kernels.backends import compiled; print(compiled.__file__, compiled.LIBRARY)"
    imported, library = run(python, "-c", where, cwd=folder, env=env).strip().split(" ", 1)
    if not imported.startswith(str(folder / "fresh")) or (library == "None") != pure:
        raise SystemExit(f"{imported} was imported, with the library {library}")
    info = run(python.with_name("stgp"), "info", cwd=folder, env={**env, "COLUMNS": "300"})
    print(info)
    if pure != (WITHOUT_LIBRARY in info):
        raise SystemExit("stgp info does not say whether the compiled library is there")
    backend = "reference" if pure else "cpu"
    print(f"tests of the backend {backend}: {run_backend_tests(python, folder, env, backend)}")


def is_pure(wheel: Path) -> bool:
    """Return whether the name of a wheel says that it has no library."""
    return wheel.name.endswith("-py3-none-any.whl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--repaired", type=Path, metavar="WHEEL", help="what auditwheel made the compiled one of")
    pinned = re.search(r"^torch==.*$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    parser.add_argument("--torch", default=pinned[0], help=f"what is installed beside it (default: {pinned[0]})")
    args = parser.parse_args()
    for wheel in args.wheels:
        check_content(wheel, is_pure(wheel))
        if not is_pure(wheel):
            with tempfile.TemporaryDirectory() as folder:
                check_library(compiled_library(wheel, Path(folder)), wheel.stem.split("-")[2:])
            if args.repaired is not None:
                check_repaired(wheel, args.repaired)
    check_installed([wheel.absolute() for wheel in args.wheels], args.torch)


if __name__ == "__main__":
    main()
