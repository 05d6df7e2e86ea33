"""Timing on a CPU: python -m benchmarks.cpu_bench. Exits with 0 if every bar is met.

Every result is compared with its definition before it is timed. The contenders of a shape, a plain copy and a probe of
what the machine's memory does (ceiling.cpp: as many bytes in the proportion and order of pooling, no arithmetic) take
turns in one process. All memory that is given to them was touched before. Large inputs are read from memory; a small
call follows another one like it, and finds all in caches. A result is freed after its time is taken. Bars compare
medians.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stgridpool_kernels as stgp
from stgridpool_kernels import baselines, compiled

from .contenders import WORKLOADS, Contender, Workload, average_pool, mismatch, random_tokens
from .gpu_report import ROOT, Bar, Rows, output_of, save
from .lower_bound import Traffic

RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build"

REPEATS, QUICK_REPEATS = 25, 3
SLOW_S = 1.0
"""Calls that take longer are made a fifth as often."""

SMALL_REPEATS = 3000
QUIET_CORES = 0.1
"""Cores that other processes may use of a machine that counts as quiet."""

T64 = WORKLOADS["64x27x27x3584"]
T16 = replace(T64, name="16x27x27x3584", frame_counts=(16,), goal=False)
SMALL = Workload("1x9x9x384", (1,), 9, 384)
OTHERS = (
    WORKLOADS["32x27x27x3584-ceil"],
    WORKLOADS["64x24x24x4096"],
    replace(T16, name="16x27x27x3584-fp32", dtype=torch.float32),
    replace(T16, name="16x27x27x3584-fp16", dtype=torch.float16),
)

OURS = POOL, _, GRID, _ = "norm_pool(out=)", "norm_pool", "grid_pool(out=)", "grid_pool"

Run = Callable[[], object]


# ---- the ceiling ----


class Probe:
    """The functions of ceiling.cpp, compiled for this machine."""

    def __init__(self) -> None:
        """Compiles unless it has been; raises RuntimeError with the reason where that is not possible."""
        source = Path(__file__).with_name("ceiling.cpp")
        given = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if given is None:
            raise RuntimeError("no C++ compiler")
        compiler = shlex.split(given)
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wall", "-Wno-psabi"]
        known = hashlib.sha256(source.read_bytes())
        known.update("\n".join([*compiler, output_of([*compiler, "--version"]) or "", *flags, cpu_name()]).encode())
        library = BUILD / f"ceiling-{known.hexdigest()[:16]}.so"
        if not library.exists():
            BUILD.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                built, linked = Path(folder, "ceiling.o"), Path(folder, "ceiling.so")
                # not linked to an OpenMP runtime: that of torch is used, since the threads of two would wait for work
                # on each other's cores
                for command in (
                    [*flags, "-c", f"{source}", "-o", f"{built}"],
                    ["-shared", f"{built}", "-o", f"{linked}"],
                ):
                    done = subprocess.run([*compiler, *command], capture_output=True, text=True)
                    if done.returncode != 0:
                        raise RuntimeError(f"ceiling.cpp does not compile: {done.stderr.strip()[:2000]}")
                linked.replace(library)
        try:
            functions = ctypes.CDLL(str(library))
        except OSError as error:
            raise RuntimeError(f"ceiling.cpp does not load: {error}") from error
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._pool, self._read, self._copy = functions.pool, functions.read, functions.copy
        self._pool.argtypes, self._pool.restype = [pointer, pointer, *[size] * 6, threads], None
        self._read.argtypes, self._read.restype = [pointer, size, threads], ctypes.c_uint64
        self._copy.argtypes, self._copy.restype = [pointer, pointer, size, threads], None

    def pool(self, x: Tensor, out: Tensor, threads: int) -> None:
        """out (T, OH, OW, C) = the bitwise or of the tokens of each 2 × 2 window of x (T, H, W, C)."""
        token = x.shape[3] * x.element_size()
        self._pool(*_addresses(token, x, out), *x.shape[:3], *out.shape[1:3], token, threads)

    def read(self, x: Tensor, threads: int) -> int:
        """The bitwise or of all 64-bit words of x."""
        return int(self._read(*_addresses(x.nbytes, x), x.nbytes, threads))

    def copy(self, x: Tensor, out: Tensor, threads: int) -> None:
        self._copy(*_addresses(x.nbytes, x, out), x.nbytes, threads)


def _addresses(unit: int, *tensors: Tensor) -> list[int]:
    addresses = [tensor.data_ptr() for tensor in tensors]
    if unit % 64 or any(address % 64 for address in addresses) or not all(t.is_contiguous() for t in tensors):
        raise ValueError("the probe moves whole cache lines of contiguous tensors")
    return addresses


# ---- contenders ----


def contenders(workload: Workload) -> list[Contender]:
    """Who is timed on a shape. The published code has windows without ceil_mode only, and takes long: only where two
    bytes are a value and nothing is cut."""
    ceil_mode = workload.ceil_mode
    grid_pool = partial(stgp.grid_pool, ceil_mode=ceil_mode)
    norm_pool = partial(stgp.norm_pool, ceil_mode=ceil_mode)
    right_grid, right_pool = (partial(op, backend="reference") for op in (grid_pool, norm_pool))
    right_average = partial(average_pool, ceil_mode=ceil_mode, dtype=torch.float32)
    # float32 arithmetic in another order and rounded once, against rounding at every step
    once, every = (2, 8) if workload.dtype.itemsize == 2 else (64, 64)
    timed = [
        Contender("norm_pool", "norm_pool", partial(norm_pool, backend="cpu"), right_pool, once, takes_out=True),
        Contender("grid_pool", "grid_pool", partial(grid_pool, backend="cpu"), right_grid, once, takes_out=True),
        Contender("avg_pool2d", "norm_pool", partial(average_pool, ceil_mode=ceil_mode), right_average, every),
        Contender(
            "llava_avg_pool",
            "norm_pool",
            partial(baselines.llava_avg_pool, ceil_mode=ceil_mode),
            right_average,
            every,
        ),
    ]
    if workload not in OTHERS:
        naive_pool = partial(baselines.naive_grid_pool, frame_strides=())
        timed += [
            Contender("naive_norm_pool", "norm_pool", naive_pool, right_pool, every),
            Contender("naive_grid_pool", "grid_pool", baselines.naive_grid_pool, right_grid, every),
        ]
    return timed


def check(timed: Contender, x: Tensor) -> str | None:
    """Why the result on x is wrong, or None. Looks at the last 32 frames: no segment is longer, so that whole
    segments before them have no part in the result."""
    assert len(x) <= 32 or len(x) % 32 == 0
    expected = timed.definition(x[-32:])
    given = {"out": expected.new_full((len(x), *expected.shape[1:]), math.nan)} if timed.takes_out else {}
    results = [timed.call(x, **given)] + ([timed.call(x)] if timed.takes_out else [])
    reasons = (mismatch(result[-32:], expected, timed.ulps) for result in results)
    return next((reason for reason in reasons if reason is not None), None)


# ---- timing ----


@dataclass
class Row:
    """Times of one contender on one shape, and what it is held to: for a pooling, the fewest bytes that it must move;
    for copies and the probe, the bytes that they move."""

    workload: str
    contender: str
    dtype: str
    shape: tuple[int, ...]
    ceil_mode: bool
    read_bytes: int
    write_bytes: int
    samples: int
    min_us: float
    p20_us: float
    p50_us: float
    p80_us: float
    max_us: float
    gb_per_s: float

    @staticmethod
    def of(workload: Workload, contender: str, moved: Traffic, seconds: Sequence[float]) -> Row:
        least, p20, p50, p80, most = (round(float(np.quantile(seconds, q)) * 1e6, 2) for q in (0, 0.2, 0.5, 0.8, 1))
        return Row(
            workload=workload.name,
            contender=contender,
            dtype=str(workload.dtype).removeprefix("torch."),
            shape=workload.shape,
            ceil_mode=workload.ceil_mode,
            read_bytes=moved.read_bytes,
            write_bytes=moved.write_bytes,
            samples=len(seconds),
            min_us=least,
            p20_us=p20,
            p50_us=p50,
            p80_us=p80,
            max_us=most,
            gb_per_s=round(moved.total_bytes / p50 / 1e3, 3),
        )


@dataclass(frozen=True)
class Clock:
    """Seconds since some time: on the wall, of all cores together in this process, in any process, and while the
    hypervisor ran something else. The last two are 0 where /proc/stat is not there."""

    wall: float
    own: float
    busy: float
    stolen: float

    @staticmethod
    def now() -> Clock:
        busy = stolen = 0.0
        if Path("/proc/stat").exists():
            user, nice, system, _, _, irq, softirq, steal = _first_line_of_proc_stat()
            busy, stolen = user + nice + system + irq + softirq, steal
        return Clock(time.perf_counter(), time.process_time(), busy, stolen)

    def use_since(self, before: Clock) -> dict[str, float]:
        """Cores in use on average, by this process and by others."""
        wall, own, busy, stolen = (a - b for a, b in zip(astuple(self), astuple(before), strict=True))
        used = {"own_cores": own, "others_cores": max(busy - own, 0.0), "stolen_cores": stolen}
        return {"wall_s": round(wall, 2)} | {name: round(seconds / wall, 3) for name, seconds in used.items()}


def _first_line_of_proc_stat() -> list[float]:
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    return [int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in fields[1:9]]


def measure(workload: Workload, probe: Probe | None, repeats: int, threads: int) -> tuple[list[Row], dict[str, Any]]:
    """Times of everybody on a shape, and who used the CPU meanwhile. Exits if a result is wrong."""
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    timed = contenders(workload)
    for contender in timed:
        reason = check(contender, x)
        if reason is not None:
            sys.exit(f"{contender.name} on {workload.name} is wrong: {reason}")

    calls: dict[str, Run] = {}
    moved: dict[str, Traffic] = {}
    bound, rows, cols = workload.bound("norm_pool"), *workload.plan("norm_pool").pooled_size
    out = torch.ones(len(x), rows, cols, workload.channels, dtype=x.dtype)
    whole = torch.ones_like(x)
    if probe is not None:
        calls |= {
            "ceiling": partial(probe.pool, x, out, threads),
            "read": partial(probe.read, x, threads),
            "streaming_copy": partial(probe.copy, x, whole, threads),
        }
        moved |= {"ceiling": bound, "read": Traffic(x.nbytes, 0), "streaming_copy": Traffic(x.nbytes, x.nbytes)}
    calls["copy"], moved["copy"] = partial(whole.copy_, x), Traffic(x.nbytes, x.nbytes)
    for contender in timed:
        variants = {contender.name: partial(contender.call, x)}
        if contender.takes_out:
            variants = {f"{contender.name}(out=)": partial(contender.call, x, out=out)} | variants
        calls |= variants
        moved |= dict.fromkeys(variants, workload.bound(contender.op))

    def evict(_: Run) -> object:
        return torch.amax(whole.view(torch.int32))

    def warm(call: Run) -> object:
        return call()

    before = Clock.now()
    times = take_turns(calls, repeats, warm if workload is SMALL else evict)
    use = {"workload": workload.name} | Clock.now().use_since(before)
    return [Row.of(workload, name, moved[name], seconds) for name, seconds in times.items()], use


def take_turns(calls: Mapping[str, Run], repeats: int, prepare: Callable[[Run], object]) -> dict[str, list[float]]:
    """Seconds of every call, made in turns so that clocks and neighbours favour none; slow ones in fewer turns, spread
    evenly. Each is called once before the first turn. prepare(call) runs before it is timed, so that what is left in
    the caches and which threads are awake does not depend on whose turn it was.
    """
    slow = max(1, repeats // 5)
    rounds = {name: repeats if _seconds(call) < SLOW_S else slow for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if (turn + 1) * rounds[name] // repeats > turn * rounds[name] // repeats:
                prepare(call)
                times[name].append(_seconds(call))
    return times


def _seconds(call: Run) -> float:
    begin = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - begin


# ---- bars ----


def bars(rows: Rows) -> list[Bar]:
    """The goals, by medians."""

    def median(workload: Workload, contender: str) -> float | None:
        row = rows.get((workload.name, contender))
        return None if row is None else row["p50_us"]

    def times(workload: Workload, contender: str, ours: str) -> float | None:
        a, b = median(workload, contender), median(workload, ours)
        return None if a is None or b is None else a / b

    def of_ceiling(workload: Workload) -> float | None:
        rates = [rows.get((workload.name, name)) for name in (POOL, "ceiling")]
        return None if rates[0] is None or rates[1] is None else 100 * rates[0]["gb_per_s"] / rates[1]["gb_per_s"]

    t16, t64 = T16.name, T64.name
    small = {name: median(SMALL, name) for name in OURS}
    return [
        Bar.of("norm_pool(out=) 1.2 times as fast as avg_pool2d", {t16: times(T16, "avg_pool2d", POOL)}, 1.2, "x"),
        Bar.of("norm_pool(out=) 2.5 times as fast as avg_pool2d", {t64: times(T64, "avg_pool2d", POOL)}, 2.5, "x"),
        Bar.of("norm_pool(out=) 15 times as fast as LLaVA's", {t64: times(T64, "llava_avg_pool", POOL)}, 15, "x"),
        Bar.of("grid_pool(out=) 100 times as fast as eager", {t64: times(T64, "naive_grid_pool", GRID)}, 100, "x"),
        Bar.of("norm_pool(out=) 100 times as fast as eager", {t64: times(T64, "naive_norm_pool", POOL)}, 100, "x"),
        Bar.of("norm_pool(out=) reaches 80 % of the ceiling", {t64: of_ceiling(T64)}, 80, " %"),
        Bar.of("and where part of x may be in the cache", {t16: of_ceiling(T16)}, 80, " %"),
        Bar.of("grid_pool(out=) within 1.35 of norm_pool(out=)", {t64: times(T64, GRID, POOL)}, 1.35, "x", True),
        Bar.of("a call on one frame of 9 x 9 x 384 within 80 us", small, 80, " us", at_most=True),
    ]


# ---- report ----


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.exists() else None
    )
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe(threads: int) -> dict[str, Any]:
    """The CPU, versions and source that results belong to."""
    changed = output_of(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    library = compiled.LIBRARY
    assert library is not None
    assert library.__file__ is not None
    return {
        "device": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": threads,
            "capability": library.cpu_capability(),
            "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        },
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "library": library.build_info(),
        },
        "source": {
            "commit": output_of(["git", "rev-parse", "HEAD"]),
            "dirty": None if changed is None else bool(changed),
            "library_sha256": hashlib.sha256(Path(library.__file__).read_bytes()).hexdigest(),
        },
    }


def results_name(device: str, utc: datetime) -> str:
    return f"cpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{utc:%Y%m%dT%H%M%SZ}.json"


def newest_results(folder: Path | None = None) -> Path | None:
    """The file of the last run, by the time in it."""
    return max((folder or RESULTS).glob("cpu-*.json"), key=lambda path: load(path)["utc"], default=None)


def load(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def by_name(rows: Iterable[Mapping[str, Any]]) -> Rows:
    return {(row["workload"], row["contender"]): dict(row) for row in rows}


def terminal_table(rows: Sequence[Row]) -> Table:
    """Of one shape. GB/s: the fewest bytes that a pooling must move over its median; what copies and the probe move.
    ratio: of the median to that of norm_pool(out=)."""
    first = rows[0]
    medians = {row.contender: row.p50_us for row in rows}
    table = Table(title=f"{first.workload} {first.dtype}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("contender", no_wrap=True)
    unit, digits = (1e-3, 2) if medians[POOL] > 1000 else (1.0, 1)
    titles = [f"{name} {'ms' if unit < 1 else 'us'}" for name in ("p50", "p20", "p80", "min")]
    for title in (*titles, "n", "GB/s", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        times = [f"{time * unit:.{digits}f}" for time in (row.p50_us, row.p20_us, row.p80_us, row.min_us)]
        ratio = format_ratio(row.p50_us / medians[POOL])
        table.add_row(row.contender, *times, str(row.samples), f"{row.gb_per_s:.2f}", ratio)
    return table


def format_ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


TITLES = {
    POOL: "`norm_pool` with `out=`",
    "norm_pool": "`norm_pool`",
    GRID: "`grid_pool` with `out=`",
    "grid_pool": "`grid_pool`",
    "ceiling": "reading and writing as many bytes",
    "copy": "a copy of `x`",
    "avg_pool2d": "`avg_pool2d` of a channels-last view",
    "llava_avg_pool": "average pooling as LLaVA calls it",
    "naive_norm_pool": "published code, pooling alone",
    "naive_grid_pool": "published code",
}


def markdown_table(report: Mapping[str, Any]) -> str:
    """For the README: medians relative to norm_pool's into given memory, and on which machine."""
    rows, device = by_name(report["rows"]), report["device"]
    where = (
        f"{device['name']}, {device['cores']} cores, {device['threads']} threads, {device['capability']}, "
        f"torch {report['versions']['torch'].partition('+')[0]}, {report['utc'][:10]}"
    )
    lines = ["| time, relative to the first row | 16 frames | 64 frames |", "|---|---|---|"]
    for contender, title in TITLES.items():
        cells = []
        for workload in (T16, T64):
            row, ours = rows.get((workload.name, contender)), rows[workload.name, POOL]
            ratio = "-" if row is None else format_ratio(row["p50_us"] / ours["p50_us"])
            cells.append(f"1 ({ours['p50_us'] / 1e3:.1f} ms)" if contender == POOL else ratio)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    small = {name: rows[SMALL.name, name]["p50_us"] for name in ("norm_pool", "grid_pool")}
    facts = (
        f"Frames of 27 × 27 × 3584 in bfloat16, pooled to 13 × 13; medians. {where}. A call on one frame of "
        f"9 × 9 × 384 takes {small['norm_pool']:.0f} µs (`norm_pool`) and {small['grid_pool']:.0f} µs (`grid_pool`)."
    )
    others = max(use["others_cores"] for use in report["use"])
    if others > QUIET_CORES:
        facts += f" Other processes used up to {others:.1f} cores meanwhile."
    return "\n".join([*lines, "", textwrap.fill(facts, 120)])


# ---- command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_bench", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--repeats", type=int, help=f"samples of a call, {REPEATS} by default; of slow ones a fifth")
    parser.add_argument("--quick", action="store_true", help="few samples of the main shapes; no file unless -o")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="a new file in place of one named by time")
    parser.add_argument(
        "--require-quiet",
        type=float,
        nargs="?",
        const=QUIET_CORES,
        metavar="CORES",
        help=f"do nothing while other processes use more cores than this ({QUIET_CORES} if not given)",
    )
    parser.add_argument(
        "--table",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE",
        help="only print the README's table from a file of results, by default the newest",
    )
    given = parser.parse_args(arguments)
    if given.table is not None:
        path = newest_results() if given.table == RESULTS else given.table
        if path is None:
            parser.error(f"there are no results of a CPU in {RESULTS}")
        print(markdown_table(load(path)))
        return 0
    if given.output is not None and given.output.exists():
        parser.error(f"{given.output} exists")
    if given.threads < 1 or (given.repeats is not None and given.repeats < 1):
        parser.error("--threads and --repeats must be at least 1")
    reason = compiled.why_not_on_cpu(None, None)
    if reason is not None:
        parser.error(f"backend cpu: {reason}")
    if given.require_quiet is not None:
        before = Clock.now()
        time.sleep(2)
        others = Clock.now().use_since(before)["others_cores"]
        if others > given.require_quiet:
            print(f"other processes use {others:.2f} cores: nothing was measured", file=sys.stderr)
            return 2
    return run(given.repeats or (QUICK_REPEATS if given.quick else REPEATS), given.quick, given.threads, given.output)


def run(repeats: int, quick: bool, threads: int, output: Path | None) -> int:
    """Measures, prints and writes; 0 if every bar is met."""
    console = Console()
    torch.set_num_threads(threads)
    try:
        probe = Probe()
    except RuntimeError as error:
        probe = None
        console.print(f"no ceiling: {error}", markup=False)
    utc = datetime.now(timezone.utc)
    report: dict[str, Any] = {"utc": utc.isoformat(timespec="seconds"), "repeats": repeats, "quick": quick} | describe(
        threads
    )
    load_before = os.getloadavg()
    rows, uses = [], []
    for workload in (SMALL, T16, T64, *(() if quick else OTHERS)):
        small = workload is SMALL
        found, use = measure(workload, None if small else probe, SMALL_REPEATS if small else repeats, threads)
        console.print(terminal_table(found))
        rows += found
        uses.append(use)
    reached = bars(by_name(asdict(row) for row in rows))
    report |= {
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "use": uses,
        "rows": [asdict(row) for row in rows],
        "bars": [asdict(bar) for bar in reached],
    }
    for bar in reached:
        console.print(f"{bar.status:12} {bar.name}: {bar.detail}", markup=False, highlight=False, soft_wrap=True)
    others, stolen = (max(use[name] for use in uses) for name in ("others_cores", "stolen_cores"))
    quiet = "quiet" if max(others, stolen) <= QUIET_CORES else "NOT QUIET"
    console.print(
        f"{quiet}: others used up to {others:.2f} cores, the hypervisor took up to {stolen:.2f}", soft_wrap=True
    )
    if output is not None or not quick:
        path = output or RESULTS / results_name(report["device"]["name"], utc)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        save(report, path, None)
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0 if all(bar.status == "met" for bar in reached) else 1


if __name__ == "__main__":
    sys.exit(main())
