"""The command `stgp bench` prints times, here made-up ones, and refuses mistakes before anything is timed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.benchmark

from stgridpool_kernels import grid_pool
from stgridpool_kernels.cli import bench as bench_command
from stgridpool_kernels.cli.main import main

SMALL = ["bench", "--device", "cpu", "--shape", "9x5x7x8"]


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List the functions that were timed, of which the first takes 1 to 3 ms and each 10 times as long as the last."""
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
    (line,) = [line.split() for line in printed.splitlines() if line.strip().startswith("LLaVA")]
    assert (line[2:5], line[-1]) == (["100", "200", "300"], "100.00")
    assert "grid_pool is 100 times as fast as LLaVA-style pooling, which it stands in for, and 10000 times" in printed


@pytest.mark.parametrize("busy", [0.52, 0.0])
def test_a_narrow_pipe_loses_no_digits_and_hears_of_progress(
    busy: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_command, "others_cores", lambda: lambda: busy)
    monkeypatch.setenv("COLUMNS", "30")
    assert main(SMALL) == 0
    shown = capsys.readouterr()
    (line,) = [line.split() for line in shown.out.splitlines() if line.strip().startswith("naive")]
    assert (line[:2], line[2:5], line[-1]) == (["naive", "ST-GridPool"], ["10000", "20000", "30000"], "10000.00")
    assert "…" not in shown.out
    assert ("NOT QUIET: others used up to 0.52" in shown.out) == (busy > 0.1)
    names = ["grid_pool", "norm_pool", "LLaVA-style pooling", "avg_pool2d", "naive ST-GridPool"]
    assert shown.err.splitlines() == [f"{name}, {number} of 5" for number, name in enumerate(names, 1)]


def test_one_json_object(capsys: pytest.CaptureFixture[str], timed: list[Any]) -> None:
    assert main([*SMALL, "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["dtype"], found["shape"]) == ("cpu", "float32", [9, 5, 7, 8])
    names = ["grid_pool", "norm_pool", "LLaVA-style pooling", "avg_pool2d", "naive ST-GridPool"]
    assert [timing["name"] for timing in found["timings"]] == names
    assert len(timed) == 5
    first = found["timings"][0]
    assert (first["p20_us"], first["p50_us"], first["p80_us"]) == pytest.approx((1000, 2000, 3000))
    assert first["gb_per_s"] == pytest.approx((9 * 5 * 7 * 8 + 9 * 2 * 3 * 8) * 4 / 2e6)


@pytest.mark.parametrize("factor", [float("nan"), 1.2])
def test_wrong_results_are_not_timed(
    factor: float, timed: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_command, "naive_grid_pool", lambda x: grid_pool(x) * factor)
    assert main(SMALL) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("stgp bench: naive ST-GridPool is off by ")
    assert (printed.out, len(timed)) == ("", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "9x5x7"], "--shape must be TxHxWxC with H and W of at least 2, as in 32x27x27x896; got '9x5x7'"),
        (["--shape", "9x1x7x8"], "got '9x1x7x8'"),
        (["--device", "tpu"], "--device must be one that can be used here, got 'tpu'"),
        (["--device", "cuda:99"], "--device must be one that can be used here, got 'cuda:99' ("),
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
