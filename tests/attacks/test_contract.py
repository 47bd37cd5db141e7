"""What every attack promises, in one table."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from attacks.registry import ATTACKS, AnyAttack
from fedgc.canaries import plan_planting
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import RefusedError
from fedgc.rng import generator
from fedgc.types import GRANTS, Attack, Canaries, Observation

QUICK = {
    "label-inference": {},
    "gradient-inversion": {"iterations": 3, "restarts": 2, "components": 10, "copies": 1},
    "embedding-recovery": {},
    "feature-inversion": {"iterations": 3, "components": 10, "copies": 1},
    "identity-linkage": {},
    "correction-probe": {},
    "membership-inference": {"models": 4, "epochs": 1},
    "template-inversion": {"method": "both", "training": 3, "iterations": 3, "components": 10, "copies": 1},
    "candidate-match": {"labels": 2},
    "canary-inference": {},
}
table = pytest.mark.parametrize("attack", [ATTACKS[name](**QUICK[name]) for name in ATTACKS], ids=list(ATTACKS))


def observed(world, attack: Attack) -> Observation:
    seat = "client" if attack.name == "correction-probe" else "server"
    seen = world("fedgc", batch=2, kind=attack.target).seen_by(seat)
    if attack.name == "membership-inference":
        faces, people = synthetic_faces(10, 3, 32, seed=4)
        faces = faces.float() / 255
        return replace(seen, suspects=seen.gallery, auxiliary_faces=faces, auxiliary_people=people)
    if attack.name == "canary-inference":
        planting = plan_planting(world("fedgc", batch=2, kind="round").parties, 8, 32, seed=0)
        return replace(seen, canaries=Canaries(planting.photos.float() / 255, planting.classes, planting.clients))
    return replace(seen, candidates=seen.auxiliary_faces[:8]) if attack.name == "candidate-match" else seen


def test_the_registry_is_complete() -> None:
    assert set(ATTACKS) == set(QUICK)
    assert {cls.model_fields["name"].default for cls in get_args(get_args(AnyAttack)[0])} == set(ATTACKS)


@table
def test_the_same_seed_gives_the_same_answer(world, attack: Attack) -> None:
    observation = observed(world, attack)
    one, two = (attack(observation, generator("contract")) for _ in range(2))
    assert one.sources == two.sources
    for field in ("images", "labels", "scores", "embeddings", "loss"):
        a, b = getattr(one, field), getattr(two, field)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@table
def test_shapes_types_and_ranges(world, attack: Attack) -> None:
    observation = observed(world, attack)
    answer = attack(observation, generator(0))
    n = len(answer.sources)
    assert n > 0
    assert any(x is not None for x in (answer.images, answer.labels, answer.scores, answer.embeddings))
    if answer.images is not None:
        assert answer.images.shape == (n, 3, 32, 32)
        assert answer.images.dtype == torch.float32
        assert float(answer.images.min()) >= 0
        assert float(answer.images.max()) <= 1
        assert answer.images.is_contiguous()
        assert not answer.images.requires_grad
    if answer.labels is not None:
        assert answer.labels.shape == (n,)
        assert answer.labels.dtype == torch.int64
    if answer.scores is not None and observation.canaries is not None:
        assert answer.scores.shape == (n, len(observation.canaries.images))
        assert answer.scores.dtype == torch.float32
        assert answer.scores.isfinite().all()
    elif answer.scores is not None:
        candidates = observation.candidates
        assert answer.scores.shape == (n, observation.gallery.size if candidates is None else len(candidates))
        assert answer.scores.dtype == torch.float32
        assert float(answer.scores.abs().max()) <= 1 + 1e-5
    if answer.embeddings is not None:
        assert answer.embeddings.shape == (n, 32)
        assert answer.embeddings.dtype == torch.float32
        torch.testing.assert_close(answer.embeddings.norm(dim=1), torch.ones(n))
    if answer.loss is not None:
        assert answer.loss.shape == (n,)
        assert answer.loss.isfinite().all()


@table
def test_no_global_generator_is_read_or_moved(world, attack: Attack) -> None:
    observation = observed(world, attack)
    before = torch.random.get_rng_state()
    attack(observation, generator(0))
    assert torch.equal(before, torch.random.get_rng_state())


@table
def test_the_observation_is_left_as_it_was(world, attack: Attack) -> None:
    observation = observed(world, attack)
    update = observation.aggregate if observation.client_updates is None else observation.client_updates[0]
    kept = {name: tensor.clone() for name, tensor in {**update.before, **update.delta}.items()}
    attack(observation, generator(0))
    for name, tensor in {**update.before, **update.delta}.items():
        assert torch.equal(tensor, kept[name])
        assert not tensor.requires_grad


@table
def test_what_was_not_granted_is_refused_before_any_compute(world, attack: Attack, monkeypatch) -> None:
    def compute(*_: object, **__: object) -> None:
        raise AssertionError("an attack that must refuse has started to compute")

    monkeypatch.setattr(type(attack), "run", compute)
    nothing = world("fedgc", batch=2, kind=attack.target).seen_by("outsider", knows=False)
    with pytest.raises(RefusedError, match=f"^{attack.name}: needs "):
        attack(nothing, generator(0))


@table
def test_it_is_its_own_record(attack: Attack) -> None:
    adapter = TypeAdapter(AnyAttack)
    assert adapter.validate_json(attack.model_dump_json()) == attack
    assert eval(repr(attack), {type(attack).__name__: type(attack)}) == attack  # noqa: S307


@table
def test_its_settings_cannot_be_changed_or_misspelt(attack: Attack) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        attack.name = "other"
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(attack)(iteration=3)


@table
def test_what_it_declares_makes_sense(attack: Attack) -> None:
    assert attack.summary
    assert attack.target in ("round", "step")
    assert all(need and need <= set(GRANTS) for need in attack.needs)
