"""audit: attack the mechanism itself, many times, and hold what is found against the epsilon that it is accounted for.

The attacker knows everything but whether the canary is there. It tries many statistics of what a run let out, chooses one, and
a threshold, on half of the runs, and is counted on the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from defenses.client_dp import ClientDP
from defenses.dp_sgd import DPSGD
from eval.audit import FLAGGED, REPORTED, LowerBound, Method, choose_test, discriminant, lower_bound
from fedgc.algorithms import ALGORITHMS, Algorithm
from fedgc.config import Config
from fedgc.doors import Defense
from fedgc.errors import UsageError
from fedgc.pipeline.watch import Watch, silent
from fedgc.pipeline.worlds import Canary, Floats, LocalTraining, Released, WholeUpdates, Worlds
from fedgc.rng import stream_seed

RUNS, ROUNDS, FEWEST = 1000, 2, 20
Statistics = Sequence[tuple[str, Floats]]


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
        raise UsageError(f"an audit needs {FEWEST} runs, one round and a rate in (0, 1], got {runs}, {rounds} and {rate:g}")
    worlds = _worlds(defense, rounds, rate, algorithm, seed)
    claim = worlds.defense.spent(worlds.charges)
    assert claim is not None
    delta = float(claim["delta"])
    method: Method = "gaussian" if all(c.sample_rate == 1 for c in worlds.charges) else "clopper-pearson"
    half = runs // 2
    total, done = (1 + len(worlds.canaries)) * half + 2 * (runs - half), iter(range(1, 10**9))
    step = lambda: watch("auditing", next(done), total)  # noqa: E731
    play = partial(_play, worlds, seed, step)
    absent = play(None, 0, half)
    tried = {canary: play(canary, 0, half) for canary in worlds.canaries}
    chosen = {c: choose_test(p, absent, list(_statistics(worlds, p, absent)), delta, method) for c, p in tried.items()}
    on_first = {c: _count(chosen[c], tried[c], absent, delta, method, REPORTED) for c in tried}
    canary = max(on_first, key=lambda c: (on_first[c].value, on_first[c].true_positive - on_first[c].false_positive))
    present, absent = play(canary, half, runs), play(None, half, runs)
    reported, flagged = (_count(chosen[canary], present, absent, delta, method, c) for c in (REPORTED, FLAGGED))
    return {
        "defense": worlds.defense.card(), "unit": claim["unit"], "claimed": claim["epsilon"], "delta": delta,
        "accountant": claim["accountant"], "adjacency": claim["adjacency"], "sample_rate": claim["sample_rate"],
        "rounds": rounds, "runs": runs, "method": method, "canary": canary, "statistic": chosen[canary].name,
        "epsilon_lower_bound": _document(reported), "flagged": _document(flagged),
        "exceeded": flagged.value > claim["epsilon"],
        "verdict": _verdict(claim["epsilon"], reported, flagged, canary, chosen[canary].name),
    }  # fmt: skip


def audit_config(config: Config, runs: int = RUNS, watch: Watch = silent) -> dict[str, Any]:
    """Audit the defense of a configuration under its algorithm."""
    algorithm = ALGORITHMS[config.federation.algorithm]
    if isinstance(config.defense, ClientDP) and algorithm.alone:
        raise UsageError(f"client-dp changes what clients send, and under {algorithm.name} none does: nothing to audit")
    return audit(config.defense, runs=runs, seed=config.seed, algorithm=algorithm, watch=watch)


def _worlds(
    defense: Defense, rounds: int, rate: float, algorithm: Algorithm, seed: int
) -> LocalTraining | WholeUpdates:
    if isinstance(defense, DPSGD):
        return LocalTraining(defense, rounds, rate, seed)
    if isinstance(defense, ClientDP):
        return WholeUpdates(defense, rounds, algorithm, seed)
    raise UsageError(
        f"{defense.name} promises no epsilon that an audit could hold it to: audit dp-sgd or client-dp "
        "(--set defense.name=dp-sgd --set defense.epsilon=8), or attack a run"
    )


# -- what the attacker looks at


def _play(worlds: Worlds, seed: int, step: Any, canary: Canary | None, first: int, last: int) -> Floats:
    """What the attacker reads in runs first..last - 1 of one world: (n, F)."""
    read = []
    for number in range(first, last):
        key = stream_seed(seed, "audit", canary or "absent", number)
        read.append(_features(worlds, worlds.play(canary, key)))
        step()
    return np.stack(read)


def _columns(worlds: Worlds) -> list[tuple[str, int, int, str]]:
    """What each feature is: (kind, round, round of the canary's gradient, block), in the order of `_features`."""
    rounds = range(len(worlds.directions))
    columns = [("along", r, s, block) for r in rounds for s in rounds for block in worlds.blocks]
    columns += [("length", r, r, block) for r in rounds for block in worlds.blocks]
    columns += [("alike", r, s, "") for r, s in pairwise(rounds)]
    return [*columns, ("failed", 0, 0, "")]


def _features(worlds: Worlds, released: Released) -> Floats:
    """Per round and block: the release along the canary's gradient in every round, and its length; how alike consecutive rounds
    are (cosine); how many failed. (F,), the others zero where one failed."""
    arrived = [release for release in released if release is not None]
    failed = len(released) - len(arrived)
    if failed:
        return np.array([*[0.0] * (len(_columns(worlds)) - 1), failed])
    parts = [(worlds.directions[:, part], [release[part] for release in arrived]) for part in worlds.blocks.values()]
    along = np.array([[gradients @ release for release in releases] for gradients, releases in parts])  # block, round, round
    length = np.array([[np.linalg.norm(release) for release in releases] for _, releases in parts])  # block, round
    whole = [np.linalg.norm(release) for release in arrived]
    alike = [a @ b / max(m * n, 1e-300) for (a, m), (b, n) in pairwise(zip(arrived, whole, strict=True))]
    return np.concatenate([along.transpose(1, 2, 0).ravel(), length.T.ravel(), alike, [0.0]])


def _statistics(worlds: Worlds, present: Floats, absent: Floats) -> Iterator[tuple[str, Floats]]:
    """All that are tried, as weights of the features; the discriminant is learned from these runs."""
    columns = _columns(worlds)
    total = lambda holds: np.array([float(holds(*column)) for column in columns])  # noqa: E731
    failed = total(lambda kind, *_: kind == "failed")
    yield from (("rounds that failed", sign * failed) for sign in (1, -1))
    yield "updates along the canary's gradient", total(lambda kind, r, s, _: kind == "along" and r == s)
    for block in worlds.blocks:
        yield f"{block} along the canary's gradient", total(lambda k, r, s, b, at=block: k == "along" and r == s and b == at)
        longer = total(lambda k, r, s, b, at=block: k == "length" and b == at)
        yield from ((f"length of the updates of {block}", sign * longer) for sign in (1, -1))
    for r in range(len(worlds.directions)):
        yield f"round {r + 1} along the canary's gradient", total(lambda k, a, s, _, at=r: k == "along" and a == s == at)
    alike = total(lambda kind, *_: kind == "alike")
    yield from (("how alike consecutive rounds are", sign * alike) for sign in (1, -1) if alike.any())
    along = [n for n, (kind, *_) in enumerate(columns) if kind == "along"]
    yield "a combination of rounds and blocks", discriminant(present, absent, along)


# -- what is said of it


def _count(test: Any, present: Floats, absent: Floats, delta: float, method: Method, confidence: float) -> LowerBound:
    return lower_bound(test.positives(present), test.positives(absent), len(present), delta, method, confidence)


def _document(bound: LowerBound) -> Mapping[str, Any]:
    return {
        "value": bound.value, "ceiling": bound.ceiling, "confidence": bound.confidence, "n": bound.runs,
        "true_positive_rate": bound.true_positive, "false_positive_rate": bound.false_positive,
    }  # fmt: skip


def _verdict(claimed: float, reported: LowerBound, flagged: LowerBound, canary: Canary, statistic: str) -> str:
    """One sentence."""
    surely = f"{100 * flagged.confidence:g} %"
    if flagged.value > claimed:
        return (
            f"the code does not keep its promise: at {surely} confidence epsilon is at least {flagged.value:.3g}, and "
            f"{claimed:.3g} is claimed (canary: {canary}; seen in: {statistic})"
        )
    if flagged.ceiling <= claimed:
        return (
            f"nothing can be said: no attack on {flagged.runs} counted runs could show more than {flagged.ceiling:.3g}, and "
            f"{claimed:.3g} is claimed; take more runs, or audit with a smaller defense.epsilon"
        )
    if reported.value > claimed:
        return (
            f"look again with more runs: the bound at {100 * reported.confidence:g} % exceeds the claim of {claimed:.3g}, as it may "
            f"by chance, and at {surely} it is {flagged.value:.3g}"
        )
    return f"no bug found: the bound does not exceed the {claimed:.3g} that is claimed, which proves no privacy"
