"""The correction over several processes: each holds some rows and meets the others' as they go round in a ring.

Nobody forms or sends anything of C x C: a process sends its rows (n, d), then rows and denominators (n, d + 1), to its
neighbour, P - 1 times each, and computes while they travel. `fedgc.correction.gradient` is the same in one process.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fedgc.correction import inverse_lengths, through_length

BLOCK = 1024  # rows of a tile


def sharded_gradient(W: Tensor, owner: Tensor, scale: float, *, block: int = BLOCK) -> Tensor:
    """∇Reg with respect to this process's rows, W: (n, d), owner: (n,) client of each; n may differ between processes, and be 0.

    To be called by every process of the default group (gloo or nccl). Unit rows, the default denominator, float32 or float64;
    each ordered pair of rows is met twice: 6 C²d / P operations, and 2 (n, d) buffers beside the result.
    """
    sizes = _sizes(len(W), W.device)
    inverse = inverse_lengths(W)
    E = W * inverse
    Z = W.new_ones(len(W), 1)
    for rows, of, _ in _ring(E, owner, None, sizes):
        for mine, _, H in _tiles(E, owner, rows, of, scale, block):
            Z[mine] += H.sum(dim=1, keepdim=True)
    G = torch.zeros_like(W)
    for rows, of, denominators in _ring(E, owner, Z, sizes):
        assert denominators is not None
        for mine, theirs, H in _tiles(E, owner, rows, of, scale, block):
            G[mine].addmm_(H, rows[theirs] / denominators[theirs], alpha=scale)
    return through_length(G, W, inverse)


def _tiles(
    E: Tensor, owner: Tensor, rows: Tensor, of: Tensor, scale: float, block: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Kernels exp(s (e_i·e_j - 1)) of my rows with visiting ones, 0 within a client, in one buffer."""
    if not len(E) or not len(rows):
        return
    buffer = E.new_empty(min(block, len(E)) * min(block, len(rows)))
    apart = bool(owner.max() < of.min()) or bool(
        of.max() < owner.min()
    )  # rows in order of clients, as they are in a run
    for a in range(0, len(E), block):
        mine = slice(a, min(a + block, len(E)))
        for b in range(0, len(rows), block):
            theirs = slice(b, min(b + block, len(rows)))
            H = buffer[: (mine.stop - a) * (theirs.stop - b)].view(mine.stop - a, theirs.stop - b).fill_(-scale)
            H.addmm_(E[mine], rows[theirs].T, alpha=scale).exp_()
            if not apart:
                H.masked_fill_(owner[mine, None] == of[None, theirs], 0)
            yield mine, theirs, H


def _ring(
    E: Tensor, owner: Tensor, Z: Tensor | None, sizes: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows, owners and denominators of every process, mine first; the next ones travel while a visit is made use of."""
    rank, world = dist.get_rank(), len(sizes)
    width = E.shape[1]
    visiting = E if Z is None else torch.cat([E, Z], dim=1)
    of = owner
    for step in range(world):
        coming = None
        if step + 1 < world:
            n = sizes[(rank - step - 1) % world]
            next_visiting, next_of = visiting.new_empty(n, visiting.shape[1]), of.new_empty(n)
            to, source = (rank + 1) % world, (rank - 1) % world
            coming = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, visiting.contiguous(), to), dist.P2POp(dist.irecv, next_visiting, source),
                    dist.P2POp(dist.isend, of, to), dist.P2POp(dist.irecv, next_of, source),
                ]
            )  # fmt: skip
        yield visiting[:, :width], of, None if Z is None else visiting[:, width:]
        if coming is not None:
            for request in coming:
                request.wait()
            visiting, of = next_visiting, next_of


def _sizes(n: int, device: torch.device) -> list[int]:
    """Rows of every process."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = n
    dist.all_reduce(counts)
    return [int(c) for c in counts]
