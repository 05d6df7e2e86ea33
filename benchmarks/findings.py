"""Three sentences on what the results of a CPU mean for a user: large calls, small calls, and what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.goals import ONE_FRAME, T64
from benchmarks.report import plural, show_number, show_time
from benchmarks.results import BenchRow, Results
from benchmarks.tables import LLAVA, PLAIN

OPS = {"channels-last `avg_pool2d`": PLAIN, "`norm_pool`": "norm_pool:cpu", "`grid_pool`": "grid_pool:cpu"}
"""Providers by their names in sentences. Each writes into fresh memory, or into given memory with ":out"."""


def cost(results: Results, prefill: Results | None) -> list[list[str]]:
    """Return the lines of the README's table: what 64 frames cost, then what that is of a prefill, if there are any.

    Columns are grid_pool, LLaVA's own call and channels-last avg_pool2d. A cell is "-" where nothing was measured.
    """
    rows = [results.find(T64, provider) for provider in ("grid_pool:cpu", LLAVA, PLAIN)]
    times = [show_time(row.us) if row and row.is_timed else "-" for row in rows]
    lines = [["64 frames of 27 × 27 × 3584, bfloat16, into a fresh result", *times]]
    found = shares_of_prefill(prefill).values() if prefill else ()
    for pooling in {each.pooling.workload: each.pooling for each in found}.values():
        model = (
            f"{pooling.frames} frames by a decoder of the shape of Qwen2-{pooling.workload.removeprefix('prefill-')}"
        )
        lines.append([f"share of a prefill of {model}", *(show_share(each.share) for each in found), "-"])
    if found and all(each.of_all for each in found):
        gains = (show_share(each.of_all or 0) for each in found)
        lines.append(["pooling and that prefill, next to a prefill of all tokens", *gains, "-"])
    return lines


def large_calls(results: Results, prefill: Results | None) -> str:
    """Return the cost of 64 frames next to the poolings that the ops stand in for, and as a share of a prefill.

    results: of a CPU, with the workload of 64 frames. prefill: results of prefills, if there are any.
    """
    device = results.run.device
    fresh = {name: results.find(T64, provider) for name, provider in OPS.items()}
    given = [results.find(T64, f"{provider}:out") for provider in OPS.values()]
    times = [f"{show_time(row.us)} with {name}" for name, row in fresh.items() if row is not None]
    text = (
        f"On {device['name']} with {plural(device.get('threads'), 'thread')}, pooling 64 frames of LLaVA-Video "
        f"(27 × 27 tokens of 3584 channels, bfloat16) takes {listed(times)}, each into a fresh result"
    )
    if any(given):
        text += f" (into given memory: {listed([show_time(row.us) if row else 'not measured' for row in given])})"
    if llava := results.find(T64, LLAVA):
        text += f", and {show_time(llava.us)} with LLaVA's own call"
    share = share_of_prefill(prefill) if prefill else ""
    return f"{text}; {share}." if share else f"{text}."


PREFILLS = ("grid_pool()", LLAVA)
"""Poolings before the prefills that are compared, by the names of their providers."""


@dataclass(frozen=True)
class Prefilled:
    """A pooling and the prefill after it: percent that the pooling takes of both, and both of a prefill of all tokens.

    pooling: the result of the pooling. of_all: None if the prefill of all tokens was not timed.
    """

    pooling: BenchRow
    share: float
    of_all: float | None


def shares_of_prefill(results: Results) -> dict[str, Prefilled]:
    """Return what was measured of each of `PREFILLS`, nothing unless all were."""
    rows = {row.provider: row for found in results.of("prefill").values() for row in found if row.is_timed}
    unpooled = rows.get("prefill:unpooled")
    shares = {}
    for name in PREFILLS:
        pooling, prefill = rows.get(f"pool:{name}"), rows.get(f"prefill:{name}")
        if pooling and prefill:
            both = pooling.us + prefill.us
            shares[name] = Prefilled(pooling, 100 * pooling.us / both, 100 * both / unpooled.us if unpooled else None)
    return shares if len(shares) == len(PREFILLS) else {}


def share_of_prefill(results: Results) -> str:
    """Return the shares of grid_pool and of LLaVA's own call in a pooling and the prefill after it, as a sentence."""
    found = shares_of_prefill(results)
    if not found:
        return ""
    ours, llava = (found[name] for name in PREFILLS)
    size = ours.pooling.workload.removeprefix("prefill-")
    return (
        f"of the time until a decoder of the shape of Qwen2-{size}, with random weights, has read "
        f"{ours.pooling.frames} frames of {ours.pooling.shape[-1]} channels, `grid_pool` is {show_share(ours.share)} "
        f"where LLaVA's own call is {show_share(llava.share)}"
    )


def show_share(percent: float) -> str:
    return f"{show_number(percent)} %"


def small_calls(overhead: Results | None, empty: Results | None, plain: Results | None) -> str:
    """Return the cost of calls on few tokens. overhead, empty, plain: results with the groups of these names."""
    texts = []
    pair = [overhead.find(ONE_FRAME, name) if overhead else None for name in ("grid_pool:cpu", PLAIN)]
    if all(row is not None and row.overhead_us is not None for row in pair):
        ours, average = (f"{show_number(row.overhead_us or 0)} µs ({show_number(row.us)} µs)" for row in pair if row)
        texts.append(
            f"on one frame of 9 × 9 tokens of 384 channels `grid_pool` takes {ours} where `avg_pool2d` takes "
            f"{average}, on warm caches (and after other work has filled them)"
        )
    op = empty.find("empty", "empty:op") if empty else None
    if op is not None and op.overhead_us is not None:
        texts.append(f"a call without any frames takes {show_number(op.overhead_us)} µs ({show_number(op.us)} µs)")
    if plain is not None:
        texts.append(slower_shapes(plain))
    text = "; ".join(texts)
    return f"{text[0].upper()}{text[1:]}." if texts else ""


def slower_shapes(results: Results) -> str:
    """Return on how many shapes of the sweep avg_pool2d is faster than each op, with either kind of memory."""
    texts, measured = [], results.of("plain")
    worst = dict[str, float]()
    for op in ("norm_pool", "grid_pool"):
        slower = 0
        for name in measured:
            found = [ratio for out in ("", ":out") if (ratio := faster(results, name, op, out)) is not None]
            slower += min(found, default=1.0) < 1
            worst[name] = min([worst.get(name, 1.0), *found])
        texts.append(f"than `{op}` on {slower}")
    place = min(worst, key=worst.__getitem__)
    row: BenchRow = measured[place][0]
    most = f", most on {' × '.join(map(str, row.shape))} {row.dtype}, in {worst[place]:.2f} of the time"
    which = f"`avg_pool2d` is faster, with given memory or with a fresh result, {' and '.join(texts)}"
    text = f"of {len(measured)} shapes of 1 to 64 frames, {which}"
    return text + (most if worst[place] < 1 else "")


def faster(results: Results, workload: str, op: str, out: str) -> float | None:
    """Return the time of avg_pool2d over that of an op, None if one was not measured."""
    ours, plain = (results.find(workload, f"{name}{out}") for name in (f"{op}:cpu", PLAIN))
    return None if ours is None or plain is None else plain.us / ours.us


def not_measured(machines: Sequence[Results]) -> str:
    """Return what no result is about. machines: results of all machines."""
    names = [results.run.device["name"] for results in machines if results.run.device["type"] == "cpu"]
    others = f"CPUs other than {listed(list(dict.fromkeys(names)))}" if names else "any CPU"
    missing = [others, "what the poolings do to a model's answers"]
    if not any(results.run.device["type"] == "cuda" for results in machines):
        missing = ["anything on a GPU (the kernels have not run on one yet)", *missing]
    return f"Not measured: {listed(missing)}."


def listed(words: Sequence[str]) -> str:
    """Return words as in "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
