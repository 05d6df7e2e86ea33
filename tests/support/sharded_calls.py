"""Cases of tests/test_dtensor.py, which run in each of four processes: the ops on DTensors and on plain tensors.

The cases run one after the other in the same processes, so later cases see state of earlier ones, such as caches. The
first case must run before torch.distributed.tensor is imported.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import stgridpool_kernels as stgp

CASES: dict[str, Callable[[], None]] = {}
WORLD = 4
OPS = ("grid_pool", "temporal_grid", "norm_pool", "token_norm")


def run(rank: int, folder: str) -> None:
    """Run every case in one process; write a file with the traceback of each, None if it passed."""
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
        except (Exception, pytest.fail.Exception):  # pytest.fail.Exception is no Exception
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # examples/sharded.py gives the reason


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


# ---- helpers ----


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random tokens that are the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mesh(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (WORLD,))


def placements(dims: tuple[int | None, ...]) -> tuple[Any, ...]:
    """Return Shard(dim) for every mesh dimension, Replicate() for None."""
    from torch.distributed.tensor import Replicate, Shard

    return tuple(Replicate() if dim is None else Shard(dim) for dim in dims)


def shard(x: Tensor, on: Any, *dims: int | None) -> Any:
    """Return x as a DTensor; every process takes its shard from its own copy of x, without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, on, placements(dims), src_data_rank=None)


@contextlib.contextmanager
def no_communication() -> Iterator[None]:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        yield
    assert mode.get_total_counts() == 0, mode.get_comm_counts()


def same(sharded: Any, expected: Tensor) -> None:
    """Check that `sharded` is a DTensor of `expected`, and that this process holds its shard bit by bit."""
    from torch.distributed.tensor import distribute_tensor

    assert (sharded.shape, sharded.stride(), sharded.dtype) == (expected.shape, expected.stride(), expected.dtype)
    own = distribute_tensor(expected, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()
    assert torch.equal(sharded.to_local(), own)


def compare(name: str, x: Tensor, on: Any, dims: tuple[int | None, ...], **given: Any) -> None:
    """Check that calls with and without gradient, and the backward, equal one process bit by bit and send nothing."""
    function = getattr(stgp, name)
    plain = x.clone().requires_grad_()
    expected = function(plain, **given)
    grad = tokens(*expected.shape, seed=1, dtype=expected.dtype)
    expected.backward(grad)
    leaf = shard(x, on, *dims).requires_grad_()
    before = leaf.to_local().clone()
    with no_communication():
        with torch.no_grad():
            quiet = function(leaf, **given)
        out = function(leaf, **given)
        out.backward(shard(grad, on, *dims))
    assert quiet.placements == out.placements == leaf.grad.placements == leaf.placements == placements(dims)
    for result in (quiet, out.detach()):
        same(result, expected.detach())
    same(leaf.grad, plain.grad)
    assert torch.equal(leaf.to_local(), before)


def refused(
    name: str, x: Tensor, on: Any, dims: tuple[int | None, ...], works: list[tuple[int | None, ...]], **given: Any
) -> None:
    """Check that x is refused before anything is sent, and that the placements offered by the message work."""
    function = getattr(stgp, name)
    sharded = shard(x, on, *dims)
    offered = [placements(choice) for choice in works]
    with no_communication():
        raises(
            ValueError,
            f"x has placements {placements(dims)}, at which {name} cannot be computed shard by shard; it can be at "
            f"{' or '.join(map(str, offered))}: call x.redistribute(placements={offered[0]})",
            lambda: function(sharded, **given),
        )
    for choice in offered:
        same(function(sharded.redistribute(placements=choice), **given), function(x, **given))


def raises(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()


# ---- cases ----


@case
def the_rules_are_imported_by_the_first_call_on_a_dtensor() -> None:
    rules, slow = "stgridpool_kernels.dtensor", "torch.distributed.tensor"
    x = tokens(8, 16, 4, 4, 8)
    expected = stgp.grid_pool(torch.nn.Parameter(x), ceil_mode=True)
    assert rules not in sys.modules
    assert slow not in sys.modules
    on = mesh()
    sharded = shard(x, on, 0)
    assert slow in sys.modules
    assert torch.equal(stgp.grid_pool(x, ceil_mode=True), expected)
    assert rules not in sys.modules
    raises(NotImplementedError, "sharding strategy", lambda: torch.ops.stgp.grid_pool(sharded))  # documented

    def call(t: Tensor) -> Tensor:
        return stgp.grid_pool(t, ceil_mode=True) * 2

    plain, leaf = x.clone().requires_grad_(), sharded.detach().requires_grad_()
    call(plain).sum().backward()
    one_compiles = dist.get_rank() == 0  # one process is enough, since calls send nothing and compiling takes seconds
    if one_compiles:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    same(call(sharded), expected.detach() * 2)
    assert rules in sys.modules
    call(leaf).sum().backward()
    same(leaf.grad, plain.grad)
    if one_compiles:
        pool = torch.compile(stgp.grid_pool, backend="aot_eager", fullgraph=True)
        for frames in (128, 256):  # the second number of frames is a symbol, until the cut fixes it
            y = tokens(frames, 4, 3, 8)
            same(pool(shard(y, on, 0)), stgp.grid_pool(y))


@case
def torch_ops() -> None:
    on = mesh()
    for name in OPS:
        x = tokens(5, 9, 5, 7, 16)
        expected = getattr(stgp, name)(x)
        op = getattr(torch.ops.stgp, name)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode(), no_communication():
                out = op(shard(x, on, 0))
            same(out, expected)
        with mode(), no_communication():
            assert op(shard(x, on, 0).requires_grad_()).requires_grad


@case
def the_batch() -> None:
    on = mesh()
    for name in OPS:
        for batch in (8, 5, 2):  # even; pieces of 2, 2, 1 and 0; fewer than processes
            x = tokens(batch, 9, 5, 7, 16)
            compare(name, x, on, (0,))
            assert torch.equal(getattr(stgp, name)(shard(x, on, 0)).full_tensor(), getattr(stgp, name)(x))


@case
def replicated() -> None:
    for name in OPS:
        compare(name, tokens(9, 5, 7, 16), mesh(), (None,))


@case
def frames_at_segment_borders() -> None:
    on = mesh()
    for name in OPS:
        compare(name, tokens(128, 4, 3, 16), on, (0,))
        compare(name, tokens(2, 128, 4, 3, 16), on, (1,))
    for sampling in ("first", "last"):
        compare("grid_pool", tokens(96, 4, 3, 8), on, (0,), frame_strides=(2,), sampling=sampling)
        for frames in (104, 40):  # pieces of 26 and of 10 frames are not whole segments
            x = tokens(frames, 4, 3, 8)
            refused("grid_pool", x, on, (0,), [(None,)], frame_strides=(2, 4), sampling=sampling)
            refused("temporal_grid", x[None], on, (1,), [(None,)], frame_strides=(2, 4), sampling=sampling)


@case
def a_shorter_last_piece() -> None:
    # 4 processes, pieces of 16, 16, 16 and 8 frames: segments of 8, and of 16 whose last one is incomplete in both
    refused("grid_pool", tokens(56, 4, 3, 8), mesh(), (0,), [(None,)], frame_strides=(2, 4))
    compare("grid_pool", tokens(61, 4, 3, 8), mesh(), (0,), frame_strides=(2, 4), sampling="first")
    # and pieces of 16, 16, 16 and 15, where strides that do not divide the whole take other frames
    refused("grid_pool", tokens(63, 4, 3, 8), mesh(), (0,), [(None,)], frame_strides=(2, 4))


@case
def frames_anywhere_without_gridding() -> None:
    on = mesh()
    for frames in (10, 3):
        for name in ("norm_pool", "token_norm"):
            compare(name, tokens(frames, 5, 7, 8), on, (0,))
            compare(name, tokens(2, frames, 5, 7, 8), on, (1,))
        compare("grid_pool", tokens(frames, 5, 7, 8), on, (0,), frame_strides=())


@case
def two_mesh_dimensions() -> None:
    on = mesh(2, 2)
    for name in OPS:
        compare(name, tokens(3, 64, 4, 3, 8), on, (0, 1))
        compare(name, tokens(3, 64, 4, 3, 8), on, (1, 0))
        compare(name, tokens(128, 4, 3, 8), on, (0, 0))
        compare(name, tokens(3, 64, 4, 3, 8), on, (None, 1))
    # pieces of 48 of 96 frames cannot be gridded alone; the batch can be sharded over both mesh dimensions
    refused("grid_pool", tokens(4, 96, 4, 3, 8), on, (0, 1), [(0, 0), (0, None), (None, None)])
    refused("grid_pool", tokens(3, 96, 4, 3, 8), on, (0, 1), [(0, None), (None, None)])
    # frames can be sharded over either mesh dimension, but both would give pieces of 16
    refused("grid_pool", tokens(4, 64, 4, 3, 8), on, (1, 1), [(0, 0), (None, None)])


@case
def packed_videos() -> None:
    on = mesh(2, 2)
    x = tokens(64, 4, 3, 8)
    for counts in ([32, 32], [16, 16, 0, 32], [10, 22, 32], [64]):
        compare("grid_pool", x, on, (0, None), frame_counts=counts)
        compare("temporal_grid", x, on, (None, None), frame_counts=counts)
    refused("grid_pool", x, on, (0, None), [(None, None)], frame_counts=[31, 33])


@case
def a_mesh_of_some_processes() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    on = DeviceMesh("cpu", [0, 1])
    for name in OPS:
        counts = {"frame_counts": [32, 32]} if name in ("grid_pool", "temporal_grid") else {}
        for x, arguments in ((tokens(64, 4, 3, 8), {}), (tokens(64, 4, 3, 8), counts), (tokens(3, 16, 4, 3, 8), {})):
            compare(name, x, on, (0,), **arguments)
            leaf = shard(x, on, 0).requires_grad_()
            out = getattr(stgp, name)(leaf, **arguments)
            out.backward(shard(torch.ones(out.shape), on, None))
            assert leaf.grad.placements == leaf.placements
            if on.get_coordinate() is None:
                assert out.to_local().numel() == leaf.grad.to_local().numel() == 0
    raises(ValueError, "x has placements (Shard(dim=3),)", lambda: stgp.grid_pool(shard(tokens(8, 4, 4, 8), on, 3)))


@case
def rows_columns_and_channels_are_refused() -> None:
    on = mesh()
    for name in OPS:
        everywhere = [(0,), (None,)] if name in ("grid_pool", "temporal_grid") else [(0,), (1,), (None,)]
        for dim in (2, 3, 4):
            refused(name, tokens(4, 16, 8, 4, 8), on, (dim,), everywhere)
        refused(name, tokens(128, 8, 4, 8), on, (3,), [(0,), (None,)])
    refused("grid_pool", tokens(2, 16, 8, 4, 8), on, (4,), [(None,)])
    refused("grid_pool", tokens(64, 8, 4, 8), mesh(2, 2), (0, 3), [(0, None), (None, None)])


@case
def placements_of_other_kinds_are_refused() -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    parts = DTensor.from_local(tokens(9, 4, 3, 8), mesh(), [Partial()])
    strided = DTensor.from_local(tokens(32, 4, 3, 8), mesh(2, 2), [_StridedShard(0, split_factor=2), Shard(0)])
    for x, works in (
        (parts, "(Shard(dim=0),) or (Replicate(),)"),
        (strided, "(Shard(dim=0), Shard(dim=0)) or (Replicate(), Shard(dim=0)) or (Replicate(), Replicate())"),
    ):
        message = f"x has placements {x.placements}, at which norm_pool cannot be computed shard by shard; it can be at"
        with no_communication():
            raises(ValueError, f"{message} {works}: call x.redistribute(", lambda x=x: stgp.norm_pool(x))
        cut = x.redistribute(placements=[Shard(0)] * len(x.placements))
        same(stgp.norm_pool(cut), stgp.norm_pool(x.full_tensor()))


@case
def a_gradient_is_redistributed_to_the_placements_of_x() -> None:
    from torch.distributed.tensor import DTensor, Partial

    on = mesh()
    for name in OPS:
        for dims in ((0,), (None,)):
            plain, leaf = (tokens(5, 9, 4, 3, 8).requires_grad_() for _ in range(2))
            leaf = shard(leaf.detach(), on, *dims).requires_grad_()
            expected, out = (getattr(stgp, name)(x) for x in (plain, leaf))
            grad = tokens(*expected.shape)
            expected.backward(4 * grad)
            out.backward(DTensor.from_local(grad, on, [Partial()]))
            assert leaf.grad.placements == leaf.placements
            same(leaf.grad, plain.grad)


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
        {"norm_channels": 3},
        {"sampling": "first"},
        {"resize": "bilinear"},
        {"frame_strides": [2]},
        {"frame_strides": []},
        {"grid_shape": [1, 2]},
        {"frame_counts": [32, 96]},
    ]
    for arguments in [{}, *changes, {}, *reversed(changes)]:
        compare("grid_pool", x, on, (0,), **arguments)
    of_op = {"norm_pool": changes[:10], "temporal_grid": changes[10:], "token_norm": changes[7:10]}
    for name, its_changes in of_op.items():
        for arguments in [{}, *its_changes, {}]:
            compare(name, x, on, (0,), **arguments)
    # whether 63 frames are refused depends on a string
    x = tokens(63, 4, 3, 8)
    for _ in range(2):
        refused("grid_pool", x, on, (0,), [(None,)], frame_strides=[2], sampling="last")
        compare("grid_pool", x, on, (0,), frame_strides=[2], sampling="first")


@case
def out() -> None:
    on = mesh()
    x = tokens(8, 9, 4, 6, 8)
    result = shard(torch.zeros(8, 9, 2, 3, 8), on, 0)
    sharded = shard(x, on, 0)
    with no_communication():
        assert stgp.grid_pool(sharded, out=result) is result
    same(result, stgp.grid_pool(x))
    result = shard(torch.zeros(8, 9, 2, 3, 8), mesh(2, 2), 0, 0)
    for wrong, kind, message in (
        (torch.zeros(8, 9, 2, 3, 8), TypeError, "out must be a DTensor as x is, got Tensor"),
        (shard(torch.zeros(8, 9, 2, 3, 8), on, 1), ValueError, "out must have the placements of x, (Shard(dim=0),)"),
        (shard(torch.zeros(8, 9, 2, 2, 8), on, 0), ValueError, "out must have shape (8, 9, 2, 3, 8)"),
        (result, ValueError, "out must be on the mesh of x"),
    ):
        raises(kind, message, lambda wrong=wrong: stgp.grid_pool(sharded, out=wrong))
    raises(TypeError, "x must be a DTensor as out is, got Tensor", lambda: stgp.grid_pool(x, out=result))
    some = shard(torch.zeros(8, 9, 2, 2, 8), on, 2)
    raises(ValueError, "x has placements (Shard(dim=2),)", lambda: stgp.grid_pool(shard(x, on, 2), out=some))


@case
def out_on_a_mesh_of_some_processes() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    on = DeviceMesh("cpu", [0, 1])
    x = tokens(3, 9, 4, 6, 8)
    result = shard(torch.zeros(3, 9, 2, 3, 8), on, 0)
    assert stgp.grid_pool(shard(x, on, 0), out=result) is result
    same(result, stgp.grid_pool(x))


@case
def bad_input_is_refused_before_anything_is_sent() -> None:
    on = mesh()
    x, of_rank_3 = shard(tokens(64, 4, 3, 8), on, 3), shard(tokens(4, 3, 8), on, 0)
    with no_communication():
        raises(ValueError, "padding must be at most half", lambda: stgp.grid_pool(x, padding=2))
        raises(ValueError, "frame_counts must sum to T = 64", lambda: stgp.grid_pool(x, frame_counts=[3]))
        raises(ValueError, "norm_channels must be from 1 to C = 8, got 9", lambda: stgp.token_norm(x, norm_channels=9))
        raises(ValueError, "sampling must be one of", lambda: stgp.grid_pool(x, sampling="middle"))
        raises(ValueError, "x must have shape", lambda: stgp.norm_pool(of_rank_3))


@case
def uneven_local_tensors_are_refused() -> None:
    from torch.distributed.tensor import DTensor, Shard

    local = tokens((8, 40, 8, 8)[dist.get_rank()], 4, 3, 8)
    x = DTensor.from_local(local, mesh(), [Shard(0)], shape=torch.Size((64, 4, 3, 8)), stride=(96, 24, 8, 1))
    raises(
        ValueError,
        "x must be sharded evenly, as torch.chunk cuts: of 64 in dimension 0 this process should hold 16, got ",
        lambda: stgp.norm_pool(x),
    )


@case
def another_order_of_mesh_dimensions_is_refused() -> None:
    from torch.distributed.tensor._dtensor_spec import ShardOrderEntry

    x = shard(tokens(64, 4, 3, 8), mesh(2, 2), 0, 0)
    x._spec.shard_order = (ShardOrderEntry(0, (1, 0)),)
    raises(ValueError, "x must be sharded over mesh dimensions in their order", lambda: stgp.norm_pool(x))


@case
def a_module_trains() -> None:
    x, weight = tokens(8, 16, 4, 4, 8, dtype=torch.float64), tokens(8, 8, seed=2, dtype=torch.float64)
    gradients = []
    for sharded in (False, True):
        w = shard(weight, mesh(), None) if sharded else weight.clone()
        w.requires_grad_()
        projected = (shard(x, mesh(), 0) if sharded else x) @ w
        stgp.GridPool(frame_strides=(2,))(projected).square().sum().backward()
        gradients.append(w.grad.full_tensor() if sharded else w.grad)
    torch.testing.assert_close(*gradients)  # the sum over processes has another order of additions
