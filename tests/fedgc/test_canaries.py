"""Canaries: who gets which, by coins of their own, and what does not change where there are none."""

from __future__ import annotations

import pytest
import torch

from fedgc.canaries import blots, plan_planting, planted
from fedgc.rng import generator
from fedgc.schedule import Party


@pytest.fixture
def parties() -> list[Party]:
    return [
        Party(k, torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4) % 2 + 2 * k, (2 * k, 2 * k + 1))
        for k in range(3)
    ]


def test_candidates_are_dealt_evenly_under_classes_of_their_client(parties) -> None:
    plan = plan_planting(parties, 20, 32, seed=0)
    assert plan.clients.bincount().tolist() == [7, 7, 6]
    assert torch.equal(plan.classes // 2, plan.clients)
    assert len(plan.classes.unique()) == 6
    assert plan.photos.shape == (20, 3, 32, 32)
    assert plan.photos.dtype == torch.uint8


def test_the_plan_is_a_function_of_the_seed(parties) -> None:
    one, two, other = (plan_planting(parties, 200, 32, seed=s) for s in (5, 5, 6))
    for field in ("photos", "classes", "clients", "inside"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    assert not torch.equal(one.inside, other.inside)
    assert not torch.equal(one.photos, other.photos)


def test_coins_are_fair_and_do_not_depend_on_photo_class_or_client(parties) -> None:
    plan = plan_planting(parties, 6000, 32, seed=1)
    assert abs(float(plan.inside.float().mean()) - 0.5) < 0.02  # three standard errors
    for k in range(3):
        assert abs(float(plan.inside[plan.clients == k].float().mean()) - 0.5) < 0.035


def test_more_candidates_do_not_change_the_coins_of_the_first(parties) -> None:
    few, many = (plan_planting(parties, n, 32, seed=1).inside for n in (30, 60))
    assert torch.equal(few, many[:30])


def test_those_whose_coin_says_so_are_photos_like_any_others(parties) -> None:
    plan = plan_planting(parties, 20, 32, seed=0)
    trained = planted(parties, plan)
    assert sum(len(p.photos) for p in trained) == 12 + int(plan.inside.sum())
    for before, after in zip(parties, trained, strict=True):
        mine = plan.inside & (plan.clients == before.client)
        assert torch.equal(after.photos[:4], before.photos)
        assert torch.equal(after.photos[4:], plan.photos[mine])
        assert torch.equal(after.labels[4:], plan.classes[mine])
        assert after.classes == before.classes


def test_without_canaries_the_parties_are_those_of_people(parties) -> None:
    assert planted(parties, None) == tuple(parties)


def test_blots_are_symmetric_and_differ() -> None:
    photos = blots(5, 48, generator(0)).float()
    torch.testing.assert_close(photos, photos.flip(3), atol=1, rtol=0)
    distance = torch.cdist(photos.flatten(1), photos.flatten(1)) / photos[0].numel() ** 0.5
    assert float(distance[~torch.eye(5, dtype=torch.bool)].min()) > 40  # of 255, root mean square
