"""The Qwen-VL and InternVL models in vLLM answer, on a CPU, as transformers with the same weights: make test-vllm.

Of every model there is one process, with engines of several options and one of vLLM's own, which ask questions.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import questions
from runner import CLOSE, Answers, Runner, assert_same_answers, difference, selected

POOL = {"mode": "pool", "temperature": 2.0}
OTHER = {"mode": "pool", "temperature": -2.0, "frame_strides": [1, 2]}
GRID = {"mode": "grid", "frame_strides": [1, 2]}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
ENGINES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "pool": (POOL, {}),
    "pool, in chunks": (POOL, {"max_num_batched_tokens": 96}),
    "other options": (OTHER, {}),
    "grid": (GRID, {}),
    "vLLM's own": (None, {}),
    "pool, with drafts": (POOL, {"speculative_config": NGRAM}),
}
"""Each engine has options, or None for vLLM's own architecture, and further arguments.

The one with drafts is the last, since vLLM for CPUs makes no engine in a process that has loaded numba for them.
"""


@pytest.fixture(scope="module", params=questions.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(kind: str, runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what each of the engines answered."""
    folder = questions.save(kind, tmp_path_factory.mktemp(kind))
    asked = [questions.PROMPTS, questions.AGAIN]
    batches = [[questions.given(kind, *prompt) for prompt in prompts.items()] for prompts in asked]
    engines = [
        {
            "arguments": {
                "model": str(folder),
                "max_model_len": 2048,
                "enable_prefix_caching": not kind.startswith("qwen3_5"),  # which needs Triton for that
                "max_num_batched_tokens": 4096,
                **({} if options is None else selected(f"Stgp{questions.KINDS[kind]}", **options)),
                **({"dtype": "bfloat16"} if kind.startswith("qwen3_5") else {}),
                **({"trust_remote_code": True} if kind == "internvl_chat" else {}),
                **arguments,
            },
            "batches": batches,
            "graphs": True,
        }
        for options, arguments in engines_of(kind).values()
    ]
    return dict(zip(engines_of(kind), runner(engines, questions.media(kind)), strict=True))


def engines_of(kind: str) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Return the engines of a kind of model. In vLLM on a CPU, drafts for Qwen3.5 need Triton."""
    left_out = ["pool, with drafts"] if kind.startswith("qwen3_5") else []
    return {name: engine for name, engine in ENGINES.items() if name not in left_out}


@functools.cache
def expected(kind: str, engine: str) -> Answers:
    return questions.expected(kind, ENGINES[engine][0])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_answers_as_transformers(kind: str, engine: str, results: dict[str, Any]) -> None:
    """Answers are the same token for token, except for Qwen3.5, whose kernels for CPUs in vLLM take bfloat16 alone.

    Of that model the places in its prompts are compared, and the first token, whose logarithm of probability may differ
    by what bfloat16 does to it; test_tokens.py compares its answers in one arithmetic.
    """
    if engine not in results:
        pytest.skip("vLLM for CPUs has no drafts for this model")
    answers, reference = results[engine]["answers"], expected(kind, engine)
    if not kind.startswith("qwen3_5"):
        assert_same_answers(answers, reference)
        return
    for name, answer in reference.items():
        assert answers[name]["places"] == answer["places"], name
        assert answers[name]["tokens"][0] == answer["tokens"][0], name
        assert difference(answers[name], answer) < 0.3, name


@pytest.mark.parametrize(
    ("engine", "other"), [("pool", "other options"), ("pool", "vLLM's own"), ("grid", "vLLM's own")]
)
def test_engines_of_other_options_answer_otherwise(kind: str, engine: str, other: str, results: dict[str, Any]) -> None:
    """If engines of other options answered alike, the comparison with transformers would show nothing."""
    one, two = (results[name]["answers"] for name in (engine, other))
    for name in questions.SHOWING:
        assert one[name]["tokens"] != two[name]["tokens"] or difference(one[name], two[name]) > 10 * CLOSE, name
    shorter = [name for name in one if one[name]["places"] < two[name]["places"]]
    assert shorter == (questions.SHOWING if (engine, other) == ("pool", "vLLM's own") else [])


def test_a_video_that_is_asked_about_again_is_not_computed_again(kind: str, results: dict[str, Any]) -> None:
    for engine in ("pool", "grid"):
        answers = results[engine]["answers"]
        assert (answers["the video again"]["cached"] > 0) == ("qwen3_5" not in kind)


def test_cuda_graphs_of_the_encoder_are_for_images(kind: str, results: dict[str, Any]) -> None:
    stock = results["vLLM's own"]["graphs"]
    if kind in ("internvl", "interns1"):
        assert stock is None
        assert results["pool"]["graphs"] is None
        return
    assert stock["modalities"] == ["image", "video"]
    assert results["pool"]["graphs"] == {**stock, "modalities": ["image"], "frames": 1}
