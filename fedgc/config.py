"""One typed configuration. Its resolved form is written beside every result and repeats it.

Precedence: default < file < environment (FEDGC_PRIV_SECTION_KEY) < --set < flag.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from defenses.registry import AnyDefense
from fedgc.algorithms import Push
from fedgc.errors import UsageError
from fedgc.probing import Probing
from fedgc.robust import Robust
from fedgc.schedule import Schedule
from fedgc.types import ModelSpec, Norm

ENVIRONMENT = "FEDGC_PRIV_"
SWEEP = "sweep"  # the table of a grid, which is no configuration
PROBER = 0  # the client that probes; curious clients sit there too


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Where faces come from. min_images: fewest photos of a person who is trained on; held_out: photos of each of
    them kept for galleries; center_fraction: how much of the shorter side `align = center` keeps."""

    source: str = "synthetic"
    image_size: int = Field(default=48, ge=32, le=256)
    align: Literal["none", "center", "mtcnn"] = "none"
    center_fraction: float = Field(default=0.52, gt=0.1, le=1)
    min_images: int = Field(default=6, ge=2)
    held_out: int = Field(default=3, ge=1)
    augment: bool = True


class Model(Section):
    """init: weights to start from: a finished run, a checkpoint, or weights that others publish; their SHA-256 beside it.
    trained: what of the backbone training moves: everything, or its last linear layer with the norm behind it."""

    backbone: Literal["small", "mobilefacenet", "iresnet18", "iresnet50", "inception-resnet-v1"] = "small"
    embedding_size: int = Field(default=128, ge=8, le=4096)
    norm: Norm = "group"
    init: str | None = Field(default=None, min_length=1)
    init_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    trained: Literal["all", "last"] = "all"

    @model_validator(mode="after")
    def _frozen_needs_weights(self) -> Self:
        if self.trained == "last" and (self.init is None or self.norm == "batch"):
            raise ValueError(
                "trained = last keeps all other layers as public weights left them: set model.init, and norm = group or frozen"
            )
        if self.norm == "frozen" and self.init is None:
            raise ValueError("norm = frozen keeps BatchNorm as public weights left it: set model.init, or norm = group")
        return self


class Head(Section):
    """margin_size: m of CosFace or ArcFace; lr_factor: learning rate of class embeddings over the backbone's.

    softmax: "own" counts the classes that a party holds, as the paper's private softmax does; "everybody" counts all, those
    of others as one logit for strangers at cosine zero (`fedgc.heads.loss`).
    """

    margin: Literal["none", "cosface", "arcface"] = "cosface"
    margin_size: float = Field(default=0.25, ge=0, le=1)
    scale: float = Field(default=30.0, gt=0, le=256)
    lr_factor: float = Field(default=4.0, gt=0)
    softmax: Literal["own", "everybody"] = "own"


class FederationSection(Section):
    """clients: how many, or "people" for one client a person; unevenness: spread (standard deviation of the logarithm) of
    people over clients; participation: share of clients in each round. lr is the peak of a warmed-up cosine over rounds.

    clip_norm bounds the gradient of a batch (0: not at all), for stability and not for privacy: a cosine head's gradient is
    long at first. precision: of convolutions and matrix products. The server adds server_lr times its momentum (decay
    server_momentum) to the model: FedAvgM. aggregation: the rule in place of the mean (`fedgc.robust`), which is to withstand so
    many liars.
    """

    algorithm: Literal["centralized", "local", "fedavg", "fedpe", "fedgc", "fedcos", "fedaws"] = "fedgc"
    clients: Literal["people"] | Annotated[int, Field(ge=1)] = 4
    unevenness: float = Field(default=0.0, ge=0, le=3)
    rounds: int = Field(default=24, ge=1)
    local_epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=0.03, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    clip_norm: float = Field(default=2.0, ge=0)
    participation: float = Field(default=1.0, gt=0, le=1)
    server_lr: float = Field(default=1.0, gt=0)
    server_momentum: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    aggregation: Literal["mean", "norm-clipping", "median", "trimmed-mean", "multi-krum", "safl"] = "mean"
    liars: int = Field(default=1, ge=1)


class Correction(Section):
    """The server's push on class embeddings (fedgc, fedcos, fedaws); see `fedgc.algorithms.Push` for each key.

    weight: λ, times the learning rate; "auto" gives as many pushes as centralised training would. scale: s inside FedGC's
    softmax. normalised = false: raw inner products without a scale, as the paper writes it.
    """

    weight: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    scale: float = Field(default=8.0, gt=0, le=256)
    normalised: bool = True
    all_classes: bool = False
    margin: float = Field(default=1.0, gt=0, le=2)
    squared: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    sample_above: int = Field(default=200_000, ge=2)

    def push(self) -> Push:
        values = self.model_dump()
        return Push(**{**values, "weight": None if self.weight == "auto" else self.weight})


class ProbingSection(Section):
    """A client (the first) that reads strangers' class embeddings out of the correction of rows that it chooses; see
    `fedgc.probing`. rounds: in how many of the last rounds it does (0: nobody departs from the protocol)."""

    rounds: int = Field(default=0, ge=0)
    start: Literal["own", "random"] = "own"
    restart: int = Field(default=0, ge=0)
    hold: float = Field(default=2.0, gt=0, le=100)
    length: float = Field(default=1.0, gt=0, le=20)


class Record(Section):
    """What is kept for attacks: full rounds, and steps on `victims` photos at each of `batch_sizes`.

    local_steps: how many optimiser steps a recorded step is, each on all its photos; every number is recorded on the same photos.
    rounds: "last", "ends" (first and last), "all", or a list. clients: "all", or how many clients' updates are kept.
    """

    rounds: Literal["last", "ends", "all"] | tuple[int, ...] = "ends"
    clients: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    victims: int = Field(default=8, ge=0)
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 4)
    local_steps: tuple[Annotated[int, Field(ge=1)], ...] = (1,)

    def keeps(self, client: int) -> bool:
        """Whether the updates of this client are kept; messages to it always are."""
        return self.clients == "all" or client < self.clients

    def at(self, round: int, last: int) -> bool:
        match self.rounds:
            case "all":
                return True
            case "last":
                return round == last
            case "ends":
                return round in (1, last)
            case listed:
                return round in listed


class Audit(Section):
    """canaries: how many images of nobody are put into training or left out, by a coin each (`fedgc.canaries`)."""

    canaries: int = Field(default=0, ge=0)


class Flower(Section):
    """Where engine = flower. timeout: seconds that a round waits for a client, and then goes on without it; wait: seconds for
    nodes to appear."""

    timeout: float = Field(default=3600.0, gt=0)
    wait: float = Field(default=600.0, gt=0)


class Config(Section):
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["inprocess", "flower"] = "inprocess"
    data: Data = Data()
    model: Model = Model()
    head: Head = Head()
    federation: FederationSection = FederationSection()
    correction: Correction = Correction()
    defense: AnyDefense = Field(default_factory=lambda: get_args(get_args(AnyDefense)[0])[0]())
    probing: ProbingSection = ProbingSection()
    record: Record = Record()
    audit: Audit = Audit()
    flower: Flower = Flower()

    def spec(self, classes: int = 0) -> ModelSpec:
        """classes: people in the whole federation, for a softmax that counts them."""
        m, h = self.model, self.head
        return ModelSpec(
            m.backbone, m.norm, m.embedding_size, self.data.image_size, h.margin, h.margin_size, h.scale,
            classes if h.softmax == "everybody" else 0,
        )  # fmt: skip

    def schedule(self) -> Schedule:
        f = self.federation
        return Schedule(
            rounds=f.rounds, local_epochs=f.local_epochs, batch_size=f.batch_size, lr=f.lr,
            head_lr_factor=self.head.lr_factor, momentum=f.momentum, weight_decay=f.weight_decay, clip_norm=f.clip_norm or None,
            participation=f.participation, push=self.correction.push(), augment=self.data.augment, server_lr=f.server_lr,
            server_momentum=f.server_momentum, precision=f.precision,
            robust=Robust(f.aggregation, f.liars),
        )  # fmt: skip

    def plan_of_probing(self) -> Probing | None:
        """What the first client does in place of the protocol, if anything."""
        p, rounds = self.probing, self.federation.rounds
        if p.rounds == 0:
            return None
        return Probing(PROBER, max(1, rounds - p.rounds + 1), p.hold, p.start, p.restart, p.length)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def digest(self) -> str:
        """Short hash of the resolved configuration: runs that differ in nothing share it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def load_config(
    file: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Resolve a configuration; raises UsageError naming the key, its place, and the nearest valid key."""
    tree = read_toml(file) if file else {}
    origin = str(file) if file else "the configuration"
    if SWEEP in tree:
        raise UsageError(f"{origin} holds a grid, [{SWEEP}]: give it to `fedgc-priv sweep`, or take that table out")
    for name, value in environment_settings(environment or {}).items():
        put(tree, name, value)
    for setting in settings:
        put(tree, *parse_setting(setting))
    for name, value in (flags or {}).items():
        if value is not None:
            put(tree, name, value)
    return validated(tree, origin)


def validated(tree: Mapping[str, Any], origin: str = "the configuration") -> Config:
    if (key := _too_long(tree)) is not None:
        raise UsageError(f"{origin}: {key} is a number of more than 64 bits; TOML has none, and nothing here needs one")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(explain(error, origin, tree)) from None


def _too_long(value: Any, key: str = "") -> str | None:
    """The key of the first whole number that does not fit 64 bits."""
    if isinstance(value, Mapping):
        inner = ((f"{key}.{name}" if key else str(name), part) for name, part in value.items())
        return next((found for name, part in inner if (found := _too_long(part, name)) is not None), None)
    if isinstance(value, list | tuple):
        return next((found for part in value if (found := _too_long(part, key)) is not None), None)
    return key if isinstance(value, int) and not -(2**63) <= value < 2**63 else None


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give a TOML file or leave it out for the defaults") from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # also of a number with thousands of digits, and of deep nesting
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None


def parse_setting(setting: str) -> tuple[str, Any]:
    """'a.b=value' -> ('a.b', value), the value as TOML where it is TOML, else as text."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {setting!r}: write KEY=VALUE, for example --set federation.rounds=10")
    return key.strip(), parse_value(text.strip())


def parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"{key}: {section} is a value, not a section")
    tree[last] = value


def known_keys() -> list[str]:
    """Every dotted key, those of every defense included."""
    keys: list[str] = []
    for name, info in Config.model_fields.items():
        kinds = get_args(get_args(AnyDefense)[0]) if name == "defense" else (info.annotation,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += [f"{name}.{inner}" for inner in kind.model_fields]
            else:
                keys.append(name)
    return list(dict.fromkeys(keys))


def environment_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    names = {ENVIRONMENT + key.upper().replace(".", "_"): key for key in known_keys()}
    found = {}
    for name in sorted(n for n in environment if n.startswith(ENVIRONMENT)):
        if name not in names:
            raise UsageError(f"environment variable {name}: no such key{_suggestion(name, names)}")
        found[names[name]] = parse_value(environment[name])
    return found


def explain(error: ValidationError, origin: str, tree: Mapping[str, Any]) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    key = _key(first["loc"])
    where = key.split(".")
    others = {_key(e["loc"]) for e in error.errors()} - {key}
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        defense = tree.get("defense", {})
        if where[0] == "defense" and isinstance(defense, dict):
            name = defense.get("name", "none")
            return f"{origin}: defense '{name}' has no key '{key}'; choose the defense with defense.name{more}"
        return f"{origin}: unknown key '{key}'{_suggestion(key, known_keys())}{more}"
    if first["type"] == "union_tag_not_found":
        return f"{origin}: [defense] needs a name, for example defense.name = dp-sgd{more}"
    messages = " or ".join(dict.fromkeys(e["msg"] for e in error.errors() if _key(e["loc"]) == key))
    return f"{origin}: {key} = {first['input']!r}: {messages}{more}"


def _key(place: Sequence[int | str]) -> str:
    """The dotted key of a pydantic location, without the names of defenses and of union members in it."""
    parts = [str(part) for part in place]
    if parts[0] == "defense" and len(parts) > 2:
        parts.pop(1)
    return ".".join(parts[:2])


def _suggestion(wrong: str, right: Sequence[str] | Mapping[str, str]) -> str:
    near = difflib.get_close_matches(wrong, list(right), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "; `fedgc-priv train --help` lists the keys"
