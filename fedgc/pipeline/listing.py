"""list: what can be chosen from, as rows."""

from __future__ import annotations

from typing import Any

from attacks.registry import ATTACKS
from defenses.registry import DEFENSES
from fedgc.algorithms import ALGORITHMS
from fedgc.data.fetch import SOURCES
from fedgc.models import BACKBONES
from fedgc.pipeline.judges import listed
from fedgc.threats import THREATS


def listing(kind: str) -> list[dict[str, Any]]:
    """Rows of {"name": …, …} for attacks, defenses, threats, algorithms, models, judges or datasets."""
    match kind:
        case "attacks":
            return [
                {
                    "name": name, "what": a.summary, "reads": "single steps" if a.target == "step" else "whole rounds",
                    "needs": [" + ".join(sorted(need)) for need in a.needs],
                    "settings": [f"{f}={i.default}" for f, i in a.model_fields.items() if f != "name"],
                }
                for name, a in ATTACKS.items()
            ]  # fmt: skip
        case "defenses":
            return [
                {"name": n, "what": d.summary, "settings": [f for f in d.model_fields if f != "name"]}
                for n, d in DEFENSES.items()
            ]
        case "threats":
            return [
                {"name": t.name, "who": t.position, "behaviour": t.behaviour, "holds at most": sorted(t.grants)}
                for t in THREATS.values()
            ]
        case "algorithms":
            return [{"name": a.name, "what": a.summary, "class embeddings": a.head} for a in ALGORITHMS.values()]
        case "models":
            return [
                {
                    "name": name, "what": b.summary, "parameters": b.parameters,
                    "counted at": f"{b.side} px, {b.features} features",
                    "takes": f"photos >= {b.smallest} px" + (f", {b.features} features only" if b.fixed else ""),
                }
                for name, b in BACKBONES.items()
            ]  # fmt: skip
        case "judges":
            return listed()
        case _:
            return [
                {"name": "synthetic", "what": "built-in synthetic faces, 120 people with 12 photos each"},
                {"name": "synthetic:PEOPLExPHOTOS", "what": "the same, with your numbers"},
                {"name": "FOLDER", "what": "one sub-folder of photos a person (JPEG, PNG, PPM/PGM, BMP, WebP)"},
                *(
                    {"name": f"faces/{s.name}", "what": f"after `data fetch {s.name}`: {s.what}; {s.terms}"}
                    for s in SOURCES.values()
                ),
            ]
