"""The command `stgp`: in process where its functions are tested, as a process where the process itself is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stgridpool_kernels
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.cli import demo, info, options, pool
from stgridpool_kernels.cli import inspect as inspect_command
from stgridpool_kernels.cli import main as cli
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.io import inputs, token_files
from stgridpool_kernels.io.token_files import read_tokens, write_tokens

SCHEMA = [argument for argument in torch.ops.stgp.grid_pool.default._schema.arguments if argument.kwarg_only]
DEFAULTS = {argument.name: argument.default_value for argument in SCHEMA}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _in_a_folder_with_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STGP_BACKEND", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    write_tokens("a.npy", tokens(16, 6, 7, 8), force=False)


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def stgp(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from stgridpool_kernels.cli.main import main; sys.exit(main())"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, **options)


def parsed(*arguments: str) -> dict[str, Any]:
    return options.op_options(
        cli.build_parser().parse_args(options.join_negative_numbers(["pool", "a", "-o", "b", *arguments]))
    )


# ---- options of the op ----


def test_every_schema_argument_has_an_option_with_help_and_the_same_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(options.OPTION_HELP) == set(DEFAULTS)
    assert parsed() == {**DEFAULTS, "backend": "auto"}
    with pytest.raises(SystemExit):
        main(["pool", "--help"])
    shown = capsys.readouterr().out
    for name in DEFAULTS:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--frame-strides", "4,2"], "frame_strides", (4, 2)),
        (["--frame-strides", "none"], "frame_strides", ()),
        (["--frame-strides", "4:2"], "frame_strides", (4, 2)),
        (["--grid-shape", "2,2,1,3"], "grid_shape", (2, 2, 1, 3)),
        (["--sampling", "first"], "sampling", "first"),
        (["--resize", "bilinear"], "resize", "bilinear"),
        (["--kernel-size", "3"], "kernel_size", 3),
        (["--kernel-size", "3,2"], "kernel_size", (3, 2)),
        (["--kernel-size", "3x2"], "kernel_size", (3, 2)),
        (["--stride", "1,2"], "stride", (1, 2)),
        (["--stride", "none"], "stride", None),
        (["--padding", "1"], "padding", 1),
        (["--padding", "-1,-2"], "padding", (-1, -2)),
        (["--ceil-mode"], "ceil_mode", True),
        (["--no-ceil-mode"], "ceil_mode", False),
        (["--no-count-include-pad"], "count_include_pad", False),
        (["--output-size", "3,4"], "output_size", (3, 4)),
        (["--temperature", "-1"], "temperature", -1.0),
        (["--temperature", "-1e-3"], "temperature", -1e-3),
        (["--temperature", "-.5"], "temperature", -0.5),
        (["--temperature=-2"], "temperature", -2.0),
        (["--temperature", "-inf"], "temperature", -float("inf")),
        (["--norm-type", "inf"], "norm_type", float("inf")),
        (["--no-normalize-norm"], "normalize_norm", False),
        (["--frame-counts", "8,8"], "frame_counts", (8, 8)),
        (["--backend", "reference"], "backend", "reference"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)
def test_options_become_arguments(arguments: list[str], name: str, value: object) -> None:
    assert parsed(*arguments) == {**DEFAULTS, "backend": "auto", name: value}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frame-strides", "2,x"], "argument --frame-strides: it must be integers like 2,4,8, or none"),
        (["--kernel-size", "1,2,3"], "argument --kernel-size: it must be one integer or two like 2,2"),
        (["--kernel-size", "none"], "argument --kernel-size: it must be one integer or two"),
        (["--sampling", "middle"], "argument --sampling: invalid choice"),
        (["--temperature", "warm"], "argument --temperature: it must be a number, got 'warm'"),
        (["--backend", "nope"], "argument --backend: invalid choice"),
        (["--temp", "1"], "unrecognized arguments: --temp"),
        (["--num-frames", "0"], "argument --num-frames: expected an integer of at least 1"),
        (["--grid", "18"], "argument --grid: expected rows and columns as in 18x32"),
        (["--tap", "l3"], "argument --tap: invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_exit_2_and_name_the_option(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pool", "a.npy", "-o", "out.npy", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert files() == ["a.npy"]


@pytest.mark.parametrize(
    "arguments", [[], ["pool"], ["pool", "a.npy"], ["pool", "-o", "x"], ["inspect", "a.npy"], ["nope"]]
)
def test_missing_arguments_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: stgp" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "pool", "inspect", "demo"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"\n  stgp {command}" in capsys.readouterr().out


# ---- pool ----


def test_pool_writes_what_the_op_computes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--frame-strides",
        "2",
        "--grid-shape",
        "1,2",
        "--kernel-size",
        "3,2",
        "--stride",
        "2",
        "--padding",
        "1",
        "--ceil-mode",
    ]
    arguments += [
        "--no-count-include-pad",
        "--temperature",
        "-2",
        "--norm-type",
        "inf",
        "--no-normalize-norm",
        "--sampling",
        "first",
    ]
    assert main(["pool", "a.npy", "-o", "out.npy", *arguments]) == 0
    expected = stgridpool_kernels.grid_pool(
        tokens(16, 6, 7, 8),
        frame_strides=[2],
        grid_shape=[1, 2],
        kernel_size=[3, 2],
        stride=2,
        padding=1,
        ceil_mode=True,
        count_include_pad=False,
        temperature=-2.0,
        norm_type=float("inf"),
        normalize_norm=False,
        sampling="first",
    )
    assert torch.equal(read_tokens("out.npy"), expected)
    shown = capsys.readouterr()
    assert f"(16, 6, 7, 8) → {tuple(expected.shape)}" in shown.out
    assert "float32" in shown.out
    assert shown.err == ""


def test_pool_asks_for_the_backend_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def grid_pool(x: Tensor, **options: Any) -> Tensor:
        asked.append(options["backend"])
        return x

    monkeypatch.setattr(pool, "grid_pool", grid_pool)
    assert main(["pool", "a.npy", "-o", "out.npy", "--backend", "reference"]) == 0
    assert main(["pool", "a.npy", "-o", "out2.npy"]) == 0
    assert asked == ["reference", "auto"]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_pool_keeps_the_format_and_dtype_of_its_input(suffix: str) -> None:
    dtype = torch.bfloat16 if suffix in (".pt", ".safetensors") else torch.float16
    write_tokens(f"in{suffix}", tokens(2, 8, 4, 4, 8).to(dtype), force=False)
    assert main(["pool", f"in{suffix}", "-o", "new/folder"]) == 0
    pooled = read_tokens(f"new/folder/in{suffix}")
    assert torch.equal(pooled, stgridpool_kernels.grid_pool(tokens(2, 8, 4, 4, 8).to(dtype)))
    assert pooled.dtype == dtype


def test_pool_converts_format_and_dtype() -> None:
    write_tokens("b.pt", tokens(8, 4, 4, 8).bfloat16(), force=False)
    assert main(["pool", "a.npy", "b.pt", "-o", "out", "--format", "npz", "--dtype", "float32"]) == 0
    assert files() == ["a.npy", "b.pt", "out/a.npz", "out/b.npz"]
    pooled = stgridpool_kernels.grid_pool(tokens(8, 4, 4, 8).bfloat16())
    assert torch.equal(read_tokens("out/b.npz"), pooled.float())


def test_pool_takes_the_tensor_the_key_names() -> None:
    np.savez("two.npz", a=tokens(8, 4, 4, 8).numpy(), b=tokens(8, 6, 6, 8).numpy())
    assert main(["pool", "two.npz", "-o", "out.npy", "--key", "b"]) == 0
    assert read_tokens("out.npy").shape == (8, 3, 3, 8)


def test_pool_goes_on_after_a_bad_input_and_lists_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("integers.npy", np.zeros((1, 2, 2, 2), int))
    Path("empty.pt").touch()
    write_tokens("bf16.pt", tokens(8, 4, 4, 8).bfloat16(), force=False)
    inputs = ["integers.npy", "a.npy", "none.npy", "empty.pt", "bf16.pt"]
    assert main(["pool", *inputs, "-o", "out", "--format", "npy"]) == 1
    assert [name for name in files() if name.startswith("out")] == ["out/a.npy"]
    shown = capsys.readouterr()
    assert "a.npy" in shown.out
    assert shown.err.splitlines() == [
        "stgp pool: 4 of 5 inputs failed:",
        "stgp pool: integers.npy: tokens are bfloat16, float16, float32 or float64, got int64",
        "stgp pool: none.npy: no such file",
        "stgp pool: empty.pt: the file is empty",
        "stgp pool: bf16.pt: out/bf16.npy: NumPy's formats cannot hold bfloat16: write .pt or .safetensors, or convert "
        "with --dtype float32",
    ]


def test_inputs_that_all_fail_leave_no_folder() -> None:
    assert main(["pool", "none.npy", "none.pt", "-o", "out"]) == 1
    assert not Path("out").exists()


BEFORE_WORK = {
    "option of the op": (["a.npy", "-o", "x.npy", "--kernel-size", "0"], "kernel_size must be 2 integers"),
    "temperature": (
        ["a.npy", "-o", "x.npy", "--temperature", "nan"],
        "temperature must be finite in float32 arithmetic, got nan",
    ),
    "two inputs, one file": (["a.npy", "b.npy", "-o", "x.npy"], "-o x.npy names a file, but there are 2 inputs"),
    "same output": (["a.npy", "sub/a.npy", "-o", "out"], "out/a.npy would be the output of 2 inputs: a.npy, sub/a.npy"),
    "same output by format": (["a.npy", "a.pt", "-o", "out", "--format", "npz"], "out/a.npz would be the output of 2"),
    "the input itself": (["a.npy", "-o", "a.npy", "--force"], "a.npy: is the input a.npy, which is never overwritten"),
    "the input's folder": (["a.npy", "-o", ".", "--force"], "a.npy: is the input a.npy, which is never overwritten"),
    "format against suffix": (["a.npy", "-o", "x.npy", "--format", "pt"], "-o x.npy and --format pt disagree"),
    "no folder": (["a.npy", "-o", "none/x.npy"], "none/x.npy: there is no folder none"),
    "folder is a file": (["a.npy", "-o", "a.npy/out"], "a.npy is not a folder"),
    "dtype against format": (["a.npy", "-o", "x.npy", "--dtype", "bfloat16"], "NumPy's formats cannot hold bfloat16"),
    "device": (["a.npy", "-o", "x.npy", "--device", "nope"], "--device must be one that can be used here, got 'nope'"),
}


@pytest.mark.parametrize(("arguments", "message"), BEFORE_WORK.values(), ids=BEFORE_WORK.keys())
def test_errors_that_need_no_input_come_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files()
    monkeypatch.setattr(pool, "load_input", lambda *_, **__: pytest.fail("an input was read"))
    assert main(["pool", *arguments]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("stgp pool: ")
    assert shown.err.count("\n") == 1
    assert files() == before


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard link", "symbolic link"])
def test_an_input_is_not_overwritten_under_another_name(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    link("a.npy", "other.npy")
    assert main(["pool", "a.npy", "-o", "other.npy", "--force"]) == 1
    assert "other.npy: is the input a.npy, which is never overwritten" in capsys.readouterr().err
    assert torch.equal(read_tokens("a.npy"), tokens(16, 6, 7, 8))


def test_an_existing_output_stops_everything_without_force(capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens("b.npy", tokens(8, 4, 4, 8), force=False)
    Path("out").mkdir()
    Path("out/b.npy").write_text("precious")
    assert main(["pool", "a.npy", "b.npy", "-o", "out"]) == 1
    assert "out/b.npy: exists already; give another name, or --force" in capsys.readouterr().err
    assert files() == ["a.npy", "b.npy", "out/b.npy"]
    assert Path("out/b.npy").read_text() == "precious"
    assert main(["pool", "a.npy", "b.npy", "-o", "out", "--force"]) == 0
    assert read_tokens("out/b.npy").shape == (8, 2, 2, 8)


def test_errors_of_the_op_name_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "a.npy", "-o", "out.npy", "--frame-counts", "3,4"]) == 1
    assert capsys.readouterr().err == "stgp pool: a.npy: frame_counts must sum to T = 16, got [3, 4] with sum 7\n"
    assert main(["pool", "a.npy", "-o", "out.npy", "--frame-counts", "8,8"]) == 0
    assert torch.equal(read_tokens("out.npy"), stgridpool_kernels.grid_pool(tokens(16, 6, 7, 8), frame_counts=[8, 8]))


def test_a_dtype_that_overflows_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens("large.npy", tokens(8, 4, 4, 8) * 1e6, force=False)
    assert main(["pool", "large.npy", "-o", "out.npy", "--dtype", "float16"]) == 1
    assert "large.npy: --dtype float16 cannot hold the result's" in capsys.readouterr().err
    assert not Path("out.npy").exists()


def test_infinities_of_the_result_are_no_overflow() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    assert torch.equal(pool._cast(x, torch.float16).isinf(), x.isinf())
    with pytest.raises(ValueError, match=r"--dtype float16 cannot hold the result's 100000$"):
        pool._cast(torch.cat([x, torch.tensor([-1e5])]), torch.float16)


def test_a_backend_that_cannot_run_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "backend_reasons", lambda: {"reference": "it is Sunday"})
    assert main(["pool", "a.npy", "-o", "out.npy", "--backend", "reference"]) == 1
    assert capsys.readouterr().err == "stgp pool: backend 'reference' cannot run here: it is Sunday\n"
    monkeypatch.setenv("STGP_BACKEND", "nope")
    assert main(["pool", "a.npy", "-o", "out.npy"]) == 1
    assert "stgp pool: STGP_BACKEND must be one of 'auto', " in capsys.readouterr().err


@pytest.mark.needs("no gpu")
def test_a_device_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "a.npy", "-o", "out.npy", "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("stgp pool: --device must be one that can be used here, got 'cuda': ")


@pytest.mark.gpu
def test_pool_on_a_gpu() -> None:
    assert main(["pool", "a.npy", "-o", "out.npy", "--device", "cuda"]) == 0
    expected = stgridpool_kernels.grid_pool(tokens(16, 6, 7, 8).cuda()).cpu()
    assert torch.equal(read_tokens("out.npy"), expected)


def test_names_with_markup_or_escapes_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[red]a.npy", "\x1b[31mb.npy", "c\n.npy"]
    for name in names:
        write_tokens(name, tokens(8, 4, 4, 8), force=False)
    assert main(["pool", *names, "\x1b[31mnone.npy", "-o", "out"]) == 1
    shown = capsys.readouterr()
    assert "[red]a.npy" in shown.out
    assert r"\x1b[31mb.npy" in shown.out
    assert r"c\n.npy" in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert r"\x1b[31mnone.npy: no such file" in shown.err


def test_a_video_is_pooled_with_the_options_for_videos() -> None:
    from stgridpool_kernels.io.encoder import find_model, find_sample_video

    video = find_sample_video("carphone_pristine.mp4")
    find_model()
    arguments = ["--num-frames", "4", "--grid", "4x6", "--tap", "l11", "--frame-strides", "none"]
    assert main(["pool", str(video), "-o", "out", *arguments]) == 0
    x, _ = inputs.load_input(video, key=None, num_frames=4, grid=(4, 6), tap="l11")
    expected = stgridpool_kernels.grid_pool(x, frame_strides=[])
    assert torch.equal(read_tokens("out/carphone_pristine.safetensors"), expected)


def test_a_missing_package_is_named_with_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("clip.mp4").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    inputs._encoder.cache_clear()
    assert main(["pool", "clip.mp4", "-o", "out"]) == 1
    assert 'pip install "stgridpool_kernels[demo]"' in capsys.readouterr().err


# ---- errors and interruptions ----


def test_a_traceback_is_shown_with_debug_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "none.npy", "-o", "out.npy"]) == 1
    assert capsys.readouterr().err == "stgp pool: none.npy: no such file\n"
    assert main(["pool", "none.npy", "-o", "out.npy", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_nobody_expected_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(info, "_facts_table", fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "stgp info: unexpected KeyError: 'a bug' (--debug shows where)\n"


def test_ctrl_c_while_writing_leaves_nothing_and_keeps_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens("b.npy", tokens(8, 4, 4, 8), force=False)
    save = np.save

    def interrupted(out: Any, array: np.ndarray, **options: Any) -> None:
        save(out, array, **options)
        if len(array) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(token_files.np, "save", interrupted)
    assert main(["pool", "a.npy", "b.npy", "-o", "out"]) == 130
    shown = capsys.readouterr()
    assert shown.err == "stgp pool: interrupted\n"
    assert "a.npy" in shown.out
    assert files() == ["a.npy", "b.npy", "out/a.npy"]


def test_ctrl_c_ends_the_process_with_130(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib; from stgridpool_kernels.cli import main as cli, pool\n"
        "def wait(x, **options): pathlib.Path('started').touch(); time.sleep(60)\n"
        "pool.grid_pool = wait\n"
        "sys.exit(cli.main(['pool', 'a.npy', '-o', 'out.npy']))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not Path("started").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "stgp pool: interrupted\n"
    assert files() == ["a.npy", "started"]


# ---- info, inspect, demo ----


def info_rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The two columns that `stgp info` prints."""
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {cells[0].strip(): cells[1].strip() for line in lines if len(cells := line.strip("│").split("│")) == 2}


def test_info_shows_versions_packages_and_backends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"fast": "no fast device", "reference": None}
    monkeypatch.setattr(info, "backend_reasons", lambda: reasons)
    monkeypatch.setitem(info._OPTIONAL_PACKAGES, "no-such-package", "nothing")
    rows = info_rows(capsys)
    assert rows["version"] == stgridpool_kernels.__version__
    assert rows["torch"].startswith(torch.__version__)
    assert torch.backends.cpu.get_cpu_capability() in rows["CPU"]
    assert rows["threads"].startswith(str(torch.get_num_threads()))
    assert rows["no-such-package"] == "not found (nothing)"
    assert rows["STGP_BACKEND"] == "not set: auto"
    assert rows["fast"] == "cannot run: no fast device"
    assert rows["reference"] == "can run; auto takes it first"


@pytest.mark.parametrize("cuda", ["", "13.0.88"], ids=["without CUDA", "with CUDA"])
def test_info_shows_the_compiled_library(
    cuda: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(
        build_info=lambda: {
            "version": "0.9.1",
            "compiler": "GNU 12.2.0",
            "torch": "2.13.0+cpu",
            "stable ABI": "torch 2.10",
            "cuda": cuda,
            "cuda architectures": "80, 90 and PTX of 90" if cuda else "",
            "cpu capabilities": "avx512, avx2, portable",
        },
        cpu_capability=lambda: "avx2",
    )
    monkeypatch.setattr(compiled, "LIBRARY", library)
    monkeypatch.setenv("COLUMNS", "200")
    rows = info_rows(capsys)
    expected = "0.9.1, built by GNU 12.2.0 with torch 2.13.0+cpu; stable ABI of torch 2.10"
    assert rows["compiled library"] == expected
    assert rows["CPU kernels"] == "avx2, compiled for avx512, avx2, portable"
    assert rows["CUDA kernels"] == ("CUDA 13.0.88, compiled for 80, 90 and PTX of 90" if cuda else "none")


def test_info_says_that_there_is_no_compiled_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "LIBRARY", None)
    rows = info_rows(capsys)
    assert rows["compiled library"] == "not built (pip install -v says why)"
    assert "CPU kernels" not in rows
    assert rows["cpu"] == "cannot run: the compiled library was not built (pip install -v says why)"


@pytest.mark.needs("library")
def test_info_and_the_compiled_library_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows, info = info_rows(capsys), compiled.LIBRARY.build_info()
    assert all(info[name] in rows["compiled library"] for name in ("version", "compiler", "torch", "stable ABI"))
    assert rows["CPU kernels"].split(",")[0] in info["cpu capabilities"].split(", ")
    assert (rows["CUDA kernels"] == "none") == (not info["cuda"])


@pytest.mark.parametrize(
    ("value", "effect"),
    [
        ("reference", "reference: calls run on reference unless they ask for another"),
        ("auto", "auto: calls run on the fastest that can unless they ask for another"),
        ("nope", "nope: every call fails: STGP_BACKEND must be one of"),
    ],
)
def test_info_shows_the_effect_of_the_environment(
    value: str, effect: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STGP_BACKEND", value)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    assert effect in capsys.readouterr().out


def test_info_says_that_the_backend_of_the_environment_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "backend_reasons", lambda: {"reference": "it is Sunday"})
    monkeypatch.setenv("STGP_BACKEND", "reference")
    assert main(["info"]) == 0
    assert "every call fails, since it cannot run here: it is Sunday" in capsys.readouterr().out


def test_inspect_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(inspect_command, "inspect_command", lambda *given, **named: calls.append((given, named)))
    arguments = ["--temperature", "-2", "--num-frames", "4", "--grid", "4x6", "--tap", "l12", "--key", "k", "--force"]
    assert main(["inspect", "a.mp4", "-o", "out.png", "--frame-counts", "9,7", *arguments]) == 0
    [(given, named)] = calls
    assert given == (Path("a.mp4"), Path("out.png"))
    assert named.pop("console") is not None
    assert named == {
        "options": {**DEFAULTS, "frame_counts": (9, 7), "backend": "auto", "temperature": -2.0},
        "num_frames": 4,
        "grid": (4, 6),
        "tap": "l12",
        "key": "k",
        "force": True,
    }


def test_inspect_refuses_before_any_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_command, "inspect_command", lambda *_, **__: pytest.fail("work began"))
    Path("out.png").touch()
    assert main(["inspect", "a.npy", "-o", "out.png"]) == 1
    assert main(["inspect", "a.npy", "-o", "a.npy", "--force"]) == 1
    assert main(["inspect", "a.npy", "-o", "new.png", "--padding", "9"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(":")[0] for error in errors] == ["stgp inspect"] * 3
    assert ["exists already" in errors[0], "is the input" in errors[1], "padding must be" in errors[2]] == [True] * 3


def test_demo_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(demo, "demo_command", lambda *given, **named: calls.append((given, named)))
    assert main(["demo"]) == 0
    assert main(["demo", "-o", "x.png", "--offline-tokens", "--force"]) == 0
    assert [given for given, _ in calls] == [(Path("demo.png"),), (Path("x.png"),)]
    assert [(named["offline_tokens"], named["force"]) for _, named in calls] == [(False, False), (True, True)]


# ---- the process ----


def test_version_of_the_process() -> None:
    done = stgp(["--version"])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"stgp {stgridpool_kernels.__version__}\n", "")


def test_piped_output_has_no_colours_bars_or_cursor_movements() -> None:
    done = stgp(["pool", "a.npy", "none.npy", "-o", "out"])
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == "stgp pool: 1 of 2 inputs failed:\nstgp pool: none.npy: no such file\n"
    assert "written into: out" in done.stdout


def test_a_narrow_ascii_terminal_loses_no_text() -> None:
    environment = {**os.environ, "COLUMNS": "44", "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    done = stgp(["pool", "a.npy", "-o", "out"], env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "…" not in done.stdout
    assert "float32" in done.stdout
    assert files() == ["a.npy", "out/a.npy"]
