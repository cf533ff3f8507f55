"""Batches of images on the device, and how they are augmented.

Every random number is drawn on the CPU, and augmentation is integer arithmetic and indexing; so a generator's seed
gives the same batches on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from sophon.domains.types import Batch, ImageSet
from sophon.errors import choose


def batch_indices(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Walk through shuffled epochs for ever, in batches that are never short.

    What an epoch leaves over begins the next batch, so every run of ``count`` indices that starts at an epoch is a
    permutation, also where ``batch_size`` is larger than ``count``.

    Args:
        count: how many images there are, >= 1.
        batch_size: indices a batch, >= 1.
        generator: on the CPU; drawn from once an epoch, when the epoch is needed.

    Returns:
        An endless iterator of int64 [batch_size] on the CPU, each index in 0 .. count - 1.

    Raises:
        ValueError: ``count`` or ``batch_size`` is below 1.
    """
    _check(count, batch_size)
    return chain.from_iterable(_epochs(count, batch_size, generator))


def _check(count: int, batch_size: int) -> None:
    if count < 1 or batch_size < 1:
        raise ValueError(f"cannot draw batches of {batch_size} from {count} images; both must be >= 1")


def _epochs(count: int, batch_size: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """Give the batches that are known without drawing again: what an epoch adds."""
    pending = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pending) < batch_size:
            pending = torch.cat([pending, torch.randperm(count, generator=generator)])
        whole = len(pending) - len(pending) % batch_size
        yield list(torch.split(pending[:whole], batch_size))
        pending = pending[whole:]


def batches(
    images: ImageSet, batch_size: int, generator: torch.Generator, augmentation: str = "none"
) -> Iterator[Batch]:
    """Give training batches for ever; see `batch_indices`.

    Args:
        images: on any device.
        batch_size: images a batch, >= 1.
        generator: on the CPU; shuffles and augments.
        augmentation: a key of `AUGMENTATIONS`.

    Returns:
        An endless iterator of batches of ``batch_size`` images on the device of ``images``.

    Raises:
        UserError: ``augmentation`` is not known.
        ValueError: ``images`` is empty or ``batch_size`` is below 1.
    """
    choose("augmentation", augmentation, AUGMENTATIONS)
    augment = AUGMENTATIONS[augmentation]
    _check(len(images), batch_size)
    # An epoch at a time: what is read ahead must not draw from the generator before the augmentation of what is due.
    stream = chain.from_iterable(map(images.stream, _epochs(len(images), batch_size, generator)))
    return (batch._replace(images=augment(batch.images, generator)) for batch in stream)


def evaluation_batches(images: ImageSet, batch_size: int) -> Iterator[Batch]:
    """Give every image once, in order, ``batch_size`` at a time; the last batch may be short.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"cannot make batches of {batch_size} images; it must be >= 1")
    return images.stream(torch.split(torch.arange(len(images)), batch_size)) if len(images) else iter(())


def _unchanged(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    return _gather(images, _shifted(images, 2, generator), _shifted(images, 3, generator))


def _standard(images: Tensor, generator: torch.Generator) -> Tensor:
    rows, columns = _shifted(images, 2, generator), _shifted(images, 3, generator)
    flip = torch.rand(len(images), 1, generator=generator) < 0.5
    return _gather(images, rows, torch.where(flip, columns.flip(1), columns))


def _strong(images: Tensor, generator: torch.Generator) -> Tensor:
    return _cutout(_jitter(_standard(images, generator), generator), generator)


def _shifted(images: Tensor, dimension: int, generator: torch.Generator) -> Tensor:
    """For each image, the source positions [B, size] of a crop out of a border of size / 8 reflected pixels."""
    size = images.shape[dimension]
    border = size // 8
    offsets = torch.randint(-border, border + 1, (len(images), 1), generator=generator)
    positions = (torch.arange(size) + offsets).abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    rows, columns = rows.to(images.device), columns.to(images.device)
    picked = images.gather(2, rows[:, None, :, None].expand(images.shape))
    return picked.gather(3, columns[:, None, None, :].expand(images.shape))


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale each image's contrast and brightness by 0.6 .. 1.4, as whole 256ths: exact on every device."""
    factors = torch.randint(154, 359, (2, len(images), 1, 1, 1), generator=generator, dtype=torch.int32)
    contrast, brightness = factors.to(images.device)
    mean = _mean(images)
    contrasted = mean * 256 + (images.int() - mean) * contrast
    rounded: Tensor = (contrasted * brightness + 32768) >> 16
    return rounded.clamp(0, 255).to(torch.uint8)


def _cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blank a square of a quarter of each image's side, anywhere inside it, with the image's mean."""
    hidden = [_interval(images, dimension, generator) for dimension in (2, 3)]
    mask = (hidden[0][:, None, :, None] & hidden[1][:, None, None, :]).to(images.device)
    return torch.where(mask, _mean(images).to(torch.uint8), images)


def _interval(images: Tensor, dimension: int, generator: torch.Generator) -> Tensor:
    size = images.shape[dimension]
    length = size // 4
    start = torch.randint(0, size - length + 1, (len(images), 1), generator=generator)
    positions = torch.arange(size)
    return (positions >= start) & (positions < start + length)


def _mean(images: Tensor) -> Tensor:
    pixels = images[0].numel()
    return (images.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64) // pixels).int()


# Each maps uint8 [B, C, H, W] on any device to new images of the same shape, with randomness from a CPU generator.
AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": _unchanged,
    "crop": _crop,  # shifts by up to size / 8, the border reflected: for digits and letters
    "standard": _standard,  # crop, and a mirror image every second time
    "strong": _strong,  # standard, contrast and brightness, and a blanked square
}
