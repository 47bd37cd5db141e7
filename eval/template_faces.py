"""Faces made from class embeddings: how near they come to their people.

There is no photo that such an image should equal, so pixels are compared with other photos of the person, to which no image of
that person is close. Who is meant is asked of the attacked model itself. That flatters an attack whose objective that model
is: the same figures of the class embedding alone, with no image at all, stand beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.fidelity import fidelity_summary, psnr, ssim
from eval.linkage import linkage, ranks_of
from eval.scoring import Metrics, Scores
from eval.statistics import bootstrap_mean, bootstrap_median
from fedgc.types import Gallery, Reconstruction

Looks = Callable[[Tensor], Tensor]


def score_faces(
    found: Reconstruction, mates: Mapping[int, int], gallery: Gallery, auxiliary: Tensor, rows: Mapping[int, Tensor],
    looks: Looks, rng: np.random.Generator,
) -> Scores:  # fmt: skip
    """psnr, ssim, psnr_gain, embedding_cosine, rank1, rank5 and auc of one image a class.

    mates: gallery number of each class; a class without gallery photos is left out. rows: class embedding (d,) of each class.
    looks: images (n, 3, S, S) -> unit features (n, d) of the attacked model. psnr and ssim of an image are means over the
    person's gallery photos; embedding_cosine is that of its feature with the mean feature of these photos, and people are ranked
    by it.

    Baselines: the mean face, noise, the auxiliary face whose feature is nearest to the class embedding, the image of another
    class, and the class embedding itself, which has no pixels.
    """
    assert found.images is not None
    kept = [i for i, c in enumerate(found.sources) if c in mates]
    classes = [found.sources[i] for i in kept]
    truth, images = np.array([mates[c] for c in classes]), found.images[kept]
    photos = [gallery.images[gallery.people == g] for g in truth.tolist()]
    people = F.normalize(_sums(looks(gallery.images), gallery), dim=1)
    mean = auxiliary.mean(dim=0, keepdim=True)
    base = np.array([float(psnr(mean.expand_as(x), x).mean()) for x in photos])
    units = F.normalize(torch.stack([rows[c] for c in classes]).float(), dim=1)
    nearest = auxiliary[(units @ looks(auxiliary).T).argmax(dim=1)]
    rivals = {
        "mean-face": mean.expand_as(images), "nearest-auxiliary-face": nearest,
        "noise": torch.from_numpy(rng.random(images.shape, dtype=np.float32)),
        "another-class": images.roll(1, dims=0),
    }  # fmt: skip

    def scored(x: Tensor) -> tuple[Metrics, np.ndarray, Tensor]:
        signal, structure = _fidelity(x, photos)
        metrics = {k: m.to_json() for k, m in fidelity_summary(signal, structure, rng=rng).items()}
        metrics["psnr_gain"] = replace(bootstrap_median(signal - base, rng=rng), chance=0.0).to_json()
        scores = looks(x) @ people.T
        return metrics | _in_features(scores, truth, rng), signal, scores

    metrics, signal, scores = scored(images)
    baselines = {name: scored(x)[0] for name, x in rivals.items()}
    baselines["class-embedding"] = _in_features(units @ people.T, truth, rng)
    samples = [
        {"target": n, "class": c, "psnr": round(float(p), 4), "psnr_gain": round(float(p - b), 4), "rank": int(r)}
        for n, (c, p, b, r) in enumerate(zip(classes, signal, base, ranks_of(scores, truth), strict=True))
    ]
    return Scores(metrics, baselines, samples, (torch.stack([x[0] for x in photos]), images))


def _sums(features: Tensor, gallery: Gallery) -> Tensor:
    return torch.zeros(gallery.size, features.shape[1]).index_add_(0, gallery.people, features)


def _fidelity(images: Tensor, photos: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) mean PSNR and mean SSIM of each image with the photos of its person."""
    pairs = [(x.expand_as(mine), mine) for x, mine in zip(images, photos, strict=True)]
    return tuple(np.array([float(f(x, y).mean()) for x, y in pairs]) for f in (psnr, ssim))  # type: ignore[return-value]


def _in_features(scores: Tensor, truth: np.ndarray, rng: np.random.Generator) -> Metrics:
    own = scores[torch.arange(len(truth)), torch.from_numpy(truth)].numpy()
    return {"embedding_cosine": bootstrap_mean(own, rng=rng).to_json(), **linkage(scores, truth, rng)}
