"""This script runs engines of vLLM, one after the other: python engine.py REQUEST ANSWERS.

REQUEST is a JSON object: "media" names a file of arrays by name; "engines" is a list of objects with "arguments" of an
engine, and "batches" of prompts. The prompts of a batch are asked together, the batches one after the other. A prompt
has a "name", "text" or "ids", names of its "videos" and "images" and, where the model wants it, "metadata" of videos.
In place of videos it may have names of their "tokens" with their "grids" in patches.
A list with an object for each engine is written to the file ANSWERS: what was answered to every prompt (tokens and the
logarithms of their probabilities), and the settings for CUDA graphs of the model's encoder.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

SAMPLING = SamplingParams(temperature=0, max_tokens=tiny.ANSWER, ignore_eos=True, logprobs=0, detokenize=False)


def given(prompt: dict[str, Any], media: Any) -> dict[str, Any]:
    """Return a prompt as vLLM takes it, which itself widens the place of a video to as many as it needs."""
    videos: Any = [media[name] for name in prompt.get("videos", ())]
    if "metadata" in prompt:
        videos = list(zip(videos, prompt["metadata"], strict=True))
    if "tokens" in prompt:
        videos = {
            "video_embeds": torch.cat([torch.from_numpy(media[name]) for name in prompt["tokens"]]),
            "video_grid_thw": torch.tensor(prompt["grids"]),
            "timestamps": [[float(frame) for frame in range(grid[0])] for grid in prompt["grids"]],
        }
    items = {"video": videos, "image": [Image.fromarray(media[name]) for name in prompt.get("images", ())]}
    text = {"prompt": prompt["text"]} if "text" in prompt else {"prompt_token_ids": prompt["ids"]}
    return {**text, "multi_modal_data": {kind: some for kind, some in items.items() if some}}


def answered(output: Any) -> dict[str, Any]:
    [best] = output.outputs
    return {
        "places": len(output.prompt_token_ids),
        "ids": list(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "tokens": list(best.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)],
    }


def encoder_graphs(model: Any) -> dict[str, Any] | None:
    """Return the modalities whose encoder calls CUDA graphs may record, and the most frames of a video for them."""
    if not hasattr(model, "get_encoder_cudagraph_config"):
        return None
    config = model.get_encoder_cudagraph_config()
    return {"modalities": config.modalities, "frames": config.max_frames_per_video, "buffers": config.buffer_keys}


def run(asked: dict[str, Any], media: Any) -> dict[str, Any]:
    """Return the answers of one engine, after which nothing of it is left."""
    prompts = [prompt for batch in asked["batches"] for prompt in batch]
    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {
            "video": max(1, *(len(prompt.get("videos", prompt.get("grids"))) for prompt in prompts))
        },
        **asked["arguments"],
    }
    engine = LLM(**arguments)
    answers = {}
    for batch in asked["batches"]:
        outputs = engine.generate([given(prompt, media) for prompt in batch], SAMPLING, use_tqdm=False)
        answers.update({prompt["name"]: answered(output) for prompt, output in zip(batch, outputs, strict=True)})
    graphs = engine.apply_model(encoder_graphs)[0] if asked.get("graphs") else None
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"answers": answers, "graphs": graphs}


def main() -> None:
    request, written = map(Path, sys.argv[1:])
    asked = json.loads(request.read_text())
    with np.load(asked["media"]) as media:
        results = [run(engine, media) for engine in asked["engines"]]
    written.write_text(json.dumps(results))


if __name__ == "__main__":  # vLLM starts processes that import this
    main()
