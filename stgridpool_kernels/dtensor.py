"""The ops on a DTensor: every process computes its own shard, wherever that is what the whole would give.

A summary depends on frames of one video alone, and pooling on one frame alone. So a shard over the batch is a batch of
its own, and a shard over frames is a video of its own if the plan of the whole, restricted to it, is its plan:
`cut_counts` compares the two, and no index rule is written here. Then nothing is communicated. Everything else (shards
over H, W or C, partial sums, borders inside a segment) is redistributed first, over the batch or over frames where that
is possible.

DTensor caches what it infers for an op, by some of its arguments only. These ops do not take part in that: each has a
dispatch rule, which decides anew at every call.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ops import ARGUMENTS, _defaults, _gridding, _library, _pooling, check_call
from .plan import grid_plan

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_MODULE = "torch.distributed.tensor"
_registered = False


def support_dtensor() -> None:
    """Registers the rules, now or when torch.distributed.tensor is imported, which takes half as long as torch itself.

    A torch without torch.distributed never gets there.
    """
    if hasattr(sys.modules.get(_MODULE), "DTensor"):
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds torch.distributed.tensor as it would be found without, and registers the rules once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    global _registered
    if _registered:
        return
    _registered = True
    from torch.distributed.tensor import DTensor

    for name in ARGUMENTS:
        for op, rule in (
            (name, _forward),
            (f"_{name}_out", _forward_out),
            (f"_{name}_recorded", _recorded),
            (f"_{name}_backward", _backward),
        ):
            torch.library.register_torch_dispatch(f"stgp::{op}", DTensor, _rule(name, rule), lib=_library)


def _rule(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def rule(cls: type, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        with torch.no_grad():  # the rule stands below autograd, which has its own op for the gradient
            return run(name, func, *args, **kwargs)

    return rule


# ---- the ops ----


def _forward(name: str, func: Any, x: Tensor, **given: Any) -> Tensor:
    shards, shape = _shards(name, x, given)
    return shards.whole(func(shards.local, **shards.arguments), shape)


def _recorded(name: str, func: Any, x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    shards, shape = _shards(name, x, given)
    out, backend = func(shards.local, **shards.arguments)
    return shards.whole(out, shape), backend


def _forward_out(name: str, func: Any, x: Tensor, *, out: Tensor, **given: Any) -> None:
    shards, shape = _shards(name, x, given)
    out_sharded = _dtensor("out", out)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if out_sharded.device_mesh != shards.mesh or tuple(out_sharded.placements) != shards.placements:
        raise ValueError(
            f"out must be on the mesh of x with placements {shards.placements}, got {tuple(out_sharded.placements)} on "
            f"{out_sharded.device_mesh}"
        )
    if shards.takes_part:
        func(shards.local, out=out_sharded.to_local(), **shards.arguments)


def _backward(name: str, func: Any, grad: Tensor, x: Tensor, *others: Any, **given: Any) -> Tensor:
    shards, shape = _shards(name, x, given)
    grad_sharded = _dtensor("grad", grad)
    if grad_sharded.device_mesh != shards.mesh:
        raise ValueError(f"grad must be on the mesh of x, {shards.mesh}, got {grad_sharded.device_mesh}")
    local = _redistribute(grad_sharded, shards.placements).to_local()
    if not shards.takes_part:
        local = local.new_empty((0, *shape[1:]))
    result = shards.whole(func(local, shards.local, *others, **shards.arguments), tuple(x.shape))
    return _redistribute(result, _of_gradient(_dtensor("x", x).placements))


def _redistribute(x: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    if tuple(x.placements) == placements:
        return x
    # detached, since torch 2.10 fails where x requires a gradient
    return _dtensor("x", x.detach()).redistribute(placements=placements)


def _of_gradient(placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """Of the gradient of a tensor: as it is placed, but for partial sums, each of which gets the whole gradient."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if placement.is_partial() else placement for placement in placements)


def _dtensor(name: str, value: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        raise TypeError(f"{name} must be a DTensor where another tensor of the call is one, got {type(value).__name__}")
    return value


# ---- where a call runs ----


class _Shards:
    """A call as one process runs it. `local` and `arguments` go to the op, `whole` makes a DTensor of its result."""

    def __init__(self, x: DTensor, placements: tuple[Placement, ...], arguments: dict[str, Any]) -> None:
        self.mesh, self.placements, self.arguments = x.device_mesh, placements, arguments
        self.takes_part = x.device_mesh.get_coordinate() is not None
        self.local = _redistribute(x, placements).to_local()
        if not self.takes_part:  # no frames, so that the op runs and gives no frames
            self.local = self.local.new_empty((0, *x.shape[1:]))

    def whole(self, local: Tensor, shape: tuple[int, ...]) -> DTensor:
        from torch.distributed.tensor import DTensor

        # results are contiguous
        strides = tuple(accumulate(reversed(shape[1:]), lambda span, size: span * size, initial=1))[::-1]
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=strides
        )


def _shards(name: str, x: Tensor, given: dict[str, Any]) -> tuple[_Shards, tuple[int, ...]]:
    """Checks a call, decides how it is placed, and redistributes x where it has to be. With the shape of the result."""
    x_sharded = _dtensor("x", x)
    shape, _ = check_call(name, x, given)
    placements = _placements(name, x_sharded, given)
    arguments = dict(given)
    if given.get("frame_counts") is not None:
        pieces, own = _pieces(x_sharded, placements, 0)
        cut = _cut(name, x_sharded, given, pieces)
        assert cut is not None
        arguments["frame_counts"] = [] if own is None else list(cut[own])
    _check_local(name, x_sharded, given)
    return _Shards(x_sharded, placements, arguments), shape


def _placements(name: str, x: DTensor, given: dict[str, Any]) -> tuple[Placement, ...]:
    """The placements nearest to those of x at which every process can compute its shard alone."""
    from torch.distributed.tensor import Replicate, Shard

    batch, frames = (None, 0) if x.dim() == 4 else (0, 1)

    def fits(placements: Sequence[Placement]) -> bool:
        return _cut(name, x, given, _pieces(x, placements, frames)[0]) is not None

    chosen: list[Placement] = [Replicate() for _ in x.placements]
    moved = []
    for i, placement in enumerate(x.placements):
        if type(placement) is not Shard:  # replicated, partial, or sharded in a way that only DTensor knows
            continue
        dim = placement.dim % x.dim()
        attempt = [*chosen[:i], Shard(dim), *chosen[i + 1 :]]
        if dim == batch or (dim == frames and fits(attempt)):
            chosen = attempt
        else:
            moved.append(i)
    for i in moved:
        for onto in (batch, frames):
            # not where a later mesh dimension already shards the same one: its shards would have to move as well
            if onto is None or any(later.is_shard(onto) for later in chosen[i + 1 :]):
                continue
            attempt = [*chosen[:i], Shard(onto), *chosen[i + 1 :]]
            pieces, _ = _pieces(x, attempt, onto)
            if all(low < high for low, high in pieces) and (onto == batch or fits(attempt)):
                chosen = attempt
                break
    return tuple(chosen)


def _cut(name: str, x: DTensor, given: dict[str, Any], pieces: Sequence[tuple[int, int]]) -> Any:
    """`cut_counts` for this call; frames stand alone in an op without gridding."""
    if name in ("norm_pool", "token_norm"):
        return ()
    a = _defaults[name] | given
    counts = a["frame_counts"]
    if counts is None:
        if not a["frame_strides"]:
            return ()
        counts = (x.shape[0 if x.dim() == 4 else 1],)
    gridding = {
        key: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
        for key, v in _gridding(name, a).items()
    }
    return cut_counts(tuple(int(count) for count in counts), tuple(pieces), **gridding)


@lru_cache(maxsize=256)
def cut_counts(
    frame_counts: tuple[int, ...], pieces: tuple[tuple[int, int], ...], **gridding: Any
) -> tuple[tuple[int, ...], ...] | None:
    """The videos within every piece [first, last) of packed frames, or None where a piece cannot be gridded alone.

    A piece can if its own plan has the groups that the plan of the whole has there, level by level.
    """
    nothing = _pooling("temporal_grid", {})
    whole = grid_plan(frame_counts, 1, 1, **gridding, **nothing)
    ends = tuple(accumulate(frame_counts))
    cut = []
    for low, high in pieces:
        counts = tuple(
            min(end, high) - max(end - count, low)
            for end, count in zip(ends, frame_counts, strict=True)
            if min(end, high) > max(end - count, low)
        )
        part = grid_plan(counts, 1, 1, **gridding, **nothing)
        for of_whole, of_part in zip(whole.levels, part.levels, strict=True):
            groups = zip(of_whole.targets, of_whole.sources, strict=True)
            here = [(target, sources) for target, sources in groups if low <= target < high]
            own = zip(of_part.targets, of_part.sources, strict=True)
            if here != [(low + target, tuple(low + source for source in sources)) for target, sources in own]:
                return None
        cut.append(counts)
    return tuple(cut)


def _pieces(x: DTensor, placements: Sequence[Placement], dim: int) -> tuple[tuple[tuple[int, int], ...], int | None]:
    """The ranges [first, last) that dimension `dim` is sharded into, in order, and the place of this process's own.

    DTensor cuts as torch.chunk does, one mesh dimension after the other: pieces of ⌈size/n⌉, the last one shorter, none
    left for processes after that.
    """
    mesh = x.device_mesh
    coordinate = mesh.get_coordinate()
    pieces = [(0, int(x.shape[dim]))]
    own = 0
    for i, placement in enumerate(placements):
        if placement.is_shard(dim):
            n = mesh.size(i)
            pieces = [piece for low, high in pieces for piece in _chunks(low, high, n)]
            own = own * n + (0 if coordinate is None else coordinate[i])
    return tuple(pieces), None if coordinate is None else own


def _chunks(low: int, high: int, n: int) -> Iterator[tuple[int, int]]:
    step = -(-(high - low) // n)
    for k in range(n):
        yield min(low + k * step, high), min(low + (k + 1) * step, high)


def _check_local(name: str, x: DTensor, given: dict[str, Any]) -> None:
    """Raises ValueError where the shard that this process holds is not the one that DTensor's rule gives it."""
    from torch.distributed.tensor import Shard

    order = getattr(x._spec, "shard_order", None) or ()
    if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order):
        raise ValueError(f"x must be sharded over mesh dimensions in their order, got shard order {order}")
    if any(not placement.is_replicate() and type(placement) is not Shard for placement in x.placements):
        return
    if x.device_mesh.get_coordinate() is None:
        return
    local = x.to_local()
    for dim in range(x.dim() - 3):
        if not any(placement.is_shard(dim) for placement in x.placements):
            continue
        pieces, own = _pieces(x, x.placements, dim)
        assert own is not None
        low, high = pieces[own]
        if local.shape[dim] != high - low:
            raise ValueError(
                f"x must be sharded evenly, as torch.chunk cuts: of {x.shape[dim]} in dimension {dim} this process "
                f"should hold {high - low}, got {local.shape[dim]}"
            )
