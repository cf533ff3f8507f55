"""Streamed images: the same images, batches, splits and hashes as in memory, without holding them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sophon.config import DomainConfig
from sophon.domains import (
    Batch,
    ImageSet,
    LoadedDomain,
    MemoryImages,
    StreamedImages,
    batches,
    evaluation_batches,
    few_shot,
    joined,
    load_original,
    load_restricted,
)
from sophon.errors import UserError
from tests.domains.made import save_image, write_pets

KINDS = ("memory", "streamed")


def loaded(config: DomainConfig, memory_gb: float, load: object = load_restricted) -> LoadedDomain:
    return load(config, image_size=8, channels=3, memory_gb=memory_gb)  # type: ignore[operator]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> DomainConfig:
    config = write_pets(tmp_path_factory.mktemp("pets"), train=24, test=4)
    save_image(Path(config.root) / "train" / "dog" / "twin.png", (0, 50, 100))  # equals an image of a cat
    return config


@pytest.fixture(scope="module")
def domains(pets: DomainConfig) -> dict[str, LoadedDomain]:
    return {kind: loaded(pets, memory_gb) for kind, memory_gb in zip(KINDS, (1, 0), strict=True)}


def pixels(parts: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    images, labels, _ = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(first: ImageSet, second: ImageSet) -> bool:
    pairs = zip(*(pixels(evaluation_batches(images, 5)) for images in (first, second)), strict=True)
    return first.sha256() == second.sha256() and all(torch.equal(a, b) for a, b in pairs)


def test_where_images_are_kept_changes_nothing_else(domains: dict[str, LoadedDomain]) -> None:
    memory, streamed = (domains[kind] for kind in KINDS)
    assert {type(images) for images in memory.splits.values()} == {MemoryImages}
    assert {type(images) for images in streamed.splits.values()} == {StreamedImages}
    assert dict(memory.hashes) == dict(streamed.hashes)
    for split in memory.splits:
        assert same(memory[split], streamed[split])
        assert streamed[split].shape == memory[split].shape == (3, 8, 8)
    assert streamed.notes[-1].startswith("decoded as they are read: ")


@given(size=st.integers(1, 30), augmentation=st.sampled_from(["none", "standard"]), seed=st.integers(0, 3))
def test_training_batches_are_the_same(
    domains: dict[str, LoadedDomain], size: int, augmentation: str, seed: int
) -> None:
    drawn = []
    for kind in KINDS:
        generator = torch.Generator().manual_seed(seed)
        stream = batches(domains[kind]["adapt"], size, generator, augmentation)
        drawn.append((pixels(next(stream) for _ in range(7)), generator.get_state()))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0][0], drawn[1][0], strict=True))
    assert torch.equal(drawn[0][1], drawn[1][1])  # nothing was drawn ahead


def held(batch: Batch, classes: tuple[str, ...]) -> MemoryImages:
    return MemoryImages(batch.images, batch.labels, classes, batch.prompts)


# What other rooms do with a set of images; each must come to the same on both kinds.
OPERATIONS = {
    "take": lambda images: images.take(torch.tensor([3, 0, 3])),
    "take of take": lambda images: images.take(torch.arange(4)).take(torch.tensor([1])),
    "take nothing": lambda images: images.take(torch.arange(0)).take(torch.arange(0)),
    "first": lambda images: held(images.first(3), images.classes),
    "first of few": lambda images: held(images.first(999), images.classes),
    "relabelled": lambda images: images.relabelled(1 - images.labels, ("x", "y")),
    "few shot": lambda images: few_shot(images, 5, torch.Generator().manual_seed(0)),
    "all shots": lambda images: few_shot(images, None, torch.Generator()),
    "to": lambda images: images.to(torch.device("cpu")),
    "joined with itself": lambda images: joined(images, images.take(torch.arange(2))),
    "joined with memory": lambda images: joined(images, OTHER),
    "joined behind memory": lambda images: joined(OTHER, images, OTHER, classes=("a", "b", "c")),
    "part of joined": lambda images: joined(images, OTHER, images).take(torch.tensor([0, len(images) + 1, -1])),
}
OTHER = MemoryImages(torch.full((2, 3, 8, 8), 7, dtype=torch.uint8), torch.tensor([1, 0]), ("a", "b"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_come_to_the_same(name: str, domains: dict[str, LoadedDomain]) -> None:
    results = [OPERATIONS[name](domains[kind]["adapt"]) for kind in KINDS]
    if "nothing" in name:
        assert [len(images) for images in results] == [0, 0]
        assert len({images.sha256() for images in results}) == 1
    else:
        assert same(*results)
    assert results[0].classes == results[1].classes


def test_what_fits_is_held_by_who_walks_it_often(pets: DomainConfig) -> None:
    limit = 20 * 3 * 8 * 8 / 1e9  # twenty images
    domain = loaded(pets, limit)
    assert isinstance(domain["attack"], StreamedImages)
    assert isinstance(few_shot(domain["attack"], 10, torch.Generator()), MemoryImages)
    tight = loaded(pets, limit / 4)
    assert isinstance(few_shot(tight["attack"], 10, torch.Generator()), StreamedImages)


def test_unreadable_images_are_found_before_the_work(tmp_path: Path) -> None:
    config = write_pets(tmp_path, train=20)
    (tmp_path / "train" / "cat" / "3.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"3\.png cannot be read"):
        loaded(config, 0)
    domain = loaded(replace(config, skip_unreadable=True), 0)
    assert dict(domain.hashes) == dict(loaded(replace(config, skip_unreadable=True), 1).hashes)
    assert "1 unreadable" in str(domain)


def test_an_image_that_goes_away_later_is_named(tmp_path: Path) -> None:
    domain = loaded(write_pets(tmp_path, train=20), 0, load_original)
    path = tmp_path / "train" / "cat" / "7.png"
    path.unlink()
    with pytest.raises(UserError, match=rf"^domain\.original\.root: the image {path} cannot be read: [^\n]*$"):
        pixels(evaluation_batches(joined(domain["train"], domain["val"]), 4))


@pytest.mark.slow
def test_a_large_folder_is_walked_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, side = 600, 64
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
    for number in range(count):
        image = Image.fromarray(np.full((4, 4, 3), (number % 256, number // 256, 9), np.uint8))
        image.save(tmp_path / ("test" if number < 20 else "train") / "a" / f"{number}.bmp")
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def counted(image: Image.Image, shape: tuple[int, int, int], convert: object = None) -> Tensor:
        nonlocal most
        found = original(image, shape)
        alive.add(found)
        most = max(most, len(alive))
        return found

    from sophon.domains import sources

    original = sources.to_tensor
    monkeypatch.setattr(sources, "to_tensor", counted)
    config = DomainConfig(name="large", source="imagefolder", root=str(tmp_path))
    domain = load_original(config, image_size=side, channels=3, memory_gb=1e-6)
    first_pass, most = most, 0
    assert sum(len(batch.labels) for batch in evaluation_batches(domain["train"], 16)) == len(domain["train"])
    stream = batches(domain["train"], 16, torch.Generator())
    for _ in range(40):
        next(stream)
    del stream
    gc.collect()
    assert first_pass <= 4 * 128  # the groups that are read together and ahead
    assert most <= 4 * 16
    assert not alive
