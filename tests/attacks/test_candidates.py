from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from attacks.candidates import CandidateMatch, Noise, Step, set_value
from attacks.subsets import evidence, nonnegative, projected, summed
from attacks.updates import targets
from defenses.dp_sgd import DPSGD
from fedgc import heads
from fedgc.errors import RefusedError
from fedgc.models import build_model
from fedgc.rng import generator
from fedgc.types import HEAD, Observation

DECOYS = 8


def dp(sigma: float, clip: float = 1.0) -> DPSGD:
    return DPSGD(noise_multiplier=sigma, max_grad_norm=clip)


def lined_up(world, threat: str = "server") -> Observation:
    """The victims of all clients come first, in order, then strangers."""
    photos = torch.cat([world.truth.images.flatten(0, 1), world.knowledge.auxiliary_faces[:DECOYS]])
    return replace(world.seen_by(threat), candidates=photos)


def named(observation: Observation, **settings) -> list[list[int]]:
    """For each update, as many candidates as it has photos: those of most evidence, in order of their numbers."""
    scores = CandidateMatch(**settings)(observation, generator(0)).scores
    return [
        sorted(row.argsort(descending=True)[: update.images].tolist())
        for row, update in zip(scores, targets(observation), strict=True)
    ]


# -- what it finds


@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc", "fedpe"])
def test_the_server_names_single_photos(world, algorithm: str) -> None:
    assert named(lined_up(world(algorithm))) == [[0], [1]]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc", "fedpe"])
def test_the_server_names_every_photo_of_a_batch(world, algorithm: str) -> None:
    assert named(lined_up(world(algorithm, batch=3))) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc", "fedpe"])
def test_another_client_names_the_photos_in_the_mean_of_the_others(world, algorithm: str) -> None:
    assert named(lined_up(world(algorithm, batch=2, clients=3), "client"), labels=2) == [[2, 3, 4, 5]]


@pytest.mark.parametrize(("algorithm", "batch"), [("fedavg", 1), ("fedgc", 1), ("fedgc", 3)])
def test_a_little_noise_hides_nothing(world, algorithm: str, batch: int) -> None:
    expected = [list(range(batch)), list(range(batch, 2 * batch))]
    assert named(lined_up(world(algorithm, batch=batch, defense=dp(0.03)))) == expected


def test_a_little_noise_does_not_help_a_backbone_alone_either(world) -> None:
    assert named(lined_up(world("fedpe", defense=dp(0.01)))) == [[0], [1]]


def test_evidence_of_noisy_rounds_adds_up(world) -> None:
    """Sixteen observations of one photo at a noise at which one of them often errs."""
    seen = lined_up(world(defense=dp(1e-6)))
    draw = generator("rounds")
    hits, total = 0, torch.zeros(len(seen.candidates))
    for _ in range(16):
        scores = CandidateMatch(labels=1)(noisier(seen, 0.7, draw), generator(0)).scores[0]
        hits, total = hits + (int(scores.argmax()) == 0), total + scores
    assert int(total.argmax()) == 0
    assert hits < 16


def noisier(seen: Observation, sigma: float, draw: torch.Generator) -> Observation:
    """The step as it would be with more noise of the same mechanism (C = 1, one photo)."""
    constants = seen.public_constants
    card = {**constants.defense, "noise_multiplier": sigma}
    one = seen.client_updates[0]
    delta = {n: d - constants.lr_of(n) * sigma * torch.randn(d.shape, generator=draw) for n, d in one.delta.items()}
    return replace(seen, client_updates=(replace(one, delta=delta),), public_constants=replace(constants, defense=card))


# -- controls


def test_an_update_of_noise_names_nobody_more_than_chance(world) -> None:
    seen = lined_up(world())
    draw, update = generator("noise"), seen.client_updates[0]
    few = replace(seen, candidates=seen.candidates[:6])
    hits = 0
    for _ in range(30):
        delta = {n: torch.randn(d.shape, generator=draw) * d.std() for n, d in update.delta.items()}
        hits += named(replace(few, client_updates=(replace(update, delta=delta),)), labels=1) == [[0]]
    assert hits <= 12  # of 30 at a chance of 1/6: exceeded once in a thousand


def test_a_lineup_without_the_victim_shows_little_evidence(world) -> None:
    seen = lined_up(world())
    scores = CandidateMatch()(replace(seen, candidates=seen.candidates[2:]), generator(0)).scores
    assert float(scores.max()) < 0.8
    assert float(CandidateMatch()(seen, generator(0)).scores.max()) > 0.999


def test_noise_that_drowns_the_photo_hides_it(world) -> None:
    """The score of the truth is then any candidate's: log-likelihoods differ by less than noise explains."""
    scores = CandidateMatch(labels=1)(lined_up(world(defense=dp(30.0))), generator(0)).scores
    assert float(scores.abs().max()) < 1


# -- the likelihood


def clipped_by_a_loop(update, constants, photo: Tensor, row: int, clip: float) -> Tensor:
    """The plain way: one photo's loss, its gradient over all parameters, shortened to the clipping norm."""
    model = build_model(constants.spec, len(update.classes)).double().eval()
    tensors = {n: t.double().requires_grad_() for n, t in update.before.items()}
    loss = heads.loss(functional_call(model, tensors, (photo[None],)), torch.tensor([row]), constants.spec)
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    whole = torch.cat([g.flatten() for g in gradients])
    return whole * min(1.0, clip / float(whole.norm()))


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e6])
def test_gradients_of_candidates_are_clipped_photo_by_photo(world, clip: float) -> None:
    this = world(batch=2, defense=dp(1.0, clip))
    seen = lined_up(this)
    update = seen.client_updates[0]
    before, delta = ({n: t.double() for n, t in part.items()} for part in (update.before, update.delta))
    step = Step.of(replace(update, before=before, delta=delta), seen.public_constants)
    names = [n for n in update.before if n in step.observed]
    assert list(step.observed) == names
    for photo, row in itertools.product(seen.candidates[:2].double(), (0, 4)):
        oracle = clipped_by_a_loop(update, seen.public_constants, photo, row, clip) / 2
        torch.testing.assert_close(step.gradients(photo[None], [row])[0], oracle, rtol=1e-9, atol=1e-12)


def test_opacus_sends_the_sum_that_the_likelihood_expects(world) -> None:
    this = world(batch=2, defense=dp(1e-6))
    seen = lined_up(this)
    step = Step.of(seen.client_updates[0], seen.public_constants)
    rows = this.truth.labels[0].tolist()
    expected = sum(step.gradients(x[None], [y])[0] for x, y in zip(this.truth.images[0], rows, strict=True))
    observed = torch.cat([g.flatten() for g in step.observed.values()])
    torch.testing.assert_close(observed, expected, rtol=1e-3, atol=2e-5)
    assert float(expected.norm()) > 0.5


@pytest.mark.parametrize(("threat", "clients", "times"), [("server", 2, 1.0), ("client", 3, 2**0.5)])
def test_the_noise_is_that_of_the_mechanism(world, threat: str, clients: int, times: float) -> None:
    """Per coordinate σC/B from one client, and √m of that over m·B photos from m."""
    seen = lined_up(world("fedavg", batch=2, clients=clients, defense=dp(50.0, 0.1)), threat)
    update = targets(seen)[0]
    noise = Noise.of(update, seen.public_constants)
    assert noise.deviation == pytest.approx(50 * 0.1 * times / update.images)
    step = Step.of(update, seen.public_constants)
    observed = torch.cat([g.flatten() for g in step.observed.values()])
    assert float(observed.std()) == pytest.approx(noise.deviation, rel=0.01)
    assert Noise.of(update, replace(seen.public_constants, defense={"name": "none"})) is None


@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc"])
def test_the_likely_rows_are_those_whose_gradients_match(world, algorithm: str) -> None:
    """Against the cosine of every row's whole gradient with the observed one; the row of the truth is the first."""
    this = world(algorithm, defense=dp(0.1))
    seen = lined_up(this)
    step = Step.of(seen.client_updates[1], seen.public_constants)
    observed = torch.cat([g.flatten() for g in step.observed.values()])
    row = seen.client_updates[1].classes.index(int(this.truth.labels[1, 0]))
    assert step.likely_rows(this.truth.images[1], 1) == [row]
    for photo in seen.candidates[2:5].split(1):
        trials = step.gradients(photo, range(len(seen.client_updates[1].classes)))
        match = (trials @ observed) / trials.norm(dim=1)
        assert int(match.argmax()) in step.likely_rows(photo, 2)


def test_the_log_likelihood_of_a_set_by_hand(world) -> None:
    seen = lined_up(world(batch=2, defense=dp(0.5)))
    update, constants = seen.client_updates[0], seen.public_constants
    value, owners = set_value(update, constants, seen.candidates[:3], labels=6)
    step = Step.of(update, constants)
    observed = torch.cat([g.flatten() for g in step.observed.values()]).double()
    pair = [next(a for a, k in enumerate(owners) if k == photo) for photo in (0, 2)]
    rows = [step.likely_rows(seen.candidates[k][None], 6)[0] for k in (0, 2)]
    model = sum(step.gradients(seen.candidates[k][None], [y])[0] for k, y in zip((0, 2), rows, strict=True)).double()
    reduction = observed.square().sum() - (observed - model).square().sum()
    assert value(pair) == pytest.approx(float(reduction) / (2 * (0.5 / 2) ** 2), rel=1e-3)
    assert sorted({*owners}) == [0, 1, 2]
    assert len(owners) == 18


def test_gradients_too_long_to_be_held_are_computed_again(world, monkeypatch) -> None:
    seen = lined_up(world(batch=2, defense=dp(0.5)))
    few = replace(seen, candidates=seen.candidates[:5])
    whole = CandidateMatch(labels=2)(few, generator(0)).scores
    monkeypatch.setattr("attacks.candidates.HELD", 1)
    torch.testing.assert_close(CandidateMatch(labels=2)(few, generator(0)).scores, whole, rtol=1e-3, atol=1e-3)


# -- sets of gradients, against least squares on the gradients themselves


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    A = rng.normal(size=(7, 12))
    return A, 0.7 * A[1] + 0.2 * A[4] + 0.1 * rng.normal(size=12)


def test_what_a_set_explains(vectors) -> None:
    from scipy.optimize import nnls

    A, t = vectors
    for chosen in ([], [3], [1, 4], [0, 2, 5]):
        plain = t @ t - np.square(t - A[chosen].sum(0)).sum()
        assert summed(A @ t, A @ A.T)(chosen) == pytest.approx(plain)
        fitted = t @ t - nnls(A[chosen].T, t)[1] ** 2 if chosen else 0.0
        assert nonnegative(A @ t, A @ A.T)(chosen) == pytest.approx(fitted, rel=1e-6, abs=1e-9)


def test_what_a_set_explains_under_any_derivative(vectors) -> None:
    H, _ = vectors
    T = np.random.default_rng(1).normal(size=(5, 12))
    for chosen in ([3], [1, 4], [0, 2, 5]):
        fit = np.linalg.lstsq(H[chosen].T, T.T, rcond=None)[0]
        expected = np.square(T).sum() - np.square(T.T - H[chosen].T @ fit).sum()
        assert projected(H @ T.T, H @ H.T)(chosen) == pytest.approx(expected, rel=1e-6)


def test_the_best_set_is_found_and_members_are_judged_beside_the_others(vectors) -> None:
    A, t = vectors
    value = nonnegative(A @ t, A @ A.T)
    scores, best = evidence(value, range(7), 2)
    everything = {pair: value(pair) for pair in itertools.combinations(range(7), 2)}
    assert max(everything, key=everything.__getitem__) == (1, 4)
    assert best == pytest.approx(everything[1, 4])
    assert scores[1] == pytest.approx(value([1, 4]) - value([4]))
    assert scores[0] == pytest.approx(value([1, 0]) - value([1]))  # in the place of 4, which adds least
    assert set(np.argsort(scores)[-2:]) == {1, 4}


def test_an_early_mistake_is_taken_back() -> None:
    """The one vector that explains most alone is in neither place of the best pair."""
    A = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.8, 0.8, 0.3]])
    t = np.array([1.0, 1.0, 0.0])
    value = summed(A @ t, A @ A.T)
    assert max(range(3), key=lambda j: value([j])) == 2
    scores, best = evidence(value, range(3), 2)
    assert best == pytest.approx(2.0)
    assert int(scores.argmin()) == 2


def test_a_candidate_takes_one_place_whatever_its_label() -> None:
    A = np.array([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])  # two labels of candidate 0
    t = np.array([2.0, 0.2])
    scores, best = evidence(summed(A @ t, A @ A.T), [0, 0, 1], 2)
    assert scores.shape == (2,)
    assert best == pytest.approx(max(summed(A @ t, A @ A.T)(s) for s in ([0, 2], [1, 2])))


@pytest.mark.parametrize(("signal", "success"), [(2.0, 0.32), (3.0, 0.68)])
def test_orthogonal_candidates_are_named_as_often_as_theory_says(signal: float, success: float) -> None:
    """Exact success of maximum likelihood among 100 orthogonal gradients of length C at √T/σ = signal."""
    rng = np.random.default_rng(5)
    gram = np.eye(100)
    hits = 0
    for _ in range(600):
        along = gram[0] + rng.normal(size=100) / signal
        hits += int(evidence(summed(along, gram), range(100), 1)[0].argmax()) == 0
    assert hits / 600 == pytest.approx(success, abs=0.045)


# -- refusals


def test_a_round_of_many_steps_is_refused(world) -> None:
    with pytest.raises(RefusedError, match="single step"):
        CandidateMatch()(lined_up(world(kind="round")), generator(0))


def test_no_candidates_is_refused(world) -> None:
    with pytest.raises(RefusedError, match=r"needs candidates \+ client-updates"):
        CandidateMatch()(world().seen_by("server"), generator(0))


def test_as_many_photos_as_candidates_is_refused(world) -> None:
    seen = lined_up(world(batch=3))
    with pytest.raises(RefusedError, match="3 candidates for 3 photos leave no choice"):
        CandidateMatch()(replace(seen, candidates=seen.candidates[:3]), generator(0))


def test_an_update_of_zeros_is_refused(world) -> None:
    seen = lined_up(world())
    still = tuple(replace(u, delta={name: d * 0 for name, d in u.delta.items()}) for u in seen.client_updates)
    with pytest.raises(RefusedError, match="client 0 is all zeros"):
        CandidateMatch()(replace(seen, client_updates=still), generator(0))


def test_a_backbone_alone_has_no_head_to_read(world) -> None:
    seen = lined_up(world("fedpe"))
    assert HEAD not in seen.client_updates[0].before
    assert not Step.of(seen.client_updates[0], seen.public_constants).sees_head
