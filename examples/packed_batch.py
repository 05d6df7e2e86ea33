"""Videos of different lengths pooled in one call, packed along T: the bits are those of each video alone.

python examples/packed_batch.py                      # three pieces of the packaged tokens
python examples/packed_batch.py a.npy b.safetensors  # files of tokens (T, H, W, C) with the same H, W and C
"""

from __future__ import annotations

import argparse

import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.io.data import load_fixture
from stgridpool_kernels.io.token_files import read_tokens


def packaged() -> list[torch.Tensor]:
    tokens = torch.from_numpy(load_fixture()[0])  # (16, 9, 16, 384) float16
    return [tokens, tokens[3:14], tokens[:5]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="token files (default: pieces of the packaged tokens)")
    args = parser.parse_args()
    try:
        videos = [read_tokens(file) for file in args.files] or packaged()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if any(x.shape[1:] != videos[0].shape[1:] or x.dtype != videos[0].dtype or x.dim() != 4 for x in videos):
        found = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in videos)
        parser.error(f"the files must hold (T, H, W, C) with one H, W, C and dtype, got {found}")

    # One tensor and the number of frames of each video, as attention over variable lengths takes them.
    counts = [len(video) for video in videos]
    packed = torch.cat(videos)  # (ΣT, H, W, C)
    pooled = stgp.grid_pool(packed, frame_counts=counts)
    for number, (video, part) in enumerate(zip(videos, pooled.split(counts), strict=True)):
        alone = stgp.grid_pool(video)
        assert torch.equal(part, alone), f"video {number} differs"
        summaries = stgp.grid_plan([len(video)], *video.shape[1:3]).overwritten
        sizes = f"{tuple(video.shape)} → {tuple(part.shape)}"
        print(f"video {number}: {sizes}, summaries in frames {list(summaries)}, bit for bit as alone")

    # The same for engines, which hold a frame as a row of tokens.
    flat = stgp.pool_flat(packed.flatten(1, 2), counts, packed.shape[1:3])
    assert torch.equal(flat, pooled.flatten(1, 2))
    print(f"pool_flat: {tuple(packed.flatten(1, 2).shape)} → {tuple(flat.shape)}, the same bits")


if __name__ == "__main__":
    main()
