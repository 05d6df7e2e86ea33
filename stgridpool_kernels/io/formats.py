"""Opening of videos and pictures with PyAV, which ships its own FFmpeg and is imported on first use.

FFmpeg is handed bytes and never a name, and opens only formats that hold their pictures themselves. So reading a file
opens no other file and no connection, whatever the file holds and however it is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, BinaryIO

__all__ = ["VideoError", "import_av", "opened"]

_CONTAINERS = (
    "apng asf avi dhav dv flic flv gif gxf ivf matroska mov mpeg mpegts mxf nsv nut nuv ogg pva rm swf wtv yuv4mpegpipe"
)
_RAW = "apv av1 cavsvideo dirac dnxhd h261 h263 h264 hevc m4v mjpeg mjpeg_2000 mpegvideo obu vc1 vvc"
_PICTURES = (
    "alias_pix brender_pix bmp_pipe dds_pipe dpx_pipe exr_pipe fits gif_pipe hdr_pipe ico j2k_pipe jpeg_pipe "
    "jpegls_pipe pam_pipe pbm_pipe pcx_pipe pfm_pipe pgm_pipe pgmyuv_pipe phm_pipe png_pipe ppm_pipe psd_pipe qoi_pipe "
    "sgi_pipe sunrast_pipe tiff_pipe vbn_pipe webp_pipe xbm_pipe xpm_pipe xwd_pipe"
)
_SOUND = "aac aiff flac mp3 wav"  # so that the error about a song says that it holds no video

_FORMATS = ",".join(f"{_CONTAINERS} {_RAW} {_PICTURES} {_SOUND}".split())
"""Names of FFmpeg's demuxers that read a file's pictures from that file alone."""

_OPTIONS = {
    "format_whitelist": _FORMATS,
    # The bytes come from Python, and a demuxer that names more of them by an address is refused.
    "protocol_whitelist": "none",
}

_HEAD = 4096
"""Number of bytes at the start of a file in which a playlist is recognised."""

_STILL = {b"\xff\xd8\xff": "jpeg_pipe", b"P7\n": "pam_pipe"}
"""Demuxers of pictures that FFmpeg recognises by their names, or if nothing follows them, by how such files begin."""

_PLAYLISTS = {
    "an HLS or M3U playlist": rb"#EXTM3U",
    "a concat script": rb"ffconcat\s",
    "an SDP session description": rb"v=0\s|(?s:.*)^c=IN IP",
    "a DASH manifest": rb"(?s:.*)<(\w+:)?MPD\b",
    "a Smooth Streaming manifest": rb"(?s:.*)<(\w+:)?SmoothStreamingMedia\b",
    "an HDS manifest": rb"(?s:.*)<manifest\s[^>]*ns\.adobe\.com/f4m",
    "an IMF composition playlist": rb"(?s:.*)<(\w+:)?CompositionPlaylist\b",
    "a SMIL presentation": rb"(?s:.*)<(\w+:)?smil\b",
    "an ASX playlist": rb"(?is:(<\?xml.*)?<asx\b)",
    "an XSPF playlist": rb"(?s:.*)<(\w+:)?playlist\b[^>]*xspf",
    "a PLS playlist": rb"(?i:\[playlist\])",
    "an ASF reference": rb"\[Reference\]",
    "an RTSP reference": rb"(?i:rtsptext|rtsp://)",
    "a VobSub index": rb"# VobSub index file",
    "an SVG drawing": rb"(?s:.*)<(\w+:)?svg\b",
    "a list of addresses": rb"(?i:(https?|mms|rtmp|ftp|file)://)",
}
"""Texts that name the files or addresses where pictures are, by what they are called in errors."""


class VideoError(ValueError):
    """Error about a file or stream whose video cannot be read. The message gives its name and the cause."""


@contextmanager
def opened(name: str, source: BinaryIO | None = None) -> Iterator[tuple[Any, Any, Bytes]]:
    """Yield PyAV's container and its video stream, of the file `name` or of the bytes of `source`, and these bytes.

    Raises VideoError if the file cannot be opened, or if nothing in it is a video that FFmpeg can decode.
    """
    with ExitStack() as stack:
        file = Bytes(stack.enter_context(_open_file(name)) if source is None else source, name)
        container = stack.enter_context(_open_container(name, file))
        yield container, _video_stream(name, container), file


def import_av() -> ModuleType:
    """Return PyAV. Raises ImportError, which says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading video needs PyAV: pip install "stgridpool_kernels[demo]"', name="av") from error
    return av


def _open_file(name: str) -> BinaryIO:
    import_av()
    try:
        return open(name, "rb")
    except (OSError, ValueError) as error:  # ValueError for a null character
        cause = error.strerror if isinstance(error, OSError) else error
        raise VideoError(f"{name}: cannot be opened: {cause}") from error


class Bytes:
    """Bytes of a file or stream, without the name by which FFmpeg would choose a format or look for more files.

    PyAV goes on after an exception in `read`, Ctrl-C included. So the bytes end there, and `check` raises it.
    """

    def __init__(self, source: BinaryIO, name: str) -> None:
        self._source, self._name = source, name
        self._error: BaseException | None = None
        self._unread = b""
        self._start = source.tell() if source.seekable() else 0
        self.head = self._unread = self.read(_HEAD)
        self.check()
        if self.rewind():
            self._unread = b""
            self.seek, self.tell = source.seek, source.tell

    def read(self, size: int) -> bytes:
        try:
            if self._unread:
                taken, self._unread = self._unread[:size], self._unread[size:]
                return taken
            return self._source.read(size) if self._error is None else b""
        except BaseException as error:
            self._error = error
            return b""

    def rewind(self) -> bool:
        """Go back to where the bytes began, if that is possible, and return whether it is."""
        if not self._source.seekable():
            return False
        self._source.seek(self._start)
        return True

    def check(self) -> None:
        """Raise what a `read` has raised, an OSError as VideoError."""
        if isinstance(self._error, OSError):
            cause = self._error.strerror or self._error
            raise VideoError(f"{self._name}: cannot be read: {cause}") from self._error
        if self._error is not None:
            raise self._error


def _open_container(name: str, source: Bytes) -> Any:
    av = import_av()
    _refuse_playlists(name, source.head)
    try:
        try:
            return _open(source)
        except av.FFmpegError:
            picture = next((_STILL[start] for start in _STILL if source.head.startswith(start)), None)
            if picture is None or not source.rewind():
                raise
            return _open(source, picture)
    except VideoError:
        raise
    except av.ArgumentError as error:
        raise VideoError(f"{name}: damaged, or not in a format that is read (docs/streaming.md lists them)") from error
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        cause = getattr(error, "strerror", None) or error
        raise VideoError(f"{name}: not a video FFmpeg can read, or cut short: {cause}") from error


def _open(source: Bytes, format: str | None = None) -> Any:
    try:
        # Tags may be in any encoding.
        return import_av().open(source, format=format, container_options=_OPTIONS, metadata_errors="replace")
    finally:
        source.check()


def _refuse_playlists(name: str, head: bytes) -> None:
    """Raise VideoError if a file that begins with `head` is one of `_PLAYLISTS`.

    FFmpeg refuses it too, but does not say what it is.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"\0" in text:
        return
    for kind, pattern in _PLAYLISTS.items():
        if re.match(pattern, text, re.MULTILINE):
            raise VideoError(f"{name}: {kind}, which names other files; only formats that hold their pictures are read")


def _video_stream(name: str, container: Any) -> Any:
    """Return the stream that FFmpeg takes for the best video. Pictures that are attached to a song are none."""
    best = container.streams.best("video")
    streams = [stream for stream in (best, *container.streams.video) if stream and not _is_attached(stream)]
    if not streams:
        raise VideoError(f"{name}: the file holds no video stream")
    if all(stream.disposition & import_av().stream.Disposition.dependent for stream in streams):
        raise VideoError(f"{name}: its picture is a grid of tiles, which is not read")
    if streams[0].codec_context is None:
        codec = _codec(container, streams[0])
        raise VideoError(f"{name}: FFmpeg has no decoder for codec {codec} of its video, or its header is cut short")
    return streams[0]


def _codec(container: Any, stream: Any) -> str:
    """Return the tag or name of a codec without a decoder, which PyAV has only in a text of FFmpeg for logs."""
    logging = import_av().logging
    level = logging.get_level()
    logging.set_level(logging.INFO)  # no text is made at the usual level, at which PyAV reads no logs
    try:
        text = container.dumps_format()
    except UnicodeDecodeError:  # of tags, which the text has too
        text = ""
    finally:
        logging.set_level(level)
    found = re.search(rf"Stream #0:{stream.index}\b.*?: Video: (?:none \((.+?) /|([\w ]+))", text)
    tag = ((found[1] or found[2]) if found else "none").strip()
    return "of an unknown name" if tag in ("", "none") else tag


def _is_attached(stream: Any) -> bool:
    return bool(stream.disposition & import_av().stream.Disposition.attached_pic)
