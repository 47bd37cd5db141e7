"""The correction over several processes against the one-process result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fedgc.correction import gradient
from fedgc.rng import generator
from fedgc.sharding import sharded_gradient

D, SCALE = 12, 8.0


def rows(count: int) -> tuple[Tensor, Tensor]:
    """Unequal clients; one of a single row, one row of no length."""
    W = torch.randn(count, D, generator=generator(count, "rows"), dtype=torch.float64)
    W *= torch.linspace(0.3, 3, count, dtype=torch.float64)[:, None]
    W[count // 2] = 0
    owner = torch.randint(5, (count,), generator=generator(count, "owners")).sort().values
    owner[-1] = 9
    return W, owner


def shares(count: int, world: int) -> list[int]:
    """Unequal: the last process has the most, and of three or more the first has nothing."""
    sizes = [count // (2 * world)] * world
    sizes[0] = 0 if world > 2 else sizes[0]
    return [*sizes[:-1], count - sum(sizes[:-1])]


def process(rank: int, world: int, count: int, order: Tensor, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    W, owner = rows(count)
    sizes = shares(count, world)
    mine = order[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    G = sharded_gradient(W[mine], owner[mine], SCALE, block=7)
    torch.save({"rows": mine, "G": G}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_shards_add_up_to_the_whole(world: int, shuffled: bool, tmp_path: Path) -> None:
    count = 61
    W, owner = rows(count)
    order = torch.randperm(count, generator=generator(1, "order")) if shuffled else torch.arange(count)
    mp.spawn(process, (world, count, order, str(tmp_path)), nprocs=world)
    found = torch.full_like(W, torch.nan)
    for rank in range(world):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        found[part["rows"]] = part["G"]
    torch.testing.assert_close(found, gradient(W, owner, SCALE), rtol=1e-12, atol=1e-13)
