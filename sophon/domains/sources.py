"""Data sets by configuration: where they come from, which of their images are kept, and those images decoded.

A source gives two `Part` objects, which know every label but decode an image only when asked; so the class subset and
the limits of a `DomainConfig` are applied first, and a large folder costs no more than what is kept of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sophon.config import DomainConfig
from sophon.domains.bundled import bundled_set
from sophon.domains.decoding import MODES, to_tensor
from sophon.domains.folder import image_folder
from sophon.domains.names import few
from sophon.domains.notes import Notes
from sophon.domains.part import Part, UnreadableError
from sophon.domains.torchvision_sets import torchvision_sets
from sophon.domains.types import ImageSet
from sophon.errors import UserError, choose

SOURCES: dict[str, Callable[[DomainConfig, str], tuple[Part, Part]]] = {
    "bundled": bundled_set,
    "torchvision": torchvision_sets,
    "imagefolder": image_folder,
}


class Loaded(NamedTuple):
    """The training and the test images of a data set, on the CPU, and what was noticed on the way."""

    train: ImageSet
    test: ImageSet
    notes: Notes


def load_source(config: DomainConfig, *, image_size: int, channels: int, where: str) -> Loaded:
    """Load what ``config`` asks for of a data set.

    Args:
        config: the data set, the classes to keep and the limits per class.
        image_size: height and width in pixels that every image is stretched to (bilinear, antialiased).
        channels: 1 or 3; grey images are repeated, colour ones reduced to their luminance (ITU-R 601).
        where: the configuration key of ``config``, for messages, such as ``domain.restricted``.

    Returns:
        The images in the data set's own order. Class k is the k-th of ``config.classes``, or of the data set's own
        classes.

    Raises:
        UserError: a value is not allowed, or the data is missing or damaged.
    """
    choose(f"{where}.source", config.source, SOURCES)
    _validate(config, image_size, channels, where)
    parts = dict(zip(("train", "test"), SOURCES[config.source](config, where), strict=True))
    notes = Notes(image_size)
    if config.classes is None:
        notes.saw_classes(parts["train"].classes)
    selections = {side: _select(part, config, side, where) for side, part in parts.items()}
    train, test = (
        _decode(part, side, *selections[side], config, (channels, image_size, image_size), notes, where)
        for side, part in parts.items()
    )
    return Loaded(train, test, notes)


def _validate(config: DomainConfig, image_size: int, channels: int, where: str) -> None:
    if image_size < 1:
        raise UserError(f"model.image_size: {image_size} is not allowed; it must be >= 1")
    if channels not in MODES:
        raise UserError(f"model.channels: {channels} is not allowed; it must be 1 or 3")
    for name in ("per_class", "test_per_class"):
        limit = getattr(config, name)
        if limit is not None and limit < 1:
            raise UserError(f"{where}.{name}: {limit} is not allowed; it must be >= 1, or null for all")
    if config.classes is not None and (not config.classes or len(set(config.classes)) < len(config.classes)):
        raise UserError(f"{where}.classes: {config.classes} is not allowed; name each class once, or null for all")


def _kept_classes(part: Part, config: DomainConfig) -> tuple[str, ...]:
    return part.classes if config.classes is None else tuple(config.classes)


def _select(part: Part, config: DomainConfig, side: str, where: str) -> tuple[Tensor, Tensor]:
    """Return which images of ``part`` are kept, in their order, and their labels among the kept classes."""
    limit = config.per_class if side == "train" else config.test_per_class
    numbers = torch.as_tensor(part.labels, dtype=torch.int64)
    chosen = torch.full_like(numbers, -1)
    for label, name in enumerate(_kept_classes(part, config)):
        choose(f"{where}.classes", name, part.classes)
        members = (numbers == part.classes.index(name)).nonzero().flatten()
        # A generator for each class: what is drawn of one does not depend on which others are kept.
        order = torch.randperm(len(members), generator=class_generator(config.split_seed, side, name))
        chosen[members[order[:limit]]] = label
    indices = (chosen >= 0).nonzero().flatten()
    _require_classes(chosen[indices], _kept_classes(part, config), side, where)
    return indices, chosen[indices]


def _decode(
    part: Part,
    side: str,
    indices: Tensor,
    labels: Tensor,
    config: DomainConfig,
    shape: tuple[int, int, int],
    notes: Notes,
    where: str,
) -> ImageSet:
    notes.left_out.update(part.left_out)
    images = torch.empty((len(indices), *shape), dtype=torch.uint8)
    readable = torch.ones(len(indices), dtype=torch.bool)
    for row, index in enumerate(indices.tolist()):
        try:
            image = part.read(index)
        except UnreadableError as error:
            if not config.skip_unreadable:
                raise UserError(f"{where}.root: {error}; {where}.skip_unreadable=true leaves such out") from error
            notes.saw_unreadable(str(error))
            readable[row] = False
        else:
            notes.saw(image)
            images[row] = to_tensor(image, shape)
    decoded = ImageSet(images, labels, _kept_classes(part, config))
    if readable.all():
        return decoded
    _require_classes(labels[readable], decoded.classes, side, where)
    return decoded.take(readable.nonzero().flatten())


def _require_classes(labels: Tensor, classes: tuple[str, ...], side: str, where: str) -> None:
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    empty = [f"'{name}'" for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise UserError(f"{where}.classes: there is no {side} image of {few(empty)}; name other classes")


def class_generator(seed: int, purpose: str, name: str) -> torch.Generator:
    """Return a CPU generator that depends on all three arguments and nothing else."""
    digest = hashlib.sha256(repr((seed, purpose, name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
