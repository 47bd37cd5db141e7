"""Client-level DP against its definition, in float64: sensitivity with one client swapped, noise, accounting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from defenses.accounting import epsilon_of
from defenses.client_dp import ClientDP
from defenses.clip_only import ClipOnly
from defenses.whole_update import clipped
from fedgc.doors import ClientPlan
from fedgc.errors import UsageError
from fedgc.types import BACKBONE, HEAD, Charge, ClientUpdate, Tensors
from tests.defenses.test_dp_sgd import gaussian_epsilon

WEIGHTS = (0.5, 0.3, 0.2)
PRIVATE = {"noise_multiplier": 2.0, "max_grad_norm": 0.7, "delta": 1e-2}


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update(client: int, size: float) -> ClientUpdate:
    """A random update of two tensors whose norm is near ``size``, in float64."""
    draw = torch.randn(60, generator=stream(client), dtype=torch.float64) * size / 60**0.5
    return ClientUpdate(client, {"backbone.a": draw[:40].view(8, 5), HEAD: draw[40:].view(4, 5)}, 1)


def norm(tensors: Tensors) -> float:
    return float(torch.cat([t.flatten() for t in tensors.values()]).norm())


def released(updates: list[ClientUpdate], defense: ClientDP) -> Tensor:
    """What leaves the server before its noise, over the noise's scale: the averaged backbone, and every client's rows."""
    sent = [defense.outgoing(u, stream()).tensors for u in updates]
    mean = sum(w * s["backbone.a"] for w, s in zip(WEIGHTS, sent, strict=True))
    parts = [
        mean.flatten() / defense._deviation(max(WEIGHTS)),
        *(s[HEAD].flatten() / defense._deviation(1.0) for s in sent),
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("size", [0.1, 0.69, 5.0, 1e4])
@pytest.mark.parametrize("client", [0, 1, 2])
def test_a_client_moves_the_release_by_at_most_its_noise_over_sigma(client: int, size: float) -> None:
    """In units of the noise, the release with zeros in the place of one client's update is at most 1/σ away."""
    defense = ClientDP(**PRIVATE)
    whole = [update(k, size) for k in range(3)]
    zeros = ClientUpdate(client, {n: torch.zeros_like(t) for n, t in whole[client].tensors.items()}, 1)
    moved = float((released(whole, defense) - released([*whole[:client], zeros, *whole[client + 1 :]], defense)).norm())
    assert 0 < moved <= (1 + 1e-6) / 2.0
    if client == 0 and size > 1:  # the largest weight uses all of the room
        assert moved == pytest.approx(1 / 2.0, rel=1e-6)


@pytest.mark.parametrize("defense", [ClientDP(**PRIVATE), ClipOnly(max_grad_norm=0.7)], ids=["client-dp", "clip-only"])
def test_the_whole_update_is_clipped_as_one(defense) -> None:
    long, short = update(0, 100.0), update(1, 0.1)
    out = defense.outgoing(long, stream()).tensors
    assert norm(out) == pytest.approx(0.7, rel=1e-9)
    for name, tensor in out.items():  # by one factor
        torch.testing.assert_close(tensor, long.tensors[name] * 0.7 / norm(long.tensors))
    assert all(t is short.tensors[n] for n, t in defense.outgoing(short, stream()).tensors.items())


def test_clipping_in_float32_keeps_the_bound_to_rounding() -> None:
    draws = [torch.randn(1000, generator=stream(s)) * 10**e for s, e in enumerate((-3, 0, 4, 15))]
    for x in draws:
        assert norm(clipped({"a": x.double()}, 1e-3)) <= 1e-3 * (1 + 1e-12)
        assert norm({n: t.double() for n, t in clipped({"a": x}, 1e-3).items()}) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_central_noise_has_the_scale_of_the_share(share: float) -> None:
    delta = {"backbone.a": torch.zeros(400, 500, dtype=torch.float64)}
    noise = ClientDP(**PRIVATE).aggregated(delta, share, stream())["backbone.a"]
    std = 2.0 * 0.7 * share
    assert float(noise.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(noise.mean())) < 5 * std / 400_000**0.5
    assert float(noise.abs().gt(1.959964 * std).double().mean()) == pytest.approx(0.05, abs=0.003)
    assert ClientDP(**PRIVATE, noise="local").aggregated(delta, share, stream()) is delta


def test_local_noise_is_added_in_full_by_every_client() -> None:
    zeros = ClientUpdate(0, {"backbone.a": torch.zeros(200_000, dtype=torch.float64), HEAD: torch.zeros(9, 4)}, 1)
    sent = ClientDP(**PRIVATE, noise="local").outgoing(zeros, stream()).tensors
    assert float(sent["backbone.a"].std()) == pytest.approx(1.4, rel=0.01)
    assert float(sent[HEAD].std()) == pytest.approx(1.4, rel=0.5)


@pytest.mark.parametrize("noise", ["central", "local"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_every_tensor_that_is_released_carries_its_noise(federation, algorithm: str, noise: str) -> None:
    """In a federation, with noise beside which nothing else is seen: the mean's by the largest weight, stacked rows in full."""
    sigma = 1e4
    fed = federation(algorithm, defense=ClientDP(noise_multiplier=sigma, max_grad_norm=1.0, delta=1e-2, noise=noise))
    start = fed.initial_state()
    result = fed.play(start)
    t, photos = result.transcript, torch.tensor([8.0, 9.0, 12.0])
    weights = photos / photos.sum()
    expected = sigma * float(weights.max() if noise == "central" else weights.norm())
    change = torch.cat([(t.released[n] - t.broadcast[n]).flatten() for n in t.released if n.startswith(BACKBONE)])
    assert float(change.std()) == pytest.approx(expected, rel=0.02)
    if algorithm == "fedavg":
        rows = t.released[HEAD] - t.broadcast[HEAD]
        assert float(rows.std()) == pytest.approx(expected, rel=0.25)
    if algorithm == "fedgc":
        rows = result.state.rows - start.rows
        assert float(rows.std()) == pytest.approx(sigma, rel=0.25)
    sent = torch.cat([x.flatten() for u in t.updates.values() for x in u.tensors.values()])
    if noise == "central":
        assert float(sent.norm()) <= 3**0.5 * 1.001  # clipped and clean, in the hands of a server that is trusted
    else:
        assert float(sent.std()) == pytest.approx(sigma, rel=0.02)


def test_rounds_streams_and_clients_have_noise_of_their_own(federation) -> None:
    fed = federation("fedgc", defense=ClientDP(noise_multiplier=1e4, delta=1e-2, noise="local"))
    first = fed.play(fed.initial_state())
    second = fed.play(first.state)
    name = "backbone.embedding.weight"
    noise = [u.tensors[name].flatten() for r in (first, second) for u in r.transcript.updates.values()]
    off_diagonal = torch.corrcoef(torch.stack(noise)) - torch.eye(len(noise))
    assert float(off_diagonal.abs().max()) < 6 / len(noise[0]) ** 0.5


# -- accounting


def test_a_round_is_one_release_whatever_its_steps() -> None:
    defense = ClientDP(noise_multiplier=3.0)
    assert defense.charge(ClientPlan(1, 50, 5, 99, rounds=7), 4, 10) == Charge(1, 4, 3.0, 1.0, 1)


def test_spent_is_that_of_the_client_that_took_part_most() -> None:
    defense = ClientDP(noise_multiplier=5.0, delta=1e-3)
    ledger = [Charge(0, t, 5.0, 1.0, 1) for t in range(20)] + [Charge(1, t, 5.0, 1.0, 1) for t in range(7)]
    spent = defense.spent(ledger)
    exact = gaussian_epsilon(5.0, 20, 1e-3)
    assert exact <= spent["epsilon"] <= exact * 1.01 + 0.02
    assert spent["epsilon"] <= defense.spent(ledger, quick=True)["epsilon"]
    assert (spent["unit"], spent["steps"], spent["sample_rate"]) == ("client", 20, 1.0)
    assert defense.spent(())["epsilon"] == 0.0
    assert "trusted" in spent["view"]
    assert "trusted" not in ClientDP(noise_multiplier=5.0, noise="local").spent(ledger)["view"]


def test_a_target_is_reached_by_whoever_takes_part_in_every_round() -> None:
    plans = [ClientPlan(k, 50, 5, 99, rounds=12) for k in range(4)]
    prepared = ClientDP(epsilon=8.0, delta=1e-3).prepared(plans)
    assert prepared.noise_multiplier is not None
    assert 0.97 * 8 < epsilon_of([(prepared.noise_multiplier, 1.0, 12)], 1e-3) <= 8.0
    assert ClientDP(noise_multiplier=0.3).prepared(plans).noise_multiplier == 0.3
    with pytest.raises(ValueError, match=r"needs defense\.epsilon"):
        ClientDP()
    with pytest.raises(ValueError, match="give one"):
        ClientDP(epsilon=8.0, noise_multiplier=0.3)


def test_a_delta_that_promises_nothing_is_refused() -> None:
    plans = [ClientPlan(k, 50, 5, 99, rounds=12) for k in range(4)]
    with pytest.raises(UsageError, match="one of 4 clients"):
        ClientDP(noise_multiplier=1.0, delta=0.25).prepared(plans)


def test_only_who_takes_part_is_charged(federation) -> None:
    fed = federation("fedgc", defense=ClientDP(noise_multiplier=1.0, delta=1e-2), participation=0.67)
    state = fed.play(fed.play(fed.initial_state()).state).state
    assert [c.round for c in state.ledger] == [1, 1, 2, 2]
    assert math.isclose(fed.defense.spent(state.ledger)["sample_rate"], 1.0)
