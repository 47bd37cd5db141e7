"""The client's side on Flower: one message in, one message out, and what a client keeps with its node."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedgc.client import Clients
from fedgc.config import Config, put, validated
from fedgc.data.splits import Splits
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.heads import initial_rows
from fedgc.pipeline.flower.memory import Memory, key_of_secret
from fedgc.pipeline.flower.rosters import counts_of, parties_of
from fedgc.pipeline.flower.wire import ABOUT, about, content_to_order, note, upload_to_content
from fedgc.pipeline.setting import Setting, federation, load_config_faces, prepare
from fedgc.rng import generator
from fedgc.types import HEAD
from fedgc.uploads import Home, Order, Upload

Told = Mapping[str, Any]


class Node(Protocol):
    """Where a client's photos and its memory are. told: the description in the server's message."""

    simulated: bool

    def photos(self, context: Context, told: Told) -> list[int] | None:
        """Of each person, where the server cannot know them."""

    def clients(self, context: Context, told: Told, memory: Memory) -> Clients: ...

    def memory(self, context: Context, told: Told) -> Memory: ...


def client_app(node: Node) -> ClientApp:
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        photos = node.photos(context, about(message.content))
        return Message(RecordDict({ABOUT: note(client=_client(context), photos=photos)}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        told = about(message.content)
        memory = node.memory(context, told)
        mine = node.clients(context, told, memory)
        order, home = content_to_order(message.content)
        if not node.simulated:
            memory.require_same(order)
        upload = answer(mine, _client(context), order, home, memory)
        return Message(upload_to_content(upload, order, everything=node.simulated), reply_to=message)

    return app


def answer(mine: Clients, client: int, order: Order, sent: Home, memory: Memory) -> Upload:
    """Train on an order, with what this node remembers, and remember the outcome. Privacy is charged before anything leaves."""
    party = mine.parties[client]
    upload = mine.answer(party, order, _at_home(mine, client, order, sent, memory))
    charge = mine.defense.charge(mine.plan(party), int(order.where[1]), upload.steps)
    rows = upload.home.rows
    uploaded = None if rows is None or order.rows is None else order.rows + upload.sent[HEAD]
    memory.keep(int(order.where[1]), rows, uploaded, charge)
    return upload


def _at_home(mine: Clients, client: int, order: Order, sent: Home, memory: Memory) -> Home:
    """Class embeddings as the client keeps them, moved as the server has moved those that it uploaded last."""
    if mine.algorithm.head != "private" and not mine.defense.keeps_rows:
        return Home()
    rows, uploaded = memory.rows(int(order.where[1]))
    if rows is None and sent.rows is not None:
        return sent
    if rows is None:  # this client trains for the first time
        fresh = initial_rows(mine.classes, mine.spec.embedding_size, generator(mine.seed, "rows"))
        rows = fresh[list(mine.parties[client].classes)]
    return Home(rows if uploaded is None or order.rows is None else rows + (order.rows - uploaded))


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


class SimulatedNode:
    """A client of an experiment on one machine: all read the faces of the configuration, and each trains on its part."""

    simulated = True

    def __init__(self, config_toml: str, noise_key: int) -> None:
        self.config_toml, self.noise_key = config_toml, noise_key

    def photos(self, context: Context, told: Told) -> None:
        return None

    def clients(self, context: Context, told: Told, memory: Memory) -> Clients:
        return _prepared(self.config_toml, self.noise_key)

    def memory(self, context: Context, told: Told) -> Memory:
        return Memory(context)


@lru_cache(maxsize=1)
def _prepared(config_toml: str, noise_key: int) -> Clients:
    """Once for all clients that an actor speaks for."""
    torch.set_num_threads(1)
    made = federation(prepare(validated(tomllib.loads(config_toml))))
    made.noise_key = noise_key
    return made


class DeployedNode:
    """A client on a machine of its own, by the node's configuration: ``faces``, its folder, or ``source``, faces that it shares
    with the server (an experiment); ``home``, a folder for what it must not forget; ``secret``, what clients share and the server
    does not know, for defenses that need it. What a server says of paths and devices is not listened to."""

    simulated = False

    def photos(self, context: Context, told: Told) -> list[int] | None:
        return counts_of(load_config_faces(_config(context, told))) if "faces" in context.node_config else None

    def memory(self, context: Context, told: Told) -> Memory:
        home, run = context.node_config.get("home"), str(told["run"])
        if not run.isalnum():
            raise UsageError(f"the server calls its run {run!r}, which is no name for a folder")
        return Memory(context, Path(str(home)) / run if home else None)

    def clients(self, context: Context, told: Told, memory: Memory) -> Clients:
        config = _config(context, told)
        made = federation(_setting(context, told, config))
        made.noise_key = _noise_key(context, made, memory)
        return made


def _config(context: Context, told: Told) -> Config:
    """The server's configuration with this node's own paths and device."""
    tree = tomllib.loads(str(told["config"]))
    own = context.node_config
    if ("faces" in own) == ("source" in own):
        raise UsageError("a node's configuration names faces=FOLDER, its own, or source=SPEC, shared with the server")
    put(tree, "data.source", str(own.get("faces", own.get("source"))))
    put(tree, "device", str(own.get("device", "cpu")))
    tree.get("model", {}).pop("init", None)  # orders carry the weights
    return validated(tree)


def _setting(context: Context, told: Told, config: Config) -> Setting:
    if "source" in context.node_config:
        return prepare(config)
    faces, client = load_config_faces(config), _client(context)
    if told["roster"][client] != counts_of(faces):
        raise UsageError(
            f"the photos in {config.data.source} are not those that this node announced: start the training again"
        )
    parties = parties_of(told["roster"], config.data.image_size, faces, client)
    nobody = torch.empty(0, dtype=torch.int64)
    return Setting(config, faces, Splits((), (), (), (), nobody, nobody), parties, (), torch.device(config.device))


def _noise_key(context: Context, made: Federation, memory: Memory) -> int:
    """Of this client alone, unless its defense needs one that clients share. Raises UsageError where that, or a home, is
    wanting."""
    defense, own = made.defense, context.node_config
    if defense.masks or defense.blinds:
        if "secret" not in own:
            raise UsageError(
                f"{defense.name} needs secret=... in the configuration of every node, the same, unknown to the server"
            )
        return key_of_secret(str(own["secret"]))
    fixed = getattr(defense, "noise_seed", None)
    if fixed is not None:
        return int(fixed)
    if defense.spent(()) is not None and memory.home is None:
        raise UsageError(
            f"{defense.name} needs home=FOLDER in the node's configuration: a node that forgot its noise would release a "
            "round twice"
        )
    return memory.noise_key()
