"""Calls on a video without frames are timed warm and cold, in the mode they name, next to an empty op."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import overhead
from benchmarks.__main__ import main
from benchmarks.devices import Cpu
from benchmarks.measure import SampleBudget, measure
from benchmarks.provider import mismatch
from benchmarks.providers import providers
from benchmarks.results import load
from benchmarks.workloads import WORKLOADS, parse_workload, random_tokens

EMPTY = WORKLOADS["empty"]
NAMES = ["empty:op", "empty:op, inference mode", "empty:function", "empty:python op"]

pytestmark = pytest.mark.usefixtures("caches")


@pytest.mark.parametrize("workload", [EMPTY, parse_workload("empty:fp32")], ids=["bf16", "fp32"])
def test_every_provider_is_right(workload: Any) -> None:
    x = random_tokens(workload.shape, workload.dtype, "cpu", 0)
    found = providers(workload, "cpu")
    assert [provider.name for provider in found] == NAMES
    for provider in found:
        result = provider.call(x)
        assert (result.shape, result.dtype) == ((0, 13, 13, 3584), workload.dtype)
        assert mismatch(result, provider.definition(x), 0) is None
        assert mismatch(result[:, 1:], provider.definition(x), 0) is not None
        assert mismatch(result.double(), provider.definition(x), 0) is not None


def test_the_empty_op_has_the_schema_of_the_op() -> None:
    ops = (torch.ops.stgp_benchmarks.empty.default, torch.ops.stgp.grid_pool.default)
    empty, op = (str(each._schema).partition("(")[2] for each in ops)
    assert empty == op
    x = torch.empty(EMPTY.shape)
    assert torch.equal(torch.ops.stgp_benchmarks.empty(x, temperature=2.0), torch.empty(overhead.RESULT))


@pytest.mark.parametrize("other", ["64x27x27x3584", "empty:ceil", "1x9x9x384"])
def test_other_workloads_are_refused(other: str) -> None:
    workload = replace(parse_workload(other), kind="empty")
    with pytest.raises(ValueError, match=f'timed on the workload "empty", got {other}'):
        providers(workload, "cpu")


def test_rows_have_warm_and_cold_times_in_their_mode(without_waiting: None) -> None:
    modes: dict[str, Counter[bool]] = {name: Counter() for name in NAMES}

    def counted(name: str, call: Any, x: Tensor) -> Tensor:
        modes[name][torch.is_inference_mode_enabled()] += 1
        result: Tensor = call(x)
        return result

    timed = [
        replace(p, call=lambda x, name=p.name, call=p.call: counted(name, call, x))  # type: ignore[misc]
        for p in providers(EMPTY, "cpu")
    ]
    rows = measure(EMPTY, timed, Cpu(1), "some run", baseline="empty:python op", effort=SampleBudget(3, 3))
    found = {row.provider: row for row in rows}
    for name in NAMES:
        row = found[name]
        assert (row.check, row.samples, row.baseline, row.shape) == ("ok", 3, "empty:python op", EMPTY.shape)
        assert (row.read_bytes, row.write_bytes, row.gb_per_s, row.percent_of_copy) == (0, 0, None, None)
        assert min(row.overhead_us, row.p50_us, row.times_baseline) > 0
        inference = "inference" in name
        assert modes[name][inference] > 300  # warm calls
        assert modes[name][not inference] == int(inference)  # the result is checked outside of the mode


def test_the_command_compares_with_the_empty_op(
    tmp_path: Path, without_waiting: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--shape", "empty", "--samples", "2", "-o", str(tmp_path / "r.jsonl")]
    assert main(arguments) == 0
    assert "empty, python op" in capsys.readouterr().out
    assert main([*arguments, "--baseline", "copy"]) == 0
    first, second = load(tmp_path / "r.jsonl")
    assert [{row.baseline for row in results.rows} for results in (first, second)] == [{"empty:python op"}, {"copy"}]
    ratios = {row.provider: row.times_baseline for row in first.rows}
    assert ratios["empty:python op"] == 1
    assert ratios.keys() > {*NAMES}
