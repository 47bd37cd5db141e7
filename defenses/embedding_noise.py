"""Noise on uploaded class embeddings alone. A client keeps its own clean, trains with them, and applies the answer to them.

One draw serves the whole run: the mean over rounds of uploads with fresh noise would be the class embedding itself. It hides
where class embeddings are and not how they move: the difference of two uploads of a row is that of the row, up to its length.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from defenses.whole_update import like
from fedgc.doors import Defense, Scheme


class EmbeddingNoise(Defense):
    """scale: expected length of the noise over the length of the class embedding; that of w in d dimensions has the standard
    deviation scale · |w| / √d in every coordinate. The cosine of what is uploaded with what was trained is then about
    1/√(1 + scale²). noise_seed: as for dp-sgd."""

    name: Literal["embedding-noise"] = "embedding-noise"
    scale: float = Field(default=1.0, ge=0)
    noise_seed: int | None = None
    keeps_rows: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "upload class embeddings with noise, the same in every round, and keep them clean at home; no guarantee"
    )

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_uploaded_rows(self.name)

    def uploading(self, client: int, rows: Tensor, noise: torch.Generator) -> Tensor:
        lengths = rows.norm(dim=1, keepdim=True)
        return rows + self.scale * lengths / rows.shape[1] ** 0.5 * like(rows, noise)
