"""Several local steps on the same photos, against an optimiser that takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.gradient_inversion import GradientInversion
from attacks.gradient_matching import Solution
from attacks.label_inference import LabelInference
from attacks.local_update import PLACES, UnrolledMatching, single_steps
from attacks.objectives import HeadMatching, PullMatching
from attacks.updates import gradient, middle_of, weights_of_steps
from defenses.dp_sgd import DPSGD
from fedgc import heads
from fedgc.errors import RefusedError
from fedgc.local import load_tensors
from fedgc.models import build_model
from fedgc.rng import generator
from fedgc.types import HEAD, LocalConstants, Observation, ObservedUpdate

FEW = {"components": 20, "copies": 1}


def first(world, **kind) -> tuple[ObservedUpdate, LocalConstants]:
    this = world("fedgc", **kind)
    return this.seen_by("server").client_updates[0], this.transcript.constants


def alone(observation: Observation) -> Observation:
    return replace(observation, client_updates=observation.client_updates[:1])


def optimised(update: ObservedUpdate, constants: LocalConstants, x: torch.Tensor, y: torch.Tensor) -> ObservedUpdate:
    """What `torch.optim.SGD` makes of the steps, in float64."""
    model = build_model(constants.spec, len(update.classes)).eval()
    load_tensors(model, update.before)
    model.double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = [{"params": [p], "lr": constants.lr_of(name)} for name, p in model.named_parameters()]
    sgd = torch.optim.SGD(groups, momentum=constants.momentum, weight_decay=constants.weight_decay)
    for _ in range(constants.steps):
        sgd.zero_grad()
        heads.loss(model(x.double()), y, constants.spec).backward()
        if constants.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), constants.clip_norm)
        sgd.step()
    return replace(update, delta={name: p.detach() - start[name] for name, p in model.named_parameters()})


def value(objective, x: torch.Tensor) -> float:
    """In float64, from inputs that were stored in float32, the observed gradient again of length one."""
    inputs = {k: [t.double() if t.is_floating_point() else t for t in v] for k, v in objective.inputs.items()}
    length = sum(o.square().sum() for o in inputs["observed"]).sqrt()
    inputs["observed"] = [o / length for o in inputs["observed"]]
    return float(objective.value(inputs, x.double()).detach())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_steps_are_those_of_the_optimiser(world, steps: int, clip: float | None, momentum: float) -> None:
    update, constants = first(world, batch=2)
    truth = world("fedgc", batch=2).truth
    told = replace(constants, steps=steps, clip_norm=clip, momentum=momentum, weight_decay=0.05)
    x, y = truth.images[0], truth.labels[0]
    seen = optimised(update, told, x, y)
    assert abs(value(UnrolledMatching.of(seen, told, y), x)) < 1e-12
    assert value(UnrolledMatching.of(seen, told, y), x.flip(3)) > 1e-2
    wrong = [replace(told, weight_decay=0.0)]
    if steps > 1:
        wrong += [replace(told, momentum=0.5), replace(told, clip_norm=0.3), replace(told, head_lr_factor=1.0)]
        wrong += [replace(told, steps=2), replace(told, lr=told.lr / 2)]
    for other in wrong:
        assert value(UnrolledMatching.of(seen, other, y), x) > 1e-9, other


@pytest.mark.parametrize("steps", [1, 3])
def test_the_true_photos_match_a_recorded_update(world, steps: int) -> None:
    """Against `fedgc.local.train_locally`, which clips at 1.0 and decays with 1e-3 in this world."""
    update, constants = first(world, batch=2, steps=steps)
    truth = world("fedgc", batch=2, steps=steps).truth
    assert (constants.steps, constants.momentum) == (steps, 0.9 if steps > 1 else 0.0)
    objective = UnrolledMatching.of(update, constants, truth.labels[0])
    right = value(objective, truth.images[0])
    assert right < 1e-5
    if steps > 1:
        naive, once = single_steps(update, constants, "naive")[0]
        head = HeadMatching.of(naive.before, gradient(naive, once), truth.labels[0], once.spec)
        assert value(head, truth.images[0]) > 100 * right


def test_one_unrolled_step_is_head_matching(world) -> None:
    update, constants = first(world, batch=2)
    labels, x = world("fedgc", batch=2).truth.labels[0], world().knowledge.auxiliary_faces[:2]
    head = HeadMatching.of(update.before, gradient(update, constants), labels, constants.spec)
    assert value(UnrolledMatching.of(update, constants, labels), x) == pytest.approx(value(head, x), rel=1e-6)


def test_the_slope_of_the_unrolled_objective_is_right(world) -> None:
    """Against central differences, in float64."""
    update, constants = first(world, steps=3)
    objective = UnrolledMatching.of(update, constants, world().truth.labels[0])
    inputs = {k: [t.double() if t.is_floating_point() else t for t in v] for k, v in objective.inputs.items()}
    x = world().knowledge.auxiliary_faces[:1].double().requires_grad_()
    direction = torch.randn(x.shape, generator=generator("direction"), dtype=torch.float64)
    (slope,) = torch.autograd.grad(objective.value(inputs, x), x)
    up, down = (objective.value(inputs, x + sign * 1e-6 * direction).item() for sign in (1, -1))
    assert (slope * direction).sum().item() == pytest.approx((up - down) / 2e-6, rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_mean_gradient_of_constant_gradients_is_that_gradient(steps: int, decay: float, momentum: float) -> None:
    draw = generator("constant")
    start = {n: torch.randn(3, 4, generator=draw, dtype=torch.float64) for n in ("backbone.w", HEAD)}
    pull = {n: torch.randn(3, 4, generator=draw, dtype=torch.float64) for n in start}
    constants = LocalConstants(None, 0.1, 2.0, momentum, decay, None, 1, steps, False)
    now = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
    groups = [{"params": [p], "lr": constants.lr_of(n)} for n, p in now.items()]
    sgd = torch.optim.SGD(groups, momentum=momentum, weight_decay=decay)
    places = []
    for _ in range(steps):
        places.append(now[HEAD].detach().clone())
        for n, p in now.items():
            p.grad = pull[n].clone()
        sgd.step()
    delta = {n: p.detach() - start[n] for n, p in now.items()}
    seen = gradient(ObservedUpdate((0,), start, delta, 1, ()), constants)
    for n in start:
        torch.testing.assert_close(seen[n], pull[n], rtol=0, atol=1e-12 if decay == 0 or steps == 1 else 2e-3)
    if decay == 0:  # then the mean place of the steps is exact too
        weights = weights_of_steps(constants)
        mean = sum(w * p for w, p in zip(weights, places, strict=True)) / sum(weights)
        torch.testing.assert_close(start[HEAD] + middle_of(constants) * delta[HEAD], mean)


def test_single_steps_start_on_the_way_and_have_the_mean_gradient(world) -> None:
    update, constants = first(world, steps=3)
    mean = gradient(update, constants)
    assert len(single_steps(update, constants, "naive")) == 1
    for place, (step, once) in zip(PLACES, single_steps(update, constants, "surrogate"), strict=True):
        assert (once.steps, once.momentum) == (1, 0.0)
        torch.testing.assert_close(step.before[HEAD], update.before[HEAD] + place * update.delta[HEAD])
        seen = gradient(step, once)
        for name in mean:
            torch.testing.assert_close(seen[name], mean[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["naive", "surrogate", "unrolled"])
def test_one_step_is_itself(world, how: str) -> None:
    update, constants = first(world)
    (problem,) = GradientInversion(local_update=how).problems(update, constants)
    assert isinstance(problem[0], PullMatching)
    assert single_steps(update, constants, how) == [(update, constants)]


def test_the_noise_of_several_steps_is_averaged(world) -> None:
    """By hand: Σ c_k n_k / Σ c_k of three steps with m = 1/2, c = 7/4, 3/2, 1."""
    update, constants = first(world, steps=3)
    card = {"name": "dp-sgd", "max_grad_norm": 1.0, "noise_multiplier": 2.0}
    (_, once), *_ = single_steps(update, replace(constants, momentum=0.5, defense=card), "naive")
    assert once.defense["noise_multiplier"] == pytest.approx(2.0 * (49 / 16 + 9 / 4 + 1) ** 0.5 / (17 / 4))
    assert card["noise_multiplier"] == 2.0


@pytest.mark.parametrize("best", range(len(PLACES)))
def test_the_surrogate_is_chosen_by_its_loss(world, monkeypatch, best: int) -> None:
    losses = [0.5] * len(PLACES)
    losses[best] = 0.1
    given = iter(enumerate(losses))

    def solved(distance, prior, shape, *_) -> Solution:
        i, loss = next(given)
        images = torch.full(shape, i / 10)
        return Solution(images, loss, images[None], 4, 1)

    monkeypatch.setattr("attacks.gradient_inversion.match", solved)
    answer = GradientInversion(**FEW, polish=0)(alone(world(steps=3).seen_by("server")), generator(0))
    assert float(answer.loss[0]) == pytest.approx(0.1)
    assert float(answer.images.mean()) == pytest.approx(best / 10)
    assert (answer.iterations, answer.failed) == (4 * len(PLACES), len(PLACES))


@pytest.mark.parametrize("how", ["naive", "surrogate", "unrolled"])
def test_photos_of_several_steps_are_found_again(world, how: str) -> None:
    from eval.fidelity import align, psnr

    this = world(steps=3)
    seen: list[tuple[int, int]] = []
    attack = GradientInversion(local_update=how, iterations=60, components=40, copies=2)
    answer = attack(alone(this.seen_by("server")), generator(0), lambda done, total: seen.append((done, total)))
    truth = this.truth.images[0]
    mean = this.knowledge.auxiliary_faces.mean(0).expand_as(truth)
    gain = float((psnr(align(answer.images, truth)[0], truth) - psnr(mean, truth)).mean())
    assert gain > 1.0
    assert answer.labels.tolist() == this.truth.labels[0].tolist()
    assert seen[-1][0] == seen[-1][1]
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


@pytest.mark.parametrize(("batch", "steps"), [(1, 5), (2, 3)])
def test_labels_of_several_steps_are_read(world, batch: int, steps: int) -> None:
    this = world(batch=batch, steps=steps)
    found = LabelInference()(this.seen_by("server"), generator(0)).labels
    assert found.tolist() == this.truth.labels.flatten().tolist()


def test_a_batch_of_several_steps_is_matched_by_its_labels(world) -> None:
    """Closed forms hold for the batch of one step; of several, the rows are named by their pulls and the head is matched."""
    update, constants = first(world, batch=2, steps=3)
    truth = world("fedgc", batch=2, steps=3).truth
    (objective, rows, count), *others = GradientInversion().problems(update, constants)
    assert isinstance(objective, HeadMatching)
    assert (rows.tolist(), count, len(others)) == (truth.labels[0].tolist(), 2, len(PLACES) - 1)
    pulls = GradientInversion().objective(*single_steps(update, constants, "naive")[0])[0]
    assert isinstance(pulls, PullMatching)
    assert value(objective, truth.images[0]) < value(objective, truth.images[0].flip(3))


@pytest.mark.parametrize("how", ["naive", "surrogate"])
def test_without_the_head_several_steps_are_matched_all_the_same(world, how: str) -> None:
    update, constants = world("fedpe", steps=3).seen_by("server").client_updates[0], world(steps=3).transcript.constants
    problems = GradientInversion(local_update=how).problems(update, constants)
    assert [type(objective) for objective, _, _ in problems] == [PullMatching] * (1 if how == "naive" else len(PLACES))


@pytest.mark.parametrize(
    ("kind", "change", "why"),
    [
        ({}, {"steps": 9}, "up to 8 steps"),
        ({"algorithm": "fedpe"}, {}, "class embeddings"),
        ({"defense": DPSGD(noise_multiplier=1.0, delta=1e-2)}, {}, "steps of dp-sgd"),
    ],
)
def test_what_cannot_be_unrolled_is_refused(world, kind, change, why: str) -> None:
    observation = world(steps=3, **kind).seen_by("server")
    observation = replace(observation, public_constants=replace(observation.public_constants, **change))
    with pytest.raises(RefusedError, match=why):
        GradientInversion(local_update="unrolled")(observation, generator(0))
    assert GradientInversion().refusal(observation) is None


def test_a_mean_of_several_clients_is_not_unrolled(world) -> None:
    observation = world("fedavg", clients=3, steps=3).seen_by("client")
    assert "mean over several" in GradientInversion(local_update="unrolled").refusal(observation)
    assert GradientInversion().refusal(observation) is None


def test_a_whole_round_is_refused_with_what_to_record(world) -> None:
    with pytest.raises(RefusedError, match=r"record\.local_steps"):
        GradientInversion()(world(kind="round").seen_by("server"), generator(0))
