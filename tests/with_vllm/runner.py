"""This module runs engines of vLLM in processes of their own, and compares what they answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CLOSE = 1e-4
"""Logarithms of probabilities of the libraries differ by less than this in float32; other options give 1e-2."""

Answers = dict[str, dict[str, Any]]


class Runner:
    """This object runs engines in a process. `log` is what the last process printed."""

    def __init__(self, settings: Mapping[str, str], folder: Path) -> None:
        self._settings, self._folder, self.log = settings, folder, ""

    def __call__(
        self,
        engines: Iterable[Mapping[str, Any]],
        media: Mapping[str, np.ndarray],
        fails: bool = False,
        **environment: str | None,
    ) -> list[dict[str, Any]]:
        """Return the results of engines that run one after the other, or nothing where the process must fail.

        engines: objects as engine.py takes them. environment: variables to set, or to remove where they are None.
        """
        several = environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "1"
        uni = {} if several else {"distributed_executor_backend": "uni"}
        request, written, arrays = (self._folder / name for name in ("request.json", "answers.json", "media.npz"))
        np.savez(arrays, **media)
        made = [{**engine, "arguments": {**uni, **engine["arguments"]}} for engine in engines]
        request.write_text(json.dumps({"media": str(arrays), "engines": made}))
        env = {**self._settings, **environment}
        done = subprocess.run(
            [sys.executable, str(HERE / "engine.py"), str(request), str(written)],
            cwd=self._folder,
            env={name: value for name, value in env.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        self.log = done.stdout
        assert bool(done.returncode) == fails, done.stdout
        return [] if fails else json.loads(written.read_text())


def selected(architecture: str, **options: Any) -> dict[str, Any]:
    """Return the engine's arguments that select an architecture, with options where there are any."""
    return {"hf_overrides": {"architectures": [architecture], **({"stgp_options": options} if options else {})}}


def assert_same_answers(answers: Answers, reference: Answers, close: float = CLOSE) -> None:
    for name, answer in reference.items():
        assert answers[name]["places"] == answer["places"], name
        assert answers[name]["tokens"] == answer["tokens"], name
        assert difference(answers[name], answer) < close, name


def difference(answer: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return how much the first token's logarithm of probability differs, which depends on the prompt alone."""
    return abs(answer["logprobs"][0] - other["logprobs"][0])
