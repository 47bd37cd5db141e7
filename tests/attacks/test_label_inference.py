"""The rules against gradients of real heads, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.label_inference import LabelInference, infer_labels
from attacks.updates import gradient
from fedgc import heads
from fedgc.errors import RefusedError
from fedgc.rng import generator
from fedgc.types import HEAD, LocalConstants, ModelSpec, ObservedUpdate

MARGINS = ("none", "cosface", "arcface")


def constants(margin: str) -> LocalConstants:
    spec = ModelSpec("small", "group", 64, 32, margin, 0.3, 16.0)  # type: ignore[arg-type]
    return LocalConstants(
        spec, lr=0.01, head_lr_factor=4.0, momentum=0.0, weight_decay=0.1, clip_norm=None, batch_size=1,
        steps=1, augmented=False,
    )  # fmt: skip


def one_step(
    labels: list[int], classes: int, pull: float, margin: str, seed: int
) -> tuple[ObservedUpdate, torch.Tensor]:
    """One SGD step of a cosine head on signed features, each drawn ``pull`` towards its class; and its
    gradient."""
    draw = generator("labels", seed)
    W = torch.randn(classes, 64, generator=draw, dtype=torch.float64)
    W *= 0.5 + torch.rand(classes, 1, generator=draw, dtype=torch.float64)
    y = torch.tensor(labels)
    z = torch.randn(len(y), 64, generator=draw, dtype=torch.float64) / 8 + pull * W[y] / W[y].norm(dim=1, keepdim=True)
    head = heads.CosineHead(classes, 64).double()
    head.load_state_dict({"weight": W})
    c = constants(margin)
    optimizer = torch.optim.SGD(head.parameters(), lr=c.lr_of(HEAD), weight_decay=c.weight_decay)
    heads.loss(head(z), y, c.spec).backward()
    true = head.weight.grad.clone()
    optimizer.step()
    update = ObservedUpdate((0,), {HEAD: W}, {HEAD: head.weight.detach() - W}, len(y), tuple(range(classes)))
    return update, true


@pytest.mark.parametrize("margin", MARGINS)
def test_the_gradient_behind_a_step_is_recovered(margin: str) -> None:
    update, true = one_step([3, 3, 1], 10, 0.5, margin, seed=0)
    torch.testing.assert_close(gradient(update, constants(margin))[HEAD], true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_one_photo_always_shows_its_class(margin: str, pull: float) -> None:
    for seed in range(20):
        update, _ = one_step([seed % 12], 12, pull, margin, seed)
        assert infer_labels(update, constants(margin)).tolist() == [seed % 12]


@pytest.mark.parametrize(("margin", "pull"), [("none", 0.0), ("cosface", 0.5), ("arcface", 0.5)])
def test_a_batch_of_different_people(margin: str, pull: float) -> None:
    found = 0
    for seed in range(2):
        labels = torch.randperm(100, generator=generator("people", seed))[:8].tolist()
        update, _ = one_step(labels, 100, pull, margin, seed)
        found += len(set(infer_labels(update, constants(margin)).tolist()) & set(labels))
    assert found >= 14  # of 16; guessing finds 1


@pytest.mark.parametrize("labels", [[4, 4, 4, 9], [7, 7], [1, 2, 2, 2, 2]])
def test_people_who_are_there_more_than_once(labels: list[int]) -> None:
    hits = sum(
        infer_labels(one_step(labels, 50, 0.5, "cosface", seed)[0], constants("cosface")).tolist() == labels
        for seed in range(5)
    )
    assert hits >= 4


def test_a_client_of_one_person_has_only_one_answer() -> None:
    update, _ = one_step([0, 0, 0], 1, 0.5, "none", seed=0)
    assert infer_labels(update, constants("none")).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("algorithm", "threat"), [("fedavg", "server"), ("fedgc", "server"), ("fedavg", "client")])
def test_labels_name_classes_in_the_order_of_the_updates(world, algorithm: str, threat: str) -> None:
    this = world(algorithm, batch=2, clients=2)
    answer = LabelInference()(this.seen_by(threat), generator(0))
    first = 1 if threat == "client" else 0  # the client of seat 0 sees the others' update alone
    assert answer.labels.tolist() == this.truth.labels[first:].sort(dim=1).values.flatten().tolist()
    assert answer.sources == tuple(k for k in range(first, 2) for _ in range(2))


def test_an_aggregate_of_several_has_no_single_source(world) -> None:
    this = world("fedavg", batch=1, clients=3)
    answer = LabelInference()(this.seen_by("client"), generator(0))
    assert answer.sources == (-1, -1)
    assert sorted(answer.labels.tolist()) == sorted(this.truth.labels[1:].flatten().tolist())


@pytest.mark.parametrize(("algorithm", "threat"), [("fedpe", "server"), ("fedpe", "client"), ("fedgc", "client")])
def test_no_head_rows_is_refused_without_calling_it_safe(world, algorithm: str, threat: str) -> None:
    with pytest.raises(RefusedError, match=r"head\.weight.*does not say that nothing leaks"):
        LabelInference()(world(algorithm).seen_by(threat), generator(0))


def test_labels_are_told_under_noise_by_a_typical_face(world) -> None:
    """Noise that hides the direction of every row leaves the label in the sum over all coordinates."""
    this = world("fedgc")
    observation = this.seen_by("server")
    constants, draw = observation.public_constants, torch.Generator().manual_seed(0)
    card = {"name": "dp-sgd", "max_grad_norm": 1.0, "noise_multiplier": 0.05}
    updates = []
    for update in observation.client_updates:
        g = gradient(update, constants)
        norm = torch.stack([x.square().sum() for x in g.values()]).sum().sqrt().clamp(min=1)
        noisy = {n: x / norm + 0.05 * torch.randn(x.shape, generator=draw) for n, x in g.items()}
        delta = {n: -constants.lr_of(n) * (x + constants.weight_decay * update.before[n]) for n, x in noisy.items()}
        updates.append(replace(update, delta=delta))
    hidden = replace(observation, client_updates=tuple(updates), public_constants=replace(constants, defense=card))
    assert LabelInference()(hidden, generator(0)).labels.tolist() == this.truth.labels.flatten().tolist()
