"""The reference that all backends are tested against: ST-GridPool in plain PyTorch, differentiable.

It takes every argument, and at least one frame. Frame indices and window positions come from `GridPlan`; all arithmetic
is here. It runs in float32, or in float64 for float64 input, and needs a few times the memory of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import GridPlan, Level, Runs
from .weighting import Weighting


def grid_pool(x: Tensor, plan: GridPlan, weighting: Weighting) -> Tensor:
    """Apply temporal gridding, then norm-based pooling: (…, T, H, W, C) → (…, T, OH, OW, C) in x.dtype.

    With a plan without levels this is norm_pool: Σ softmax(temperature · ‖t‖) · t over the tokens t of every window.
    """
    pooled = _pool(_grid(x, plan), plan, weighting)
    return pooled.to(x.dtype).view(*x.shape[:-3], *plan.pooled_size, x.shape[-1])


def temporal_grid(x: Tensor, plan: GridPlan) -> Tensor:
    """Replace the target frame of every group by the group's summary. The result has shape and dtype of x."""
    return _grid(x, plan).to(x.dtype).view(x.shape)


def _grid(x: Tensor, plan: GridPlan) -> Tensor:
    """Return the frames of all videos, (frames, H, W, C), with summaries in place, rounded to x.dtype."""
    if not plan.levels:
        return _accumulate(x.flatten(0, -4))
    # if channels were not last in memory, torch would shrink by another kernel, which rounds differently
    frames = x.flatten(0, -4).to(_arithmetic(x), copy=True, memory_format=torch.contiguous_format)
    for level in plan.levels:
        if level.targets:
            groups = frames[torch.tensor(level.sources, device=x.device)]  # (G, S, H, W, C)
            summaries = _shrink(groups, level, plan.resize)
            with torch.no_grad():  # the derivative treats rounding as the identity
                summaries.copy_(summaries.to(x.dtype))
            frames[torch.tensor(level.targets, device=x.device)] = summaries
    return frames


def _shrink(groups: Tensor, level: Level, resize: str) -> Tensor:
    """Return the summaries (G, H, W, C) of G groups of S frames each, (G, S, H, W, C), tiled row-major."""
    G, _, H, W, C = groups.shape
    m, n = level.rows, level.cols
    if resize == "area":
        h, w = math.ceil(H / m), math.ceil(W / n)
        tiles = F.adaptive_avg_pool2d(groups.flatten(0, 1).permute(0, 3, 1, 2), (h, w)).permute(0, 2, 3, 1)
        mosaic = tiles.reshape(G, m, n, h, w, C).transpose(2, 3).reshape(G, m * h, n * w, C)
        return mosaic[:, :H, :W]
    mosaic = groups.reshape(G, m, n, H, W, C).transpose(2, 3).reshape(G, H, m, W, n, C)
    # Bilinear at an integer scale m samples the middle of every m rows: one row if m is odd, the mean of two if even.
    return mosaic[:, :, (m - 1) // 2 : m // 2 + 1, :, (n - 1) // 2 : n // 2 + 1].mean((2, 4))


def _pool(frames: Tensor, plan: GridPlan, weighting: Weighting) -> Tensor:
    """Pool the frames of all videos, (frames, H, W, C) → (frames, OH, OW, C), without rounding to another dtype."""
    norms = token_norm(frames, weighting)
    rows, row_taken = _positions(plan.window_rows, plan.height, frames.device)
    cols, col_taken = _positions(plan.window_cols, plan.width, frames.device)

    # position (i, j) of every window at once; row and column indices broadcast to (OH, OW)
    window = [(rows[:, i, None], cols[:, j]) for i in range(rows.shape[1]) for j in range(cols.shape[1])]
    taken = torch.stack([r[:, None] & c for r in row_taken.T for c in col_taken.T], dim=-1)  # (OH, OW, window)
    logits = torch.stack([weighting.temperature * norms[:, r, c] for r, c in window], dim=-1)  # (T, OH, OW, window)
    # n zero tokens of norm 0 weigh n · exp(0) together, as one token of logit log(n) does
    sizes = (torch.tensor(runs.count, device=taken.device) for runs in (plan.window_rows, plan.window_cols))
    padding = torch.outer(*sizes) - taken.sum(-1)
    padding = padding.to(logits.dtype).log().expand(logits.shape[:-1])
    weights = torch.cat([torch.where(taken, logits, -math.inf), padding[..., None]], dim=-1).softmax(-1)
    pooled = frames.new_zeros(())
    all_taken = bool(taken.all())
    for k, (r, c) in enumerate(window):  # padding adds zeros
        weighted = weights[..., k, None] * frames[:, r, c]
        # a weight of 0 would turn an infinity that a shorter run repeats into NaN
        pooled = pooled + (weighted if all_taken else torch.where(taken[..., k, None], weighted, 0))
    return pooled


def _positions(runs: Runs, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions of runs that are inside the frame, and a mask of those that belong to their run.

    Both have the shape (runs, longest run). No run is in the padding alone.
    """
    start = torch.tensor(runs.start, device=device)
    stop = (start + torch.tensor(runs.count, device=device)).clamp(max=size)
    start = start.clamp(min=0)
    positions = start[:, None] + torch.arange(int((stop - start).max()), device=device)
    # a shorter run repeats its last position, so that a NaN outside a window cannot reach its result
    return positions.minimum(stop[:, None] - 1), positions < stop[:, None]


def token_norm(x: Tensor, weighting: Weighting) -> Tensor:
    """‖t‖ of every token by the first `norm_channels` channels: (…, T, H, W, C) → (…, T, H, W), float32 or float64."""
    if weighting.norm_channels < x.shape[-1]:
        x = x[..., : weighting.norm_channels]
    # Frame by frame, since torch's vectorised pow may round the tail of a tensor differently: otherwise the last bit of
    # a norm would depend on the number of frames.
    norms = [_norm(frame, weighting.norm_type, weighting.normalize_norm) for frame in x.flatten(0, -4)]
    return torch.stack(norms).view(x.shape[:-1])


def _norm(tokens: Tensor, norm_type: float, normalize_norm: bool) -> Tensor:
    """‖t‖ = (mean_c |t_c|^p)^(1/p), or the sum in place of the mean; max_c |t_c| for p = inf: (…, C) → (…)."""
    magnitude = _accumulate(tokens).abs().contiguous()  # the order of summation depends on strides
    if norm_type == math.inf:
        return magnitude.amax(-1)
    powers = _power(magnitude, norm_type)
    return _power(powers.mean(-1) if normalize_norm else powers.sum(-1), 1 / norm_type)


def _power(base: Tensor, exponent: float) -> Tensor:
    """base ** exponent for base ≥ 0, with gradient 0 at 0 (where it would be infinite for an exponent below 1)."""
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1).pow(exponent), base.detach())


def _accumulate(x: Tensor) -> Tensor:
    return x.to(_arithmetic(x))


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grid_pool_backward(grad: Tensor, x: Tensor, plan: GridPlan, weighting: Weighting, grad_x: Tensor) -> None:
    """Write the gradient of grid_pool with respect to x into grad_x."""
    _differentiate(lambda leaf: grid_pool(leaf, plan, weighting), grad, x, grad_x)


def temporal_grid_backward(grad: Tensor, x: Tensor, plan: GridPlan, grad_x: Tensor) -> None:
    """Write the gradient of temporal_grid with respect to x into grad_x."""
    _differentiate(lambda leaf: temporal_grid(leaf, plan), grad, x, grad_x)


def token_norm_backward(grad: Tensor, x: Tensor, weighting: Weighting, grad_x: Tensor) -> None:
    """Write the gradient of token_norm with respect to x into grad_x."""
    _differentiate(lambda leaf: token_norm(leaf, weighting), grad, x, grad_x)


def _differentiate(function: Callable[[Tensor], Tensor], grad: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """Write the gradient of function(x) with respect to x into grad_x, by computing it again. It is rounded once.

    Where a norm has no derivative, this takes 0 at a zero token and, for p ≤ 1, at zero elements; for p = inf, all
    elements of the largest magnitude share the gradient equally.
    """
    # dispatched kernels run below autograd
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf), leaf, grad)
    grad_x.copy_(found)
