"""Generation of docs/performance.md, its details and pictures, and the README's table of costs from benchmarks/results.

For every machine and kind of workload, the last measured state of the code counts. All figures come from these results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.details import details
from benchmarks.findings import cost, large_calls, listed, not_measured, small_calls
from benchmarks.goals import T64, goals
from benchmarks.plot import save_plots
from benchmarks.report import (
    filled,
    machine_line,
    remarks,
    show_number,
    state_line,
    workload_title,
)
from benchmarks.results import BenchRow, Results, file_name, last_states, machine_files
from benchmarks.tables import (
    base_of,
    empty_table,
    fresh_table,
    is_shown,
    one_frame_table,
    plain_tables,
    prefill_table,
    summary_table,
    table,
    times_table,
)

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
PICTURES = ROOT / "docs" / "performance"
DETAILS = PICTURES / "details.md"
MARK = "<!-- benchmarks -->", "<!-- /benchmarks -->"

HEADS = {
    "summary": "Times of a call in ms, each after other work has filled the caches: with given memory (`out=`), "
    "then with a fresh result. `avg_pool2d` is called on a channels-last view, without a copy, and is a "
    "plain average: it has no norms and no summaries. LLaVA avg pooling is the code that engines call: "
    "permute, contiguous, `avg_pool2d`.",
    "plain": "The time of channels-last `avg_pool2d` over that of `norm_pool`, then over that of `grid_pool`: "
    "above 1 the op is faster, and bold is slower. Frames have 27 × 27 tokens; `norm_pool` and "
    "`grid_pool` return 13 × 13. Calls follow one another on the same tokens, as in a loop (warm "
    "caches).",
    "small": "µs until a call returns: the time that a small call cannot go below. Warm: the same call was made "
    "just before. Cold: other work has filled the caches, as between two layers of a model.",
    "fresh": "The time of a call with a fresh result over that with given memory, on cold caches, by the size of "
    "the result. Memory that is fresh from the system is handed out and cleared page by page while the "
    "result is written; where the C library still holds memory that was freed before, it costs nothing. In "
    "a virtual machine whose host takes back what is free, it costs several times as much after a pause of "
    "some seconds: times of the largest results vary with that. Give `out=` where calls repeat.",
}
KINDS = {
    "stream": "`push, N` gives a stream N frames at a time, `push, 1x4` one frame to each of four streams. Samples are "
    "whole periods of 32 frames, since a push that completes a segment takes longer. `grid_pool` of the whole video "
    "was timed again in these runs, hours from those above; fresh results of this size vary, as *Fresh memory* says. "
    "What a stream keeps is the most of one stream and of four together.",
    "gradients": "Gradients in the tokens alone, next to the ops.",
    "pruning": "EVS and VidCom2 are the methods by which vLLM drops tokens of videos (`--video-pruning-method`). Both "
    "are called at the rate q that keeps exactly as many tokens as `grid_pool` returns. With its default options that "
    "is a quarter, or less where windows of 2 × 2 leave out an odd row or column; the plugin for vLLM rounds up. A "
    "call computes vLLM's mask and gathers the tokens that it keeps. vLLM also appends positions to these tokens and "
    "corrects those of the prompt, which is not timed. Two things are checked: the kept tokens are tokens of x in "
    "their order, and in float32 the method keeps the tokens that its definition, computed in float64, keeps of the "
    "same x. (In bfloat16 most similarities of random tokens are equal, so any choice among them is right.) Both "
    "methods are plain torch and were timed on a CPU only. What a method does to answers is not measured. `make "
    "bench-pruning` runs this in an environment that has vLLM; elsewhere the two are skipped.",
}
PREFILL = """\
## What pooling saves a language model

Time until a prompt of visual tokens and a short text has gone through a decoder of Qwen2's shape, which grows faster
than the number of tokens, and the time of the pooling before it. Weights are random: only times mean something. Rows
with equally many tokens differ by noise.
"""
SWEEPS = {
    "T-896": "Frames, 896 channels",
    "T-3584": "Frames, 3584 channels",
    "C": "Channels, 32 frames",
    "window": "Windows, 32 frames of 3584 channels; others than 2 × 2 take the general kernels",
    "budget": "Tokens by `output_size`, 32 frames of 3584 channels; general kernels",
}
METHOD = """\
## How it is measured

- **Right first.** Every result is compared with its definition on the tokens that it is timed on, and what is wrong is
  not timed.
- **In turns.** All calls on a workload take turns in one process, so that changes of clocks and other load affect all
  alike. Ratios within a run hold better than times across runs. Times are medians; the use of cores by other processes
  is recorded.
- **From memory.** Unless a table says warm, a buffer larger than the caches is read before each sample. Threads are
  pinned to cores. On a GPU a sample is a CUDA graph of calls on rotating inputs and outputs of at least five times the
  L2 cache.
- **Against the limit.** The ceiling probe moves the fewest bytes of the pooling in the pooling's order by a compiled
  loop without arithmetic.

`make performance` writes this page and [its details](performance/details.md) from the files in
[benchmarks/results](../benchmarks/results), to which `python -m benchmarks` appends. Repeat it: `python -m benchmarks`
(every workload that fits into memory), `python -m benchmarks --shape plain empty 1x9x9x384`, `python -m benchmarks
--shape stream gradients`, `make prefill`, `make bench-pruning`, and on a machine with a GPU `make gpu-check`.
`python -m benchmarks compare A B` shows the changes beyond the noise, `make bench` runs microbenchmarks under
pytest-benchmark, and `stgp bench` answers the first question in half a minute, without a checkout.
"""


def page(files: Sequence[Path]) -> str:
    """Return the text of the page, from the files of all machines.

    The newest CPU and the newest GPU have all tables; older results of other machines follow with the first one only.
    """
    machines = last_states(files, T64)
    latest = newest(machines)
    parts = ["# Performance\n", *sentences(files, machines)]
    for results in latest:
        parts += section(results, files)
    for results in machines:
        parts += earlier(results) if results not in latest else []
    for kind, text in KINDS.items():
        parts += comparison(f"## {kind.capitalize()}", text, last_states(files, kind), kind)
    prefills = last_states(files, "prefill")
    parts += [PREFILL, *(part for results in prefills for part in prefill_tables(results))] if prefills else []
    if any(last_states(files, group) for group in SWEEPS):
        parts.append("## Sweeps\n")
    for group, title in SWEEPS.items():
        parts += comparison(f"### {title}", "", last_states(files, group)[:1], group)
    return "\n".join([*parts, METHOD]).rstrip() + "\n"


def of_machine(found: Sequence[Results], machine: Results) -> Results | None:
    """Return the results that are of the same machine, None if there are none."""
    same = (each for each in found if file_name(each.run.device) == file_name(machine.run.device))
    return next(same, None)


def newest(machines: Sequence[Results]) -> list[Results]:
    """Return the first result of a CPU and the first of a GPU, if there are any. Only these have pictures."""
    firsts = (next((m for m in machines if m.run.device["type"] == kind), None) for kind in ("cpu", "cuda"))
    return [results for results in firsts if results is not None]


def sentences(files: Sequence[Path], machines: Sequence[Results]) -> list[str]:
    """Return the paragraphs that the page begins with: large calls, small calls, and what was not measured."""
    cpu = next((results for results in machines if results.run.device["type"] == "cpu"), None)
    if cpu is None:
        return [f"{filled(not_measured(machines))}\n"] if machines else []
    parts = {part: of_machine(last_states(files, part), cpu) for part in ("prefill", "overhead", "empty", "plain")}
    prefill, *small = parts.values()
    texts = [large_calls(cpu, prefill), small_calls(*small), not_measured(machines)]
    about = {"prefill": "the language model", "overhead": "one frame", "empty": "no frames", "plain": "all shapes"}
    states = {part: state_line(found.run) for part, found in parts.items() if found}
    others = [f"those of {about[part]} are of {each}" for part, each in states.items() if each != state_line(cpu.run)]
    texts.append(f"*These figures are of {state_line(cpu.run)}; {listed(others)}.*" if others else "")
    return [f"{filled(text)}\n" for text in texts if text]


def section(results: Results, files: Sequence[Path]) -> list[str]:
    """Return the section of a machine: times, the sweep next to avg_pool2d, small calls, fresh memory and goals."""
    head = f"## {results.run.device['name']}\n\n{filled(machine_line(results.run))}.\n"
    parts = [head, *titled("Times", HEADS["summary"], [summary_table(results)])]
    plain, empty, one_frame = (of_machine(last_states(files, part), results) for part in ("plain", "empty", "overhead"))
    if plain:
        parts += titled("Next to a plain average", HEADS["plain"], [*plain_tables(plain), state(plain)])
    if empty or one_frame:
        tables = [
            ("A video of no frames", empty_table, empty),
            ("One frame of 9 × 9 × 384", one_frame_table, one_frame),
        ]
        shown = [f"{title} ({state_line(found.run)}):\n\n{show(found)}" for title, show, found in tables if found]
        parts += titled("Small calls", HEADS["small"], shown)
    if of_fresh := fresh_table(results):
        parts += titled("Fresh memory", HEADS["fresh"], [of_fresh])
    lines = ([goal.name, goal.status, goal.detail] for goal in goals(results))
    parts += titled(
        "Goals", "", [table(["goal", "", "values within the limit, and the worst"], lines, of_numbers=False)]
    )
    folder = picture_folder(results)
    for name, text in (("ratios", "time relative to the fastest kernel"), ("time", "time against frames")):
        if (PICTURES / folder / f"{name}.png").exists():
            parts.append(f"![{text}](performance/{folder}/{name}.png)\n")
    return parts


def earlier(results: Results) -> list[str]:
    """Return the short section of a machine whose results are older than those of another machine."""
    text = f"Older results than those above: {machine_line(results.run)}."
    return [f"## {results.run.device['name']}\n\n{filled(text)}\n", f"{summary_table(results)}\n"]


def titled(title: str, text: str, tables: Sequence[str]) -> list[str]:
    """Return tables below a title and a text."""
    return [f"### {title}\n", *([f"{filled(text)}\n"] if text else []), *(f"{each}\n" for each in tables)]


def state(results: Results) -> str:
    """Return the line below a table that names the state of the code that it is of."""
    return f"*{state_line(results.run)}.*"


def comparison(title: str, text: str, machines: Sequence[Results], group: str) -> list[str]:
    """Return a table of times for every machine that has results of a group, with remarks below."""
    parts = [f"{title}\n", *([f"{filled(text)}\n"] if text else [])] if machines else []
    for results in machines:
        workloads = results.of(group)
        names = sorted(workloads, key=lambda name: (workloads[name][0].frames, workloads[name][0].shape[-1]))
        parts += [f"{times_table(results, names)}\n", *kept_states(workloads)]
        found = remarks([row for name in names for row in workloads[name] if is_shown(base_of(row.provider))])
        parts += ["\n".join(f"- {remark}" for remark in dict.fromkeys(found)) + "\n"] if found else []
        parts.append(f"{filled(f'*{machine_line(results.run)}.*')}\n")
    return parts


def kept_states(workloads: Mapping[str, Sequence[BenchRow]]) -> list[str]:
    """Return a line with the most memory that each stream keeps between two pushes."""
    most = {name: max((row.state_bytes or 0 for row in rows), default=0) for name, rows in workloads.items()}
    texts = [f"{show_number(size / 1e6)} MB ({name})" for name, size in most.items() if size]
    return [filled(f"A stream keeps at most {listed(texts)} between two pushes.") + "\n"] if texts else []


def prefill_tables(results: Results) -> list[str]:
    """Return a table for every decoder, with its sizes and the machine below."""
    parts = []
    for workload, rows in results.of("prefill").items():
        note = next(row.note for row in rows if row.provider == "prefill:unpooled")
        about = f"{workload}: {workload_title(rows[0])}. {note}. {machine_line(results.run)}, "
        about += f"transformers {results.run.versions.get('transformers')}."
        parts += [f"{prefill_table(rows)}\n", f"{filled(about)}\n"]
    return parts


# ---- files ----


def picture_folder(results: Results) -> str:
    """Return the name of the folder of a machine's pictures, which equals that of its file of results."""
    return file_name(results.run.device).removesuffix(".jsonl")


def with_cost(readme: str, files: Sequence[Path]) -> str:
    """Return the text of the README with its table of costs, from the newest results of a CPU."""
    cpu = next((results for results in last_states(files, T64) if results.run.device["type"] == "cpu"), None)
    if cpu is None:
        return readme
    lines = cost(cpu, of_machine(last_states(files, "prefill"), cpu))
    decoder = "weights of the decoder are random, and prefills of as many tokens differ by noise"
    text = f"On {machine_line(cpu.run)}; {decoder}."
    shown = table(["", "`grid_pool`", "LLaVA's own call", "channels-last `avg_pool2d`"], lines)
    before, _, rest = readme.partition(MARK[0])
    return f"{before}{MARK[0]}\n{shown}\n\n{filled(text)}\n{MARK[1]}{rest.partition(MARK[1])[2]}"


def texts() -> dict[Path, str]:
    """Return the texts of the page, its details and the README that follow from the results."""
    files = machine_files()
    return {PAGE: page(files), DETAILS: details(files), README: with_cost(README.read_text(encoding="utf-8"), files)}


def write() -> list[Path]:
    """Draw the pictures, write the page, its details and the README, and return the files written."""
    machines = last_states(machine_files(), T64)
    shown = newest(machines)
    written = [path for each in shown for path in save_plots(each, PICTURES / picture_folder(each), force=True)]
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def stale() -> list[Path]:
    """Return the files whose text differs from the one that follows from the results."""
    return [path for path, text in texts().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
