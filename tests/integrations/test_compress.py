"""`compress` gives models that are not patched what a patched model and processor give them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stgridpool_kernels.integrations import glm_v, qwen_vl
from stgridpool_kernels.integrations.compress import compress
from tests.support.pages import TRANSFORMERS
from tests.support.tiny_grid_models import (
    GLM_KINDS,
    GREEDY,
    HIDDEN,
    QWEN_KINDS,
    ask,
    build,
    chat_template,
    pictures,
    placeholder,
)
from tests.support.tolerance import assert_same_bits

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.needs("torchvision", "encoder outputs"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

KINDS = (*QWEN_KINDS, *GLM_KINDS)


def both(kind: str, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Return a model and its processor, and the same two patched."""
    plain, plain_processor = build(kind)
    model, processor = copy.deepcopy(plain), copy.deepcopy(plain_processor)
    (glm_v if kind in GLM_KINDS else qwen_vl).patch(model, processor, **options)
    return plain, plain_processor, model, processor


def prompts(kind: str, processor: Any, which: str) -> Any:
    video, image = placeholder(kind, "video"), placeholder(kind, "image")
    videos = [pictures(34, 5, 7, seed=1), pictures(20, 5, 5, seed=2)]
    if which == "two":
        return ask(processor, [f"a {video} long tail of text", f"b {video}"], videos)
    if kind in GLM_KINDS:
        return ask(processor, f"hi {video} and {video} what?", videos)
    return ask(processor, f"hi {video} see {image} and {video} what?", videos, [pictures(1, 4, 4, seed=3)[0]])


@pytest.mark.parametrize("mode", ["grid", "pool"])
@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_a_patched_model_gets(kind: str, which: str, mode: str) -> None:
    plain, plain_processor, model, processor = both(kind, mode=mode)
    patched, stock = prompts(kind, processor, which), prompts(kind, plain_processor, which)
    before = {name: value.clone() if torch.is_tensor(value) else copy.copy(value) for name, value in stock.items()}
    given = compress(plain, stock, mode=mode)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(given[name], patched[name])
    assert stock.keys() == before.keys()
    assert all(torch.equal(stock[name], value) for name, value in before.items() if torch.is_tensor(value))
    assert "pixel_values_videos" not in given
    assert "pixel_values" not in given
    real = patched["attention_mask"].bool()
    assert_same_bits(plain(**compress(plain, stock, mode=mode)).logits[real], model(**patched).logits[real])
    answer = plain.generate(**given, max_new_tokens=5, **GREEDY)
    assert torch.equal(answer, model.generate(**patched, max_new_tokens=5, **GREEDY))


@pytest.mark.parametrize("kind", QWEN_KINDS)
def test_beams(kind: str) -> None:
    plain, plain_processor, model, processor = both(kind, output_size=(2, 3))
    given = compress(plain, prompts(kind, plain_processor, "two"), output_size=(2, 3))
    found = plain.generate(**given, max_new_tokens=4, num_beams=3, **GREEDY)
    patched = prompts(kind, processor, "two")
    assert torch.equal(found, model.generate(**patched, max_new_tokens=4, num_beams=3, **GREEDY))


@pytest.mark.parametrize("kind", QWEN_KINDS)
def test_a_second_search_with_beams_is_refused(kind: str) -> None:
    """Videos of one size are where the library would mix them up in silence."""
    plain, processor = build(kind)
    text = placeholder(kind, "video")
    videos = [pictures(8, 3, 3, seed=seed) for seed in range(2)]
    given = compress(plain, ask(processor, [f"a {text}", f"a {text}"], videos))
    greedy = [plain.generate(**given, max_new_tokens=4, **GREEDY) for _ in range(2)]
    assert torch.equal(*greedy)
    sent = pickle.loads(pickle.dumps(given))
    plain.generate(**given, max_new_tokens=2, num_beams=2, **GREEDY)
    with pytest.raises(RuntimeError, match=r"repeated by an earlier generate with num_beams .*: call compress again"):
        plain.generate(**given, max_new_tokens=2, num_beams=2, **GREEDY)
    assert torch.equal(plain.generate(**sent, max_new_tokens=4, **GREEDY), greedy[0])


def test_padding_stays_on_its_side_and_labels_follow() -> None:
    plain, plain_processor, _model, _ = both("qwen3_vl")
    video = placeholder("qwen3_vl", "video")
    videos = [pictures(34, 5, 7, seed=1), pictures(8, 3, 3, seed=2)]
    left = ask(plain_processor, [f"a {video} long tail", f"b {video}"], videos)
    shift = int((left["attention_mask"][1] == 0).sum())
    right = dict(left)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        right[name] = torch.stack([left[name][0], left[name][1].roll(-shift)])
    right["labels"] = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    from_left, from_right = compress(plain, left), compress(plain, right)
    assert from_right["attention_mask"][:, 0].all()
    assert not from_right["attention_mask"][1, -1]
    assert from_left["attention_mask"][:, -1].all()
    assert not from_left["attention_mask"][1, 0]
    for name in ("input_ids", "mm_token_type_ids"):
        kept = [one[name][one["attention_mask"].bool()] for one in (from_left, from_right)]
        assert torch.equal(*kept)
    padded = from_right["attention_mask"] == 0
    assert torch.equal(from_right["labels"], from_right["input_ids"].masked_fill(padded, -100))
    assert torch.isfinite(plain(**from_right).loss)


def test_prompts_that_were_not_padded_are_padded_on_the_left() -> None:
    plain, processor = build("qwen3_vl")
    plain.config.text_config.pad_token_id = 3
    video = placeholder("qwen3_vl", "video")
    videos = [pictures(8, 3, 3, seed=1), pictures(8, 2, 2, seed=2)]  # 36 and 16 tokens, of which 16 and 4 are left
    inputs = ask(processor, [f"a {video}", f"a {video} {'x' * 20}"], videos)
    assert inputs["attention_mask"].all()
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    given = compress(plain, inputs)
    assert given["attention_mask"][0].tolist() == [0] * 8 + [1] * (given["input_ids"].shape[1] - 8)
    assert given["attention_mask"][1].all()
    assert torch.equal(given["token_type_ids"], given["attention_mask"])
    assert given["input_ids"][0, :8].tolist() == [3] * 8


def test_inputs_without_videos_come_back() -> None:
    plain, processor = build("qwen3_vl")
    inputs = ask(processor, f"see {placeholder('qwen3_vl', 'image')}", [], [pictures(1, 4, 4)[0]])
    given = compress(plain, inputs)
    assert given == dict(inputs)
    assert given is not inputs


def test_a_gradient_is_not_kept() -> None:
    plain, processor = build("qwen3_vl")
    with torch.enable_grad():
        given = compress(plain, prompts("qwen3_vl", processor, "one"))
    assert not given["mm_encoder_outputs"]["video"].pooler_output[0].requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mm_token_type_ids": None},
            "inputs must have mm_token_type_ids, as the processor returns it, got input_ids, att",
        ),
        ({"video_grid_thw": None}, "inputs must have video_grid_thw"),
        ({"input_ids": None}, "inputs must have input_ids"),
        ({"position_ids": torch.zeros(3, 1, 9)}, "inputs must not have position_ids"),
        ({"mm_encoder_outputs": {}}, "inputs must not have mm_encoder_outputs"),
        ({"inputs_embeds": torch.zeros(1, 9, HIDDEN)}, "inputs must not have inputs_embeds"),
        ({"past_key_values": ()}, "inputs must not have past_key_values"),
        ({"image_grid_thw": None}, "inputs must have image_grid_thw, as the processor"),
        ({"input_ids": [[1, 2]]}, r"input_ids must be a tensor \(prompts, tokens\), as with .* got list"),
        ({"mm_token_type_ids": [[0, 2]]}, "mm_token_type_ids must be a tensor of the shape .* got list"),
        ({"labels": torch.zeros(1, 3)}, r"labels must be a tensor .* got \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, r"attention_mask must be a tensor .* got \(1, 1, 2, 2\)"),
        ({"video_grid_thw": [[17, 10, 14]]}, "video_grid_thw must be a tensor, as with return_tensors='pt', got list"),
        ({"video_grid_thw": torch.tensor([[17, 10, 14], [10, 10, 8]])}, "inputs must have 795 placeholders .* got 845"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    plain, processor = build("qwen3_vl")
    inputs = {**prompts("qwen3_vl", processor, "one"), **changes}
    with pytest.raises(ValueError, match=message):
        compress(plain, inputs)


def test_an_input_with_unknown_padding_is_refused() -> None:
    plain, processor = build("qwen3_vl")
    inputs = prompts("qwen3_vl", processor, "one")
    inputs["weights"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs must not have weights, of which it is not known"):
        compress(plain, inputs)


def test_a_mask_that_marks_packed_prompts_is_refused() -> None:
    plain, processor = build("qwen3_vl")
    inputs = prompts("qwen3_vl", processor, "one")
    inputs["attention_mask"] = 1 + inputs["attention_mask"]
    with pytest.raises(ValueError, match="attention_mask must have entries 0 and 1 alone, got 2"):
        compress(plain, inputs)
    del inputs["attention_mask"]
    without = compress(plain, inputs)
    assert without["attention_mask"].all()
    assert_same_bits(plain(**without).logits, plain(**compress(plain, prompts("qwen3_vl", processor, "one"))).logits)


def test_inputs_of_a_patched_processor_are_refused() -> None:
    plain, _, model, processor = both("qwen3_vl")
    with pytest.raises(ValueError, match=r"inputs must have 845 placeholders .* got 294"):
        compress(plain, prompts("qwen3_vl", processor, "one"))
    with pytest.raises(RuntimeError, match=r"model is patched, with ModeOptions\(mode='pool', ceil_mode=True\)"):
        compress(model, prompts("qwen3_vl", processor, "one"))


def test_other_models_and_wrong_options_are_refused() -> None:
    plain, processor = build("qwen3_vl")
    inputs = prompts("qwen3_vl", processor, "one")
    with pytest.raises(TypeError, match=r"model must hold one Qwen2VLModel or .* or Glm46VModel .* got Linear with 0"):
        compress(nn.Linear(1, 1), inputs)
    with pytest.raises(TypeError, match=r"an InternVL model.* which rows .* are frames .*internvl\.patch"):
        compress(build("internvl")[0], {})
    with pytest.raises(TypeError, match="inputs must be a mapping, as a processor returns it, got NoneType"):
        compress(plain, None)
    with pytest.raises(ValueError, match="temperature must not be given in mode 'grid'"):
        compress(plain, inputs, mode="grid", temperature=2.0)
    with pytest.raises(ValueError, match="norm_channels must be at most"):
        compress(plain, inputs, norm_channels=HIDDEN + 1)


def test_an_older_version_is_refused_with_the_reason(install: Callable[[str], None]) -> None:
    plain, processor = build("qwen3_vl")
    install("5.22.0")
    with pytest.raises(RuntimeError, match=r"needs mm_encoder_outputs.*: transformers 5\.22\.0 is .* from 5\.23"):
        compress(plain, prompts("qwen3_vl", processor, "one"))


def test_the_snippet_of_the_page_runs() -> None:
    plain, plain_processor, model, processor = both("qwen3_vl")
    for one in (plain_processor, processor):
        one.chat_template = chat_template("qwen3_vl")
    question = [{"type": "video", "video": pictures(34, 5, 7)}, {"type": "text", "text": "What happens?"}]
    messages = [{"role": "user", "content": question}]
    ask_with = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    names: dict[str, Any] = {"model": plain, "processor": plain_processor, "messages": messages, "ask": ask_with}
    TRANSFORMERS.run("compress", names)
    inputs = processor.apply_chat_template(messages, **ask_with)
    patched = model.generate(**inputs, max_new_tokens=20)
    assert torch.equal(names["answer"], patched)
    assert torch.equal(names["new_tokens"], patched[:, inputs["input_ids"].shape[1] :])


def test_a_model_inside_another_module_is_found() -> None:
    plain, processor = build("qwen3_vl")
    inputs = prompts("qwen3_vl", processor, "two")
    found, expected = (compress(one, inputs) for one in (nn.ModuleList([plain]), plain))
    assert torch.equal(found["input_ids"], expected["input_ids"])


def test_a_model_that_takes_no_encoder_outputs_is_refused_in_any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, processor = build("qwen3_vl")
    monkeypatch.setenv("STGP_ALLOW_UNTESTED", "1")
    monkeypatch.setattr(type(plain.model), "forward", lambda self, input_ids: None)
    with pytest.raises(
        RuntimeError, match=r"Qwen3VLModel.forward must take \(self, input_ids, ..., mm_encoder_outputs"
    ):
        compress(plain, prompts("qwen3_vl", processor, "one"))
