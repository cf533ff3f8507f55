"""Images that are decoded when they are needed, for data sets that do not fit into memory.

Threads decode ahead of who reads: Pillow lets go of the interpreter while it decodes and resizes, and threads, unlike
processes, work inside an audit's workers, need no shared memory and nothing that can be pickled, and raise what they
raise.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from sophon.domains.types import Batch, ImageSet, MemoryImages, Prompts, prompts_at

_AHEAD = 2  # groups that are read before they are asked for
GROUP = 128  # images that are read together where nobody says how many
_Read = TypeVar("_Read")


def read_ahead(read: Callable[[int], _Read], groups: Iterable[Sequence[int]]) -> Iterator[list[_Read]]:
    """Read groups of numbers in threads, some groups ahead; give what was read in order.

    Raises:
        Exception: what ``read`` raised first, in the order of the numbers.
    """
    pending: deque[list[Future[_Read]]] = deque()
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        for group in groups:
            pending.append([pool.submit(read, number) for number in group])
            if len(pending) > _AHEAD:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class StreamedImages(ImageSet):
    """Labelled images that are decoded whenever they are read.

    Attributes:
        read: decodes an image by its number: uint8 [C, H, W] on the CPU; called from several threads.
        numbers: int64 [N] on the CPU: what ``read`` is asked for.
        labels: int64 [N].
        classes: the class names, in the order of the labels.
        prints: `ImageSet.fingerprints` of the images.
        memory: how many bytes of pixels `in_memory` may hold.
        shape: (C, H, W) of an image.
        prompts: the text that goes with each image; None where the domain has none.
    """

    read: Callable[[int], Tensor]
    numbers: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    prints: Tensor
    memory: int
    prompts: Prompts | None = None
    shape: tuple[int, int, int] = field(kw_only=True)

    def batch(self, indices: Tensor) -> Batch:
        """Decode the images at ``indices`` (int64 [M])."""
        return next(self.stream([indices]))

    def stream(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        """Give a batch for each of ``parts`` (int64 [M] each), decoded ahead."""
        known: deque[Tensor] = deque()

        def numbers() -> Iterator[list[int]]:
            for part in parts:
                known.append(part)
                yield self.numbers[part.cpu()].tolist()

        for images in read_ahead(self.read, numbers()):
            part = known.popleft()
            labels = self.labels[part.to(self.labels.device)]
            stacked = torch.stack(images) if images else torch.empty((0, *self.shape), dtype=torch.uint8)
            yield Batch(stacked.to(labels.device), labels, prompts_at(self.prompts, part))

    def take(self, indices: Tensor) -> StreamedImages:
        """Return the set of the images at ``indices`` (int64 [M]), none of them decoded."""
        on_cpu = indices.cpu()
        labels = self.labels[indices.to(self.labels.device)]
        prompts = prompts_at(self.prompts, on_cpu)
        return replace(self, numbers=self.numbers[on_cpu], labels=labels, prints=self.prints[on_cpu], prompts=prompts)

    def relabelled(self, labels: Tensor, classes: tuple[str, ...]) -> StreamedImages:
        """Return the same images with other labels (int64 [N]) of other classes."""
        return replace(self, labels=labels.to(self.labels.device), classes=classes)

    def to(self, device: torch.device) -> StreamedImages:
        """Return the same images, whose batches then come on ``device``."""
        return replace(self, labels=self.labels.to(device))

    def fingerprints(self) -> Tensor:
        """Return the sha256 of every image's pixels: uint8 [N, 32] on the CPU."""
        return self.prints

    def in_memory(self) -> ImageSet:
        """Return the same images in memory if they take no more than ``memory`` bytes, else these."""
        if len(self) * torch.Size(self.shape).numel() > self.memory:
            return self
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8, device=self.labels.device)
        parts = torch.split(torch.arange(len(self)), GROUP)
        for part, batch in zip(parts, self.stream(parts), strict=True):
            images[part] = batch.images
        return MemoryImages(images, self.labels, self.classes, self.prompts)


def joined(first: ImageSet, *others: ImageSet, classes: tuple[str, ...] | None = None) -> ImageSet:
    """Return several sets of images of one shape as one, in their order, on the device of the first.

    Args:
        others: more of them; their labels stay as they are.
        classes: of the whole; None for those of the first. It has prompts where all of them have.
    """
    classes = first.classes if classes is None else classes
    sets = [first, *others]
    texts = [images.prompts for images in sets if images.prompts is not None]
    prompts = tuple(chain.from_iterable(texts)) if len(texts) == len(sets) else None
    labels = torch.cat([images.labels.to(first.labels.device) for images in sets])
    held = [images.images.to(labels.device) for images in sets if isinstance(images, MemoryImages)]
    if len(held) == len(sets):
        return MemoryImages(torch.cat(held), labels, classes, prompts)
    whole, *rest = map(_streamed, sets)
    for images in rest:
        start = int(whole.numbers.max()) + 1 if len(whole) else 0
        whole = replace(
            whole,
            read=_either(whole.read, images.read, start),
            numbers=torch.cat([whole.numbers, images.numbers + start]),
            prints=torch.cat([whole.prints, images.prints]),
        )
    return replace(whole, labels=labels, classes=classes, prompts=prompts)


def _either(first: Callable[[int], Tensor], second: Callable[[int], Tensor], start: int) -> Callable[[int], Tensor]:
    return lambda number: first(number) if number < start else second(number - start)


def _streamed(images: ImageSet) -> StreamedImages:
    if isinstance(images, StreamedImages):
        return images
    assert isinstance(images, MemoryImages)
    held, numbers, prints = images.images, torch.arange(len(images)), images.fingerprints()
    return StreamedImages(
        lambda number: held[number].cpu(), numbers, images.labels, images.classes, prints, 0, shape=images.shape
    )
