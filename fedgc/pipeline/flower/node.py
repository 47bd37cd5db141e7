"""The client's side on Flower: one message in, one message out, and what a client keeps in the context of its node."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedgc.client import Clients
from fedgc.config import validated
from fedgc.pipeline.flower.wire import ABOUT, ONLY, arrays, content_to_order, note, one_of, upload_to_content
from fedgc.pipeline.setting import federation, prepare
from fedgc.types import HEAD
from fedgc.uploads import Home, Order, Upload

ROWS, UPLOADED, LEDGER = "class-embeddings", "uploaded", "ledger"
Maker = Callable[[Context], Clients]


def client_app(clients: Maker, *, simulated: bool) -> ClientApp:
    """clients: the parties of a node, the one that it speaks for among them; called for every message."""
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return Message(RecordDict({ABOUT: note(client=_client(context))}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        mine = clients(context)
        order, home = content_to_order(message.content)
        upload = answer(mine, _client(context), order, home, context.state)
        return Message(upload_to_content(upload, order, everything=simulated), reply_to=message)

    return app


def answer(mine: Clients, client: int, order: Order, home: Home, state: RecordDict) -> Upload:
    """Train on an order, with what this node remembers, and remember the outcome. Privacy is charged before anything leaves."""
    party = mine.parties[client]
    upload = mine.answer(party, order, _at_home(mine, client, order, home, state))
    charge = mine.defense.charge(mine.plan(party), int(order.where[1]), upload.steps)
    if charge is not None:
        paid = json.loads(str(state.config_records[LEDGER]["json"])) if LEDGER in state else []
        state[LEDGER] = ConfigRecord({"json": json.dumps([*paid, asdict(charge)])})
    if upload.home.rows is not None:
        state[ROWS] = arrays({ONLY: upload.home.rows})
        if order.rows is not None:
            state[UPLOADED] = arrays({ONLY: order.rows + upload.sent[HEAD]})
    return upload


def _at_home(mine: Clients, client: int, order: Order, sent: Home, state: RecordDict) -> Home:
    """Class embeddings as the client keeps them, moved as the server has moved those that it uploaded last."""
    rows = one_of(state, ROWS)
    if rows is None:
        return sent
    uploaded = one_of(state, UPLOADED)
    return Home(rows if uploaded is None or order.rows is None else rows + (order.rows - uploaded))


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def simulated_clients(config_toml: str, noise_key: int) -> Maker:
    """Every client of an experiment on one machine: all read the faces of the configuration, and each trains on its part."""

    def made(context: Context) -> Clients:
        return _prepared(config_toml, noise_key)

    return made


@lru_cache(maxsize=1)
def _prepared(config_toml: str, noise_key: int) -> Clients:
    import tomllib

    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    made = federation(prepare(validated(tomllib.loads(config_toml))))
    made.noise_key = noise_key
    return made
