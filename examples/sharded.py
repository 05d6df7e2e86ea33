"""One batch of videos over several processes: every process pools its own shard, and nothing is sent.

torchrun --standalone --nproc-per-node 2 examples/sharded.py
torchrun --standalone --nproc-per-node 8 examples/sharded.py --device cuda    # NCCL; not run yet
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import stgridpool_kernels as stgp


def main() -> bool:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--frames", type=int, default=64, help="of every video: a multiple of 32 for every process")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/sharded.py")

    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh(args.device, (world,))  # starts NCCL for cuda, gloo for cpu

    torch.manual_seed(0)
    # (B, T, H, W, C), the same in every process
    videos = torch.randn(world, args.frames, 12, 12, 64, device=args.device)

    right = True
    for name, dim in (("videos", 0), ("frames", 1)):
        x = distribute_tensor(videos, mesh, [Shard(dim)]).requires_grad_()
        with CommDebugMode() as communication:
            y = stgp.grid_pool(x)
            y.backward(torch.ones_like(y))
        same = torch.equal(y.full_tensor(), stgp.grid_pool(videos))
        right &= same
        if dist.get_rank() == 0:
            print(
                f"sharded over {name}: {tuple(x.to_local().shape)} → {tuple(y.to_local().shape)} in every process, "
                f"{communication.get_total_counts()} collectives, "
                f"{'equal to' if same else 'NOT'} the result of one process"
            )
    dist.barrier()  # no process leaves while another still hears from it
    dist.destroy_process_group()
    return right


if __name__ == "__main__":
    right = main()
    # Not through the interpreter's own end: a thread of gloo may still hold a tensor of the last collective, needs the
    # GIL to let go of it, and aborts the process where Python is ending. destroy_process_group does not wait for these
    # threads, and the caches of DTensor keep the group alive.
    sys.stdout.flush()
    os._exit(0 if right else 1)
