"""This module makes tiny models of the Qwen-VL family in SGLang's own classes, and what of an engine videos go through.

The encoder and the multimodal processor are SGLang's; the latter wraps a processor of transformers. Language models are
left out, since their rotary embeddings need an operation for GPUs.
"""

from __future__ import annotations

import asyncio
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from sglang.srt import runtime_context
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.rotary_embedding import base
from sglang.srt.managers import mm_schedule, mm_utils
from sglang.srt.managers.schedule_batch import MultimodalInputs, MultimodalProcessorOutput
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import common
from sglang.srt.utils.msgpack_utils import dec_hook, enc_hook, ext_hook
from torch import Tensor, nn

from tests.support import tiny_grid_models
from tests.support.media import write_video

with pytest.MonkeyPatch.context() as patch:
    # SGLang pins memory and asks for operations of a GPU unless it is in its mode for CPUs. The mode is set after the
    # imports above, since in this mode they would import a package that is published for GPUs alone.
    patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    common.is_cpu.cache_clear()
    assert common.is_cpu()
    base._is_cpu = True

FPS = 25
"""Videos have this many frames a second, all of which are sampled."""


def publish(folder: Path, **arguments: Any) -> ServerArgs:
    """Make the arguments of a server those of this process, as SGLang's launcher does, and return them."""
    given = {
        "model_path": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "load_format": "dummy",
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "disable_cuda_graph": True,
        "disable_radix_cache": True,
        "mm_process_config": {"video": {"fps": FPS, "min_pixels": 28 * 28, "max_pixels": 10**6}},
    }
    server = ServerArgs(**{**given, **arguments})
    server.resolve_once()
    ranks = runtime_context.SpawnRanks(world_rank=0)
    runtime_context.publish(server, role="scheduler", ranks=ranks)
    if not torch.distributed.is_initialized():
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            backend="gloo",
            distributed_init_method=f"file://{folder / 'rendezvous'}",
        )
        initialize_model_parallel()
    return server


class Engine:
    """This object has the parts of an engine that the hooks change, if they are in force when it is made.

    kind: one of `tiny_grid_models.QWEN_KINDS`. folder: an empty folder. model_type: the type that its configuration
    names, by default its own. arguments: those of the server.
    """

    def __init__(self, kind: str, folder: Path, model_type: str | None = None, **arguments: Any) -> None:
        folder.mkdir(exist_ok=True)
        model, self.library_processor = tiny_grid_models.build(kind)
        config = model.config
        config.architectures = [type(model).__name__]
        if kind == "qwen2_vl":
            config.vision_config.in_chans = 3  # Checkpoints have this setting by this name.
        if kind.startswith("qwen3_5"):
            config.vision_config.deepstack_visual_indexes = []  # Checkpoints of Qwen3.5 name no such levels.
        config.save_pretrained(folder)
        self.library_processor.save_pretrained(folder)
        self.kind, self.server = kind, publish(folder, **arguments)
        self.config = ModelConfig.from_server_args(self.server).hf_config
        self.config.encoder_only = True
        if model_type is not None:
            self.config.model_type = model_type
        self.processor = QwenVLImageProcessor(
            self.config, self.server, self.library_processor, "default", skip_mm_pool=True
        )

    def model(self, monkeypatch: Any) -> Any:
        """Return the model, always with the same weights."""
        name = type(self).module(self.kind)
        module = importlib.import_module(f"sglang.srt.models.{name}")
        if self.kind == "qwen2_vl":  # SGLang's Qwen2-VL makes its language model in any case.
            monkeypatch.setattr(module, "Qwen2Model", lambda *arguments, **named: nn.Identity())
        torch.manual_seed(0)
        model = getattr(module, self.config.architectures[0])(self.config)
        for parameter in model.visual.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model.eval()

    @staticmethod
    def module(kind: str) -> str:
        """Return the name of SGLang's module of a kind of model."""
        return "qwen3_5" if kind.startswith("qwen3_5") else kind

    def prompt(self, *parts: str | bytes | Path) -> MultimodalProcessorOutput:
        """Return what the scheduler gets for text, images and files of videos, passed on as between processes."""
        text = "".join(
            part
            if isinstance(part, str)
            else tiny_grid_models.placeholder(self.kind, "image" if isinstance(part, bytes) else "video")
            for part in parts
        )
        images = [part for part in parts if isinstance(part, bytes)]
        videos = [str(part) for part in parts if isinstance(part, Path)]
        request = SimpleNamespace(video_data=videos, audio_data=None, rid="request")
        made = asyncio.run(self.processor.process_mm_data_async(images, text, request))
        decoder = msgspec.msgpack.Decoder(MultimodalProcessorOutput, dec_hook=dec_hook, ext_hook=ext_hook)
        return decoder.decode(msgspec.msgpack.Encoder(enc_hook=enc_hook).encode(made))


def schedule(made: MultimodalProcessorOutput, model: Any) -> tuple[list[int], MultimodalInputs]:
    """Return the padded prompt and the inputs that the scheduler makes of what it gets."""
    from array import array

    inputs = MultimodalInputs.from_processor_output(made)
    return model.pad_input_ids(array("q", made.input_ids), inputs).tolist(), inputs


@torch.no_grad()
def embed(model: Any, requests: Sequence[tuple[list[int], MultimodalInputs]], cuts: Sequence[int] = ()) -> list[Tensor]:
    """Return what the language model gets for each prompt, main and deepstack channels side by side.

    cuts: where chunks of prefill end, in tokens of every prompt.
    """
    torch.manual_seed(1)
    embedding = nn.Embedding(256, tiny_grid_models.HIDDEN)
    longest = max(len(ids) for ids, _ in requests)
    pieces: list[list[Tensor]] = [[] for _ in requests]
    for start, end in zip([0, *cuts], [*cuts, longest], strict=True):
        chunks = [ids[start:end] for ids, _ in requests]
        main, other = mm_utils.embed_mm_inputs(
            mm_inputs_list=[inputs for _, inputs in requests],
            extend_prefix_lens=[start] * len(requests),
            extend_seq_lens=[len(chunk) for chunk in chunks],
            input_ids=torch.tensor([token for chunk in chunks for token in chunk]),
            input_embedding=embedding,
            multimodal_model=model,
            use_deepstack=getattr(model, "use_deepstack", {}),
        )
        rows = torch.cat([main, *other.values()], -1)
        for piece, part in zip(pieces, rows.split([len(chunk) for chunk in chunks]), strict=True):
            piece.append(part)
    return [torch.cat(piece) for piece in pieces]


def empty_cache(bytes_: int = 2**24) -> None:
    """Replace the cache of the encoder's tokens by an empty one of a number of bytes."""
    mm_schedule.init_mm_embedding_cache(bytes_)


def film(folder: Path, frames: int, height: int, width: int, seed: int = 0) -> Path:
    """Write a video of random blocks and return its path."""
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, height // 14, width // 14, 3), np.uint8)
    path = folder / f"{frames}_{height}_{width}_{seed}.mp4"
    return write_video(path, frames=list(blocks.repeat(14, 1).repeat(14, 2)))


def picture(height: int, width: int) -> bytes:
    """Return a PNG of random pixels."""
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
