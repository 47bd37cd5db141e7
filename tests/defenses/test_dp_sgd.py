"""DP-SGD against its definition: per-photo gradients, sensitivity, noise, sampling and the accountants."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn

from defenses.accounting import epsilon_of, merged, noise_for, rounded_up, undominated
from defenses.dp_sgd import DPSGD, poisson_units
from fedgc import heads
from fedgc.algorithms import ALGORITHMS, Push
from fedgc.doors import ClientPlan, Defense, LocalSession
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.heads import CosineHead
from fedgc.local import train_locally
from fedgc.models import FaceModel, build_model
from fedgc.schedule import Party, Schedule
from fedgc.types import HEAD, Charge, LocalConstants, ModelSpec
from fedgc.victims import victims

SPEC = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
CLASSES = 5
both_modes = pytest.mark.parametrize("mode", ["bookkeeping", "hooks"])
CONSTANTS = LocalConstants(SPEC, 0.1, 2.0, 0.0, 0.0, None, 4, None, False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def face_model(margin: str = "cosface", dtype: torch.dtype = torch.float32) -> tuple[FaceModel, ModelSpec]:
    model = build_model(SPEC, CLASSES, seed=0)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model.to(dtype), replace(SPEC, margin=margin)


def faces(count: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=drawn), torch.arange(count) % CLASSES


def streams() -> dict[str, torch.Generator]:
    return {"sampling": None, "noise": torch.Generator().manual_seed(3)}  # type: ignore[dict-item]


@contextmanager
def session(model: FaceModel, defense: DPSGD, batch: int) -> Iterator[LocalSession]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = ClientPlan(0, 100, batch, 10)
    with defense.local_training(model, optimizer, iter(()), plan, **streams()) as opened:
        yield opened


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tensors], dim=1)


# -- gradients of single photos


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_hooks_agree_with_a_loop_over_photos(batch: int, margin: str, dtype: torch.dtype) -> None:
    """Every layer and the head, whose per-photo gradient is our own closed form."""
    model, spec = face_model(margin, dtype)
    photos, labels = faces(batch)
    x = photos.to(dtype) / 255
    expected = []
    for i in range(batch):
        value = heads.loss(model(x[i : i + 1]), labels[i : i + 1], spec)
        expected.append(torch.autograd.grad(value, list(model.parameters())))
    with session(model, DPSGD(noise_multiplier=1.0, mode="hooks"), batch):
        heads.loss(model(x), labels, spec).backward()
        for (name, p), alone in zip(model.named_parameters(), zip(*expected, strict=True), strict=True):
            tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-11, "rtol": 1e-9}
            torch.testing.assert_close(
                p.grad_sample, torch.stack(alone), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@both_modes
def test_an_empty_batch_has_no_gradient_and_is_noised_all_the_same(mode: str) -> None:
    model, spec = face_model()
    before = copy.deepcopy(model.state_dict())
    with session(model, DPSGD(noise_multiplier=1.0, mode=mode), 4) as opened:
        opened.optimizer.zero_grad()
        heads.loss(model(torch.zeros(0, 3, 32, 32)), torch.zeros(0, dtype=torch.long), spec).backward()
        opened.optimizer.clip_and_accumulate()
        assert all(not p.summed_grad.any() for p in model.parameters())
        opened.optimizer.zero_grad()
        heads.loss(model(torch.zeros(0, 3, 32, 32)), torch.zeros(0, dtype=torch.long), spec).backward()
        opened.optimizer.step()
    assert all((p - before[name]).norm() > 0 for name, p in model.named_parameters())


@both_modes
def test_nothing_stays_behind_on_the_network(mode: str) -> None:
    model, spec = face_model()
    photos, labels = faces(3)
    with session(model, DPSGD(noise_multiplier=1.0, mode=mode), 3) as opened:
        heads.loss(model(photos / 255), labels, spec).backward()
        opened.optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    heads.loss(model(photos / 255), labels, spec).backward()
    assert all(getattr(p, "grad_sample", None) is None for p in model.parameters())


# -- sensitivity and clipping


def clipped_sum(model: FaceModel, spec: ModelSpec, photos: Tensor, labels: Tensor, bound: float, mode: str) -> Tensor:
    """Sum of the clipped gradients that the session's optimiser forms before noise: (all parameters,)."""
    with session(model, DPSGD(noise_multiplier=1.0, max_grad_norm=bound, mode=mode), 4) as opened:
        opened.optimizer.zero_grad()
        heads.loss(model(photos / 255), labels, spec).backward()
        opened.optimizer.clip_and_accumulate()
        return torch.cat([p.summed_grad.flatten() for p in model.parameters()])


@both_modes
@pytest.mark.parametrize("bound", [0.01, 1.0, 1e4])
def test_a_photo_moves_the_sum_by_at_most_the_clipping_norm(bound: float, mode: str) -> None:
    model, spec = face_model(dtype=torch.float64)
    photos, labels = faces(8)
    whole = clipped_sum(model, spec, photos.double(), labels, bound, mode)
    for i in range(8):
        kept = [j for j in range(8) if j != i]
        moved = float((whole - clipped_sum(model, spec, photos[kept].double(), labels[kept], bound, mode)).norm())
        assert 0 < moved <= bound * (1 + 1e-6)
        if bound == 0.01:  # every photo's gradient is longer than that
            assert moved == pytest.approx(bound, rel=1e-3)


@both_modes
def test_the_whole_vector_is_clipped_as_one(mode: str) -> None:
    """Sum of g min(1, C/|g|) over photos, with |g| over backbone and head together."""
    model, spec = face_model(dtype=torch.float64)
    photos, labels = faces(4)
    x, bound, expected = photos.double() / 255, 0.5, torch.zeros(())
    for i in range(4):
        value = heads.loss(model(x[i : i + 1]), labels[i : i + 1], spec)
        g = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
        expected = expected + g * min(1.0, bound / float(g.norm()))
    found = clipped_sum(model, spec, photos.double(), labels, bound, mode)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-7)


# -- noise


def trained(defense: Defense, photos: Tensor, labels: Tensor, batches: list[Tensor], expected: int = 4):
    model, _ = face_model()
    plan = ClientPlan(0, 100, expected, 10)
    return train_locally(
        model, photos, labels, iter(batches), CONSTANTS, defense, plan, augmenting=None, **streams()
    )  # fmt: skip


@pytest.mark.parametrize(("sigma", "bound", "batch"), [(1.5, 0.7, 4), (0.6, 2.0, 16)])
def test_noise_has_the_promised_scale(sigma: float, bound: float, batch: int) -> None:
    """Where no photo was drawn the update is noise alone, with std lr·σ·C/B; head rows carry their own rate."""
    photos, labels = faces(3)
    defense = DPSGD(noise_multiplier=sigma, max_grad_norm=bound)
    result = trained(defense, photos, labels, [torch.zeros(0, dtype=torch.long)], expected=batch)
    backbone = torch.cat([d.flatten() for name, d in result.delta.items() if name != HEAD])
    std = 0.1 * sigma * bound / batch
    assert len(backbone) > 1e5
    assert float(backbone.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(backbone.mean())) < 5 * std / math.sqrt(len(backbone))
    assert float(backbone.abs().gt(1.959964 * std).float().mean()) == pytest.approx(0.05, abs=0.005)
    head = result.delta[HEAD]
    assert float(head.std()) == pytest.approx(2 * std, rel=5 / math.sqrt(2 * head.numel()))


def test_every_step_has_noise_of_its_own() -> None:
    photos, labels = faces(3)
    empty = torch.zeros(0, dtype=torch.long)
    one, two = (trained(DPSGD(noise_multiplier=1.0), photos, labels, [empty] * n) for n in (1, 2))
    first = one.delta["backbone.embedding.weight"].flatten()
    second = two.delta["backbone.embedding.weight"].flatten() - first
    assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) == pytest.approx(0, abs=5 / math.sqrt(len(first)))
    assert float(second.std()) == pytest.approx(float(first.std()), rel=0.05)


def test_the_update_is_divided_by_the_expected_and_not_the_drawn_batch() -> None:
    photos, labels = faces(6)
    quiet = DPSGD(noise_multiplier=1e-9, max_grad_norm=1.0)
    once, half = (trained(quiet, photos, labels, [torch.arange(6)], expected=b) for b in (4, 8))
    for name, delta in once.delta.items():
        torch.testing.assert_close(delta, 2 * half.delta[name], rtol=1e-3, atol=1e-6)


# -- inside a federation


def federation(algorithm: str, defense: Defense, **changes) -> Federation:
    photos, _ = faces(24)
    labels = torch.arange(24) // 6
    parties = [Party(k, photos[12 * k : 12 * k + 12], labels[12 * k : 12 * k + 12], (2 * k, 2 * k + 1)) for k in (0, 1)]
    numbers = {
        "rounds": 2, "local_epochs": 1, "batch_size": 4, "lr": 0.1, "head_lr_factor": 2.0, "momentum": 0.0,
        "weight_decay": 0.0, "clip_norm": None, "participation": 1.0, "push": Push(weight=0.0), "augment": False,
    }  # fmt: skip
    seeds = {"seed": changes.pop("seed", 0), "noise_key": changes.pop("noise_key", 1)}
    schedule = Schedule(**{**numbers, **changes})
    return Federation(ALGORITHMS[algorithm], SPEC, schedule, parties, defense, device=torch.device("cpu"), **seeds)


@pytest.mark.parametrize("kind", ["round", "step"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_class_embeddings_are_inside_the_mechanism(algorithm: str, kind: str) -> None:
    """With σ = 1000 nothing but noise is left of any tensor that a client trains, sent or kept."""
    fed = federation(algorithm, DPSGD(noise_multiplier=1000.0, delta=1e-2))
    start = fed.initial_state()
    if kind == "round":
        result = fed.play(start)
        transcript, steps, batch = result.transcript, 3, 4
        moved = {HEAD: result.state.rows - start.rows} if algorithm == "fedpe" else {}
    else:
        transcript, _ = fed.play_step(start, 0, *victims(fed.parties, 2, 4, seed=0)[0])
        steps, batch, moved = 1, 2, {}
    std = 1000.0 * math.sqrt(steps) / batch
    for update in transcript.updates.values():
        assert (HEAD in update.tensors) is (algorithm != "fedpe")
        for name, delta in {**update.tensors, **moved}.items():
            if delta.numel() >= 32:
                noise = delta / transcript.constants.lr_of(name) / std
                assert float(noise.std()) == pytest.approx(1, rel=6 / math.sqrt(2 * delta.numel())), name


def test_every_client_round_and_record_has_noise_of_its_own() -> None:
    fed = federation("fedgc", DPSGD(noise_multiplier=1000.0, delta=1e-2))
    start = fed.initial_state()
    first = fed.play(start)
    records = [fed.play_step(start, n, *victims(fed.parties, b, 4, seed=0)[0])[0] for b, n in ((1, 0), (1, 1), (2, 0))]
    transcripts = [first.transcript, fed.play(first.state).transcript, *records]
    noise = [u.tensors["backbone.embedding.weight"].flatten() for t in transcripts for u in t.updates.values()]
    off_diagonal = torch.corrcoef(torch.stack(noise)) - torch.eye(len(noise))
    assert float(off_diagonal.abs().max()) < 6 / math.sqrt(len(noise[0]))


def test_noise_and_sampling_follow_the_secret_key_and_not_the_public_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows which photos were drawn gets no amplification by sampling to hold against."""
    drawn: dict[tuple[int, int], list[list[int]]] = {}

    def spying(count: int, rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        for batch in poisson_units(count, rate, steps, generator):
            drawn.setdefault(key, []).append(batch.tolist())
            yield batch

    monkeypatch.setattr("defenses.dp_sgd.poisson_units", spying)
    for key in ((0, 1), (0, 2), (5, 1)):
        fed = federation("fedgc", DPSGD(noise_multiplier=1.0, delta=1e-2), seed=key[0], noise_key=key[1])
        fed.play(fed.initial_state())
    assert drawn[0, 1] == drawn[5, 1] != drawn[0, 2]


def test_a_stream_has_more_than_32_bits_of_seed() -> None:
    """2^32 candidates can be tried; and streams of a run must not collide."""
    from fedgc import rng

    stream = rng.generator("a")
    for seed in (stream.initial_seed() & 0xFFFFFFFF, rng.stream_seed("a") & 0xFFFFFFFF):
        other = torch.Generator().manual_seed(seed)
        assert not torch.equal(torch.rand(4, generator=other), torch.rand(4, generator=rng.generator("a")))
    state = rng.generator("a").get_state()
    words = state[rng.FIRST : rng.FIRST + 8 * rng.WORDS].view(torch.int64)  # the twister's state, and all of it named
    assert int(words.max()) < 2**32
    assert len(words.unique()) == rng.WORDS
    for change in ("b", "A"):
        assert not torch.equal(state, rng.generator(change).get_state())


def test_a_stream_is_uniform_and_independent_of_its_neighbour() -> None:
    """The state is laid out by hand: draws from it must still be what a generator's draws are."""
    from fedgc import rng

    x, y = (torch.randn(200_000, generator=rng.generator("noise", n)) for n in (0, 1))
    assert abs(float(x.mean())) < 4 / 200_000**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / 200_000) ** 0.5
    assert abs(float((x * y).mean())) < 4 / 200_000**0.5


def test_recorded_steps_are_not_charged_and_rounds_are() -> None:
    fed = federation("fedgc", DPSGD(noise_multiplier=1.0, delta=1e-2))
    state = fed.initial_state()
    fed.play_step(state, 0, *victims(fed.parties, 2, 4, seed=0)[0])
    assert state.ledger == ()
    state = fed.play(fed.play(state).state).state
    assert state.ledger == tuple(Charge(k, t, 1.0, 4 / 12, 3, 6) for t in (1, 2) for k in (0, 1))


def test_who_takes_no_part_is_not_charged() -> None:
    fed = federation("fedgc", DPSGD(noise_multiplier=1.0, delta=1e-2), participation=0.5)
    assert len(fed.play(fed.initial_state()).state.ledger) == 1


@pytest.mark.parametrize(("batch_size", "epochs"), [(4, 1), (5, 2), (11, 3), (1, 1), (50, 2)])
def test_the_plan_never_promises_fewer_steps_than_are_taken(batch_size: int, epochs: int) -> None:
    fed = federation("fedgc", DPSGD(noise_multiplier=1.0, delta=1e-2), batch_size=batch_size, local_epochs=epochs)
    state = fed.play(fed.play(fed.initial_state()).state).state
    for party in fed.parties:
        taken = sum(c.steps for c in state.ledger if c.client == party.client)
        assert 0 < taken <= fed.plan(party).steps


# -- sampling


def test_every_photo_joins_a_batch_independently_at_the_accounted_rate() -> None:
    n, batch, steps = 25, 4, 4000
    plan = ClientPlan(0, n, batch, steps)
    drawn = torch.zeros(steps, n)
    for i, index in enumerate(poisson_units(n, batch / n, steps, torch.Generator().manual_seed(0))):
        assert len(set(index.tolist())) == len(index)
        drawn[i, index] = 1
    q, cells = batch / n, steps * n
    assert abs(float(drawn.mean()) - q) < 4 * math.sqrt(q * (1 - q) / cells)
    each = math.sqrt(q * (1 - q) / steps)
    assert float((drawn.mean(dim=0) - q).abs().max()) < 4 * each
    sizes = drawn.sum(dim=1)  # binomial, not fixed
    assert float(sizes.var()) == pytest.approx(n * q * (1 - q), rel=4 * math.sqrt(2 / steps))
    assert (
        0 < float((sizes == 0).float().mean()) == pytest.approx((1 - q) ** n, abs=4 * math.sqrt((1 - q) ** n / steps))
    )
    charge = DPSGD(noise_multiplier=1.0).charge(plan, 1, steps)
    assert charge == Charge(0, 1, 1.0, q, steps)


# -- accounting


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """Exact epsilon of composed Gaussian mechanisms without sampling (Balle & Wang 2018)."""
    mu = math.sqrt(steps) / sigma

    def excess(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return float(brentq(excess, 1e-9, 200))


def renyi_epsilon(sigma: float, q: float, steps: int, delta: float) -> float:
    """Epsilon by RDP from quadrature of the sampled Gaussian's divergence (Mironov et al. 2019), converted as in
    Canonne, Kamath & Steinke (2020), at the best order of a fine grid."""

    def at(order: float) -> float:
        def density(x: float) -> float:
            return norm.pdf(x, scale=sigma) * (1 - q + q * math.exp((2 * x - 1) / (2 * sigma**2))) ** order

        moment, _ = quad(density, -30 * sigma, 40 * sigma, limit=500, points=[0.0, order])
        renyi = steps * math.log(moment) / (order - 1)
        return renyi + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return min(at(1.5 + 0.1 * i) for i in range(30))


def test_the_anchor_of_both_accountants() -> None:
    history = [(1.0, 0.1, 200)]
    assert epsilon_of(history, 2.5e-4) == pytest.approx(8.03, abs=0.0803 + 0.02)
    quick = epsilon_of(history, 2.5e-4, quick=True)
    assert quick == pytest.approx(renyi_epsilon(1.0, 0.1, 200, 2.5e-4), rel=1e-4)
    assert quick == pytest.approx(9.10, abs=0.05)


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1.0, 1, 1e-3), (4.0, 20, 1e-3), (20.0, 100, 1e-5)])
def test_without_sampling_the_closed_form_is_reached_from_above(sigma: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(sigma, steps, delta)
    found = epsilon_of([(sigma, 1.0, steps)], delta)
    assert exact <= found <= exact * 1.01 + 0.02
    assert found <= epsilon_of([(sigma, 1.0, steps)], delta, quick=True) + 1e-9


def test_epsilon_moves_the_right_way() -> None:
    base = epsilon_of([(1.0, 0.1, 50)], 1e-3)
    assert epsilon_of([(2.0, 0.1, 50)], 1e-3) < base
    assert epsilon_of([(1.0, 0.2, 50)], 1e-3) > base
    assert epsilon_of([(1.0, 0.1, 100)], 1e-3) > base
    assert epsilon_of([(1.0, 0.1, 50)], 1e-4) > base


@pytest.mark.parametrize(("target", "rate", "steps"), [(1.0, 0.1, 100), (8.0, 1.0, 3), (50.0, 1.0, 20)])
def test_the_least_noise_that_reaches_a_target(target: float, rate: float, steps: int) -> None:
    sigma = noise_for(target, 1e-3, rate, steps)
    assert epsilon_of([(sigma, rate, steps)], 1e-3) <= target
    assert epsilon_of([(sigma / 1.03, rate, steps)], 1e-3) > target


def test_the_noise_is_enough_for_the_client_that_needs_most() -> None:
    plans = [ClientPlan(0, 160, 16, 100), ClientPlan(1, 20, 20, 1), ClientPlan(2, 200, 16, 90)]
    prepared = DPSGD(epsilon=1.0, delta=1e-3).prepared(plans)
    sigma = prepared.noise_multiplier
    assert sigma is not None
    spent = [epsilon_of([(sigma, p.batch_size / p.images, p.steps)], 1e-3) for p in plans]
    assert 0.97 < max(spent) <= 1.0
    assert sigma == max(noise_for(1.0, 1e-3, 0.1, 100), noise_for(1.0, 1e-3, 1.0, 1))
    assert prepared.epsilon == 1.0


def test_a_given_noise_is_kept() -> None:
    assert DPSGD(noise_multiplier=0.7).prepared([ClientPlan(0, 50, 5, 9)]).noise_multiplier == 0.7


def test_dominated_clients_need_no_search() -> None:
    runs = {(0.1, 10), (0.2, 10), (0.2, 20), (0.05, 30), (0.05, 29)}
    assert set(undominated(runs)) == {(0.2, 20), (0.05, 30)}


def test_steps_at_equal_noise_and_rate_add_up() -> None:
    assert merged([(1.0, 0.1, 3), (2.0, 0.1, 1), (1.0, 0.1, 4)]) == [(1.0, 0.1, 7), (2.0, 0.1, 1)]


@pytest.mark.parametrize("quick", [True, False])
def test_spent_is_the_largest_over_clients_and_adds_rounds(quick: bool) -> None:
    defense = DPSGD(noise_multiplier=1.0, delta=1e-3)
    ledger = [Charge(0, t, 1.0, 0.1, 10) for t in range(1, 6)] + [Charge(1, t, 1.0, 0.1, 4) for t in range(1, 6)]
    spent = defense.spent(ledger, quick)
    assert spent["epsilon"] == pytest.approx(epsilon_of([(1.0, 0.1, 50)], 1e-3, quick))
    assert spent["steps"] == 50
    assert spent["epsilon"] > defense.spent(ledger[:4], quick)["epsilon"] > defense.spent([], quick)["epsilon"] == 0
    assert (spent["unit"], spent["adjacency"], spent["sampling"]) == ("image", "add-remove", "poisson")
    assert spent["accountant"].startswith("rdp" if quick else "prv")


# -- refusals


def test_batch_norm_is_refused_with_the_setting_that_helps() -> None:
    net = FaceModel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), CosineHead(1, 8))
    with pytest.raises(UsageError, match=r"--set model\.norm=group"):
        DPSGD(noise_multiplier=1.0).check_module(net)
    DPSGD(noise_multiplier=1.0).check_module(face_model()[0])


@pytest.mark.parametrize("images", [10, 50])
def test_a_delta_that_promises_nothing_is_refused(images: int) -> None:
    plans = [ClientPlan(0, 1000, 5, 9), ClientPlan(1, images, 5, 9)]
    with pytest.raises(UsageError, match=rf"client with {images} photos: set it below"):
        DPSGD(noise_multiplier=1.0, delta=1 / images).prepared(plans)
    assert DPSGD(noise_multiplier=1.0, delta=0.99 / images).prepared(plans)


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be reached in 1000000 steps"):
        noise_for(1e-4, 1e-9, 1.0, 10**6)


def test_the_card_names_the_mechanism_and_no_secret() -> None:
    card = DPSGD(noise_multiplier=1.0, noise_seed=77).card()
    assert (card["name"], card["noise_multiplier"], card["max_grad_norm"]) == ("dp-sgd", 1.0, 1.0)
    assert 77 not in card.values()


@pytest.mark.slow
def test_the_large_backbone_trains_under_dp() -> None:
    spec = replace(SPEC, backbone="inception-resnet-v1", embedding_size=512, image_size=80)
    model = build_model(spec, CLASSES, 0)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    DPSGD(noise_multiplier=1.0).check_module(model)
    x, labels = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    alone = torch.autograd.grad(heads.loss(model(x[:1]), labels[:1], spec), list(model.parameters()))
    with session(model, DPSGD(noise_multiplier=1.0, mode="hooks"), 2):
        heads.loss(model(x), labels, spec).backward()
        for p, expected in zip(model.parameters(), alone, strict=True):
            difference = float((p.grad_sample[0] - expected).norm())
            assert difference <= 1e-3 * float(expected.norm()) + 1e-6


def test_an_epsilon_is_rounded_up_and_does_not_depend_on_the_last_digits() -> None:
    for epsilon in (7.978955396693547, 7.97895539669355, 0.9991741891930194, 4321.123456789012, 1.0, 1e-7):
        found = rounded_up(epsilon)
        assert epsilon <= found <= epsilon * (1 + 2e-9)
    assert rounded_up(7.978955396693547) == rounded_up(7.97895539669355) == 7.978955397
    assert (rounded_up(0.0), rounded_up(float("inf"))) == (0.0, float("inf"))
