"""Aggregation that a few lying clients cannot steer: rules in place of the weighted mean.

None of them is a promise. They assume that most clients are honest and alike, which clients with different people are not; each
rule says below what it assumes. What a client uploads of its own class embeddings under fedgc is stacked, not averaged, and no
rule covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fedgc.errors import UsageError
from fedgc.types import Tensors


@dataclass(frozen=True)
class Robust:
    """rule: one of `RULES`; liars: how many clients a rule is to withstand (trimmed-mean, multi-krum). similar: the cosine from
    which two updates are held to be one sender's, at first (safl); it falls by ``decay`` every round."""

    rule: str = "mean"
    liars: int = 1
    similar: float = 0.95
    decay: float = 0.99

    def aggregate(self, updates: Sequence[Tensors], weights: Sequence[float], round: int) -> dict[str, Tensor]:
        """One update out of those of the clients of a round, each of the same names and shapes. weights: shares, which add up
        to 1; only norm-clipping minds them, since a client's photo count is its own word."""
        names = list(updates[0])
        rows = torch.stack([torch.cat([u[name].flatten().float() for name in names]) for u in updates])
        out = RULES[self.rule](rows, torch.tensor(weights, dtype=rows.dtype, device=rows.device), self, round)
        parts = out.split([updates[0][name].numel() for name in names])
        return {
            name: p.view_as(updates[0][name]).to(updates[0][name].dtype) for name, p in zip(names, parts, strict=True)
        }

    def require(self, clients: int) -> None:
        """Raises UsageError where so few clients cannot outvote the liars."""
        least = {
            "trimmed-mean": 2 * self.liars + 1,
            "multi-krum": 2 * self.liars + 3,
            "median": 3,
            "safl": 3,
            "norm-clipping": 3,
        }
        if clients < least.get(self.rule, 1):
            raise UsageError(
                f"federation.aggregation = {self.rule} needs {least[self.rule]} clients in a round"
                + (
                    f" to withstand {self.liars} (federation.liars)"
                    if self.rule in ("trimmed-mean", "multi-krum")
                    else ""
                )
                + f", and there are {clients}"
            )


def norm_clipping(rows: Tensor, weights: Tensor, how: Robust, round: int) -> Tensor:
    """Updates shortened to the median length of the round, then the weighted mean: a liar cannot shout (Sun et al. 2019).
    Assumes that fewer than half lie."""
    lengths = rows.norm(dim=1)
    factor = (lengths.median() / lengths.clamp_min(1e-30)).clamp_max(1.0)
    return (weights * factor) @ rows


def median(rows: Tensor, weights: Tensor, how: Robust, round: int) -> Tensor:
    """The median of every coordinate (Yin et al. 2018), the middle of the two middle ones where they are even in number."""
    ordered, n = rows.sort(dim=0).values, len(rows)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(rows: Tensor, weights: Tensor, how: Robust, round: int) -> Tensor:
    """Of every coordinate the mean without the ``liars`` largest and smallest (Yin et al. 2018)."""
    return rows.sort(dim=0).values[how.liars : len(rows) - how.liars].mean(dim=0)


def multi_krum(rows: Tensor, weights: Tensor, how: Robust, round: int) -> Tensor:
    """The mean of the n - f updates whose n - f - 2 nearest neighbours are nearest (Blanchard et al. 2017), f = ``liars``."""
    n, f = len(rows), how.liars
    squared = torch.cdist(rows.double(), rows.double()).square()
    nearest = squared.sort(dim=1).values[:, 1 : n - f - 1]
    chosen = nearest.sum(dim=1).argsort()[: n - f]
    return rows[chosen.sort().values].mean(dim=0)


def safl(rows: Tensor, weights: Tensor, how: Robust, round: int) -> Tensor:
    """Updates that point the same way count as one sender's: the median of each such group, then of the groups (after Sybil-aware
    aggregation for face recognition, arXiv 2311.04346; a reconstruction: thresholds and linkage are ours). Assumes that Sybils
    send nearly the same, and that honest clients, who hold different people, do not."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    alike = unit @ unit.T >= how.similar * how.decay ** (round - 1)
    count, group = connected_components(alike.cpu().numpy(), directed=False)
    of = torch.from_numpy(group).to(rows.device)
    medians = torch.stack([median(rows[of == g], weights, how, round) for g in range(count)])
    return median(medians, weights, how, round)


Rule = Callable[[Tensor, Tensor, Robust, int], Tensor]
RULES: dict[str, Rule] = {
    "mean": lambda rows, weights, how, round: weights @ rows,
    "norm-clipping": norm_clipping,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "multi-krum": multi_krum,
    "safl": safl,
}
MEAN = Robust()
