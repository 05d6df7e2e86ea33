"""This module adds ST-GridPool to the Qwen-VL models of vLLM: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.

The number of tokens that are left of a video is known before anything runs. So two places are told of the smaller grid,
the one that writes prompts and the one that makes positions, and a third one pools.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .video_grid import shrink_grids, shrink_video
from .vllm_models import PooledModel, PooledProcessor, encoder_batches

Grid = tuple[int, int, int]
"""A grid is the number of pairs of frames of a video, and rows and columns of tokens of a pair."""


class QwenProcessor(PooledProcessor):
    """This mixin writes as many placeholders of a video into prompts as tokens are left of it."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        config = self.info.ctx.model_config.hf_config
        pooled = dict(out_mm_kwargs)
        if "video" in pooled:
            pooled["video"] = [_pooled_item(item, config, self.info.stgp_options) for item in pooled["video"]]
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, type(out_mm_kwargs)(pooled))  # type: ignore[misc]


class QwenModel(PooledModel):
    """This mixin pools what the encoder leaves of a video: (T·H'·W', C) tokens, ordered by time, row and column.

    In models with deepstack, C holds the channels of the main token, then those of all levels.
    """

    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.stgp_channels = vllm_config.model_config.hf_text_config.hidden_size

    def _process_video_input(self, video_input: Any) -> tuple[Tensor, ...]:
        merge = self.config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in video_input["video_grid_thw"].tolist()]
        return tuple(
            shrink_video(tokens, grid, self.stgp_options, self.stgp_channels)
            for tokens, grid in zip(self._encoded(video_input, grids, merge), grids, strict=True)
        )

    def _encoded(self, video_input: Any, grids: Sequence[Grid], merge: int) -> Sequence[Tensor]:
        """Return the tokens that the encoder leaves of every video, in calls of at most `stgp_encoder_limit` tokens.

        A pair of frames is encoded without regard to the others, so that a long video can be encoded in pieces.
        """
        encode = super()._process_video_input  # type: ignore[misc]
        if video_input["type"] == "video_embeds" or sum(map(math.prod, grids)) <= self.stgp_encoder_limit:
            return encode(video_input)  # type: ignore[no-any-return]
        pieces = [piece for grid in grids for piece in _pieces(grid, self.stgp_encoder_limit)]
        sizes = [math.prod(piece) for piece in pieces]
        rows: list[Tensor] = []
        start = 0
        for some in encoder_batches(sizes, self.stgp_encoder_limit):
            patches = sum(sizes[some]) * merge**2
            part = {
                "type": video_input["type"],
                "pixel_values_videos": video_input["pixel_values_videos"][start : start + patches],
                "video_grid_thw": torch.tensor([(t, h * merge, w * merge) for t, h, w in pieces[some]]),
            }
            rows += encode(part)
            start += patches
        videos: Sequence[Tensor] = torch.cat(rows).split([math.prod(grid) for grid in grids])
        return videos

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> Any:
        pooled = [
            dataclasses.replace(feature, data=_pooled_item(feature.data, self.config, self.stgp_options))
            if feature.modality == "video"
            else feature
            for feature in mm_features
        ]
        return super().get_mrope_input_positions(input_tokens, pooled)  # type: ignore[misc]


def _pieces(grid: Grid, limit: int) -> list[Grid]:
    """Return grids of consecutive frames that are a video together, each of `limit` tokens or a single frame."""
    frames, rows, cols = grid
    most = max(1, limit // (rows * cols))
    return [(min(most, frames - start), rows, cols) for start in range(0, frames, most)]


def _pooled_item(item: Any, config: Any, options: Any) -> Any:
    """Return vLLM's record of a video with the grid, in patches, of what is left of it, and all else as it is.

    Raises ValueError if patches do not make whole tokens, which a request that brings tokens may say.
    """
    grid, merge = item["video_grid_thw"], config.vision_config.spatial_merge_size
    if any(patches % merge for patches in grid.data.tolist()[1:]):
        raise ValueError(
            f"video_grid_thw must have rows and columns of patches that are multiples of {merge}, got "
            f"{grid.data.tolist()}"
        )
    [left] = shrink_grids(grid.data[None], merge, options)
    return type(item)({**item, "video_grid_thw": dataclasses.replace(grid, data=left)})
