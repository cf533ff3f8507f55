"""Data sets by configuration: where they come from, which of their images are kept, and those images decoded.

A source gives two `Part` objects, which know every label but decode an image only when asked; so the class subset and
the limits of a `DomainConfig` are applied first, and a large folder costs no more than what is kept of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from sophon.config import DomainConfig
from sophon.domains.bundled import bundled_set
from sophon.domains.decoding import MODES, to_tensor
from sophon.domains.folder import image_folder
from sophon.domains.names import few
from sophon.domains.notes import Notes
from sophon.domains.part import Part, UnreadableError, class_generator
from sophon.domains.python_data import Domain
from sophon.domains.streamed import GROUP, StreamedImages, read_ahead
from sophon.domains.torchvision_sets import torchvision_sets
from sophon.domains.types import ImageSet, MemoryImages, Prompts, fingerprints
from sophon.errors import UserError, choose
from sophon.tracking import Tracker

_MANY = 20_000  # images whose reading takes long enough to show how far it is

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


def load_source(
    config: DomainConfig, *, image_size: int, channels: int, where: str, memory_gb: float = math.inf
) -> Loaded:
    """Load what ``config`` asks for of a data set.

    Args:
        config: the data set, the classes to keep and the limits per class.
        image_size: height and width in pixels that every image is stretched to (bilinear, antialiased).
        channels: 1 or 3; grey images are repeated, colour ones reduced to their luminance (ITU-R 601).
        where: the configuration key of ``config``, for messages, such as ``domain.restricted``.
        memory_gb: decode the images whenever they are read if they take more than so many 10^9 bytes; inf for never.

    Returns:
        The images in the data set's own order. Class k is the k-th of ``config.classes``, or of the data set's own
        classes. Every image has been decoded once, so that what cannot be read is known.

    Raises:
        UserError: a value is not allowed, or the data is missing or damaged.
    """
    if channels not in MODES:
        raise UserError(f"model.channels: {channels} is not allowed; it must be 1 or 3")
    parts = dict(zip(("train", "test"), _opened(config, where), strict=True))
    notes = Notes(image_size)
    if config.classes is None:
        notes.saw_classes(parts["train"].classes)
    shape = (channels, image_size, image_size)
    kept = {side: _select(part, config, side, where) for side, part in parts.items()}
    size = sum(len(numbers) for numbers, _ in kept.values()) * channels * image_size**2
    if size > memory_gb * 1e9:
        notes.streamed = size / 1e9
    train, test = (
        _read(parts[side], *kept[side], shape, config, where, notes, memory_gb if size > memory_gb * 1e9 else None)
        for side in parts
    )
    for side, images in (("train", train), ("test", test)):
        _require_classes(images.labels, images.classes, side, where)
    return Loaded(train, test, notes)


def class_names(config: DomainConfig, where: str) -> tuple[str, ...]:
    """Return the names of a data set's classes without reading an image; see `load_source` for what is raised."""
    return _kept_classes(_opened(config, where)[0], config)


def _opened(config: DomainConfig, where: str) -> tuple[Part, Part]:
    if isinstance(config, Domain) and config.source == "python":
        return config.parts()
    choose(f"{where}.source", config.source, SOURCES)
    return SOURCES[config.source](config, where)


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


def _read(
    part: Part,
    numbers: Tensor,
    labels: Tensor,
    shape: tuple[int, int, int],
    config: DomainConfig,
    where: str,
    notes: Notes,
    memory_gb: float | None,
) -> ImageSet:
    """Decode images once, and keep them, or with a limit to memory only what tells them apart."""

    in_memory = config.source == "python"
    key = where if in_memory else f"{where}.root"
    skipping = "sophon.Domain(..., skip_unreadable=True)" if in_memory else f"{where}.skip_unreadable=true"

    def decoded(number: int) -> tuple[Tensor, tuple[int, int]] | UnreadableError:
        try:
            image = part.read(number)
        except UnreadableError as error:
            return error
        return to_tensor(image, shape), image.size

    def pixels(number: int) -> Tensor:
        result = decoded(number)
        if isinstance(result, UnreadableError):
            raise UserError(f"{key}: {result}") from result
        return result[0]

    notes.left_out.update(part.left_out)
    kept = torch.empty((len(numbers), *(shape if memory_gb is None else (32,))), dtype=torch.uint8)
    readable = torch.ones(len(numbers), dtype=torch.bool)
    groups = (group.tolist() for group in torch.split(numbers, GROUP))
    with Tracker(progress=len(numbers) >= _MANY).progress(f"reading {where}", len(numbers)) as advance:
        for row, result in enumerate(chain.from_iterable(read_ahead(decoded, groups))):
            advance()
            if isinstance(result, UnreadableError):
                if not config.skip_unreadable:
                    raise UserError(f"{key}: {result}; {skipping} leaves such out") from result
                notes.saw_unreadable(str(result))
                readable[row] = False
                continue
            image, size = result
            notes.saw(size)
            kept[row] = image if memory_gb is None else fingerprints(image[None])[0]
    if not readable.all():
        kept, numbers, labels = kept[readable], numbers[readable], labels[readable]
    classes = _kept_classes(part, config)
    prompts = _prompts(part, numbers.tolist(), [classes[label] for label in labels.tolist()], config, where)
    if memory_gb is None:
        return MemoryImages(kept, labels, classes, prompts)
    return StreamedImages(pixels, numbers, labels, classes, kept, int(memory_gb * 1e9), prompts, shape=shape)


def _prompts(
    part: Part, numbers: Sequence[int], names: Sequence[str], config: DomainConfig, where: str
) -> Prompts | None:
    """Return the text that goes with each image: the domain's prompt, filled in, else the data's own captions."""
    template, texts = config.prompt, part.texts
    if template is None:
        return None if texts is None else tuple(texts[number] for number in numbers)
    if "{text}" in template and texts is None:
        raise UserError(
            f"{where}.prompt: '{template}' asks for {{text}}, but the images have no captions; leave it out"
        )
    captions = [texts[number] for number in numbers] if texts is not None else names
    return tuple(
        template.replace("{class}", name).replace("{text}", caption)
        for name, caption in zip(names, captions, strict=True)
    )


def _require_classes(labels: Tensor, classes: tuple[str, ...], side: str, where: str) -> None:
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    empty = [f"'{name}'" for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise UserError(f"{where}.classes: there is no {side} image of {few(empty)}; name other classes")
