"""The benchmark on a CPU: its probe, who is timed, its bars, and what is made of its results. Times are made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import cpu_bench
from benchmarks.contenders import Workload, random_tokens
from benchmarks.cpu_bench import (
    GRID,
    OTHERS,
    OURS,
    POOL,
    SMALL,
    T16,
    T64,
    Clock,
    Probe,
    Row,
    bars,
    by_name,
    check,
    contenders,
    load,
    main,
    markdown_table,
    measure,
    newest_results,
    results_name,
    take_turns,
)
from benchmarks.lower_bound import Traffic
from stgridpool_kernels import compiled

TINY = Workload("tiny", (64,), 5, 96)

needs_library = pytest.mark.skipif(compiled.LIBRARY is None, reason="the compiled library was not built")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


# ---- the probe ----


def words(*shape: int) -> Tensor:
    """Random bits, few of which are set: or-ing them all together leaves zeros."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(0, 256, (*shape, 8), dtype=torch.uint8, generator=generator) for _ in range(20))
    few = next(draws)
    for draw in draws:
        few &= draw
    return few.view(torch.int64).squeeze(-1)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "pooled"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((5, 7), (3, 4)), ((1, 1), (1, 1))], ids=str
)
def test_probe_combines_windows(size: tuple[int, int], pooled: tuple[int, int], threads: int) -> None:
    x, out = words(3, *size, 24), torch.full((3, *pooled, 24), -1)
    Probe().pool(x, out, threads)
    expected = np.zeros(out.shape, dtype=np.int64)
    for r in range(min(size[0], 2 * pooled[0])):
        for c in range(min(size[1], 2 * pooled[1])):
            expected[:, r // 2, c // 2] |= x.numpy()[:, r, c]
    np.testing.assert_array_equal(out.numpy(), expected)


@needs_compiler
@pytest.mark.parametrize("lines", [1, 3, 1024, 1024 * 3 + 5])
def test_probe_reads_and_copies_everything(lines: int) -> None:
    probe, x = Probe(), words(lines * 8)
    assert probe.read(x, 2) == np.bitwise_or.reduce(x.numpy().view(np.uint64))
    for place in (0, lines * 4, -1):
        marked = torch.zeros_like(x)
        marked[place] = 1 << 40
        assert probe.read(marked, 2) == 1 << 40
    out = torch.full((x.numel() + 8,), -1)
    probe.copy(x, out[:-8], 2)
    assert torch.equal(out[:-8], x)
    assert (out[-8:] == -1).all()


@needs_compiler
def test_probe_is_compiled_once_and_refuses_parts_of_lines() -> None:
    probe, x = Probe(), words(2, 4, 4, 8)
    before = set(cpu_bench.BUILD.glob("ceiling-*"))
    Probe()
    assert set(cpu_bench.BUILD.glob("ceiling-*")) == before
    with pytest.raises(ValueError, match="whole cache lines"):
        probe.pool(x[..., :7].contiguous(), torch.empty(2, 2, 2, 7, dtype=x.dtype), 1)
    with pytest.raises(ValueError, match="whole cache lines"):
        probe.read(x.flatten()[1:9], 1)


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        Probe()


# ---- who is timed ----


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [4, 5])
def test_contenders_are_right(dtype: torch.dtype, size: int) -> None:
    workload = replace(TINY, size=size, dtype=dtype)
    x = random_tokens(workload.shape, dtype, "cpu", 0)
    timed = contenders(workload)
    assert len(timed) == 6
    assert {contender.name: check(contender, x) for contender in timed} == dict.fromkeys(
        contender.name for contender in timed
    )


@needs_library
def test_windows_that_the_edge_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = replace(TINY, ceil_mode=True)
    monkeypatch.setattr(cpu_bench, "OTHERS", (workload,))
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    timed = contenders(workload)
    assert not any("naive" in contender.name for contender in timed)
    assert [check(contender, x) for contender in timed] == [None] * 4


@needs_library
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders(TINY)[0]

    def spoilt(x: Tensor, out: Tensor | None = None) -> Tensor:
        result = right.call(x) if out is None else right.call(x, out=out)
        if out is None:
            result[-1, -1, -1, -1] += 1
        return result

    monkeypatch.setattr(cpu_bench, "contenders", lambda workload: [replace(right, call=spoilt)])
    with pytest.raises(SystemExit, match="norm_pool on tiny is wrong: off by"):
        measure(TINY, None, 1, 1)


@needs_library
@needs_compiler
def test_measure() -> None:
    threads = torch.get_num_threads()
    rows, use = measure(TINY, Probe(), 2, threads)
    found = {row.contender: row for row in rows}
    assert {*OURS, "ceiling", "read", "streaming_copy", "copy", "avg_pool2d", "llava_avg_pool"} < set(found)
    assert {row.samples for row in rows} == {2}
    assert all(0 < row.min_us <= row.p20_us <= row.p50_us <= row.p80_us <= row.max_us for row in rows)
    token, tokens = TINY.channels * 2, 64 * 25
    moved = {name: (row.read_bytes, row.write_bytes) for name, row in found.items()}
    assert moved["ceiling"] == moved[POOL] == (64 * 16 * token, 64 * 4 * token)
    assert moved["read"] == (tokens * token, 0)
    assert moved["copy"] == moved["streaming_copy"] == (tokens * token,) * 2
    assert use["workload"] == "tiny"
    assert use["others_cores"] >= 0


def test_shapes() -> None:
    assert (T16.shape, T64.shape) == ((16, 27, 27, 3584), (64, 27, 27, 3584))
    names = [workload.name for workload in (SMALL, T16, T64, *OTHERS)]
    assert len(set(names)) == len(names)
    bound = T64.bound("grid_pool")
    assert (round(bound.read_bytes / 1e6, 1), round(bound.write_bytes / 1e6, 1)) == (305.6, 77.5)


def test_slow_calls_take_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def seconds(call: Callable[[], object]) -> float:
        call()
        return 2.0 if order[-1] == "slow" else 0.1

    monkeypatch.setattr(cpu_bench, "_seconds", seconds)
    calls = {name: (lambda name=name: order.append(name)) for name in ("slow", "fast")}
    times = take_turns(calls, 10, prepare=lambda call: order.append("prepare"))
    assert {name: len(samples) for name, samples in times.items()} == {"slow": 2, "fast": 10}
    assert order[:2] == ["slow", "fast"]
    assert order[2::2] == ["prepare"] * 12
    assert [i for i, name in enumerate(order[3::2]) if name == "slow"] == [4, 10]  # turns 5 and 10


def test_who_used_the_cpu() -> None:
    before = Clock(wall=100.0, own=10.0, busy=500.0, stolen=3.0)
    after = Clock(wall=104.0, own=16.0, busy=508.0, stolen=3.4)
    assert after.use_since(before) == {"wall_s": 4.0, "own_cores": 1.5, "others_cores": 0.5, "stolen_cores": 0.1}


# ---- bars ----


MEDIANS_US = {
    (T16, POOL): 4_000.0,
    (T16, "ceiling"): 3_300.0,
    (T16, "avg_pool2d"): 4_900.0,
    (T64, POOL): 16_000.0,
    (T64, "norm_pool"): 40_000.0,
    (T64, GRID): 21_000.0,
    (T64, "ceiling"): 13_000.0,
    (T64, "avg_pool2d"): 41_000.0,
    (T64, "llava_avg_pool"): 500_000.0,
    (T64, "naive_norm_pool"): 1_700_000.0,
    (T64, "naive_grid_pool"): 4_000_000.0,
    **{(SMALL, name): 40.0 + i for i, name in enumerate(OURS)},
}


def rows_of(medians: dict[tuple[Workload, str], float]) -> list[Row]:
    return [
        Row.of(workload, contender, workload.bound("norm_pool"), [us / 1e6] * 3)
        for (workload, contender), us in medians.items()
    ]


def statuses(medians: dict[tuple[Workload, str], float]) -> list[str]:
    return [bar.status for bar in bars(by_name(asdict(row) for row in rows_of(medians)))]


def test_a_row_of_known_times() -> None:
    row = Row.of(TINY, "x", Traffic(3_000_000, 1_000_000), [0.003, 0.001, 0.002])
    assert (row.min_us, row.p20_us, row.p50_us, row.p80_us, row.max_us) == (1000, 1400, 2000, 2600, 3000)
    assert row.samples == 3
    assert row.gb_per_s == 2.0


@pytest.mark.parametrize(
    ("where", "us", "missed"),
    [
        (None, 0.0, []),
        ((T16, "avg_pool2d"), 4_799.0, [0]),
        ((T64, "avg_pool2d"), 39_999.0, [1]),
        ((T64, "llava_avg_pool"), 239_999.0, [2]),
        ((T64, "naive_grid_pool"), 2_099_999.0, [3]),
        ((T64, "naive_norm_pool"), 1_599_999.0, [4]),
        ((T64, "ceiling"), 12_790.0, [5]),
        ((T16, "ceiling"), 3_190.0, [6]),
        ((T64, GRID), 21_601.0, [7]),
        *(((SMALL, name), 80.1, [8]) for name in OURS),
    ],
    ids=lambda value: f"{value[0].name} {value[1]}" if isinstance(value, tuple) else None,
)
def test_bars(where: tuple[Workload, str] | None, us: float, missed: list[int]) -> None:
    medians = MEDIANS_US if where is None else MEDIANS_US | {where: us}
    assert statuses(medians) == ["not met" if i in missed else "met" for i in range(9)]


def test_missing_times_meet_no_bar() -> None:
    assert statuses({}) == ["not measured"] * 9
    without_a_probe = {where: us for where, us in MEDIANS_US.items() if where[1] != "ceiling"}
    assert [i for i, status in enumerate(statuses(without_a_probe)) if status == "not measured"] == [5, 6]


# ---- results ----


REPORT: dict[str, Any] = {
    "utc": "2026-11-22T12:00:00+00:00",
    "device": {"name": "Some CPU", "cores": 4, "threads": 2, "capability": "avx2"},
    "versions": {"torch": "2.13.0+cpu"},
    "use": [{"others_cores": 0.04}],
    "rows": [asdict(row) for row in rows_of(MEDIANS_US)],
}


def test_table() -> None:
    assert markdown_table(REPORT).splitlines() == [
        "| time, relative to the first row | 16 frames | 64 frames |",
        "|---|---|---|",
        "| `norm_pool` with `out=` | 1 (4.0 ms) | 1 (16.0 ms) |",
        "| `norm_pool` | - | 2.50 |",
        "| `grid_pool` with `out=` | - | 1.31 |",
        "| `grid_pool` | - | - |",
        "| reading and writing as many bytes | 0.82 | 0.81 |",
        "| a copy of `x` | - | - |",
        "| `avg_pool2d` of a channels-last view | 1.23 | 2.56 |",
        "| average pooling as LLaVA calls it | - | 31 |",
        "| published code, pooling alone | - | 106 |",
        "| published code | - | 250 |",
        "",
        "Frames of 27 × 27 × 3584 in bfloat16, pooled to 13 × 13; medians. Some CPU, 4 cores, 2 threads, avx2, "
        "torch 2.13.0,",
        "2026-11-22. A call on one frame of 9 × 9 × 384 takes 41 µs (`norm_pool`) and 43 µs (`grid_pool`).",
    ]
    noisy = markdown_table(REPORT | {"use": [{"others_cores": 0.04}, {"others_cores": 0.52}]})
    assert noisy.replace("\n", " ").endswith("(`grid_pool`). Other processes used up to 0.5 cores meanwhile.")


@needs_library
@pytest.mark.parametrize(("times_ours", "code"), [(1, 0), (3, 1)], ids=["met", "not met"])
def test_results_can_be_read_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    times_ours: int,
    code: int,
) -> None:
    medians = MEDIANS_US | {(T64, POOL): MEDIANS_US[T64, POOL] * times_ours}

    def measured(workload: Workload, probe: object, repeats: int, threads: int) -> tuple[Sequence[Row], dict[str, Any]]:
        asked.append((workload.name, probe is not None, repeats, threads))
        here = {where: us for where, us in medians.items() if where[0] is workload} or {(workload, POOL): 1.0}
        return rows_of(here), {"workload": workload.name, "others_cores": 0.3, "stolen_cores": 0.0}

    asked: list[tuple[str, bool, int, int]] = []
    monkeypatch.setattr(cpu_bench, "measure", measured)
    monkeypatch.setattr(cpu_bench, "Probe", object)
    monkeypatch.setattr(cpu_bench, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        assert main(["--quick", "--threads", "1"]) == code
        assert newest_results(tmp_path) is None
        assert main(["--repeats", "7", "--threads", "1"]) == code
    finally:
        torch.set_num_threads(threads)
    assert [call[0] for call in asked] == [w.name for w in (SMALL, T16, T64, SMALL, T16, T64, *OTHERS)]
    assert asked[1][1:] == (True, cpu_bench.QUICK_REPEATS, 1)
    assert asked[3][1:] == (False, cpu_bench.SMALL_REPEATS, 1)
    assert {call[1:] for call in asked[4:]} == {(True, 7, 1)}

    path = newest_results(tmp_path)
    assert path is not None
    report = load(path)
    assert [bar["status"] for bar in report["bars"]].count("met") == (9 if code == 0 else 5)
    assert report["device"]["threads"] == 1
    assert report["device"]["capability"] in ("avx512", "avx2", "portable")
    printed = capsys.readouterr().out
    assert "NOT QUIET: others used up to 0.30 cores" in printed
    assert main(["--table", str(path)]) == 0
    assert capsys.readouterr().out == markdown_table(report) + "\n"
    with pytest.raises(SystemExit):
        main(["-o", str(path)])


def test_no_results_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu_bench, "RESULTS", tmp_path / "none")
    assert newest_results() is None
    with pytest.raises(SystemExit):
        main(["--table"])
    assert "there are no results of a CPU" in capsys.readouterr().err


def test_names_and_the_newest(tmp_path: Path) -> None:
    assert newest_results(tmp_path) is None
    utc = cpu_bench.datetime(2026, 11, 22, 12, 0, 0, tzinfo=cpu_bench.timezone.utc)
    name = results_name("AMD EPYC 9B14 96-Core", utc)
    assert name == "cpu-amd-epyc-9b14-96-core-20261122T120000Z.json"
    for name, time in (("cpu-b-1.json", "2026-11-21"), ("cpu-a-2.json", "2026-11-22"), ("gpu-c.json", "2026-11-23")):
        (tmp_path / name).write_text(f'{{"utc": "{time}"}}')
    assert newest_results(tmp_path) == tmp_path / "cpu-a-2.json"


@needs_library
def test_a_machine_that_is_not_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clocks = iter([Clock(0.0, 0.0, 0.0, 0.0), Clock(2.0, 0.0, 1.0, 0.0)] * 2)
    monkeypatch.setattr(Clock, "now", lambda: next(clocks))
    monkeypatch.setattr(cpu_bench.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cpu_bench, "run", lambda *arguments: 0)
    assert main(["--require-quiet"]) == 2
    assert "other processes use 0.50 cores: nothing was measured" in capsys.readouterr().err
    assert main(["--require-quiet", "0.6"]) == 0


def test_readme_shows_the_newest_results() -> None:
    readme = (cpu_bench.ROOT / "README.md").read_text(encoding="utf-8")
    if "<!-- cpu-bench -->" not in readme:
        pytest.skip("the README has no place for the table")
    newest = newest_results()
    if newest is None:
        pytest.skip("there are no results of a CPU")
    shown = readme.split("<!-- cpu-bench -->\n", 1)[1].split("<!-- /cpu-bench -->", 1)[0]
    assert shown.strip() == markdown_table(load(newest))
