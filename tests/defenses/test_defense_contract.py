"""What holds of every defense: its record, its card, its refusals, and that it does nothing where its setting is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from defenses.blinded_correction import BlindedCorrection
from defenses.client_dp import ClientDP
from defenses.clip_only import ClipOnly
from defenses.correction_noise import CorrectionNoise
from defenses.dp_sgd import DPSGD
from defenses.embedding_noise import EmbeddingNoise
from defenses.none import NoDefense
from defenses.pruning import Pruning
from defenses.quantization import Quantization
from defenses.registry import DEFENSES, AnyDefense
from defenses.row_step_bound import RowStepBound
from defenses.secure_aggregation import SecureAggregation
from fedgc.algorithms import ALGORITHMS
from fedgc.doors import Defense
from fedgc.errors import UsageError
from fedgc.pipeline.listing import listing
from fedgc.runs import RunDirectory
from fedgc.types import HEAD, State
from fedgc.victims import victims
from tests.fedgc.test_federation import close, same_state, same_transcript

AT_WORK: tuple[Defense, ...] = (
    NoDefense(),
    DPSGD(noise_multiplier=1.0, delta=1e-2, noise_seed=5),
    ClientDP(noise_multiplier=0.5, delta=1e-2, noise_seed=5),
    ClientDP(noise_multiplier=0.5, delta=1e-2, noise="local"),
    ClipOnly(max_grad_norm=0.1),
    Pruning(keep=0.1),
    Quantization(bits=2),
    SecureAggregation(),
    EmbeddingNoise(scale=0.5),
    CorrectionNoise(clip=0.01, noise=0.5, drop_below=0.001),
    RowStepBound(bound=0.02),
    BlindedCorrection(noise_seed=5),
)
EXACTLY_OFF: tuple[Defense, ...] = (
    ClipOnly(max_grad_norm=1e6),
    Pruning(keep=1.0),
    CorrectionNoise(clip=1e6, noise=0.0),
    RowStepBound(bound=1e6),
)
NEARLY_OFF: tuple[tuple[Defense, float], ...] = (
    (EmbeddingNoise(scale=0.0), 1e-5),
    (SecureAggregation(bits=45), 1e-5),
    (ClientDP(noise_multiplier=1e-12, max_grad_norm=1e3, delta=1e-2), 1e-5),
    (Quantization(bits=8), 3e-2),
)
EVERYWHERE = {"none", "dp-sgd"}
CORRECTED = {"fedgc", "fedcos", "fedaws"}
SENT = {"fedavg", "fedpe"} | CORRECTED
USED = {
    **dict.fromkeys(("client-dp", "clip-only", "pruning", "quantization", "secure-aggregation"), SENT),
    **dict.fromkeys(("embedding-noise", "correction-noise", "row-step-bound", "blinded-correction"), CORRECTED),
    **{name: set(ALGORITHMS) for name in EVERYWHERE},
}


def ids(defense: Any) -> str:
    return defense.kind if isinstance(defense, Defense) else str(defense)


def suits(defense: Defense) -> list[str]:
    return [a for a in ("fedgc", "fedavg", "fedpe") if a in USED[defense.name]]


def played(fed: Any, rounds: int = 2) -> State:
    state = fed.initial_state()
    for _ in range(rounds):
        state = fed.play(state).state
    return state


def test_the_table_holds_every_defense() -> None:
    assert {d.name for d in AT_WORK} == set(DEFENSES) == set(USED)


@pytest.mark.parametrize("defense", AT_WORK, ids=ids)
def test_a_defense_is_frozen_and_its_own_record(defense: Defense) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        defense.name = "other"  # type: ignore[misc]
    record = json.loads(json.dumps(defense.model_dump(mode="json")))
    assert TypeAdapter(AnyDefense).validate_python(record) == defense
    with pytest.raises(ValidationError, match="extra"):
        type(defense)(**record, other=1)


@pytest.mark.parametrize("defense", AT_WORK, ids=ids)
def test_the_card_tells_the_mechanism_and_no_seed(defense: Defense) -> None:
    card = defense.card()
    assert card["name"] == defense.name
    told = set(type(defense).model_fields) - {"noise_seed"}
    assert set(card) == {field for field in told if getattr(defense, field) is not None}


def test_they_are_listed_with_what_they_do() -> None:
    rows = {row["name"]: row for row in listing("defenses")}
    assert set(rows) == set(DEFENSES)
    assert all(row["what"] for row in rows.values())
    assert "keep" in rows["pruning"]["settings"]


@pytest.mark.parametrize("defense", AT_WORK, ids=ids)
def test_only_differential_privacy_promises_anything(defense: Defense) -> None:
    assert (defense.spent(()) is not None) is (defense.name in ("dp-sgd", "client-dp"))


@pytest.mark.parametrize("defense", AT_WORK, ids=ids)
def test_what_a_scheme_has_nothing_for_is_refused_before_the_first_round(federation, parties, defense) -> None:
    for algorithm in ALGORITHMS:
        if algorithm in USED[defense.name]:
            assert federation(algorithm, defense=defense).defense.name == defense.name
            continue
        with pytest.raises(UsageError, match=rf"there is none under {algorithm}: use it with"):
            federation(algorithm, defense=defense)


@pytest.mark.parametrize("kind", ["group", "batch"])
@pytest.mark.parametrize("defense", [ClientDP(noise_multiplier=1.0, delta=1e-2), Quantization()], ids=ids)
def test_noise_on_running_statistics_is_refused(federation, defense: Defense, kind: str) -> None:
    from dataclasses import replace

    from tests.fedgc.conftest import SPEC

    spec = replace(SPEC, norm=kind)
    if kind == "group":
        assert federation(spec=spec, defense=defense)
        return
    with pytest.raises(UsageError, match=r"--set model\.norm=group"):
        federation(spec=spec, defense=defense)


@pytest.mark.parametrize("defense", AT_WORK[2:], ids=ids)
def test_no_defense_changes_what_no_client_trains(federation, defense: Defense) -> None:
    """BatchNorm held constant stays as public weights left it, noise or not."""
    from dataclasses import replace

    from tests.fedgc.conftest import SPEC

    fed = federation("fedgc", spec=replace(SPEC, norm="frozen"), defense=defense)
    start = fed.initial_state()
    state = fed.play(start).state
    assert fed.constant
    assert all(torch.equal(state.backbone[name], start.backbone[name]) for name in fed.constant)
    moved = [name for name in state.backbone if name not in fed.constant]
    assert all(not torch.equal(state.backbone[name], start.backbone[name]) for name in moved if "embedding" in name)


@pytest.mark.parametrize("defense", EXACTLY_OFF, ids=ids)
def test_without_bite_training_is_that_of_none_bit_for_bit(federation, defense: Defense) -> None:
    for algorithm in suits(defense):
        changed, plain = (federation(algorithm, defense=d) for d in (defense, None))
        assert same_state(played(changed), played(plain))


@pytest.mark.parametrize(("defense", "tolerance"), NEARLY_OFF, ids=ids)
def test_without_bite_training_is_that_of_none_to_rounding(federation, defense: Defense, tolerance: float) -> None:
    for algorithm in suits(defense):
        changed, plain = (played(federation(algorithm, defense=d)) for d in (defense, None))
        close(changed.backbone, plain.backbone, atol=tolerance)
        torch.testing.assert_close(changed.rows, plain.rows, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("defense", [*AT_WORK[2:7], *AT_WORK[8:]], ids=ids)
def test_at_work_it_changes_training(federation, defense: Defense) -> None:
    for algorithm in suits(defense):
        changed, plain = (played(federation(algorithm, defense=d)) for d in (defense, None))
        assert any(float((changed.backbone[n] - t).abs().max()) > 1e-5 for n, t in plain.backbone.items())


@pytest.mark.parametrize("defense", AT_WORK[2:], ids=ids)
def test_a_round_is_a_function_of_its_state_and_survives_the_disk(federation, tmp_path: Path, defense: Defense) -> None:
    """What resuming rests on: the same bits again, in another federation, from a state that was written and read."""
    run = RunDirectory(tmp_path / "run")
    run.create("")
    for algorithm in suits(defense):
        fed, other = (federation(algorithm, defense=defense) for _ in range(2))
        state = fed.play(fed.initial_state()).state
        run.save_round(state, {"round": 1}, fed.spec)
        loaded = run.load_state(1)
        assert loaded is not None
        assert loaded.kept.keys() == state.kept.keys() == ({HEAD} if defense.keeps_rows else set())
        first = fed.play(state)
        photos, labels = victims(fed.parties, 2, 4, seed=0)[0]
        fed.play_step(state, 0, photos, labels)
        for again in (fed.play(state), other.play(loaded)):
            assert same_state(again.state, first.state)
            assert same_transcript(again.transcript, first.transcript)
            assert all(torch.equal(again.state.kept[n], t) for n, t in first.state.kept.items())
