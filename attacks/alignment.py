"""Whose class embeddings these are where they come turned by an unknown rotation: two clouds of points laid over each other.

Rows x_i (n, d) are class embeddings times an unknown orthogonal R, y_g (G, d) the mean features of the people of a gallery, each
as unit vectors. Row i shows person p(i). Three ways, all in float64:

    gram          no R at all: the p under which the cosines among rows resemble those among people, a quadratic assignment
                  (FAQ, Vogelstein et al. 2015), each row with a different person
    wasserstein   R and p in turn: orthogonal Procrustes for R, assignment for p (Wasserstein-Procrustes, Grave et al. 2019),
                  started from matched second moments with signs by third moments, then from altered signs. Assignments are soft
                  at first and harden (Rangarajan et al. 1997): hard ones from the start end in the nearest poor optimum
    paired        R alone, from rows whose people the attacker knows: U Vᵀ of Σ y_p(i) x_iᵀ (Schönemann 1966)

Every start is judged by the attacker's own objective. Known pairs stay fixed in the first two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, quadratic_assignment
from torch import Tensor

Array = np.ndarray
Pairs = list[tuple[int, int]]  # (row, person)
ALTERNATIONS = 100
TEMPERATURES = np.geomspace(0.3, 0.02, 12)  # of soft assignments, in cosines: from all people alike to one or two
AT_EACH = 5  # alternations at a temperature
BALANCING = 20
RANK = 1e-9  # relative to the largest singular value: below, known pairs say nothing of a direction


def unit(points: Tensor | Array) -> Array:
    x = np.asarray(points, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


def procrustes(rows: Array, people: Array) -> Array:
    """(d, d) Q that brings rows (m, d) nearest to people (m, d) as rows @ Q: U Vᵀ of rowsᵀ people. Directions of which fewer
    than d pairs say nothing are left out, so that Q is orthogonal on the span of what is known and zero beyond it."""
    U, S, Vt = np.linalg.svd(rows.T @ people)
    least = max(RANK * float(S[0]), 1e-300)
    r = int(np.count_nonzero(least < S))
    return U[:, :r] @ Vt[:r]


def assigned(scores: Array, known: Pairs) -> Array:
    """(n,) a different person for each row, with the largest sum of scores (n, G); known pairs are kept."""
    scores = scores.copy()
    for i, g in known:
        scores[i], scores[:, g] = -1e6, -1e6
        scores[i, g] = 1e6
    return linear_sum_assignment(-scores)[1]


def softly_assigned(scores: Array, temperature: float, known: Pairs) -> Array:
    """(n, G) shares of each row in people: rows of sum 1, and nobody shared out much more than once (Sinkhorn)."""
    P = np.exp((scores - scores.max(axis=1, keepdims=True)) / temperature)
    for _ in range(BALANCING):
        P /= P.sum(axis=1, keepdims=True)
        P /= np.maximum(P.sum(axis=0, keepdims=True), 1)
    for i, g in known:
        P[i] = 0
        P[i, g] = 1
    return P


def wasserstein_procrustes(
    rows: Array, people: Array, known: Pairs, restarts: int, draw: np.random.Generator, tick: Callable[[int], None]
) -> Array:
    """(d, d) Q: of all starts the one whose assigned people lie nearest to the turned rows."""
    starts = [procrustes(rows[[i for i, _ in known]], people[[g for _, g in known]])] if known else []
    best, found = -np.inf, np.eye(rows.shape[1])
    for attempt in range(restarts):
        Q = starts[attempt] if attempt < len(starts) else matched_moments(rows, people, draw, attempt > len(starts))
        for temperature in np.repeat(TEMPERATURES, AT_EACH):
            Q = procrustes(rows, softly_assigned(rows @ Q @ people.T, temperature, known) @ people)
        match = np.full(len(rows), -1)
        for _ in range(ALTERNATIONS):
            before, match = match, assigned(rows @ Q @ people.T, known)
            if (match == before).all():
                break
            Q = procrustes(rows, people[match])
        reached = float((rows @ Q * people[match]).sum())
        if reached > best:
            best, found = reached, Q
        tick(attempt + 1)
    return found


def matched_moments(rows: Array, people: Array, draw: np.random.Generator, altered: bool = False) -> Array:
    """(d, d) Q that lays the principal directions of rows over those of people, in order of their second moments; the sign of
    each by its third moment, and that of a tenth of them turned over at random if ``altered``."""
    axes = []
    for cloud in (rows, people):
        V = np.linalg.eigh(cloud.T @ cloud)[1][:, ::-1]
        skew = ((cloud @ V) ** 3).sum(axis=0)
        axes.append(V * np.where(skew < 0, -1.0, 1.0))
    signs = np.where(draw.random(rows.shape[1]) < 0.1, -1.0, 1.0) if altered else 1.0
    return (axes[0] * signs) @ axes[1].T


def standard(cosines: Array) -> Array:
    """(m, m) with mean 0 and variance 1 off the diagonal, which is 0: as much as people who are nobody's row."""
    off = ~np.eye(len(cosines), dtype=bool)
    kept = cosines[off]
    out = (cosines - kept.mean()) / max(float(kept.std()), 1e-12)
    np.fill_diagonal(out, 0.0)
    return out


def matched_grams(
    rows: Array, people: Array, known: Pairs, restarts: int, draw: np.random.Generator, tick: Callable[[int], None]
) -> Array:
    """(n, G) correlation in [-1, 1] of each row's cosines to the other rows with each person's cosines to the people of those
    rows, under the best quadratic assignment. The fewer rows are padded by what resembles nobody."""
    n, G = len(rows), len(people)
    B = standard(people @ people.T)
    A = np.zeros((max(n, G), max(n, G)))
    A[:n, :n] = standard(rows @ rows.T)
    if n > G:
        B = np.pad(B, (0, n - G))
    best, match = -np.inf, np.arange(n)
    for attempt in range(restarts):
        options = {
            "maximize": True, "rng": draw, "partial_match": np.array(known, dtype=int).reshape(-1, 2),
            "P0": "barycenter" if attempt == 0 else "randomized",
        }  # fmt: skip
        answer = quadratic_assignment(A, B, method="faq", options=options)
        if answer.fun > best:
            best, match = float(answer.fun), answer.col_ind[:n]
        tick(attempt + 1)
    seen = match < G
    profiles, theirs = A[:n, :n][:, seen], B[:G][:, match[seen]]
    scores = profiles @ theirs.T
    return scores / np.maximum(np.outer(np.linalg.norm(profiles, axis=1), np.linalg.norm(theirs, axis=1)), 1e-12)


def aligned_scores(
    method: str, rows: Tensor, people: Tensor, known: Pairs, restarts: int, generator: torch.Generator,
    tick: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """float32 (n, G) similarity of rows (n, d) that come turned with people (G, d). known: (row, person) that the attacker knows.

    method: "gram", "wasserstein", "paired" (known pairs and nothing else). Equal generators give equal answers.
    """
    x, y = unit(rows), unit(people)
    draw = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    if method == "gram":
        return torch.from_numpy(matched_grams(x, y, known, restarts, draw, tick)).float()
    if method == "wasserstein":
        Q = wasserstein_procrustes(x, y, known, restarts, draw, tick)
    else:
        Q = procrustes(x[[i for i, _ in known]], y[[g for _, g in known]])
    return torch.from_numpy((x @ Q @ y.T).clip(-1, 1)).float()
