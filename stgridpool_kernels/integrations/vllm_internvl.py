"""This module adds ST-GridPool to InternVLChatModel, InternVL and Intern-S1 of vLLM, after their projector.

Every frame has a square of tokens, and as many places in the prompt, whatever the resolution of the video.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch

from .internvl import frame_tokens
from .vllm_models import PooledInfo, PooledModel, PooledProcessor


class InternVLInfo(PooledInfo):
    """This mixin checks options against the tokens of a frame."""

    get_hf_processor: Any

    def check_options(self) -> None:
        super().check_options()
        frame_tokens(self.get_hf_processor().image_seq_length, self.stgp_options)


class InternVLProcessor(PooledProcessor):
    """This mixin writes as many placeholders of a frame into prompts as tokens are left of it."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        tokens = self.info.get_hf_processor(**hf_processor_mm_kwargs).image_seq_length
        left = frame_tokens(tokens, self.info.stgp_options)
        return [_shortened(update, tokens, left) if update.modality == "video" else update for update in updates]


class InternVLModel(PooledModel):
    """This mixin pools what the projector leaves of a video: (F, S, C) tokens of F frames, where S is a square."""

    num_image_token: int
    extract_feature: Any

    def stgp_grid(self) -> tuple[int, int]:
        return (math.isqrt(self.num_image_token),) * 2

    def _process_vision_input(self, image_input: Any) -> Any:
        if image_input["type"] != "pixel_values_videos":
            return super()._process_vision_input(image_input)  # type: ignore[misc]
        name = "pixel_values_flat" if hasattr(image_input, "pixel_values_flat") else "pixel_values"
        frames = [int(count) for count in image_input["num_patches"]]
        most = max(1, self.stgp_encoder_limit // self.num_image_token)
        features = torch.cat([self.extract_feature(some) for some in image_input[name].split(most)])
        tokens = self.stgp_options.apply(features.unflatten(1, self.stgp_grid()), frame_counts=frames)
        return tuple(video.flatten(0, 2) for video in tokens.split(frames))


def _shortened(update: Any, tokens: int, left: int) -> Any:
    """Return vLLM's prompt update for a video with `left` places for each frame in place of `tokens`."""

    def replacement(item_idx: int) -> Any:
        details = update.replacement(item_idx)
        ids: list[int] = []
        for is_place, run in itertools.groupby(
            zip(details.is_embed(details.full).tolist(), details.full, strict=True), key=lambda pair: pair[0]
        ):
            same = [token for _, token in run]
            ids += same[: len(same) // tokens * left] if is_place else same
        return dataclasses.replace(details, full=ids)

    return dataclasses.replace(update, replacement=replacement)
