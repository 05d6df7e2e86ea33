"""Lists of packages have a version for each, are complete, and an environment that differs from its list is noticed."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from tools import bounds, environment
from tools.environment import canonical, faults, incomplete, read_pins

ROOT = Path(__file__).parents[2]
LISTS = [
    ROOT / "requirements.txt",
    *sorted(ROOT.glob("tests/with_*/requirements.txt")),
    *sorted(ROOT.glob("tools/requirements/*.txt")),
]


def installed(**versions: tuple[str, list[str]]) -> list[Any]:
    """Return distributions by name, each with its version and its requirements."""
    return [
        SimpleNamespace(metadata={"Name": name}, version=version, requires=requires)
        for name, (version, requires) in versions.items()
    ]


def written(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("listed", LISTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_package_of_a_list_has_one_version(listed: Path) -> None:
    for lines in read_pins(listed).values():
        assert all("==" in line for line in lines)
        assert len(lines) == 1 or sorted(line.partition(";")[2].strip() for line in lines) == [
            'python_version < "3.11"',
            'python_version >= "3.11"',
        ]


def test_the_main_list_holds_all_that_its_packages_ask_for() -> None:
    """Requirements are known of the packages that are installed here in the version of the list."""
    pins = read_pins(environment.MAIN)
    lines = [line for lines in pins.values() for line in lines if applies(line)]
    exact = {(canonical(name), version) for name, version in map(parts, lines)}
    here = [
        one
        for one in metadata.distributions()
        if (canonical(one.name), one.version) in exact or canonical(one.name).startswith(("nvidia-", "cuda-"))
    ]  # the parts of CUDA are those that a torch for CUDA asks for
    listed = installed(**{name: (version, []) for name, version in exact})
    assert len(here) > 5
    assert faults(pins, incomplete(environment.MAIN), [*here, *listed]) == []


def applies(line: str) -> bool:
    marker = Requirement(line).marker
    return marker is None or marker.evaluate()


def parts(line: str) -> tuple[str, str]:
    """Return name and version of `name==version; marker`."""
    name, version = line.partition(";")[0].strip().split("==")
    return name, version


def test_a_name_alone_has_the_version_of_the_main_list_and_own_lines_win(tmp_path: Path) -> None:
    main = read_pins(environment.MAIN)
    (tmp_path / "more.txt").write_text("rich==1.0\nNumPy\nmsgpack==0.1\n")
    pins = read_pins(written(tmp_path, "# a comment\n-r more.txt\nrich  # as ever\nmsgpack==0.2\nPy_YAML==7\n"))
    assert pins == {
        "rich": main["rich"],
        "numpy": main["numpy"],
        "msgpack": ["msgpack==0.2"],
        "py-yaml": ["Py_YAML==7"],
    }
    with pytest.raises(SystemExit, match=r"list\.txt must give a version for no_such_package"):
        read_pins(written(tmp_path, "no_such_package\n"))


def test_the_incomplete_packages_of_added_lists_count_too(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("# incomplete: One_A two\n")
    assert incomplete(written(tmp_path, "-r more.txt\n# incomplete: three\n")) == {"one-a", "two", "three"}


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ({"torch": ("2.13.0+cpu", ["Jinja2", "nothing; extra == 'more'"]), "jinja2": ("3.1", [])}, []),
        ({"torch": ("2.13.0", [])}, ["jinja2==3.1 is listed, got None"]),
        ({"torch": ("2.13.0", []), "Jinja2": ("3.2", [])}, ["jinja2==3.1 is listed, got 3.2"]),
        (
            {"torch": ("2.13.0", ["sympy>1", "jinja2>3.1"]), "jinja2": ("3.1", [])},
            ["torch 2.13.0 needs sympy>1, got None", "torch 2.13.0 needs jinja2>3.1, got 3.1"],
        ),
        ({"torch": ("2.13.0", []), "jinja2": ("3.1", []), "sympy": ("1.14", [])}, ["sympy 1.14 is not listed"]),
        (
            {
                "torch": ("2.13.0", []),
                "jinja2": ("3.1", []),
                "pip": ("1", []),
                "nvidia_cublas": ("1", []),
                "triton": ("3", []),
            },
            [],
        ),
    ],
)
def test_what_differs_is_said(there: dict[str, tuple[str, list[str]]], found: list[str]) -> None:
    pins = {"torch": ["torch==2.13.0"], "jinja2": ["jinja2==3.1"], "tomli": ['tomli==2; python_version < "3.0"']}
    assert faults(pins, [], installed(**there)) == found


def test_another_torch_chooses_for_itself() -> None:
    pins = {"torch": ["torch==2.13.0"], "setuptools": ["setuptools==84"]}
    there = installed(torch=("2.11.0", ["setuptools<82", "triton==3.6"]), setuptools=("84", []))
    assert faults(pins, [], there, "torch==2.11.0") == []
    assert faults(pins, [], there, "torch==2.12.0") == ["torch==2.12.0 is listed, got 2.11.0"]
    assert len(faults(pins, [], there, "torch==2.13.0")) == 3


def test_a_list_with_triton_has_its_own_beside_a_torch_for_cuda() -> None:
    """Packages of the index are built for CUDA, and each of their versions asks for one version of Triton."""
    there = installed(torch=("2.13.0", ["triton==3.7.1"]), triton=("3.9.0", []))
    pins = {"torch": ["torch==2.13.0"]}
    [fault] = faults(pins, [], there, "torch==2.13.0")
    assert fault == "torch 2.13.0 needs triton==3.7.1, got 3.9.0"
    pins["triton"] = ["triton==3.9.0"]
    assert faults(pins, [], there, "torch==2.13.0") == []
    assert faults(pins, [], installed(torch=("2.13.0", []), triton=("3.7.1", []))) == [
        "triton==3.9.0 is listed, got 3.7.1"
    ]


def test_requirements_of_incomplete_packages_are_not_asked_for() -> None:
    pins = {"engine": ["engine==1"]}
    there = installed(engine=("1", ["a", "b>2"]))
    assert faults(pins, ["engine"], there) == []
    assert len(faults(pins, [], there)) == 2


# ---- the bounds of pyproject.toml ----


def test_every_lower_bound_is_a_requirement_of_one_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    printed = {}
    for arguments in ([], ["--oldest"], ["bench"], ["--oldest", "bench"]):
        monkeypatch.setattr(sys, "argv", ["bounds", *arguments])
        bounds.main()
        printed[tuple(arguments)] = [Requirement(line) for line in capsys.readouterr().out.splitlines()]
    for extras in ((), ("bench",)):
        newest, oldest = printed[extras], printed[("--oldest", *extras)]
        assert [one.name for one in newest] == [one.name for one in oldest]
        for allowed, lowest in zip(newest, oldest, strict=True):
            [bound] = lowest.specifier
            assert bound.operator == "=="
            assert f">={bound.version}" in str(allowed.specifier)
            assert allowed.extras == lowest.extras
    assert {"torch", "numpy", "cmake", "pytest", "matplotlib", "ray"} <= {one.name for one in printed[()]}
    assert {one.name for one in printed[("bench",)]} == {"matplotlib", "transformers"}


def test_metadata_in_the_folder_of_a_checkout_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange.egg-info").mkdir()
    (tmp_path / "strange.egg-info" / "PKG-INFO").write_text("Name: strange\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert metadata.version("strange") == "1"
    names = {one.name for one in environment.distributions()}
    assert "pytest" in names
    assert "strange" not in names
