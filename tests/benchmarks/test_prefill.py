"""Providers of a prefill: sizes of decoders and poolings, and that its logits are right."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import prefill
from benchmarks.measure import SampleBudget, measure, take_turns
from benchmarks.prefill import BUDGETS, DECODERS, TEXT_TOKENS, build, side_of
from benchmarks.provider import mismatch
from benchmarks.providers import providers
from benchmarks.workloads import WORKLOADS, Workload, random_tokens

TINY = Workload("tiny", (2,), channels=64, kind="prefill", groups=("prefill",))


@pytest.mark.parametrize(
    ("budget", "size", "side"), [(0.5, 27, 19), (0.3, 27, 15), (1.0, 27, 27), (0.25, 24, 12), (1e-6, 27, 1)]
)
def test_the_square_closest_to_a_budget(budget: float, size: int, side: int) -> None:
    assert side_of(budget, size) == side
    assert all(abs(side**2 - budget * size**2) <= abs(other**2 - budget * size**2) for other in range(1, size + 1))


def test_poolings_go_from_all_tokens_to_the_fewest() -> None:
    found = providers(WORKLOADS["prefill-7b"], "cpu")
    prefills = [provider.settings for provider in found if provider.op == "prefill"]
    tokens = [settings["visual_tokens"] for settings in prefills]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == 64 * 27 * 27
    assert {tuple(settings["grid"]) for settings in prefills} == {(n, n) for n in (27, 19, 15, 14, 13)}
    assert len(found) == 2 * len(prefills) - 1 == 2 * (len(BUDGETS) + 5) - 1
    for provider in found:
        if provider.op != "prefill":
            x = random_tokens((2, 27, 27, 64), torch.bfloat16, "cpu", 0)
            pooled = provider.call(x)
            assert mismatch(pooled, provider.definition(x), provider.ulps) is None
            assert list(pooled.shape[1:3]) == provider.settings["grid"]


def test_sizes_of_the_published_decoders() -> None:
    assert DECODERS[896].parameters == 494_032_768
    assert DECODERS[3584].parameters == 7_615_616_512
    prompt = 64 * 27 * 27 + TEXT_TOKENS
    bound = DECODERS[3584].bound(prompt, 2)
    assert bound.read_bytes == 2 * (7_615_616_512 + prompt * 3584)
    assert bound.write_bytes == 2 * (2 * 28 * 4 * 128 * prompt + 152_064)
    assert 20 < DECODERS[3584].needed_bytes(prompt, 2) / 2**30 < 30


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=lambda decoder: decoder.name)
def test_parameters_are_those_that_transformers_makes(decoder: prefill.Decoder) -> None:
    model = build(decoder, torch.bfloat16, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == decoder.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_prefill_is_causal_and_ends_in_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no mask, with which no attention kernel could be used that never holds all scores."""
    calls = []
    attend = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **given: object) -> Tensor:
        calls.append(given | {"length": q.shape[2]})
        return attend(q, k, v, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x = random_tokens(TINY.shape, TINY.dtype, "cpu", 0)
    (pooled,) = (each for each in providers(TINY, "cpu") if each.name == "prefill:grid_pool()")
    assert pooled.call(x).shape == (1, 1, 1, 256)
    assert len(calls) == DECODERS[64].layers
    length = 2 * 13 * 13 + TEXT_TOKENS
    assert all(call["is_causal"] and call["attn_mask"] is None and call["length"] == length for call in calls)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take_turns, "__defaults__", (0.0,))
    from benchmarks.devices import Cpu

    timed = providers(TINY, "cpu")
    rows = measure(TINY, timed, Cpu(), "some run", baseline="prefill:unpooled", effort=SampleBudget(1, 1))
    found = {row.provider: row for row in rows if row.op}
    assert list(found) == [provider.name for provider in timed]
    assert {row.check for row in rows} == {"ok"}
    assert all(row.times_baseline for row in rows)
    assert found["prefill:grid_pool()"].settings["visual_tokens"] == 2 * 13 * 13


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        build(DECODERS[64], torch.float16, "cpu")


@pytest.mark.parametrize("workload", [replace(TINY, channels=65), replace(TINY, frame_counts=(2, 2), batch=2)])
def test_other_tokens_are_refused(workload: Workload) -> None:
    with pytest.raises(ValueError, match="one video of 64, 896, 3584 channels, got tiny"):
        providers(workload, "cpu")
