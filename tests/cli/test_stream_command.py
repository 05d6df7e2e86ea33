"""`stgp pool --stream`, and docs/streaming.md."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stgridpool_kernels
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.io import inputs
from stgridpool_kernels.io.inputs import load_input
from stgridpool_kernels.io.token_files import TokenFileError, read_tokens, stream_tokens, write_chunks

PAGE = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def array(T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((T, 5, 6, 8)).astype(np.float32)


def test_snippets_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(SNIPPETS) == ["one", "several", "state"]
    names: dict[str, object] = {}
    for name, source in SNIPPETS.items():
        exec(compile(source, f"docs/streaming.md: {name}", "exec"), names)
    assert names["y"].shape == (5, 13, 13, 64)  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", ["1", "7"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_file_gives_what_the_command_gives_without(tmp_path: Path, suffix: str, chunk: str) -> None:
    x = array(24)
    source = tmp_path / f"in{suffix}"
    np.save(source, x) if suffix == ".npy" else save_file({"tokens": torch.from_numpy(x)}, source)
    for name, more in (("streamed", ["--stream", "--chunk", chunk]), ("whole", [])):
        assert main(["pool", str(source), "-o", str(tmp_path / f"{name}{suffix}"), *more]) == 0
    read = np.load if suffix == ".npy" else lambda path: load_file(path)["tokens"].numpy()
    assert np.array_equal(read(tmp_path / f"streamed{suffix}"), read(tmp_path / f"whole{suffix}"))


def stgp(*arguments: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "stgridpool_kernels", *arguments], input=stdin, capture_output=True)


def test_pipe_of_arrays(tmp_path: Path) -> None:
    x, pipe = array(26), io.BytesIO()
    for part in np.split(x, [3, 3, 20]):
        np.save(pipe, part)
    out = tmp_path / "out.npy"
    done = stgp("pool", "-", "-o", str(out), "--stream", "--dtype", "float16", stdin=pipe.getvalue())
    assert done.returncode == 0, done.stderr.decode()
    assert b"26 frames are no multiple of the strides (2, 4, 8)" in done.stderr
    longer = torch.cat([torch.from_numpy(x), torch.zeros(6, 5, 6, 8)])
    assert np.array_equal(np.load(out), stgridpool_kernels.grid_pool(longer)[:26].half().numpy())


def header(*shape: int) -> bytes:
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(99)


def saved(*arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    for each in arrays:
        np.save(file, each)
    return file.getvalue()


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
    "larger": (header(4, 1 << 15, 1 << 15, 8), "cannot be read|cut short"),
    "negative": (header(-3, 5, 6, 8), r"cannot be read \(ValueError: negative dimensions are not allowed\)"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_pipe_that_is_no_stream_of_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, message: str
) -> None:
    with pytest.raises(TokenFileError, match=f"^-: .*({message})"):
        list(stream_tokens(io.BufferedReader(io.BytesIO(data)), "-", 2))
    source = tmp_path / "in.npy"
    source.write_bytes(data)
    assert main(["pool", str(source), "-o", str(tmp_path / "out.npy"), "--stream"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"stgp pool: {source}: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_empty_pipe(tmp_path: Path) -> None:
    assert list(stream_tokens(io.BufferedReader(io.BytesIO()), "-", 2)) == []
    done = stgp("pool", "-", "-o", str(tmp_path / "out.npy"), "--stream", stdin=b"")
    assert (done.returncode, done.stderr) == (1, b"stgp pool: -: no frame came\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_no_frames_give_no_frames(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"in{suffix}"
    x = array(0)
    np.save(source, x) if suffix == ".npy" else save_file({"tokens": torch.from_numpy(x)}, source)
    assert main(["pool", str(source), "-o", str(tmp_path / "out.npy"), "--stream"]) == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 2, 3, 8)


def test_standard_input_that_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["pool", "-", "-o", str(tmp_path / "out.npy"), "--stream"]) == 1
    assert capsys.readouterr().err == "stgp pool: -: standard input is closed\n"


@pytest.mark.parametrize(
    ("number", "when"),
    [("SIGINT", "between arrays"), ("SIGINT", "in an array"), ("SIGTERM", "between arrays"), ("SIGHUP", "in an array")],
)
def test_interrupted(tmp_path: Path, number: str, when: str) -> None:
    """Nothing is left of what was written by then."""
    command = ["pool", "-", "-o", str(tmp_path / "out.npy"), "--stream"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stgridpool_kernels", *command],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    np.save(part := io.BytesIO(), array(4))
    process.stdin.write(part.getvalue() + (part.getvalue()[:999] if when == "in an array" else b""))
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [file.suffix for file in tmp_path.iterdir()] == [".tmp"]
    process.send_signal(getattr(signal, number))
    _, errors = process.communicate(timeout=120)
    expected = {"SIGINT": (130, b"stgp pool: interrupted\n"), "SIGTERM": (143, b""), "SIGHUP": (129, b"")}
    assert (process.returncode, errors) == expected[number]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--frame-counts", "4"],
        ["--key", "x"],
        ["--num-frames", "4"],
    ],
)
def test_options_that_need_the_whole(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "in.npy", array(4))
    command = ["pool", str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.npy"), "--stream", *arguments]
    assert main(command) == 1
    assert f"{arguments[0]} cannot go with --stream" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-frames", "4"], "--num-frames is for videos, of which there is none, got 4"),
        (["--grid", "3x5"], "--grid is for videos, of which there is none, got 3x5"),
        (["--tap", "l11", "--stream"], "--tap is for videos, of which there is none, got l11"),
    ],
)
def test_options_that_need_a_video(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "in.npy", array(4))
    assert main(["pool", str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.npy"), *arguments]) == 1
    assert message in capsys.readouterr().err
    if "--stream" not in arguments:
        assert main(["inspect", str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.png"), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["in.npy"]


def test_options_that_need_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "in.npy", array(4))
    output = ["-o", str(tmp_path / "out.npy")]
    assert main(["pool", str(tmp_path / "in.npy"), *output, "--chunk", "4"]) == 1
    assert "--chunk goes with --stream only, got 4" in capsys.readouterr().err
    assert main(["pool", "-", *output]) == 1
    assert "-: standard input is read with --stream only" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


def test_formats_that_cannot_be_written_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "in.npy", array(4))
    assert main(["pool", str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.pt"), "--stream"]) == 1
    assert "--stream writes .npy and .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_chunks_are_written_as_write_tokens_writes_them_joined(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"out{suffix}"
    x = torch.randn(15, 2, 3, 4).to(dtype)
    if suffix == ".npy" and dtype == torch.bfloat16:
        with pytest.raises(TokenFileError, match="cannot hold bfloat16"):
            write_chunks(path, [x], force=False)
        assert not path.exists()
        return
    write_chunks(path, x.split([1, 0, 14]), force=False)
    assert torch.equal(read_tokens(path), x)
    if suffix == ".npy":
        assert np.load(path, mmap_mode="r").flags.aligned


def test_no_chunk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match=r"out\.npy: no frame came"):
        write_chunks(tmp_path / "out.npy", [], force=False)
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import re, sys
from stgridpool_kernels.cli.main import main
code = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def peak_kib(tmp_path: Path, frames: int) -> int:
    """The peak memory of a process that pools so many frames of 0.5 MB from a pipe."""
    command = ["pool", "-", "-o", str(tmp_path / f"{frames}.npy"), "--stream", "--chunk", "4"]
    process = subprocess.Popen(
        [sys.executable, "-c", MEMORY, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False
    )
    assert process.stdin is not None
    np.save(part := io.BytesIO(), np.random.default_rng(0).standard_normal((8, 16, 16, 512)).astype(np.float32))
    for _ in range(frames // 8):
        process.stdin.write(part.getvalue())
    process.stdin.close()
    assert process.stdout is not None
    found = re.search(r"peak (\d+)", process.stdout.read().decode())
    assert process.wait() == 0
    assert found is not None
    return int(found[1])


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """960 frames more, of 503 MB, take no more than 32 MB: that much the allocator may keep or not."""
    short, long = (peak_kib(tmp_path, frames) for frames in (64, 1024))
    assert np.load(tmp_path / "1024.npy", mmap_mode="r").shape == (1024, 8, 8, 512)
    assert long - short < 32 << 10


# ---- videos ----


def make_video(path: Path, frames: int, height: int = 96, width: int = 128) -> Path:
    import av

    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        picture = np.empty((height, width, 3), np.uint8)
        for number in range(frames):
            picture[...] = ((np.arange(width) + 3 * number) % 256)[:, None]
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                writer.mux(packet)
        for packet in stream.encode(None):
            writer.mux(packet)
    return path


def test_every_frame_of_a_video(tmp_path: Path) -> None:
    from stgridpool_kernels.io.video import VideoError, iter_frames, read_frames

    path = make_video(tmp_path / "clip.mkv", 75)
    expected = read_frames(path, 1000, size=(28, 42))
    assert len(expected) == 75
    with path.open("rb") as pipe:
        assert np.array_equal(np.stack(list(iter_frames(pipe, "-", size=(28, 42)))), expected)
    with pytest.raises(VideoError, match="-: not a video"):
        list(iter_frames(io.BytesIO(b"no video" * 99), "-", size=(28, 42)))


def cut_video(path: Path) -> Path:
    """An .avi file, whose header announces 75 frames, without the last part of them."""
    make_video(path, 75)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


class FakeEncoder:
    """One token a frame: its mean."""

    def __call__(self, frames: np.ndarray, *, progress: object = None) -> np.ndarray:
        return frames.mean((1, 2, 3), dtype=np.float32).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("more", [[], ["--stream"]], ids=["whole", "streamed"])
def test_a_damaged_video_is_pooled_with_a_line_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    path = cut_video(tmp_path / "clip.avi")
    monkeypatch.setattr(inputs, "_encoder", lambda tap: FakeEncoder())
    arguments = ["--grid", "1x1", "--kernel-size", "1", "--frame-strides", "none", *more]
    arguments += [] if more else ["--num-frames", "99"]
    assert main(["pool", str(path), "-o", str(tmp_path / "out.npy"), *arguments]) == 0
    found = re.fullmatch(
        rf"stgp pool: {path}: damaged or cut short: (\d+) of 75 frames can be decoded, the others are left out\n",
        capsys.readouterr().err,
    )
    assert found is not None
    assert 0 < int(found[1]) < 75
    assert np.load(tmp_path / "out.npy").shape == (int(found[1]), 1, 1, 1)


def test_what_is_no_video_hears_of_token_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inputs, "_encoder", lambda tap: FakeEncoder())
    (tmp_path / "x.bin").write_bytes(b"no video" * 99)
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"no video" * 99,), daemon=True)
    writing.start()
    for name, why in (
        ("x.bin", "token files end in .npy, .npz, .pt, .safetensors"),
        ("pipe", "tokens in a pipe are .npy"),
    ):
        assert main(["pool", str(tmp_path / name), "-o", str(tmp_path / "out.npy"), "--stream"]) == 1
        error = capsys.readouterr().err
        assert f"{name}: not a video FFmpeg can read" in error
        assert f"{name} was taken for a video: {why}" in error
        assert error.count("\n") == 1
    writing.join()


def test_video_from_a_file_and_from_a_pipe(tmp_path: Path) -> None:
    from stgridpool_kernels.io.encoder import find_model

    find_model()
    path = make_video(tmp_path / "clip.mkv", 16)
    x, _ = load_input(path, key=None, num_frames=99, grid=(2, 4), tap="post_ln")
    options = ["--stream", "--chunk", "4", "--grid", "2x4"]
    assert main(["pool", str(path), "-o", str(tmp_path / "file.npy"), *options]) == 0
    done = stgp("pool", "-", "-o", str(tmp_path / "pipe.npy"), *options, stdin=path.read_bytes())
    assert done.returncode == 0, done.stderr.decode()
    expected = stgridpool_kernels.grid_pool(x).numpy()
    for name in ("file", "pipe"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)


DECODE = """
import re, sys
from stgridpool_kernels.io.video import iter_frames
count = sum(1 for _ in iter_frames(sys.stdin.buffer, "-", size=(480, 640)))
print(count, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def test_memory_does_not_grow_with_a_video(tmp_path: Path) -> None:
    """900 frames more, of 829 MB decoded, take no more than 32 MB."""
    peaks = []
    for frames in (100, 1000):
        path = make_video(tmp_path / f"{frames}.mkv", frames)
        with path.open("rb") as pipe:
            done = subprocess.run([sys.executable, "-c", DECODE], stdin=pipe, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        count, peak = map(int, done.stdout.split())
        assert count == frames
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 32 << 10
