"""One client's local training: a function of parameters, photos and public constants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgc import heads
from fedgc.doors import ClientPlan, Defense
from fedgc.errors import WorkFailedError
from fedgc.models import FaceModel, state_tensors
from fedgc.team import Team
from fedgc.types import HEAD, LocalConstants, Tensors


@dataclass(frozen=True)
class LocalResult:
    """delta: change of every tensor; loss: mean over steps (nan where no step had a photo); steps: steps taken; dropped:
    gradients of single photos that were not finite and left out, where a defense looks at single photos."""

    delta: dict[str, Tensor]
    loss: float
    steps: int
    images: int
    dropped: int = 0


@torch.no_grad()
def load_tensors(model: FaceModel, tensors: Tensors) -> None:
    """Copy named tensors into the resident model, in place."""
    own = state_tensors(model)
    torch._foreach_copy_([own[name] for name in tensors], list(tensors.values()))


def epoch_batches(count: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Photo indices of shuffled epochs. A last batch of one photo is left out: batch statistics of one are undefined."""
    for _ in range(epochs):
        for batch in torch.randperm(count, generator=generator).split(batch_size):
            if len(batch) > 1 or min(count, batch_size) == 1:
                yield batch


ZOOM, SHIFT, TURN, BRIGHTNESS, CONTRAST, TINT = (
    0.1,
    0.1,
    0.12,
    0.2,
    0.2,
    0.06,
)  # most in either direction; TURN in radians


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift, turn and scale each photo of a batch, and change its light, by random amounts of its own."""
    n = len(x)
    draw = (torch.rand(n, 10, generator=generator) * 2 - 1).to(x.device)
    zoom, turn = 1 + ZOOM * draw[:, 0], TURN * draw[:, 1]
    mirror = torch.where(draw[:, 2] < 0, -1.0, 1.0)
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    rows = torch.stack([cos * mirror, -sin, SHIFT * draw[:, 3], sin * mirror, cos, SHIFT * draw[:, 4]], dim=1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    light = 1 + BRIGHTNESS * draw[:, 5, None] + TINT * draw[:, 7:]
    grey = moved.mean(dim=(1, 2, 3), keepdim=True)
    return ((grey + (1 + CONTRAST * draw[:, 6, None, None, None]) * (moved - grey)) * light[:, :, None, None]).clamp_(
        0, 1
    )


@contextmanager
def products_in_bfloat16(backbone: nn.Module) -> Iterator[None]:
    """Convolutions and matrix products of the backbone in bfloat16; norms, whose bfloat16 kernels are slow on a CPU, in float32.
    Weights stay float32, and so does all that comes after the backbone."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),)) for norm in norms]
    forward = backbone.forward

    def forward_in_bfloat16(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(x).float()

    backbone.forward = forward_in_bfloat16
    try:
        yield
    finally:
        del backbone.forward  # the class has its own
        for hook in hooks:
            hook.remove()


def _backward(
    model: FaceModel,
    x: Tensor,
    labels: Tensor,
    constants: LocalConstants,
    team: Team | None,
    parameters: list[nn.Parameter],
) -> Tensor:
    """Gradients of the mean loss of a batch, each process of a team on its photos; returns that loss."""
    if team is None:
        loss = heads.loss(model(x), labels, constants.spec)
        loss.backward()
        return loss
    mine = team.part(len(x))
    loss = x.new_zeros(())
    if mine.stop > mine.start:
        loss = heads.loss(model(x[mine]), labels[mine], constants.spec) * ((mine.stop - mine.start) / len(x))
        loss.backward()
    return team.add_up(parameters, loss)


def train_locally(
    model: FaceModel,
    photos: Tensor,
    labels: Tensor,
    batches: Iterator[Tensor],
    constants: LocalConstants,
    defense: Defense,
    plan: ClientPlan,
    *,
    sampling: torch.Generator | None,
    augmenting: torch.Generator | None,
    noise: torch.Generator | None,
    team: Team | None = None,
) -> LocalResult:
    """Train the resident model in place and return what changed. team: other processes that share each batch.

    photos: uint8 (n, 3, S, S), labels: int64 (n,) indices into the rows of the model's head. Raises WorkFailedError, before
    anything leaves the client, where the update is not finite, or the mean loss is not and no defense bounds single photos.
    """
    held = state_tensors(model)  # once: the walk takes as long as a small layer, and training changes them in place
    before = dict(zip(held, torch._foreach_add(list(held.values()), 0), strict=True))
    parameters = list(model.parameters())
    groups = [
        {"params": list(model.backbone.parameters()), "lr": constants.lr},
        {"params": [model.head.weight], "lr": constants.lr_of(HEAD)},
    ]
    optimizer = torch.optim.SGD(groups, momentum=constants.momentum, weight_decay=constants.weight_decay)
    losses: list[Tensor] = []
    steps = images = 0
    half = products_in_bfloat16(model.backbone) if constants.precision == "bfloat16" else nullcontext()
    with half, defense.local_training(model, optimizer, batches, plan, sampling, noise) as session:
        for index in session.batches:
            index = index.to(photos.device)
            x = photos[index].float() / 255
            if augmenting is not None and len(index):
                x = augment(x, augmenting)
            session.optimizer.zero_grad()
            loss = _backward(model, x, labels[index], constants, team, parameters)
            if constants.clip_norm is not None and not session.bounded:
                torch.nn.utils.clip_grad_norm_(parameters, constants.clip_norm)
            session.optimizer.step()
            steps, images = steps + 1, images + len(index)
            if len(index):
                losses.append(loss.detach())
    every = torch.stack(losses) if losses else torch.zeros(0)
    if session.bounded:  # one photo without a finite loss is dropped before clipping, and does not speak for the others
        every = every[every.isfinite()]
    mean = float(every.mean()) if len(every) else float("nan")
    # where single photos are protected, whether anything is sent must not depend on the loss of one of them
    diverged = bool(losses) and not math.isfinite(mean) and not session.bounded
    delta = dict(zip(held, torch._foreach_sub(list(held.values()), list(before.values())), strict=True))
    finite = torch.stack(torch._foreach_norm(list(delta.values()))).isfinite().all()
    if diverged or not bool(finite):
        raise WorkFailedError(
            f"training of client {plan.client} diverged (loss {mean:g}, or an update that is not finite), and nothing "
            f"was sent. Lower federation.lr (now {constants.lr:g})"
        )
    return LocalResult(delta, mean, steps, images, getattr(session.optimizer, "dropped", 0))
