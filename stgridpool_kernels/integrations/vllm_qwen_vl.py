"""The Qwen-VL models of vLLM with ST-GridPool after their encoder: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.

The number of tokens that are left of a video is known before anything runs. So two places are told of the smaller grid,
the one that writes prompts and the one that makes positions, and a third one pools.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from torch import Tensor

from .video_grid import shrink_grids, shrink_video
from .vllm_models import PooledInfo, PooledModel, PooledProcessor, encoder_batches, make_class


class QwenInfo(PooledInfo):
    def check_options(self) -> None:
        super().check_options()
        self.stgp_options.check_channels(self.ctx.model_config.hf_text_config.hidden_size)


class QwenProcessor(PooledProcessor):
    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        config = self.info.ctx.model_config.hf_config
        pooled = dict(out_mm_kwargs)
        if "video" in pooled:
            pooled["video"] = [_pooled_item(item, config, self.info.stgp_options) for item in pooled["video"]]
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, type(out_mm_kwargs)(pooled))  # type: ignore[misc]


class QwenModel(PooledModel):
    """Mixin of a model whose encoder leaves (T·H'·W', C) tokens of a video, in its order of patches T × H × W.

    Of models with deepstack, C holds the channels of the main token, then those of all levels.
    """

    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.stgp_channels = vllm_config.model_config.hf_text_config.hidden_size

    def _process_video_input(self, video_input: Any) -> tuple[Tensor, ...]:
        merge = self.config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in video_input["video_grid_thw"].tolist()]
        pooled: list[Tensor] = []
        for videos in encoder_batches([math.prod(grid) for grid in grids], self.stgp_encoded):
            encoded = super()._process_video_input(_some_videos(video_input, videos, merge))  # type: ignore[misc]
            pooled += [
                shrink_video(tokens, grid, self.stgp_options, self.stgp_channels)
                for tokens, grid in zip(encoded, grids[videos], strict=True)
            ]
        return tuple(pooled)

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> Any:
        pooled = [
            dataclasses.replace(feature, data=_pooled_item(feature.data, self.config, self.stgp_options))
            if feature.modality == "video"
            else feature
            for feature in mm_features
        ]
        return super().get_mrope_input_positions(input_tokens, pooled)  # type: ignore[misc]


def _pooled_item(item: Any, config: Any, options: Any) -> Any:
    """Return vLLM's record of a video with the grid, in patches, of what is left of it, and all else as it is."""
    grid = item["video_grid_thw"]
    [left] = shrink_grids(grid.data[None], config.vision_config.spatial_merge_size, options)
    return type(item)({**item, "video_grid_thw": dataclasses.replace(grid, data=left)})


def _some_videos(video_input: Any, videos: slice, merge: int) -> Any:
    """Return the part of `video_input` for some of its videos: patches, or tokens where requests brought those."""
    grids = video_input["video_grid_thw"]
    if videos == slice(0, len(grids)):
        return video_input
    kind = video_input["type"]
    sizes = (grids.prod(-1) // (merge**2 if kind == "video_embeds" else 1)).tolist()
    start = sum(sizes[: videos.start])
    rows = video_input[kind][start : start + sum(sizes[videos])]
    return {"type": kind, kind: rows, "video_grid_thw": grids[videos]}


@functools.cache
def pooled_class(base: str) -> Any:
    """Return the class of an architecture of vLLM with ST-GridPool."""
    return make_class(base, QwenModel, QwenProcessor, QwenInfo)
