"""The compiled probe reads and writes every byte that it counts, and says why it is missing where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import probe
from benchmarks.probe import Probe, cache_folder

needs_compiler = pytest.mark.needs("compiler")


def words(*shape: int, share: float) -> Tensor:
    """Return random words of 64 bits with a share of the bits set, so few that or-ing them leaves zeros."""
    bits = np.random.default_rng(0).random((*shape, 64)) < share
    return torch.from_numpy(np.packbits(bits, axis=-1).view(np.int64).squeeze(-1)).clone()  # whole cache lines


@needs_compiler
@pytest.mark.usefixtures("caches")
def test_every_byte_is_moved_and_nothing_else() -> None:
    """Windows that the edge cuts are combined too, and parts of cache lines are refused."""
    probe = Probe()
    for size, pooled, threads in (((4, 6), (2, 3), 1), ((5, 7), (2, 3), 2), ((5, 7), (3, 4), 2), ((1, 1), (1, 1), 1)):
        x, out = words(3, *size, 24, share=0.2), torch.full((3, *pooled, 24), -1)
        probe.pool(x, out, threads)
        expected = np.zeros(out.shape, dtype=np.int64)
        for r, c in np.ndindex(min(size[0], 2 * pooled[0]), min(size[1], 2 * pooled[1])):
            expected[:, r // 2, c // 2] |= x.numpy()[:, r, c]
        np.testing.assert_array_equal(out.numpy(), expected)
    for lines in (1, 3, 1024 * 3 + 5):
        x = words(lines * 8, share=0.1 / lines)
        assert probe.read(x, 2) == np.bitwise_or.reduce(x.numpy().view(np.uint64))
        for place in (0, lines * 4, -1):
            marked = torch.zeros_like(x)
            marked[place] = 1 << 40
            assert probe.read(marked, 2) == 1 << 40
    x = words(2, 4, 4, 8, share=0.2)
    with pytest.raises(ValueError, match="whole cache lines"):
        probe.pool(x[..., :7].contiguous(), torch.empty(2, 2, 2, 7, dtype=x.dtype), 1)
    with pytest.raises(ValueError, match="whole cache lines"):
        probe.read(x.flatten()[1:9], 1)
    with pytest.raises(ValueError, match="contiguous"):
        probe.pool(x.transpose(1, 2), torch.empty(2, 2, 2, 8, dtype=x.dtype), 1)


def test_it_is_compiled_once_for_a_compiler_and_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = []

    def compiles(compiler: list[str], library: Path) -> None:
        library.parent.mkdir(exist_ok=True)
        library.write_bytes(b"no library")
        compiled.append((tuple(compiler), library))

    monkeypatch.setattr(probe, "_compile", compiles)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, cpu in (("a", "one"), ("a", "one"), ("a -b", "one"), ("a", "another")):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(probe, "cpu_name", lambda name=cpu: name)  # -march=native follows it
        with pytest.raises(RuntimeError, match=r"^ceiling\.cpp: "):  # what is there is loaded
            Probe()
    assert [compiler for compiler, _ in compiled] == [("a",), ("a", "-b"), ("a",)]
    assert {library for _, library in compiled} == {*cache_folder().iterdir()}


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("sh -c 'echo unknown option >&2; exit 1'", r"^ceiling\.cpp does not compile: unknown option"),
        ("no-such-compiler -m64", r"^ceiling\.cpp: .*no-such-compiler"),
        ("", r"^no C\+\+ compiler"),
    ],
    ids=["fails", "missing", "none"],
)
def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, reason: str) -> None:
    """The reason is one line, and no file is left of an attempt to compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=reason):
        Probe()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
