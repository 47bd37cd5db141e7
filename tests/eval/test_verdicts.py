"""Success attack rates against their definition, and what impostors reach."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from eval.pairs import unit
from eval.verdicts import FMRS, JudgeGate, Targets, another, judge_gate, verdicts

DRAWS = 200


def faces(people: int, each: int, seed: int, noise: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of people around a mean that they share, as a judge's are: unit (people * each, 16), and who each is."""
    rng = np.random.default_rng(seed)
    own = 1.5 + rng.standard_normal((people, 16)).repeat(each, axis=0)
    return unit(own + noise * rng.standard_normal(own.shape)), np.arange(people).repeat(each)


@pytest.fixture(scope="module")
def judged_by() -> JudgeGate:
    return judge_gate(*faces(100, 3, 0), draws=DRAWS, rng=np.random.default_rng(0))


def grouped(embeddings: np.ndarray, each: int) -> list[np.ndarray]:
    return list(embeddings.reshape(-1, each, embeddings.shape[1]))


def test_a_threshold_is_the_smallest_with_so_few_false_matches() -> None:
    embeddings, people = faces(80, 2, 1)
    found = judge_gate(embeddings, people, draws=DRAWS, rng=np.random.default_rng(0))
    cosines = np.round(embeddings @ embeddings.T, 10)
    pairs = [
        cosines[np.ix_(people == a, people == b)].ravel() for a, b in itertools.combinations(range(80), 2)
    ]  # all of one size: the balanced rate is the plain one
    impostors = np.sort(np.concatenate(pairs))
    for fmr in FMRS:
        t = found.points[fmr].threshold
        assert t.value is not None
        assert t.far == pytest.approx((impostors >= t.value).mean())
        assert (impostors >= t.value).mean() <= fmr
        below = impostors[impostors < t.value].max()
        assert (impostors >= below).mean() > fmr
        assert t.low is not None
        assert t.high is not None
        assert t.low <= t.value <= t.high
    assert found.points[0.01].threshold.note is None
    assert "indicative" in str(found.points[0.001].threshold.note)
    assert found.impostor_mean == pytest.approx(impostors.mean())
    assert found.impostor_spread == pytest.approx(impostors.std())


def test_too_few_people_support_no_threshold_and_no_rate() -> None:
    found = judge_gate(*faces(20, 3, 2), draws=DRAWS, rng=np.random.default_rng(0))
    assert found.points[0.01].threshold.value is None
    embeddings, people = faces(20, 2, 3)
    targets = Targets(people[::2], embeddings[::2], grouped(embeddings[1::2], 1))
    metrics, _, _ = verdicts(embeddings[::2], targets, found, {}, np.random.default_rng(0))
    assert metrics["sar1@fmr=0.01"]["value"] is None
    assert "190 identity pairs" in metrics["sar1@fmr=0.01"]["why"]
    assert metrics["identity_similarity"]["value"] == pytest.approx(1)
    alone = judge_gate(*faces(1, 3, 2), draws=DRAWS, rng=np.random.default_rng(0))
    assert "one identity" in str(alone.auc.why)


def test_impostors_succeed_at_the_false_match_rate_and_the_person_does_not(judged_by: JudgeGate) -> None:
    photos, _ = faces(600, 4, 4)
    strangers, _ = faces(600, 1, 5)
    sets = grouped(photos, 4)
    targets = Targets(np.arange(600), np.stack([s[0] for s in sets]), [s[1:] for s in sets])
    rivals = {"genuine": np.stack([s[1] for s in sets])}
    metrics, baselines, mean = verdicts(strangers, targets, judged_by, rivals, np.random.default_rng(0))
    for name in ("sar1@fmr=0.01", "sar2@fmr=0.01"):
        assert metrics[name]["chance"] == 0.01
        assert metrics[name]["low"] <= 0.01 <= metrics[name]["high"]
        assert metrics[name]["value"] < 0.02
        assert baselines["genuine"][name]["value"] > 0.5
    assert metrics["identity_similarity"]["value"] == pytest.approx(judged_by.impostor_mean, abs=0.02)
    assert metrics["identity_similarity"]["chance"] == pytest.approx(judged_by.impostor_mean, abs=0.005)
    assert abs(metrics["identity_z"]["value"]) < 0.15
    assert mean.mean() == pytest.approx(metrics["identity_similarity"]["value"])
    known = judged_by.tar[0.01].value
    assert baselines["genuine-photo"]["sar2@fmr=0.01"]["value"] == pytest.approx(known, abs=0.08)
    assert set(baselines["genuine-photo"]) == {"sar2@fmr=0.01", "sar2@fmr=0.001"}


def test_one_picture_for_everybody_is_no_better_than_chance_where_nobody_is_like_it(judged_by: JudgeGate) -> None:
    photos, people = faces(200, 2, 6)
    targets = Targets(people[::2], photos[::2], grouped(photos[1::2], 1))
    away = np.repeat(unit(np.random.default_rng(7).standard_normal((1, 16))), 200, axis=0)
    metrics, _, _ = verdicts(away, targets, judged_by, {}, np.random.default_rng(0))
    assert metrics["sar1@fmr=0.01"]["value"] == 0
    assert metrics["sar1@fmr=0.01"]["high"] >= 1 - 0.025 ** (1 / 200) - 1e-9  # Clopper-Pearson for none of 200
    assert metrics["identity_z"]["high"] < 0


def test_one_picture_that_is_like_everybody_is_at_chance(judged_by: JudgeGate) -> None:
    """A mean face, or what a judge makes of noise: nearer to all photos than people are to each other, and of nobody."""
    photos, people = faces(200, 2, 6)
    targets = Targets(people[::2], photos[::2], grouped(photos[1::2], 1))
    like = np.repeat(unit(np.ones((1, 16))), 200, axis=0)
    for of in (targets, replace(targets, photos=None)):
        metrics, _, _ = verdicts(like, of, judged_by, {}, np.random.default_rng(0))
        assert metrics["identity_z"]["low"] > 0
        for name in ("identity_similarity", "identity_z"):
            assert metrics[name]["low"] <= metrics[name]["chance"] == pytest.approx(metrics[name]["value"], abs=1e-4)
    genuine = verdicts(photos[1::2], targets, judged_by, {}, np.random.default_rng(0))[0]["identity_z"]
    assert genuine["low"] > genuine["chance"]


def test_sar2_is_the_share_of_the_other_photos_that_accept(judged_by: JudgeGate) -> None:
    picture, far = unit(np.eye(16)[:1])[0], unit(np.eye(16)[1:2])[0]
    others = [np.stack([picture, picture, far, far]), np.stack([far]), np.empty((0, 16))]
    targets = Targets(np.arange(3), None, others)
    metrics, baselines, mean = verdicts(np.stack([picture] * 3), targets, judged_by, {}, np.random.default_rng(0))
    assert metrics["sar2@fmr=0.01"]["value"] == pytest.approx(0.25)  # one half, and none; the third cannot be asked
    assert "1 targets have no other photo" in metrics["sar2@fmr=0.01"]["note"]
    assert set(metrics) == {"sar2@fmr=0.01", "sar2@fmr=0.001", "identity_similarity", "identity_z"}
    assert metrics["identity_similarity"]["value"] == pytest.approx(0.25)
    assert baselines == {}
    assert np.allclose(mean[:2], [0.5, 0])
    assert np.isnan(mean[2])


def test_photos_of_one_person_are_one_piece_of_evidence(judged_by: JudgeGate) -> None:
    photos, _ = faces(40, 1, 8)
    alone = Targets(np.arange(40), photos, [photos[i : i + 1] for i in range(40)])
    shared = Targets(np.arange(40) // 20, photos, alone.others)
    found = np.concatenate([photos[:20], -photos[20:]])
    each, by_person = (
        verdicts(found, targets, judged_by, {}, np.random.default_rng(0))[0]["sar1@fmr=0.01"]
        for targets in (alone, shared)
    )
    assert each["value"] == by_person["value"] == pytest.approx(0.5)
    assert (each["n"], by_person["n"]) == (40, 2)
    assert 0.29 < each["high"] - each["low"] < 0.4  # Clopper-Pearson for 20 of 40 is 0.32 wide
    assert (by_person["low"], by_person["high"]) == (0, 1)  # one person is accepted, the other is not


def test_another_is_always_somebody_else() -> None:
    people = np.array([0, 0, 1, 2, 2])
    swapped = another(people)
    assert swapped is not None
    assert (people[swapped] != people).all()
    assert another(np.zeros(3, dtype=int)) is None
