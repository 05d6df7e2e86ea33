"""The sentences that the page begins with say what results say, and leave out what was not measured."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.findings import large_calls, listed, not_measured, small_calls
from benchmarks.goals import ONE_FRAME
from benchmarks.results import Results
from tests.benchmarks.rows import RUN, make_row
from tests.benchmarks.test_page import prefill
from tests.benchmarks.test_tables import SWEEP


def test_large_calls() -> None:
    """Fresh results are compared with fresh ones, and the plain average is named before LLaVA's own call."""
    times = {"norm_pool:cpu": 16.0, "grid_pool:cpu": 20.0, "avg_pool2d": 58.0, "llava_avg_pool": 455.0}
    rows = [make_row(name, 1e3 * ms) for name, ms in times.items()]
    first = (
        "On Some CPU with 1 thread, pooling 64 frames of LLaVA-Video (27 × 27 tokens of 3584 channels, bfloat16) "
        "takes 58.0 ms with channels-last `avg_pool2d`, 16.0 ms with `norm_pool` and 20.0 ms with `grid_pool`, each "
        "into a fresh result"
    )
    llava = ", and 455 ms with LLaVA's own call"
    assert large_calls(Results(RUN, rows), None) == f"{first}{llava}."
    rows += [make_row("norm_pool:cpu:out", 12_400), make_row("grid_pool:cpu:out", 15_800)]
    given = " (into given memory: not measured, 12.4 ms and 15.8 ms)"
    assert large_calls(Results(RUN, rows), None) == f"{first}{given}{llava}."
    reads = [prefill("pool", "grid_pool()", 1, 13), prefill("prefill", "grid_pool()", 3_999, 13)]
    assert large_calls(Results(RUN, rows), Results(RUN, reads)) == f"{first}{given}{llava}."
    reads += [prefill("pool", "llava_avg_pool", 10, 13), prefill("prefill", "llava_avg_pool", 3_990, 13)]
    assert large_calls(Results(RUN, rows), Results(RUN, reads)).endswith(
        "; of the time until a decoder of the shape of Qwen2-7b, with random weights, has read 64 frames of 3584 "
        "channels, `grid_pool` is 0.025 % where LLaVA's own call is 0.25 %."
    )


def test_small_calls() -> None:
    """A shape counts as slower if it is with either kind of memory; the worst is named."""
    facts = {"workload": ONE_FRAME, "groups": ("overhead",)}
    one_frame = [make_row("grid_pool:cpu", 206, overhead_us=29.2, **facts)]
    assert small_calls(Results(RUN, one_frame), None, None) == ""
    one_frame.append(make_row("avg_pool2d", 42.6, overhead_us=5.7, **facts))
    empty = [make_row("empty:op", 150, overhead_us=15.5, workload="empty", groups=("empty",))]
    assert small_calls(Results(RUN, one_frame), Results(RUN, empty), Results(RUN, SWEEP)) == (
        "On one frame of 9 × 9 tokens of 384 channels `grid_pool` takes 29.2 µs (206 µs) where `avg_pool2d` takes 5.70 "
        "µs (42.6 µs), on warm caches (and after other work has filled them); a call without any frames takes 15.5 µs "
        "(150 µs); of 3 shapes of 1 to 64 frames, `avg_pool2d` is faster, with given memory or with a fresh result, "
        "than `norm_pool` on 1 and than `grid_pool` on 2, most on 1 × 27 × 27 × 64 bfloat16, in 0.25 of the time."
    )
    text = small_calls(None, None, Results(RUN, SWEEP[-2:]))
    assert text.endswith(" than `norm_pool` on 0 and than `grid_pool` on 0.")


def test_what_was_not_measured() -> None:
    gpu = replace(RUN, device={"type": "cuda", "name": "Some GPU"})
    other = replace(RUN, device=RUN.device | {"name": "Another"})
    text = not_measured([Results(other, []), Results(RUN, []), Results(RUN, [])])
    assert "anything on a GPU" in text
    assert "CPUs other than Another and Some CPU" in text
    assert "GPU" not in not_measured([Results(gpu, []), Results(RUN, [])])


def test_lists() -> None:
    assert [listed(["a", "b", "c"][:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
