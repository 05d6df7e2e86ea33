"""token_norm: the norm ‖t‖ of every token."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import tile_config
from .launch import CallSpec, Launch, PreparedCall
from .tiles import finish_norms, join_norms, load_tokens, no_norms, partial_norms, token_places


@triton.jit(do_not_specialize=["count", "T", "weights"])  # one compilation serves all values of these
def token_norm_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, H, W)
    count,  # number of tokens
    T,
    weights,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out[t, r, c] = (mean_c |x[t, r, c]|^p)^(1/p), TOKENS of them a program."""
    number = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    frames, rows, cols = number // (SIZE.H * SIZE.W), number // SIZE.W % SIZE.H, number % SIZE.W
    total = no_norms(TOKENS, NORM)
    for chunk in range(CHUNKS):
        channels = chunk * BLOCK + tl.arange(0, BLOCK)
        tile = load_tokens(x, None, frames, rows, cols, number < count, channels, T, SIZE, False).to(tl.float32)
        total = join_norms(total, partial_norms(tile, channels, weights, NORM), NORM)
    norms = finish_norms(total, weights, SIZE.C, NORM, True)
    tl.store(out.pointer + token_places(frames, rows, cols, T, out), norms, mask=number < count)


def prepare(spec: CallSpec) -> PreparedCall:
    """Return the one launch of token_norm."""
    count = spec.out.numel()
    config = tile_config(spec.size.C, min(count, 64))
    arguments = spec.arguments() | {"count": count}
    arguments |= {"BLOCK": config.block, "CHUNKS": config.chunks, "TOKENS": config.tokens}
    grid = (triton.cdiv(count, config.tokens), 1, 1)
    return PreparedCall(None, [Launch(token_norm_kernel, grid, arguments, **spec.options(config.num_warps))], 0, None)
