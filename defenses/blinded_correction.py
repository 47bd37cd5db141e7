"""Class embeddings that the server corrects without reading them: clients turn them by a secret that they share.

FedGC's push, and those of FedCos and FedAwS, depend on class embeddings through their inner products alone, so that for any
orthogonal R (d, d) the correction of W R is (correction of W) R. Clients upload W_k R and turn back what returns. The idea and
the argument are ours. It promises no privacy in numbers: every length and every angle between two class embeddings stays
visible, the backbone is not turned, and one client that hands over R opens every upload, past and future.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedgc.doors import Defense, Scheme


def rotation(size: int, secret: torch.Generator) -> Tensor:
    """float64 (d, d), uniform among orthogonal matrices: Q of a Gaussian matrix, with the signs that make its R positive
    (Mezzadri 2007, Notices of the AMS 54)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=secret, dtype=torch.float64))
    return q * r.diagonal().sign()


class BlindedCorrection(Defense):
    """One R for the whole run, out of the secret behind its noise; clients agree on it without the server.

    The server begins with random rows that it may know: they are the blinded ones, and what clients read them as, it does not
    know. There is no fresh R in every round: the server's rows of a client that is away in a round could not be turned along, and
    rows change so little in a round that the turn between two R would follow from them.
    noise_seed: leave unset for a secret from the operating system, kept in an owner-only file; set it to make an experiment
    repeatable, knowing that whoever knows it can turn everything back.
    """

    name: Literal["blinded-correction"] = "blinded-correction"
    noise_seed: int | None = None
    blinds: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "clients turn class embeddings by a shared secret rotation, under which the server corrects"
    )

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_uploaded_rows(self.name)

    def blinded(self, rows: Tensor, secret: torch.Generator) -> Tensor:
        return self._turned(rows, rotation(rows.shape[1], secret))

    def unblinded(self, rows: Tensor, secret: torch.Generator) -> Tensor:
        return self._turned(rows, rotation(rows.shape[1], secret).T)

    @staticmethod
    def _turned(rows: Tensor, turn: Tensor) -> Tensor:
        return (rows.double() @ turn.to(rows.device)).to(rows.dtype)  # one rounding at each end, and no more
