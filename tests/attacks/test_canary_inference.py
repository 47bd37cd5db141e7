"""Canaries in updates: the read-out against a loop and against sums of which all is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.canary_inference import CanaryInference, elsewhere
from attacks.photo_gradients import PhotoGradients, products, sketch
from fedgc import heads
from fedgc.canaries import plan_planting
from fedgc.errors import RefusedError
from fedgc.rng import generator
from fedgc.types import HEAD, Canaries, Observation, ObservedUpdate


@pytest.fixture
def canaries(world) -> Canaries:
    plan = plan_planting(world("fedgc", batch=2, kind="round").parties, 24, 32, seed=3)
    return Canaries(plan.photos.float() / 255, plan.classes, plan.clients)


def seen(world, canaries: Canaries, algorithm: str = "fedgc", seat: str = "server") -> Observation:
    return replace(world(algorithm, batch=2, kind="round").seen_by(seat), canaries=canaries)


def with_canaries(observation: Observation, inside: torch.Tensor, noise: float) -> Observation:
    """The observation with updates that are sums of the unit gradients of the canaries inside, and noise in every coordinate."""
    canaries, constants = observation.canaries, observation.public_constants
    made: list[ObservedUpdate] = []
    draw = generator("noise")
    for update in observation.client_updates:
        photo = PhotoGradients(update, constants)
        mine = inside & (canaries.clients == update.clients[0])
        labels = torch.tensor([update.classes.index(c) for c in canaries.classes[mine].tolist()])
        each = torch.cat(list(photo.each(canaries.images[mine], labels)))
        total = (each / each.norm(dim=1, keepdim=True)).sum(dim=0)
        total += noise * torch.randn(len(total), generator=draw)
        parts = total.split([p.numel() for p in photo.trained.values()])
        named = zip(photo.trained.items(), parts, strict=True)
        made.append(replace(update, delta={n: -constants.lr_of(n) * x.view_as(p) for (n, p), x in named}))
    return replace(observation, client_updates=tuple(made))


def test_gradients_of_single_photos_are_those_of_a_loop(world, canaries) -> None:
    observation = seen(world, canaries)
    update = observation.client_updates[0]
    photo = PhotoGradients(update, observation.public_constants)
    labels = torch.arange(5)
    found = torch.cat(list(photo.each(canaries.images[:5], labels)))
    parameters = list(photo.model.parameters())
    for i in range(5):
        loss = heads.loss(photo.model(canaries.images[i : i + 1]), labels[i : i + 1], photo.spec)
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(found[i], wanted, rtol=1e-3, atol=1e-4)
    mean = photo.mean(canaries.images[:5], 2)
    each = torch.cat(list(photo.each(canaries.images[:5], torch.full((5,), 2))))
    torch.testing.assert_close(mean[0], each.mean(dim=0), rtol=1e-3, atol=1e-4)


def test_the_update_is_divided_by_each_tensors_learning_rate(world, canaries) -> None:
    observation = seen(world, canaries)
    update, constants = observation.client_updates[0], observation.public_constants
    observed = PhotoGradients(update, constants).observed
    rows = update.delta[HEAD].numel()
    torch.testing.assert_close(observed[-rows:], -update.delta[HEAD].flatten() / (constants.lr * 2))


def test_products_by_sketch_are_near_the_exact_ones(monkeypatch) -> None:
    rows, observed = torch.randn(6, 5000, generator=generator(1)), torch.randn(5000, generator=generator(2))
    along, gram, lengths = products([rows[:4], rows[4:]], 6, observed, generator(0))
    unit = (rows / rows.norm(dim=1, keepdim=True)).double()
    torch.testing.assert_close(gram, unit @ unit.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(along, unit @ observed.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(lengths, rows.norm(dim=1).double())
    monkeypatch.setattr("attacks.photo_gradients.HELD", 100)
    monkeypatch.setattr("attacks.photo_gradients.sketch", lambda x: sketch(x, 2000))
    again, near, _ = products([rows], 6, observed, generator(0))
    torch.testing.assert_close(again, along)
    torch.testing.assert_close(near, gram, rtol=0, atol=0.1)
    assert not torch.equal(near, gram)


def test_what_is_inside_is_read_out_of_a_noised_sum(world, canaries) -> None:
    inside = torch.rand(24, generator=generator("coins")) < 0.5
    observation = with_canaries(seen(world, canaries), inside, noise=0.15)
    target, control = CanaryInference()(observation, generator(0)).scores
    assert float(target[inside].min()) > float(target[~inside].max())
    assert float(control.mean()) == pytest.approx(0, abs=1e-5)
    assert float(control.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_evidence_does_not_depend_on_the_learning_rate(world, canaries) -> None:
    inside = torch.arange(24) < 12
    observation = with_canaries(seen(world, canaries), inside, noise=0.1)
    slower = replace(observation.public_constants, lr=observation.public_constants.lr / 10)
    updates = tuple(replace(u, delta={n: x / 10 for n, x in u.delta.items()}) for u in observation.client_updates or ())
    late = replace(observation, public_constants=slower, client_updates=updates)
    one, two = (CanaryInference()(o, generator(0)).scores for o in (observation, late))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_gradient_shorter_than_the_clipping_norm_weighs_less(world, canaries) -> None:
    observation = seen(world, canaries)
    card = {"name": "dp-sgd", "noise_multiplier": 1.0, "max_grad_norm": 1e4}
    clipped = replace(observation, public_constants=replace(observation.public_constants, defense=card))
    plain, weighed = (CanaryInference()(o, generator(0)).scores for o in (observation, clipped))
    assert torch.equal(plain.sign(), weighed.sign())
    assert (weighed.abs() < 0.1 * plain.abs()).all()


def test_the_image_in_a_candidates_place_is_another_clients() -> None:
    clients = torch.tensor([0, 1, 1, 2, 0])
    assert elsewhere(clients).tolist() == [1, 3, 3, 4, 1]
    assert elsewhere(torch.zeros(3, dtype=torch.long)).tolist() == [0, 1, 2]


def test_candidates_of_clients_whose_updates_are_not_seen_are_not_spoken_of(world, canaries) -> None:
    observation = seen(world, canaries)
    first = replace(observation, client_updates=observation.client_updates[:1])
    scores = CanaryInference()(first, generator(0)).scores
    assert not scores[:, canaries.clients == 1].any()
    assert scores[0, canaries.clients == 0].all()


def test_a_client_reads_the_mean_of_the_others_where_rows_are_shared(world, canaries) -> None:
    others = canaries.clients == 1
    theirs = Canaries(canaries.images[others], canaries.classes[others], canaries.clients[others])
    scores = CanaryInference()(seen(world, theirs, "fedavg", "client"), generator(0)).scores
    assert scores.shape == (2, 12)
    assert scores.isfinite().all()


@pytest.mark.parametrize(("algorithm", "seat"), [("fedgc", "client"), ("fedpe", "server"), ("fedgc", "server-secagg")])
def test_seats_without_the_class_embeddings_are_refused(world, canaries, algorithm: str, seat: str) -> None:
    with pytest.raises(RefusedError, match="class embeddings for it do not reach"):
        CanaryInference()(seen(world, canaries, algorithm, seat), generator(0))


def test_an_outsider_is_refused(world, canaries) -> None:
    with pytest.raises(RefusedError, match="needs auxiliary-faces"):
        CanaryInference()(seen(world, canaries, "fedavg", "outsider"), generator(0))
