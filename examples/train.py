"""Gradients through grid_pool: a projector before the pooling learns to tell the colours of the packaged frames.

python examples/train.py
python examples/train.py --steps 200 --temperature 3
python examples/train.py --checkpoint    # activation checkpointing: projector and pooling run again in the backward
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import stgridpool_kernels as stgp
from stgridpool_kernels.io.data import load_fixture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the weights in a window (default: 1)")
    parser.add_argument("--checkpoint", action="store_true", help="keep no activations between projector and pooling")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")

    tokens, frames, _ = load_fixture()
    x = torch.from_numpy(tokens).float()  # (16, 9, 16, 384)
    # The colour of a token is the mean of its 7 × 7 pixels: (16, 63, 112, 3) → (16, 9, 16, 3). With temperature=0,
    # grid_pool averages each window, so the targets are the colours of what pooled tokens show, summaries included.
    # It is called as an op, since the function would warn that 3 channels look like another layout.
    colours = torch.from_numpy(frames).float().unflatten(1, (9, 7)).unflatten(3, (16, 7)).mean((2, 4)) / 255
    target = torch.ops.stgp.grid_pool(colours, temperature=0.0)  # (16, 4, 8, 3)

    torch.manual_seed(0)
    projector, head = nn.Linear(384, 64), nn.Linear(64, 3)
    pool = nn.Sequential(projector, stgp.GridPool(temperature=args.temperature))
    optimizer = torch.optim.Adam([*projector.parameters(), *head.parameters()], lr=3e-4)
    for step in range(1, args.steps + 1):
        pooled = checkpoint(pool, x, use_reentrant=False) if args.checkpoint else pool(x)  # (16, 4, 8, 64)
        loss = nn.functional.mse_loss(head(pooled), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 10 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.5f}, gradient of the projector {projector.weight.grad.norm():.5f}")


if __name__ == "__main__":
    main()
