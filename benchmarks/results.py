"""Files of results: JSON lines that are only ever appended to.

A run writes one line that says where and how it was measured (`Run`), then one line for every provider on every
workload (`Row`), as they are found. Rows name their run, so that a file may hold many.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Run:
    """Where and how rows were measured.

    run: its name, which begins with the time. device: type ("cpu" or "cuda"), name and what else belongs to it.
    settings: how it was asked for. peaks: "fp32_gflops", multiplications and additions per second, in 10⁹.
    """

    run: str
    utc: str
    device: dict[str, Any]
    versions: dict[str, Any]
    source: dict[str, Any]
    settings: dict[str, Any]
    peaks: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Row:
    """What was found for one provider on one workload; None where it was not measured or has no meaning.

    provider: "copy", "ceiling", "read", or a name of `providers.py`; op: whose lower bound it is held to.
    check: "ok", or "wrong: …", "failed: …" or "skipped: …", and then there are no times.
    p20_us, p50_us, p80_us: quantiles of the time of a call, in µs. cold_us: the median of single calls on a GPU, from
    Python to the end of the work, none of whose memory is in a cache.
    read_bytes, write_bytes: the fewest bytes that the op must move; of a copy and of a probe what they move.
    gb_per_s: these over the median time. percent_of_copy, percent_of_ceiling: that as a share of what a copy, and a
    probe that moves as many bytes in the same pattern, reached between the same samples.
    times_baseline: median time of the provider `baseline` over that of this one: above 1 this one is faster.
    flops: additions and multiplications that the op's formula takes. extra_peak_bytes: memory in use at most during a
    call, beyond the input and the result. launches: kernels on a GPU, operators of torch on a CPU.
    overhead_us: the time until a call on one frame of 9 × 9 tokens of 384 channels returns; overhead_cold_us: on a CPU
    the same where other work has filled the caches, which then hold nothing of the op's own code and data.
    others_cores: CPU cores that other processes and the hypervisor used meanwhile.
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
    min_us: float | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int | None = None
    calls_per_sample: int | None = None
    rotating_sets: int | None = None
    cold_us: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    percent_of_ceiling: float | None = None
    baseline: str | None = None
    times_baseline: float | None = None
    flops: float | None = None
    extra_peak_bytes: int | None = None
    launches: int | None = None
    overhead_us: float | None = None
    overhead_cold_us: float | None = None
    others_cores: float | None = None

    @property
    def frames(self) -> int:
        """Frames of all videos."""
        return self.shape[0] if len(self.shape) == 4 else self.shape[0] * self.shape[1]

    @property
    def spread(self) -> float | None:
        """(p80 − p20) / p50."""
        if self.p20_us is None or self.p50_us is None or self.p80_us is None:
            return None
        return (self.p80_us - self.p20_us) / self.p50_us


@dataclass(frozen=True)
class Results:
    """One run and its rows."""

    run: Run
    rows: list[Row]

    def find(self, workload: str, provider: str) -> Row | None:
        """The row of a provider on a workload, if it was measured and right."""
        return next(
            (r for r in self.rows if (r.workload, r.provider) == (workload, provider) and r.check == "ok"),
            None,
        )

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(row.workload for row in self.rows))


# ---- files ----


class Writer:
    """Appends lines to a file, each whole; its folder is made if needed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # a run that was killed may have left part of a line

    def write(self, line: DataclassInstance) -> None:
        self._file.write(encode(line).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def encode(line: DataclassInstance) -> str:
    """One line of JSON, without what is None; its kind is the name of its class."""
    found = {name: value for name, value in asdict(line).items() if value is not None}
    return json.dumps({"kind": type(line).__name__.lower()} | found)


def load(path: Path) -> list[Results]:
    """All runs in a file, oldest first. Lines that are cut or of another kind are passed over.

    A row may be written more than once, as more of it is known: the last one counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no run.
    """
    runs: dict[str, Run] = {}
    rows: dict[tuple[str, str, str], Row] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(found, dict):
            continue
        match found.pop("kind", None):
            case "run":
                run = _decode(Run, found)
                runs[run.run] = run
            case "row" if found.get("run") in runs:
                found["shape"], found["groups"] = tuple(found["shape"]), tuple(found["groups"])
                rows[found["run"], found["workload"], found["provider"]] = _decode(Row, found)
    if not runs:
        raise ValueError(f"{path}: holds no results of stgp bench")
    return [Results(run, [row for row in rows.values() if row.run == name]) for name, run in runs.items()]


Line = TypeVar("Line", Run, Row)


def _decode(kind: type[Line], found: dict[str, Any]) -> Line:
    known = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in found.items() if name in known})


def pick(argument: str) -> Results:
    """The results that FILE or FILE@RUN names: the newest run of the file, or the newest whose name begins with RUN."""
    whole = "@" not in argument or Path(argument).exists()
    name, _, run = (argument, "", "") if whole else argument.rpartition("@")
    found = [results for results in load(Path(name)) if results.run.run.startswith(run)]
    if not found:
        raise ValueError(f"{name}: holds no run whose name begins with {run!r}")
    return found[-1]


def file_name(device: dict[str, Any]) -> str:
    """Of the file that a machine's results are appended to."""
    return f"{device['type']}-{re.sub(r'[^a-z0-9]+', '-', str(device['name']).lower()).strip('-')}.jsonl"


# ---- comparison ----


@dataclass(frozen=True)
class Change:
    """A provider on a workload in two runs. ratio: median time in `after` over that in `before`. noise: the sum of both
    spreads, (p80 − p20) / p50. verdict: "faster" or "slower" where the ratio is beyond the noise, else ""."""

    workload: str
    provider: str
    before: Row
    after: Row
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        if max(self.ratio, 1 / self.ratio) <= 1 + self.noise:
            return ""
        return "slower" if self.ratio > 1 else "faster"


def compare(before: Results, after: Results) -> list[Change]:
    """What both runs measured, in the order of `after`."""
    changes = []
    for new in after.rows:
        old = before.find(new.workload, new.provider)
        if old is None or new.check != "ok" or not old.p50_us or not new.p50_us:
            continue
        noise = (old.spread or 0.0) + (new.spread or 0.0)
        changes.append(Change(new.workload, new.provider, old, new, new.p50_us / old.p50_us, noise))
    return changes


def with_ratios(rows: Iterable[Row], baseline: str) -> Sequence[Row]:
    """The rows of one workload, each with its time relative to the baseline's."""
    rows = list(rows)
    base = next((row.p50_us for row in rows if row.provider == baseline and row.check == "ok"), None)
    for row in rows:
        row.baseline = baseline
        row.times_baseline = round(base / row.p50_us, 4) if base and row.p50_us else None
    return rows
