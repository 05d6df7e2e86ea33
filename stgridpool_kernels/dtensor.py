"""The ops on DTensors: every process computes its own shard of the result, and x is never communicated.

A summary depends on frames of one video, and a pooled token on one frame. A shard over the batch is therefore computed
as a batch. A shard over frames is computed as a video if its plan has the groups that the plan of the whole has there;
`cut_counts` compares the two plans. All other placements are refused.

Importing this module registers a dispatch rule for every op. The public functions import it when they are given a
DTensor; a program that calls only `torch.ops.stgp` has to import it. The rules check placements at every call, since
DTensor's own cache of placements ignores some arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .namespace import NAMESPACE
from .once import refuse_second
from .ops import ARGUMENTS, Arguments, check_call, gridding_plan, op_names
from .plan import GridPlan

refuse_second("cut_counts" in globals())  # importlib.reload keeps what a module defines

Cut = dict[tuple[int, ...], tuple[int, ...]]
"""Numbers of frames of every video within a range [first, last) of packed frames, by range."""

# ---- one rule for each kind of op ----


def _forward(name: str, op: Any, x: DTensor, **given: Any) -> DTensor:
    shape, local, arguments = _local_call(name, x, given)
    return _whole(op(local, **arguments), x, shape)


def _forward_out(name: str, op: Any, x: Tensor, *, out: Tensor, **given: Any) -> None:
    x, out = _both("out", out, x)
    shape, local, arguments = _local_call(name, x, given)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if out.placements != x.placements:
        raise ValueError(f"out must have the placements of x, {x.placements}, got {out.placements}")
    if x.device_mesh.get_coordinate() is not None:
        op(local, out=out.to_local(), **arguments)


def _recorded(name: str, op: Any, x: DTensor, **given: Any) -> tuple[DTensor, Tensor]:
    shape, local, arguments = _local_call(name, x, given)
    out, backend = op(local, **arguments)
    return _whole(out, x, shape), backend


def _backward(name: str, op: Any, grad: Tensor, x: Tensor, backend: Tensor, **given: Any) -> DTensor:
    x, grad = _both("grad", grad.detach(), x)
    _, local, arguments = _local_call(name, x, given)
    if grad.placements != x.placements:  # autograd chose them, such as Replicate for the gradient of a sum
        grad = grad.redistribute(placements=x.placements)
    return _whole(op(grad.to_local(), local, backend, **arguments), x, tuple(x.shape))


def _dispatch(name: str, rule: Any, cls: type, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():  # the rule runs below autograd, which has its own op for the gradient
        return rule(name, op, *args, **kwargs)


for _name in ARGUMENTS:
    for _op, _rule in zip(op_names(_name), (_forward, _forward_out, _recorded, _backward), strict=True):
        torch.library.register_torch_dispatch(f"{NAMESPACE}::{_op}", DTensor, partial(_dispatch, _name, _rule))


def _both(name: str, value: Tensor, x: Tensor) -> tuple[DTensor, DTensor]:
    """Return x and `value`, the tensor `name`. Raises TypeError or ValueError unless both are DTensors on one mesh."""
    if not isinstance(x, DTensor):
        raise TypeError(f"x must be a DTensor as {name} is, got {type(x).__name__}")
    if not isinstance(value, DTensor):
        raise TypeError(f"{name} must be a DTensor as x is, got {type(value).__name__}")
    if value.device_mesh != x.device_mesh:
        raise ValueError(f"{name} must be on the mesh of x, {x.device_mesh}, got {value.device_mesh}")
    return x, value


def _local_call(name: str, x: DTensor, given: Arguments) -> tuple[tuple[int, ...], Tensor, Arguments]:
    """Check a call; return the shape of the whole result, this process's shard of x, and the arguments for it.

    A process outside the mesh gets a shard without frames, so that all processes run the same ops.
    """
    shape, _ = check_call(name, x, given)
    cut = _cut(name, x, x.placements, given)
    if cut is None:
        raise ValueError(_refusal(name, x, given))
    local, outside = x.to_local(), x.device_mesh.get_coordinate() is None
    if outside:
        local = local.new_empty((0, *x.shape[1:]))
    else:
        _check_local(x, local)
    if given.get("frame_counts") is not None and (cut or outside):
        counts = () if outside else cut[tuple(map(int, _own_range(x, x.dim() - 4)))]
        return shape, local, given | {"frame_counts": counts}
    return shape, local, given


def _check_local(x: DTensor, local: Tensor) -> None:
    """Raise ValueError unless this process holds the shard of x that DTensor's rule gives it."""
    order = getattr(x._spec, "shard_order", None) or ()
    if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order):
        raise ValueError(f"x must be sharded over mesh dimensions in their order, got shard order {order}")
    for dim in range(x.dim() - 3):
        low, high = _own_range(x, dim)
        if local.shape[dim] != high - low:
            raise ValueError(
                f"x must be sharded evenly, as torch.chunk cuts: of {x.shape[dim]} in dimension {dim} this process "
                f"should hold {high - low}, got {local.shape[dim]}"
            )


def _own_range(x: DTensor, dim: int) -> tuple[int, int]:
    """Return the range [first, last) of dimension `dim` of x that this process should hold."""
    low, high = 0, x.shape[dim]
    for i, placement in enumerate(x.placements):
        if placement.is_shard(dim):
            n, k = x.device_mesh.size(i), x.device_mesh.get_local_rank(i)
            length, offset = Shard.local_shard_size_and_offset(high - low, n, k)
            low, high = low + offset, low + offset + length
    return low, high


def _whole(local: Tensor, x: DTensor, shape: tuple[int, ...]) -> DTensor:
    """Return a contiguous DTensor of this shape, with the placements of x, whose local shard is `local`."""
    stride = tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]
    return DTensor.from_local(local, x.device_mesh, x.placements, shape=torch.Size(shape), stride=stride)


# ---- placements at which a call can be computed shard by shard ----


def _refusal(name: str, x: DTensor, given: Arguments) -> str:
    """Return the message for refused placements. It offers no shards of a dimension that is smaller than the mesh."""
    held, dims = x.placements, range(len(x.placements))
    shards = [Shard(dim) for dim in range(x.dim() - 3) if x.shape[dim] >= x.device_mesh.size()]
    kept = [_cut(name, x, [held[i] if i == j else Replicate() for j in dims], given) is not None for i in dims]
    tried = [tuple(held[i] if kept[i] else choice for i in dims) for choice in (*shards, Replicate())]
    tried += [(choice,) * len(held) for choice in (*shards, Replicate())]
    found = [placements for placements in dict.fromkeys(tried) if _cut(name, x, placements, given) is not None]
    return (
        f"x has placements {held}, at which {name} cannot be computed shard by shard; it can be at "
        f"{' or '.join(map(str, found))}: call x.redistribute(placements={found[0]})"
    )


def _cut(name: str, x: DTensor, placements: Sequence[Placement], given: Arguments) -> Cut | None:
    """Return the cut of a call at these placements, {} if frames are not sharded, None if placements are refused."""
    frames = x.dim() - 4
    if not all(p.is_replicate() or (type(p) is Shard and p.dim <= frames) for p in placements):
        return None
    chunks = tuple(x.device_mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard(frames))
    if not chunks:
        return {}
    counts = given.get("frame_counts")
    if counts is None:
        counts = (x.shape[frames],)  # all videos of a batch are cut alike
    return cut_counts(gridding_plan(name, [int(count) for count in counts], given), chunks)


@lru_cache(maxsize=256)
def cut_counts(plan: GridPlan, chunks: tuple[int, ...]) -> Cut | None:
    """Cut a plan's packed frames into `_pieces`. Return None if a piece cannot be gridded alone.

    A piece can be gridded alone if its own plan has, level by level, the groups that the plan of the whole has there.
    """
    videos = list(zip(accumulate(plan.frame_counts), plan.frame_counts, strict=True))
    cut: Cut = {}
    for low, high in _pieces(sum(plan.frame_counts), chunks):
        within = (min(end, high) - max(end - count, low) for end, count in videos)
        counts = tuple(count for count in within if count > 0)
        if _groups(plan, low, high) != _groups(replace(plan, frame_counts=counts), 0, high - low):
            return None
        cut[low, high] = counts
    return cut


def _groups(plan: GridPlan, low: int, high: int) -> list[list[tuple[int, list[int]]]]:
    """Return, by level, target and sources of the groups with a target in [low, high), counting frames from `low`."""
    levels = [zip(level.targets, level.sources, strict=True) for level in plan.levels]
    return [[(t - low, [s - low for s in sources]) for t, sources in level if low <= t < high] for level in levels]


def _pieces(size: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges [first, last) that DTensor cuts `size` into: chunks[0] pieces, each of chunks[1] pieces, …"""
    pieces = [(0, size)]
    for n in chunks:
        shards = [(low, Shard.local_shard_size_and_offset(high - low, n, k)) for low, high in pieces for k in range(n)]
        pieces = [(low + offset, low + offset + length) for low, (length, offset) in shards]
    return pieces
