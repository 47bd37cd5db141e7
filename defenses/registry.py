"""Every defense, by name. A new one is a file, and one name here."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from defenses.blinded_correction import BlindedCorrection
from defenses.client_dp import ClientDP
from defenses.clip_only import ClipOnly
from defenses.correction_noise import CorrectionNoise
from defenses.dp_sgd import DPSGD
from defenses.embedding_noise import EmbeddingNoise
from defenses.none import NoDefense
from defenses.pruning import Pruning
from defenses.quantization import Quantization
from defenses.row_step_bound import RowStepBound
from defenses.secure_aggregation import SecureAggregation
from fedgc.doors import Defense

AnyDefense = Annotated[
    NoDefense | DPSGD | ClientDP | ClipOnly | Pruning | Quantization | SecureAggregation | EmbeddingNoise
    | CorrectionNoise | RowStepBound | BlindedCorrection,
    Field(discriminator="name"),
]  # fmt: skip
DEFENSES: dict[str, type[Defense]] = {
    str(kind.model_fields["name"].default): kind for kind in get_args(get_args(AnyDefense)[0])
}
