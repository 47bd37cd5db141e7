"""What the published methods of gradient inversion choose, side by side with ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attacks.gradient_matching import Optimizer
from attacks.objectives import Metric


@dataclass(frozen=True)
class Method:
    """The choices that a paper makes. labels: by the rows' directions (`head_algebra`), by the sign of a row's sum (iDLG), or
    searched with the pixels (DLG). start: "mean" face or random pixels. polish: whether all pixels are searched at the end."""

    metric: Metric
    optimizer: Optimizer
    step_size: float
    iterations: int
    prior: Literal["faces", "pixels"]
    labels: Literal["rows", "sums", "searched"] = "rows"
    total_variation: float = 0.0
    restarts: int = 1
    group: float = 0.0
    start: Literal["mean", "random"] = "random"
    polish: bool = False


METHODS: dict[str, Method] = {
    "cascade": Method("cosine", "adam", 0.2, 800, "faces", start="mean", polish=True),
    "inverting-gradients": Method("cosine", "signed-adam", 0.1, 4800, "pixels", total_variation=1.0),
    "gradinversion": Method("l2", "adam", 0.1, 2000, "pixels", total_variation=0.01, restarts=4, group=0.01),
    "idlg": Method("l2", "lbfgs", 1.0, 300, "pixels", labels="sums"),
    "dlg": Method("l2", "lbfgs", 1.0, 300, "pixels", labels="searched"),
}
