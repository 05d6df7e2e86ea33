"""The command `stgp pool --stream` gives what `stgp pool` gives, and the code in docs/streaming.md runs."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stgridpool_kernels
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.io import inputs
from stgridpool_kernels.io.token_files import TokenFileError, read_tokens, write_chunks
from tests.support.pages import STREAMING


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def array(T: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((T, 5, 6, 8)).astype(np.float32)


def saved(*arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    for each in arrays:
        np.save(file, each)
    return file.getvalue()


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def stream(source: str, *arguments: str, out: str = "out.npy") -> int:
    return main(["pool", source, "-o", out, "--stream", *arguments])


@contextmanager
def standard_input(data: bytes) -> Iterator[None]:
    """Put a pipe that gives these bytes in place of the standard input of this process."""
    before, (out, into) = os.dup(0), os.pipe()
    os.dup2(out, 0)
    os.close(out)

    def write() -> None:
        with suppress(BrokenPipeError), open(into, "wb") as pipe:
            pipe.write(data)

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)
        writing.join()


def test_snippets_of_the_page_run() -> None:
    assert list(STREAMING.snippets) == ["one", "several", "state"]
    names: dict[str, object] = {}
    for snippet in STREAMING.snippets:
        STREAMING.run(snippet, names)
    assert names["y"].shape == (5, 13, 13, 64)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("suffix", "chunk"), [(".npy", "1"), (".npy", "7"), (".safetensors", "7")])
def test_file_gives_what_the_command_gives_without(suffix: str, chunk: str) -> None:
    """A file of no frames gives a file of no frames."""
    for frames in (24, 0):
        source, x = f"in{suffix}", array(frames)
        np.save(source, x) if suffix == ".npy" else save_file({"tokens": torch.from_numpy(x)}, source)
        assert stream(source, "--chunk", chunk, "--force", out=f"streamed{suffix}") == 0
        assert main(["pool", source, "-o", f"whole{suffix}", "--force"]) == 0
        read = np.load if suffix == ".npy" else lambda path: load_file(path)["tokens"].numpy()
        assert read(f"streamed{suffix}").shape == (frames, 2, 3, 8)
        assert np.array_equal(read(f"streamed{suffix}"), read(f"whole{suffix}"))


def test_pipe_of_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    x = array(26)
    with standard_input(saved(*np.split(x, [3, 3, 20]))):
        assert stream("-", "--dtype", "float16") == 0
    assert "26 frames are no multiple of the strides (2, 4, 8)" in capsys.readouterr().err
    longer = torch.cat([torch.from_numpy(x), torch.zeros(6, 5, 6, 8)])
    assert np.array_equal(np.load("out.npy"), stgridpool_kernels.grid_pool(longer)[:26].half().numpy())


def header(*shape: int) -> bytes:
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(99)


DAMAGED = {
    "short": (saved(array(4))[:-1], "cut short: 4 frames announced, 2 and a part came"),
    "other shape": (
        saved(array(4), array(4)[:, :4]),
        r"after \(…, H, W, C\) = \(5, 6, 8\) of float32 came \(4, 6, 8\)",
    ),
    "columns": (saved(array(4).T), r"is stored row by row, got shape \(8, 6, 5, 4\), column by column"),
    "no tokens": (saved(np.zeros((4, 5))), r"a stream of tokens has shape \(T, H, W, C\), got \(4, 5\)"),
    "integers": (saved(np.zeros((4, 5, 6, 8), int)), "tokens are bfloat16, float16, float32 or float64, got int64"),
    "text": (saved(array(4))[:6] + b"garbage" * 30, r"cannot be read \(ValueError: .*\); allowed: arrays of floats"),
    "huge": (header(2, 10**9, 10**9, 8), "cannot be read|cut short"),
    "negative": (header(-3, 5, 6, 8), r"cannot be read \(ValueError: negative dimensions are not allowed\)"),
    "empty": (b"", "no frame came"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_pipe_that_is_no_stream_of_tokens(capsys: pytest.CaptureFixture[str], data: bytes, message: str) -> None:
    with standard_input(data):
        assert stream("-", "--chunk", "2") == 1
    assert re.fullmatch(rf"stgp pool: -: .*({message}).*\n", capsys.readouterr().err)
    assert files() == []


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert stream("-") == 1
    assert capsys.readouterr().err == "stgp pool: -: standard input is closed\n"


@pytest.mark.parametrize(
    ("number", "part", "code", "said"),
    [("SIGINT", 999, 130, b"stgp pool: interrupted\n"), ("SIGTERM", 0, 143, b"")],
    ids=["SIGINT in an array", "SIGTERM between arrays"],
)
def test_interrupted(number: str, part: int, code: int, said: bytes) -> None:
    """An interrupted process leaves nothing of what it has written."""
    command = [sys.executable, "-m", "stgridpool_kernels", "pool", "-", "-o", "out.npy", "--stream"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    ) as process:
        assert process.stdin is not None
        process.stdin.write(saved(array(4)) + saved(array(4))[:part])
        process.stdin.flush()
        for _ in range(6000):
            if files():
                break
            time.sleep(0.05)
        assert [Path(name).suffix for name in files()] == [".tmp"]
        process.send_signal(getattr(signal, number))
        _, errors = process.communicate()
    assert (process.returncode, errors) == (code, said)
    assert files() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream", "--frame-counts", "4"], "--frame-counts cannot go with --stream, got (4,)"),
        (["--stream", "--key", "x"], "--key cannot go with --stream, got x"),
        (["--stream", "--num-frames", "4"], "--num-frames cannot go with --stream, got 4"),
        (["--stream", "--tap", "l11"], "--tap is for videos, of which there is none, got l11"),
        (
            ["--grid", "3x5"],
            "--grid is for videos and flattened tokens (T, N, C), got 3x5 for tokens of shape (4, 5, 6, 8)",
        ),
        (["--stream", "--grid", "5x6"], "--grid is for videos and flattened tokens (T, N, C), got 5x6 for tokens of"),
        (["--num-frames", "4"], "--num-frames is for videos, of which there is none, got 4"),
        (["--chunk", "4"], "--chunk goes with --stream only, got 4"),
        (["--stream", "-o", "out.pt"], "--stream writes .npy and .safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("in.npy", array(4))
    assert main(["pool", "in.npy", "-o", "out.npy", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert files() == ["in.npy"]


def test_standard_input_needs_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "-", "-o", "out.npy"]) == 1
    assert "-: standard input is read with --stream only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".npy", torch.float16),
        (".npy", torch.float64),
        (".safetensors", torch.bfloat16),
        (".safetensors", torch.float32),
    ],
)
def test_chunks_are_written_as_write_tokens_writes_them_joined(suffix: str, dtype: torch.dtype) -> None:
    x = torch.randn(15, 2, 3, 4).to(dtype)
    write_chunks(f"out{suffix}", x.split([1, 0, 14]), force=False)
    assert torch.equal(read_tokens(f"out{suffix}"), x)
    if suffix == ".npy":
        assert np.load("out.npy", mmap_mode="r").flags.aligned


def test_chunks_that_cannot_be_written() -> None:
    with pytest.raises(TokenFileError, match="cannot hold bfloat16"):
        write_chunks("out.npy", [torch.zeros(1, 1, 1, 1).bfloat16()], force=False)
    with pytest.raises(TokenFileError, match=r"out\.npy: no frame came"):
        write_chunks("out.npy", [], force=False)
    assert files() == []


# ---- videos ----


def make_video(path: str, frames: int, height: int = 96, width: int = 128) -> Path:
    import av

    with av.open(path, "w") as writer:
        stream = writer.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        picture = np.empty((height, width, 3), np.uint8)
        for number in range(frames):
            picture[...] = ((np.arange(width) + 3 * number) % 256)[:, None]
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                writer.mux(packet)
        for packet in stream.encode(None):
            writer.mux(packet)
    return Path(path)


MEMORY = """
import io, os, re, sys, threading
import numpy as np
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.io.video import iter_frames

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def write(arrays):
    with open("pipe", "wb") as pipe:
        for _ in range(arrays):
            pipe.write(part.getvalue())

os.mkfifo("pipe")
np.save(part := io.BytesIO(), np.random.default_rng(0).standard_normal((8, 16, 16, 512)).astype(np.float32))
for arrays in (4, 40):
    threading.Thread(target=write, args=(arrays,)).start()
    assert main(["pool", "pipe", "-o", f"{arrays}.npy", "--stream", "--chunk", "4"]) == 0
    print(peak(), file=sys.stderr)
for name in ("50.mkv", "150.mkv"):
    with open(name, "rb") as video:
        assert name == f"{sum(1 for _ in iter_frames(video, '-', size=(480, 640)))}.mkv"
    print(peak(), file=sys.stderr)
"""


def test_memory_does_not_grow_with_the_input() -> None:
    """Neither 288 frames of tokens more, which are 151 MB, nor 100 pictures of a video more, 92 MB, take 32 MB.

    That much the allocator may keep or not.
    """
    for frames in (50, 150):
        make_video(f"{frames}.mkv", frames)
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.load("40.npy", mmap_mode="r").shape == (320, 8, 8, 512)
    # a build without kernels warns there too
    tokens, more_tokens, video, more_video = (int(line) for line in done.stderr.splitlines() if line.isdigit())
    assert more_tokens - tokens < 32 << 10
    assert more_video - video < 32 << 10


class FakeEncoder:
    """This encoder makes one token of a frame: its mean."""

    def __call__(self, frames: np.ndarray, *, progress: object = None) -> np.ndarray:
        return frames.mean((1, 2, 3), dtype=np.float32).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("more", [["--num-frames", "99"], ["--stream"]], ids=["whole", "streamed"])
def test_a_damaged_video_is_pooled_with_a_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """An .avi file, whose header announces all frames, is cut in the middle."""
    path = make_video("clip.avi", 75)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setattr(inputs, "_encoder", lambda tap: FakeEncoder())
    arguments = ["--grid", "1x1", "--kernel-size", "1", "--frame-strides", "none", *more]
    assert main(["pool", "clip.avi", "-o", "out.npy", *arguments]) == 0
    found = re.fullmatch(
        r"stgp pool: clip\.avi: damaged or cut short: (\d+) of 75 frames can be decoded, the others are left out\n",
        capsys.readouterr().err,
    )
    assert found is not None
    assert 0 < int(found[1]) < 75
    assert np.load("out.npy").shape == (int(found[1]), 1, 1, 1)


def test_what_is_no_video_hears_of_token_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inputs, "_encoder", lambda tap: FakeEncoder())
    Path("x.bin").write_bytes(b"no video" * 99)
    for name, why in (
        ("x.bin", "token files end in .npy, .npz, .pt, .safetensors"),
        ("/dev/stdin", "tokens in a pipe are .npy"),
    ):
        with standard_input(b"no video" * 99):
            assert stream(name) == 1
        error = capsys.readouterr().err
        assert f"{name}: not a video FFmpeg can read" in error
        assert f"{name} was taken for a video: {why}" in error
        assert error.count("\n") == 1


def test_video_from_a_file_and_from_a_pipe() -> None:
    """A video gives the same tokens as a whole, streamed from a file and streamed from a pipe."""
    path = make_video("clip.mkv", 16)
    options = ["--grid", "2x4", "--tap", "l11", "--temperature", "2"]
    assert main(["pool", "clip.mkv", "-o", "new/", "--num-frames", "99", *options]) == 0
    assert stream("clip.mkv", "--chunk", "4", *options, out="file.npy") == 0
    with standard_input(path.read_bytes()):
        assert stream("-", "--chunk", "4", *options, out="pipe.npy") == 0
    x, _ = inputs.load_input(path, key=None, num_frames=99, grid=(2, 4), tap="l11")
    expected = stgridpool_kernels.grid_pool(x, temperature=2.0)
    assert expected.shape == (16, 1, 2, 384)
    for name in ("new/clip.safetensors", "file.npy", "pipe.npy"):
        assert torch.equal(read_tokens(name), expected)
