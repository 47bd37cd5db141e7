"""DP-SGD without gradients of single photos: book-keeping (Bu et al. 2023, arXiv 2210.00038).

One forward pass notes every layer's input, one backward pass, of activations alone, the gradient of its output; lengths follow
from these (`defenses.layer_gradients`), and from them the clipped sum in one product a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from defenses.layer_gradients import RULES, Part, Units, trains, unknown_layers
from defenses.per_unit import UnitOptimizer, fit_only
from fedgc.errors import UsageError


class Book:
    """While open, what passes through each layer with parameters: its input (B, ...) and the gradient of its output."""

    def __init__(self, module: nn.Module) -> None:
        if unknown := unknown_layers(module):
            raise UsageError(
                f"defense.mode = bookkeeping knows no rule for the layer {unknown[0]} ({len(unknown)} in all): use "
                "defense.mode = hooks"
            )
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.inputs: dict[nn.Module, Tensor] = {}
        self.gradients: dict[nn.Module, Tensor] = {}
        layers = [m for m in module.modules() if trains(m)]
        self._handles = [
            module.register_forward_pre_hook(lambda *_: self._ask_gradients(False)),
            module.register_forward_hook(lambda *_: self._ask_gradients(True), always_call=True),
            *(layer.register_forward_hook(self._note) for layer in layers),
        ]

    def _ask_gradients(self, wanted: bool) -> None:
        # a graph made meanwhile leads to activations alone, so that the backward pass forms no gradient of a parameter
        for p in self.parameters:
            p.requires_grad_(wanted)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if layer in self.inputs:
            raise UsageError(
                f"defense.mode = bookkeeping cannot train a network that uses a layer ({type(layer).__name__}) twice: use "
                "defense.mode = hooks"
            )
        self.inputs[layer] = inputs[0].detach()
        first = not output.requires_grad
        noted = output.detach().requires_grad_() if first else output
        noted.register_hook(lambda gradient: self.gradients.__setitem__(layer, gradient))
        return noted if first else None

    def clear(self) -> None:
        self.inputs, self.gradients = {}, {}

    def photos(self) -> int:
        return len(next(iter(self.inputs.values())))

    def parts(self, units: Units) -> list[Part]:
        return [
            part
            for layer, x in self.inputs.items()
            for part in RULES[type(layer)](layer, x, self.gradients[layer], units)
        ]

    def unfit(self) -> Tensor:
        """(B,) photos for which some number is not finite."""
        every = [*self.inputs.values(), *self.gradients.values()]
        return ~torch.stack([t.flatten(1).isfinite().all(dim=1) for t in every]).all(dim=0)

    def blank(self, photos: Tensor) -> None:
        """Forget all that came of some photos, (B,) bool: their gradients become zero, whatever they were."""
        for kept in (self.inputs, self.gradients):
            for layer, t in kept.items():
                kept[layer] = fit_only(t, ~photos)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.clear()


class BookKeepingOptimizer(UnitOptimizer):
    """Opacus's private optimiser, with its noise, fed from a book in place of per-photo gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, book: Book, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self.book = book
        self.units = 0

    def counted(self) -> int:
        return self.units

    @property
    def accumulated_iterations(self) -> int:
        return 1

    def zero_grad(self, set_to_none: bool = False) -> None:
        self.book.clear()
        super().zero_grad(set_to_none)

    def pre_step(self, closure: Any = None) -> bool:
        self.clip_and_accumulate()
        self.add_noise()
        self.scale_grad()
        return True

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Σ g min(1, C/|g|) over units into ``summed_grad`` of every parameter."""
        parameters: list[Any] = self.params
        totals: dict[Tensor, Tensor] = {}
        self.units = 0
        if photos := self.book.photos():
            people = None if self.people is None else self.people.to(parameters[0].device)
            units = Units(photos, people)
            parts, norms = self._measured(units, photos)
            self.units = units.size
            factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0) * photos
            totals = dict(pair for part in parts for pair in part.total(factors))
        for p in parameters:
            p.summed_grad = totals[p] if p in totals else torch.zeros_like(p)

    def _measured(self, units: Units, photos: int) -> tuple[list[Part], Tensor]:
        """Parts, and (U,) lengths of units' gradients. The loss is a mean over photos, so that its gradients are too short by
        their number. What is not finite is dropped: photos first, then units whose length is too great for its type."""
        parts, norms = self._lengths(units, photos)
        for overflow in (False, True):
            if bool(norms.isfinite().all()):
                break
            bad = ~norms.isfinite() if overflow else None
            unfit = self.book.unfit() if bad is None else (bad if units.place is None else bad[units.place])
            self.dropped += int(unfit.sum())
            self.book.blank(unfit)
            parts, norms = self._lengths(units, photos)
        return parts, norms

    def _lengths(self, units: Units, photos: int) -> tuple[list[Part], Tensor]:
        parts = self.book.parts(units)
        return parts, torch.stack([p.squares for p in parts]).sum(dim=0).clamp_min(0).sqrt() * photos
