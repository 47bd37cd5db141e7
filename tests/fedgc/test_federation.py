"""The round loop against plain loops written here, and the identities that tie the algorithms together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.dp_sgd import DPSGD
from defenses.none import NoDefense
from fedgc import heads
from fedgc.algorithms import Push
from fedgc.client import round_half_up
from fedgc.correction import gradient
from fedgc.errors import WorkFailedError
from fedgc.federation import Federation
from fedgc.heads import initial_rows
from fedgc.local import augment, epoch_batches
from fedgc.models import build_model
from fedgc.rng import generator
from fedgc.schedule import Party, Schedule
from fedgc.threats import THREATS
from fedgc.types import BACKBONE, HEAD, State, Transcript
from fedgc.victims import manifest_hash, victims

SERVER = {"server_momentum": 0.8, "server_lr": 0.5}
EVERY = ("centralized", "fedavg", "fedpe", "fedgc")
NOISY = DPSGD(noise_multiplier=1.0, delta=1e-2)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=atol)


def same_state(a: State, b: State) -> bool:
    return same(a.backbone, b.backbone) and torch.equal(a.rows, b.rows) and (a.round, a.ledger) == (b.round, b.ledger)


def same_transcript(a: Transcript, b: Transcript) -> bool:
    updates = a.updates.keys() == b.updates.keys()
    updates = updates and all(same(a.updates[k].tensors, b.updates[k].tensors) for k in a.updates)
    returned = a.returned.keys() == b.returned.keys() and all(same(a.returned[k], b.returned[k]) for k in a.returned)
    return updates and returned and same(a.broadcast, b.broadcast) and same(a.released, b.released)


def played(federation: Federation, rounds: int = 2) -> State:
    state = federation.initial_state()
    for _ in range(rounds):
        state = federation.play(state).state
    return state


def merged(parties: list[Party]) -> list[Party]:
    """All photos in the hands of one party."""
    classes = tuple(c for p in parties for c in p.classes)
    return [Party(0, torch.cat([p.photos for p in parties]), torch.cat([p.labels for p in parties]), classes)]


# -- against plain SGD


def sgd(federation: Federation, rounds: int) -> dict[str, Tensor]:
    """One party's training, from the definitions: shuffled epochs, cosface, clipped gradients, heavy ball."""
    (party,), s, spec = federation.parties, federation.schedule, federation.spec
    model = build_model(spec, len(party.classes), federation.seed)
    with torch.no_grad():
        model.head.weight.copy_(initial_rows(len(party.classes), 16, generator(federation.seed, "rows")))
    named = dict(model.named_parameters())
    for t in range(1, rounds + 1):
        velocity = {name: torch.zeros_like(p) for name, p in named.items()}
        order = torch.randperm(len(party.photos), generator=generator(federation.seed, "batches", t, 0))
        for index in order.split(s.batch_size):
            x, y = party.photos[index].float() / 255, party.labels[index]
            logits = spec.scale * (model(x) - spec.margin_size * F.one_hot(y, len(party.classes)))
            grads = torch.autograd.grad(F.cross_entropy(logits, y), list(named.values()))
            length = torch.cat([g.flatten() for g in grads]).norm()
            shorten = min(1.0, float(s.clip_norm / length)) if s.clip_norm else 1.0
            for (name, p), g in zip(named.items(), grads, strict=True):
                lr = s.lr_at(t) * (s.head_lr_factor if name == HEAD else 1)
                velocity[name] = s.momentum * velocity[name] + shorten * g + s.weight_decay * p.detach()
                p.data -= lr * velocity[name]
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("algorithm", ["centralized", "fedavg"])
def test_one_client_is_plain_sgd(federation, parties, algorithm: str, clip_norm: float | None) -> None:
    one = federation(algorithm, clients=parties[:1], clip_norm=clip_norm)
    state = played(one, rounds=2)
    close({**state.backbone, HEAD: state.rows}, sgd(one, rounds=2), atol=2e-6)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_one_client_is_centralized(federation, parties, algorithm: str) -> None:
    one, whole = (played(federation(a, clients=merged(parties))) for a in (algorithm, "centralized"))
    close(one.backbone, whole.backbone)
    torch.testing.assert_close(one.rows, whole.rows)


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc"])
def test_a_recorded_step_is_minus_the_learning_rate_times_the_gradient(
    federation, parties, algorithm: str, margin: str
) -> None:
    fed = federation(algorithm, weight_decay=0.02, momentum=0.9, augment=True)
    fed.spec = replace(fed.spec, margin=margin)
    state = fed.play(fed.initial_state()).state
    photos, labels = victims(parties, 2, 6, seed=0)[0]
    transcript, truth = fed.play_step(state, 0, photos, labels)
    lr = fed.schedule.lr_at(2)
    for k, party in enumerate(parties):
        rows = list(range(7)) if algorithm == "fedavg" else list(party.classes)
        model = build_model(fed.spec, len(rows))
        model.load_state_dict({**state.backbone, HEAD: state.rows[rows]})
        y = labels[k] - rows[0]
        cosine = model(truth.images[k])
        logits = [fed.spec.scale * by_hand(c, int(t), margin) for c, t in zip(cosine, y, strict=True)]
        F.cross_entropy(torch.stack(logits), y).backward()
        expected = {
            name: -lr * (2.0 if name == HEAD else 1.0) * (p.grad + 0.02 * p.detach())
            for name, p in model.named_parameters()
        }
        close(transcript.updates[k].tensors, expected)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_recorded_update_of_several_steps_is_what_the_optimiser_makes_of_them(
    federation, parties, clip: float | None
) -> None:
    """The same photos at every step, with momentum, weight decay and clipping as in training."""
    fed = federation("fedgc", weight_decay=0.02, momentum=0.9, augment=True, clip_norm=clip)
    state = fed.initial_state()
    photos, labels = victims(parties, 2, 6, seed=0)[0]
    transcript, truth = fed.play_step(state, 0, photos, labels, steps=3)
    assert (transcript.constants.steps, transcript.constants.momentum, transcript.constants.augmented) == (
        3,
        0.9,
        False,
    )
    party, lr = parties[0], fed.schedule.lr_at(1)
    model = build_model(fed.spec, len(party.classes))
    model.load_state_dict({**state.backbone, HEAD: state.rows[list(party.classes)]})
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(3):
        model.zero_grad()
        heads.loss(model(truth.images[0]), labels[0] - party.classes[0], fed.spec).backward()
        length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / float(length))
        for name, p in model.named_parameters():
            velocity[name] = 0.9 * velocity[name] + factor * p.grad + 0.02 * p.detach()
            p.data -= lr * (2.0 if name == HEAD else 1.0) * velocity[name]
    before = {**state.backbone, HEAD: state.rows[list(party.classes)]}
    close(transcript.updates[0].tensors, {n: p.detach() - before[n] for n, p in model.named_parameters()})


def test_a_defense_plans_for_the_steps_that_are_taken(federation, parties, monkeypatch) -> None:
    plans = []
    taken = NoDefense.local_training
    monkeypatch.setattr(NoDefense, "local_training", lambda self, *a: (plans.append(a[3]), taken(self, *a))[1])
    fed = federation("fedgc")
    fed.play_step(fed.initial_state(), 0, *victims(parties, 2, 6, seed=0)[0], steps=4)
    assert {(p.images, p.batch_size, p.steps) for p in plans} == {(2, 2, 4)}


def by_hand(cosines: Tensor, label: int, margin: str) -> Tensor:
    change = {"none": lambda c: c, "cosface": lambda c: c - 0.2, "arcface": lambda c: (c.acos() + 0.2).cos()}
    return torch.stack([change[margin](c) if j == label else c for j, c in enumerate(cosines)])


def test_clipping_shortens_the_gradient_of_a_batch(federation, parties) -> None:
    photos, labels = victims(parties, 2, 6, seed=0)[0]
    fed = federation("fedgc", clip_norm=1e-2, weight_decay=0.0)
    transcript, _ = fed.play_step(fed.initial_state(), 0, photos, labels)
    for update in transcript.updates.values():
        steps = [delta / transcript.constants.lr_of(name) for name, delta in update.tensors.items()]
        length = torch.cat([s.flatten() for s in steps]).norm()
        assert float(length) == pytest.approx(1e-2, rel=1e-3)


# -- aggregation


@pytest.mark.parametrize("algorithm", EVERY[1:])
def test_the_server_adds_the_mean_of_updates_weighted_by_photos(federation, algorithm: str) -> None:
    fed = federation(algorithm)
    state = fed.play(fed.initial_state()).state
    result = fed.play(state)
    t, photos = result.transcript, {0: 8, 1: 9, 2: 12}
    assert {k: u.num_examples for k, u in t.updates.items()} == photos == t.examples
    for name, before in t.broadcast.items():
        mean = sum(photos[k] / 29 * u.tensors[name] for k, u in t.updates.items())
        torch.testing.assert_close(t.released[name], before + mean, rtol=1e-5, atol=1e-7)
    close(result.state.backbone, {k: v for k, v in t.released.items() if k != HEAD}, atol=0)


def test_fedgc_stacks_and_corrects(federation, parties) -> None:
    fed = federation("fedgc")
    before = fed.play(fed.initial_state()).state
    result = fed.play(before)
    t = result.transcript
    stacked = torch.cat([before.rows[list(p.classes)] + t.updates[p.client].tensors[HEAD] for p in parties])
    step = 3.0 * fed.schedule.lr_at(2)
    expected = stacked - step * gradient(stacked, torch.tensor(fed.owners), 8.0)
    torch.testing.assert_close(result.state.rows, expected)
    assert (expected - stacked).norm() > 1e-4 * stacked.norm()
    for p in parties:
        assert torch.equal(t.returned[p.client][HEAD], result.state.rows[list(p.classes)])


def test_fedgc_without_weight_is_fedpe_bit_for_bit(federation) -> None:
    gc, pe = (played(federation(a, push=Push(weight=0.0))) for a in ("fedgc", "fedpe"))
    assert same(gc.backbone, pe.backbone)
    assert torch.equal(gc.rows, pe.rows)
    corrected = played(federation("fedgc"))
    assert not torch.equal(corrected.rows, pe.rows)


def test_private_rows_train_at_home_and_stay_there(federation) -> None:
    fed = federation("fedpe")
    start = fed.initial_state()
    result = fed.play(start)
    assert (result.state.rows - start.rows).norm(dim=1).min() > 0
    t = result.transcript
    assert all(name.startswith(BACKBONE) for u in t.updates.values() for name in u.tensors)
    assert not t.sent
    assert not t.returned
    assert not t.rows


def test_the_server_adds_its_momentum(federation) -> None:
    """θ_t = θ_{t-1} + η m_t with m_t = β m_{t-1} + the mean update (FedAvgM), and what a client must subtract is on record."""
    fed = federation("fedavg", server_momentum=0.8, server_lr=0.5)
    state, m = fed.initial_state(), None
    for _ in range(3):
        result = fed.play(state)
        t = result.transcript
        carried = {name: 0.8 * v for name, v in m.items()} if m else {}
        close(t.carried, carried)
        mean = {n: sum(t.weight(k) * u.tensors[n] for k, u in t.updates.items()) for n in t.broadcast}
        m = {name: v + carried.get(name, 0) for name, v in mean.items()}
        close(t.released, {name: v + 0.5 * m[name] for name, v in t.broadcast.items()})
        close(result.state.momentum, m)
        others = THREATS["client"].observe(t, seat=0).aggregate
        rest = {n: sum(t.weight(k) * t.updates[k].tensors[n] for k in (1, 2)) / (1 - t.weight(0)) for n in t.broadcast}
        close(others.delta, rest, atol=2e-6)
        state = result.state


def test_who_trains_alone_has_no_server(federation, parties) -> None:
    plain, slowed = (federation("centralized", clients=merged(parties), **more) for more in ({}, SERVER))
    assert same_state(played(plain), played(slowed))


def test_without_momentum_nothing_is_carried(federation) -> None:
    result = federation("fedgc").play(federation("fedgc").initial_state())
    assert not result.state.momentum
    assert not result.transcript.carried


@pytest.mark.parametrize("algorithm", ["fedcos", "fedaws"])
def test_the_ablations_differ_from_fedgc_by_the_push_alone(federation, algorithm: str) -> None:
    """From the same state the same updates; without weight the same round."""
    fed, gc = federation(algorithm), federation("fedgc")
    state = fed.initial_state()
    one, other = fed.play(state), gc.play(state)
    assert all(same(u.tensors, other.transcript.updates[k].tensors) for k, u in one.transcript.updates.items())
    assert not torch.equal(one.state.rows, other.state.rows)
    still = federation(algorithm, push=Push(weight=0.0)).play(state)
    assert torch.equal(still.state.rows, federation("fedgc", push=Push(weight=0.0)).play(state).state.rows)


def test_the_weight_counts_the_pushes_of_centralised_training(federation) -> None:
    """Local steps a round over people, times the head's share of the rate: photos 8, 9, 12 in batches of 4, 7 people."""
    assert federation("fedgc", push=Push(), local_epochs=2).push_weight == pytest.approx(2.0 * 2 * (2 + 3 + 3) / 7)
    assert federation("fedgc", push=Push(weight=0.25)).push_weight == 0.25


def test_only_the_updates_asked_for_are_kept(federation) -> None:
    fed = federation("fedgc")
    state = fed.initial_state()
    whole, some = fed.play(state), fed.play(state, keep=lambda client: client == 1)
    assert same_state(whole.state, some.state)
    assert set(some.transcript.updates) == {1}
    assert some.transcript.examples == whole.transcript.examples
    assert same(some.transcript.released, whole.transcript.released)


@pytest.mark.parametrize("algorithm", ["fedgc", "fedaws", "fedpe"])
def test_one_person_a_client_trains(federation, parties, algorithm: str) -> None:
    """Softmax over one class is constant; the pull is not, and a server that pushes keeps the people apart."""
    singles, photos = [], torch.cat([p.photos for p in parties])
    labels = torch.cat([p.labels for p in parties])
    for c in range(7):
        mine = labels == c
        singles.append(Party(c, photos[mine], labels[mine], (c,)))
    fed = federation(algorithm, clients=singles, push=Push(weight=20.0), rounds=8)
    state = played(fed, rounds=8)
    start = fed.initial_state()
    assert not same(state.backbone, start.backbone)
    E = F.normalize(state.rows, dim=1)
    nearest = (E @ E.T - 2 * torch.eye(7)).max()
    plain = F.normalize(played(federation("fedpe", clients=singles, rounds=8), rounds=8).rows, dim=1)
    if algorithm != "fedpe":
        assert nearest < (plain @ plain.T - 2 * torch.eye(7)).max() - 0.05


# -- a round is a function of the state before it


@pytest.mark.parametrize("defense", [None, NOISY], ids=["none", "dp-sgd"])
@pytest.mark.parametrize("algorithm", EVERY)
def test_a_round_is_a_function_of_its_state(federation, parties, algorithm: str, defense: DPSGD | None) -> None:
    """Twice the same, in another process's federation too, recorded or not, whatever the global generator holds."""
    clients = merged(parties) if algorithm == "centralized" else parties
    fed, other = (federation(algorithm, clients=clients, defense=defense, augment=True) for _ in range(2))
    state = fed.play(fed.initial_state()).state
    kept = State(state.round, {k: v.clone() for k, v in state.backbone.items()}, state.rows.clone(), state.ledger)
    first = fed.play(state)
    photos, labels = victims(clients, 2, 4, seed=0)[0]
    torch.manual_seed(99)
    recorded = [fed.play_step(state, 0, photos, labels)[0] for _ in range(2)]
    assert same_transcript(*recorded)
    again, elsewhere = fed.play(state), other.play(state)
    assert same_state(state, kept)
    for result in (again, elsewhere):
        assert same_state(result.state, first.state)
        assert same_transcript(result.transcript, first.transcript)
        assert result.loss == first.loss


def test_the_initial_state_does_not_remember_training(federation) -> None:
    fed = federation()
    before = fed.initial_state()
    trained = fed.play(before).state
    assert not same(trained.backbone, before.backbone)
    assert same_state(fed.initial_state(), before)


def test_clients_do_not_see_each_other_train(federation, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation("fedgc")
    state = fed.initial_state()
    forward = fed.play(state)
    everybody = fed.participants(1)
    monkeypatch.setattr(fed, "participants", lambda round: everybody[::-1])
    backward = fed.play(state)
    for k, update in forward.transcript.updates.items():
        assert same(update.tensors, backward.transcript.updates[k].tensors)
    close(forward.state.backbone, backward.state.backbone, atol=1e-7)


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_and_rounds_draw_differently(federation, seed: int) -> None:
    one, other = (federation("fedgc", seed=s) for s in (seed, seed + 1))
    assert not torch.equal(one.initial_state().rows, other.initial_state().rows)
    state = one.initial_state()
    a, b = (f.play(state).transcript.updates[0].tensors[HEAD] for f in (one, other))
    assert not torch.equal(a, b)  # batches in another order


def test_participants_depend_on_seed_and_round_alone(federation, parties) -> None:
    def drawn(algorithm: str, seed: int, participation: float = 0.67) -> list[list[int]]:
        fed = federation(algorithm, seed=seed, participation=participation)
        return [[p.client for p in fed.participants(t)] for t in range(1, 30)]

    assert drawn("fedgc", 0) == drawn("fedavg", 0)
    assert drawn("fedgc", 0) != drawn("fedgc", 1)
    assert {len(clients) for clients in drawn("fedgc", 0)} == {2}
    assert {k for clients in drawn("fedgc", 0) for k in clients} == {0, 1, 2}
    assert {len(clients) for clients in drawn("fedgc", 0, participation=0.01)} == {1}
    assert all(clients == [0, 1, 2] for clients in drawn("fedgc", 0, participation=1.0))


@pytest.mark.parametrize("algorithm", ["fedpe", "fedgc"])
def test_who_stays_away_sends_nothing(federation, parties, algorithm: str) -> None:
    fed = federation(algorithm, participation=0.67, push=Push(weight=0.0))
    state = fed.initial_state()
    result = fed.play(state)
    (absent,) = {0, 1, 2} - set(result.transcript.updates)
    rows = list(parties[absent].classes)
    assert torch.equal(result.state.rows[rows], state.rows[rows])
    assert absent not in result.transcript.examples
    assert result.transcript.weight(absent) == 0
    assert sum(result.transcript.weight(k) for k in range(3)) == pytest.approx(1)


# -- what local training does at its edges


def test_a_loss_that_is_not_finite_stops_before_anything_is_sent(federation) -> None:
    fed = federation("fedgc")
    state = fed.initial_state()
    state.backbone["backbone.embedding.bias"][0] = torch.nan
    with pytest.raises(WorkFailedError, match=r"client 0 diverged \(loss nan.*Lower federation\.lr"):
        fed.play(state)


def test_an_update_that_is_not_finite_is_never_sent(federation) -> None:
    """The loss of the last step is finite; what that step does to the weights is not."""
    fed = federation("fedgc", lr=60.0, weight_decay=3e38, batch_size=64)
    with pytest.raises(WorkFailedError, match="client 0"):
        fed.play(fed.initial_state())


@pytest.mark.parametrize(
    ("count", "size", "lengths"),
    [(6, 4, [4, 2]), (5, 4, [4]), (3, 4, [3]), (1, 4, [1]), (3, 1, [1, 1, 1]), (4, 4, [4])],
)
def test_epochs_are_shuffled_batches(count: int, size: int, lengths: list[int]) -> None:
    batches = list(epoch_batches(count, size, 2, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == 2 * lengths
    for epoch in (batches[: len(lengths)], batches[len(lengths) :]):
        photos = torch.cat(epoch).tolist()
        assert len(set(photos)) == len(photos) == sum(lengths)
        assert set(photos) <= set(range(count))


def test_single_photo_batches_train(federation) -> None:
    result = federation("fedgc", batch_size=1).play(federation("fedgc").initial_state())
    assert result.images == 29
    assert all(u.tensors[HEAD].norm() > 0 for u in result.transcript.updates.values())


def test_augmentation_moves_each_photo_by_its_own_amount() -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    moved, again = (augment(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(moved, again)
    assert moved.shape == x.shape
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert len({float(m.sum()) for m in moved}) == 6


def test_the_learning_rate_warms_up_and_falls() -> None:
    s = Schedule(10, 1, 4, 0.3, 2.0, 0.9, 0.0, None, 1.0, Push(), False, warmup_rounds=2)
    rates = [s.lr_at(t) for t in range(1, 11)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[2] <= 0.3
    assert all(a > b > 0 for a, b in pairwise(rates[2:]))


@pytest.mark.parametrize(("x", "whole"), [(0.4, 0), (0.5, 1), (1.5, 2), (2.5, 3), (2.49, 2)])
def test_halves_are_rounded_up(x: float, whole: int) -> None:
    assert round_half_up(x) == whole


# -- the manifest of recorded photos


def test_victims_are_drawn_without_repetition_from_their_own_client(parties) -> None:
    steps = victims(parties, 2, 18, seed=0)
    assert len(steps) == 3
    for k, party in enumerate(parties):
        photos = torch.cat([photos[k] for photos, _ in steps])
        labels = torch.cat([labels[k] for _, labels in steps])
        found = [[i for i, own in enumerate(party.photos) if torch.equal(own, x)] for x in photos]
        assert all(len(f) == 1 for f in found)
        index = [f[0] for f in found]
        assert len(set(index)) == 6
        assert torch.equal(party.labels[index], labels)


def test_victims_depend_on_photos_and_seed_alone(federation, parties) -> None:
    """Every cell of a comparison is attacked on the same photos."""
    manifests = {
        manifest_hash(victims(federation(a, defense=d).parties, 2, 6, seed=0))
        for a in ("fedavg", "fedpe", "fedgc")
        for d in (None, NOISY)
    }
    assert len(manifests) == 1
    assert manifest_hash(victims(parties, 2, 6, seed=1)) not in manifests


@pytest.mark.parametrize(
    ("batch", "count", "steps"), [(1, 3, 1), (1, 4, 2), (4, 100, 2), (8, 8, 1), (9, 9, 0), (1, 0, 0)]
)
def test_as_many_victims_as_asked_for_or_as_there_are(parties, batch: int, count: int, steps: int) -> None:
    recorded = victims(parties, batch, count, seed=0)
    assert len(recorded) == steps
    assert all(photos.shape == (3, batch, 3, 32, 32) and labels.shape == (3, batch) for photos, labels in recorded)


def test_truth_is_what_was_trained_on(federation, parties) -> None:
    photos, labels = victims(parties, 2, 6, seed=0)[0]
    fed = federation("fedgc")
    transcript, truth = fed.play_step(fed.initial_state(), 0, photos, labels)
    assert truth.clients == (0, 1, 2)
    assert torch.equal((truth.images * 255).round().to(torch.uint8), photos)
    assert torch.equal(truth.labels, labels)
    assert transcript.kind == "step"
    assert (transcript.constants.batch_size, transcript.constants.steps, transcript.constants.momentum) == (2, 1, 0.0)
    assert transcript.examples == {0: 2, 1: 2, 2: 2}
