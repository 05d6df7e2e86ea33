"""The command python -m benchmarks times the ops on this machine, and shows, compares and draws results.

    python -m benchmarks [run] [options]      time workloads; --help lists the options
    python -m benchmarks show FILE            print tables of results
    python -m benchmarks compare A B          print the changes from A to B, and mark those beyond the noise
    python -m benchmarks plot FILE FOLDER     draw results
    python -m benchmarks goals [FILE …]       print the goals that results reach
    python -m benchmarks page                 write docs/performance.md, its details and the README's table of costs

FILE is a file of JSON lines and stands for its newest run; FILE@RUN stands for the run whose name begins with RUN.
"""

from __future__ import annotations

import os
import sys

if "torch" not in sys.modules:  # OpenMP reads these when torch loads it
    os.environ.setdefault("OMP_PROC_BIND", "true")
    os.environ.setdefault("OMP_PLACES", "cores")

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import page
from benchmarks.goals import T64, goals
from benchmarks.plot import save_plots
from benchmarks.providers import BASELINE
from benchmarks.report import compare_summary, compare_table, machine_line, workload_table
from benchmarks.results import FOLDER, Results, compare, last_state, machine_files, pick
from benchmarks.run import list_workloads, run
from stgridpool_kernels.cli.terminal import print_whole
from stgridpool_kernels.integrations.command_line import positive, refuse_unknown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    It is 0 on success; 1 if a result is wrong, a goal is missed or a text is stale, and after an error, which is
    described in one line on stderr; and 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0] not in COMMANDS and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    parsed, unknown = build_parser().parse_known_args(given)
    refuse_unknown(parsed.parser, unknown)
    console = Console(highlight=False)
    try:
        return COMMANDS[parsed.command](parsed, console)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks {parsed.command}: {error}", file=sys.stderr)
        return 1


def run_command(parsed: argparse.Namespace, console: Console) -> int:
    if parsed.list:
        list_workloads(parsed.device, console)
        return 0
    return run(parsed, console)


def show_command(parsed: argparse.Namespace, console: Console) -> int:
    print_tables(pick(parsed.results), console)
    return 0


def compare_command(parsed: argparse.Namespace, console: Console) -> int:
    before, after = pick(parsed.before), pick(parsed.after)
    changes = compare(before, after)
    if not changes:
        raise ValueError(f"{parsed.before} and {parsed.after} timed nothing in common")
    print_whole(console, compare_table(changes, before.run, after.run))
    console.print(compare_summary(changes, before.run, after.run), markup=False, soft_wrap=True)
    return 0


def plot_command(parsed: argparse.Namespace, console: Console) -> int:
    for path in save_plots(pick(parsed.results), parsed.folder, parsed.force):
        console.print(f"picture: {path}", markup=False, soft_wrap=True)
    return 0


def goals_command(parsed: argparse.Namespace, console: Console) -> int:
    """Print the goals of every file, from the given run, or from all runs of the last state with the main shape."""
    names = parsed.results or [str(path) for path in machine_files()]
    asked = (pick(name) if "@" in name else last_state(Path(name), T64) or last_state(Path(name)) for name in names)
    chosen = [results for results in asked if results is not None]
    if not chosen:
        raise ValueError(f"there are no results in {', '.join(names) or FOLDER}")
    missed = False
    for results in chosen:
        console.print(machine_line(results.run), markup=False, soft_wrap=True)
        if parsed.tables:
            print_tables(results, console)
        for goal in goals(results):
            missed |= goal.status != "met"
            console.print(f"{goal.status:12} {goal.name}: {goal.detail}", markup=False, soft_wrap=True)
    return int(missed)


def page_command(parsed: argparse.Namespace, console: Console) -> int:
    paths, remark = (page.stale(), " is not what the results say") if parsed.check else (page.write(), "")
    for path in paths:
        console.print(f"{path.relative_to(page.ROOT)}{remark}")
    return int(parsed.check and bool(paths))


def print_tables(results: Results, console: Console) -> None:
    for name in results.workloads:
        print_whole(console, workload_table([row for row in results.rows if row.workload == name]))


COMMANDS = {
    "run": run_command,
    "show": show_command,
    "compare": compare_command,
    "plot": plot_command,
    "goals": goals_command,
    "page": page_command,
}


RUN = """\
Times the ops on this machine, next to the code that they replace and to a plain copy. Every result is compared with its
definition before it is timed. Results are appended to the file of the machine in benchmarks/results."""


def build_parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=text)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    _add_run(commands.add_parser("run", help="time workloads (the default)", description=RUN))
    show = commands.add_parser("show", help="print the tables of results")
    show.add_argument("results", metavar="FILE")
    changes = commands.add_parser("compare", help="print the changes between two results")
    changes.add_argument("before", metavar="A")
    changes.add_argument("after", metavar="B")
    plot = commands.add_parser("plot", help="draw results")
    plot.add_argument("results", metavar="FILE")
    plot.add_argument("folder", type=Path, metavar="FOLDER")
    plot.add_argument("--force", action="store_true", help="overwrite pictures in FOLDER")
    reached = commands.add_parser("goals", help="print the goals that results reach; exit with 0 if all are met")
    reached.add_argument("--tables", action="store_true", help="print the results first")
    reached.add_argument("results", nargs="*", metavar="FILE", help="default: the files of all machines")
    written = commands.add_parser(
        "page", help="write docs/performance.md, its details and pictures, and the README's table of costs"
    )
    written.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a text is not up to date")
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    def several(name: str, metavar: str, text: str) -> None:
        parser.add_argument(name, nargs="+", action="extend", default=[], metavar=metavar, help=text)

    parser.add_argument("--quick", action="store_true", help="small shapes and few samples, for a small machine")
    several(
        "--shape", "S", "workloads or groups of --list, or shapes as in 64x27x27x3584 and 8x32x27x27x896 (a batch), "
        "followed by any of :fp16, :fp32, :ceil, :plain, :gradients, :stream, :prefill and :pruning; default: all "
        "poolings that fit into memory"
    )  # fmt: skip
    several(
        "--provider", "P", "providers to time: names of --list, their parts before a colon, or patterns as in '*avg*'; "
        "default: all, except that those which take seconds on a CPU are timed on small shapes and those of goals only"
    )  # fmt: skip
    several("--skip", "P", "providers to leave out, named in the same way")
    parser.add_argument("--baseline", default=BASELINE, metavar="P", help="the unit of other times (%(default)s)")
    parser.add_argument("--device", help="device: cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of the CPU (default: torch's choice)")
    parser.add_argument("--samples", type=positive, metavar="N", help="samples of a call (default: by its duration)")
    parser.add_argument("--limit", type=positive, metavar="SECONDS", help="end the process if a workload takes longer")
    parser.add_argument("--times-only", action="store_true", help="do not count launches, which needs a profiler")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="append to FILE, not to the machine's file")
    parser.add_argument(
        "--continue",
        dest="continued",
        action="store_true",
        help="skip rows that the file has for this code and device; write rows before they are timed",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line in place of tables")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the results into this folder")
    parser.add_argument("--force", action="store_true", help="overwrite pictures in FOLDER")
    parser.add_argument("--list", action="store_true", help="show workloads and providers, and measure nothing")


if __name__ == "__main__":
    sys.exit(main())
