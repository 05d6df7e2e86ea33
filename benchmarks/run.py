"""The command `python -m benchmarks run`: measure workloads, print tables, append results to a file, draw them."""

from __future__ import annotations

import argparse
import faulthandler
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.devices import Cpu, Device, open_device
from benchmarks.machine import new_run
from benchmarks.measure import LATE, LOST, QUICK, WARM, SampleBudget, measure
from benchmarks.plot import refuse_existing, save_plots
from benchmarks.providers import BASELINE, BASELINES, chosen, providers, select
from benchmarks.report import machine_line, workload_table
from benchmarks.results import FOLDER, BenchRow, Results, Run, append, encode, file_name, load
from benchmarks.workloads import QUICK as QUICK_NAMES
from benchmarks.workloads import WORKLOADS, Workload, parse_workloads
from stgridpool_kernels.cli.machine import busy_note
from stgridpool_kernels.cli.terminal import print_whole


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure by the options of the command line; return the exit code, 0, or 1 if a result was wrong or failed.

    Raises, before anything is measured, ValueError for an unknown shape, provider or device, and FileExistsError for
    pictures that exist.
    """
    default = QUICK_NAMES if options.quick else [w.name for w in WORKLOADS.values() if w.kind == "pooling"]
    workloads = [workload for text in options.shape or default for workload in parse_workloads(text)]
    if options.plot is not None:
        refuse_existing(options.plot, options.force)
    device = open_device(options.device, options.threads)
    check_names(options, workloads, device)
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("shape", "provider", "skip", "baseline")}
    settings |= {"quick": options.quick, **({"pinned": device.is_pinned} if isinstance(device, Cpu) else {})}
    results = Results(new_run(device.torch_device, settings, getattr(device, "threads", None)), [])
    path = options.output or (None if options.quick else FOLDER / file_name(results.run.device))
    known = known_rows(path, results.run) if path and options.continued else {}
    shown = Console(stderr=True) if options.json else console
    show_machine(results.run, device, shown)

    def keep(*lines: Run | BenchRow) -> None:
        if path is not None:
            append(path, *lines)

    def write(*lines: Run | BenchRow) -> None:
        keep(*lines)
        for line in lines if options.json else ():
            print(encode(line), flush=True)

    write(results.run)
    early = keep if options.continued else lambda row: None
    for rows in measure_all(options, workloads, device, results.run, known, early):
        results.rows.extend(rows)
        write(*rows)
        if not options.json:
            print_whole(console, workload_table(rows))
    others = max((row.others_cores or 0.0 for row in results.rows), default=0.0)
    if note := busy_note(others):
        shown.print(note, style="yellow")
    kept = f"appended to {path}" if path else "quick results are not kept: -o FILE appends them to a file"
    shown.print(kept, markup=False, soft_wrap=True)
    for picture in save_plots(results, options.plot, options.force) if options.plot else ():
        shown.print(f"picture: {picture}", markup=False, soft_wrap=True)
    return int(any(row.outcome in ("wrong", "failed") for row in results.rows))


def check_names(options: argparse.Namespace, workloads: Sequence[Workload], device: Device) -> None:
    """Raise ValueError for a provider or baseline that no workload has."""
    known = list(dict.fromkeys(provider.name for w in workloads for provider in providers(w, device.type)))
    # --skip may name a provider that these workloads lack: torch.compile is timed on few workloads
    goals = [workload for workload in WORKLOADS.values() if workload.goal and options.skip]
    anywhere = [*known, *(provider.name for w in goals for provider in providers(w, device.type))]
    for asked, among in [(p, known) for p in options.provider] + [(p, anywhere) for p in options.skip]:
        if not select(among, [asked]):
            raise ValueError(f"provider must be among {', '.join(known)}, or a pattern that fits; got {asked!r}")
    # the default baseline is allowed even if no workload has it
    allowed = {BASELINE, *known, *(f"{name}:out" for name in known), "copy", "ceiling"}
    if options.baseline not in allowed:
        raise ValueError(f"baseline must be copy, ceiling or one of {', '.join(known)}; got {options.baseline!r}")


def show_machine(run: Run, device: Device, console: Console) -> None:
    pinned = ", pinned" if run.settings.get("pinned") else ""
    console.print(f"{machine_line(run)}{pinned}", markup=False, soft_wrap=True)
    if isinstance(device, Cpu) and device.why_no_probe is not None:
        console.print(f"no ceiling: {device.why_no_probe}", markup=False, soft_wrap=True)


def measure_all(
    options: argparse.Namespace,
    workloads: Sequence[Workload],
    device: Device,
    run: Run,
    known: Mapping[tuple[str, str], BenchRow],
    early: Callable[[BenchRow], None],
) -> Iterator[list[BenchRow]]:
    """Measure one workload after another and yield its rows; name each on stderr before it is measured.

    early: called with a row as soon as it has any value.
    """
    progress = Console(stderr=True, highlight=False)
    for number, workload in enumerate(workloads, 1):
        timed = chosen(workload, device.type, options.provider, options.skip)
        timed = [provider for provider in timed if not is_known(workload.name, provider.name, known)]
        if known and not timed:
            continue
        progress.print(f"{workload.name}, {number} of {len(workloads)}", style="dim", soft_wrap=True)
        effort = QUICK if options.quick else WARM if workload.warm else SampleBudget()
        if options.samples is not None:
            effort = replace(effort, most=options.samples, least=options.samples)
        baseline = BASELINES.get(workload.kind, BASELINE) if options.baseline == BASELINE else options.baseline
        given: dict[str, Any] = {"baseline": baseline, "effort": effort, "extras": not options.times_only}
        with limited(options.limit):
            yield measure(workload, timed, device, run.run, report=early, **given)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def limited(seconds: int | None) -> Iterator[None]:
    """End the process with a traceback if the block takes longer, since no exception can end a kernel that hangs."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def known_rows(path: Path, run: Run) -> dict[tuple[str, str], BenchRow]:
    """Return the rows of a file with the code, versions and device of a run; quick rows only if the run is quick."""

    def identity(run: Run) -> list[Any]:
        code = [run.source.get("package_sha256"), run.source.get("library_sha256")]
        return [*code, run.device, run.versions, bool(run.settings.get("quick"))]

    with suppress(FileNotFoundError, ValueError):
        same = (results for results in load(path) if identity(results.run) == identity(run))
        return {(row.workload, row.provider): row for results in same for row in results.rows}
    return {}


def is_known(workload: str, provider: str, known: Mapping[tuple[str, str], BenchRow]) -> bool:
    """Return whether a provider was timed or found wrong on a workload, or has ended a process on any workload."""
    if any(row.check == LOST and row.provider == provider for row in known.values()):
        return True
    row = known.get((workload, provider))
    return row is not None and row.check != LATE and (row.check != "ok" or row.is_timed)


def list_workloads(name: str | None, console: Console) -> None:
    """Print all workloads, and the providers of every kind."""
    device = open_device(name)
    table = Table("name", "tokens", "dtype", "pooled to", "groups", title="workloads", title_justify="left")
    kinds: dict[str, dict[str, None]] = {}
    for workload in WORKLOADS.values():
        rows, cols = workload.plan("norm_pool").pooled_size
        groups = [*workload.groups, *(["quick"] if workload.name in QUICK_NAMES else [])]
        shape, dtype = " × ".join(map(str, workload.shape)), str(workload.dtype).removeprefix("torch.")
        table.add_row(workload.name, shape, dtype, f"{rows} × {cols}", ", ".join(groups))
        kinds.setdefault(workload.kind, {}).update((p.name, None) for p in providers(workload, device.type))
    print_whole(console, table)
    for kind, names in kinds.items():
        console.print(f"{kind} on {device.type}: {', '.join(names)}", markup=False, soft_wrap=True)
