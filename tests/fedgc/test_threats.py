"""What reaches whom: each seat's observation is exactly what its party sends or receives, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses.dp_sgd import DPSGD
from fedgc.algorithms import Push
from fedgc.models import build_backbone
from fedgc.schedule import Party
from fedgc.threats import THREATS, Knowledge, outsider_observation
from fedgc.types import (
    BACKBONE,
    GRANTS,
    GRANTS_OF_FIELDS,
    HEAD,
    Gallery,
    Observation,
    ObservedUpdate,
    Transcript,
    Truth,
)
from fedgc.victims import victims
from tests.fedgc.conftest import SPEC

OWNED = {"auxiliary-faces", "gallery"}
PUBLIC = {"public-constants", "global-model"}
SERVER = PUBLIC | {"client-updates"}
EXPECTED = {
    ("fedavg", "server"): SERVER | {"class-embeddings"},
    ("fedgc", "server"): SERVER | {"class-embeddings"},
    ("fedpe", "server"): SERVER,
    ("fedavg", "server-secagg"): PUBLIC | {"aggregate", "class-embeddings"},
    ("fedgc", "server-secagg"): PUBLIC | {"aggregate", "class-embeddings"},
    ("fedpe", "server-secagg"): PUBLIC | {"aggregate"},
    ("fedavg", "client"): PUBLIC | {"aggregate", "class-embeddings", "own-class-embeddings"},
    ("fedgc", "client"): PUBLIC | {"aggregate", "own-class-embeddings", "correction"},
    ("fedpe", "client"): PUBLIC | {"aggregate"},
    ("fedavg", "outsider"): PUBLIC,
    ("fedgc", "outsider"): PUBLIC,
    ("fedpe", "outsider"): PUBLIC,
}
SEATS = range(3)


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return Knowledge(torch.rand(4, 3, 32, 32), Gallery(torch.rand(2, 3, 32, 32), torch.arange(2)))


@pytest.fixture(scope="module")
def transcript(federation) -> Callable[..., Transcript]:
    """transcript(algorithm, kind="round"): of the second round, so that everything has moved."""

    @cache
    def record(algorithm: str, kind: str = "round", **changes: Any) -> Transcript:
        fed = federation(algorithm, **changes)
        state = fed.play(fed.initial_state()).state
        if kind == "round":
            return fed.play(state).transcript
        return fed.play_step(state, 0, *victims(fed.parties, 2, 6, seed=0)[0])[0]

    return record


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached from a value."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from tensors_in(inner)


def carries(value: Any, row: Tensor) -> bool:
    """Whether some tensor holds this row, whole, at any place of its memory."""
    width, steps = len(row), torch.arange(len(row))
    for tensor in tensors_in(value):
        if tensor.dtype == row.dtype and tensor.numel() >= width:
            flat = tensor.detach().reshape(-1)
            starts = torch.nonzero(flat[: len(flat) - width + 1] == row[0])
            if bool((flat[starts + steps] == row).all(dim=1).any()):
                return True
    return False


def rows_of(transcript: Transcript, client: int, state: Tensor) -> list[Tensor]:
    return [state[c] for c, owner in enumerate(transcript.owners) if owner == client]


# -- who is granted what


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize(("algorithm", "threat"), EXPECTED)
def test_exactly_the_expected_grants(transcript, knowledge, algorithm: str, threat: str, kind: str) -> None:
    t = transcript(algorithm, kind)
    for seat in SEATS:
        granted = set(THREATS[threat].observe(t, seat=seat).granted)
        assert granted == EXPECTED[algorithm, threat]
        assert set(THREATS[threat].observe(t, knowledge, seat).granted) == granted | OWNED
        assert granted | OWNED <= THREATS[threat].grants


def test_an_observation_says_what_it_is_of(transcript) -> None:
    t = transcript("fedgc", "step")
    seen = THREATS["client"].observe(t)
    assert (seen.threat, seen.algorithm, seen.round, seen.kind) == ("client", "fedgc", 2, "step")
    assert seen.public_constants == t.constants


GRANTED_FIELDS = sorted(GRANTS_OF_FIELDS)


@settings(max_examples=60, deadline=None)
@given(held=st.sets(st.sampled_from(GRANTED_FIELDS)), threat=st.sampled_from(sorted(THREATS)))
def test_a_seat_that_reads_beyond_its_grants_is_stopped(held: set[str], threat: str) -> None:
    """Whatever a view returns, an observation with a field outside the seat's grants never comes to be."""
    model = THREATS[threat]
    own = {"auxiliary_faces", "gallery", "public_constants"}
    greedy = dataclasses.replace(model, view=lambda t, seat: {name: torch.zeros(1) for name in held - own})
    allowed = {GRANTS_OF_FIELDS[name] for name in held - own} <= model.grants
    if allowed:
        seen = greedy.observe(EMPTY)
        not_none = {f.name for f in dataclasses.fields(seen) if getattr(seen, f.name) is not None}
        assert {GRANTS_OF_FIELDS[n] for n in not_none & GRANTS_OF_FIELDS.keys()} <= model.grants
    else:
        with pytest.raises(AssertionError, match="leaks"):
            greedy.observe(EMPTY)


EMPTY = Transcript("fedgc", 1, "round", None, {}, {}, {}, {}, {}, {}, (), {})  # type: ignore[arg-type]


def test_every_field_of_an_observation_is_a_grant_or_names_it() -> None:
    names = {f.name for f in dataclasses.fields(Observation)}
    assert names - {"threat", "algorithm", "round", "kind", "auxiliary_people"} == set(GRANTS_OF_FIELDS)
    assert all(model.grants <= set(GRANTS) for model in THREATS.values())


def types_in(hint: Any, seen: set[Any]) -> set[Any]:
    """Every type that a type's annotations reach."""
    if hint in seen:
        return seen
    seen.add(hint)
    for inner in getattr(hint, "__args__", ()):
        types_in(inner, seen)
    if dataclasses.is_dataclass(hint):
        for field_type in get_type_hints(hint).values():
            types_in(field_type, seen)
    return seen


def test_no_observation_can_reach_the_truth() -> None:
    reached = types_in(Observation, set())
    assert Gallery in reached  # the walk does go into fields, unions and tuples
    assert ObservedUpdate in reached
    assert Truth not in reached
    assert Transcript not in reached
    assert Party not in reached
    assert Truth not in types_in(Transcript, set())


# -- what BatchNorm layers remember


@pytest.mark.parametrize("threat", [t for t in THREATS if t != "probing-client"])  # nobody probes here
@pytest.mark.parametrize("kind", ["round", "step"])
def test_every_seat_holds_the_running_statistics_of_a_released_model(transcript, threat: str, kind: str) -> None:
    t = transcript("fedgc", kind, spec=replace(SPEC, norm="batch"))
    held = THREATS[threat].observe(t).normalisation_statistics
    layers = sum(isinstance(m, torch.nn.BatchNorm2d) for m in build_backbone(t.constants.spec, seed=0).modules())
    assert len(held) == 2 * layers > 0
    assert all(torch.equal(x, t.released[name]) for name, x in held.items())
    assert all(float(x.std()) > 0 for x in held.values())  # the round before it has moved them


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_there_are_no_running_statistics_where_no_layer_keeps_any(transcript, norm: str) -> None:
    t = transcript("fedgc", spec=replace(SPEC, norm=norm))
    assert all(threat.observe(t).normalisation_statistics is None for threat in THREATS.values())


# -- the server


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc"])
def test_the_server_reads_every_update_and_every_class_embedding(transcript, algorithm: str, kind: str) -> None:
    t = transcript(algorithm, kind)
    seen = THREATS["server"].observe(t)
    assert [u.clients for u in seen.client_updates] == [(0,), (1,), (2,)]
    for k, update in enumerate(seen.client_updates):
        assert update.delta == t.updates[k].tensors
        assert update.before.keys() == update.delta.keys()
        assert update.images == t.examples[k]
        assert update.classes == t.rows[k]
        assert len(update.classes) == len(update.delta[HEAD]) == len(update.before[HEAD])
    assert seen.class_embeddings.classes == tuple(range(7))
    if algorithm == "fedgc":  # what the owners uploaded, before the correction
        for c, row in zip(seen.class_embeddings.classes, seen.class_embeddings.weight, strict=True):
            owner = t.owners[c]
            i = t.rows[owner].index(c)
            assert torch.equal(row, t.sent[owner][HEAD][i] + t.updates[owner].tensors[HEAD][i])


@pytest.mark.parametrize("kind", ["round", "step"])
def test_no_head_reaches_the_server_of_fedpe(transcript, federation, kind: str) -> None:
    t = transcript("fedpe", kind)
    fed = federation("fedpe")
    states = [fed.initial_state()]
    for _ in range(2):
        states.append(fed.play(states[-1]).state)
    for message in (t, THREATS["server"].observe(t)):
        assert not any(carries(message, row) for state in states for row in state.rows)
    seen = THREATS["server"].observe(t)
    for update in seen.client_updates:
        assert not update.classes
        assert all(name.startswith(BACKBONE) for name in (*update.before, *update.delta))


def test_the_server_sees_nothing_of_whom_the_record_leaves_out(transcript) -> None:
    t = transcript("fedgc")
    t = dataclasses.replace(t, updates={0: t.updates[0]})
    seen = THREATS["server"].observe(t)
    assert [u.clients for u in seen.client_updates] == [(0,)]
    assert seen.class_embeddings.classes == (0, 1)


# -- a client


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("algorithm", ["fedpe", "fedgc"])
def test_no_foreign_class_embedding_reaches_a_client(transcript, federation, algorithm: str, kind: str) -> None:
    """Neither before training, nor as trained, nor as corrected."""
    fed = federation(algorithm)
    before = fed.play(fed.initial_state()).state
    after = fed.play(before).state.rows
    t = transcript(algorithm, kind)
    heads = [u.tensors[HEAD] for u in t.updates.values() if HEAD in u.tensors]
    trained = before.rows + torch.cat(heads) if heads else before.rows
    back = torch.cat([m[HEAD] for m in t.returned.values()]) if t.returned else after
    for seat in SEATS:
        seen = THREATS["client"].observe(t, seat=seat)
        for stage in (fed.initial_state().rows, before.rows, trained, after, back):
            for owner in set(SEATS) - {seat}:
                assert not any(carries(seen, row) for row in rows_of(t, owner, stage))
    own = rows_of(t, 0, back)
    assert all(carries(THREATS["client"].observe(t), row) for row in own) is (algorithm == "fedgc")


@pytest.mark.parametrize("kind", ["round", "step"])
def test_fedavg_shows_a_client_every_foreign_class_embedding(transcript, kind: str) -> None:
    t = transcript("fedavg", kind)
    for seat in SEATS:
        seen = THREATS["client"].observe(t, seat=seat)
        foreign = [c for c, owner in enumerate(t.owners) if owner != seat]
        assert seen.class_embeddings.classes == tuple(foreign)
        assert torch.equal(seen.class_embeddings.weight, t.released[HEAD][foreign])
        assert {t.owners[c] for c in seen.own_class_embeddings.classes} == {seat}
        assert all(carries(seen, row) for c in foreign for row in [t.released[HEAD][c]])


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_the_aggregate_without_ones_own_share_is_the_others_mean(transcript, algorithm: str, kind: str) -> None:
    t = transcript(algorithm, kind)
    for seat in SEATS:
        seen = THREATS["client"].observe(t, seat=seat).aggregate
        others = [k for k in SEATS if k != seat]
        photos = sum(t.examples[k] for k in others)
        assert seen.clients == tuple(others)
        assert seen.images == photos
        assert seen.delta.keys() == seen.before.keys() == t.broadcast.keys()
        for name, delta in seen.delta.items():
            mean = sum(t.examples[k] / photos * t.updates[k].tensors[name] for k in others)
            torch.testing.assert_close(delta, mean, rtol=1e-3, atol=2e-6)


def test_who_was_away_sees_the_whole_aggregate(transcript) -> None:
    t = transcript("fedgc", participation=0.67)
    (absent,) = set(SEATS) - set(t.examples)
    seen = THREATS["client"].observe(t, seat=absent)
    assert seen.aggregate.clients == tuple(t.examples)
    assert seen.correction is None  # it uploaded nothing, so nothing was answered
    for name, delta in seen.aggregate.delta.items():
        torch.testing.assert_close(delta, t.released[name] - t.broadcast[name])


def test_a_correction_is_what_came_back_less_what_was_sent(transcript, federation) -> None:
    t = transcript("fedgc")
    for seat in SEATS:
        seen = THREATS["client"].observe(t, seat=seat)
        uploaded = t.sent[seat][HEAD] + t.updates[seat].tensors[HEAD]
        assert torch.equal(seen.correction.weight, t.returned[seat][HEAD] - uploaded)
        assert seen.correction.classes == seen.own_class_embeddings.classes == t.rows[seat]
        assert torch.equal(seen.own_class_embeddings.weight, t.returned[seat][HEAD])
        assert float(seen.correction.weight.norm()) > 0
    uncorrected = transcript("fedgc", push=Push(weight=0.0))
    seen = THREATS["client"].observe(uncorrected)
    torch.testing.assert_close(seen.correction.weight, torch.zeros(2, 16))


@pytest.mark.parametrize("algorithm", ["centralized", "fedavg", "fedpe", "fedgc"])
def test_a_federation_of_one_has_no_others(federation, parties, algorithm: str) -> None:
    fed = federation(algorithm, clients=parties[:1])
    t = fed.play(fed.initial_state()).transcript
    seen = THREATS["client"].observe(t)
    assert seen.aggregate is None
    assert seen.class_embeddings is None


# -- an outsider


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_an_outsider_holds_the_released_backbone_alone(transcript, algorithm: str, kind: str) -> None:
    t = transcript(algorithm, kind)
    seen = THREATS["outsider"].observe(t)
    assert seen.global_model.keys() == {name for name in t.released if name.startswith(BACKBONE)}
    assert all(torch.equal(x, t.released[name]) for name, x in seen.global_model.items())
    assert len(list(tensors_in(seen))) == len(seen.global_model)


def test_a_found_checkpoint_shows_what_is_in_it(transcript, knowledge) -> None:
    t = transcript("fedgc")
    bare = outsider_observation(t.released, None, t.constants, knowledge)
    assert set(bare.granted) == PUBLIC | OWNED
    rows = torch.rand(5, 16)
    full = outsider_observation(t.released, rows, t.constants, knowledge)
    assert set(full.granted) == PUBLIC | OWNED | {"class-embeddings"}
    assert full.class_embeddings.classes == (0, 1, 2, 3, 4)


def test_the_search_for_rows_does_find_them() -> None:
    row = torch.rand(16)
    hidden = torch.cat([torch.rand(5), row, torch.rand(7)])
    assert carries({"a": [(hidden.reshape(4, 7),)]}, row)
    assert not carries(torch.rand(100), row)


# -- secrets of the defense


def test_public_constants_do_not_hold_the_seed_of_the_noise(transcript) -> None:
    t = transcript("fedgc", defense=DPSGD(noise_multiplier=1.0, delta=1e-2, noise_seed=12345))
    for threat in THREATS.values():
        card = threat.observe(t).public_constants.defense
        assert card["noise_multiplier"] == 1.0
        assert "noise_seed" not in card
