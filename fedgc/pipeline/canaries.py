"""The canaries that an attacker is given, and how what it says of them is scored beside the coins and the promised epsilon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attacks.canary_inference import CanaryInference
from eval.canaries import Claim, score_canaries
from eval.scoring import Scores
from fedgc.runs import RunDirectory
from fedgc.types import Attack, Canaries, Reconstruction


def given(run: RunDirectory, attack: Attack, seat: int | None) -> Canaries | None:
    """The candidates, for the attack that asks for them. seat: the client who attacks; it knows its own, which are left out."""
    every = run.load_canaries() if isinstance(attack, CanaryInference) else None
    if every is None or seat is None:
        return every
    others = every.clients != seat
    return Canaries(every.images[others], every.classes[others], every.clients[others])


def score_found(
    run: RunDirectory, found: Mapping[str, Reconstruction], seat: int | None, rng: np.random.Generator
) -> Scores:
    """Evidence of all rounds is added up."""
    every = run.load_canaries()
    assert every is not None
    kept = every.clients != (-1 if seat is None else seat)
    evidence = np.sum([r.scores.double().numpy() for r in found.values() if r.scores is not None], axis=0)
    names = list(zip(every.classes[kept].tolist(), every.clients[kept].tolist(), strict=True))
    inside = run.load_coins()[kept].numpy()
    return score_canaries(evidence[0], evidence[1], inside, claim_of(run.about().get("privacy")), names, rng)


def claim_of(privacy: Mapping[str, Any] | None) -> Claim:
    """What a run promises to one photo. A canary is one photo, put in or left out, and a promise to another unit is no less and
    no more than that: it is not compared."""
    if privacy is None:
        return Claim(None, None, "no differential privacy was promised")
    if privacy["epsilon"] is None:
        return Claim(None, None, f"epsilon is withheld: {privacy.get('why')}")
    if (unit := privacy.get("unit")) != "image":
        whom = "a person with all photos" if unit == "identity" else "a whole client"
        why = (
            f"epsilon is promised to {whom}, and a canary is one photo: the bound speaks of a photo and is not compared"
        )
        return Claim(None, None, why)
    return Claim(float(privacy["epsilon"]), float(privacy["delta"]))
