"""Makes a folder that Hugging Face's package `kernels` loads: this package without its compiled library and commands.

    python -m tools.hf_kernel build/hf_kernel

It holds the files that the package itself imports, as they are, the reference and the Triton kernels among them. These
import each other relatively, and besides nothing but Python's own modules, torch and triton. One line of one file
differs: the namespace of the ops is that of the copy, so that copies and the installed package work side by side in one
process. docs/integrations/hf_kernels.md says how to load it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "stgridpool_kernels"
NAME = "stgridpool-kernels"
VARIANT = Path("build/torch-universal")
"""Folder that `kernels` looks for, of a kernel in Python that is not of one GPU."""
OTHERS = {"torch", "triton", *sys.stdlib_module_names}
"""Names of the modules that a kernel may import besides its own."""
NAMESPACE = 'NAMESPACE = "stgp"\n'
"""The line of namespace.py that a copy has another one for."""
LEFT_OUT = "copies for the package kernels come without it; the installed package stgridpool_kernels can have it\n"
"""Text that the copy shows as the reason why it has no compiled library."""


def imported(file: Path) -> tuple[set[Path], set[str]]:
    """Return the files that a file imports relatively, inside functions too, and the names of the other modules."""
    files: set[Path] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            module = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for path in (module, *(module / alias.name for alias in node.names)):
                files |= set(filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py")))
    return files, others


def selected(package: Path) -> list[Path]:
    """Return the files that importing the package needs, at once or later. Raises SystemExit if it needs more."""
    found: set[Path] = set()
    wanted = [package / "__init__.py"]
    while wanted:
        file = wanted.pop()
        if file not in found:
            found.add(file)
            files, others = imported(file)
            if strange := others - OTHERS:
                raise SystemExit(f"{file} imports {', '.join(sorted(strange))}, which a kernel cannot count on")
            # Python runs the first file of every folder above a module before it.
            wanted += [above / "__init__.py" for path in files for above in path.parents if package in above.parents]
            wanted += files
    return sorted(found)


def write(out: Path, package: Path = PACKAGE) -> str:
    """Write the folder, which must be empty or missing; return the id of the copy, which names its ops too.

    The id follows from the files, so that copies that differ have different ones. Raises SystemExit if the folder holds
    something, or if a file needs what a kernel cannot have.
    """
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    texts = {file.relative_to(package): file.read_text(encoding="utf-8") for file in selected(package)}
    namespace = Path("namespace.py")
    if texts[namespace].count(NAMESPACE) != 1:
        raise SystemExit(f"{package / namespace} has not the line {NAMESPACE.strip()} once")
    build = hashlib.sha256(repr(sorted((str(path), text) for path, text in texts.items())).encode()).hexdigest()[:12]
    identifier = f"_{NAME.replace('-', '_')}_{build}"
    texts[namespace] = texts[namespace].replace(NAMESPACE, f'NAMESPACE = "{identifier}"\n')
    texts[Path("left_out.txt")] = LEFT_OUT
    texts[Path("metadata.json")] = json.dumps(metadata(identifier, texts[Path("version.py")]), indent=2) + "\n"
    for path, text in texts.items():
        file = out / VARIANT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", out)
    return identifier


def metadata(identifier: str, version: str) -> dict[str, object]:
    """Return what `kernels` 0.17 reads about a kernel. version: text of version.py, whose first number is given."""
    [major] = re.findall(r'__version__ = "(\d+)', version)
    return {
        "name": NAME,
        "id": identifier,
        "version": int(major),
        "license": "Apache-2.0",
        "kernels-minver": "0.17.0",
        "python-depends": [],
        # There is none for all devices, and `kernels` compares it with nothing where no architectures are named.
        "backend": {"type": "cpu"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder, empty or missing")
    out = parser.parse_args().out
    identifier = write(out)
    files = [file for file in out.rglob("*") if file.is_file()]
    print(f"{out}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e3:.0f} kB")
    print(f"ops: torch.ops.{identifier}")


if __name__ == "__main__":
    main()
