"""token_norm: the norm ‖t‖ of every token."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import tile_config
from .launch import CallSpec, Launch, PreparedCall
from .tiles import finish_norms, join_norms, load_tokens, no_norms, partial_norms, token_places


@triton.jit(do_not_specialize=["n", "T", "norm_channels"])  # one compilation serves all values of these
def token_norm_kernel(
    x,  # (…, T, H, W, C)
    out,  # (…, T, H, W)
    scratch,  # unused
    tables,  # unused
    n,  # tokens
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    x_video: tl.int64,
    x_frame,
    x_row,
    x_col,
    x_channel,
    out_video: tl.int64,
    out_frame,
    out_row,
    out_col,
    norm_channels,  # channels of the norm, None for all
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    P: tl.constexpr,
):
    """out[t, r, c] = (mean_c |x[t, r, c]|^p)^(1/p), TOKENS of them a program."""
    x_strides = (x_video, x_frame, x_row, x_col, x_channel)
    number = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    frames, rows, cols = number // (H * W), number // W % H, number % W
    total = no_norms(TOKENS, NORM)
    for chunk in range(CHUNKS):
        channels = chunk * BLOCK + tl.arange(0, BLOCK)
        tile = load_tokens(x, x, frames, rows, cols, number < n, channels, T, H, W, x_strides, C, False).to(tl.float32)
        total = join_norms(total, partial_norms(tile, channels, norm_channels, NORM, P), NORM)
    places = token_places(frames, rows, cols, T, (out_video, out_frame, out_row, out_col))
    tl.store(out + places, finish_norms(total, C, norm_channels, MEAN, NORM, P, True), mask=number < n)


def prepare(request: CallSpec) -> PreparedCall:
    """Return the one launch of token_norm."""
    n = request.out.numel()
    config = tile_config(request.x.shape[-1], min(n, 64))
    arguments = request.sizes() | request.weights() | {"n": n}
    arguments |= {"BLOCK": config.block, "CHUNKS": config.chunks, "TOKENS": config.tokens}
    grid = (triton.cdiv(n, config.tokens), 1, 1)
    return PreparedCall(request.plan, [Launch(token_norm_kernel, grid, arguments, num_warps=config.num_warps)], 0, None)
