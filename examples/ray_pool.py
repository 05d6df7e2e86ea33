"""A folder of token files and videos pooled with Ray Data, as a step of a pipeline of one's own.

python examples/ray_pool.py stgridpool_kernels/io/data pooled --key tokens    # the packaged tokens, in a checkout
python examples/ray_pool.py videos/ pooled/ --temperature 2 --actors 4

It needs pip install ".[ray]", and for videos ".[demo]" and the two packages that docs/command-line.md installs after
it. Without steps of one's own, python -m stgridpool_kernels.integrations.ray does the same with more options.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import ray

from stgridpool_kernels.integrations.ray import PoolFiles
from stgridpool_kernels.io.token_files import SUFFIXES
from stgridpool_kernels.io.video import VIDEO_SUFFIXES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with token files or videos")
    parser.add_argument("output", type=Path, help="folder of the results; what is there already is kept")
    parser.add_argument("--key", help="name of the tensor, in files that hold several")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the weights in a window (default: 1)")
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="processes that pool (default: 1)")
    args = parser.parse_args()
    options = {"key": args.key, "temperature": args.temperature}
    try:
        PoolFiles(**options)  # bad options fail here, before Ray starts
        found = sorted(file for file in args.folder.iterdir() if file.suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES))
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.actors < 1:
        parser.error(f"--actors must be at least 1, got {args.actors}")
    if not found:
        parser.error(f"{args.folder} has no token files ({', '.join(SUFFIXES)}) and no videos")

    # Actors work in folders of their own, so paths are absolute.
    output = args.output.resolve()
    rows = [{"source": str(file.resolve()), "output": str(output / f"{file.name}.safetensors")} for file in found]
    files = ray.data.from_items(rows)  # a step before this one may filter or fetch, one after it may read the results
    actors = ray.data.ActorPoolStrategy(size=args.actors)
    pooled = files.map_batches(PoolFiles, fn_constructor_kwargs=options, batch_size=4, compute=actors)
    states = Counter()
    for row in pooled.iter_rows():
        states[row["state"]] += 1
        print(f"{row['state']}: {row['reason'] or row['output']}")
        if row["warning"]:
            print(f"warning: {row['warning']}")
    print(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    if states["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
