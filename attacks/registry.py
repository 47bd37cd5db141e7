"""Every attack by the name that selects it. To add one: write its file, and name it here and in the union
below."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from attacks.canary_inference import CanaryInference
from attacks.candidates import CandidateMatch
from attacks.correction_probe import CorrectionProbe
from attacks.embedding_recovery import EmbeddingRecovery
from attacks.feature_inversion import FeatureInversion
from attacks.gradient_inversion import GradientInversion
from attacks.identity_linkage import IdentityLinkage
from attacks.label_inference import LabelInference
from attacks.membership import MembershipInference
from attacks.template_inversion import TemplateInversion
from fedgc.types import Attack

ATTACKS: dict[str, type[Attack]] = {
    cls.model_fields["name"].default: cls
    for cls in (
        LabelInference, EmbeddingRecovery, FeatureInversion, GradientInversion, IdentityLinkage, TemplateInversion,
        CorrectionProbe, MembershipInference, CandidateMatch, CanaryInference,
    )
}  # fmt: skip

AnyAttack = Annotated[
    LabelInference
    | EmbeddingRecovery
    | FeatureInversion
    | GradientInversion
    | IdentityLinkage
    | CorrectionProbe
    | MembershipInference
    | TemplateInversion
    | CandidateMatch
    | CanaryInference,
    Field(discriminator="name"),
]
