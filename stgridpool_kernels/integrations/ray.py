"""Integration into Ray Data: pooling of many token files and videos on all devices of a machine or a cluster.

    report = extract(["videos/", "tokens/a.npy"], "pooled/", temperature=2.0)

The command `python -m stgridpool_kernels.integrations.ray videos/ -o pooled/ temperature=2` does the same.
Ray schedules, retries, scales and shows the progress.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import grid_pool
from ..flat import grid_size
from ..io.failures import describe, is_out_of_memory
from ..io.folders import Found, find_inputs, remark_on
from ..io.inputs import check_reading, load_input
from ..io.token_files import write_tokens
from ..io.video import VideoWarning
from ..io.writing import remove_leftovers
from ..plan.values import count
from ..stream_state import usable_device
from .base import PoolOptions, require
from .command_line import SEVERAL, grid, join_values, refuse_unknown
from .options import OPTIONS, read_options

TESTED: dict[str, Any] = {
    "package": "ray",
    "at_least": "2.60",
    "below": "2.61",
    "install": "ray[data]",
    "signatures": {
        "ray:init": "..., include_dashboard",
        "ray:is_initialized": "...",
        "ray:cluster_resources": "...",
        "ray:shutdown": "...",
        "ray.data:from_items": "items, ..., override_num_blocks",
        "ray.data:ActorPoolStrategy.__init__": "self, ..., size",
        "ray.data:Dataset.map_batches": (
            "self, fn, ..., fn_constructor_kwargs, batch_size, batch_format, compute, num_gpus"
        ),
        "ray.data:Dataset.iter_rows": "self, ...",
    },
}
"""Arguments of `require` for this integration."""

_READING = {"key": None, "num_frames": 32, "grid": None, "tap": "post_ln"}
_Path = str | os.PathLike[str]


@dataclass
class Report:
    """Result of `extract`: outputs of this call and those that existed before; reasons and warnings by input.

    left_out counts what was found in folders and is no input, as `folders.Found` does. A folder that cannot be listed
    is among those that failed.
    """

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    warned: dict[Path, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


class PoolFiles:
    """Callable class for `ray.data.Dataset.map_batches` that pools files, several with one call of the op.

    A batch has the columns "source", a token file or a video, and "output", the file to write in an existing folder.
    The result adds the columns "state", "reason" and "warning". The state is "written"; "skipped" if the output exists,
    after a previous run or a previous try of the batch by `map_batches`; or "failed", after any exception of reading,
    pooling or writing the file, with the reason in one line. Files that cannot be pooled together, as they do not fit
    into memory, are pooled one by one. The warning tells how much of a video that is cut short is missing. Outputs
    appear complete or not at all, and inputs are never modified.

    device: device that pools. options: key, num_frames=32, grid=None and tap="post_ln" as in `inputs.load_input`;
    arguments of `grid_pool` except `frame_counts` and `out`. Raises as `check_reading`, `PoolOptions` and, for a device
    that cannot be used, ValueError.
    """

    def __init__(self, *, device: str = "cpu", **options: Any) -> None:
        self.reading: dict[str, Any] = {name: options.pop(name, default) for name, default in _READING.items()}
        check_reading(**self.reading)
        self.arguments = PoolOptions(**options).arguments
        self.device = usable_device(device, "device")

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        jobs = [_Job(str(source), str(output)) for source, output in zip(batch["source"], batch["output"], strict=True)]
        self._pool(jobs)
        for job in jobs if len(jobs) > 1 else ():
            if job.may_succeed_alone:
                job.reason = ""
                self._pool([job])
        columns = ("source", "output", "state", "reason", "warning")
        return {column: [getattr(job, column) for job in jobs] for column in columns}

    def _pool(self, jobs: list[_Job]) -> None:
        """Read, pool and write files, those of one frame size and dtype with one call of the op."""
        groups: dict[Any, list[tuple[_Job, Tensor]]] = {}
        for job in jobs:
            if os.path.lexists(job.output):
                job.state = "skipped"
                continue
            try:
                x = self._read(job)
            except Exception as error:
                job.fail(error)
            else:
                groups.setdefault((*x.shape[-3:], x.dtype), []).append((job, x))
        for group in groups.values():
            self._pool_packed(group)

    def _read(self, job: _Job) -> Tensor:
        """Return the tokens of a file, (T, H, W, C) or (B, T, H, W, C)."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", VideoWarning)
            x, _ = load_input(job.source, **self.reading)
        job.warning = "; ".join(str(warning.message) for warning in caught)
        job.is_flat = x.dim() == 3
        return x.unflatten(1, grid_size(self.reading["grid"])) if job.is_flat else x

    def _pool_packed(self, group: list[tuple[_Job, Tensor]]) -> None:
        """Pool inputs of one frame size and dtype, packed along T, and write the result of each."""
        counts = [x.shape[-4] for _, x in group for _ in range(math.prod(x.shape[:-4]))]
        try:
            packed = torch.cat([x.flatten(0, -4) for _, x in group]).to(self.device)
            with torch.no_grad():
                pooled = grid_pool(packed, frame_counts=counts, **self.arguments).cpu()
        except Exception as error:
            for job, _ in group:
                job.fail(error, packed=len(group) > 1)
            return
        for (job, x), part in zip(group, pooled.split([math.prod(x.shape[:-3]) for _, x in group]), strict=True):
            result = part.reshape(*x.shape[:-3], *part.shape[1:])
            try:
                write_tokens(job.output, result.flatten(-3, -2) if job.is_flat else result, force=False)
                job.state = "written"
            except FileExistsError:  # a concurrent run wrote it
                job.state = "skipped"
            except Exception as error:
                job.fail(error)


@dataclass
class _Job:
    """One file of a batch, with the columns of `PoolFiles` as fields, and notes for a second try."""

    source: str
    output: str
    state: str = ""
    reason: str = ""
    warning: str = ""
    is_flat: bool = False
    may_succeed_alone: bool = False

    def fail(self, error: Exception, *, packed: bool = False) -> None:
        """Note why the file failed. packed: whether it was pooled with others, which may be the cause."""
        reason = describe(error)
        self.state, self.reason = "failed", reason if self.source in reason else f"{self.source}: {reason}"
        self.may_succeed_alone = packed or is_out_of_memory(error)


def extract(
    inputs: _Path | Iterable[_Path],
    output: _Path,
    *,
    device: str | None = None,
    actors: int | None = None,
    batch_size: int = 4,
    **options: Any,
) -> Report:
    """Pool every input into a .safetensors file of its name in the folder `output`, on the devices of Ray.

    Outputs that exist are taken as finished and not overwritten, so a second run continues the first. Inputs that
    cannot be read, that the options do not fit, that do not fit into memory or that fail in any other way are reported
    as failed; the others are pooled.

    inputs: token files, videos, and folders, which are searched recursively; `output` gets the same subfolders. Files
    of folders are found by their suffixes, and the report counts the others.
    output: a folder, made if needed. On several machines, all of them share the inputs and the output.
    device: "cpu" or "cuda"; by default "cuda" if the cluster has GPUs. actors: number of processes; by default one per
    GPU, or one per CPU. batch_size: number of files that an actor reads and pools at once. options: those of
    `PoolFiles`.

    Uses the cluster that this process is connected to; else that of RAY_ADDRESS; else one that `ray start` started on
    this machine; else it starts one for the length of the call.

    Raises OSError, ValueError or TypeError before anything is read; ImportError or RuntimeError without Ray, and
    for a version that `require` refuses.
    """
    PoolFiles(**options)  # checks them
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be None, 'cpu' or 'cuda', got {device!r}")
    count("actors", 1 if actors is None else actors, 1)
    count("batch_size", batch_size, 1)
    found = _found(Path(output), [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs))
    ray = require(**TESTED)
    skipped = [target for target in found.outputs if os.path.lexists(target)]
    report = Report(skipped=skipped, failed=dict(found.unreadable), left_out=dict(found.left_out))
    new = {target: source for target, source in found.outputs.items() if target not in skipped}
    rows = [{"source": str(source.absolute()), "output": str(target.absolute())} for target, source in new.items()]
    if not rows:
        return report
    if started := not ray.is_initialized():
        ray.init(include_dashboard=None if os.environ.get("RAY_ADDRESS") else False)
    try:
        for row in _pooled(ray, rows, device, actors, batch_size, options):
            if row["state"] == "failed":
                report.failed[Path(row["source"])] = row["reason"]
            else:  # a batch that Ray retries skips outputs of its first try, which did not exist before this run
                report.written.append(Path(row["output"]))
            if row["warning"]:
                report.warned[Path(row["source"])] = row["warning"]
    finally:
        for row in rows:
            remove_leftovers(row["output"])
        if started:
            ray.shutdown()
    return report


def _found(output: Path, inputs: Sequence[_Path]) -> Found:
    if not inputs:
        raise ValueError("inputs must name at least one file or folder, got none")
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"inputs must exist, there is no {given}")
    return find_inputs(output, inputs, lambda file: ".safetensors")


def _pooled(ray: Any, rows: list[Any], device: str | None, actors: int | None, size: int, options: Any) -> Any:
    """Return an iterator over the rows that `PoolFiles` returns, in any order."""
    for folder in {os.path.dirname(row["output"]) for row in rows}:
        os.makedirs(folder, exist_ok=True)
    gpus, cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
    device = device or ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        raise ValueError("device must be None or 'cpu' where the cluster has no GPU, got 'cuda'")
    batches = math.ceil(len(rows) / size)
    actors = min(batches, actors or (gpus if device == "cuda" else max(1, cpus)))
    pooled = ray.data.from_items(rows, override_num_blocks=batches).map_batches(
        PoolFiles,
        fn_constructor_kwargs={"device": device, **options},
        batch_size=size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if device == "cuda" else None,
    )
    return pooled.iter_rows()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 if an input failed or the call raised, 130 after Ctrl-C."""
    prog = "python -m stgridpool_kernels.integrations.ray"
    parser = argparse.ArgumentParser(prog, allow_abbrev=False, description="Pool files on every device that Ray has.")
    about = f"token files, videos, folders, or an option of the op as NAME=VALUE; {SEVERAL}"
    parser.add_argument("inputs", nargs="+", metavar="IN", help=about)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder of the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device (default: cuda if the cluster has GPUs)")
    parser.add_argument("--actors", type=int, metavar="N", help="processes (default: one per GPU, or per CPU)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="files at once (default: 4)")
    parser.add_argument("--key", metavar="NAME", help="name of the tensor, in files that hold several")
    parser.add_argument("--num-frames", type=int, default=32, metavar="N", help="most frames of a video (default: 32)")
    rows = "tokens per frame, which flattened tokens (T, N, C) need (default for videos: 18x32)"
    parser.add_argument("--grid", type=grid, metavar="ROWSxCOLS", help=rows)
    given_args, unknown = parser.parse_known_intermixed_args(
        join_values(sys.argv[1:] if argv is None else argv, {"--grid"})
    )
    refuse_unknown(parser, unknown, {f"--{name.replace('_', '-')}": f"{name}=VALUE" for name in OPTIONS})
    args = vars(given_args)
    given = args.pop("inputs")
    texts = [text for text in given if text.split("=")[0].isidentifier() and "=" in text and not os.path.lexists(text)]
    try:
        options = read_options(dict(text.split("=", 1) for text in texts))
        report = extract([text for text in given if text not in texts], **args, **options)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what is written is whole", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    counts = f"{len(report.written)} written, {len(report.skipped)} there already, {len(report.failed)} failed"
    left_out = remark_on(report.left_out)
    print(f"{counts}; {left_out}" if left_out else counts)
    sys.stderr.writelines(f"{line}\n" for line in [*report.warned.values(), *report.failed.values()])
    return 1 if report.failed else 0


if __name__ == "__main__":
    # Workers import PoolFiles by the module's name, which is __main__ here.
    from stgridpool_kernels.integrations.ray import main as command

    sys.exit(command())
