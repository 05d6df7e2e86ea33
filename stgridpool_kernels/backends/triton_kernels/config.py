"""How a kernel is cut into programs and threads: one short table, nothing is tuned at call time."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Config:
    """tokens, block: rows and channels of a tile. chunks: tiles that cover C. num_warps: of 32 threads."""

    tokens: int
    block: int
    chunks: int
    num_warps: int


@dataclass(frozen=True)
class FusedConfig:
    """How the fused kernel is cut, where a tile is a window of 4 tokens. No choice changes a bit of a result.

    num_warps: of 32 threads. stages: of a walk's pipeline; from 2 on, tokens of later steps are copied to shared memory
    meanwhile. frame_cells, mosaic_cells: the cells that a program walks of a frame of x and of a summary; of a frame,
    None is the whole row if W is odd, so that a column is carried, and 1 if it is even. spread: windows of frames that
    are not sampled are shared out among all launches, to run beside the few programs of a level; else all are in the
    first launch.

    The most registers that a thread of the forward may take, None for as many as the compiler likes: plain_registers
    where nothing is shrunk, even_registers where W is even, odd_registers where it is odd (the last in gradients too).
    """

    num_warps: int
    stages: int = 1
    plain_registers: int | None = None
    even_registers: int | None = None
    odd_registers: int = 128
    frame_cells: int | None = None
    mosaic_cells: int = 1
    spread: bool = False


@dataclass(frozen=True)
class Row:
    """The configuration for tokens of at most `block` values of `bytes` bytes, from compute capability `capability`."""

    block: int
    bytes: int
    capability: tuple[int, int]
    config: FusedConfig
    reason: str


# Every row gives a thread 64 values of its window, in pieces of 8 neighbouring channels: 16 bytes of a 16-bit type.
# A multiprocessor has room for 16 warps at 128 registers a thread, to which walks that carry a column have to be held,
# and for 24 at 80. With 16 warps to a block, one block fits either way. The first row that fits counts.
# Row(block, bytes, capability, FusedConfig(num_warps, stages, plain_registers, even_registers), reason)
ROWS = (
    Row(512, 2, (10, 0), FusedConfig(1, 2), "as for 8.0, but spills at 80 registers: float32 is computed in pairs"),
    Row(1024, 2, (10, 0), FusedConfig(2, 2), "as above"),
    Row(2048, 2, (10, 0), FusedConfig(4, 2), "as above"),
    Row(4096, 2, (10, 0), FusedConfig(8, 2), "as above"),
    Row(512, 2, (8, 0), FusedConfig(1, 2, 80, 80), "one warp: norms need no barrier"),
    Row(1024, 2, (8, 0), FusedConfig(2, 2, 80, 80), "the 6 tokens of a prefetched step take 12 KiB"),
    Row(2048, 2, (8, 0), FusedConfig(4, 2, 80, 80), "a prefetched step takes 24 KiB"),
    Row(4096, 2, (8, 0), FusedConfig(8, 2, 80, 80), "a prefetched step takes 48 KiB, two blocks fit from 100 KiB on"),
    Row(8192, 2, (8, 0), FusedConfig(16), "a block fills the registers, a prefetched step would take 96 KiB"),
    Row(512, 4, (8, 0), FusedConfig(1), "prefetching takes twice the room of 16-bit values: left out until measured"),
    Row(1024, 4, (8, 0), FusedConfig(2), "no prefetching, as above"),
    Row(2048, 4, (8, 0), FusedConfig(4), "no prefetching, as above"),
    Row(4096, 4, (8, 0), FusedConfig(8), "a prefetched step would take 96 KiB"),
    Row(8192, 4, (8, 0), FusedConfig(16), "a prefetched step would take 192 KiB"),
)

MAX_BLOCK = ROWS[-1].block
"""Channels of a token that stay in registers from its norm to its use. Longer tokens are read in chunks, twice."""

TILE = 4 * 4096
"""Values of a tile that holds more than 4 tokens."""


def fused_block(C: int) -> int:
    """Channels of a tile of the fused kernel, which holds all C of a token."""
    return _block(C, MAX_BLOCK)


def fused_config(C: int, value_bytes: int, capability: tuple[int, int]) -> FusedConfig:
    """The configuration of the first row that fits."""
    fits = (row for row in ROWS if row.block >= C and value_bytes <= row.bytes and capability >= row.capability)
    return next(fits).config


def tile_config(C: int, wanted: int) -> Config:
    """For kernels that reduce over the channels of up to `wanted` tokens at once: as many as a tile holds, or 4."""
    block = _block(C, MAX_BLOCK)
    tokens = min(triton.next_power_of_2(wanted), max(4, TILE // block))
    return Config(tokens, block, triton.cdiv(C, block), _warps(tokens * block))


def channelwise_config(C: int) -> Config:
    """For kernels in which channels have nothing to do with each other."""
    block = _block(C, 1024)
    tokens = min(64, 4096 // block)
    return Config(tokens, block, triton.cdiv(C, block), max(1, tokens * block // 1024))


def _block(C: int, most: int) -> int:
    return int(min(max(triton.next_power_of_2(C), 16), most))


def _warps(values: int) -> int:
    """64 values per thread"""
    return min(max(1, values // 2048), 16)
