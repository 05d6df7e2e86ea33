"""lmms-eval evaluates models of transformers with few random weights, patched by their `stgp_` arguments.

Each run is compared with one of lmms-eval's own model of the same name: it has to ask about the same pixels, in the
same words, and the language model has to be given what the reference leaves of the tokens of that model's encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-lmms-eval")

import tiny_checkpoints
import tiny_task
import transformers
from lmms_eval import models
from loguru import logger

from stgridpool_kernels.integrations.pooled_class import is_pooled

FRAMES = 16
VARIANTS = [
    (name, variant)
    for name in tiny_checkpoints.KINDS
    for variant in ("simple", "chat")
    if getattr(models.get_model_manifest(name), f"{variant}_class_path")
]
"""Each entry is a model of lmms-eval and a variant, simple or chat, that it has."""

SETTINGS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "grid": ({"stgp_mode": "grid", "stgp_frame_strides": "1:2"}, "grid", {"frame_strides": (1, 2)}),
    "pool": ({"stgp_temperature": 2}, "pool", {"temperature": 2.0}),
    "other windows": (
        {"stgp_mode": "pool", "stgp_output_size": "3x2", "stgp_frame_strides": "none", "stgp_norm_type": "inf"},
        "pool",
        {"output_size": (3, 2), "ceil_mode": False, "frame_strides": (), "norm_type": float("inf")},
    ),
}
"""These are model arguments, each with the mode and the options that they stand for."""


class Run(NamedTuple):
    """This is an evaluation: what the model was asked, in the order of the answers, and its answers."""

    requests: list[tiny_checkpoints.Request]
    answers: list[str]


Evaluate = Callable[..., Run]


@pytest.fixture
def evaluate(requests: list[tiny_checkpoints.Request], folder_of: Callable[[str], str], tasks: Path) -> Evaluate:
    """Return a function that evaluates a model by its name, one of lmms-eval's or of ours."""

    def run(model: str, variant: str, batch_size: int = 1, frames: int = FRAMES, **more: Any) -> Run:
        requests.clear()
        name = model.removesuffix("_stgp")
        given = tiny_checkpoints.arguments(name, folder_of(name), frames, **more)
        simple = variant == "simple"
        answers = tiny_task.evaluate(model, given, tasks, force_simple=simple, batch_size=batch_size)
        return Run(list(requests), answers)

    return run


def test_lmms_eval_finds_the_models() -> None:
    listed = models.list_available_models()
    for name, variant in VARIANTS:
        assert f"{name}_stgp" in listed
        pooled, own = (models.get_model(model, force_simple=variant == "simple") for model in (f"{name}_stgp", name))
        assert issubclass(pooled, own)
        assert own.__module__ == f"lmms_eval.models.{variant}.{name}"
    assert models.get_model_manifest("internvl_hf_stgp").simple_class_path is None


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_language_model_is_given_what_the_reference_leaves(
    name: str, variant: str, setting: str, evaluate: Evaluate, folder_of: Callable[[str], str]
) -> None:
    arguments, mode, options = SETTINGS[setting]
    own = evaluate(name, variant)
    ours = evaluate(f"{name}_stgp", variant, **arguments, stgp_backend="reference")
    plain, _ = tiny_checkpoints.load(name, folder_of(name))
    by_hand, processor = tiny_checkpoints.load(name, folder_of(name))
    tiny_checkpoints.adapter(name).patch(by_hand, processor, mode=mode, backend="reference", **options)
    for stock, pooled, answer in zip(own.requests, ours.requests, ours.answers, strict=True):
        assert torch.equal(tiny_checkpoints.pixels(pooled), tiny_checkpoints.pixels(stock))
        assert torch.equal(tiny_checkpoints.words(pooled), tiny_checkpoints.words(stock))
        expected = tiny_checkpoints.by_hand(plain, stock.inputs, mode, **options)
        seen = tiny_checkpoints.seen(pooled)
        assert len(seen) == len(expected) == tiny_checkpoints.LEVELS.get(name, 1)
        assert all(map(torch.equal, seen, expected))
        before = tiny_checkpoints.seen(stock)[0]
        assert seen[0].shape != before.shape or not torch.equal(seen[0], before)
        again = by_hand.generate(**pooled.inputs)[:, pooled.inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(again, skip_special_tokens=True) == [answer]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_without_it_a_model_is_lmms_evals_own_and_others_do_not_change_it(
    name: str, variant: str, evaluate: Evaluate, folder_of: Callable[[str], str]
) -> None:
    pooled = models.get_model(f"{name}_stgp", force_simple=variant == "simple")
    other = pooled.create_from_arg_string(
        tiny_checkpoints.arguments(name, folder_of(name), FRAMES, stgp_temperature=2), {"device": "cpu"}
    )
    own = evaluate(name, variant)
    off = evaluate(f"{name}_stgp", variant, stgp=False)
    assert off.answers == own.answers
    for stock, same in zip(own.requests, off.requests, strict=True):
        assert stock.inputs.keys() == same.inputs.keys()
        assert torch.equal(stock.inputs["input_ids"], same.inputs["input_ids"])
        assert torch.equal(stock.given["inputs_embeds"], same.given["inputs_embeds"])
        assert "ModeOptions" not in repr(same.model)
    assert "ModeOptions(mode='pool', ceil_mode=True, temperature=2.0)" in repr(other.model)
    assert is_pooled(other.processor)


@pytest.mark.parametrize(("name", "variant"), [each for each in VARIANTS if each[0] != "internvl_hf"])
def test_a_padded_batch_is_given_the_same_tokens(name: str, variant: str, evaluate: Evaluate) -> None:
    """All frames are asked for, since the simple model of Qwen2.5-VL would leave out some of the first video alone."""
    ask = functools.partial(evaluate, f"{name}_stgp", variant, frames=tiny_task.FRAMES, stgp_frame_strides="1:2")
    alone, [batch] = ask(), ask(batch_size=2).requests
    together = [tiny_checkpoints.seen(request) for request in alone.requests]
    for level, tokens in enumerate(tiny_checkpoints.seen(batch)):
        expected = torch.cat([one[level] for one in together])
        assert tokens.shape == expected.shape
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stgp_temprature": 2}, "stgp_temprature=2"),
        ({"stgp_mode": "both"}, "stgp_mode: mode must be 'grid' or 'pool', got 'both'"),
        ({"stgp_mode": "grid", "stgp_kernel_size": 3}, "kernel_size must not be given in mode 'grid'"),
        ({"stgp": False, "stgp_mode": "grid"}, "stgp must not be False where stgp_mode is given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_wrong_options_are_refused_before_anything_is_loaded(
    name: str, variant: str, more: dict[str, Any], message: str
) -> None:
    build = models.get_model(f"{name}_stgp", force_simple=variant == "simple").create_from_arg_string
    with pytest.raises((TypeError, ValueError)) as raised:
        build(tiny_checkpoints.arguments(name, "/no/checkpoint", FRAMES, **more), {"device": "cpu"})
    assert message in str(raised.value)


@pytest.mark.parametrize("name", dict(VARIANTS))
def test_another_version_of_transformers_is_refused_before_anything_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = models.get_model(f"{name}_stgp").create_from_arg_string
    monkeypatch.setattr(metadata, "version", lambda package: "4.57.6")
    with pytest.raises(RuntimeError, match=r"transformers 4\.57\.6 is installed"):
        build(tiny_checkpoints.arguments(name, "/no/checkpoint", FRAMES), {"device": "cpu"})


@pytest.mark.parametrize("name", dict(VARIANTS))
def test_an_option_that_does_not_fit_the_model_is_refused_when_it_is_loaded(
    name: str, folder_of: Callable[[str], str]
) -> None:
    build = models.get_model(f"{name}_stgp").create_from_arg_string
    given = tiny_checkpoints.arguments(name, folder_of(name), FRAMES, stgp_norm_channels=64)
    with pytest.raises(ValueError, match="norm_channels must be at most the 32 channels of a token, got 64"):
        build(given, {"device": "cpu"})


@pytest.mark.parametrize("name", dict(VARIANTS))
def test_the_log_says_what_is_in_force(name: str, folder_of: Callable[[str], str]) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, level="INFO", format="{message}")
    try:
        for more in ({"stgp": False}, {"stgp_mode": "grid", "stgp_frame_strides": "1:2"}):
            given = tiny_checkpoints.arguments(name, folder_of(name), FRAMES, **more)
            loaded = models.get_model(f"{name}_stgp").create_from_arg_string(given, {"device": "cpu"})
    finally:
        logger.remove(sink)
    expected = f"ST-GridPool: videos of {type(loaded.model).__name__}, ModeOptions(mode='grid', frame_strides=(1, 2))\n"
    assert [line for line in lines if "ST-GridPool" in line] == [expected]


def test_an_error_of_internvl_is_raised_where_lmms_evals_own_model_answers_nothing(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, **inputs: Any) -> Any:
        raise RuntimeError("out of memory")

    recording = transformers.GenerationMixin.generate
    monkeypatch.setattr(transformers.GenerationMixin, "generate", fail)
    assert evaluate("internvl_hf", "chat").answers == ["", ""]
    for more in ({}, {"stgp": False}):
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate("internvl_hf_stgp", "chat", **more)
    monkeypatch.setattr(transformers.GenerationMixin, "generate", recording)
    [first, *_] = evaluate("internvl_hf_stgp", "chat").requests
    assert "generate" not in vars(first.model)
