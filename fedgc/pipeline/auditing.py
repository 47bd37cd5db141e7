"""audit: attack the mechanism itself, many times, and hold what is found against the epsilon that it is accounted for.

The attacker knows everything but whether the canary is there. It tries many statistics of what a run let out, chooses one, and
a threshold, on half of the runs, and is counted on the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from defenses.client_dp import ClientDP
from defenses.dp_sgd import DPSGD
from eval.audit import FLAGGED, REPORTED, LowerBound, Method, PresenceTest, choose_test, discriminant, lower_bound
from fedgc.algorithms import ALGORITHMS, Algorithm
from fedgc.config import Config
from fedgc.doors import Defense
from fedgc.errors import UsageError
from fedgc.pipeline.watch import Watch, silent
from fedgc.pipeline.worlds import Canary, Floats, LocalTraining, Released, WholeUpdates, Worlds
from fedgc.rng import stream_seed

RUNS, ROUNDS, FEWEST = 1000, 2, 20


@dataclass(frozen=True)
class Found:
    """What the best of the tests that were tried shows on the counted runs. flagged: the bound that is held against the claim."""

    canary: Canary
    test: PresenceTest
    reported: LowerBound
    flagged: LowerBound


def audit(
    defense: Defense,
    *,
    runs: int = RUNS,
    rounds: int = ROUNDS,
    rate: float = 1.0,
    seed: int = 0,
    algorithm: Algorithm = ALGORITHMS["fedgc"],
    watch: Watch = silent,
) -> dict[str, Any]:
    """Audit a defense that promises an epsilon; the document of ``audit --json``.

    runs: in each world, half of which are counted. rounds: releases of a run. rate: share of photos, or people, in a batch of
    dp-sgd; at 1 the mechanism is Gaussian, and the attack strongest. algorithm: whose messages client-dp covers. A target
    epsilon is one of what is played here. Raises UsageError where the defense promises nothing.
    """
    if runs < FEWEST or rounds < 1 or not 0 < rate <= 1:
        what = f"{FEWEST} runs or more, a round or more and a rate in (0, 1]"
        raise UsageError(f"an audit needs {what}, got {runs}, {rounds} and {rate:g}")
    worlds = _worlds(defense, rounds, rate, algorithm, seed)
    claim = worlds.defense.spent(worlds.charges)
    assert claim is not None
    method: Method = "gaussian" if all(c.sample_rate == 1 for c in worlds.charges) else "clopper-pearson"
    found = _attack(worlds, runs, seed, float(claim["delta"]), method, watch)
    said = ("unit", "delta", "accountant", "adjacency", "sample_rate", "randomness")
    return {
        "defense": worlds.defense.card(), "claimed": claim["epsilon"], **{key: claim[key] for key in said},
        "rounds": rounds, "runs": runs, "method": method, "canary": found.canary, "statistic": found.test.name,
        "epsilon_lower_bound": _document(found.reported), "flagged": _document(found.flagged),
        "exceeded": found.flagged.value > claim["epsilon"], "verdict": _verdict(claim["epsilon"], found),
    }  # fmt: skip


def _attack(worlds: Worlds, runs: int, seed: int, delta: float, method: Method, watch: Watch) -> Found:
    """Try every canary and statistic on the first half of the runs, and count the best of them on the second."""
    half, done = runs // 2, count(1)
    total = (1 + len(worlds.canaries)) * half + 2 * (runs - half)
    play = partial(_play, worlds, seed, lambda: watch("auditing", next(done), total))
    absent, chosen = play(None, 0, half), {}
    for canary in worlds.canaries:
        present = play(canary, 0, half)
        test = choose_test(present, absent, list(_statistics(worlds, present, absent)), delta, method)
        bound = _count(test, present, absent, delta, method, REPORTED)
        chosen[canary] = (bound.value, bound.true_positive - bound.false_positive, test)
    canary = max(chosen, key=lambda c: chosen[c][:2])
    test = chosen[canary][-1]
    present, absent = play(canary, half, runs), play(None, half, runs)
    reported, flagged = (_count(test, present, absent, delta, method, c) for c in (REPORTED, FLAGGED))
    return Found(canary, test, reported, flagged)


def audit_config(config: Config, runs: int = RUNS, watch: Watch = silent) -> dict[str, Any]:
    """Audit the defense of a configuration under its algorithm."""
    algorithm = ALGORITHMS[config.federation.algorithm]
    if isinstance(config.defense, ClientDP) and algorithm.alone:
        raise UsageError(f"client-dp changes what clients send, and under {algorithm.name} none does: nothing to audit")
    return audit(config.defense, runs=runs, seed=config.seed, algorithm=algorithm, watch=watch)


def _worlds(defense: Defense, rounds: int, rate: float, algorithm: Algorithm, seed: int) -> Worlds:
    if isinstance(defense, DPSGD):
        return LocalTraining(defense, rounds, rate, seed)
    if isinstance(defense, ClientDP):
        return WholeUpdates(defense, rounds, algorithm, seed)
    raise UsageError(
        f"{defense.name} promises no epsilon that an audit could hold it to: audit dp-sgd or client-dp "
        "(--set defense.name=dp-sgd --set defense.epsilon=8), or attack a run"
    )


# -- what the attacker looks at


def _play(worlds: Worlds, seed: int, step: Callable[[], None], canary: Canary | None, first: int, last: int) -> Floats:
    """What the attacker reads in runs first..last - 1 of one world: (n, F)."""
    read = []
    for number in range(first, last):
        key = stream_seed(seed, "audit", canary or "absent", number)
        read.append(_features(worlds, worlds.play(canary, key)))
        step()
    return np.stack(read)


class Column(NamedTuple):
    """One feature. gradient: the round whose canary's gradient it is along; the same round for other kinds."""

    kind: Literal["along", "length", "alike", "failed"]
    round: int
    gradient: int
    block: str


def _columns(worlds: Worlds) -> list[Column]:
    """In the order of `_features`."""
    rounds = range(len(worlds.directions))
    return [
        *(Column("along", r, s, block) for r in rounds for s in rounds for block in worlds.blocks),
        *(Column("length", r, r, block) for r in rounds for block in worlds.blocks),
        *(Column("alike", r, r, "") for r in rounds[1:]),
        Column("failed", 0, 0, ""),
    ]


def _features(worlds: Worlds, released: Released) -> Floats:
    """Per round and block: the release along the canary's gradient in every round, and its length; how alike consecutive rounds
    are (cosine); how many failed. (F,), the others zero where one failed."""
    arrived = [release for release in released if release is not None]
    failed = len(released) - len(arrived)
    if failed:
        return np.array([*[0.0] * (len(_columns(worlds)) - 1), failed])
    parts = [(worlds.directions[:, part], [release[part] for release in arrived]) for part in worlds.blocks.values()]
    # (blocks, rounds, rounds) and (blocks, rounds)
    along = np.array([[gradients @ release for release in releases] for gradients, releases in parts])
    length = np.array([[np.linalg.norm(release) for release in releases] for _, releases in parts])
    directions = [release / max(float(np.linalg.norm(release)), 1e-300) for release in arrived]
    alike = [float(first @ second) for first, second in pairwise(directions)]
    return np.concatenate([along.transpose(1, 2, 0).ravel(), length.T.ravel(), alike, [0.0]])


def _statistics(worlds: Worlds, present: Floats, absent: Floats) -> Iterator[tuple[str, Floats]]:
    """All that are tried, as weights of the features (F,); the last is learned from these runs."""
    columns = _columns(worlds)
    of = partial(_sum, columns)
    for sign in (1, -1):
        yield "rounds that failed", sign * of("failed")
    yield "updates along the canary's gradient", of("along")
    for block in worlds.blocks:
        yield f"{block} along the canary's gradient", of("along", block=block)
    for r in range(len(worlds.directions)):
        yield f"round {r + 1} along the canary's gradient", of("along", round=r)
    for sign in (1, -1):
        yield from ((f"length of the updates of {block}", sign * of("length", block=block)) for block in worlds.blocks)
        yield "how alike consecutive rounds are", sign * of("alike")
    along = [n for n, column in enumerate(columns) if column.kind == "along"]
    yield "a combination of rounds and blocks", discriminant(present, absent, along)


def _sum(columns: Sequence[Column], kind: str, round: int | None = None, block: str | None = None) -> Floats:
    """Weights that add up the features of a kind, each round's along the canary's gradient in that round."""
    return np.array(
        [
            float(c.kind == kind and c.gradient == c.round and round in (None, c.round) and block in (None, c.block))
            for c in columns
        ]
    )


# -- what is said of it


def _count(
    test: PresenceTest, present: Floats, absent: Floats, delta: float, method: Method, confidence: float
) -> LowerBound:
    return lower_bound(test.positives(present), test.positives(absent), len(present), delta, method, confidence)


def _document(bound: LowerBound) -> Mapping[str, Any]:
    return {
        "value": bound.value, "ceiling": bound.ceiling, "confidence": bound.confidence, "n": bound.runs,
        "true_positive_rate": bound.true_positive, "false_positive_rate": bound.false_positive,
    }  # fmt: skip


def _verdict(claimed: float, found: Found) -> str:
    """One sentence."""
    reported, flagged = found.reported, found.flagged
    surely, claims = f"{100 * flagged.confidence:g} %", f"{claimed:.3g} is claimed"
    if flagged.value > claimed:
        return (
            f"the code does not keep its promise: at {surely} confidence it lets through what "
            f"{'a Gaussian mechanism' if flagged.method == 'gaussian' else 'a mechanism'} does from epsilon {flagged.value:.3g} "
            f"on, and {claims} (canary: {found.canary}; seen in: {found.test.name})"
        )
    if flagged.ceiling <= claimed:
        return (
            f"nothing can be said: at {surely} confidence no attack on {flagged.runs} counted runs shows more than "
            f"{flagged.ceiling:.3g}, and {claims}; take more runs, or audit with more noise"
        )
    if reported.value > claimed:
        return (
            f"look again with more runs: the bound at {100 * reported.confidence:g} % confidence is above the claimed "
            f"{claimed:.3g}, as it may be by chance, and at {surely} it is {flagged.value:.3g}"
        )
    return f"no bug found: the bound does not exceed the {claimed:.3g} that is claimed, which proves no privacy"
