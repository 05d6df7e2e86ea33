"""The folder for the package `kernels` holds what it needs, and computes the same beside the installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stgridpool_kernels.backends.missing import PACKAGE, RECORD
from tests.support.kernel_copy import CALLS
from tools import hf_kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the package in a folder that the command wrote."""
    out = tmp_path_factory.mktemp("kernel")
    done = subprocess.run(
        [sys.executable, "-m", "tools.hf_kernel", out], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith(f"ops: torch.ops.{metadata(out / hf_kernel.VARIANT)['id']}\n")
    assert (out / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    return out / hf_kernel.VARIANT


def metadata(folder: Path) -> dict[str, object]:
    return json.loads((folder / "metadata.json").read_text())


def run(code: str, *arguments: object) -> str:
    """Run Python code in a process of its own, in the checkout, and return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_are_those_of_the_package_but_for_the_line_of_the_namespace(copy: Path) -> None:
    found = {file.relative_to(copy).as_posix(): file.read_text() for file in copy.rglob("*") if file.is_file()}
    added = {name: found.pop(name) for name in ("metadata.json", RECORD)}
    assert added[RECORD] == hf_kernel.LEFT_OUT
    differ = {name for name, text in found.items() if text != (hf_kernel.PACKAGE / name).read_text()}
    assert differ == {"namespace.py"}
    was = hf_kernel.NAMESPACE.replace("stgp", str(metadata(copy)["id"]))
    assert found["namespace.py"] == (hf_kernel.PACKAGE / "namespace.py").read_text().replace(hf_kernel.NAMESPACE, was)


def test_files_are_those_that_the_package_imports(copy: Path) -> None:
    found = {file.relative_to(copy).as_posix() for file in copy.rglob("*.py")}
    assert {"__init__.py", "ops.py", "stream.py", "dtensor.py", "backends/triton_kernels/fused.py"} <= found
    assert {name for name in found if name.startswith(("cli/", "integrations/", "io/"))} == {
        "io/__init__.py",
        "io/writing.py",  # which save_tables writes with
    }
    assert "__main__.py" not in found


IMPORTED = """
import importlib.util, sys
import torch, torch.distributed.tensor
before = {name.split(".")[0] for name in sys.modules}
folder, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
importlib.import_module(f"{name}.dtensor")
print(*{name.split(".")[0] for name in sys.modules} - before - sys.stdlib_module_names)
"""


def test_importing_the_copy_imports_no_other_package(copy: Path) -> None:
    assert run(IMPORTED, copy, metadata(copy)["id"]).split() == [metadata(copy)["id"]]


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.needs("interpreter"))])
def test_copy_and_package_compute_the_same_bits_in_one_process(backend: str, copy: Path) -> None:
    code = "from tests.support.kernel_copy import main; main()"
    compared = run(code, copy, metadata(copy)["id"], backend).splitlines()
    for name in CALLS:
        assert f"{name}, torch.bfloat16" in compared
    assert {"gradient of published, torch.bfloat16", "module", "flat", "stream", "compiled"} <= {*compared}


TWICE = """
import sys, torch
from pathlib import Path
from tests.support.kernel_copy import load
folder, name = sys.argv[1:]
copy = load(Path(folder), name)
x = torch.randn(16, 4, 4, 8)
assert getattr(torch.ops, name).grid_pool(x).shape == torch.ops.stgp.grid_pool(x).shape
print(copy.available_backends()[-1], copy.backends.compiled.missing_library())
try:
    load(Path(folder), "another_name")
except ImportError as error:
    print(error)
"""


def test_a_copy_has_ops_of_its_own_no_library_and_is_loaded_once(copy: Path) -> None:
    backend, refused = run(TWICE, copy, metadata(copy)["id"]).splitlines()
    reason = hf_kernel.LEFT_OUT.strip()
    assert backend == f"reference the compiled library is missing: the build left it out: {reason}"
    assert refused.startswith("stgridpool_kernels is already loaded in this process")


# ---- what is written, and what is refused ----


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return shutil.copytree(
        hf_kernel.PACKAGE, tmp_path / "tree" / hf_kernel.PACKAGE.name, ignore=shutil.ignore_patterns("*.so")
    )


def test_the_id_follows_from_the_files(package: Path, tmp_path: Path) -> None:
    first, again = (hf_kernel.write(tmp_path / name, package) for name in ("first", "again"))
    assert first == again
    (package / "version.py").write_text('__version__ = "3.1.4"\n')
    second = hf_kernel.write(tmp_path / "second", package)
    assert second != first
    for name, identifier, version in (("first", first, 0), ("second", second, 3)):
        variant = tmp_path / name / hf_kernel.VARIANT
        assert metadata(variant)["id"] == identifier
        assert metadata(variant)["version"] == version
        assert f'NAMESPACE = "{identifier}"\n' in (variant / "namespace.py").read_text()
    (package / "cli" / "main.py").write_text("import numpy\n")  # which no copy holds
    assert hf_kernel.write(tmp_path / "third", package) == second


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("import numpy as np", "numpy"),
        ("    from rich.table import Table", "rich"),
        ("import stgridpool_kernels", PACKAGE),
    ],
)
def test_a_module_that_needs_another_package_is_refused(line: str, named: str, package: Path, tmp_path: Path) -> None:
    file = package / "backends" / "triton_kernels" / "config.py"
    file.write_text(f"{file.read_text()}\n\ndef late():\n    pass\n{line}\n")
    with pytest.raises(SystemExit, match=rf"config\.py imports {named}, which a kernel cannot count on$"):
        hf_kernel.write(tmp_path / "out", package)
    assert not (tmp_path / "out").exists()


def test_a_package_without_the_line_of_the_namespace_is_refused(package: Path, tmp_path: Path) -> None:
    (package / "namespace.py").write_text('NAMESPACE = "other"\nOPS = None\n')
    with pytest.raises(SystemExit, match=r'namespace\.py has not the line NAMESPACE = "stgp" once$'):
        hf_kernel.write(tmp_path / "out", package)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"is not empty$"):
        hf_kernel.write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
