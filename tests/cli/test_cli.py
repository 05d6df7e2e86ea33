"""The command `stgp` reads options, pools files, shows the machine, and ends in one line after an error or Ctrl-C."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import stgridpool_kernels
from stgridpool_kernels import backends
from stgridpool_kernels.backends import compiled
from stgridpool_kernels.cli import demo, info, options, pool
from stgridpool_kernels.cli import inspect as inspect_command
from stgridpool_kernels.cli import main as cli
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.integrations.command_line import join_values
from stgridpool_kernels.io import inputs, token_files
from stgridpool_kernels.io.token_files import read_tokens, write_tokens
from tests.support.cases import tokens

SCHEMA = [argument for argument in torch.ops.stgp.grid_pool.default._schema.arguments if argument.kwarg_only]
DEFAULTS = {argument.name: argument.default_value for argument in SCHEMA}


@pytest.fixture(autouse=True)
def _in_a_folder_with_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STGP_BACKEND", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    write_tokens("a.npy", tokens(16, 6, 7, 8), force=False)


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# ---- options ----


def parsed(*arguments: str) -> dict[str, Any]:
    given = join_values(["pool", "a", "-o", "b", *arguments], options.integer_flags())
    return options.op_options(cli.build_parser().parse_args(given))


def test_every_schema_argument_has_an_option_with_help_and_the_same_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(options.OPTION_HELP) == set(DEFAULTS)
    assert parsed() == {**DEFAULTS, "backend": "auto"}
    with pytest.raises(SystemExit):
        main(["pool", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in DEFAULTS if f"--{name.replace('_', '-')}" not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("--frame-strides 4,2 --kernel-size 3x2", {"frame_strides": (4, 2), "kernel_size": (3, 2)}),
        ("--frame-strides 2 4 8 --output-size 10x10", {"frame_strides": (2, 4, 8), "output_size": (10, 10)}),
        (
            "--frame-strides=2:4 --stride 2×1 --padding 1 0",
            {"frame_strides": (2, 4), "stride": (2, 1), "padding": (1, 0)},
        ),
        ("--padding -1 -2 --frame-counts 16", {"padding": (-1, -2), "frame_counts": (16,)}),
        ("--frame-strides none --stride none", {"frame_strides": (), "stride": None}),
        ("--ceil-mode --no-count-include-pad", {"ceil_mode": True, "count_include_pad": False}),
        ("--padding -1,-2 --temperature -1e-3", {"padding": (-1, -2), "temperature": -1e-3}),
        ("--temperature -.5 --norm-type inf", {"temperature": -0.5, "norm_type": float("inf")}),
        ("--temperature=-2 --backend reference", {"temperature": -2.0, "backend": "reference"}),
        ("--temperature -inf --frame-counts 8,8", {"temperature": -float("inf"), "frame_counts": (8, 8)}),
    ],
)
def test_options_become_arguments(arguments: str, meant: dict[str, Any]) -> None:
    assert parsed(*arguments.split()) == {**DEFAULTS, "backend": "auto", **meant}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pool a.npy -o out.npy --frame-strides 2,x", "--frame-strides: it must be integers like 2,4,8, or none"),
        ("pool a.npy -o out.npy --kernel-size 1,2,3", "--kernel-size: it must be one integer or two like 2,2"),
        ("pool a.npy -o out.npy --temperature warm", "argument --temperature: it must be a number, got 'warm'"),
        ("pool a.npy -o out.npy --backend nope", "argument --backend: invalid choice"),
        ("pool a.npy -o out.npy --temp 1", "unrecognized arguments: --temp 1; did you mean --temperature?"),
        (
            "pool a.npy -o out.npy --kernel_size 2",
            "unrecognized arguments: --kernel_size 2; did you mean --kernel-size?",
        ),
        ("pool a.npy -o out.npy --frame_stride=2", "--frame_stride=2; did you mean --frame-strides?"),
        ("inspect a.npy -o out.png --gird 3x3", "--gird 3x3; did you mean --grid?"),
        ("demo --offline", "unrecognized arguments: --offline; did you mean --offline-tokens?"),
        ("pool a.npy -o out.npy b.npy", "unrecognized arguments: b.npy\n"),
        ("pool a.npy -o out.npy --num-frames 0", "argument --num-frames: expected an integer of at least 1"),
        ("pool a.npy -o out.npy --grid 18", "argument --grid: it must be rows and columns like 18x32"),
        (
            "pool a.npy -o out.npy --grid 0x3",
            "argument --grid: it must be rows and columns like 18x32, both at least 1",
        ),
        ("pool a.npy", "the following arguments are required: -o/--output"),
        ("nope", "invalid choice: 'nope'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_usage_errors_exit_2_and_name_the_option(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    command = arguments.split()[:1] if not message.startswith("invalid choice: 'nope'") else []
    assert error.startswith(" ".join(["usage: stgp", *command, ""]))
    assert message in error
    assert files() == ["a.npy"]


@pytest.mark.parametrize("text", ["2x3", "2,3", "2:3", "2 3", "2×3"])
def test_a_grid_in_every_form(text: str) -> None:
    for given in ([text], text.split()):
        arguments = join_values(["inspect", "a", "-o", "b", "--grid", *given], options.integer_flags())
        assert cli.build_parser().parse_args(arguments).grid == (2, 3)


def test_version_and_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    version = f"stgp {stgridpool_kernels.__version__}\n"
    helps = [([command, "--help"], f"\n  stgp {command}") for command in ("info", "pool", "inspect", "demo")]
    for arguments, said in [(["--version"], version), *helps]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert said in capsys.readouterr().out


# ---- pool ----


def test_pool_writes_what_the_op_computes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--frame-strides 2 --grid-shape 1,2 --kernel-size 3,2 --stride 2 --padding 1 --ceil-mode "
        "--no-count-include-pad --temperature -2 --norm-type inf --no-normalize-norm --sampling first"
    )
    assert main(["pool", "a.npy", "-o", "out.npy", *arguments.split()]) == 0
    expected = stgridpool_kernels.grid_pool(
        tokens(16, 6, 7, 8), frame_strides=[2], grid_shape=[1, 2], kernel_size=[3, 2], stride=2, padding=1,
        ceil_mode=True, count_include_pad=False, temperature=-2.0, norm_type=float("inf"), normalize_norm=False,
        sampling="first",
    )  # fmt: skip
    assert torch.equal(read_tokens("out.npy"), expected)
    shown = capsys.readouterr()
    assert f"(16, 6, 7, 8) → {tuple(expected.shape)}" in shown.out
    assert "float32" in shown.out
    assert "pooled on " in shown.out
    assert shown.err == ""


def test_pool_asks_for_the_backend_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pool, "grid_pool", lambda x, **options: (asked.append(options["backend"]), x)[1])
    assert main(["pool", "a.npy", "-o", "out.npy", "--backend", "reference"]) == 0
    assert main(["pool", "a.npy", "-o", "out2.npy"]) == 0
    assert asked == ["reference", "auto"]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_pool_keeps_the_format_and_dtype_of_its_input(suffix: str) -> None:
    x = tokens(2, 8, 4, 4, 8).to(torch.bfloat16 if suffix in (".pt", ".safetensors") else torch.float16)
    write_tokens(f"in{suffix}", x, force=False)
    assert main(["pool", f"in{suffix}", "-o", "new/folder"]) == 0
    pooled = read_tokens(f"new/folder/in{suffix}")
    assert torch.equal(pooled, stgridpool_kernels.grid_pool(x))
    assert pooled.dtype == x.dtype


def test_pool_converts_format_and_dtype() -> None:
    """The option --key names the tensor of a file that holds several."""
    x = tokens(8, 4, 4, 8).bfloat16()
    torch.save({"x": x, "other": tokens(8, 6, 6, 8)}, "b.pt")
    assert main(["pool", "b.pt", "-o", "out/", "--key", "x", "--format", "npz", "--dtype", "float32"]) == 0
    assert files() == ["a.npy", "b.pt", "out/b.npz"]
    assert torch.equal(read_tokens("out/b.npz"), stgridpool_kernels.grid_pool(x).float())


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
    assert main(["pool", "none.npy", "none.pt", "-o", "none"]) == 1
    assert not Path("none").exists()


@pytest.mark.parametrize("step", ["load_input", "grid_pool", "write_tokens"])
def test_any_failure_of_a_file_leaves_the_others(
    step: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(pool, step), []

    def failing(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 57 bytes.\nBacktrace")
        return real(*given, **named)

    monkeypatch.setattr(pool, step, failing)
    write_tokens("b.npy", tokens(8, 4, 4, 8), force=False)
    assert main(["pool", "a.npy", "b.npy", "-o", "out"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "stgp pool: 1 of 2 inputs failed:",
        "stgp pool: a.npy: out of memory: cannot allocate 57 bytes",
    ]
    assert files() == ["a.npy", "b.npy", "out/b.npy"]


def test_folders_are_pooled_into_the_same_subfolders(capsys: pytest.CaptureFixture[str]) -> None:
    """The command counts files that it leaves out, and pools the others if one of them fails."""
    Path("in/more").mkdir(parents=True)
    x = tokens(8, 4, 4, 8)
    write_tokens("in/b.npy", x, force=False)
    write_tokens("in/more/b.pt", x, force=False)
    Path("in/more/c.PT").write_bytes(b"damaged")
    Path("in/thumbnail.JPG").touch()
    assert main(["pool", "in", "a.npy", "-o", "out"]) == 1
    assert [name for name in files() if name.startswith("out")] == ["out/a.npy", "out/b.npy", "out/more/b.pt"]
    assert torch.equal(read_tokens("out/more/b.pt"), stgridpool_kernels.grid_pool(x))
    shown = capsys.readouterr()
    assert "in/more/b.pt" in shown.out
    assert "written into: out" in shown.out
    assert shown.err.splitlines()[:2] == [
        "stgp pool: left out of folders: 1 .jpg",
        "stgp pool: 1 of 4 inputs failed:",
    ]
    assert shown.err.splitlines()[2].startswith("stgp pool: in/more/c.PT: ")
    assert main(["pool", "in", "-o", "out.npy"]) == 1
    assert "-o out.npy names a file, but there are a folder of inputs" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main(["pool", "empty", "-o", "out"]) == 1
    assert (
        "inputs must hold token files (.npy, .npz, .pt, .safetensors) or videos, empty has none"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("stream", [[], ["--stream", "--chunk", "3"]], ids=["whole", "streamed"])
def test_flattened_tokens_are_pooled_and_flattened_again(
    suffix: str, stream: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    x = tokens(16, 6, 7, 8)
    write_tokens(f"flat{suffix}", x.flatten(1, 2), force=False)
    command = ["pool", f"flat{suffix}", "-o", f"out{suffix}", *stream]
    assert main(command) == 1
    assert capsys.readouterr().err.endswith(
        "(T, H, W, C), got (16, 42, 8); flattened tokens (T, ROWS·COLS, C) need --grid ROWSxCOLS\n"
    )
    assert main([*command, "--grid", "6x6"]) == 1
    error = capsys.readouterr().err
    assert "--grid must have the 42 tokens of a flattened frame, got 6x6 = 36 for shape (16, 42, 8)\n" in error
    assert main([*command, "--grid", "6x7"]) == 0
    assert "(16, 42, 8) → (16, 9, 8)" in capsys.readouterr().out
    pooled = read_tokens(f"out{suffix}", grid=(3, 3))
    assert torch.equal(pooled, stgridpool_kernels.grid_pool(x).flatten(1, 2))


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("frames", "strides", "remark"),
    [
        (7, "2,4", "a video of 7 frames is too short for temporal gridding (8 frames)"),
        (8, "2,4", ""),
        (7, "none", ""),
        (23, "9,6", "a video of 23 frames is too short for temporal gridding (24 frames)"),
    ],
)  # fmt: skip
def test_a_video_too_short_for_gridding_is_named(
    frames: int, strides: str, remark: str, stream: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    x = tokens(frames, 4, 4, 8)
    write_tokens("x.npy", x, force=False)
    assert main(["pool", "x.npy", "-o", "out.npy", "--frame-strides", strides, *stream]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no multiple" not in line]
    assert said == ([f"stgp pool: x.npy: {remark}: frames are pooled one by one"] if remark else [])
    ungridded = torch.equal(read_tokens("out.npy"), stgridpool_kernels.norm_pool(x))
    assert ungridded == (bool(remark) or strides == "none")


def test_packed_videos_too_short_for_gridding_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "a.npy", "-o", "b.npy", "--frame-counts", "7,7,2"]) == 0
    assert "a.npy: a video of at most 7 frames is too short for temporal gridding" in capsys.readouterr().err
    assert main(["pool", "a.npy", "-o", "c.npy", "--frame-counts", "8,8", "--grid-shape", "2,2,1,2,1,1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_tokens_that_are_not_finite_are_counted(
    value: float, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    x = tokens(8, 4, 4, 8).to(dtype)
    x[2, 1, 1, 3] = x[2, 1, 1, 4] = x[5, 0, 0, 0] = value
    write_tokens("x.safetensors", x, force=False)
    for more in ([], ["--stream"]):
        assert main(["pool", "x.safetensors", "-o", "out.safetensors", "--force", *more]) == 0
        said = "2 tokens have a NaN or infinite value, and so may results that they are part of"
        assert capsys.readouterr().err == f"stgp pool: x.safetensors: {said}\n"


def test_errors_of_the_op_name_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "a.npy", "-o", "out.npy", "--frame-counts", "3,4"]) == 1
    assert capsys.readouterr().err == "stgp pool: a.npy: frame_counts must sum to T = 16, got [3, 4] with sum 7\n"
    assert main(["pool", "a.npy", "-o", "out.npy", "--frame-counts", "8,8"]) == 0
    assert torch.equal(read_tokens("out.npy"), stgridpool_kernels.grid_pool(tokens(16, 6, 7, 8), frame_counts=[8, 8]))


def test_a_dtype_that_overflows_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Infinities that the result has anyway are no overflow."""
    write_tokens("large.npy", tokens(8, 4, 4, 8) * 1e6, force=False)
    assert main(["pool", "large.npy", "-o", "out.npy", "--dtype", "float16"]) == 1
    assert "large.npy: --dtype float16 cannot hold the result's" in capsys.readouterr().err
    assert not Path("out.npy").exists()
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    assert torch.equal(pool._cast(x, torch.float16).isinf(), x.isinf())


BEFORE_WORK = {
    "option of the op": ("a.npy -o x.npy --kernel-size 0", "kernel_size must be 2 integers"),
    "temperature": ("a.npy -o x.npy --temperature nan", "temperature must be finite in float64 arithmetic, got nan"),
    "two inputs, one file": ("a.npy b.npy -o x.npy", "-o x.npy names a file, but there are 2 inputs"),
    "same output": ("a.npy sub/a.npy -o out", "out/a.npy would be made of a.npy and sub/a.npy"),
    "same output by format": ("a.npy a.pt -o out --format npz", "out/a.npz would be made of a.npy and a.pt"),
    "the input itself": ("a.npy -o a.npy --force", "a.npy: is the input a.npy, which is never overwritten"),
    "the input's folder": ("a.npy -o . --force", "the folder of an input, which is never overwritten: a.npy"),
    "format against suffix": ("a.npy -o x.npy --format pt", "-o x.npy and --format pt disagree"),
    "no folder": ("a.npy -o none/x.npy", "none/x.npy: there is no folder none"),
    "folder is a file": ("a.npy -o a.npy/out", "a.npy is not a folder"),
    "dtype against format": ("a.npy -o x.npy --dtype bfloat16", "NumPy's formats cannot hold bfloat16"),
    "device": ("a.npy -o x.npy --device nope", "--device must be one that can be used here, got 'nope'"),
    **{
        f"device {name}": (
            f"a.npy -o x.npy --device {name}",
            f"--device must be one that can be used here, got '{name}'; allowed: cpu",
        )
        for name in ("hpu", "vulkan", "opencl", "meta", "CPU")
    },
    "device that is not there": pytest.param(
        "a.npy -o x.npy --device cuda",
        "--device must be one that can be used here, got 'cuda' (",
        marks=pytest.mark.needs("no gpu"),
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BEFORE_WORK.values(), ids=BEFORE_WORK.keys())
def test_errors_that_need_no_input_come_before_any_work(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "load_input", lambda *_, **__: pytest.fail("an input was read"))
    assert main(["pool", *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("stgp pool: ")
    assert message in error
    assert error.count("\n") == 1
    assert files() == ["a.npy"]


def test_what_is_there_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Outputs are overwritten with --force alone, and an input is never overwritten, not even under another name."""
    write_tokens("b.npy", tokens(8, 4, 4, 8), force=False)
    Path("out").mkdir()
    Path("out/b.npy").write_text("precious")
    assert main(["pool", "a.npy", "b.npy", "-o", "out"]) == 1
    assert "out/b.npy: exists already; give another name, or --force" in capsys.readouterr().err
    assert files() == ["a.npy", "b.npy", "out/b.npy"]
    assert Path("out/b.npy").read_text() == "precious"
    assert main(["pool", "a.npy", "b.npy", "-o", "out", "--force"]) == 0
    assert read_tokens("out/b.npy").shape == (8, 2, 2, 8)
    for link in (os.link, os.symlink):
        link("a.npy", f"{link.__name__}.npy")
        assert main(["pool", "a.npy", "-o", f"{link.__name__}.npy", "--force"]) == 1
        assert f"{link.__name__}.npy: is the input a.npy, which is never overwritten" in capsys.readouterr().err
    assert torch.equal(read_tokens("a.npy"), tokens(16, 6, 7, 8))


def test_a_backend_that_cannot_run_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "backend_reasons", lambda: {"reference": "it is Sunday"})
    assert main(["pool", "a.npy", "-o", "out.npy", "--backend", "reference"]) == 1
    assert capsys.readouterr().err == "stgp pool: backend 'reference' cannot run here: it is Sunday\n"
    monkeypatch.setenv("STGP_BACKEND", "nope")
    assert main(["pool", "a.npy", "-o", "out.npy"]) == 1
    assert "stgp pool: STGP_BACKEND must be one of 'auto', " in capsys.readouterr().err


@pytest.mark.gpu
def test_pool_on_a_gpu() -> None:
    assert main(["pool", "a.npy", "-o", "out.npy", "--device", "cuda"]) == 0
    expected = stgridpool_kernels.grid_pool(tokens(16, 6, 7, 8).cuda()).cpu()
    assert torch.equal(read_tokens("out.npy"), expected)


@pytest.mark.gpu
def test_a_gpu_is_the_default_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "a.npy", "-o", "out.npy"]) == 0
    assert main(["inspect", "a.npy", "-o", "out.png"]) == 0
    assert main(["demo", "--offline-tokens", "-o", "demo.png"]) == 0
    assert main(["bench", "--shape", "9x5x7x8"]) == 0
    assert capsys.readouterr().out.count("cuda:0") == 2


def test_names_with_markup_or_escapes_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[red]a.npy", "\x1b[31mb.npy", "c\n.npy"]
    for name in names:
        write_tokens(name, tokens(8, 4, 4, 8), force=False)
    assert main(["pool", *names, "\x1b[31mnone.npy", "-o", "out"]) == 1
    shown = capsys.readouterr()
    assert [name for name in ("[red]a.npy", r"\x1b[31mb.npy", r"c\n.npy") if name not in shown.out] == []
    assert "\x1b" not in shown.out + shown.err
    assert r"\x1b[31mnone.npy: no such file" in shown.err


# ---- errors and interruptions ----


def test_errors_are_one_line_and_a_traceback_with_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody expected is one line too, and a missing package comes with how to install it."""

    def fail() -> None:
        raise KeyError("a bug")

    assert main(["pool", "none.npy", "-o", "out.npy"]) == 1
    assert capsys.readouterr().err == "stgp pool: none.npy: no such file\n"
    assert main(["pool", "none.npy", "-o", "out.npy", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(info, "_facts_table", fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "stgp info: unexpected KeyError: 'a bug' (--debug shows where)\n"
    Path("clip.mp4").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    inputs._encoder.cache_clear()
    assert main(["pool", "clip.mp4", "-o", "out"]) == 1
    assert 'pip install "stgridpool_kernels[demo]"' in capsys.readouterr().err


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


def test_a_narrow_ascii_pipe_loses_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed to a pipe has no colours, bars or cursor movements, and every character is ASCII."""
    monkeypatch.setenv("COLUMNS", "44")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["pool", "a.npy", "none.npy", "-o", "out"]) == 1
    shown, errors = (stream.buffer.getvalue().decode("ascii") for stream in (out, err))
    assert errors == "stgp pool: 1 of 2 inputs failed:\nstgp pool: none.npy: no such file\n"
    assert "\x1b" not in shown
    assert "float32" in shown
    assert "written into: out" in shown


# ---- info, inspect, demo ----


def info_rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the two columns that `stgp info` prints."""
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {cells[0].strip(): cells[1].strip() for line in lines if len(cells := line.strip("│").split("│")) == 2}


def test_info_shows_versions_packages_and_backends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "backend_reasons", lambda: {"fast": "no fast device", "reference": None})
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


def test_info_shows_what_auto_passes_over(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that runs by name alone is not the one that auto takes."""
    by_name = dataclasses.replace(backends.REFERENCE, name="by-name", opt_in_reason=lambda: "nobody tried it")
    monkeypatch.setattr(info, "BACKENDS", [by_name, backends.REFERENCE])
    monkeypatch.setattr(info, "backend_reasons", lambda: {"by-name": None, "reference": None})
    rows = info_rows(capsys)
    assert rows["by-name"] == "can run; auto passes it over: nobody tried it"
    assert rows["reference"] == "can run; auto takes it first"


def test_info_shows_the_compiled_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    about = {
        "version": "0.9.1", "compiler": "GNU 12.2.0", "torch": "2.13.0+cpu", "stable ABI": "torch 2.10",
        "cuda": "13.0.88", "cuda architectures": "80, 90 and PTX of 90", "cpu capabilities": "avx512, avx2, portable",
    }  # fmt: skip
    library = SimpleNamespace(build_info=lambda: about, cpu_capability=lambda: "avx2")
    monkeypatch.setattr(compiled, "LIBRARY", library)
    rows = info_rows(capsys)
    expected = "0.9.1, built by GNU 12.2.0 with torch 2.13.0+cpu; stable ABI of torch 2.10"
    assert rows["compiled library"] == expected
    assert rows["CPU kernels"] == "avx2, compiled for avx512, avx2, portable"
    assert rows["CUDA kernels"] == "CUDA 13.0.88, compiled for 80, 90 and PTX of 90"
    monkeypatch.setattr(compiled, "LIBRARY", None)
    monkeypatch.setattr(compiled, "why_missing", lambda: "it rained")
    rows = info_rows(capsys)
    assert rows["compiled library"] == "missing: it rained"
    assert "CPU kernels" not in rows
    assert rows["cpu"] == "cannot run: the compiled library is missing: it rained"


@pytest.mark.needs("library")
def test_info_and_the_compiled_library_agree(capsys: pytest.CaptureFixture[str]) -> None:
    rows, info = info_rows(capsys), compiled.LIBRARY.build_info()
    assert all(info[name] in rows["compiled library"] for name in ("version", "compiler", "torch", "stable ABI"))
    assert rows["CPU kernels"].split(",")[0] in info["cpu capabilities"].split(", ")
    assert (rows["CUDA kernels"] == "none") == (not info["cuda"])


@pytest.mark.parametrize(
    ("value", "effect"),
    [
        ("reference", "reference: every call fails, since it cannot run here: it is Sunday"),
        ("auto", "auto: calls run on the fastest that can unless they ask for another"),
        ("nope", "nope: every call fails: STGP_BACKEND must be one of"),
    ],
)
def test_info_shows_the_effect_of_the_environment(
    value: str, effect: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "backend_reasons", lambda: {"reference": "it is Sunday"})
    monkeypatch.setenv("STGP_BACKEND", value)
    assert effect in info_rows(capsys)["STGP_BACKEND"]


def test_inspect_and_demo_hand_their_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    for command, name in ((inspect_command, "inspect_command"), (demo, "demo_command")):
        monkeypatch.setattr(command, name, lambda *given, console, **named: calls.append((given, named)))
    arguments = ["--temperature", "-2", "--num-frames", "4", "--grid", "4x6", "--tap", "l12", "--key", "k", "--force"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["inspect", "a.mp4", "-o", "out.png", "--frame-counts", "9,7", *arguments]) == 0
    assert main(["demo"]) == 0
    assert main(["demo", "-o", "x.png", "--offline-tokens", "--force"]) == 0
    given = {**DEFAULTS, "frame_counts": (9, 7), "backend": "auto", "temperature": -2.0}
    device = torch.device("cpu")
    assert calls == [
        (
            (Path("a.mp4"), Path("out.png")),
            {
                "options": given,
                "num_frames": 4,
                "grid": (4, 6),
                "tap": "l12",
                "key": "k",
                "device": device,
                "force": True,
            },
        ),
        ((Path("demo.png"),), {"offline_tokens": False, "device": device, "force": False}),
        ((Path("x.png"),), {"offline_tokens": True, "device": device, "force": True}),
    ]
