"""Videos are opened if their format holds the pictures itself, and nothing else is opened, whatever a file says."""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stgridpool_kernels.io import formats
from stgridpool_kernels.io.video import VideoError, VideoWarning, count_frames, iter_frames, read_frames
from tests.support.media import pictures, write_video

SIZE = (14, 14)


class Pipe:
    """Bytes that can only be read in order."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read

    def seekable(self) -> bool:
        return False


def stream(path: Path) -> list[np.ndarray]:
    return list(iter_frames(io.BytesIO(path.read_bytes()), str(path), size=SIZE))


def pipe(path: Path) -> list[np.ndarray]:
    return list(iter_frames(Pipe(path.read_bytes()), str(path), size=SIZE))


READERS: dict[str, Callable[[Path], Any]] = {
    "read": lambda path: read_frames(path, 9, size=SIZE),
    "count": count_frames,
    "stream": stream,
    "pipe": pipe,
}

readers = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


# ---- formats that hold their pictures ----

VIDEOS = {
    "a.mp4": {"codec": "libx264"},
    "fast.mp4": {"codec": "libx264", "muxer": {"movflags": "faststart"}},
    "fragments.mp4": {"codec": "libx264", "muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "a.mov": {},
    "a.m4v": {"format": "mp4"},
    "a.3gp": {},
    "a.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "a.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "a.avi": {"sound": True},
    "a.ts": {"codec": "mpeg2video"},
    "a.m2ts": {"codec": "libx264", "muxer": {"mpegts_m2ts_mode": "1"}},
    "a.mpg": {"codec": "mpeg2video"},
    "a.vob": {"codec": "mpeg2video"},
    "a.flv": {"codec": "flv1"},
    "a.ivf": {"codec": "libvpx"},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "a.apng": {"codec": "apng", "pixels": "rgb24"},
    "a.y4m": {"codec": "wrapped_avframe"},
    "a.mxf": {"codec": "mpeg2video"},
    "a.wmv": {"codec": "wmv2", "format": "asf"},
    "a.ogv": {"codec": "libvpx"},
    "a.nut": {},
    "a.h264": {"codec": "libx264"},
    "a.hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "a.m2v": {"codec": "mpeg2video", "format": "mpeg2video"},
    "raw.m4v": {"format": "m4v"},
    "a.mjpeg": {"codec": "mjpeg", "format": "mjpeg", "pixels": "yuvj420p"},
}


@pytest.mark.parametrize(("name", "how"), VIDEOS.items(), ids=VIDEOS)
def test_formats_that_hold_their_pictures(
    name: str, how: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A video of each format is read by path, by stream and by pipe, whatever its name is."""
    path = write_video(tmp_path / name, **how)
    expected = read_frames(path, 9, size=SIZE)
    assert len(expected) == count_frames(path) == 5
    # A palette of 256 colours is 20 off. Frames in another order, or colours exchanged, would be farther.
    assert np.abs(read_frames(path, 9).astype(int) - pictures(5)).mean() < 24
    np.testing.assert_array_equal(stream(path), expected)
    np.testing.assert_array_equal(pipe(path), expected)
    np.testing.assert_array_equal(read_frames(path.rename(tmp_path / "clip.bin"), 9, size=SIZE), expected)
    assert not [each for each in recwarn if issubclass(each.category, VideoWarning)]


PICTURES = {
    "png": ("png", "rgb24"),
    "jpg": ("mjpeg", "yuvj420p"),
    "webp": ("libwebp", "yuv420p"),
    "bmp": ("bmp", "bgr24"),
    "tiff": ("tiff", "rgb24"),
    "ppm": ("ppm", "rgb24"),
}


@pytest.mark.parametrize("suffix", PICTURES)
@pytest.mark.parametrize("name", ["im%03d", "a?b", "s*", "x[1]", "{a,b}", "%d"])
def test_a_picture_is_itself_however_it_is_called(name: str, suffix: str, tmp_path: Path) -> None:
    codec, pixels = PICTURES[suffix]
    for other in ("im000", "im001", "axb", "sa", "x1", "a", "b", "0", "1"):
        (tmp_path / f"{other}.{suffix}").write_bytes(b"not a picture")
    path = tmp_path / f"{name}.{suffix}"
    write_video(tmp_path / f"plain.{suffix}", codec, format="image2", pixels=pixels, frames=1).rename(path)
    frames = read_frames(path, 4)
    assert np.abs(frames.astype(int) - pictures(1)).mean() < 12
    assert len(stream(path)) == 1


# ---- formats that name other files ----


@pytest.fixture
def address() -> Iterator[tuple[str, list[bytes]]]:
    """Yield the address of a server on this machine, and a list that gets all that it is asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(1000))

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)


PLAYLISTS = {
    "segments.m3u8": ("HLS", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/a.ts\n#EXT-X-ENDLIST\n"),
    "local.m3u8": ("HLS", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n"),
    "key.m3u8": (
        "HLS",
        '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-KEY:METHOD=AES-128,URI="{url}/key"\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n',
    ),
    "map.m3u8": (
        "HLS",
        '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MAP:URI="{url}/i.mp4"\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n',
    ),
    "master.m3u8": ("HLS", "\ufeff#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}/b.m3u8\n"),
    "hls.mp4": ("HLS", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/a.ts\n#EXT-X-ENDLIST\n"),
    "concat.mp4": ("concat", "ffconcat version 1.0\nfile good.mp4\n"),
    "concat.txt": ("concat", "ffconcat version 1.0\nfile '{path}'\n"),
    "camera.sdp": ("SDP", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45004 RTP/AVP 96\n"),
    "a.mpd": ("DASH", '<?xml version="1.0"?>\n<MPD><Period><BaseURL>{url}/</BaseURL></Period></MPD>\n'),
    "a.asx": ("ASX", '<ASX version="3"><entry><ref href="{url}/a"/></entry></ASX>'),
    "a.pls": ("PLS", "[playlist]\nFile1={url}/a.mp4\n"),
    "a.xspf": ("XSPF", '<?xml version="1.0"?>\n<playlist xmlns="http://xspf.org/ns/0/"><trackList/></playlist>'),
    "a.smil": ("SMIL", '<smil><body><video src="{url}/a.mp4"/></body></smil>'),
    "a.svg": ("SVG", "<svg xmlns='http://www.w3.org/2000/svg'><image href='{url}/a.png'/></svg>"),
}


@pytest.fixture(params=PLAYLISTS.items(), ids=PLAYLISTS)
def playlist(request: pytest.FixtureRequest, address: tuple[str, list[bytes]], tmp_path: Path) -> tuple[str, Path]:
    """Return what kind of playlist a file is, and its path, beside a sound video that it may name."""
    name, (kind, text) = request.param
    good = write_video(tmp_path / "good.mp4")
    path = tmp_path / name
    path.write_text(text.format(url=f"http://{address[0]}", path=good))
    return kind, path


@readers
def test_playlists_are_refused_by_name(
    reader: Callable[[Path], Any], playlist: tuple[str, Path], address: tuple[str, list[bytes]]
) -> None:
    kind, path = playlist
    cause = f"^{path}: an? {kind} .*, which names other files; only formats that hold their pictures are read$"
    with pytest.raises(VideoError, match=cause):
        reader(path)
    assert not address[1]


@readers
def test_no_other_file_is_opened_for_a_playlist_that_is_not_recognised(
    reader: Callable[[Path], Any],
    playlist: tuple[str, Path],
    address: tuple[str, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(formats, "_PLAYLISTS", {})
    with pytest.raises(VideoError, match=r"not in a format that is read|not a video FFmpeg can read"):
        reader(playlist[1])
    assert not address[1]


@pytest.mark.parametrize("reader", [READERS["read"], stream, pipe])
def test_a_movie_whose_pictures_are_in_another_file_has_none(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    """The data reference is an alias, by an absolute and by a relative name, of a movie of the same layout."""
    good = write_video(tmp_path / "good.mov")
    data = good.read_bytes()
    alias = bytes(10) + b"\3" + b"vol".ljust(27, b"\0") + bytes(12) + b"\x08" + b"good.mov".ljust(63, b"\0") + bytes(16)
    alias += struct.pack(">hh", 1, 1) + bytes(16)
    for kind, name in ((2, bytes(good)), (0, bytes(tmp_path.name, "ascii"))):
        alias += struct.pack(">hH", kind, len(name)) + name + bytes(len(name) % 2)
    alias += struct.pack(">hh", -1, 0)
    boxes = struct.pack(">I4sII", 16 + 12 + len(alias), b"dref", 0, 1) + struct.pack(
        ">I4sI", 12 + len(alias), b"alis", 0
    )
    start = data.index(b"dref") - 4
    [size] = struct.unpack_from(">I", data, start)
    changed = bytearray(data[:start] + boxes + alias + data[start + size :])
    for outer in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        at = changed.index(outer) - 4
        struct.pack_into(">I", changed, at, struct.unpack_from(">I", changed, at)[0] + len(boxes + alias) - size)
    at = changed.index(b"mdat")
    body = slice(at + 4, at - 4 + struct.unpack_from(">I", changed, at - 4)[0])
    changed[body] = bytes(body.stop - body.start)
    path = tmp_path / "alias.mov"
    path.write_bytes(changed)
    assert alias_is_followed(path)
    with pytest.raises(VideoError, match=f"^{path}: no frame of its video stream can be decoded$"):
        reader(path)


def alias_is_followed(path: Path) -> bool:
    import av

    with av.open(str(path), container_options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        return len(list(container.decode(video=0))) == 5


def test_a_playlist_in_a_pipe_is_refused(address: tuple[str, list[bytes]], tmp_path: Path) -> None:
    fifo = tmp_path / "live.m3u8"
    os.mkfifo(fifo)
    text = PLAYLISTS["segments.m3u8"][1].format(url=f"http://{address[0]}", path="")
    writer = threading.Thread(target=fifo.write_text, args=(text,))
    writer.start()
    with fifo.open("rb") as source, pytest.raises(VideoError, match=f"^{fifo}: an HLS"):
        list(iter_frames(source, str(fifo), size=SIZE))
    writer.join()
    assert not address[1]


# ---- pictures attached to something else ----


@readers
def test_a_picture_attached_to_a_song_is_no_video(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    path = write_song(tmp_path)
    with pytest.raises(VideoError, match=f"^{path}: the file holds no video stream$"):
        reader(path)


def test_a_video_with_a_picture_attached_is_the_video(tmp_path: Path) -> None:
    import av
    from av.stream import Disposition

    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        video, cover = container.add_stream("mpeg4", rate=25), container.add_stream("png", rate=25)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        cover.height, cover.width, cover.pix_fmt = 480, 640, "rgb24"
        cover.disposition = Disposition.attached_pic
        for stream, shown in ((cover, pictures(1, (480, 640))), (video, pictures(5))):
            for picture in shown:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    with av.open(str(path)) as container:
        assert sum(Disposition.attached_pic in stream.disposition for stream in container.streams.video) == 1
    assert read_frames(path, 9).shape == (5, 48, 64, 3)


def write_song(folder: Path) -> Path:
    """Write a second of silence as MP3 behind an ID3 tag with a cover picture and a title that is not UTF-8."""
    import av

    with av.open(str(folder / "bare.mp3"), "w") as container:
        stream = container.add_stream("mp3", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), format="fltp", layout="stereo")
        silence.sample_rate, silence.pts = 44100, 0
        fifo = av.AudioFifo()
        fifo.write(silence)
        while frame := fifo.read(1152, partial=True):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    picture = write_video(folder / "cover.jpg", "mjpeg", format="image2", pixels="yuvj420p", frames=1).read_bytes()
    tag = b""
    for name, body in ((b"APIC", b"\0image/jpeg\0\x03cover\0" + picture), (b"TIT2", b"\x03Caf\xe9")):
        tag += name + struct.pack(">IH", len(body), 0) + body
    length = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    path = folder / "song.mp3"
    path.write_bytes(b"ID3\x03\0\0" + length + tag + (folder / "bare.mp3").read_bytes())
    return path


# ---- tags ----

TAG = "tag that is replaced"


@readers
@pytest.mark.parametrize("encoding", ["latin-1", "shift-jis", "cp1251", "utf-16"])
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("a.mp4", ["title", "handler_name"]),
        ("a.mov", ["title", "handler_name"]),
        ("a.mkv", ["title"]),
        ("a.avi", ["title", "encoder"]),
        ("a.ts", ["service_name"]),
        ("a.wmv", ["title"]),
    ],
)
def test_tags_in_any_encoding_do_not_matter(
    name: str, keys: list[str], encoding: str, reader: Callable[[Path], Any], tmp_path: Path
) -> None:
    codec = {"a.ts": "mpeg2video", "a.wmv": "wmv2"}.get(name, "mpeg4")
    format = "asf" if name == "a.wmv" else None
    path = write_video(tmp_path / name, codec, format=format, tags=dict.fromkeys(keys, TAG))
    text = {"latin-1": "Café crème brûlée", "shift-jis": "テレビ", "cp1251": "Видео", "utf-16": "Ünï"}[encoding]
    utf_16 = TAG.encode("utf-16-le")
    data = path.read_bytes()
    assert TAG.encode() in data or utf_16 in data
    data = data.replace(TAG.encode(), text.encode(encoding).ljust(len(TAG))[: len(TAG)])
    path.write_bytes(data.replace(utf_16, b"\x00\xd8".ljust(len(utf_16), b"\xdc")))
    frames = reader(path)
    assert (frames if isinstance(frames, int) else len(frames)) == 5


def test_a_grid_of_tiles_is_refused() -> None:
    """PyAV does not say how the tiles of an AVIF or HEIF picture are joined. One of them is not the picture."""
    dependent = formats.import_av().stream.Disposition.dependent
    tiles = [SimpleNamespace(disposition=dependent) for _ in range(4)]
    streams = SimpleNamespace(best=lambda kind: tiles[0], video=tiles)
    with pytest.raises(VideoError, match=r"^a.avif: its picture is a grid of tiles, which is not read$"):
        formats._video_stream("a.avif", SimpleNamespace(streams=streams))


# ---- files that may end a process ----

UNKNOWN = {
    "fourcc.mp4": ({"codec": "libx264"}, b"avc1", b"zzz1", "zzz1"),
    "encrypted.mp4": ({"codec": "libx264"}, b"avc1", b"encv", "encv"),
    "id.mkv": ({}, b"V_MPEG4/ISO/ASP", b"V_ZZZZ4/ISO/ASP", "of an unknown name"),
    "fourcc.avi": ({}, b"FMP4", b"ZZZ4", "ZZZ4"),
    "fourcc.ivf": ({"codec": "libvpx"}, b"VP80", b"ZZ80", "ZZ80"),
}
"""Files by name: how to write the video, what is replaced by what in it, and the codec in the error."""


def test_a_codec_without_a_decoder_is_an_error(tmp_path: Path) -> None:
    for name, (how, old, new, _) in UNKNOWN.items():
        path = write_video(tmp_path / name, **how)
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))
    cause = "FFmpeg has no decoder for codec {} of its video, or its header is cut short"
    expected = {f"{tmp_path / name}: {cause.format(codec)}" for name, (*_, codec) in UNKNOWN.items()}
    assert read_in_a_process(tmp_path) == expected


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_header_that_is_cut_short_gives_frames_or_an_error(step: int, tmp_path: Path) -> None:
    for name in ("fast.mp4", "fragments.mp4", "a.flv"):
        whole = write_video(tmp_path / name, **VIDEOS[name])
        data = whole.read_bytes()
        whole.unlink()
        for length in range(1, data.index(b"mdat") + 40 if b"mdat" in data else 400, step):
            (tmp_path / f"{length}.{name}").write_bytes(data[:length])
    assert read_in_a_process(tmp_path)


DAMAGED = (
    "a.mp4",
    "fast.mp4",
    "fragments.mp4",
    "a.mkv",
    "vp8.webm",
    "a.avi",
    "a.ts",
    "a.flv",
    "a.gif",
    "a.ogv",
    "a.ivf",
)


@pytest.mark.parametrize("count", [14, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_files_give_frames_or_an_error(count: int, tmp_path: Path) -> None:
    """Bytes are changed, half of the time in the header only, and every fourth file is cut short."""
    for name in DAMAGED:
        whole = write_video(tmp_path / name, **VIDEOS[name])
        data = whole.read_bytes()
        whole.unlink()
        for number in range(count):
            draw, damaged = random.Random(f"{name} {number}"), bytearray(data)
            for _ in range(draw.choice((1, 4, 16))):
                damaged[draw.randrange(len(data) if number % 2 else min(len(data), 3000))] = draw.randrange(256)
            if number % 4 == 3:
                del damaged[draw.randrange(1, len(data)) :]
            (tmp_path / f"{number}.{name}").write_bytes(damaged)
    assert read_in_a_process(tmp_path) > {""}


def read_in_a_process(folder: Path) -> set[str]:
    """Let every reader read the files of a folder, and return messages of the VideoErrors, and "" for frames.

    A process of their own tells other errors and signals. A fork would wait for threads of decoders of this one.
    """
    call = f"from {__name__} import print_outcomes; print_outcomes({str(folder)!r})"
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", call], capture_output=True, text=True, timeout=900)
    lines = ended.stdout.splitlines()
    assert not ended.returncode, f"{lines[-1:]} {ended.stderr[-1000:]}"
    return set(lines)


def print_outcomes(folder: str) -> None:
    for path in sorted(Path(folder).iterdir()):
        for reader in READERS.values():
            try:
                reader(path)
            except VideoError as error:
                print(error, flush=True)
            else:
                print(flush=True)
