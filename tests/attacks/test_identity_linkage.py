from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.adapters import adapter
from attacks.identity_linkage import IdentityLinkage, person_embeddings
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import RefusedError
from fedgc.models import build_backbone
from fedgc.rng import generator
from fedgc.types import BACKBONE, ClassEmbeddings


def backbone_of(observation):
    backbone = build_backbone(observation.public_constants.spec, seed=9)
    backbone.load_state_dict({n.removeprefix(BACKBONE): t for n, t in observation.global_model.items()})
    return backbone


def test_a_class_embedding_at_its_persons_mean_is_linked(world) -> None:
    """Ground truth by construction: rows that are people's mean features, in another order and at other
    lengths."""
    observation = world(kind="round").seen_by("server")
    people = person_embeddings(backbone_of(observation), observation.gallery)
    order = torch.randperm(len(people), generator=generator("order"))
    rows = ClassEmbeddings(people[order] * torch.linspace(0.1, 9, len(people))[:, None], tuple(range(50, 62)))
    answer = IdentityLinkage()(replace(observation, class_embeddings=rows), generator(0))
    assert answer.sources == tuple(range(50, 62))
    assert answer.scores.argmax(dim=1).tolist() == order.tolist()
    torch.testing.assert_close(answer.scores.max(dim=1).values, torch.ones(12))


def test_scores_are_cosines_with_the_observed_network(world) -> None:
    observation = world(kind="round").seen_by("server")
    answer = IdentityLinkage()(observation, generator(0))
    people = person_embeddings(backbone_of(observation), observation.gallery)
    rows = observation.class_embeddings.weight
    for i, g in ((0, 0), (3, 5), (7, 2)):
        cosine = torch.nn.functional.cosine_similarity(rows[i], people[g], dim=0)
        assert float(answer.scores[i, g]) == pytest.approx(float(cosine), abs=1e-5)


def test_a_person_is_the_mean_of_their_photos_wherever_these_lie(world) -> None:
    observation = world(kind="round").seen_by("server")
    gallery, backbone = observation.gallery, backbone_of(observation)
    shuffled = torch.randperm(len(gallery.people), generator=generator("shuffle"))
    mixed = replace(gallery, images=gallery.images[shuffled], people=gallery.people[shuffled])
    torch.testing.assert_close(person_embeddings(backbone, mixed), person_embeddings(backbone, gallery))


def test_another_client_of_fedavg_sees_only_foreign_classes(world) -> None:
    answer = IdentityLinkage()(world("fedavg", kind="round").seen_by("client"), generator(0))
    assert answer.sources == tuple(range(6, 12))
    assert answer.scores.shape == (6, 12)


@pytest.mark.parametrize(("algorithm", "threat"), [("fedgc", "client"), ("fedpe", "server"), ("fedgc", "outsider")])
def test_without_foreign_class_embeddings_it_is_refused_and_says_why(world, algorithm: str, threat: str) -> None:
    with pytest.raises(RefusedError, match="no class embedding of anybody else reaches it"):
        IdentityLinkage()(world(algorithm, kind="round").seen_by(threat), generator(0))


def test_changes_of_class_embeddings_are_those_that_the_clients_sent(world) -> None:
    observation = world("fedgc", kind="round").seen_by("server")
    answer = IdentityLinkage(source="embedding-changes")(observation, generator(0))
    people = person_embeddings(backbone_of(observation), observation.gallery)
    change = observation.client_updates[1].delta["head.weight"][2]
    row = answer.sources.index(observation.client_updates[1].classes[2])
    cosines = torch.nn.functional.normalize(change, dim=0) @ people.T
    torch.testing.assert_close(answer.scores[row], cosines)
    with pytest.raises(RefusedError, match="no change of a class embedding reaches the seat 'server' under fedpe"):
        IdentityLinkage(source="embedding-changes")(world("fedpe", kind="round").seen_by("server"), generator(0))


def test_features_of_a_step_are_linked_without_a_head(world) -> None:
    built = world("fedpe", batch=1)
    answer = IdentityLinkage(source="face-embeddings")(built.seen_by("server"), generator(0))
    assert answer.sources == (0, 1)
    assert answer.scores.argmax(dim=1).tolist() == built.truth.labels.flatten().tolist()


def test_an_adapter_between_linear_spaces_is_exact() -> None:
    features = torch.randn(200, 16, generator=generator("features"))
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator("turn")))[0]
    torch.testing.assert_close(adapter(features, features @ turn), turn, rtol=0, atol=1e-3)


def test_through_another_recogniser_people_are_still_ranked(world) -> None:
    faces, people = synthetic_faces(20, 4, 32, seed=4)
    observation = world("fedgc", kind="round").seen_by("server")
    attack = IdentityLinkage(through="adapter", epochs=2)
    with pytest.raises(RefusedError, match="eight strangers or more"):
        attack(observation, generator(0))
    owning = replace(observation, auxiliary_faces=faces.float() / 255, auxiliary_people=people)
    own = person_embeddings(backbone_of(observation), observation.gallery)
    rows = ClassEmbeddings(own, tuple(range(12)))
    scores = attack(replace(owning, class_embeddings=rows), generator(0)).scores
    ranks = (scores >= scores.diagonal()[:, None]).sum(dim=1)
    assert float(ranks.float().mean()) < 4  # 6.5 by chance
