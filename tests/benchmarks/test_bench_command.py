"""The command `stgp bench`: what it prints of times that are made up, and what it refuses before anything is timed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.benchmark
from torch import Tensor

from stgridpool_kernels import grid_pool
from stgridpool_kernels.cli import bench as bench_command
from stgridpool_kernels.cli.main import main

SMALL = ["bench", "--device", "cpu", "--shape", "9x5x7x8"]


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that were timed. The first takes 1, 2 and 3 ms, and each takes 10 times as long as the last."""
    calls = []

    class Timer:
        def __init__(self, statement: str, globals: dict[str, Any], num_threads: int) -> None:
            assert num_threads == torch.get_num_threads()
            calls.append(globals["pool"])
            eval(statement, globals)

        def blocked_autorange(self, min_run_time: float) -> SimpleNamespace:
            return SimpleNamespace(times=[1e-3 * 10 ** (len(calls) - 1) * share for share in (1, 2, 3)])

    monkeypatch.setattr(torch.utils.benchmark, "Timer", Timer)
    return calls


def test_table_and_its_meaning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(SMALL) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("9x5x7x8 bfloat16, ")
    (line,) = [line.split() for line in printed.splitlines() if line.strip().startswith("LLaVA")]
    assert line[2:5] == ["100", "200", "300"]
    assert line[-1] == "100.00"
    assert printed.splitlines()[-1] == (
        "grid_pool is 100 times as fast as LLaVA-style pooling, which it stands in for, and 10000 times as fast as "
        "naive ST-GridPool."
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_json_object(capsys: pytest.CaptureFixture[str], dtype: str, timed: list[Any]) -> None:
    assert main([*SMALL, "--dtype", dtype, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["dtype"], found["shape"]) == ("cpu", dtype, [9, 5, 7, 8])
    assert found["threads"] == torch.get_num_threads()
    names = ["grid_pool", "norm_pool", "LLaVA-style pooling", "avg_pool2d", "naive ST-GridPool"]
    assert [timing["name"] for timing in found["timings"]] == names
    assert len(timed) == 5
    first = found["timings"][0]
    assert (first["p20_us"], first["p50_us"], first["p80_us"]) == pytest.approx((1000, 2000, 3000))
    moved = (9 * 5 * 7 * 8 + 9 * 2 * 3 * 8) * getattr(torch, dtype).itemsize
    assert first["gb_per_s"] == pytest.approx(moved / 2e6)


@pytest.mark.parametrize("spoilt", [lambda y: y * float("nan"), lambda y: y * 1.2], ids=["NaN", "too large"])
def test_wrong_results_are_not_timed(
    spoilt: Any, timed: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tensor) -> Tensor:
        return spoilt(grid_pool(x))

    monkeypatch.setattr(bench_command, "naive_grid_pool", wrong)
    assert main(SMALL) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("stgp bench: naive ST-GridPool is off by ")
    assert printed.out == ""
    assert wrong not in timed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "9x5x7"], "--shape must be TxHxWxC with H and W of at least 2, as in 32x27x27x896; got '9x5x7'"),
        (["--shape", "9x1x7x8"], "got '9x1x7x8'"),
        (["--shape", "0x5x7x8"], "got '0x5x7x8'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(
    arguments: list[str], message: str, timed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("stgp bench: ")
    assert message in printed.err
    assert (printed.out, timed) == ("", [])
