"""The command `stgp pool`: read files and videos, pool them, write the results."""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..functional import grid_pool
from ..integrations.command_line import positive
from ..io.folders import remark_on
from ..io.inputs import load_input, stream_input
from ..io.token_files import SUFFIXES, check_dtype, check_streamable, write_chunks, write_tokens
from ..stream import GridPoolStream
from .options import (
    DTYPES,
    add_command,
    add_device_option,
    add_input_options,
    add_op_options,
    check_grid,
    check_options,
    check_video_options,
    device_of,
    encoding,
    num_frames,
    op_options,
)
from .outputs import check_outputs, outputs_of
from .remarks import count_not_finite, remarks
from .terminal import complain, describe, printable


@dataclass(frozen=True)
class _Pooled:
    """Row of a finished input in the table that ends the command: shapes before and after, dtype and seconds."""

    source: Path
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: torch.dtype
    seconds: float


def add_pool(commands: Any) -> None:
    parser = add_command(commands, "pool", _run_pool, "pool the tokens in files, or of videos, and write the result")
    parser.usage = "stgp pool IN [IN ...] -o OUT [options]"
    parser.description = (
        f"Pool token files ({', '.join(SUFFIXES)}) and videos. Tokens have shape (T, H, W, C), or (B, T, H, W, C), and "
        "dtype bfloat16, float16, float32 or float64. Files are never unpickled; outputs appear whole or not at all."
    )
    parser.epilog = (
        "examples:\n"
        "  stgp pool tokens.safetensors -o pooled.safetensors\n"
        "  stgp pool a.npy b.pt -o pooled/ --ceil-mode --temperature 0.5\n"
        "  stgp pool flattened.npy -o pooled.npy --grid 27x27\n"
        "  stgp pool videos/ -o pooled/ --frame-strides 2,4\n"
        "  stgp pool clip.mp4 -o clip.npy --num-frames 64 --frame-strides none\n"
        "  stgp pool clip.mp4 -o clip.npy --stream\n"
        "  ffmpeg -i URL -f matroska - | stgp pool - -o pooled.safetensors --stream"
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="IN",
        help="token files, videos, or folders, searched recursively for both",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help=f"a file for one input, if it ends in {', '.join(SUFFIXES)}; else a folder, made if needed, where each "
        "result keeps its input's name, in the subfolder of its input",
    )
    parser.add_argument(
        "--format",
        choices=[suffix[1:] for suffix in SUFFIXES],
        help="format of files in the folder OUT (default: the input's; safetensors for videos)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="dtype of the result (default: the input's)")
    add_device_option(parser, "pools")
    parser.add_argument("--force", action="store_true", help="overwrite outputs that exist")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read, pool and write frame by frame, in memory that does not grow with the input: .npy, .safetensors, "
        "videos (all of their frames), or a pipe of .npy arrays or of a video; - is standard input. Writes .npy or "
        ".safetensors",
    )
    parser.add_argument(
        "--chunk", type=positive, metavar="N", help="with --stream, maximum number of frames at a time (default: 1)"
    )
    add_input_options(parser)
    add_op_options(parser)


def _run_pool(args: argparse.Namespace) -> int:
    options = op_options(args)
    check_options(options)
    device, out = device_of(args), Path(args.output)
    found = outputs_of(args.inputs, args.output, args.format)
    args.inputs, is_folder = list(found.outputs.values()), list(found.outputs) != [out]
    _check(args, list(found.outputs), is_folder)

    finished: list[_Pooled] = []
    failures = list(found.unreadable.values())
    try:
        with closing(_with_bars(found.outputs)) as jobs:
            for source, output, show in jobs:
                try:
                    pool_file = _stream_file if args.stream else _pool_file
                    finished.append(pool_file(source, output, args, options, device, show))
                except Exception as error:
                    message = describe(error)
                    failures.append(message if str(source) in message else f"{source}: {message}")
                    if args.debug:
                        traceback.print_exc()
    finally:  # also after Ctrl-C, since finished outputs stay
        if finished:
            Console(highlight=False).print(_summary(finished, out, device, folder=is_folder))
    inputs = len(found.outputs) + len(found.unreadable)
    headline = [f"{len(failures)} of {inputs} inputs failed:"] if inputs > 1 and failures else []
    left_out = remark_on(found.left_out)
    for message in [*([left_out] if left_out else []), *headline, *failures]:
        complain(args, message)
    return 1 if failures else 0


def _check(args: argparse.Namespace, outputs: Sequence[Path], is_folder: bool) -> None:
    """Raise the errors of options and outputs that come before any input is read."""
    check_outputs(args.inputs, outputs, made=is_folder, force=args.force)
    if args.dtype:
        for output in outputs:
            check_dtype(output, DTYPES[args.dtype])
    if args.stream:
        _check_stream(args, outputs)
    elif args.chunk is not None:
        raise ValueError(f"--chunk goes with --stream only, got {args.chunk}")
    elif Path("-") in args.inputs:
        raise ValueError("-: standard input is read with --stream only")
    check_video_options(args, args.inputs)


def _with_bars(outputs: Mapping[Path, Path]) -> Generator[tuple[Path, Path, Callable[..., None]], None, None]:
    """Yield each input, its output and a function that shows its progress; bars are drawn on a terminal alone."""
    bars = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=bars, transient=True, disable=not bars.is_terminal) as progress:
        files = progress.add_task("files", total=len(outputs), visible=len(outputs) > 1)
        frames = progress.add_task("frames", visible=False)
        for output, source in outputs.items():

            def show(stage: str, done: int, total: int | None, name: str = printable(source.name)) -> None:
                progress.update(frames, description=f"{stage} {name}", completed=done, total=total, visible=True)

            yield source, output, show
            progress.update(frames, visible=False)
            progress.advance(files)


def _pool_file(
    source: Path,
    output: Path,
    args: argparse.Namespace,
    options: dict[str, Any],
    device: torch.device,
    progress: Callable[[str, int, int], object],
) -> _Pooled:
    start = time.perf_counter()
    x, _ = load_input(source, key=args.key, num_frames=num_frames(args), progress=progress, **encoding(args))
    before = tuple(x.shape)
    dtype = DTYPES[args.dtype] if args.dtype else x.dtype
    check_dtype(output, dtype)
    check_grid(args.grid, before, args.inputs)
    if len(before) == 3:
        x = x.unflatten(1, args.grid)
    with torch.no_grad():
        pooled = _cast(grid_pool(x.to(device), **options), dtype).cpu()
    if len(before) == 3:
        pooled = pooled.flatten(1, 2)
    output.parent.mkdir(parents=True, exist_ok=True)  # made late, so that failures leave no folder
    write_tokens(output, pooled, force=args.force)
    counts = options["frame_counts"] or [x.shape[-4]] * math.prod(x.shape[:-4])
    for remark in remarks(counts, count_not_finite(x), options):
        complain(args, f"{source}: {remark}")
    return _Pooled(source, before, tuple(pooled.shape), dtype, time.perf_counter() - start)


def _check_stream(args: argparse.Namespace, outputs: Sequence[Path]) -> None:
    for name in ("frame_counts", "key", "num_frames"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} cannot go with --stream, got {getattr(args, name)}")
    for output in outputs:
        check_streamable(output)


def _stream_file(
    source: Path,
    output: Path,
    args: argparse.Namespace,
    options: dict[str, Any],
    device: torch.device,
    progress: Callable[[str, int, int | None], object],
) -> _Pooled:
    start = time.perf_counter()
    stream = GridPoolStream(**{name: value for name, value in options.items() if name != "frame_counts"})
    shapes: list[tuple[int, ...]] = [(), ()]

    not_finite = 0

    def pooled_chunks() -> Iterator[Tensor]:
        nonlocal not_finite
        for x in stream_input(source, chunk=args.chunk or 1, **encoding(args)):
            shapes[0] = tuple(x.shape[1:])
            check_grid(args.grid, tuple(x.shape), args.inputs)
            frames = x.unflatten(1, args.grid) if x.dim() == 3 else x
            not_finite += count_not_finite(frames)
            pooled = stream.push(frames.to(device))
            pooled = pooled.flatten(1, 2) if x.dim() == 3 else pooled
            shapes[1] = tuple(pooled.shape[1:])
            yield _cast(pooled, DTYPES[args.dtype] if args.dtype else x.dtype)
            progress("streaming", stream.frames(), None)

    chunks = pooled_chunks()
    first = next(chunks)  # stream_input yields at least one chunk, or raises
    check_dtype(output, first.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)  # made late, so that failures leave no folder
    write_chunks(output, chain([first], chunks), force=args.force)
    if not stream.matches_offline():
        complain(
            args,
            f"{source}: {stream.frames()} frames are no multiple of the strides {stream.arguments['frame_strides']}: "
            "without --stream, or with --sampling first, other frames are sampled",
        )
    for remark in remarks([stream.frames()], not_finite, options):
        complain(args, f"{source}: {remark}")
    before, after = ((stream.frames(), *shape) for shape in shapes)
    return _Pooled(source, before, after, first.dtype, time.perf_counter() - start)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    cast = x.to(dtype)
    if cast.dtype != x.dtype and cast.isinf().sum() != x.isinf().sum():
        largest = x[x.isfinite()].abs().max().item()
        raise ValueError(f"--dtype {str(dtype).removeprefix('torch.')} cannot hold the result's {largest:g}")
    return cast


def _summary(finished: Sequence[_Pooled], out: Path, device: torch.device, *, folder: bool) -> Table:
    written = f"pooled on {device}, written{' into' if folder else ''}: {printable(str(out))}"
    table = Table(caption=Text(written, overflow="fold"), caption_justify="left")
    table.add_column("input", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("seconds", no_wrap=True, justify="right")
    for each in finished:
        table.add_row(
            Text(printable(str(each.source))),
            f"{each.before} → {each.after}",
            str(each.dtype).removeprefix("torch."),
            f"{each.seconds:.2f}",
        )
    return table
