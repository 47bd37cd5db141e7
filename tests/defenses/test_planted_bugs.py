"""The audit finds six planted bugs, and none in the defenses as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planted_bugs import PLANTED, NoNoise, NotANumber, runs_needed
from torch import Tensor

from defenses.client_dp import ClientDP
from defenses.dp_sgd import DPSGD
from defenses.none import NoDefense
from eval.audit import ceiling, gaussian_epsilon
from fedgc import heads
from fedgc.algorithms import ALGORITHMS
from fedgc.errors import UsageError
from fedgc.pipeline.auditing import audit
from fedgc.pipeline.worlds import SPEC, LocalTraining, WholeUpdates
from fedgc.types import HEAD, Tensors

SEEDS = 20
UNITS = ("image", "identity")


def dp_sgd(kind: type[DPSGD] = DPSGD, sigma: float = 1.0, **settings: Any) -> DPSGD:
    return kind(noise_multiplier=sigma, delta=1e-3, **settings)


# -- the two worlds


@pytest.mark.parametrize("mode", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bound", [0.01, 1.0, 3000.0])
def test_the_canary_adds_what_the_definition_says_and_nothing_else(unit: str, bound: float, mode: str) -> None:
    """With the same noise in both worlds the difference is the clipped gradient, by plain differentiation."""
    worlds = LocalTraining(dp_sgd(unit=unit, max_grad_norm=bound, mode=mode), 2, 1.0, seed=0)
    np.testing.assert_allclose(np.linalg.norm(worlds.directions, axis=1), 1.0)
    for present, absent, gradient in zip(worlds.play("long", 5), worlds.play(None, 5), worlds.directions, strict=True):
        np.testing.assert_allclose(present - absent, gradient, atol=2e-6)
    assert [charge.sample_rate for charge in worlds.charges] == [1.0, 1.0]


@pytest.mark.parametrize("unit", UNITS)
def test_noise_is_that_of_the_claim_and_fresh(unit: str) -> None:
    worlds = LocalTraining(dp_sgd(sigma=3.0, unit=unit), 2, 1.0, seed=0)
    quiet = LocalTraining(dp_sgd(NoNoise, unit=unit), 2, 1.0, seed=0).play(None, 1)
    noise = [r - q for key in range(4) for r, q in zip(worlds.play(None, key), quiet, strict=True)]
    assert float(np.std(noise)) == pytest.approx(3.0, rel=4 / np.sqrt(2 * np.size(noise)))
    assert np.abs(np.corrcoef(noise) - np.eye(8)).max() < 5 / np.sqrt(len(noise[0]))


def test_an_absent_photo_has_no_gradient() -> None:
    model = LocalTraining(dp_sgd(), 1, 1.0, seed=0).model
    loss = heads.loss(model(torch.zeros(1, 3, 32, 32)), torch.tensor([3]), SPEC)
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("unit", UNITS)
def test_with_sampling_the_direction_is_orthogonal_to_everybody_else(unit: str) -> None:
    worlds = LocalTraining(dp_sgd(NoNoise, unit=unit), 1, 0.5, seed=0)
    assert worlds.charges[0].sample_rate == 0.5
    seen = [worlds.play("long", key)[0] @ worlds.directions[0] for key in range(40)]
    together = float(worlds.directions[0] @ worlds.directions[0])
    there = np.isclose(seen, together, atol=1e-4)
    assert (there | np.isclose(seen, 0, atol=1e-4)).all()
    assert 8 < there.sum() < 32  # of 40, at a rate of one half
    assert 0.2 < together < 1


@pytest.mark.parametrize("noise", ["central", "local"])
@pytest.mark.parametrize("algorithm", ["fedgc", "fedavg", "fedpe"])
def test_a_whole_client_adds_its_clipped_update(algorithm: str, noise: str) -> None:
    defense = ClientDP(noise_multiplier=2.0, noise=noise, max_grad_norm=0.3)
    worlds = WholeUpdates(defense, 2, ALGORITHMS[algorithm], seed=0)
    np.testing.assert_allclose(np.linalg.norm(worlds.directions, axis=1), 1.0, rtol=1e-5)
    released = [worlds.play(canary, 5) for canary in ("long", None)]
    for present, absent, update in zip(*released, worlds.directions, strict=True):
        np.testing.assert_allclose(present - absent, update, atol=5e-6)
        assert float(absent.std()) == pytest.approx(2.0, rel=0.1)


# -- what an audit finds


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("mode", "seed"), [("bookkeeping", 0), ("hooks", 1)])
def test_dp_sgd_as_it_is_passes(unit: str, mode: str, seed: int) -> None:
    found = audit(dp_sgd(unit=unit, mode=mode), runs=100, seed=seed)
    assert not found["exceeded"], found
    assert "proves no privacy" in found["verdict"]
    assert found["claimed"] >= gaussian_epsilon(2**0.5, 1e-3)


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: type[DPSGD]) -> None:
    found = audit(dp_sgd(bug), runs=runs_needed(bug))
    assert found["claimed"] == pytest.approx(4.86, abs=0.02)  # what the correct one claims
    assert found["flagged"]["value"] > found["claimed"]
    assert found["exceeded"]
    assert "does not keep its promise" in found["verdict"]
    assert (found["canary"] == "not finite") is (bug is NotANumber)


def test_with_sampling_bugs_are_held_against_a_bound_for_every_mechanism() -> None:
    for bug, exceeded in ((DPSGD, False), (NoNoise, True)):
        found = audit(dp_sgd(bug, 4.0), runs=100, rounds=1, rate=0.75)
        assert found["method"] == "clopper-pearson"
        assert found["exceeded"] is exceeded
        assert found["epsilon_lower_bound"]["value"] <= ceiling(50, 1e-3, "clopper-pearson")


class BareRowsOfClients(ClientDP):
    def aggregated(self, delta: Tensors, share: float, noise: torch.Generator) -> dict[str, Tensor]:
        return {**super().aggregated(delta, share, noise), **{n: t for n, t in delta.items() if n == HEAD}}


class ShareOfRows(ClientDP):
    """Class embeddings are stacked, and get the noise of a mean over many clients."""

    def aggregated(self, delta: Tensors, share: float, noise: torch.Generator) -> Any:
        return super().aggregated(delta, share / 10, noise)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", ["central", "local"])
def test_client_dp_as_it_is_passes(noise: str, seed: int) -> None:
    assert not audit(ClientDP(noise_multiplier=1.0, noise=noise), runs=200, seed=seed)["exceeded"]


@pytest.mark.parametrize("bug", [BareRowsOfClients, ShareOfRows])
def test_bugs_of_client_dp_are_found(bug: type[ClientDP]) -> None:
    assert audit(bug(noise_multiplier=1.0), runs=100)["exceeded"]


def test_many_runs_come_near_the_claim() -> None:
    found = audit(ClientDP(noise_multiplier=1.0), runs=1000)
    bound = found["epsilon_lower_bound"]
    assert 0.6 * found["claimed"] < bound["value"] < found["claimed"] < bound["ceiling"]
    assert bound["n"] == 500


def test_an_audit_can_be_repeated() -> None:
    one, two, other = (audit(ClientDP(noise_multiplier=1.0), runs=60, seed=seed) for seed in (0, 0, 1))
    assert one == two != other


# -- what is said, and what is refused


def test_a_target_is_one_of_what_is_played() -> None:
    found = audit(ClientDP(epsilon=2.0), runs=20)
    assert 1.9 < found["claimed"] <= 2.0


def test_a_claim_beyond_the_ceiling_is_named() -> None:
    found = audit(ClientDP(noise_multiplier=0.2), runs=20)
    assert not found["exceeded"]
    assert "nothing can be said" in found["verdict"]
    assert "take more runs" in found["verdict"]


def test_progress_ends_where_it_said() -> None:
    told: list[tuple[int, int]] = []
    audit(ClientDP(noise_multiplier=1.0), runs=21, watch=lambda stage, done, total, note="": told.append((done, total)))
    assert told[-1][0] == told[-1][1] == len(told)


def test_what_promises_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"none promises no epsilon.*--set defense\.name=dp-sgd"):
        audit(NoDefense())


@pytest.mark.parametrize("wrong", [{"runs": 5}, {"rounds": 0}, {"rate": 0.0}, {"rate": 1.5}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="an audit needs"):
        audit(dp_sgd(), **wrong)


# -- twenty of each


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_no_false_alarm_in_twenty_clean_audits(unit: str) -> None:
    alarms = [seed for seed in range(SEEDS) if audit(dp_sgd(unit=unit), runs=200, seed=100 + seed)["exceeded"]]
    assert alarms == []


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bug", PLANTED)
def test_every_bug_is_found_with_twenty_seeds(bug: type[DPSGD], unit: str) -> None:
    found = [audit(dp_sgd(bug, unit=unit), runs=runs_needed(bug), seed=100 + seed)["exceeded"] for seed in range(SEEDS)]
    assert all(found), found
