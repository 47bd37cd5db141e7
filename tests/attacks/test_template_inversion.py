from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attacks.priors import Eigenfaces, eigenfaces
from attacks.template_inversion import TemplateInversion, as_features, coordinates
from fedgc.errors import RefusedError
from fedgc.models import embed
from fedgc.rng import generator
from fedgc.types import ClassEmbeddings

QUICK = {"training": 6, "iterations": 20, "components": 30, "copies": 1}


def features(attack: TemplateInversion, observation, images: torch.Tensor) -> torch.Tensor:
    return attack.network(observation).all_features(images)


def with_rows(observation, rows: torch.Tensor):
    return replace(observation, class_embeddings=ClassEmbeddings(rows, tuple(range(50, 50 + len(rows)))))


@pytest.fixture
def seen(world):
    """A round in which the class embeddings are those of strangers' photos: what is to be found is known."""
    observation = world(kind="round").seen_by("server")
    faces, rest = observation.auxiliary_faces[:6], observation.auxiliary_faces[6:]
    observation = replace(observation, auxiliary_faces=rest)
    return with_rows(observation, 3 * features(TemplateInversion(), observation, faces))


@pytest.mark.parametrize("method", ["both", "optimisation", "decoder"])
def test_the_image_has_the_feature_and_nearer_than_any_face_the_attacker_owns(seen, method: str) -> None:
    enough = QUICK | {"iterations": 60, "shift": 0}
    losses = {m: TemplateInversion(method=m, **enough)(seen, generator(0)).loss.mean() for m in (method, "nearest")}
    assert losses[method] < losses["nearest"]


def test_the_search_goes_on_from_the_decoder(seen) -> None:
    one, two = (TemplateInversion(method=m, **QUICK)(seen, generator(0)) for m in ("decoder", "both"))
    assert float(two.loss.mean()) < float(one.loss.mean())
    assert (one.iterations, two.iterations) == (0, 6 * QUICK["iterations"])


def test_the_nearest_face_is_one_of_the_attackers(seen) -> None:
    answer = TemplateInversion(method="nearest", shift=0)(seen, generator(0))
    units = F.normalize(seen.class_embeddings.weight, dim=1)
    cosines = (units - units.mean(0)) @ features(TemplateInversion(), seen, seen.auxiliary_faces).T
    torch.testing.assert_close(answer.images, seen.auxiliary_faces[cosines.argmax(dim=1)])
    assert answer.sources == tuple(range(50, 56))


def test_loss_is_that_of_the_images_as_recognition_sees_them(seen) -> None:
    attack = TemplateInversion(**QUICK)
    answer = attack(seen, generator(0))
    _, units = attack.wanted(seen, attack.network(seen), generator(0))
    found = embed(attack.network(seen).backbone, (answer.images * 255).round().to(torch.uint8))
    torch.testing.assert_close(answer.loss, 1 - (found * units).sum(1), atol=2e-3, rtol=0)


def test_rows_get_the_mean_feature_in_place_of_their_own() -> None:
    draw = generator("rows")
    rows, middle = torch.randn((5, 8), generator=draw) + 2, torch.randn(8, generator=draw)
    moved = as_features(7 * rows, middle, 0.5)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(as_features(rows, middle, 0.5), moved)  # their lengths do not matter
    units = F.normalize(rows, dim=1)
    torch.testing.assert_close(moved[0], F.normalize(units[0] - units.mean(0) + 0.5 * middle, dim=0))
    torch.testing.assert_close(as_features(rows[:1], middle, 0.0), units[:1])


def test_coordinates_undo_images() -> None:
    draw = generator("faces")
    faces = torch.rand((12, 3, 8, 8), generator=draw)
    prior = Eigenfaces(faces.mean(0), eigenfaces(faces, 5), 1.0)
    z = torch.randn((4, 5), generator=draw)
    torch.testing.assert_close(coordinates(prior, prior.images(z)), z, atol=1e-4, rtol=0)
    assert float(coordinates(prior, prior.images(100 * z)).abs().max()) == 3.0


def test_no_more_classes_than_asked_for(seen) -> None:
    answer = TemplateInversion(method="nearest", classes=2)(seen, generator(0))
    assert answer.sources == (50, 51)
    whole = TemplateInversion(method="nearest")(seen, generator(0))
    assert torch.equal(answer.images, whole.images[:2])


def test_features_of_a_step_give_its_photos(world) -> None:
    observation = world("fedpe").seen_by("server")  # no class embedding reaches this seat
    attack = TemplateInversion(source="face-embeddings", **QUICK)
    assert attack.reads == "step"
    answer = attack(observation, generator(0))
    assert answer.sources == (0, 1)
    assert answer.images.shape == (2, 3, 32, 32)
    true = features(attack, observation, world("fedpe").truth.images.flatten(0, 1))
    cosines = features(attack, observation, answer.images) @ true.T
    torch.testing.assert_close(1 - cosines.diag(), answer.loss, atol=1e-3, rtol=0)


def test_a_feature_that_is_not_known_gets_the_mean_face(world, monkeypatch) -> None:
    monkeypatch.setattr(
        TemplateInversion,
        "wanted",
        lambda *_: ((0, 1), F.normalize(torch.eye(2, 32), dim=1) * torch.tensor([[1.0], [0]])),
    )
    observation = world().seen_by("server")
    answer = TemplateInversion(source="face-embeddings", **QUICK)(observation, generator(0))
    assert answer.failed == 1
    torch.testing.assert_close(answer.images[1], observation.auxiliary_faces.mean(0))
    assert not torch.allclose(answer.images[0], answer.images[1])


@pytest.mark.parametrize(("algorithm", "threat"), [("fedgc", "client"), ("fedpe", "server"), ("fedgc", "outsider")])
def test_without_class_embeddings_it_is_refused_and_says_why(world, algorithm: str, threat: str) -> None:
    with pytest.raises(RefusedError, match="no class embedding of anybody else reaches it"):
        TemplateInversion()(world(algorithm, kind="round").seen_by(threat), generator(0))


def test_a_step_asks_for_what_embedding_recovery_asks_for(world) -> None:
    attack = TemplateInversion(source="face-embeddings")
    with pytest.raises(RefusedError, match=r"needs .*aggregate \+ auxiliary-faces"):
        attack(world().seen_by("server", knows=False), generator(0))
    with pytest.raises(RefusedError, match="single step"):
        attack(world(kind="round").seen_by("server"), generator(0))
    with pytest.raises(RefusedError, match="class-embeddings"):
        TemplateInversion()(world().seen_by("outsider"), generator(0))


def test_progress_ends_at_its_total(seen) -> None:
    told: list[tuple[int, int]] = []
    TemplateInversion(method="both", **QUICK)(seen, generator(0), lambda done, total: told.append((done, total)))
    assert told[-1] == (26, 26)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
