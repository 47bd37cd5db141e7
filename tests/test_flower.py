"""On Flower: the same weights and messages as in one process, and rounds that go on without nodes that fail."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import TINY

pytest.importorskip("flwr", reason="engine = flower needs pip install 'fedgc-priv[flower]'")

from flower_grid import Fault, InThisProcess, deployment
from flwr.app import Array, Message, RecordDict

from fedgc.config import Config, load_config
from fedgc.errors import RunError, UsageError, WorkFailedError
from fedgc.files import read_tensors
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.flower.memory import Memory, key_of_secret
from fedgc.pipeline.flower.wire import ABOUT, SENT, about, note
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from fedgc.types import Charge

NOISE = ("defense.noise_multiplier=1.0", "defense.noise_seed=1")
SCHEMES = {
    "fedavg": (),
    "fedpe": (),
    "fedgc": ("federation.server_momentum=0.5",),
    "fedcos": (),
    "fedaws": (),
    "dp-sgd": ("defense.name=dp-sgd", *NOISE),
    "client-dp": ("defense.name=client-dp", *NOISE),
    "secure-aggregation": ("defense.name=secure-aggregation",),
    "blinded-correction": ("defense.name=blinded-correction",),
    "embedding-noise": ("defense.name=embedding-noise", "defense.noise_seed=1"),
}


def configured(*settings: str, algorithm: str = "fedgc", engine: str = "flower") -> Config:
    flags = {"federation.algorithm": algorithm, "engine": engine}
    return load_config(settings=(*TINY, "federation.clients=3", "federation.rounds=3", *settings), flags=flags)


def tensors(run: Path, folder: str) -> dict[str, Any]:
    return {p.name: read_tensors(p) for p in sorted((run / folder).glob("*.safetensors"))}


def same(one: Path, other: Path, folders: tuple[str, ...] = ("checkpoints", "transcript")) -> None:
    for folder in folders:
        ours, theirs = tensors(one, folder), tensors(other, folder)
        assert ours.keys() == theirs.keys() != set()
        for name, (found, told) in ours.items():
            assert told == theirs[name][1]
            assert found.keys() == theirs[name][0].keys()
            for key, x in found.items():
                torch.testing.assert_close(x, theirs[name][0][key], rtol=1e-5, atol=1e-6, msg=f"{name} {key}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_and_messages_are_those_of_one_process(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.urandom", lambda n: b"k" * n)  # the noise key of both runs
    settings = (*SCHEMES[scheme], "federation.participation=0.7")
    algorithm = scheme if scheme.startswith("fed") else "fedgc"
    here = train(configured(*settings, algorithm=algorithm, engine="inprocess"), tmp_path / "here")
    there = train(configured(*settings, algorithm=algorithm), tmp_path / "there", engine=InThisProcess())
    same(tmp_path / "here", tmp_path / "there")
    assert here["privacy"] == there["privacy"]
    assert here["utility"]["auc"]["value"] == pytest.approx(there["utility"]["auc"]["value"], abs=1e-3)


@pytest.mark.parametrize("scheme", ["fedpe", "embedding-noise"])
def test_what_clients_keep_survives_a_new_session(scheme: str, tmp_path: Path) -> None:
    config = configured(*SCHEMES[scheme], "defense.noise_seed=1" if scheme != "fedpe" else "seed=0",
                        algorithm=scheme if scheme.startswith("fed") else "fedgc")  # fmt: skip
    train(config, tmp_path / "whole", engine=InThisProcess())

    class PulledError(Exception):
        pass

    def pull() -> None:
        raise PulledError

    with pytest.raises(PulledError):  # fmt: skip
        train(config, tmp_path / "cut", engine=InThisProcess(), after_round=pull)
    train(config, tmp_path / "cut", resume=True, engine=InThisProcess())  # nodes that remember nothing
    same(tmp_path / "cut", tmp_path / "whole", ("checkpoints",))


# -- failures


def changed(name: str, x: torch.Tensor | None) -> Fault:
    """The honest answer with one tensor in place of another, or without it."""

    def fault(message: Message, reply: Message) -> Message:
        record = reply.content.array_records[SENT]
        if x is None:
            del record[name]
        else:
            record[name] = Array(x.numpy())
        return reply

    return fault


def told(**changes: Any) -> Fault:
    def fault(message: Message, reply: Message) -> Message:
        reply.content[ABOUT] = note(**{**about(reply.content), **changes})
        return reply

    return fault


FAULTS: dict[str, tuple[Fault, str]] = {
    "a number that is none": (changed("head.weight", torch.full((4, 32), torch.nan)), "head.weight is not finite"),
    "another shape": (changed("head.weight", torch.zeros(3, 32)), "head.weight is [3, 32] in place of [4, 32]"),
    "another type": (changed("head.weight", torch.zeros(4, 32, dtype=torch.float64)), "head.weight is float64"),
    "one tensor less": (changed("head.weight", None), "head.weight is missing"),
    "one tensor more": (changed("mine", torch.zeros(1)), "mine was not asked for"),
    "a round of before": (told(where=["round", 1]), "it is of round 1"),
    "another client": (told(client=0), "it speaks for client 0"),
    "counts that cannot be": (told(dropped=10**6), "gradients left out"),
    "no numbers": (told(loss="low"), "are not numbers"),
    "no answer": (lambda message, reply: None, "no answer within"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_goes_on_without_a_node_that_fails(fault: str, tmp_path: Path) -> None:
    spoil, why = FAULTS[fault]
    config = configured(*SCHEMES["dp-sgd"], "flower.timeout=0.3")
    result = train(config, tmp_path / "run", engine=InThisProcess(faults={(2, 1): spoil}))
    run = RunDirectory(tmp_path / "run")
    missing = {m["round"]: m["missing"] for m in run.metrics() if "missing" in m}
    assert list(missing) == [2]
    assert list(missing[2]) == ["1"]
    assert why in missing[2]["1"]
    state = run.load_state()
    assert state is not None
    assert all(bool(x.isfinite().all()) for x in (*state.backbone.values(), state.rows))
    assert {(c.client, c.round) for c in state.ledger} == {(k, t) for k in range(3) for t in (1, 2, 3)}  # asked is paid
    examples = run.load_transcript("round-0003").examples
    assert sorted(examples) == [0, 1, 2]  # it is asked again
    assert result["utility"]["auc"]["value"] is not None


def test_a_node_that_leaves_comes_back(tmp_path: Path) -> None:
    engine = InThisProcess(absent={2: (0,)})
    train(configured(), tmp_path / "run", engine=engine)
    missing = [m.get("missing", {}) for m in RunDirectory(tmp_path / "run").metrics()]
    assert missing == [{}, {"0": "no node speaks for it"}, {}]
    state = RunDirectory(tmp_path / "run").load_state()
    assert state is not None
    assert state.ledger == ()


def test_the_mean_is_over_those_that_answered(tmp_path: Path) -> None:
    """One of two clients fails in the only round: what is released is the update of the other, whole."""
    config = configured("federation.clients=2", "federation.rounds=1", "record.rounds=all", "flower.timeout=0.2")
    train(config, tmp_path / "run", engine=InThisProcess(faults={(1, 0): lambda message, reply: None}))
    t = RunDirectory(tmp_path / "run").load_transcript("round-0001")
    assert list(t.updates) == [1]
    for name, before in t.broadcast.items():
        after = before + t.constants.server_lr * t.updates[1].tensors.get(name, torch.zeros(()))
        torch.testing.assert_close(t.released[name], after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("defense", ["none", "secure-aggregation"])
def test_a_round_without_a_mean_stops_and_can_go_on(defense: str, tmp_path: Path) -> None:
    silent: Fault = lambda message, reply: None  # noqa: E731
    config = configured(f"defense.name={defense}", "flower.timeout=0.2")
    clients = range(3) if defense == "none" else (1,)
    with pytest.raises(WorkFailedError, match=r"round 2 has no mean.*--resume"):
        train(config, tmp_path / "run", engine=InThisProcess(faults={(2, k): silent for k in clients}))
    assert RunDirectory(tmp_path / "run").last_round() == 1
    assert math.isfinite(
        train(config, tmp_path / "run", resume=True, engine=InThisProcess())["utility"]["auc"]["value"]
    )


def test_what_flower_cannot_play_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for settings, why in ((("federation.algorithm=centralized",), "one party"), (("probing.rounds=1",), "no probing")):
        with pytest.raises(UsageError, match=why):
            train(load_config(settings=(*TINY, *settings, "engine=flower")), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


# -- nodes with folders of their own


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two nodes' faces: 4 and 3 people, and one of a single photo, who is not trained on."""
    root, draw = tmp_path_factory.mktemp("faces"), torch.Generator().manual_seed(0)
    for k, people in enumerate((4, 3)):
        for person in range(people + 1):
            folder = root / str(k) / f"p{person}"
            folder.mkdir(parents=True)
            for n in range(5 if person < people else 1):
                photo = torch.randint(256, (32, 32, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(photo.numpy()).save(folder / f"{n}.png")
    return [root / "0", root / "1"]


def nodes(folders: list[Path], **more: str) -> list[dict[str, Any]]:
    return [{"partition-id": k, "faces": str(folder), **more} for k, folder in enumerate(folders)]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
def test_photos_stay_with_their_nodes(algorithm: str, folders: list[Path], tmp_path: Path) -> None:
    config = configured("federation.clients=2", "record.victims=0", algorithm=algorithm)
    engine = deployment(nodes(folders))
    result = train(config, tmp_path / "run", engine=engine)
    assert engine.roster == [[5, 5, 5, 5], [5, 5, 5]]
    about = RunDirectory(tmp_path / "run").about()
    assert (about["classes"], about["clients"], about["images"], about["photos"]) == (7, 2, 35, "at the nodes")
    assert result["utility"]["auc"]["value"] is not None
    state = RunDirectory(tmp_path / "run").load_state()
    assert state is not None
    kept = [Memory(context).rows(4)[0] for context in engine.grid.contexts.values()]  # type: ignore[attr-defined]
    if algorithm == "fedpe":
        assert [x.shape[0] for x in kept if x is not None] == [4, 3]
        assert not any(
            torch.isclose(state.rows[0], x[0]).all() for x in kept if x is not None
        )  # the server has none of them
    with pytest.raises(RunError, match="kept their photos"):
        attack(tmp_path / "run")


def test_what_needs_photos_at_the_server_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"record\.victims"):
        train(configured("federation.clients=2"), tmp_path / "run", engine=deployment(nodes(folders)))
    mixed = [*nodes(folders)[:1], {"partition-id": 1, "source": "synthetic:24x6"}]
    with pytest.raises(UsageError, match="all must have"):
        train(configured("federation.clients=2", "record.victims=0"), tmp_path / "run", engine=deployment(mixed))
    other = [*nodes(folders)[:1], {"partition-id": 5, "source": "synthetic:24x6"}]
    with pytest.raises(RunError, match=r"partition-id is 5"):
        train(configured("federation.clients=2", "record.victims=0"), tmp_path / "run", engine=deployment(other))


def test_privacy_needs_a_home_and_lives_there(folders: list[Path], tmp_path: Path) -> None:
    config = configured("federation.clients=2", "record.victims=0", "defense.name=dp-sgd", "defense.noise_multiplier=1.0",
                        "flower.wait=1", "flower.timeout=5")  # fmt: skip
    with pytest.raises(WorkFailedError, match="no mean"):
        train(config, tmp_path / "without", engine=deployment(nodes(folders)))
    homes = [{**node, "home": str(tmp_path / f"home{k}")} for k, node in enumerate(nodes(folders))]
    train(config, tmp_path / "run", engine=deployment(homes))
    ledger = json.loads((tmp_path / "run/privacy.json").read_text())
    assert ledger
    for k in range(2):
        (path,) = (tmp_path / f"home{k}").glob("*/memory.safetensors")
        assert path.stat().st_mode & 0o077 == 0
        notes = read_tensors(path)[1]
        paid = [Charge(**c) for c in notes["ledger"]]
        assert [(c.client, c.round) for c in paid] == [(k, 1), (k, 2), (k, 3)]
        keys = {notes["noise-key"]}
    assert len(keys) == 1


def test_a_round_is_not_answered_twice_for_different_weights(folders: list[Path], tmp_path: Path) -> None:
    """A node that drew the same noise again would let its server subtract it."""
    config = configured("federation.clients=2", "record.victims=0", "defense.name=dp-sgd", "defense.noise_multiplier=1.0",
                        "federation.rounds=2")  # fmt: skip
    engine = deployment([{**node, "home": str(tmp_path / f"home{k}")} for k, node in enumerate(nodes(folders))])
    train(config, tmp_path / "run", engine=engine)
    order = engine.grid.orders[-1]  # type: ignore[attr-defined]
    again = engine.grid.app(order, engine.grid.contexts[order.metadata.dst_node_id])  # type: ignore[attr-defined]
    assert not again.has_error()  # as after a crash of the server
    name = next(iter(order.content.array_records["backbone"]))
    order.content.array_records["backbone"][name] = Array(order.content.array_records["backbone"][name].numpy() + 1)
    with pytest.raises(UsageError, match="its noise is used up"):
        engine.grid.app(order, engine.grid.contexts[order.metadata.dst_node_id])  # type: ignore[attr-defined]


def test_a_round_that_is_played_again_starts_where_it_did(folders: list[Path], tmp_path: Path) -> None:
    """Private class embeddings live in the node's home; the server lost the round, the node had played it."""
    config = configured("federation.clients=2", "record.victims=0", algorithm="fedpe")
    homes = lambda name: [{**n, "home": str(tmp_path / f"{name}{k}")} for k, n in enumerate(nodes(folders))]  # noqa: E731
    train(config, tmp_path / "whole", engine=deployment(homes("whole")))
    dead: Fault = lambda message, reply: None  # noqa: E731
    cut = config.model_copy(update={"flower": config.flower.model_copy(update={"timeout": 0.2})})
    with pytest.raises(WorkFailedError, match="no mean"):
        train(cut, tmp_path / "cut", engine=deployment(homes("cut"), faults={(2, k): dead for k in range(2)}))
    train(cut, tmp_path / "cut", resume=True, engine=deployment(homes("cut")))
    same(tmp_path / "cut", tmp_path / "whole", ("checkpoints",))


def test_a_shared_secret_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("federation.clients=2", "defense.name=blinded-correction", "federation.rounds=1")
    shared = [{"partition-id": k, "source": config.data.source} for k in range(2)]
    with pytest.raises(WorkFailedError, match="no mean"):
        train(config, tmp_path / "without", engine=deployment(shared))
    told = [{**node, "secret": "a long one"} for node in shared]
    train(config, tmp_path / "run", engine=deployment(told))
    monkeypatch.setattr(RunDirectory, "noise_key", lambda run, fixed: key_of_secret("a long one"))
    here = config.model_copy(update={"engine": "inprocess"})
    train(here, tmp_path / "here")
    same(tmp_path / "run", tmp_path / "here", ("checkpoints",))


def test_a_record_of_flower_holds_no_more_than_was_sent(tmp_path: Path) -> None:
    """In a deployment an upload of private class embeddings has no trace of them."""
    config = configured("federation.clients=2", "federation.rounds=1", algorithm="fedpe")
    seen: list[RecordDict] = []

    def look(message: Message, reply: Message) -> Message:
        seen.append(reply.content)
        return reply

    shared = [{"partition-id": k, "source": config.data.source} for k in range(2)]
    train(config, tmp_path / "run", engine=deployment(shared, faults={(1, k): look for k in range(2)}))
    assert len(seen) == 2
    for content in seen:
        assert set(content.array_records) == {SENT}
        assert not any(name.startswith("head") for name in content.array_records[SENT])
