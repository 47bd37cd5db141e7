"""A client that uploads rows of its choice: it reads strangers' class embeddings, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from defenses.none import NoDefense
from fedgc.algorithms import ALGORITHMS, Push
from fedgc.config import load_config
from fedgc.correction import gradient
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.probing import Probing, next_probes
from fedgc.rng import generator
from fedgc.rounds import Rounds
from fedgc.schedule import Party, Schedule
from fedgc.threats import THREATS
from fedgc.types import HEAD, ModelSpec, State

SPEC = ModelSpec("small", "group", 32, 32, "cosface", 0.25, 16.0)
SCHEDULE = Schedule(
    rounds=4, local_epochs=1, batch_size=8, lr=0.05, head_lr_factor=2.0, momentum=0.9, weight_decay=1e-3,
    clip_norm=1.0, participation=1.0, push=Push(weight=1.0), augment=False,
)  # fmt: skip


def federation(algorithm: str, probing: Probing | None, weight: float = 1.0) -> Federation:
    faces, people = synthetic_faces(12, 3, 32, seed=1)
    parties = [
        Party(k, faces[mine], people[mine], tuple(range(6 * k, 6 * k + 6)))
        for k in range(2)
        for mine in [(people // 6) == k]
    ]
    schedule = replace(SCHEDULE, push=Push(weight=weight))
    return Federation(
        ALGORITHMS[algorithm], SPEC, schedule, parties, NoDefense(), 0, 1, torch.device("cpu"), None, probing
    )


def played(parties: Federation, rounds: int, state: State | None = None) -> State:
    state = state or parties.initial_state()
    for _ in range(rounds):
        state = parties.play(state).state
    return state


def test_probes_climb_to_strangers_that_stay() -> None:
    """Fixed strangers, float64: nearly every probe of ten ends at one of forty, from where it saw none."""
    draw = torch.randn(50, 32, generator=generator("strangers"), dtype=torch.float64)
    W, owner = F.normalize(draw, dim=1), torch.tensor([0] * 10 + [1] * 40)
    plan, received, probes = Probing(0, 1), W[:10], None
    for t in range(1, 17):
        probes = next_probes(plan, t, 0, received, probes)
        V = torch.cat([probes.sent, W[10:]])
        received = (V - 0.1 * gradient(V, owner, 16.0))[:10]
    nearest = (probes.sent @ W[10:].T).amax(dim=1)
    assert float((W[:10] @ W[10:].T).amax(dim=1).max()) < 0.7
    assert int((nearest > 0.95).sum()) >= 8


def test_the_backbone_is_trained_honestly() -> None:
    """Where the server pushes nothing, a prober's federation is FedPE: the same backbone, and its own rows kept at home."""
    probing = played(federation("fedgc", Probing(0, 1), weight=0.0), 3)
    private = played(federation("fedpe", None), 3)
    assert all(torch.equal(probing.backbone[name], tensor) for name, tensor in private.backbone.items())
    torch.testing.assert_close(probing.probes["own"], private.rows[:6], rtol=0, atol=1e-6)
    torch.testing.assert_close(probing.rows[6:], private.rows[6:], rtol=0, atol=1e-6)


def test_nobody_probes_before_the_first_round_of_it() -> None:
    plain, later = played(federation("fedgc", None), 2), played(federation("fedgc", Probing(0, 3)), 2)
    assert torch.equal(plain.rows, later.rows)
    assert later.probes == {}


def test_the_server_holds_what_was_chosen_and_the_record_says_so() -> None:
    parties = federation("fedgc", Probing(0, 1, length=2.0))
    state = parties.initial_state()
    transcript = parties.play(state).transcript
    uploaded = transcript.sent[0][HEAD] + transcript.updates[0].tensors[HEAD]
    expected = 2 * F.normalize(state.rows[:6], dim=1)
    torch.testing.assert_close(uploaded, expected)
    assert transcript.prober == 0
    seen = THREATS["probing-client"].observe(transcript)
    torch.testing.assert_close(seen.probes.weight, expected)
    assert THREATS["client"].observe(transcript).global_model is None
    assert THREATS["client"].observe(transcript, seat=1).global_model is not None
    assert THREATS["probing-client"].observe(federation("fedgc", None).play(state).transcript).probes is None


def test_probes_begin_anew_where_they_should() -> None:
    plan = Probing(0, 3, restart=2)
    assert [t for t in range(3, 9) if plan.begins(t)] == [3, 5, 7]
    assert [t for t in range(1, 9) if Probing(0, 3).begins(t)] == [3]


def test_a_resumed_run_goes_on_probing_bit_for_bit(tmp_path) -> None:
    parties = federation("fedgc", Probing(0, 1))
    whole = played(parties, 3)
    rounds = Rounds(tmp_path)
    for folder in ("state", "checkpoints"):
        (tmp_path / folder).mkdir()
    rounds.save_round(played(parties, 2), {"round": 2}, SPEC)
    resumed = played(parties, 1, rounds.load_state())
    assert torch.equal(whole.rows, resumed.rows)
    assert whole.probes.keys() == resumed.probes.keys() != set()
    assert all(torch.equal(whole.probes[name], resumed.probes[name]) for name in whole.probes)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "centralized", "local"])
def test_there_is_nothing_to_probe_where_no_row_is_answered(algorithm: str) -> None:
    with pytest.raises(UsageError, match=r"probing\.rounds: a server answers class embeddings under fedgc"):
        federation(algorithm, Probing(0, 1))


def test_the_configuration_counts_rounds_from_the_end() -> None:
    assert load_config(settings=["probing.rounds=8"]).plan_of_probing() == Probing(0, 17)
    assert load_config(settings=["probing.rounds=99", "probing.restart=4"]).plan_of_probing().first == 1
    assert load_config().plan_of_probing() is None
