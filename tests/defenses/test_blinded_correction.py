"""The blinded correction against the plain one: the same training, and nothing but turned rows on the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from defenses.blinded_correction import BlindedCorrection, rotation
from defenses.none import NoDefense
from fedgc.algorithms import ALGORITHMS, Push
from fedgc.client import clients_secret
from fedgc.data.synthetic import synthetic_faces
from fedgc.doors import Defense
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.probing import Probing
from fedgc.rng import generator
from fedgc.schedule import Party, Schedule
from fedgc.transcripts import rows_read
from fedgc.types import HEAD, ModelSpec, State

SPEC = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
KEY = 7
TOLERANCE = 2e-6  # of three rounds in float32, which were seen to differ by 2e-7
PUSHES = {
    "normalised": ("fedgc", Push(weight=3.0)),
    "raw": ("fedgc", Push(weight=3.0, normalised=False)),
    "all classes": ("fedgc", Push(weight=3.0, all_classes=True)),
    "sampled": ("fedgc", Push(weight=3.0, sample_above=3)),
    "fedcos": ("fedcos", Push(weight=0.1)),
    "fedcos, squared": ("fedcos", Push(weight=0.1, squared=True)),
    "fedaws": ("fedaws", Push(weight=0.1, margin=1.2)),
}
each_push = pytest.mark.parametrize(("algorithm", "push"), PUSHES.values(), ids=list(PUSHES))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parties() -> list[Party]:
    faces, people = synthetic_faces(6, 4, 32, seed=1)
    return [Party(k, faces[mine], people[mine], (2 * k, 2 * k + 1)) for k in range(3) for mine in [people // 2 == k]]


@pytest.fixture(scope="module")
def federation(parties: list[Party]) -> Callable[..., Federation]:
    def build(
        algorithm: str = "fedgc",
        push: Push | None = None,
        defense: Defense | None = None,
        probing: Probing | None = None,
    ) -> Federation:
        schedule = Schedule(
            rounds=3, local_epochs=1, batch_size=4, lr=0.05, head_lr_factor=2.0, momentum=0.9, weight_decay=1e-3,
            clip_norm=None, participation=1.0, push=push or Push(weight=3.0), augment=False,
        )  # fmt: skip
        defense = defense or BlindedCorrection()
        cpu = torch.device("cpu")
        return Federation(ALGORITHMS[algorithm], SPEC, schedule, parties, defense, 0, KEY, cpu, None, probing)

    return build


def opened(rows: Tensor) -> Tensor:
    return BlindedCorrection().unblinded(rows, clients_secret(KEY))


def turned(rows: Tensor) -> Tensor:
    return BlindedCorrection().blinded(rows, clients_secret(KEY))


def plain_start(blinded: State) -> State:
    return replace(blinded, rows=opened(blinded.rows))


def test_a_rotation_is_orthogonal_and_its_secrets_own() -> None:
    R = rotation(64, generator("secret"))
    torch.testing.assert_close(R @ R.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(R, rotation(64, generator("secret")))
    assert (R - rotation(64, generator("another"))).abs().max() > 0.1
    corner = torch.tensor([float(rotation(8, generator("uniform", i))[0, 0]) for i in range(400)])
    assert abs(float(corner.mean())) < 4 / (8 * 400) ** 0.5  # Q of a bare QR has a first entry of one sign


@each_push
def test_every_push_turns_with_the_rows(algorithm: str, push: Push) -> None:
    W = torch.randn(12, 16, generator=generator("W"), dtype=torch.float64) / 4
    owner, R = torch.arange(12) // 3, rotation(16, generator("R"))
    one, other = (
        ALGORITHMS[algorithm].next_rows(rows, owner, push, 0.05, generator("negatives")) for rows in (W @ R, W)
    )
    assert (other - W).norm() > 1e-3
    torch.testing.assert_close(one, other @ R, rtol=0, atol=1e-11)


@each_push
def test_training_is_that_without_the_defense(federation, algorithm: str, push: Push) -> None:
    """From the same start, which the server holds turned: after three rounds, to float32 rounding."""
    blind, plain = federation(algorithm, push), federation(algorithm, push, NoDefense())
    one = blind.initial_state()
    start = other = plain_start(one)
    for _ in range(3):
        one, other = blind.play(one).state, plain.play(other).state
    assert (other.rows - start.rows).norm(dim=1).min() > 0.05
    torch.testing.assert_close(opened(one.rows), other.rows, rtol=0, atol=TOLERANCE)
    for name in other.backbone:
        torch.testing.assert_close(one.backbone[name], other.backbone[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["round", "step"])
def test_the_wire_carries_turned_rows_alone(federation, parties: list[Party], kind: str) -> None:
    blind, plain = federation(), federation(defense=NoDefense())
    state = blind.play(blind.initial_state()).state
    if kind == "round":
        seen, true = blind.play(state).transcript, plain.play(plain_start(state)).transcript
    else:
        photos, labels = torch.stack([p.photos[:1] for p in parties]), torch.stack([p.labels[:1] for p in parties])
        seen, true = (f.play_step(s, 0, photos, labels)[0] for f, s in ((blind, state), (plain, plain_start(state))))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)  # noqa: E731
    read = rows_read(seen, opened)
    for k in range(3):
        assert torch.equal(seen.sent[k][HEAD], state.rows[2 * k : 2 * k + 2])
        for place in ("sent", "returned"):
            wire, clear = getattr(seen, place)[k][HEAD], getattr(true, place)[k][HEAD]
            close(wire, turned(clear))
            close(getattr(read, place)[k][HEAD], clear)
            assert torch.nn.functional.cosine_similarity(wire, clear).max() < 0.9
        close(seen.updates[k].tensors[HEAD], turned(true.updates[k].tensors[HEAD]))
        close(read.updates[k].tensors[HEAD], true.updates[k].tensors[HEAD])
        for name in true.updates[k].tensors:
            if name != HEAD:  # the backbone is not turned
                close(seen.updates[k].tensors[name], true.updates[k].tensors[name])
    assert seen.constants.defense == {"name": "blinded-correction"}


def test_the_server_begins_with_rows_that_it_may_know_and_whose_meaning_it_does_not(federation) -> None:
    """Were the plain rows a function of the run's seed, they and what is sent would be the pairs that give R away."""
    blind, plain = federation(), federation(defense=NoDefense())
    assert torch.equal(blind.initial_state().rows, plain.initial_state().rows)


def test_a_probing_client_probes_as_before(federation) -> None:
    probing = Probing(0, 1)
    blind, plain = federation(probing=probing), federation(defense=NoDefense(), probing=probing)
    one = blind.initial_state()
    other = plain_start(one)
    for _ in range(3):
        one, other = blind.play(one).state, plain.play(other).state
    for name in ("own", "sent", "answer"):
        torch.testing.assert_close(opened(one.probes[name]), other.probes[name], rtol=0, atol=1e-4)
    for name in other.backbone:
        torch.testing.assert_close(one.backbone[name], other.backbone[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("algorithm", ["centralized", "local", "fedavg", "fedpe"])
def test_where_no_rows_go_to_the_server_and_back_it_is_refused(federation, algorithm: str) -> None:
    with pytest.raises(UsageError, match=f"there is none under {algorithm}: use it with federation.algorithm = fedgc"):
        federation(algorithm)


def test_the_card_tells_nothing_of_the_secret() -> None:
    assert BlindedCorrection(noise_seed=3).card() == {"name": "blinded-correction"}
