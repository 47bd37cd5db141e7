"""Closed forms of the head against gradients that autograd takes of `fedgc.heads`, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks import head_algebra as algebra
from fedgc import heads
from fedgc.rng import generator
from fedgc.types import HEAD, LocalConstants, ModelSpec, ObservedUpdate

MARGINS = ("none", "cosface", "arcface")
PULLS = (0.0, 0.5, 0.8)
D = 48


def constants(margin: str, strangers: int = 0) -> LocalConstants:
    spec = ModelSpec("small", "group", D, 32, margin, 0.3, 16.0, strangers)  # type: ignore[arg-type]
    return LocalConstants(
        spec, lr=0.01, head_lr_factor=4.0, momentum=0.0, weight_decay=0.1, clip_norm=None, batch_size=1,
        steps=1, augmented=False,
    )  # fmt: skip


class Step:
    """One step of a cosine head on features with cosine ``pull`` to their class, its gradient shortened to a ``factor``."""

    def __init__(
        self, labels: list[int], classes: int, pull: float, margin: str, seed: int = 0, strangers: int = 0,
        factor: float = 1.0,
    ) -> None:  # fmt: skip
        draw = generator("head algebra", seed)
        W = torch.randn(classes, D, generator=draw, dtype=torch.float64)
        W *= 0.5 + torch.rand(classes, 1, generator=draw, dtype=torch.float64)
        self.labels, self.constants = torch.tensor(labels), constants(margin, strangers)
        towards = F.normalize(W, dim=1)[self.labels]
        e = torch.randn(len(labels), D, generator=draw, dtype=torch.float64)
        e = F.normalize(e - (e * towards).sum(1, keepdim=True) * towards, dim=1)
        lengths = 1 + torch.rand(len(labels), 1, generator=draw, dtype=torch.float64)
        self.units = pull * towards + (1 - pull**2) ** 0.5 * e
        z = (lengths * self.units).requires_grad_()
        weight = W.clone().requires_grad_()
        cosines = F.normalize(z, dim=1) @ F.normalize(weight, dim=1).T
        cosines.retain_grad()
        heads.loss(cosines, self.labels, self.constants.spec).backward()
        self.by_cosine, self.by_feature = factor * cosines.grad, factor * z.grad * lengths
        self.gradient = factor * weight.grad
        self.update = self.observed(W, self.gradient)
        self.rows = algebra.head_rows(self.update, self.constants)

    def observed(self, W: Tensor, gradient: Tensor) -> ObservedUpdate:
        c = self.constants
        delta = -c.lr_of(HEAD) * (gradient + c.weight_decay * W)
        return ObservedUpdate((0,), {HEAD: W}, {HEAD: delta}, len(self.labels), tuple(range(len(W))))


def cosines_of(found: Tensor, true: Tensor) -> Tensor:
    """Cosine of each true feature with the nearest found one."""
    return (true @ F.normalize(found, dim=1).T).amax(dim=1)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cosine_head_is_told_by_rows_that_do_not_move_along_themselves(margin: str, dtype: torch.dtype) -> None:
    step = Step([3, 1], 12, 0.5, margin)
    before = {HEAD: step.update.before[HEAD].to(dtype)}
    after = (step.update.before[HEAD] + step.update.delta[HEAD]).to(dtype)
    update = replace(step.update, before=before, delta={HEAD: after - before[HEAD]})
    assert algebra.kind_of_head(algebra.head_rows(update, step.constants)) == "cosine"


@pytest.mark.parametrize("seed", range(10))
def test_a_plain_linear_head_is_told_apart_and_its_longest_row_is_the_label(seed: int) -> None:
    step = Step([seed], 12, 0.5, "none", seed)
    W = step.update.before[HEAD].clone().requires_grad_()
    z = 3 * torch.randn(1, D, generator=generator("linear", seed), dtype=torch.float64)
    F.cross_entropy(z @ W.T / 4, torch.tensor([seed])).backward()
    rows = algebra.head_rows(step.observed(W.detach(), W.grad), step.constants)
    assert algebra.kind_of_head(rows) == "linear"
    assert algebra.guess_labels(rows, 1).tolist() == [seed]


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("pull", PULLS)
@pytest.mark.parametrize("strangers", [0, 100])
def test_one_photo_gives_its_label_and_its_feature(margin: str, pull: float, strangers: int) -> None:
    for seed in range(5):
        step = Step([seed], 12, pull, margin, seed, strangers, factor=0.03)
        assert algebra.guess_labels(step.rows, 1).tolist() == [seed]
        assert float(algebra.embedding_of_one(step.rows, seed) @ step.units[0]) > 1 - 1e-9


def test_two_rows_are_enough_for_the_feature_and_one_is_not() -> None:
    step = Step([2], 12, 0.5, "cosface")
    two = replace(step.rows, pull=step.rows.pull[[2, 7]], directions=step.rows.directions[[2, 7]])
    assert float(algebra.embedding_of_one(two, 0) @ step.units[0]) > 1 - 1e-9
    with pytest.raises(ValueError, match="two rows"):
        algebra.embedding_of_one(replace(two, pull=two.pull[:1], directions=two.directions[:1]), 0)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("pull", PULLS)
def test_known_features_give_every_derivative_and_every_label(margin: str, pull: float) -> None:
    labels = [0, 1, 2, 3, 3, 3, 4, 5]  # every class of the head, one of them three times
    step = Step(labels, 6, pull, margin, factor=0.1)
    torch.testing.assert_close(algebra.shares(step.rows, step.units), step.by_cosine, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(algebra.feature_gradients(step.rows, step.units), step.by_feature, rtol=1e-6, atol=1e-9)
    assert algebra.labels_of(step.rows, step.units).tolist() == labels
    torch.testing.assert_close(algebra.explained(step.rows, step.units), step.rows.pull, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("strangers", [0, 100])
def test_the_truth_explains_every_row_and_other_labels_do_not(margin: str, strangers: int) -> None:
    step = Step([1, 4, 4], 20, 0.5, margin, strangers=strangers, factor=0.2)
    for own in (False, True):
        matching = algebra.RowMatching(step.rows, step.labels, step.constants.spec, own)
        assert abs(float(matching(3 * step.units).detach())) < 1e-9
        other = replace(matching, labels=torch.tensor([1, 4, 5]))
        assert float(other(step.units).detach()) > 1e-2


def test_photos_clipped_one_by_one_are_explained_by_factors_of_their_own() -> None:
    step = Step([1, 4], 20, 0.5, "cosface")
    g = torch.tensor([[1.0], [0.2]]) * step.by_cosine
    pull = g.T @ step.units - (g * (step.units @ step.rows.directions.T)).sum(0)[:, None] * step.rows.directions
    matching = algebra.RowMatching(replace(step.rows, pull=pull), step.labels, step.constants.spec)
    assert float(matching(step.units).detach()) > 1e-3
    assert abs(float(replace(matching, own=True)(step.units).detach())) < 1e-9


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("pull", PULLS)
def test_row_matching_finds_the_features_of_a_batch(margin: str, pull: float) -> None:
    step = Step([1, 9, 9, 30], 40, pull, margin, factor=0.1)
    units, left = algebra.RowMatching(step.rows, step.labels, step.constants.spec).solve()
    assert left < 1e-6
    assert float(cosines_of(units, step.units).min()) > 0.99


@pytest.mark.parametrize(("pull", "third"), [(0.0, 9), (0.0, 20)])  # nearer to their rows, labels may go wrong
def test_eight_photos_by_their_rows_alone(pull: float, third: int) -> None:
    step = Step([1, 9, third, 30, 41, 45, 57, 59], 60, pull, "cosface")
    labels, units = algebra.match_batch(step.rows, 8, step.constants.spec)
    assert labels.tolist() == step.labels.tolist()
    assert float(cosines_of(units, step.units).min()) > 0.99


def test_a_second_opinion_mends_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step([1, 9, 20], 30, 0.5, "cosface")
    monkeypatch.setattr(algebra, "guess_labels", lambda rows, count: torch.tensor([1, 9, 9]))
    labels, units = algebra.match_batch(step.rows, 3, step.constants.spec)
    assert labels.tolist() == [1, 9, 20]
    assert float(cosines_of(units, step.units).min()) > 0.99


@pytest.mark.parametrize("missing", [1, 2])
def test_photos_that_are_left_over_come_from_what_the_known_ones_leave(missing: int) -> None:
    step = Step([1, 9, 20, 20], 30, 0.5, "cosface")
    known = 4 - missing
    labels, units = algebra.match_rest(
        step.rows, step.labels[:known], step.units[:known], 4, step.constants.spec, own=False
    )
    assert sorted(labels.tolist()) == [1, 9, 20, 20]
    assert torch.equal(units[:known], step.units[:known])
    assert float(cosines_of(units, step.units).min()) > 0.99


def test_rows_drift_towards_their_people_over_many_steps() -> None:
    step = Step([3, 3, 8], 20, 0.3, "cosface")
    W = step.update.before[HEAD].clone().requires_grad_()
    optimizer = torch.optim.SGD([W], lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        heads.loss(step.units @ F.normalize(W, dim=1).T, step.labels, step.constants.spec).backward()
        optimizer.step()
    update = replace(step.update, delta={HEAD: W.detach() - step.update.before[HEAD]})
    drift = algebra.row_drift(update)
    assert float(drift[8] @ step.units[2]) > 0.85
    assert float(drift[3] @ F.normalize(step.units[:2].sum(0), dim=0)) > 0.85
    assert float((drift[[0, 1, 2]] @ step.units.T).max()) < 0.2
