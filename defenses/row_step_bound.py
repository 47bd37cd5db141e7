"""The server bounds how far an uploaded class embedding may lie from the one that it last returned: against clients that upload
rows of their choice. Honest training moves them little in a round.

The bound is Euclidean, in units of the length of the row that was returned. It so bounds the angle, to at most arcsin(bound),
which is all that a cosine head and a normalised correction see; and the length, by which a long row could pick out its nearest
stranger where the correction takes raw inner products.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedgc.doors import Defense, Scheme

SLACK = 1 + 1e-5  # a move that was scaled back once is not scaled again for its rounding


class RowStepBound(Defense):
    """bound: most that a class embedding moves in a round, over the length of the one that was returned."""

    name: Literal["row-step-bound"] = "row-step-bound"
    bound: float = Field(default=0.2, gt=0)
    summary: ClassVar[str] = "the server scales back class embeddings that moved too far in a round; no guarantee"

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_uploaded_rows(self.name)

    def receiving(self, client: int, change: Tensor, held: Tensor) -> Tensor:
        most = self.bound * held.norm(dim=1, keepdim=True)
        length = change.norm(dim=1, keepdim=True)
        factor = (most / length.clamp_min(1e-30)).where(length > SLACK * most, 1.0)
        return change * factor
