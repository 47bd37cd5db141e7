"""Protocols over listed pairs, against plain loops."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import t as student

from eval.pair_protocol import FEWEST, ListedPairs, best_thresholds, calibrated_accuracy, fold_accuracy, pair_auc
from eval.pairs import PairScores
from eval.statistics import clopper_pearson

FOLDS = 10


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def listed(each: int = 8, *, gap: float = 1.0, ties: bool = True, seed: int = 0, folds: int = FOLDS) -> ListedPairs:
    """``each`` pairs of a kind in a fold, of six people of its own; matched cosines are higher by ``gap``."""
    noise = np.random.default_rng(seed)
    scores, people, fold = [], [], []
    for k in range(folds):
        for n in range(2 * each):
            a = int(noise.integers(6))
            b = a if n < each else (a + 1 + int(noise.integers(5))) % 6
            scores.append(noise.normal() + (gap if n < each else 0))
            people.append((6 * k + a, 6 * k + b))
            fold.append(k)
    rounded = np.round(scores, 1) if ties else np.array(scores)
    return ListedPairs(rounded, np.array(people), np.array(fold))


def balanced(pairs: list[tuple[float, bool]], threshold: float) -> Fraction:
    shares = []
    for kind in (True, False):
        told = [(s >= threshold) == matched for s, matched in pairs if matched is kind]
        shares.append(Fraction(sum(told), len(told)))
    return (shares[0] + shares[1]) / 2


def looped(pairs: ListedPairs) -> list[Fraction]:
    rows = list(zip(pairs.scores.tolist(), pairs.matched.tolist(), pairs.fold.tolist(), strict=True))
    found = []
    for k in range(FOLDS):
        rest = [(s, m) for s, m, fold in rows if fold != k]
        best, threshold = Fraction(-1), math.nan
        for candidate in sorted({s for s, m in rest if m}):
            if balanced(rest, candidate) > best:
                best, threshold = balanced(rest, candidate), candidate
        found.append(balanced([(s, m) for s, m, fold in rows if fold == k], threshold))
    return found


@pytest.mark.parametrize("drop", [0, 25])
@pytest.mark.parametrize("ties", [True, False])
def test_ten_folds_against_a_loop(ties: bool, drop: int) -> None:
    pairs = listed(ties=ties)
    if drop:  # folds no longer of one size, nor half matched
        keep = np.ones(len(pairs.scores), dtype=bool)
        keep[np.flatnonzero(np.arange(len(keep)) % 16 < 2)[:drop]] = False
        pairs = pairs.only(keep)
    expected = looped(pairs)
    result = fold_accuracy(pairs, FOLDS)
    mean = float(sum(expected) / FOLDS)
    half = student.ppf(0.975, 9) * statistics.stdev(map(float, expected)) / math.sqrt(FOLDS)
    assert result.value == pytest.approx(mean, abs=1e-12)
    assert (result.low, result.high) == (pytest.approx(mean - half), pytest.approx(min(1, mean + half)))
    assert (result.n, result.chance) == (FOLDS, 0.5)
    assert result.note is not None
    assert "9 degrees of freedom" in result.note
    assert "more than one fold" not in result.note
    if not drop:  # balanced folds: the accuracy of LFW, the share of pairs told right
        assert all((16 * value).denominator == 1 for value in expected)


def test_the_threshold_never_sees_its_own_fold() -> None:
    pairs = listed(gap=3)
    moved = pairs.scores + np.where(pairs.fold == 0, 100.0, 0.0)  # every pair of fold 0 looks matched
    alone = fold_accuracy(ListedPairs(moved, pairs.people, pairs.fold), FOLDS)
    rest = looped(pairs)[1:]
    assert alone.value == pytest.approx(float(sum(rest) + Fraction(1, 2)) / FOLDS, abs=0.03)


def test_best_thresholds_against_a_loop() -> None:
    pairs = listed(3, seed=3)
    weights = np.random.default_rng(1).integers(0, 3, size=(20, len(pairs.scores)))
    for row, found in zip(weights, best_thresholds(pairs.curve(weights)), strict=True):
        repeated = [
            (float(s), bool(m))
            for s, m, w in zip(pairs.scores, pairs.matched, row, strict=True)
            for _ in range(w)
        ]  # fmt: skip
        levels = sorted({float(s) for s in pairs.scores[pairs.matched]})
        best = max(balanced(repeated, level) for level in levels)
        assert found == next(level for level in levels if balanced(repeated, level) == best)


def test_auc_against_a_loop() -> None:
    pairs = listed()
    own, other = pairs.scores[pairs.matched], pairs.scores[~pairs.matched]
    expected = np.mean([(a > b) + (a == b) / 2 for a in own for b in other])
    result = pair_auc(pairs, rng=rng())
    assert result.value == pytest.approx(expected)
    assert result.n == pairs.identities
    assert result.low is not None
    assert result.high is not None
    assert result.low < expected < result.high


def test_a_drawn_person_counts_in_all_pairs() -> None:
    pairs = ListedPairs(np.zeros(3), np.array([[7, 7], [7, 9], [9, 9]]), np.zeros(3, dtype=int))
    drawn = np.concatenate(list(pairs.draws(50, rng())))
    assert drawn.shape == (50, 3)
    assert (drawn[:, 0] + drawn[:, 2] == 2).all()
    assert (drawn[:, 1] == drawn[:, 0] * drawn[:, 2]).all()
    assert len(np.unique(drawn, axis=0)) == 3


def calibration(separated: bool) -> PairScores:
    noise = np.random.default_rng(2)
    labels = np.repeat(np.arange(12), 4)
    centres = noise.normal(size=(12, 64)) if separated else np.zeros((12, 64))
    return PairScores.from_embeddings(
        centres[labels] + (0.05 if separated else 1) * noise.normal(size=(48, 64)), labels
    )


def test_a_perfect_embedding() -> None:
    pairs = listed(gap=0)
    perfect = ListedPairs(np.where(pairs.matched, 1.0, 0.0), pairs.people, pairs.fold)
    low = clopper_pearson(perfect.identities, perfect.identities).low
    for result in (
        fold_accuracy(perfect, FOLDS),
        calibrated_accuracy(perfect, calibration(True), rng=rng()),
        pair_auc(perfect, rng=rng()),
    ):
        assert (result.value, result.high) == (1.0, 1.0)
        assert result.low == pytest.approx(low)


def test_a_random_embedding() -> None:
    pairs = listed(40, gap=0, ties=False)
    chance = ListedPairs(pairs.scores / 10, pairs.people, pairs.fold)
    for result in (
        fold_accuracy(chance, FOLDS),
        calibrated_accuracy(chance, calibration(False), rng=rng()),
        pair_auc(chance, rng=rng()),
    ):
        assert result.low is not None
        assert result.high is not None
        assert result.low < 0.5 < result.high
        assert result.high - result.low < 0.2


def test_the_threshold_of_one_fold_is_that_of_the_calibration_people() -> None:
    pairs, settled = listed(gap=0.4, folds=1, each=30), calibration(True)
    scaled = ListedPairs(np.tanh(pairs.scores), pairs.people, pairs.fold)
    threshold = min(settled.genuine)  # the sets are apart, so the lowest genuine score is the best threshold
    assert threshold > max(settled.impostor)
    rows = list(zip(scaled.scores.tolist(), scaled.matched.tolist(), strict=True))
    result = calibrated_accuracy(scaled, settled, rng=rng())
    assert result.value == pytest.approx(float(balanced(rows, threshold)))
    assert result.note == "indicative: 6 people"


def test_too_few_pairs_give_a_reason() -> None:
    pairs = listed(FEWEST)
    assert fold_accuracy(pairs, FOLDS).value is not None
    first = np.flatnonzero(pairs.matched & (pairs.fold == 3))[0]
    short = pairs.only(np.arange(len(pairs.scores)) != first)
    result = fold_accuracy(short, FOLDS)
    assert result.value is None
    assert result.why == "fold 4 has 4 matched and 5 mismatched pairs left, 5 of each needed"
    assert pair_auc(short, rng=rng()).value is not None
    nothing = pairs.only(np.zeros(len(pairs.scores), dtype=bool))
    for empty in (fold_accuracy(nothing, FOLDS), pair_auc(nothing, rng=rng())):
        assert empty.value is None
    one = ListedPairs(np.zeros(10), np.array([[0, 0]] * 5 + [[0, 1]] * 5), np.zeros(10, dtype=int))
    assert pair_auc(one, rng=rng()).why == "all matched pairs are of one person: no interval"
    alone = PairScores.from_embeddings(np.ones((3, 2)), [0, 0, 0])
    assert "calibration people" in str(calibrated_accuracy(pairs, alone, rng=rng()).why)


def test_people_in_several_folds_are_said() -> None:
    pairs = listed()
    people = pairs.people.copy()
    people[people == 7] = 0  # of the second fold, now also in the first
    assert "people in more than one fold: 1" in str(
        fold_accuracy(ListedPairs(pairs.scores, people, pairs.fold), 10).note
    )
