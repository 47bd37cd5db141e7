"""A grid whose nodes live in this process: messages go through Flower's own records and bytes, and nothing else of it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgc.config import Config
from fedgc.federation import Federation
from fedgc.pipeline.engines import Deployment, Simulation
from fedgc.pipeline.flower.node import DeployedNode, Node, SimulatedNode, client_app
from fedgc.pipeline.flower.server import GridClients, Nodes
from fedgc.uploads import Ask

Fault = Callable[[Message, Message], Message | None]  # what was asked, the honest answer -> what arrives


@dataclass
class Grid:
    """Nodes by their numbers. faults: what becomes of an answer, by (round, client); absent: clients without a node, by round."""

    node: Node
    configs: list[dict[str, Any]]
    faults: Mapping[tuple[int, int], Fault] = field(default_factory=dict)
    absent: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        self.app = client_app(self.node)
        self.contexts = {100 + k: Context(7, 100 + k, own, RecordDict(), {}) for k, own in enumerate(self.configs)}
        self.replies: dict[str, Message] = {}
        self.orders: list[Message] = []
        self.round, self.count = 1, 0

    def get_node_ids(self) -> list[int]:
        return [n for n in self.contexts if n - 100 not in self.absent.get(self.round, ())]

    def push_messages(self, messages: list[Message]) -> list[str]:
        return [self._delivered(message) for message in messages]

    def _delivered(self, message: Message) -> str:
        self.count += 1
        number = str(self.count)
        message.metadata.__dict__["_message_id"] = number
        node = message.metadata.dst_node_id
        self.orders += [message] if message.metadata.message_type == "train" else []
        try:
            reply = self.app(message, self.contexts[node])
        except Exception as error:
            reply = Message(Error(1, f"{type(error).__name__}: {error}"), reply_to=message)
        fault = self.faults.get((self.round, node - 100)) if message.metadata.message_type == "train" else None
        arrives = fault(message, reply) if fault else reply
        if arrives is not None:
            self.replies[number] = arrives
        return number

    def pull_messages(self, numbers: set[str]) -> list[Message]:
        return [self.replies.pop(n) for n in list(numbers) if n in self.replies]


class InThisProcess(Simulation):
    """Simulation without Ray."""

    def __init__(self, **faults: Any) -> None:
        self.faults = faults

    @contextmanager
    def reached(self, config: Config, parties: Federation) -> Iterator[Ask | None]:
        clients = len(parties.parties)
        node = SimulatedNode(config.to_toml(), parties.noise_key)
        self.grid = Grid(node, [{"partition-id": k} for k in range(clients)], **self.faults)
        yield following(self.grid, GridClients(Nodes(self.grid, clients, config), {}, restores=True))  # type: ignore[arg-type]


def following(grid: Grid, ask: Ask) -> Ask:
    """Tells the grid which round it is."""

    def asked(orders: Any) -> Any:
        orders = list(orders)
        grid.round = int(orders[0][1].where[1])
        yield from ask(orders)

    return asked


class Loopback(Deployment):
    """A deployment without processes."""

    @contextmanager
    def reached(self, config: Config, parties: Federation) -> Iterator[Ask | None]:
        with super().reached(config, parties) as ask:
            yield following(self.grid, ask)  # type: ignore[arg-type]


def deployment(configs: list[dict[str, Any]], **faults: Any) -> Deployment:
    return Loopback(Grid(DeployedNode(), configs, **faults))  # type: ignore[arg-type]
