"""What may be said where an attack found nothing. The support rules of the report, in one place.

Zero successes of n targets still allow a rate of 1 - 0.05^(1/n) (one-sided, 95 %): 13.9 % of 20, 3.0 % of 100. So below
`ENOUGH` targets a failure is a failure, and no sentence bounds what leaks; from there on the upper end of the interval is the
sentence. Nothing ever says that something does not leak.
"""

from __future__ import annotations

import re

from eval.results import Spread
from eval.wording import number

ENOUGH = 100  # targets from which on a failed attack is given a bound in words
FORBIDDEN = re.compile(
    r"(?:does|do|did) not leak\b|\bno leak(?:age)?\b|leaks? nothing|\bis (?:private|safe|anonymous)\b"
    r"|cannot be rebuilt|fully protected|perfectly private",
    re.IGNORECASE,
)  # fmt: skip
ALLOWED = re.compile(
    r"no sentence here says that something does not leak", re.IGNORECASE
)  # the rule itself, in the limits


def may_bound(n: int | None) -> bool:
    """Whether a failure on so many targets supports a sentence about the most that such an attack gets."""
    return n is not None and n >= ENOUGH


def absence(value: Spread, unit: str) -> str:
    """What to say of a figure that is not told from chance."""
    if value.value is None:
        return "no figure"
    if may_bound(value.n) and value.high is not None:
        return f"not told from chance; this attack gets {number(value.high, unit)} at most (95 %)"
    count = f"{value.n} targets" if value.n is not None else "an unknown number of targets"
    return f"not told from chance on {count}, too few to say more"


def overclaims(text: str) -> list[str]:
    """Phrases in a text that claim more than an attack can show."""
    return [match.group() for match in FORBIDDEN.finditer(ALLOWED.sub("", " ".join(text.split())))]
