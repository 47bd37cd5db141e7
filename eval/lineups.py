"""Candidate photos against the truth: how high the photos behind an update rank, beside what noise lets any attack reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.privacy import candidate_ceiling
from eval.scoring import Metrics, Scores
from eval.statistics import Measured, rate

NO_NOISE = "no ceiling: no noise of the defense bounds what an attack finds"


@dataclass(frozen=True)
class Lineup:
    """One target: evidence for each of K candidates (K,), the candidates that are behind it (N,), and their people (N,).

    noise: noise multiplier of one photo in it, counting what every client added; None where none is known.
    """

    scores: Tensor
    behind: Tensor
    people: Tensor
    noise: float | None = None


@dataclass(frozen=True)
class Ranked:
    """A photo's place (1 is best, ties against the attacker) among ``size`` candidates: it and those that are not behind
    the same update, so that the others of a batch neither help nor hide it."""

    place: int
    size: int
    person: int
    noise: float | None


def score_lineups(steps: Sequence[Sequence[Lineup]], rounds: int, rng: np.random.Generator) -> Scores:
    """rank1 and rank5 over photos, with chance and, where the noise is known, the ceiling of ``rounds`` observations.

    steps: the targets that share one set of candidates. Baseline, where a step has several: the evidence of another update
    in place of the photo's own, which shows whether candidates differ in anything but what the update says.
    """
    own = [r for step in steps for lineup in step for r in ranked(lineup, lineup.scores)]
    swapped = [r for step in steps for lineup, other in _neighbours(step) for r in ranked(lineup, other.scores, other)]
    baselines = {"another-update": _rates(swapped, rng)} if swapped else {}
    metrics = _rates(own, rng)
    for k, name in ((1, "rank1"), (5, "rank5")):
        if any(r.noise is None for r in own):
            metrics[name] |= {"ceiling": None, "note": NO_NOISE}
        else:
            bounds = [candidate_ceiling(r.size, rounds, r.noise, k) for r in own if r.noise is not None]
            metrics[name]["ceiling"] = round(float(np.mean(bounds)), 6)
    samples = [{"target": n, "class": r.person, "rank": r.place, "candidates": r.size} for n, r in enumerate(own)]
    return Scores(metrics, baselines, samples)


def ranked(lineup: Lineup, scores: Tensor, also_out: Lineup | None = None) -> Iterator[Ranked]:
    """The rank of each photo behind a target by ``scores``; also_out: whose photos are left out as well."""
    for mate, person in zip(lineup.behind.tolist(), lineup.people.tolist(), strict=True):
        kept = torch.ones(len(scores), dtype=torch.bool)
        kept[lineup.behind] = False
        if also_out is not None:
            kept[also_out.behind] = False
        kept[mate] = False
        place = 1 + int((scores[kept] >= scores[mate]).sum())
        yield Ranked(place, 1 + int(kept.sum()), person, lineup.noise)


def _neighbours(step: Sequence[Lineup]) -> list[tuple[Lineup, Lineup]]:
    return list(zip(step, [*step[1:], step[0]], strict=True)) if len(step) > 1 else []


def _rates(found: Sequence[Ranked], rng: np.random.Generator) -> Metrics:
    places, people = np.array([r.place for r in found]), np.array([r.person for r in found])
    out = {}
    for k in (1, 5):
        chance = float(np.mean([min(1.0, k / r.size) for r in found]))
        measured = rate(places <= k, people, chance=round(chance, 6), rng=rng)
        if chance == 1:
            measured = Measured.unsupported(f"of so few candidates everybody is among the {k} best", len(found), 1.0)
        out[f"rank{k}"] = measured.to_json()
    return out
