"""The commands of docs/accuracy.md run with other weights and data sets; `make test-lmms-eval` runs these tests.

A shell runs the page's blocks as they stand, with a `python` that prints its arguments. lmms-eval's own parser then
reads every command, and each run is made with a model of few random weights in place of the checkpoint, on a task that
is made here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stgridpool_kernels as stgp

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-lmms-eval")

import llava_stub
import tiny_checkpoints
import tiny_task
import torch
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from qwen_vl_utils.vision_process import smart_resize

from stgridpool_kernels.integrations.base import pooled_grid

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "accuracy.md").read_text(encoding="utf-8")
OTHER_PAGE = (HERE.parents[1] / "docs" / "integrations" / "lmms_eval.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if "pip install" not in block]
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes=1", "-m", "lmms_eval"]
SIDES = {"average": {"ceil_mode": False}, "bilinear": {"ceil_mode": True}}

# These are the options that the names of runs of LLaVA stand for; None is the model's own pooling.
MEANT: dict[str, dict[str, Any] | None] = {
    "onevision": None,
    "onevision-stgp": {},
    "video": None,
    "video-stgp": {},
    "ptg-only": {"temperature": 0.0},
    "nsp-only": {"frame_strides": ()},
    "both": {},
    **{f"beta-{beta}": {"temperature": float(beta)} for beta in ("0", "0.5", "1", "2", "5", "10")},
    **{f"p-{p}": {"norm_type": float(p)} for p in ("1", "2", "3", "4", "inf")},
    "budget-30": {"output_size": 7},
    "budget-50": {"output_size": 9},
}

Line = tuple[int, tuple[str, dict[str, Any]] | None]


def lines(strides: tuple[int, ...], few: int) -> dict[str, Line]:
    """Return the frames of every line of a model of transformers, with the mode and the options if it has any."""
    average: dict[str, Any] = {"temperature": 0.0, "frame_strides": ()}
    ours = {"frame_strides": strides}
    return {
        "stock": (64, None),
        "grid": (64, ("grid", ours)),
        "average-2": (64, ("pool", average)),
        "pool-2": (64, ("pool", ours)),
        "frames-2": (16, None),
        "average-3": (64, ("pool", {**average, "kernel_size": 3})),
        "pool-3": (64, ("pool", {**ours, "kernel_size": 3})),
        "frames-3": (few, None),
    }


OF_SIZES: dict[str, Line] = {"size-2": (64, None), "size-3": (64, None)}
OF_TRANSFORMERS: dict[str, dict[str, Line]] = {
    "qwen2_5_vl": lines((1, 2, 4), 8) | OF_SIZES,
    "qwen3_vl": lines((1, 2, 4), 8) | OF_SIZES,
    "qwen3_5": lines((1, 2, 4), 8),
    "internvl_hf": lines((2, 4, 8), 9),
}
TODAY = [f"{model}-{line}" for model, given in OF_TRANSFORMERS.items() for line in given]


def commands() -> dict[str, list[list[str]]]:
    """Return the arguments of each command of the page, by the name that its run is logged under."""
    note = f"""python() {{ {sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"; }}"""
    script = "\n".join(["set -eu", note, *BLOCKS])
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[list[str]]] = {}
    for given in map(json.loads, printed.splitlines()):
        assert given[: len(LAUNCH)] == LAUNCH
        name = given[given.index("--output_path") + 1].removeprefix("logs/")
        found.setdefault(name, []).append(given[len(LAUNCH) :])
    return found


COMMANDS = commands()


def parsed(given: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *given])
    return parse_eval_args()[1]


def test_the_page_has_every_run() -> None:
    assert set(COMMANDS) == {*MEANT, *TODAY}
    assert [len(COMMANDS[name]) for name in MEANT] == [6] * 4 + [3] * 16
    assert {len(COMMANDS[name]) for name in TODAY} == {4}
    assert f"each of the {len(COMMANDS)} runs" in PAGE


def test_every_task_is_one_of_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    known = TaskManager("ERROR").all_tasks
    asked = {parsed(given, monkeypatch).tasks for runs in COMMANDS.values() for given in runs}
    assert len(asked) == 6
    assert asked <= set(known)


@pytest.mark.parametrize("name", MEANT)
def test_a_run_of_llava(name: str, pretrained: str, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [parsed(given, monkeypatch) for given in COMMANDS[name]]
    [model_args] = {each.model_args for each in asked}
    assert {(each.model, each.batch_size, each.log_samples) for each in asked} == {("llava_onevision_stgp", "1", True)}
    frames = simple_parse_args_string(model_args)["max_frames_num"]
    options = MEANT[name]
    model = tiny_task.evaluate_llava(asked[0].model, of_few_weights(model_args, pretrained, device_map="auto"), tasks)
    for features, pooled in model.videos:
        assert features.shape[:2] == (frames, llava_stub.SIDE**2)
        own = model.get_2dPool(features)
        if options is None:
            assert torch.equal(pooled, own)
            continue
        size = {} if "output_size" in options else SIDES[model.config.mm_spatial_pool_mode]
        grid = features.unflatten(1, (llava_stub.SIDE,) * 2)
        assert torch.equal(pooled, stgp.grid_pool(grid, **size, **options).flatten(1, 2))
        assert pooled.shape != own.shape or not torch.equal(pooled, own)


@pytest.fixture(scope="session")
def long_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a task with videos of the page's number of frames."""
    return tiny_task.save(tmp_path_factory.mktemp("long"), frames=64)


@pytest.mark.parametrize("name", TODAY)
def test_a_run_of_a_model_of_transformers(
    name: str,
    folder_of: Callable[[str], str],
    requests: list[tiny_checkpoints.Request],
    long_videos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, line = name.partition("-")
    frames, ours = OF_TRANSFORMERS[model][line]
    asked = [parsed(given, monkeypatch) for given in COMMANDS[name]]
    [model_args] = {each.model_args for each in asked}
    assert {(each.model, each.batch_size, each.log_samples) for each in asked} == {(f"{model}_stgp", "1", True)}
    here = tiny_checkpoints.ON_THE_CPU[model] | ({"stgp_backend": "reference"} if ours else {})
    tiny_task.evaluate(asked[0].model, of_few_weights(model_args, folder_of(model), **here), long_videos)
    plain, _ = tiny_checkpoints.load(model, folder_of(model))
    mode, options = ours or ("grid", {"frame_strides": ()})
    assert len(requests) == tiny_task.QUESTIONS
    for request in requests:
        assert tiny_checkpoints.frames(request) == frames
        expected = tiny_checkpoints.by_hand(plain, request.inputs, mode, **options)
        assert all(map(torch.equal, tiny_checkpoints.seen(request), expected))


@pytest.mark.parametrize("video", [(720, 1280), (1080, 1920), (360, 640), (480, 640), (240, 320), (1280, 720)])
@pytest.mark.parametrize(("model", "side", "resized"), [("qwen2_5_vl", 28, 2), ("qwen3_vl", 32, 1)])
def test_smaller_frames_have_about_the_tokens_that_windows_leave(
    model: str, side: int, resized: int, video: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor of Qwen2.5-VL resizes frames a second time, to the same number of pixels."""

    def tokens(line: str) -> tuple[int, int]:
        given = simple_parse_args_string(parsed(COMMANDS[f"{model}-{line}"][0], monkeypatch).model_args)
        pixels = video
        for _ in range(resized):
            pixels = smart_resize(*pixels, side, given["min_pixels"], given["max_pixels"])
        return pixels[0] // side, pixels[1] // side

    for window in (2, 3):
        left = math.prod(pooled_grid(tokens("stock"), kernel_size=window, ceil_mode=True))
        assert 0.75 <= math.prod(tokens(f"size-{window}")) / left <= 1.25


def of_few_weights(model_args: str, pretrained: str, **more: object) -> str:
    """Return the page's model arguments with another checkpoint, followed by others, which override the page's."""
    checkpoint = simple_parse_args_string(model_args)["pretrained"]
    assert model_args.count(checkpoint) == 1
    return ",".join([model_args.replace(checkpoint, pretrained), *(f"{name}={value}" for name, value in more.items())])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ptg-only", "ST-GridPool: 9 × 9 → 16 tokens a frame, 1024 for 64 frames, PoolOptions(temperature=0.0)"),
        (
            "qwen3_vl-pool-2",
            "ST-GridPool: videos of Qwen3VLForConditionalGeneration, "
            "ModeOptions(mode='pool', frame_strides=(1, 2, 4), ceil_mode=True)",
        ),
    ],
)
def test_one_command_in_full(
    name: str,
    said: str,
    pretrained: str,
    folder_of: Callable[[str], str],
    long_videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launcher and command line run in a process of their own, with other checkpoint, task, device and sizes."""
    [given, *_] = COMMANDS[name]
    asked = parsed(given, monkeypatch)
    if name in MEANT:
        model_args = of_few_weights(asked.model_args, pretrained, device_map="auto")
    else:
        model_args = of_few_weights(asked.model_args, folder_of("qwen3_vl"), **tiny_checkpoints.ON_THE_CPU["qwen3_vl"])
    swapped = {asked.model_args: model_args, asked.tasks: "tiny_video"}
    given = [swapped.get(word, word) for word in given]
    package = tmp_path / "path/llava/__init__.py"  # This takes the place of a clone of LLaVA-NeXT.
    package.parent.mkdir(parents=True)
    package.write_text("import llava_stub\n\nllava_stub.install()\n")
    path = [str(package.parents[1]), str(HERE), str(HERE.parents[1])]
    done = subprocess.run(
        [
            sys.executable,
            *LAUNCH[:3],
            "--cpu",
            *LAUNCH[3:],
            *given,
            "--include_path",
            str(long_videos),
            "--device",
            "cpu",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [samples] = (tmp_path / "logs" / name).rglob("*_samples_tiny_video.jsonl")
    assert len(samples.read_text().splitlines()) == tiny_task.QUESTIONS
    assert said in done.stderr + done.stdout
    assert said in OTHER_PAGE


def asked_on_the_other_page(model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    commands = re.findall(r"```\n(python -m lmms_eval .*?)```", OTHER_PAGE, re.DOTALL)
    [words] = [words for command in commands if model in (words := shlex.split(command.replace("\\\n", " ")))]
    assert words[:3] == ["python", "-m", "lmms_eval"]
    asked = parsed(words[3:], monkeypatch)
    assert (asked.model, asked.tasks) == (model, "videomme")
    return asked


def test_the_command_of_the_other_page_for_llava(pretrained: str, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_on_the_other_page("llava_vid_stgp", monkeypatch)
    given = of_few_weights(asked.model_args, pretrained, device_map="auto")
    model = tiny_task.evaluate_llava(asked.model, given, tasks)
    for features, pooled in model.videos:
        grid = features.unflatten(1, (llava_stub.SIDE,) * 2)
        assert torch.equal(pooled, stgp.grid_pool(grid, temperature=2.0, frame_strides=(2, 4, 8)).flatten(1, 2))


def test_the_command_of_the_other_page_for_qwen(
    folder_of: Callable[[str], str],
    requests: list[tiny_checkpoints.Request],
    long_videos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = asked_on_the_other_page("qwen3_vl_stgp", monkeypatch)
    here = tiny_checkpoints.ON_THE_CPU["qwen3_vl"] | {"stgp_backend": "reference"}
    tiny_task.evaluate(asked.model, of_few_weights(asked.model_args, folder_of("qwen3_vl"), **here), long_videos)
    plain, _ = tiny_checkpoints.load("qwen3_vl", folder_of("qwen3_vl"))
    for request in requests:
        expected = tiny_checkpoints.by_hand(plain, request.inputs, "pool", temperature=2.0, frame_strides=(1, 2, 4))
        assert all(map(torch.equal, tiny_checkpoints.seen(request), expected))
