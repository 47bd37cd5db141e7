"""From the feature space of one recogniser to that of another, by a linear map fitted on strangers' photos.

Whoever holds templates of one recogniser and a database of another links the two so: features of the same photos in both are
nearly a linear function of each other (McNeely-White et al. 2022). The other recogniser here is one that the attacker trains on
its strangers alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedgc.models import as_bytes, embed

RIDGES = np.logspace(-4, 3, 15)


def adapter(source: Tensor, target: Tensor) -> Tensor:
    """(d, d') ridge regression of unit features target (n, d') on source (n, d), without an offset since directions are what is
    mapped; its weight by generalised cross-validation over the photos."""
    from sklearn.linear_model import RidgeCV

    fit = RidgeCV(alphas=RIDGES, fit_intercept=False).fit(source.double().numpy(), target.double().numpy())
    return torch.from_numpy(fit.coef_.T.copy()).float()


def adapted(source: nn.Module, target: nn.Module, faces: Tensor) -> Tensor:
    """The adapter between two backbones, fitted on faces float32 (N, 3, S, S)."""
    photos = as_bytes(faces)
    return adapter(embed(source, photos), embed(target, photos))
