"""Ray Data, on a local cluster: right, packed, resumable, with progress, and indifferent to the death of a process."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.integrations import ray as stgp_ray
from stgridpool_kernels.integrations.ray import PoolFiles, extract
from stgridpool_kernels.io.encoder import find_sample_video
from stgridpool_kernels.io.inputs import load_input
from stgridpool_kernels.io.token_files import read_tokens, write_tokens
from stgridpool_kernels.io.video import VideoWarning
from tests.support.examples import run_example
from tests.support.pages import SCALING

MARK = f"STGP_RAY_TEST={uuid.uuid4().hex}"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "RAY_gcs_server_port_wait_time_s": "120",  # 30 unless told, which a loaded machine may need
    MARK.split("=")[0]: MARK.split("=")[1],
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(num_cpus=2, include_dashboard=False, address="local", object_store_memory=100_000_000)
        yield
        ray.shutdown()


def tokens(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Files of several formats, dtypes, ranks and frame sizes, and one that is damaged."""
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    write_tokens(folder / "a.npy", tokens(0, 9, 6, 5, 8), force=False)
    write_tokens(folder / "b.pt", tokens(1, 2, 17, 6, 5, 8), force=False)
    write_tokens(folder / "c.safetensors", tokens(2, 40, 6, 5, 8, dtype=torch.bfloat16), force=False)
    write_tokens(folder / "more" / "a.npz", tokens(3, 8, 4, 4, 8), force=False)
    (folder / "broken.npy").write_bytes((folder / "a.npy").read_bytes()[:-7])
    (folder / "notes.txt").write_text("no tokens")
    (folder / ".hidden.npy").write_text("no tokens")
    return folder


NAMES = ["a.npy", "b.pt", "c.safetensors", "more/a.npz"]


def check(folder: Path, out: Path, **options: object) -> None:
    for name in NAMES:
        x = read_tokens(folder / name)
        assert torch.equal(read_tokens((out / name).with_suffix(".safetensors")), stgp.grid_pool(x, **options))
    found = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert found == sorted(str(Path(name).with_suffix(".safetensors")) for name in NAMES)


def test_every_file_is_pooled_and_a_second_run_does_nothing_twice(cluster: None, inputs: Path, tmp_path: Path) -> None:
    """The second run is the command's, which starts a cluster of its own, and shows progress and what failed."""
    out = tmp_path / "out"
    before = {file: file.read_bytes() for file in inputs.rglob("*") if file.is_file()}
    report = extract(inputs, out, actors=1, batch_size=3, temperature=2.0, ceil_mode=True)
    check(inputs, out, temperature=2.0, ceil_mode=True)
    assert sorted(report.written) == sorted((out / name).with_suffix(".safetensors") for name in NAMES)
    assert not report.skipped
    assert list(report.failed) == [inputs / "broken.npy"]
    assert report.failed[inputs / "broken.npy"].startswith(f"{inputs / 'broken.npy'}: cannot be read (")
    assert not report.warned
    assert report.left_out == {".txt": 1, "hidden": 1}
    assert {file: file.read_bytes() for file in before} == before

    (out / "a.safetensors").unlink()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    command = [sys.executable, "-m", "stgridpool_kernels.integrations.ray", str(inputs), "-o", str(out)]
    command += ["temperature=2", "ceil_mode=true", "--actors", "1"]
    done = subprocess.run(command, capture_output=True, text=True)  # without RAY_ADDRESS, as the fixture leaves it
    assert done.returncode == 1, done.stderr
    assert done.stdout == f"1 written, {len(kept)} there already, 1 failed; left out of folders: 1 .txt, 1 hidden\n"
    assert "Running Dataset" in done.stderr
    assert "MapBatches(PoolFiles)" in done.stderr
    assert f"{inputs / 'broken.npy'}: cannot be read (" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    check(inputs, out, temperature=2.0, ceil_mode=True)


def test_the_page_on_scaling(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes of the cluster work in another folder, so the step of a pipeline gets absolute paths."""
    monkeypatch.chdir(tmp_path)
    Path("tokens").mkdir()
    x, written = tokens(0, 9, 4, 4, 8), Path("pooled/a.safetensors")
    write_tokens(Path("tokens/a.npy"), x, force=False)
    SCALING.run("extract", {})
    assert capsys.readouterr().out == "1 written, 0 there already\n{}\n{}\n{}\n"
    assert torch.equal(read_tokens(written), stgp.grid_pool(x, temperature=2.0))
    written.unlink()
    SCALING.run("step", {}, *((f'"{folder}/', f'"{tmp_path}/{folder}/') for folder in ("tokens", "pooled")))
    assert "'state': 'written'" in capsys.readouterr().out
    assert torch.equal(read_tokens(written), stgp.grid_pool(x, temperature=2.0))


def test_the_example(cluster: None, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/ray_pool.py pools the files of a folder, and names those that it cannot pool."""
    (inputs / ".hidden.npy").unlink()
    out, names = tmp_path / "out", ["a.npy", "b.pt", "c.safetensors"]
    for state in ("written", "skipped"):
        with pytest.raises(SystemExit, match="1"):
            run_example("ray_pool.py", inputs, out, "--temperature", 2)
        lines = capsys.readouterr().out.splitlines()
        assert lines.pop() == f"1 failed, 3 {state}"
        [failed] = [line for line in lines if line.startswith("failed")]
        assert failed.startswith(f"failed: {inputs / 'broken.npy'}: cannot be read (")
        assert sorted({*lines} - {failed}) == [f"{state}: {out / name}.safetensors" for name in names]
    for name in names:
        expected = stgp.grid_pool(read_tokens(inputs / name), temperature=2.0)
        assert torch.equal(read_tokens(out / f"{name}.safetensors"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing", "out"), "No such file or directory: 'missing'"),
        (("in/more", "out", "--temperature", "nan"), "temperature must be finite"),
        (("in/more", "out", "--actors", "0"), "--actors must be at least 1, got 0"),
        (("empty", "out"), "empty has no token files (.npy, .npz, .pt, .safetensors) and no videos"),
    ],
)
def test_the_example_refuses_bad_input_before_ray_starts(
    inputs: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    monkeypatch.chdir(inputs.parent)
    monkeypatch.setattr(ray.data, "from_items", lambda *_: pytest.fail("Ray was asked"))
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        run_example("ray_pool.py", *arguments)
    assert message in capsys.readouterr().err


def workers() -> list[int]:
    """Ray's processes of this test's cluster that pool."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = MARK.encode() in (folder / "environ").read_bytes().split(b"\0")
            if mine and b"MapWorker(MapBatches(PoolFiles))" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def test_a_killed_process_costs_nothing(cluster: None, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    files = 40
    for i in range(files):
        write_tokens(folder / f"{i}.npy", tokens(i, 8 + i, 12, 12, 16), force=False)
    (folder / "broken.npy").write_bytes(b"nonsense")
    killed: list[tuple[int, int]] = []
    of_earlier_tests = workers()  # they may still be ending

    def kill() -> None:
        """Stops the processes when the first files are there, kills one, and lets the others go on."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if len(list(out.glob("*.safetensors"))) >= 2:
                stopped = [process for process in workers() if process not in of_earlier_tests]
                for process in stopped:
                    os.kill(process, signal.SIGSTOP)
                killed.append((len(list(out.glob("*.safetensors"))), stopped[0]))
                os.kill(stopped[0], signal.SIGKILL)
                for process in stopped[1:]:
                    os.kill(process, signal.SIGCONT)
                return
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    report = extract(folder, out, batch_size=4)
    killer.join()
    (finished, process), *_ = killed
    assert 2 <= finished < files
    assert not Path(f"/proc/{process}").exists() or "Z" in Path(f"/proc/{process}/stat").read_text()
    assert sorted(file.name for file in out.iterdir()) == sorted(f"{i}.safetensors" for i in range(files))
    assert sorted(report.written) == sorted(out.iterdir())
    assert list(report.failed) == [folder / "broken.npy"]
    for i in range(files):
        assert torch.equal(read_tokens(out / f"{i}.safetensors"), stgp.grid_pool(tokens(i, 8 + i, 12, 12, 16)))


# ---- without a cluster ----


def result_of(pool: PoolFiles, *jobs: tuple[Path, Path]) -> dict[str, list[str]]:
    result = pool({"source": [str(source) for source, _ in jobs], "output": [str(output) for _, output in jobs]})
    assert list(result) == ["source", "output", "state", "reason", "warning"]
    return result


def run_batch(pool: PoolFiles, *jobs: tuple[Path, Path]) -> list[str]:
    return result_of(pool, *jobs)["state"]


def test_files_of_one_size_are_pooled_in_one_call(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(x: torch.Tensor, **arguments: object) -> torch.Tensor:
        calls.append((tuple(x.shape), arguments["frame_counts"]))
        return stgp.grid_pool(x, **arguments)

    monkeypatch.setattr(stgp_ray, "grid_pool", counted)
    jobs = [(inputs / name, tmp_path / f"{i}.safetensors") for i, name in enumerate(["a.npy", "b.pt", "more/a.npz"])]
    assert run_batch(PoolFiles(), *jobs) == ["written"] * 3
    assert calls == [((9 + 2 * 17, 6, 5, 8), [9, 17, 17]), ((8, 4, 4, 8), [8])]
    for source, output in jobs:
        assert torch.equal(read_tokens(output), stgp.grid_pool(read_tokens(source)))
    assert run_batch(PoolFiles(), *jobs) == ["skipped"] * 3


def test_options_that_do_not_fit_some_files_leave_the_others(inputs: Path, tmp_path: Path) -> None:
    jobs = [(inputs / name, tmp_path / f"{i}.safetensors") for i, name in enumerate(["more/a.npz", "a.npy"])]
    result = result_of(PoolFiles(kernel_size=5), *jobs)
    assert result["state"] == ["failed", "written"]
    assert result["reason"][0].startswith(f"{inputs / 'more' / 'a.npz'}: kernel_size=[5, 5] with ")
    assert result["reason"][1] == ""


FAILURES = {
    "MemoryError": (MemoryError("Unable to allocate 53.6 GiB for an array"), "out of memory: cannot allocate 53.6 GiB"),
    "CPU": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 57600 bytes.\nmore"),
        "out of memory: cannot allocate 57600 bytes",
    ),
    "GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of"),
        "out of memory of the GPU: cannot allocate 20.00 GiB",
    ),
    "any other": (KeyError("a bug"), "unexpected KeyError: 'a bug'"),
    "without words": (RuntimeError(), "unexpected RuntimeError: "),
    "several lines": (RuntimeError("first\nsecond"), "first"),
}


@pytest.mark.parametrize(("error", "reason"), FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("step", ["load_input", "grid_pool", "write_tokens"])
def test_a_failure_of_one_file_is_its_own(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception, reason: str
) -> None:
    """The files a.npy and b.pt are pooled in one call, which fails as long as it has the frames of b.pt."""
    real = getattr(stgp_ray, step)

    def failing(*given: object, **named: object) -> object:
        first = given[0]
        if first == str(tmp_path / "b.safetensors") or first == str(inputs / "b.pt"):
            raise error
        if isinstance(first, torch.Tensor) and len(first) >= 2 * 17:
            raise error
        return real(*given, **named)

    monkeypatch.setattr(stgp_ray, step, failing)
    names = ["a.npy", "b.pt", "more/a.npz"]
    jobs = [(inputs / name, (tmp_path / Path(name).name).with_suffix(".safetensors")) for name in names[:2]]
    jobs.append((inputs / names[2], tmp_path / "c.safetensors"))
    result = result_of(PoolFiles(), *jobs)
    assert result["state"] == ["written", "failed", "written"]
    assert result["reason"] == ["", f"{inputs / 'b.pt'}: {reason}", ""]
    assert torch.equal(read_tokens(jobs[0][1]), stgp.grid_pool(read_tokens(inputs / "a.npy")))
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("step", ["load_input", "grid_pool", "write_tokens"])
def test_files_that_fit_into_memory_alone_are_written(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The step finds no memory until all three files were tried together."""
    real, calls = getattr(stgp_ray, step), []

    def failing(*given: object, **named: object) -> object:
        calls.append(given)
        if len(calls) <= {"load_input": 3, "grid_pool": 2, "write_tokens": 3}[step]:
            raise MemoryError
        return real(*given, **named)

    monkeypatch.setattr(stgp_ray, step, failing)
    jobs = [(inputs / name, tmp_path / f"{i}.safetensors") for i, name in enumerate(["a.npy", "b.pt", "more/a.npz"])]
    result = result_of(PoolFiles(), *jobs)
    assert (result["state"], result["reason"]) == (["written"] * 3, [""] * 3)
    for source, output in jobs:
        assert torch.equal(read_tokens(output), stgp.grid_pool(read_tokens(source)))


@pytest.mark.parametrize("step", ["load_input", "grid_pool", "write_tokens"])
def test_an_interrupt_ends_a_batch(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stgp_ray, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_batch(PoolFiles(), (inputs / "a.npy", tmp_path / "a.safetensors"))


LIMITED = """
import resource, sys
import torch
from stgridpool_kernels.integrations.ray import PoolFiles

pool, names = PoolFiles(temperature=2.0), sys.argv[1:]
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29), -1))
result = pool({"source": names, "output": [f"{name}.safetensors" for name in names]})
print(*zip(result["state"], result["reason"]), sep="\\n")
"""


def test_a_file_larger_than_memory_leaves_the_others(inputs: Path) -> None:
    """The header of the file is honest: it has 57 GB, though none are on the disk.

    A file of 300 MB is read, and there is no memory to pool it.
    """
    import numpy as np

    for name, frames in (("huge.npy", 80_000), ("large.npy", 420)):
        with (inputs / name).open("wb") as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": (frames, 14, 14, 896)}
            np.lib.format.write_array_header_1_0(file, about)
            file.truncate(file.tell() + frames * 14 * 14 * 896 * 4)
    names = ["a.npy", "huge.npy", "large.npy", "b.pt"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # threads take address space
    command = [sys.executable, "-c", LIMITED, *names]
    done = subprocess.run(command, cwd=inputs, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert [state for state, _ in found] == ["written", "failed", "failed", "written"]
    assert found[1][1].startswith("huge.npy: cannot be read (MemoryError: Unable to allocate 52.3 GiB")
    assert found[2][1].startswith("large.npy: out of memory: cannot allocate ")
    for name in ("a.npy", "b.pt"):
        expected = stgp.grid_pool(read_tokens(inputs / name), temperature=2.0)
        assert torch.equal(read_tokens(inputs / f"{name}.safetensors"), expected)


def test_flattened_tokens(tmp_path: Path) -> None:
    x = tokens(0, 9, 6, 5, 8)
    write_tokens(tmp_path / "flat.npy", x.flatten(1, 2), force=False)
    write_tokens(tmp_path / "x.npy", x, force=False)
    jobs = [(tmp_path / name, tmp_path / f"{name}.safetensors") for name in ("flat.npy", "x.npy")]
    assert result_of(PoolFiles(), jobs[0])["reason"][0].endswith("need --grid ROWSxCOLS")
    assert run_batch(PoolFiles(grid=(6, 5)), *jobs) == ["written", "written"]
    assert torch.equal(read_tokens(jobs[0][1], grid=(3, 2)), stgp.grid_pool(x).flatten(1, 2))
    assert torch.equal(read_tokens(jobs[1][1]), stgp.grid_pool(x))


def test_a_damaged_video_is_pooled_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, **_: object) -> tuple[torch.Tensor, None]:
        if source.endswith(".mp4"):
            warnings.warn(f"{source}: 8 of 9 frames can be decoded", VideoWarning, stacklevel=2)
        return tokens(0, 8, 4, 4, 8), None

    monkeypatch.setattr(stgp_ray, "load_input", load)
    jobs = [(tmp_path / name, tmp_path / f"{name}.safetensors") for name in ("a.mp4", "b.npy")]
    result = result_of(PoolFiles(), *jobs)
    assert result["state"] == ["written", "written"]
    assert result["warning"] == [f"{tmp_path / 'a.mp4'}: 8 of 9 frames can be decoded", ""]


@pytest.mark.parametrize("failed", [{}, {Path("b.npy"): "b.npy: empty"}], ids=["warned", "warned and failed"])
def test_the_command_names_damaged_videos(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failed: dict[Path, str]
) -> None:
    report = stgp_ray.Report(written=[Path("a.safetensors")], warned={Path("a.mp4"): "a.mp4: damaged"}, failed=failed)
    monkeypatch.setattr(stgp_ray, "extract", lambda *_, **__: report)
    assert stgp_ray.main(["a.mp4", "b.npy", "-o", "out"]) == len(failed)
    shown = capsys.readouterr()
    assert shown.out == f"1 written, 0 there already, {len(failed)} failed\n"
    assert shown.err.splitlines() == ["a.mp4: damaged", *failed.values()]


def test_the_command_reads_options_in_every_form_and_counts_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []
    report = stgp_ray.Report(left_out={".jpg": 2, "hidden": 1})
    monkeypatch.setattr(stgp_ray, "extract", lambda inputs, **named: asked.append(named) or report)
    for text in ("2,4", "2:4", "2x4", "2 4", "[2, 4]"):
        assert stgp_ray.main(["in", "-o", "out", f"frame_strides={text}", "--grid", "18", "32"]) == 0
        assert (asked[-1]["frame_strides"], asked[-1]["grid"]) == ((2, 4), (18, 32))
    expected = "0 written, 0 there already, 0 failed; left out of folders: 2 .jpg, 1 hidden\n"
    assert capsys.readouterr().out == 5 * expected


@pytest.mark.parametrize(
    ("arguments", "meant"), [(["--temperature", "2"], "temperature=VALUE"), (["--batchsize", "2"], "--batch-size")]
)
def test_the_command_says_which_option_may_be_meant(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        stgp_ray.main(["in", "-o", "out", *arguments])
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m stgridpool_kernels.integrations.ray")
    assert f"; did you mean {meant}?" in error


def test_videos(tmp_path: Path) -> None:
    video = find_sample_video("carphone_pristine.mp4")
    pool = PoolFiles(num_frames=8, grid=(4, 5))
    states = run_batch(pool, (video, tmp_path / "v.safetensors"))
    x, _ = load_input(video, key=None, num_frames=8, grid=(4, 5), tap="post_ln")
    assert states == ["written"]
    assert torch.equal(read_tokens(tmp_path / "v.safetensors"), stgp.grid_pool(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"colour": 1}, TypeError, "options must be among"),
        ({"grid": "18x32"}, TypeError, r"grid must be 2 integers \(rows, cols\), got '18x32'"),
        ({"device": "tpu"}, ValueError, "device must be None, 'cpu' or 'cuda', got 'tpu'"),
        ({"actors": 0}, ValueError, "actors must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"grid": (0, 1)}, ValueError, r"grid must be 2 integers \(rows, cols\) of at least 1, got \(0, 1\)"),
        ({"grid": (1, 2, 3)}, ValueError, r"grid must be 2 integers .*, got \(1, 2, 3\)"),
        ({"grid": 3}, ValueError, "grid must be 2 integers .*, got 3"),
        ({"grid": "ab"}, TypeError, "grid must be 2 integers .*, got 'ab'"),
        ({"key": 1}, TypeError, "key must be a name or None, got 1"),
        ({"tap": "last"}, ValueError, "tap must be one of post_ln.*, got 'last'"),
        ({"tap": ["last"]}, ValueError, r"tap must be one of post_ln.*, got \['last'\]"),
        ({"num_frames": 0}, ValueError, "num_frames must be at least 1, got 0"),
        ({"num_frames": "8"}, TypeError, "num_frames must be an integer, got '8'"),
        ({"actors": 1.5}, TypeError, "actors must be an integer, got 1.5"),
        ({"inputs": []}, ValueError, "inputs must name at least one"),
        ({"inputs": "missing"}, FileNotFoundError, "inputs must exist"),
        ({"inputs": "empty"}, ValueError, r"inputs must hold token files \(.npy, .*\) or videos, empty has none"),
        ({"output": "in/out"}, ValueError, "output must not be in a folder of inputs"),
        ({"inputs": ["in/c.safetensors"], "output": "in"}, ValueError, "output must not be the folder of an input"),
        ({"inputs": ["in/a.npy", "in/more/a.npz"]}, ValueError, "inputs must differ in name"),
        ({"output": "in/a.npy"}, NotADirectoryError, "output must be a folder"),
    ],
)
def test_bad_input_is_refused_before_ray_is_asked(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(inputs.parent)
    monkeypatch.setattr(stgp_ray, "require", lambda *_, **__: pytest.fail("Ray was asked"))
    Path("empty").mkdir()
    given = {"inputs": "in", "output": "out"} | arguments
    with pytest.raises(error, match=message):
        extract(given.pop("inputs"), given.pop("output"), **given)
    assert not Path("out").exists()


@pytest.mark.parametrize("arguments", [{"grid": 3}, {"grid": (0, 1)}, {"tap": "last"}, {"num_frames": 0}], ids=str)
def test_a_step_is_refused_as_it_is_made(arguments: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(arguments))}.* must be"):
        PoolFiles(**arguments)


def test_without_ray_the_error_says_which_is_needed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stgp_ray, "TESTED", {**stgp_ray.TESTED, "at_least": "99", "below": "100"})
    assert stgp_ray.main([str(inputs), "-o", str(tmp_path / "out")]) == 1
    assert 'ray from 99 to before 100: pip install "ray[data]>=99,<100"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
