"""What the rows of a face head say of the photos of one step, in closed form or nearly so.

Notation of `fedgc.heads`: ŵ_j unit class embeddings, ẑ_i unit features, c_ij their cosines, g_ij the derivative of the
loss by c_ij (negative where j is the class of photo i, positive elsewhere). A row's gradient G_j, times its length, is

    u_j = |w_j| G_j = Σ_i g_ij P_j ẑ_i = Σ_i g_ij ẑ_i - (Σ_i g_ij c_ij) ŵ_j,   P_j = I - ŵ_j ŵ_jᵀ,

so that u_j ⊥ ŵ_j: the mark of a normalised head. Everything is computed in float64 on the device of the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.updates import gradient
from fedgc import heads
from fedgc.rng import generator, on_device
from fedgc.types import HEAD, LocalConstants, ModelSpec, ObservedUpdate

NEW_CLASS = 0.2  # photos that a class not yet named counts as having, against the next photo of one that is
MARK = 1e-2  # how near to zero, relative to the gradient, counts as zero
STARTS = (0.0, 0.2, 0.4, 0.6, 0.8)  # cosine to the own class embedding from which row matching starts
EXCHANGES = 3  # labels of a batch that a second opinion may change
SHORT = 40  # iterations of a try
WANTED = 3  # rows that an exchange may bring in
EXACT = 1e-4  # share of the rows' squared length left unexplained from which labels are not doubted


@dataclass(frozen=True)
class HeadRows:
    """pull: (C, d) u_j as observed, up to one factor where the client shortened its gradient; directions: (C, d) ŵ_j;
    noise: (C,) length that rounding alone gives a row of ``pull``; lengths: (C,) |w_j|."""

    pull: Tensor
    directions: Tensor
    noise: Tensor
    lengths: Tensor

    @property
    def weights(self) -> Tensor:
        """(C,) weight of each row's squared error: one over its length, rows of mere rounding left out of the race; scaled
        so that predicting zero costs 1."""
        lengths = self.pull.norm(dim=1)
        per_row = 1 / (lengths + 3 * self.noise + 1e-30)
        return per_row / (per_row * lengths.square()).sum().clamp_min(1e-300)


def head_rows(update: ObservedUpdate, constants: LocalConstants) -> HeadRows | None:
    """The rows behind one step, or None where the head's rows do not reach the observer."""
    if HEAD not in update.delta or HEAD not in update.before:
        return None
    rounding = torch.finfo(update.delta[HEAD].dtype).eps / 4 / abs(constants.lr_of(HEAD))  # of w + step, both stored
    rows, weight = gradient(update, constants)[HEAD].double(), update.before[HEAD].double()
    lengths = weight.norm(dim=1, keepdim=True)
    return HeadRows(rows * lengths, weight / lengths, rounding * lengths[:, 0].square(), lengths[:, 0])


def kind_of_head(rows: HeadRows) -> Literal["cosine", "linear", "unclear"]:
    """ "cosine": no row moves along itself. "linear" (no bias): rows add up to zero, since each photo's residuals do.
    "unclear": neither, as under noise."""
    size = rows.pull.norm() + 1e-300
    slack = MARK + float(rows.noise.norm() / size)
    if (rows.pull * rows.directions).sum(dim=1).norm() <= slack * size:
        return "cosine"
    gradients = rows.pull / rows.lengths[:, None]
    return "linear" if gradients.sum(0).norm() <= slack * gradients.norm() else "unclear"


def guess_labels(rows: HeadRows, count: int) -> Tensor:
    """Rows behind the photos of one step at a glance: int64 (B,), ascending.

    One photo of a linear head: the longest row, |G_y| = Σ_{j≠y} |G_j|. Of a cosine head: the row against the others,
    argmin_j <U_j, Σ_k U_k> with U_j = u_j/|u_j|, needs three classes. In a batch a row's pull is -<u_j, m>, with m the
    mean U_j of the half of the rows with the least norm, mostly absent classes; places go to the greatest pulls, and a class
    may take several (see `_seats`).
    """
    if count == 1 and kind_of_head(rows) == "linear":
        return (rows.pull.norm(dim=1) / rows.lengths).argmax()[None]
    units = rows.pull / (rows.pull.norm(dim=1, keepdim=True) + 3 * rows.noise[:, None] + 1e-300)
    if count == 1:
        return (units @ units.sum(0)).argmin()[None]
    absent = rows.pull.norm(dim=1).argsort()[: max(1, len(units) // 2)]
    return _seats(-rows.pull @ F.normalize(units[absent].mean(0), dim=0), count)


def _seats(pull: Tensor, count: int) -> Tensor:
    """Deal ``count`` places among rows by their pull, as seats to parties by votes: the gradients of photos
    of one class add up in its row, so the n-th place of a class costs pull / n. The first is nearly free,
    since photos differ in the length of their gradients more than batches repeat people."""
    photos = torch.zeros(len(pull), dtype=torch.long, device=pull.device)
    for _ in range(count):
        price = torch.where(photos == 0, NEW_CLASS, photos + 1.0)
        photos[(pull / price).argmax()] += 1
    return torch.arange(len(pull), device=pull.device).repeat_interleave(photos)


def embedding_of_one(rows: HeadRows, label: int) -> Tensor:
    """(d,) unit feature of the only photo: it lies in the span of u_j and ŵ_j for every row j, and u_y points away.

    The smallest eigenvector of Σ_j |u_j|² (I - projection on span(u_j, ŵ_j)), so that rows count as far as rounding leaves
    them. Raises ValueError with fewer than two rows, which leave a plane.
    """
    if len(rows.pull) < 2:
        raise ValueError("one head row leaves the embedding free in a plane: two rows or more are needed")
    weight = rows.pull.norm(dim=1).square()
    along = F.normalize(rows.pull - (rows.pull * rows.directions).sum(1, keepdim=True) * rows.directions, dim=1)
    weight = weight / weight.sum()
    spans = (along.T * weight) @ along + (rows.directions.T * weight) @ rows.directions
    unit = torch.linalg.eigh(spans).eigenvectors[:, -1]
    return -unit if rows.pull[label] @ unit > 0 else unit


def shares(rows: HeadRows, units: Tensor) -> Tensor:
    """(B, C) g_ij as observed, by least squares on u_j = Σ_i g_ij P_j ẑ_i, given the unit features (B, d)."""
    cosines = units @ rows.directions.T
    gram = (units @ units.T)[None] - cosines.T[:, :, None] * cosines.T[:, None, :]  # <P_j ẑ_i, P_j ẑ_k>
    right = (rows.pull @ units.T) - (rows.pull * rows.directions).sum(1, keepdim=True) * cosines.T
    ridge = 1e-12 * torch.eye(len(units), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, right).T


def labels_of(rows: HeadRows, units: Tensor) -> Tensor:
    """(B,) the row of each photo whose unit feature is known: the one that it pulls the hardest."""
    return shares(rows, units).argmin(dim=1)


def feature_gradients(rows: HeadRows, units: Tensor) -> Tensor:
    """(B, d) dL/dz_i times |z_i|, as observed: Σ_j g_ij (ŵ_j - c_ij ẑ_i)."""
    along = shares(rows, units) @ rows.directions
    return along - (along * units).sum(1, keepdim=True) * units


@dataclass(frozen=True)
class RowMatching:
    """Unexplained share of the head's rows as a function of unit features, for given labels: in [0, 1].

    The loss goes through `fedgc.heads.loss`, so that margins and strangers are those of training. The common factor of an
    update (batch mean and clipping) is solved in closed form; with ``own`` each photo has a factor of its own, as in a mean of
    several clients' clipped steps.
    """

    rows: HeadRows
    labels: Tensor
    spec: ModelSpec
    own: bool = False

    def __call__(self, features: Tensor) -> Tensor:
        """(B, d) features of any length -> a number, twice differentiable."""
        units = F.normalize(features, dim=1)
        cosines = units @ self.rows.directions.T
        held = cosines if cosines.requires_grad else cosines.requires_grad_()
        with torch.enable_grad():
            total = heads.loss(held, self.labels, self.spec) * len(self.labels)
            (g,) = torch.autograd.grad(total, held, create_graph=True)
        w, u = self.rows.weights, self.rows.pull
        along = (g * held * w) @ (g * held).T
        gram = ((g * w) @ g.T) * (units @ units.T) - along
        tied = (g * w * (units @ u.T)).sum(1) - (g * held * w * (u * self.rows.directions).sum(1)).sum(1)
        if not self.own:
            return 1 - tied.sum().clamp_min(0).square() / gram.sum().clamp_min(1e-300)
        ridge = 1e-10 * gram.diagonal().mean().detach() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return 1 - tied @ torch.linalg.solve(gram + ridge, tied)

    def remainder(self, units: Tensor) -> Tensor:
        """(C, d) the rows less what photos with these features and labels make of them, at the best common factor."""
        held = (units @ self.rows.directions.T).requires_grad_()
        (g,) = torch.autograd.grad(heads.loss(held, self.labels, self.spec), held)
        made = g.T @ units - (g * held.detach()).sum(0)[:, None] * self.rows.directions
        w = self.rows.weights[:, None]
        return self.rows.pull - made * (w * made * self.rows.pull).sum() / (w * made.square()).sum().clamp_min(1e-300)

    def starts(self) -> Iterator[Tensor]:
        """c ŵ_y + √(1 - c²) e for a grid of c, e the way the label's row was pulled; photos of one class a little apart."""
        towards = self.rows.directions[self.labels]
        away = -F.normalize(self.rows.pull[self.labels], dim=1)
        draw = on_device(generator("row-matching"), towards.device)
        apart = torch.randn(towards.shape, generator=draw, dtype=towards.dtype, device=towards.device)
        apart = 0.3 * apart / towards.shape[1] ** 0.5
        for c in STARTS:
            yield c * towards + (1 - c * c) ** 0.5 * away + apart

    def solve(self, start: Tensor | None = None, iterations: int = 400) -> tuple[Tensor, float]:
        """(B, d) unit features and the unexplained share, by L-BFGS from ``start`` or the best of the grid."""
        if start is None:
            start = min(self.starts(), key=lambda s: float(self(s).detach()))
        z = F.normalize(start, dim=1).detach().clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [z], max_iter=iterations, history_size=30, tolerance_grad=1e-12, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            objective = self(z)
            (z.grad,) = torch.autograd.grad(objective, z)
            return objective

        optimizer.step(cast(Any, closure))
        return F.normalize(z.detach(), dim=1), float(self(z).detach())


def explained(rows: HeadRows, units: Tensor) -> Tensor:
    """(C, d) the part of the rows that photos with these unit features can have made."""
    g = shares(rows, units)
    return g.T @ units - (g * (units @ rows.directions.T)).sum(0)[:, None] * rows.directions


def match_rest(
    rows: HeadRows, labels: Tensor, units: Tensor, count: int, spec: ModelSpec, own: bool
) -> tuple[Tensor, Tensor]:
    """Labels (B,) and unit features (B, d) of all photos, those (n,), (n, d) known beforehand first and unchanged.

    What the known ones leave of the rows shows the labels of the others, whose features start from there in row matching.
    """
    rest = replace(rows, pull=rows.pull - explained(rows, units))
    more = guess_labels(rest, count - len(units)) if count - len(units) > 1 else rest.pull.norm(dim=1).argmax()[None]
    labels = torch.cat([labels, more])
    matching = RowMatching(rows, labels, spec, own)
    starts = (torch.cat([units, s]) for s in replace(matching, rows=rest, labels=more).starts())
    solved, _ = matching.solve(min(starts, key=lambda s: float(matching(s).detach())))
    return labels, torch.cat([units, solved[len(units) :]])


def match_batch(rows: HeadRows, count: int, spec: ModelSpec, own: bool = False) -> tuple[Tensor, Tensor]:
    """Labels (B,) and unit features (B, d) of a batch from the head's rows alone.

    A second opinion on the labels: while they leave a part of the rows unexplained, row matching tries what the features
    found so far pull, and every exchange of one label for another that is pulled hard; the best of short tries is kept if it
    explains more.
    """
    matching = RowMatching(rows, guess_labels(rows, count), spec, own)
    units, left = matching.solve()
    for _ in range(EXCHANGES):
        if left < EXACT:
            break
        trials = [replace(matching, labels=labels) for labels in _alternatives(matching, units)]
        tried = [(trial, *trial.solve(iterations=SHORT)) for trial in trials]
        trial, start, _ = min(tried, key=lambda t: t[2])
        better, less = trial.solve(start)
        if less > 0.9 * left:
            break
        matching, units, left = trial, better, less
    return matching.labels, units


def _alternatives(matching: RowMatching, units: Tensor) -> list[Tensor]:
    """Other label multisets: what each feature pulls, and each label exchanged for each of the rows that are pulled away from
    the features harder than these labels explain."""
    rest = -(matching.remainder(units) @ F.normalize(units.mean(0), dim=0))
    wanted = rest.argsort(descending=True)[:WANTED].tolist()
    held = matching.labels.tolist()
    trials = {tuple(sorted(labels_of(matching.rows, units).tolist()))}
    trials |= {tuple(sorted([*held[:i], new, *held[i + 1 :]])) for i in range(len(held)) for new in wanted}
    return [torch.tensor(t, device=units.device) for t in sorted(trials - {tuple(sorted(held))})]


def row_drift(update: ObservedUpdate) -> Tensor:
    """(C, d) unit direction in which each class embedding moved over any number of steps.

    ΔW_y ≈ -lr Σ_k G_y, which for a class whose photos were trained on is near its mean feature, its part along w_y apart; for
    one that was not, near the opposite of all others'.
    """
    return F.normalize(update.delta[HEAD].double(), dim=1)
