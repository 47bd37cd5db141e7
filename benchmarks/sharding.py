"""The correction over 1, 2 and 4 processes: seconds, memory of each, and distance from the one-process result.

Processes share this machine's cores, one thread each: with more processes than cores the time says nothing of a cluster.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fedgc.correction import gradient
from fedgc.sharding import sharded_gradient

SCALE, CLIENTS = 8.0, 37


def rows(count: int, size: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows start to stop of ``count``, each drawn by its own number: a process makes its own alone."""
    numbers = range(start, count if stop is None else stop)
    W = torch.empty(len(numbers), size)
    for i, n in enumerate(numbers):
        torch.randn(size, generator=torch.Generator().manual_seed(n), out=W[i])
    return W, torch.arange(start, start + len(numbers)) * CLIENTS // count


def peak() -> float:
    """MiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def process(rank: int, world: int, count: int, size: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    cut = [count * r // world for r in range(world + 1)]
    W, owner = rows(count, size, cut[rank], cut[rank + 1])
    sharded_gradient(W[:64], owner[:64], SCALE)
    before = peak()
    dist.barrier()
    clock = time.monotonic()
    G = sharded_gradient(W, owner, SCALE)
    dist.barrier()
    torch.save({"G": G, "seconds": time.monotonic() - clock, "more": peak() - before}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measured(world: int, count: int, size: int, whole: Tensor) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (world, count, size, folder), nprocs=world)
        parts = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
    G = torch.cat([part["G"] for part in parts])
    return {"seconds": max(p["seconds"] for p in parts), "more": max(p["more"] for p in parts),
            "error": float((G - whole).norm() / whole.norm())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_575)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    W, owner = rows(options.rows, options.size)
    gradient(W[:256], owner[:256], SCALE)
    clock = time.monotonic()
    whole = gradient(W, owner, SCALE)
    print(f"C = {options.rows}, d = {options.size}, {os.cpu_count()} cores, one thread a process")
    print(f"fedgc.correction.gradient, one process: {time.monotonic() - clock:.2f} s")
    for world in options.processes:
        m = measured(world, options.rows, options.size, whole)
        print(
            f"{world} processes: {m['seconds']:.2f} s, {m['more']:.0f} MiB more each, relative error {m['error']:.1e}"
        )


if __name__ == "__main__":
    main()
