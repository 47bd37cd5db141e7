"""What a report says in words. Every sentence is made from the figures it stands on, and claims no more than their interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.empirical import alarms, statement
from eval.privacy import rero_from_profile
from eval.results import METRICS, Cell, Spread, algorithm_name, defense_text, epsilon_text
from eval.wording import NO_GUARANTEE, interval, number


def measured(value: Spread, metric: str) -> str:
    unit = METRICS[metric][1] if metric in METRICS else ""
    assert value.value is not None
    return f"{number(value.value, unit)} {interval(value, unit)}".strip()


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Promises that were found false; then three sentences: what another client learns, what the server learns, and what epsilon
    buys."""
    federated = [c for c in cells if c.algorithm != "centralized"]
    weakest = list({c.algorithm: c for c in reversed(federated)}.values())[::-1]  # cells start with the least protected
    if not any(run.attacks for cell in cells for run in cell.runs):
        return ["No attack was run, so that nothing is said about leakage.", _bought(cells)]
    return [*alarms(cells), _client_sentence(weakest), _server_sentence(weakest), _bought(cells)]


def _client_sentence(weakest: Sequence[Cell]) -> str:
    parts = []
    for cell in weakest:
        entry = cell.first.leading("identity-linkage", "client")
        if entry is None:
            parts.append(f"under {_name(cell)} nobody tried to link class embeddings from a client's seat")
        elif entry.get("refused"):
            withheld = "class-embeddings" not in entry.get("granted", ())
            reach = "no other client's class embedding reaches it" if withheld else "the attack could not start"
            parts.append(f"under {_name(cell)} {reach}{_still(cell)}")
        else:
            found = cell.attack("identity-linkage", "client", "rank1")
            parts.append(
                f"under {_name(cell)} a curious client re-identifies {_rate(found, 'people from class embeddings')}"
                if found.value is not None
                else f"under {_name(cell)} a curious client's attempts to re-identify people gave no figure ({found.why})"
            )
    return _sentence("; ".join(parts) or "no federated run was attacked")


def _still(cell: Cell) -> str:
    """What a client gets all the same, where no class embedding reaches it."""
    gain = cell.attack("gradient-inversion", "client", "psnr_gain")
    if gain.value is None or not _above(gain):
        return ""
    found = f"{measured(gain, 'psnr_gain')} above the mean face ({_caveats(gain)})"
    return f", but it rebuilds single photos from the others' mean update at {found}"


def _server_sentence(weakest: Sequence[Cell]) -> str:
    """What the server receives is read from the grants, never assumed."""
    both = [c for c in weakest if {"client-updates", "class-embeddings"} <= _server_grants(c)]
    rank = _per_algorithm(weakest, "identity-linkage", "rank1", lambda v: _rate(v, "people"))
    gain = _per_algorithm(
        weakest, "gradient-inversion", "psnr_gain",
        lambda v: f"{measured(v, 'psnr_gain')} above the mean face ({_caveats(v)})",
    )  # fmt: skip
    found = [f"re-identifies {rank}"] if rank else []
    found += [f"rebuilds single photos at {gain}"] if gain else []
    alike = " alike" if len(both) > 1 else ""
    opening = f"the server receives every client's update and class embeddings under {_listed([_name(c) for c in both])}{alike}"
    if not found:
        nothing = "no attack from the server's seat gave a figure"
        return _sentence(f"{opening}; {nothing}" if both else nothing)
    return _sentence(f"{opening}: it {_listed(found)}" if both else f"the server {_listed(found)}")


def _server_grants(cell: Cell) -> set[str]:
    return {g for run in cell.runs for e in run.entries if e["threat"] == "server" for g in e.get("granted", ())}


def _per_algorithm(weakest: Sequence[Cell], attack: str, metric: str, words: Callable[[Spread], str]) -> str:
    values = [(c, v) for c in weakest if (v := c.attack(attack, "server", metric)).value is not None]
    return _listed([f"{words(v)} under {_name(c)}" for c, v in values])


def _bought(cells: Sequence[Cell]) -> str:
    promised = [c for c in cells if c.epsilon is not None]
    withheld = [c for c in cells if c.withheld]
    if not promised and withheld:
        of = _listed([_name(c) for c in withheld])
        return f"No ε stands: what ran is not what was accounted for, so that it is withheld of {of} (section 7); {NO_GUARANTEE}."
    if not promised:
        return f"No run was trained with differential privacy, so that nothing bounds what a better attack finds: {NO_GUARANTEE}."
    parts = []
    for algorithm in dict.fromkeys(c.algorithm for c in promised):
        mine = [c for c in cells if c.algorithm == algorithm]
        first, last = mine[0], [c for c in mine if c.epsilon is not None][-1]
        if first is last:
            parts.append(f"under {algorithm_name(algorithm)} at {_promise(last)}, AUC is {_auc(last)}")
            continue
        way = f"under {algorithm_name(algorithm)}, from {defense_text(first.first)} to {_promise(last)}"
        shares = _shares(first, last)
        parts.append(f"{way}, AUC goes from {_plain(first)} to {_auc(last)}{f', and {shares}' if shares else ''}")
    return f"{_sentence('; '.join(parts))[:-1]}; {NO_GUARANTEE}."


def _shares(first: Cell, last: Cell) -> str:
    before, after = (c.attack("identity-linkage", "server", "rank1") for c in (first, last))
    if before.value is None or after.value is None:
        return ""
    return f"the share of people whom the server names from {measured(before, 'rank1')} to {_rate(after, '')}"


def _plain(cell: Cell) -> str:
    trained = cell.utility("auc")
    return f"no figure ({trained.why})" if trained.value is None else measured(trained, "auc")


def _promise(cell: Cell) -> str:
    assert cell.epsilon is not None
    return f"{cell.first.about['privacy'].get('unit', 'image')}-level ε = {epsilon_text(cell.epsilon)}"


def _auc(cell: Cell) -> str:
    trained, untrained = cell.utility("auc"), cell.utility("auc", "untrained")
    if trained.value is None:
        return f"no figure ({trained.why})"
    text = measured(trained, "auc")
    if untrained.value is None:
        return text
    apart = trained.low is not None and trained.low > untrained.value
    return f"{text} ({'' if apart else 'not told from '}untrained {number(untrained.value, '')})"


def _rate(found: Spread, what: str) -> str:
    noun = f" of {found.n} {what}" if found.n and what else ""
    if found.chance is None:
        return f"{measured(found, 'rank1')}{noun}"
    chance = (
        f"chance {number(found.chance, '%')}" if _above(found) else f"not told from chance, {number(found.chance, '%')}"
    )
    return f"{measured(found, 'rank1')}{noun} ({chance})"


def _caveats(found: Spread) -> str:
    count = f"{found.n} people" if found.n else "no count of people"
    return count if _above(found) else f"{count}, not told from it"


def _above(found: Spread) -> bool:
    """Whether the whole interval lies above chance, or above zero where chance is not given."""
    return found.low is not None and found.low > (found.chance or 0.0)


def _name(cell: Cell) -> str:
    text = defense_text(cell.first)
    return algorithm_name(cell.algorithm) + ("" if text == "no defense" else f" ({text})")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


TERMS = {
    "unit": "Unit",
    "adjacency": "Neighbouring relation",
    "delta": "δ",
    "accountant": "Accountant",
    "epsilon_pld": "ε by another library (PLD)",
    "pld": "PLD by",
    "epsilon_identity": "ε of a person with all photos (PLD, mixture)",
    "photos_of_a_person": "The most photos of a person in a client",
    "sampling": "Sampling, as run",
    "sample_rate": "Sample rate q",
    "steps": "Steps T of the busiest client",
    "noise_multiplier": "Noise multiplier σ",
    "max_grad_norm": "Clipping norm C",
    "clipping": "What is clipped",
    "composition": "Composition over clients",
    "covers": "Inside the mechanism",
    "outside": "Outside the promise",
    "randomness": "Randomness",
}
VIEW = "the server, which sees every noised update of every round; whoever sees less is covered too"


def accounting(cells: Sequence[Cell]) -> dict[str, Any]:
    """The whole statement that each epsilon needs: terms that all share once, the others as one row a cell."""
    promised = [c for c in cells if c.epsilon is not None]
    statements = {c.label: _statement(c) for c in promised}
    names = list(dict.fromkeys(name for statement in statements.values() for name in statement))
    own = [n for n in names if len({s.get(n) for s in statements.values()}) > 1]
    shared = [(n, next(iter(statements.values()))[n]) for n in names if n not in own]
    rows = [(label, [statement.get(n, "") for n in own]) for label, statement in statements.items() if own]
    seeded = [c.label for c in promised if c.first.config.get("defense", {}).get("noise_seed") is not None]
    return {"shared": shared, "columns": own, "rows": rows, "warnings": _warnings(promised, seeded),
            "withheld": [(c.label, c.withheld) for c in cells if c.withheld]}  # fmt: skip


def _statement(cell: Cell) -> dict[str, str]:
    p: Mapping[str, Any] = cell.first.about["privacy"]
    asked = f" (asked for: at most {p['target_epsilon']:g})" if p.get("target_epsilon") else ""
    terms = {"ε": f"{p['epsilon']:.4g}{asked}", **statement(cell)}
    for key, name in TERMS.items():
        if p.get(key) is not None:
            terms[name] = f"{p[key]:.4g}" if isinstance(p[key], float) else str(p[key])
    photos = _photos(cell)
    if p.get("unit", "image") == "image" and photos > 1 and p.get("epsilon_identity") is None:
        terms[f"All {photos} photos of a person"] = _group(p["epsilon"], p["delta"], photos)
    for candidates in (100, 1000):
        pairs = [*(p.get("profile") or ()), (p["epsilon"], p["delta"])]
        gamma = rero_from_profile([e for e, _ in pairs], [d for _, d in pairs], 1 / candidates)
        terms[f"γ at 1 in {candidates}"] = "no bound" if gamma >= 1 else f"{100 * gamma:.2g} %"
    return {**terms, "Tuning runs": "not counted", "Adversary's view": p.get("view", VIEW)}


def _photos(cell: Cell) -> int:
    """Trained photos of a person, on average."""
    return round(cell.first.about.get("images", 0) / max(1, cell.first.about.get("classes", 1)))


def _group(epsilon: float, delta: float, photos: int) -> str:
    """Group privacy: k photos have (k·ε, k·exp((k-1)·ε)·δ)."""
    exponent = (photos - 1) * epsilon + math.log(photos * delta)
    return f"ε = {epsilon_text(photos * epsilon)}, " + (
        "δ > 1: void" if exponent >= 0 else f"δ = {math.exp(exponent):.2g}"
    )


def _warnings(promised: Sequence[Cell], seeded: Sequence[str]) -> list[str]:
    out = []
    if any(c.first.about["privacy"].get("unit", "image") == "image" for c in promised):
        out.append(
            "Image-level is not person-level: ε bounds what one photo changes. A person whose photos were all trained on is "
            "protected far less; what is left for all of them together is in the statement above."
        )
    if seeded:
        whose = "; ".join(seeded) if len(seeded) < len(promised) else "every run with an ε"
        out.append(
            f"The noise of {whose} came from a seed that is written in the configuration. Whoever knows it can "
            "subtract the noise, so that these runs show the cost of a defense and protect nobody: leave defense.noise_seed "
            "unset where real people are concerned."
        )
    return out
