"""What the model classes of the plugin for vLLM share: options, hashes, budgets and how a class is made.

A class of the plugin is vLLM's own with three mixins: one for the model, one for its processor of prompts and one for
the processor's knowledge of the model (its "info"). Weights, images and everything else of the base are unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.hasher import MultiModalHasher

from .modes import MODES
from .vllm import engine_options, logger


class PooledInfo:
    """Mixin of what a processor knows of its model, which the process that makes the engine asks before any weights.

    stgp_modes: the modes that the model has. stgp_options: the engine's options.
    """

    stgp_modes: Sequence[str] = MODES
    ctx: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        try:
            self.stgp_options = engine_options(self.ctx.model_config.hf_config, self.stgp_modes)
            self.check_options()
        except ValueError as error:
            # vLLM would interpret a ValueError as a missing processor, and continue with text only
            raise RuntimeError(str(error)) from error

    def check_options(self) -> None:
        """Raise ValueError if the engine cannot have its options."""
        rate = self.ctx.get_mm_config().video_pruning_rate
        if rate:
            raise ValueError(f"video_pruning_rate must be 0 or left out beside ST-GridPool, got {rate}")


class PooledProcessor:
    """Mixin of a processor of prompts. stock: vLLM's class that it extends."""

    stock: Any
    info: Any
    dummy_inputs: Any

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Return hashes under which options have a share, so that no cache gives a video of other options.

        Hashes of videos that a request brings along ("UUIDs") are treated alike. Those of images stay.
        """
        hashes = dict(super()._get_mm_hashes(inputs))  # type: ignore[misc]
        options = self.info.stgp_options
        given = {"mode": options.mode, **options.arguments}
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        if "video" in hashes:
            hashes["video"] = [
                MultiModalHasher.hash_kwargs(algorithm, mm_hash=video, stgp_options=given) for video in hashes["video"]
            ]
        return hashes

    def get_dummy_mm_inputs(self, *arguments: Any, **keywords: Any) -> Any:
        """Return what vLLM makes without ST-GridPool, from which it derives budgets that hold for any video.

        Its video for this has as many frames as fit into the context unpooled. Requests may have more of them.
        """
        return self.stock(self.info, self.dummy_inputs).get_dummy_mm_inputs(*arguments, **keywords)


class PooledModel:
    """Mixin of a model. stgp_options: the engine's options."""

    stgp_modes: Sequence[str] = MODES

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.stgp_options = engine_options(vllm_config.model_config.hf_config, self.stgp_modes)
        self.stgp_encoded = vllm_config.scheduler_config.max_num_encoder_input_tokens
        if self.stgp_options.mode == "pool" and "grid" in self.stgp_modes:
            # prompts are shorter than vLLM's, which counts the tokens that its encoder sees of a video by its places
            self.supports_tower_connector_lora = False
        logger.info("ST-GridPool: %s, %s", self._shown_size(), self.stgp_options)

    def _shown_size(self) -> str:
        """Return what becomes of a frame of a video, in words for the engine's log."""
        grid = self.stgp_grid()
        if grid is None:
            return "tokens of videos after the encoder"
        (height, width), (rows, cols) = grid, self.stgp_options.frame_size(grid)
        return f"frames of videos from {height} × {width} to {rows} × {cols} tokens"

    def stgp_grid(self) -> tuple[int, int] | None:
        """Return rows and columns of tokens of a frame before pooling, None where they depend on the video."""
        return None


class EncoderGraphs:
    """Mixin of a model whose encoder vLLM can record in CUDA graphs, for images."""

    def get_encoder_cudagraph_config(self) -> Any:
        """Return the engine's settings for CUDA graphs of the encoder, which is called without them for videos.

        A graph returns what the encoder leaves, and nothing pools that. Images keep their graphs.
        """
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        others = [modality for modality in config.modalities if modality != "video"]
        return dataclasses.replace(config, modalities=others, max_frames_per_video=1)


def encoder_batches(tokens: Sequence[int], limit: int) -> Iterator[slice]:
    """Yield runs of videos whose tokens together do not exceed `limit`, and videos that exceed it alone.

    tokens: the number of tokens that the encoder leaves of each video. The engine chooses the videos of a step by the
    number of pooled tokens, so that a step may hold several times the tokens that the encoder was profiled with.
    """
    start = total = 0
    for number, count in enumerate(tokens):
        if number > start and total + count > limit:
            yield slice(start, number)
            start, total = number, 0
        total += count
    if start < len(tokens):
        yield slice(start, len(tokens))


def make_class(base: str, model: type, processor: type = PooledProcessor, info: type = PooledInfo) -> Any:
    """Return vLLM's class of an architecture with mixins, and with vLLM's processor, which has mixins too.

    The class has the name of its base, since vLLM looks some settings up by it: where a draft model finds the
    placeholders of images, for example.
    """
    stock_model = ModelRegistry.models[base].load_model_cls()
    stock = stock_model._processor_factory
    graphs = [EncoderGraphs] if hasattr(stock_model, "get_encoder_cudagraph_config") else []

    def mixed(mixin: type, *others: Any, **members: Any) -> Any:
        cls = others[-1]
        return type(cls)(cls.__name__, (mixin, *others), {"__module__": mixin.__module__, **members})

    register = MULTIMODAL_REGISTRY.register_processor(
        mixed(processor, stock.processor, stock=stock.processor),
        info=mixed(info, stock.info),
        dummy_inputs=stock.dummy_inputs,
    )
    return register(mixed(model, *graphs, stock_model))
