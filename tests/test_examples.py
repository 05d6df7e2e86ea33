"""The programs of examples/ run and print what they promise, and the stored outputs of the notebook are right.

examples/sharded.py is run by test_scaling.py, examples/ray_pool.py by integrations/test_ray.py, and
examples/vllm_client.py by with_vllm/test_page.py too, where it asks a server of vLLM.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.integrations import qwen_vl
from stgridpool_kernels.io.data import load_fixture
from stgridpool_kernels.io.encoder import find_sample_video
from stgridpool_kernels.io.token_files import write_tokens
from stgridpool_kernels.io.video import read_frames
from tests.integrations.test_transformers import embed
from tests.support import tiny_grid_models, tiny_models
from tests.support.examples import FOLDER, commands, docstring, run_example
from tests.support.media import write_video
from tests.support.pages import VLLM

ROOT = FOLDER.parent
PROGRAMS = sorted(file.name for file in FOLDER.glob("*.py"))
NOTEBOOK = json.loads((FOLDER / "method.ipynb").read_text(encoding="utf-8"))
ROWS = re.findall(
    r"^\| \[(.+?)\]\((.+?)\) \| (.+?) \| (.+?) \| (.+?) \|$",
    (FOLDER / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
"""The rows of the table of examples/README.md: name, link, what it shows, what it needs, and the tests that run it."""

with_transformers = pytest.mark.needs("torchvision")


def refused(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """Return the last line that an example prints as it refuses its arguments."""
    with pytest.raises(SystemExit) as ended:
        run_example(name, *arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: ")
    return shown.err.splitlines()[-1]


# ---- the folder ----


def test_every_example_is_in_the_table_with_the_test_that_runs_it() -> None:
    assert [name for name, *_ in ROWS] == sorted(file.name for file in FOLDER.iterdir() if file.name != "README.md")
    for name, link, shows, _, tests in ROWS:
        assert link == name
        if name in PROGRAMS:
            assert shows == docstring(name).splitlines()[0].removesuffix(".")
        for test in re.findall(r"`(tests/.+?)`", tests):
            assert name in (ROOT / test).read_text(encoding="utf-8")
        assert "`tests/" in tests


class Understood(Exception):
    """Raised in place of running an example whose arguments were read."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[with_transformers] * name.startswith("transformers_")) for name in PROGRAMS],
)
def test_the_commands_of_a_docstring_are_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = argparse.ArgumentParser.parse_args

    def read_and_stop(self: argparse.ArgumentParser, *arguments: Any) -> None:
        read(self, *arguments)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
    assert commands(name)
    for arguments in commands(name):
        with pytest.raises(Understood):
            run_example(name, *arguments)


# ---- packed_batch.py, streaming_camera.py, train.py ----


def test_packed_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("packed_batch.py")
    assert capsys.readouterr().out.splitlines() == [
        "video 0: (16, 9, 16, 384) → (16, 4, 8, 384), summaries in frames [7, 15], bit for bit as alone",
        "video 1: (11, 9, 16, 384) → (11, 4, 8, 384), summaries in frames [8], bit for bit as alone",
        "video 2: (5, 9, 16, 384) → (5, 4, 8, 384), summaries in frames [], bit for bit as alone",
        "pool_flat: (32, 144, 384) → (32, 32, 384), the same bits",
    ]
    for name, shape in (("a.npy", (9, 6, 5, 8)), ("b.pt", (4, 6, 5, 8)), ("c.npy", (4, 4, 5, 8))):
        write_tokens(tmp_path / name, torch.randn(shape), force=False)
    run_example("packed_batch.py", tmp_path / "a.npy", tmp_path / "b.pt")
    assert capsys.readouterr().out.endswith("pool_flat: (13, 30, 8) → (13, 6, 8), the same bits\n")

    error = refused(capsys, "packed_batch.py", tmp_path / "a.npy", tmp_path / "c.npy")
    assert error.endswith("one H, W, C and dtype, got (9, 6, 5, 8) torch.float32, (4, 4, 5, 8) torch.float32")
    assert refused(capsys, "packed_batch.py", tmp_path / "d.npy").endswith("d.npy: no such file")


def streamed(out: str) -> list[tuple[int, bool]]:
    """Return number of a frame, and whether it is a summary, for each line about one."""
    lines = re.findall(
        r"^frame (\d+): \(9, 16, 384\) → \(4, 8, 384\), \d+ bytes kept(, a summary)?$", out, re.MULTILINE
    )
    return [(int(number), bool(summary)) for number, summary in lines]


def test_streaming_camera(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwritten = stgp.grid_plan([16], 9, 16).overwritten
    expected = [(number, number in overwritten) for number in range(16)]
    run_example("streaming_camera.py")
    out = capsys.readouterr().out
    assert streamed(out) == expected
    assert out.endswith("\nbit for bit the frames of grid_pool(tokens)\n")

    state = tmp_path / "stream.pt"
    run_example("streaming_camera.py", "--frames", 10, "--state", state)
    run_example("streaming_camera.py", "--state", state)
    out = capsys.readouterr().out
    assert streamed(out) == expected
    assert out.count("bit for bit the frames of grid_pool(tokens)\n") == 2
    whole, parts = stgp.GridPoolStream(), stgp.GridPoolStream()
    whole.push(torch.from_numpy(load_fixture()[0]))
    parts.load_state_dict(torch.load(state, weights_only=True))
    more = torch.randn(16, 9, 16, 384).half()
    assert torch.equal(parts.push(more), whole.push(more))


def test_streaming_camera_reads_pipes_and_videos(capsys: pytest.CaptureFixture[str]) -> None:
    """The first one is started as a user starts it."""
    written = io.BytesIO()
    np.save(written, load_fixture()[0][:9])
    command = [sys.executable, str(FOLDER / "streaming_camera.py"), "-"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=written.getvalue(), env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert streamed(done.stdout.decode()) == [(number, number == 7) for number in range(9)]

    run_example("streaming_camera.py", find_sample_video("carphone_pristine.mp4"), "--frames", 2)
    for number, line in enumerate(capsys.readouterr().out.splitlines()):
        assert line.startswith(f"frame {number}: (18, 32, 384) → (9, 16, 384), ")
    assert number == 1


def test_streaming_camera_leaves_its_state_when_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push = stgp.GridPoolStream.push

    def interrupted(self: stgp.GridPoolStream, x: torch.Tensor) -> torch.Tensor:
        if self.frames() == 3:
            raise KeyboardInterrupt
        return push(self, x)

    monkeypatch.setattr(stgp.GridPoolStream, "push", interrupted)
    run_example("streaming_camera.py", "--state", tmp_path / "stream.pt")
    out = capsys.readouterr().out
    assert streamed(out) == [(0, False), (1, False), (2, False)]
    assert "\nstopped\n" in out
    monkeypatch.undo()
    run_example("streaming_camera.py", "--state", tmp_path / "stream.pt", "--frames", 1)
    assert streamed(capsys.readouterr().out) == [(3, False)]


def test_streaming_camera_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no state")
    (tmp_path / "empty").touch()
    for name in ("text", "empty"):
        error = refused(capsys, "streaming_camera.py", "--state", tmp_path / name)
        assert error.endswith(f"{name} is no file that torch.save wrote")
    torch.save({"frames": 1}, tmp_path / "other.pt")
    assert "other" not in refused(capsys, "streaming_camera.py", "--state", tmp_path / "other.pt")
    assert refused(capsys, "streaming_camera.py", tmp_path / "clip.mp4").endswith("clip.mp4: no such file")
    assert refused(capsys, "streaming_camera.py", "--frames=-1").endswith("--frames must not be negative, got -1")


def test_train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Tensor] = []
    pool = stgp.GridPool.forward
    monkeypatch.setattr(stgp.GridPool, "forward", lambda self, x: calls.append(x) or pool(self, x))
    printed = []
    for options, passes in (((), 1), (("--checkpoint",), 2), (("--temperature", 3), 1)):
        calls.clear()
        run_example("train.py", *options)
        assert len(calls) == 50 * passes
        printed.append(capsys.readouterr().out)
    plain, recomputed, hotter = printed
    assert recomputed == plain
    assert hotter != plain
    numbers = re.findall(r"^step (\d+): loss ([\d.]+), gradient of the projector ([\d.]+)$", plain, re.MULTILINE)
    assert [int(step) for step, *_ in numbers] == [1, 10, 20, 30, 40, 50]
    losses = [float(loss) for _, loss, _ in numbers]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05 * losses[0]
    assert all(float(gradient) > 0 for *_, gradient in numbers)
    assert refused(capsys, "train.py", "--steps", 0).endswith("--steps must be at least 1, got 0")


# ---- transformers_llava.py, transformers_qwen.py ----


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Return a video of 20 frames, 25 a second."""
    return write_video(tmp_path / "clip.mp4", frames=20)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Note the scores of every token that a model generates, by which answers differ more than by their tokens."""
    from transformers import GenerationMixin

    generate, scores = GenerationMixin.generate, []

    def generate_and_note(self: Any, **inputs: Any) -> torch.Tensor:
        found = generate(self, **inputs, output_scores=True, return_dict_in_generate=True)
        scores.append(torch.stack(found.scores))
        return found.sequences

    monkeypatch.setattr(GenerationMixin, "generate", generate_and_note)
    return scores


def assert_generated(generated: list[torch.Tensor]) -> None:
    """Check the scores of an example, of the same by hand, and of a model that is not patched."""
    example, by_hand, stock = generated
    torch.testing.assert_close(example, by_hand)
    assert (example[0] - stock[0]).nan_to_num().abs().max() > 1e-3


@with_transformers
@pytest.mark.parametrize(
    ("kind", "side", "places"), [("onevision", 27, 16 * 14 * 14 + 1), ("next_video", 24, 16 * 12 * 12)]
)
def test_transformers_llava(
    kind: str,
    side: int,
    places: int,
    tmp_path: Path,
    clip: Path,
    generated: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = getattr(tiny_models, kind)()
    processor = tiny_models.processor(model)
    for one in (model, processor):
        one.save_pretrained(tmp_path / "model")
    options = ("--frames", 16, "--temperature", 3, "--question", "who is it", "--max-new-tokens", 8)
    run_example("transformers_llava.py", tmp_path / "model", clip, *options)
    heading, answer = capsys.readouterr().out.splitlines()
    assert heading == f"16 frames of {side} × {side} = {16 * side**2} tokens → {places} in the prompt"

    inputs = processor(text="<video>who is it", videos=[read_frames(clip, 16)], return_tensors="pt")
    with torch.no_grad():
        given = embed(model, inputs["input_ids"], inputs["pixel_values_videos"], temperature=3.0)
        output = model.generate(inputs_embeds=given, max_new_tokens=8, do_sample=False)
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert_generated(generated)
    assert answer == processor.decode(output[0], skip_special_tokens=True)


@with_transformers
@pytest.mark.parametrize(
    ("kind", "flags", "options", "places"),
    [
        ("qwen3_vl", "", {}, 10 * 3 * 4),
        (
            "qwen2_5_vl",
            "--frame-strides 1 2 --temperature 3",
            {"frame_strides": (1, 2), "temperature": 3.0},
            10 * 3 * 4,
        ),
        ("qwen3_vl", "--output-size 2 5", {"output_size": (2, 5)}, 10 * 2 * 5),
        ("qwen3_vl", "--mode grid", {"mode": "grid"}, 10 * 6 * 8),
    ],
)
def test_transformers_qwen(
    kind: str,
    flags: str,
    options: dict[str, Any],
    places: int,
    tmp_path: Path,
    clip: Path,
    generated: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, processor = tiny_grid_models.build(kind)
    processor.chat_template = tiny_grid_models.chat_template(kind)
    for one in (model, processor):
        one.save_pretrained(tmp_path / "model")
    asked = ("--question", "who?", "--max-new-tokens", 8)
    run_example("transformers_qwen.py", tmp_path / "model", clip, *flags.split(), *asked)
    heading, answer = capsys.readouterr().out.splitlines()
    assert heading == f"20 frames, 10 after the encoder: {10 * 6 * 8} tokens → {places} in the prompt"

    def by_hand() -> str:
        video = torch.from_numpy(read_frames(clip, 32)).permute(0, 3, 1, 2)
        text = tiny_grid_models.placeholder(kind, "video") + "who?"
        inputs = tiny_grid_models.ask(processor, text, [video], frames_per_second=25.0)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    qwen_vl.patch(model, processor, **options)
    assert answer == by_hand()
    qwen_vl.unpatch(model, processor if options.get("mode") != "grid" else None)
    by_hand()
    assert_generated(generated)


@with_transformers
@pytest.mark.parametrize("name", ["transformers_llava.py", "transformers_qwen.py"])
def test_transformers_examples_refuse_what_they_cannot_use(
    name: str, tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    assert "missing.mp4: " in refused(capsys, name, tmp_path / "folder", tmp_path / "missing.mp4")
    assert refused(capsys, name, tmp_path / "folder", clip, "--frames", 0).endswith(
        "num_frames must be at least 1, got 0"
    )
    error = refused(capsys, name, tmp_path / "folder", clip)
    assert str(tmp_path / "folder") in error


# ---- vllm_client.py ----


class Server(BaseHTTPRequestHandler):
    """Stands in for a server of vLLM: it has one model, and notes what it is asked."""

    asked: ClassVar[list[tuple[str, Any]]] = []
    refuses = False

    def do_GET(self) -> None:
        self._answer(None, {"data": [{"id": "a-model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        message = {"role": "assistant", "content": "a rabbit"}
        self._answer(request, {"choices": [{"message": message}], "usage": {"prompt_tokens": 130}})

    def _answer(self, request: Any, answer: Any) -> None:
        self.asked.append((self.path, request))
        self.send_response(400 if self.refuses else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"error": "too long"} if self.refuses else answer).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Server, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        threading.Thread(target=listening.serve_forever).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_vllm_client(server: str, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("vllm_client.py", clip, "--server", f"{server}/", "--question", "Who is it?", "--max-tokens", 7)
    assert capsys.readouterr().out == "a-model: 130 tokens in the prompt\na rabbit\n"
    (path, nothing), (other, request) = Server.asked
    assert (path, nothing, other) == ("/v1/models", None, "/v1/chat/completions")
    [message] = request.pop("messages")
    assert request == {"model": "a-model", "max_tokens": 7, "temperature": 0}
    video, text = message["content"]
    assert (message["role"], text) == ("user", {"type": "text", "text": "Who is it?"})
    head, data = video["video_url"]["url"].split(",")
    assert (video["type"], head) == ("video_url", "data:video/mp4;base64")
    assert base64.b64decode(data) == clip.read_bytes()


def test_vllm_client_says_what_is_wrong(
    server: str, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = refused(capsys, "vllm_client.py", ROOT / "README.md")
    assert refusal.endswith("README.md must be a video file with the suffix of one, such as .mp4")
    assert "missing.mp4 must be a video file" in refused(capsys, "vllm_client.py", clip.with_name("missing.mp4"))
    assert not Server.asked
    monkeypatch.setattr(Server, "refuses", True)
    refusal = refused(capsys, "vllm_client.py", clip, "--server", server)
    assert refusal.endswith(f'{server} answers 400: {{"error": "too long"}}')
    assert "does not answer as a server of vLLM" in refused(capsys, "vllm_client.py", clip, "--server", "nowhere")


def test_the_server_of_the_client_is_that_of_the_page() -> None:
    [command] = re.findall(r"```\n(vllm serve .*?)\n```", VLLM.text, re.DOTALL)
    assert command in docstring("vllm_client.py")


# ---- method.ipynb ----


def text_of(cell: dict[str, Any]) -> str:
    """Return what a cell printed when the notebook was stored."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_the_cells_of_the_notebook_print_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, which another version may draw differently, are counted."""
    from matplotlib import pyplot

    shown: list[int] = []

    def show() -> None:
        shown.extend(pyplot.get_fignums())
        pyplot.close("all")

    pyplot.switch_backend("Agg")
    monkeypatch.setattr(pyplot, "show", show)
    names: dict[str, Any] = {}
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        shown.clear()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pyplot.rc_context():
            exec(compile("".join(cell["source"]), f"examples/method.ipynb: {cell['id']}", "exec"), names)
        assert printed.getvalue() == text_of(cell)
        assert [output["output_type"] for output in cell["outputs"]].count("display_data") == len(shown)
        assert cell["execution_count"] == number
    assert len(cells) >= 5


def test_the_notebook_is_small_and_holds_text_and_pictures_alone() -> None:
    assert (FOLDER / "method.ipynb").stat().st_size < 600_000
    outputs = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in (output.get("name"), *output.get("data", ()))}
    assert kinds == {None, "stdout", "image/png", "text/plain"}
