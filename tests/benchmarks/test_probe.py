"""The compiled probe: it reads and writes every byte that it counts, and it may be missing with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import probe
from benchmarks.probe import Probe, cache_folder

pytestmark = pytest.mark.usefixtures("caches")
needs_compiler = pytest.mark.needs("compiler")


def words(*shape: int) -> Tensor:
    """Random bits, few of which are set: or-ing them all together leaves zeros."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(0, 256, (*shape, 8), dtype=torch.uint8, generator=generator) for _ in range(20))
    few = next(draws)
    for draw in draws:
        few &= draw
    return few.view(torch.int64).squeeze(-1)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "pooled"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((5, 7), (3, 4)), ((1, 1), (1, 1))], ids=str
)
def test_windows_are_combined(size: tuple[int, int], pooled: tuple[int, int], threads: int) -> None:
    x, out = words(3, *size, 24), torch.full((3, *pooled, 24), -1)
    Probe().pool(x, out, threads)
    expected = np.zeros(out.shape, dtype=np.int64)
    for r in range(min(size[0], 2 * pooled[0])):
        for c in range(min(size[1], 2 * pooled[1])):
            expected[:, r // 2, c // 2] |= x.numpy()[:, r, c]
    np.testing.assert_array_equal(out.numpy(), expected)


@needs_compiler
@pytest.mark.parametrize("lines", [1, 3, 1024, 1024 * 3 + 5])
def test_everything_is_read(lines: int) -> None:
    probe, x = Probe(), words(lines * 8)
    assert probe.read(x, 2) == np.bitwise_or.reduce(x.numpy().view(np.uint64))
    for place in (0, lines * 4, -1):
        marked = torch.zeros_like(x)
        marked[place] = 1 << 40
        assert probe.read(marked, 2) == 1 << 40


@needs_compiler
def test_parts_of_lines_are_refused() -> None:
    probe, x = Probe(), words(2, 4, 4, 8)
    with pytest.raises(ValueError, match="whole cache lines"):
        probe.pool(x[..., :7].contiguous(), torch.empty(2, 2, 2, 7, dtype=x.dtype), 1)
    with pytest.raises(ValueError, match="whole cache lines"):
        probe.read(x.flatten()[1:9], 1)
    with pytest.raises(ValueError, match="contiguous"):
        probe.pool(x.transpose(1, 2), torch.empty(2, 2, 2, 8, dtype=x.dtype), 1)


# ---- compiling ----


@needs_compiler
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Probe()
    (library,) = cache_folder().iterdir()  # nothing that was made on the way is left
    assert library.name.startswith("ceiling-")
    with monkeypatch.context() as patch:
        patch.setattr(probe, "_compile", lambda *arguments: pytest.fail("compiled again"))
        Probe()
    monkeypatch.setattr(probe, "cpu_name", lambda: "another CPU")  # which -march=native is not the same for
    Probe()
    assert len(list(cache_folder().iterdir())) == 2


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        Probe()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("sh -c 'echo unknown option >&2; exit 1'", "does not compile: unknown option"),
        ("no-such-compiler -m64", "no-such-compiler"),
    ],
    ids=["fails", "missing"],
)
def test_a_compiler_of_no_use_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(RuntimeError, match=rf"^ceiling\.cpp.*{reason}"):
        Probe()
    assert list(cache_folder().iterdir()) == []
