"""grid_pool at the published settings: 2 × 2 windows at stride 2 and 2 × 2 grids shrunk by area. Tokens are read once.

Summaries are tiled from *thumbnails*: D(frame) is the frame average-pooled to ⌈H/2⌉ × ⌈W/2⌉ cells, the same for every
level. Cell (i, j) averages rows 2i, 2i + 1 and columns 2j, 2j + 1, which are window (i, j); if H is odd also row
2i − 1, and if W is odd also column 2j − 1 (so ⌈27/2⌉ = 14 cells overlap by one row and one column).

There are three kernels. Each pools nodes that are outputs, and the first and the last shrink nodes that a later level
samples:

    rows_kernel       frames of x that are shrunk ──► D, pooled frames
    windows_kernel    the other frames of x ──► pooled frames
    mosaics_kernel    the summaries of a level, as mosaics of D ──► D, pooled frames; one launch a level

From compute capability 9.0 on, a launch may start while the one before it ends (programmatic dependent launch). No
launch ends before the one before it has ended, and thumbnails are neither read nor written before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import triton
import triton.language as tl

from ...plan.tables import ENTRY_WORDS, Header, Stage, stages_of
from .config import FusedConfig, fused_block, fused_config, resident_blocks
from .launch import Arguments, CallSpec, Launch, PreparedCall
from .tiles import channel_places, frame_places, store_token, weigh_tile

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton for other GPUs, on which no launch overlaps
    gdc_launch_dependents = gdc_wait = None

ENTRY: tl.constexpr = tl.constexpr(ENTRY_WORDS)
"""Number of int32 in an entry of the tables: the node, the frame to pool into or −1, the slot of its thumbnail or −1,
the offset of its row counts of live cells, and the four slots that a mosaic is tiled from."""


OVERLAPPING = (9, 0)
"""Lowest compute capability with programmatic dependent launch."""


@triton.jit(do_not_specialize=["entries", "cells", "T", "weights"])  # one compilation serves all values of these
def rows_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, OH, OW, C)
    scratch,  # thumbnails: (slots, h, w, C)
    tables,
    entries,  # where the entries of this launch start in `tables`
    cells,  # of a row, that one program walks
    T,
    OH: tl.constexpr,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    POOLS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """D[t, i, j] = mean x[t, r, c] over cell (i, j) and, if POOLS, out[t, i, j] = Σ α·x[t, r, c] over window (i, j).

    One program walks row i of the cells of a frame, or `cells` of them, from left to right. OVERLAPS: this launch may
    overlap with its neighbours.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    entry = tables + entries + tl.program_id(0) // SIZE.h * ENTRY
    i, first = tl.program_id(0) % SIZE.h, tl.program_id(1) * (cells if SIZE.W % 2 == 1 else 1)
    image = x.pointer + frame_places(tl.load(entry), T, x)
    where = (entry, image, i, first, cells)
    walk(x, out, scratch, tables, where, T, OH, OW, weights, SIZE, NORM, BLOCK, STAGES, POOLS, OVERLAPS, False)


@triton.jit(do_not_specialize=["entries", "cells", "T", "weights"])
def mosaics_kernel(
    x,  # (…, T, H, W, C), whose tokens are not read
    out,  # (…, T, OH, OW, C)
    scratch,  # thumbnails: (slots, h, w, C)
    tables,
    entries,  # where the entries of this launch start in `tables`
    cells,  # of a row, that one program walks
    T,
    OH: tl.constexpr,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    POOLS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Do for the summaries of a level, each a mosaic of four thumbnails, what `rows_kernel` does for frames of x."""
    entry = tables + entries + tl.program_id(0) // SIZE.h * ENTRY
    i, first = tl.program_id(0) % SIZE.h, tl.program_id(1) * (cells if SIZE.W % 2 == 1 else 1)
    if OVERLAPS:
        gdc_launch_dependents()
    where = (entry, scratch, i, first, cells)
    walk(x, out, scratch, tables, where, T, OH, OW, weights, SIZE, NORM, BLOCK, 1, POOLS, OVERLAPS, True)


@triton.jit(do_not_specialize=["entries", "T", "weights"])
def windows_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, OH, OW, C)
    tables,
    entries,  # where the entries of this launch start in `tables`; None for all frames of x, without tables
    T,
    OH: tl.constexpr,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out[t, i, j] = Σ α·x[t, r, c] over window (i, j) of a frame that is not shrunk. One window a program.

    OVERLAPS: this launch may overlap with its neighbours, on neither of which it depends. Its last program alone waits
    for the launch before it, so that the others make room for more.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    program, channels, token = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, 4)
    frame, i, j = program // (OH * OW), program // OW % OH, program % OW
    if entries is not None:
        frame = tl.load(tables + entries + frame * ENTRY + 1)
    taken = (2 * i + token // 2 < SIZE.H) & (2 * j + token % 2 < SIZE.W)
    places = places_in(i, j, token // 2, token % 2, tables, x, SIZE, False)
    image = x.pointer + frame_places(frame, T, x)
    tile = load_tile(image, places, taken, channels, x, SIZE, False)
    shares = weigh_tile(tile, taken, channels, weights, SIZE.C, NORM)
    store_token(out, frame, i, j, T, channels, channels < SIZE.C, tl.sum(shares * tile, 0))
    if SIZE.C > BLOCK:  # the norm runs over channels of the first block alone
        for start in tl.range(BLOCK, SIZE.C, BLOCK, num_stages=1):
            more = start + channels
            tile = load_tile(image, places, taken, more, x, SIZE, False)
            store_token(out, frame, i, j, T, more, more < SIZE.C, tl.sum(shares * tile, 0))
    if OVERLAPS and program == tl.num_programs(0) - 1:
        gdc_wait()


@triton.jit
def walk(
    x,
    out,
    scratch,
    tables,
    where,
    T,
    OH: tl.constexpr,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    POOLS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    MOSAIC: tl.constexpr,
):
    """Pool and shrink cells `first`, … of row i of an entry, a cell a step, if something depends on them.

    where: (entry, image, i, first, cells) with the place where the entry's frame starts or, for a MOSAIC, where
    thumbnails do, and with the maximum number of steps. There is one step if W is even or tokens take several blocks,
    since no column is carried then.
    STAGES: from 2 on, tokens of later steps are copied to shared memory in advance.
    """
    entry, image, i, first, cells = where
    channels = tl.arange(0, BLOCK)
    target, slot, live = tl.load(entry + 1), tl.load(entry + 2), tl.load(tables + tl.load(entry + 3) + i)
    if OVERLAPS:  # until here, nothing of scratch is read or written
        gdc_wait()
    target = tl.where((i < OH) & POOLS, target, -1)
    stop = tl.minimum(tl.maximum(live, tl.where(target >= 0, OW, 0)), first + cells)
    node = (x, image, entry, i, live, scratch + (slot.to(tl.int64) * SIZE.h + i) * SIZE.w * SIZE.C)
    carried = tl.zeros((BLOCK,), tl.float32)
    if SIZE.W % 2 == 1 and first > 0:
        beside = tl.where(first < live, SIZE.H, 0)
        carried = sum_column(image, entry, i, first, beside, channels, x, SIZE, MOSAIC)
    if SIZE.W % 2 == 0 or SIZE.C > BLOCK:
        if first < stop:
            walk_cell(node, out, target, first, carried, channels, T, OW, weights, SIZE, NORM, BLOCK, POOLS, MOSAIC)
    else:
        for step in tl.range(first, stop, num_stages=STAGES):
            j = i * 0 + step
            carried = walk_cell(
                node, out, target, j, carried, channels, T, OW, weights, SIZE, NORM, BLOCK, POOLS, MOSAIC
            )


@triton.jit
def walk_cell(
    node,
    out,
    target,
    j,
    carried,
    channels,
    T,
    OW: tl.constexpr,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    POOLS: tl.constexpr,
    MOSAIC: tl.constexpr,
):
    """Pool window (i, j) of a node if its `target` is not −1, and store cell (i, j) of its thumbnail if that is live.

    carried: sum of the column left of the cell. Returns the sum of its last column, in the order of a walk.
    """
    x, image, entry, i, live, _ = node
    HALO: tl.constexpr = SIZE.H % 2 == 1 or SIZE.W % 2 == 1
    token = tl.arange(0, 4)
    taken = (2 * i + token // 2 < SIZE.H) & (2 * j + token % 2 < SIZE.W)
    places = places_in(i, j, token // 2, token % 2, entry, x, SIZE, MOSAIC)
    tile = load_tile(image, places, taken, channels, x, SIZE, MOSAIC)
    shares = tl.zeros((4, 1), tl.float32)
    if POOLS and HALO and target >= 0:  # first: a halo leaves no registers for the sums below as well
        shares = weigh_tile(tile, taken, channels, weights, SIZE.C, NORM)
        in_out = channels < tl.where(j < OW, SIZE.C, 0)
        store_token(out, target, i, j, T, channels, in_out, tl.sum(shares * tile, 0))
    carried = shrink_tile(node, tile, j, carried, channels, SIZE, BLOCK, MOSAIC)
    if POOLS and not HALO and target >= 0:  # last: the sums above are done with
        shares = weigh_tile(tile, taken, channels, weights, SIZE.C, NORM)
        in_out = channels < tl.where(j < OW, SIZE.C, 0)
        store_token(out, target, i, j, T, channels, in_out, tl.sum(shares * tile, 0))

    if SIZE.C > BLOCK:  # the norm runs over channels of the first block alone, and no column of the others is carried
        for start in tl.range(BLOCK, SIZE.C, BLOCK, num_stages=1):
            more = start + channels
            tile = load_tile(image, places, taken, more, x, SIZE, MOSAIC)
            if POOLS and target >= 0:
                in_out = more < tl.where(j < OW, SIZE.C, 0)
                store_token(out, target, i, j, T, more, in_out, tl.sum(shares * tile, 0))
            beside = tl.where((j > 0) & (j < live), SIZE.H, 0)
            column = sum_column(image, entry, i, j, beside, more, x, SIZE, MOSAIC) if SIZE.W % 2 == 1 else carried
            shrink_tile(node, tile, j, column, more, SIZE, BLOCK, MOSAIC)
    return carried


@triton.jit
def shrink_tile(node, tile, j, carried, channels, SIZE: tl.constexpr, BLOCK: tl.constexpr, MOSAIC: tl.constexpr):
    """Store these channels of cell (i, j) of a node if it is live, and return the sum of the cell's last column.

    tile: the window's tokens. carried: sum of the column left of it.
    """
    x, image, entry, i, live, thumbnail = node
    columns = tl.sum(tl.reshape(tile, (2, 2, BLOCK)), 0)  # sums of rows, for columns 2j and 2j + 1
    height = tl.minimum(2 * i + 2, SIZE.H) - (tl.maximum(2 * i - 1, 0) if SIZE.H % 2 == 1 else 2 * i)
    width = tl.minimum(2 * j + 2, SIZE.W) - 2 * j
    if SIZE.H % 2 == 1:
        two = tl.arange(0, 2)
        over = 2 * j + two < tl.where((i > 0) & (j < live), SIZE.W, 0)
        above = places_in(i, j, 0 * two - 1, two, entry, x, SIZE, MOSAIC)
        columns += load_tile(image, above, over, channels, x, SIZE, MOSAIC)
    if SIZE.W % 2 == 1:
        left, right = tl.split(tl.trans(columns))
        cell = carried + left + right
        carried = right
        width += tl.minimum(j, 1)
    else:
        cell = tl.sum(columns, 0)
    tl.store(
        thumbnail + j.to(tl.int64) * SIZE.C + channels,
        (cell * (inverse(height) * inverse(width))).to(thumbnail.dtype.element_ty),
        mask=channels < tl.where(j < live, SIZE.C, 0),
        eviction_policy="evict_last",
    )
    return carried


@triton.jit
def inverse(n):
    """Return 1 / n for a cell of n = 1, 2 or 3 rows or columns, rounded once and without a division."""
    return tl.where(n == 3, 1 / 3, tl.where(n == 2, 0.5, 1.0))


@triton.jit
def places_in(i, j, down, right, entry, x, SIZE: tl.constexpr, MOSAIC: tl.constexpr):
    """Return where tokens start that are `down` rows and `right` columns from the first token of window (i, j).

    They are in a frame of x, or in scratch for the mosaic of the four thumbnails of an entry. In a frame, the distances
    between them are constants, which loads add to one address.
    """
    if MOSAIC:
        rows, cols = 2 * i + down, 2 * j + right
        below, beside = (rows >= SIZE.h).to(tl.int32), (cols >= SIZE.w).to(tl.int32)
        slots = tl.load(entry + 4 + 2 * below + beside).to(tl.int64)
        places = ((slots * SIZE.h + rows - below * SIZE.h) * SIZE.w + cols - beside * SIZE.w) * SIZE.C
    else:
        first = (2 * i).to(tl.int64) * x.row + (2 * j).to(tl.int64) * x.col
        places = first + down.to(tl.int64) * x.row + right.to(tl.int64) * x.col
    return places


@triton.jit
def sum_column(image, entry, i, j, bottom, channels, x, SIZE: tl.constexpr, MOSAIC: tl.constexpr):
    """Return the sum of the tokens left of cell (i, j), in its rows above `bottom`, added in the order of a walk."""
    down = tl.arange(0, 2)
    places = places_in(i, j, down, 0 * down - 1, entry, x, SIZE, MOSAIC)
    total = tl.sum(load_tile(image, places, 2 * i + down < bottom, channels, x, SIZE, MOSAIC), 0)
    if SIZE.H % 2 == 1:
        up = tl.arange(0, 1) - 1
        places = places_in(i, j, up, 0 * up - 1, entry, x, SIZE, MOSAIC)
        taken = (2 * i + up >= 0) & (2 * i + up < bottom)
        total += tl.sum(load_tile(image, places, taken, channels, x, SIZE, MOSAIC), 0)
    return total


@triton.jit
def load_tile(image, places, taken, channels, x, SIZE: tl.constexpr, MOSAIC: tl.constexpr):
    """Return tokens as float32, 0 where not taken.

    Tokens of x are the first to leave the cache, as only those of the row above a walk are read twice. Thumbnails stay,
    as they may be read often.
    """
    mask = taken[:, None] & (channels < SIZE.C)[None, :]
    if MOSAIC:
        tile = tl.load(image + places[:, None] + channels[None, :], mask=mask, other=0.0)
    else:
        places = channel_places(places, channels, x)
        tile = tl.load(image + places, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile.to(tl.float32)


def prepare(spec: CallSpec) -> PreparedCall:
    """Return the launches of grid_pool, of norm_pool, or of a chunk of streams, whose thumbnails the streams keep."""
    if not spec.gridded and spec.chunk is None:
        frames = math.prod(spec.x.shape[:-3])
        return PreparedCall(spec.plan, [_launch_windows(spec, None, frames)], 0, None)
    scratch = thumbnail_elements(spec) if spec.chunk is None else 0
    return PreparedCall(spec.plan, launch_stages(spec, pools=True), scratch, spec.tables)


def thumbnail_elements(spec: CallSpec) -> int:
    """Return the number of elements of all slots of thumbnails."""
    return Header.of(spec.words).slots * spec.size.h * spec.size.w * spec.size.C


def launch_stages(spec: CallSpec, pools: bool) -> list[Launch]:
    """Return the launches of the stages of the tables. pools: whether nodes are pooled; else they are shrunk only.

    The first one is never early: whatever runs before it may still use the memory of its scratch.
    """
    launches: list[Callable[[bool, bool], Launch]] = []
    for stage in stages_of(spec.words):
        # a summary is walked also if it is not shrunk, since it is a mosaic
        walked = stage.num_entries if stage.mosaic and pools else stage.shrunk
        if walked:
            launches.append(partial(_launch_walks, spec, stage, walked, pools))
        if pools and walked < stage.num_entries:
            first = stage.entries + walked * ENTRY_WORDS
            launches.append(partial(_launch_windows, spec, first, stage.num_entries - walked))
    overlaps = len(launches) > 1 and spec.capability is not None and spec.capability >= OVERLAPPING
    return [launch(overlaps, overlaps and number > 0) for number, launch in enumerate(launches)]


def _launch_walks(spec: CallSpec, stage: Stage, walked: int, pools: bool, overlaps: bool, early: bool) -> Launch:
    """Return the launch for `walked` entries of a stage. overlaps: as in `rows_kernel`. early: as in `CallSpec`."""
    config, arguments = _shared(spec)
    size, odd = spec.size, spec.size.W % 2 == 1
    halo = odd or size.H % 2 == 1
    registers = _most_registers(spec, config.odd_registers if halo else config.even_registers, halo)
    places = resident_blocks(spec.x.device, spec.capability, config.num_warps, registers)
    carries = odd and arguments["BLOCK"] >= size.C
    cells = config.cells(walked * size.h, size.w, places, bool(stage.mosaic)) if carries else 1
    arguments |= {"entries": stage.entries, "cells": cells, "POOLS": pools, "STAGES": config.stages if carries else 1}
    grid = (walked * size.h, triton.cdiv(size.w, cells), 1)
    kernel = mosaics_kernel if stage.mosaic else rows_kernel
    return Launch(kernel, grid, arguments | {"OVERLAPS": overlaps}, **spec.options(config.num_warps, registers, early))


def _launch_windows(
    spec: CallSpec, entries: int | None, frames: int, overlaps: bool = False, early: bool = False
) -> Launch:
    """Return the launch for frames that are not shrunk. entries, overlaps: as in `windows_kernel`."""
    config, arguments = _shared(spec)
    registers = _most_registers(spec, config.window_registers, False)
    grid = (frames * math.prod(spec.pooled_size), 1, 1)
    arguments |= {"entries": entries, "OVERLAPS": overlaps}
    return Launch(windows_kernel, grid, arguments, **spec.options(config.num_warps, registers, early))


def _shared(spec: CallSpec) -> tuple[FusedConfig, Arguments]:
    """Return the configuration of a call, and the arguments that all its launches share."""
    arguments = spec.arguments()
    channels = int(arguments["weights"].channels or spec.size.C)
    block = fused_block(spec.size.C, channels)
    config = fused_config(block, spec.x.element_size(), spec.capability)
    OH, OW = spec.pooled_size
    return config, arguments | {"OH": OH, "OW": OW, "BLOCK": block}


def _most_registers(spec: CallSpec, limit: int | None, halo: bool) -> int | None:
    """Return the maximum number of registers per thread, None for no limit.

    Powers take about 240 registers and would spill with a limit. So would some of the kernels without a halo, if they
    cannot read tokens 16 bytes at a time or their norm runs over some of the channels; others need fewer than 80, but
    with a limit the compiler uses up to the limit.
    """
    arguments = spec.arguments()
    if arguments["NORM"].kind == "power":
        return None
    *strides, step = spec.x.stride()
    some_channels = arguments["weights"].channels is not None
    narrow = spec.grad is not None or some_channels or step != 1 or any(stride % 16 for stride in strides)
    return limit if halo or not narrow else None
