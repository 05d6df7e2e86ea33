"""Prints the requirements of pyproject.toml for pip, all of them or those of the named extras.

    python -m tools.bounds [--oldest] [EXTRA …]

With --oldest each is the lowest version that is allowed: `numpy>=1.26` gives `numpy==1.26`. Without extras, these are
the requirements of the package, of its build and of the extras that its tests need: demo, test and ray.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def requirements(project: dict[str, Any], extras: list[str]) -> list[Requirement]:
    """Return the requirements of these extras, or of package, build and tests, without the package itself."""
    optional = project["project"]["optional-dependencies"]
    listed = [] if extras else [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in extras or ("demo", "test", "ray"):
        listed += optional[extra]
    parsed = [Requirement(text) for text in listed]
    return [one for one in parsed if one.name != project["project"]["name"]]


def lowest(requirement: Requirement) -> Requirement:
    """Return the requirement with nothing but its lower bound, as the only version."""
    [version] = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return Requirement(f"{requirement.name}{extras}=={version}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA")
    parser.add_argument("--oldest", action="store_true", help="the lower bounds alone")
    args = parser.parse_args()
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    found = requirements(toml.loads((ROOT / "pyproject.toml").read_text()), args.extras)
    print(*sorted({str(lowest(one) if args.oldest else one) for one in found}), sep="\n")


if __name__ == "__main__":
    main()
