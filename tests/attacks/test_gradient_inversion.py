from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.gradient_matching import Schedule, match
from attacks.inverting_gradients import GradientInversion, matching
from attacks.priors import Eigenfaces, Pixels, eigenfaces, mean_face, total_variation
from eval.fidelity import align, psnr
from fedgc.errors import RefusedError
from fedgc.rng import generator
from fedgc.types import Observation


def gain(world, observation: Observation, **settings) -> float:
    """PSNR of what is found for client 0 less that of always answering the strangers' mean face, in dB."""
    truth = world.truth.images[0]
    first = replace(observation, client_updates=observation.client_updates[:1])
    found = GradientInversion(**{"iterations": 120, "components": 20, **settings})(first, generator(0)).images
    best, missing = align(found, truth)
    mean = world.knowledge.auxiliary_faces.mean(0).expand_as(truth)
    assert missing == 0
    return float((psnr(best, truth) - psnr(mean, truth)).mean())


@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc"])
def test_a_photo_is_found_again_with_eigenfaces(world, algorithm: str) -> None:
    assert gain(world(algorithm), world(algorithm).seen_by("server")) > 2.0


def test_a_photo_is_found_again_by_its_pixels(world) -> None:
    assert gain(world(), world().seen_by("server"), prior="pixels") > 0.5


def test_a_batch_is_found_again(world) -> None:
    assert gain(world(batch=2), world(batch=2).seen_by("server")) > 1.0


@pytest.mark.parametrize("prior", ["faces", "pixels"])
def test_an_update_of_noise_shows_no_photo(world, prior: str) -> None:
    """The control: an update of the same size and no content gives nothing that the mean face does not."""
    observation = world().seen_by("server")
    draw = generator("noise")
    noisy = tuple(
        replace(u, delta={n: torch.randn(d.shape, generator=draw) * d.std() for n, d in u.delta.items()})
        for u in observation.client_updates
    )
    assert gain(world(), replace(observation, client_updates=noisy), prior=prior) < 0


def test_the_true_photos_match_exactly(world) -> None:
    """The attack's objective is zero at the truth: model, mode, normalisation and weight decay are the
    victim's."""
    this = world("fedgc", batch=2)
    update = this.seen_by("server").client_updates[0]
    distance = matching(update, torch.tensor([0, 1]), this.transcript.constants)
    assert distance(this.truth.images[0]).item() < 1e-4
    assert distance(this.truth.images[0].flip(3)).item() > 1e-2


def test_the_gradient_of_the_objective_is_right(world) -> None:
    """Second derivatives through the network against central differences along one direction, in float64."""
    this = world()
    update = this.seen_by("server").client_updates[0]
    before, delta = ({n: t.double() for n, t in part.items()} for part in (update.before, update.delta))
    double = replace(update, before=before, delta=delta)
    distance = matching(double, torch.tensor([0]), this.transcript.constants)
    x = this.knowledge.auxiliary_faces[:1].double().requires_grad_()
    direction = torch.randn(x.shape, generator=generator("direction"), dtype=torch.float64)
    (slope,) = torch.autograd.grad(distance(x), x)
    h = 1e-6
    difference = (distance(x + h * direction) - distance(x - h * direction)).item() / (2 * h)
    assert (slope * direction).sum().item() == pytest.approx(difference, rel=1e-3)


def test_start_needs_no_auxiliary_faces_for_pixels(world) -> None:
    observation = world().seen_by("server", knows=False)
    answer = GradientInversion(prior="pixels", iterations=2)(observation, generator(0))
    assert answer.images.shape == (2, 3, 32, 32)


def test_faces_without_auxiliary_faces_are_refused(world) -> None:
    with pytest.raises(RefusedError, match=r"auxiliary-faces.*prior = 'pixels'"):
        GradientInversion(prior="faces")(world().seen_by("server", knows=False), generator(0))


def test_a_round_of_many_steps_is_refused(world) -> None:
    with pytest.raises(RefusedError, match="single step"):
        GradientInversion()(world(kind="round").seen_by("server"), generator(0))


def test_a_backbone_alone_is_refused(world) -> None:
    with pytest.raises(RefusedError, match="does not say that nothing leaks"):
        GradientInversion()(world("fedgc").seen_by("client"), generator(0))


def test_a_step_without_a_learning_rate_is_refused(world) -> None:
    observation = world().seen_by("server")
    still = replace(observation.public_constants, lr=0.0)
    with pytest.raises(RefusedError, match="learning rate of 0"):
        GradientInversion()(replace(observation, public_constants=still), generator(0))


def test_an_update_of_zeros_is_refused(world) -> None:
    observation = world().seen_by("server")
    still = tuple(replace(u, delta={name: d * 0 for name, d in u.delta.items()}) for u in observation.client_updates)
    with pytest.raises(RefusedError, match="client 0 is all zeros"):
        GradientInversion()(replace(observation, client_updates=still), generator(0))


def test_progress_ends_at_its_total_even_when_it_stops_early(world) -> None:
    seen: list[tuple[int, int]] = []
    attack = GradientInversion(iterations=20, restarts=2, tolerance=0.999, components=5)
    answer = attack(world().seen_by("server"), generator(0), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (80, 80)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert answer.iterations < 80


def bowl(x: torch.Tensor) -> torch.Tensor:
    return (x - 0.25).square().mean()


def test_the_best_start_is_chosen_and_a_failed_one_counted() -> None:
    calls = 0

    def fails_first(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return bowl(x) * (float("nan") if calls == 1 else 1.0)

    prior = Pixels(torch.full((3, 4, 4), 0.5), True, 0.0)
    found = match(fails_first, prior, (1, 3, 4, 4), Schedule(40, 2, 0.05), generator(0), lambda done: None)
    assert found.failed == 1
    assert found.iterations == 41
    assert found.loss < 0.01
    assert float((found.images - 0.25).abs().max()) < 0.1


def test_where_every_start_fails_the_first_start_is_returned() -> None:
    prior = Pixels(torch.full((3, 4, 4), 0.9), True, 0.0)
    found = match(lambda x: x.sum() * float("nan"), prior, (1, 3, 4, 4), Schedule(5, 2, 0.05), generator(0), print)
    assert found.failed == 2
    assert found.loss == float("inf")
    torch.testing.assert_close(found.images, torch.full((1, 3, 4, 4), 0.9))


def test_total_variation_by_hand() -> None:
    step = torch.zeros(1, 1, 2, 3)
    step[..., 2] = 1.0  # one edge across in each of two rows, out of four neighbours; none down
    assert float(total_variation(step)) == pytest.approx(0.5)


def test_eigenfaces_are_the_principal_axes_in_standard_deviations() -> None:
    faces = torch.rand(30, 3, 4, 4, generator=generator("faces"))
    basis = eigenfaces(faces, 5).double()
    x = faces.flatten(1).double()
    values, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)) / 30)
    for row, value, vector in zip(basis, values.flip(0), vectors.T.flip(0), strict=False):
        assert float(row.square().sum()) == pytest.approx(float(value), rel=1e-4)
        assert abs(float(row @ vector)) == pytest.approx(float(value.sqrt()), rel=1e-3)
    assert len(eigenfaces(faces, 500)) == 29


def test_eigenfaces_start_at_the_mean_face() -> None:
    faces = torch.rand(6, 3, 4, 4, generator=generator("faces"))
    prior = Eigenfaces(mean_face(faces, (1, 3, 4, 4)), eigenfaces(faces, 3), 0.0)
    start = prior.images(prior.start((1, 3, 4, 4), 0, generator(0)))
    torch.testing.assert_close(start, faces.mean(0, keepdim=True))
