"""Files of tokens hold what was written, are never half written, and are not read when they are damaged or hostile."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stgridpool_kernels.io import inputs, writing
from stgridpool_kernels.io.encoder import find_sample_video
from stgridpool_kernels.io.inputs import load_input, stream_input
from stgridpool_kernels.io.token_files import (
    SUFFIXES,
    TokenFileError,
    check_dtype,
    read_tokens,
    stream_safetensors,
    write_tokens,
)
from stgridpool_kernels.io.video import VideoError, read_frames
from stgridpool_kernels.io.writing import atomic_write, refuse_existing, remove_leftovers
from tests.support.cases import tokens
from tests.support.media import write_video
from tests.support.tolerance import assert_same_bits

DTYPES = (torch.float16, torch.float32, torch.float64, torch.bfloat16)


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
    """Return the archive with its first member marked as encrypted."""
    changed = bytearray(archive)
    changed[6] |= 1
    changed[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def st_file(header: dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def pt(value: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


class Evil:
    """Unpickling an object of this class makes a folder."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("unpickled",)


# ---- round trips ----


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES), dtype=st.sampled_from(DTYPES))
def test_a_written_tensor_is_read_back_bit_for_bit(data: st.DataObject, suffix: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and suffix in (".npy", ".npz"):
        suffix = ".safetensors"
    batch = data.draw(st.sampled_from([(), (1,), (2,)]))
    shape = (*batch, *data.draw(st.tuples(st.integers(0, 3), *[st.integers(1, 3)] * 3)))
    size = math.prod(shape) * dtype.itemsize
    x = torch.frombuffer(bytearray(data.draw(st.binary(min_size=size, max_size=size)) or b"\0" * 8), dtype=dtype)
    x = x[: math.prod(shape)].reshape(shape)
    order = data.draw(st.permutations(range(3)))
    x = x.permute(*range(len(batch) + 1), *[len(batch) + 1 + axis for axis in order])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{suffix}")
        write_tokens(path, x, force=False)
        assert_same_bits(read_tokens(path), x)
        assert os.listdir(folder) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_views_gradients_and_upper_case(tmp_path: Path, suffix: str) -> None:
    """A view is written without the rest of its storage."""
    path, x = tmp_path / f"x{suffix}".upper(), tokens(1000, 2, 2, 8)[3:4].requires_grad_()
    write_tokens(path, x, force=False)
    assert path.stat().st_size < 8000
    assert torch.equal(read_tokens(path), x.detach())


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", "\u0416 \u98ef".encode()], ids=repr)
@pytest.mark.parametrize("folder", [b".", b"dossi\xe9r"], ids=repr)
def test_names_are_any_bytes(name: bytes, folder: bytes, tmp_path: Path) -> None:
    x = tokens(4, 2, 2, 8)
    place = tmp_path / os.fsdecode(folder)
    place.mkdir(exist_ok=True)
    for suffix in SUFFIXES:
        path = place / (os.fsdecode(name) + suffix)
        write_tokens(path, x, force=False)
        assert torch.equal(read_tokens(path), x)
        if suffix in (".npy", ".safetensors"):
            chunks = list(stream_input(path, grid=(1, 1), tap="l11", chunk=3))
            assert torch.equal(torch.cat(chunks), x)
    video = place / os.fsdecode(name + b".mp4")
    assert len(read_frames(write_video(place / "a.mp4").rename(video), 9)) == 5
    video.write_bytes(b"no video")
    with pytest.raises(VideoError, match=f"^{re.escape(str(video))}: not a video FFmpeg can read"):
        read_frames(video, 9)


def test_what_cannot_be_written_is_refused_with_what_can(tmp_path: Path) -> None:
    x = tokens(1, 1, 1, 1)
    for suffix in (".npy", ".npz"):
        with pytest.raises(TokenFileError, match=r"cannot hold bfloat16: write \.pt or \.safetensors"):
            write_tokens(tmp_path / f"x{suffix}", x.bfloat16(), force=False)
    for call in (lambda path: check_dtype(path, x.dtype), lambda path: write_tokens(path, x, force=True), read_tokens):
        with pytest.raises(TokenFileError, match=r"x\.bin: token files end in \.npy, \.npz, \.pt, \.safetensors"):
            call(tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


def test_other_ways_to_store_an_array_are_read(tmp_path: Path) -> None:
    x = tokens(2, 3, 4, 5)
    np.save(tmp_path / "big.npy", x.numpy().astype(">f4"))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(x.numpy()))
    np.savez_compressed(tmp_path / "compressed.npz", x.numpy())
    torch.save(x, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert [path.name for path in tmp_path.iterdir() if not torch.equal(read_tokens(path), x)] == []


# ---- which tensor ----


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_of_several_tensors_the_key_chooses(tmp_path: Path, suffix: str) -> None:
    path, a, b = tmp_path / f"x{suffix}", tokens(1, 2, 2, 2), tokens(2, 2, 2, 2)
    match suffix:
        case ".npz":
            np.savez(path, a=a.numpy(), b=b.numpy())
        case ".pt":
            torch.save({"a": a, "b": b, "note": "not a tensor"}, path)
        case _:
            safetensors.torch.save_file({"a": a, "b": b}, path)
    assert torch.equal(read_tokens(path, "b"), b)
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
LARGE = {"dtype": "F32", "shape": [1, 1, 1, 10**9], "data_offsets": [0, 4 * 10**9]}
FLOATS = np.zeros(ONE, np.float32)
UNREAD = r"cannot be read \(\w+: .+\); allowed: "
REFUSED = {
    "npy: empty": (".npy", b"", "the file is empty"),
    "npy: other format": (".npy", b"hello, world", UNREAD + "an array of floats, as numpy.save writes it"),
    "npy: huge shape": (".npy", npy(HUGE), UNREAD),
    "npy: negative shape": (".npy", npy((-1, -1, 1, 1), data=b"1234"), UNREAD),
    "npy: two arrays": (".npy", 2 * npy((1, 1, 1, 1), data=b"1234"), "more follows its array; stgp pool --stream"),
    "npy: rank 3": (".npy", npy((1, 1, 1), data=b"1234"), r"\(T, H, W, C\), got \(1, 1, 1\)"),
    "npy: no channel": (".npy", npy((1, 1, 1, 0)), "at least 1, got shape"),
    "npy: integers": (".npy", npy((1, 1, 1, 1), "<i4", b"1234"), "float32 or float64, got int32"),
    "npy: bare bytes": (".npy", npy((1, 1, 1, 1), "|V2", b"12"), r"bfloat16\? use .pt or .safetensors"),
    "npy: objects": (".npy", npy((1, 1, 1, 1), "|O", b"1234"), "Object arrays cannot be loaded.*allowed: an array of"),
    "npz: no member": (".npz", b"PK\x05\x06" + bytes(18), "holds no tensor"),
    "npz: no array": (".npz", npz(b"text", "notes.txt"), "float32 or float64, got bytes32"),
    "npz: password": (".npz", encrypted(npz(npy((1, 1, 1, 1), data=b"1234"))), UNREAD),
    "npz: member cut short": (".npz", npz(npy((1, 1, 1, 2), data=b"1234")), UNREAD),
    "npz: objects": (".npz", npz(npy((1, 1, 1, 1), "|O", b"1234")), "Object arrays cannot be loaded"),
    "pt: other format": (".pt", b"hello, world", UNREAD + "a tensor or a dict of tensors, as torch.save writes them"),
    "pt: an array": (".pt", npy((1, 1, 1, 1), data=b"1234"), "not a pickle of tensors, or damaged; allowed: a"),
    "pt: legacy, cut short": (".pt", pt(torch.zeros(ONE), _use_new_zipfile_serialization=False)[:-3], UNREAD),
    "pt: code": (".pt", pt(Evil()), rf"refused: needs unpickling of {os.name}.mkdir"),
    "pt: list": (".pt", pt([tokens(1, 1, 1, 1)]), "holds a list; allowed: a tensor or a dict of tensors"),
    "pt: no tensor": (".pt", pt({"a": 1}), "holds no tensor"),
    "pt: integers": (".pt", pt(torch.zeros(ONE, dtype=torch.int64)), "got int64"),
    "pt: sparse": (".pt", pt(torch.zeros(ONE).to_sparse()), "its tensor is sparse; allowed: one whose elements"),
    "pt: meta": (".pt", pt(torch.zeros(ONE, device="meta")), "its tensor is meta"),
    "pt: expanded": (".pt", pt(torch.zeros(1).expand(HUGE)), "its tensor is expanded"),
    "st: too short": (".safetensors", b"1234", UNREAD + "tensors, as safetensors.torch.save_file writes them"),
    "st: huge header length": (".safetensors", st_file({}, length=2**60), UNREAD),
    "st: cut short": (".safetensors", st_file({"a": LARGE}, b"1234"), UNREAD),
    "st: no tensor": (".safetensors", st_file({}), "holds no tensor"),
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
    ("error", "cause"),
    [(MemoryError(), ""), (OverflowError("too large\nby far"), "too large"), (RuntimeError("a. b. c"), "a. b")],
    ids=repr,
)
def test_errors_of_any_kind_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(np.lib.format, "read_array", fail)
    np.save(tmp_path / "x.npy", FLOATS)
    expected = f"x.npy: cannot be read ({type(error).__name__}: {cause}); allowed: an array of floats, as numpy.save "
    with pytest.raises(TokenFileError) as caught:
        read_tokens(tmp_path / "x.npy")
    assert expected in str(caught.value)
    assert caught.value.__cause__ is error


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


def content_of(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder, f"x{suffix}"), tokens(1, 2, 2, 2), force=False)
        return Path(folder, f"x{suffix}").read_bytes()


WHOLE = {suffix: content_of(suffix) for suffix in SUFFIXES}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path, content = tmp_path / f"x{suffix}", WHOLE[suffix]
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(TokenFileError):
            read_tokens(path)


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


@pytest.mark.parametrize(("error", "existing"), [(KeyboardInterrupt, False), (SystemExit, True), (OSError, True)])
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


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tokens(tmp_path / "x.npy", tokens(1, 1, 1, 1), force=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.npy").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444], ids=oct)
@pytest.mark.parametrize("linked", [False, True], ids=["file", "link to it"])
def test_a_file_that_is_replaced_keeps_its_mode_from_the_first_byte(tmp_path: Path, mode: int, linked: bool) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"before")
    path.chmod(mode)
    if linked:
        (tmp_path / "link.bin").symlink_to("x.bin")
    with atomic_write(tmp_path / "link.bin" if linked else path, force=True) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
        file.write(b"after")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"after", mode)


@pytest.mark.parametrize(("refused", "mode"), [("nothing", 0o640), ("owner", 0o640), ("group", 0o600)])
def test_a_file_that_is_replaced_keeps_its_owner_and_group_where_that_is_allowed(
    tmp_path: Path, refused: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions of a group that cannot be kept are not given to another group."""
    path, asked = tmp_path / "x.bin", []

    def chown(file: object, owner: int, group: int) -> None:
        asked.append((owner, group))
        if refused == ("group" if owner == -1 else "owner"):
            raise PermissionError(1, "Operation not permitted")

    path.write_bytes(b"before")
    path.chmod(0o640)
    monkeypatch.setattr(writing.os, "chown", chown)
    with atomic_write(path, force=True) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
    assert sorted(asked) == [(-1, path.stat().st_gid), (path.stat().st_uid, -1)]
    assert stat.S_IMODE(path.stat().st_mode) == mode


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
def test_a_file_appears_when_it_is_whole(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written under another name in its folder, and one that appears meanwhile is kept."""

    def no_link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(writing.os, "link", no_link)
    path = tmp_path / "x.bin"
    with atomic_write(path, force=False) as file:
        file.write(b"whole")
        assert not path.exists()
        assert [entry.parent for entry in tmp_path.iterdir()] == [tmp_path]
    assert path.read_bytes() == b"whole"
    path.unlink()
    appeared = pytest.raises(FileExistsError, match="appeared while it was being made")
    with appeared, atomic_write(path, force=False) as file:
        file.write(b"ours")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
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


def test_a_video_becomes_tokens_of_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder gets the frames in the size of the grid."""
    video = find_sample_video("carphone_pristine.mp4")
    asked: list[object] = []

    def encode(frames: np.ndarray, progress: Callable[[int, int], object]) -> np.ndarray:
        progress(len(frames), len(frames))
        return frames[:, ::14, ::14].astype(np.float32)

    monkeypatch.setattr(inputs, "_encoder", lambda tap: asked.append(tap) or encode)
    given = {"key": None, "num_frames": 5, "grid": (2, 3), "tap": "l11"}
    found, frames = load_input(video, **given, progress=lambda *step: asked.append(step))
    assert frames is not None
    assert np.array_equal(frames, read_frames(video, 5, size=(28, 42)))
    assert torch.equal(found, torch.from_numpy(frames[:, ::14, ::14].astype(np.float32)))
    assert asked == ["l11", *(("decoding", done, 5) for done in range(1, 6)), ("encoding", 5, 5)]


@pytest.mark.parametrize("write", [*SUFFIXES, ".pt of old"])
def test_tokens_in_a_file_of_another_name_are_recognised_without_an_encoder(
    tmp_path: Path, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_encoder", lambda tap: pytest.fail("an encoder was asked for"))
    suffix, path = write.split()[0], tmp_path / "x"
    write_tokens(tmp_path / f"x{suffix}", tokens(1, 2, 3, 4), force=False)
    (tmp_path / f"x{suffix}").rename(path)
    if suffix != write:
        torch.save(tokens(1, 2, 3, 4), path, _use_new_zipfile_serialization=False)
    with pytest.raises(TokenFileError, match=rf"/x: holds tokens in the format of {suffix}, give it that suffix"):
        load_input(path, key=None, num_frames=1, grid=None, tap="post_ln")


def test_only_a_video_asks_for_the_packages_of_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(tap: str) -> None:
        raise ImportError("the encoder needs onnxruntime")

    monkeypatch.setattr(inputs, "_encoder", missing)
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("text", "no tokens")
    (tmp_path / "text").write_text("no tokens" * 99)
    (tmp_path / "cut").write_bytes((tmp_path / "archive").read_bytes()[:-9])
    (tmp_path / "clip").write_bytes(find_sample_video("carphone_pristine.mp4").read_bytes())
    given = {"grid": None, "tap": "post_ln"}
    for name, error in (("archive", ValueError), ("text", ValueError), ("cut", ValueError), ("clip", ImportError)):
        with pytest.raises(error, match="was taken for a video: token files end in"):
            load_input(tmp_path / name, key=None, num_frames=1, **given)
        with pytest.raises(error, match="was taken for a video: token files end in"):
            next(stream_input(tmp_path / name, chunk=1, **given))


def test_flattened_tokens_are_read_with_their_grid(tmp_path: Path) -> None:
    x, given = tokens(5, 6, 4), {"key": None, "num_frames": 1, "tap": "post_ln"}
    write_tokens(tmp_path / "x.npy", x, force=False)
    write_tokens(tmp_path / "x.safetensors", x, force=False)
    for name in ("x.npy", "x.safetensors"):
        assert torch.equal(load_input(tmp_path / name, grid=(2, 3), **given)[0], x)
        chunks = list(stream_input(tmp_path / name, grid=(2, 3), tap="post_ln", chunk=2))
        assert ([len(chunk) for chunk in chunks], torch.equal(torch.cat(chunks), x)) == ([2, 2, 1], True)
        for grid, message in (
            (None, r"got \(5, 6, 4\); flattened tokens \(T, ROWS·COLS, C\) need --grid ROWSxCOLS"),
            ((3, 3), r"--grid must have the 6 tokens of a flattened frame, got 3x3 = 9 for shape \(5, 6, 4\)"),
        ):
            with pytest.raises(TokenFileError, match=message):
                load_input(tmp_path / name, grid=grid, **given)
            with pytest.raises(TokenFileError, match=message):
                next(stream_input(tmp_path / name, grid=grid, tap="post_ln", chunk=1))


def test_what_is_no_video_either_hears_of_token_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_encoder", lambda tap: None)
    for name, hint in (("x.pth", True), ("x.mp4", False)):
        (tmp_path / name).write_bytes(b"nothing that is a video")
        with pytest.raises(ValueError, match=name) as caught:
            load_input(tmp_path / name, key=None, num_frames=1, grid=(1, 1), tap="post_ln")
        assert ("token files end in .npy, .npz, .pt, .safetensors" in str(caught.value)) == hint
