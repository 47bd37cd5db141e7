"""Accuracy and AUC on a given list of pairs, by the protocols of Labeled Faces in the Wild (Huang et al. 2007).

A pair is said to match if its cosine s >= t. Accuracy is the mean of the shares of matched and of mismatched pairs that
are told right: on a complete list, half of each, it is the share of all pairs, and leaving pairs out does not move
its chance level from 1/2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import t as student

from eval.pairs import Curve, PairScores, chunks
from eval.statistics import (
    CONFIDENCE,
    DRAWS,
    Floats,
    Ints,
    Measured,
    clopper_pearson,
    identity_weights,
    rate_interval,
)

FEWEST = 5  # pairs of each kind in every fold
_FEW = 20  # people; below, the coverage of the bootstrap has not been checked
_DECIMALS = 12  # shares that differ by less are equal but for rounding


@dataclass(frozen=True)
class ListedPairs:
    """Cosines (P,) of the pairs, the two people of each (P, 2) numbered 0..K-1, and its fold (P,)."""

    scores: Floats
    people: Ints
    fold: Ints

    @property
    def matched(self) -> NDArray[np.bool_]:
        return np.equal(self.people[:, 0], self.people[:, 1])

    @property
    def identities(self) -> int:
        return len(np.unique(self.people))

    def only(self, chosen: NDArray[np.bool_]) -> ListedPairs:
        return ListedPairs(self.scores[chosen], self.people[chosen], self.fold[chosen])

    def draws(self, count: int, rng: np.random.Generator) -> Iterator[Ints]:
        """(count, P) in chunks: how often each pair occurs where people are drawn, w_a, or w_a w_b of two people."""
        numbered = np.unique(self.people, return_inverse=True)[1].reshape(-1, 2)
        for weights in chunks(identity_weights(self.identities, count, rng)):
            first, second = weights[:, numbered[:, 0]], weights[:, numbered[:, 1]]
            yield np.where(self.matched, first, first * second)

    def curve(self, weights: Ints) -> Curve:
        """Error rates around every matched score for each row of pair weights (D, P); NaN without either kind."""
        own, other = self.scores[self.matched], self.scores[~self.matched]
        levels = np.unique(own)
        below = np.searchsorted(levels, other) + np.searchsorted(levels, other, "right")
        genuine = _heaped(np.searchsorted(levels, own), len(levels), weights[:, self.matched])
        impostor = _heaped(below, 2 * len(levels) + 1, weights[:, ~self.matched])
        with np.errstate(invalid="ignore"):
            return Curve(levels, genuine / genuine[-1], impostor / impostor[-1])

    def accuracy(self, thresholds: Floats, weights: Ints) -> Floats:
        """(D,) accuracy of each row of pair weights (D, P) at its own threshold (D,); NaN without either kind."""
        right = np.equal(self.scores >= thresholds[:, None], self.matched) * weights
        with np.errstate(invalid="ignore"):
            shares = [
                right[:, kind].sum(axis=1) / weights[:, kind].sum(axis=1) for kind in (self.matched, ~self.matched)
            ]
        return np.where(np.isnan(thresholds), np.nan, (shares[0] + shares[1]) / 2)


def best_thresholds(curve: Curve) -> Floats:
    """(D,) the matched score at which FMR + FNMR is least, the lowest of several; NaN where a draw has no rates."""
    missed = np.concatenate([np.zeros_like(curve.genuine[:1]), curve.genuine[:-1]])
    wrong = np.round(missed + 1 - curve.impostor[0:-1:2], _DECIMALS)
    return np.where(np.isnan(wrong).any(axis=0), np.nan, curve.levels[wrong.argmin(axis=0)])


def fold_accuracy(pairs: ListedPairs, folds: int) -> Measured:
    """Mean accuracy over ``folds`` (at least two), each at the threshold that is best on the other folds.

    The interval is the standard error over folds with the quantile of Student's t. At exactly 1 that is no error at
    all: there the Clopper-Pearson end for so many people holds.
    """
    why = too_few(pairs, folds)
    if why:
        return Measured.unsupported(why, folds, 0.5)
    accuracies = np.empty(folds)
    for fold in range(folds):
        held = pairs.fold == fold
        threshold = best_thresholds(pairs.only(~held).curve(_once(~held)))
        accuracies[fold] = pairs.only(held).accuracy(threshold, _once(held))[0]
    value = float(np.round(accuracies.mean(), _DECIMALS))
    half = float(student.ppf((1 + CONFIDENCE) / 2, folds - 1) * accuracies.std(ddof=1) / np.sqrt(folds))
    low = value - half
    if value == 1.0:
        low = clopper_pearson(pairs.identities, pairs.identities).low or 0.0
    note = f"interval: standard error over {folds} folds, Student's t with {folds - 1} degrees of freedom"
    shared = _in_several_folds(pairs)
    if shared:
        note += f"; too narrow: people in more than one fold: {shared}"
    return Measured(value, max(0.0, low), min(1.0, value + half), folds, chance=0.5, note=note)


def calibrated_accuracy(
    pairs: ListedPairs, calibration: PairScores, *, draws: int = DRAWS, rng: np.random.Generator
) -> Measured:
    """Accuracy on one fold at the threshold that is best on calibration people; both sets of people are resampled."""
    n = pairs.identities
    why = too_few(pairs, 1) or (calibration.why_not and f"calibration people: {calibration.why_not}")
    if why:
        return Measured.unsupported(why, n, 0.5)
    once = np.ones((1, len(pairs.scores)), dtype=np.int64)
    value = float(pairs.accuracy(best_thresholds(calibration.curve()), once)[0])
    samples = [
        pairs.accuracy(best_thresholds(calibration.curve(chosen)), weights)
        for chosen, weights in zip(
            chunks(identity_weights(calibration.identities, draws, rng)), pairs.draws(draws, rng), strict=True
        )
    ]
    return _by_people(value, np.concatenate(samples), n)


def pair_auc(pairs: ListedPairs, *, draws: int = DRAWS, rng: np.random.Generator) -> Measured:
    """P(matched > mismatched) + P(tie)/2 over the listed pairs of all folds; people are resampled."""
    why = too_few(pairs, 1)
    if why:
        return Measured.unsupported(why, pairs.identities, 0.5)
    value = float(pairs.curve(np.ones((1, len(pairs.scores)), dtype=np.int64)).auc()[0])
    samples = [pairs.curve(weights).auc() for weights in pairs.draws(draws, rng)]
    return _by_people(value, np.concatenate(samples), pairs.identities)


def too_few(pairs: ListedPairs, folds: int) -> str | None:
    """Why these pairs support no rate: a fold (or, with one, the whole) has too few of one kind, or people are few."""
    for fold in range(folds):
        kinds = pairs.matched[pairs.fold == fold] if folds > 1 else pairs.matched
        matched, mismatched = int(kinds.sum()), int((~kinds).sum())
        if min(matched, mismatched) < FEWEST:
            where = f"fold {fold + 1} has" if folds > 1 else "there are"
            return f"{where} {matched} matched and {mismatched} mismatched pairs left, {FEWEST} of each needed"
    if len(np.unique(pairs.people[pairs.matched])) < 2:
        return "all matched pairs are of one person: no interval"
    return None


def _by_people(value: float, samples: Floats, n: int) -> Measured:
    value = float(np.round(value, _DECIMALS))  # a sum of shares that should be exactly 1 is
    low, high = rate_interval(value, samples, n)
    note = f"indicative: {n} people" if n < _FEW else None
    return Measured(value, max(0.0, low), min(1.0, high), n, chance=0.5, note=note)


def _in_several_folds(pairs: ListedPairs) -> int:
    """How many people occur in more than one fold; in LFW's own list nobody does."""
    seen = np.unique(np.column_stack([pairs.people.ravel(), np.repeat(pairs.fold, 2)]), axis=0)
    return int((np.unique(seen[:, 0], return_counts=True)[1] > 1).sum())


def _heaped(rows: Ints, height: int, weights: Ints) -> Floats:
    """(height, D) cumulative weight up to each row, of pairs (P,) that lie at ``rows``."""
    places = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(height, len(rows)))
    return np.cumsum(places @ weights.T.astype(np.float64), axis=0)


def _once(chosen: NDArray[np.bool_]) -> Ints:
    return np.ones((1, int(chosen.sum())), dtype=np.int64)
