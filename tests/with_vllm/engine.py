"""Run one engine of vLLM in a process of its own: python engine.py FOLDER REQUEST ANSWERS.

FOLDER holds a model of tiny.py. REQUEST is a JSON object of "arguments" of the engine, and "batches" of names of
prompts of tiny.py: the prompts of a batch are asked together, the batches one after the other. What is answered is
written to the file ANSWERS: tokens, and the logarithms of their probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
from vllm import LLM, SamplingParams

SAMPLING = SamplingParams(temperature=0, max_tokens=tiny.ANSWER, ignore_eos=True, logprobs=0, detokenize=False)


def given(prompt: tiny.Prompt) -> dict:
    """Return a prompt as vLLM takes it, which itself widens the place of a video to as many as it needs."""
    media = {
        "video": [tiny.video(*made) for made in prompt.videos],
        "image": [tiny.image(seed) for seed in prompt.images],
    }
    return {
        "prompt_token_ids": list(prompt.ids),
        "multi_modal_data": {kind: items for kind, items in media.items() if items},
    }


def main() -> None:
    folder, request, written = sys.argv[1:]
    asked = json.loads(request)
    videos = max(len(tiny.PROMPTS[name].videos) for names in asked["batches"] for name in names)
    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        limit_mm_per_prompt={"video": max(1, videos)},
        **asked["arguments"],
    )
    answers = {}
    for names in asked["batches"]:
        prompts = [given(tiny.PROMPTS[name]) for name in names]
        for name, output in zip(names, engine.generate(prompts, SAMPLING, use_tqdm=False), strict=True):
            [best] = output.outputs
            answers[name] = {
                "places": len(output.prompt_token_ids),
                "tokens": list(best.token_ids),
                "logprobs": [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)],
            }
    Path(written).write_text(json.dumps(answers))


if __name__ == "__main__":  # vLLM starts processes that import this
    main()
