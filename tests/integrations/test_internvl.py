"""InternVL of transformers with few random weights: patched, loaded patched, put back."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stgridpool_kernels import grid_pool, temporal_grid
from stgridpool_kernels.cli.main import main
from stgridpool_kernels.integrations import internvl
from stgridpool_kernels.integrations.modes import mode_options
from tests.support.pages import TRANSFORMERS
from tests.support.tiny_grid_models import GREEDY, HIDDEN, INTERNVL_SIDE, build, chat_template, pictures
from tests.support.tolerance import assert_same_bits, relative

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.needs("torchvision", "encoder outputs"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

PROMPTS = {
    "videos": ("hi <video> and <video> what?", 2, 0),
    "image and videos": ("hi <video> see <IMG_CONTEXT> and <video> what?", 2, 1),
    "image": ("see <IMG_CONTEXT> what?", 0, 1),
}


@pytest.fixture(params=["grid", "pool"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PROMPTS)
def prompt(request: pytest.FixtureRequest) -> str:
    return request.param


def patched(**options: Any) -> tuple[Any, Any, Any, Any]:
    """Return a patched model, its processor, and both as the library has them."""
    model, processor = build("internvl")
    plain, plain_processor = copy.deepcopy(model), copy.deepcopy(processor)
    internvl.patch(model, processor, **options)
    return model, processor, plain, plain_processor


def ask(processor: Any, texts: Sequence[str], videos: int, images: int, frames: int = 17) -> Any:
    """Return inputs for prompts with videos of 17 frames and images of 3 tiles: two, and a thumbnail of the whole."""
    given: dict[str, Any] = {"text": list(texts), "return_tensors": "pt", "padding": True}
    if videos:
        given["videos"] = [pictures(frames, 5, 7, seed=seed) for seed in range(videos)]
    if images:
        given["images"] = [pictures(1, 8, 16, seed=9 + seed)[0] for seed in range(images)]
    return processor(**given)


def inputs_for(processor: Any, prompt: str) -> Any:
    text, videos, images = PROMPTS[prompt]
    return ask(processor, [text], videos, images)


def by_hand(plain: Any, inputs: Any, mode: str, **options: Any) -> Tensor:
    """Return all visual tokens in the order of the prompt, of videos those that the reference leaves."""
    raw = plain.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    left = []
    for (kind, length), tokens in zip(
        inputs["visual_segments"].tolist(), raw.split(inputs["visual_segments"][:, 1].tolist()), strict=True
    ):
        assert len(tokens) == length
        x = tokens.unflatten(1, (INTERNVL_SIDE, INTERNVL_SIDE))
        if kind == internvl.VIDEO and mode == "grid":
            x = temporal_grid(x, **options, backend="reference")
        elif kind == internvl.VIDEO:
            x = grid_pool(x, **{"ceil_mode": True, **options}, backend="reference")
        left.append(x.flatten(0, 2))
    return torch.cat(left)


def embeddings_by_hand(plain: Any, inputs: Any, mode: str, **options: Any) -> Tensor:
    embeddings: Tensor = plain.get_input_embeddings()(inputs["input_ids"])
    embeddings[inputs["input_ids"] == plain.config.image_token_id] = by_hand(plain, inputs, mode, **options)
    return embeddings


def test_tokens_logits_and_answers_are_those_by_hand(prompt: str, mode: str) -> None:
    model, processor, plain, plain_processor = patched(mode=mode)
    inputs, stock = inputs_for(processor, prompt), inputs_for(plain_processor, prompt)
    assert_same_bits(inputs["pixel_values"], stock["pixel_values"])
    _, videos, images = PROMPTS[prompt]
    of_visuals = inputs["input_ids"] == plain.config.image_token_id
    assert int(of_visuals.sum()) == videos * 17 * (64 if mode == "grid" else 16) + images * 3 * 64
    if mode == "grid":
        assert torch.equal(inputs["input_ids"], stock["input_ids"])
    expected = {"videos": [[2, 17], [2, 17]], "image and videos": [[2, 17], [1, 3], [2, 17]], "image": [[1, 3]]}
    assert inputs["visual_segments"].tolist() == expected[prompt]

    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["inputs_embeds"].clone()), with_kwargs=True
    )
    answer = model.generate(**inputs, max_new_tokens=5, **GREEDY)
    handle.remove()
    embeddings = embeddings_by_hand(plain, inputs, mode)
    assert relative(seen[0][of_visuals], embeddings[of_visuals]) <= 2e-6
    assert_same_bits(seen[0][~of_visuals], embeddings[~of_visuals])
    assert relative(model(**inputs).logits, plain(inputs_embeds=embeddings).logits) <= 5e-5
    mask = inputs["attention_mask"]
    hand = plain.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=5, **GREEDY)
    assert answer[:, -5:].tolist() == hand.tolist()
    if prompt == "image":
        assert_same_bits(model(**inputs).logits, plain(**stock).logits)


@pytest.mark.parametrize("options", [{"mode": "grid"}, {}, {"output_size": (5, 4)}, {"output_size": (8, 8)}], ids=repr)
def test_padded_batches_and_beams(options: dict[str, Any]) -> None:
    """Prompts of a batch have different visuals, of different numbers of tokens, and keep their own under beams."""
    model, processor, plain, _ = patched(**options)
    texts = ["a <video> then <IMG_CONTEXT> long tail of text", "b", "c <IMG_CONTEXT> and <video> and <video>"]
    batch = ask(processor, texts, 3, 2)
    hand = embeddings_by_hand(
        plain,
        batch,
        options.get("mode", "pool"),
        **({**options, "ceil_mode": False} if "output_size" in options else {}),
    )
    for search in ({"num_beams": 1}, {"num_beams": 3}):
        found = model.generate(**batch, max_new_tokens=4, **search, **GREEDY)
        expected = plain.generate(
            inputs_embeds=hand, attention_mask=batch["attention_mask"], max_new_tokens=4, **search, **GREEDY
        )
        assert found[:, -4:].tolist() == expected.tolist()


def test_sampling_follows_its_seed_with_and_without_cache(mode: str) -> None:
    model, processor, _, _ = patched(mode=mode)
    drawn = []
    for cache in (True, False):
        torch.manual_seed(7)
        drawn.append(
            model.generate(
                **inputs_for(processor, "image and videos"),
                max_new_tokens=8,
                do_sample=True,
                use_cache=cache,
                num_return_sequences=2,
                eos_token_id=-1,
                pad_token_id=0,
            )
        )
    assert torch.equal(*drawn)


@pytest.mark.parametrize("frames", [1, 8, 33])
def test_lengths(frames: int, mode: str) -> None:
    model, processor, plain, _ = patched(mode=mode)
    inputs = ask(processor, ["hi <video>"], 1, 0, frames)
    expected = plain(inputs_embeds=embeddings_by_hand(plain, inputs, mode)).logits
    assert relative(model(**inputs).logits, expected) <= 5e-5


def test_in_bfloat16(mode: str) -> None:
    model, processor, plain, _ = patched(mode=mode)
    inputs = inputs_for(processor, "image and videos")
    model, plain = model.to(torch.bfloat16), plain.to(torch.bfloat16)
    pixels, segments = inputs["pixel_values"], inputs["visual_segments"]
    found = model.get_image_features(pixels, visual_segments=segments).pooler_output
    assert found.dtype == torch.bfloat16
    assert relative(found.flatten(0, 1).float(), by_hand(plain, inputs, mode).float()) <= 1e-2
    assert isinstance(model.get_image_features(pixels, visual_segments=segments, return_dict=False), tuple)
    model.generate(**inputs, max_new_tokens=2, **GREEDY)


def test_text_alone_does_not_change(mode: str) -> None:
    model, processor, plain, plain_processor = patched(mode=mode)
    inputs, stock = (ask(one, ["only text"], 0, 0) for one in (processor, plain_processor))
    assert inputs.keys() == stock.keys()
    assert_same_bits(model(**inputs).logits, plain(**stock).logits)


@pytest.mark.parametrize("mode", ["pool", pytest.param("grid", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same_logits(mode: str) -> None:
    model, processor, _, _ = patched(mode=mode)
    inputs = inputs_for(processor, "image and videos")
    expected = model(**inputs).logits
    torch._dynamo.reset()
    assert relative(torch.compile(model, backend="eager")(**inputs).logits, expected) <= 1e-6


def test_calls_from_several_threads_do_not_mix() -> None:
    _, processor, _, _ = patched()
    alone = [inputs_for(processor, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        for prompt, expected, found in zip(
            [*PROMPTS] * 8,
            alone * 8,
            pool.map(lambda prompt: inputs_for(processor, prompt), [*PROMPTS] * 8),
            strict=True,
        ):
            assert torch.equal(found["visual_segments"], expected["visual_segments"]), prompt
            assert torch.equal(found["input_ids"], expected["input_ids"]), prompt


@pytest.mark.parametrize("which", ["head", "inner", "both"])
def test_a_forward_that_was_replaced_on_the_object(which: str, mode: str) -> None:
    """Hooks that move inputs between devices replace it, and so does `model.forward = torch.compile(model.forward)`."""
    model, processor = build("internvl")
    plain = copy.deepcopy(model)
    calls = []
    for one in {"head": [model], "inner": [model.model], "both": [model, model.model]}[which]:

        def hooked(*arguments: Any, stock: Any = one.forward, **keywords: Any) -> Any:
            calls.append(1)
            return stock(*arguments, **keywords)

        one.forward = functools.update_wrapper(hooked, one.forward)
    internvl.patch(model, processor, mode=mode)
    inputs = inputs_for(processor, "image and videos")
    expected = plain(inputs_embeds=embeddings_by_hand(plain, inputs, mode)).logits
    assert relative(model(**inputs).logits, expected) <= 5e-5
    model.generate(**inputs, max_new_tokens=2, **GREEDY)
    assert calls


def test_the_inner_model_alone_is_patched(mode: str) -> None:
    model, processor = build("internvl")
    inner, plain = model.model, copy.deepcopy(model.model)
    internvl.patch(inner, processor, mode=mode)
    inputs = inputs_for(processor, "image and videos")
    embeddings = plain.get_input_embeddings()(inputs["input_ids"])
    holder = SimpleNamespace(model=plain)
    embeddings[inputs["input_ids"] == plain.config.image_token_id] = by_hand(holder, inputs, mode)
    expected = plain(inputs_embeds=embeddings).last_hidden_state
    assert relative(inner(**inputs).last_hidden_state, expected) <= 5e-5
    internvl.unpatch(inner, processor)
    assert type(inner) is type(plain)


def test_other_layers_of_the_encoder(mode: str) -> None:
    model, processor, plain, _ = patched(mode=mode)
    inputs = inputs_for(processor, "videos")
    pixels, segments = inputs["pixel_values"], inputs["visual_segments"]
    found = model.model.get_image_features(pixels, vision_feature_layer=1, visual_segments=segments).pooler_output
    usual = model.model.get_image_features(pixels, visual_segments=segments).pooler_output
    x = plain.model.get_image_features(pixels, vision_feature_layer=1).pooler_output.unflatten(
        1, (INTERNVL_SIDE, INTERNVL_SIDE)
    )
    expected = mode_options(mode).apply(x, [17, 17]).flatten(1, 2)
    assert relative(found.flatten(0, 1), expected.flatten(0, 1)) <= 2e-6
    assert relative(found, usual) > 1e-3
    embeddings = plain.get_input_embeddings()(inputs["input_ids"])
    embeddings[inputs["input_ids"] == plain.config.image_token_id] = expected.flatten(0, 1)
    logits = plain(inputs_embeds=embeddings).logits
    assert relative(model(**inputs, vision_feature_layer=1).logits, logits) <= 5e-5
    assert relative(model(**inputs).logits, logits) > 1e-3


# ---- what is refused ----


@pytest.mark.parametrize("prompt", PROMPTS)
def test_inputs_of_a_processor_that_is_not_patched_are_refused(prompt: str, mode: str) -> None:
    model, _, _, plain_processor = patched(mode=mode)
    stock = inputs_for(plain_processor, prompt)
    for run in (lambda: model(**stock), lambda: model.generate(**stock, max_new_tokens=1, **GREEDY)):
        with pytest.raises(
            ValueError, match="visual_segments must be given with pixel_values, got None: make inputs with"
        ):
            run()


@pytest.mark.parametrize(
    "segments", [torch.tensor([2, 37, 1]), torch.tensor([[2.0, 37.0]]), "abc", {}, 37, [2, 37], [[2, True]]]
)
def test_segments_of_another_form_are_refused(segments: Any) -> None:
    model, processor, _, _ = patched()
    pixels = inputs_for(processor, "image and videos")["pixel_values"]
    with pytest.raises(ValueError, match=r"visual_segments must be rows \[1, tiles of an image\] .* the 37 rows"):
        model.get_image_features(pixels, visual_segments=segments)


@pytest.mark.parametrize("segments", [[[2, 17]], [[2, 37]], [[3, 37]], [[2, 17], [1, 20], [1, 0], [2, -1], [1, 1]]])
def test_segments_that_do_not_fit_are_refused(segments: list) -> None:
    model, processor, _, _ = patched()
    inputs = inputs_for(processor, "image and videos")
    inputs["visual_segments"] = torch.tensor(segments)
    if segments == [[2, 37]]:  # a prompt for other visuals
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(**inputs)
    else:
        with pytest.raises(ValueError, match=r"visual_segments must be rows \[1, tiles of an image\] .* the 37 rows"):
            model(**inputs)


def test_segments_are_those_of_one_call_alone() -> None:
    model, processor, _, _ = patched()
    inputs = inputs_for(processor, "videos")
    assert internvl._PROCESSOR_SEGMENTS.get(None) is None
    model(**inputs)
    with pytest.raises(ValueError, match="visual_segments must be given with pixel_values, got None"):
        model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"not used by the model: \['visual_segment'\]"):
        model.generate(**inputs, visual_segment=1, max_new_tokens=1)


def test_a_processor_is_needed_in_both_modes(mode: str) -> None:
    model, processor = build("internvl")
    with pytest.raises(TypeError, match=rf"processor must be given in mode '{mode}', .* which rows .* call patch\(m"):
        internvl.patch(model, mode=mode)
    with pytest.raises(TypeError, match="processor must be an instance of InternVLProcessor, got Linear"):
        internvl.patch(model, nn.Linear(1, 1), mode=mode)
    with pytest.raises(TypeError, match="model must hold one InternVLModel of transformers, got Linear with 0"):
        internvl.patch(nn.Linear(1, 1), processor, mode=mode)
    with pytest.raises(ValueError, match=f"norm_channels must be at most the {HIDDEN} channels"):
        internvl.patch(model, processor, norm_channels=HIDDEN + 1)
    with pytest.raises(ValueError, match=r"output_size must not exceed the frame of 8 × 8 tokens, got \[9, 9\]"):
        internvl.patch(model, processor, output_size=(9, 9))
    assert not any(hasattr(one, "stgp_options") for one in (model, model.model, processor))
    for wrong in (None, "a", model.config):
        with pytest.raises(TypeError, match="model must hold one InternVLModel"):
            internvl.patch(wrong, processor)


def test_one_processor_serves_two_models_with_equal_options() -> None:
    model, processor, plain, _ = patched()
    internvl.patch(plain, processor)
    other, _ = build("internvl")
    with pytest.raises(RuntimeError, match=r"processor is patched already, with .* unpatch it first"):
        internvl.patch(other, processor, temperature=2.0)
    assert not hasattr(other.model, "stgp_options")
    for wrong in ("nonsense", build("qwen3_vl")[1]):
        with pytest.raises(TypeError, match="processor must be an instance of InternVLProcessor"):
            internvl.unpatch(model, wrong)
    assert "visual_segments" in processor.model_input_names
    text = ["a <video>"], [], ["Frame1: " + "<IMG_CONTEXT>" * 16]
    assert processor.get_text_with_replacements(*text)[0] == ["a Frame1: " + "<IMG_CONTEXT>" * 16]


def test_an_older_version_is_refused(install: Callable[[str], None]) -> None:
    model, processor = build("internvl")
    install("5.17.0")
    with pytest.raises(RuntimeError, match=r"transformers 5\.17\.0 is installed; .* from 5\.23 to before"):
        internvl.patch(model, processor)


# ---- put back, copied, saved, loaded ----


def test_unpatch_restores_all(mode: str) -> None:
    model, processor, plain, plain_processor = patched(mode=mode)
    with pytest.raises(RuntimeError, match="patched already"):
        internvl.patch(model, processor)
    internvl.unpatch(model, processor)
    for found, stock in ((model, plain), (model.model, plain.model), (processor, plain_processor)):
        assert type(found) is type(stock)
    stock_inputs = inputs_for(plain_processor, "videos")
    assert inputs_for(processor, "videos").keys() == stock_inputs.keys()
    assert_same_bits(model(**stock_inputs).logits, plain(**stock_inputs).logits)
    with pytest.raises(RuntimeError, match="model is not patched"):
        internvl.unpatch(model, processor)


@pytest.mark.parametrize("which", ["head", "inner"])
def test_a_wrapped_model_is_not_unpatched_in_part(which: str) -> None:
    model, processor, _, _ = patched()
    wrapped = model if which == "head" else model.model
    wrapped.scale = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(wrapped, "scale", nn.Identity())
    before = [type(one) for one in (model, model.model, processor)]
    with pytest.raises(RuntimeError, match="wrapped after it was patched, its class is now Parametrized"):
        internvl.unpatch(model, processor)
    assert [type(one) for one in (model, model.model, processor)] == before
    with pytest.raises(RuntimeError, match="patched already"):
        internvl.patch(model, processor)
    assert [type(one) for one in (model, model.model, processor)] == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_are_patched_and_stand_alone(copied: Any) -> None:
    model, processor, _, _ = patched(temperature=2.0)
    model_copy, processor_copy = copied(model), copied(processor)
    expected = model(**inputs_for(processor, "image and videos")).logits
    for parameter in model.parameters():
        parameter.zero_()
    internvl.unpatch(model, processor)
    assert_same_bits(model_copy(**inputs_for(processor_copy, "image and videos")).logits, expected)


def test_what_is_saved_does_not_know_of_it(tmp_path: Path) -> None:
    model, processor, plain, plain_processor = patched()
    for folder, objects in (("patched", (model, processor)), ("stock", (plain, plain_processor))):
        for one in objects:
            one.save_pretrained(tmp_path / folder)
    files = {
        folder: {file.name: file.read_text() for file in (tmp_path / folder).glob("*.json")}
        for folder in ("patched", "stock")
    }
    assert files["patched"] == files["stock"]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_what_is_loaded_while_registered_is_patched(mode: str, tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    plain, plain_processor = build("internvl")
    plain.save_pretrained(tmp_path)
    plain_processor.save_pretrained(tmp_path)
    internvl.register(mode=mode)
    try:
        with pytest.raises(RuntimeError, match="registered already"):
            internvl.register()
        model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        processor = transformers.AutoProcessor.from_pretrained(tmp_path)
        made = transformers.AutoModelForImageTextToText.from_config(plain.config)
    finally:
        internvl.unregister()
    for one in (model, model.model, made.model, processor):
        assert one.stgp_options == mode_options(mode)
    inputs = inputs_for(processor, "image and videos")
    expected = plain(inputs_embeds=embeddings_by_hand(plain, inputs, mode)).logits
    assert relative(model(**inputs).logits, expected) <= 5e-5
    assert not hasattr(type(plain).from_pretrained(tmp_path).model, "stgp_options")
    assert not hasattr(transformers.AutoProcessor.from_pretrained(tmp_path), "stgp_options")
    with pytest.raises(RuntimeError, match="not registered"):
        internvl.unregister()


def test_the_snippet_of_the_page_runs(tmp_path: Path) -> None:
    plain, plain_processor = build("internvl")
    plain_processor.chat_template = chat_template("internvl")
    plain.save_pretrained(tmp_path)
    plain_processor.save_pretrained(tmp_path)
    names: dict[str, Any] = {"video": pictures(17, 5, 7)}
    TRANSFORMERS.run("internvl", names, ("OpenGVLab/InternVL3-1B-hf", str(tmp_path)))
    assert names["segments"] == [[2, 17]]
    hand = embeddings_by_hand(plain, names["inputs"], "pool")
    expected = plain.generate(inputs_embeds=hand, max_new_tokens=20)
    assert names["answer"][:, names["inputs"]["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_tokens_can_be_inspected_as_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = build("internvl")
    pixels = ask(processor, ["hi <video>"], 1, 0)["pixel_values"]
    save_file(
        {"tokens": model.get_image_features(pixels, return_dict=True).pooler_output}, tmp_path / "tokens.safetensors"
    )
    grid = f"{INTERNVL_SIDE}x{INTERNVL_SIDE}"
    assert main(["inspect", str(tmp_path / "tokens.safetensors"), "-o", str(tmp_path / "i.png"), "--grid", grid]) == 0
    assert f"(17, {INTERNVL_SIDE}, {INTERNVL_SIDE}, {HIDDEN})" in capsys.readouterr().out
