"""Prefills have the sizes of published decoders, follow every pooling, and end in the right logits."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.devices import Cpu
from benchmarks.measure import SampleBudget, measure
from benchmarks.prefill import BUDGETS, DECODERS, TEXT_TOKENS, build
from benchmarks.providers import providers
from benchmarks.workloads import WORKLOADS, Workload, random_tokens

TINY = Workload("tiny", (2,), channels=64, kind="prefill", groups=("prefill",))


def test_poolings_go_from_all_tokens_to_the_fewest() -> None:
    """Each provider pools to the grid that it says, and has a prefill behind it."""
    found = providers(WORKLOADS["prefill-7b"], "cpu")
    prefills = [provider.settings for provider in found if provider.op == "prefill"]
    tokens = [settings["visual_tokens"] for settings in prefills]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == 64 * 27 * 27
    assert {tuple(settings["grid"]) for settings in prefills} == {(n, n) for n in (27, 19, 15, 14, 13)}
    assert len(found) == 2 * len(prefills) - 1 == 2 * (len(BUDGETS) + 5) - 1
    x = random_tokens(TINY.shape, TINY.dtype, "cpu", 0)
    for provider in providers(TINY, "cpu"):
        if provider.op != "prefill":
            assert list(provider.call(x).shape[1:3]) == provider.settings["grid"]


def test_sizes_of_the_published_decoders() -> None:
    """The decoders have as many parameters as the models that transformers makes of their sizes."""
    assert DECODERS[896].parameters == 494_032_768
    assert DECODERS[3584].parameters == 7_615_616_512
    for decoder in (DECODERS[64], DECODERS[3584]):
        parameters = list(build(decoder, torch.bfloat16, "meta").parameters())
        assert sum(parameter.numel() for parameter in parameters) == decoder.parameters
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    prompt = 64 * 27 * 27 + TEXT_TOKENS
    bound = DECODERS[3584].bound(prompt, 2)
    assert bound.read_bytes == 2 * (7_615_616_512 + prompt * 3584)
    assert bound.write_bytes == 2 * (2 * 28 * 4 * 128 * prompt + 152_064)


@pytest.mark.usefixtures("without_waiting")
def test_prefills_are_causal_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefills give no mask to attention, since with one no kernel could be used that never holds all scores."""
    calls = []
    attend = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **given: object) -> Tensor:
        calls.append((given["is_causal"], given["attn_mask"], q.shape[2]))
        return attend(q, k, v, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    timed = {provider.name: provider for provider in providers(TINY, "cpu")}
    pooled = timed["prefill:grid_pool()"].call(random_tokens(TINY.shape, TINY.dtype, "cpu", 0))
    assert pooled.shape == (1, 1, 1, 256)  # the logits of the last position
    assert calls == [(True, None, 2 * 13 * 13 + TEXT_TOKENS)] * DECODERS[64].layers
    monkeypatch.setenv("CXX", "no-such-compiler")
    effort = SampleBudget(1, 1)
    rows = measure(TINY, list(timed.values()), Cpu(), "some run", baseline="prefill:unpooled", effort=effort)
    assert [row.provider for row in rows] == ["copy", *timed]
    assert {row.check for row in rows} == {"ok"}
    assert all(row.times_baseline for row in rows)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        build(DECODERS[64], torch.float16, "cpu")


@pytest.mark.parametrize("workload", [replace(TINY, channels=65), replace(TINY, frame_counts=(2, 2), batch=2)])
def test_other_tokens_are_refused(workload: Workload) -> None:
    with pytest.raises(ValueError, match="one video of 64, 896, 3584 channels, got tiny"):
        providers(workload, "cpu")
