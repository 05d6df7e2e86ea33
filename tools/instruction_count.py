"""Warp instructions that the blocks of a launch execute, from the machine code of a kernel and the trips of its loops.

`read_graph` divides a listing of nvdisasm into basic blocks and finds the edges between them. `count_instructions` adds
up what programs execute, where a program is a block of the launch, and a step of it is a cell or a window:

- A program without a step executes a path that stores nothing. Another one executes a path through the loop over steps,
  and in that loop a path for each of its steps: one with a store of a pooled token or without, and with a store of a
  cell of a thumbnail or without, as the step has them. Where no path leads past a store, the store has a predicate.
- An instruction with a predicate counts, because it is issued.
- Slow paths do not count: functions that are called (of roots and divisions of unusual numbers), the calls
  themselves where a path leads past them, and code for warps that have diverged at a shuffle. Neither does what no path
  leads to: the endless loop behind the end of a kernel, and the padding.
- Of the paths that remain, the longest counts, because all threads of a warp are assumed to take the same. So the load
  of a halo counts, even if the first row or column has none. An inner loop counts once a step, with every copy that
  the compiler has made of it.

The count is the same for all warps of a block. It is an upper bound where warps leave early.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

LINE = re.compile(r"^([.$\w]+):\s*$|/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
"""Matches a label, or else an instruction: its predicate if there is one, its name and its operands."""

TARGET = re.compile(r"`\(([^)]+)\)")
"""Matches the label that a branch names among its operands."""

TABLE = re.compile(r"BRANCH_TARGETS ([^\"]+)\"")
"""Matches the labels that nvdisasm lists for an indirect branch."""


@dataclass(frozen=True)
class BasicBlock:
    """Instructions that are executed one after the other, in the order of the code.

    instructions: their names with modifiers. successors: the numbers of the basic blocks that may follow. exits:
    whether a thread may end here. calls: whether the last instruction calls a function.
    """

    instructions: tuple[str, ...]
    successors: tuple[int, ...]
    exits: bool
    calls: bool

    def pools(self) -> bool:
        """Return whether the block stores pooled tokens, or computes their weights.

        Pooled tokens are not read again, and are the only values that are stored to be evicted first. The only powers
        that a kernel computes are for weights.
        """
        return any(name.startswith("MUFU.EX2") or (_is_store(name) and ".EF" in name) for name in self.instructions)

    def shrinks(self) -> bool:
        """Return whether the block stores cells of thumbnails, which are all values but pooled tokens."""
        return any(_is_store(name) and ".EF" not in name for name in self.instructions)


def _is_store(name: str) -> bool:
    return name.split(".")[0] in ("STG", "ST")


@dataclass(frozen=True)
class Programs:
    """The programs of one kind in a launch, where a program is a block of the launch.

    kind: "rows" of frames that are shrunk, "windows" of frames that are not, or "mosaics", the rows of summaries.
    programs: their number. busy: the number of those that have any step. steps: the cells or windows of all programs.
    pooled, shrunk: the numbers of steps that store a pooled token, and of those that store a cell of a thumbnail.
    longest: the most steps that one program takes, one after the other.
    """

    kind: str
    programs: int
    busy: int
    steps: int
    pooled: int
    shrunk: int
    longest: int


Graph = Sequence[BasicBlock]
"""The basic blocks of a kernel in the order of the code; execution begins at the first."""

Edges = Mapping[int, Sequence[int]]
"""The basic blocks that may follow each basic block, by number."""


def read_graph(listing: str) -> Graph:
    """Return the basic blocks of a kernel from the listing that nvdisasm prints of it.

    Raises ValueError if a branch has a target that the listing does not name.
    """
    runs: list[list[re.Match[str]]] = [[]]
    labels: dict[str, int] = {}
    for found in LINE.finditer(listing):
        if found[1] is not None:
            if runs[-1]:
                runs.append([])
            labels[found[1]] = len(runs) - 1
            continue
        runs[-1].append(found)
        if found[3].split(".")[0] in ("BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT", "KILL", "BPT"):
            runs.append([])
    return [_read_block(run, number, len(runs), labels) for number, run in enumerate(runs)]


def _read_block(run: Sequence[re.Match[str]], number: int, blocks: int, labels: dict[str, int]) -> BasicBlock:
    names = tuple(found[3] for found in run)
    following = (number + 1,) if number + 1 < blocks else ()
    if not run:
        return BasicBlock((), following, False, False)
    _, predicate, name, operands = run[-1].groups()
    kind, *modifiers = name.split(".")
    if kind in ("EXIT", "KILL", "RET", "BPT"):
        # a trap ends a kernel whatever the debugger does
        return BasicBlock(names, following if predicate else (), kind == "EXIT", False)
    if kind not in ("BRA", "BRX", "JMP", "JMX") or "DIV" in modifiers:
        return BasicBlock(names, following, False, kind == "CALL")
    table = TABLE.search(operands)
    targets = [label.strip() for label in table[1].split(",")] if table else TARGET.findall(operands)
    if not targets or any(target not in labels for target in targets):
        raise ValueError(f"no label in the listing is the target of {name}{operands}")
    # a condition is a predicate before the name, or an operand before the target
    conditional = predicate is not None or (table is None and operands.split("`")[0].strip() != "")
    successors = dict.fromkeys((*(labels[target] for target in targets), *(following if conditional else ())))
    return BasicBlock(names, tuple(successors), False, False)


def count_instructions(graph: Graph, programs: Programs) -> int:
    """Return how many instructions one warp of each of these programs executes, summed over the programs."""
    edges = _edges_of_kind(_edges_of_calls(graph), graph, programs.kind)
    exits = {block for block in edges if graph[block].exits}
    working = {block for block in edges if graph[block].pools() or graph[block].shrinks()}
    loops = [loop for loop in _loops(edges) if loop & working]
    sizes = {block: len(graph[block].instructions) for block in edges}
    inside = working.union(*loops)
    total = (programs.programs - programs.busy) * _longest(edges, _between(edges, {0}, exits, inside), sizes)
    if not loops and programs.steps == programs.busy:
        return total + _count_steps(graph, edges, {0}, exits & _reach(edges, working), programs)
    for loop in loops:
        heads = {block for block in loop if block == 0 or any(block in edges[other] for other in edges.keys() - loop)}
        step = {block: [later for later in edges[block] if later in loop - heads] for block in loop}
        ends = {block for block in loop if graph[block].exits or len(step[block]) < len(edges[block])}
        total += _count_steps(graph, step, heads, ends, programs)
        sizes |= dict.fromkeys(loop, 0)
    return total + programs.busy * _longest(edges, _connected(edges, inside), sizes)


def _count_steps(graph: Graph, step: Edges, heads: set[int], ends: set[int], programs: Programs) -> int:
    """Return how many instructions all steps execute, each on a path from `heads` to `ends`."""
    both = programs.pooled + programs.shrunk - programs.steps
    sizes = {block: len(graph[block].instructions) for block in step}
    kinds = {(True, True): both, (True, False): programs.pooled - both, (False, True): programs.shrunk - both}
    return sum(
        times * _longest(step, _blocks_of_step(graph, step, heads, ends, pools, shrinks), sizes)
        for (pools, shrinks), times in kinds.items()
    )


def _blocks_of_step(
    graph: Graph, step: Edges, heads: set[int], ends: set[int], pools: bool, shrinks: bool
) -> Collection[int]:
    """Return the basic blocks that a step may pass which stores a pooled token, a cell, or both."""
    blocks = set(step)
    for works, wanted in ((BasicBlock.pools, pools), (BasicBlock.shrinks, shrinks)):
        working = {block for block in blocks if works(graph[block])}
        if not working or not _between(step, heads, ends, working | (step.keys() - blocks)):
            continue  # no path leads past this work, so that it has a predicate
        chosen = blocks & _connected(step, working) if wanted else blocks - working
        blocks = _between(step, heads, ends, step.keys() - chosen) or blocks
    return blocks


def _longest(edges: Edges, blocks: Collection[int], sizes: Mapping[int, int]) -> int:
    """Return the most instructions on a path through these basic blocks. A loop on it is passed once, as a whole."""
    inner = {block: [later for later in edges[block] if later in blocks] for block in blocks}
    loops = {block: frozenset(loop) for loop in _loops(inner) for block in loop}
    found: dict[frozenset[int], int] = {}
    waiting = [loops.get(block, frozenset({block})) for block in inner]
    while waiting:
        node = waiting[-1]
        after = {loops.get(later, frozenset({later})) for block in node for later in inner[block]} - {node}
        unknown = after - found.keys()
        if unknown and node not in found:
            waiting += unknown
            continue
        found[node] = sum(sizes[block] for block in node) + max((found[later] for later in after), default=0)
        waiting.pop()
    return max(found.values(), default=0)


# ---- parts of the graph ----


def _edges_of_calls(graph: Graph) -> Edges:
    """Return the edges between the basic blocks that run in usual cases: without calls that a path leads past."""
    every = {number: block.successors for number, block in enumerate(graph)}
    reached = _reach(every, {0})
    calling = {block for block in reached if graph[block].calls}
    usual = _reach(every, {0}, calling)
    kept = usual if all(block in usual for block in reached if _is_needed(graph[block])) else reached
    return {block: [later for later in every[block] if later in kept] for block in kept}


def _is_needed(block: BasicBlock) -> bool:
    return block.exits or block.pools() or block.shrinks()


def _edges_of_kind(edges: Edges, graph: Graph, kind: str) -> Edges:
    """Return the edges that programs of a kind can take, if the first condition of a kernel tells its kinds apart.

    On one side of that condition, but outside of all loops that it is in, pooled tokens are stored and cells are not:
    that side is for windows. All cells are stored on the other side.
    """
    cells = {block for block in edges if graph[block].shrinks()}
    tokens = {block for block in edges if graph[block].pools()}
    for block in sorted(edges) if cells and tokens else ():
        for windows, others in permutations(edges[block], 2):
            of_windows, of_others = _reach(edges, {windows}), _reach(edges, {others})
            alone = of_windows - of_others
            if block not in of_others and cells <= of_others and not cells & of_windows and tokens & alone:
                dropped = others if kind == "windows" else windows
                kept = {**edges, block: [later for later in edges[block] if later != dropped]}
                reached = _reach(kept, {0})
                return {block: kept[block] for block in reached}
    return edges


def _reach(edges: Edges, starts: Iterable[int], avoided: Collection[int] = ()) -> set[int]:
    """Return the basic blocks on paths from `starts` that pass none of `avoided`."""
    found = {block for block in starts if block not in avoided}
    waiting = list(found)
    while waiting:
        for block in edges[waiting.pop()]:
            if block not in found and block not in avoided:
                found.add(block)
                waiting.append(block)
    return found


def _between(edges: Edges, starts: Iterable[int], ends: Iterable[int], avoided: Collection[int]) -> set[int]:
    """Return the basic blocks on paths from `starts` to `ends` that pass none of `avoided`."""
    return _reach(edges, starts, avoided) & _reach(_reversed(edges), ends, avoided)


def _connected(edges: Edges, blocks: Iterable[int]) -> set[int]:
    """Return these basic blocks and all that are on a path with one of them."""
    chosen = set(blocks)
    return _reach(edges, chosen) | _reach(_reversed(edges), chosen)


def _reversed(edges: Edges) -> Edges:
    """Return the basic blocks that may precede each basic block."""
    back: dict[int, list[int]] = {block: [] for block in edges}
    for block, later in edges.items():
        for successor in later:
            back[successor].append(block)
    return back


def _loops(edges: Edges) -> list[set[int]]:
    """Return the outermost loops: the largest sets of basic blocks in which paths lead from each to each."""
    after = {block: _reach(edges, edges[block]) for block in edges}
    found: list[set[int]] = []
    for block in edges:
        if block in after[block] and not any(block in loop for loop in found):
            found.append({other for other in after[block] if block in after[other]})
    return found
