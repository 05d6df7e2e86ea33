"""Everything that needs a GPU, in one command: build, tests, memory checker, timing, counters, then goals met or not.

`python -m benchmarks.gpu_check` in the root of a checkout; nothing has to be installed beyond torch, triton, numpy,
pytest and hypothesis. The cuda backend takes nvcc, a C++ compiler, cmake, ninja and pybind11; it is left out without.
Each stage runs in processes of its own, which are ended when the stage's time is over. What was found until then is
kept in one JSON file in benchmarks/results/. Logs are in the folder $OUT, with a copy of that file, or in a temporary
one where OUT is not set.

Exit code: 0 if all stages passed or were skipped with a reason, 1 if not, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stgridpool_kernels.bench.lower_bound import Traffic
from stgridpool_kernels.bench.machine import ROOT, describe
from stgridpool_kernels.bench.report import is_ours, workload_table
from stgridpool_kernels.bench.results import Results, file_name, load
from stgridpool_kernels.bench.workloads import WORKLOADS

from .goals import GOALS, MAIN, RESULTS, bars
from .gpu_bench import CHOICES, COUNTED, COUNTED_CALLS, COUNTED_ON, SMALL_CALLS_RIGHT

LIMIT_SECONDS = 545
WORKLOAD_SECONDS = 75
"""After which a process that times a workload is ended."""

LEAST_SECONDS = 5
"""A process is not started for less."""


# ---- processes ----


@dataclass(frozen=True)
class Finished:
    """code: exit status, None if the process was ended because its time was over. output: stdout and stderr."""

    code: int | None
    output: str

    def last_lines(self, count: int = 3) -> str:
        return " | ".join(line.strip() for line in self.output.strip().splitlines()[-count:])[-600:]


def run_limited(
    command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None, patience: float = 2
) -> Finished:
    """Runs a command in a process group of its own, for at most `seconds`, and appends its output to `log`.

    `patience` seconds before that it is interrupted, as by Ctrl-C, so that it can say how far it came; then the group
    is killed, as is whatever a finished command leaves behind.
    """
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    variables |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(max(seconds - patience, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open("rb") as file:
        file.seek(begin)
        return Finished(code, file.read().decode(errors="replace"))


# ---- stages ----


@dataclass(frozen=True)
class Outcome:
    """status: passed, failed, skipped (it cannot run here) or unfinished (its time was over)."""

    status: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """run(seconds, logs) ends within `seconds` of whatever it is given and writes logs into a folder."""

    name: str
    seconds: float
    run: Callable[[float, Path], Outcome]


def run_stages(
    stages: Sequence[Stage],
    limit: float,
    logs: Path,
    report: Callable[[Stage, Outcome, float], None],
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Runs stages one after another; each may take what the later ones do not need, so at least its own time."""
    deadline = now() + limit
    for number, stage in enumerate(stages):
        begin = now()
        allowed = deadline - begin - sum(later.seconds for later in stages[number + 1 :])
        if allowed < LEAST_SECONDS:
            outcome = Outcome("unfinished", "not begun: no time was left")
        else:
            try:
                outcome = stage.run(allowed, logs)
            except Exception as error:
                outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        report(stage, outcome, now() - begin)


def worst(statuses: Iterable[str]) -> str:
    """failed, else unfinished, else passed, else skipped."""
    found = set(statuses)
    return next(status for status in ("failed", "unfinished", "passed", "skipped") if status in found)


class Clock:
    """Shares a stage's time among steps: each gets its part of all there is, and what earlier ones left."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds, self.promised = time.monotonic(), seconds, 0.0

    def left(self, part: float = 1.0) -> float:
        self.promised = min(1.0, self.promised + part)
        return self.begin + self.promised * self.seconds - time.monotonic()


# ---- build ----


def run_build(seconds: float, logs: Path) -> Outcome:
    """The compiled library in the checkout, for this GPU alone."""
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    given = f"{os.environ.get('CMAKE_ARGS', '')} -DSTGP_CUDA_ARCHITECTURES={capability}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = run_limited(command, seconds, logs / "build.log", {"CMAKE_ARGS": given})
    if done.code != 0:
        return Outcome("unfinished" if done.code is None else "failed", done.last_lines())
    probe = "import json; from stgridpool_kernels import compiled; print(json.dumps(compiled.LIBRARY.build_info()))"
    asked = run_limited([sys.executable, "-c", probe], 60, logs / "build.log")
    if asked.code != 0:
        left_out = re.findall(r"^stgridpool_kernels: .*left out.*$", done.output, re.MULTILINE)
        return Outcome("skipped" if left_out else "failed", left_out[-1] if left_out else asked.last_lines())
    built = json.loads(asked.output.strip().splitlines()[-1])
    status = "passed" if built["cuda"] else "skipped"
    return Outcome(status, ", ".join(f"{key} {value or 'none'}" for key, value in built.items()), {"library": built})


# ---- tests ----

TEST_STEPS = (
    ("test_gpu, triton", ["tests/test_gpu.py", "-k", "by_triton"], 0.3, False),
    ("test_gpu, cuda", ["tests/test_gpu.py", "-k", "by_cuda"], 0.15, False),
    ("backends", ["tests/test_backends.py", "-k", "(triton-cuda or cuda-cuda) and not random"], 0.2, True),
    ("gradients", ["tests/test_backward.py", "-k", "triton-cuda or cuda-cuda"], 0.2, True),
    ("backends, random calls", ["tests/test_backends.py", "-k", "(triton-cuda or cuda-cuda) and random"], 0.1, True),
    ("backends, reference", ["tests/test_backends.py", "-k", "reference"], 0.05, True),
)
"""Name, what of the suite, share of the time, and whether several processes may share the GPU."""


def run_tests(seconds: float, logs: Path) -> Outcome:
    """`pytest -m gpu`, what only a GPU can show first."""
    clock, found = Clock(seconds), {}
    parallel = importlib.util.find_spec("xdist") is not None
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    for name, selected, part, shared in TEST_STEPS:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--maxfail=20", "--tb=short"]
        command += ["-p", "no:cacheprovider", *selected]
        if shared and parallel:
            command += ["-n", str(workers), "--dist", "worksteal"]
        left = clock.left(part)
        if left < LEAST_SECONDS:
            found[name] = {"status": "unfinished", "summary": "not begun: no time was left"}
            continue
        threads = {"OMP_NUM_THREADS": "1"} if shared and parallel else {}
        found[name] = read_pytest(run_limited(command, left, logs / "tests.log", threads, patience=8))
        print(f"  {name}: {found[name]['status']}, {found[name]['summary']}", flush=True)
        for failure in found[name]["failures"][:10]:
            print(f"    {failure[:200]}", flush=True)
    summary = "; ".join(f"{name}: {step['summary']}" for name, step in found.items())
    return Outcome(worst(step["status"] for step in found.values()), summary, {"steps": found})


def read_pytest(done: Finished) -> dict[str, Any]:
    """Counts and failures. A process that was killed left no summary: then what `-v` printed counts."""
    summaries = re.findall(
        r"^=+ (.*\b(?:passed|failed|skipped|error|deselected)s?\b.* in [\d.]+.*?) =+$", done.output, re.M
    )
    if summaries:
        counts = {
            kind.rstrip("s"): int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summaries[-1])
        }
    else:
        states = re.findall(r"^(?:tests/\S+.* |\[gw\d+\].* )(PASSED|FAILED|SKIPPED|ERROR)\b", done.output, re.M)
        counts = {state.lower(): states.count(state) for state in dict.fromkeys(states)}
    failures = re.findall(r"^(?:FAILED|ERROR) (tests/.*)$", done.output, re.M)
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no test was run"
    if counts.get("failed") or counts.get("error"):
        status = "failed"
    elif done.code is None:
        status = "unfinished"
    elif done.code == 0 and counts.get("passed"):
        status = "passed"
    else:
        status, summary = "failed", f"{summary}: {done.last_lines()}"
    if done.code is None:
        summary += " until the time was over"
    return {"status": status, "summary": summary, "counts": counts, "failures": failures[:40]}


# ---- memory checker ----


def run_sanitizer(seconds: float, logs: Path) -> Outcome:
    """Small calls as they are, which also compiles them, then under compute-sanitizer."""
    clock, log = Clock(seconds), logs / "sanitizer.log"
    small = [sys.executable, "-m", "benchmarks.gpu_bench", "small"]
    plain = run_limited(small, clock.left(0.4), log)
    if plain.code != 0 or SMALL_CALLS_RIGHT not in plain.output:
        status = "unfinished" if plain.code is None else "failed"
        return Outcome(status, f"small calls, not watched: {plain.last_lines()}")
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return Outcome("skipped", "compute-sanitizer is not installed; the small calls are right")
    # every tensor is an allocation of its own, and what lies between two of them is nobody's
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    common = [tool, "--target-processes", "application-only", "--error-exitcode", "86"]
    checks = {
        "memcheck": [*common, "--tool", "memcheck", "--report-api-errors", "no", "--padding", "256"],
        "racecheck": [*common, "--tool", "racecheck"],
    }
    found = {}
    for (check, command), part in zip(checks.items(), (0.3, 0.3), strict=True):
        left = clock.left(part)
        if left < LEAST_SECONDS:
            found[check] = Outcome("unfinished", "not begun: no time was left")
        else:
            found[check] = read_sanitizer(check, run_limited([*command, *small], left, log, memory))
        print(f"  {check}: {found[check].status}, {found[check].summary}", flush=True)
    summary = "; ".join(f"{check}: {outcome.summary}" for check, outcome in found.items())
    details = {check: asdict(outcome) for check, outcome in found.items()}
    return Outcome(worst(outcome.status for outcome in found.values()), summary, details)


def read_sanitizer(check: str, done: Finished) -> Outcome:
    """Passed only if the tool says that it found nothing and the calls under it came to their end."""
    pattern = r"RACECHECK SUMMARY: .*" if check == "racecheck" else r"ERROR SUMMARY: .*"
    summaries = re.findall(pattern, done.output)
    if done.code is None:
        return Outcome("unfinished", "its time was over")
    if "Device not supported" in done.output:
        return Outcome("skipped", "Device not supported")
    if not summaries:
        return Outcome("skipped", f"no verdict, exit code {done.code}: {done.last_lines()}")
    errors = [int(count) for count in re.findall(r"(\d+) errors?\b", summaries[-1])]
    if any(errors) or SMALL_CALLS_RIGHT not in done.output or done.code != 0:
        first = re.search(r"^=+ ((?:Invalid|Error|Race|Program hit|Potential).*)$", done.output, re.M)
        return Outcome("failed", f"{summaries[-1]}: {first[1] if first else done.last_lines()}")
    return Outcome("passed", summaries[-1])


def find_tool(name: str) -> str | None:
    """A program in PATH or where CUDA is usually installed."""
    folders = [
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
        *map(str, Path("/opt/nvidia").glob("nsight-compute/*")),
    ]
    return shutil.which(name, path=os.pathsep.join(folders))


# ---- timing ----

COMPILED = "compiled_grid_pool"


@dataclass(frozen=True)
class Pass:
    """A call of `stgp bench`: on which workloads, and with which options."""

    shapes: Sequence[str]
    options: Sequence[str] = ()


def passes() -> list[Pass]:
    """Shapes that goals are set for first, then the other models, then gradients, then torch.compile, which takes long,
    then sweeps."""
    main = sorted(MAIN, key=lambda name: not WORKLOADS[name].goal)
    sweeps = [name for name in WORKLOADS if name not in main]
    most = ["--skip", COMPILED]
    gradients = Pass(GOALS, ["--provider", "*_backward:*", "--baseline", "copy"])
    compiled = Pass(GOALS, ["--provider", COMPILED, "--baseline", "copy"])
    return [Pass(main, most), gradients, compiled, Pass(sweeps, most)]


def is_kernel(provider: str) -> bool:
    """Whether it is one of the package's kernels, gradients included."""
    return is_ours(provider.replace("_backward", ""))


def run_bench(seconds: float, logs: Path) -> Outcome:
    """`stgp bench` on every workload, for as long as there is time."""
    return run_passes(passes(), seconds, rows_file(logs), logs / "bench.log")


def rows_file(logs: Path) -> Path:
    """Of this check's timings, named as `stgp bench` names a device's file."""
    return logs / file_name(describe("cuda")["device"])


def run_passes(wanted: Sequence[Pass], seconds: float, rows: Path, log: Path) -> Outcome:
    """All workloads of a pass in one process; if that ends early, those after the one that it ended in in another."""
    clock = Clock(seconds)
    rows.unlink(missing_ok=True)  # of an earlier check with the same folder
    part = rows.with_suffix(".part")
    ends, unfinished = [], []
    for each in wanted:
        part.unlink(missing_ok=True)
        pending, begun = list(each.shapes), 0
        while pending and clock.left() > LEAST_SECONDS:
            command = [sys.executable, "-m", "stgridpool_kernels", "bench", "--device", "cuda", "-o", str(part)]
            command += ["--limit", str(WORKLOAD_SECONDS), *each.options, "--shape", *pending]
            done = run_limited(command, clock.left(), log)
            results = load_rows(part)
            found = {row.workload for one in results for row in one.rows}
            pending = [name for name in each.shapes if name not in {*found, *unfinished}]
            if not pending:
                break
            ends.append(f"exit code {done.code} in {pending[0]}: {done.last_lines()}")
            if len(results) == begun:
                break  # it does not get as far as a workload: it will not the next time
            begun = len(results)
            unfinished.append(pending.pop(0))
        unfinished += pending
        if part.exists():
            append(part, rows)
            part.unlink()
    return read_bench(load_rows(rows), ends, unfinished)


def append(lines: Path, to: Path) -> None:
    """Appends lines of JSON to a file of such, whose last may be cut."""
    cut = to.exists() and not to.read_bytes().endswith(b"\n")
    with to.open("ab") as file:
        file.write(b"\n" * cut + lines.read_bytes())


def load_rows(rows: Path) -> list[Results]:
    """Of every process, as far as it came."""
    with suppress(FileNotFoundError, ValueError):
        return load(rows)
    return []


def read_bench(
    results: Sequence[Results],
    ends: Sequence[str],
    unfinished: Sequence[str],
    ours: Callable[[str], bool] = is_kernel,
) -> Outcome:
    """Passed only if all of `ours` are right. `ends` says how processes ended that did not end well."""
    rows = [row for each in results for row in each.rows]
    bad = [f"{row.workload} {row.provider}: {row.check}" for row in rows if row.check != "ok"]
    checks = [row.check for row in rows if ours(row.provider) and not row.check.startswith("skipped")]
    if not checks or any(check != "ok" for check in checks) or any(": wrong" in reason for reason in bad):
        status = "failed"
    else:
        status = "unfinished" if unfinished or ends else "passed"
    workloads = {row.workload for row in rows}
    summary = f"{len(workloads)} workloads, {len(rows)} rows, {len(bad)} of them without a right result"
    return Outcome(status, summary, {"not_right": bad, "unfinished": list(unfinished), "ends": list(ends)})


def run_tune(seconds: float, logs: Path) -> Outcome:
    """grid_pool as configured and with every other choice of configuration."""
    rows = logs / "tune.jsonl"
    done = run_limited([sys.executable, "-m", "benchmarks.gpu_bench", "tune", str(rows)], seconds, logs / "tune.log")
    ends = [] if done.code == 0 else [f"exit code {done.code}: {done.last_lines()}"]
    results = load_rows(rows)
    found = read_bench(results, ends, [], CHOICES.__contains__)
    times = [f"{row.workload} {row.provider}: {row.p50_us} us" for each in results for row in each.rows]
    return replace(found, details=found.details | {"times": times})


def run_prefill(seconds: float, logs: Path) -> Outcome:
    """What pooling saves a decoder of 7B parameters."""
    if importlib.util.find_spec("transformers") is None:
        return Outcome("skipped", "transformers is not installed")
    rows = logs / f"prefill-{rows_file(logs).name}"
    command = [sys.executable, "-m", "benchmarks.prefill", "--device", "cuda", "-o", str(rows)]
    done = run_limited(command, seconds, logs / "prefill.log")
    status = "passed" if done.code == 0 else "unfinished" if done.code is None else "failed"
    return Outcome(status, done.last_lines())


# ---- byte counters ----

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def run_counters(seconds: float, logs: Path) -> Outcome:
    """Bytes that grid_pool and norm_pool move to and from memory on one shape, next to the lower bound."""
    tool = find_tool("ncu")
    if tool is None:
        return Outcome("skipped", "ncu is not installed")
    workload, clock = WORKLOADS[COUNTED_ON], Clock(seconds)
    found: dict[str, Any] = {}
    for provider in COUNTED:
        op = provider.partition(":")[0]
        command = [tool, "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"]
        command += ["--target-processes", "application-only", "--metrics", ",".join(COUNTERS)]
        command += ["--csv", "--print-units", "base"]
        left = clock.left(0.5)
        if left < LEAST_SECONDS:
            return Outcome("unfinished", f"{op} not begun: no time was left", found)
        command += [sys.executable, "-m", "benchmarks.gpu_bench", "counted", provider]
        done = run_limited(command, left, logs / "counters.log")
        kernels = read_counters(done.output)
        if not kernels or len(kernels) % COUNTED_CALLS:
            status = "unfinished" if done.code is None else "skipped"
            said = f"{len(kernels)} kernels counted, exit code {done.code}: {done.last_lines()}"
            return Outcome(status, f"{op}: {said}", found)
        found[op] = per_call(kernels, workload.bound(op))
        print(f"  {op}: {show_counters(found[op])}", flush=True)
    return Outcome("passed", "; ".join(f"{op}: {show_counters(counted)}" for op, counted in found.items()), found)


def read_counters(text: str) -> list[dict[str, Any]]:
    """Kernels in order of launch, from what `ncu --csv` writes: one line per kernel and metric."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines):
        if line.get("Metric Name") in COUNTERS:
            kernel = kernels.setdefault(str(line["ID"]), {"kernel": line["Kernel Name"]})
            factor = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}[line["Metric Unit"]]
            kernel[line["Metric Name"]] = float(line["Metric Value"].replace(",", "")) * factor
    return [kernel for kernel in kernels.values() if all(counter in kernel for counter in COUNTERS)]


def per_call(kernels: Sequence[Mapping[str, Any]], bound: Traffic) -> dict[str, Any]:
    """Bytes per call in the steady state: the first call finds nothing of an earlier one in the cache, so it is left
    out; each of the others writes back what the one before it left there."""
    launches = len(kernels) // COUNTED_CALLS
    counted = kernels[launches:]
    read, written = (sum(kernel[counter] for kernel in counted) / (COUNTED_CALLS - 1) for counter in COUNTERS)
    return {
        "kernel_launches": launches,
        "read_bytes": read,
        "write_bytes": written,
        "lower_bound_read_bytes": bound.read_bytes,
        "lower_bound_write_bytes": bound.write_bytes,
        "kernels": list(counted[:launches]),
    }


def show_counters(counted: Mapping[str, Any]) -> str:
    read, written, low_read, low_written = (
        counted[key] / 1e6 for key in ("read_bytes", "write_bytes", "lower_bound_read_bytes", "lower_bound_write_bytes")
    )
    ratio = (read + written) / (low_read + low_written)
    launches = counted["kernel_launches"]
    shown = f"{read:.1f} MB read ({low_read:.1f}), {written:.1f} written ({low_written:.1f}), {ratio:.2f} of the bound"
    return f"{shown}, {launches} launches"


STAGES = (
    Stage("build", 60, run_build),
    Stage("tests", 175, run_tests),
    Stage("sanitizer", 80, run_sanitizer),
    Stage("bench", 170, run_bench),
    Stage("counters", 45, run_counters),
    Stage("tune", 60, run_tune),
    Stage("prefill", 150, run_prefill),
)
ASKED_FOR = ("tune", "prefill")
"""Stages that run only if they are named."""


def keep_rows(rows: Path, folder: Path, out: Path | None) -> None:
    """Appends a check's timings, of every kind, to the device's files in `folder`."""
    for path in (rows, rows.with_name(f"prefill-{rows.name}"), rows.with_name("tune.jsonl")):
        if path.exists() and (out is None or not folder.samefile(out)):
            append(path, folder / (path.name if path.name != "tune.jsonl" else f"tune-{rows.name}"))


def new_results_file(folder: Path, device: str, utc: datetime) -> Path:
    """Creates an empty file named by device and time; never one that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{utc:%Y%m%dT%H%M%SZ}"
    for number in range(1, 1000):
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.json"
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise FileExistsError(f"{folder / name}.json and 998 more exist")


def save(report: Mapping[str, Any], path: Path, out: Path | None) -> None:
    """Writes the report whole, and a copy into the folder `out`."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    if out is not None and not out.samefile(path.parent):
        shutil.copy(path, out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=[stage.name for stage in STAGES],
        help=f"only these; all but {', '.join(ASKED_FOR)} by default",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results; must not exist")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="for all (%(default)s)")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 2

    chosen = given.stage or [stage.name for stage in STAGES if stage.name not in ASKED_FOR]
    stages = [stage for stage in STAGES if stage.name in chosen]
    utc = datetime.now(timezone.utc)
    report: dict[str, Any] = {"format": 2, "utc": utc.isoformat(timespec="seconds"), **describe("cuda"), "stages": {}}
    if given.json is None:
        path = new_results_file(RESULTS, report["device"]["name"], utc)
    else:
        path = given.json
        if path.exists():
            parser.error(f"{path} exists")
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    logs = out or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    save(report, path, out)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"{report['device']['name']}, {versions}\nresults: {path}\nlogs: {logs}", flush=True)

    def add(stage: Stage, outcome: Outcome, seconds: float) -> None:
        found = {"status": outcome.status, "summary": outcome.summary, "seconds": round(seconds, 1)}
        report["stages"][stage.name] = found | outcome.details
        timed = load_rows(rows_file(logs))
        report["bars"] = [asdict(bar) for bar in bars(timed)] if timed else []
        save(report, path, out)
        print(f"{stage.name}: {outcome.status} in {seconds:.0f} s: {outcome.summary}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end: no stage's process outlives this one
    run_stages(stages, given.limit, logs, add)
    keep_rows(rows_file(logs), RESULTS, out)
    timed = load_rows(rows_file(logs))
    console = Console(width=100, highlight=False)
    for results in timed:
        for name in results.workloads:
            console.print(workload_table([row for row in results.rows if row.workload == name]))
    for bar in report.get("bars", ()):
        print(f"{bar['status']:13}{bar['name']}: {bar['detail']}")
    statuses = {stage["status"] for stage in report["stages"].values()}
    return 0 if statuses <= {"passed", "skipped"} else 1


if __name__ == "__main__":
    sys.exit(main())
