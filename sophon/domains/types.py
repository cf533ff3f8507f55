"""What the other rooms know of a domain: labelled images, wherever they are kept, and named splits of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sophon.domains.names import few

Prompts = tuple[str, ...]


class Batch(NamedTuple):
    """Some labelled images.

    Attributes:
        images: uint8 [B, C, H, W].
        labels: int64 [B] on the same device.
        prompts: the text that goes with each image; None where the domain has none.
    """

    images: Tensor
    labels: Tensor
    prompts: Prompts | None = None


def prompts_at(prompts: Prompts | None, indices: Tensor) -> Prompts | None:
    """Return the prompts of the images at ``indices`` (int64 [M])."""
    return None if prompts is None else tuple(prompts[index] for index in indices.tolist())


class ImageSet(ABC):
    """Labelled images of one size. Batches of them come on the device that they were sent `to`.

    Attributes:
        labels: int64 [N], each in 0 .. len(classes) - 1.
        classes: the class names, in the order of the labels.
        shape: (C, H, W) of an image.
        prompts: the text that goes with each image; None where the domain has none.
    """

    labels: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    prompts: Prompts | None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, indices: Tensor) -> Batch:
        """Return the images at ``indices`` (int64 [M])."""

    @abstractmethod
    def take(self, indices: Tensor) -> ImageSet:
        """Return the set of the images at ``indices`` (int64 [M]), which may repeat."""

    @abstractmethod
    def relabelled(self, labels: Tensor, classes: tuple[str, ...]) -> ImageSet:
        """Return the same images with other labels (int64 [N]) of other classes."""

    @abstractmethod
    def to(self, device: torch.device) -> ImageSet:
        """Return the same images on ``device``."""

    @abstractmethod
    def fingerprints(self) -> Tensor:
        """Return the sha256 of every image's pixels: uint8 [N, 32] on the CPU."""

    def first(self, count: int) -> Batch:
        """Return the first ``count`` images, all if there are fewer."""
        return self.batch(torch.arange(min(count, len(self))))

    def spread(self, count: int) -> Batch:
        """Return ``count`` images taken evenly from the whole set, all if there are fewer."""
        return self.batch(torch.linspace(0, len(self) - 1, min(count, len(self))).long())

    def stream(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        """Give a batch for each of ``parts`` (int64 [M] each), which may be drawn before they are needed."""
        return map(self.batch, parts)

    def in_memory(self) -> ImageSet:
        """Return the same images in memory if they fit there, for who walks through them again and again."""
        return self

    def sha256(self) -> str:
        """Hash pixels, labels, class names and prompts: equal hashes mean the same images in the same order."""
        digest = hashlib.sha256(repr((len(self), self.shape, self.classes)).encode())
        digest.update(self.fingerprints().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        if self.prompts is not None:
            digest.update(repr(self.prompts).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class MemoryImages(ImageSet):
    """Labelled images held whole in memory or on the device.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in 0 .. len(classes) - 1.
        classes: the class names, in the order of the labels.
        prompts: the text that goes with each image; None where the domain has none.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    prompts: Prompts | None = None
    shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.images.shape[1:]))

    def batch(self, indices: Tensor) -> Batch:
        """Return the images at ``indices`` (int64 [M])."""
        prompts = prompts_at(self.prompts, indices)
        indices = indices.to(self.labels.device)
        return Batch(self.images[indices], self.labels[indices], prompts)

    def take(self, indices: Tensor) -> MemoryImages:
        """Return copies of the images at ``indices`` (int64 [M])."""
        batch = self.batch(indices)
        return MemoryImages(batch.images, batch.labels, self.classes, batch.prompts)

    def relabelled(self, labels: Tensor, classes: tuple[str, ...]) -> MemoryImages:
        """Return the same images with other labels (int64 [N]) of other classes."""
        return MemoryImages(self.images, labels.to(self.labels.device), classes, self.prompts)

    def to(self, device: torch.device) -> MemoryImages:
        """Return the same images on ``device``."""
        return MemoryImages(self.images.to(device), self.labels.to(device), self.classes, self.prompts)

    def fingerprints(self) -> Tensor:
        """Return the sha256 of every image's pixels: uint8 [N, 32] on the CPU."""
        return fingerprints(self.images)


def fingerprints(images: Tensor) -> Tensor:
    """Return the sha256 of every image's pixels, of uint8 [N, C, H, W] on any device: uint8 [N, 32] on the CPU."""
    digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images.cpu().numpy())
    return torch.from_numpy(np.frombuffer(digests, np.uint8).reshape(-1, 32).copy())


@dataclass(frozen=True)
class LoadedDomain:
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

    def to(self, device: torch.device) -> LoadedDomain:
        """Return the same domain with every split on ``device``."""
        return replace(self, splits={name: images.to(device) for name, images in self.splits.items()})
