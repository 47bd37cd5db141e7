"""What a step attack reads out of an observation: its targets, and the gradient behind each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from fedgc.types import HEAD, LocalConstants, Observation, ObservedUpdate


def targets(observation: Observation) -> tuple[ObservedUpdate, ...]:
    """The observed updates: one a client where they arrive singly, else the mean of the other clients'."""
    if observation.client_updates is not None:
        return observation.client_updates
    return () if observation.aggregate is None else (observation.aggregate,)


def without_turned_rows(update: ObservedUpdate, constants: LocalConstants) -> ObservedUpdate:
    """The update as it is, or where its rows come turned by a secret without them."""
    if not turned(constants):
        return update
    before, delta = (
        {name: t for name, t in tensors.items() if name != HEAD} for tensors in (update.before, update.delta)
    )
    return replace(update, before=before, delta=delta)


def source(update: ObservedUpdate) -> int:
    """The client of an update; -1 for a mean of several."""
    return update.clients[0] if len(update.clients) == 1 else -1


def gradient(update: ObservedUpdate, constants: LocalConstants) -> dict[str, Tensor]:
    """Gradient of the loss at ``update.before``, from one SGD step: -delta/lr - weight_decay·before, where
    the client shortened its gradient (``clip_norm``) up to one common factor.

    Of K steps with momentum the mean gradient, each step weighing as much as it moved the parameters: -delta/(lr Σc) -
    weight_decay·(before + s·delta), exact but for the straight line that parameters are taken to have moved along.

    Only tensors whose start is known and that training steps on: running statistics are not among a model's
    parameters and are left to the caller, who looks gradients up by parameter name.
    """
    total, middle = sum(weights_of_steps(constants)), middle_of(constants)
    return {
        name: -delta / (constants.lr_of(name) * total) - constants.weight_decay * (update.before[name] + middle * delta)
        for name, delta in update.delta.items()
        if name in update.before
    }


def turned(constants: LocalConstants) -> bool:
    """Whether class embeddings come turned by a rotation that the attacker does not know, as the defense card says: inner
    products among them still hold, those with features of the backbone do not."""
    return constants.defense.get("name") == "blinded-correction"


def reads_rows(update: ObservedUpdate, constants: LocalConstants) -> bool:
    """Whether the head's rows behind an update are seen, and can be put behind the backbone in a forward pass."""
    return HEAD in update.delta and HEAD in update.before and not turned(constants)


def drifted(update: ObservedUpdate, constants: LocalConstants) -> bool:
    """Whether an update is of several photos and steps, whose mean gradient is not that of any one place."""
    return (constants.steps or 1) > 1 and update.images > 1


def weights_of_steps(constants: LocalConstants) -> list[float]:
    """c_k = (1 - m^(K-k)) / (1 - m): how many times lr the gradient of step k, k = 0..K-1, moves the parameters in K steps
    of SGD with momentum m. One where the number of steps is not known."""
    steps, m = constants.steps or 1, constants.momentum
    return [(1 - m ** (steps - k)) / (1 - m) for k in range(steps)]


def middle_of(constants: LocalConstants) -> float:
    """s in [0, 1): the weighted mean place of the steps on the way, at the pace of a constant gradient."""
    weights = weights_of_steps(constants)
    walked = [sum(weights[len(weights) - k :]) for k in range(len(weights))]  # in k steps, which are the last k of K
    return sum(w * s for w, s in zip(weights, walked, strict=True)) / sum(weights) ** 2


def illegible(observation: Observation) -> str | None:
    """Why no gradient can be read from the updates of this observation, or None."""
    if observation.public_constants.lr == 0:
        return "the recorded step was taken at a learning rate of 0 and changed nothing; record an earlier round"
    for update in targets(observation):
        if not any(bool(change.any()) for change in update.delta.values()):
            return f"the update of client {source(update)} is all zeros: there is nothing in it to read"
    return None


def unreadable(observation: Observation, forward: bool = False) -> str | None:
    """Why the updates of this observation cannot be read through the head's rows, or None. forward: reading puts the rows behind
    the backbone."""
    if forward and turned(observation.public_constants) and any(HEAD in u.delta for u in targets(observation)):
        return (
            "puts class embeddings behind the backbone, and under blinded-correction they come turned by a rotation that the "
            f"seat '{observation.threat}' does not know"
        )
    for update in targets(observation) if illegible(observation) is None else ():
        if HEAD not in update.delta or HEAD not in update.before:
            return (
                f"reads labels from changes of the class embeddings ({HEAD}), and none reach the seat "
                f"'{observation.threat}' under {observation.algorithm}. The change of the backbone does, and "
                "it depends on the photos too: that this attack cannot start does not say that nothing leaks"
            )
    return illegible(observation)


class Noise(NamedTuple):
    """What the defense card says of a step: clipping norm of a photo, and standard deviation of a coordinate of the mean."""

    clip: float
    deviation: float

    @classmethod
    def of(cls, update: ObservedUpdate, constants: LocalConstants) -> Noise | None:
        """None where the card tells of none on the gradients of photos. Every client of a mean added noise of its own."""
        clip, sigma = (constants.defense.get(key) for key in ("max_grad_norm", "noise_multiplier"))
        if constants.defense.get("name") != "dp-sgd" or not clip or not sigma:
            return None
        return cls(clip, sigma * clip * len(update.clients) ** 0.5 / update.images)
