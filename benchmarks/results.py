"""Results: append-only files of JSON lines, and values that are computed from them.

A run writes one line about its machine and settings (`Run`), then one line for every provider on every workload
(`BenchRow`) as soon as it is measured. Rows name their run, so a file may hold many runs. Every machine has one file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FOLDER = Path(__file__).with_name("results")
"""Folder of the results that documents are generated from."""


@dataclass(frozen=True)
class Run:
    """The conditions under which rows were measured.

    run: name, which begins with the time in UTC. device: type ("cpu" or "cuda"), name and properties of the device.
    versions, source: software that was measured. settings: options of the run.
    """

    run: str
    utc: str
    device: dict[str, Any]
    versions: dict[str, Any]
    source: dict[str, Any]
    settings: dict[str, Any]


@dataclass(eq=False)
class BenchRow:
    """The result of one provider on one workload. Values that were not measured or have no meaning are None.

    provider: "copy", "ceiling", "read", or the name of a provider of the workload. op: the op that it computes; "" for
    the first three, which move bytes only. settings: arguments that are not the defaults. groups: "main", or the sweeps
    and kinds that the workload belongs to.
    read_bytes, write_bytes: lower bound of the op's traffic; the actual traffic of a copy or a probe.
    check: "ok", or "wrong: …", "failed: …" or "skipped: …" for a row without times. note: remark below the table.
    p20_us, p50_us, p80_us: quantiles of the time of a call in µs, over `samples` samples of `calls_per_sample` calls
    on `rotating_sets` inputs in turn.
    gb_per_s: the lower bound over the median time, in 10⁹ bytes per second. percent_of_copy, percent_of_ceiling: that
    as a share of the bandwidth of the copy, and of the ceiling probe, between the same samples.
    times_baseline: median time of the provider `baseline` over that of this one, above 1 if this one is faster. If this
    one writes into given memory, so does the baseline, unless it cannot.
    extra_peak_bytes: peak memory of a call beyond the input and the result. state_bytes: maximum memory that a stream
    keeps between two calls. launches: number of kernels that a call launches on a GPU.
    overhead_us: median time in µs until a call on warm caches returns. others_cores: mean number of CPU cores that
    other processes and the hypervisor used meanwhile.
    """

    run: str
    workload: str
    provider: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    settings: dict[str, Any]
    groups: tuple[str, ...]
    input_bytes: int
    read_bytes: int
    write_bytes: int
    check: str = "skipped: not reached"
    note: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int | None = None
    calls_per_sample: int | None = None
    rotating_sets: int | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    percent_of_ceiling: float | None = None
    baseline: str | None = None
    times_baseline: float | None = None
    extra_peak_bytes: int | None = None
    state_bytes: int | None = None
    launches: int | None = None
    overhead_us: float | None = None
    others_cores: float | None = None

    @property
    def frames(self) -> int:
        """Total number of frames of all videos."""
        return self.shape[0] if len(self.shape) == 4 else self.shape[0] * self.shape[1]

    @property
    def outcome(self) -> str:
        """Kind of the check: "ok", "wrong", "failed" or "skipped"."""
        return self.check.partition(":")[0]

    @property
    def is_timed(self) -> bool:
        return self.check == "ok" and self.p50_us is not None

    @property
    def us(self) -> float:
        """Median time of a call in µs. Raises ValueError if there is none."""
        if self.p50_us is None:
            raise ValueError(f"{self.provider} on {self.workload} was not timed")
        return self.p50_us

    @property
    def spread(self) -> float:
        """Relative spread (p80 − p20) / p50 of the times, 0 if a quantile is missing."""
        if self.p20_us is None or self.p50_us is None or self.p80_us is None:
            return 0.0
        return (self.p80_us - self.p20_us) / self.p50_us


@dataclass(frozen=True)
class Results:
    """One run and its rows."""

    run: Run
    rows: list[BenchRow]

    def find(self, workload: str, provider: str) -> BenchRow | None:
        """Return the row of a provider on a workload, None if there is none with a right result."""
        found = (r for r in self.rows if (r.workload, r.provider) == (workload, provider) and r.check == "ok")
        return next(found, None)

    def of(self, group: str) -> dict[str, list[BenchRow]]:
        """Return the rows of a group by workload, in the order of measurement."""
        found: dict[str, list[BenchRow]] = {}
        for row in self.rows:
            if group in row.groups:
                found.setdefault(row.workload, []).append(row)
        return found

    def has(self, part: str) -> bool:
        """Return whether there is a row of a workload of this name or group."""
        return any(part in (row.workload, *row.groups) for row in self.rows)

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(row.workload for row in self.rows))


# ---- files ----


def append(path: Path, *lines: DataclassInstance) -> None:
    """Append lines to a file, each in one write. File and folder are made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
            file.write(b"\n")  # a killed run may have left an incomplete line
        for line in lines:
            file.write(encode(line).encode() + b"\n")


def encode(line: DataclassInstance) -> str:
    """Encode as one line of JSON, without None values; "kind" is run or row."""
    found = {name: value for name, value in asdict(line).items() if value is not None}
    return json.dumps({"kind": "row" if isinstance(line, BenchRow) else "run"} | found)


def load(path: Path) -> list[Results]:
    """Load all runs of a file, oldest first. Incomplete lines and lines of other kinds are skipped.

    If a row was written more than once, the last one counts, which has the most values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no run.
    """
    runs: dict[str, Run] = {}
    rows: dict[tuple[str, str, str], BenchRow] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        kind = found.pop("kind", None) if isinstance(found, dict) else None
        if kind == "run":
            runs[found["run"]] = _decode(Run, found)
        elif kind == "row" and found["run"] in runs:
            found["shape"], found["groups"] = tuple(found["shape"]), tuple(found["groups"])
            rows[found["run"], found["workload"], found["provider"]] = _decode(BenchRow, found)
    if not runs:
        raise ValueError(f"{path}: holds no results of benchmarks")
    return [Results(run, [row for row in rows.values() if row.run == name]) for name, run in runs.items()]


Line = TypeVar("Line", Run, BenchRow)


def _decode(kind: type[Line], found: dict[str, Any]) -> Line:
    names = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in found.items() if name in names})


def pick(argument: str) -> Results:
    """Load the results of FILE or FILE@RUN: the newest run of the file, or the newest whose name begins with RUN."""
    whole = "@" not in argument or Path(argument).exists()
    name, _, run = (argument, "", "") if whole else argument.rpartition("@")
    found = [results for results in load(Path(name)) if results.run.run.startswith(run)]
    if not found:
        raise ValueError(f"{name}: holds no run whose name begins with {run!r}")
    return found[-1]


def last_state(path: Path, part: str | None = None) -> Results | None:
    """Load the rows of all runs of the last state of the code that has any of the workload or group `part`.

    A state is the package with its compiled library; runs of the same package without a library belong to it too. Quick
    runs do not count. If runs have the same row, the latest counts. The result names the latest run that has `part`,
    whose environment may be another than that of the other runs. Returns None if there is no such run.
    """
    states: dict[Any, list[Results]] = {}
    for results in load(path):
        if results.rows and not results.run.settings.get("quick"):
            states.setdefault(results.run.source.get("package_sha256"), []).append(results)
    having = [runs for runs in states.values() if part is None or any(each.has(part) for each in runs)]
    if not having:
        return None
    runs = max(having, key=lambda runs: runs[-1].run.utc)
    libraries = (None, runs[-1].run.source.get("library_sha256"))
    same = [each for each in runs if each.run.source.get("library_sha256") in libraries]
    rows = {(row.workload, row.provider): row for each in same for row in each.rows}
    measured = [each.run for each in same if part is None or each.has(part)]
    return Results((measured or [same[-1].run])[-1], list(rows.values()))


def last_states(paths: Sequence[Path], part: str) -> list[Results]:
    """Load the last state of every machine that has any of the workload or group `part`, the newest machine first."""
    found = [results for results in (last_state(path, part) for path in paths) if results is not None]
    return sorted(found, key=lambda results: results.run.utc, reverse=True)


def machine_files(folder: Path = FOLDER) -> list[Path]:
    """Return the files of all machines, ordered by name."""
    return sorted([*folder.glob("cpu-*.jsonl"), *folder.glob("cuda-*.jsonl")])


def file_name(device: dict[str, Any]) -> str:
    """Return the name of a machine's file of results."""
    return f"{device['type']}-{re.sub(r'[^a-z0-9]+', '-', str(device['name']).lower()).strip('-')}.jsonl"


# ---- values that follow from times ----


def add_rates(rows: Sequence[BenchRow], baseline: str) -> None:
    """Set bandwidths, their shares of the copy's and the probe's, and ratios to the baseline in a workload's rows."""
    timed = {row.provider: row for row in rows if row.is_timed}
    rates = {name: (row.read_bytes + row.write_bytes) / row.us / 1e3 for name, row in timed.items()}
    for row in rows:
        row.baseline = baseline
        if row.provider in timed:
            row.gb_per_s = round(rates[row.provider], 3) or None
            row.percent_of_copy = _ratio(100 * rates[row.provider], rates.get("copy"), 2)
            row.percent_of_ceiling = _ratio(100 * rates[row.provider], rates.get("ceiling"), 2)
            given = f"{baseline}:out" if row.provider.endswith(":out") else baseline
            unit = timed.get(given) or timed.get(baseline)
            row.times_baseline = _ratio(unit.us, row.us, 4) if unit else None


def _ratio(value: float, unit: float | None, digits: int) -> float | None:
    return round(value / unit, digits) if unit else None


@dataclass(frozen=True)
class Change:
    """The rows of a provider on a workload in two runs.

    ratio: its median time in `after` over that in `before`. noise: sum of both spreads. verdict: "faster" or "slower"
    if the ratio is beyond the noise, else "".
    """

    before: BenchRow
    after: BenchRow

    @property
    def ratio(self) -> float:
        return self.after.us / self.before.us

    @property
    def noise(self) -> float:
        return self.before.spread + self.after.spread

    @property
    def verdict(self) -> str:
        if max(self.ratio, 1 / self.ratio) <= 1 + self.noise:
            return ""
        return "slower" if self.ratio > 1 else "faster"


def compare(before: Results, after: Results) -> list[Change]:
    """Return the changes of all rows that both runs timed, in the order of `after`."""
    pairs = ((before.find(new.workload, new.provider), new) for new in after.rows)
    return [Change(old, new) for old, new in pairs if old is not None and old.is_timed and new.is_timed]
