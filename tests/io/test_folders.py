"""Folders are searched for token files and videos in the same way on every machine, and what is left out is counted."""

from __future__ import annotations

import mimetypes
import os
from collections import Counter
from pathlib import Path

import pytest

from stgridpool_kernels.io.folders import find_inputs, remark_on

CAMERAS = """
3g2 3gp 264 265 asf avi divx dv f4v flv gif h264 hevc insv ivf lrv m2t m2ts m4v mjpeg mjpg mkv mod mov mp4 mpeg mpg mpv
mts mxf nut obu ogm ogv qt tod ts vob webm wmv y4m
""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def found(*inputs: str, output: str = "out", suffix: str = ".safetensors") -> dict[str, str]:
    outputs = find_inputs(Path(output), inputs, lambda file: suffix).outputs
    return {str(source): str(target) for target, source in outputs.items()}


def test_files_of_cameras_are_found_whatever_the_machine_says_of_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimetypes, "guess_type", lambda *_, **__: ("model/vnd.mts", None))
    names = [f"{number}.{suffix}" for number, suffix in enumerate([*CAMERAS, "npy", "npz", "pt", "safetensors"])]
    make(*(f"in/{name}" for name in names), *(f"in/upper/{name.upper()}" for name in names))
    expected = {f"in/{name}": f"out/{Path(name).stem}.safetensors" for name in names}
    upper = {f"in/upper/{name.upper()}": f"out/upper/{Path(name).stem}.safetensors" for name in names}
    assert found("in") == expected | upper


def test_what_is_left_out_is_counted() -> None:
    make("in/a.NPY", "in/b.mkv", "in/more/c.Mp4", "in/e.npy/f.pt", "in/clip.jpg", "in/more/clip.JPG", "in/notes")
    make("in/.d.npy", "in/.cache/x.npy", "elsewhere/y.npy")
    os.symlink("../elsewhere", "in/link")
    os.symlink("..", "in/more/loop")
    os.symlink("../elsewhere/y.npy", "in/y.npy")
    os.symlink("nowhere", "in/z.npy")
    result = find_inputs(Path("out"), ["in"], lambda file: ".pt")
    names = ["a.NPY", "b.mkv", "y.npy", "z.npy", "e.npy/f.pt", "more/c.Mp4"]
    assert {str(source): str(target) for target, source in result.outputs.items()} == {
        f"in/{name}": str(Path("out", name).with_suffix(".pt")) for name in names
    }
    assert result.left_out == {".jpg": 2, "hidden": 2, "linked folder(s)": 2, "without suffix": 1}
    assert remark_on(result.left_out) == ("left out of folders: 2 .jpg, 2 hidden, 2 linked folder(s), 1 without suffix")
    assert remark_on(Counter()) == ""


def test_a_folder_that_cannot_be_listed_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    make("in/a.npy", "in/locked/b.npy")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    result = find_inputs(Path("out"), ["in"], lambda file: ".pt")
    assert list(result.outputs.values()) == [Path("in/a.npy")]
    assert result.unreadable == {Path("in/locked"): "in/locked: Permission denied"}
    with pytest.raises(PermissionError, match="locked"):
        find_inputs(Path("out"), ["in/locked"], lambda file: ".pt")


def test_files_that_differ_in_suffix_alone_have_outputs_of_their_own() -> None:
    make("in/a.mp4", "in/a.gif", "in/a.b.mp4", "in/more/a.mp4")
    assert found("in") == {
        "in/a.mp4": "out/a.mp4.safetensors",
        "in/a.gif": "out/a.gif.safetensors",
        "in/a.b.mp4": "out/a.b.safetensors",
        "in/more/a.mp4": "out/more/a.safetensors",
    }


def test_files_and_folders_may_be_mixed_and_repeated() -> None:
    make("in/a.npy", "b.npy", ".hidden/c.npy")
    expected = {"in/a.npy": "out/a.safetensors", "b.npy": "out/b.safetensors", "none.x": "out/none.safetensors"}
    assert found("in", "b.npy", "b.npy", "in/a.npy", "none.x") == expected
    assert found(".hidden") == {".hidden/c.npy": "out/c.safetensors"}


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["in"], "in", "output must not be in a folder of inputs: in is in in"),
        (["in"], "in/new/out", "output must not be in a folder of inputs: in/new/out is in in"),
        (["in"], "linked/out", "output must not be in a folder of inputs: linked/out is in in"),
        (["."], "out", r"output must not be in a folder of inputs: out is in \."),
        (["in/a.npy", "in/more/a.mp4"], "out", "inputs must differ in name, out/a.safetensors would be made of"),
        (["in", "in/more"], "out", "inputs must differ in name, out/a.safetensors would be made of"),
        (["in/b.safetensors"], "in", "output must not be the folder of an input, which is never overwritten: in/b"),
        (["empty"], "out", r"inputs must hold token files .* or videos, empty has none; left out of folders: 1 .txt"),
        (["in"], "in/a.npy", "output must be a folder, got in/a.npy"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(inputs: list[str], output: str, message: str) -> None:
    make("in/a.npy", "in/b.safetensors", "in/more/a.mp4", "empty/notes.txt")
    os.symlink("in", "linked")
    with pytest.raises((ValueError, NotADirectoryError), match=f"^{message}"):
        found(*inputs, output=output)
