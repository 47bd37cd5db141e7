"""Two plainer ways to spread class embeddings across clients, to compare FedGC's correction with. e_i are unit rows.

    fedcos: sum over ordered pairs on different clients of e_i·e_j, or of its square
    fedaws: sum over ordered pairs on different clients of max(0, margin - |e_i - e_j|)²   (FedAwS, Yu et al., ICML 2020)

Both gradients are with respect to W, (C, d), so that of unit rows is projected on their tangent spaces and over |w|. FedAwS
has one class a client; pairs of one client are left out here, as in FedGC, so that the three differ in their weights alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc.correction import Pairs, inverse_lengths, through_length


def fedcos(W: Tensor, owner: Tensor, squared: bool = False) -> Tensor:
    """The reference: O(C²) memory, differentiable. W: (C, d), owner: (C,) client of each row."""
    E = F.normalize(W, dim=1)
    cosines = (E @ E.T).masked_fill(owner[:, None] == owner[None, :], 0)
    return (cosines.square() if squared else cosines).sum()


def fedcos_gradient(W: Tensor, owner: Tensor, squared: bool = False) -> Tensor:
    """Its gradient (C, d): 2 (sum of all e - sum of the client's own), O(Cd), or squared 4 (E^T E - E_k^T E_k) e_i, O(Cd²)."""
    clients, client = owner.unique(return_inverse=True)
    if len(clients) < 2:
        return torch.zeros_like(W)
    inverse = inverse_lengths(W)
    E = W * inverse
    if not squared:
        own = E.new_zeros(len(clients), E.shape[1]).index_add_(0, client, E)
        return through_length(2 * (E.sum(dim=0) - own)[client], W, inverse)
    G = 4 * E @ (E.T @ E)
    for index in client.argsort().split(client.bincount().tolist()):
        own = E[index]
        G[index] -= 4 * torch.linalg.multi_dot([own, own.T, own])
    return through_length(G, W, inverse)


def fedaws(W: Tensor, owner: Tensor, margin: float) -> Tensor:
    """The reference: O(C²) memory, differentiable. ``margin``: a distance, at most 2 between unit rows."""
    E = F.normalize(W, dim=1)
    distance = torch.cdist(E, E, compute_mode="donot_use_mm_for_euclid_dist")
    return (margin - distance).clamp_min(0).square().masked_fill(owner[:, None] == owner[None, :], 0).sum()


def fedaws_gradient(W: Tensor, owner: Tensor, margin: float, block: int | None = None) -> Tensor:
    """Its gradient (C, d), -4 sum_j max(0, margin/D_ij - 1) (e_i - e_j), in O(block²) memory besides it. Rows nearer than the
    square root of the precision count as that far apart: coinciding rows have no direction in which to part."""
    if len(owner.unique()) < 2:
        return torch.zeros_like(W)
    pairs = Pairs(W, owner, 1.0, block=block)
    nearest = torch.finfo(W.dtype).eps
    G = torch.zeros_like(W)
    for r, c, A, B, cosine in pairs.halves(0.0):
        weight = cosine.mul_(-2).add_(2).clamp_min_(nearest).rsqrt_().mul_(margin).sub_(1).clamp_min_(0)
        weight = pairs.exclude(weight, r, c, 0.0, own=True)
        pairs.add_product(G[r], weight, B, alpha=4)  # what e_i itself adds is radial
        if c != r:
            pairs.add_product(G[c], weight.T, A, alpha=4)
    return pairs.in_callers_order(G)
