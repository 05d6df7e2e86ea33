"""Makes an environment of pinned versions, and checks that it holds these and no others.

    python -m tools.environment build/with_sglang tests/with_sglang/requirements.txt [--torch "torch==…"]

A list names packages, one a line. `-r FILE` adds another list, and a line wins over an added one of the same package. A
name without a version has the version of requirements.txt at the root of the tree, so that no version is written twice.
`# incomplete: NAME …` names packages of whose requirements the list holds only what is used.

Packages are installed with --no-deps, but for torch, since there are builds of it for many devices. It comes first,
with what it asks for, in the versions of the list. Afterwards everything that a package requires must be installed in a
fitting version, and nothing may be installed that is not in the list. Exceptions are the parts of CUDA, which a torch
for CUDA chooses, and pip, which comes with Python. A list that names Triton has its own, whichever the torch for CUDA
asks for, since one for the CPU asks for none.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "requirements.txt"
UNLISTED = re.compile(r"pip|stgridpool-kernels|triton|(nvidia|cuda)-.*")
"""Names of what may be installed without being listed."""
CHOSEN_BY_TORCH = ("torch", "triton", "setuptools")
"""Packages that are not held to the list while torch is installed: another torch may ask for another version."""

Pins = dict[str, list[str]]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(listed: Path) -> Pins:
    """Return the lines of a list, with versions and markers, by the canonical name of their package."""
    own, added = _lines(listed)
    main = own if listed == MAIN else _lines(MAIN)[0]
    pins: Pins = {}
    for more in added:
        pins |= read_pins(more)
    for name, lines in own.items():
        if all("==" not in line for line in lines):
            if name not in main:
                raise SystemExit(f"{listed} must give a version for {lines[0]}, which requirements.txt does not have")
            lines = main[name]
        pins[name] = lines
    return pins


def distributions() -> Iterable[metadata.Distribution]:
    """Return what is installed in the environment of this Python.

    The folder that it was started in is not looked at: a build leaves the package's metadata in a checkout.
    """
    return metadata.distributions(path=sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")}))


def incomplete(listed: Path) -> set[str]:
    """Return the canonical names of packages of whose requirements a list holds only some."""
    found = re.findall(r"^# incomplete: (.*)$", listed.read_text(), re.MULTILINE)
    names = {canonical(name) for line in found for name in line.split()}
    return names.union(*(incomplete(more) for more in _lines(listed)[1]))


def faults(pins: Pins, exempt: Iterable[str], installed: Iterable[metadata.Distribution], torch: str = "") -> list[str]:
    """Return what keeps an environment from being complete and pinned, as sentences; nothing if it is.

    exempt: names of packages whose requirements are not asked for. torch: the requirement that chose torch, if it is
    not the one of the list; its own requirements are not asked for then.
    """
    from packaging.requirements import Requirement  # not there in the Python that makes an environment

    versions, requirements = {}, {}
    for distribution in installed:
        name = canonical(distribution.metadata["Name"])
        versions.setdefault(name, distribution.version)  # the first on the path is the one that is imported
        requirements.setdefault(name, [Requirement(text) for text in distribution.requires or ()])
    lines = [Requirement(line) for lines in pins.values() for line in lines]
    wanted = {canonical(line.name): line for line in lines if line.marker is None or line.marker.evaluate()}
    if torch and Requirement(torch) != wanted.get("torch"):
        wanted["torch"] = Requirement(torch)
        exempt = {*exempt, "torch"}

    def fits(requirement: Requirement) -> bool:
        version = versions.get(canonical(requirement.name))
        return version is not None and requirement.specifier.contains(version, prereleases=True)

    found = [f"{line} is listed, got {versions.get(name)}" for name, line in wanted.items() if not fits(line)]
    for name, asked in requirements.items():
        if name not in wanted and not UNLISTED.fullmatch(name):
            found.append(f"{name} {versions[name]} is not listed")
        for requirement in asked if name not in exempt else ():
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            own_triton = name == "torch" and requirement.name == "triton" and "triton" in wanted
            if needed and not own_triton and not fits(requirement):
                found.append(
                    f"{name} {versions[name]} needs {requirement}, got {versions.get(canonical(requirement.name))}"
                )
    return found


def make(folder: Path, listed: Path, torch: str | None = None) -> None:
    """Make an environment in `folder`, emptying it first. Raises SystemExit if a step fails or it is not complete.

    torch: a requirement for pip in place of the one in the list.
    """
    pins = read_pins(listed)
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    lists = {"pins.txt": pins.keys() - {"torch"}, "constraints.txt": pins.keys() - set(CHOSEN_BY_TORCH)}
    for file, names in lists.items():
        (folder / file).write_text("".join(f"{line}\n" for name in sorted(names) for line in pins[name]))
    pip = (str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if chosen := torch or " ".join(pins.get("torch", [])):
        _run(*pip, "--constraint", folder / "constraints.txt", chosen)
    _run(*pip, "--no-deps", "--requirement", folder / "pins.txt")
    _run(folder / "bin/python", "-m", "tools.environment", "--check", folder, listed, "--torch", chosen)


def _lines(listed: Path) -> tuple[Pins, list[Path]]:
    """Return the lines of a list by package, without those of the lists that it adds, and these lists."""
    own: Pins = {}
    added = []
    for line in listed.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            added.append((listed.parent / text[3:].strip()).resolve())
        elif text:
            own.setdefault(canonical(re.split(r"[=;\[ ]", text)[0]), []).append(text)
    return own, added


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = subprocess.run(words, cwd=ROOT, env=environment).returncode
    if code:
        raise SystemExit(f"failed with {code}: {' '.join(words)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("listed", type=Path, metavar="LIST")
    parser.add_argument("--torch", default="", help="what pip installs as torch (default: the version of the list)")
    parser.add_argument("--check", action="store_true", help="check the environment of this Python, make none")
    args = parser.parse_args()
    listed = args.listed.resolve()
    if not args.check:
        make(args.folder.absolute(), listed, args.torch or None)
    elif found := faults(read_pins(listed), incomplete(listed), distributions(), args.torch):
        sys.exit("\n".join([f"{args.folder} is not what {args.listed} says:", *found]))


if __name__ == "__main__":
    main()
