"""Verification and identification against brute force over pairs, scikit-learn, and simulated coverage."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from eval.recognition import (
    PairScores,
    closed_set_rank1,
    identification,
    linkage_auc,
    paired_auc_difference,
    rank_k,
    support,
    verified,
)
from eval.statistics import Measured, clopper_pearson, identity_weights
from fedgc.errors import UsageError, WorkFailedError

RATES = ("auc", "eer", "tar@far=0.1", "tar@far=0.01", "rank1")


def people(
    identities: int, images: int, rng: np.random.Generator, *, noise: float = 1.0, dimensions: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of `images` photos of each person; each person has a noise level of its own."""
    labels = np.repeat(np.arange(identities), images)
    level = noise * rng.uniform(0.5, 1.5, size=identities)
    centres = rng.normal(size=(identities, dimensions))
    return centres[labels] + level[labels, None] * rng.normal(size=(len(labels), dimensions)), labels


def ragged(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Nine people with 1 to 7 photos in mixed order, cosines on a coarse grid so that many are tied."""
    labels = rng.permutation(np.repeat(np.arange(9), [1, 2, 2, 3, 4, 5, 5, 6, 7]))
    directions = rng.integers(-1, 2, size=(9, 4))[labels] + rng.integers(-1, 2, size=(len(labels), 4))
    return directions.astype(float), labels


def brute_pairs(
    embeddings: np.ndarray, labels: np.ndarray, weights: np.ndarray, balanced: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, whether genuine, and weight (normalised by kind) of each pair, by the definitions."""
    sizes = np.bincount(labels)
    scores, genuine, mass = [], [], []
    for i, j in combinations(range(len(labels)), 2):
        a, b = labels[i], labels[j]
        norm = np.linalg.norm(embeddings[i]) * np.linalg.norm(embeddings[j])
        scores.append(round(embeddings[i] @ embeddings[j] / norm if norm else 0.0, 10))
        genuine.append(a == b)
        if a == b:
            mass.append(weights[a] / (sizes[a] * (sizes[a] - 1) / 2 if balanced else 1))
        else:
            mass.append(weights[a] * weights[b] / (sizes[a] * sizes[b] if balanced else 1))
    score, same, weight = np.array(scores), np.array(genuine), np.array(mass)
    weight[same] /= weight[same].sum()
    weight[~same] /= weight[~same].sum()
    return score, same, weight


def brute_eer(score: np.ndarray, same: np.ndarray, weight: np.ndarray) -> float:
    low, high = 0.0, 1.0
    for threshold in [*np.unique(score), np.inf]:
        fmr = weight[~same & (score >= threshold)].sum()
        fnmr = weight[same & (score < threshold)].sum()
        low, high = max(low, min(fmr, fnmr)), min(high, max(fmr, fnmr))
    return (low + high) / 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("balanced", [True, False])
def test_curve_agrees_with_loops_over_pairs(seed: int, balanced: bool) -> None:
    rng = np.random.default_rng(seed)
    embeddings, labels = ragged(rng)
    scores = PairScores.from_embeddings(embeddings, labels, balanced=balanced)
    draws = np.vstack([np.ones((1, 9), dtype=np.int64), identity_weights(9, 4, rng)])
    targets = (0.02, 0.1, 0.3, 1.0)
    curve, thresholds = scores.curve(draws), scores.thresholds(targets, draws)
    for row, weights in enumerate(draws):
        score, same, weight = brute_pairs(embeddings, labels, weights, balanced)
        assert curve.auc()[row] == pytest.approx(roc_auc_score(same, score, sample_weight=weight), abs=1e-12)
        assert curve.eer()[row] == pytest.approx(brute_eer(score, same, weight), abs=1e-12)
        for column, target in enumerate(targets):
            threshold = thresholds[row, column]
            assert weight[~same & (score >= threshold)].sum() <= target + 1e-8
            just_below = np.nextafter(threshold, -np.inf)
            assert target == 1 or weight[~same & (score >= just_below)].sum() > target
            tar = weight[same & (score >= threshold)].sum()
            assert curve.tar(thresholds[:, column])[row] == pytest.approx(tar, abs=1e-12)


def test_point_rates_agree_with_loops_over_pairs() -> None:
    embeddings, labels = ragged(np.random.default_rng(1))
    scores = PairScores.from_embeddings(embeddings, labels)
    score, same, weight = brute_pairs(embeddings, labels, np.ones(9))
    for threshold in [-np.inf, -0.5, 0.0, 0.5, score[3], np.nextafter(score[3], 2), np.inf]:
        assert scores.fmr(threshold) == pytest.approx(weight[~same & (score >= threshold)].sum(), abs=1e-12)
        assert scores.fnmr(threshold) == pytest.approx(weight[same & (score < threshold)].sum(), abs=1e-12)


def test_threshold_uses_all_scores_when_the_head_is_too_short() -> None:
    """A draw may put nearly all its weight on identities with low impostor scores."""
    rng = np.random.default_rng(2)
    embeddings, labels = people(12, 4, rng, dimensions=3)
    weights = np.zeros((30, 12), dtype=np.int64)
    for row in weights:
        row[rng.choice(12, 2, replace=False)] = 6
    scores = PairScores.from_embeddings(embeddings, labels)
    for row, threshold in zip(weights, scores.thresholds([0.1], weights)[:, 0], strict=True):
        score, same, weight = brute_pairs(embeddings, labels, row)
        by_hand = np.sort(score[~same & (weight > 0)])[::-1][1]  # 16 equal scores: 1 may match, 2 may not
        assert threshold == pytest.approx(np.nextafter(by_hand, np.inf), abs=1e-9)


def test_threshold_meets_a_target_that_is_hit_exactly() -> None:
    """5 people with 1 photo, 10 impostor scores: at FAR 0.3 three of them match, whatever the rounding."""
    embeddings, labels = people(5, 1, np.random.default_rng(4))
    scores = PairScores.from_embeddings(embeddings, labels)
    limits = scores.thresholds([0.1, 0.3, 0.7])[0]
    assert [int((scores.impostor >= limit).sum()) for limit in limits] == [1, 3, 7]


def test_identity_drawn_twice_is_no_impostor_of_itself() -> None:
    embeddings, labels = people(3, 4, np.random.default_rng(0))
    scores = PairScores.from_embeddings(embeddings, labels)
    alone = np.array([[3, 0, 0]])
    assert np.isnan(scores.curve(alone).auc()).all()
    assert np.isnan(scores.thresholds([0.1], alone)).all()
    pair = scores.curve(np.array([[1, 1, 0], [2, 2, 0]])).auc()
    assert pair[0] == pytest.approx(pair[1])


def test_labels_and_tensors_of_any_kind() -> None:
    embeddings, labels = people(4, 3, np.random.default_rng(0))
    expected = PairScores.from_embeddings(embeddings, labels).curve().auc()
    names = np.array(["zoe", "ann", "mia", "eve"])[labels]
    assert PairScores.from_embeddings(embeddings, names).curve().auc() == pytest.approx(expected)
    tensors = PairScores.from_embeddings(torch.tensor(embeddings), torch.tensor(labels) + 70)
    assert tensors.curve().auc() == pytest.approx(expected)
    assert PairScores.from_embeddings(7 * embeddings, labels).curve().auc() == pytest.approx(expected)


def measure(test: tuple, calib: tuple, draws: int = 200, seed: int = 0) -> dict[str, Measured | int]:
    return verified(*test, *calib, draws=draws, rng=np.random.default_rng(seed))[0]


def test_verification_reports_what_the_definitions_say() -> None:
    rng = np.random.default_rng(3)
    test, calib = people(30, 4, rng), people(28, 5, rng)
    result = measure(test, calib)
    assert (result["identities"], result["images"]) == (30, 120)
    score, same, weight = brute_pairs(*test, np.ones(30))
    assert result["auc"].value == pytest.approx(roc_auc_score(same, score, sample_weight=weight))
    assert result["eer"].value == pytest.approx(brute_eer(score, same, weight))
    other, calib_same, calib_weight = brute_pairs(*calib, np.ones(28))
    candidates = np.nextafter(np.sort(other[~calib_same]), np.inf)
    limit = next(t for t in candidates if calib_weight[~calib_same & (other >= t)].sum() <= 0.1)
    tar = result["tar@far=0.1"]
    assert tar.value == pytest.approx(weight[same & (score >= limit)].sum())
    assert tar.to_json()["far"] == pytest.approx(weight[~same & (score >= limit)].sum())
    assert (tar.chance, tar.note) == (0.1, None)
    assert "indicative" in str(result["tar@far=0.01"].note)
    for name in RATES:
        assert 0 <= result[name].low < result[name].value < result[name].high <= 1
        assert result[name].n == 30


def test_verification_is_reproducible() -> None:
    rng = np.random.default_rng(3)
    test, calib = people(12, 3, rng), people(12, 3, rng)
    assert measure(test, calib, seed=1) == measure(test, calib, seed=1)
    assert measure(test, calib, seed=1) != measure(test, calib, seed=2)


def test_the_calibration_set_is_resampled_too() -> None:
    """A threshold from few people is uncertain, and the interval of the TAR says so; the AUC has none."""
    rng = np.random.default_rng(12)
    test, few, many = people(60, 4, rng), people(10, 4, rng), people(150, 4, rng)
    by_few, by_many = measure(test, few), measure(test, many)
    width = [result["tar@far=0.1"].high - result["tar@far=0.1"].low for result in (by_few, by_many)]
    assert width[0] > 1.5 * width[1]
    assert by_few["auc"] == by_many["auc"]


def test_perfect_separation() -> None:
    labels = np.repeat(np.arange(30), 3)
    faces = np.eye(30)[labels]
    result = measure((faces, labels), (faces, labels))
    assert [result[name].value for name in RATES] == [1.0, 0.0, 1.0, 1.0, 1.0]
    edge = 0.025 ** (1 / 30)
    assert (result["auc"].low, result["auc"].high) == (pytest.approx(edge), 1.0)
    assert (result["eer"].low, result["eer"].high) == (0.0, pytest.approx(1 - edge))
    assert result["tar@far=0.1"].far == 0.0


def test_random_embeddings_are_at_chance() -> None:
    rng = np.random.default_rng(8)
    labels = np.repeat(np.arange(40), 4)
    result = measure((rng.normal(size=(160, 8)), labels), (rng.normal(size=(160, 8)), labels))
    for name in RATES:
        assert result[name].low <= result[name].chance <= result[name].high
    assert result["auc"].value == pytest.approx(0.5, abs=0.08)
    assert result["tar@far=0.1"].far == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1])
def test_a_collapsed_model_earns_nothing(constant: float) -> None:
    """All embeddings equal: ties are half right in the AUC, and never right elsewhere."""
    labels = np.repeat(np.arange(30), 3)
    faces = np.full((90, 7), constant, dtype=np.float32)
    result = measure((faces, labels), (faces, labels))
    assert [result[name].value for name in RATES] == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert result["tar@far=0.1"].far == 0.0


def test_ties_count_as_matches() -> None:
    scores = PairScores.from_embeddings(np.eye(4)[[0, 0, 1, 1, 2]], ["a", "a", "b", "b", "c"])
    assert (scores.fmr(0.0), scores.fnmr(1.0)) == (1.0, 0.0)
    assert scores.thresholds([0.5])[0, 0] > 0.0


def test_too_few_people_are_refused_with_a_reason() -> None:
    rng = np.random.default_rng(0)
    crowd = people(30, 3, rng)
    one = measure(people(1, 6, rng), crowd)
    single = measure(people(9, 1, rng), crowd)
    for result, reason in ((one, "one identity only"), (single, "second image")):
        assert all(result[name].value is None for name in RATES)
        assert reason in str(result["auc"].why)
    few = measure(people(8, 3, rng), crowd)
    assert "28 identity pairs in the test set (8 identities), at least 30" in str(few["tar@far=0.1"].why)
    assert few["auc"].value is not None
    assert few["auc"].note == "indicative: 8 identities"
    assert "calibration set" in str(measure(crowd, people(5, 3, rng))["tar@far=0.1"].why)
    assert measure(crowd, people(1, 3, rng))["tar@far=0.1"].value is None
    with pytest.raises(UsageError, match="no impostor pairs"):
        PairScores.from_embeddings(*people(1, 3, rng)).fmr(0.0)


@pytest.mark.parametrize(("target", "needed"), [(0.1, 25), (0.01, 78), (1e-3, 246), (1e-4, 776)])
def test_support_table(target: float, needed: int) -> None:
    assert support(target, needed, "test") == (None, None)
    why, note = support(target, needed - 1, "test")
    assert why is None
    assert f"{round(30 / target)} wanted" in str(note)


@pytest.mark.parametrize(("target", "least"), [(0.1, 9), (0.01, 25)])
def test_below_three_expected_errors_is_refused(target: float, least: int) -> None:
    assert support(target, least, "test")[0] is None
    assert "not supported" in str(support(target, least - 1, "test")[0])


def test_malformed_input_is_refused() -> None:
    embeddings, labels = people(4, 3, np.random.default_rng(0))
    with pytest.raises(UsageError, match="12 embeddings but 11 labels"):
        PairScores.from_embeddings(embeddings, labels[:-1])
    with pytest.raises(UsageError, match="images, dimensions"):
        PairScores.from_embeddings(embeddings[0], labels)
    with pytest.raises(UsageError, match="labels must be one-dimensional"):
        PairScores.from_embeddings(embeddings, labels[:, None])
    embeddings[0, 0] = np.nan
    with pytest.raises(WorkFailedError, match="diverged"):
        PairScores.from_embeddings(embeddings, labels)


def test_rank1_in_one_set_by_hand() -> None:
    angles = np.radians([0, 90, 5, 50, 85, 180])
    faces = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # gallery: a at 0, b at 90, c at 180; probes: a at 5 (right) and at 50 (nearer to b), b at 85 (right)
    measured = closed_set_rank1(faces, ["a", "b", "a", "a", "b", "c"], draws=50, rng=np.random.default_rng(0))
    assert measured.value == pytest.approx((1 / 2 + 1) / 2)
    assert (measured.n, measured.chance) == (2, 1 / 3)


def test_ranks_agree_with_sorting() -> None:
    rng = np.random.default_rng(5)
    queries, gallery, truth = rng.normal(size=(40, 6)), rng.normal(size=(25, 6)), rng.integers(0, 25, 40)
    ranks = rank_k(torch.tensor(queries), gallery, truth)
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    order = np.argsort(-(queries @ unit.T), axis=1)
    assert ranks.tolist() == [row.tolist().index(mate) + 1 for row, mate in zip(order, truth, strict=True)]


def test_rank_ties_and_failures_go_against_the_claim() -> None:
    gallery = np.array([[1.0, 0], [1.0, 0], [0, 1.0], [1.0, 0]])
    queries = np.array([[2.0, 0], [0, 3.0], [0, 0], [np.nan, 1]])
    assert rank_k(queries, gallery, [0, 2, 1, 2]).tolist() == [3, 1, 4, 4]
    with pytest.raises(UsageError, match=r"0\.\.3"):
        rank_k(queries, gallery, [0, 2, 1, 4])
    with pytest.raises(UsageError, match="one row"):
        rank_k(queries, gallery, [0, 2])


def test_identification_is_exact_binomial_with_chance() -> None:
    ranks = np.array([1] * 12 + [4] * 5 + [9] * 3)
    result = identification(ranks, 50)
    assert result["rank1"] == clopper_pearson(12, 20, chance=1 / 50)
    assert result["rank5"] == clopper_pearson(17, 20, chance=5 / 50)
    clustered = identification(ranks, 50, clusters=np.arange(20) // 4, rng=np.random.default_rng(0))
    assert (clustered["rank1"].n, clustered["rank1"].value) == (5, 0.6)


def test_identification_edges() -> None:
    small = identification([1, 2], 5)
    assert small["rank1"].value == 0.5
    assert "gallery of 5" in str(small["rank5"].why)
    assert identification([], 50)["rank1"].why == "no trials"
    with pytest.raises(UsageError, match=r"1\.\.5"):
        identification([0, 2], 5)
    with pytest.raises(UsageError, match=r"1\.\.5"):
        identification([6], 5)


def test_linkage_auc_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(6)
    gallery, truth = rng.normal(size=(20, 5)).round(), np.repeat(np.arange(12), 2)
    gallery[:, 0] = 1.0
    queries = gallery[truth] + rng.normal(size=(24, 5)).round()
    measured = linkage_auc(queries, gallery, truth, draws=400, rng=rng)
    lengths = np.maximum(np.linalg.norm(queries, axis=1), 1e-300)[:, None] * np.linalg.norm(gallery, axis=1)
    scores = (queries @ gallery.T / lengths).round(10)
    genuine = np.arange(20) == truth[:, None]
    assert measured.value == pytest.approx(roc_auc_score(genuine.ravel(), scores.ravel()))
    assert 0 < measured.low < measured.value < measured.high < 1
    assert (measured.n, measured.chance) == (12, 0.5)


def test_linkage_interval_is_a_resample_of_people() -> None:
    rng = np.random.default_rng(6)
    gallery, truth = rng.normal(size=(9, 4)), np.array([0, 0, 0, 1, 2, 2])
    queries = gallery[truth] + 2 * rng.normal(size=(6, 4))
    draws = []
    scores = (queries @ gallery.T) / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(gallery, axis=1)
    for counts in identity_weights(3, 200, np.random.default_rng(1)):
        weight = np.repeat(counts[truth][:, None], 9, axis=1).ravel().astype(float)
        genuine = (np.arange(9) == truth[:, None]).ravel()
        draws.append(roc_auc_score(genuine, scores.ravel(), sample_weight=weight))
    measured = linkage_auc(queries, gallery, truth, draws=200, rng=np.random.default_rng(1))
    assert measured.low == pytest.approx(np.quantile(draws, 0.025, method="lower"))
    assert measured.high == pytest.approx(np.quantile(draws, 0.975, method="higher"))


def test_linkage_edges() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(30, 8))
    perfect = linkage_auc(gallery[:20], gallery, np.arange(20), draws=100, rng=rng)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(0.025 ** (1 / 20))
    assert linkage_auc(np.ones((20, 8)), np.ones((30, 8)), np.arange(20), draws=100, rng=rng).value == 0.5
    assert "two people" in str(linkage_auc(gallery[:2], gallery, [3, 3], rng=rng).why)


def test_paired_difference_sees_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(9)
    better, labels = people(40, 4, rng, noise=1.2)
    worse = better + 0.5 * rng.normal(size=better.shape)
    difference = paired_auc_difference(better, worse, labels, draws=300, rng=np.random.default_rng(1))
    a, b = (PairScores.from_embeddings(x, labels).curve().auc()[0] for x in (better, worse))
    assert difference.value == pytest.approx(a - b)
    assert 0 < difference.low < difference.value < difference.high
    draws = identity_weights(40, 300, np.random.default_rng(1))
    separate = [
        np.quantile(PairScores.from_embeddings(x, labels).curve(draws).auc(), [0.025, 0.975]) for x in (better, worse)
    ]
    assert difference.high - difference.low < sum(high - low for low, high in separate) / 2
    assert paired_auc_difference(better, better, labels, draws=100, rng=rng) == Measured(0.0, 0.0, 0.0, 40)
    assert "one identity" in str(paired_auc_difference(better[:4], worse[:4], labels[:4], rng=rng).why)


def coverage(identities: int, images: int, repeats: int, seed: int) -> dict[str, float]:
    """Share of simulated test sets whose interval holds the value in a large population."""
    rng = np.random.default_rng(seed)
    population = people(700, 4, rng, noise=1.3)
    truth = measure(population, population, draws=2)
    covered = dict.fromkeys(("auc", "eer", "tar@far=0.1"), 0)
    for _ in range(repeats):
        test, calib = (people(identities, images, rng, noise=1.3) for _ in range(2))
        result = measure(test, calib, draws=200, seed=int(rng.integers(2**31)))
        for name in covered:
            covered[name] += result[name].low <= truth[name].value <= result[name].high
    return {name: count / repeats for name, count in covered.items()}


def test_intervals_cover_roughly() -> None:
    assert min(coverage(30, 3, repeats=30, seed=0).values()) >= 0.8


@pytest.mark.slow
def test_intervals_cover_ninety_percent_at_fifty_identities() -> None:
    assert min(coverage(50, 8, repeats=200, seed=1).values()) >= 0.9
