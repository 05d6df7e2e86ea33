"""The command `stgp`: its parser and exit codes. Every subcommand has its own file in this folder."""

from __future__ import annotations

import argparse
import io
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..arguments import LayoutWarning
from ..integrations.command_line import join_values, refuse_unknown
from ..io.token_files import SUFFIXES
from ..io.video import VideoWarning
from ..version import __version__
from .bench import SHAPE, bench_command
from .info import add_info
from .options import (
    DTYPES,
    add_command,
    add_device_option,
    add_input_options,
    add_op_options,
    check_options,
    check_video_options,
    device_of,
    encoding,
    integer_flags,
    num_frames,
    op_options,
)
from .outputs import check_outputs
from .pool import add_pool
from .terminal import complain, describe, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stgp` with `argv`, by default the process's arguments, and return the exit code.

    It is 0 on success, 1 after an error, which is described in one line on stderr, and 130 after Ctrl-C. Usage errors,
    --help and --version raise SystemExit, as argparse does. So do SIGTERM (143) and SIGHUP (129), after temporary files
    are removed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding without "→" shows its escape
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args, unknown = parser.parse_known_args(join_values(sys.argv[1:] if argv is None else argv, integer_flags()))
    refuse_unknown(args.parser, unknown)
    try:
        with _ended_by_signals(), _warnings_in_a_line(args):
            code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        complain(args, "interrupted")
        return 130
    except Exception as error:
        complain(args, describe(error))
        if args.debug:
            traceback.print_exc()
        return 1


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit if their action is the default. This works in the main thread only."""

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
def _warnings_in_a_line(args: argparse.Namespace) -> Iterator[None]:
    """Print the package's warnings, a line each, on stderr, without the code that raised them.

    A RuntimeWarning, as for missing kernels, is red on a terminal.
    """
    with warnings.catch_warnings():  # restores showwarning
        show = warnings.showwarning

        def show_in_a_line(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any, **named: Any
        ) -> None:
            if issubclass(category, (LayoutWarning, VideoWarning)):
                complain(args, str(message))
            elif issubclass(category, RuntimeWarning):
                line = Text(printable(f"stgp {args.command}: {message}"), "bold red")
                Console(stderr=True, soft_wrap=True).print(line)
            else:
                show(message, category, filename, lineno, *more, **named)

        warnings.showwarning = show_in_a_line
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
    add_info(commands)
    add_pool(commands)
    _add_inspect(commands)
    _add_demo(commands)
    _add_bench(commands)
    return parser


# ---- stgp inspect, stgp demo, stgp bench ----


def _add_inspect(commands: Any) -> None:
    parser = add_command(commands, "inspect", _run_inspect, "draw the effect of pooling on the tokens of one input")
    parser.usage = "stgp inspect IN -o OUT.png [options]"
    parser.description = (
        "Measure and draw the effect of the op on one video's tokens: the frames that become summaries, the spread of "
        f"the norms, the sharpness of the pooling weights. IN is a token file ({', '.join(SUFFIXES)}) or a video; of a "
        "batch or of packed videos the first is drawn."
    )
    parser.epilog = "example:\n  stgp inspect clip.mp4 -o clip.png --temperature 2"
    parser.add_argument("input", type=Path, metavar="IN", help="a token file or a video")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="a picture of it, a PNG file (default: none)")
    add_device_option(parser, "pools")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    add_input_options(parser)
    add_op_options(parser)


def _run_inspect(args: argparse.Namespace) -> int:
    options = op_options(args)
    check_options(options)
    device = device_of(args)
    check_outputs([args.input], [args.output] if args.output else [], made=False, force=args.force)
    check_video_options(args, [args.input])
    from .inspect import inspect_command

    inspect_command(
        args.input,
        args.output,
        options=options,
        num_frames=num_frames(args),
        **encoding(args),
        key=args.key,
        device=device,
        force=args.force,
        console=Console(),
    )
    return 0


def _add_demo(commands: Any) -> None:
    parser = add_command(commands, "demo", _run_demo, "run the op on real video tokens, check it, time it, draw it")
    parser.epilog = "example:\n  stgp demo -o demo.png"
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo.png"), metavar="OUT", help="the picture (default: demo.png)"
    )
    parser.add_argument(
        "--offline-tokens",
        action="store_true",
        help="use the tokens packaged with the library instead of decoding and encoding a clip",
    )
    add_device_option(parser, "pools")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def _run_demo(args: argparse.Namespace) -> int:
    from .demo import demo_command

    device = device_of(args)
    demo_command(args.output, offline_tokens=args.offline_tokens, device=device, force=args.force, console=Console())
    return 0


def _add_bench(commands: Any) -> None:
    parser = add_command(commands, "bench", _run_bench, "time the ops next to the pooling that they replace")
    parser.epilog = "In a checkout, python -m benchmarks measures more: models, sweeps, limits, gradients, streams."
    shape, dtype = "shape of the tokens (default: %(default)s)", "dtype of the tokens (default: %(default)s)"
    parser.add_argument("--shape", default=SHAPE, metavar="TxHxWxC", help=shape)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help=dtype)
    add_device_option(parser, "is timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of a table")


def _run_bench(args: argparse.Namespace) -> int:
    bench_command(args.shape, args.dtype, device_of(args), args.json, Console())
    return 0
