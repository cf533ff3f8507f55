"""What the other rooms know of a domain: labelled images in memory, and named splits of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sophon.domains.names import few


class Batch(NamedTuple):
    """Some labelled images: ``images`` uint8 [B, C, H, W] and ``labels`` int64 [B], on the same device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images held whole in memory or on the device.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in 0 .. len(classes) - 1.
        classes: the class names, in the order of the labels.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ImageSet:
        """Return the same images on ``device``."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)

    def take(self, indices: Tensor) -> ImageSet:
        """Return the images at ``indices`` (int64 [M])."""
        indices = indices.to(self.labels.device)
        return ImageSet(self.images[indices], self.labels[indices], self.classes)

    def sha256(self) -> str:
        """Hash pixels, labels and class names: equal hashes mean the same images in the same order."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.cpu().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Domain:
    """A domain with its disjoint splits.

    Attributes:
        name: what reports call it.
        classes: the class names.
        splits: ``train``, ``val``, ``test`` of an original domain; ``adapt``, ``query`` (the defender's), ``attack``,
            ``select`` (the attacker's) and ``test`` of a restricted one.
        hashes: each split's `ImageSet.sha256`.
        notes: what is worth saying of how it was read, a phrase each.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, ImageSet]
    hashes: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say on one line what it holds and what is worth noting of how it was read."""
        splits = ", ".join(f"{name} {len(images)}" for name, images in self.splits.items())
        several = f"{len(self.classes)} class{'es' if len(self.classes) != 1 else ''} ({few(self.classes)})"
        return "; ".join([f"domain {self.name}: {several}", f"images: {splits}", *self.notes])

    def __getitem__(self, split: str) -> ImageSet:
        return self.splits[split]

    def to(self, device: torch.device) -> Domain:
        """Return the same domain with every split on ``device``."""
        return replace(self, splits={name: images.to(device) for name, images in self.splits.items()})
