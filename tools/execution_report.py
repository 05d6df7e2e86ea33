"""Tables of the warp instructions that a call executes, and of the times that follow from them and from its bytes.

The times are predictions for two GPUs and not measurements: how long it takes to issue the instructions, and how long
to move the lower bound of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lower_bound import lower_bound
from stgridpool_kernels.plan import GridPlan
from tools.instruction_count import Programs, count_instructions, read_graph

PREDICTED_ARCH = 90
"""The architecture that executed instructions are counted for: that of H100 and H200."""

CLOCK, SMS = 1.755e9, 132
"""Cycles a second and multiprocessors of both GPUs."""

ISSUED = 2.5
"""Warp instructions that a multiprocessor is assumed to issue a cycle, where it has room for 4."""

BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}
"""Bytes that are assumed to move in a second. The rate of H200 is that of a copy that was measured."""

EXECUTION_LEGEND = """\
steps: cells or windows of all programs; some are pooled, some shrunk, some both. longest chain: steps of one program.
instructions: executed by all warps. in flight: tokens that the resident blocks of a multiprocessor hold."""


@dataclass(frozen=True)
class ExecutedLaunch:
    """A launch with what it executes.

    kernel: its name. block_warps: warps of a block. resident_warps: those that fit on a multiprocessor. programs: one
    for each kind. instructions: the warp instructions of each kind.
    """

    kernel: str
    block_warps: int
    resident_warps: int
    programs: Sequence[Programs]
    instructions: Sequence[int]

    @staticmethod
    def of(
        kernel: str, listing: str, block_warps: int, resident_warps: int, programs: Sequence[Programs]
    ) -> ExecutedLaunch:
        """Count the instructions of a launch. `listing` is what nvdisasm prints of its kernel."""
        graph = read_graph(listing)
        instructions = [block_warps * count_instructions(graph, kind) for kind in programs]
        return ExecutedLaunch(kernel, block_warps, resident_warps, programs, instructions)

    def bytes_in_flight(self, token_bytes: int) -> int:
        """Return the bytes of tokens that the blocks of a multiprocessor hold, each a window of four tokens."""
        return self.resident_warps // self.block_warps * 4 * token_bytes


@dataclass(frozen=True)
class ExecutedCall:
    """A call with its launches. title: the shape and dtype of its tokens, and its name."""

    title: str
    plan: GridPlan
    channels: int
    value_bytes: int
    launches: Sequence[ExecutedLaunch]

    @property
    def instructions(self) -> int:
        """The warp instructions of all launches."""
        return sum(sum(launch.instructions) for launch in self.launches)

    @property
    def issue_seconds(self) -> float:
        """Seconds that it takes to issue all instructions."""
        return self.instructions / (ISSUED * SMS * CLOCK)

    @property
    def moved_bytes(self) -> int:
        """The lower bound of the bytes that the call reads and writes."""
        return lower_bound(self.plan, self.channels, self.value_bytes).total_bytes

    def summary(self) -> str:
        """Return one line with the instructions and bytes of the call, and the times that follow from them."""
        times = (
            f"{self.moved_bytes / rate * 1e6:.0f} µs on {gpu} at {rate / 1e12} TB/s" for gpu, rate in BANDWIDTH.items()
        )
        return (
            f"{self.instructions / 1e6:.1f} million warp instructions: {self.issue_seconds * 1e6:.0f} µs at {ISSUED} a "
            f"cycle and multiprocessor. {self.moved_bytes / 1e6:.1f} MB: {', '.join(times)}."
        )

    def table(self) -> Table:
        """Return a table with a row for each kind of programs of every launch, and one for the whole call."""
        table = Table("launch", "kernel", "programs", box=box.MARKDOWN)
        for name in ("steps", "pooled", "shrunk", "longest chain", "instructions, million", "in flight, KiB"):
            table.add_column(name, justify="right")
        for number, launch in enumerate(self.launches, 1):
            flight = f"{launch.bytes_in_flight(self.channels * self.value_bytes) / 1024:.0f}"
            for programs, instructions in zip(launch.programs, launch.instructions, strict=True):
                counts = (programs.steps, programs.pooled, programs.shrunk, programs.longest)
                kind = f"{programs.programs} {programs.kind}"
                cells = (str(number), launch.kernel, kind, *map(str, counts), f"{instructions / 1e6:.2f}", flight)
                table.add_row(*cells)
        every = [programs for launch in self.launches for programs in launch.programs]
        sums = (
            sum(getattr(programs, name) for programs in every) for name in ("programs", "steps", "pooled", "shrunk")
        )
        longest = max((programs.longest for programs in every), default=0)
        table.add_row("all", "", *map(str, (*sums, longest)), f"{self.instructions / 1e6:.2f}", "")
        return table


def show(calls: Iterable[ExecutedCall]) -> None:
    """Print the tables of calls in Markdown."""
    console = Console(width=300)  # a line of a Markdown table must not be broken
    for call in calls:
        with console.capture() as captured:
            console.print(call.table())
        lines = (line.rstrip() for line in captured.get().splitlines())
        print(f"Executed by {call.title}:\n", *filter(None, lines), "", call.summary(), "", sep="\n", flush=True)
