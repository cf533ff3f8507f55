"""Splits: disjoint, complete, stratified, repeatable, and hashed by what is in them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophon.config import DomainConfig
from sophon.domains import (
    ImageSet,
    LoadedDomain,
    MemoryImages,
    defenders_images,
    few_shot,
    load_original,
    load_restricted,
    splits,
)
from sophon.domains.notes import Notes
from sophon.domains.sources import Loaded
from sophon.errors import UserError

CONFIG = DomainConfig(name="invented", source="bundled", dataset="invented")


def images_of(labels: list[int], first: int = 0) -> ImageSet:
    """Images that all differ: the pixels spell the number of the image."""
    numbers = torch.arange(first, first + len(labels))
    pixels = torch.stack([numbers % 256, numbers // 256, torch.zeros_like(numbers), torch.zeros_like(numbers)], 1)
    classes = tuple(f"class {label}" for label in range(max(labels) + 1))
    return MemoryImages(pixels.to(torch.uint8).view(-1, 1, 2, 2), torch.tensor(labels), classes)


def loaded(load: object, train: ImageSet, test: ImageSet, config: DomainConfig = CONFIG) -> LoadedDomain:
    with mock.patch.object(splits, "load_source", return_value=Loaded(train, test, Notes(2))):
        return load(config, image_size=2, channels=1)  # type: ignore[operator]


def keys(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


@given(
    sizes=st.lists(st.integers(10, 60), min_size=1, max_size=4),
    val_fraction=st.floats(0.1, 0.9),
    seed=st.integers(-5, 5),
    restricted=st.booleans(),
)
def test_splits_are_disjoint_complete_and_stratified(
    sizes: list[int], val_fraction: float, seed: int, restricted: bool
) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    train, test = images_of(labels), images_of(list(range(len(sizes))), first=len(labels))
    config = replace(CONFIG, val_fraction=val_fraction, split_seed=seed)
    load = load_restricted if restricted else load_original
    domain = loaded(load, train, test, config)
    fractions = config.fractions if restricted else {"train": 1 - val_fraction, "val": val_fraction}

    assert set(domain.splits) == {*fractions, "test"}
    everything = [key for name in domain.splits for key in keys(domain[name])]
    assert len(everything) == len(set(everything)) == len(train) + len(test)
    assert set(everything) == {*keys(train), *keys(test)}
    for name, fraction in fractions.items():
        counts = Counter(domain[name].labels.tolist())
        assert all(abs(counts[label] - fraction * size) <= 1 for label, size in enumerate(sizes))
    again = loaded(load, train, test, config)
    assert again.hashes == domain.hashes


def test_duplicates_reach_one_split_only() -> None:
    distinct, test = images_of([0, 1] * 10), images_of([0, 1], first=20)
    pixels = torch.cat([distinct.images, distinct.images[:6], test.images])
    labels = torch.cat([distinct.labels, 1 - distinct.labels[:6], test.labels])
    domain = loaded(load_restricted, MemoryImages(pixels, labels, distinct.classes), test)
    assert dict(domain.hashes) == dict(loaded(load_restricted, distinct, test).hashes)


def test_fractions_below_one_leave_images_out() -> None:
    fractions = {"adapt": 0.2, "query": 0.1, "attack": 0.2, "select": 0.1}
    config = replace(CONFIG, fractions=fractions)
    domain = loaded(load_restricted, images_of([0] * 100), images_of([0], first=100), config)
    assert {name: len(domain[name]) for name in fractions} == {"adapt": 20, "query": 10, "attack": 20, "select": 10}


def test_a_split_without_a_class_is_refused() -> None:
    train = images_of([0] * 30 + [1] * 3)
    with pytest.raises(
        UserError, match=r"3 different training images of class 'class 1' leaves none for split 'select'"
    ):
        loaded(load_restricted, train, images_of([0], first=99))
    with pytest.raises(
        UserError, match=r"^domain\.original\.val_fraction: 0\.1 of the 3 .* leaves none for split 'val'"
    ):
        loaded(load_original, train, images_of([0], first=99))
    with pytest.raises(
        UserError,
        match=r"^domain\.original: every training image of class 'class 0' equals another one or a test image",
    ):
        loaded(load_original, images_of([0] * 3), images_of([0] * 3))


def test_the_defenders_images_are_those_of_all_domains_without_the_attackers() -> None:
    original = loaded(load_original, images_of([0, 1] * 20), images_of([0, 1], first=500))
    # the first 10 images are the original domain's, some of them its validation images
    restricted = [
        loaded(load_restricted, images_of([0] * 40, first=first), images_of([0], first=600 + first))
        for first in (30, 100)
    ]
    found = defenders_images(original, restricted)
    assert found.classes == tuple(f"invented: class {label}" for label in (0, 1, 0, 0))
    held = [original["val"], original["test"]]
    held += [domain[name] for domain in restricted for name in ("attack", "select", "test")]
    own = [original["train"], *(domain[name] for domain in restricted for name in ("adapt", "query"))]
    attacked = {key for images in held for key in keys(images)}
    assert sorted(keys(found)) == sorted({key for images in own for key in keys(images)} - attacked)
    labels = dict(zip(keys(found), found.labels.tolist(), strict=True))
    assert {labels[key] for key in keys(restricted[1]["query"])} == {3}


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), part=st.floats(0, 1), seed=st.integers(0, 20))
def test_few_shot_is_balanced_nested_and_repeatable(sizes: list[int], part: float, seed: int) -> None:
    images = images_of([label for label, size in enumerate(sizes) for _ in range(size)])
    budget = round(len(sizes) + part * (len(images) - len(sizes)))

    def draw(budget: int) -> ImageSet:
        return few_shot(images, budget, torch.Generator().manual_seed(seed))

    drawn = draw(budget)
    counts = Counter(drawn.labels.tolist())
    assert len(set(keys(drawn))) == len(drawn) == budget
    most = max(counts.values())
    assert all(counts[label] == size or counts[label] >= most - 1 for label, size in enumerate(sizes))
    assert keys(draw(budget)) == keys(drawn)
    assert set(keys(draw(len(sizes)))) <= set(keys(drawn))


@pytest.mark.parametrize("budget", [-1, 0, 1, 7])
def test_few_shot_refuses_an_impossible_budget(budget: int) -> None:
    with pytest.raises(UserError, match=rf"^data_budget: {budget} is not allowed; it must be 2 .* to 6 "):
        few_shot(images_of([0, 1] * 3), budget, torch.Generator())
