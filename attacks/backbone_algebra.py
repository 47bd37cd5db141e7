"""What the gradient of the last layers of a backbone says of the photos of one step, with the head's rows or without.

The last linear layer makes y = W h + b of its input h, and a norm may follow, z = norm(y). With δ_i = dL/dy_i its gradients are
dW = Σ δ_i h_iᵀ and db = Σ δ_i, so that one photo has h = dWᵀdb / |db|² (Phong et al. 2018), whatever the head, the label and the
clipping. A norm's own gradients are dβ = Σ dL/dz and dγ = Σ dL/dz·x̂ with z = γ x̂ + β, so that one photo has z = γ dγ/dβ + β.
Several photos are told apart by the zeros of a ReLU (`attacks.unmixing`) or, where the head's rows are seen, by the
directions of their gradients, which follow from the unit features (`attacks.head_algebra`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.head_algebra import (
    HeadRows,
    embedding_of_one,
    feature_gradients,
    guess_labels,
    head_rows,
    labels_of,
    match_batch,
    match_rest,
)
from attacks.last_layers import Tail, affine, is_affine, map_of, onto, tail
from attacks.unmixing import singular, unmix
from attacks.updates import turned
from fedgc.types import LocalConstants, ObservedUpdate

RANK_ONE = 0.1  # share of the length of dW that db must leave unexplained at most


@dataclass(frozen=True)
class Recovered:
    """What one update gives away, entry i of each field about the same photo; None where it does not follow.

    labels: int64 (n,) rows of the head, ascending; unit_embeddings: (n, d); inputs: (n, f) of the embedding layer in their true
    scale; features: (n, d) before any normalisation to unit length; feature_gradient: (n, d) dL/dz as observed. n is the number
    of photos, or without the head's rows how many of them could be told apart. All but labels float64. how: for people.
    """

    labels: Tensor | None
    unit_embeddings: Tensor | None
    inputs: Tensor | None
    features: Tensor | None
    feature_gradient: Tensor | None
    how: str


def inputs_of_one(last: Tail) -> Tensor | None:
    """(f,) h of the only photo in its true scale, or None where the scale cannot be known (no bias, and a norm that undoes it).

    With a bias h = dWᵀdb / |db|², all rows of dW by what they can be trusted. Without, dW = δ hᵀ gives the direction, and a norm
    on either side gives sign and scale.
    """
    dW, h = last.gradients[last.linear]["weight"], _by_bias(last)
    if h is not None and (dW - torch.outer(last.gradients[last.linear]["bias"], h)).norm() <= RANK_ONE * dW.norm():
        return h
    _, _, V, _ = singular(dW, 1)
    if not V.shape[1]:
        return None
    v = V[:, 0]
    fed = last.output_of(last.feeding)
    if fed is not None:
        return v * _along(v, *fed)
    made = last.output_of(last.norm)
    if made is None or last.norm is None or not is_affine(last.norm):
        return None
    z, trust = made
    scale, shift = affine(last.norm, z)
    bias = last.linear.bias if last.linear.bias is not None else torch.zeros_like(z)
    return v * _along(scale * (last.linear.weight.detach() @ v), z - shift - scale * bias.detach(), trust)


def _by_bias(last: Tail) -> Tensor | None:
    """(f,) dWᵀdb / |db|², the h that leaves the least of dW unexplained."""
    seen = last.gradients[last.linear]
    if "bias" not in seen or not bool(seen["bias"].any()):
        return None
    return seen["weight"].T @ seen["bias"] / seen["bias"].square().sum()


def _along(direction: Tensor, target: Tensor, trust: Tensor) -> Tensor:
    """The factor by which a direction comes nearest to a target, errors weighed by trust²."""
    weight = trust.square()
    return (weight * direction * target).sum() / (weight * direction.square()).sum().clamp_min(1e-300)


def inputs_of_batch(update: ObservedUpdate, constants: LocalConstants, units: Tensor) -> Tensor | None:
    """(B, f) h of each photo in its true scale, from the unit features (B, d) of all of them and the head's rows.

    The rows and ẑ give the direction of each dL/dz_i, hence of δ_i, and dW, db = Σ δ_i (h_i, 1)ᵀ is solved by least squares: the
    entry that must be 1 sets the scale. Without a bias the scale comes from a norm, or is not known: None. None as well where
    head or backbone do not reach the observer.
    """
    rows, last = head_rows(update, constants), tail(update, constants)
    return None if rows is None or last is None else _inputs_by_rows(rows, last, units.double())


def _inputs_by_rows(rows: HeadRows, last: Tail, units: Tensor) -> Tensor | None:
    seen, linear = last.gradients[last.linear], last.linear
    pulls = _before_norm(last, units, feature_gradients(rows, units))
    right = seen["weight"] if "bias" not in seen else torch.cat([seen["weight"], seen["bias"][:, None]], dim=1)
    solved = torch.linalg.pinv(pulls.T, rtol=1e-9) @ right  # h_i, or h_i and 1, over |z_i| and the spread of a norm
    if "bias" in seen:
        h = solved[:, :-1] / solved[:, -1:]
    elif last.norm is not None and is_affine(last.norm):
        scale, shift = affine(last.norm, units[0])
        if linear.bias is not None:
            shift = shift + scale * linear.bias.detach()
        off = (
            units - solved @ (scale[:, None] * linear.weight.detach()).T
        )  # |z|·off = shift, since z = scale·W h + shift
        h = solved * ((off @ shift) / off.square().sum(1).clamp_min(1e-300))[:, None]
    elif last.feeding is not None and not is_affine(last.feeding):
        h = onto(last.feeding, solved)
    else:
        return None
    return h.clamp_min(0) if last.rectified else h


def _before_norm(last: Tail, units: Tensor, pulls: Tensor) -> Tensor:
    """Directions of dL/dy_i from those of dL/dz_i (n, d), through the norm where there is one."""
    norm = last.norm
    if norm is None:
        return pulls
    if is_affine(norm):
        return pulls * affine(norm, units[0])[0]
    z = onto(norm, units)
    gamma, beta = map_of(norm)
    spread = ((z - beta) / gamma).requires_grad_()  # its own normalised form: only the direction of the answer counts
    (before,) = torch.autograd.grad(norm(spread), spread, pulls)
    return before


def recover(update: ObservedUpdate, constants: LocalConstants) -> Recovered:
    """All that follows from the update of one step: labels, unit features, inputs of the embedding layer, gradients.

    One photo: the last layers, and the label by the head's rows where they are seen. Several: by the zeros of their inputs where
    a ReLU made them, the labels then by what each photo pulls; else by row matching. Rows that come turned by a secret say
    nothing of features: they name the label of one photo, and no more is made of them. Seconds at the most.
    """
    rows, last, count = head_rows(update, constants), tail(update, constants), update.images
    blind = turned(constants)
    if count == 1:
        return _of_one(rows, last, blind)
    inputs = _by_zeros(last, count) if last is not None else None
    units = None if inputs is None or last is None else F.normalize(last.features(inputs), dim=1)
    if rows is None or blind:
        return _without_rows(last, inputs, units)
    own = len(update.clients) > 1
    how = "row matching" if units is None else "zeros of the embedding layer's inputs"
    if units is None:
        labels, units = match_batch(rows, count, constants.spec, own)
    else:
        labels = labels_of(rows, units)
        if len(units) < count:
            how += f", {count - len(units)} of {count} by row matching"
            labels, units = match_rest(rows, labels, units, count, constants.spec, own)
    if last is not None and (inputs is None or len(inputs) < count):
        solved = _inputs_by_rows(rows, last, units)
        inputs = solved if solved is None or inputs is None else torch.cat([inputs, solved[len(inputs) :]])
    order = labels.sort(stable=True).indices
    labels, units, inputs = labels[order], units[order], None if inputs is None else inputs[order]
    features = None if inputs is None or last is None else last.features(inputs)
    pulls = None if features is None else feature_gradients(rows, units) / features.norm(dim=1, keepdim=True)
    return Recovered(labels, units, inputs, features, pulls, how)


def _of_one(rows: HeadRows | None, last: Tail | None, blind: bool = False) -> Recovered:
    labels = None if rows is None else guess_labels(rows, 1)
    inputs = features = pulls = None
    if last is not None:
        h, made = inputs_of_one(last), last.output_of(last.norm)
        if h is None and made is None and rows is None:  # noise: better an estimate than none
            h = _by_bias(last)
        inputs = None if h is None else h[None]
        features = last.features(inputs) if inputs is not None else None if made is None else made[0][None]
        pulls = made[1][None] if made is not None else _pulls(last, inputs)
    units = None if features is None else F.normalize(features, dim=1)
    how = "the last layers of the backbone"
    if units is None and rows is not None and labels is not None and len(rows.pull) > 1 and not blind:
        units, how = embedding_of_one(rows, int(labels))[None], "the head's rows"
    return Recovered(labels, units, inputs, features, pulls, how)


def _without_rows(last: Tail | None, inputs: Tensor | None, units: Tensor | None) -> Recovered:
    if last is None or inputs is None:
        why = "nothing: no zeros tell the photos apart, and the head's rows are not seen"
        return Recovered(None, None, None, None, None, why)
    features = last.features(inputs)
    return Recovered(None, units, inputs, features, _pulls(last, inputs), "zeros of the embedding layer's inputs")


def _has_zeros(last: Tail, count: int) -> bool:
    seen = last.gradients[last.linear]
    return last.rectified and "bias" in seen and count < min(seen["weight"].shape)


def _by_zeros(last: Tail, count: int) -> Tensor | None:
    """(n, f) inputs of a layer with a bias behind a ReLU, n <= count, or None."""
    if not _has_zeros(last, count):
        return None
    seen = last.gradients[last.linear]
    found = unmix(seen["weight"], seen["bias"], count).inputs
    return found if len(found) else None


def _pulls(last: Tail, inputs: Tensor | None) -> Tensor | None:
    """(n, d) dL/dz_i of a layer without a norm after it: dW = Σ δ_i h_iᵀ solved for δ."""
    if last.norm is not None or inputs is None:
        return None
    return (last.gradients[last.linear]["weight"] @ torch.linalg.pinv(inputs, rtol=1e-9)).T


def separable(update: ObservedUpdate, constants: LocalConstants) -> bool:
    """Whether the photos of an update can be told apart without the head's rows; the costly part, a forward pass, is small."""
    last = tail(update, constants)
    return last is not None and _has_zeros(last, update.images)
