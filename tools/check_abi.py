"""Proves that one build of the compiled library serves several versions of torch.

    python -m tools.check_abi BUILDER LOADER [LOADER ...]

Each is a Python executable, of one Python version, with numpy and a torch of its own; BUILDER needs setuptools, cmake,
ninja and pybind11 too. BUILDER builds a wheel. The same wheel is installed into a folder for each of them, where
`tests/support/compiled_results.py` checks that the ops are there and that golden values are reproduced. What the
library computes must be the same, bit by bit, under every torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from tests.support.wheels import ROOT, build_wheel, compiled_library, environment, run


def results(python: Path, wheel: Path, folder: Path) -> dict[str, Any]:
    """Return what tests/support/compiled_results.py prints of the wheel, installed for `python` alone."""
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--target", folder, wheel)
    path = os.pathsep.join((str(folder), str(ROOT)))
    program = ROOT / "tests" / "support" / "compiled_results.py"
    shown = run(python, program, cwd=folder, env=environment(PYTHONPATH=path))
    found: dict[str, Any] = json.loads(shown)
    if Path(found["library"]).parents[1] != folder:
        raise SystemExit(f"{python} loaded {found['library']}, not what was installed into {folder}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("builder", type=Path, help="Python that builds")
    parser.add_argument("loaders", type=Path, nargs="+", help="Pythons that load what it built")
    args = parser.parse_args()
    pythons = [python.absolute() for python in (args.builder, *args.loaders)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        wheel = build_wheel(pythons[0], folder)
        compiled_library(wheel, folder)
        found = [results(python, wheel, folder / f"installed-{i}") for i, python in enumerate(pythons)]

    built, *loaded = found
    info = built["build_info"]
    print(f"{wheel.name}, built {date.today()} by {info['compiler']} on {platform.platform()}")
    for each in found:
        print(f"  torch {each['torch']}: private ops on {', '.join(each['ops'])}")
        print(f"    build_info: torch {each['build_info']['torch']}, stable ABI {each['build_info']['stable ABI']}")
        print(
            f"    {each['golden']} golden cases reproduced, {len(each['digests'])} results with {each['capabilities']}"
        )
    if len({each["torch"] for each in found}) != len(found):
        raise SystemExit("the versions of torch must differ")
    for each in loaded:
        if each["sha256"] != built["sha256"] or each["build_info"] != info or info["torch"] != built["torch"]:
            raise SystemExit(f"torch {each['torch']} loaded another library")
        differ = [name for name, digest in built["digests"].items() if each["digests"].get(name) != digest]
        if differ or len(each["digests"]) != len(built["digests"]):
            raise SystemExit(f"torch {each['torch']} gives other results: {', '.join(differ)}")
    print(f"one library, {len(built['digests'])} results the same bit by bit under {len(found)} versions of torch")


if __name__ == "__main__":
    main()
