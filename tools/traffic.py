"""Bytes that the kernels of grid_pool and of its gradient ask for, launch by launch, counted in Triton's interpreter.

`python -m tools.traffic` prints tables for the shapes that goals are set for, in Markdown. What is counted are
requests: every element that a load or a store names, as often as it names it, wherever the hardware would find it. How
much of that goes to device memory only the counters of a GPU can tell; the estimates say what they assume.

Tokens have one channel here. The kernels for the published settings ask for all channels of a token or for none, so
that one stands for all; it takes some 4 ms per program, and minutes for 64 frames. Rows are cut into the walks that an
H100 gets for all channels.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.goals import GOALS
from benchmarks.workloads import WORKLOADS, Workload
from stgridpool_kernels.backends.weighting import Weighting
from stgridpool_kernels.plan import GridPlan
from stgridpool_kernels.plan.dataflow import Dataflow, live_cells
from tests.support.interpreter import hasten_interpreter, repair_interpreter

Addresses = NDArray[np.int64]

TABLE_BYTES = 4


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens of x and out, cells of thumbnails, and entries of tables that one launch, or several, ask for.

    x_again, cells_again, sums_again: number of the loads whose element the same launch has asked for before. In a
    gradient, `out` is the gradient of x, `grad` that of the result, and `sums` are those of summaries, in float32.
    """

    programs: int = 0
    x_loads: int = 0
    x_again: int = 0
    cell_loads: int = 0
    cells_again: int = 0
    out_stores: int = 0
    cell_stores: int = 0
    table_loads: int = 0
    grad_loads: int = 0
    sum_loads: int = 0
    sums_again: int = 0
    sum_stores: int = 0

    def requests(self, itemsize: int = 2, again: bool = True) -> float:
        """Return all requests but those of tables, in units of a token of x, whose values have `itemsize` bytes.

        Without `again`, what a launch loads several times counts once, as if a cache served it from then on.
        """
        sums = self.sum_loads + self.sum_stores - (0 if again else self.sums_again)
        tokens = self.x_loads + self.cell_loads + self.grad_loads + self.out_stores + self.cell_stores
        return tokens - (0 if again else self.x_again + self.cells_again) + sums * 4 / itemsize

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Recorder:
    """Counter of how often each element of some tensors is loaded and stored."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.loads, self.stores = (
            {name: np.zeros(tensor.numel(), np.int64) for name, tensor in tensors.items()} for _ in range(2)
        )

    def note(self, times: dict[str, NDArray[np.int64]], addresses: Addresses) -> None:
        """Count the accesses of one instruction, which are all in one tensor."""
        if not addresses.size:
            return
        for name, tensor in self.tensors.items():
            places = (addresses - tensor.data_ptr()) // tensor.itemsize
            if places.min() >= 0 and places.max() < tensor.numel():
                np.add.at(times[name], places, 1)
                return
        raise IndexError(f"an access at {addresses[0]:#x} is in none of {', '.join(self.tensors)}")

    def watch(self) -> AbstractContextManager[object]:
        """Record what interpreted kernels load and store while the context is entered, except what they mask."""
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.note(self.loads, pointers.data[mask.data].astype(np.int64))
            return load(builder, pointers, mask, *rest)

        def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.note(self.stores, pointers.data[mask.data].astype(np.int64))
            return store(builder, pointers, value, mask, *rest)

        return patch.multiple(InterpreterBuilder, create_masked_load=watched_load, create_masked_store=watched_store)


H100 = (9, 0)
"""Compute capability of the GPU whose number of multiprocessors cuts rows into walks."""


def count_launches(plan: GridPlan, gradient: bool = False, channels: int = 1) -> list[Counts]:
    """Return the counts of every launch of grid_pool by `plan`, or of its gradient, as it is launched for `channels`.

    Raises RuntimeError unless the kernels are interpreted, ValueError for a plan that takes the general kernels.
    """
    from stgridpool_kernels.backends import triton_kernels  # here, since it reads TRITON_INTERPRET once

    if not triton_kernels.INTERPRETED:
        raise RuntimeError("the kernels are compiled: set TRITON_INTERPRET=1 before they are imported")
    if not plan.fusable:
        raise ValueError(f"the general kernels run {plan}: one channel does not stand for all of a token there")
    T = sum(plan.frame_counts)
    x = torch.ones(T, plan.height, plan.width, 1, dtype=torch.bfloat16)
    result = torch.ones(T, *plan.pooled_size, 1, dtype=x.dtype)
    out = torch.empty_like(x) if gradient else result
    call = prepared(x, result, plan, gradient, (8, 0))  # the interpreter runs no launches that overlap
    tokens = (t.to("meta").expand(-1, -1, -1, channels) for t in (x, result))
    of_all_channels = prepared(*tokens, plan, gradient, H100)
    for launch, like in zip(call.launches, of_all_channels.launches, strict=True):
        launch.grid = like.grid
        for place, name in enumerate(launch.kernel.arg_names):
            if name == "cells":
                launch.arguments[place] = like.arguments[place]
    cells = torch.empty(call.scratch, dtype=x.dtype)
    tables = call.tables.tensor if call.tables else torch.empty(0, dtype=torch.int32)
    grad, sums = result if gradient else torch.empty(0), torch.empty(call.gradients)
    tensors = {"x": x, "out": out, "cells": cells, "tables": tables, "grad": grad, "sums": sums}

    counts = []
    for launch in call.launches:
        recorder = Recorder(**tensors)
        with recorder.watch():
            launch(tuple(tensors.values()), 0)
        loads, stores = (
            {name: int(times.sum()) for name, times in found.items()} for found in (recorder.loads, recorder.stores)
        )
        again = {name: loads[name] - np.count_nonzero(times) for name, times in recorder.loads.items()}
        counts.append(
            Counts(
                programs=math.prod(launch.grid),
                x_loads=loads["x"],
                x_again=again["x"],
                cell_loads=loads["cells"],
                cells_again=again["cells"],
                out_stores=stores["out"],
                cell_stores=stores["cells"],
                table_loads=loads["tables"],
                grad_loads=loads["grad"],
                sum_loads=loads["sums"],
                sums_again=again["sums"],
                sum_stores=stores["sums"],
            )
        )
    return counts


def prepared(x: Tensor, result: Tensor, plan: GridPlan, gradient: bool, capability: tuple[int, int]) -> Any:
    """Return grid_pool of tokens like x, or its gradient, as it is prepared for a GPU of this compute capability."""
    from stgridpool_kernels.backends import triton_kernels
    from stgridpool_kernels.backends.triton_kernels.launch import CallSpec

    weighting = Weighting(1.0, 2.0, True, x.shape[-1])
    if gradient:
        spec = CallSpec(x, torch.empty_like(x), plan, weighting, result, capability=capability)
        return triton_kernels.prepare_grid_pool_backward(spec)
    return triton_kernels.prepare_grid_pool(CallSpec(x, result, plan, weighting, capability=capability))


def loads_without_carrying(plan: GridPlan) -> int:
    """Return how many tokens of x would be loaded if each program had one cell, or one window, and loaded all of it.

    The plan must be one that `count_launches` takes: 2 × 2 windows, and 2 × 2 grids shrunk by area.
    """
    graph = Dataflow.of(plan)
    live = live_cells(plan, graph)
    windows = np.multiply.outer(plan.window_rows.count, plan.window_cols.count)  # (OH, OW) tokens
    h, w = -(-plan.height // 2), -(-plan.width // 2)
    cells = np.zeros((h, w), np.int64)
    if live:  # the first tile of a mosaic is the thumbnail of a frame
        level = plan.levels[graph.summaries[0].level]
        cells = np.multiply.outer(level.row_runs.count[:h], level.col_runs.count[:w])
    loads = 0
    for frame, node in enumerate(graph.outputs):
        tokens = np.zeros((h, w), np.int64)
        if node == frame:
            tokens[: len(windows), : len(windows[0])] = windows
        for i, count in enumerate(live.get(frame, ())):
            tokens[i, :count] = cells[i, :count]
        loads += int(tokens.sum())
    return loads


# ---- tables ----

COLUMNS = {
    "x loaded": "x_loads",
    "of it again": "x_again",
    "thumbnails loaded": "cell_loads",
    "of them again": "cells_again",
    "out stored": "out_stores",
    "thumbnails stored": "cell_stores",
}
GRADIENT_COLUMNS = {
    "x loaded": "x_loads",
    "of it again": "x_again",
    "thumbnails loaded": "cell_loads",
    "of them again": "cells_again",
    "thumbnails stored": "cell_stores",
    "gradient of out loaded": "grad_loads",
    "of summaries loaded": "sum_loads",
    "of these again": "sums_again",
    "of summaries stored": "sum_stores",
    "of x stored": "out_stores",
}


def launch_table(
    counts: Sequence[Counts], workload: Workload, names: Sequence[str], columns: Mapping[str, str] = COLUMNS
) -> Table:
    """Return a table in MB with a row for every launch, by name, and their sum. columns: fields by column."""
    table = Table("launch", box=box.MARKDOWN)
    for name in ("programs", *columns, "tables, KB"):
        table.add_column(name, justify="right")
    for name, found in zip((*names, "all"), (*counts, sum(counts, Counts())), strict=True):
        row = [name, str(found.programs)]
        for field in columns.values():
            value_bytes = 4 if field.startswith("sum") else workload.dtype.itemsize
            row.append(f"{getattr(found, field) * workload.channels * value_bytes / 1e6:.1f}")
        table.add_row(*row, f"{found.table_loads * TABLE_BYTES / 1e3:.1f}")
    return table


def launch_names(plan: GridPlan, counts: Sequence[Counts]) -> list[str]:
    """Return names of the launches of grid_pool: rows of frames that are shrunk, windows of the others, mosaics."""
    levels = len(Dataflow.of(plan).by_level())
    frames = [f"frames of x, {'rows' if found.cell_stores else 'windows'}" for found in counts[: len(counts) - levels]]
    return [*frames, *(f"summaries, {number}" for number in range(1, levels + 1))]


def gradient_launch_names(plan: GridPlan, counts: Sequence[Counts]) -> list[str]:
    """Return names of the launches of a gradient: thumbnails again, then back through the levels."""
    levels = len(Dataflow.of(plan).by_level())
    shrunk = len(counts) - levels - 1
    names = [f"thumbnails, {'frames of x' if number == 0 else f'summaries, {number}'}" for number in range(shrunk)]
    return [*names, *(f"summaries, {number}" for number in range(levels, 0, -1)), "frames of x"]


def gradient_table(forward: Counts, backward: Counts, workload: Workload) -> Table:
    """Return a table of a gradient's bytes next to those of its call."""
    token_bytes = workload.channels * workload.dtype.itemsize
    table = Table("bytes", box=box.MARKDOWN)
    for name in ("grid_pool, MB", "gradient, MB", "ratio"):
        table.add_column(name, justify="right")
    rows = {"requests: all of the tables above": True, "what a launch loads several times counted once": False}
    for name, again in rows.items():
        both = [counts.requests(workload.dtype.itemsize, again) for counts in (forward, backward)]
        table.add_row(name, *(f"{tokens * token_bytes / 1e6:.1f}" for tokens in both), f"{both[1] / both[0]:.2f}")
    return table


def total_table(counts: Sequence[Counts], workload: Workload) -> Table:
    """Return a table of what all launches ask for, and of what device memory would move under some assumptions."""
    found = sum(counts, Counts())
    token_bytes = workload.channels * workload.dtype.itemsize
    bound = workload.bound("grid_pool")
    everything = workload.input_bytes + bound.write_bytes
    once = (found.x_loads - found.x_again + found.out_stores) * token_bytes
    halo, written = found.x_again * token_bytes, found.cell_stores * token_bytes
    read = (found.cell_loads - found.cells_again) * token_bytes
    rows = {
        "lower bound: tokens that the result depends on, and out, once": bound.total_bytes,
        "all of x, and out, once": everything,
        "requests: all of the table above": once + halo + written + found.cell_loads * token_bytes,
        "estimate 1: L2 keeps the thumbnails and the halo": once,
        "estimate 2: as 1, and thumbnails are written to memory": once + written,
        "estimate 3: as 2, and every launch reads them from there": once + written + read,
        "estimate 4: as 3, and L2 keeps no halo either": once + halo + written + read,
    }
    table = Table("bytes", box=box.MARKDOWN)
    for name in ("MB", "to lower bound", "to x and out"):
        table.add_column(name, justify="right")
    for name, number in rows.items():
        ratios = (f"{number / whole:.2f}" for whole in (bound.total_bytes, everything))
        table.add_row(name, f"{number / 1e6:.1f}", *ratios)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="traffic", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", choices=WORKLOADS, default=GOALS, help=f"by default {', '.join(GOALS)}")
    parser.add_argument("--frames", type=int, metavar="T", help="one video of so many frames, in place of the shape's")
    more = "of grid_pool's gradient too, which takes twice as long"
    parser.add_argument("--gradient", action="store_true", help=more)
    given = parser.parse_args(arguments)

    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    repair_interpreter()
    hasten_interpreter()
    console = Console(width=300)  # a line of a Markdown table must not be broken
    console.print("Requests of the kernels, counted in Triton's interpreter; not measurements of device memory.")
    for name in given.shape:
        workload = WORKLOADS[name]
        if given.frames is not None:
            workload = replace(workload, frame_counts=(given.frames,))
        plan = workload.plan("grid_pool")
        with Console(stderr=True).status(f"counting {name}"):
            counts = count_launches(plan, channels=workload.channels)
        dtype = str(workload.dtype).removeprefix("torch.")
        shapes = [" × ".join(map(str, shape)) for shape in (workload.shape, plan.pooled_size)]
        print(f"\n{shapes[0]} {dtype}, frames pooled to {shapes[1]}; MB:\n")
        show(console, launch_table(counts, workload, launch_names(plan, counts)))
        show(console, total_table(counts, workload))
        alone = loads_without_carrying(plan) * workload.channels * workload.dtype.itemsize / 1e6
        print(f"If no column were carried, programs would load {alone:.1f} MB of x.", flush=True)
        if given.gradient:
            with Console(stderr=True).status(f"counting the gradient of {name}"):
                back = count_launches(plan, gradient=True, channels=workload.channels)
            print("\nIts gradient; MB, those of summaries in float32:\n")
            names = gradient_launch_names(plan, back)
            show(console, launch_table(back, workload, names, GRADIENT_COLUMNS))
            show(console, gradient_table(sum(counts, Counts()), sum(back, Counts()), workload))


def show(console: Console, table: Table) -> None:
    with console.capture() as captured:
        console.print(table)
    lines = (line.rstrip() for line in captured.get().splitlines())
    print("\n".join(line for line in lines if line), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
