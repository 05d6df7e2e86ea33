"""Everything that needs a GPU, in one command, in the order of its value; docs/gpu-check.md says what comes out.

A stage is a process that appends what it finds to one file of JSON lines at once: the file of results of this GPU, in
$OUT or else in benchmarks/results. A provider or a test is there as lost before it begins. A process that dies or falls
silent is started again and passes over what is there: a fault costs what it is in.

Exit code: 0 if all is well, 1 if something failed or was left unfinished, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
FAST_SECONDS, ALL_SECONDS, LEAST_SECONDS = 200.0, 560.0, 5.0
"""Limits in seconds with --fast and without it, and the least time to start a process for. About 20 s go by before the
first stage."""
AXES = {
    "mosaic_cells": [1, 2, 4, 7],
    "frame_cells": [4, 7],
    "odd_registers": [80],
    "even_registers": [128],
    "stages": [1],
}
"""The values that `tune triton` tries besides the configuration as it is; the most is expected of the first axis."""
WARMED = [f"--calls grid_pool --config {axis}={value}" for axis, values in AXES.items() for value in values]
WARMED = ["--calls published --dtype bf16 fp16 --shape 8x9x7x64 8x8x6x64", "", *WARMED]
"""Arguments of tools.compile_report, which fills Triton's cache beside the first stages with what they ask for."""
TOOLS = ("/usr/local/cuda/bin", *map(str, Path("/opt/nvidia").glob("nsight-compute/*")))
"""These folders are searched after PATH: nvcc, ncu and compute-sanitizer are usually there."""
TESTS: tuple[str, ...] = ()
"""Arguments that stand-ins give to pytest in place of the tests of a stage."""


class Lines:
    """A file of JSON lines from the byte `since` on, by default from its end."""

    def __init__(self, path: Path, since: int | None = None) -> None:
        self.path, self.since = path, path.stat().st_size if since is None else since

    def append(self, line: str) -> None:
        """Write a line in one piece, since other processes may append too."""
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the lines, without one that a killed process has left incomplete."""
        found = []
        for line in self.path.read_bytes()[self.since :].decode(errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def last(self) -> dict[str, dict[str, Any]]:
        """Return the last line of every provider on a workload and of every test, by name."""
        named = ((line.get("name", f"{line.get('workload')} {line.get('provider')}"), line) for line in self.read())
        return {name: line for name, line in named if line.get("kind") in ("row", "test")}

    def states(self) -> dict[str, str]:
        """Return "ok", "passed", "skipped", what is wrong, or "checked" (right but not timed), by provider and test."""
        last = self.last()
        untimed = {name for name, line in last.items() if line["check"] == "ok" and line.get("p50_us") is None}
        return {name: "checked" if name in untimed else line["check"] for name, line in last.items()}

    def forgive(self) -> None:
        """Mark lost providers and tests as late: their time was over, so a later stage may try them again."""
        from benchmarks.measure import LATE, LOST

        for line in self.last().values():
            if line["check"] == LOST:
                self.append(json.dumps(line | {"check": LATE}))


@dataclass(frozen=True)
class Stage:
    """A process to run.

    seconds: time that is promised to it. cuda: whether it needs a library with CUDA kernels. fast: whether --fast runs
    it. patience: seconds without a new line that count as hanging.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    cuda: bool = False
    fast: bool = False
    patience: float = 40.0


@dataclass
class Check:
    """A run of this command. end: the time by the monotonic clock at which it has to be over."""

    results: Path
    log: Path
    end: float
    why_no_cuda: str | None = None

    def start(self, command: Sequence[str], since: int = 0) -> subprocess.Popen[bytes]:
        """Start a process that leads a group of its own, with its output in the log."""
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        given = {"PYTHONPATH": paths, "STGP_RESULTS": str(self.results), "STGP_SINCE": str(since)}
        given["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), *TOOLS))
        options = {"cwd": ROOT, "env": os.environ | given, "stdin": subprocess.DEVNULL, "start_new_session": True}
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)

    def run_process(self, command: Sequence[str], seconds: float, patience: float, since: int = 0) -> int | None:
        """Return the exit code; None if its time was over or it appended nothing for as long as there is patience."""
        process = self.start(command, since)
        size, heard, end = -1, time.monotonic(), time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < min(end, heard + patience):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                if self.results.stat().st_size != size:
                    size, heard = self.results.stat().st_size, time.monotonic()
            return process.poll()
        finally:
            stop(process)

    def run_stage(self, stage: Stage, seconds: float) -> dict[str, Any]:
        """Run a stage, and start its process again for as long as it fails and gets further each time."""
        begin, lines, before, codes = time.monotonic(), Lines(self.results), None, list[int | None]()
        while codes[-1:] != [0] and lines.states() != before:
            before, left = lines.states(), seconds - (time.monotonic() - begin)
            if left < LEAST_SECONDS:
                break
            codes.append(self.run_process(stage.command, left, stage.patience, lines.since))
            if codes[-1] is None and time.monotonic() - begin >= seconds:
                lines.forgive()
        states = lines.states()
        bad = [f"{name}: {state}" for name, state in states.items() if state.startswith(("failed", "wrong"))]
        kinds = [state.split(":")[0] for state in states.values()]
        said = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)] or [f"exit codes {codes}"]
        status = "failed" if bad or any(codes) else "passed" if codes[-1:] == [0] else "unfinished"
        found = {"status": status, "summary": "; ".join([*said, *bad[:5]]), "codes": codes}
        return found | {"seconds": round(time.monotonic() - begin, 1)}

    def run_stages(self, stages: Sequence[Stage]) -> list[str]:
        """Run stages and return their states. A stage may take the time that later ones are not promised."""
        states = []
        for number, stage in enumerate(stages):
            left = self.end - time.monotonic() - sum(later.seconds for later in stages[number + 1 :])
            if stage.cuda and self.why_no_cuda is not None:
                found: dict[str, Any] = {"status": "skipped", "summary": self.why_no_cuda}
            elif left < LEAST_SECONDS:
                found = {"status": "unfinished", "summary": "no time was left"}
            else:
                found = self.run_stage(stage, left)
            Lines(self.results).append(json.dumps({"kind": "stage", "name": stage.name} | found))
            print(f"{stage.name}: {found['status']}, {found.get('seconds', 0)} s: {found['summary']}", flush=True)
            states.append(found["status"])
            if stage.name == "build":
                self.probe_library()
        return states

    def probe_library(self) -> None:
        """Ask a process of its own whether there are CUDA kernels; rename a library that cannot be loaded."""
        has = "c.LIBRARY is not None and c.LIBRARY.build_info()['cuda']"
        ask = f"from stgridpool_kernels.backends import compiled as c; raise SystemExit(0 if {has} else 3)"
        code = self.run_process((sys.executable, "-c", ask), 60, 60)
        self.why_no_cuda = None if code == 0 else "there is no compiled library with CUDA kernels"
        for library in ROOT.glob("stgridpool_kernels/_C*.so") if code not in (0, 3) else ():
            self.why_no_cuda = f"the compiled library does not load, exit code {code}"
            library.rename(f"{library}.does-not-load")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it has started, even if it has ended itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def all_stages(check: Check, arch: str) -> list[Stage]:
    """Return the stages by their value. Those of CUDA kernels come last where their library is still to be built."""
    from benchmarks.goals import GOALS

    def of_gpu(selected: str, *given: str, files: tuple[str, ...] = ("tests/backends/test_gpu.py",)) -> tuple[str, ...]:
        command = (*module, "pytest", "-p", "tools.gpu_bench", "-p", "no:cacheprovider", "-q", "--tb=short")
        return (*command, *given, *(TESTS or ("-m", "gpu", *files, "-k", selected)))

    module = (sys.executable, "-m")
    ours = (*module, "tools.gpu_bench")
    bench = (*ours, "bench", "--device", "cuda", "-o", str(check.results), "--continue", "--times-only")
    bench += ("--samples", "15", "--baseline", "copy")
    goals, plain = (*bench, "--shape", *GOALS), ("llava_avg_pool", "avg_pool2d", "naive_grid_pool")
    gradients = [f"{goal}:gradients" for goal in GOALS]
    build = ("env", f"CMAKE_ARGS=-DSTGP_CUDA_ARCHITECTURES={arch}")
    build += (sys.executable, "setup.py", "build_ext", *(("--inplace",) if check.why_no_cuda else ("-b", "build/gpu")))
    # without another worker for one that dies: it would not find the same tests to run
    many = ("-n", str(max((os.cpu_count() or 1) - 2, 1)), "--max-worker-restart", "0")
    common = ("tests/backends/test_backends.py", "tests/backends/test_backward.py")
    # every tensor is an allocation of its own, so that what is behind its end belongs to nobody
    watch = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "86")
    kinds, backends = ("memcheck", "racecheck"), ("triton", "cuda")
    watched = {f"{k}, {b}": (*watch, "--tool", k, *of_gpu(f"small and by_{b}")) for k in kinds for b in backends}
    stages = [
        Stage("smoke", 25, of_gpu("smoke and by_triton"), fast=True),
        Stage("goals", 40, (*goals, "--provider", "*_pool:triton", *plain), fast=True),
        Stage("goals, cuda", 20, (*goals, "--provider", "*_pool:cuda"), cuda=True, fast=True),
        Stage("tune", 45, (*ours, "tune", "triton"), fast=True),
        Stage("tune, cuda", 15, (*ours, "tune", "cuda"), cuda=True, fast=True),
        Stage("counters", 20, (*ours, "counters", "triton"), fast=True),
        Stage("counters, cuda", 15, (*ours, "counters", "cuda"), cuda=True, fast=True),
        Stage("test_gpu, triton", 60, of_gpu("by_triton", *many)),
        Stage("test_gpu, cuda", 40, of_gpu("by_cuda", *many), cuda=True),
        Stage("rest of the bench", 45, (*bench, "--skip", "compiled_grid_pool")),
        Stage("gradients", 15, (*bench, "--shape", *gradients, "--provider", "*_backward:*")),
        Stage("torch.compile", 15, (*goals, "--provider", "compiled_grid_pool"), patience=120),
        Stage("backends", 40, of_gpu("triton-cuda or reference-cuda", *many, files=common)),
        Stage("backends, cuda", 25, of_gpu("cuda-cuda", *many, files=common), cuda=True),
        *(Stage(name, 20, command, "cuda" in name, patience=60) for name, command in watched.items()),
        Stage("build", 40, build, patience=ALL_SECONDS),
    ]
    return stages if check.why_no_cuda is None else sorted(stages, key=lambda stage: stage.cuda)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help=f"stop after the counters, {FAST_SECONDS:.0f} s at most")
    parser.add_argument("--stage", nargs="+", default=[""], metavar="NAME", help="only stages whose name begins so")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"for all stages ({ALL_SECONDS:.0f})")
    parser.add_argument("--stand-ins", metavar="MODULE", help="rehearse without a GPU, on what this module has for one")
    given = parser.parse_args(arguments)
    if given.stand_ins:
        importlib.import_module(given.stand_ins)
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 2
    end = time.monotonic() + (given.limit or (FAST_SECONDS if given.fast else ALL_SECONDS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end: no process outlives this one
    out = os.environ.get("OUT")
    log = Path(out or tempfile.mkdtemp(prefix="gpu-check-"), "gpu-check.log")
    log.touch()
    check = Check(log, log, end)
    check.probe_library()
    from benchmarks import machine, results

    arch = "".join(map(str, torch.cuda.get_device_capability()))
    name = results.file_name(machine.describe("cuda")["device"])
    check.results = Path(out or ROOT / "benchmarks" / "results", name)
    check.results.touch()
    print(f"results: {check.results}\nlog: {log}\nlibrary: {check.why_no_cuda or 'with CUDA kernels'}", flush=True)
    lines, stages = Lines(check.results), all_stages(check, arch)
    stages = [each for each in stages if each.name.startswith(tuple(given.stage)) and each.fast >= given.fast]
    warm = (sys.executable, "-m", "tools.compile_report", "--arch", arch)
    warming = [check.start((*warm, *given.split())) for given in WARMED]
    try:
        states = check.run_stages(stages)
    finally:
        for process in warming:
            stop(process)
    shown = {(line["kind"], line["provider"]): line["shown"] for line in lines.read() if "shown" in line}
    print("\n".join(shown.values()))
    from benchmarks.__main__ import main as run_benchmarks

    if any(line.get("kind") == "run" and not line["settings"]["quick"] for line in lines.read()):
        run_benchmarks(["goals", "--tables", str(check.results)])
    return 0 if set(states) <= {"passed", "skipped"} else 1


if __name__ == "__main__":
    from tools.gpu_check import main as main_of_the_module  # so that stand-ins and this are the same module

    sys.exit(main_of_the_module())
