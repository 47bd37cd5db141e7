"""Where clients live: in this process, or in others that Flower reaches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from fedgc.algorithms import ALGORITHMS
from fedgc.config import Config
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.pipeline.parallel import DataParallel, processes
from fedgc.pipeline.setting import Setting, prepare
from fedgc.pipeline.watch import Watch
from fedgc.uploads import Ask

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid


class Engine(Protocol):
    """here: whether clients train on this machine, and its memory is theirs."""

    here: bool

    def prepare(self, config: Config, watch: Watch) -> Setting:
        """Everything that training starts from."""

    def reached(self, config: Config, parties: Federation) -> AbstractContextManager[Ask | None]:
        """How clients are asked while the block lasts; None for in turn, in this process."""


def engine_of(config: Config) -> Engine:
    if processes() > 1:
        return DataParallel()
    return Simulation() if config.engine == "flower" else InProcess()


class InProcess:
    here = True

    def prepare(self, config: Config, watch: Watch) -> Setting:
        return prepare(config, watch)

    @contextmanager
    def reached(self, config: Config, parties: Federation) -> Iterator[Ask | None]:
        yield None


class Simulation:
    """Flower's simulation on this machine: every client in a Ray actor, on its part of the faces of the configuration."""

    here = True

    def prepare(self, config: Config, watch: Watch) -> Setting:
        setting = prepare(config, watch)
        _require_federation(config)
        return setting

    def app(self, config: Config, parties: Federation) -> ClientApp:
        """What every node runs."""
        from fedgc.pipeline.flower.node import SimulatedNode, client_app

        return client_app(SimulatedNode(config.to_toml(), parties.noise_key))

    @contextmanager
    def reached(self, config: Config, parties: Federation) -> Iterator[Ask | None]:
        try:
            from fedgc.pipeline.flower.server import GridClients, Nodes
            from fedgc.pipeline.flower.simulation import simulated_grid
        except ImportError as error:
            raise UsageError(
                f"engine = flower needs Flower and Ray ({error.name} is missing): pip install 'fedgc-priv[flower]', or use "
                "inprocess"
            ) from None
        with simulated_grid(self.app(config, parties), len(parties.parties)) as (grid, check):
            nodes = Nodes(grid, len(parties.parties), config, check)
            yield GridClients(nodes, {}, restores=True)


class Deployment:
    """Nodes that connect to a SuperLink. They share the faces of the configuration (an experiment), or keep folders of their
    own."""

    here = False

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def prepare(self, config: Config, watch: Watch) -> Setting:
        from fedgc.pipeline.flower.rosters import remote_setting
        from fedgc.pipeline.flower.server import Nodes

        _require_federation(config)
        if config.federation.clients == "people":
            raise UsageError("federation.clients = people is for experiments: say how many nodes there are")
        self.nodes = Nodes(self.grid, config.federation.clients, config)
        self.roster = self.nodes.roster()
        return prepare(config, watch) if self.roster is None else remote_setting(config, self.roster, watch)

    @contextmanager
    def reached(self, config: Config, parties: Federation) -> Iterator[Ask | None]:
        from fedgc.pipeline.flower.server import GridClients

        run = hashlib.sha256(f"run {config.digest()} {parties.noise_key}".encode()).hexdigest()[
            :16
        ]  # the same when it goes on
        told = {"config": config.to_toml(), "roster": self.roster, "run": run}
        yield GridClients(self.nodes, told, restores=False)


def _require_federation(config: Config) -> None:
    """Raises UsageError where there is nobody to send to, or a client would have to be told how to cheat."""
    if ALGORITHMS[config.federation.algorithm].alone:
        raise UsageError(
            f"engine = flower: {config.federation.algorithm} has one party, and nobody to send to; use inprocess"
        )
    if config.probing.rounds:
        raise UsageError("engine = flower plays no probing client: set probing.rounds = 0, or use inprocess")
