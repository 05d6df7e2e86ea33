"""Frames pooled one by one as they come, with a state of bounded size that can be saved and taken up again.

python examples/streaming_camera.py                                   # the packaged tokens, frame by frame
python examples/streaming_camera.py --frames 10 --state stream.pt     # stop after 10 frames …
python examples/streaming_camera.py --state stream.pt                 # … and go on with the eleventh
python examples/streaming_camera.py clip.mp4                          # a video, through the demo's vision tower
ffmpeg -i /dev/video0 -f matroska - | python examples/streaming_camera.py -   # a camera, until Ctrl-C

Videos need pip install ".[demo]" and the two packages that docs/command-line.md installs after it.
"""

from __future__ import annotations

import argparse
import pickle
from itertools import islice
from pathlib import Path

import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.io.data import load_fixture
from stgridpool_kernels.io.inputs import stream_input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", nargs="?", help="a video, a .npy file, or - for a pipe (default: the packaged tokens)"
    )
    parser.add_argument("--frames", type=int, metavar="N", help="stop after N frames")
    parser.add_argument("--state", type=Path, metavar="FILE", help="go on from this state, and leave the new one there")
    args = parser.parse_args()
    if args.frames is not None and args.frames < 0:
        parser.error(f"--frames must not be negative, got {args.frames}")

    stream = stgp.GridPoolStream()  # takes the arguments of grid_pool
    try:
        if args.state is not None and args.state.exists():
            stream.load_state_dict(torch.load(args.state, weights_only=True))
        first, pooled = stream.frames(), []
        tokens = torch.from_numpy(load_fixture()[0])  # (16, 9, 16, 384)
        if args.source is None:
            frames = iter(tokens[first:].split(1))
        else:
            frames = stream_input(args.source, grid=None, tap="post_ln", chunk=1)
        for number, x in enumerate(islice(frames, args.frames), first):
            y = stream.push(x)  # (1, H, W, C) → (1, ⌊H/2⌋, ⌊W/2⌋, C), in the same call
            # With the default strides and grids, a summary takes the place of every eighth frame.
            summary = ", a summary" if number % 8 == 7 else ""
            sizes = f"{tuple(x.shape[1:])} → {tuple(y.shape[1:])}"
            print(f"frame {number}: {sizes}, {stream.state_bytes} bytes kept{summary}", flush=True)
            if args.source is None:
                pooled.append(y)
    except KeyboardInterrupt:
        print("stopped")
    except (EOFError, pickle.UnpicklingError):
        parser.error(f"{args.state} is no file that torch.save wrote")
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(str(error))
    if pooled:
        assert torch.equal(torch.cat(pooled), stgp.grid_pool(tokens)[first : stream.frames()])
        print("bit for bit the frames of grid_pool(tokens)")
    if args.state is not None:
        torch.save(stream.state_dict(), args.state)


if __name__ == "__main__":
    main()
