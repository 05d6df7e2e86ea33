"""The backends `cpu` and `cuda`, whose kernels are in the compiled library `stgridpool_kernels._C`.

The library, if it was built, is loaded with the package. It implements private ops, declared here, which take a plan
as tables.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.machinery import PathFinder
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..namespace import NAMESPACE, OPS
from ..once import refuse_second
from ..plan import GridPlan
from ..plan.tables import VERSION
from .device_tables import Tables, tables_of, tables_of_chunk
from .missing import PACKAGE, why_missing
from .weighting import Weighting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of x that the library takes, in the order of their numbers in csrc/grid_pool.h."""

# ---- ops that the library implements ----

# The ops get checked tensors. `tables` holds the words of the plan (plan/tables.py), which `_check_tables` has checked,
# and `device_tables` the same words on the device of x, or None if that is the CPU.
refuse_second(hasattr(OPS, "_grid_pool_by_tables"))
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_PLAN = "Tensor tables, Tensor? device_tables"
_NORM = "float norm_type, bool normalize_norm, int norm_channels"
# `cells` is the maximum number of cells or windows per thread block of the fused CUDA kernels, 0 for their choice.
_library.define(
    f"_grid_pool_by_tables(Tensor x, {_PLAN}, float temperature, {_NORM}, Tensor(a!) out, int cells=0) -> ()"
)
_library.define(
    f"_pool_chunk_by_tables(Tensor x, {_PLAN}, float temperature, {_NORM}, Tensor(a!) thumbnails, Tensor(b!) out) -> ()"
)
# Tables for gradients have a gradient section. `out` is the gradient of x.
_library.define(
    f"_grid_pool_backward_by_tables(Tensor grad, Tensor x, {_PLAN}, float temperature, {_NORM}, Tensor(a!) out) -> ()"
)
_library.define(f"_temporal_grid_backward_by_tables(Tensor grad, {_PLAN}, Tensor(a!) out) -> ()")
_library.define(f"_temporal_grid_by_tables(Tensor x, {_PLAN}, Tensor(a!) out) -> ()")
_library.define("_check_tables(Tensor tables) -> ()")
_library.define(f"_token_norm_compiled(Tensor x, {_NORM}, Tensor(a!) out) -> ()")
_GRID_POOL = OPS._grid_pool_by_tables.default
_TEMPORAL_GRID = OPS._temporal_grid_by_tables.default

# ---- calls that the library can run ----

LARGEST = 1 << 24
"""Exclusive limit of the rows and of the columns, in tokens, of frames and of results, since tables hold int32."""

FUSED_CHANNELS = 8192
"""Maximum number of channels of a norm in the fused CUDA kernels, whose blocks hold these channels of a token."""


MOST_FUSED_CHANNELS = 1 << 28
"""Maximum number of channels of a token in the fused CUDA kernels, which count its bytes in 32 bits."""


def _load() -> ModuleType | None:
    """Return the compiled library, None if there is none. Raises ImportError with the cause if it does not load."""
    name = f"{PACKAGE}._C"
    # The library must be beside this package: a search by name finds that of another checkout which is installed too.
    spec = PathFinder.find_spec(name, sys.modules[PACKAGE].__path__)
    if spec is None or spec.loader is None or not spec.origin:
        return None
    advice = f"Build it again with this torch ({torch.__version__}), or remove it: {spec.origin}"
    try:
        library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
    except ImportError as error:
        raise ImportError(f"the compiled library is there but does not load: {error}. {advice}") from error
    if library.TABLES_VERSION != VERSION or not hasattr(library, "DenseCall"):
        built = library.build_info()["version"]
        raise ImportError(f"the compiled library is of version {built} and its ops take other arguments. {advice}")
    return library


LIBRARY = _load()
"""The compiled library, None if it was not built."""


NO_CUDA_KERNELS = "the compiled library was built without CUDA kernels, for which docs/building.md says what is needed"
"""Reason of a library that was built without nvcc or with a torch for the CPU."""

LARGE = 1 << 20
"""Size of x, in bytes, above which a call that lacks compiled kernels warns."""


STAGE_BYTES, MOST_STAGE_FRAMES = 24 << 20, 64
"""Maximum size in bytes and number of frames of a stage on the CPU, where these are more than two for each thread."""

LARGE_RESULT = 32 << 20
"""Size in bytes from which a fresh result is in huge pages.

glibc takes a block of this size from the system and gives it back whole, so that the advice stays with no other memory,
unless its heap has a free block that is large enough.
"""


address_of: Callable[[Tensor], int] = getattr(Tensor, "const_data_ptr", Tensor.data_ptr)
"""Function that returns the address of the first element of a tensor that is only read.

Older torch has only `data_ptr` for that, which copies a lazy clone first.
"""


def take_huge_pages(out: Tensor) -> None:
    """Have a large, fresh result on the CPU backed by huge pages, which the system clears in less time than small ones.

    out: memory that nothing has been written to, of any shape and dtype. Without huge pages this does nothing.
    """
    if out.nbytes >= LARGE_RESULT and out.device.type == "cpu" and LIBRARY is not None:
        LIBRARY.take_huge_pages(out.data_ptr(), out.nbytes)


def missing_library() -> str | None:
    """Return why there is no compiled library and what to do about it, None if there is one."""
    return None if LIBRARY is not None else f"the compiled library is missing: {why_missing()}"


def unsupported_on_cpu(x: Tensor | None, plan: GridPlan | None) -> str | None:
    """Return why the CPU kernels cannot run the call, or None. With x None: why they cannot run on this machine.

    The reason is `missing_library()` only if they could run the call otherwise.
    """
    if x is not None:
        if x.device.type != "cpu":
            return f"x is on {x.device}"
        reason = _unsupported_call(x, plan)
        if reason is not None:
            return reason
    return None if LIBRARY is not None else missing_library()


def unsupported_on_cuda(x: Tensor | None, plan: GridPlan | None) -> str | None:
    """Return why the CUDA kernels cannot run the call, or None. With x None: why they cannot run on this machine.

    The reason is `missing_library()` or `NO_CUDA_KERNELS` only if they could run the call otherwise.
    """
    if x is not None:
        if not x.is_cuda:
            return f"x is on {x.device}"
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            return f"{torch.cuda.get_device_name(x.device)} has a compute capability below 8.0"
        reason = _unsupported_call(x, plan)
        if reason is not None:
            return reason
    return _missing_cuda_here()


@cache
def _missing_cuda_here() -> str | None:
    if LIBRARY is None:
        return missing_library()
    if not LIBRARY.build_info()["cuda"]:
        return NO_CUDA_KERNELS
    return None if torch.cuda.is_available() else "no CUDA device"


def warn_if_missing(x: Tensor, plan: GridPlan | None) -> None:
    """Warn, once in a process, that a call on much memory takes the reference because compiled kernels are missing."""
    if x.nbytes > LARGE and not torch.compiler.is_compiling():
        for reason in (unsupported_on_cuda(x, plan), unsupported_on_cpu(x, plan)):
            if reason is not None and reason in (missing_library(), NO_CUDA_KERNELS):
                _warn(reason)


@cache
def _warn(reason: str) -> None:
    message = f"calls run on the reference, which is many times slower than the kernels: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _unsupported_call(x: Tensor, plan: GridPlan | None) -> str | None:
    if x.dtype not in DTYPES:
        return f"{str(x.dtype).removeprefix('torch.')} runs on the reference only"
    if plan is not None:
        most = max(plan.height, plan.width, *plan.pooled_size)
        if most >= LARGEST:
            return f"there are {most} rows or columns, the kernels count fewer than 2²⁴"
        if max(plan.padding) >= LARGEST:
            return f"padding is {max(plan.padding)}, the kernels count fewer than 2²⁴ rows and columns of it"
        if most * x.shape[-4] >= 1 << 31:  # no mosaic has more rows or columns
            mosaics = [max(level.rows * plan.height, level.cols * plan.width) for level in plan.levels if level.targets]
            if max(mosaics, default=0) >= 1 << 31:
                return f"a mosaic has {max(mosaics)} rows or columns of tokens, the kernels count fewer than 2³¹"
    return None


# ---- what the ops compute ----


def _run(
    op: Callable[..., None], tensors: Sequence[Tensor], plan: GridPlan, *rest: object, gradient: bool = False
) -> None:
    """Call op(*tensors, tables, device_tables, *rest) with the tables of a plan, for a forward or for a gradient."""
    device = tensors[0].device
    is_cuda = device.type == "cuda"
    frames_per_stage = None if is_cuda or gradient else _frames_per_stage(tensors[0])
    with torch.cuda.device(device) if is_cuda else nullcontext():
        tables = tables_of(plan, device, frames_per_stage=frames_per_stage, gradient=gradient)
        op(*tensors, *_checked(tables), *rest)


def _frames_per_stage(x: Tensor) -> int:
    """Return the number of frames of a stage for tokens x on the CPU: two for each thread, or more if they are small.

    Thumbnails of small stages stay in the cache, but threads wait for each other between stages.
    """
    fitting = STAGE_BYTES // (math.prod(x.shape[-3:]) * x.element_size())
    power_of_two = (1 << min(fitting, MOST_STAGE_FRAMES).bit_length()) >> 1  # other numbers would make more tables
    return max(2 * torch.get_num_threads(), power_of_two)


def _checked(tables: Tables) -> tuple[Tensor, Tensor | None]:
    """Return tables, whose words are checked at their first use, as the two arguments of an op."""
    if not tables.checked:
        OPS._check_tables.default(tables.words)
        tables.checked = True
    return tables.words, tables.use_now() if tables.tensor.is_cuda else None


def can_fuse_on_cpu(plan: GridPlan, channels: int, weighting: Weighting) -> bool:
    """Return True: grid_pool on the CPU is fused for any number of channels and any norm."""
    return True


def can_fuse_on_cuda(plan: GridPlan, channels: int, weighting: Weighting) -> bool:
    """Return whether csrc/cuda/grid_pool.cu takes the fused kernels, by the channels of a token and by the norm."""
    holds = weighting.norm_channels <= FUSED_CHANNELS and channels <= MOST_FUSED_CHANNELS
    return holds and weighting.norm_type in (1.0, 2.0, math.inf)


def grid_pool(x: Tensor, plan: GridPlan, weighting: Weighting, out: Tensor) -> None:
    _run(_GRID_POOL, (x,), plan, *weighting, out)


def grid_pool_backward(grad: Tensor, x: Tensor, plan: GridPlan, weighting: Weighting, grad_x: Tensor) -> None:
    op = OPS._grid_pool_backward_by_tables.default
    _run(op, (grad, x), plan, *weighting, grad_x, gradient=True)


def temporal_grid(x: Tensor, plan: GridPlan, out: Tensor) -> None:
    _run(_TEMPORAL_GRID, (x,), plan, out)


def temporal_grid_backward(grad: Tensor, x: Tensor, plan: GridPlan, grad_x: Tensor) -> None:
    _run(OPS._temporal_grid_backward_by_tables.default, (grad,), plan, grad_x, gradient=True)


def token_norm(x: Tensor, weighting: Weighting, out: Tensor) -> None:
    _, *norm = weighting
    OPS._token_norm_compiled.default(x, *norm, out)


def bind_on_cpu(
    function: Callable[..., None], x: Tensor, arguments: tuple[Any, ...]
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what does the same on the CPU for tokens of the shape and dtype of x, and its arguments between x and out.

    For `grid_pool` and `temporal_grid` that is a function with checked tables, which passes contiguous tensors to the
    library by their addresses: this takes less time than a call of an op. Any other function is returned as it is.
    """
    ops = {grid_pool: _GRID_POOL, temporal_grid: _TEMPORAL_GRID}
    if function not in ops or LIBRARY is None:
        return function, arguments
    plan, *weightings = arguments
    tables = _checked(tables_of(plan, torch.device("cpu"), frames_per_stage=_frames_per_stage(x)))
    op, weighting = ops[function], tuple(chain.from_iterable(weightings))
    channels = x.shape[-1]
    settings = weighting or Weighting(1.0, 2.0, True, channels)  # which temporal_grid does not read
    words, dtype = tables[0].data_ptr(), DTYPES.index(x.dtype)
    call_dense = LIBRARY.DenseCall(function is grid_pool, words, dtype, channels, *settings)

    def run(x: Tensor, out: Tensor) -> None:
        if x.is_contiguous() and out.is_contiguous():
            call_dense(address_of(x), out.data_ptr())
        else:
            op(x, *tables, *weighting, out)

    return run, ()


def pool_chunk(x: Tensor, words: tuple[int, ...], weighting: Weighting, slots: Tensor, out: Tensor) -> None:
    op = OPS._pool_chunk_by_tables.default
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        op(x, *_checked(tables_of_chunk(words, x.device)), *weighting, slots, out)
