"""The CUDA kernels emulated on the CPU: what the shared suite does not ask, and that the emulation sees mistakes."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess

import pytest
import torch

from stgridpool_kernels import grid_plan
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan.tables import plan_tables
from tests.support import cuda_emulation
from tests.support.pairwise import pairwise
from tests.support.tolerance import assert_accurate, assert_gradient_accurate, assert_same_bits

pytestmark = pytest.mark.needs("compiler")

DTYPES = cuda_emulation.DTYPES
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NUM_STEPS = 16
"""The place in tables of the number of stages of the fused form, which is 0 if there is no such form."""


def tokens(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(2).to(dtype)


def pooled(x, general=False, norm_type=2.0, normalize_norm=True, norm_channels=None, cells=0, **arguments):
    """grid_pool of one video, by the fused form where there is one, or by the general form."""
    T, H, W, C = x.shape
    plan = grid_plan(arguments.pop("frame_counts", [T]), H, W, **arguments)
    tables = plan_tables(plan)
    if general:
        assert tables[NUM_STEPS] > 0
        tables = tables[:]
        tables[NUM_STEPS] = 0
    out = torch.full((T, *plan.pooled_size, C), math.nan, dtype=x.dtype)
    cuda_emulation.run(
        "grid_pool", x, tables, Weighting(1.0, norm_type, normalize_norm, norm_channels or C), out, cells=cells
    )
    return out


def misaligned(x):
    return x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape).copy_(x)


SIZES = [(5, 7), (4, 6), (5, 6), (4, 7), (9, 3), (1, 2), (2, 9)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


@dtypes
@pytest.mark.parametrize(
    ("size", "ceil_mode"),
    [(size, ceil_mode) for size in SIZES for ceil_mode in (False, True) if ceil_mode or size[0] > 1],
)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_fused_and_general_kernels_give_the_same_bits(norm_type, ceil_mode, size, dtype):
    """So that a video gives the same bits alone and packed with others, even if only one of the two can be fused."""
    x = tokens(17, *size, 72, dtype=dtype)
    for frame_strides in ((1, 2), (2, 4)):
        arguments = {"frame_strides": frame_strides, "ceil_mode": ceil_mode, "norm_type": norm_type}
        assert_same_bits(pooled(x, **arguments), pooled(x, general=True, **arguments))


@dtypes
@sizes
def test_memory_layout_does_not_change_a_bit(size, dtype):
    x = tokens(16, *size, 64, dtype=dtype)
    strided = x.movedim(-1, -3).contiguous().movedim(-3, -1)
    for arguments in ({"ceil_mode": True}, {"kernel_size": 1}, {"ceil_mode": True, "norm_type": 1.0}):
        expected = pooled(x, **arguments)
        assert_same_bits(pooled(misaligned(x), **arguments), expected)
        assert_same_bits(pooled(strided, **arguments), expected)


@dtypes
@pytest.mark.parametrize("size", [(5, 13), (4, 13), (5, 12), (4, 12)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_cuts_of_rows_change_no_bit(size, dtype):
    """A block may walk any number of cells: a column that it does not carry is summed in the same order."""
    x = tokens(9, *size, 72, dtype=dtype)
    x[0], x[1, 1, size[1] // 2] = -0.0, math.nan
    arguments = {"frame_strides": (1, 2), "frame_counts": [8, 1], "ceil_mode": True}
    expected = pooled(x, **arguments)
    for cells in (1, 2, 4, 5, 7, 99):
        assert_same_bits(pooled(x, cells=cells, **arguments), expected)


@dtypes
def test_a_video_alone_is_fused_and_packed_is_not(dtype):
    """3 × 1 grids have no fused form, and a video that is too short for them has no grid."""
    x = tokens(40, 5, 7, 24, dtype=dtype)
    arguments = {"frame_strides": (2, 4), "grid_shape": (2, 2, 3, 1), "ceil_mode": True}
    packed = pooled(x, frame_counts=[31, 9], **arguments)
    assert_same_bits(packed[31:], pooled(x[31:], **arguments))


def over_channels(every, few):
    """Every number of channels in one dtype, a few in every dtype: a vec has 8 values of 16 bits, or 4 of 32."""
    rows = [(torch.bfloat16, C) for C in every] + [
        (dtype, C) for dtype in DTYPES if dtype != torch.bfloat16 for C in few
    ]
    return pytest.mark.parametrize(("dtype", "C"), rows, ids=lambda value: str(value).removeprefix("torch."))


@over_channels([8, 512, 520, 1152, 3584, 4096, 8192, 8200], [520, 3584, 8200])
def test_numbers_of_channels(C, dtype):
    """One warp, several, blocks that are not full, and tokens that no block holds."""
    x = tokens(8, 3, 5, C, dtype=dtype)
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    assert_accurate(pooled(x, **arguments), "grid_pool", x, **arguments)


@dtypes
@pytest.mark.parametrize(("C", "norm_channels"), [(1104, 520), (4096, 512), (1160, 1153), (8200, 5000)])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 0.5])
def test_norms_of_some_channels_are_summed_as_those_of_a_slice(norm_type, C, norm_channels, dtype):
    """This holds for blocks of other numbers of warps, either access to memory, and fused and general kernels."""
    x = tokens(4, 3, 2, C, dtype=dtype)
    arguments = {"frame_strides": (1,), "ceil_mode": True, "norm_type": norm_type}
    found = pooled(x, norm_channels=norm_channels, **arguments)
    assert_same_bits(found[..., :norm_channels], pooled(x[..., :norm_channels], **arguments))


def scratch_bytes(x, general=False, norm_channels=None, **arguments):
    """Return the bytes of scratch that grid_pool takes for one video, which differ between the two forms."""
    T, H, W, C = x.shape
    tables = plan_tables(grid_plan([T], H, W, **arguments))
    words = (ctypes.c_int32 * len(tables))(*tables)
    words[NUM_STEPS] *= not general
    call = cuda_emulation.Call(DTYPES.index(x.dtype), T, C, norm_type=2.0, norm_channels=norm_channels or C)
    return cuda_emulation.load().stgp_scratch_bytes(0, words, ctypes.byref(call))


@dtypes
@pytest.mark.parametrize("size", [(5, 7), (4, 6)], ids=["odd", "even"])
def test_channels_that_no_block_holds(size, dtype):
    """Such channels are pooled when the weights are known, if the norm runs over channels that a block holds."""
    x = tokens(9, *size, 8216, dtype=dtype)
    x[2, 1, 1], x[3, 2, 2, 8210] = -0.0, math.nan
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    assert scratch_bytes(x, **arguments) == scratch_bytes(x, general=True, **arguments)
    arguments["norm_channels"] = 520
    assert scratch_bytes(x, **arguments) != scratch_bytes(x, general=True, **arguments)
    expected = pooled(x, general=True, **arguments)
    for cells in (0, 1, 3):
        assert_same_bits(pooled(x, cells=cells, **arguments), expected)
    assert_same_bits(pooled(misaligned(x), **arguments), expected)


@dtypes
@pytest.mark.parametrize("C", [13, 16])
def test_norms_of_some_channels_of_tokens_with_gaps(C, dtype):
    """Vectors of 16 bytes fit the norm and the strides of x, and the tokens of summaries only if C has whole ones."""
    x = tokens(9, 5, 4, 16, dtype=dtype)[..., :C]
    arguments = {"frame_strides": (1, 2), "kernel_size": 2, "norm_channels": 8}
    for norm_type in (2.0, 3.0):
        expected = pooled(x.contiguous(), norm_type=norm_type, **arguments)
        assert_same_bits(pooled(x, norm_type=norm_type, **arguments), expected)
        assert_same_bits(pooled(x, norm_type=norm_type, general=norm_type == 2.0, **arguments), expected)


@pytest.mark.parametrize("op", ["grid_pool", "temporal_grid", "grid_pool_backward", "temporal_grid_backward"])
@pytest.mark.parametrize("arguments", [{}, {"grid_shape": (1, 2)}], ids=["fused", "general"])
def test_scratch_beyond_64_bits(arguments, op):
    """The size of scratch stays at the largest one, which no allocation gives, and does not wrap to a small one."""
    tables = plan_tables(grid_plan([8], 4, 4, frame_strides=(1,), **arguments), gradient=True)
    words = (ctypes.c_int32 * len(tables))(*tables)
    sizes = []
    for C in (8, 1 << 40, 1 << 58, 1 << 60, 1 << 62, (1 << 63) - 1):
        call = cuda_emulation.Call(dtype=2, T=8, C=C, norm_type=2.0)
        number = cuda_emulation.OPS.index(op)
        sizes.append(cuda_emulation.load().stgp_scratch_bytes(number, words, ctypes.byref(call)))
    assert sizes == sorted(sizes)
    assert 1 << 40 < sizes[1] < sizes[-1] == (1 << 63) - 64


@dtypes
def test_large_windows(dtype):
    """More positions than weights that are in shared memory at a time, some of them padding."""
    x = tokens(2, 40, 40, 16, dtype=dtype)
    arguments = {"frame_strides": (), "kernel_size": 41, "padding": 20, "stride": 9}
    assert_accurate(pooled(x, **arguments), "grid_pool", x, **arguments)


@dtypes
def test_long_walks(dtype):
    x = tokens(4, 3, 41, 40, dtype=dtype)
    for arguments in ({"frame_strides": (1,)}, {"frame_strides": (1,), "ceil_mode": True}, {"frame_strides": ()}):
        assert_accurate(pooled(x, **arguments), "grid_pool", x, **arguments)


# ---- gradients ----


def gradient(x, grad, general=False, norm_type=2.0, norm_channels=None, **arguments):
    """Return the gradient of grid_pool of one video, by the fused form where there is one, or by the general form."""
    T, H, W, C = x.shape
    plan = grid_plan(arguments.pop("frame_counts", [T]), H, W, **arguments)
    tables = plan_tables(plan, gradient=True)
    if general:
        assert tables[NUM_STEPS] > 0
        tables = tables[:]
        tables[NUM_STEPS] = 0
    out = torch.full(x.shape, math.nan, dtype=x.dtype)
    cuda_emulation.run(
        "grid_pool_backward", x, tables, Weighting(1.0, norm_type, True, norm_channels or C), out, grad=grad
    )
    return out


def gradient_of(x, **arguments):
    """Random numbers in the shape of what is pooled."""
    plan = grid_plan([len(x)], *x.shape[1:3], **arguments)
    return torch.randn(len(x), *plan.pooled_size, x.shape[3], generator=torch.Generator().manual_seed(1)).to(x.dtype)


@pytest.mark.parametrize(("size", "norm_type", "dtype"), pairwise(SIZES, [1.0, 2.0, math.inf], DTYPES))
def test_fused_and_general_gradients_are_accurate(norm_type, size, dtype):
    x = tokens(17, *size, 72, dtype=dtype)
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    grad = gradient_of(x, **arguments)
    for general in (False, True):
        found = gradient(x, grad, general, norm_type, **arguments)
        assert_gradient_accurate(found, "grid_pool", x, grad, norm_type=norm_type, **arguments)


@over_channels([8, 512, 520, 3584, 8200], [520])
def test_gradients_of_numbers_of_channels(C, dtype):
    x = tokens(8, 3, 5, C, dtype=dtype)
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    grad = gradient_of(x, **arguments)
    assert_gradient_accurate(gradient(x, grad, **arguments), "grid_pool", x, grad, **arguments)


@dtypes
def test_a_gradient_alone_and_packed(dtype):
    """A video that is too short for the grids that have no fused form."""
    x = tokens(40, 5, 7, 24, dtype=dtype)
    arguments = {"frame_strides": (2, 4), "grid_shape": (2, 2, 3, 1), "ceil_mode": True}
    grad = gradient_of(x, **arguments)
    packed = gradient(x, grad, frame_counts=[31, 9], **arguments)
    assert_same_bits(packed[31:], gradient(x[31:], grad[31:], **arguments))


@dtypes
@pytest.mark.parametrize("general", [False, True])
def test_memory_layout_does_not_change_a_bit_of_a_gradient(general, dtype):
    x = tokens(16, 5, 7, 64, dtype=dtype)
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    grad = gradient_of(x, **arguments)
    expected = gradient(x, grad, general, **arguments)
    assert_same_bits(gradient(misaligned(x), grad, general, **arguments), expected)
    assert_same_bits(gradient(x, misaligned(grad), general, **arguments), expected)
    strided = x.movedim(-1, -3).contiguous().movedim(-3, -1)
    assert_same_bits(gradient(strided, grad, general, **arguments), expected)


# ---- what the emulation sees ----

BODIES = {
    "__syncthreads();": None,
    "if (threadIdx.x != 40) __syncthreads();": "some threads wait at a barrier that others never reach",
    "if (threadIdx.x % 2) __syncthreads(); else __shfl_sync(~0u, 1.0f, 0);": (
        "not all lanes of a warp reached the same exchange"
    ),
    "__shfl_sync(~0u, 1.0f, 40);": "an exchange with a lane that does not exist",
    # shared memory holds nothing of the block before
    "if (!std::isnan(memory[threadIdx.x])) abort(); memory[threadIdx.x] = 1;": None,
    # warps do not always run in the same order
    "memory[threadIdx.x] = 1; __syncthreads();"
    "if (threadIdx.x / 32 == 1) memory[0] = 2; else if (memory[0] == 2) __syncthreads();": "some threads wait",
}
"""Bodies of a kernel, and the message with which the emulation ends each of them; None where it is right."""

KERNEL = """
#include <cstdlib>
#include "cuda_runtime.h"
struct Number { int number; };
static __shared__ float memory[64];
__global__ void kernel(Number body) {
  switch (body.number) { %s }
}
int main(int, char** arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  return cudaLaunchKernelEx(&config, kernel, Number{atoi(arguments[1])});
}
"""

FUNCTIONS = """
#include "../../../csrc/grid_pool.h"
namespace stgp::cuda {
int64_t scratch_bytes(Op, const int32_t*, const Call&) { return 0; }
int grid_pool(const int32_t*, const int32_t*, const Call&, void*) { return 0; }
int temporal_grid(const int32_t*, const int32_t*, const Call&, void*) { return 0; }
int grid_pool_backward(const int32_t*, const int32_t*, const Call&, void*) { return 0; }
int temporal_grid_backward(const int32_t*, const int32_t*, const Call&, void*) { return 0; }
int token_norm(int64_t, int64_t, int64_t, const Call&, void*) { return 0; }
}
"""


def test_threads_that_do_not_meet(tmp_path):
    headers = tmp_path / cuda_emulation.HEADERS.relative_to(cuda_emulation.ROOT)
    shutil.copytree(cuda_emulation.HEADERS, headers)
    (tmp_path / "csrc").mkdir()
    shutil.copy(cuda_emulation.ROOT / "csrc" / "grid_pool.h", tmp_path / "csrc")
    cases = "".join(f"case {number}: {{ {body} break; }}\n" for number, body in enumerate(BODIES))
    (headers / "kernel.cpp").write_text(KERNEL % cases)
    (headers / "functions.cpp").write_text(FUNCTIONS)
    compiler = cuda_emulation.find_compiler()
    subprocess.run([compiler, "-std=c++17", "-w", *headers.glob("*.cpp"), "-o", tmp_path / "kernel"], check=True)
    for number, (body, message) in enumerate(BODIES.items()):
        done = subprocess.run([tmp_path / "kernel", str(number)], capture_output=True, text=True)
        assert (done.returncode == 0) == (message is None), body
        assert (message or "") in done.stderr, body
