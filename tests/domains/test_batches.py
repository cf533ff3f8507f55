"""Batches: no image is lost, none is short, and a seed decides everything."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophon import attacker
from sophon.domains import AUGMENTATIONS, ImageSet, MemoryImages, batch_indices, batches, evaluation_batches
from sophon.errors import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 6, channels: int = 3, size: int = 16) -> ImageSet:
    images = torch.randint(0, 256, (count, channels, size, size), generator=seeded(1), dtype=torch.uint8)
    return MemoryImages(images, torch.arange(count) % 2, ("a", "b"))


@given(count=st.integers(1, 40), batch_size=st.integers(1, 100), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation_and_no_batch_is_short(count: int, batch_size: int, seed: int) -> None:
    drawn = list(islice(batch_indices(count, batch_size, seeded(seed)), 3 * count // batch_size + 2))
    assert all(indices.shape == (batch_size,) and indices.dtype == torch.int64 for indices in drawn)
    together = torch.cat(drawn)
    for epoch in together.split(count)[:-1]:
        assert epoch.sort().values.tolist() == list(range(count))


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (4, 0), (-1, 1)])
def test_impossible_batches_fail_at_once(count: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        batch_indices(count, batch_size, seeded())


def test_unknown_augmentation_is_refused_before_the_first_batch() -> None:
    with pytest.raises(UserError, match=r"augmentation: 'mixup' is not known; allowed: crop, none, standard, strong"):
        batches(some_images(), 4, seeded(), "mixup")


def test_evaluation_gives_each_image_once_in_order() -> None:
    images = some_images(7)
    seen = list(evaluation_batches(images, 3))
    assert [len(batch.labels) for batch in seen] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.images for batch in seen]), images.images)
    assert torch.equal(torch.cat([batch.labels for batch in seen]), images.labels)
    with pytest.raises(ValueError, match="must be >= 1"):
        evaluation_batches(images, 0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 5), (1, 1)])
def test_augmentations_keep_form_leave_their_input_alone_and_repeat(name: str, channels: int, size: int) -> None:
    images = some_images(8, channels, size).images
    before = images.clone()
    once, twice = (AUGMENTATIONS[name](images, seeded(5)) for _ in range(2))
    assert once.shape == images.shape
    assert once.dtype == torch.uint8
    assert torch.equal(once, twice)
    assert torch.equal(images, before)


def test_augmentations_are_those_that_attackers_choose_from() -> None:
    assert tuple(AUGMENTATIONS) == attacker.AUGMENTATIONS
