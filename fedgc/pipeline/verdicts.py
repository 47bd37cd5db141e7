"""attack --judge: an independent recogniser looks at what attacks left in a run, after they are done.

It reads an attack's folder and writes a verdict beside the attack's own summary, one file a judge: no attack is made again for
another judge, and no judge's figures pass for another's. What it makes of photos that stay the same is kept, owner-only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.fidelity import MID_GREY
from eval.judges import Judge, in_bytes
from eval.pairs import PairScores
from eval.scoring import nearest
from eval.statistics import Floats, Ints
from eval.verdicts import JudgeGate, Targets, another, judge_gate, verdicts
from fedgc.errors import RunError
from fedgc.files import PRIVATE, holding, read_tensors, write_json, write_tensors
from fedgc.pipeline.judges import load_judges
from fedgc.pipeline.linking import mates_of
from fedgc.pipeline.records import Verdict, checked, pictures_in
from fedgc.pipeline.watch import Watch
from fedgc.rng import numpy_generator
from fedgc.runs import RunDirectory
from fedgc.types import Gallery

AT_ONCE = 32  # pictures between two looks at the clock, and between two savings
TO_FRAME = 96  # strangers' photos by which a framing is chosen
VERDICT = "verdict-*.json"

Entry = dict[str, Any]


class Memory:
    """A judge's unit embeddings of photos by their bytes; those of photos that stay are kept in the run, owner-only."""

    def __init__(self, judge: Judge, run: RunDirectory, watch: Watch) -> None:
        self.judge, self.watch = judge, watch
        self.file = run.path / "private" / f"judge-{judge.key}.safetensors"
        self._kept: dict[str, Floats] = {}
        if self.file.exists():
            with suppress(RunError, KeyError):  # what is damaged is looked at again
                tensors, _ = read_tensors(self.file)
                names = ("".join(f"{byte:02x}" for byte in row) for row in tensors["photos"].tolist())
                self._kept = dict(zip(names, tensors["embeddings"].double().numpy(), strict=True))

    def __call__(self, photos: Tensor, what: str, keep: bool = True) -> Floats:
        """(n, d) of photos float32 (n, 3, H, W) in [0, 1], each different one looked at once."""
        names = [hashlib.sha256(photo.numpy().tobytes()).hexdigest() for photo in in_bytes(photos)]
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        missing = sorted(i for name, i in first.items() if name not in self._kept)
        found = dict(self._kept)
        for start in range(0, len(missing), AT_ONCE):
            self.watch(f"the judge looks at {what}", start, len(missing))
            part = missing[start : start + AT_ONCE]
            rows = self.judge(photos[part]).astype(np.float32).astype(np.float64)  # as they are kept
            found |= {names[i]: row for i, row in zip(part, rows, strict=True)}
            if keep:
                self._keep(found)
        if missing:
            self.watch(f"the judge looks at {what}", len(missing), len(missing))
        return np.stack([found[name] for name in names])

    def _keep(self, found: dict[str, Floats]) -> None:
        self._kept = dict(found)
        photos = torch.tensor([list(bytes.fromhex(name)) for name in found], dtype=torch.uint8)
        embeddings = torch.from_numpy(np.stack(list(found.values())).astype(np.float32))
        write_tensors(self.file, {"photos": photos, "embeddings": embeddings}, None, PRIVATE)


class Bench:
    """A judge and the run whose attacks come before it. Raises what `load_judges` does, and RunError for a run that keeps no
    calibration people."""

    def __init__(self, run: RunDirectory, name: str, watch: Watch) -> None:
        self.run, self.watch = run, watch
        self.calibration, self.strangers = run.load_bystanders()
        self.judges = load_judges(name, run)
        self.seed = run.about()["seed"]

    @cached_property
    def look(self) -> Memory:
        """The judge, where several framings are possible with the one that tells most strangers apart."""
        if len(self.judges) == 1:
            return Memory(self.judges[0], self.run, self.watch)
        few = self.strangers.people < max(2, TO_FRAME // _each(self.strangers))
        photos, people = self.strangers.images[few], self.strangers.people[few]
        memories = [Memory(judge, self.run, self.watch) for judge in self.judges]
        scores = [PairScores.from_embeddings(m(photos, "strangers"), people) for m in memories]
        aucs = [0.0 if s.why_not else float(s.curve().auc()[0]) for s in scores]
        return memories[int(np.argmax(aucs))]

    @cached_property
    def gate(self) -> JudgeGate:
        embeddings = self.look(self.calibration.images, "calibration people")
        return judge_gate(
            embeddings, self.calibration.people, rng=numpy_generator(self.seed, "judge", self.look.judge.key)
        )

    @cached_property
    def about(self) -> dict[str, Any]:
        judge = self.look.judge
        return {"name": judge.name, "weights": judge.weights, **self.gate.to_json()}

    @cached_property
    def auxiliary(self) -> Tensor:
        faces = self.run.load_knowledge().auxiliary_faces
        assert faces is not None
        return faces

    @cached_property
    def others(self) -> dict[int, Tensor]:
        """Of each class, the photos of that person that nobody trained on: those of the gallery."""
        known = self.run.load_knowledge().gallery
        assert known is not None
        return {c: known.images[known.people == g] for c, g in mates_of(self.run).items()}

    def judged(self, entry: Entry) -> Entry:
        """The entry of one attack with this judge's verdict, if the attack returned pictures."""
        folder = self.run.path / str(entry.get("folder", ""))
        if entry["refused"] or not entry.get("folder") or (shown := pictures(folder, entry)) is None:
            return entry
        file = folder / f"verdict-{self.look.judge.key}.json"
        if file.exists():
            return merged(entry, checked(Verdict, file))
        images, classes, originals = shown
        metrics, baselines, similarity = self.compare(images, classes, originals, str(entry["folder"]))
        kept = {"judge": self.about, "metrics": metrics, "baselines": baselines, "similarity": similarity}
        write_json(file, kept, PRIVATE)
        return merged(entry, kept)

    def compare(
        self, images: Tensor, classes: Sequence[int], originals: Tensor | None, stream: str
    ) -> tuple[dict[str, Any], dict[str, Any], list[float | None]]:
        """Metrics and baselines of pictures (n, 3, H, W) of people ``classes``, and each one's cosine with its photo.

        originals: the very photos (n, 3, H, W), or None for pictures of people rather than of photos. A picture that is
        not finite counts as grey.
        """
        rng = numpy_generator(self.seed, "judge", stream)
        people = np.array(classes, dtype=np.int64)
        whole = images.flatten(1).isfinite().all(dim=1).view(-1, 1, 1, 1)
        found = self.look(torch.where(whole, images, torch.tensor(MID_GREY)), "what was found", keep=False)
        width = found.shape[1]
        blank = np.empty((0, width))
        known = {c: self.others.get(c) for c in set(classes)}
        rest = {
            c: self.look(x, "photos of the gallery") if x is not None and len(x) else blank for c, x in known.items()
        }
        photos = None if originals is None else self.look(originals, "the photos behind updates")
        targets = Targets(people, photos, [rest[c] for c in classes])
        noise = torch.from_numpy(rng.random(tuple(images.shape), dtype=np.float32))
        rivals = {"noise": self.look(noise, "noise", keep=False)}
        mean = self.look(self.auxiliary.mean(dim=0, keepdim=True), "the mean face")
        rivals["mean-face"] = np.repeat(mean, len(images), axis=0)
        models = originals if originals is not None else self._typical(classes, images)
        rivals["nearest-auxiliary-face"] = self.look(nearest(models, self.auxiliary), "auxiliary faces")
        if (swapped := another(people)) is not None:
            rivals["another-reconstruction"] = found[swapped]
            if photos is not None:
                rivals["another-victim"] = photos[swapped]
        metrics, baselines, mean_cosine = verdicts(found, targets, self.gate, rivals, rng)
        if originals is None:
            baselines |= self._of_photos(people, rest, swapped, rng)
        return metrics, baselines, [round(float(x), 6) if math.isfinite(x) else None for x in mean_cosine]

    def _typical(self, classes: Sequence[int], images: Tensor) -> Tensor:
        """The mean of each person's photos in the gallery, in place of an original."""
        grey = torch.full_like(images[0], MID_GREY)
        return torch.stack([self.others[c].mean(dim=0) if len(self.others.get(c, ())) else grey for c in classes])

    def _of_photos(
        self, people: Ints, rest: Mapping[int, Floats], swapped: Ints | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Where pictures are of people: one photo of the gallery against the person's others, and against somebody else's."""
        several = np.array([i for i, c in enumerate(people.tolist()) if len(rest[c]) > 1], dtype=np.int64)
        rows = {}
        if len(several):
            own = Targets(people[several], None, [rest[int(people[i])][1:] for i in several])
            first = np.stack([rest[int(people[i])][0] for i in several])
            rows["genuine-photo"] = verdicts(first, own, self.gate, {}, rng)[0]
        if swapped is not None and all(len(rest[int(c)]) for c in people):
            theirs = np.stack([rest[int(people[j])][0] for j in swapped])
            targets = Targets(people, None, [rest[int(c)] for c in people])
            rows["another-victim"] = verdicts(theirs, targets, self.gate, {}, rng)[0]
        return rows


def _each(gallery: Gallery) -> int:
    return max(1, len(gallery.people) // max(1, gallery.size))


def pictures(folder: Path, entry: Entry) -> tuple[Tensor, list[int], Tensor | None] | None:
    """What an attack returned as pictures (n, 3, H, W), the class of each, and the photos behind recorded steps in the same
    order; None where it returned none."""
    if entry.get("batch_size") is not None:  # of recorded steps
        if (pair := pictures_in(folder)) is None:
            return None
        originals, found = pair
        with holding(folder / "summary.json"):
            return found, [int(s["class"]) for s in entry["samples"]], originals
    tensors, about = read_tensors(folder / "reconstructions.safetensors")
    images = {name.removesuffix("/images"): t for name, t in tensors.items() if name.endswith("/images")}
    if not images:
        return None
    if not isinstance(about, dict) or "sources" not in about:
        raise RunError(f"{folder} does not say whose its pictures are: attack again with --force")
    return torch.cat(list(images.values())), [int(c) for name in images for c in about["sources"][name]], None


def merged(entry: Entry, verdict: Mapping[str, Any]) -> Entry:
    """The entry with a judge's metrics, baselines, and cosine of each sample."""
    names = [*entry["baselines"], *(n for n in verdict["baselines"] if n not in entry["baselines"])]
    baselines = {n: {**entry["baselines"].get(n, {}), **verdict["baselines"].get(n, {})} for n in names}
    samples = entry["samples"]
    if len(samples) == len(verdict["similarity"]):
        samples = [{**s, "similarity": x} for s, x in zip(samples, verdict["similarity"], strict=True)]
    return {
        **entry, "judge": verdict["judge"], "metrics": {**entry["metrics"], **verdict["metrics"]},
        "baselines": baselines, "samples": samples,
    }  # fmt: skip


def with_verdict(folder: Path, entry: Entry) -> Entry:
    """The entry as a report shows it: of several judges that spoke, with the one that knows people best."""
    found = [checked(Verdict, file) for file in sorted(folder.glob(VERDICT))]
    return merged(entry, max(found, key=lambda v: v["judge"]["auc"].get("value") or 0.0)) if found else entry
