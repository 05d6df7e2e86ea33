"""Files of tokens: every format holds what was written, nothing damaged or hostile is read, nothing is half written."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stgridpool_kernels.io import inputs, writing
from stgridpool_kernels.io.inputs import load_input
from stgridpool_kernels.io.token_files import (
    SUFFIXES,
    TokenFileError,
    check_dtype,
    read_tokens,
    stream_safetensors,
    write_tokens,
)
from stgridpool_kernels.io.writing import atomic_write, refuse_existing, remove_leftovers

DTYPES = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """For comparing NaNs, infinities and signed zeros too."""
    return x.contiguous().view(BITS[x.element_size()])


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def npy(shape: tuple[int, ...], descr: str = "<f4", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def npz(member: bytes, name: str = "a.npy") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, member)
    return file.getvalue()


def encrypted(archive: bytes) -> bytes:
    """The archive with its first member marked as encrypted."""
    changed = bytearray(archive)
    changed[6] |= 1
    changed[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def safetensors(header: dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def pt(value: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def one_tensor(dtype: str, shape: list[int], size: int) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


class Evil:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("unpickled",)


# ---- round trips ----


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES), dtype=st.sampled_from(DTYPES))
def test_a_written_tensor_is_read_back_bit_for_bit(data: st.DataObject, suffix: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and suffix in (".npy", ".npz"):
        return
    batch = data.draw(st.sampled_from([(), (1,), (2,)]))
    shape = (*batch, *data.draw(st.tuples(st.integers(0, 3), *[st.integers(1, 3)] * 3)))
    size = int(np.prod(shape)) * dtype.itemsize
    x = torch.frombuffer(bytearray(data.draw(st.binary(min_size=size, max_size=size)) or b"\0" * 8), dtype=dtype)
    x = x[: int(np.prod(shape))].reshape(shape)
    order = data.draw(st.permutations(range(3)))
    x = x.permute(*range(len(batch) + 1), *[len(batch) + 1 + axis for axis in order])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{suffix}")
        write_tokens(path, x, force=False)
        found = read_tokens(path)
        assert found.dtype == dtype
        assert found.shape == x.shape
        assert torch.equal(bits(found), bits(x))
        assert os.listdir(folder) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_tokens(path, tokens(1000, 2, 2, 8)[3:4], force=False)
    assert path.stat().st_size < 8000
    assert torch.equal(read_tokens(path), tokens(1000, 2, 2, 8)[3:4])


def test_a_tensor_that_requires_grad_is_written(tmp_path: Path) -> None:
    x = tokens(1, 2, 2, 2).requires_grad_()
    for suffix in SUFFIXES:
        write_tokens(tmp_path / f"x{suffix}", x, force=False)
        assert torch.equal(read_tokens(tmp_path / f"x{suffix}"), x.detach())


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_numpy_formats_refuse_bfloat16_and_name_what_can_hold_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(TokenFileError, match=r"cannot hold bfloat16: write \.pt or \.safetensors"):
        write_tokens(path, tokens(1, 1, 1, 1).bfloat16(), force=False)
    assert not path.exists()


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for call in (
        lambda path: check_dtype(path, torch.float32),
        lambda path: write_tokens(path, tokens(1, 1, 1, 1), force=True),
        read_tokens,
    ):
        with pytest.raises(TokenFileError, match=r"x\.bin: token files end in \.npy, \.npz, \.pt, \.safetensors"):
            call(tmp_path / "x.bin")


def test_upper_case_suffixes_are_known(tmp_path: Path) -> None:
    write_tokens(tmp_path / "X.NPY", tokens(1, 2, 3, 4), force=False)
    assert torch.equal(read_tokens(tmp_path / "X.NPY"), tokens(1, 2, 3, 4))


def test_arrays_of_another_byte_or_axis_order_are_read(tmp_path: Path) -> None:
    x = tokens(2, 3, 4, 5)
    np.save(tmp_path / "big.npy", x.numpy().astype(">f4"))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(x.numpy()))
    assert torch.equal(read_tokens(tmp_path / "big.npy"), x)
    assert torch.equal(read_tokens(tmp_path / "fortran.npy"), x)


# ---- which tensor ----


def write_several(path: Path) -> None:
    a, b = tokens(1, 2, 2, 2), tokens(2, 2, 2, 2)
    match path.suffix:
        case ".npz":
            np.savez(path, a=a.numpy(), b=b.numpy())
        case ".pt":
            torch.save({"a": a, "b": b, "note": "not a tensor"}, path)
        case ".safetensors":
            import safetensors.torch

            safetensors.torch.save_file({"a": a, "b": b}, path)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_of_several_tensors_the_key_chooses(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_several(path)
    assert torch.equal(read_tokens(path, "b"), tokens(2, 2, 2, 2))
    with pytest.raises(TokenFileError, match=rf"x\{suffix}: holds several tensors; choose one with --key: a, b$"):
        read_tokens(path)
    with pytest.raises(TokenFileError, match=r"holds no tensor 'c'; it has a, b$"):
        read_tokens(path, "c")


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_a_key_for_a_tensor_without_a_name_is_an_error(tmp_path: Path, suffix: str) -> None:
    write_tokens(tmp_path / f"x{suffix}", tokens(1, 1, 1, 1), force=False)
    with pytest.raises(TokenFileError, match=r"has no name, so --key a cannot choose it"):
        read_tokens(tmp_path / f"x{suffix}", "a")


# ---- files that are refused ----

ONE = [1, 1, 1, 1]
HUGE = (10**5, 10**4, 10**3, 10)
FLOATS = np.zeros(ONE, np.float32)
UNREAD = r"cannot be read \(\w+: .+\); allowed: "
REFUSED = {
    "npy: empty": (".npy", b"", "the file is empty"),
    "npy: other format": (".npy", b"hello, world", UNREAD + "an array of floats, as numpy.save writes it"),
    "npy: huge shape": (".npy", npy(HUGE), UNREAD),
    "npy: shape beyond int64": (".npy", npy((10**9,) * 4), UNREAD),
    "npy: negative shape": (".npy", npy((-1, -1, 1, 1), data=b"1234"), UNREAD),
    "npy: header longer than the file": (".npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff", UNREAD),
    "npy: large header": (".npy", b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70000, UNREAD),
    "npy: two arrays": (
        ".npy",
        2 * npy((1, 1, 1, 1), data=b"1234"),
        "more follows its array; stgp pool --stream reads",
    ),
    "npy: rank 0": (".npy", npy((), data=b"1234"), r"\(B, T, H, W, C\) or \(T, H, W, C\), got \(\)"),
    "npy: rank 3": (".npy", npy((1, 1, 1), data=b"1234"), r"\(T, H, W, C\), got \(1, 1, 1\)"),
    "npy: rank 6": (".npy", npy((1,) * 6, data=b"1234"), "got .1, 1, 1, 1, 1, 1"),
    "npy: no channel": (".npy", npy((1, 1, 1, 0)), "at least 1, got shape"),
    "npy: integers": (".npy", npy((1, 1, 1, 1), "<i4", b"1234"), "float32 or float64, got int32"),
    "npy: complex": (".npy", npy((1, 1, 1, 1), "<c8", b"12345678"), "got complex64"),
    "npy: long double": (".npy", npy((1, 1, 1, 1), "<f16", b"1" * 16), "got float128"),
    "npy: bare bytes": (".npy", npy((1, 1, 1, 1), "|V2", b"12"), r"bfloat16\? use .pt or .safetensors"),
    "npy: objects": (".npy", npy((1, 1, 1, 1), "|O", b"1234"), "Object arrays cannot be loaded.*allowed: an array of"),
    "npz: empty": (".npz", b"", "the file is empty"),
    "npz: other format": (".npz", b"hello, world", "not a zip archive, or cut short.*allowed: arrays of floats"),
    "npz: one array": (".npz", npy((1, 1, 1, 1), data=b"1234"), "not a zip archive"),
    "npz: no member": (".npz", b"PK\x05\x06" + bytes(18), "holds no tensor"),
    "npz: no array": (".npz", npz(b"text", "notes.txt"), "float32 or float64, got bytes32"),
    "npz: password": (".npz", encrypted(npz(npy((1, 1, 1, 1), data=b"1234"))), UNREAD),
    "npz: member cut short": (".npz", npz(npy((1, 1, 1, 2), data=b"1234")), UNREAD),
    "npz: huge shape": (".npz", npz(npy(HUGE)), UNREAD),
    "npz: integers": (".npz", npz(npy((1, 1, 1, 1), "<i4", b"1234")), "got int32"),
    "npz: objects": (".npz", npz(npy((1, 1, 1, 1), "|O", b"1234")), "Object arrays cannot be loaded"),
    "npz: rank 2": (".npz", npz(npy((1, 1), data=b"1234")), r"got \(1, 1\)"),
    "pt: empty": (".pt", b"", "the file is empty"),
    "pt: other format": (".pt", b"hello, world", UNREAD + "a tensor or a dict of tensors, as torch.save writes them"),
    "pt: an array": (".pt", npy((1, 1, 1, 1), data=b"1234"), "not a pickle of tensors, or damaged; allowed: a"),
    "pt: legacy, cut short": (".pt", pt(torch.zeros(ONE), _use_new_zipfile_serialization=False)[:-3], UNREAD),
    "pt: code": (".pt", pt(Evil()), rf"refused: needs unpickling of {os.name}.mkdir"),
    "pt: legacy code": (".pt", pt(Evil(), _use_new_zipfile_serialization=False), "refused: needs unpickling of"),
    "pt: module": (".pt", pt(torch.nn.Linear(1, 1)), "needs unpickling of torch.nn.modules.linear.Linear"),
    "pt: list": (".pt", pt([tokens(1, 1, 1, 1)]), "holds a list; allowed: a tensor or a dict of tensors"),
    "pt: no tensor": (".pt", pt({"a": 1}), "holds no tensor"),
    "pt: integers": (".pt", pt(torch.zeros(ONE, dtype=torch.int64)), "got int64"),
    "pt: float8": (".pt", pt(torch.zeros(ONE).to(torch.float8_e4m3fn)), "got float8_e4m3fn"),
    "pt: rank 3": (".pt", pt(torch.zeros(1, 1, 1)), r"got \(1, 1, 1\)"),
    "pt: sparse": (".pt", pt(torch.zeros(ONE).to_sparse()), "its tensor is sparse; allowed: one whose elements"),
    "pt: meta": (".pt", pt(torch.zeros(ONE, device="meta")), "its tensor is meta"),
    "pt: expanded": (".pt", pt(torch.zeros(1).expand(HUGE)), "its tensor is expanded"),
    "st: empty": (".safetensors", b"", "the file is empty"),
    "st: too short": (".safetensors", b"1234", UNREAD + "tensors, as safetensors.torch.save_file writes them"),
    "st: no json": (".safetensors", struct.pack("<Q", 5) + b"hello", UNREAD),
    "st: huge header length": (".safetensors", safetensors({}, length=2**60), UNREAD),
    "st: header longer than the file": (".safetensors", safetensors({}, length=10**6), UNREAD),
    "st: huge shape": (".safetensors", safetensors(one_tensor("F32", [*HUGE], 4)), UNREAD),
    "st: more than the file": (
        ".safetensors",
        safetensors(one_tensor("F32", [1, 1, 1, 10**9], 4 * 10**9), b"1234"),
        UNREAD,
    ),
    "st: no tensor": (".safetensors", safetensors({}), "holds no tensor"),
    "st: integers": (".safetensors", safetensors(one_tensor("I32", ONE, 4), b"1234"), "got int32"),
    "st: complex": (".safetensors", safetensors(one_tensor("C64", ONE, 8), b"12345678"), "got complex64"),
    "st: rank 3": (".safetensors", safetensors(one_tensor("F32", [1, 1, 1], 4), b"1234"), r"got \(1, 1, 1\)"),
}


@pytest.mark.parametrize(("suffix", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_file_is_refused_in_one_line_with_its_name_cause_and_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match=message) as caught:
        read_tokens(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 400
    assert "weights_only" not in line  # nor other advice to read it all the same
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of quantized and nested tensors and their storages
def test_quantized_and_nested_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(torch.quantize_per_tensor(torch.zeros(ONE), 1, 0, torch.qint8), tmp_path / "quantized.pt")
    torch.save(torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]), tmp_path / "nested.pt")
    for kind in ("quantized", "nested"):
        with pytest.raises(TokenFileError, match=f"{kind}.pt: its tensor is {kind}; allowed: "):
            read_tokens(tmp_path / f"{kind}.pt")


@pytest.mark.parametrize(
    "error", [MemoryError(), OverflowError("too large\nby far"), RuntimeError("a. b. c")], ids=repr
)
def test_errors_of_any_kind_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(np.lib.format, "read_array", fail)
    np.save(tmp_path / "x.npy", FLOATS)
    cause = {MemoryError: "", OverflowError: "too large", RuntimeError: "a. b"}[type(error)]
    expected = f"x.npy: cannot be read ({type(error).__name__}: {cause}); allowed: an array of floats, as numpy.save "
    with pytest.raises(TokenFileError) as caught:
        read_tokens(tmp_path / "x.npy")
    assert expected in str(caught.value)
    assert caught.value.__cause__ is error


def test_legacy_and_compressed_files_are_read(tmp_path: Path) -> None:
    x = tokens(2, 3, 4, 5)
    torch.save(x, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    np.savez_compressed(tmp_path / "x.npz", x.numpy())
    assert torch.equal(read_tokens(tmp_path / "x.pt"), x)
    assert torch.equal(read_tokens(tmp_path / "x.npz"), x)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tokens_do_not_change_with_the_file(tmp_path: Path, suffix: str) -> None:
    path, x = tmp_path / f"x{suffix}", tokens(4, 3, 4, 5)
    write_tokens(path, x, force=False)
    found = [read_tokens(path)]
    if suffix == ".safetensors":
        found.append(torch.cat(list(stream_safetensors(path, 3))))
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(read, x) for read in found)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_tokens(path, tokens(1, 2, 2, 2), force=False)
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(TokenFileError):
            read_tokens(path)


def content_of(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder, f"x{suffix}"), tokens(1, 2, 2, 2), force=False)
        return Path(folder, f"x{suffix}").read_bytes()


WHOLE = {suffix: content_of(suffix) for suffix in SUFFIXES}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=300, deadline=None)
@given(
    suffix=st.sampled_from(SUFFIXES),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_bytes_give_tokens_or_a_clear_error(suffix: str, changes: list[tuple[float, int]]) -> None:
    content = bytearray(WHOLE[suffix])
    for place, value in changes:
        content[int(place * len(content))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{suffix}")
        path.write_bytes(content)
        try:
            found = read_tokens(path)
        except TokenFileError:  # and no other kind
            return
    assert found.dim() in (4, 5)
    assert found.dtype in DTYPES


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npy: no such file"):
        read_tokens(tmp_path / "none.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(TokenFileError, match=r"folder\.npy: a folder, give a file"):
        read_tokens(tmp_path / "folder.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(TokenFileError, match=r"pipe\.npy: not a regular file"):
        read_tokens(tmp_path / "pipe.npy")


# ---- writing all or nothing ----


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with atomic_write(path, force=False) as file:
        file.write(b"whole")
        assert not path.exists()
        assert [entry.parent for entry in tmp_path.iterdir()] == [tmp_path]
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, ValueError])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    path = tmp_path / "x.bin"
    if existing:
        path.write_bytes(b"before")
    with pytest.raises(error), atomic_write(path, force=True) as file:  # noqa: PT012
        file.write(b"half")
        file.flush()
        raise error
    assert os.listdir(tmp_path) == (["x.bin"] if existing else [])
    assert not existing or path.read_bytes() == b"before"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tokens_whose_write_fails_leave_nothing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_tokens(tmp_path / f"x{suffix}", tokens(1, 1, 1, 1), force=False)
    assert caught.value.filename == str(tmp_path / f"x{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tokens(tmp_path / "x.npy", tokens(1, 1, 1, 1), force=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.npy").stat().st_mode) == 0o666 & ~umask


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"before")
    with pytest.raises(FileExistsError, match=r"x\.npy: exists already; .* --force"):
        write_tokens(path, tokens(1, 1, 1, 1), force=False)
    assert path.read_bytes() == b"before"
    write_tokens(path, tokens(1, 1, 1, 1), force=True)
    assert torch.equal(read_tokens(path), tokens(1, 1, 1, 1))
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(writing.os, "link", no_link)
    path = tmp_path / "x.bin"
    appeared = pytest.raises(FileExistsError, match="appeared while it was being made")
    with appeared, atomic_write(path, force=False) as file:
        file.write(b"ours")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["x.bin"]


def no_link(source: Path, target: Path) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.os, "link", no_link)
    with atomic_write(tmp_path / "x.bin", force=False) as file:
        file.write(b"whole")
    assert (tmp_path / "x.bin").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_leftovers_of_a_killed_process_are_removed_once_the_file_is_there(tmp_path: Path) -> None:
    path, other = tmp_path / "x.bin", tmp_path / ".y.bin.0123.tmp"
    other.touch()
    writer = atomic_write(path, force=False)
    writer.__enter__().write(b"killed here")
    [leftover] = set(tmp_path.iterdir()) - {other}
    remove_leftovers(path)
    assert leftover.exists()
    path.write_bytes(b"whole")
    remove_leftovers(path)
    assert set(tmp_path.iterdir()) == {path, other}


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.bin").write_bytes(b"before")
    link = tmp_path / "link.bin"
    link.symlink_to(Path("there", "x.bin"))
    with atomic_write(link, force=True) as file:
        file.write(b"after")
    assert link.is_symlink()
    assert (tmp_path / "there" / "x.bin").read_bytes() == b"after"


def test_what_cannot_be_a_new_file_is_refused_with_and_without_force(tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(IsADirectoryError, match="is a folder"):
            refuse_existing(tmp_path, force)
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            refuse_existing(tmp_path / "none" / "x.npy", force)
    refuse_existing(tmp_path / "x.npy", False)
    (tmp_path / "dangling.npy").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        refuse_existing(tmp_path / "dangling.npy", False)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file, is not overwritten"):
        refuse_existing(tmp_path / "pipe", True)


# ---- tokens of files and videos ----


def test_token_files_have_no_frames(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x.pt", tokens(2, 1, 2, 3, 4), force=False)
    found, frames = load_input(tmp_path / "x.pt", key=None, num_frames=1, grid=(1, 1), tap="post_ln")
    assert torch.equal(found, tokens(2, 1, 2, 3, 4))
    assert frames is None


def test_a_video_becomes_tokens_of_its_frames() -> None:
    from stgridpool_kernels.io.encoder import Encoder, find_sample_video
    from stgridpool_kernels.io.video import read_frames

    video = find_sample_video("carphone_pristine.mp4")
    encoder = Encoder("l11")
    seen: list[tuple[str, int, int]] = []
    found, frames = load_input(
        video, key=None, num_frames=5, grid=(2, 3), tap="l11", progress=lambda *step: seen.append(step)
    )
    assert frames is not None
    assert np.array_equal(frames, read_frames(video, 5, size=(28, 42)))
    assert found.shape == (5, 2, 3, 384)
    assert torch.equal(found, torch.from_numpy(encoder(frames)))
    assert [step for step in seen if step[0] == "decoding"] == [("decoding", done, 5) for done in range(1, 6)]
    assert seen[-1] == ("encoding", 5, 5)


def test_what_is_no_video_either_hears_of_token_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_encoder", lambda tap: None)
    for name, hint in (("x.pth", True), ("x.mp4", False)):
        (tmp_path / name).write_bytes(b"nothing that is a video")
        with pytest.raises(ValueError, match=name) as caught:
            load_input(tmp_path / name, key=None, num_frames=1, grid=(1, 1), tap="post_ln")
        assert ("token files end in .npy, .npz, .pt, .safetensors" in str(caught.value)) == hint
