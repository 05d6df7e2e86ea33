"""The LLaVA models in vLLM answer, on a CPU, as transformers with the same weights: make test-vllm.

Models and prompts are those of tiny.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from runner import CLOSE, Answers, Runner, assert_same_answers, difference, selected
from torch import Tensor, nn

from stgridpool_kernels.integrations import transformers as pooled_transformers
from stgridpool_kernels.integrations.modes import mode_options

HERE = Path(__file__).parent
ONEVISION = "StgpLlavaOnevisionForConditionalGeneration"
NEXT_VIDEO = "StgpLlavaNextVideoForConditionalGeneration"
OPTIONS = {"temperature": 4.0, "frame_strides": [1, 2], "sampling": "first", "normalize_norm": False}
VIDEOS = ["6 frames", "9 frames", "two videos of one length", "17 frames"]
MIXED = "two videos of different lengths"


@pytest.fixture(scope="session")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_onevision(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="session")
def next_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_next_video(tmp_path_factory.mktemp("next_video"))


@pytest.fixture
def run(runner: Runner) -> Any:
    """Return a function that runs an engine, which must fail or not, and returns its answers and what it printed."""

    def run(
        folder: Path,
        batches: list[list[str]],
        arguments: dict | None = None,
        fails: bool = False,
        **environment: str | None,
    ) -> tuple[Answers, str]:
        prompts = {name: tiny.PROMPTS[name] for names in batches for name in names}
        media = {f"video {seed}": tiny.video(seed, frames) for one in prompts.values() for seed, frames in one.videos}
        media |= {f"image {seed}": tiny.image(seed) for one in prompts.values() for seed in one.images}
        engine = {
            "arguments": {"model": str(folder), **(arguments or {})},
            "batches": [[given(name) for name in names] for names in batches],
        }
        results = runner([engine], media, fails, **environment)
        return (results[0]["answers"] if results else {}), runner.log

    return run


def given(name: str) -> dict[str, Any]:
    """Return a prompt as engine.py takes it."""
    prompt = tiny.PROMPTS[name]
    return {
        "name": name,
        "ids": prompt.ids,
        "videos": [f"video {seed}" for seed, _ in prompt.videos],
        "images": [f"image {seed}" for seed in prompt.images],
    }


def expected(folder: Path, names: list[str], tokens_per_frame: int | None = None, **options: Any) -> Answers:
    """Return what transformers answers with the same weights and options, prompt by prompt."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    pooled_transformers.patch(model, tokens_per_frame=tokens_per_frame, **options)
    model.generation_config.eos_token_id = None
    newlines = int(isinstance(model, hf.LlavaOnevisionForConditionalGeneration))
    answers = {}
    for name in names:
        prompt = tiny.PROMPTS[name]
        videos = [tiny.video(*made) for made in prompt.videos]
        pixels = [processor.video_processor(videos=[one], return_tensors="pt")["pixel_values_videos"] for one in videos]
        places = iter([len(video) * 9 + newlines for video in videos])
        ids = torch.tensor([[t for i in prompt.ids for t in ([i] * next(places) if i == tiny.VIDEO else [i])]])
        with torch.inference_mode():
            given = inputs(model, ids, pixels)
            output = model.generate(
                **given,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tiny.ANSWER,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = output.sequences[0, -tiny.ANSWER :].tolist()
        logprobs = [step.log_softmax(-1)[0, token].item() for step, token in zip(output.logits, tokens, strict=True)]
        answers[name] = {"places": ids.shape[1], "tokens": tokens, "logprobs": logprobs}
    return answers


def inputs(model: Any, ids: Tensor, pixels: list[Tensor]) -> dict[str, Tensor]:
    """Return what transformers' generate takes, which is embeddings where the lengths of videos differ."""
    if not pixels:
        return {"input_ids": ids}
    if len({video.shape for video in pixels}) == 1:
        return {"input_ids": ids, "pixel_values_videos": torch.cat(pixels)}
    features = torch.cat([model.model.get_video_features(video).pooler_output[0] for video in pixels])
    words = model.get_input_embeddings()(ids)
    return {"inputs_embeds": words.masked_scatter((ids == tiny.VIDEO)[..., None], features)}


# ---- answers ----


def test_the_same_answers_as_transformers_in_a_mixed_batch(run: Any, onevision: Path) -> None:
    names = [*VIDEOS, MIXED, "words"]
    answers, log = run(onevision, [names], selected(ONEVISION))
    assert_same_answers(answers, expected(onevision, names))
    assert "ST-GridPool: frames of videos from 5 × 5 to 3 × 3 tokens, ModeOptions(mode='pool', ceil_mode=True)" in log
    unlike = expected(onevision, VIDEOS, **OPTIONS)
    assert all(difference(answers[name], unlike[name]) > 10 * CLOSE for name in VIDEOS), "the comparison sees nothing"


def test_options_as_an_argument_of_the_engine(run: Any, onevision: Path) -> None:
    answers, log = run(onevision, [[*VIDEOS, MIXED]], selected(ONEVISION, **OPTIONS), STGP_VLLM_OPTIONS="not read")
    assert_same_answers(answers, expected(onevision, [*VIDEOS, MIXED], **OPTIONS))
    assert f"ST-GridPool: frames of videos from 5 × 5 to 3 × 3 tokens, {mode_options('pool', **OPTIONS)}" in log


def test_options_in_the_environment_and_several_processes(run: Any, onevision: Path) -> None:
    environment = {"STGP_VLLM_OPTIONS": json.dumps(OPTIONS), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    answers, log = run(onevision, [[*VIDEOS, MIXED]], selected(ONEVISION), **environment)
    assert_same_answers(answers, expected(onevision, [*VIDEOS, MIXED], **OPTIONS))
    assert f"ST-GridPool: frames of videos from 5 × 5 to 3 × 3 tokens, {mode_options('pool', **OPTIONS)}" in log


def test_next_video(run: Any, next_video: Path) -> None:
    """The grid is odd, so that the model's own pooling does not fit vLLM's placeholders."""
    names = ["6 frames", "9 frames", "17 frames", "words"]
    answers, _ = run(next_video, [names], selected(NEXT_VIDEO, **OPTIONS))
    assert_same_answers(answers, expected(next_video, names, tokens_per_frame=9, **OPTIONS))
    unlike = expected(next_video, names[:3], tokens_per_frame=9)
    assert all(difference(answers[name], unlike[name]) > 10 * CLOSE for name in names[:3])


def test_images_and_other_models_are_left_alone(run: Any, onevision: Path) -> None:
    """An engine that selects nothing answers alike, to the bit, where the package is installed and where it is not."""
    alone = [[name] for name in [*VIDEOS, "an image", "words"]]  # that engine takes videos of one length in a batch
    absent, _ = run(onevision, alone, PYTHONPATH=None)
    installed, log = run(onevision, alone)
    assert installed == absent
    assert "ST-GridPool" not in log
    pooled, _ = run(onevision, alone, selected(ONEVISION))
    assert pooled["an image"] == absent["an image"]
    assert pooled["words"] == absent["words"]
    assert all(difference(pooled[name], absent[name]) > 10 * CLOSE for name in VIDEOS)


def test_it_is_not_installed_where_it_should_not_be() -> None:
    listed = (
        "from importlib.metadata import entry_points as e; print([p.value for p in e(group='vllm.general_plugins')])"
    )
    shown = []
    for environment in (dict(os.environ), {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}):
        command = [sys.executable, "-c", listed]
        shown.append(subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True).stdout)
    assert shown[0].count("stgridpool_kernels.integrations.vllm:register") == 1
    assert "stgridpool_kernels" not in shown[1]


# ---- refused ----


def test_another_number_of_tokens_is_refused_when_the_engine_is_made(run: Any, onevision: Path) -> None:
    _, log = run(onevision, [["words"]], selected(ONEVISION, output_size=[2, 4]), fails=True)
    assert log.strip().splitlines()[-1] == (
        "RuntimeError: vLLM's prompt for llava_onevision expects 9 tokens per frame (3 × 3) where a frame has 5 × 5, "
        "these options give 8 (2 × 4); pass output_size=(3, 3) and no other argument of the windows"
    )
    assert "Starting to load model" not in log


def test_an_unknown_option_is_refused(run: Any, onevision: Path) -> None:
    _, log = run(onevision, [["words"]], selected(ONEVISION), STGP_VLLM_OPTIONS='{"strides": [2]}', fails=True)
    assert "RuntimeError: STGP_VLLM_OPTIONS: there must be an option strides" in log
    assert "Starting to load model" not in log


def at_version(version: str, folder: Path) -> str:
    """Return a PYTHONPATH on which the installed vLLM says that it is another version."""
    about = folder / f"other/vllm-{version}.dist-info/METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return os.pathsep.join([str(about.parents[1]), os.environ["PYTHONPATH"]])


def test_an_older_version_is_refused_where_it_is_selected(run: Any, onevision: Path, tmp_path: Path) -> None:
    path = at_version("0.31.0", tmp_path)
    _, log = run(onevision, [["words"]], selected(ONEVISION), PYTHONPATH=path, fails=True)
    assert (
        "RuntimeError: vllm 0.31.0+cpu is installed; this integration was tested with vllm from 0.32 to before 0.34"
    ) in log


def test_a_newer_version_is_warned_of_where_it_is_selected(run: Any, onevision: Path, tmp_path: Path) -> None:
    _, log = run(onevision, [["words"]], selected(ONEVISION), PYTHONPATH=at_version("1.99.0", tmp_path))
    assert "UserWarning: vllm 1.99.0+cpu is installed; this integration was tested with vllm from 0.32" in log
    assert "ST-GridPool: frames of videos from 5 × 5 to 3 × 3 tokens" in log


def test_another_version_does_nothing_to_other_models(run: Any, onevision: Path, tmp_path: Path) -> None:
    _, log = run(onevision, [["words", "an image"]], PYTHONPATH=at_version("1.99.0", tmp_path))
    assert "ST-GridPool" not in log
    assert "UserWarning: vllm" not in log


# ---- the classes ----


class Tower(nn.Module):
    """This vision tower maps (frames, 3, height, width) to (frames, 25, 16), each frame from its pixels alone."""

    def forward(self, pixels: Tensor, feature_select_strategy: str) -> Tensor:
        assert feature_select_strategy == "default"
        return pixels.flatten(1).unflatten(1, (25, 16))


def bare(name: str) -> Any:
    """Return a model of ours without what needs an engine."""
    from stgridpool_kernels.integrations import vllm as plugin

    kind = getattr(plugin, name)
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=20, patch_size=4), vision_feature_select_strategy="default"
    )
    model.vision_tower = Tower()
    model.multi_modal_projector = nn.Linear(16, 16)
    model.image_newline = nn.Parameter(torch.full((16,), 7.0))
    model.stgp_options = mode_options("pool")
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", [ONEVISION, NEXT_VIDEO])
def test_videos_of_a_batch_do_not_know_of_each_other(name: str) -> None:
    model = bare(name)
    videos = [torch.randn(frames, 1, 20, 20) for frames in (9, 6, 0, 17, 9)]
    together = model._process_video_pixels({"pixel_values_videos": videos})
    alone = [model._process_video_pixels({"pixel_values_videos": video[None]}) for video in videos]
    newlines = int(name == ONEVISION)
    assert [video.shape for video in together] == [(frames * 9 + newlines, 16) for frames in (9, 6, 0, 17, 9)]
    for video, [other] in zip(together, alone, strict=True):
        assert torch.equal(video, other)
    if newlines:
        assert all(torch.equal(video[-1], model.image_newline) for video in together)


@pytest.mark.parametrize("name", [ONEVISION, NEXT_VIDEO])
def test_videos_of_one_length_come_as_one_tensor(name: str) -> None:
    model = bare(name)
    videos = torch.randn(3, 9, 1, 20, 20)
    one = model._process_video_pixels({"pixel_values_videos": videos})
    several = model._process_video_pixels({"pixel_values_videos": list(videos)})
    assert all(torch.equal(video, other) for video, other in zip(one, several, strict=True))
