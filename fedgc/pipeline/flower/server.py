"""The server's side on Flower: `Federation.ask` through a grid, which goes on without clients that do not answer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedgc.config import Config
from fedgc.errors import RunError, UsageError, WorkFailedError
from fedgc.files import MALFORMED
from fedgc.pipeline.flower.rosters import Roster
from fedgc.pipeline.flower.wire import ABOUT, about, arrays, content_to_upload, note, order_to_content
from fedgc.uploads import Absence, Answers, Asked, Home, Order, Upload

HELLO_SECONDS = 120.0
POLL_SECONDS = 0.02
MOST_POLL_SECONDS = 1.0
LOOK_SECONDS = 0.2
MOST_PHOTOS = 10_000_000  # of a client


class Nodes:
    """Which node speaks for which client, and messages to them and back. check: raises where nothing more can come."""

    def __init__(self, grid: Grid, clients: int, config: Config, check: Callable[[], None] = lambda: None) -> None:
        self.grid, self.clients, self.config, self.check = grid, clients, config, check
        self.told: dict[int, dict[str, Any]] = {}  # by every node that was greeted

    def present(self) -> dict[int, int]:
        """The node of each client that has one now. Waits for all the first time, and later for one."""
        deadline = time.monotonic() + self.config.flower.wait
        enough = 1 if self.told else self.clients
        while True:
            here = set(self.grid.get_node_ids())
            self._greet(sorted(here - self.told.keys()))
            found = {told["client"]: node for node, told in self.told.items() if node in here and "client" in told}
            if len(found) >= enough:
                return found
            if time.monotonic() > deadline:
                lost = ", ".join(str(k) for k in range(self.clients) if k not in found)
                raise WorkFailedError(
                    f"no node for client {lost} within {self.config.flower.wait:g} s (flower.wait): start one with "
                    f"partition-id={lost.partition(',')[0]}"
                )
            self.check()
            time.sleep(LOOK_SECONDS)

    def roster(self) -> Roster | None:
        """Photos of each person of every client, where nodes keep them; None where all share the faces of the configuration."""
        found = [self.told[node].get("photos") for _, node in sorted(self.present().items())]
        if all(photos is None for photos in found):
            return None
        if any(photos is None for photos in found):
            raise UsageError("some nodes have faces=FOLDER and others source=SPEC: all must have one or the other")
        return found  # type: ignore[return-value]

    def _greet(self, nodes: list[int]) -> None:
        """Ask new nodes whom they speak for. One that does not say is not asked again."""
        hello = RecordDict({ABOUT: note(config=self.config.to_toml())})
        replies = self.exchange(
            [self.message(node, "query", hello, "hello", HELLO_SECONDS) for node in nodes], HELLO_SECONDS
        )
        for node in nodes:
            self.told[node] = _introduction(replies.get(node), self.clients)
            if why := self.told[node].get("why"):
                raise RunError(f"a node could not join: {why}")

    def message(self, node: int, kind: str, content: RecordDict, group: str, ttl: float) -> Message:
        return Message(content, node, kind, ttl=ttl, group_id=group)

    def exchange(self, messages: list[Message], timeout: float) -> dict[int, Message]:
        """Answers by node; polls often at first, since a simulation answers in milliseconds."""
        waiting = set(self.grid.push_messages(messages)) if messages else set()
        found: dict[int, Message] = {}
        deadline, pause = time.monotonic() + timeout, POLL_SECONDS
        while waiting and time.monotonic() < deadline:
            self.check()
            for reply in self.grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                found[reply.metadata.src_node_id] = reply
            if waiting:
                time.sleep(pause)
                pause = min(pause * 1.1, MOST_POLL_SECONDS)
        return found


def _introduction(reply: Message | None, clients: int) -> dict[str, Any]:
    if reply is None:
        return {}
    if reply.has_error():
        return {"why": _reason(reply)}
    try:
        told = about(reply.content)
    except ValueError as error:
        return {"why": str(error)}
    client, photos = told.get("client"), told.get("photos")
    if type(client) is not int or not 0 <= client < clients:
        return {"why": f"partition-id is {repr(client)[:40]}, and there are {clients} clients (federation.clients)"}
    if photos is not None and (why := _no_photos(photos)):
        return {"why": f"client {client} has {why}"}
    return {"client": client, "photos": photos}


def _no_photos(photos: Any) -> str | None:
    """Why these are no counts of photos, or None."""
    if not isinstance(photos, list) or not photos or not all(type(n) is int and n > 0 for n in photos):
        return "no person with two photos or more"
    return None if sum(photos) <= MOST_PHOTOS else f"more than {MOST_PHOTOS:,} photos, it says"


def _reason(reply: Message) -> str:
    """The last line of what went wrong at the node: the lines before are a stack."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(reply.error.reason))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (lines[-1].removesuffix("'>") if lines else "it gave no reason")[:300]


class GridClients:
    """One message a client and round. told: goes with every order; restores: whether a client that never trained in this
    session is sent the class embeddings that the record says it keeps."""

    def __init__(self, nodes: Nodes, told: Mapping[str, Any], *, restores: bool) -> None:
        self.nodes, self.told, self.restores = nodes, told, restores
        self.restored: set[int] = set()

    def __call__(self, orders: Asked) -> Answers:
        timeout = self.nodes.config.flower.timeout
        present = self.nodes.present()
        asked, messages, backbone = [], [], None
        for party, order, home in orders:
            node = present.get(party.client)
            asked.append((party, order, node))
            if node is not None:
                backbone = backbone or arrays(order.backbone)
                content = order_to_content(order, backbone, self._restored(party.client, home), **self.told)
                messages.append(self.nodes.message(node, "train", content, str(order.where[1]), timeout))
        replies = self.nodes.exchange(messages, timeout)
        for party, order, node in asked:
            if node is None:
                yield party, Absence("no node speaks for it", asked=False)
            else:
                yield party, self._read(replies.get(node), party.client, order)

    def _restored(self, client: int, home: Home) -> Home:
        first = self.restores and client not in self.restored
        self.restored.add(client)
        return home if first else Home()

    def _read(self, reply: Message | None, client: int, order: Order) -> Upload | Absence:
        if reply is None:
            return Absence(f"no answer within {self.nodes.config.flower.timeout:g} s")
        if reply.has_error():
            return Absence(f"its node failed: {_reason(reply)}")
        try:
            return content_to_upload(reply.content, client, order.where)
        except MALFORMED as error:
            return Absence(f"its answer was refused: {error}")
