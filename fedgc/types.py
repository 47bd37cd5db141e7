"""The vocabulary that every other module speaks. Nothing here reads or writes anything.

Training produces a `Transcript` (what crossed the wire) and a `Truth` (what did not). A threat model turns a
transcript into an `Observation`; an attack turns an observation into a `Reconstruction`; only `eval` compares that
with the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedgc.errors import RefusedError

Tensors = Mapping[str, Tensor]
Progress = Callable[[int, int], None]  # (done, total)

Norm = Literal["group", "batch", "frozen"]

BACKBONE = "backbone."
HEAD = "head.weight"


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build and train the network that a party runs; public.

    softmax_classes: how many classes the softmax counts. Those that a party does not hold stand in its denominator at
    cosine zero, where a random stranger is; 0 counts held classes only, as the paper does.
    """

    backbone: str
    norm: Norm
    embedding_size: int
    image_size: int
    margin: Literal["none", "cosface", "arcface"]
    margin_size: float
    scale: float
    softmax_classes: int = 0


@dataclass(frozen=True)
class LocalConstants:
    """The public constants of local training in one round.

    The head's learning rate is ``lr * head_lr_factor``; the gradient of a whole batch is shortened to ``clip_norm``.
    ``steps`` is None where clients take different numbers of steps, as in a whole round. ``defense`` is the defense card:
    mechanism and its public parameters, which a strong attacker knows. ``augmented`` says whether training saw transformed
    photos. ``server_lr`` multiplies the mean update. precision: of convolutions and matrix products in local training.
    """

    spec: ModelSpec
    lr: float
    head_lr_factor: float
    momentum: float
    weight_decay: float
    clip_norm: float | None
    batch_size: int
    steps: int | None
    augmented: bool
    defense: Mapping[str, Any] = field(default_factory=dict)
    server_lr: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def lr_of(self, name: str) -> float:
        """Learning rate of a named parameter."""
        return self.lr * (self.head_lr_factor if name == HEAD else 1.0)


@dataclass(frozen=True)
class ClientUpdate:
    """Everything that one client sent in one round, and only that.

    ``tensors`` are changes (after minus before) keyed by parameter name; ``head.weight`` has one row per class of
    `Transcript.rows[client]` and is absent where the algorithm keeps it at home.
    """

    client: int
    tensors: Tensors
    num_examples: int


@dataclass(frozen=True)
class Transcript:
    """Everything on the wire in one round.

    kind "round" is a round as trained. Kind "step" is a recorded step: from the same parameters, every client takes
    ``constants.steps`` optimiser steps, one or few, each on the same ``constants.batch_size`` photos, through the same algorithm
    and defense; it is the worst case for a photo (a client with few photos, or a server that knows the rest of the batch) and
    never changes the model.

    broadcast   what the server sent to everybody, before local training
    sent        what it sent to client k alone (its own class embeddings)
    updates     what each recorded client sent back
    released    what everybody holds after aggregation
    returned    what the server sent back to client k alone (its class embeddings, corrected)
    rows        class of each row of client k's ``head.weight``
    owners      the client of each class
    examples    photos of each client that took part; its share of them is its weight in the aggregate
    carried     the server's momentum before this round, times its decay: known to all who saw the last two broadcasts
    prober      the client that chose what it uploaded as class embeddings in this round (`fedgc.probing`), if any
    masked      whether what is averaged arrived masked, so that the server read the sum alone; ``updates`` hold the rest
    summed      the weighted mean as the server computed it, where ``updates`` do not hold all that went into it
    own         what client k trained and sent masked: what it knows of itself, and nobody else does
    """

    algorithm: str
    round: int
    kind: Literal["round", "step"]
    constants: LocalConstants
    broadcast: Tensors
    sent: Mapping[int, Tensors]
    updates: Mapping[int, ClientUpdate]
    released: Tensors
    returned: Mapping[int, Tensors]
    rows: Mapping[int, tuple[int, ...]]
    owners: tuple[int, ...]
    examples: Mapping[int, int]
    carried: Tensors = field(default_factory=dict)
    prober: int | None = None
    masked: bool = False
    summed: Tensors = field(default_factory=dict)
    own: Mapping[int, Tensors] = field(default_factory=dict)

    def weight(self, client: int) -> float:
        """Aggregation weight of a client; zero where it took no part."""
        return self.examples.get(client, 0) / sum(self.examples.values())


@dataclass(frozen=True)
class Truth:
    """Private photos and identities behind a transcript of kind "step". Read by eval, by nobody else.

    images: float32 (K, B, 3, H, W) in [0, 1], labels: int64 (K, B) class of each, clients: the K clients in order.
    """

    clients: tuple[int, ...]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Gallery:
    """Photos of G candidate people that an attacker owns: other photos than those trained on, in an order that says
    nothing. images: float32 (N, 3, H, W) in [0, 1]; people: int64 (N,) in 0..G-1."""

    images: Tensor
    people: Tensor

    @property
    def size(self) -> int:
        return int(self.people.max()) + 1


@dataclass(frozen=True)
class Canaries:
    """Images each of which may have been trained on, by a coin that the attacker does not see, and where it would be. images:
    float32 (m, 3, H, W) in [0, 1]; classes, clients: int64 (m,)."""

    images: Tensor
    classes: Tensor
    clients: Tensor


@dataclass(frozen=True)
class ObservedUpdate:
    """An update, or a weighted mean of several, in an adversary's hands.

    before: the parameters it started from, as far as the adversary holds them; delta: the change;
    images: how many photos are behind it; clients: whose they are; classes: the class of each visible head row.
    """

    clients: tuple[int, ...]
    before: Tensors
    delta: Tensors
    images: int
    classes: tuple[int, ...]


@dataclass(frozen=True)
class ClassEmbeddings:
    """Rows of the head that belong to other parties. weight: float32 (C', d); classes: class of each row."""

    weight: Tensor
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Observation:
    """What one adversary holds. A grant that was not given is None."""

    threat: str
    algorithm: str
    round: int
    kind: Literal["round", "step"]
    public_constants: LocalConstants
    global_model: Tensors | None = None
    client_updates: tuple[ObservedUpdate, ...] | None = None
    aggregate: ObservedUpdate | None = None
    class_embeddings: ClassEmbeddings | None = None
    own_class_embeddings: ClassEmbeddings | None = None
    correction: ClassEmbeddings | None = None
    probes: ClassEmbeddings | None = None
    auxiliary_faces: Tensor | None = None
    gallery: Gallery | None = None
    normalisation_statistics: Tensors | None = None  # of BatchNorm layers of the released model
    candidates: Tensor | None = None  # photos (K, 3, H, W), one or more of which are behind an update
    suspects: Gallery | None = None  # people some of whom were trained on, by other photos than those
    acquaintances: Mapping[int, int] | None = None  # person of the gallery behind a class, where it is known beforehand
    canaries: Canaries | None = None  # images that were put into training or not
    auxiliary_people: Tensor | None = None  # a number for the person of each auxiliary face; comes with them

    @property
    def granted(self) -> tuple[str, ...]:
        """Names of the grants, as the command line prints them."""
        held = (f.name for f in fields(self) if f.name in GRANTS_OF_FIELDS and getattr(self, f.name) is not None)
        return tuple(sorted(GRANTS_OF_FIELDS[name] for name in held))


GRANTS_OF_FIELDS = {
    name: name.replace("_", "-")
    for name in (
        "public_constants", "global_model", "client_updates", "aggregate", "class_embeddings", "own_class_embeddings",
        "correction", "probes", "auxiliary_faces", "gallery", "normalisation_statistics", "candidates", "suspects",
        "acquaintances", "canaries",
    )
}  # fmt: skip
GRANTS = tuple(GRANTS_OF_FIELDS.values())


@dataclass(frozen=True)
class Reconstruction:
    """What an attack returns; fields it does not speak of are None.

    Entry i answers target i: ``sources[i]`` is the client whose update it came from (-1: an aggregate of several) or, for
    class embeddings, the class. images: float32 (n, 3, H, W); labels: int64 (n,); scores: float32 (n, G) similarity of
    target i with each person of the gallery, or evidence for each candidate; embeddings: float32 (n, d) unit features, or zero
    where none was found. ``loss`` is the attack's own final objective, one number a target. every: float32 (restarts, n, 3, H,
    W), where each start ended; ``images`` are the best of them by that.
    """

    sources: tuple[int, ...]
    images: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    embeddings: Tensor | None = None
    loss: Tensor | None = None
    every: Tensor | None = None
    iterations: int = 0
    failed: int = 0


class Named(BaseModel):
    """Frozen, typed, and its own record: the fields are the hyper-parameters and ``name`` selects the class."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str

    @property
    def kind(self) -> str:
        return self.name


class Attack(Named):
    """One published attack, or one of ours. Calling it checks what it needs; a subclass writes only `run`.

    needs: alternatives, each a set of grants of which all must be held. target: the kind of transcript it reads.
    costly: seconds a photo rather than a moment, so that few photos are attacked unless more are asked for. apart: updates are
    attacked one by one, and so may be shared out.
    """

    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset(),)
    target: ClassVar[Literal["round", "step"]] = "round"
    costly: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    summary: ClassVar[str] = ""

    @property
    def reads(self) -> Literal["round", "step"]:
        """``target``, unless a setting makes it another."""
        return self.target

    def needed(self) -> tuple[frozenset[str], ...]:
        """``needs``, unless a setting makes them others."""
        return self.needs

    def refusal(self, observation: Observation) -> str | None:
        """Why this attack cannot start from this observation, or None. Costs no compute."""
        held = frozenset(observation.granted)
        if any(need <= held for need in self.needed()):
            return self.unsuitable(observation)
        wanted = " or ".join(" + ".join(sorted(need)) for need in self.needed())
        return (
            f"needs {wanted}; under {observation.algorithm} the seat '{observation.threat}' "
            f"holds only {', '.join(sorted(held)) or 'nothing'}"
        )

    def unsuitable(self, observation: Observation) -> str | None:
        """A subclass says here what else keeps it from starting."""
        return None

    def sized(self, photos: int) -> Self:
        """The attack with what depends on the size of a job decided, so that a repetition decides alike."""
        return self

    def loss_at(self, observation: Observation, number: int, images: Tensor) -> float | None:
        """Of an attack that searches: its objective of the update of that number at given images (B, 3, H, W), to tell a search
        that fell short. None where there is none."""
        return None

    @final
    def __call__(
        self, observation: Observation, generator: torch.Generator, progress: Progress | None = None
    ) -> Reconstruction:
        """Run on one observation. Raises RefusedError before any compute when something needed was not granted."""
        why = self.refusal(observation)
        if why:
            raise RefusedError(f"{self.kind}: {why}")
        return self.run(observation, generator, progress or (lambda done, total: None))

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        raise NotImplementedError


@dataclass(frozen=True)
class Charge:
    """One entry of the privacy ledger: client's steps in a round at one noise multiplier and sample rate. photos: the most that
    one person has among what is sampled, for the figure that speaks of a person."""

    client: int
    round: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    photos: int = 1


@dataclass(frozen=True)
class State:
    """All that the next round needs. rows: (C, d) class embeddings in order of classes; momentum: the server's, keyed
    like what it averages, empty without server momentum; probes: what a probing client remembers (`fedgc.probing.Probes`);
    kept: class embeddings (C, d) as clients keep them at home, where a defense has them upload others."""

    round: int
    backbone: dict[str, Tensor]
    rows: Tensor
    ledger: tuple[Charge, ...] = ()
    momentum: dict[str, Tensor] = field(default_factory=dict)
    probes: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
