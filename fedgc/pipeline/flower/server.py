"""The server's side on Flower: `Federation.ask` through a grid, which goes on without clients that do not answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedgc.acceptance import problem_with
from fedgc.errors import WorkFailedError
from fedgc.pipeline.flower.wire import ABOUT, about, arrays, content_to_upload, note, order_to_content
from fedgc.uploads import Absence, Answers, Asked, Home, Order, Packing, Upload

HELLO_SECONDS = 60.0
POLL_SECONDS = 0.02
MOST_POLL_SECONDS = 1.0


class GridClients:
    """One message a client and round. timeout: seconds that a round waits for answers; wait: for the first node of every client;
    restores: whether a client that has lost its class embeddings, or never had them, is sent those of the record."""

    def __init__(
        self, grid: Grid, clients: int, pack: Packing, *, timeout: float, wait: float, restores: bool,
        stopped: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.grid, self.clients, self.pack = grid, clients, pack
        self.timeout, self.wait, self.restores, self.stopped = timeout, wait, restores, stopped
        self.known: dict[int, int | None] = {}  # client of each node; None of one that did not say
        self.restored: set[int] = set()

    def __call__(self, orders: Asked) -> Answers:
        nodes = self._nodes()
        asked, sent = [], {}
        packed = None
        for party, order, home in orders:
            asked.append((party, order))
            if party.client in nodes:
                packed = packed or arrays(order.backbone)
                rest = home if self.restores and party.client not in self.restored else Home()
                self.restored.add(party.client)
                sent[nodes[party.client]] = self._message(
                    nodes[party.client], "train", order_to_content(order, packed, rest), str(order.where[1])
                )
        replies = self._exchange(list(sent.values()), self.timeout)
        for party, order in asked:
            node = nodes.get(party.client)
            if node is None:
                yield party, Absence("no node speaks for it", asked=False)
            else:
                yield party, self._read(replies.get(node), party.client, order)

    def _read(self, reply: Message | None, client: int, order: Order) -> Upload | Absence:
        if reply is None:
            return Absence(f"no answer within {self.timeout:g} s")
        if reply.has_error():
            return Absence(f"its node failed: {' '.join(str(reply.error.reason).split())[:200]}")
        try:
            upload = content_to_upload(reply.content, client, order.where)
        except (ValueError, KeyError, TypeError) as error:
            return Absence(f"its answer was refused: {error}")
        problem = problem_with(upload, order, self.pack)
        return Absence(f"its answer was refused: {problem}") if problem else upload

    def _nodes(self) -> dict[int, int]:
        """The node of each client that has one now. Waits for all the first time, and later for one."""
        deadline = time.monotonic() + self.wait
        enough = 1 if self.known else self.clients
        while True:
            here = set(self.grid.get_node_ids())
            self._greet(sorted(here - self.known.keys()))
            found = {client: node for node, client in self.known.items() if client is not None and node in here}
            if len(found) >= enough:
                return found
            if time.monotonic() > deadline:
                lost = ", ".join(str(k) for k in range(self.clients) if k not in found)
                raise WorkFailedError(
                    f"no node for client {lost} within {self.wait:g} s: start one with partition-id={lost.partition(',')[0]}"
                )
            self.stopped()
            time.sleep(0.2)

    def _greet(self, nodes: list[int]) -> None:
        hello = [self._message(node, "query", RecordDict({ABOUT: note()}), "hello") for node in nodes]
        for node, reply in self._exchange(hello, HELLO_SECONDS).items():
            client = None if reply.has_error() else about(reply.content).get("client")
            self.known[node] = client if isinstance(client, int) and 0 <= client < self.clients else None

    def _message(self, node: int, kind: str, content: RecordDict, group: str) -> Message:
        return self.grid.create_message(content, kind, node, group, ttl=max(self.timeout, HELLO_SECONDS))

    def _exchange(self, messages: list[Message], timeout: float) -> dict[int, Message]:
        """Answers by node; polls often at first, since a simulation answers in milliseconds."""
        if not messages:
            return {}
        waiting = set(self.grid.push_messages(messages))
        found: dict[int, Message] = {}
        deadline, pause = time.monotonic() + timeout, POLL_SECONDS
        while waiting and time.monotonic() < deadline:
            self.stopped()
            for reply in self.grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                found[reply.metadata.src_node_id] = reply
            if waiting:
                time.sleep(pause)
                pause = min(pause * 1.1, MOST_POLL_SECONDS)
        return found
