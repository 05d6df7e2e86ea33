"""The model classes of the plugin for vLLM share this code: options, hashes, budgets and the making of a class.

A class of the plugin is vLLM's own with three mixins: one for the model, one for its processor of prompts and one for
the processor's knowledge of the model (its "info"). Weights, images and everything else of the base are unchanged.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.hasher import MultiModalHasher

from ..version import __version__
from .modes import MODES
from .vllm import engine_options, logger


class PooledInfo:
    """This mixin extends what a processor of prompts knows of its model.

    The process that makes the engine makes one before weights are loaded, so that wrong options are refused there.
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
        self.stgp_options.check_channels(self.stgp_channels())
        rate = self.ctx.get_mm_config().video_pruning_rate
        if rate:
            raise ValueError(f"video_pruning_rate must be 0 or left out beside ST-GridPool, got {rate}")

    def stgp_channels(self) -> int:
        """Return the number of channels of the tokens that are pooled, without those of deepstack levels."""
        return int(self.ctx.model_config.hf_text_config.hidden_size)


class PooledProcessor:
    """This mixin extends a processor of prompts. stock: vLLM's own class of it."""

    stock: Any
    info: Any
    dummy_inputs: Any

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Return hashes of videos that depend on the options, so that no cache returns a video of other options.

        They depend on the version of this package as well, since another one may compute other bits. So do hashes that
        a request brings along ("UUIDs"). Those of images are vLLM's.
        """
        hashes = dict(super()._get_mm_hashes(inputs))  # type: ignore[misc]
        options = self.info.stgp_options
        given = {"version": __version__, "mode": options.mode, **options.arguments}
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        if "video" in hashes:
            hashes["video"] = [
                MultiModalHasher.hash_kwargs(algorithm, mm_hash=video, stgp_options=given) for video in hashes["video"]
            ]
        return hashes

    def get_dummy_mm_inputs(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the inputs by which vLLM profiles the base, so that budgets are those of the base.

        Pooled, the video of these inputs would have fewer tokens than a longer one that fits into the context.
        """
        return self.stock(self.info, self.dummy_inputs).get_dummy_mm_inputs(*arguments, **keywords)


class PooledModel:
    """This mixin extends a model of vLLM.

    stgp_options: the engine's options. stgp_shortens: whether mode "pool" makes prompts shorter than vLLM's.
    stgp_encoder_limit: the most tokens that its encoder may leave in one call. The engine chooses the videos of a step
    by the tokens that are left of them, so that a step may have several times the tokens that it was profiled with.
    """

    stgp_shortens = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.stgp_options = engine_options(vllm_config.model_config.hf_config)
        self.stgp_encoder_limit = sys.maxsize
        if self.stgp_options.mode == "pool" and self.stgp_shortens:
            self.stgp_encoder_limit = vllm_config.scheduler_config.max_num_encoder_input_tokens
            # vLLM takes the places of a video in the prompt for the tokens of its encoder, which are more
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
    """This mixin leaves CUDA graphs of the encoder to images."""

    def get_encoder_cudagraph_config(self) -> Any:
        """Return settings under which vLLM uses CUDA graphs of the encoder for images alone.

        A graph returns the tokens of the encoder without a call of the method that pools them.
        """
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        others = [modality for modality in config.modalities if modality != "video"]
        return dataclasses.replace(config, modalities=others, max_frames_per_video=1)


def encoder_batches(tokens: Sequence[int], limit: int) -> Iterator[slice]:
    """Yield slices of `tokens`: as many consecutive numbers as are at most `limit` together, or one that is more."""
    start = total = 0
    for number, count in enumerate(tokens):
        if number > start and total + count > limit:
            yield slice(start, number)
            start, total = number, 0
        total += count
    if start < len(tokens):
        yield slice(start, len(tokens))


def make_class(base: str, model: type, processor: type = PooledProcessor, info: type = PooledInfo) -> Any:
    """Return a subclass of vLLM's class of an architecture, made with mixins, with a processor made in the same way.

    The class has the name of its base, since vLLM looks up by it where a draft model finds the placeholders of images.
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
