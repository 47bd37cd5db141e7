"""From a name to a judge: dlib's, facenet-pytorch's, or a network that this tool trained on other people."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from eval.judges import Framing, Judge, dlib_judge, dlib_missing, network_judge
from fedgc.algorithms import backbone_part
from fedgc.config import read_toml
from fedgc.data.align import ARCFACE_TEMPLATE
from fedgc.errors import RunError, UsageError, WorkFailedError
from fedgc.files import read_tensors, sha256
from fedgc.models import BACKBONES, build_backbone, told_spec
from fedgc.pipeline.initial import around, fitting
from fedgc.pipeline.published import BACKBONE_OF_PUBLISHED, downloaded, read_published
from fedgc.runs import RunDirectory
from fedgc.types import BACKBONE, ModelSpec, Tensors

FACENET = "vggface2"
# dlib's chips: middle of the eyes from the top, and distance between them, in sides of a chip (padding .25)
DLIB_EYES, DLIB_BETWEEN = 0.314, 0.350
LFW_CROP = 0.52  # of the shorter side of a photo of LFW, for which CENTER was measured, on auxiliary people


def _of_template() -> Framing:
    """Where dlib's chip lies in a face that was aligned to ArcFace's template of 112 pixels."""
    left, right = ARCFACE_TEMPLATE[:2] / 112
    side = float(right[0] - left[0]) / DLIB_BETWEEN
    top = float(left[1] + right[1]) / 2 - DLIB_EYES * side
    return Framing(side, float(left[0] + right[0]) / 2 - 0.5, top + side / 2 - 0.5)


CENTER, TEMPLATE, WHOLE = Framing(0.9, 0.0, 0.07), _of_template(), Framing()


@dataclass(frozen=True)
class Kind:
    summary: str
    needs: str
    missing: Callable[[], str | None]


JUDGES: dict[str, Kind] = {
    "dlib": Kind("dlib's face recognition network", "dlib-bin and face_recognition_models (the extra [judge])", dlib_missing),
    "facenet": Kind(f"InceptionResnetV1 trained on {FACENET}", "a download by facenet-pytorch, once", lambda: None),
    "FILE.safetensors": Kind("a checkpoint of `fedgc-priv train` on other people", "the file", lambda: None),
}  # fmt: skip


def load_judges(name: str, run: RunDirectory) -> list[Judge]:
    """The judge of that name for the photos of a run: one, or one for each framing among which strangers' photos must choose.

    Raises UsageError where something has to be installed or fetched first, or where the judge is not independent of the run.
    """
    if name == "dlib":
        return [dlib_judge(framing) for framing in framings(run)]
    if name == "facenet":
        return [_facenet(run)]
    path = Path(name)
    if not path.exists() or path.suffix in (".pt", ".pth"):
        raise UsageError(
            f"no judge '{name}': choose dlib, facenet, or the file of a checkpoint (.safetensors) of `fedgc-priv train`"
        )
    return [_own(name, path, run)]


def framings(run: RunDirectory) -> list[Framing]:
    """Where dlib's chip may lie in the photos of a run: known for aligned photos, else several."""
    data = read_toml(run.path / "config.toml")["data"]
    scale = LFW_CROP / data.get("center_fraction", LFW_CROP)
    match data.get("align", "none"):
        case "center":
            return [Framing(CENTER.side * scale, CENTER.right * scale, CENTER.down * scale)]
        case "mtcnn":
            return [TEMPLATE]
    return [TEMPLATE, CENTER, WHOLE]


def _facenet(run: RunDirectory) -> Judge:
    try:
        tensors, digest = read_published(downloaded(FACENET), None, trusted=True)
    except WorkFailedError as error:
        why = str(error).partition(", or give the file")[0]
        raise UsageError(f"the judge facenet has no weights here: {why}") from None
    if digest == _about_init(run).get("sha256"):
        raise UsageError("the judge facenet is what the run itself began with (model.init): choose another judge")
    chosen = BACKBONES[BACKBONE_OF_PUBLISHED]
    side = chosen.side
    spec = ModelSpec(BACKBONE_OF_PUBLISHED, "batch", chosen.features, side, "none", 0.0, 1.0)
    backbone = _loaded({BACKBONE + n: t for n, t in tensors.items()}, spec, "facenet")
    return network_judge("facenet", digest, backbone, side)


def _own(name: str, path: Path, run: RunDirectory) -> Judge:
    """A finished run (its last checkpoint) or a checkpoint."""
    owner = RunDirectory(path if path.is_dir() else path.parent.parent)
    about = owner.finished() if path.is_dir() else around(owner, path)
    file = owner.checkpoint_path(owner.last_round()) if path.is_dir() else path
    try:
        tensors, header = read_tensors(file)
    except RunError as error:
        raise UsageError(f"the judge {name} is no checkpoint: {error}") from None
    spec = told_spec(header, f"the judge {name}")
    _require_independent(name, backbone_part(tensors), about, run)
    return network_judge(name, sha256(file), _loaded(backbone_part(tensors), spec, name), spec.image_size)


def _require_independent(name: str, tensors: Tensors, about: Mapping[str, Any], run: RunDirectory) -> None:
    """Refuse a network of the run itself, however its file was packed, and one that was trained on the run's faces."""
    own = fingerprint(tensors)
    if any(fingerprint(backbone_part(read_tensors(f)[0])) == own for f in run.path.glob("checkpoints/*.safetensors")):
        raise UsageError(
            f"the judge {name} is a network of {run.path} itself, which cannot judge attacks on it: train one on other people"
        )
    here = {run.about()["dataset"], *_about_init(run).get("datasets", ())}
    if about.get("dataset") in here:
        raise UsageError(f"the judge {name} was trained on the faces behind {run.path}: train one on other people")


def _about_init(run: RunDirectory) -> Mapping[str, Any]:
    return run.about().get("init") or {}


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _loaded(tensors: Tensors, spec: ModelSpec, name: str) -> nn.Module:
    """The network with these weights; counters of BatchNorm are never saved."""
    backbone = build_backbone(spec, 0)
    fit = fitting(tensors, spec, 0, f"the judge {name}")
    backbone.load_state_dict({n.removeprefix(BACKBONE): t for n, t in fit.items()}, strict=False)
    return backbone


def listed() -> list[dict[str, Any]]:
    """Rows of ``list judges``."""
    return [
        {"name": name, "what": kind.summary, "needs": kind.needs, "missing here": kind.missing() or "nothing known"}
        for name, kind in JUDGES.items()
    ]
