"""Defenses of class embeddings: noise on what is uploaded or returned, and a bound on how far it moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.correction_noise import CorrectionNoise
from defenses.embedding_noise import EmbeddingNoise
from defenses.row_step_bound import RowStepBound
from fedgc.algorithms import Push
from fedgc.probing import Probing
from fedgc.threats import THREATS
from fedgc.types import HEAD


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int = 400, d: int = 256) -> Tensor:
    lengths = torch.rand(count, 1, generator=stream(1), dtype=torch.float64) * 3 + 0.1
    return lengths * F.normalize(torch.randn(count, d, generator=stream(2), dtype=torch.float64), dim=1)


# -- embedding-noise


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_uploaded_rows_are_as_noisy_as_promised(scale: float) -> None:
    clean = rows()
    sent = EmbeddingNoise(scale=scale).uploading(0, clean, stream())
    per_coordinate = (sent - clean) / clean.norm(dim=1, keepdim=True) * 256**0.5
    assert float(per_coordinate.std()) == pytest.approx(scale, rel=0.01)
    assert float(F.cosine_similarity(sent, clean).mean()) == pytest.approx(1 / math.sqrt(1 + scale**2), abs=0.01)


def test_the_noise_is_one_draw_for_the_whole_run(federation) -> None:
    """Rows that do not change are uploaded alike in every round, so that no mean over rounds shows them."""
    fed = federation("fedgc", defense=EmbeddingNoise(scale=1.0), push=Push(weight=3.0))
    state = fed.initial_state()
    seen, clean = [], []
    for _ in range(3):
        t = fed.play(state).transcript
        seen.append(torch.cat([t.sent[k][HEAD] + t.updates[k].tensors[HEAD] for k in t.updates]))
        before, state = state, fed.play(state).state
        clean.append(state.kept[HEAD] - (state.rows - seen[-1]))  # as trained, before the answer
        assert not torch.equal(before.kept[HEAD], state.kept[HEAD])
    directions = [F.normalize(s - c, dim=1) for s, c in zip(seen, clean, strict=True)]
    for other in directions[1:]:
        torch.testing.assert_close(F.cosine_similarity(directions[0], other), torch.ones(7), atol=1e-4, rtol=0)
    mean = torch.stack(seen).mean(dim=0)
    assert float(F.cosine_similarity(mean, torch.stack(clean).mean(dim=0)).mean()) < 0.85


def test_the_client_trains_clean_rows_and_applies_the_answer_to_them(federation) -> None:
    fed = federation("fedgc", defense=EmbeddingNoise(scale=1.0))
    plain = federation("fedgc")
    start = fed.initial_state()
    first = fed.play(start)
    theirs = plain.play(plain.initial_state()).transcript
    for k, party in enumerate(fed.parties):
        mine = list(party.classes)
        sent = start.rows[mine] + first.transcript.updates[k].tensors[HEAD]
        trained = start.rows[mine] + theirs.updates[k].tensors[HEAD]
        answer = first.transcript.returned[k][HEAD] - sent
        torch.testing.assert_close(first.state.kept[HEAD][mine], trained + answer, atol=1e-5, rtol=1e-5)
    assert float(F.cosine_similarity(first.state.kept[HEAD], first.state.rows).mean()) < 0.9


def test_who_was_away_applies_the_answer_too(federation) -> None:
    fed = federation("fedgc", defense=EmbeddingNoise(scale=1.0), participation=0.67)
    before = fed.play(fed.initial_state()).state
    after = fed.play(before)
    (away,) = set(range(3)) - set(after.transcript.examples)
    mine = list(fed.parties[away].classes)
    answer = after.state.rows[mine] - before.rows[mine]
    assert float(answer.abs().max()) > 0
    torch.testing.assert_close(after.state.kept[HEAD][mine] - before.kept[HEAD][mine], answer, atol=1e-6, rtol=1e-4)


def test_the_server_reads_noisy_rows_and_no_clean_one(federation) -> None:
    fed = federation("fedgc", defense=EmbeddingNoise(scale=2.0))
    state = fed.play(fed.initial_state()).state
    result = fed.play(state)
    seen = THREATS["server"].observe(result.transcript)
    clean = result.state.kept[HEAD]
    assert seen.class_embeddings is not None
    assert float(F.cosine_similarity(seen.class_embeddings.weight, clean).mean()) < 0.75


# -- correction-noise


def test_a_returned_change_is_clipped_dropped_and_noised() -> None:
    uploaded = rows()
    unit = uploaded.norm(dim=1, keepdim=True)
    change = F.normalize(torch.randn(uploaded.shape, generator=stream(3), dtype=torch.float64), dim=1) * unit
    size = torch.linspace(0.001, 0.3, 400, dtype=torch.float64)[:, None]
    corrected = uploaded + size * change
    out = CorrectionNoise(clip=0.1, noise=0.0, drop_below=0.02).returning(0, corrected, uploaded, stream())
    moved = ((out - uploaded).norm(dim=1, keepdim=True) / unit)[:, 0]
    small, large = size[:, 0] < 0.02, size[:, 0] > 0.1
    assert torch.equal(out[small], uploaded[small])
    torch.testing.assert_close(moved[large], torch.full_like(moved[large], 0.1))
    assert torch.equal(out[~small & ~large], corrected[~small & ~large])
    torch.testing.assert_close(F.cosine_similarity(out - uploaded, change)[~small], torch.ones(400)[~small].double())
    noisy = CorrectionNoise(clip=0.1, noise=2.0).returning(0, corrected, uploaded, stream())
    calm = CorrectionNoise(clip=0.1, noise=0.0).returning(0, corrected, uploaded, stream())
    assert float(((noisy - calm) / unit * 256**0.5).std()) == pytest.approx(0.2, rel=0.01)


def test_what_is_clipped_is_what_the_correction_did_in_this_round(federation) -> None:
    fed = federation("fedgc", defense=CorrectionNoise(clip=0.0005, noise=0.0), push=Push(weight=30.0))
    t = fed.play(fed.play(fed.initial_state()).state).transcript
    for seat in range(3):
        seen = THREATS["client"].observe(t, seat=seat)
        uploaded = t.sent[seat][HEAD] + t.updates[seat].tensors[HEAD]
        lengths = seen.correction.weight.norm(dim=1) / uploaded.norm(dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.0005), rtol=1e-3, atol=0)
    none = federation("fedgc", defense=CorrectionNoise(clip=0.0), push=Push(weight=30.0))
    t = none.play(none.initial_state()).transcript
    assert all(torch.equal(t.returned[k][HEAD], t.sent[k][HEAD] + u.tensors[HEAD]) for k, u in t.updates.items())


# -- row-step-bound


@pytest.mark.parametrize("bound", [0.01, 0.5])
def test_a_move_is_scaled_back_to_the_bound_and_no_further(bound: float) -> None:
    held = rows()
    change = torch.randn(held.shape, generator=stream(3), dtype=torch.float64) * torch.linspace(0, 0.2, 400)[:, None]
    defense = RowStepBound(bound=bound)
    taken = defense.receiving(0, change, held)
    share = change.norm(dim=1) / held.norm(dim=1)
    assert bool((share > bound).any())
    assert torch.equal(taken[share <= bound], change[share <= bound])
    torch.testing.assert_close(
        (taken.norm(dim=1) / held.norm(dim=1))[share > bound * 1.01],
        torch.full((400,), bound).double()[share > bound * 1.01],
    )
    assert torch.equal(defense.receiving(0, taken, held), taken)
    angle = torch.acos(F.cosine_similarity(held + taken, held).clamp(max=1))
    assert float(angle.max()) <= math.asin(bound) + 1e-9


@pytest.mark.parametrize("defense", [None, RowStepBound(bound=0.05)], ids=["none", "row-step-bound"])
def test_a_probing_client_goes_no_further_than_the_bound(federation, defense) -> None:
    """It knows the rule: what it remembers to have sent is what the server took, and so its answer is of that."""
    fed = replace(federation("fedgc", defense=defense, push=Push(weight=30.0), rounds=6), probing=Probing(0, 2))
    state = fed.play(fed.initial_state()).state
    steps = []
    for _ in range(3):
        t = fed.play(state).transcript
        after = fed.play(state).state
        change, held = t.updates[0].tensors[HEAD], t.sent[0][HEAD]
        steps.append(float((change.norm(dim=1) / held.norm(dim=1)).max()))
        torch.testing.assert_close(after.probes["sent"], held + change)
        seen = THREATS["probing-client"].observe(t)
        torch.testing.assert_close(seen.correction.weight, t.returned[0][HEAD] - (held + change))
        state = after
    assert (max(steps) <= 0.05 * 1.001) is (defense is not None)


def test_probing_under_embedding_noise_leaves_the_clean_rows_alone(federation) -> None:
    fed = replace(federation("fedgc", defense=EmbeddingNoise(scale=1.0), rounds=6), probing=Probing(0, 2, start="own"))
    first = fed.play(fed.initial_state()).state
    second = fed.play(first)
    mine = list(fed.parties[0].classes)
    assert torch.equal(second.state.kept[HEAD][mine], first.kept[HEAD][mine])
    probes = THREATS["probing-client"].observe(second.transcript).probes
    assert probes is not None  # from its own class embeddings, which are not the noisy ones that the server holds
    torch.testing.assert_close(F.cosine_similarity(probes.weight, first.kept[HEAD][mine]), torch.ones(len(mine)))
