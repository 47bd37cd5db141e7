"""Turned rows laid over a gallery, where the answer is known by construction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from attacks.alignment import matched_grams, procrustes, unit, wasserstein_procrustes
from attacks.backbone_algebra import recover
from attacks.embedding_recovery import EmbeddingRecovery
from attacks.gradient_inversion import GradientInversion
from attacks.head_algebra import embedding_of_one, head_rows
from attacks.identity_linkage import IdentityLinkage, person_embeddings
from attacks.label_inference import LabelInference
from defenses.blinded_correction import BlindedCorrection, rotation
from fedgc.client import clients_secret
from fedgc.errors import RefusedError
from fedgc.models import load_backbone
from fedgc.rng import generator
from fedgc.types import ClassEmbeddings

BLIND = BlindedCorrection()


def ticks(_: int) -> None:
    pass


def people_in_space(count: int, size: int) -> np.ndarray:
    """Directions of unequal spread and of a skewed kind, as features of faces are."""
    drawn = torch.randn(count, size, generator=generator("people", count, size)).exp()
    return unit(drawn * torch.linspace(1, 3, size) - 1)


def turn(size: int) -> np.ndarray:
    return rotation(size, generator("turn", size)).numpy()


def test_enough_known_pairs_give_the_rotation() -> None:
    people, R = people_in_space(40, 24), turn(24)
    np.testing.assert_allclose(procrustes(people @ R, people), R.T, atol=1e-10)
    noisy = people @ R + 1e-4 * np.random.default_rng(0).standard_normal(people.shape)
    assert np.abs(procrustes(noisy, people) - R.T).max() < 1e-2


def test_few_pairs_give_it_on_what_they_span() -> None:
    people, R = people_in_space(40, 24), turn(24)
    Q = procrustes(people[:5] @ R, people[:5])
    np.testing.assert_allclose(people[:5] @ R @ Q, people[:5], atol=1e-10)
    assert np.linalg.matrix_rank(Q) == 5


def test_cosines_among_rows_alone_find_the_people() -> None:
    people, R = people_in_space(20, 12), turn(12)
    order = np.random.default_rng(1).permutation(20)
    scores = matched_grams(people[order] @ R, people, [], 10, np.random.default_rng(2), ticks)
    assert (scores.argmax(axis=1) == order).all()
    assert scores.max() <= 1 + 1e-9


def test_fewer_rows_than_people_are_found_from_a_few_known() -> None:
    people, R = people_in_space(30, 12), turn(12)
    order = np.random.default_rng(1).permutation(30)[:18]
    known = [(i, int(order[i])) for i in range(6)]
    scores = matched_grams(people[order] @ R, people, known, 5, np.random.default_rng(2), ticks)
    assert (scores.argmax(axis=1) == order)[6:].mean() > 0.8


@pytest.mark.parametrize("known", [0, 3])
def test_clouds_of_one_shape_are_laid_over_each_other(known: int) -> None:
    people, R = people_in_space(60, 12), turn(12)
    order = np.random.default_rng(1).permutation(60)[:50]
    pairs = [(i, int(order[i])) for i in range(known)]
    Q = wasserstein_procrustes(people[order] @ R, people, pairs, 20, np.random.default_rng(2), ticks)
    assert ((people[order] @ R @ Q @ people.T).argmax(axis=1) == order).mean() > 0.8


def observation_of(world, known: int = 0, R: Tensor | None = None):
    """A server that holds people's mean features, turned, in another order, and knows some of the people."""
    observation = world(kind="round").seen_by("server")
    backbone = load_backbone(observation.public_constants.spec, observation.global_model)
    people = person_embeddings(backbone, observation.gallery)
    order = torch.randperm(len(people), generator=generator("order"))
    R = torch.from_numpy(turn(32)).float() if R is None else R
    rows = ClassEmbeddings(people[order] @ R, tuple(range(50, 62)))
    knows = {50 + i: int(order[i]) for i in range(known)}
    return replace(observation, class_embeddings=rows, acquaintances=knows or None), order


def test_rows_that_come_turned_are_not_linked_until_they_are_aligned(world) -> None:
    observation, order = observation_of(world, known=11)
    paired = IdentityLinkage(through="alignment", alignment="paired", known=11)(observation, generator(0))
    assert paired.sources == (61,)
    for kind in ("gram", "wasserstein"):
        found = IdentityLinkage(through="alignment", alignment=kind, known=11, restarts=2)(observation, generator(0))
        assert found.sources == (61,)
        assert found.scores.argmax(dim=1).tolist() == order[11:].tolist()
    blind = IdentityLinkage()(observation, generator(0)).scores
    assert (blind.argmax(dim=1) == order).sum() < 6


def test_equal_generators_align_alike_and_progress_is_told(world) -> None:
    observation, _ = observation_of(world)
    told: list[tuple[int, int]] = []
    attack = IdentityLinkage(through="alignment", restarts=3)
    one = attack(observation, generator(5), lambda done, total: told.append((done, total)))
    assert torch.equal(one.scores, attack(observation, generator(5)).scores)
    assert one.scores.shape == (12, 12)
    assert told[:3] == [(1, 4), (2, 4), (3, 4)]


def test_what_is_known_has_to_be_granted_and_to_leave_somebody(world) -> None:
    observation, _ = observation_of(world, known=12)
    attack = IdentityLinkage(through="alignment", alignment="paired", known=12)
    with pytest.raises(RefusedError, match="leaves nobody to be named"):
        attack(observation, generator(0))
    with pytest.raises(RefusedError, match="needs acquaintances"):
        attack(replace(observation, acquaintances=None), generator(0))


@pytest.mark.parametrize(
    "settings",
    [
        {"known": 3},
        {"through": "alignment", "alignment": "paired"},
        {"through": "alignment", "source": "face-embeddings"},
    ],
)
def test_settings_that_make_no_attack_are_refused(settings) -> None:
    with pytest.raises(ValidationError):
        IdentityLinkage(**settings)


# -- a server of a blinded federation


def test_features_of_a_step_are_plain_and_linked_as_without_the_defense(world) -> None:
    """The backbone is not turned: its last layers give the photo's feature whatever happens to class embeddings."""
    built = world("fedgc", defense=BLIND)
    answer = IdentityLinkage(source="face-embeddings")(built.seen_by("server"), generator(0))
    assert answer.scores.argmax(dim=1).tolist() == built.truth.labels.flatten().tolist()


@pytest.mark.parametrize("batch", [1, 2])
def test_labels_are_read_from_turned_rows_too(world, batch: int) -> None:
    """They follow from inner products among rows."""
    built = world("fedgc", batch=batch, defense=BLIND)
    answer = LabelInference()(built.seen_by("server"), generator(0))
    assert answer.labels.tolist() == built.truth.labels.sort(dim=1).values.flatten().tolist()


def test_photos_of_a_batch_are_told_apart_by_the_backbone_alone(world) -> None:
    found = [
        EmbeddingRecovery()(world(*about, batch=2, **more).seen_by("server"), generator(0)).embeddings
        for about, more in ((("fedgc",), {"defense": BLIND}), (("fedpe",), {}))
    ]
    assert found[0].shape == found[1].shape == (4, 32)
    nearest = (found[0] @ found[1].T).max(dim=1).values
    assert float(nearest.min()) > 0.999


def test_single_photo_steps_are_pairs_that_give_the_rotation_away(world) -> None:
    """The backbone gives a photo's feature in the clear, the head's rows give it turned: no photo or person need be known."""
    R = rotation(32, clients_secret(1))  # the noise key of these federations
    plain, blind = [], []
    observation = world("fedgc", defense=BLIND).seen_by("server")
    for update in observation.client_updates:
        rows = head_rows(update, observation.public_constants)
        found = recover(update, observation.public_constants)
        plain.append(found.unit_embeddings[0])
        blind.append(embedding_of_one(rows, int(found.labels[0])))
    pairs = torch.stack(blind), torch.stack(plain)
    torch.testing.assert_close(pairs[0], pairs[1] @ R, rtol=0, atol=1e-3)
    Q = torch.from_numpy(procrustes(*(p.numpy() for p in pairs)))
    torch.testing.assert_close(pairs[0] @ Q, pairs[1], rtol=0, atol=1e-3)


def test_methods_that_put_rows_behind_the_backbone_are_refused_and_say_why(world) -> None:
    observation = world("fedgc", defense=BLIND).seen_by("server")
    with pytest.raises(RefusedError, match="come turned by a rotation"):
        GradientInversion(method="inverting-gradients", iterations=2)(observation, generator(0))
    quick = {"iterations": 3, "components": 10, "copies": 1}
    assert GradientInversion(**quick)(observation, generator(0)).images.shape == (2, 3, 32, 32)


def test_one_colluding_client_opens_every_row(world) -> None:
    secret = lambda: clients_secret(1)  # noqa: E731
    observation, order = observation_of(world, R=rotation(32, secret()).float())
    held = observation.class_embeddings
    opened = replace(held, weight=BLIND.unblinded(held.weight, secret()))
    answer = IdentityLinkage()(replace(observation, class_embeddings=opened), generator(0))
    assert answer.scores.argmax(dim=1).tolist() == order.tolist()
    torch.testing.assert_close(answer.scores.max(dim=1).values, torch.ones(12))
