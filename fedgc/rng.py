"""Independent random streams named by what they are for, so that no result depends on the order of work.

`Generator.manual_seed` keeps 32 bits on the CPU: noise from it could be searched for, and two of a hundred thousand streams
would coincide. Here a name fills the whole state of the Mersenne Twister. The bits are as good as that generator: fit
for research, not for a deployment.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

WORDS = 624  # 32-bit words of the Mersenne Twister's state, which torch stores as 64-bit numbers
FIRST = 24  # bytes before them: seed, words left, whether seeded, position


def stream_seed(*name: int | str) -> int:
    """A 63-bit seed from a name such as (seed, "batches", round, client)."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*name: int | str) -> torch.Generator:
    """A CPU torch.Generator for the stream of that name."""
    stream = torch.Generator().manual_seed(0)
    words = np.frombuffer(hashlib.shake_256(repr(name).encode()).digest(4 * WORDS), "<u4").astype("<i8")
    state = stream.get_state()
    state[FIRST : FIRST + 8 * WORDS] = torch.from_numpy(words.view(np.uint8).copy())
    stream.set_state(state)
    return stream


def on_device(stream: torch.Generator, device: torch.device) -> torch.Generator:
    """The stream itself on the CPU; elsewhere a generator of that device, seeded with 63 bits of it."""
    if device.type == "cpu":
        return stream
    return torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, (1,), generator=stream)))


def numpy_generator(*name: int | str) -> np.random.Generator:
    """A numpy Generator for the stream of that name."""
    return np.random.default_rng(list(hashlib.sha256(repr(name).encode()).digest()))
