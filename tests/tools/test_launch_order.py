"""The order of accesses in the fused CUDA kernels, whose launches may overlap, in PTX that nvcc writes without a GPU.

A kernel may start before the launch before it has ended. Until it waits for that launch it may neither write to scratch
nor read thumbnails, and every block waits before it ends: the next kernel relies on all before it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")
from tests.support.cuda_emulation import KERNELS
from tools.machine_code import search_tool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(search_tool("nvcc") is None, reason="no compiler: nvcc is not in PATH or CUDA_HOME"),
]

WAIT = "griddepcontrol.wait"
NARROW = re.compile(r"ld\.global\.[usb]32\b")
"""A load of a word of the tables, which no kernel writes. Kernels of 16-bit tokens have no other load of 32 bits."""
STREAMED = re.compile(r"(ld|st)\.global\.cs\.")
"""An access to x or to out. Those to thumbnails are marked to stay in the cache, that is, not marked."""
GLOBAL = re.compile(r"\b(ld|st|atom|red)\.(global|volatile|relaxed|acquire)\S*")


def compiled(folder: Path, arch: int, old: str = "", new: str = "") -> dict[str, str]:
    """Return the PTX of the kernels of fused.cu by their mangled names. In the sources, `old` is replaced by `new`."""
    (folder / "csrc" / "cuda").mkdir(parents=True)
    for file in (*KERNELS.glob("*"), *KERNELS.parent.glob("*.h")):
        text = file.read_text(encoding="utf-8")
        (folder / "csrc" / file.relative_to(KERNELS.parent)).write_text(text.replace(old, new) if old else text)
    ptx = folder / "fused.ptx"
    nvcc = search_tool("nvcc")
    assert nvcc is not None
    command = [nvcc, "-std=c++17", "-O3", "-ptx", f"-arch=sm_{arch}", "-o", ptx, folder / "csrc" / "cuda" / "fused.cu"]
    subprocess.run(command, check=True, capture_output=True)
    _, *entries = ptx.read_text(encoding="utf-8").split(".entry ")
    return {entry.partition("(")[0]: entry for entry in entries}


def of_16_bits(kernels: dict[str, str]) -> dict[str, str]:
    """Return the kernels of bfloat16 tokens with vector access for p = 2 over all channels."""
    return {name: body for name, body in kernels.items() if "bfloat16" in name and "LNS0_6AccessE0ELb1E" in name}


def faults(body: str) -> Iterator[str]:
    """Yield what is wrong on some path through a kernel, from its entry to its end."""
    lines = [line.strip() for line in body.splitlines()]
    labels = {line.rstrip(":"): number for number, line in enumerate(lines) if line.endswith(":")}
    todo, seen = [0], set()
    while todo:
        number = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        line = lines[number]
        if WAIT in line:
            continue  # what follows is in order
        if re.search(r"\bret;", line):
            yield "a block ends without waiting"
            continue
        if (access := GLOBAL.search(line)) and not NARROW.search(line) and not STREAMED.search(line):
            yield f"{access[0]} before the wait"
        branch = re.search(r"\bbra(?:\.uni)?\s+(\S+);", line)
        if branch:
            todo.append(labels[branch[1]])
        if not branch or line.startswith("@"):
            todo.append(number + 1)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return compiled(tmp_path_factory.mktemp("ptx"), 90)


def test_kernels_wait_before_they_touch_scratch_and_before_they_end(kernels: dict[str, str]) -> None:
    found = of_16_bits(kernels)
    assert len(found) == 5  # frames and levels, with and without a halo, and windows alone
    for name, body in found.items():
        assert list(faults(body)) == [], name
    for name, body in kernels.items():
        assert "a block ends without waiting" not in faults(body), name
        assert "griddepcontrol.launch_dependents" in body, name


WAIT_OF_WALKS = "wait_for_launch_before();  // its thumbnails"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("  wait_for_launch_before();\n  }\n}", "  }\n}", "a block ends without waiting"),
        (WAIT_OF_WALKS, f"if (first >= stop) return; {WAIT_OF_WALKS}", "a block ends without waiting"),
        (WAIT_OF_WALKS, "//", "st.global.v4.u32 before the wait"),
    ],
    ids=["windows", "a walk without cells", "scratch"],
)
def test_a_wrong_order_is_seen(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert any(old in file.read_text() for file in KERNELS.glob("*.cu*"))
    found = of_16_bits(compiled(tmp_path, 90, old, new))
    assert any(fault in faults(body) for body in found.values())


def test_nothing_waits_where_launches_do_not_overlap(tmp_path: Path) -> None:
    assert all("griddepcontrol" not in body for body in compiled(tmp_path, 80).values())
