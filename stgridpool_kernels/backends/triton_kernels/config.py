"""Sizes of blocks and numbers of warps of all kernels, from a fixed table; nothing is tuned at call time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Division of a kernel into blocks.

    tokens, block: numbers of tokens and of channels per block. chunks: number of blocks that cover C channels.
    num_warps: warps of 32 threads per program.
    """

    tokens: int
    block: int
    chunks: int
    num_warps: int


@dataclass(frozen=True)
class FusedConfig:
    """Division of the fused kernels into programs. Their block is a window of 4 tokens.

    No choice but the number of warps changes a bit of a result.

    num_warps: warps of 32 threads per program. stages: depth of the pipeline of a program's walk over cells if W is
        odd; from 2 on, tokens of later steps are copied to shared memory in advance.
    window_registers, even_registers, odd_registers: maximum number of registers per thread of three kinds of programs:
        those that pool a window, walks if H and W are even, and walks with a halo. None stands for no limit. The first
        two apply to the forward only.
    frame_cells, mosaic_cells: cells per program of a walk over frames of x and over mosaics if W is odd, where a column
        is carried from cell to cell. None chooses a number by which every program runs at once. If W is even, it is 1.
    """

    num_warps: int
    stages: int = 1
    window_registers: int | None = None
    even_registers: int | None = None
    odd_registers: int = 128
    frame_cells: int | None = None
    mosaic_cells: int | None = None

    def cells(self, rows: int, row_cells: int, places: int, mosaic: bool) -> int:
        """Return the number of cells per program for `rows` rows of `row_cells` cells each.

        places: number of programs that the GPU runs at once. While there are fewer programs than places, none walks
        more than `LONGEST_WALK` cells.
        """
        chosen = self.mosaic_cells if mosaic else self.frame_cells
        if chosen is not None:
            return min(chosen, row_cells)
        cells = min(max(1, -(-rows * row_cells // places)), row_cells)
        while cells > LONGEST_WALK and rows * -(-row_cells // cells) < places:
            cells -= 1
        return cells


@dataclass(frozen=True)
class Row:
    """A configuration for tokens of at most `block` channels and `bytes` bytes per channel.

    capability: lowest compute capability that it is for. reason: grounds for its values.
    """

    block: int
    bytes: int
    capability: tuple[int, int]
    config: FusedConfig
    reason: str


# Every row gives a thread 64 values of a window, in groups of 8 neighbouring channels: 16 bytes of a 16-bit type.
# A multiprocessor has room for 24 warps at 80 registers per thread, and for 16 at 128, which is the limit for walks
# that carry a column. One program of 16 warps fits either way. The first row that fits is used.
# Row(block, bytes, capability, FusedConfig(num_warps, stages, window_registers, even_registers), reason)
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

LONGEST_WALK = 5
"""Maximum number of cells per program while the GPU has room for more programs."""

MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
"""Number of multiprocessors by compute capability of an A100, an H100 and a B200, for calls that are only compiled."""

MAX_BLOCK = ROWS[-1].block
"""Maximum number of channels per block, and of the norm of a fused call.

Outside the fused kernels longer tokens are read twice, block by block: for the norm and for the sum.
"""

MAX_ROW_PROGRAMS = (1 << 16) - 1
"""Maximum number of programs that share a row of cells: CUDA's limit for the second dimension of a launch."""

LONG_BLOCK = 4096
"""Minimum number of channels of a block if a token takes several."""

TILE = 4 * 4096
"""Maximum number of values (tokens × channels) of a block of more than 4 tokens."""


def fused_block(C: int, norm_channels: int) -> int:
    """Return the number of channels of a block of the fused kernels.

    A block holds all C channels of a token if there are at most `MAX_BLOCK`. Else the first block of a token holds the
    channels of the norm, and a block has at least `LONG_BLOCK` channels.
    """
    return _block(C if C <= MAX_BLOCK else max(norm_channels, LONG_BLOCK), MAX_BLOCK)


def fused_config(C: int, value_bytes: int, capability: tuple[int, int] | None) -> FusedConfig:
    """Return the configuration of the first row of `ROWS` that fits. capability: as in `CallSpec`."""
    capability = capability or (8, 0)
    fits = (row for row in ROWS if row.block >= C and value_bytes <= row.bytes and capability >= row.capability)
    return next(fits).config


def resident_blocks(
    device: torch.device, capability: tuple[int, int] | None, num_warps: int, registers: int | None
) -> int:
    """Return the number of programs of `num_warps` warps that a GPU runs at once.

    registers: maximum number of registers per thread; None stands for 128. A device other than "cuda" stands for the
    GPU of `MULTIPROCESSORS` with this compute capability, and None for the A100.
    """
    if device.type == "cuda":
        multiprocessors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    else:
        multiprocessors = MULTIPROCESSORS.get(capability or (8, 0), 132)
    return multiprocessors * max(1, 65536 // (32 * num_warps * (registers or 128)))


def tile_config(C: int, wanted: int) -> Config:
    """Return the configuration of kernels that reduce over the channels of up to `wanted` tokens at once.

    A block has `wanted` tokens, rounded up to a power of 2, but at most the larger of 4 and what `TILE` allows.
    """
    block = _block(C, MAX_BLOCK)
    tokens = min(triton.next_power_of_2(wanted), max(4, TILE // block))
    return Config(tokens, block, triton.cdiv(C, block), _warps(tokens * block))


def channelwise_config(C: int) -> Config:
    """Return the configuration of kernels that process channels independently."""
    block = _block(C, 1024)
    tokens = min(64, 4096 // block)
    return Config(tokens, block, triton.cdiv(C, block), max(1, tokens * block // 1024))


def _block(C: int, most: int) -> int:
    return int(min(max(triton.next_power_of_2(C), 16), most))


def _warps(values: int) -> int:
    """Return the number of warps for 64 values per thread, between 1 and 16."""
    return min(max(1, values // 2048), 16)
