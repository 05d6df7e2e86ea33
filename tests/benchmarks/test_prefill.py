"""The benchmark of what pooling saves downstream: its sizes, what it refuses, a run of a tiny decoder, its reports."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import prefill, results
from benchmarks.prefill import (
    BUDGETS,
    DECODERS,
    SIZE,
    Prefill,
    Refused,
    Variant,
    build,
    check,
    check_memory,
    compare,
    default_dtype,
    load,
    main,
    markdown,
    measure,
    plot,
    provider_of,
    save,
    show_share,
    side_of,
    variants,
)
from benchmarks.results import Run
from benchmarks.workloads import random_tokens

TINY = DECODERS["tiny"]

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

RUN = Run(
    run="20260101T000000Z-0000",
    utc="2026-01-01T00:00:00+00:00",
    device={"type": "cpu", "name": "A CPU", "cores": 2, "threads": 2},
    versions={"torch": "2.13.0+cpu", "transformers": "5.17.0"},
    source={"commit": None},
    settings={
        "model": "7b",
        "parameters": 7_615_616_512,
        "dtype": "bfloat16",
        "frames": 64,
        "text_tokens": 64,
        "repeats": 3,
    },
)


def made_up(pool_us: float = 500.0) -> list[Prefill]:
    """Rows of a run in which a prefill takes 100 µs a token."""
    rows = []
    for variant in variants():
        row = Prefill.of(variant, None, RUN.run, frames=64)
        row.provider = variant.provider
        row.add_times([pool_us] * 3 if variant.provider else [], [100.0 * row.visual_tokens] * 3)
        rows.append(row)
    compare(rows)
    return rows


# ---- sizes ----


@pytest.mark.parametrize(
    ("budget", "size", "side"), [(0.5, 27, 19), (0.3, 27, 15), (1.0, 27, 27), (0.25, 24, 12), (1e-6, 27, 1)]
)
def test_the_square_closest_to_a_budget(budget: float, size: int, side: int) -> None:
    assert side_of(budget, size) == side
    assert all(abs(side**2 - budget * size**2) <= abs(other**2 - budget * size**2) for other in range(1, size + 1))


def test_variants_go_from_all_tokens_to_the_fewest() -> None:
    tokens = [rows * cols for rows, cols in (variant.grid for variant in variants())]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == SIZE * SIZE
    assert {variant.grid for variant in variants()} == {(n, n) for n in (27, 19, 15, 14, 13)}
    assert [variant.budget for variant in variants() if variant.budget] == list(BUDGETS)


def test_parameters_of_the_published_decoders() -> None:
    assert DECODERS["0.5b"].parameters == 494_032_768
    assert DECODERS["7b"].parameters == 7_615_616_512


@needs_transformers
@pytest.mark.parametrize("name", DECODERS)
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    model = build(DECODERS[name], torch.bfloat16, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == DECODERS[name].parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_memory_counts_everything_for_the_longest_prompt() -> None:
    needed = DECODERS["7b"].needed_bytes(frames=64, itemsize=2)
    prompt = 64 * 27 * 27 + 64
    assert needed["weights"] == 2 * 7_615_616_512
    assert needed["KV cache"] == 2 * 2 * 28 * 4 * 128 * prompt
    assert needed["activations"] > 2 * 3 * 18_944 * prompt
    assert 20 < sum(needed.values()) / 2**30 < 30


# ---- what is refused ----


def test_memory_that_is_not_there_is_refused_with_sizes() -> None:
    with pytest.raises(Refused, match=r"7b in bfloat16 with 64 frames needs about 2\d\.\d GiB \(weights 14\.2, .*8\.0"):
        check_memory(DECODERS["7b"], 64, torch.bfloat16, "cuda", free=8 << 30)
    check_memory(DECODERS["7b"], 64, torch.bfloat16, "cuda", free=80 << 30)
    check_memory(DECODERS["7b"], 64, torch.bfloat16, "cpu", free=None)  # a system that does not say


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "0"], "--frames must be at least 1, got 0"),
        (["--repeats", "-1"], "--repeats must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["-o", "results.json"], r"--output must end in \.jsonl"),
        (["--device", "mps"], "--device must be cpu, cuda or cuda:1, got 'mps'"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds [0-9]+ GPUs"),
        (["--device", "gpu"], "--device must be cpu, cuda or cuda:1, got 'gpu'"),
        (["--device", "cpu", "--model", "7b", "--frames", "1000000"], "needs about .* GiB free: fewer --frames"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--no-save"])
    assert stopped.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_without_transformers_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "tiny", "--device", "cpu", "--quick", "--no-save"])
    assert stopped.value.code == 2
    assert "pip install transformers" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*attention kernel not used")
def test_attention_that_would_hold_all_scores_is_refused() -> None:
    q = torch.randn(1, 2, 8, 16)
    mask = torch.zeros(8, 8, requires_grad=True)  # no other kernel has a gradient of the mask
    with pytest.raises(Refused, match="try another --dtype"), prefill.without_score_matrix():
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    with pytest.raises(RuntimeError, match="something else"), prefill.without_score_matrix():
        raise RuntimeError("something else")


def test_dtype_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda n=native: {"avx512_bf16": n}, raising=False)
        assert default_dtype("cpu") is dtype
        assert default_dtype("cuda") is torch.bfloat16


# ---- poolings ----


@pytest.mark.parametrize("variant", variants()[1:], ids=lambda variant: variant.name)
def test_what_is_timed_pools_to_its_grid(variant: Variant) -> None:
    x = random_tokens((8, SIZE, SIZE, 32), torch.bfloat16, "cpu", 0)
    provider = provider_of(variant, x)
    assert provider is not None
    assert provider.name.partition(":")[0] == variant.provider
    assert check(provider, x, variant.grid) == "ok"
    spoilt = replace(provider, call=lambda x: provider.call(x) * 1.1)
    assert check(spoilt, x, variant.grid).startswith("wrong: off by")


# ---- a run ----


@needs_transformers
def test_a_prefill_is_causal_without_a_mask_and_ends_in_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **given: object) -> Tensor:
        calls.append(given | {"length": q.shape[2]})
        return attend(q, k, v, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = build(TINY, torch.float32, "cpu")
    with torch.inference_mode():
        assert prefill._prefill(model, torch.randn(1, 40, TINY.hidden), "cpu") > 0
    assert len(calls) == TINY.layers
    assert all(call["is_causal"] and call["attn_mask"] is None and call["length"] == 40 for call in calls)


@needs_transformers
def test_variants_take_turns_after_a_warm_up() -> None:
    seen: list[tuple[str, int, int]] = []
    rows = measure(TINY, torch.float32, "cpu", 1, 2, show=lambda *what: seen.append(what))
    names = [variant.name for variant in variants()]
    assert [text.partition(": ")[2] for text, _, _ in seen[2:]] == names * 3
    assert seen[2][0].startswith("warming up")
    assert seen[-1] == (f"turn 2 of 2: {names[-1]}", 3 * len(names) - 1, 3 * len(names))
    assert [row.samples for row in rows] == [2] * len(names)


@needs_transformers
def test_on_a_gpu_events_tell_the_time_and_the_allocator_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch.cuda: tensors stay on the CPU."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end: Event) -> float:
            return 0.25

    order: list[str] = []
    for name, result in (("memory_allocated", 1000), ("reset_peak_memory_stats", None), ("max_memory_allocated", 5000)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, result=result: (order.append(name), result)[1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        prefill, "random_tokens", lambda shape, dtype, device, seed: random_tokens(shape, dtype, "cpu", seed)
    )
    monkeypatch.setattr(prefill, "build", lambda decoder, dtype, device: build(decoder, dtype, "cpu"))
    rows = measure(TINY, torch.float32, "cuda", 1, 1)
    assert {row.prefill_p50_us for row in rows} == {250.0}
    assert {row.total_us for row in rows} == {250.0, 500.0}
    assert {row.extra_peak_bytes for row in rows} == {4000}
    assert {row.others_cores for row in rows} == {None}
    assert order[-3:] == ["memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"]


@needs_transformers
def test_a_wrong_pooling_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        prefill, "check", lambda provider, x, grid: "wrong: so it is" if provider.name == "llava_avg_pool" else "ok"
    )
    rows = {row.variant: row for row in measure(TINY, torch.float32, "cpu", 1, 1)}
    assert rows["llava_avg_pool"].check == "wrong: so it is"
    assert rows["llava_avg_pool"].total_us is rows["llava_avg_pool"].speedup_over_unpooled is None
    assert rows["grid_pool()"].total_us is not None
    assert "| wrong: so it is | - | - | - |" in markdown(RUN, list(rows.values()))


@needs_transformers
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "prefill.jsonl"
    command = ["--model", "tiny", "--device", "cpu", "--frames", "2", "--repeats", "2", "--dtype", "float32"]
    assert main([*command, "-o", str(path)]) == 0
    assert main([*command, "-o", str(path)]) == 0
    assert main([*command, "-o", str(path), "--no-save"]) == 0
    shown = capsys.readouterr().out
    assert "answers would not" in shown
    assert str(path) in shown.replace("\n", "")
    found = load(path)
    assert len(found) == 2
    assert [each.run.run for each in results.load(path)] == [run.run for run, _ in found]
    run, rows = found[0]
    assert run.settings["model"] == "tiny"
    assert run.settings["dtype"] == "float32"
    assert run.versions["transformers"]
    assert [row.variant for row in rows] == [variant.name for variant in variants()]
    for row in rows:
        assert row.check == "ok"
        assert row.visual_tokens == 2 * row.grid[0] * row.grid[1]
        assert row.prompt_tokens == row.visual_tokens + 64
        assert row.extra_peak_bytes is None
        assert row.prefill_p20_us <= row.prefill_p50_us <= row.prefill_p80_us
        if row.variant == "unpooled":
            assert row.pool_p50_us is row.share_of_pooling is None
            assert row.speedup_over_unpooled == 1
        else:
            assert row.provider
            assert row.pool_p20_us <= row.pool_p50_us <= row.pool_p80_us
            assert 0 < row.share_of_pooling < 1


@needs_transformers
def test_quick_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "RESULTS", tmp_path)
    command = ["--model", "tiny", "--device", "cpu", "--quick"]
    assert main(command) == 0
    assert not list(tmp_path.iterdir())
    assert main([*command[:-1], "--frames", "1", "--repeats", "1"]) == 0
    assert [path.name.startswith("prefill-cpu-") for path in tmp_path.iterdir()] == [True]


# ---- results ----


def test_shares_and_ratios_of_medians() -> None:
    rows = {row.variant: row for row in made_up(pool_us=1000.0)}
    unpooled, pooled = rows["unpooled"], rows["grid_pool()"]
    assert unpooled.total_us == unpooled.prefill_p50_us == 100 * 64 * 729
    assert pooled.total_us == 1000 + 100 * 64 * 169
    assert pooled.share_of_pooling == 1000 / pooled.total_us
    assert pooled.relative_to_unpooled == pooled.total_us / unpooled.total_us
    assert pooled.speedup_over_unpooled == unpooled.total_us / pooled.total_us
    assert rows["grid_pool(output_size=(19, 19))"].share_of_tokens == pytest.approx(0.4952, abs=1e-4)


def test_quantiles() -> None:
    row = Prefill.of(variants()[-1], None, "", frames=1)
    row.add_times([1.0, 3.0, 2.0], [10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    assert (row.pool_p20_us, row.pool_p50_us, row.pool_p80_us) == (1.4, 2.0, 2.6)
    assert (row.prefill_p20_us, row.prefill_p50_us, row.prefill_p80_us) == (20.0, 35.0, 50.0)
    assert row.samples == 6


def test_files_are_appended_to_and_read_back(tmp_path: Path) -> None:
    path, rows = tmp_path / "prefill.jsonl", made_up()
    save(RUN, rows, path)
    with path.open("a") as file:
        file.write('[]\n{"kind": "row", "run": "another"}\n{"kind": "prefill", "run": "unknown"}\n{"kind": "pref')
    later = replace(RUN, run="20260102T000000Z-0000")
    save(later, [replace(row, run=later.run) for row in rows], path)
    (first, found), (second, _) = load(path)
    assert (first, second) == (RUN, later)
    assert [vars(row) for row in found] == [vars(row) for row in rows]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        load(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("share", "shown"), [(None, "-"), (1.0, "100 %"), (361 / 729, "49.5 %"), (0.0123, "1.23 %"), (0.000193, "0.019 %")]
)
def test_shares_as_they_are_shown(share: float | None, shown: str) -> None:
    assert show_share(share) == shown


def test_markdown_has_a_line_for_every_variant() -> None:
    rows = made_up()
    lines = markdown(RUN, rows).splitlines()
    assert {line.count("|") for line in lines[: 2 + len(rows)]} == {9}
    assert lines[2] == "| none | 27 × 27 | 46,656 | 100 % | - | 4.67 s | 1.00 × | - |"
    assert (
        lines[3]
        == "| `grid_pool(output_size=(19, 19))` | 19 × 19 | 23,104 | 49.5 % | 500 µs | 2.31 s | 2.02 × | 0.022 % |"
    )
    facts = " ".join(lines[2 + len(rows) :])
    assert "random weights (7b: 7.62 × 10⁹ parameters, bfloat16), 64 frames of 27 × 27 tokens" in facts
    assert "A CPU, 2 cores, 2 threads, torch 2.13.0, 2026-01-01, transformers 5.17.0." in facts
    assert all(len(line) <= 120 for line in lines)
    rows[0].others_cores = 0.53
    assert "Other processes used up to 0.5 cores meanwhile." in " ".join(markdown(RUN, rows).split())


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "prefill.png"
    plot(RUN, made_up(), path)
    plot(RUN, made_up(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
