"""A plan's tables, read by the names that csrc/tables.h gives their words, are the plan, and their stages are safe.

The file that `save_tables` writes holds them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stgridpool_kernels import grid_plan
from stgridpool_kernels.plan import GridPlan, Runs, save_tables, tables
from stgridpool_kernels.plan.dataflow import Dataflow, live_cells
from stgridpool_kernels.plan.tables import (
    ChunkEntry,
    GradientSection,
    Header,
    LevelRecord,
    chunk_tables,
    plan_tables,
    stages_of,
)
from tests.support.steps import steps
from tests.support.strategies import gridding_arguments, window_arguments

HEADER = Path(__file__).parents[2] / "csrc" / "tables.h"

SLOTS_ARE_REUSED = grid_plan([64], 27, 27)
"""The third of its levels samples summaries, whose thumbnails are made after the last use of those of frames."""

TILES_ARE_DEAD = grid_plan([4], 3, 3, frame_strides=(1,))
"""No pooled token depends on three of the four thumbnails of its mosaic."""


def constants(text: str) -> dict[str, int]:
    """Return the constexpr integers of a C++ header, and its enumerators counted from 0."""
    text = re.sub(r"//.*", "", text)
    found = {name: int(value, 0) for name, value in re.findall(r"constexpr int32_t (\w+) = (\w+);", text)}
    for body in re.findall(r"enum \w+ : int32_t \{(.*?)\}", text, re.DOTALL):
        following = 0
        for name, value in re.findall(r"(\w+)\s*(?:=\s*([^,]+))?,", body):
            if value:
                following = sum(found[term] if term in found else int(term) for term in re.split(r"\s*\+\s*", value))
            found[name] = following
            following += 1
    return found


C = constants(HEADER.read_text())


def test_constants_are_those_of_the_header() -> None:
    for name in ("MAGIC", "VERSION", "HEADER_WORDS", "ENTRY_WORDS", "CONSUMER_WORDS"):
        assert getattr(tables, name) == C[name], name
    assert (C["E_SOURCES"], C["ENTRY_WORDS"]) == (4, 8)


@pytest.mark.parametrize(
    ("record", "prefix", "further"),
    [
        (Header, "H", ("HEADER_WORDS",)),
        (LevelRecord, "L", ("LEVEL_WORDS",)),
        (tables.Stage, "S", ("STAGE_WORDS",)),
        (GradientSection, "G", ("G_LEVELS",)),
    ],
)
def test_fields_are_the_enumerators_of_the_header(record: Any, prefix: str, further: tuple[str, ...]) -> None:
    """Every field has the place of the enumerator of its name. No field is called `count`, a method of tuples."""
    enumerators = [name for name in C if name.startswith(f"{prefix}_") and name not in further]
    fields = ["count" if name in ("num_summaries", "num_entries") else name for name in record._fields]
    assert [f"{prefix}_{name.upper()}" for name in fields] == sorted(enumerators, key=C.__getitem__)
    assert [C[name] for name in (*enumerators, *further)] == list(range(len(fields) + 1))


# ---- reading ----


@dataclass(frozen=True)
class Entry:
    node: int
    target: int
    slot: int
    live: tuple[int, ...]
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    mosaic: int
    shrunk: int
    after: int
    entries: tuple[Entry, ...]

    @cached_property
    def reads(self) -> set[int]:
        return {slot for entry in self.entries if self.mosaic for slot in entry.sources if slot >= 0}

    @cached_property
    def writes(self) -> list[int]:
        return [entry.slot for entry in self.entries if entry.slot >= 0]


class Reader:
    """A reader takes tables apart; every access is inside them and behind the header, and is remembered."""

    def __init__(self, words: Sequence[int]) -> None:
        self.words = words
        self.read = set(range(C["HEADER_WORDS"]))

    def header(self, name: str) -> int:
        return self.words[C[name]]

    def take(self, offset: int, count: int) -> tuple[int, ...]:
        assert C["HEADER_WORDS"] <= offset <= offset + count <= len(self.words)
        self.read.update(range(offset, offset + count))
        return tuple(self.words[offset : offset + count])

    def runs(self, offset: int, count: int) -> Runs:
        return Runs(self.take(offset, count), self.take(offset + count, count))

    def records(self, offset: str, count: str, words: str) -> list[tuple[int, ...]]:
        first, size = self.header(offset), C[words]
        return [self.take(first + i * size, size) for i in range(self.header(count))]

    def levels(self) -> list[tuple[int, int, list[tuple[int, ...]], Runs, Runs]]:
        """Return (rows, cols, sources of every summary, row runs, column runs) of every level."""
        found = []
        for level in self.records("H_LEVELS", "H_NUM_LEVELS", "LEVEL_WORDS"):
            rows, cols, first, count = (level[C[name]] for name in ("L_ROWS", "L_COLS", "L_FIRST", "L_COUNT"))
            assert first == sum(len(summaries) for _, _, summaries, _, _ in found)
            sources = self.take(level[C["L_SOURCES"]], count * rows * cols)
            groups = [sources[i : i + rows * cols] for i in range(0, len(sources), rows * cols)]
            row_runs = self.runs(level[C["L_ROW_RUNS"]], self.header("H_HEIGHT"))
            found.append((rows, cols, groups, row_runs, self.runs(level[C["L_COL_RUNS"]], self.header("H_WIDTH"))))
        return found

    def stages(self) -> list[Stage]:
        h = -(-self.header("H_HEIGHT") // 2)
        found = []
        for stage in self.records("H_STAGES", "H_NUM_STAGES", "STAGE_WORDS"):
            entries = []
            for i in range(stage[C["S_COUNT"]]):
                entry = self.take(stage[C["S_ENTRIES"]] + i * C["ENTRY_WORDS"], C["ENTRY_WORDS"])
                live = self.take(entry[C["E_LIVE"]], h)
                node, target, slot = (entry[C[name]] for name in ("E_NODE", "E_TARGET", "E_SLOT"))
                entries.append(Entry(node, target, slot, live, entry[C["E_SOURCES"] :]))
            found.append(Stage(stage[C["S_MOSAIC"]], stage[C["S_SHRUNK"]], stage[C["S_AFTER"]], tuple(entries)))
        return found


# ---- properties ----


@st.composite
def plans(draw: st.DrawFn) -> GridPlan:
    """Draw plans, most of which have a fused form."""
    counts = draw(st.lists(st.sampled_from([16, 32, 9, 64, 0, 21, 1, 40]), min_size=0, max_size=3))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.sampled_from(["fused", "fused", "any"])) == "any":
        arguments = draw(gridding_arguments()) | draw(window_arguments(height, width))
    else:
        strides = st.lists(st.sampled_from([2, 4, 1, 8, 3]), max_size=4)
        arguments = {"frame_strides": draw(strides), "sampling": draw(st.sampled_from(["last", "first"]))}
        arguments["ceil_mode"] = draw(st.booleans()) or min(height, width) < 2
    return grid_plan(counts, height, width, **arguments)


frames_per_stage = st.sampled_from([None, 4, 1, 14, 2, 100])


@given(plans(), frames_per_stage)
def test_general_form_is_the_plan(plan: GridPlan, frames_per_stage: int | None) -> None:
    words = plan_tables(plan, frames_per_stage=frames_per_stage)
    reader = Reader(words)
    graph = Dataflow.of(plan)
    assert (reader.header("H_MAGIC"), reader.header("H_VERSION")) == (C["MAGIC"], C["VERSION"])
    assert reader.header("H_WORDS") == len(words)
    assert (reader.header("H_HEIGHT"), reader.header("H_WIDTH")) == (plan.height, plan.width)
    assert (reader.header("H_OUT_ROWS"), reader.header("H_OUT_COLS")) == plan.pooled_size
    largest = max(r * c for r in plan.window_rows.count for c in plan.window_cols.count)
    assert reader.header("H_LARGEST_WINDOW") == largest
    assert reader.runs(reader.header("H_WINDOW_ROWS"), plan.pooled_size[0]) == plan.window_rows
    assert reader.runs(reader.header("H_WINDOW_COLS"), plan.pooled_size[1]) == plan.window_cols
    assert reader.header("H_FRAMES") == len(graph.outputs)
    assert reader.take(reader.header("H_OUTPUTS"), reader.header("H_FRAMES")) == graph.outputs

    assert reader.header("H_SUMMARIES") == len(graph.summaries)
    levels, numbers = reader.levels(), graph.by_level()
    for (rows, cols, sources, row_runs, col_runs), of_level in zip(levels, numbers, strict=True):
        level = plan.levels[graph.summaries[of_level[0]].level]
        assert (rows, cols, row_runs, col_runs) == (level.rows, level.cols, level.row_runs, level.col_runs)
        assert sources == [graph.summaries[s].sources for s in of_level]
        assert all(~source < of_level[0] for group in sources for source in group)  # of the levels before

    assert bool(reader.stages()) == (plan.fusable and len(graph.outputs) > 0)
    # no word is left over, except that a row of no live cells is always there
    assert not any(words[word] for word in set(range(len(words))) - reader.read)


@given(plans())
@example(SLOTS_ARE_REUSED)
def test_gradient_section_is_the_converse(plan: GridPlan) -> None:
    """Consumers invert the sources of levels, ends the output nodes, and inverse runs the runs and the windows."""
    words = plan_tables(plan, gradient=True)
    reader, plain = Reader(words), Reader(plan_tables(plan))
    assert plain.header("H_GRADIENT") == 0
    levels = reader.levels()
    assert levels == plain.levels()
    frames, summaries = reader.header("H_FRAMES"), reader.header("H_SUMMARIES")
    outputs = reader.take(reader.header("H_OUTPUTS"), frames)
    section = reader.take(reader.header("H_GRADIENT"), C["G_LEVELS"] + 2 * len(levels))

    expected: dict[int, list[tuple[int, int, int]]] = {}
    s = 0
    for number, (_, _, groups, _, _) in enumerate(levels):
        for sources in groups:
            for tile, source in enumerate(sources):
                expected.setdefault(source, []).append((s, number, tile))
            s += 1
    starts = reader.take(section[C["G_CONSUMERS"]], frames + summaries + 1)
    nodes = [*range(frames), *(~s for s in range(summaries))]
    ends = reader.take(section[C["G_ENDS"]], len(nodes))
    assert ends == tuple(outputs.index(node) if node in outputs else -1 for node in nodes)
    for number, node in enumerate(nodes):
        consumers = reader.take(starts[number], starts[number + 1] - starts[number])
        size = C["CONSUMER_WORDS"]
        found = [consumers[i : i + size] for i in range(0, len(consumers), size)]
        assert found == expected.get(node, [])

    def assert_converse(offset: int, runs: Runs, size: int) -> None:
        covering = reader.runs(offset, size)
        for position in range(size):
            first, count = covering.start[position], covering.count[position]
            covered = [i for i in range(len(runs)) if runs.start[i] <= position < runs.start[i] + runs.count[i]]
            assert covered == list(range(first, first + count))

    for number, (rows, cols, _, row_runs, col_runs) in enumerate(levels):
        assert_converse(section[C["G_LEVELS"] + 2 * number], row_runs, rows * plan.height)
        assert_converse(section[C["G_LEVELS"] + 2 * number + 1], col_runs, cols * plan.width)
    row_windows = reader.runs(reader.header("H_WINDOW_ROWS"), plan.pooled_size[0])
    col_windows = reader.runs(reader.header("H_WINDOW_COLS"), plan.pooled_size[1])
    assert_converse(section[C["G_WINDOW_ROWS"]], row_windows, plan.height)
    assert_converse(section[C["G_WINDOW_COLS"]], col_windows, plan.width)

    stages = reader.stages()
    assert bool(stages) == bool(plain.stages())
    if stages:  # every node once, and no two in one slot
        entries = [entry for stage in stages for entry in stage.entries]
        assert sorted(entry.node for entry in entries) == list(range(-summaries, frames))
        slots = [entry.slot for entry in entries if entry.slot >= 0]
        assert sorted(slots) == list(range(reader.header("H_SLOTS")))
    assert not any(words[word] for word in set(range(len(words))) - reader.read)


@given(plans(), frames_per_stage)
@example(SLOTS_ARE_REUSED, None)
@example(TILES_ARE_DEAD, None)
def test_stages_compute_every_frame_once(plan: GridPlan, frames_per_stage: int | None) -> None:
    reader = Reader(plan_tables(plan, frames_per_stage=frames_per_stage))
    graph, stages = Dataflow.of(plan), reader.stages()
    if not stages:
        return
    targets = {entry.target: entry.node for stage in stages for entry in stage.entries if entry.target >= 0}
    assert [targets[frame] for frame in range(len(graph.outputs))] == list(graph.outputs)
    assert len(targets) == sum(entry.target >= 0 for stage in stages for entry in stage.entries)

    live, slots, done = live_cells(plan, graph), reader.header("H_SLOTS"), set()
    assert {slot for stage in stages for slot in stage.writes} == set(range(slots))
    held: dict[int, int] = {}  # slot: the node whose thumbnail is in it
    for stage in stages:
        assert [entry.slot >= 0 for entry in stage.entries] == sorted(e.slot >= 0 for e in stage.entries)[::-1]
        assert stage.shrunk == len(stage.writes)
        for entry in stage.entries:
            assert (entry.node < 0) == bool(stage.mosaic)
            assert entry.node not in done
            done.add(entry.node)
            assert (entry.slot >= 0) == (entry.node in live)
            assert entry.live == live.get(entry.node, (0,) * len(entry.live))
            if stage.mosaic:
                for slot, source in zip(entry.sources, graph.summaries[~entry.node].sources, strict=True):
                    assert (slot >= 0) == (source in live)
                    assert slot < 0 or held[slot] == source
            else:
                assert entry.sources == (-1,) * 4
        held.update((entry.slot, entry.node) for entry in stage.entries if entry.slot >= 0)


@given(plans(), frames_per_stage)
def test_stages_side_by_side_do_not_disturb_each_other(plan: GridPlan, frames_per_stage: int | None) -> None:
    """A stage waits for the first S_AFTER stages and for no other: what it may overlap must use other slots."""
    stages = Reader(plan_tables(plan, frames_per_stage=frames_per_stage)).stages()
    for number, stage in enumerate(stages):
        assert 0 <= stage.after <= number
        assert len(set(stage.writes)) == len(stage.writes)
        assert not stage.reads & set(stage.writes)  # entries of a stage run in any order
        for other in stages[stage.after : number]:
            assert not set(stage.writes) & (other.reads | set(other.writes))
            assert not stage.reads & set(other.writes)


def test_stages_of_a_chunk_follow_one_another() -> None:
    """Each level reads thumbnails of the stages before it, so that threads must wait for all of them."""
    plan = grid_plan((), 4, 4)
    stages = [
        [ChunkEntry(0, -1, 0, (2, 2)), ChunkEntry(1, 1, -1, ())],
        [],
        [ChunkEntry(-1, -1, 1, (2, 2), (0, -1, -1, -1))],
        [ChunkEntry(-2, 0, -1, (), (1, -1, -1, -1))],
    ]
    assert [stage.after for stage in stages_of(chunk_tables(plan, 2, stages, 2))] == [0, 1, 2]


@given(plans())
def test_stages_for_a_gpu_are_few(plan: GridPlan) -> None:
    stages = Reader(plan_tables(plan)).stages()
    assert len(stages) <= 1 + len(Dataflow.of(plan).by_level())


def test_stages_for_a_cpu_keep_few_thumbnails() -> None:
    published = grid_plan([64], 27, 27)
    slots = [Reader(plan_tables(published, frames_per_stage=frames)).header("H_SLOTS") for frames in (None, 16, 4)]
    assert slots == sorted(slots, reverse=True)
    assert (slots[0], slots[-1]) == (40, 9)  # as docs/cpu.md says


@pytest.mark.parametrize("packed", [False, True], ids=["one video", "packed"])
@pytest.mark.parametrize("frame_strides", [(2, 4, 8), (1, 2) * 2], ids=str)
@pytest.mark.parametrize("form", [{"frames_per_stage": 4}, {"frames_per_stage": None}, {"gradient": True}], ids=str)
def test_work_grows_with_the_frames(packed: bool, frame_strides: tuple[int, ...], form: dict[str, Any]) -> None:
    """Tables of four times the frames take at most about four times the work."""

    def work(frames: int) -> int:
        plan = grid_plan([32] * (frames // 32) if packed else [frames], 3, 3, frame_strides=frame_strides)
        return steps(lambda: plan_tables(plan, **form))

    assert work(1024) < 4.5 * work(256)


# ---- save_tables ----

PUBLISHED = grid_plan([64], 27, 27)


@pytest.mark.parametrize("form", [{}, {"frames_per_stage": 4}, {"gradient": True}], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"resize": "bilinear"}, {"output_size": (3, 4)}], ids=str)
def test_file_holds_the_tables(tmp_path: Path, arguments: dict[str, Any], form: dict[str, Any]) -> None:
    saved = grid_plan([40, 9], 5, 7, **arguments)
    save_tables(saved, tmp_path / "plan.stgp", **form)
    written = (tmp_path / "plan.stgp").read_bytes()
    words = [int.from_bytes(written[i : i + 4], "little", signed=True) for i in range(0, len(written), 4)]
    assert words == list(plan_tables(saved, **form))
    assert written.startswith(b"STGP\4\0\0\0")
    assert os.listdir(tmp_path) == ["plan.stgp"]


def test_file_is_little_endian_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tables(PUBLISHED, tmp_path / "here")
    monkeypatch.setattr(tables.sys, "byteorder", {"little": "big", "big": "little"}[sys.byteorder])
    save_tables(PUBLISHED, tmp_path / "there")
    here, there = array("i"), array("i")
    here.frombytes((tmp_path / "here").read_bytes())
    there.frombytes((tmp_path / "there").read_bytes())
    assert there != here
    there.byteswap()
    assert there == here
    assert plan_tables(PUBLISHED)[0] == C["MAGIC"]  # the tables in memory stay as they are


def test_existing_file_is_replaced_and_stays_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "plan.stgp"
    path.write_bytes(b"x" * 100_000)
    save_tables(PUBLISHED, str(path))
    written = path.read_bytes()
    assert len(written) == 4 * len(plan_tables(PUBLISHED))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_tables(grid_plan([8], 4, 4), path)
    assert path.read_bytes() == written
    assert os.listdir(tmp_path) == ["plan.stgp"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_tables(PUBLISHED, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_tables(PUBLISHED, tmp_path / "none" / "plan.stgp")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("form", "allowed"),
    [
        ({"frames_per_stage": 0}, "None or at least 1, got 0"),
        ({"frames_per_stage": -4}, "None or at least 1, got -4"),
        ({"frames_per_stage": 4, "gradient": True}, "None where gradient is True, got 4"),
    ],
)
def test_frames_per_stage_is_checked(tmp_path: Path, form: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValueError, match=f"frames_per_stage must be {allowed}"):
        save_tables(PUBLISHED, tmp_path / "plan.stgp", **form)
    assert os.listdir(tmp_path) == []


def test_saving_takes_the_standard_library_alone(tmp_path: Path) -> None:
    code = (
        "import sys, types; package = types.ModuleType('p'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['p'] = package\n"
        "from p.plan import grid_plan, save_tables\n"
        "save_tables(grid_plan([16], 4, 4), sys.argv[2])\n"
        "sys.exit(', '.join({'torch', 'numpy', 'safetensors'} & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(tables.__file__).parents[1]), str(tmp_path / "plan.stgp")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "plan.stgp").exists()
