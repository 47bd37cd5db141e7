"""Where clients live: in this process, or in others that Flower reaches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedgc.config import Config
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.uploads import Ask, Packing


@contextmanager
def reached(config: Config, parties: Federation) -> Iterator[Ask | None]:
    """How the clients of a federation are asked while the block lasts; None for in turn, in this process."""
    if config.engine == "inprocess":
        yield None
        return
    try:
        from fedgc.pipeline.flower.node import client_app, simulated_clients
        from fedgc.pipeline.flower.server import GridClients
        from fedgc.pipeline.flower.simulation import simulated_grid
    except ImportError as error:
        raise UsageError(
            f"engine = flower needs Flower and Ray ({error.name} is missing): pip install 'fedgc-priv[flower]', or use inprocess"
        ) from None
    app = client_app(simulated_clients(config.to_toml(), parties.noise_key), simulated=True)
    pack = Packing(parties.algorithm, parties.defense, parties.noise_key, parties.constant)
    with simulated_grid(app, len(parties.parties)) as (grid, check):
        yield GridClients(
            grid, len(parties.parties), pack, timeout=config.flower.timeout, wait=config.flower.wait, restores=True,
            stopped=check,
        )  # fmt: skip


def require_engine(config: Config, parties: Federation) -> None:
    """Raises UsageError where the engine cannot play this scheme."""
    if config.engine == "inprocess":
        return
    if parties.algorithm.alone:
        raise UsageError(
            f"engine = flower: {config.federation.algorithm} has one party and nobody to send to; use inprocess"
        )
    if parties.probing is not None:
        raise UsageError("engine = flower plays no probing client: set probing.rounds = 0, or use inprocess")
