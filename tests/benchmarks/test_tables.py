"""Tables of the page compare like with like: given memory with given memory, and fresh results with fresh results."""

from __future__ import annotations

from typing import Any

from benchmarks.goals import ONE_FRAME, T16
from benchmarks.results import BenchRow, Results
from benchmarks.tables import empty_table, fresh_table, one_frame_table, plain_tables, summary_table, times_table
from tests.benchmarks.rows import RUN, make_row


def plain_rows(frames: int, channels: int, **times_us: float) -> list[BenchRow]:
    """Return rows of the sweep on a shape; `norm_pool_cpu_out=1` stands for norm_pool:cpu:out."""
    facts: dict[str, Any] = {"shape": (frames, 27, 27, channels), "groups": ("plain",)}
    facts["workload"] = f"{frames}x27x27x{channels}:bf16:plain"
    names = {name: name.replace("_cpu", ":cpu").replace("_out", ":out") for name in times_us}
    return [make_row(names[name], time, **facts) for name, time in times_us.items()]


SWEEP = [
    *plain_rows(1, 64, norm_pool_cpu=20, grid_pool_cpu=40, avg_pool2d=10, norm_pool_cpu_out=30, avg_pool2d_out=15),
    *plain_rows(8, 64, norm_pool_cpu=50, grid_pool_cpu=100, avg_pool2d=100, grid_pool_cpu_out=100, avg_pool2d_out=99),
    *plain_rows(8, 896, norm_pool_cpu=50, avg_pool2d=110),
]


def test_times_have_given_memory_first() -> None:
    """A provider without a choice has one time, a missing or wrong one has none, and LLaVA's call comes last."""
    rows = [
        make_row("llava_avg_pool", 455_000),
        make_row("norm_pool:cpu:out", 12_400),
        make_row("norm_pool:cpu", 30_000),
        make_row("grid_pool:cpu", 36_000),
        make_row("naive_grid_pool", 1_700_000),
        make_row("copy", 11_000),
        make_row("ceiling", 9_700),
        make_row("avg_pool2d", 58_000),
        make_row("norm_pool:cpu", 3_110, workload=T16, shape=(16, 27, 27, 3584), settings={"ceil_mode": True}),
        make_row("norm_pool:cpu:out", workload=T16, check="wrong: off by 1"),
    ]
    results = Results(RUN, rows)
    assert summary_table(results).splitlines() == [
        "| ms | avg_pool2d | norm_pool | grid_pool | LLaVA avg pooling |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 16 × 27 × 27 × 3584 bfloat16, ceil_mode=True | - | - / 3.11 | - | - |",
        "| 64 × 27 × 27 × 3584 bfloat16 (llava-video-7b) | - / 58.0 | 12.4 / 30.0 | 36.0 | 455 |",
    ]
    lines = times_table(results, ["llava-video-7b", "nowhere"]).splitlines()
    assert lines[0] == "| ms | ceiling probe | avg_pool2d | norm_pool | grid_pool | LLaVA avg pooling |"
    assert len(lines) == 3


def test_a_gpu_has_a_column_for_every_backend() -> None:
    rows = [make_row(name, 100 * i) for i, name in enumerate(("norm_pool:triton", "norm_pool:cuda", "avg_pool2d"), 1)]
    lines = summary_table(Results(RUN, rows)).splitlines()
    assert lines[0] == "| ms | avg_pool2d | norm_pool, triton | norm_pool, cuda |"
    assert lines[2].endswith("| 0.30 | 0.10 | 0.20 |")


def test_ratios_next_to_a_plain_average() -> None:
    """Ratios are bold where avg_pool2d is faster, and a ratio that was not measured is a dash."""
    given, fresh = plain_tables(Results(RUN, SWEEP))
    head = "| channels | 1 frame | 8 frames |\n| --- | ---: | ---: |\n"
    assert given == f"bfloat16, given memory:\n\n{head}| 64 | **0.50** / - | - / **0.99** |\n| 896 | - / - | - / - |"
    assert fresh == (
        f"bfloat16, fresh results:\n\n{head}| 64 | **0.50** / **0.25** | 2.00 / 1.00 |\n| 896 | - / - | 2.20 / - |"
    )


def test_small_calls() -> None:
    facts: dict[str, Any] = {"workload": "empty", "groups": ("empty",)}
    empty = [
        make_row("empty:op", 150, overhead_us=15.5, **facts),
        make_row("empty:python op", 120, overhead_us=8.0, **facts),
        make_row("empty:function", check="failed: no", **facts),
    ]
    assert empty_table(Results(RUN, empty)).splitlines()[2:] == [
        "| `torch.ops.stgp.grid_pool(x)`, no frames | 15.5 | 150 | 1.25 |",
        "| an empty Python op of the same schema | 8.00 | 120 | 1.00 |",
    ]
    facts = {"workload": ONE_FRAME, "groups": ("overhead",)}
    one_frame = [make_row(name, 200, overhead_us=26.0, **facts) for name in ("norm_pool:cpu:out", "avg_pool2d", "copy")]
    assert one_frame_table(Results(RUN, one_frame)).splitlines()[2:] == [
        "| avg_pool2d | 26.0 | 200 |",
        "| norm_pool, out= | 26.0 | 200 |",
    ]


def test_fresh_memory_is_ordered_by_size() -> None:
    rows = [
        make_row("norm_pool:cpu:out", 10.0),
        make_row("norm_pool:cpu", 14.0),
        *(make_row(name, 10.0, workload=T16, groups=("T-3584",), write_bytes=19_400_000) for name in
          ("norm_pool:cpu:out", "norm_pool:cpu", "avg_pool2d:out", "avg_pool2d")),
    ]  # fmt: skip
    lines = fresh_table(Results(RUN, rows)).splitlines()
    assert lines[0] == "| tokens | result, MB | avg_pool2d | norm_pool | grid_pool |"
    assert [line.split("|")[2:-1] for line in lines[2:]] == [
        [" 19.4 ", " 1.00 ", " 1.00 ", " - "],
        [" 77.5 ", " - ", " 1.40 ", " - "],
    ]
    assert fresh_table(Results(RUN, rows[:1])) == ""
