"""FedGC's regulariser on stacked class embeddings (Niu & Deng, AAAI 2022), and its gradient.

Local softmax never lets other clients' people push a class embedding away. With unit rows e_i and the scale s,

    Reg = sum_i -log( e^s / (e^s + sum_{j on other clients} e^{s e_j·e_i}) ),   anchors i and positives stopped, negatives j live

whose gradient on row j is the missing push: (1/|w_j|) (I - e_j e_j^T) s sum_i q_ij e_i. On raw rows (``normalised=False``)
the logits are w_j·w_i and it is sum_i q_ij w_i, unprojected. The published text was not available in full: this is a
reconstruction, pinned by tests against autograd and against the term that centralised softmax has.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc.errors import UsageError

Precision = Literal["float32", "bfloat16"]


def regulariser(
    W: Tensor,
    owner: Tensor,
    scale: float,
    *,
    normalised: bool = True,
    own_in_denominator: bool = False,
    drawn: Tensor | None = None,
) -> Tensor:
    """The reference: O(C²) memory, differentiable. W: (C, d), owner: (C,) client of each row. ``own_in_denominator``:
    a client's other classes, stopped, are in the denominator too. ``drawn``: (C,) bool, the only negatives, each
    counted C / drawn.sum() times."""
    live = F.normalize(W, dim=1) if normalised else W
    anchor = live.detach()
    same = owner[:, None] == owner[None, :]
    positive = scale * (anchor * anchor).sum(dim=1, keepdim=True)
    logits = (scale * anchor @ live.T).masked_fill(same, -torch.inf)  # row: anchor i, column: live negative j
    if own_in_denominator:
        itself = torch.eye(len(W), dtype=torch.bool, device=W.device)
        logits = torch.where(same & ~itself, scale * anchor @ anchor.T, logits)
    if drawn is not None:
        logits = logits.masked_fill(~drawn, -torch.inf) + math.log(len(drawn) / int(drawn.sum()))
    return (torch.logsumexp(torch.cat([positive, logits], dim=1), dim=1) - positive.squeeze(1)).sum()


def gradient(
    W: Tensor,
    owner: Tensor,
    scale: float,
    *,
    normalised: bool = True,
    own_in_denominator: bool = False,
    precision: Precision = "float32",
    keep: float = 1.0,
    generator: torch.Generator | None = None,
    block: int | None = None,
) -> Tensor:
    """The regulariser's gradient (C, d) with respect to W, exact at ``keep`` = 1, in O(block² + block·d) memory besides it.

    precision: of the factors of matrix products; sums and all else are in W's own precision (float32 or float64). With
    bfloat16 factors the gradient is off by less than 1 % at s = 8; on the CPU by up to 2, 4 and 11 % at s = 16, 30 and 64,
    as torch rounds products to bfloat16 there, and by 1 % on CUDA.
    keep: the share of classes drawn from ``generator`` as negatives; their logits gain log(1/keep), so that the
    denominator is unbiased (its logarithm is not). Raises UsageError if an option is out of range.
    """
    if precision not in ("float32", "bfloat16"):
        raise UsageError(f"correction: unknown precision {precision!r}; use float32 or bfloat16")
    if len(owner.unique()) < 2:
        return torch.zeros_like(W)
    drawn = draw_negatives(owner, keep, generator) if keep != 1 else None
    pairs = Pairs(W, owner, scale, normalised=normalised, drawn=drawn, precision=precision, block=block)
    if normalised and drawn is None:
        G = _symmetric_gradient(pairs, own_in_denominator)
    else:
        G = _one_sided_gradient(pairs, own_in_denominator)
    return pairs.in_callers_order(G)


def corrected(W: Tensor, owner: Tensor, scale: float, step: float, **options: Any) -> Tensor:
    """One server step, W - step · ∇Reg(W); ``step`` is the correction weight times the learning rate, ``options`` those of
    `gradient`."""
    if step == 0 or len(owner.unique()) < 2:
        return W
    return gradient(W, owner, scale, **options).mul_(-step).add_(W)


def draw_negatives(owner: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
    """(C,) bool: round(keep · C) classes, at least one, every class as likely as another."""
    if not 0 < keep <= 1:
        raise UsageError(f"correction: the share of negatives to keep is {keep}; it must be above 0 and at most 1")
    if generator is None:
        raise UsageError("correction: negatives are drawn at random; pass a generator, or keep all of them")
    chosen = torch.randperm(len(owner), generator=generator, device=generator.device)[
        : max(1, round(keep * len(owner)))
    ]
    drawn = torch.zeros(len(owner), dtype=torch.bool, device=owner.device)
    drawn[chosen.to(owner.device)] = True
    return drawn


def inverse_lengths(W: Tensor) -> Tensor:
    """(C, 1). Of a zero row 0: it has no direction, so that it neither pushes nor is pushed."""
    return W.norm(dim=1, keepdim=True).reciprocal_().nan_to_num_(posinf=0)


def through_length(G: Tensor, W: Tensor, inverse: Tensor) -> Tensor:
    """A gradient with respect to unit rows made one with respect to W, (I - e e^T) g / |w|, in place and in blocks."""
    for g, w, length in zip(G.split(1024), W.split(1024), inverse.split(1024), strict=True):
        e = w * length
        g.sub_((g * e).sum(dim=1, keepdim=True) * e).mul_(length)
    return G


class Pairs:
    """Anchors against negatives, tile by tile. Both are sorted by client, so that a client's own pairs are one rectangle of
    a tile. Rows are gathered as they are needed: a sorted or a normalised copy of W would double the memory."""

    def __init__(
        self,
        W: Tensor,
        owner: Tensor,
        scale: float,
        *,
        normalised: bool = True,
        drawn: Tensor | None = None,
        precision: Precision = "float32",
        block: int | None = None,
    ) -> None:
        self.W, self.scale = W, scale
        self.factor = torch.bfloat16 if precision == "bfloat16" else W.dtype
        self.inverse = inverse_lengths(W) if normalised else None
        self.anchors = owner.argsort(stable=True)
        ends = owner[self.anchors].unique_consecutive(return_counts=True)[1].cumsum(0)
        self.anchor_bounds = self.negative_bounds = [0, *ends.tolist()]  # of each client, in sorted order
        self.negatives, self.place = self.anchors, torch.arange(len(W), device=W.device)
        self.log_weight = 0.0
        if drawn is not None:
            chosen = drawn[self.anchors]
            self.place = chosen.nonzero().squeeze(1)  # which anchor a negative is
            self.negatives = self.anchors[self.place]
            self.negative_bounds = [0, *chosen.cumsum(0)[ends - 1].tolist()]
            self.log_weight = math.log(len(W) / len(self.negatives))
        block = min(len(W), block or (8192 if W.is_cuda else 1024))
        self.anchor_cuts, self.negative_cuts = (
            [slice(start, min(start + block, len(x))) for start in range(0, len(x), block)]
            for x in (self.anchors, self.negatives)
        )
        self.buffer = W.new_empty(block * block)

    def rows(self, index: Tensor) -> Tensor:
        """(len(index), d), of unit length if normalised."""
        rows = self.W[index]
        return rows if self.inverse is None else rows.mul_(self.inverse[index])

    def add_product(self, to: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
        """to += alpha · a b, of factors rounded to ``precision``."""
        if self.factor == to.dtype:
            to.addmm_(a, b, alpha=alpha)
            return
        a, b = a.to(self.factor), b.to(self.factor)
        # On the CPU torch has no bfloat16 product that returns its float32 sums: it rounds them once more.
        to.add_(torch.mm(a, b, out_dtype=torch.float32) if to.is_cuda else torch.mm(a, b), alpha=alpha)

    def halves(self, offset: float, with_own: bool = False) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """Each unordered pair of blocks once: its two slices, their rows and their logits, without the tiles that are one
        client's alone."""
        for n, r in enumerate(self.anchor_cuts):
            A = self.rows(self.anchors[r])
            for c in self.anchor_cuts[n:]:
                if with_own or not self.all_own(r, c):
                    B = self.rows(self.anchors[c])
                    yield r, c, A, B, self.logits(A, B, offset)

    def logits(self, A: Tensor, B: Tensor, offset: float) -> Tensor:
        """s A B^T + offset in the one buffer: (len(A), len(B)), overwritten by the next call."""
        tile = self.buffer[: len(A) * len(B)].view(len(A), len(B)).fill_(offset)
        self.add_product(tile, A, B.T, alpha=self.scale)
        return tile

    def own(self, r: slice, c: slice) -> Iterator[tuple[slice, slice]]:
        """The rectangles within the tile of anchors r and negatives c whose pairs are of one client."""
        rows, columns = self.anchor_bounds, self.negative_bounds
        client = max(bisect_right(rows, r.start), bisect_right(columns, c.start)) - 1
        while rows[client] < r.stop and columns[client] < c.stop:
            yield (
                slice(max(rows[client] - r.start, 0), min(rows[client + 1], r.stop) - r.start),
                slice(max(columns[client] - c.start, 0), min(columns[client + 1], c.stop) - c.start),
            )
            client += 1

    def all_own(self, r: slice, c: slice) -> bool:
        whole = (slice(0, r.stop - r.start), slice(0, c.stop - c.start))
        return next(self.own(r, c), None) == whole

    def exclude(self, tile: Tensor, r: slice, c: slice, value: float, own: bool) -> Tensor:
        """``value`` where a pair is of one client (``own``), or else of an anchor with itself."""
        if own:
            for rows, columns in self.own(r, c):
                tile[rows, columns] = value
        else:
            row = self.place[c] - r.start
            column = ((row >= 0) & (row < len(tile))).nonzero().squeeze(1)
            tile[row[column], column] = value
        return tile

    def in_callers_order(self, G: Tensor) -> Tensor:
        """G, from sorted order into the caller's, and from unit rows on to W if normalised. In place, a few columns at a time."""
        rank = self.anchors.argsort()
        for columns in G.split(64, dim=1):
            columns.copy_(columns[rank])
        return G if self.inverse is None else through_length(G, self.W, self.inverse)


def _symmetric_gradient(pairs: Pairs, own_in_denominator: bool) -> Tensor:
    """Of unit rows the kernel H_ij = exp(s (e_i·e_j - 1)) is symmetric and at most 1: no running maximum is needed, and every
    unordered pair of blocks is visited once: Z = 1 + H 1, then G = s H (E / Z), 4C²d operations."""
    Z = pairs.W.new_ones(len(pairs.W), 1)
    for r, c, _, _, S in pairs.halves(-pairs.scale, with_own=own_in_denominator):
        H = pairs.exclude(S.exp_(), r, c, 0.0, own=not own_in_denominator)
        Z[r] += H.sum(dim=1, keepdim=True)
        if c != r:
            Z[c] += H.sum(dim=0)[:, None]
    G = torch.zeros_like(pairs.W)
    for r, c, A, B, S in pairs.halves(-pairs.scale):
        H = pairs.exclude(S.exp_(), r, c, 0.0, own=True)
        pairs.add_product(G[r], H, B.div_(Z[c]), alpha=pairs.scale)
        if c != r:
            pairs.add_product(G[c], H.T, A / Z[r], alpha=pairs.scale)
    return G


def _one_sided_gradient(pairs: Pairs, own_in_denominator: bool) -> Tensor:
    """Of any rows and negatives, 6C²d operations at most: P = exp(S - log Z), then G = s P^T A."""
    log_Z = log_denominators(pairs, own_in_denominator)
    G = torch.zeros_like(pairs.W)
    for c in pairs.negative_cuts:
        B = pairs.rows(pairs.negatives[c])
        pushes = torch.zeros_like(B)
        for r in pairs.anchor_cuts:
            if not pairs.all_own(r, c):
                A = pairs.rows(pairs.anchors[r])
                P = pairs.logits(A, B, pairs.log_weight).sub_(log_Z[r, None]).exp_()
                pairs.add_product(pushes, pairs.exclude(P, r, c, 0.0, own=True).T, A, alpha=pairs.scale)
        G[pairs.place[c]] = pushes
    return G


def log_denominators(pairs: Pairs, own_in_denominator: bool = False) -> Tensor:
    """(C,) in sorted order: log( e^{s a_i·a_i} + the sum over anchor i's negatives ), safe for rows of any length."""
    log_Z = pairs.W.new_empty(len(pairs.W))
    for r in pairs.anchor_cuts:
        A = pairs.rows(pairs.anchors[r])
        log_Z[r] = pairs.scale * (A * A).sum(dim=1)
        for c in pairs.negative_cuts:
            if own_in_denominator or not pairs.all_own(r, c):
                S = pairs.logits(A, pairs.rows(pairs.negatives[c]), pairs.log_weight)
                S = pairs.exclude(S, r, c, -torch.inf, own=not own_in_denominator)
                log_Z[r] = torch.logaddexp(log_Z[r], S.logsumexp(dim=1))
    return log_Z
