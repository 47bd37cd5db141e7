"""Masks that cancel, a server that reads the sum alone, and a record that holds no more than crossed the wire."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from defenses.secure_aggregation import SecureAggregation, fixed
from fedgc.errors import UsageError, WorkFailedError
from fedgc.files import read_tensors
from fedgc.rng import generator
from fedgc.runs import RunDirectory
from fedgc.threats import THREATS
from fedgc.types import BACKBONE, HEAD, Tensors
from tests.fedgc.test_threats import carries

CLIENTS = (0, 2, 5)


def shares(seed: int = 0) -> dict[int, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {k: {"a": torch.randn(50, 40, generator=draw), "b": 1e-4 * torch.randn(7, generator=draw)} for k in CLIENTS}


def masked(defense: SecureAggregation, share: Tensors, client: int, key: int = 1, present=CLIENTS) -> Tensors:
    return defense.masked(client, share, present, lambda k: generator(key, "mask", min(k, client), max(k, client)))


@pytest.mark.parametrize("bits", [16, 40])
def test_masked_shares_sum_to_the_sum(bits: int) -> None:
    defense, plain = SecureAggregation(bits=bits), shares()
    sent = [masked(defense, share, k) for k, share in plain.items()]
    for name in ("a", "b"):
        total = torch.zeros_like(sent[0][name])
        for message in sent:
            total += message[name]
        assert torch.equal(
            total, sum(fixed(plain[k][name], bits) for k in CLIENTS)
        )  # the masks are gone, to the last bit
        exact = sum(plain[k][name].double() for k in CLIENTS)
        found = defense.unmasked({name: total})[name].double()
        assert float((found - exact).abs().max()) <= 3 * 2.0 ** -(bits + 1) + 1e-6 * float(exact.abs().max())


def test_a_single_masked_update_says_nothing_of_the_plain_one() -> None:
    """Uniform over the ring, for any plain update: with other pair keys, another message could stand for it as well."""
    defense, plain = SecureAggregation(), shares()[2]
    zeros = {name: torch.zeros_like(t) for name, t in plain.items()}
    sent, nothing = (masked(defense, share, 2)["a"] for share in (plain, zeros))
    for message in (sent, nothing):
        unit = message.flatten().double() / 2.0**64 + 0.5
        assert kstest(unit, "uniform").pvalue > 1e-3
        bits = torch.stack([(message.flatten() >> b) & 1 for b in range(64)]).double().mean(dim=1)
        assert float((bits - 0.5).abs().max()) < 5 * 0.5 / message.numel() ** 0.5
    pair = torch.stack([sent.flatten().double(), plain["a"].flatten().double()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / message.numel() ** 0.5
    assert torch.equal(sent - nothing, fixed(plain["a"], defense.bits))  # of one mask: masks must never be used twice
    assert not torch.equal(masked(defense, plain, 2, key=2)["a"], sent)


def test_every_round_and_record_has_masks_of_its_own(federation, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    whole = SecureAggregation.masked

    def spying(self, client, share, present, stream):
        out = whole(self, client, {n: torch.zeros_like(t) for n, t in share.items()}, present, stream)
        seen.append(out["backbone.embedding.weight"].flatten())
        return out

    monkeypatch.setattr(SecureAggregation, "masked", spying)
    fed = federation("fedgc", defense=SecureAggregation())
    state = fed.play(fed.initial_state()).state
    fed.play(state)
    assert len(seen) == 6
    assert not any(torch.equal(a, b) or torch.equal(a, -b) for i, a in enumerate(seen) for b in seen[:i])
    assert int(torch.stack(seen[:3]).sum(dim=0).abs().max()) == 0


def test_what_does_not_fit_the_ring_is_refused() -> None:
    big = {"a": torch.tensor([2.0**30])}
    with pytest.raises(WorkFailedError, match=r"lower defense\.bits"):
        masked(SecureAggregation(), big, 0)
    assert masked(SecureAggregation(bits=8), big, 0)


def test_a_sum_of_one_hides_nothing(federation, parties) -> None:
    for changes in ({"clients": parties[:1]}, {"participation": 0.1}):
        with pytest.raises(UsageError, match="1 client sends in a round"):
            federation("fedgc", defense=SecureAggregation(), **changes)


# -- what is seen


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_the_record_holds_no_update_that_the_server_did_not_read(
    federation, tmp_path: Path, algorithm: str, kind: str
) -> None:
    from fedgc.victims import victims

    fed, plain = (federation(algorithm, defense=d) for d in (SecureAggregation(), None))
    start = fed.initial_state()
    if kind == "round":
        hidden, known = (f.play(start).transcript for f in (fed, plain))
    else:
        hidden, known = (f.play_step(start, 0, *victims(f.parties, 1, 3, seed=0)[0])[0] for f in (fed, plain))
    run = RunDirectory(tmp_path / "run")
    run.create("")
    run.save_transcript("x", hidden)
    on_disk, _ = read_tensors(run.path / "transcript" / "x.safetensors")
    trained = {k: u.tensors for k, u in known.updates.items()}
    for k, tensors in trained.items():
        secret = tensors["backbone.embedding.weight"][0]
        assert carries(known, secret)
        for seen in (on_disk, hidden.updates, *(THREATS[s].observe(hidden) for s in ("server", "server-secagg"))):
            assert not carries(seen, secret), k
        assert (k in hidden.updates) is (algorithm == "fedgc")
        if algorithm == "fedgc":
            assert set(hidden.updates[k].tensors) == {HEAD}
    loaded = run.load_transcript("x")
    for seat in range(3):  # a client knows what it sent itself, from the disk too
        for t in (hidden, loaded):
            mine, theirs = (THREATS["client"].observe(x, seat=seat).aggregate for x in (t, known))
            assert mine.clients == theirs.clients
            for name, delta in mine.delta.items():
                torch.testing.assert_close(delta, theirs.delta[name], atol=2e-6, rtol=1e-3)
    assert (run.path / "attacker" / "own-x.safetensors").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_the_server_and_the_seat_behind_it_hold_the_exact_mean(federation, algorithm: str, kind: str) -> None:
    from fedgc.victims import victims

    fed, plain = (federation(algorithm, defense=d) for d in (SecureAggregation(), None))
    start = fed.play(plain.initial_state()).state
    if kind == "round":
        hidden, known = (f.play(start).transcript for f in (fed, plain))
    else:
        hidden, known = (f.play_step(start, 0, *victims(f.parties, 1, 3, seed=0)[0])[0] for f in (fed, plain))
    server, behind, without = (
        THREATS[seat].observe(t)
        for seat, t in (("server", hidden), ("server-secagg", hidden), ("server-secagg", known))
    )
    assert server.granted == behind.granted == without.granted
    assert "client-updates" not in server.granted
    assert ("class-embeddings" in server.granted) is (algorithm != "fedpe")
    images = sum(known.examples.values())
    for seen in (server, behind, without):
        assert seen.aggregate.clients == (0, 1, 2)
        assert seen.aggregate.images == images
        assert (HEAD in seen.aggregate.delta) is (algorithm == "fedavg")
        assert seen.aggregate.delta.keys() == seen.aggregate.before.keys()
        for name, delta in seen.aggregate.delta.items():
            exact = sum(known.examples[k] / images * known.updates[k].tensors[name].double() for k in range(3))
            torch.testing.assert_close(delta.double(), exact, atol=1e-9, rtol=1e-5)
    assert THREATS["server"].observe(known).client_updates is not None
    if algorithm == "fedgc":  # what is stacked cannot be summed away
        assert torch.equal(server.class_embeddings.weight, THREATS["server"].observe(known).class_embeddings.weight)


def test_a_record_of_few_clients_keeps_the_sum_of_all(federation) -> None:
    fed = federation("fedgc")
    start = fed.initial_state()
    whole, few = fed.play(start).transcript, fed.play(start, keep=lambda client: client == 0).transcript
    assert not whole.summed
    assert set(few.updates) == {0}
    a, b = (THREATS["server-secagg"].observe(t).aggregate for t in (whole, few))
    assert a.clients == b.clients == (0, 1, 2)
    assert all(torch.equal(delta, b.delta[name]) for name, delta in a.delta.items())
    assert all(name.startswith(BACKBONE) for name in a.delta)


def test_with_momentum_at_the_server_the_seat_holds_the_mean_and_not_the_step(federation) -> None:
    fed = federation("fedgc", defense=SecureAggregation(), server_momentum=0.8, server_lr=0.5)
    plain = federation("fedgc", server_momentum=0.8, server_lr=0.5)
    state = fed.play(fed.initial_state()).state
    hidden, known = (f.play(state).transcript for f in (fed, plain))
    mean, exact = (THREATS["server-secagg"].observe(t).aggregate.delta for t in (hidden, known))
    for name, delta in mean.items():
        torch.testing.assert_close(delta, exact[name], atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["centralized", "local"])
def test_who_trains_alone_sends_no_sum(federation, parties, algorithm: str) -> None:
    fed = federation(algorithm, clients=parties[:1])
    seen = THREATS["server-secagg"].observe(fed.play(fed.initial_state()).transcript)
    assert seen.aggregate is None
