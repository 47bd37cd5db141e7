"""FedGC's regulariser on stacked class embeddings (Niu & Deng, AAAI 2022), and its gradient.

Local softmax never lets other clients' people push a class embedding away. With unit rows e_i and the scale s,

    Reg = sum_i -log( e^s / (e^s + sum_{j on other clients} e^{s e_j·e_i}) ),   anchors i and positives stopped, negatives j live

whose gradient on row j is the missing push: (1/|w_j|) (I - e_j e_j^T) s sum_i q_ij e_i. The published text was not available
in full: this is a reconstruction, pinned by tests against autograd and against the term that centralised softmax has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def regulariser(W: Tensor, owner: Tensor, scale: float) -> Tensor:
    """The reference: O(C²) memory, differentiable. W: (C, d), owner: (C,) client of each row."""
    live = F.normalize(W, dim=1)
    anchor = live.detach()
    same = owner[:, None] == owner[None, :]
    negatives = (scale * anchor @ live.T).masked_fill(same, -torch.inf)  # row: anchor i, column: live negative j
    positive = W.new_full((len(W), 1), scale)
    return (torch.logsumexp(torch.cat([positive, negatives], dim=1), dim=1) - scale).sum()


def gradient(W: Tensor, owner: Tensor, scale: float, block: int = 2048) -> Tensor:
    """Its gradient (C, d) with respect to W, exact, in O(C·block) memory.

    On unit rows the kernel H_ij = exp(s (e_i·e_j - 1)), zero within a client, is symmetric and at most 1, so that no running
    maximum is needed: Z = 1 + H 1, then G = s H (E / Z), then the projection on the tangent space of each row.
    """
    norm = W.norm(dim=1, keepdim=True)
    E = W / norm
    cuts = [slice(start, start + block) for start in range(0, len(E), block)]

    def apply_kernel(values: Tensor) -> Tensor:
        out = torch.zeros_like(values)
        for rows in cuts:
            for columns in cuts:
                H = (E[rows] @ E[columns].T).sub_(1).mul_(scale).exp_()
                H.masked_fill_(owner[rows, None] == owner[None, columns], 0)
                out[rows] += H @ values[columns]
        return out

    Z = 1 + apply_kernel(torch.ones_like(norm))
    G = scale * apply_kernel(E / Z)
    return (G - (G * E).sum(dim=1, keepdim=True) * E) / norm


def corrected(W: Tensor, owner: Tensor, scale: float, step: float) -> Tensor:
    """One server step, W - step · ∇Reg(W); ``step`` is the correction weight times the learning rate."""
    if step == 0 or len(owner.unique()) < 2:
        return W
    return W - step * gradient(W, owner, scale)
