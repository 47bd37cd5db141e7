"""Who attacks, and what reaches them: the only door from a transcript to an attack.

Each seat takes from the transcript exactly the messages that party sends or receives, so that what an algorithm does not
send cannot be observed, whatever the attack. `Knowledge` is what the attacker owns apart from the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fedgc.algorithms import ALGORITHMS, RunningMean, backbone_part
from fedgc.types import (
    HEAD,
    Canaries,
    ClassEmbeddings,
    ClientUpdate,
    Gallery,
    LocalConstants,
    Norm,
    Observation,
    ObservedUpdate,
    Tensors,
    Transcript,
)

RUNNING = (".running_mean", ".running_var")  # of a BatchNorm layer


@dataclass(frozen=True)
class Knowledge:
    """What every attacker is given beside the protocol: photos of strangers (float32 (N, 3, H, W) in [0, 1], a number for each
    person int64 (N,)) and, for re-identification, photos of candidate people. Where an attack asks for it, the photos among which
    those behind an update are (float32 (K, 3, H, W)), or people some of whom were trained on, or the person of the gallery behind
    some classes, or the candidates of an audit."""

    auxiliary_faces: Tensor | None = None
    gallery: Gallery | None = None
    candidates: Tensor | None = None
    suspects: Gallery | None = None
    auxiliary_people: Tensor | None = None
    canaries: Canaries | None = None
    acquaintances: Mapping[int, int] | None = None


@dataclass(frozen=True)
class ThreatModel:
    """A position in the protocol. ``grants`` is the most that it can hold; an algorithm may send it less."""

    name: str
    position: str
    behaviour: str
    grants: frozenset[str]
    view: Callable[[Transcript, int], Mapping[str, Any]]

    def observe(self, transcript: Transcript, knowledge: Knowledge | None = None, seat: int = 0) -> Observation:
        """What this adversary holds of one transcript. seat: which client it is, where it is one."""
        knowledge = knowledge or Knowledge()
        seen = dict(self.view(transcript, seat))
        seen.update({own.name: getattr(knowledge, own.name) for own in fields(knowledge)})
        observation = Observation(
            threat=self.name,
            algorithm=transcript.algorithm,
            round=transcript.round,
            kind=transcript.kind,
            public_constants=transcript.constants,
            **seen,
        )
        beyond = set(observation.granted) - self.grants
        if beyond:
            raise AssertionError(f"threat model {self.name} leaks {sorted(beyond)}")
        return observation


def _held(transcript: Transcript, client: int) -> tuple[Tensors, tuple[int, ...]]:
    """Parameters that a client trained from, as far as they were on the wire, and the classes of the head's rows."""
    before = {**transcript.broadcast, **transcript.sent.get(client, {})}
    return before, transcript.rows.get(client, ()) if HEAD in before else ()


def _one_update(transcript: Transcript, update: ClientUpdate) -> ObservedUpdate:
    before, classes = _held(transcript, update.client)
    return ObservedUpdate((update.client,), before, update.tensors, update.num_examples, classes)


def _foreign(transcript: Transcript, weight: Tensor, classes: tuple[int, ...], seat: int) -> ClassEmbeddings | None:
    theirs = [i for i, c in enumerate(classes) if transcript.owners[c] != seat]
    return ClassEmbeddings(weight[theirs], tuple(classes[i] for i in theirs)) if theirs else None


def _released(tensors: Tensors, norm: Norm) -> dict[str, Any]:
    """The released backbone, and what its BatchNorm layers remember of the photos that all clients trained on. Layers that are
    held constant remember public photos only, and GroupNorm nothing."""
    backbone = backbone_part(tensors)
    kept = {name: t for name, t in backbone.items() if name.endswith(RUNNING)} if norm == "batch" else {}
    return {"global_model": backbone, "normalisation_statistics": kept or None}


def _server(transcript: Transcript, _seat: int) -> Mapping[str, Any]:
    """Every message, before aggregation; the class embeddings are those that the clients just trained. Where what is averaged
    arrives masked, what a server behind secure aggregation holds."""
    if transcript.masked:
        return _server_secagg(transcript, _seat)
    updates = tuple(_one_update(transcript, u) for u in transcript.updates.values())
    return {
        **_released(transcript.released, transcript.constants.spec.norm),
        "client_updates": updates or None,
        "class_embeddings": _uploaded(transcript),
    }


def _server_secagg(transcript: Transcript, _seat: int) -> Mapping[str, Any]:
    """The mean of what all clients sent to be averaged, before anything was done with it, and no single update; class embeddings
    that are stacked are one client's each and so cannot be summed away."""
    clients, images = tuple(transcript.examples), sum(transcript.examples.values())
    classes = tuple(range(len(transcript.owners))) if HEAD in transcript.broadcast else ()
    mean = None if ALGORITHMS[transcript.algorithm].alone else _mean(transcript)
    before = dict(transcript.broadcast)
    return {
        **_released(transcript.released, transcript.constants.spec.norm),
        "aggregate": None if mean is None else ObservedUpdate(clients, before, mean, images, classes),
        "class_embeddings": _uploaded(transcript),
    }


def _mean(transcript: Transcript) -> Tensors | None:
    """The weighted mean that the server computed: as recorded, or again of the updates where they are all recorded."""
    if transcript.summed:
        return dict(transcript.summed)
    if set(transcript.examples) - set(transcript.updates):
        return None
    mean = RunningMean()
    for k in transcript.examples:
        update = transcript.updates[k].tensors
        mean.add({name: update[name] for name in _averaged(transcript)}, transcript.weight(k))
    return mean.total


def _averaged(transcript: Transcript) -> list[str]:
    """Tensors that clients send to be averaged: of those that are sent out all but what nobody trains."""
    messages = [*(u.tensors for u in transcript.updates.values()), *transcript.own.values(), transcript.summed]
    trained = set().union(*messages) or set(transcript.broadcast)
    return [name for name in transcript.broadcast if name in trained]


def _uploaded(transcript: Transcript) -> ClassEmbeddings | None:
    """Class embeddings that reached the server: the mean of everybody's copies, or those that their owners just trained."""
    if HEAD in transcript.released:
        return ClassEmbeddings(transcript.released[HEAD], tuple(range(len(transcript.owners))))
    return _stacked({k: _one_update(transcript, u) for k, u in transcript.updates.items()})


def _stacked(updates: Mapping[int, ObservedUpdate]) -> ClassEmbeddings | None:
    import torch

    sent = [(u.before[HEAD] + u.delta[HEAD], u.classes) for u in updates.values() if HEAD in u.delta]
    if not sent:
        return None
    return ClassEmbeddings(torch.cat([w for w, _ in sent]), tuple(c for _, classes in sent for c in classes))


def _client(transcript: Transcript, seat: int) -> Mapping[str, Any]:
    """What one participant receives, and what it knows by having taken part; nothing where it departed from the protocol."""
    return {} if transcript.prober == seat else _participant(transcript, seat)


def _participant(transcript: Transcript, seat: int) -> Mapping[str, Any]:
    view = _released(transcript.released, transcript.constants.spec.norm)
    others = set(transcript.examples) - {seat}
    if others and (_own(transcript, seat) or seat not in transcript.examples):  # its own share is subtracted
        view["aggregate"] = _others(transcript, seat)
    if HEAD in transcript.released:
        classes = tuple(range(len(transcript.owners)))
        weight = transcript.released[HEAD]
        view["class_embeddings"] = _foreign(transcript, weight, classes, seat)
        own = [c for c in classes if transcript.owners[c] == seat]
        view["own_class_embeddings"] = ClassEmbeddings(weight[own], tuple(own))
    elif seat in transcript.returned:
        classes = transcript.rows[seat]
        received = transcript.returned[seat][HEAD]
        view["own_class_embeddings"] = ClassEmbeddings(received, classes)
        if ALGORITHMS[transcript.algorithm].corrects and seat in transcript.updates:
            uploaded = transcript.sent[seat][HEAD] + transcript.updates[seat].tensors[HEAD]
            view["correction"] = ClassEmbeddings(received - uploaded, classes)
    return view


def _probing_client(transcript: Transcript, seat: int) -> Mapping[str, Any]:
    """A participant's view with the rows that it chose to upload; nothing where it kept to the protocol."""
    if transcript.prober != seat or seat not in transcript.updates:
        return {}
    uploaded = transcript.sent[seat][HEAD] + transcript.updates[seat].tensors[HEAD]
    return {**_participant(transcript, seat), "probes": ClassEmbeddings(uploaded, transcript.rows[seat])}


def _own(transcript: Transcript, seat: int) -> Tensors:
    """What a client sent, which it knows whether it arrived masked or not; empty where that was not kept or it was away."""
    clear = transcript.updates[seat].tensors if seat in transcript.updates else {}
    return {**clear, **transcript.own.get(seat, {})}


def _others(transcript: Transcript, seat: int) -> ObservedUpdate:
    """Everybody else's mean update: the change of the global model less the server's momentum and one's own share."""
    shared = [name for name in _averaged(transcript) if name in transcript.released]
    change = {name: transcript.released[name] - transcript.broadcast[name] for name in shared}
    change = {name: delta / transcript.constants.server_lr for name, delta in change.items()}
    change = {name: delta - transcript.carried[name] if transcript.carried else delta for name, delta in change.items()}
    others = tuple(k for k in transcript.examples if k != seat)
    own = transcript.weight(seat)
    if own:
        mine = _own(transcript, seat)
        change = {name: (delta - own * mine[name]) / (1 - own) for name, delta in change.items()}
    images = sum(transcript.examples[k] for k in others)
    classes = tuple(range(len(transcript.owners))) if HEAD in transcript.broadcast else ()
    return ObservedUpdate(others, dict(transcript.broadcast), change, images, classes)


def _outsider(transcript: Transcript, _seat: int) -> Mapping[str, Any]:
    """The released backbone. No algorithm here releases its head, so that all are compared alike."""
    return _released(transcript.released, transcript.constants.spec.norm)


_ALWAYS = frozenset(
    {
        "public-constants", "global-model", "normalisation-statistics", "auxiliary-faces", "gallery", "candidates",
        "suspects", "acquaintances", "canaries",
    }
)  # fmt: skip
THREATS = {
    t.name: t
    for t in (
        ThreatModel(
            "server",
            "the aggregating server",
            "honest but curious: follows the protocol and reads every message",
            _ALWAYS | {"client-updates", "aggregate", "class-embeddings"},
            _server,
        ),
        ThreatModel(
            "server-secagg",
            "the aggregating server, behind secure aggregation",
            "honest but curious: reads the sum of what it averages, and one by one the class embeddings that it corrects",
            _ALWAYS | {"aggregate", "class-embeddings"},
            _server_secagg,
        ),
        ThreatModel(
            "client",
            "another participant",
            "honest but curious: trains as told and reads what it receives",
            _ALWAYS | {"aggregate", "class-embeddings", "own-class-embeddings", "correction"},
            _client,
        ),
        ThreatModel(
            "probing-client",
            "another participant",
            "trains its backbone as told and uploads rows of its choice in place of its class embeddings, to read the correction",
            _ALWAYS | {"aggregate", "class-embeddings", "own-class-embeddings", "correction", "probes"},
            _probing_client,
        ),
        ThreatModel(
            "outsider",
            "whoever holds the released model",
            "takes no part in training and reads the released backbone",
            _ALWAYS,
            _outsider,
        ),
    )
}


def outsider_observation(
    backbone: Tensors, head: Tensor | None, constants: LocalConstants, knowledge: Knowledge
) -> Observation:
    """The seat of somebody who found a checkpoint file: all that the file holds, and nothing else."""
    rows = None if head is None else ClassEmbeddings(head, tuple(range(len(head))))
    return Observation(
        threat="outsider", algorithm="unknown", round=0, kind="round", public_constants=constants,
        class_embeddings=rows, **_released(backbone, constants.spec.norm),
        auxiliary_faces=knowledge.auxiliary_faces, gallery=knowledge.gallery,
    )  # fmt: skip


def update_observation(update: ObservedUpdate, constants: LocalConstants, knowledge: Knowledge) -> Observation:
    """The seat of a server of which one client's update is known, and nothing else; what it released is not. Held as the global
    model is what it had sent out."""
    rows = _stacked({0: update})
    return Observation(
        threat="server", algorithm="unknown", round=0, kind="step", public_constants=constants,
        client_updates=(update,), class_embeddings=rows, **_released(update.before, constants.spec.norm),
        auxiliary_faces=knowledge.auxiliary_faces, auxiliary_people=knowledge.auxiliary_people,
    )  # fmt: skip
