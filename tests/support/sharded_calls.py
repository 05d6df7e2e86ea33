"""What tests/test_dtensor.py runs in every one of four processes: the ops on DTensors and on plain tensors.

The cases run one after the other in the same processes: what a call leaves behind, such as a cache, is there for the
next.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import stgridpool_kernels as stgp  # before torch.distributed.tensor: the rules are registered when that is imported

CASES: dict[str, Callable[[], None]] = {}
WORLD = 4


def run(rank: int, folder: str) -> None:
    """One process: runs every case, and leaves a file with what went wrong in each (None for nothing)."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(minutes=10),
    )
    outcomes: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as examples/sharded.py, which says why


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


# ---- helpers ----


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mesh(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (WORLD,))


def shard(x: Tensor, on: Any, *dims: int | None) -> Any:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return distribute_tensor(x, on, [Replicate() if dim is None else Shard(dim) for dim in dims])


@contextlib.contextmanager
def communication(expected: bool) -> Iterator[None]:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        yield
    assert (mode.get_total_counts() > 0) == expected, (mode.get_total_counts(), dict(mode.get_comm_counts()))


def same(sharded: Any, expected: Tensor) -> None:
    assert sharded.shape == expected.shape
    assert sharded.dtype == expected.dtype
    whole = sharded.full_tensor()
    assert torch.equal(whole, expected), (whole - expected).abs().max()


def compare(name: str, x: Tensor, on: Any, dims: tuple, *, communicates: bool, placed: tuple | None = None, **given):
    """Forward and backward, through the op and the function, bitwise; with grad, without, in inference mode."""
    from torch.distributed.tensor import Replicate, Shard

    op, function = getattr(torch.ops.stgp, name), getattr(stgp, name)
    plain = x.clone().requires_grad_()
    expected = op(plain, **given)
    grad = tokens(*expected.shape, seed=1, dtype=expected.dtype)
    expected.backward(grad)
    wanted = tuple(Replicate() if dim is None else Shard(dim) for dim in (dims if placed is None else placed))
    for call in (op, function):
        sharded = shard(x, on, *dims)
        before = sharded.to_local().clone()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), communication(communicates):
                out = call(sharded, **given)
            assert tuple(out.placements) == wanted, out.placements
            same(out, expected.detach())
        leaf = sharded.detach().requires_grad_()
        with communication(communicates):
            out = call(leaf, **given)
        assert tuple(out.placements) == wanted
        same(out.detach(), expected.detach())
        given_grad = shard(grad, on, *(dims if placed is None else placed))
        with communication(communicates):
            out.backward(given_grad)
        assert leaf.grad.placements == leaf.placements
        same(leaf.grad, plain.grad)
        assert torch.equal(sharded.to_local(), before)


# ---- cases ----

OPS = ("grid_pool", "temporal_grid", "norm_pool", "token_norm")


@case
def the_batch() -> None:
    on = mesh()
    for name in OPS:
        for batch in (8, 5, 2):  # even; pieces of 2, 2, 1 and 0; fewer than processes
            compare(name, tokens(batch, 9, 5, 7, 16), on, (0,), communicates=False)


@case
def frames_at_segment_borders() -> None:
    on = mesh()
    for name in OPS:
        compare(name, tokens(128, 4, 3, 16), on, (0,), communicates=False)
        compare(name, tokens(2, 128, 4, 3, 16), on, (1,), communicates=False)
    for sampling in ("first", "last"):
        for frames in (104, 96, 40):  # the last piece is shorter, or there is none for the last processes
            arguments = {"sampling": sampling, "frame_strides": (2, 4)}
            if frames == 96:
                arguments["frame_strides"] = (2,)
            aligned = frames != 104  # pieces of 26 frames are not whole segments
            placed = (0,) if aligned else (None,)
            if frames == 40:  # pieces of 10 frames neither
                aligned, placed = False, (None,)
            compare(
                "grid_pool", tokens(frames, 4, 3, 8), on, (0,), communicates=not aligned, placed=placed, **arguments
            )


@case
def a_shorter_last_piece() -> None:
    # 4 processes, pieces of 16, 16, 16 and 8 frames: segments of 8, and of 16 whose last one is incomplete in both
    compare("grid_pool", tokens(56, 4, 3, 8), mesh(), (0,), communicates=True, placed=(None,), frame_strides=(2, 4))
    compare("grid_pool", tokens(61, 4, 3, 8), mesh(), (0,), communicates=False, frame_strides=(2, 4), sampling="first")
    # and pieces of 16, 16, 16 and 16, of which strides that do not divide the whole take other frames
    compare("grid_pool", tokens(63, 4, 3, 8), mesh(), (0,), communicates=True, placed=(None,), frame_strides=(2, 4))


@case
def frames_anywhere_without_gridding() -> None:
    on = mesh()
    for frames in (10, 3):
        for name in ("norm_pool", "token_norm"):
            compare(name, tokens(frames, 5, 7, 8), on, (0,), communicates=False)
            compare(name, tokens(2, frames, 5, 7, 8), on, (1,), communicates=False)
        compare("grid_pool", tokens(frames, 5, 7, 8), on, (0,), communicates=False, frame_strides=())


@case
def two_mesh_dimensions() -> None:
    on = mesh(2, 2)
    for name in OPS:
        compare(name, tokens(3, 64, 4, 3, 8), on, (0, 1), communicates=False)
        compare(name, tokens(3, 64, 4, 3, 8), on, (1, 0), communicates=False)
        compare(name, tokens(128, 4, 3, 8), on, (0, 0), communicates=False)
        compare(name, tokens(3, 64, 4, 3, 8), on, (None, 1), communicates=False)
    # 96 = 48 + 48: not for both; the batch takes what the frames cannot
    compare("grid_pool", tokens(4, 96, 4, 3, 8), on, (0, 1), communicates=True, placed=(0, 0))
    compare("grid_pool", tokens(3, 96, 4, 3, 8), on, (0, 1), communicates=True, placed=(0, None))


@case
def packed_videos() -> None:
    on = mesh(2, 2)
    x = tokens(64, 4, 3, 8)
    for counts in ([32, 32], [16, 16, 0, 32], [10, 22, 32], [64]):
        compare("grid_pool", x, on, (0, None), communicates=False, frame_counts=counts)
        compare("temporal_grid", x, on, (None, None), communicates=False, frame_counts=counts)
    compare("grid_pool", x, on, (0, None), communicates=True, placed=(None, None), frame_counts=[31, 33])


@case
def a_mesh_of_some_processes() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    on = DeviceMesh("cpu", [0, 1])
    for name in OPS:
        counts = {"frame_counts": [32, 32]} if name in ("grid_pool", "temporal_grid") else {}
        for x, arguments in ((tokens(64, 4, 3, 8), {}), (tokens(64, 4, 3, 8), counts), (tokens(3, 16, 4, 3, 8), {})):
            plain = x.clone().requires_grad_()
            expected = getattr(stgp, name)(plain, **arguments)
            grad = tokens(*expected.shape, seed=1)
            expected.backward(grad)
            leaf, grad_sharded = shard(x, on, 0).requires_grad_(), shard(grad, on, 0)
            with communication(False):
                result = getattr(stgp, name)(leaf, **arguments)
                result.backward(grad_sharded)
            assert result.shape == expected.shape
            if on.get_coordinate() is None:
                assert result.to_local().numel() == leaf.grad.to_local().numel() == 0
            else:
                same(result.detach(), expected.detach())
                same(leaf.grad, plain.grad)


@case
def rows_columns_and_channels_are_redistributed() -> None:
    on = mesh()
    for name in OPS:
        for dim in (2, 3, 4):
            compare(name, tokens(4, 16, 8, 4, 8), on, (dim,), communicates=True, placed=(0,))
        compare(name, tokens(128, 8, 4, 8), on, (3,), communicates=True, placed=(0,))
    compare("grid_pool", tokens(16, 8, 4, 8), on, (3,), communicates=True, placed=(None,))


@case
def partial_sums_are_added_first() -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    on = mesh()
    parts = [tokens(9, 4, 3, 8, seed=rank) for rank in range(WORLD)]
    leaf = DTensor.from_local(parts[dist.get_rank()], on, [Partial()]).detach().requires_grad_()
    whole = leaf.detach().full_tensor().requires_grad_()
    expected = stgp.grid_pool(whole)
    expected.sum().backward()
    with communication(True):
        out = stgp.grid_pool(leaf)
    same(out.detach(), expected.detach())
    out.backward(shard(torch.ones_like(expected), on, None))
    assert leaf.grad.placements == (Replicate(),)
    same(leaf.grad, whole.grad)


@case
def calls_that_differ_in_one_argument() -> None:
    on = mesh()
    x = tokens(128, 5, 7, 8)
    changes = [
        {"ceil_mode": True},
        {"count_include_pad": False, "padding": [1, 1]},
        {"padding": [1, 1]},
        {"stride": [1, 1]},
        {"output_size": [2, 3]},
        {"kernel_size": [3, 2]},
        {"temperature": 2.0},
        {"norm_type": 3.0},
        {"normalize_norm": False},
        {"sampling": "first"},
        {"resize": "bilinear"},
        {"frame_strides": [2]},
        {"frame_strides": []},
        {"grid_shape": [1, 2]},
        {"frame_counts": [32, 96]},
    ]
    for arguments in [{}, *changes, {}, *reversed(changes)]:
        compare("grid_pool", x, on, (0,), communicates=False, **arguments)
    of_op = {"norm_pool": changes[:9], "temporal_grid": changes[9:], "token_norm": changes[7:9]}
    for name, its_changes in of_op.items():
        for arguments in [{}, *its_changes, {}]:
            compare(name, x, on, (0,), communicates=False, **arguments)
    # and one whose placement depends on a string: 63 frames
    for sampling in ("last", "first", "last"):
        first = sampling == "first"
        placed = (0,) if first else (None,)
        compare(
            "grid_pool",
            tokens(63, 4, 3, 8),
            on,
            (0,),
            communicates=not first,
            placed=placed,
            frame_strides=[2],
            sampling=sampling,
        )


@case
def out() -> None:
    on = mesh()
    x = tokens(8, 9, 4, 6, 8)
    result = shard(torch.zeros(8, 9, 2, 3, 8), on, 0)
    sharded = shard(x, on, 0)
    with communication(False):
        assert stgp.grid_pool(sharded, out=result) is result
    same(result, stgp.grid_pool(x))
    for wrong, message in (
        (torch.zeros(8, 9, 2, 3, 8), "out must be a DTensor"),
        (shard(torch.zeros(8, 9, 2, 3, 8), on, 1), "out must be on the mesh of x with placements"),
        (shard(torch.zeros(8, 9, 2, 2, 8), on, 0), "out must have shape"),
    ):
        raises(
            ValueError if wrong.__class__ is not Tensor else TypeError,
            message,
            lambda wrong=wrong: stgp.grid_pool(shard(x, on, 0), out=wrong),
        )
    raises(TypeError, "x must be a DTensor", lambda: stgp.grid_pool(x, out=result))


@case
def bad_input_is_refused_before_anything_is_sent() -> None:
    on = mesh()
    x, of_rank_3 = shard(tokens(64, 4, 3, 8), on, 3), shard(tokens(4, 3, 8), on, 0)
    with communication(False):
        raises(ValueError, "padding must be at most half", lambda: stgp.grid_pool(x, padding=2))
        raises(ValueError, "frame_counts must sum to T = 64", lambda: stgp.grid_pool(x, frame_counts=[3]))
        raises(ValueError, "sampling must be one of", lambda: stgp.grid_pool(x, sampling="middle"))
        raises(ValueError, "x must have shape", lambda: stgp.norm_pool(of_rank_3))


@case
def uneven_local_tensors_are_refused() -> None:
    from torch.distributed.tensor import DTensor, Shard

    local = tokens((8, 40, 8, 8)[dist.get_rank()], 4, 3, 8)
    x = DTensor.from_local(
        local, mesh(), [Shard(0)], run_check=False, shape=torch.Size((64, 4, 3, 8)), stride=(96, 24, 8, 1)
    )
    raises(ValueError, "x must be sharded evenly, as torch.chunk cuts", lambda: stgp.grid_pool(x))


@case
def a_module_trains() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    on = mesh()
    x, weight = tokens(8, 16, 4, 4, 8, dtype=torch.float64), tokens(8, 8, seed=2, dtype=torch.float64)
    gradients = []
    for sharded in (False, True):
        w = distribute_tensor(weight, on, [Replicate()]) if sharded else weight.clone()
        w.requires_grad_()
        projected = (distribute_tensor(x, on, [Shard(0)]) if sharded else x) @ w
        stgp.GridPool(frame_strides=(2,))(projected).square().sum().backward()
        gradients.append(w.grad.full_tensor() if sharded else w.grad)
    torch.testing.assert_close(*gradients)  # a sum over processes: another order of additions


@case
def compiled() -> None:
    on = mesh()
    x = tokens(8, 16, 4, 4, 8)
    call = torch.compile(lambda t: torch.ops.stgp.grid_pool(t, ceil_mode=True) * 2, backend="aot_eager", fullgraph=True)
    same(call(shard(x, on, 0)), stgp.grid_pool(x, ceil_mode=True) * 2)
    plain, leaf = x.clone().requires_grad_(), shard(x, on, 0).requires_grad_()
    (stgp.grid_pool(plain, ceil_mode=True) * 2).sum().backward()
    call(leaf).sum().backward()
    same(leaf.grad, plain.grad)


def raises(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()
