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
    """block, num_warps: as above; a tile is a window of 4 tokens. stages: of a walk's pipeline; from 2 on, tokens of
    later steps are copied to shared memory meanwhile. registers: per thread, for walks that carry a column.
    mosaic_cells: that a program of a level's launch walks. spread: windows of frames that are not sampled are shared
    out among all launches, where they run beside the few programs of a level; else all are in the first."""

    block: int
    num_warps: int
    stages: int
    registers: int = 128
    mosaic_cells: int = 1
    spread: bool = False


@dataclass(frozen=True)
class Row:
    """Tiles of (4, `block`) values of at most `bytes` bytes, on compute capability `capability` and above."""

    block: int
    bytes: int
    capability: tuple[int, int]
    num_warps: int
    stages: int
    reason: str


# Every row gives a thread 64 values of its window, in pieces of 8 neighbouring channels: 16 bytes of a 16-bit type.
# That leaves room for 16 resident warps on a multiprocessor, at no more than 128 registers each, to which walks that
# carry a column have to be held.
ROWS = (
    Row(512, 2, (8, 0), 1, 2, "one warp: norms need no barrier"),
    Row(1024, 2, (8, 0), 2, 2, "64 values per thread; the 6 tokens of a prefetched step take 12 KiB"),
    Row(2048, 2, (8, 0), 4, 2, "64 values per thread; a prefetched step takes 24 KiB"),
    Row(4096, 2, (8, 0), 8, 2, "64 values per thread; a prefetched step takes 48 KiB, two blocks fit from 100 KiB on"),
    Row(
        8192, 2, (8, 0), 16, 1, "64 values per thread; a block fills the registers, a prefetched step would take 96 KiB"
    ),
    Row(512, 4, (8, 0), 1, 1, "one warp; prefetching takes twice the room of 16-bit values: left out until measured"),
    Row(1024, 4, (8, 0), 2, 1, "64 values per thread; no prefetching, as above"),
    Row(2048, 4, (8, 0), 4, 1, "64 values per thread; no prefetching, as above"),
    Row(4096, 4, (8, 0), 8, 1, "64 values per thread; a prefetched step would take 96 KiB"),
    Row(8192, 4, (8, 0), 16, 1, "64 values per thread; a prefetched step would take 192 KiB"),
)

MAX_BLOCK = ROWS[-1].block
"""Channels of a token that stay in registers from its norm to its use. Longer tokens are read in chunks, twice."""

TILE = 4 * 4096
"""Values of a tile that holds more than 4 tokens."""


def fused_config(C: int, value_bytes: int, capability: tuple[int, int]) -> FusedConfig:
    """For the windows of 4 tokens of the fused kernel."""
    block = _block(C, MAX_BLOCK)
    row = next(row for row in ROWS if block <= row.block and value_bytes <= row.bytes and capability >= row.capability)
    return FusedConfig(block, row.num_warps, row.stages)


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
