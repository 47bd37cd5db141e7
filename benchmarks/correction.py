"""The correction's gradient: blockwise closed form against autograd through the dense regulariser."""

from __future__ import annotations

import torch

from benchmarks.timing import seconds
from fedgc.correction import gradient, regulariser


def dense(W: torch.Tensor, owner: torch.Tensor, scale: float) -> torch.Tensor:
    live = W.clone().requires_grad_()
    return torch.autograd.grad(regulariser(live, owner, scale), live)[0]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; d = 512, 36 clients, s = 8, median of 3")
    print(f"{'classes':>8} {'dense s':>9} {'block s':>9} {'ratio':>6} {'relative difference':>20}")
    for classes in (1_000, 4_000, 10_575):
        W = torch.randn(classes, 512, generator=torch.Generator().manual_seed(0))
        owner = torch.arange(classes) * 36 // classes
        slow, fast = seconds(lambda: dense(W, owner, 8.0)), seconds(lambda: gradient(W, owner, 8.0))  # noqa: B023
        error = float((dense(W, owner, 8.0) - gradient(W, owner, 8.0)).norm() / dense(W, owner, 8.0).norm())
        print(f"{classes:>8} {slow:>9.3f} {fast:>9.3f} {slow / fast:>6.2f} {error:>20.1e}")


if __name__ == "__main__":
    main()
