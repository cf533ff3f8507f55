"""One side of a data set before decoding: labels at once, images when asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sophon.config import DomainConfig
from sophon.errors import UserError


class UnreadableError(Exception):
    """An image cannot be read. The message is one line that names it."""


@dataclass(frozen=True)
class Part:
    """The training or the test side of a data set, not decoded yet.

    Attributes:
        labels: the class number of every image, each in 0 .. len(classes) - 1. A class may have no image.
        classes: the class names.
        read: decodes the image of a number in 0 .. len(labels) - 1, of any mode and size; raises `UnreadableError`.
        left_out: how many files are no images of this part, by the reason, such as ``.txt`` or ``hidden``.
        texts: the caption of every image; None where the data has none.
    """

    labels: Sequence[int]
    classes: tuple[str, ...]
    read: Callable[[int], Image.Image]
    left_out: Mapping[str, int] = field(default_factory=dict)
    texts: Sequence[str] | None = None

    def take(self, mask: Tensor) -> Part:
        """Return the part of it where ``mask`` (bool [N]) is true; nothing is then left out twice."""
        numbers = mask.nonzero().flatten().tolist()
        texts = None if self.texts is None else [self.texts[number] for number in numbers]
        labels = [self.labels[number] for number in numbers]
        return Part(labels, self.classes, lambda index: self.read(numbers[index]), texts=texts)


def data_root(config: DomainConfig, where: str) -> Path:
    """Return ``config.root`` with ``~`` expanded.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(config.root).expanduser()
    except RuntimeError as error:
        raise UserError(f"{where}.root: '{config.root}' is not allowed: {error}") from error


def class_generator(seed: int, purpose: str, name: str) -> torch.Generator:
    """Return a CPU generator that depends on all three arguments and nothing else."""
    digest = hashlib.sha256(repr((seed, purpose, name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
