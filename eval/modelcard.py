"""The model card of a report: what was trained, on whom, what it is for and what it is not for (after Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.results import METRICS, Cell, algorithm_name
from eval.wording import NO_GUARANTEE, interval, unit_of
from eval.wording import number as printed

FOR = (
    "Research on what federated training of face recognisers leaks and what protection costs: comparing algorithms, defenses and "
    "attacks under one protocol."
)
NOT_FOR = (
    "Recognising, finding or admitting people. Accuracy was measured on few people and on no group of them apart, so that errors "
    "for any one group may be far larger than these figures; no threshold here is fit for a decision about a person."
)
RISKS = (
    "Embeddings and class embeddings are biometric templates; a face can be rebuilt from them. Whoever holds a run directory "
    "holds such templates, and photos in its owner-only folders. " + NO_GUARANTEE.capitalize() + "."
)


def model_card(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Terms and words; what differs between configurations is listed with each value once."""
    configs = [c.first.config for c in cells]
    data = [c.first.about for c in cells]
    utility = [v for c in cells if (v := c.utility("auc")).value is not None]
    ends = sorted(utility, key=lambda v: v.value or 0.0)
    text = [f"{printed(v.value or 0.0, unit_of('auc'))} {interval(v, unit_of('auc'))}".strip() for v in ends]
    accuracy = "not measured" if not text else text[0] if len(text) == 1 else f"{text[0]} to {text[-1]}"
    people = _each([str(a.get("utility", {}).get("identities", "?")) for a in data])
    return [
        ("Kind", "Networks that turn a face into a template (an embedding of unit length), compared by cosine"),
        ("Trained by", _each([algorithm_name(c.algorithm) for c in cells]) + ", over " + _each(
            [f"{a.get('clients', '?')} clients and {a.get('rounds', '?')} rounds" for a in data])),
        ("Network", _each([_network(c) for c in configs])),
        ("Head while training", _each([_head(c) for c in configs])),
        ("Began with", _each([_beginning(a) for a in data])),
        ("Trained on", _each([f"{a.get('images', '?')} photos of {a.get('classes', '?')} people ({a.get('source', '?')})"
                              for a in data])),
        (METRICS["auc"][0], f"{accuracy}, on {people} people who were not trained on; all figures in section 3"),
        ("Intended use", FOR), ("Not for", NOT_FOR), ("Known risks", RISKS),
    ]  # fmt: skip


def _each(values: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _network(config: dict[str, Any]) -> str:
    model, size = config.get("model", {}), config.get("data", {}).get("image_size")
    parts = [str(model.get("backbone", "as configured")), f"{model['norm']} norm" if model.get("norm") else ""]
    parts.append(f"{model['embedding_size']} values" if model.get("embedding_size") else "")
    return ", ".join(filter(None, [*parts, f"photos of {size} x {size} pixels" if size else ""]))


def _head(config: dict[str, Any]) -> str:
    head = config.get("head", {})
    if not head:
        return "as configured"
    margin = f"margin {head['margin_size']}" if head.get("margin_size") is not None else ""
    return ", ".join(
        filter(None, [str(head.get("margin")), margin, f"scale {head['scale']}" if head.get("scale") else ""])
    )


def _beginning(about: dict[str, Any]) -> str:
    init = about.get("init")
    return (
        "random weights"
        if not init
        else f"public weights ({init.get('source', init) if isinstance(init, dict) else init})"
    )
