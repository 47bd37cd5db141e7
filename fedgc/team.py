"""Several processes that share every batch of one client: gradients are summed over them before each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team:
    """This process among those of the default group, one a device. All hold the same parameters and draw the same batches."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def part(self, count: int) -> slice:
        """Which photos of a batch are this process's; of a small batch perhaps none."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def add_up(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum gradients in place, and the loss, each weighted before by this process's share of the batch. Returns the loss."""
        for p in parameters:
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in grads), loss.detach().reshape(1)])
        dist.all_reduce(flat)
        torch._foreach_copy_(
            grads, [x.view_as(g) for x, g in zip(flat[:-1].split([g.numel() for g in grads]), grads, strict=True)]
        )
        return flat[-1]
