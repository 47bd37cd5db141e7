"""Every attack by the name that selects it. To add one: write its file, and name it here and in the union
below."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from attacks.embedding_recovery import EmbeddingRecovery
from attacks.identity_linkage import IdentityLinkage
from attacks.inverting_gradients import GradientInversion
from attacks.label_inference import LabelInference
from fedgc.types import Attack

ATTACKS: dict[str, type[Attack]] = {
    cls.model_fields["name"].default: cls
    for cls in (LabelInference, EmbeddingRecovery, GradientInversion, IdentityLinkage)
}

AnyAttack = Annotated[
    LabelInference | EmbeddingRecovery | GradientInversion | IdentityLinkage, Field(discriminator="name")
]
