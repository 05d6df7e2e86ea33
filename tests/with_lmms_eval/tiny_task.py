"""This module makes a task of lmms-eval, two videos of noise with a question on each, and evaluates models on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import llava_stub
import numpy as np
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

FRAMES, QUESTIONS = 24, 2
TASK = """
task: tiny_video
dataset_path: json
dataset_kwargs: {{data_files: {questions}}}
test_split: train
output_type: generate_until
doc_to_visual: !function tiny_visual.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def save(folder: Path, frames: int = FRAMES) -> Path:
    """Save the task with videos of one frame a second, and return the folder, which `--include_path` takes."""
    rows = []
    for number in range(QUESTIONS):
        path = folder / f"{number}.mp4"
        pixels = np.random.default_rng(number).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
        with av.open(path, "w") as container:
            stream = container.add_stream("mpeg4", rate=1)
            stream.width = stream.height = 64
            for image in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        rows.append({"video": str(path), "question": f"What is in video {number}?", "answer": "noise"})
    (folder / "questions.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny_visual.py").write_text("def visual(doc):\n    return [doc['video']]\n")
    (folder / "tiny_video.yaml").write_text(TASK.format(questions=folder / "questions.json"))
    return folder


def evaluate(model: str, model_args: str, folder: Path, **more: Any) -> list[str]:
    """Evaluate a model through lmms-eval on the task that `save` saved, and return its answers."""
    results = simple_evaluate(
        model,
        model_args=model_args,
        tasks=["tiny_video"],
        task_manager=TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name=model),
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
        **{"batch_size": 1, **more},
    )
    samples = results["samples"]["tiny_video"]
    assert len(samples) == QUESTIONS
    return [sample["filtered_resps"][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def evaluate_llava(model: str, model_args: str, folder: Path) -> llava_stub.LlavaQwenForCausalLM:
    """Evaluate a model of the stub, and return the one that lmms-eval loaded for it."""
    assert all(isinstance(answer, str) for answer in evaluate(model, model_args, folder))
    assert len(llava_stub.loaded[-1].videos) == QUESTIONS
    return llava_stub.loaded[-1]
