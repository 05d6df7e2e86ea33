"""Pruning is timed as vLLM calls it, at as many tokens as grid_pool, and a method that keeps wrong ones is refused.

Stand-ins take the place of vLLM's functions; tests/with_vllm/test_pruning_bench.py has vLLM's own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import pruning
from benchmarks.devices import Cpu
from benchmarks.measure import SampleBudget, measure
from benchmarks.provider import Provider
from benchmarks.providers import providers
from benchmarks.pruning import RANKINGS, evs, kept_rate, vidcom2
from benchmarks.results import BenchRow
from benchmarks.workloads import parse_workload, random_tokens

NAME = "8x7x9x64:pruning"
KEPT, TOKENS = 8 * 3 * 4, 8 * 7 * 9
METHODS = sorted(RANKINGS)
Spoil = Callable[[Tensor, torch.dtype], Tensor]

pytestmark = pytest.mark.usefixtures("caches", "without_waiting")


def stand_in(method: str, spoil: Spoil = lambda mask, dtype: mask, more: int = 0) -> SimpleNamespace:
    """Return functions that are called as vLLM's are. `spoil` changes the mask, `more` the number of tokens."""

    def mask(tokens: Tensor, size: tuple[int, int, int], merge: int, q: float) -> Tensor:
        kept = int(len(tokens) * (1 - q))
        found = torch.zeros(len(tokens), dtype=torch.bool)
        found[RANKINGS[method](tokens.unflatten(0, size), kept)[1]] = True
        return spoil(found, tokens.dtype)

    def count(tokens_per_frame: int, num_frames: int, q: float) -> int:
        return int(tokens_per_frame * num_frames * (1 - q)) + more

    return SimpleNamespace(compute_retention_mask=mask, compute_retained_tokens_count=count)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts stand-ins in place of vLLM's functions, with the given arguments of `stand_in`."""

    def replaced(**given: Any) -> None:
        monkeypatch.setattr(pruning, "vllm_functions", lambda method: stand_in(method, **given))

    return replaced


def rows_of(name: str, change: Callable[[Provider], Provider] = lambda provider: provider) -> dict[str, BenchRow]:
    workload = parse_workload(name)
    timed = [change(provider) for provider in providers(workload, "cpu")]
    effort = SampleBudget(most=2, least=2)
    rows = measure(workload, timed, Cpu(1), "some run", baseline="grid_pool:reference", effort=effort)
    return {row.provider: row for row in rows if row.op}


# ---- what is timed ----


@pytest.mark.parametrize("name", [NAME, "12x6x6x64:pruning:ceil:fp32"])
def test_all_are_timed_at_as_many_tokens(name: str, vllm: Callable[..., None]) -> None:
    """Every method reads all tokens at least, and writes the kept ones."""
    vllm()
    rows = rows_of(name)
    assert {"grid_pool:reference", *METHODS} < set(rows)
    assert {row.check for row in rows.values()} == {"ok"}
    assert all(row.is_timed and row.times_baseline for row in rows.values())
    (kept,) = {row.settings["visual_tokens"] for row in rows.values()}
    assert kept == (KEPT if name == NAME else 12 * 3 * 3)
    for method in METHODS:
        row = rows[method]
        assert (row.op, row.read_bytes) == ("pruning", row.input_bytes)
        assert row.write_bytes == rows["grid_pool:reference"].write_bytes


def test_vllm_is_called_as_by_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method gets the tokens without a copy, and its mask chooses among them. vLLM is imported by calls alone."""
    calls: list[tuple[Any, ...]] = []

    def mask(*given: Any) -> Tensor:
        calls.append(given)
        return torch.arange(TOKENS) % 5 == 3

    def imported(name: str) -> SimpleNamespace:
        calls.append((name,))
        return SimpleNamespace(compute_retention_mask=mask)

    monkeypatch.setattr(pruning.importlib, "import_module", imported)
    workload = parse_workload(NAME)
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    found = {provider.name: provider for provider in providers(workload, "cpu")}
    assert calls == []
    for method in METHODS:
        result = found[method].call(x)
        (module,), (tokens, size, merge, q) = calls
        assert module == f"vllm.multimodal.video_prune.{method}"
        assert (tokens.data_ptr(), tokens.shape, size, merge) == (x.data_ptr(), (TOKENS, 64), (8, 7, 9), 1)
        assert q == found[method].settings["q"]
        assert torch.equal(result, x.reshape(TOKENS, 64)[3::5][None, None])
        calls.clear()


def test_without_vllm_the_rest_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    rows = rows_of(NAME)
    assert rows["grid_pool:reference"].is_timed
    for method in METHODS:
        assert rows[method].outcome == "skipped"
        assert rows[method].check.endswith("; `make bench-pruning` runs in an environment that has it")


def test_rates_keep_exactly_as_many() -> None:
    for tokens in (*range(4, 400), 32 * 27 * 27, 64 * 20 * 36):
        for kept in (1, tokens // 4, tokens // 3, tokens - 1):
            assert int(tokens * (1 - kept_rate(kept, tokens))) == kept


@pytest.mark.parametrize("name", ["3x4x4x8:pruning", "2x8x4x4x8:pruning", "1x8x4x4x8:pruning"])
def test_other_videos_are_refused(name: str) -> None:
    """EVS keeps a whole frame at least, and vLLM prunes one video at a time."""
    with pytest.raises(ValueError, match=f"one video that is pooled to 16 tokens or more, got {name}"):
        providers(parse_workload(name), "cpu")


# ---- what is wrong ----


def without_one(mask: Tensor, dtype: torch.dtype) -> Tensor:
    mask[mask.nonzero()[-1]] = False
    return mask


def without_one_of_the_first_frame(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Exchange a token of the first frame for a later one, in bfloat16 only, which is the dtype that is timed."""
    if dtype == torch.bfloat16:
        mask[5] = False
        mask[(~mask[63:]).nonzero()[0] + 63] = True
    return mask


def others(mask: Tensor) -> Tensor:
    """Keep as many tokens, in reversed places except in the first frame, of which all are kept."""
    return torch.cat([mask[:63], mask[63:].flip(0)])


def others_in_float32(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return others(mask) if dtype == torch.float32 else mask


def others_in_bfloat16(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return others(mask) if dtype == torch.bfloat16 else mask


@pytest.mark.parametrize(
    ("method", "given", "check"),
    [
        ("evs", {"spoil": without_one}, f"wrong: keeps {KEPT - 1} tokens in place of {KEPT}"),
        ("vidcom2", {"spoil": without_one}, f"wrong: keeps {KEPT - 1} tokens in place of {KEPT}"),
        ("evs", {"spoil": without_one_of_the_first_frame}, "wrong: tokens of the first frame are not kept"),
        ("evs", {"spoil": others_in_float32}, "wrong: off by "),
        ("vidcom2", {"spoil": others_in_float32}, "wrong: off by "),
        ("evs", {"more": 1}, f"wrong: vLLM counts {KEPT + 1} tokens, grid_pool returns {KEPT}"),
    ],
)
def test_wrong_tokens_are_refused(vllm: Callable[..., None], method: str, given: Any, check: str) -> None:
    vllm(**given)
    row = rows_of(NAME)[method]
    assert row.check.startswith(check)
    assert not row.is_timed


def test_similarities_that_round_alike_may_be_ranked_in_any_order(vllm: Callable[..., None]) -> None:
    vllm(spoil=others_in_bfloat16)
    assert {row.check for row in rows_of(NAME).values()} == {"ok"}


def changed_at_first(kept: Tensor) -> Tensor:
    return torch.cat([2 * kept[:, :, :1], kept[:, :, 1:]], 2)


@pytest.mark.parametrize(
    "spoilt", [lambda kept: kept.flip(2), changed_at_first, lambda kept: kept[:, :, [0, *range(KEPT - 1)]]]
)
def test_what_is_no_selection_in_order_is_refused(
    vllm: Callable[..., None], spoilt: Callable[[Tensor], Tensor]
) -> None:
    vllm()
    gathered = pruning.Pruning.prune
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning.Pruning, "prune", lambda self, x: spoilt(gathered(self, x)))
        rows = rows_of(NAME)
    assert {rows[method].check for method in METHODS} == {"wrong: the kept tokens are not tokens of x in their order"}


# ---- definitions ----


def test_evs_keeps_the_first_frame_and_what_changes() -> None:
    """A token counts as changed if its direction changes, and not if only its length does."""
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
    x[2:, 0, 1] *= -1  # This token changes once, between frames 1 and 2.
    x[3, 1, 2] += 0.5  # This token changes a little, in frame 3.
    x[1] *= 3
    similarity, chosen = evs(x, 8)
    assert sorted(chosen.tolist()) == [*range(6), 2 * 6 + 1, 3 * 6 + 5]
    assert similarity[2 * 6 + 1] == pytest.approx(-1)
    assert similarity[3 * 6 + 1] == pytest.approx(1)


def test_vidcom2_keeps_what_stands_out_in_steady_channels() -> None:
    """A frame that stands out may keep more tokens than others, and channels that vary most count for nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(4, 1, 8, 6)
    x += 0.01 * torch.randn(x.shape, generator=generator)
    x[..., 3:] += 9 * torch.randn(4, 1, 8, 3, generator=generator)
    x[:3, 0, 2, 0] -= 0.3  # This token stands out in each of three frames.
    x[3, 0, 4:, 1] += 2  # These tokens stand out in the last frame.
    similarity, chosen = vidcom2(x, 8)
    kept = sorted(divmod(place, 8) for place in chosen.tolist())
    assert {(0, 2), (1, 2), (2, 2)} < set(kept)
    assert [token for frame, token in kept if frame == 3] == [4, 5, 6, 7]
    assert len(kept) == 8
    assert similarity.shape == (32,)


def test_similarities_of_vidcom2_by_hand() -> None:
    """Two frames have a token each, with directions (1, 0) and (0, 1) in the two channels that vary least.

    The squared distance of each is 0.5 to the mean of both, and 0 to that of its frame.
    """
    x = torch.tensor([[3.0, 0, 50, -7], [0, 5, -50, 70]]).view(2, 1, 1, 4)
    similarity, chosen = vidcom2(x, 2)
    to_video = sum(math.exp(-0.5 / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))
    assert similarity.tolist() == pytest.approx([5 + to_video] * 2)
    assert sorted(chosen.tolist()) == [0, 1]
