"""One client's local training: a function of parameters, photos and public constants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc import heads
from fedgc.doors import ClientPlan, Defense
from fedgc.errors import WorkFailedError
from fedgc.models import FaceModel, state_tensors
from fedgc.types import HEAD, LocalConstants, Tensors


@dataclass(frozen=True)
class LocalResult:
    """delta: change of every tensor; loss: mean over steps (nan where no step had a photo); steps: steps taken."""

    delta: dict[str, Tensor]
    loss: float
    steps: int
    images: int


@torch.no_grad()
def load_tensors(model: FaceModel, tensors: Tensors) -> None:
    """Copy named tensors into the resident model, in place."""
    own = state_tensors(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def epoch_batches(count: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Photo indices of shuffled epochs. A last batch of one photo is left out: batch statistics of one are undefined."""
    for _ in range(epochs):
        for batch in torch.randperm(count, generator=generator).split(batch_size):
            if len(batch) > 1 or min(count, batch_size) == 1:
                yield batch


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift, scale and brighten each photo of a batch by its own random amount."""
    n = len(x)
    draw = torch.rand(n, 5, generator=generator).to(x.device) * 2 - 1
    zoom = 1 + 0.08 * draw[:, 0]
    mirror = torch.where(draw[:, 1] < 0, -1.0, 1.0)
    zero = torch.zeros_like(zoom)
    theta = torch.stack(
        [torch.stack([zoom * mirror, zero, 0.1 * draw[:, 2]], 1), torch.stack([zero, zoom, 0.1 * draw[:, 3]], 1)], 1
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return (moved * (1 + 0.2 * draw[:, 4, None, None, None])).clamp(0, 1)


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
    noise: torch.Generator,
) -> LocalResult:
    """Train the resident model in place and return what changed.

    photos: uint8 (n, 3, S, S), labels: int64 (n,) indices into the rows of the model's head. Raises WorkFailedError at
    the first loss that is not finite, before anything leaves the client.
    """
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    groups = [
        {"params": list(model.backbone.parameters()), "lr": constants.lr},
        {"params": [model.head.weight], "lr": constants.lr_of(HEAD)},
    ]
    optimizer = torch.optim.SGD(groups, momentum=constants.momentum, weight_decay=constants.weight_decay)
    losses: list[Tensor] = []
    steps = images = 0
    with defense.local_training(model, optimizer, batches, plan, sampling, noise) as session:
        for index in session.batches:
            index = index.to(photos.device)
            x = photos[index].float() / 255
            if augmenting is not None and len(index):
                x = augment(x, augmenting)
            session.optimizer.zero_grad()
            loss = heads.loss(model(x), labels[index], constants.spec)
            loss.backward()
            if constants.clip_norm is not None and not session.bounded:
                torch.nn.utils.clip_grad_norm_(model.parameters(), constants.clip_norm)
            session.optimizer.step()
            steps, images = steps + 1, images + len(index)
            if len(index):
                losses.append(loss.detach())
    mean = float(torch.stack(losses).mean()) if losses else float("nan")
    delta = {name: tensor - before[name] for name, tensor in state_tensors(model).items()}
    if (losses and not math.isfinite(mean)) or not all(bool(d.isfinite().all()) for d in delta.values()):
        raise WorkFailedError(
            f"training of client {plan.client} diverged (loss {mean:g}, or an update that is not finite), and nothing "
            f"was sent. Lower federation.lr (now {constants.lr:g})"
        )
    return LocalResult(delta, mean, steps, images)
