"""Shadow models and what they teach about people who were trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.membership import MembershipInference, evidence
from attacks.shadows import halves, strangers
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import RefusedError
from fedgc.rng import generator
from fedgc.types import ClassEmbeddings, Gallery


class Flat(nn.Module):
    """A backbone whose features can be written down: the mean colour of a photo."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)).double()


def test_evidence_is_what_it_says_by_hand() -> None:
    colours = torch.tensor([[0.6, 0.0, 0.8], [0.8, 0.0, 0.6], [0.0, 1.0, 0.0]])
    photos = colours[:, :, None, None].expand(3, 3, 4, 4).contiguous()
    rows = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = evidence(Flat(), rows, Gallery(photos, torch.tensor([0, 0, 1])))
    mean = F.normalize(colours[:2].double().mean(0), dim=0)
    expected = torch.tensor([[0.96, 1.0, float(mean[0])], [1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert evidence(Flat(), None, Gallery(photos, torch.tensor([0, 0, 1]))).shape == (2, 2)


def test_shadows_share_out_people_evenly() -> None:
    parts = halves(11, 6, generator("halves"))
    assert parts.sum(dim=0).tolist() == [3] * 11


def test_photos_that_are_looked_at_are_not_trained_on() -> None:
    faces, people = synthetic_faces(9, 5, 32, seed=0)
    own = strangers(faces.float() / 255, people)
    assert own.seen.size == 9
    assert len(own.trained) + len(own.seen.images) == 45
    key = lambda x: x.numpy().tobytes()  # noqa: E731
    assert {key(x) for x in own.trained}.isdisjoint({key((x * 255).round().to(torch.uint8)) for x in own.seen.images})
    assert strangers(faces[:30].float() / 255, people[:30]) is None


def test_without_strangers_told_apart_it_is_refused(world) -> None:
    seen = world("fedgc", kind="round").seen_by("outsider")
    with pytest.raises(RefusedError, match="eight strangers or more"):
        MembershipInference()(replace(seen, suspects=seen.gallery), generator(0))


@pytest.mark.slow
def test_class_embeddings_give_members_away(world) -> None:
    from attacks.shadows import trained

    built = world("fedgc", kind="round")
    faces, people = synthetic_faces(40, 14, 32, seed=8)
    suspects = Gallery(faces.float() / 255, people)
    constants = built.transcript.constants
    own = strangers(suspects.images, suspects.people)
    members = torch.arange(40) < 20
    victim = trained(own, members, constants, 60, generator("victim"), lambda epoch: None)
    others, of = synthetic_faces(60, 6, 32, seed=9)
    model = {f"backbone.{n}": t for n, t in victim.backbone.state_dict().items()}
    seen = replace(
        built.seen_by("outsider"), global_model=model, suspects=own.seen, auxiliary_faces=others.float() / 255,
        auxiliary_people=of, class_embeddings=ClassEmbeddings(victim.rows, tuple(range(20))),
    )  # fmt: skip
    found, control = MembershipInference(epochs=40)(seen, generator(0)).scores
    wins, chance = ((x[members][:, None] > x[~members]).float().mean() for x in (found, control))
    assert float(wins) > 0.7
    assert 0.25 < float(chance) < 0.75
