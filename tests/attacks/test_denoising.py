"""The learned denoiser: its linear part against algebra, its correction against the linear part, and the polish that it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.denoising import LEVEL, Denoiser, Polish, auxiliary_denoiser, changed
from attacks.gradient_inversion import GradientInversion
from attacks.priors import eigenfaces, varied
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import RefusedError
from fedgc.rng import generator

QUICK = {"components": 20, "copies": 1}
LESSONS = 60


def test_the_linear_part_is_the_mean_of_a_gaussian_given_noise() -> None:
    """In float64: mean + C (C + level²·I)⁻¹ (x - mean), C the covariance of the basis."""
    draw = generator("linear")
    basis, mean = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((5, 192), (3, 8, 8)))
    basis = torch.linalg.qr(basis.T).Q.T * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)[:, None]
    x, level = (
        torch.randn(2, 3, 8, 8, generator=draw, dtype=torch.float64),
        torch.tensor([0.2, 0.7], dtype=torch.float64),
    )
    covariance = basis.T @ basis
    for photo, s, found in zip(x, level, Denoiser.untrained(mean, basis).linear(x, level), strict=True):
        gain = covariance @ torch.linalg.inv(covariance + s**2 * torch.eye(192, dtype=torch.float64))
        torch.testing.assert_close(found.flatten(), mean.flatten() + gain @ (photo - mean).flatten())


def test_what_is_learned_beats_the_linear_part_on_other_people(world) -> None:
    known = world().knowledge.auxiliary_faces
    denoiser = auxiliary_denoiser(known, **QUICK, steps=LESSONS)
    others = synthetic_faces(20, 1, 32, seed=5)[0].float() / 255
    for s in (0.03, 0.1):
        noisy = others + s * torch.randn(others.shape, generator=generator("noise"))
        level = torch.full((len(others),), s)
        errors = [(clean - others).square().mean() for clean in (denoiser(noisy, level), denoiser.linear(noisy, level))]
        assert float(errors[0]) < 0.9 * float(errors[1])


def test_it_is_learned_once_and_leaves_the_global_generator_alone(world) -> None:
    faces = world().knowledge.auxiliary_faces
    before = torch.random.get_rng_state()
    first = auxiliary_denoiser(faces[:20], 5, 0, steps=2)
    torch.rand(3)  # the global generator plays no part
    auxiliary_denoiser.__globals__["_place"].cache_clear()
    again = auxiliary_denoiser(faces[:20].clone(), 5, 0, steps=2)
    assert auxiliary_denoiser(faces[:20], 5, 0, steps=2) is again
    for a, b in zip(first.correction.parameters(), again.correction.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    torch.random.set_rng_state(before)


@pytest.mark.parametrize("side", [32, 36])
def test_a_side_need_not_be_a_multiple_of_anything(side: int) -> None:
    faces = torch.rand(6, 3, side, side, generator=generator("sides"))
    denoiser = Denoiser.untrained(faces.mean(0), eigenfaces(varied(faces, 0, generator(0)), 4))
    assert denoiser(faces, torch.full((6,), 0.1)).shape == faces.shape


def test_the_penalty_pulls_towards_what_denoising_makes(world) -> None:
    faces = world().knowledge.auxiliary_faces
    denoiser = auxiliary_denoiser(faces, **QUICK, steps=LESSONS)
    x = (faces[:2] + 0.1 * torch.randn(2, 3, 32, 32, generator=generator("x"))).requires_grad_()
    (slope,) = torch.autograd.grad(Polish(x.detach(), lambda y: changed(denoiser, y), 3.0).penalty(x, x), x)
    with torch.no_grad():
        away = x - denoiser(x, torch.full((2,), LEVEL))
        torch.testing.assert_close(slope, 3.0 * 2 * away / x.numel())


def test_polish_goes_on_from_what_was_found(world) -> None:
    """It lowers the loss, leaves the span of the eigenfaces, and stays near what was found."""
    seen = world().seen_by("server")
    seen = replace(seen, client_updates=seen.client_updates[:1])
    ticks: list[tuple[int, int]] = []
    plain, polished = (
        GradientInversion(iterations=60, restarts=2, polish=n, lessons=LESSONS, **QUICK)(
            seen, generator(0), lambda done, total: ticks.append((done, total))
        )
        for n in (0, 30)
    )
    assert float(polished.loss[0]) < float(plain.loss[0])
    assert torch.equal(plain.every, polished.every)
    assert 0 < float((polished.images - plain.images).abs().max()) < 0.3
    assert ticks[-1] == (150 + LESSONS, 150 + LESSONS)
    assert [d for d, _ in ticks[-30:]] == sorted(d for d, _ in ticks[-30:])
    assert polished.iterations == plain.iterations + 30


def test_only_long_searches_of_the_cascade_are_polished_unless_asked() -> None:
    assert GradientInversion()._polish == 300
    assert GradientInversion(iterations=399)._polish == 0
    assert GradientInversion(method="inverting-gradients")._polish == 0
    assert GradientInversion(prior="pixels")._polish == 0
    assert GradientInversion(iterations=5, polish=7)._polish == 7


def test_under_noise_nothing_is_polished(world) -> None:
    seen = world().seen_by("server")
    card = {"name": "dp-sgd", "max_grad_norm": 1.0, "noise_multiplier": 0.1}
    noisy = replace(seen, public_constants=replace(seen.public_constants, defense=card))
    answers = [GradientInversion(iterations=3, polish=n, **QUICK)(noisy, generator(0)) for n in (0, 5)]
    assert torch.equal(answers[0].images, answers[1].images)


def test_polish_without_its_needs_is_refused(world) -> None:
    with pytest.raises(RefusedError, match="polish needs auxiliary-faces"):
        GradientInversion(prior="pixels", polish=5)(world().seen_by("server", knows=False), generator(0))
    with pytest.raises(RefusedError, match="method 'dlg' searches them too"):
        GradientInversion(method="dlg", polish=5)(world().seen_by("server"), generator(0))
