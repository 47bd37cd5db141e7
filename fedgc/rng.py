"""Independent random streams named by what they are for, so that no result depends on the order of work."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def stream_seed(*name: int | str) -> int:
    """A 63-bit seed from a name such as (seed, "batches", round, client)."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*name: int | str) -> torch.Generator:
    """A CPU torch.Generator for the stream of that name."""
    return torch.Generator().manual_seed(stream_seed(*name))


def numpy_generator(*name: int | str) -> np.random.Generator:
    """A numpy Generator for the stream of that name."""
    return np.random.default_rng(stream_seed(*name))
