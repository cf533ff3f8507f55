"""Pseudo-labels: what simulated attackers fine-tune on where the defender has images of a domain but no labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sophon.domains.batches import evaluation_batches
from sophon.domains.types import ImageSet, LoadedDomain
from sophon.errors import UserError
from sophon.seeds import derive_seed

_BATCH, _STARTS, _ITERATIONS = 250, 5, 50


def with_clusters(
    domain: LoadedDomain, features: Callable[[Tensor], Tensor], clusters: int, *, seed: int, where: str
) -> LoadedDomain:
    """Label a domain's images by the cluster that their features fall in.

    The clusters are those of ``adapt``: k-means (Lloyd, 1982) from centres drawn as k-means++ does (Arthur and
    Vassilvitskii, 2007), the tightest of a few starts. Images of the other splits belong to the nearest centre. The
    same features give the same labels.

    Args:
        domain: with the split ``adapt``, on any device; its labels are not read.
        features: of uint8 images [B, C, H, W] on the domain's device: float [B, D].
        clusters: how many, >= 2.

    Returns:
        The same images in the same splits, with classes ``cluster_0``, ``cluster_1``, ... and hashes of both. Each
        class has an image in ``adapt``.

    Raises:
        UserError: ``adapt`` does not fall into so many clusters.
    """
    from scipy.cluster.vq import vq  # takes a second to import, for labels that are seldom missing

    points = {name: _features(images, features) for name, images in domain.splits.items()}
    centres = _centres(points["adapt"], clusters, seed)
    if centres is None:
        raise UserError(
            f"{where}.clusters: {clusters} is not allowed; the {len(points['adapt'])} images of split 'adapt' do not "
            "fall into so many; give fewer"
        )
    classes = tuple(f"cluster_{index}" for index in range(clusters))
    splits = {}
    for name, images in domain.splits.items():
        labels = torch.from_numpy(vq(points[name], centres)[0].astype(np.int64))
        splits[name] = images.relabelled(labels, classes)
    return replace(
        domain, classes=classes, splits=splits, hashes={name: images.sha256() for name, images in splits.items()}
    )


@torch.no_grad()
def _features(images: ImageSet, features: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
    parts = [features(batch.images).float().cpu() for batch in evaluation_batches(images, _BATCH)]
    points: NDArray[np.float32] = torch.cat(parts).numpy()
    return points


def _centres(points: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.float32] | None:
    """Return the centres [clusters, D] of the tightest start that leaves no cluster empty; None if each does."""
    from scipy.cluster.vq import ClusterError, kmeans2, vq

    best, least = None, math.inf
    for start in range(_STARTS if clusters <= len(points) else 0):
        generator = np.random.default_rng(derive_seed(seed, "clusters", start))
        try:
            with np.errstate(invalid="ignore"):  # fewer different points than clusters: found out below
                centres, _ = kmeans2(points, clusters, _ITERATIONS, minit="++", missing="raise", rng=generator)
        except ClusterError:
            continue
        nearest, distances = vq(points, centres)
        spread = float(np.square(distances, dtype=np.float64).sum())
        if spread < least and np.bincount(nearest, minlength=clusters).all():
            best, least = centres, spread
    return best
