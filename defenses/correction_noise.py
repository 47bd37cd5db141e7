"""The server blurs what its correction did to each class embedding before it returns it: against clients that read it.

Without an accounted bound it promises nothing: all class embeddings of a client change at once, in every round.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from defenses.whole_update import like
from fedgc.doors import Defense, Scheme


class CorrectionNoise(Defense):
    """All lengths are in units of the length of the uploaded class embedding, near an angle in radians.

    drop_below: a change shorter than this is not made at all. clip: others are shortened to this. noise: what is left gets
    Gaussian noise of an expected length of ``noise · clip`` (standard deviation noise · clip · |w| / √d in every coordinate).
    noise_seed: as for dp-sgd.
    """

    name: Literal["correction-noise"] = "correction-noise"
    clip: float = Field(default=0.002, ge=0)
    noise: float = Field(default=1.0, ge=0)
    drop_below: float = Field(default=0.0, ge=0)
    noise_seed: int | None = None
    summary: ClassVar[str] = (
        "clip, noise or drop what the server's correction did to each class embedding; no guarantee"
    )

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require(scheme.corrects, self.name, "the server's correction", "fedgc, fedcos or fedaws")

    def returning(self, client: int, rows: Tensor, uploaded: Tensor, noise: torch.Generator) -> Tensor:
        unit, change = uploaded.norm(dim=1, keepdim=True), rows - uploaded
        length = change.norm(dim=1, keepdim=True)
        shorter = uploaded + change * (self.clip * unit / length.clamp_min(1e-30))
        out = torch.where(length > self.clip * unit, shorter, rows)
        out = out + self.noise * self.clip * unit / rows.shape[1] ** 0.5 * like(rows, noise)
        return torch.where(length < self.drop_below * unit, uploaded, out)
