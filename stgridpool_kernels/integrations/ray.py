"""Ray Data: pools the tokens of many files or videos, on every device of a machine or of a cluster.

    from stgridpool_kernels.integrations.ray import extract

    report = extract(["videos/", "tokens/a.npy"], "pooled/", temperature=2.0)

or `python -m stgridpool_kernels.integrations.ray videos/ -o pooled/ temperature=2`. Ray schedules, retries, scales and
shows the progress. What is here is one step of a Ray dataset, `PoolFiles`, and a pipeline around it.
"""

from __future__ import annotations

import argparse
import glob
import logging
import math
import mimetypes
import operator
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import grid_pool
from ..inputs import load_input
from ..io.encoder import TAPS
from ..io.token_files import SUFFIXES, write_tokens
from .base import PoolOptions, require
from .options import read_option

_TESTED = {"at_least": "2.60", "below": "2.61"}

_logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What became of the files: outputs that were written, outputs that were there already, why an input failed."""

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)


class PoolFiles:
    """A callable class for `ray.data.Dataset.map_batches`: files in, pooled files out, one call of the op for many.

    A batch has columns "source" (a token file or a video) and "output" (the file to write, in an existing folder). The
    result has these and "state": "written"; "skipped" where the output is there already, which `map_batches` running a
    batch again may find as well as a second run; "failed", with the reason in "reason". Outputs appear whole or not at
    all, and inputs are never modified.

    device: where it pools. key, num_frames, grid, tap: as in `inputs.load_input`, errors as in `extract`. options:
    arguments of `grid_pool` except `frame_counts` and `out`; errors as in `PoolOptions`.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        key: str | None = None,
        num_frames: int = 32,
        grid: tuple[int, int] = (18, 32),
        tap: str = "post_ln",
        **options: Any,
    ) -> None:
        self.arguments = PoolOptions(**options).arguments
        self.device = torch.device(device)
        self.reading = _reading(key, num_frames, grid, tap)

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        sources, outputs = ([str(path) for path in batch[column]] for column in ("source", "output"))
        states: list[tuple[str, str]] = [("", "")] * len(sources)
        groups: dict[Any, list[tuple[int, Tensor]]] = {}
        for i, (source, output) in enumerate(zip(sources, outputs, strict=True)):
            if os.path.lexists(output):
                states[i] = "skipped", ""
                continue
            try:
                x, _ = load_input(source, **self.reading)
            except (ValueError, OSError) as error:
                states[i] = _failed(source, error)
                continue
            groups.setdefault((*x.shape[-3:], x.dtype), []).append((i, x))
        for group in groups.values():
            self._pool(group, sources, outputs, states)
        return {
            "source": sources,
            "output": outputs,
            "state": [state for state, _ in states],
            "reason": [reason for _, reason in states],
        }

    def _pool(
        self, group: list[tuple[int, Tensor]], sources: list[str], outputs: list[str], states: list[tuple[str, str]]
    ) -> None:
        """Pools inputs of one frame size and dtype, packed along T, and writes each."""
        counts = [count for _, x in group for count in (x.shape[:1] if x.dim() == 4 else (x.shape[1],) * x.shape[0])]
        packed = torch.cat([x if x.dim() == 4 else x.flatten(0, 1) for _, x in group]).to(self.device)
        try:
            with torch.no_grad():
                pooled = grid_pool(packed, frame_counts=counts, **self.arguments).cpu()
        except ValueError as error:  # what the options ask for does not fit frames of this size
            for i, _ in group:
                states[i] = _failed(sources[i], error)
            return
        for (i, x), part in zip(group, pooled.split([math.prod(x.shape[:-3]) for _, x in group]), strict=True):
            try:
                write_tokens(outputs[i], part.reshape(*x.shape[:-3], *part.shape[1:]), force=False)
                states[i] = "written", ""
            except FileExistsError:  # by a run beside this one
                states[i] = "skipped", ""
            except OSError as error:
                states[i] = _failed(sources[i], error)


def _failed(source: str, error: Exception) -> tuple[str, str]:
    reason = str(error) or type(error).__name__
    _logger.warning("skipped: %s", reason if source in reason else f"{source}: {reason}")
    return "failed", reason


def extract(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    actors: int | None = None,
    batch_size: int = 4,
    key: str | None = None,
    num_frames: int = 32,
    grid: tuple[int, int] = (18, 32),
    tap: str = "post_ln",
    **options: Any,
) -> Report:
    """Pools every input into a .safetensors file of its name in the folder `output`, on the devices that Ray has.

    A file that is there already is taken for finished and left alone, so a second run does what the first left. An
    input that cannot be read, or that the options do not fit, is reported and skipped.

    Args:
        inputs: token files, videos, and folders, which are searched with all folders in them; these come back in
            `output`. On several machines, paths that all of them can read.
        output: a folder, made if needed. On several machines, one that all of them share.
        device: "cpu" or "cuda"; by default "cuda" where the cluster has GPUs.
        actors: processes; by default one per GPU, or one per CPU.
        batch_size: files that are read and pooled at once by an actor; all of them have to fit into its memory.
        key, num_frames, grid, tap: as in `inputs.load_input`.
        options: arguments of `grid_pool` except `frame_counts` and `out`.

    Uses the cluster that this process is connected to; else the one of RAY_ADDRESS; else the one that `ray start` left
    running on this machine; else starts one here, for the length of the call.

    Raises:
        FileNotFoundError, ValueError, TypeError: before anything is read, naming the argument, its value and what is
            allowed.
        ImportError, RuntimeError: Ray is not installed, or of a version that was not tested.
        Whatever Ray raises where it gives up.
    """
    reading = _reading(key, num_frames, grid, tap)
    PoolOptions(**options)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be None, 'cpu' or 'cuda', got {device!r}")
    for name, value in (("actors", actors), ("batch_size", batch_size)):
        if value is not None:
            _check_count(name, value)
    out = Path(output)
    jobs = _jobs([inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs), out)
    ray = require("ray", **_TESTED)

    report = Report(skipped=[target for target in jobs.values() if os.path.lexists(target)])
    rows = [
        {"source": os.fspath(source.absolute()), "output": os.fspath(target.absolute())}
        for source, target in jobs.items()
        if not os.path.lexists(target)
    ]
    if not rows:
        return report
    for folder in {os.path.dirname(row["output"]) for row in rows}:
        os.makedirs(folder, exist_ok=True)
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=None if os.environ.get("RAY_ADDRESS") else False)
    try:
        _run(ray, rows, report, {**reading, **options}, device, actors, batch_size)
    finally:
        for row in rows:
            _remove_leftovers(Path(row["output"]))
        if started:
            ray.shutdown()
    return report


def _reading(key: str | None, num_frames: int, grid: tuple[int, int], tap: str) -> dict[str, Any]:
    """Arguments of `load_input`, checked before there is any file."""
    _check_count("num_frames", num_frames)
    try:
        size = tuple(operator.index(count) for count in grid)
    except TypeError as error:
        raise TypeError(f"grid must be two integers (rows, cols), got {grid!r}") from error
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"grid must be (rows, cols) of at least 1, got {grid}")
    if tap not in tuple(TAPS):
        raise ValueError(f"tap must be one of {', '.join(TAPS)}, got {tap!r}")
    return {"key": key, "num_frames": num_frames, "grid": size, "tap": tap}


def _check_count(name: str, value: int) -> None:
    try:
        operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}") from error
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _run(
    ray: Any,
    rows: list[dict[str, str]],
    report: Report,
    arguments: dict[str, Any],
    device: str | None,
    actors: int | None,
    batch_size: int,
) -> None:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    device = device or ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        raise ValueError("device must be None or 'cpu' where the cluster has no GPU, got 'cuda'")
    batches = math.ceil(len(rows) / batch_size)
    actors = min(batches, actors or (gpus if device == "cuda" else cpus))
    pooled = ray.data.from_items(rows, override_num_blocks=batches).map_batches(
        PoolFiles,
        fn_constructor_kwargs={"device": device, **arguments},
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if device == "cuda" else None,
    )
    for row in pooled.iter_rows():
        match row["state"]:
            case "failed":
                report.failed[Path(row["source"])] = row["reason"]
            case state:
                # a batch that Ray ran again finds what its first try wrote: it was not there when this run began
                assert state in ("written", "skipped")
                report.written.append(Path(row["output"]))


def _remove_leftovers(output: Path) -> None:
    """Temporary files of a process that was killed while it wrote: no one needs them once the output is there."""
    if output.exists():
        for name in glob.glob(f".{glob.escape(output.name[:40])}.*.tmp", root_dir=output.parent):
            (output.parent / name).unlink(missing_ok=True)


def _jobs(inputs: Sequence[str | os.PathLike[str]], out: Path) -> dict[Path, Path]:
    """The output of every input."""
    if not inputs:
        raise ValueError("inputs must name at least one file or folder, got none")
    if os.path.lexists(out) and not out.is_dir():
        raise NotADirectoryError(f"output must be a folder, got {out}")
    jobs: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            if out.resolve().is_relative_to(given.resolve()):
                raise ValueError(f"output must not be in a folder of inputs: {out} is in {given}")
            found = [file for file in sorted(given.rglob("*")) if file.is_file() and _holds_tokens(file)]
            if not found:
                raise ValueError(f"inputs must hold token files ({', '.join(SUFFIXES)}) or videos, {given} has none")
            named = [(file, file.relative_to(given)) for file in found]
        elif given.exists():
            named = [(given, Path(given.name))]
        else:
            raise FileNotFoundError(f"inputs must exist, there is no {given}")
        for file, name in named:
            target = (out / name).with_suffix(".safetensors")
            if target in taken and taken[target].resolve() != file.resolve():
                raise ValueError(f"inputs must differ in name, {target} would be made of {taken[target]} and {file}")
            if target.resolve() == file.resolve():
                raise ValueError(f"output must not be the folder of an input, which is never overwritten: {file}")
            if target not in taken:
                jobs[file], taken[target] = target, file
    return jobs


def _holds_tokens(file: Path) -> bool:
    if file.name.startswith("."):
        return False
    return file.suffix.lower() in SUFFIXES or (mimetypes.guess_type(file.name)[0] or "").startswith("video/")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. 0, or 1 where an input failed, or 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m stgridpool_kernels.integrations.ray",
        description="Pool token files and videos on every device that Ray has. What is finished is skipped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IN", help="token files, videos, folders; NAME=VALUE is an argument of grid_pool"
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="a folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where the cluster has GPUs")
    parser.add_argument("--actors", type=int, metavar="N", help="processes (default: one per GPU, or per CPU)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="files at once (default: 4)")
    parser.add_argument("--key", metavar="NAME", help="which tensor, in files that hold several")
    parser.add_argument("--num-frames", type=int, default=32, metavar="N", help="of a video, at most (default: 32)")
    args = vars(parser.parse_intermixed_args(argv))
    given = args.pop("inputs")
    try:
        options = {}
        for name, value in (text.split("=", 1) for text in given if _is_option(text)):
            options[name] = read_option(name, value, name)
        report = extract([text for text in given if not _is_option(text)], **args, **options)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what is written is whole", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{len(report.written)} written, {len(report.skipped)} there already, {len(report.failed)} failed")
    for source, reason in report.failed.items():
        print(reason if str(source) in reason else f"{source}: {reason}", file=sys.stderr)
    return 1 if report.failed else 0


def _is_option(text: str) -> bool:
    return text.split("=", 1)[0].isidentifier() and "=" in text and not os.path.lexists(text)


if __name__ == "__main__":
    # workers import PoolFiles by the module's name, which is another one here
    from stgridpool_kernels.integrations.ray import main as command

    sys.exit(command())
