"""The photos of a batch told apart by what is zero: each input of a linear layer behind a ReLU is zero in many places.

The gradient of the layer's weight is D = Σ_i δ_i h_iᵀ, that of its bias Σ_i δ_i. A column of D in which photo i is inactive
lies in the hyperplane that the other δ span, and h_i >= 0 puts all columns on one side of it. The normals q of those
hyperplanes, scaled to q·Σδ = 1, are therefore vertices of {q : q·D >= 0, q·Σδ = 1}, and qᵀD is h_i itself, in its true
scale and whatever factor each photo's gradient has. Linear programmes find the vertices, and how many columns lie in a vertex's
hyperplane tells which of them are photos. Low rank and zeros are those of SPEAR (Dimitrov et al. 2024), which samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

LOUD = 10.0  # times the rounding of a column: below, it says nothing
NEAR = 5.0  # times the rounding: distance from a hyperplane that counts as in it
ALIKE = 0.999  # cosine of two inputs that are one
EXACT = 1e-8  # rounding that is assumed at least, in mean numbers of the gradient: what linear programmes leave
FEWEST = 8  # columns in a hyperplane beyond those that any hyperplane could hold
WRONG = 0.01  # share of columns on the wrong side that rounding may excuse
START = 0.01  # reach of the first fit, in mean inputs


@dataclass(frozen=True)
class Unmixed:
    """inputs: (r, f) nonnegative h_i in their true scale, of the photos that could be told apart; rank: photos whose gradient
    stands out from rounding."""

    inputs: Tensor
    rank: int


def singular(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The part of a (d, f) gradient that at most ``count`` photos make: U (d, r), S (r,), V (f, r), and the rounding of one
    number, measured in the directions that no photo explains; r counts singular values beyond it."""
    d, f = weight.shape
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rest = values[count:]
    noise = float(rest.square().sum().sqrt()) / max(1, (d - count) * (f - count)) ** 0.5 if len(rest) else 0.0
    noise = max(noise, EXACT * float(values[0]) / (d * f) ** 0.5)
    r = int((values[:count] > 1.5 * noise * (d**0.5 + f**0.5)).sum())  # the largest of a random matrix is near that sum
    return left[:, :r], values[:r], right[:r].T, noise


def unmix(weight: Tensor, bias: Tensor, count: int) -> Unmixed:
    """weight: (d, f) gradient of a layer on nonnegative inputs with zeros; bias: (d,) that of its bias; count: photos.
    Answers with the photos that stand the test, in no order that means anything."""
    U, S, V, noise = singular(weight, count)
    r = len(S)
    if r == 0:
        return Unmixed(torch.zeros((0, weight.shape[1]), dtype=torch.float64, device=weight.device), 0)
    scale, total = S.cpu().numpy(), (U.T @ bias.double()).cpu().numpy()
    columns = (V * S).cpu().numpy()
    loud = columns[np.linalg.norm(columns, axis=1) > LOUD * noise * r**0.5]
    settled = (_settled(q / scale, loud, noise, total) for q in _vertices(loud / scale, total / scale, r))
    kept: list[np.ndarray] = []
    for _, q in sorted((s for s in settled if s is not None), key=lambda s: -s[0]):
        if len(kept) < r and not any(_alike(q, other, columns) for other in kept):
            kept.append(q)
    found = np.stack(kept) @ columns.T if kept else np.zeros((0, weight.shape[1]))
    return Unmixed(torch.from_numpy(found).to(weight.device).clamp_min(0), r)


def _vertices(points: np.ndarray, total: np.ndarray, r: int) -> list[np.ndarray]:
    """Vertices of {q : points·q >= 0, total·q = 1}: first those that an objective flat on all found so far leads to, then
    some of random objectives, for where columns of one photo alone are missing and there are vertices that are no photo."""
    draw = np.random.default_rng(0)
    found: list[np.ndarray] = []
    for attempt in range(2 * r + 8):
        objective = draw.standard_normal(r)
        if attempt < r and len(found) < r:
            base = np.array([total, *(q - found[0] for q in found[1:])])
            objective -= np.linalg.pinv(base) @ (base @ objective)
        for sign in (1, -1):
            answer = linprog(
                sign * objective, A_ub=-points, b_ub=np.zeros(len(points)), A_eq=total[None], b_eq=[1.0],
                bounds=(None, None), method="highs",
            )  # fmt: skip
            if answer.status == 0 and all(np.abs(answer.x - q).max() > 1e-6 * np.abs(q).max() for q in found):
                found.append(answer.x)
    return found


def _settled(q: np.ndarray, columns: np.ndarray, noise: float, total: np.ndarray) -> tuple[int, np.ndarray] | None:
    """How many columns lie in the hyperplane of q, and its normal fitted to them: least squares of the input with weights that
    forget what is not near zero (Cauchy's, its reach halved down to the rounding). None where it is no photo's: few
    columns in it, or some on its wrong side."""
    for halving in range(12):
        h = columns @ q
        reach = max(3 * noise * float(np.linalg.norm(q)), START * float(np.abs(h).mean()) / 2**halving)
        q = np.linalg.solve((columns.T / (h**2 + reach**2)) @ columns, total)
        q = q / (q @ total)
    distance = columns @ q / (noise * np.linalg.norm(q))
    inside = int((np.abs(distance) < NEAR).sum())
    wrong = int((distance < -2 * NEAR).sum())
    if len(q) > 1 and (inside < len(q) - 1 + FEWEST or wrong > WRONG * len(columns)):
        return None
    return inside, q


def _alike(a: np.ndarray, b: np.ndarray, columns: np.ndarray) -> bool:
    x, y = columns @ a, columns @ b
    return bool(x @ y > ALIKE * np.linalg.norm(x) * np.linalg.norm(y))
