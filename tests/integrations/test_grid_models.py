"""Qwen-VL and GLM-V models of transformers with few random weights: patched, loaded patched, put back.

What the language model is given is compared with tokens that the encoder of the same model, not patched, makes, and
that the reference pools: `by_hand`. What comes out of it is compared with the decoder of that model on those tokens.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stgridpool_kernels import grid_pool
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.integrations import base, glm_v, qwen_vl
from stgridpool_kernels.integrations.base import pooled_grid
from stgridpool_kernels.integrations.modes import mode_options
from tests.support.pages import TRANSFORMERS
from tests.support.tiny_grid_models import (
    GLM_KINDS,
    GREEDY,
    HIDDEN,
    QWEN_KINDS,
    ask,
    build,
    by_hand,
    chat_template,
    pictures,
    placeholder,
)
from tests.support.tolerance import assert_same_bits, relative
from tests.support.triples import ABSENT

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.needs("torchvision"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

KINDS = (*QWEN_KINDS, *GLM_KINDS)
ONE_OF_EACH = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm46v")
"""One model for each way to hold tokens: one run a video, deepstack, linear attention, runs of frames in GLM's form."""
SHORT, LONG = (34, 5, 7), (20, 5, 5)
"""Frames, and rows and columns of tokens, of two videos. All are odd after the encoder but the second's 10 pairs."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["grid", "pool"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def family(kind: str) -> ModuleType:
    return glm_v if kind in GLM_KINDS else qwen_vl


def patched(kind: str, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Return a patched model, its processor, and both as the library has them."""
    model, processor = build(kind)
    plain, plain_processor = copy.deepcopy(model), copy.deepcopy(processor)
    family(kind).patch(model, processor, **options)
    return model, processor, plain, plain_processor


def one_prompt(kind: str, processor: Any) -> Any:
    """Return inputs of a prompt with two videos of different sizes, and an image where the model takes one too."""
    video, image = placeholder(kind, "video"), placeholder(kind, "image")
    videos = [pictures(*SHORT, seed=1), pictures(*LONG, seed=2)]
    if kind in GLM_KINDS:
        return ask(processor, f"hi {video} and {video} what?", videos)
    return ask(processor, f"hi {video} see {image} and {video} what?", videos, [pictures(1, 4, 4, seed=3)[0]])


def pooled_grids(grids: Tensor, mode: str, **options: Any) -> Tensor:
    """Return `video_grid_thw` of videos of the pooled size."""
    if mode == "grid":
        return grids
    sizes = [pooled_grid((rows // 2, cols // 2), **{"ceil_mode": True, **options}) for _, rows, cols in grids.tolist()]
    return torch.cat([grids[:, :1], 2 * torch.tensor(sizes)], 1)


def positions_by_hand(plain: Any, inputs: Any, mode: str, **options: Any) -> Tensor:
    """Return the positions that the library gives a prompt whose videos have the pooled size."""
    taken = inspect.signature(plain.model.get_rope_index).parameters
    given = {name: value for name, value in inputs.items() if name in taken}
    given["video_grid_thw"] = pooled_grids(inputs["video_grid_thw"], mode, **options)
    positions: Tensor = plain.model.get_rope_index(**given)[0]
    return positions


def embeddings_by_hand(plain: Any, inputs: Any, mode: str, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return the embeddings of a prompt with pooled tokens at the places of videos, and what deepstack adds to them."""
    of_videos, of_images = inputs["mm_token_type_ids"] == 2, inputs["mm_token_type_ids"] == 1
    main, *deep = by_hand(plain, inputs, mode, **options)
    embeddings = plain.get_input_embeddings()(inputs["input_ids"])
    visual = of_videos | of_images
    levels = [torch.zeros(int(visual.sum()), HIDDEN) for _ in deep]
    if "pixel_values" in inputs:
        raw = plain.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        embeddings[of_images] = torch.cat(raw.pooler_output)
        for level, features in zip(levels, getattr(raw, "deepstack_features", None) or [], strict=True):
            level[of_images[visual]] = features if torch.is_tensor(features) else torch.cat(features)
    embeddings[of_videos] = main
    for level, tokens in zip(levels, deep, strict=True):
        level[of_videos[visual]] = tokens
    return embeddings, {"visual_pos_masks": visual, "deepstack_visual_embeds": levels} if deep else {}


def decode(plain: Any, embeddings: Tensor, positions: Tensor, **more: Any) -> Tensor:
    """Return the logits of the decoder for embeddings that were made by hand."""
    hidden = plain.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **more)
    logits: Tensor = plain.lm_head(hidden.last_hidden_state)
    return logits


def continued(plain: Any, inputs: Any, answer: Tensor, mode: str, **options: Any) -> Tensor:
    """Return the logits by hand at the places where the library chose an answer (1, tokens) that follows a prompt."""
    embeddings, deep = embeddings_by_hand(plain, inputs, mode, **options)
    positions = positions_by_hand(plain, inputs, mode, **options)
    positions = torch.cat([positions, positions[..., -1:] + 1 + torch.arange(answer.shape[1])], -1)
    embeddings = torch.cat([embeddings, plain.get_input_embeddings()(answer)], 1)
    if deep:
        deep["visual_pos_masks"] = nn.functional.pad(deep["visual_pos_masks"], (0, answer.shape[1]))
    return decode(plain, embeddings, positions, **deep)[:, inputs["input_ids"].shape[1] - 1 : -1]


def seen_by_decoder(model: Any, run: Any) -> dict[str, Any]:
    """Return the keyword arguments of the first call of the language model while run() runs."""
    seen: dict[str, Any] = {}

    def note(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        if not seen:
            seen.update({name: value.clone() if torch.is_tensor(value) else value for name, value in keywords.items()})

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


# ---- what the language model is given, and what it answers ----


def test_tokens_positions_and_logits_are_those_by_hand(kind: str, mode: str) -> None:
    model, processor, plain, plain_processor = patched(kind, mode=mode)
    inputs, stock = one_prompt(kind, processor), one_prompt(kind, plain_processor)
    assert_same_bits(inputs["pixel_values_videos"], stock["pixel_values_videos"])
    assert torch.equal(inputs["video_grid_thw"], stock["video_grid_thw"])
    if mode == "grid":
        assert torch.equal(inputs["input_ids"], stock["input_ids"])
    else:
        assert int((inputs["mm_token_type_ids"] == 2).sum()) == 17 * 3 * 4 + 10 * 3 * 3
        assert int((stock["mm_token_type_ids"] == 2).sum()) == 17 * 5 * 7 + 10 * 5 * 5

    seen = seen_by_decoder(model, lambda: model(**inputs))
    of_videos = inputs["mm_token_type_ids"] == 2
    main, *deep = by_hand(plain, stock, mode)
    assert relative(seen["inputs_embeds"][of_videos], main) <= 2e-6
    expected, more = embeddings_by_hand(plain, inputs, mode)
    assert_same_bits(seen["inputs_embeds"][~of_videos], expected[~of_videos])
    visual = of_videos | (inputs["mm_token_type_ids"] == 1)
    assert len(seen.get("deepstack_visual_embeds") or []) == len(deep)
    for found, tokens, level in zip(
        seen.get("deepstack_visual_embeds") or [], deep, more.get("deepstack_visual_embeds", []), strict=True
    ):
        assert relative(found[of_videos[visual]], tokens) <= 2e-6
        assert_same_bits(found[~of_videos[visual]], level[~of_videos[visual]])

    positions = positions_by_hand(plain, inputs, mode)
    assert torch.equal(seen["position_ids"][-3:], positions)
    assert relative(model(**inputs).logits, decode(plain, expected, positions, **more)) <= 5e-5


def test_answers_are_those_by_hand(kind: str, mode: str) -> None:
    model, processor, plain, _ = patched(kind, mode=mode)
    inputs = one_prompt(kind, processor)
    answer = model.generate(**inputs, max_new_tokens=5, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    logits = continued(plain, inputs, answer, mode)
    assert answer.tolist() == logits.argmax(-1).tolist()
    without_cache = model.generate(**inputs, max_new_tokens=5, use_cache=False, **GREEDY)
    assert without_cache[:, inputs["input_ids"].shape[1] :].tolist() == answer.tolist()


@pytest.mark.parametrize("kind", KINDS if "encoder outputs" in ABSENT else QWEN_KINDS)
def test_beams_have_the_probabilities_by_hand(kind: str, mode: str) -> None:
    """A search that mixed up the videos of two prompts would give other probabilities."""
    model, processor, plain, _ = patched(kind, mode=mode)
    text = placeholder(kind, "video")
    videos = [pictures(*SHORT, seed=1), pictures(*LONG, seed=2), pictures(8, 3, 3, seed=4)]
    batch = ask(processor, [f"a {text} and {text} long tail", f"b {text}"], videos)
    found = model.generate(
        **batch, max_new_tokens=4, num_beams=3, return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    alone = [ask(processor, f"a {text} and {text} long tail", videos[:2]), ask(processor, f"b {text}", videos[2:])]
    for inputs, sequence, score in zip(alone, found.sequences, found.sequences_scores, strict=True):
        answer = sequence[None, -4:]
        logits = continued(plain, inputs, answer, mode)
        chosen = logits.log_softmax(-1).gather(-1, answer[..., None]).sum()
        assert float(score) == pytest.approx(float(chosen) / 4, abs=2e-4)


@pytest.mark.needs("encoder outputs")
@pytest.mark.parametrize("kind", GLM_KINDS)
def test_glm_takes_no_videos_under_beams_in_the_library_itself(kind: str, mode: str) -> None:
    """The page says so; where the library can do it, the test above is for these models too."""
    model, processor, plain, plain_processor = patched(kind, mode=mode)
    for one, its_processor in ((model, processor), (plain, plain_processor)):
        inputs = ask(its_processor, f"hi {placeholder(kind, 'video')}", [pictures(*SHORT)])
        with pytest.raises(ValueError, match="expected a non-empty list of Tensors"):
            one.generate(**inputs, max_new_tokens=2, num_beams=2, **GREEDY)


def test_a_padded_batch_answers_as_one_by_one(kind: str, mode: str) -> None:
    model, processor, _, _ = patched(kind, mode=mode)
    text = placeholder(kind, "video")
    texts = [f"a {text} and then a long tail of text", f"b {text}"]
    videos = [pictures(*SHORT, seed=1), pictures(*LONG, seed=2)]
    together = model.generate(**ask(processor, texts, videos), max_new_tokens=5, **GREEDY)
    for row, prompt, video in zip(together, texts, videos, strict=True):
        alone = model.generate(**ask(processor, prompt, [video]), max_new_tokens=5, **GREEDY)
        assert row[-5:].tolist() == alone[0, -5:].tolist()


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_sampling_follows_its_seed_with_and_without_cache(kind: str) -> None:
    model, processor, _, _ = patched(kind)
    inputs = one_prompt(kind, processor)
    drawn = []
    for cache in (True, False):
        torch.manual_seed(7)
        drawn.append(
            model.generate(**inputs, max_new_tokens=8, do_sample=True, use_cache=cache, eos_token_id=-1, pad_token_id=0)
        )
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize(
    "sizes", [[(2, 1, 1)], [(2, 2, 2), (16, 4, 6)], [(64, 1, 3)], [(18, 2, 5), (34, 3, 2), (6, 7, 1)]]
)
def test_all_sizes_of_videos(kind: str, mode: str, sizes: Sequence[tuple[int, int, int]]) -> None:
    model, _processor, plain, _ = patched(kind, mode=mode)
    # the processors take no video below a number of pixels, so grids are given instead
    frames = [(count // 2, rows, cols) for count, rows, cols in sizes]
    grids = torch.tensor([(count, 2 * rows, 2 * cols) for count, rows, cols in frames])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values_videos": pixels, "video_grid_thw": grids}
    found = model.model.get_video_features(pixels, grids)
    expected, *deep = by_hand(plain, given, mode)
    assert [len(tokens) for tokens in found.pooler_output] == [
        count * ((rows * cols) if mode == "grid" else ((rows + 1) // 2) * ((cols + 1) // 2))
        for count, rows, cols in frames
    ]
    assert relative(torch.cat(found.pooler_output), expected) <= 2e-6
    for level, tokens in zip(getattr(found, "deepstack_features", None) or [], deep, strict=True):
        assert relative(level if torch.is_tensor(level) else torch.cat(tuple(level)), tokens) <= 2e-6
    as_tuple = model.model.get_video_features(pixels, grids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert model.model.get_video_features(pixels, grids, output_hidden_states=True).hidden_states is not None


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize(
    "options",
    [
        {"output_size": (2, 3)},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"frame_strides": (1, 2), "temperature": 4.0, "normalize_norm": False},
        {"norm_channels": 5, "resize": "bilinear"},
        {"norm_channels": HIDDEN},
    ],
    ids=repr,
)
def test_options_reach_tokens_prompts_and_positions(kind: str, options: dict[str, Any]) -> None:
    model, processor, plain, plain_processor = patched(kind, **options)
    options = {"ceil_mode": "output_size" not in options, **options}
    inputs, stock = one_prompt(kind, processor), one_prompt(kind, plain_processor)
    seen = seen_by_decoder(model, lambda: model.generate(**inputs, max_new_tokens=2, **GREEDY))
    main = by_hand(plain, stock, "pool", **options)[0]
    assert relative(seen["inputs_embeds"][inputs["mm_token_type_ids"] == 2], main) <= 2e-6
    assert torch.equal(seen["position_ids"][-3:], positions_by_hand(plain, inputs, "pool", **options))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_in_bfloat16(kind: str, mode: str) -> None:
    model, processor, plain, _ = patched(kind, mode=mode)
    inputs = one_prompt(kind, processor)
    model, plain = model.to(torch.bfloat16), plain.to(torch.bfloat16)
    seen = seen_by_decoder(model, lambda: model.generate(**inputs, max_new_tokens=2, **GREEDY))
    tokens = seen["inputs_embeds"][inputs["mm_token_type_ids"] == 2]
    assert tokens.dtype == torch.bfloat16
    assert relative(tokens.float(), by_hand(plain, inputs, mode)[0].float()) <= 1e-2


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_images_alone_and_text_alone_do_not_change(kind: str, mode: str) -> None:
    model, processor, plain, plain_processor = patched(kind, mode=mode)
    image = placeholder(kind, "image")
    for text, images in ((f"look {image} here", [pictures(1, 4, 6)[0]]), ("only text", [])):
        inputs, stock = (ask(one, text, [], images) for one in (processor, plain_processor))
        assert torch.equal(inputs["input_ids"], stock["input_ids"])
        assert_same_bits(model(**inputs).logits, plain(**stock).logits)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_gradients_pass_through_pooled_tokens(kind: str) -> None:
    model, processor, plain, _ = patched(kind)
    inputs = one_prompt(kind, processor)
    name = next(name for name, _ in model.model.visual.named_parameters() if "merger" in name and "weight" in name)
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        embeddings, deep = embeddings_by_hand(plain, inputs, "pool")
        logits = decode(plain, embeddings, positions_by_hand(plain, inputs, "pool"), **deep)
        plain.loss_function(logits=logits, labels=inputs["input_ids"], vocab_size=logits.shape[-1]).backward()
    found, expected = (one.model.visual.get_parameter(name).grad for one in (model, plain))
    assert expected.abs().max() > 0
    assert relative(found, expected) <= 1e-3


SLOW = pytest.mark.slow  # half a minute each


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("qwen3_vl", "pool"),
        ("glm46v", "grid"),
        *[pytest.param("qwen3_vl", "grid", marks=SLOW), pytest.param("glm46v", "pool", marks=SLOW)],
        *[pytest.param(kind, mode, marks=SLOW) for kind in ("qwen2_5_vl", "qwen3_5") for mode in ("grid", "pool")],
    ],
)
def test_a_compiled_model_gives_the_same_logits(kind: str, mode: str) -> None:
    model, processor, _, _ = patched(kind, mode=mode)
    inputs = one_prompt(kind, processor)
    expected = model(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert relative(compiled(**inputs).logits, expected) <= 1e-6


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "glm46v"])
def test_an_encoder_that_merges_other_blocks_of_patches(kind: str) -> None:
    model, processor = build(kind, merge=1)
    plain = copy.deepcopy(model)
    family(kind).patch(model, processor)
    inputs = ask(processor, f"hi {placeholder(kind, 'video')}", [pictures(20, 3, 4)])
    assert inputs["video_grid_thw"].tolist() == [[10, 6, 8]]
    assert int((inputs["mm_token_type_ids"] == 2).sum()) == 10 * 3 * 4
    raw = plain.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    expected = grid_pool(raw.pooler_output[0].view(10, 6, 8, HIDDEN), ceil_mode=True, backend="reference")
    seen = seen_by_decoder(model, lambda: model(**inputs))
    assert relative(seen["inputs_embeds"][inputs["mm_token_type_ids"] == 2], expected.flatten(0, 2)) <= 2e-6


# ---- what is refused ----


def test_a_prompt_of_a_processor_that_is_not_patched_is_refused(kind: str) -> None:
    model, _, _, plain_processor = patched(kind)
    inputs = one_prompt(kind, plain_processor)
    with pytest.raises(ValueError, match=r"prompts must have 294 .* that ModeOptions\(mode='pool', .* got 845: make"):
        model.generate(**inputs, max_new_tokens=1, **GREEDY)
    with pytest.raises(ValueError, match="do not match"):  # the library's own check, which comes first here
        model(**inputs)


def test_a_patched_processor_is_of_no_use_to_another_model(kind: str) -> None:
    _, processor, plain, _ = patched(kind)
    inputs = one_prompt(kind, processor)
    with pytest.raises((RuntimeError, ValueError)):
        plain(**inputs)
    family(kind).patch(plain, mode="grid")
    with pytest.raises(ValueError, match=r"must have 845 .* got 294: make them with a processor that is not patched"):
        plain.generate(**inputs, max_new_tokens=1, **GREEDY)


def test_in_mode_pool_a_processor_is_needed(kind: str) -> None:
    model, processor = build(kind)
    module = family(kind)
    with pytest.raises(
        TypeError, match=r"processor must be given in mode 'pool', .*mode='grid' needs none\): call patch\(m"
    ):
        module.patch(model)
    with pytest.raises(TypeError, match=r"processor must be an instance of \w+Processor.*, got Linear"):
        module.patch(model, nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"processor must be an instance of \w+Processor.*, got Linear"):
        module.patch(model, nn.Linear(1, 1), mode="grid")
    assert not hasattr(model.model, "stgp_options")
    module.patch(model, mode="grid")
    with pytest.raises(RuntimeError, match=r"patched already, with ModeOptions\(mode='grid'\): unpatch it first"):
        module.patch(model, processor)
    assert not hasattr(processor, "stgp_options")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "both"}, ValueError, "mode must be 'grid' or 'pool', got 'both'"),
        ({"mode": None}, ValueError, "mode must be 'grid' or 'pool', got None"),
        (
            {"mode": "grid", "temperature": 1.0},
            ValueError,
            "temperature must not be given in mode 'grid'.* got temperature=1",
        ),
        ({"mode": "grid", "output_size": None}, ValueError, "output_size must not be given in mode 'grid'"),
        ({"mode": "grid", "frame_stride": 2}, TypeError, "options must be among .* did you mean frame_strides"),
        ({"temp": 2}, TypeError, "options must be among .* got temp=2"),
        ({"norm_channels": HIDDEN + 1}, ValueError, f"norm_channels must be at most the {HIDDEN} channels .* got 33"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
    ],
)
def test_wrong_options_are_refused_and_change_nothing(options: dict, error: type, message: str) -> None:
    model, processor = build("qwen3_vl")
    stock = type(model.model), type(processor)
    with pytest.raises(error, match=message):
        qwen_vl.patch(model, processor, **options)
    assert (type(model.model), type(processor)) == stock


def test_a_frame_that_is_too_small_for_the_options_is_refused_where_the_prompt_is_made() -> None:
    _, processor, _, _ = patched("qwen3_vl", output_size=(6, 6))
    with pytest.raises(ValueError, match=r"output_size must not exceed the frame of 5 × 7 tokens, got \[6, 6\]"):
        one_prompt("qwen3_vl", processor)


def test_a_newer_version_is_warned_of_where_the_user_calls(
    monkeypatch: pytest.MonkeyPatch, install: Callable[[str], None]
) -> None:
    monkeypatch.setattr(base, "_WARNED", set())
    install("99")
    with pytest.warns(UserWarning, match="transformers 99 is installed; this integration was tested") as caught:
        qwen_vl.patch(*build("qwen3_vl"))
    assert [warning.filename for warning in caught if "99" in str(warning.message)] == [__file__]


def test_other_models_are_refused(kind: str) -> None:
    model, processor = build(kind)
    other = qwen_vl if family(kind) is glm_v else glm_v
    with pytest.raises(TypeError, match=r"model must hold one \w+Model or .* of transformers, got \w+ with 0"):
        other.patch(model, processor)
    with pytest.raises(TypeError, match="got ModuleList with 2"):
        family(kind).patch(nn.ModuleList([model, copy.deepcopy(model)]), processor)


# ---- put back, apart, copied, saved ----


def test_unpatch_restores_both(kind: str, mode: str) -> None:
    model, processor, plain, plain_processor = patched(kind, mode=mode)
    family(kind).unpatch(model, processor)
    assert type(model.model) is type(plain.model)
    assert type(processor) is type(plain_processor)
    inputs, stock = one_prompt(kind, processor), one_prompt(kind, plain_processor)
    assert torch.equal(inputs["input_ids"], stock["input_ids"])
    assert_same_bits(model(**inputs).logits, plain(**stock).logits)
    with pytest.raises(RuntimeError, match="model is not patched, its class is"):
        family(kind).unpatch(model, processor)


def test_mode_grid_leaves_the_processor_alone(kind: str) -> None:
    _, processor, _, plain_processor = patched(kind, mode="grid")
    assert type(processor) is type(plain_processor)


def test_a_processor_of_another_model_of_the_family_is_taken() -> None:
    """A GLM-4.1V model takes prompts of the processor of GLM-4.6V, as it does without a patch."""
    (model, _), (_, processor) = build("glm4v"), build("glm46v")
    plain = copy.deepcopy(model)
    glm_v.patch(model, processor)
    inputs = ask(processor, f"hi {placeholder('glm46v', 'video')}", [pictures(*SHORT)])
    seen = seen_by_decoder(model, lambda: model.generate(**inputs, max_new_tokens=2, **GREEDY))
    assert relative(seen["inputs_embeds"][inputs["mm_token_type_ids"] == 2], by_hand(plain, inputs, "pool")[0]) <= 2e-6


def test_subclasses_of_models_and_processors_are_taken() -> None:
    model, processor = build("qwen3_vl")
    inner, outer = (type("Mine", (type(one),), {}) for one in (model.model, processor))
    model.model.__class__, processor.__class__ = inner, outer
    qwen_vl.patch(model, processor)
    assert int((one_prompt("qwen3_vl", processor)["mm_token_type_ids"] == 2).sum()) == 294
    processor.__class__ = type("Later", (type(processor),), {})
    with pytest.raises(RuntimeError, match="wrapped after it was patched, its class is now Later"):
        qwen_vl.unpatch(model, processor)
    assert hasattr(model.model, "stgp_options")  # nothing was restored in part
    processor.__class__ = type(processor).__base__
    qwen_vl.unpatch(model, processor)
    assert (type(model.model), type(processor)) == (inner, outer)


def test_unpatch_refuses_what_patch_does() -> None:
    model, _, _, _ = patched("qwen3_vl")
    _, other, _, _ = patched("glm46v")
    for processor in ("nonsense", other):
        with pytest.raises(
            TypeError, match=r"processor must be an instance of Qwen2VLProcessor or .* got (str|Glm46VProc)"
        ):
            qwen_vl.unpatch(model, processor)
    assert hasattr(model.model, "stgp_options")
    assert hasattr(other, "stgp_options")
    for wrong in (None, "a", model.config):
        for call in (qwen_vl.patch, qwen_vl.unpatch, glm_v.patch):
            with pytest.raises(TypeError, match="model must hold one"):
                call(wrong)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_patched_processor_does_not_give_wrong_counts(kind: str) -> None:
    _, processor, _, plain_processor = patched(kind)
    with pytest.raises(ValueError, match=r"video_sizes must be None: .* got \[\(34, 40, 56\)\]"):
        processor._get_num_multimodal_tokens(video_sizes=[(34, 40, 56)])
    images = {"image_sizes": [(32, 32)]}
    assert processor._get_num_multimodal_tokens(**images) == plain_processor._get_num_multimodal_tokens(**images)


def test_unpatch_restores_what_it_is_given() -> None:
    model, processor, plain, plain_processor = patched("qwen3_vl")
    qwen_vl.unpatch(model)
    assert type(model.model) is type(plain.model)
    with pytest.raises(RuntimeError, match=r"processor is patched already, with .*: unpatch it first"):
        qwen_vl.patch(model, processor, temperature=2.0)
    assert type(model.model) is type(plain.model)
    qwen_vl.patch(model, processor)  # with the same options, as for two models with one processor
    other, _ = build("qwen3_vl")
    qwen_vl.patch(other, processor)
    with pytest.raises(RuntimeError, match="processor is patched already"):
        qwen_vl.patch(build("qwen3_vl")[0], processor, mode="grid")
    qwen_vl.unpatch(model)
    qwen_vl.unpatch(model, processor)
    assert type(processor) is type(plain_processor)


def test_models_with_different_options_keep_apart() -> None:
    built = [build("qwen3_vl") for _ in range(3)]
    chosen: list[dict[str, Any]] = [{}, {"output_size": (2, 2)}, {"mode": "grid"}]
    for (model, processor), options in zip(built, chosen, strict=True):
        qwen_vl.patch(model, processor, **options)
    plain, _ = build("qwen3_vl")
    counts = []
    for (model, processor), options in zip(built, chosen, strict=True):
        inputs = one_prompt("qwen3_vl", processor)
        counts.append(int((inputs["mm_token_type_ids"] == 2).sum()))
        own = {"ceil_mode": False, **options} if "output_size" in options else {}
        logits = decode(
            plain,
            (made := embeddings_by_hand(plain, inputs, options.get("mode", "pool"), **own))[0],
            positions_by_hand(plain, inputs, options.get("mode", "pool"), **own),
            **made[1],
        )
        assert relative(model(**inputs).logits, logits) <= 5e-5
    assert counts == [294, 108, 845]


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_are_patched_and_stand_alone(kind: str, copied: Any) -> None:
    model, processor, plain, plain_processor = patched(kind, temperature=2.0)
    model_copy, processor_copy = copied(model), copied(processor)
    expected = model(**one_prompt(kind, processor)).logits
    for parameter in model.parameters():
        parameter.zero_()
    family(kind).unpatch(model, processor)
    assert_same_bits(model_copy(**one_prompt(kind, processor_copy)).logits, expected)
    family(kind).unpatch(model_copy, processor_copy)
    assert type(processor_copy) is type(plain_processor)
    assert type(model_copy.model) is type(plain.model)


LOADED = """
import pickle, sys, torch
for kind in sys.argv[1:]:
    model, processor, inputs = pickle.load(open(kind, "rb"))
    with torch.no_grad():
        torch.save(model(**inputs).logits, f"{kind} logits")
    assert processor.stgp_options == model.model.stgp_options
"""


def test_a_patched_model_is_patched_in_a_process_that_it_is_sent_to(tmp_path: Path) -> None:
    expected = {}
    for kind in ONE_OF_EACH:
        model, processor, _, _ = patched(kind, temperature=2.0)
        inputs = one_prompt(kind, processor)
        (tmp_path / kind).write_bytes(pickle.dumps((model, processor, dict(inputs))))
        expected[kind] = model(**inputs).logits
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", LOADED, *ONE_OF_EACH]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    for kind, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{kind} logits"), logits)


def saved(folder: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_what_is_saved_does_not_know_of_it(kind: str, tmp_path: Path) -> None:
    model, processor, plain, plain_processor = patched(kind)
    assert list(model.state_dict()) == list(plain.state_dict())
    for folder, objects in (("patched", (model, processor)), ("stock", (plain, plain_processor))):
        for one in objects:
            one.save_pretrained(tmp_path / folder)
    assert saved(tmp_path / "patched") == saved(tmp_path / "stock")
    loaded = type(plain).from_pretrained(tmp_path / "patched").eval()
    processor = type(plain_processor).from_pretrained(tmp_path / "patched")
    assert not hasattr(loaded.model, "stgp_options")
    assert not hasattr(processor, "stgp_options")
    stock = one_prompt(kind, plain_processor)
    assert torch.equal(one_prompt(kind, processor)["input_ids"], stock["input_ids"])
    assert_same_bits(loaded(**stock).logits, plain(**stock).logits)


def test_what_a_patched_model_shows() -> None:
    model, processor, _, _ = patched("qwen3_vl", temperature=2.0)
    assert "videos: ModeOptions(mode='pool', ceil_mode=True, temperature=2.0)" in repr(model)
    assert model.model.stgp_options == processor.stgp_options == mode_options("pool", temperature=2.0)
    assert type(model.model).__name__ == "Qwen3VLModel"
    assert type(processor).__name__ == "Qwen3VLProcessor"


# ---- loaded while registered ----


@pytest.fixture
def ended() -> Iterator[None]:
    """For tests that register: nothing is registered afterwards."""
    yield
    for module in (qwen_vl, glm_v):
        try:
            module.unregister()
        except RuntimeError:
            continue


def checkpoint(kind: str, folder: Path) -> tuple[Any, Any]:
    model, processor = build(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_what_is_loaded_while_registered_is_patched(kind: str, mode: str, tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    plain, plain_processor = checkpoint(kind, tmp_path)
    family(kind).register(mode=mode)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inner = transformers.AutoModel.from_pretrained(tmp_path)
    made = transformers.AutoModelForImageTextToText.from_config(plain.config)
    again, _ = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    mine = type("Mine", (type(plain),), {}).from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    kept_for_longer = type(plain).from_pretrained
    family(kind).unregister()
    assert not hasattr(kept_for_longer(tmp_path).model, "stgp_options")
    chosen = mode_options(mode)
    for one in (model.model, inner, made.model, again.model, mine.model, *[processor] * (mode == "pool")):
        assert one.stgp_options == chosen
    assert type(mine).__name__ == "Mine"
    assert hasattr(processor, "stgp_options") == (mode == "pool")
    inputs = one_prompt(kind, processor)
    expected, more = embeddings_by_hand(plain, inputs, mode)
    logits = decode(plain, expected, positions_by_hand(plain, inputs, mode), **more)
    assert relative(model(**inputs).logits, logits) <= 5e-5
    for one in (plain, type(plain).from_pretrained(tmp_path)):
        assert not hasattr(one.model, "stgp_options")
    for one in (plain_processor, type(plain_processor).from_pretrained(tmp_path)):
        assert not hasattr(one, "stgp_options")
    family(kind).unpatch(model, processor)
    assert type(model.model) is type(plain.model)
    assert type(processor) is type(plain_processor)


@pytest.mark.usefixtures("ended")
def test_registering_twice_is_refused_and_families_do_not_meet() -> None:
    qwen_vl.register()
    glm_v.register(mode="grid")
    with pytest.raises(RuntimeError, match="registered already: unregister first"):
        qwen_vl.register(mode="grid")
    qwen_vl.unregister()
    with pytest.raises(RuntimeError, match="not registered"):
        qwen_vl.unregister()
    glm_v.unregister()


@pytest.mark.usefixtures("ended")
def test_what_is_loaded_by_the_class_of_a_patched_object_keeps_its_options(tmp_path: Path) -> None:
    checkpoint("qwen3_vl", tmp_path)
    model, processor, _, _ = patched("qwen3_vl", temperature=2.0)
    qwen_vl.register(temperature=2.0)
    for one in (model.model, processor):
        assert type(one).from_pretrained(tmp_path).stgp_options == mode_options("pool", temperature=2.0)


@pytest.mark.usefixtures("ended")
def test_options_that_do_not_fit_are_refused_when_a_model_is_loaded(tmp_path: Path) -> None:
    plain, _ = checkpoint("qwen3_vl", tmp_path)
    qwen_vl.register(norm_channels=HIDDEN + 1)
    with pytest.raises(ValueError, match="norm_channels must be at most"):
        type(plain).from_pretrained(tmp_path)


@pytest.mark.usefixtures("ended")
def test_loaders_that_others_replaced_stay() -> None:
    transformers: Any = importlib.import_module("transformers")
    stock = transformers.Qwen3VLModel.from_pretrained.__func__
    transformers.Qwen3VLModel.from_pretrained = classmethod(stock)
    try:
        with pytest.raises(ValueError, match=r"Qwen3VLModel.from_pretrained must not be replaced by others"):
            qwen_vl.register()
        with pytest.raises(RuntimeError, match="not registered"):
            qwen_vl.unregister()
        assert "from_pretrained" in vars(transformers.Qwen3VLModel)
    finally:
        del transformers.Qwen3VLModel.from_pretrained


CHECKPOINT = "Qwen/Qwen3-VL-8B-Instruct"


@pytest.mark.usefixtures("ended")
def test_the_snippets_of_the_page_run(tmp_path: Path) -> None:
    plain, plain_processor = build("qwen3_vl")
    plain_processor.chat_template = chat_template("qwen3_vl")
    for one in (plain, plain_processor):
        one.save_pretrained(tmp_path)
    names: dict[str, Any] = {"video": pictures(*SHORT)}
    for snippet, count in (("qwen", 17 * 3 * 4), ("qwen_grid", 17 * 5 * 7)):
        TRANSFORMERS.run(snippet, names, *[(CHECKPOINT, str(tmp_path))] * (snippet == "qwen"))
        inputs, answer = names["inputs"], names["answer"]
        assert int((inputs["mm_token_type_ids"] == 2).sum()) == count
        options = {"frame_strides": (1, 2, 4)} if snippet == "qwen_grid" else {}
        first = continued(plain, inputs, answer[:, inputs["input_ids"].shape[1] :], snippet[5:] or "pool", **options)
        assert first.argmax(-1)[0, 0] == answer[0, inputs["input_ids"].shape[1]]
    assert type(names["model"].model) is type(plain.model)
    assert type(names["processor"]) is type(plain_processor)
    TRANSFORMERS.run("qwen_register", names, (CHECKPOINT, str(tmp_path)))
    assert names["model"].model.stgp_options == names["processor"].stgp_options == mode_options("pool")


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile, lambda model: nn.ModuleList([model])])
def test_the_model_inside_a_wrapper_is_patched(wrapper: Any) -> None:
    model, processor = build("qwen3_vl")
    stock, wrapped = type(model.model), wrapper(model)
    qwen_vl.patch(wrapped, processor)
    assert model.model.stgp_options == mode_options("pool")
    qwen_vl.unpatch(wrapped, processor)
    assert type(model.model) is stock


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_can_be_inspected_as_the_page_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = build(kind)
    inputs = ask(processor, f"hi {placeholder(kind, 'video')}", [pictures(*SHORT)])
    TRANSFORMERS.run("inspect", {"model": model, "inputs": inputs})
    command = next(
        line for line in TRANSFORMERS.text.splitlines() if line.startswith("stgp inspect tokens.safetensors")
    )
    assert main(command.split()[1:]) == 0
    shown = capsys.readouterr().out
    assert f"(17, 5, 7, {HIDDEN}) float32 → (17, 3, 4, {HIDDEN})" in shown
    assert "At temperature 1 the largest weight of a window is" in shown
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
