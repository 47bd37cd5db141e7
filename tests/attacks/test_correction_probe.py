"""The correction of one's own class embeddings, read as what it is: a mean of strangers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attacks.correction_probe import CorrectionProbe
from fedgc.correction import regulariser
from fedgc.errors import RefusedError
from fedgc.rng import generator
from fedgc.types import HEAD


def test_the_answer_is_the_push_of_strangers_across_the_row(world) -> None:
    built = world("fedgc", kind="round")
    t = built.transcript
    found = CorrectionProbe()(built.seen_by("client"), generator(0))
    uploaded = torch.cat([t.sent[k][HEAD] + t.updates[k].tensors[HEAD] for k in (0, 1)]).double().requires_grad_()
    owner = torch.tensor([k for k in (0, 1) for _ in t.rows[k]])
    (push,) = torch.autograd.grad(regulariser(uploaded, owner, 8.0), uploaded)
    torch.testing.assert_close(found.embeddings.double(), F.normalize(push[:6], dim=1), rtol=0, atol=2e-3)
    assert found.sources == t.rows[0]
    assert found.scores.shape == (6, built.knowledge.gallery.size)


def test_a_stranger_next_to_a_row_is_what_its_answer_shows() -> None:
    """Scale 30, one stranger near the row: the answer points to its part across the row, float64 oracle by hand."""
    from fedgc.correction import gradient
    from fedgc.probing import answer_of

    draw = torch.randn(6, 16, generator=generator("near"), dtype=torch.float64)
    row = F.normalize(draw[:1], dim=1)
    near = F.normalize(row + 0.3 * F.normalize(draw[1:2], dim=1), dim=1)
    W = torch.cat([row, near, F.normalize(draw[2:], dim=1)])
    owner = torch.tensor([0, 1, 1, 1, 1, 1])
    received = W - 0.1 * gradient(W, owner, 30.0)
    across = near - (near * row).sum() * row
    assert float((answer_of(row, received[:1]) * F.normalize(across, dim=1)).sum()) > 0.999


@pytest.mark.parametrize(
    ("algorithm", "seat", "why"),
    [
        ("fedgc", "server", "in the clear"),
        ("fedavg", "client", "in the clear"),
        ("fedpe", "client", "holds only"),
        ("fedgc", "outsider", "holds only"),
    ],
)
def test_who_gets_no_answer_is_refused(world, algorithm: str, seat: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        CorrectionProbe()(world(algorithm, kind="round").seen_by(seat), generator(0))
