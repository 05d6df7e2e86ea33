"""Providers of a prefill: the time that pooling saves the language model behind it.

A decoder with the architecture of Qwen2 runs over the visual tokens of a video and a short text: one forward that fills
the KV cache and computes the logits of the last position, the first step of generation. Its weights are random, which
does not affect times. The pooling before it is timed separately. A CPU without instructions for products of bfloat16
(AVX512-BF16, AMX) is faster in float32: `--shape prefill-0.5b:fp32`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lower_bound import Traffic
from benchmarks.poolings import backends, op_by_op_ulps, poolings
from benchmarks.provider import Pool, Provider
from benchmarks.workloads import Workload, random_tokens

TEXT_TOKENS = 64
"""Number of tokens of text in a prompt."""
BUDGETS = (0.5, 0.3)
"""Shares of the visual tokens, for each of which an `output_size` is timed."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder. tied: whether input and output embeddings are one matrix."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def kv_width(self) -> int:
        """Number of values in the keys, or in the values, of a token in one layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def parameters(self) -> int:
        h, kv = self.hidden, self.kv_width
        attention = 2 * h * h + 2 * h * kv + h + 2 * kv  # queries, keys and values have a bias
        layer = attention + 3 * h * self.intermediate + 2 * h
        return (1 if self.tied else 2) * self.vocabulary * h + self.layers * layer + h

    def bound(self, prompt: int, value_bytes: int) -> Traffic:
        """Lower bound of a prefill: weights and prompt are read, the KV cache and the logits are written."""
        cache = 2 * self.layers * self.kv_width * prompt
        read = self.parameters + prompt * self.hidden
        return Traffic(read * value_bytes, (cache + self.vocabulary) * value_bytes)

    def needed_bytes(self, prompt: int, value_bytes: int) -> int:
        """Estimate of the peak memory in bytes of a prefill, with the activations of one layer."""
        activations = prompt * (5 * self.hidden + 3 * self.intermediate)
        return self.bound(prompt, value_bytes).total_bytes + activations * value_bytes


DECODERS = {
    decoder.hidden: decoder
    for decoder in (
        Decoder("tiny", 64, 2, 4, 2, 128, 256, tied=True),  # for tests
        Decoder("0.5b", 896, 24, 14, 2, 4864, 151_936, tied=True),
        Decoder("7b", 3584, 28, 28, 4, 18_944, 152_064, tied=False),
    )
}


def prefills(workload: Workload, device: str) -> list[Provider]:
    """Return providers of the prefill after every pooling, and of the pooling alone, from most tokens to fewest.

    Raises ValueError unless the workload is one video whose channels are the width of a decoder.
    """
    w, decoder = workload, DECODERS.get(workload.channels)
    if decoder is None or w.batch is not None or len(w.frame_counts) > 1:
        widths = ", ".join(map(str, DECODERS))
        raise ValueError(f"a prefill is timed on one video of {widths} channels, got {w.name}")
    found = []
    sizes = f"{decoder.name}: {decoder.parameters / 1e9:.2f} × 10⁹ parameters, {TEXT_TOKENS} tokens of text"
    for label, of_pooling, name in variants(w, backends(device)[0]):
        rows, cols = of_pooling.plan("norm_pool").pooled_size if name else w.grid
        prompt = w.frames * rows * cols + TEXT_TOKENS
        about = {"pooled_by": label, "grid": [rows, cols], "visual_tokens": prompt - TEXT_TOKENS}
        pool: Pool | None = None
        if name:
            (provider,) = (each for each in poolings(of_pooling, device) if each.name == name)
            pool, moved = provider.call, of_pooling.bound(provider.op)
            found.append(replace(provider, name=f"pool:{label}", takes_out=False, moved=moved, settings=about))
        prefill = Prefill(decoder, pool)
        found.append(
            Provider(
                f"prefill:{label}",
                "prefill",
                prefill.with_cache,
                prefill.without_cache,
                op_by_op_ulps(w),
                moved=decoder.bound(prompt, w.dtype.itemsize),
                captures=False,
                memory=decoder.needed_bytes(prompt, w.dtype.itemsize) / w.input_bytes,
                note="" if name else sizes,
                settings=about,
            )
        )
    return found


def variants(workload: Workload, backend: str) -> list[tuple[str, Workload, str]]:
    """Return label, workload and provider ("" for none) of every pooling, from most tokens to fewest."""
    ours, floor, ceil = f"grid_pool:{backend}", workload, replace(workload, ceil_mode=True)
    squares = [(side_of(budget, workload.grid[0]),) * 2 for budget in BUDGETS]
    budgets = [replace(workload, output_size=square) for square in squares]
    return [
        ("unpooled", workload, ""),
        *((f"grid_pool(output_size={each.output_size})", each, ours) for each in budgets),
        ("llava_bilinear_pool", ceil, "llava_bilinear_pool"),
        ("grid_pool(ceil_mode=True)", ceil, ours),
        ("llava_avg_pool", floor, "llava_avg_pool"),
        ("grid_pool()", floor, ours),
    ]


def side_of(budget: float, size: int) -> int:
    """Return the side of the square of tokens whose number is closest to a share of size × size."""
    return min(range(1, size + 1), key=lambda side: abs(side * side - budget * size * size))


class Prefill:
    """Forward of the decoder over the pooled tokens of x and a text. Prompts are cached by x."""

    def __init__(self, decoder: Decoder, pool: Pool | None) -> None:
        self.decoder, self.pool = decoder, pool
        self._prompts: dict[int, Tensor] = {}

    def with_cache(self, x: Tensor) -> Tensor:
        """Return the logits of the last position, (1, 1, 1, vocabulary), by a forward that fills a KV cache."""
        prompt = self.prompt(x)
        result = self._forward(x, prompt, use_cache=True)
        assert result.past_key_values.get_seq_length() == prompt.shape[1]
        logits: Tensor = result.logits[None]
        return logits

    def without_cache(self, x: Tensor) -> Tensor:
        """Return the logits of the last position, (1, 1, 1, vocabulary), by a forward without a KV cache."""
        logits: Tensor = self._forward(x, self.prompt(x), use_cache=False).logits[None]
        return logits

    def prompt(self, x: Tensor) -> Tensor:
        """Return the prompt of x, (1, visual tokens + TEXT_TOKENS, C)."""
        if x.data_ptr() not in self._prompts:
            pooled = x if self.pool is None else self.pool(x)
            text = random_tokens((TEXT_TOKENS, x.shape[-1]), x.dtype, str(x.device), seed=1)
            self._prompts[x.data_ptr()] = torch.cat([pooled.flatten(0, 2), text])[None]
        return self._prompts[x.data_ptr()]

    @torch.inference_mode()
    def _forward(self, x: Tensor, prompt: Tensor, use_cache: bool) -> Any:
        """Run the model with attention kernels that never store all L × L scores, which would take most memory."""
        model = build(self.decoder, x.dtype, str(x.device))
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            return model(inputs_embeds=prompt, use_cache=use_cache, logits_to_keep=1)


@lru_cache(maxsize=1)
def build(decoder: Decoder, dtype: torch.dtype, device: str) -> Callable[..., Any]:
    """Return the decoder with random weights. Raises ImportError without transformers."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"the decoder comes from transformers ({error}): pip install transformers") from error
    config = transformers.Qwen2Config(
        vocab_size=decoder.vocabulary,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=decoder.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return cast(Callable[..., Any], model.eval())
