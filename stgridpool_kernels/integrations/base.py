"""Functions that engine integrations share: pooling in an engine's layout, token counts, and checks of options.

How to add an engine
--------------------

Engines hold the tokens of all videos of a batch as one (ΣF, h·w, C) tensor, and reserve placeholders in the prompt
before they compute it. An adapter therefore does three things: it finds the number of frames of each video, it passes
the tensor to `pool_flat`, and it refuses options that give another number of tokens than there are placeholders. It
imports its engine lazily, with `require`, which also checks that the methods that it replaces take what they took in
the tested versions, and changes nothing until it is called. The following adapter is complete. It is for the engine of
tests/support/toy_engine.py, and tests/integrations/test_base.py executes it from this docstring:

    from stgridpool_kernels.integrations.base import ceil_options, pool_flat, require, require_size
    from stgridpool_kernels.integrations.pooled_class import patch_class, unpatch_class

    SIGNATURES = {"toy_engine:VideoModel.shrink": "self, features, frames_per_video"}


    def members(base, options):
        def shrink(self, features, frames_per_video):
            return pool_flat(features, frames_per_video, self.grid, **options.arguments)

        return {"shrink": shrink}


    def patch(model, **options):
        engine = require("toy_engine", at_least="1.0", below="2.0", signatures=SIGNATURES)
        if not isinstance(model, engine.VideoModel):
            raise TypeError(f"model must be a toy_engine.VideoModel, got {type(model).__name__}")
        chosen = ceil_options(**options)
        require_size("toy_engine", model.grid, model.tokens_per_frame, chosen)
        patch_class(model, members, chosen)


    def unpatch(model):
        unpatch_class(model)

The two functions of `pooled_class` replace the model's class and put it back. Parameters and their names do not change,
models with different options do not affect each other, and patched models can be copied, pickled and saved.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from types import ModuleType
from typing import Any

from .. import GridPool, grid_plan, pool_flat, use_backend
from ..arguments import check_names
from ..flat import OPTIONS, grid_size
from ..plan.values import count, shown

__all__ = [
    "NEWLINES",
    "PoolOptions",
    "ceil_options",
    "pool_flat",
    "pooled_grid",
    "require",
    "require_size",
    "signature_fault",
    "tokens_per_frame",
    "video_token_count",
]

NEWLINES = ("none", "one_token", "grid", "frame")
"""Supported placements of newline tokens: none, one after the video, one after every row, one after every frame."""

_GEOMETRY = tuple(name for name in inspect.signature(grid_plan).parameters if name in OPTIONS)
_ALLOW_UNTESTED = "STGP_ALLOW_UNTESTED"
_WARNED: set[str] = set()
"""Engines that `require` warned of in this process, and in the one that it was forked from."""


def pooled_grid(grid: Sequence[int], **options: Any) -> tuple[int, int]:
    """Return rows and columns (OH, OW) of tokens that `pool_flat` leaves of an (h, w) frame. Raises as `pool_flat`."""
    check_names(options, OPTIONS, "options")
    rows, cols = grid_size(grid)
    return grid_plan((), rows, cols, **{name: options[name] for name in _GEOMETRY if name in options}).pooled_size


def tokens_per_frame(grid: Sequence[int], **options: Any) -> int:
    """Return the number OH·OW of tokens that `pool_flat` leaves of an (h, w) frame. Raises as `pool_flat`."""
    return math.prod(pooled_grid(grid, **options))


def video_token_count(frames: int, grid: Sequence[int], newline: str = "none", **options: Any) -> int:
    """Return the number of tokens of a video in the prompt, with the engine's newline tokens.

    frames: number F of frames. grid: (h, w) of a frame before pooling, in tokens. newline: "none" counts F·OH·OW;
    "one_token" F·OH·OW + 1, with one per video, as LLaVA-OneVision in transformers and vLLM; "grid" F·OH·(OW + 1), with
    one after every row; "frame" F·(OH·OW + 1), with one after every frame.

    Raises ValueError for a negative number of frames or an unknown newline; otherwise as `pool_flat`.
    """
    if newline not in NEWLINES:
        raise ValueError(f"newline must be one of {', '.join(map(repr, NEWLINES))}, got {shown(newline)}")
    frames = count("frames", frames)
    rows, cols = pooled_grid(grid, **options)
    counts = {
        "none": frames * rows * cols,
        "one_token": frames * rows * cols + 1,
        "grid": frames * rows * (cols + 1),
        "frame": frames * (rows * cols + 1),
    }
    return counts[newline]


@dataclass(frozen=True, init=False, repr=False)
class PoolOptions:
    """Checked keyword arguments of `grid_pool` except `frame_counts` and `out`. Objects are immutable and hashable.

    Two objects are equal if all arguments, defaults included, are equal. `pool_flat(x, frames, grid,
    **options.arguments)` applies them. Raises as `grid_pool`, except for limits that depend on the size of x, and
    TypeError for an unknown argument.
    """

    _items: tuple[tuple[str, Any], ...]

    def __init__(self, **options: Any) -> None:
        check_names(options, OPTIONS, "options")
        backend = use_backend(options.pop("backend", "auto")).name
        arguments = {**GridPool(**options).arguments, "backend": backend}
        object.__setattr__(self, "_items", tuple(arguments.items()))

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, with defaults, and with sequences as tuples."""
        return dict(self._items)

    def __repr__(self) -> str:
        defaults = dict(PoolOptions()._items)
        shown = ", ".join(f"{name}={value!r}" for name, value in self._items if value != defaults[name])
        return f"PoolOptions({shown})"


def ceil_options(**options: Any) -> PoolOptions:
    """Return options for an engine whose own pooling rounds up, as 27 × 27 → 14 × 14: `ceil_mode` is True by default.

    An `output_size` leaves `ceil_mode` at the default of `grid_pool`. Raises as `PoolOptions`.
    """
    if options.get("output_size") is None:
        options.setdefault("ceil_mode", True)
    return PoolOptions(**options)


def require_size(engine: str, grid: Sequence[int], expected: int, options: PoolOptions) -> None:
    """Check that options leave as many tokens per frame as the engine has placeholders for.

    engine: its name in the error message. grid: (h, w) of a frame before pooling, in tokens. expected: number of tokens
    per frame after pooling.

    Raises ValueError with both numbers, and with options that fit if they are known.
    """
    arguments, expected = options.arguments, count("expected", expected)
    rows, cols = pooled_grid(grid, **arguments)
    if rows * cols == expected:
        return
    side = math.isqrt(expected)
    square = f" ({side} × {side})" if side * side == expected else ""
    height, width = grid
    raise ValueError(
        f"{engine} expects {expected} tokens per frame{square} where a frame has {height} × {width}, these options "
        f"give {rows * cols} ({rows} × {cols}){_remedy(grid, expected, arguments)}"
    )


def require(
    package: str,
    at_least: str,
    below: str,
    signatures: Mapping[str, str] | None = None,
    install: str | None = None,
) -> ModuleType:
    """Import an engine if the integration was tested with its version, or still fits it.

    package: name of the module. at_least, below: the tested versions, at_least ≤ version < below. signatures: the names
    of the parameters of each function or method that the integration replaces or calls, see `signature_fault`. install:
    name of the package for pip, by default `package`.

    A version from `below` on, or one that is unknown, gives a UserWarning, once for each engine in a process. So does
    an older version if the environment variable STGP_ALLOW_UNTESTED is 1.

    Raises ImportError if the engine is not installed; RuntimeError for an older version, and for signatures that
    differ, whichever the version. Each message says which versions were tested and how to install one.
    """
    tested = (
        f"this integration was tested with {package} from {at_least} to before {below}: "
        f'pip install "{install or package}>={at_least},<{below}"'
    )
    version = _version(package)
    if version is None:
        raise ImportError(f"{package} is not installed; {tested}")
    found, release = f"{package} {version} is installed", _release(version)
    older = release is not None and release < (_release(at_least) or ())
    newer = release is None or release >= (_release(below) or ())
    if older and os.environ.get(_ALLOW_UNTESTED) != "1":
        raise RuntimeError(f"{found}; {tested}, or set {_ALLOW_UNTESTED}=1 to try this version")
    engine = importlib.import_module(package)
    for path, expected in (signatures or {}).items():
        if fault := signature_fault(path, expected):
            raise RuntimeError(f"{found}, but {fault}; {tested}")
    if (older or newer) and package not in _WARNED:
        warnings.warn(f"{found}; {tested}", UserWarning, stacklevel=_level_of_user())
        _WARNED.add(package)
    return engine


def _level_of_user() -> int:
    """Return the stack level, as the caller of this function counts it, of the first code outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("stgridpool_kernels."):
        frame, level = frame.f_back, level + 1
    return level


def signature_fault(path: str, expected: str) -> str | None:
    """Return how a function of an engine differs from what an integration expects, None if it does not.

    path: its module and name, such as "module:Class.method". expected: the names of all its parameters, such as
    "self, x". If other optional parameters may follow, "..." stands for them, and names after it are those of
    parameters at any place: "self, x, ..., size". A name may be a pattern with *.
    """
    module, _, name = path.partition(":")
    try:
        parameters = inspect.signature(pkgutil.resolve_name(path)).parameters
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the engine itself lacks something
        return f"there is no {module}"
    except AttributeError:
        return f"{module} has no {name}"
    except (TypeError, ValueError):
        return f"{name} must be a function with known parameters"
    if _fits(parameters, expected):
        return None
    return f"{name} must take ({expected}), got ({', '.join(parameters)})"


def _fits(parameters: Mapping[str, inspect.Parameter], expected: str) -> bool:
    first, *others = ([name for name in part.split(", ") if name] for part in expected.split("..."))
    names = list(parameters)
    if len(names) < len(first) or not all(map(fnmatchcase, names, first)):
        return False
    if not others:
        return len(names) == len(first)
    further = names[len(first) :]
    optional = all(
        parameters[name].default is not inspect.Parameter.empty
        or parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for name in further
        if name not in others[0]
    )
    return optional and set(others[0]) <= set(further)


def _version(package: str) -> str | None:
    """Return the version of an installed engine, "of unknown version" if it does not say, None if it is not there."""
    try:
        if version := metadata.version(package):
            return version
    except metadata.PackageNotFoundError:  # it may be a clone on the path, or a distribution of another name
        missing = object()
        loaded = sys.modules.get(package, missing)
        if loaded is None or (loaded is missing and importlib.util.find_spec(package) is None):
            return None
    return str(getattr(importlib.import_module(package), "__version__", "of unknown version"))


def _remedy(grid: Sequence[int], expected: int, arguments: dict[str, Any]) -> str:
    """Return options that fit, as the end of a message; empty if neither rounding nor a nearly square grid fits."""
    if arguments["output_size"] is None:
        flipped = {**arguments, "ceil_mode": not arguments["ceil_mode"]}
        if tokens_per_frame(grid, **flipped) == expected:
            return f"; pass ceil_mode={flipped['ceil_mode']}"
    rows = math.isqrt(expected)
    if rows and expected % rows == 0:
        return f"; pass output_size=({rows}, {expected // rows}) and no other argument of the windows"
    return ""


def _release(version: str) -> tuple[int, ...] | None:
    """Return the leading numbers of a version without trailing zeros: "5.17.0rc1" gives (5, 17). None without any.

    An epoch, which no tested version has, is not taken for a number of the release: "1!5.17" gives None.
    """
    numbers = re.match(r"\s*v?(?:0!)?(\d{1,9}(?:\.\d{1,9})*)(?![\d!])", version, re.IGNORECASE)
    if numbers is None:
        return None
    release = [int(number) for number in numbers[1].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)
