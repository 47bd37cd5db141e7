"""The candidate photos that an attacker is given, and how what it found among them is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attacks.canary_inference import CanaryInference
from attacks.candidates import CandidateMatch
from attacks.correction_probe import CorrectionProbe
from eval.lineups import Lineup, score_lineups
from eval.scoring import Scores
from fedgc.rng import generator
from fedgc.runs import RunDirectory
from fedgc.transcripts import step_of
from fedgc.types import Attack, Reconstruction, Truth


@dataclass(frozen=True)
class Hidden:
    """Candidate photos of one recorded step, float32 (K, 3, H, W), and, for scoring alone, the truth's place among them.

    places: the candidate that each photo behind a client's update is; people: the class of each.
    """

    photos: Tensor
    places: Mapping[int, Tensor]
    people: Mapping[int, Tensor]


def adds_up(attack: Attack) -> bool:
    """Whether what several rounds show of the same people is one piece of evidence."""
    return isinstance(attack, CandidateMatch | CorrectionProbe | CanaryInference)


def hide(run: RunDirectory, attack: Attack, names: Sequence[str], seat: int | None) -> dict[str, Hidden]:
    """For each transcript of a single step its photos among the candidates that an attack asks for (more where the step
    has more); nothing for an attack that asks for none.

    Decoys are first the photos of other recorded steps, as trained on as the victims; then photos of the gallery; then
    auxiliary faces. Each kind comes in an order drawn by the run's seed, no photo comes twice, and one step has the same
    candidates in every round. seat: the client who attacks; its own photos it would rule out.
    """
    if not isinstance(attack, CandidateMatch):
        return {}
    owned = run.load_knowledge()
    assert owned.auxiliary_faces is not None and owned.gallery is not None  # noqa: PT018
    steps = {step_of(n): run.load_truth(n) for n in run.transcripts() if step_of(n)}
    drawn = {}
    for step in dict.fromkeys(map(step_of, names)):
        others = [_photos(truth, seat) for key, truth in steps.items() if key != step]
        kinds = [*([torch.cat(others)] if others else []), owned.gallery.images, owned.auxiliary_faces]
        drawn[step] = _line_up(
            steps[step], kinds, attack.candidates, seat, generator(run.about()["seed"], "candidates", step)
        )
    return {name: drawn[step_of(name)] for name in names}


def _photos(truth: Truth, seat: int | None) -> Tensor:
    return truth.images[[i for i, k in enumerate(truth.clients) if k != seat]].flatten(0, 1)


def _line_up(truth: Truth, kinds: Sequence[Tensor], size: int, seat: int | None, draw: torch.Generator) -> Hidden:
    found: dict[bytes, Tensor] = {}
    ruled_out = {_key(x) for x in truth.images[[i for i, k in enumerate(truth.clients) if k == seat]].flatten(0, 1)}
    for photo in _photos(truth, seat):
        found.setdefault(_key(photo), photo)
    for photos in kinds:
        for i in torch.randperm(len(photos), generator=draw).tolist():
            if len(found) >= size:
                break
            if (key := _key(photos[i])) not in ruled_out:
                found.setdefault(key, photos[i])
    keys = list(found)
    order = torch.randperm(len(keys), generator=draw).tolist()
    place = {keys[i]: n for n, i in enumerate(order)}
    mine = {
        k: torch.tensor([place[_key(x)] for x in truth.images[i]]) for i, k in enumerate(truth.clients) if k != seat
    }
    people = {k: truth.labels[i] for i, k in enumerate(truth.clients)}
    return Hidden(torch.stack([found[keys[i]] for i in order]), mine, people)


def _key(photo: Tensor) -> bytes:
    return (photo * 255).round().to(torch.uint8).numpy().tobytes()


def score_candidates(
    found: Mapping[str, Reconstruction], hidden: Mapping[str, Hidden], sigma: float | None, rng: np.random.Generator
) -> Scores:
    """Evidence of one step in several rounds is added up. sigma: noise multiplier that a client trains with, if any."""
    steps: dict[str, list[str]] = {}
    for name in found:
        steps.setdefault(step_of(name), []).append(name)
    rounds = max(len(names) for names in steps.values())
    return score_lineups([_lineups(names, found, hidden[names[0]], sigma) for names in steps.values()], rounds, rng)


def _lineups(
    names: Sequence[str], found: Mapping[str, Reconstruction], hidden: Hidden, sigma: float | None
) -> list[Lineup]:
    out = []
    for i, source in enumerate(found[names[0]].sources):
        scores = sum((s[i] for name in names if (s := found[name].scores) is not None), torch.zeros(len(hidden.photos)))
        clients = list(hidden.places) if source == -1 else [source]
        behind, people = (torch.cat([part[k] for k in clients]) for part in (hidden.places, hidden.people))
        out.append(Lineup(scores, behind, people, sigma * len(clients) ** 0.5 if sigma else None))
    return out
