"""LLaVA-OneVision and LLaVA-NeXT-Video of transformers, with few random weights: patched, loaded patched, put back."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stgridpool_kernels import grid_pool
from stgridpool_kernels.integrations import transformers as integration
from stgridpool_kernels.integrations.base import PoolOptions, pool_flat, video_token_count
from tests.support import tiny_models
from tests.support.pages import TRANSFORMERS
from tests.support.tiny_models import pixels, prompt
from tests.support.tolerance import assert_same_bits

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MODELS = {"onevision": tiny_models.onevision, "next_video": tiny_models.next_video}
MODULES = {
    "onevision": "transformers.models.llava_onevision.modeling_llava_onevision",
    "next_video": "transformers.models.llava_next_video.modeling_llava_next_video",
}
NAMES = {"onevision": "LlavaOnevisionModel", "next_video": "LlavaNextVideoModel"}
COUNTS = {"onevision": (14, "one_token"), "next_video": (12, "none")}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> Any:
    return MODELS[kind]()


@pytest.fixture
def registered() -> Iterator[None]:
    """For tests that register: nothing is registered afterwards."""
    yield
    with contextlib.suppress(RuntimeError):
        integration.unregister()


def hidden(model: Any, videos: Tensor) -> Tensor:
    """(videos · frames, side², C): what the model pools, LLaVA-OneVision after its projector."""
    inner = model.model
    states = inner.vision_tower(videos.flatten(0, 1), output_hidden_states=True).hidden_states
    features = states[inner.config.vision_feature_layer]
    if inner.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    return inner.multi_modal_projector(features) if hasattr(inner, "apply_pooling") else features


def by_hand(model: Any, videos: Tensor, **options: Any) -> Tensor:
    """(videos, tokens, C): every video's features pooled alone, one call per video."""
    inner, alone = model.model, []
    for features in hidden(model, videos).split(videos.shape[1]):
        pooled = pool_flat(features, [len(features)], **{"ceil_mode": True, **options})
        alone.append((pooled if hasattr(inner, "apply_pooling") else inner.multi_modal_projector(pooled)).flatten(0, 1))
    return torch.stack(alone)


def features_of(model: Any, videos: Tensor, **keywords: Any) -> Tensor:
    """(videos, tokens, C): what the model computes, without the newline that later versions put after it."""
    return without_newline(model.model.get_video_features(videos, **keywords).pooler_output, videos.shape[1])


def without_newline(found: Any, frames: int) -> Tensor:
    if isinstance(found, Tensor):
        return found[:, : found.shape[1] // frames * frames]
    return torch.stack([video.flatten(0, 1) for video in found])


def embed(model: Any, ids: Tensor, videos: Tensor, **options: Any) -> Tensor:
    """(1, tokens, C): the prompt with `by_hand` in the place of placeholders, and the newline of LLaVA-OneVision."""
    embeddings, pooled = model.get_input_embeddings()(ids), by_hand(model, videos, **options)
    if hasattr(model.model, "apply_pooling"):
        newline = model.model.image_newline.expand(len(pooled), 1, -1)
        pooled = torch.cat([pooled, newline], 1)
    return embeddings.masked_scatter((ids == tiny_models.VIDEO)[..., None], pooled.to(embeddings.dtype))


def answers(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The new tokens, and the scores they were chosen by."""
    given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**settings, **inputs, output_scores=True, return_dict_in_generate=True)
    return found.sequences[:, given:], torch.stack(found.scores)


def placeholders(kind: str, frames: int) -> int:
    side, newline = COUNTS[kind]
    return video_token_count(frames, (2 * side, 2 * side), newline)


# ---- what a patched model computes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "frame_strides": (1, 2)}], ids=["published", "other"])
def test_every_video_is_pooled_as_if_it_were_alone(kind: str, model: Any, dtype: torch.dtype, options: dict) -> None:
    model.to(dtype)
    videos = pixels(model, 2, 9, dtype)
    before, stock = videos.clone(), features_of(model, videos)
    integration.patch(model, **options)
    pooled = features_of(model, videos)
    assert_same_bits(pooled, by_hand(model, videos, **options))
    assert_same_bits(videos, before)
    assert pooled.shape == stock.shape
    together = pool_flat(hidden(model, videos), [18], **{"ceil_mode": True, **options})
    if kind == "onevision":
        assert not torch.equal(pooled, together.view_as(pooled))
    assert not torch.allclose(pooled, stock)


def test_two_videos_in_a_prompt(kind: str, model: Any) -> None:
    videos = pixels(model, 2, 9)
    ids = prompt([placeholders(kind, 9)] * 2)
    _, stock_scores = answers(model, input_ids=ids, pixel_values_videos=videos)
    integration.patch(model)
    found, scores = answers(model, input_ids=ids, pixel_values_videos=videos)
    expected, expected_scores = answers(model, inputs_embeds=embed(model, ids, videos))
    assert found.tolist() == expected.tolist()
    torch.testing.assert_close(scores, expected_scores)
    assert (scores[0] - stock_scores[0]).nan_to_num().abs().max() > 1e-3


# one video per prompt: for several the library repeats each video as often as there are beams, not each prompt's videos
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_prompts(kind: str, model: Any, beams: int) -> None:
    videos = pixels(model, 2, 8)
    ids = prompt([placeholders(kind, 8)])
    integration.patch(model)
    found, _ = answers(
        model, input_ids=ids.repeat(2, 1), pixel_values_videos=videos, attention_mask=None, num_beams=beams
    )
    alone = [answers(model, inputs_embeds=embed(model, ids, video), num_beams=beams)[0] for video in videos.split(1)]
    assert found.tolist() == torch.cat(alone).tolist()


def test_any_token_budget_with_as_many_placeholders(kind: str, model: Any) -> None:
    options = {"output_size": (10, 7)}
    integration.patch(model, tokens_per_frame=70, **options)
    videos = pixels(model, 1, 9)
    ids = prompt([9 * 70 + (kind == "onevision")])
    found, _ = answers(model, input_ids=ids, pixel_values_videos=videos)
    assert (
        found.tolist()
        == answers(model, inputs_embeds=embed(model, ids, videos, **options, ceil_mode=False))[0].tolist()
    )


def test_other_ways_to_call(model: Any) -> None:
    integration.patch(model)
    videos = pixels(model, 1, 8)
    pooled = features_of(model, videos)
    name = next(iter(inspect.signature(model.get_video_features).parameters))
    outer = model.get_video_features(**{name: videos}).pooler_output
    assert_same_bits(without_newline(outer, 8), pooled)
    with pytest.raises(TypeError, match=f"missing a required argument: '{name}'"):
        model.model.get_video_features()
    as_tuple = model.model.get_video_features(videos, return_dict=False)
    assert isinstance(as_tuple, tuple)
    other = features_of(model, videos, vision_feature_layer=-2 if model.config.vision_feature_layer == -1 else -1)
    assert not torch.equal(other, pooled)


def test_calls_from_several_threads_keep_apart(model: Any) -> None:
    integration.patch(model)
    inputs = [pixels(model, 2, 9), pixels(model, 3, 8), pixels(model, 1, 17)]
    expected = [by_hand(model, videos) for videos in inputs]

    def run(index: int) -> Tensor:
        with torch.no_grad():  # of the thread
            return features_of(model, inputs[index])

    with ThreadPoolExecutor(3) as pool:
        for index, pooled in enumerate(pool.map(run, [0, 1, 2] * 2)):
            torch.testing.assert_close(pooled, expected[index % 3])


def test_the_vision_path_compiles_without_a_graph_break(model: Any) -> None:
    integration.patch(model)
    torch._dynamo.reset()
    features_of(model, pixels(model, 1, 1))  # at the first call the library installs hooks, which it cannot compile
    compiled = torch.compile(model.model.get_video_features, fullgraph=True, backend="aot_eager")
    videos = pixels(model, 2, 9)
    found = without_newline(compiled(videos).pooler_output, 9)
    torch.testing.assert_close(found, features_of(model, videos))


def test_images_are_left_alone(kind: str, model: Any) -> None:
    stock = type(model.model)
    integration.patch(model)
    changed = {name for name, value in vars(type(model.model)).items() if vars(stock).get(name) is not value}
    replaced = {"get_video_features", "extra_repr", "__reduce_ex__", "stgp_options"}
    assert changed - {"__module__", "__doc__", "__annotations_cache__"} == replaced  # the last since Python 3.14
    assert isinstance(model.model, stock)


# ---- patching ----


def test_unpatch_restores_the_model(kind: str, model: Any) -> None:
    videos, inner = pixels(model, 2, 9), model.model
    stock, stock_class, members = features_of(model, videos), type(inner), dict(vars(inner))
    integration.patch(model)
    assert "PoolOptions(ceil_mode=True)" in repr(model)
    integration.unpatch(model)
    assert type(inner) is stock_class
    assert vars(inner).keys() == members.keys()
    assert all(vars(inner)[name] is value for name, value in members.items())
    assert_same_bits(features_of(model, videos), stock)
    with pytest.raises(RuntimeError, match="not patched"):
        integration.unpatch(model)


def test_the_inner_model_and_what_wraps_one_are_taken_too(model: Any) -> None:
    videos = pixels(model, 1, 8)
    for given in (model.model, nn.ModuleDict({"wrapped": model})):
        integration.patch(given)
        assert_same_bits(features_of(model, videos), by_hand(model, videos))
        integration.unpatch(model)


def test_a_patched_model_is_not_patched_again(model: Any) -> None:
    integration.patch(model)
    with pytest.raises(RuntimeError, match=r"patched already, with PoolOptions\(ceil_mode=True\): unpatch it first"):
        integration.patch(model.model, temperature=2.0)
    assert model.model.stgp_options == PoolOptions(ceil_mode=True)


def test_models_with_different_options_keep_apart(kind: str) -> None:
    models = [MODELS[kind]() for _ in range(4)]
    videos = pixels(models[0], 1, 8)
    stock = features_of(models[0], videos)
    chosen = [{}, {"temperature": 4.0}, {"frame_strides": ()}]
    for model, options in zip(models, chosen, strict=False):
        integration.patch(model, **options)
    for model, options in zip(models, chosen, strict=False):
        assert_same_bits(features_of(model, videos), by_hand(model, videos, **options))
    assert_same_bits(features_of(models[3], videos), stock)
    integration.unpatch(models[0])
    assert_same_bits(features_of(models[0], videos), stock)
    assert_same_bits(features_of(models[1], videos), by_hand(models[1], videos, temperature=4.0))


def test_a_copy_is_patched_and_stands_alone(model: Any) -> None:
    integration.patch(model, temperature=2.0)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    integration.unpatch(model)
    videos = pixels(copied, 2, 9)
    pooled = features_of(copied, videos)
    assert pooled.abs().max() > 0
    assert_same_bits(pooled, by_hand(copied, videos, temperature=2.0))


@pytest.fixture
def one_process() -> Iterator[None]:
    """Make a process group of this process alone, which sharding needs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(inner: nn.Module) -> None:
    torch.distributed.fsdp.fully_shard(inner).unshard()  # which otherwise happens when the model is called


def parametrize(inner: nn.Module) -> None:
    inner.scale = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(inner, "scale", nn.Identity())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", [shard, parametrize])
def test_wrappers_that_replace_the_class_are_not_lost(model: Any, wrap: Any) -> None:
    videos = pixels(model, 1, 8)
    integration.patch(model)
    pooled = features_of(model, videos)
    wrap(model.model)
    wrapped = type(model.model)
    with pytest.raises(RuntimeError, match=rf"wrapped after it was patched, its class is now {wrapped.__name__}"):
        integration.unpatch(model)
    with pytest.raises(RuntimeError, match="patched already"):
        integration.patch(model)
    assert type(model.model) is wrapped
    torch.testing.assert_close(features_of(model, videos), pooled)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", [shard, parametrize])
def test_a_wrapped_model_is_patched_and_stays_wrapped(model: Any, wrap: Any) -> None:
    videos = pixels(model, 1, 8)
    stock, expected = features_of(model, videos), by_hand(model, videos)
    wrap(model.model)
    wrapped = type(model.model)
    integration.patch(model)
    torch.testing.assert_close(features_of(model, videos), expected)
    integration.unpatch(model)
    assert type(model.model) is wrapped
    torch.testing.assert_close(features_of(model, videos), stock)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel, torch.compile])
def test_the_model_inside_a_wrapper_is_patched(model: Any, wrapper: Any) -> None:
    videos, stock_class = pixels(model, 1, 8), type(model.model)
    wrapped = wrapper(model)
    integration.patch(wrapped, temperature=2.0)
    assert_same_bits(features_of(model, videos), by_hand(model, videos, temperature=2.0))
    integration.unpatch(wrapped)
    assert type(model.model) is stock_class


def test_a_graph_that_was_compiled_before_the_patch_is_not_used_after_it(model: Any) -> None:
    videos = pixels(model, 1, 8)
    features_of(model, videos)
    torch._dynamo.reset()
    compiled = torch.compile(lambda videos: model.model.get_video_features(videos).pooler_output, backend="eager")
    stock = without_newline(compiled(videos), 8)
    integration.patch(model)
    torch.testing.assert_close(without_newline(compiled(videos), 8), by_hand(model, videos))
    integration.unpatch(model)
    torch.testing.assert_close(without_newline(compiled(videos), 8), stock)


LOADED = """
import pickle, torch
for kind in ("onevision", "next_video"):
    for way in ("saved", "pickled"):
        name = f"{kind} {way}"
        model = torch.load(name, weights_only=False) if way == "saved" else pickle.load(open(name, "rb"))
        type(model)(model.config)  # transformers lists what a model can return when the first of its class is made
        with torch.no_grad():
            pooled = model.model.get_video_features(torch.load(f"{kind} videos")).pooler_output
        torch.save(pooled, f"{name} result")
"""


def test_a_patched_model_is_patched_in_a_process_that_it_is_sent_to(tmp_path: Path) -> None:
    expected = {}
    for kind, build in MODELS.items():
        model = build()
        integration.patch(model, temperature=2.0)
        torch.save(model, tmp_path / f"{kind} saved")
        (tmp_path / f"{kind} pickled").write_bytes(pickle.dumps(model))
        videos = pixels(model, 2, 9)
        torch.save(videos, tmp_path / f"{kind} videos")
        expected[kind] = features_of(model, videos)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", LOADED], check=True, cwd=tmp_path, env=environment)
    for kind, pooled in expected.items():
        for way in ("saved", "pickled"):
            torch.testing.assert_close(without_newline(torch.load(tmp_path / f"{kind} {way} result"), 9), pooled)


def saved(folder: Path) -> tuple[dict, list[str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return json.loads((folder / "config.json").read_text()), sorted(file.keys())


def test_what_is_saved_does_not_know_of_it(model: Any, tmp_path: Path) -> None:
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "stock")
    model.model.save_pretrained(tmp_path / "stock_inner")
    integration.patch(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "patched")
    model.model.save_pretrained(tmp_path / "patched_inner")
    assert saved(tmp_path / "patched") == saved(tmp_path / "stock")
    assert saved(tmp_path / "patched_inner") == saved(tmp_path / "stock_inner")

    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    integration.unpatch(model)
    videos = pixels(model, 1, 8)
    assert_same_bits(features_of(loaded, videos), features_of(model, videos))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            tiny_models.onevision,
            {"ceil_mode": False},
            r"LlavaOnevisionModel expects 196 tokens per frame \(14 × 14\) .* 169 \(13 × 13\); pass ceil_mode=True",
        ),
        (tiny_models.onevision, {"output_size": (10, 10)}, r"expects 196 .* give 100 .* pass output_size=\(14, 14\)"),
        (tiny_models.onevision, {"tokens_per_frame": 100}, "expects 100 .* give 196"),
        (
            lambda: tiny_models.next_video(27),
            {},
            r"LlavaNextVideoModel expects 182 .* 27 × 27, .* give 196 \(14 × 14\)",
        ),
        (lambda: tiny_models.next_video(27), {"ceil_mode": False}, r"expects 182 .* give 169 \(13 × 13\)"),
        (lambda: tiny_models.next_video(spatial_pool_mode="conv"), {}, "spatial_pool_mode must be 'average' or 'max'"),
        (tiny_models.onevision, {"temperature": float("inf")}, "temperature must be finite"),
    ],
)
def test_what_the_model_could_not_use_is_refused(build: Any, options: dict, message: str) -> None:
    model = build()
    stock = type(model.model)
    with pytest.raises(ValueError, match=message):
        integration.patch(model, **options)
    assert type(model.model) is stock


def test_what_is_refused_fails_in_the_model_too() -> None:
    """The rule behind the numbers is the library's own."""
    model = tiny_models.onevision()
    integration.patch(model, tokens_per_frame=169, ceil_mode=False)
    with pytest.raises(ValueError, match="Video features and video tokens do not match"):
        answers(model, input_ids=prompt([8 * 196 + 1]), pixel_values_videos=pixels(model, 1, 8))
    odd = tiny_models.next_video(27)  # its own pooling leaves 13 × 13, its processor writes 27 · 27 // 4
    with pytest.raises(ValueError, match="Video features and video tokens do not match"):
        answers(odd, input_ids=prompt([8 * 182]), pixel_values_videos=pixels(odd, 1, 8))


def test_other_modules_and_unknown_options_are_refused(model: Any) -> None:
    with pytest.raises(
        TypeError, match="LlavaOnevisionModel or LlavaNextVideoModel of transformers, got Linear with 0"
    ):
        integration.patch(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="got ModuleList with 2"):
        integration.patch(nn.ModuleList([model, copy.deepcopy(model)]))
    with pytest.raises(TypeError, match=r"options must be among .* got temp=1"):
        integration.patch(model, temp=1)


def test_an_older_version_is_refused(model: Any, install: Callable[[str], None]) -> None:
    install("5.16.1")
    for call in (lambda: integration.patch(model), integration.register, integration.unregister):
        with pytest.raises(RuntimeError, match=r"transformers 5\.16\.1 is installed; .* from 5\.17 to before"):
            call()


CHECKPOINT = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"


def test_the_snippets_of_the_page_for_a_loaded_model_run(tmp_path: Path) -> None:
    model, videos = tiny_models.onevision(), pixels(tiny_models.onevision(), 1, 8)
    model.save_pretrained(tmp_path)
    ids = prompt([8 * 196 + 1])
    names: dict[str, Any] = {"inputs": {"input_ids": ids, "pixel_values_videos": videos, "pad_token_id": 0}}
    TRANSFORMERS.run("patch", names, (CHECKPOINT, str(tmp_path)))
    given = embed(model, ids, videos)
    expected = model.generate(inputs_embeds=given, max_new_tokens=20, pad_token_id=0, do_sample=False)
    assert names["answer"][:, ids.shape[1] :].tolist() == expected.tolist()

    TRANSFORMERS.run("budget", names)
    assert names["placeholders"] == 801
    ids = prompt([801])
    found = answers(names["model"], input_ids=ids, pixel_values_videos=videos)[0]
    given = embed(model, ids, videos, output_size=(10, 10), ceil_mode=False)
    assert found.tolist() == answers(model, inputs_embeds=given)[0].tolist()


def test_tokens_can_be_saved_for_inspection_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that are saved are those that a patched model pools."""
    monkeypatch.chdir(tmp_path)
    model, videos = tiny_models.onevision(), pixels(tiny_models.onevision(), 1, 8)
    TRANSFORMERS.run("inspect_llava", {"model": model, "inputs": {"pixel_values_videos": videos}})
    tokens = load_file("tokens.safetensors")["tokens"]
    assert tokens.shape[:3] == (8, 27, 27)
    integration.patch(model)
    by_page = grid_pool(tokens, ceil_mode=True)
    assert_same_bits(features_of(model, videos).reshape(by_page.shape), by_page)


def test_the_page_quotes_the_refusal() -> None:
    with pytest.raises(ValueError, match="expects 196") as refused:
        integration.patch(tiny_models.onevision(), ceil_mode=False)
    assert str(refused.value) in TRANSFORMERS.text.replace("\n", " ")


# ---- models loaded while registered ----


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("registered")
def test_a_model_loaded_while_registered_is_patched(kind: str, model: Any, checkpoint: Path) -> None:
    from transformers import AutoModelForImageTextToText

    videos, stock_class = pixels(model, 2, 9), type(model.model)
    stock = features_of(model, videos)
    integration.register(temperature=2.0)
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    assert type(loaded) is type(model)
    assert getattr(sys.modules[MODULES[kind]], NAMES[kind]) is stock_class
    integration.unregister()
    assert_same_bits(features_of(loaded, videos), by_hand(model, videos, temperature=2.0))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert_same_bits(features_of(model, videos), stock)
    assert_same_bits(features_of(type(model).from_pretrained(checkpoint).eval(), videos), stock)
    integration.unpatch(loaded)
    assert_same_bits(features_of(loaded, videos), stock)


@pytest.mark.usefixtures("registered")
def test_the_snippet_of_the_page_for_later_models_runs(tmp_path: Path) -> None:
    tiny_models.onevision().save_pretrained(tmp_path)
    names: dict[str, Any] = {}
    TRANSFORMERS.run("register", names, (CHECKPOINT, str(tmp_path)))
    assert names["model"].model.stgp_options == PoolOptions(ceil_mode=True)


@pytest.mark.usefixtures("registered")
def test_registering_twice_is_refused() -> None:
    integration.register()
    with pytest.raises(RuntimeError, match="registered already: unregister first"):
        integration.register(temperature=2.0)
    integration.unregister()
    with pytest.raises(RuntimeError, match="not registered"):
        integration.unregister()


def test_loaders_that_others_replaced_stay(kind: str) -> None:
    found = getattr(importlib.import_module(MODULES[kind]), NAMES[kind])
    found._from_config = classmethod(found._from_config.__func__)
    try:
        with pytest.raises(ValueError, match=f"{NAMES[kind]}._from_config must not be replaced by others"):
            integration.register()
        with pytest.raises(RuntimeError, match="not registered"):
            integration.unregister()
        assert "_from_config" in vars(found)
        assert "from_pretrained" not in vars(found)
    finally:
        del found._from_config


@pytest.mark.usefixtures("registered")
def test_a_size_that_does_not_fit_is_refused_at_loading(kind: str, model: Any, checkpoint: Path) -> None:
    integration.register(output_size=(3, 3))
    for load in (lambda: type(model).from_pretrained(checkpoint), lambda: type(model)._from_config(model.config)):
        with pytest.raises(ValueError, match=r"expects \d+ tokens .* give 9 \(3 × 3\)"):
            load()
    integration.unregister()
    assert not hasattr(type(model).from_pretrained(checkpoint).model, "stgp_options")


@pytest.mark.usefixtures("registered")
def test_all_ways_to_load_give_patched_models(model: Any, checkpoint: Path) -> None:
    from transformers import AutoModel, AutoModelForImageTextToText

    integration.register()
    loaded, _ = type(model).from_pretrained(checkpoint, output_loading_info=True)
    made = AutoModelForImageTextToText.from_config(model.config)
    inner = AutoModel.from_pretrained(checkpoint)
    integration.unregister()
    for one in (loaded.model, made.model, inner):
        assert one.stgp_options == PoolOptions(ceil_mode=True)
    assert not hasattr(model.model, "stgp_options")
