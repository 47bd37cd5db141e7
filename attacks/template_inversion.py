"""A face for a class embedding, the row of the head that stands for a person, or for one photo's unit feature.

An adversary needs the embedding, the backbone that gives it meaning, and photos of strangers. A decoder learned from these
renders it at once (Mai et al. 2018); a search then brings the backbone's feature of the image to the embedding
(Mahendran & Vedaldi 2015; Yin et al. 2020), held by eigenfaces of the strangers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from attacks.correction_probe import CorrectionProbe, strangers_seen
from attacks.decoder import Network, Tick, trained_decoder
from attacks.embedding_recovery import EmbeddingRecovery
from attacks.gradient_matching import counted, offset
from attacks.priors import Eigenfaces, auxiliary_basis
from attacks.updates import targets
from fedgc.local import augment
from fedgc.models import load_backbone
from fedgc.types import Attack, ClassEmbeddings, Observation, Progress, Reconstruction, Tensors

BATCH = 16  # images searched at once
REACH = 3.0  # standard deviations along an eigenface that a start may lie from the mean
CHECKS = 10  # iterates among which the objective chooses


class TemplateInversion(Attack):
    """Images whose unit feature is the given one, one for each class embedding, or for each photo behind a recorded step.

    source "class-embeddings": rows of whole rounds, at most ``classes`` of them. Their mean is replaced by ``shift`` times the
    mean feature of the auxiliary faces, since softmax does not see what all features share and leaves it out of the rows.
    "face-embeddings": what `embedding-recovery` finds in recorded steps, with that attack's needs. "correction": strangers' class
    embeddings as `correction-probe` reads them, which are returned as well.

    method "optimisation": search from the mean face; "decoder": `attacks.decoder`, trained in ``training`` steps; "both": search
    from the decoder's image, which ended no better on auxiliary people and takes three times as long; "nearest": the auxiliary
    face with the nearest feature, which is no reconstruction at all.
    """

    name: Literal["template-inversion"] = "template-inversion"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"class-embeddings", "global-model", "auxiliary-faces"}),)
    target: ClassVar[Literal["round", "step"]] = "round"
    costly: ClassVar[bool] = True
    summary: ClassVar[str] = "faces for class embeddings, or for features recovered from a step"

    source: Literal["class-embeddings", "face-embeddings", "correction"] = "class-embeddings"
    method: Literal["optimisation", "decoder", "both", "nearest"] = "optimisation"
    classes: int = Field(default=512, ge=1)
    shift: float = Field(default=0.5, ge=0, le=2)
    training: int = Field(default=200, ge=1)
    iterations: int = Field(default=150, ge=1)
    step_size: float = Field(default=0.1, gt=0)
    components: int = Field(default=300, ge=1)
    gaussian: float = Field(default=1e-2, ge=0)
    copies: int = Field(default=4, ge=0, le=100)

    @property
    def reads(self) -> Literal["round", "step"]:
        return "step" if self.source == "face-embeddings" else "round"

    def needed(self) -> tuple[frozenset[str], ...]:
        if self.source == "class-embeddings":
            return self.needs
        if self.source == "correction":
            return tuple(need | {"global-model", "auxiliary-faces"} for need in CorrectionProbe.needs)
        return tuple(need | {"auxiliary-faces"} for need in EmbeddingRecovery.needs)

    def refusal(self, observation: Observation) -> str | None:
        why = super().refusal(observation)
        if why and self.source == "class-embeddings" and observation.class_embeddings is None:
            why += ": no class embedding of anybody else reaches it, so there is no face to look for"
        return why

    def unsuitable(self, observation: Observation) -> str | None:
        faces = observation.auxiliary_faces
        if faces is None or len(faces) < 2:
            return "needs two auxiliary faces or more"
        return EmbeddingRecovery().unsuitable(observation) if self.source == "face-embeddings" else None

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """images: float32 (n, 3, S, S); loss: float32 (n,), 1 - cosine of the image's feature and what it was to be. The
        mean face stands for a feature that was not found, which counts as failed."""
        faces = observation.auxiliary_faces
        assert faces is not None
        faces = faces.detach().cpu().float()
        network = self.network(observation)
        sources, units = self.wanted(observation, network, generator)
        known = units.any(dim=1)
        images = faces.mean(0).expand(len(units), *faces.shape[1:]).contiguous()
        lost = 0
        if bool(known.any()):
            images[known], lost = self.rendered(network, faces, units[known], generator, progress)
        rows = self.rows(observation)
        guesses = rows.weight[: self.classes] if self.source == "correction" and rows is not None else None
        loss = 1 - (network.all_features(images) * units).sum(1)
        searched = self.iterations * int(known.sum()) if self.method in ("both", "optimisation") else 0
        failed = int((~known).sum()) + lost
        return Reconstruction(sources, images=images, loss=loss, embeddings=guesses, iterations=searched, failed=failed)

    def network(self, observation: Observation) -> Network:
        """The backbone that gave the embeddings their meaning. Recorded steps take a photo's feature once, recognition with the
        mirror image."""
        of_classes = self.source != "face-embeddings"
        model: Tensors | None = observation.global_model if of_classes else targets(observation)[0].before
        assert model is not None
        backbone = load_backbone(observation.public_constants.spec, model)
        return Network.of(backbone, mirrored=of_classes)

    def wanted(
        self, observation: Observation, network: Network, generator: torch.Generator
    ) -> tuple[tuple[int, ...], Tensor]:
        """Source of each target, and the unit feature (n, d) that its image is to have; zero where none was found."""
        if self.source == "face-embeddings":
            found = EmbeddingRecovery()(observation, generator)
            assert found.embeddings is not None
            return found.sources, found.embeddings
        rows, faces = self.rows(observation), observation.auxiliary_faces
        assert rows is not None and faces is not None  # noqa: PT018
        middle = network.all_features(faces.detach().cpu().float()).mean(0)
        return rows.classes[: self.classes], as_features(rows.weight, middle, self.shift)[: self.classes]

    def rows(self, observation: Observation) -> ClassEmbeddings | None:
        """Class embeddings to make faces of: those that the seat holds, or those that it reads from the correction."""
        rows, correction = observation.class_embeddings, observation.correction
        if self.source == "correction" and correction is not None:
            rows = ClassEmbeddings(strangers_seen(observation), correction.classes)
        return None if rows is None else replace(rows, weight=rows.weight.detach().cpu().float())

    def rendered(
        self, network: Network, faces: Tensor, units: Tensor, generator: torch.Generator, progress: Progress
    ) -> tuple[Tensor, int]:
        """(n, 3, S, S) in [0, 1] for unit features (n, d), and how many searches ended with a loss that is not finite."""
        if self.method == "nearest":
            return faces[(units @ network.all_features(faces).T).argmax(dim=1)], 0
        batches = units.split(BATCH)
        learning = self.training if self.method != "optimisation" else 0
        searching = self.iterations * len(batches) if self.method != "decoder" else 0
        tick = counted(progress, learning + searching)
        starts: Tensor | None = None
        if learning:
            decoder = trained_decoder(network, faces, self.training, self.copies, tick)
            starts = torch.cat([decoder(batch) for batch in batches]).clamp(0, 1)
        if self.method == "decoder":
            assert starts is not None
            return starts, 0
        prior = Eigenfaces(faces.mean(0), auxiliary_basis(faces, self.components, self.copies), self.gaussian)
        out: list[Tensor] = []
        lost = 0
        for number, batch in enumerate(batches):
            first = None if starts is None else starts[number * BATCH : number * BATCH + len(batch)]
            z = batch.new_zeros(len(batch), len(prior.basis)) if first is None else coordinates(prior, first)
            done = offset(tick, learning + number * self.iterations)
            images, failed = self.searched(network, prior, batch, z, generator, done)
            out, lost = [*out, images], lost + failed
        return torch.cat(out), lost

    def searched(
        self, network: Network, prior: Eigenfaces, units: Tensor, z: Tensor, generator: torch.Generator, tick: Tick
    ) -> tuple[Tensor, int]:
        """The images (n, 3, S, S) of the best of CHECKS iterates, each by its own objective: 1 - cosine + gaussian·|z|², and for
        how many of them it was not finite in the end.

        For class embeddings the feature is that of an altered copy, another in each step: a person is who they are in any light
        and pose, and pixels that only this network answers to do not survive that."""
        z = z.clone().requires_grad_()
        optimizer = torch.optim.Adam([z])
        value = best = self.objective(network, prior, units, z)
        chosen = z.detach().clone()
        every = max(1, self.iterations // CHECKS)
        for i in range(self.iterations):
            images = prior.images(z)
            if self.source == "class-embeddings":
                images = augment(images, generator)
            loss = (1 - (network.once(images) * units).sum(1)).sum() + self.gaussian * z.square().sum()
            (z.grad,) = torch.autograd.grad(loss, z)
            optimizer.param_groups[0]["lr"] = self.step_size * (1 - i / self.iterations)
            optimizer.step()
            if (i + 1) % every == 0 or i + 1 == self.iterations:
                value = self.objective(network, prior, units, z)
                better = value < best
                best, chosen = torch.where(better, value, best), torch.where(better[:, None], z.detach(), chosen)
                tick(i + 1)
        return prior.final(chosen).clamp(0, 1), int((~value.isfinite()).sum())

    @torch.no_grad()
    def objective(self, network: Network, prior: Eigenfaces, units: Tensor, z: Tensor) -> Tensor:
        """(n,) of images as they are returned."""
        images = prior.final(z).clamp(0, 1)
        return 1 - (network.features(images) * units).sum(1) + self.gaussian * z.square().sum(1)


def as_features(rows: Tensor, middle: Tensor, shift: float) -> Tensor:
    """(n, d) unit features for class embeddings (n, d): their directions less the mean of these, plus shift·middle (d,).

    A single row is its own mean, and stays."""
    units = F.normalize(rows, dim=1)
    return F.normalize(units - (units.mean(0) if len(units) > 1 else 0) + shift * middle, dim=1)


def coordinates(prior: Eigenfaces, images: Tensor) -> Tensor:
    """(n, k) along the eigenfaces, which are at right angles, within REACH."""
    lengths = prior.basis.square().sum(1).clamp_min(1e-12)
    return ((images - prior.centre).flatten(1) @ prior.basis.T / lengths).clamp(-REACH, REACH)
