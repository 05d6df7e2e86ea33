"""`python -m benchmarks.stream`, in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import stream
from benchmarks.results import load

SMALL = ["--size", "5x7x8", "--chunk", "1", "32", "--streams", "1", "2", "--periods", "1", "--device", "cpu"]


def test_rows_are_printed_and_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "results.jsonl"
    for _ in range(2):
        stream.main([*SMALL, "-o", str(path)])
    assert f"appended to {path}" in capsys.readouterr().out
    first, second = path.read_text().splitlines()[:5], path.read_text().splitlines()[5:]
    assert [line.split('"kind": "')[1].split('"')[0] for line in first] == ["run", *["push"] * 4]
    assert len(second) == 5
    assert load(path)[0].run.settings["size"] == [5, 7, 8]


def test_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    stream.main([*SMALL, "--options", "output_size=2:3", "norm_type=inf", "frame_strides=1:4", "-o", str(path)])
    assert "bfloat16, output_size=2:3, norm_type=inf, frame_strides=1:4," in " ".join(capsys.readouterr().out.split())
    expected = {"output_size": "2:3", "norm_type": "inf", "frame_strides": "1:4"}
    assert load(path)[0].run.settings["options"] == expected


@pytest.mark.parametrize("options", [["frame_strides=3", "sampling=first"], ["frame_strides=3", "grid_shape=5:5"]])
def test_strides_that_do_not_matter(options: list[str], tmp_path: Path) -> None:
    """Rows are held against grid_pool here too."""
    stream.main([*SMALL, "--options", *options, "-o", str(tmp_path / "results.jsonl")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["frame_strides=3"], "frame_strides must divide 64"),
        (["kernel_size=9"], "leaves no window on a 5 × 7 frame"),
        (["resize=nearest"], "resize must be one of"),
        (["output_size=2", "ceil_mode=true"], "output_size="),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stream.main([*SMALL, "--options", *options, "--no-save"])
    assert message in capsys.readouterr().err


def test_nothing_is_saved_unasked(tmp_path: Path) -> None:
    stream.main([*SMALL, "--no-save", "-o", str(tmp_path / "results.jsonl")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streams", [1, 2])
def test_wrong_results_are_not_timed(streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "grid_pool", lambda x, **options: torch.zeros(len(x), 2, 3, 8, dtype=x.dtype))
    with pytest.raises(SystemExit, match=f"pushes of 1 frames to {streams} streams differ from grid_pool"):
        stream.main([*SMALL, "--streams", str(streams), "--no-save"])


@pytest.mark.parametrize(
    "arguments",
    [["--size", "5x7"], ["--size", "5x0x8"], ["--chunk", "5"], ["--chunk", "0"], ["--streams", "0"], ["--periods", "0"]]
    + [["--dtype", "int8"], ["--backend", "abacus"], ["--options", "output_size"], ["--options", "out=1"]]
    + [["--options", "backend=cpu"], ["--options", "temperature=warm"]],
    ids=str,
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stream.main(arguments)
    assert f"argument {arguments[0]}: invalid" in capsys.readouterr().err
