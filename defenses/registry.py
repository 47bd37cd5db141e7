"""Every defense, by name. A new one is a file, and one name here."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from defenses.blinded_correction import BlindedCorrection
from defenses.dp_sgd import DPSGD
from defenses.none import NoDefense
from fedgc.doors import Defense

AnyDefense = Annotated[NoDefense | DPSGD | BlindedCorrection, Field(discriminator="name")]
DEFENSES: dict[str, type[Defense]] = {
    str(kind.model_fields["name"].default): kind for kind in get_args(get_args(AnyDefense)[0])
}
