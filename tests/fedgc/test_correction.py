"""Oracles of FedGC's correction, in float64: autograd, finite differences, hand values and the bound that motivates it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc.correction import Pairs, corrected, draw_negatives, gradient, log_denominators, regulariser
from fedgc.errors import UsageError
from fedgc.rng import generator

OWNERS = {
    "two equal clients": [0, 0, 0, 1, 1, 1],
    "unequal clients, one of a single row": [0, 0, 0, 0, 0, 1, 2, 2, 2, 3, 3],
    "one class a client": [0, 1, 2, 3, 4],
    "clients interleaved": [1, 0, 2, 1, 0, 2, 2, 1],
}


@pytest.fixture(params=OWNERS.values(), ids=OWNERS.keys())
def owner(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(request.param)


def rows(count: int, d: int = 5, seed: int = 0) -> Tensor:
    """Float64 rows of unequal lengths."""
    drawn = torch.Generator().manual_seed(seed)
    W = torch.randn(count, d, generator=drawn, dtype=torch.float64)
    return W * torch.linspace(0.3, 3, count, dtype=torch.float64)[:, None]


def autograd(function, W: Tensor) -> Tensor:
    W = W.clone().requires_grad_()
    (out,) = torch.autograd.grad(function(W), W)
    return out


def placed(anchor: Tensor, negative: Tensor, owner: Tensor, scale: float) -> Tensor:
    """The regulariser with separate copies of its two factors, so that a test chooses which of them is live. Written
    with loops over pairs, straight from the formula."""
    a, n = F.normalize(anchor, dim=1), F.normalize(negative, dim=1)
    total = anchor.new_zeros(())
    for i in range(len(a)):
        others = [torch.exp(scale * (n[j] @ a[i]) - scale) for j in range(len(n)) if owner[j] != owner[i]]
        total = total + torch.log1p(torch.stack(others).sum() if others else anchor.new_zeros(()))
    return total


@pytest.mark.parametrize("scale", [1.0, 8.0, 30.0])
def test_the_closed_form_is_the_gradient_of_the_reference(owner: Tensor, scale: float) -> None:
    W = rows(len(owner))
    expected = autograd(lambda w: regulariser(w, owner, scale), W)
    torch.testing.assert_close(gradient(W, owner, scale), expected, rtol=1e-12, atol=1e-14)


def test_the_reference_is_the_formula(owner: Tensor) -> None:
    W = rows(len(owner))
    torch.testing.assert_close(regulariser(W, owner, 4.0), placed(W, W, owner, 4.0), rtol=1e-13, atol=0)


def test_finite_differences_of_the_live_copy_alone(owner: Tensor) -> None:
    W, scale, h = rows(len(owner), d=3), 4.0, 1e-5
    found = gradient(W, owner, scale)
    for j in range(len(W)):
        for c in range(W.shape[1]):
            step = torch.zeros_like(W)
            step[j, c] = h
            up, down = (placed(W, W + sign * step, owner, scale) for sign in (1, -1))
            assert float(found[j, c]) == pytest.approx(float(up - down) / (2 * h), abs=2e-9)


def test_another_stop_gradient_does_not_match(owner: Tensor) -> None:
    """Negatives stopped and anchors live is the gradient of the feature: the mistake that this file must notice."""
    W, scale = rows(len(owner)), 4.0
    found = gradient(W, owner, scale)
    right = autograd(lambda w: placed(w.detach(), w, owner, scale), W)
    wrong = autograd(lambda w: placed(w, w.detach(), owner, scale), W)
    both = autograd(lambda w: placed(w, w, owner, scale), W)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
    assert (found - wrong).norm() > 0.01 * found.norm()
    assert (found - both).norm() > 0.5 * found.norm()


def test_one_client_has_nothing_to_correct() -> None:
    W, owner = rows(6), torch.zeros(6, dtype=torch.long)
    assert float(regulariser(W, owner, 8.0)) == 0
    assert torch.equal(gradient(W, owner, 8.0), torch.zeros_like(W))
    assert torch.equal(corrected(W, owner, 8.0, step=10.0), W)


def test_two_people_by_hand() -> None:
    """e_1 = (1, 0), w_2 = 2 (cos φ, sin φ): Reg = 2 log(1 + r) with r = e^{s (cos φ - 1)}, and row j is pushed by
    s r/(1+r) times the other's component in its tangent plane, over its length."""
    phi, s = 1.1, 3.0
    W = torch.tensor([[1.0, 0.0], [2 * math.cos(phi), 2 * math.sin(phi)]], dtype=torch.float64)
    owner = torch.tensor([0, 1])
    r = math.exp(s * (math.cos(phi) - 1))
    assert float(regulariser(W, owner, s)) == pytest.approx(2 * math.log1p(r), rel=1e-14)
    push = s * r / (1 + r) * math.sin(phi)
    expected = torch.tensor([[0.0, push], [push * math.sin(phi) / 2, -push * math.cos(phi) / 2]], dtype=torch.float64)
    torch.testing.assert_close(gradient(W, owner, s), expected, rtol=1e-13, atol=1e-15)
    apart = corrected(W, owner, s, step=0.1)
    assert F.cosine_similarity(apart[0], apart[1], dim=0) < math.cos(phi)


def test_equivariant_to_the_order_of_classes(owner: Tensor) -> None:
    W = rows(len(owner))
    order = torch.randperm(len(W), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        gradient(W[order], owner[order], 8.0), gradient(W, owner, 8.0)[order], rtol=1e-12, atol=1e-14
    )


def test_equivariant_to_rotation(owner: Tensor) -> None:
    W = rows(len(owner))
    R, _ = torch.linalg.qr(rows(5, 5, seed=2))
    torch.testing.assert_close(
        corrected(W @ R, owner, 8.0, 0.7), corrected(W, owner, 8.0, 0.7) @ R, rtol=1e-12, atol=1e-14
    )


def test_the_push_is_tangent_and_blind_to_names_and_lengths(owner: Tensor) -> None:
    W = rows(len(owner))
    G = gradient(W, owner, 8.0)
    assert (G * W).sum(dim=1).abs().max() < 1e-14
    assert G.norm(dim=1).min() > 1e-6  # every row has a neighbour on another client
    torch.testing.assert_close(gradient(W, 7 - owner, 8.0), G)  # a client's number means nothing
    longer = torch.linspace(0.5, 4, len(W), dtype=W.dtype)[:, None]
    torch.testing.assert_close(gradient(longer * W, owner, 8.0) * longer, G, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 11, 12, 100])
def test_blocks_of_any_size_make_the_same_gradient(block: int) -> None:
    owner = torch.tensor([0] * 7 + [1] + [2] * 4)
    W = rows(12)
    torch.testing.assert_close(
        gradient(W, owner, 8.0, block=block), autograd(lambda w: regulariser(w, owner, 8.0), W), rtol=1e-12, atol=1e-14
    )


FORMS = [{"normalised": n, "own_in_denominator": o} for n, o in product((True, False), repeat=2)]


def named(form: dict[str, bool]) -> str:
    return ("unit" if form["normalised"] else "raw") + (", all classes" if form["own_in_denominator"] else "")


@pytest.mark.parametrize("block", [1, 3, 4, 8, None])
@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_every_form_is_the_gradient_of_the_reference(owner: Tensor, form, keep: float, block: int | None) -> None:
    W, scale = rows(len(owner)) / 2, 1.7
    drawn = None if keep == 1 else draw_negatives(owner, keep, generator("negatives"))
    expected = autograd(lambda w: regulariser(w, owner, scale, drawn=drawn, **form), W)
    found = gradient(W, owner, scale, keep=keep, generator=generator("negatives"), block=block, **form)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14 * float(expected.abs().max()))
    if drawn is not None:
        assert not found[~drawn].any()  # not a negative, not pushed


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_forms_of_one_client_have_nothing_to_correct(form) -> None:
    W, owner = rows(6), torch.full((6,), 3)
    assert not gradient(W, owner, 8.0, keep=0.5, generator=generator("negatives"), **form).any()
    assert float(regulariser(W, owner, 8.0) if not form["own_in_denominator"] else 0) == 0
    assert torch.equal(corrected(W, owner, 8.0, 1.0, **form), W)


def test_raw_rows_by_loops_as_the_paper_writes_it() -> None:
    """Row j: sum over i on other clients of q_ij w_i, q from exp(w_j·w_i); no tangent plane."""
    W, owner = rows(7) / 2, torch.tensor([0, 1, 0, 2, 1, 2, 2])
    expected = torch.zeros_like(W)
    for i in range(7):
        others = [j for j in range(7) if owner[j] != owner[i]]
        denominator = torch.exp(W[i] @ W[i]) + sum(torch.exp(W[j] @ W[i]) for j in others)
        for j in others:
            expected[j] += torch.exp(W[j] @ W[i]) / denominator * W[i]
    torch.testing.assert_close(gradient(W, owner, 1.0, normalised=False), expected, rtol=1e-12, atol=1e-14)


def test_a_moved_stop_gradient_does_not_match_on_raw_rows(owner: Tensor) -> None:
    W = rows(len(owner)) / 2
    found = gradient(W, owner, 1.0, normalised=False)

    def live_positive(w: Tensor) -> Tensor:  # the positive factor live: adds radial growth
        logits = (w.detach() @ w.T).masked_fill(owner[:, None] == owner[None, :], -torch.inf)
        positive = (w.detach() * w).sum(dim=1)
        return (torch.logsumexp(torch.cat([positive[:, None], logits], dim=1), dim=1) - positive).sum()

    assert (found - autograd(live_positive, W)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_all_classes_in_the_denominator_restore_what_local_softmax_lacks(owner: Tensor, form) -> None:
    """With samples f_i = w_i, full softmax pushes row j by sum_i p_ij f_i; the part of foreign i is Q^T W, exactly."""
    W = rows(len(owner)) / 2
    anchors = F.normalize(W, dim=1) if form["normalised"] else W
    foreign = (owner[:, None] != owner[None, :]).to(W.dtype)

    def full_softmax(w: Tensor) -> Tensor:
        live = F.normalize(w, dim=1) if form["normalised"] else w
        p = torch.softmax(2.0 * anchors @ anchors.T, dim=1)
        return (2.0 * foreign * p * (anchors @ live.T)).sum()  # linear in w_j: its slope is the foreign push on row j

    found = gradient(W, owner, 2.0, normalised=form["normalised"], own_in_denominator=True)
    torch.testing.assert_close(found, autograd(full_softmax, W), rtol=1e-12, atol=1e-14)
    if not form["own_in_denominator"] and len(owner.unique()) < len(owner):
        assert (found - gradient(W, owner, 2.0, **form)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_forms_are_equivariant_to_order_and_rotation(owner: Tensor, form) -> None:
    W = rows(len(owner)) / 2
    G = gradient(W, owner, 2.0, block=4, **form)
    order = torch.randperm(len(W), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gradient(W[order], owner[order], 2.0, block=4, **form), G[order], rtol=1e-11, atol=1e-13)
    R, _ = torch.linalg.qr(rows(5, 5, seed=2))
    torch.testing.assert_close(gradient(W @ R, owner, 2.0, block=4, **form), G @ R, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", FORMS, ids=named)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_raw_logits_beyond_single_precision_s_exponential(form, keep: float) -> None:
    W = rows(40, 8).float() * 20  # |w|² in the thousands: exp overflows at 88
    owner = torch.arange(40) % 3
    found, exact = (
        gradient(w, owner, 1.0, keep=keep, generator=generator("n"), block=16, **form) for w in (W, W.double())
    )
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("own_in_denominator", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_sampled_denominators_are_right_on_average(normalised: bool, own_in_denominator: bool) -> None:
    """Over all draws of 2 of 5 classes, each as often, the mean of Z is Z: exactly."""
    W, owner = rows(5) / 2, torch.tensor([0, 1, 1, 2, 0])

    def denominators(drawn: Tensor | None) -> Tensor:
        return log_denominators(
            Pairs(W, owner, 2.0, normalised=normalised, drawn=drawn, block=2), own_in_denominator
        ).exp()

    draws = [torch.tensor([i in pair for i in range(5)]) for pair in torch.combinations(torch.arange(5)).tolist()]
    mean = torch.stack([denominators(drawn) for drawn in draws]).mean(dim=0)
    torch.testing.assert_close(mean, denominators(None), rtol=1e-12, atol=0)


def test_draws_are_fair_and_repeatable() -> None:
    owner, stream = torch.zeros(10), generator("draws")
    often = torch.stack([draw_negatives(owner, 0.3, stream) for _ in range(3000)]).double()
    assert (often.sum(dim=1) == 3).all()
    assert (often.mean(dim=0) - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 3000)
    same = [draw_negatives(owner, 0.3, generator("draws")) for _ in range(2)]
    assert torch.equal(*same)
    assert draw_negatives(owner, 1e-9, generator("draws")).sum() == 1


def test_two_ways_to_the_same_gradient() -> None:
    """Every negative drawn: the one-sided passes against the symmetric ones, several tiles, some one client's alone."""
    W, owner = rows(90, 6), torch.tensor([0] * 41 + [1] + [2] * 25 + [3] * 23)
    all_drawn = gradient(W, owner, 8.0, keep=0.9999, generator=generator("all"), block=8)
    torch.testing.assert_close(gradient(W, owner, 8.0, block=8), all_drawn, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("scale", "allowed"), [(8.0, 0.01), (16.0, 0.02), (30.0, 0.05), (64.0, 0.12)])
def test_brain_floats_are_off_by_what_is_promised(scale: float, allowed: float) -> None:
    """Embeddings in few dimensions, which collide more than real ones."""
    W = (rows(1500, 32) @ rows(32, 256, seed=3)).float()
    owner = torch.randint(0, 20, (1500,), generator=torch.Generator().manual_seed(4))
    exact = gradient(W.double(), owner, scale)
    rounded, single = gradient(W, owner, scale, precision="bfloat16"), gradient(W, owner, scale)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < allowed
    assert (single - exact).norm() < 2e-5 * exact.norm()
    assert (rounded * W).sum(dim=1).abs().max() < 1e-4 * (exact * W).norm(dim=1).max() + 1e-4  # still tangent


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_brain_floats_in_every_form(owner: Tensor, form) -> None:
    W = rows(len(owner)).float() / 2
    exact = gradient(W, owner, 1.0, **form)
    assert (gradient(W, owner, 1.0, precision="bfloat16", **form) - exact).norm() < 0.02 * exact.norm()


def test_a_row_of_zeros_neither_pushes_nor_is_pushed() -> None:
    W, owner = rows(5), torch.tensor([0, 0, 1, 1, 2])
    W[2] = 0
    found = gradient(W, owner, 8.0)
    assert torch.isfinite(found).all()
    assert not found[2].any()


def test_settings_out_of_range_say_what_to_do() -> None:
    W, owner = rows(4), torch.tensor([0, 0, 1, 1])
    for options, message in (
        ({"keep": 0.0, "generator": generator("n")}, "above 0"), ({"keep": 1.5, "generator": generator("n")}, "at most 1"),
        ({"keep": 0.5}, "pass a generator"), ({"precision": "float16"}, "use float32 or bfloat16"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            gradient(W, owner, 8.0, **options)


@pytest.mark.parametrize("scale", [64.0, 256.0])
@pytest.mark.parametrize("length", [1e-3, 1.0, 100.0])
def test_no_overflow_in_single_precision(scale: float, length: float) -> None:
    W = (rows(40, 8) * length).float()
    W[20:] = W[:20]  # a lookalike on the other client: the largest possible logit
    owner = torch.arange(40) // 20
    found = gradient(W, owner, scale)
    assert torch.isfinite(found).all()
    assert torch.isfinite(regulariser(W, owner, scale))
    exact = gradient(W.double(), owner, scale)
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max()) + 1e-4 / length)


def test_a_step_of_zero_changes_no_bit(owner: Tensor) -> None:
    W = rows(len(owner)).float()
    assert torch.equal(corrected(W, owner, 8.0, step=0.0), W)
    assert not torch.equal(corrected(W, owner, 8.0, step=0.1), W)


def test_a_corrected_head_is_a_new_one_and_passes_its_options_on(owner: Tensor) -> None:
    W = rows(len(owner)) / 2
    before = W.clone()
    raw = corrected(W, owner, 1.0, 0.1, normalised=False)
    assert torch.equal(W, before)
    torch.testing.assert_close(raw, W - 0.1 * gradient(W, owner, 1.0, normalised=False), rtol=1e-14, atol=1e-15)


def test_a_small_step_lowers_the_regulariser(owner: Tensor) -> None:
    W = rows(len(owner))
    assert regulariser(corrected(W, owner, 8.0, 1e-3), owner, 8.0) < regulariser(W, owner, 8.0)


def test_local_softmax_and_the_cross_term_bound_centralised_softmax() -> None:
    """max(local, cross) <= full <= local + cross for a sample with any logits, and Reg's summand is cross at f = e_y."""
    drawn = torch.Generator().manual_seed(3)
    for _ in range(300):
        owner = torch.randint(0, 3, (9,), generator=drawn)
        W = F.normalize(torch.randn(9, 4, generator=drawn, dtype=torch.float64), dim=1)
        f = F.normalize(torch.randn(4, generator=drawn, dtype=torch.float64), dim=0)
        y = int(torch.randint(0, 9, (1,), generator=drawn))
        own, me = owner == owner[y], torch.arange(9) == y
        full, local, cross = (cross_entropy(W, f, y, among) for among in (torch.ones_like(own), own, me | ~own))
        assert max(local, cross) - 1e-12 <= full <= local + cross + 1e-12


def test_the_regulariser_sums_the_cross_terms_at_the_class_embeddings(owner: Tensor) -> None:
    E = F.normalize(rows(len(owner)), dim=1)
    each = torch.arange(len(owner))
    terms = [cross_entropy(E, E[i], int(i), (owner != owner[i]) | (each == i)) for i in each]
    assert float(regulariser(E, owner, 8.0)) == pytest.approx(sum(terms), rel=1e-12)


def cross_entropy(W: Tensor, f: Tensor, y: int, among: Tensor, scale: float = 8.0) -> float:
    logits = scale * W @ f
    return float(torch.logsumexp(logits[among], 0) - logits[y])
