from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks import fast_step
from attacks.backbone_algebra import Recovered
from attacks.fast_step import distance_of
from attacks.gradient_inversion import METHODS, GradientInversion
from attacks.gradient_matching import Schedule, match
from attacks.objectives import HeadMatching, NoisyMatching
from attacks.priors import Eigenfaces, Pixels, eigenfaces, mean_face, total_variation
from attacks.updates import gradient
from eval.fidelity import align, psnr
from fedgc import heads
from fedgc.errors import RefusedError
from fedgc.local import load_tensors
from fedgc.models import build_model
from fedgc.rng import generator
from fedgc.types import Observation


def gain(world, observation: Observation, **settings) -> float:
    """PSNR of what is found for client 0 less that of always answering the strangers' mean face, in dB."""
    truth = world.truth.images[0]
    first = replace(observation, client_updates=observation.client_updates[:1])
    found = GradientInversion(**{"iterations": 120, "components": 40, "copies": 2, **settings})(
        first, generator(0)
    ).images
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


def test_another_persons_update_shows_no_photo_of_this_one(world) -> None:
    """The control of shuffled victims: what client 1 sent, compared with the photo of client 0."""
    this = world()
    observation = this.seen_by("server")
    swapped = replace(observation, client_updates=observation.client_updates[::-1])
    assert gain(this, swapped) < 1.0


def test_a_wrong_model_shows_no_photo(world) -> None:
    """The control of a wrong model: the right update, taken for one from other weights."""
    this = world()
    observation = this.seen_by("server")
    other = build_model(this.transcript.constants.spec, 6, seed=99)
    wrong = tuple(
        replace(
            u,
            before={
                n: dict(other.named_parameters())[n].detach() if "head" not in n else t for n, t in u.before.items()
            },
        )
        for u in observation.client_updates
    )
    assert gain(this, replace(observation, client_updates=wrong)) < 1.0


def problems(world, **kind):
    """The three matching problems of one step, each zero (or one, of noise) at the truth."""
    this = world("fedgc", **kind)
    update, constants = this.seen_by("server").client_updates[0], this.transcript.constants
    labels = this.truth.labels[0]
    return {
        "pull": GradientInversion().objective(update, constants)[0],
        "head": HeadMatching.of(update.before, gradient(update, constants), labels, constants.spec),
        "noisy": NoisyMatching.of(update.before, gradient(update, constants), labels, constants.spec, 1.0, 0.01),
    }, this


def test_squared_distance_is_zero_at_the_truth_and_one_far_from_any_gradient(world) -> None:
    """In the unit of the observed gradient: |g - g̃|²/|g̃|², zero at the truth where the client shortened nothing."""
    this = world("fedgc", batch=2)
    update, constants = this.seen_by("server").client_updates[0], this.transcript.constants
    model = build_model(constants.spec, len(update.classes)).eval()
    load_tensors(model, update.before)
    labels = this.truth.labels[0]
    loss = heads.loss(model(this.truth.images[0]), labels, constants.spec)
    names = [n for n, _ in model.named_parameters()]
    whole = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    exact = HeadMatching.of(update.before, whole, labels, constants.spec, "l2")
    assert exact.value(exact.inputs, this.truth.images[0]).item() < 1e-4
    half = HeadMatching.of(update.before, {n: g / 2 for n, g in whole.items()}, labels, constants.spec, "l2")
    assert half.value(half.inputs, this.truth.images[0]).item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("kind", ["pull", "head"])
def test_the_true_photos_match_exactly(world, kind: str) -> None:
    """An objective is zero at the truth: model, mode, normalisation and weight decay are the victim's."""
    objectives, this = problems(world, batch=2)
    distance = distance_of(objectives[kind], compiled=False)
    assert distance(this.truth.images[0]).item() < 1e-4
    assert distance(this.truth.images[0].flip(3)).item() > 1e-2


def test_the_clipped_sum_is_that_of_single_photos(world) -> None:
    """Against a loop over photos, each clipped on its own, and two clips: one that shortens, one that does not."""
    this = world("fedgc", batch=2)
    update, constants = this.seen_by("server").client_updates[0], this.transcript.constants
    seen, labels = gradient(update, constants), this.truth.labels[0]
    model = build_model(constants.spec, len(update.classes)).eval()
    load_tensors(model, update.before)
    x = this.knowledge.auxiliary_faces[:2]
    for clip in (0.5, 1e6):
        total = 0.0
        for i in range(2):
            loss = heads.loss(model(x[i : i + 1]), labels[i : i + 1], constants.spec)
            own = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
            total = total + own * min(1.0, clip / float(own.norm())) / 2
        target = torch.cat([seen[n].flatten() for n, _ in model.named_parameters()]).double()
        expected = float((total - target).square().sum()) / (len(target) * 0.01**2)
        noisy = NoisyMatching.of(update.before, seen, labels, constants.spec, clip, 0.01)
        assert noisy.value(noisy.inputs, x).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["pull", "head", "noisy"])
def test_the_gradient_of_the_objective_is_right(world, kind: str) -> None:
    """Second derivatives through the network against central differences along one direction, in float64."""
    objectives, this = problems(world)
    objective = objectives[kind]
    objective = replace(objective, **{
        field: getattr(objective, field).double() for field in ("pulls",) if hasattr(objective, field)
    })  # fmt: skip
    inputs = {k: [t.double() if t.is_floating_point() else t for t in v] for k, v in objective.inputs.items()}
    x = this.knowledge.auxiliary_faces[:1].double().requires_grad_()
    direction = torch.randn(x.shape, generator=generator("direction"), dtype=torch.float64)
    (slope,) = torch.autograd.grad(objective.value(inputs, x), x)
    h = 1e-6
    up, down = (objective.value(inputs, x + sign * h * direction).item() for sign in (1, -1))
    assert (slope * direction).sum().item() == pytest.approx((up - down) / (2 * h), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pull", "head", "noisy"])
def test_a_compiled_step_is_the_plain_one_and_serves_every_victim(world, kind: str) -> None:
    objectives, this = problems(world)
    plain, fast = (distance_of(objectives[kind], compiled) for compiled in (False, True))
    before = len(fast_step._graphs)
    for x in (this.knowledge.auxiliary_faces[i : i + 1] for i in range(2)):
        values = []
        for f in (plain, fast):
            z = x.clone().requires_grad_()
            value = f(z)
            values.append((value.detach(), torch.autograd.grad(value, z)[0]))
        torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-3, atol=1e-3 * float(values[0][1].abs().max()))
    assert len(fast_step._graphs) == before + 1


def test_what_cannot_be_compiled_runs_as_it_is(world, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(fast_step, "_graphs", {})
    objectives, this = problems(world)
    x = this.truth.images[0]
    with pytest.warns(UserWarning, match="third of the speed: no compiler"):
        value = distance_of(objectives["head"], compiled=True)(x.clone().requires_grad_())
    assert value.item() < 1e-4


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs_and_lowers_its_loss(world, method: str) -> None:
    observation = world().seen_by("server")
    first = replace(observation, client_updates=observation.client_updates[:1])
    short, longer = (
        GradientInversion(method=method, iterations=n, components=10, copies=1)(first, generator(0)) for n in (1, 15)
    )
    assert float(longer.loss[0]) < float(short.loss[0])
    assert (longer.every is None) == (METHODS[method].restarts == 1)


def test_without_the_head_a_photo_is_found_all_the_same(world) -> None:
    """FedPE withholds class embeddings; the gradient by the feature is in the last layers of the backbone."""
    assert gain(world("fedpe"), world("fedpe").seen_by("server")) > 2.0


def test_the_noise_of_a_card_makes_it_a_maximum_a_posteriori(world) -> None:
    observation = world().seen_by("server")
    card = {"name": "dp-sgd", "max_grad_norm": 1.0, "noise_multiplier": 0.1}
    noisy = replace(observation, public_constants=replace(observation.public_constants, defense=card))
    update = noisy.client_updates[0]
    aware = GradientInversion().problems(update, noisy.public_constants, noisy.auxiliary_faces)[0][0]
    assert aware.labels.tolist() == [0]
    assert isinstance(aware, NoisyMatching)
    assert aware.deviation == pytest.approx(0.1)
    unaware = GradientInversion(noise_aware=False).objective(update, noisy.public_constants)[0]
    assert not isinstance(unaware, NoisyMatching)


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


def test_too_many_photos_without_the_head_are_refused(world) -> None:
    observation = world("fedgc").seen_by("client")
    crowd = replace(observation, aggregate=replace(observation.aggregate, images=10**6))
    with pytest.raises(RefusedError, match="does not say that nothing leaks"):
        GradientInversion()(crowd, generator(0))


@pytest.mark.parametrize("method", ["inverting-gradients", "idlg", "dlg"])
def test_published_methods_need_the_head(world, method: str) -> None:
    with pytest.raises(RefusedError, match="does not say that nothing leaks"):
        GradientInversion(method=method)(world("fedgc").seen_by("client"), generator(0))


def test_photos_that_cannot_be_told_apart_get_the_mean_face(world, monkeypatch) -> None:
    nothing = Recovered(None, None, None, None, None, "")
    monkeypatch.setattr("attacks.gradient_inversion.recover", lambda *_: nothing)
    this = world("fedpe", batch=2)
    answer = GradientInversion(iterations=1, components=5, copies=1)(this.seen_by("server"), generator(0))
    assert answer.failed == 2
    assert answer.labels is None
    torch.testing.assert_close(answer.images, this.knowledge.auxiliary_faces.mean(0).expand(4, -1, -1, -1))


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
    found = match(
        fails_first, prior, (1, 3, 4, 4), Schedule(40, 2, 0.05, "signed-adam"), generator(0), lambda done: None
    )
    assert found.failed == 1
    assert found.iterations == 41
    assert found.loss < 0.01
    assert float((found.images - 0.25).abs().max()) < 0.1


def test_where_every_start_fails_the_first_start_is_returned() -> None:
    prior = Pixels(torch.full((3, 4, 4), 0.9), True, 0.0)
    found = match(
        lambda x: x.sum() * float("nan"), prior, (1, 3, 4, 4), Schedule(5, 2, 0.05, "signed-adam"), generator(0), print
    )
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


def test_eigenfaces_of_many_faces_are_the_same_axes(monkeypatch) -> None:
    """Subspace iteration against the exact decomposition, on faces whose variance falls as that of photos does."""
    spread = torch.arange(1, 49) ** -1.0
    faces = (torch.randn(300, 48, generator=generator("faces")) * spread).view(300, 3, 4, 4)
    exact = eigenfaces(faces, 10)
    monkeypatch.setattr("attacks.priors.EXACT", 20)
    fast = eigenfaces(faces, 10)
    torch.testing.assert_close(fast.norm(dim=1), exact.norm(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(fast.T @ fast, exact.T @ exact, rtol=0, atol=1e-3)


def test_eigenfaces_start_at_the_mean_face() -> None:
    faces = torch.rand(6, 3, 4, 4, generator=generator("faces"))
    prior = Eigenfaces(mean_face(faces, (1, 3, 4, 4)), eigenfaces(faces, 3), 0.0)
    start = prior.images(prior.start((1, 3, 4, 4), 0, generator(0)))
    torch.testing.assert_close(start, faces.mean(0, keepdim=True))
