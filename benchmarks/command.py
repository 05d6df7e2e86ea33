"""`stgp bench`: chooses, measures while it shows how far it is, prints, appends to a file, draws."""

from __future__ import annotations

import faulthandler
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from benchmarks.devices import Cpu, Device, Gpu
from benchmarks.machine import describe
from benchmarks.measure import LATE, LOST, Effort, measure, new_run
from benchmarks.measure import QUICK as QUICK_EFFORT
from benchmarks.plot import check_plots, save_plots
from benchmarks.providers import BASELINE, chosen, providers, select
from benchmarks.report import QUIET_CORES, compare_summary, compare_table, compare_warning, machine_line, workload_table
from benchmarks.results import Results, Row, Run, Writer, compare, encode, file_name, load, pick
from benchmarks.workloads import QUICK, WORKLOADS, Workload, parse_workload


@dataclass(frozen=True)
class Request:
    """What `stgp bench` was asked for; `cli.py` has the words.

    shapes: all of WORKLOADS, or the quick ones, if there are none. times_only: neither overheads nor launches. output:
    a file to append to; None for the usual one. continued: what it has of this code on this device is passed over.
    """

    device: str | None = None
    quick: bool = False
    shapes: Sequence[str] = ()
    providers: Sequence[str] = ()
    skipped: Sequence[str] = ()
    baseline: str = BASELINE
    threads: int | None = None
    samples: int | None = None
    limit: int | None = None
    times_only: bool = False
    output: Path | None = None
    continued: bool = False
    json: bool = False
    plots: Path | None = None
    force: bool = False


def bench_command(request: Request, console: Console) -> int:
    """Measures. 0, or 1 if a result was wrong or failed.

    Raises ValueError for a shape, provider, device or number that there is not.
    """
    workloads = [parse_workload(text) for text in request.shapes or (QUICK if request.quick else WORKLOADS)]
    if request.plots is not None:
        check_plots(request.plots, request.force)
    with _device(request) as device, ExitStack() as stack:
        _check_providers(request, workloads, device)
        shown = Console(stderr=True) if request.json else console
        threads = device.threads if isinstance(device, Cpu) else None
        description = describe(device.torch_device, threads)
        settings = {
            "quick": request.quick,
            "baseline": request.baseline,
            "shapes": list(request.shapes),
            "providers": list(request.providers),
            "skipped": list(request.skipped),
        }
        if isinstance(device, Cpu):
            settings["pinned_to"] = device.pinned
            if device.why_no_probe is not None:
                shown.print(f"no ceiling: {device.why_no_probe}", markup=False, soft_wrap=True)
        path = None if request.quick and request.output is None else _output(request, description["device"])
        writer, known = None, dict[tuple[str, str], Row]()
        if path is not None:
            known = known_rows(path, description, request.quick) if request.continued else known
            writer = Writer(path)
            stack.callback(writer.close)
        run = new_run(description, settings, {"fp32_gflops": device.fp32_gflops()})
        _show_machine(run, shown)

        def write(line: Run | Row) -> None:
            if writer is not None:
                writer.write(line)
            if request.json:
                print(encode(line), flush=True)

        write(run)
        results = Results(run, [])
        report = writer.write if writer is not None and request.continued else lambda row: None
        for rows in _measure_all(request, workloads, device, run, shown, known, report):
            results.rows.extend(rows)
            for row in rows:
                write(row)
            if not request.json:
                console.print(workload_table(rows, console.width))
    _show_quiet(results, shown)
    if path is not None:
        shown.print(f"appended to {path}", markup=False, soft_wrap=True)
    elif not request.json:
        shown.print("quick results are not kept: -o FILE appends them to a file", markup=False, soft_wrap=True)
    if request.plots is not None:
        plot(results, request.plots, request.force, shown)
    return int(any(row.check.startswith(("wrong", "failed")) for row in results.rows))


def known_rows(path: Path, description: Mapping[str, Any], quick: bool) -> dict[tuple[str, str], Row]:
    """Of workloads and providers, as far as a file has them of this code and these versions on this device.

    quick: whether quick runs count, or all others.
    """
    with suppress(FileNotFoundError, ValueError):
        code = ("package_sha256", "library_sha256")
        same = [
            results
            for results in load(path)
            if all(results.run.source.get(part) == description["source"][part] for part in code)
            and bool(results.run.settings.get("quick")) == quick
            and (results.run.device, results.run.versions) == (description["device"], description["versions"])
        ]
        return {(row.workload, row.provider): row for results in same for row in results.rows}
    return {}


def is_known(workload: str, provider: str, known: Mapping[tuple[str, str], Row]) -> bool:
    """Whether it was timed or found not to be right, or has ended a process, on this or on another workload."""
    if any(row.check == LOST and row.provider == provider for row in known.values()):
        return True
    row = known.get((workload, provider))
    return row is not None and row.check != LATE and (row.check != "ok" or row.p50_us is not None)


def _device_name(asked: str | None) -> str:
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and name.partition(":")[0] != "cuda":
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    return name


@contextmanager
def _device(request: Request) -> Iterator[Device]:
    name = _device_name(request.device)
    if name == "cpu":
        device = Cpu(request.threads)
        try:
            yield device
        finally:
            device.close()
    else:
        if request.threads is not None:
            raise ValueError("--threads is for the CPU")
        yield Gpu(name)


def _check_providers(request: Request, workloads: Sequence[Workload], device: Device) -> None:
    known = list(dict.fromkeys(provider.name for w in workloads for provider in providers(w, device.type)))
    # what is left out may be missing anyway: torch.compile is timed on few workloads
    goals = [workload for workload in WORKLOADS.values() if workload.goal and request.skipped]
    anywhere = [*known, *(provider.name for w in goals for provider in providers(w, device.type))]
    for asked, among in [(p, known) for p in request.providers] + [(p, anywhere) for p in request.skipped]:
        if not select(among, [asked]):
            raise ValueError(f"provider must be among {', '.join(known)}, or a pattern that fits; got {asked!r}")
    # the usual one too where it cannot do any of these workloads: nobody asked for it
    if request.baseline not in {BASELINE, *known, *(f"{name}:out" for name in known), "copy", "ceiling"}:
        raise ValueError(f"baseline must be copy, ceiling or one of {', '.join(known)}; got {request.baseline!r}")


def _output(request: Request, device: dict[str, object]) -> Path:
    """The file that was asked for, or that of the machine: in benchmarks/results if there is such a folder."""
    if request.output is not None:
        return request.output
    folder = Path("benchmarks", "results")
    return (folder if folder.is_dir() else Path()) / file_name(device)


def _measure_all(
    request: Request,
    workloads: Sequence[Workload],
    device: Device,
    run: Run,
    console: Console,
    known: Mapping[tuple[str, str], Row],
    report: Callable[[Row], None],
) -> Iterator[list[Row]]:
    effort = QUICK_EFFORT if request.quick else Effort()
    if request.samples is not None:
        effort = Effort(most=request.samples, least=request.samples)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    # no refreshing by a thread of its own: it would take a core from what is timed
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=len(workloads))
        for number, workload in enumerate(workloads):

            def show(text: str, share: float, workload: Workload = workload, number: int = number) -> None:
                progress.update(task, description=f"{workload.name}: {text}", completed=number + share, refresh=True)

            timed = chosen(workload, device.type, request.providers, request.skipped)
            timed = [provider for provider in timed if not is_known(workload.name, provider.name, known)]
            if known and not timed:
                continue
            with _limited(request.limit):
                rows = measure(
                    workload,
                    timed,
                    device,
                    run.run,
                    baseline=request.baseline,
                    effort=effort,
                    progress=show,
                    report=report,
                    extras=not request.times_only,
                )
            yield rows
            torch._dynamo.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


@contextmanager
def _limited(seconds: int | None) -> Iterator[None]:
    """Ends the process, and says where it was, if this takes longer: there is no other way out of a kernel that never
    ends."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _show_machine(run: Run, console: Console) -> None:
    pinned = run.settings.get("pinned_to")
    words = "" if pinned is None else f", pinned to CPUs {', '.join(map(str, pinned))}" if pinned else ", not pinned"
    console.print(Text(machine_line(run) + words), soft_wrap=True)


def _show_quiet(results: Results, console: Console) -> None:
    others = max((row.others_cores for row in results.rows if row.others_cores is not None), default=None)
    if others is not None and others > QUIET_CORES:
        console.print(f"NOT QUIET: others used up to {others:.2f} cores meanwhile", style="yellow")


# ---- what results are for ----


def compare_command(before: str, after: str, console: Console) -> int:
    """Prints what changed between two results (FILE or FILE@RUN) and what is beyond the noise seen in them."""
    old, new = pick(before), pick(after)
    changes = compare(old, new)
    if not changes:
        raise ValueError(f"{before} and {after} have no provider on no workload in common")
    console.print(compare_table(changes, old.run, new.run))
    console.print(Text(compare_summary(changes)), soft_wrap=True)
    warning = compare_warning(old.run, new.run)
    if warning:
        console.print(Text(warning, style="yellow"), soft_wrap=True)
    return 0


def show_command(argument: str, plots: Path | None, force: bool, console: Console) -> int:
    """Prints results that were measured before, or draws them."""
    results = pick(argument)
    if plots is not None:
        plot(results, plots, force, console)
        return 0
    for workload in results.workloads:
        console.print(workload_table([row for row in results.rows if row.workload == workload], console.width))
    return 0


def plot(results: Results, folder: Path, force: bool, console: Console) -> None:
    for path in save_plots(results, folder, force):
        console.print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)


def list_command(device: str | None, console: Console) -> int:
    """Prints workloads and who can do them."""
    name = _device_name(device)
    if name != "cpu":
        Gpu(name)
    kind = name.partition(":")[0]
    table = Table(title="workloads", title_justify="left")
    for title in ("name", "tokens", "dtype", "pooled to", "groups"):
        table.add_column(title)
    for workload in WORKLOADS.values():
        pooled = workload.plan("norm_pool").pooled_size
        table.add_row(
            Text(workload.name),
            " × ".join(map(str, workload.shape)),
            str(workload.dtype).removeprefix("torch."),
            f"{pooled[0]} × {pooled[1]}",
            ", ".join([*workload.groups, *(["quick"] if workload.name in QUICK else [])]),
        )
    console.print(table)
    known = dict.fromkeys(p.name for w in WORKLOADS.values() for p in providers(w, kind))
    console.print(Text(f"providers on {kind}: " + ", ".join(known)), soft_wrap=True)
    return 0
