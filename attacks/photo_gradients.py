"""Gradients of single photos at the model that a round began with, and their products with the update that came of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fedgc import heads
from fedgc.local import load_tensors
from fedgc.models import build_model
from fedgc.types import LocalConstants, ObservedUpdate

HELD = 2**26  # numbers of gradients held at once: 256 MB
SKETCH = 2**17  # numbers kept of a gradient, for products among gradients, where all would be too many


class PhotoGradients:
    """observed: (P,) the update as a descent direction, each tensor divided by its learning rate. Labels are places among the
    rows of the head in ``update``."""

    def __init__(self, update: ObservedUpdate, constants: LocalConstants) -> None:
        self.spec = constants.spec
        self.model = build_model(self.spec, len(update.classes)).eval()
        load_tensors(self.model, update.before)
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self.trained = {name: p for name, p in parameters.items() if name in update.delta}
        self.constant = {name: p for name, p in parameters.items() if name not in update.delta}
        parts = [-update.delta[name] / constants.lr_of(name) for name in self.trained]
        self.observed = torch.cat([part.flatten() for part in parts])

    def _loss(self, trained: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return heads.loss(functional_call(self.model, {**self.constant, **trained}, (images,)), labels, self.spec)

    def each(self, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Blocks (b, P) of the gradients of photos (n, 3, S, S) under labels (n,), in order."""
        alone = vmap(grad(lambda t, x, y: self._loss(t, x[None], y[None])), in_dims=(None, 0, 0))
        block = max(1, min(16, HELD // len(self.observed)))
        for x, y in zip(images.split(block), labels.split(block), strict=True):
            yield self._flat(alone(self.trained, x, y))

    def mean(self, images: Tensor, label: int) -> Tensor:
        """(1, P) mean gradient of photos under one label."""
        found = grad(self._loss)(self.trained, images, torch.full((len(images),), label))
        return self._flat({name: part[None] for name, part in found.items()})

    def _flat(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([parts[name].flatten(1) for name in self.trained], dim=1)


def products(
    blocks: Iterable[Tensor], count: int, observed: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``count`` gradients, in blocks (b, P): products (n,) of their directions with ``observed`` (P,), products (n, n) among
    their directions, and their lengths (n,); float64. The second are of random sketches where gradients are too many numbers."""
    size = len(observed)
    signs = None if count * size <= HELD else torch.randint(2, (size,), generator=generator).to(observed) * 2 - 1
    along, kept, lengths = [], [], []
    for block in blocks:
        length = block.norm(dim=1).clamp_min(1e-12)
        unit = block / length[:, None]
        along.append((unit @ observed).double())
        kept.append(unit if signs is None else sketch(unit * signs))
        lengths.append(length.double())
    rows = torch.cat(kept)
    return torch.cat(along), (rows @ rows.T).double(), torch.cat(lengths)


def sketch(rows: Tensor, size: int = SKETCH) -> Tensor:
    """(b, size) sums of every ``size``-th number of rows (b, P) of random signs: products are kept on average, to about one in
    the square root of ``size``."""
    short = -rows.shape[1] % size
    return torch.nn.functional.pad(rows, (0, short)).view(len(rows), -1, size).sum(dim=1)
