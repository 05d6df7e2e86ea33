"""grid_pool at the published settings: 2 × 2 windows at stride 2 and 2 × 2 grids shrunk by area. Tokens are read once.

Summaries are tiled from *thumbnails*: D(frame) is the frame average-pooled to ⌈H/2⌉ × ⌈W/2⌉ cells, the same for every
level. Cell (i, j) averages rows 2i, 2i + 1 and columns 2j, 2j + 1, which are window (i, j); if H is odd also row
2i − 1, and if W is odd also column 2j − 1 (so ⌈27/2⌉ = 14 cells overlap by one row and one column).

The kernel is launched for the frames of x, then for the summaries of each level, which it reads as mosaics of
thumbnails. A launch pools its nodes that are outputs, and shrinks its nodes that a later level samples:

    x ──► pooled frames                 frames that no summary replaces
      └─► D ──► level 1 ──► pooled      summaries that no later level replaces
           ▲          │
           └────◄─────┘ D of summaries that a later level samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from ...plan.dataflow import live_cells
from ...plan.tables import Chunk
from ..device_tables import tables_on
from .config import FusedConfig, fused_block, fused_config
from .launch import Arguments, CallSpec, Launch, PreparedCall
from .tiles import frame_places, pool_tile, store_token

ENTRY: tl.constexpr = tl.constexpr(8)
"""Number of int32 in an entry of the tables: the frame to read, the frame to pool into or −1, the slot of its thumbnail
or −1, the offset of its row counts of live cells, and the four slots that a mosaic is tiled from."""


@triton.jit(do_not_specialize=["entries", "walked", "T", "norm_channels"])  # one compilation serves all values of these
def grid_pool_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, OH, OW, C)
    scratch,  # thumbnails: (slots, h, w, C)
    tables,
    entries,  # where the entries of this launch start in `tables`
    walked,  # how many of them have a thumbnail; these come first
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    x_video: tl.int64,
    x_frame,
    x_row,
    x_col,
    x_channel,
    out_video: tl.int64,
    out_frame,
    out_row,
    out_col,
    out_channel,
    temperature,
    norm_channels,  # channels of the norm, None for all
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
    STAGES: tl.constexpr,
    ODD_H: tl.constexpr,
    ODD_W: tl.constexpr,
    SPLIT: tl.constexpr,
    MOSAIC: tl.constexpr,
    WINDOWS: tl.constexpr,
    PLAIN: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    P: tl.constexpr,
):
    """out[t, i, j] = Σ α·x[t, r, c] over window (i, j) and D[t, i, j] = mean x[t, r, c] over cell (i, j).

    The first programs walk: each takes row i of the cells of one entry, or CELLS of it where rows are SPLIT, from left
    to right, and carries the last column of a step to the next as a sum. The others take one window each of the entries
    without a thumbnail.

    MOSAIC: the frames to walk are summaries, tiled from thumbnails; else frames of x. WINDOWS: there are entries
    without a thumbnail. PLAIN: each frame of x is one, and there is no table.
    """
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    out_strides = (out_video, out_frame, out_row, out_col, out_channel)
    channels = tl.arange(0, BLOCK)
    token = tl.arange(0, 4)
    spans: tl.constexpr = (w + CELLS - 1) // CELLS if SPLIT else 1
    program = tl.program_id(0)
    walks = walked * h * spans

    if not PLAIN and program < walks:
        entry = tables + entries + program // (h * spans) * ENTRY
        frame, target, slot = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        i = program // spans % h
        live = tl.load(tables + tl.load(entry + 3) + i)
        pooled = (target >= 0) & (i < OH)
        stop = tl.maximum(live, tl.where(pooled, OW, 0))
        first = 0
        if SPLIT:
            first = program % spans * CELLS
            stop = tl.minimum(stop, first + CELLS)

        image = scratch if MOSAIC else frame_of(x, frame, T, x_strides)
        rows = 2 * i + token // 2
        top = tl.maximum(2 * i - 1, 0) if ODD_H else 2 * i
        height = tl.minimum(2 * i + 2, H) - top
        carried = tl.zeros((BLOCK,), tl.float32)
        if ODD_W and SPLIT and CELLS > 1:
            beside = tl.where((first > 0) & (first < live), H, 0)
            carried = sum_column(image, entry, i, 2 * first - 1, beside, channels, h, w, x_strides, C, ODD_H, MOSAIC)
        thumbnail = scratch + (slot.to(tl.int64) * h + i) * w * C
        for step in tl.range(first, stop, num_stages=STAGES):
            j = i * 0 + step
            cols = 2 * j + token % 2
            taken = (rows < H) & (cols < W)
            window = places_in(rows, cols, entry, h, w, x_strides, C, MOSAIC)
            tile = load_tile(image, window, taken, channels, x_strides, C, MOSAIC)
            if (ODD_H or ODD_W) and pooled:  # first: a halo leaves no registers for the sums below as well
                result = pool_tile(tile, taken, channels, temperature, norm_channels, C, MEAN, NORM, P)
                in_out = channels < tl.where(j < OW, C, 0)
                store_token(out, target, i, j, T, out_strides, channels, in_out, result)

            if ODD_W and SPLIT and CELLS == 1:  # here, where what the window took is free again
                beside = tl.where((j > 0) & (j < live), H, 0)
                carried = sum_column(image, entry, i, 2 * j - 1, beside, channels, h, w, x_strides, C, ODD_H, MOSAIC)
            columns = tl.sum(tl.reshape(tile, (2, 2, BLOCK)), 0)  # sums of rows, for columns 2j and 2j + 1
            width = tl.minimum(2 * j + 2, W) - 2 * j
            if ODD_H:
                two = tl.arange(0, 2)
                over = 2 * j + two < tl.where((i > 0) & (j < live), W, 0)
                above = places_in(2 * i - 1 + 0 * two, 2 * j + two, entry, h, w, x_strides, C, MOSAIC)
                columns += load_tile(image, above, over, channels, x_strides, C, MOSAIC)
            if ODD_W:
                left, right = tl.split(tl.trans(columns))
                cell = carried + left + right
                carried = right
                width += tl.minimum(j, 1)
            else:
                cell = tl.sum(columns, 0)
            tl.store(
                thumbnail + j.to(tl.int64) * C + channels,
                (cell * (inverse(height) * inverse(width))).to(scratch.dtype.element_ty),
                mask=channels < tl.where(j < live, C, 0),
                eviction_policy="evict_last",
            )
            if not (ODD_H or ODD_W) and pooled:  # last: the sums above are done with
                result = pool_tile(tile, taken, channels, temperature, norm_channels, C, MEAN, NORM, P)
                in_out = channels < tl.where(j < OW, C, 0)
                store_token(out, target, i, j, T, out_strides, channels, in_out, result)
    elif WINDOWS:
        window_number = program - walks
        i, j = window_number // OW % OH, window_number % OW
        target = walked + window_number // (OH * OW)
        if not PLAIN:
            target = tl.load(tables + entries + target * ENTRY + 1)
        rows, cols = 2 * i + token // 2, 2 * j + token % 2
        taken = (rows < H) & (cols < W)
        image = frame_of(x, target, T, x_strides)
        window = places_in(rows, cols, tables, h, w, x_strides, C, False)
        tile = load_tile(image, window, taken, channels, x_strides, C, False)
        result = pool_tile(tile, taken, channels, temperature, norm_channels, C, MEAN, NORM, P)
        store_token(out, target, i, j, T, out_strides, channels, channels < C, result)


@triton.jit
def inverse(n):
    """1 / n of the 1, 2 or 3 rows or columns of a cell: rounded once, exact for 1 and 2, and no division."""
    return tl.where(n == 3, 1 / 3, tl.where(n == 2, 0.5, 1.0))


@triton.jit
def frame_of(x, frame, T, strides):
    """Frame number `frame` of all videos of T frames."""
    return x + frame_places(frame, T, strides)


@triton.jit
def places_in(rows, cols, entry, h, w, x_strides, C: tl.constexpr, MOSAIC: tl.constexpr):
    """Return where tokens start: in a frame of x, or in scratch for the mosaic of the four thumbnails of an entry."""
    if MOSAIC:
        below, beside = (rows >= h).to(tl.int32), (cols >= w).to(tl.int32)
        slots = tl.load(entry + 4 + 2 * below + beside).to(tl.int64)
        places = ((slots * h + rows - below * h) * w + cols - beside * w) * C
    else:
        places = rows.to(tl.int64) * x_strides[2] + cols.to(tl.int64) * x_strides[3]
    return places


@triton.jit
def sum_column(
    image,
    entry,
    i,
    col,
    bottom,
    channels,
    h: tl.constexpr,
    w: tl.constexpr,
    x_strides,
    C: tl.constexpr,
    ODD_H: tl.constexpr,
    MOSAIC: tl.constexpr,
):
    """The sum of a column's tokens in the rows of cell i above `bottom`, added in the order of a walk."""
    rows = 2 * i + tl.arange(0, 2)
    places = places_in(rows, col + 0 * rows, entry, h, w, x_strides, C, MOSAIC)
    total = tl.sum(load_tile(image, places, rows < bottom, channels, x_strides, C, MOSAIC), 0)
    if ODD_H:
        row = 2 * i - 1 + tl.arange(0, 1)
        places = places_in(row, col + 0 * row, entry, h, w, x_strides, C, MOSAIC)
        taken = (row >= 0) & (row < bottom)
        total += tl.sum(load_tile(image, places, taken, channels, x_strides, C, MOSAIC), 0)
    return total


@triton.jit
def load_tile(image, places, taken, channels, x_strides, C: tl.constexpr, MOSAIC: tl.constexpr):
    """Tokens as float32, 0 where not taken. Of x, only the row above a walk is read twice; thumbnails may be often."""
    mask = taken[:, None] & (channels < C)[None, :]
    if MOSAIC:
        tile = tl.load(image + places[:, None] + channels[None, :], mask=mask, other=0.0)
    else:
        places = places[:, None] + channels.to(tl.int64)[None, :] * x_strides[4]
        tile = tl.load(image + places, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile.to(tl.float32)


def _shared(request: CallSpec, plain: bool) -> tuple[FusedConfig, Arguments, Arguments]:
    """Return the configuration, arguments and options that all launches of a call share. plain: nothing is shrunk."""
    H, W, C = request.x.shape[-3:]
    OH, OW = request.plan.pooled_size
    config = fused_config(C, request.x.element_size(), request.capability)
    shared = request.sizes() | request.weights() | {"OH": OH, "OW": OW, "BLOCK": fused_block(C)}
    shared |= {"h": -(-H // 2), "w": -(-W // 2), "ODD_H": H % 2 == 1, "ODD_W": W % 2 == 1, "PLAIN": plain}
    return config, shared, {"num_warps": config.num_warps, "maxnreg": _most_registers(request, plain, config)}


def _most_registers(request: CallSpec, plain: bool, config: FusedConfig) -> int | None:
    """Maximum number of registers per thread, None for no limit.

    Powers take about 240 registers and would spill with a limit. So would some of the kernels that cannot read tokens
    16 bytes at a time or whose norm runs over some of the channels; others need fewer than 80, but with a limit the
    compiler uses up to the limit.
    """
    *strides, step = request.x.stride()
    weights = request.weights()
    if weights["NORM"] == "power":
        return None
    if request.x.shape[-2] % 2 and not plain:
        return config.odd_registers
    some_channels = weights["norm_channels"] is not None
    if request.grad is not None or some_channels or step != 1 or any(stride % 16 for stride in strides):
        return None
    return config.plain_registers if plain else config.even_registers


def _walk(config: FusedConfig, W: int, mosaic: bool) -> tuple[int, Arguments]:
    """Return the number of cells per program, and the arguments of its kernel that follow from it.

    A column is carried from cell to cell of a frame, so that longer walks read less twice. Mosaics are few and in the
    cache, where more programs matter more than fewer reads.
    """
    w = -(-W // 2)
    cells = config.mosaic_cells if mosaic else config.frame_cells or (w if W % 2 else 1)
    stages = 1 if mosaic or cells == 1 else config.stages
    split = cells < w
    return cells, {"STAGES": stages, "MOSAIC": mosaic, "SPLIT": split, "CELLS": cells if split else 0}


def prepare_chunk(request: CallSpec, chunk: Chunk) -> PreparedCall:
    """Return the launches for a chunk of streams, by its tables. Their scratch is the streams' thumbnails."""
    W = request.x.shape[-2]
    h, w = -(-request.x.shape[-3] // 2), -(-W // 2)
    OH, OW = request.plan.pooled_size
    config, shared, options = _shared(request, plain=False)
    launches = []
    for mosaic, entries, count, walked in chunk.stages:
        walked = count if mosaic else walked  # summaries are always walked, as in `prepare`
        cells, walk = _walk(config, W, bool(mosaic))
        arguments = walk | {"entries": entries, "walked": walked, "WINDOWS": not mosaic}
        programs = walked * h * triton.cdiv(w, cells) + (count - walked) * OH * OW
        grid = (programs, 1, 1)
        launches.append(Launch(grid_pool_kernel, grid, shared | arguments, **options))
    return PreparedCall(request.plan, launches, 0, tables_on(request.x.device, chunk.words))


def prepare(request: CallSpec) -> PreparedCall:
    """Return the launches of grid_pool or norm_pool: one for the frames of x, then one per level for its summaries."""
    ends = {node: frame for frame, node in enumerate(request.graph.outputs)}
    shrunk = launch_cells(request, ends)
    return PreparedCall(request.plan, shrunk.launches, shrunk.scratch, tables_on(request.x.device, shrunk.tables))


@dataclass(frozen=True)
class Shrunk:
    """Launches that shrink nodes, and their tables. slots: the slot of the thumbnail of every node with live cells.
    counts: the offset in `tables` of its row counts of live cells. scratch: number of elements of all thumbnails."""

    launches: list[Launch]
    tables: list[int]
    slots: dict[int, int]
    counts: dict[int, int]
    scratch: int


def launch_cells(request: CallSpec, ends: dict[int, int]) -> Shrunk:
    """Return launches that shrink the nodes with live cells, and pool the nodes of `ends` into these frames."""
    H, W, C = request.x.shape[-3:]
    h, w = -(-H // 2), -(-W // 2)
    OH, OW = request.plan.pooled_size
    graph = request.graph
    plain = not graph.summaries
    config, shared, options = _shared(request, plain)

    none_live = (0,) * h
    live = live_cells(request.plan, graph)
    slots = {node: slot for slot, node in enumerate(live)}
    tables: list[int] = []
    rows: dict[tuple[int, ...], int] = {}
    for counts in () if plain else (none_live, *live.values()):
        if counts not in rows:
            rows[counts] = len(tables)
            tables += counts

    def launch(walked: Sequence[int], pooled: Sequence[int], mosaic: bool) -> Launch:
        entries = len(tables)
        cells, walk = _walk(config, W, mosaic)
        for node in walked if plain else (*walked, *pooled):
            sources = graph.summaries[~node].sources if node < 0 else ()
            tables.extend((node, ends.get(node, -1), slots.get(node, -1)))
            tables.append(rows[live.get(node, none_live)])
            tables.extend([slots.get(source, -1) for source in sources] or [-1] * 4)
        programs = len(walked) * h * triton.cdiv(w, cells) + len(pooled) * OH * OW
        arguments = walk | {"entries": entries, "walked": len(walked), "WINDOWS": len(pooled) > 0}
        return Launch(grid_pool_kernel, (programs, 1, 1), shared | arguments, **options)

    sampled = sorted(node for node in live if node >= 0)
    pooled = [node for node in ends if node >= 0 and node not in live]
    levels = [[~s for s in level if ~s in live or ~s in ends] for level in graph.by_level()]
    levels = [mosaics for mosaics in levels if mosaics]
    parts = len(levels) + 1 if config.spread else 1
    shares = [pooled[part::parts] if part < parts else [] for part in range(len(levels) + 1)]
    launches = [launch(sampled, shares[0], mosaic=False)]
    for mosaics, share_of_windows in zip(levels, shares[1:], strict=True):
        launches.append(launch(mosaics, share_of_windows, mosaic=True))
    places = {node: rows[of_node] for node, of_node in live.items()}
    return Shrunk(launches, tables, slots, places, len(slots) * h * w * C)
