"""Domains without labels: the same images in the same splits, and clusters in the place of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sophon.config import DomainConfig
from sophon.domains import LoadedDomain, MemoryImages, load_restricted, with_clusters
from sophon.errors import UserError
from tests.tiny import tiny_bands

DIGITS = DomainConfig(name="digits", source="bundled", dataset="mnist", per_class=20, test_per_class=2)
SPLITS = ("adapt", "query", "test")
BANDS = tiny_bands("bands", SPLITS)


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1).double()


def clustered(
    domain: LoadedDomain = BANDS, features: Callable[[Tensor], Tensor] = pixels, clusters: int = 3
) -> LoadedDomain:
    return with_clusters(domain, features, clusters, seed=0, where="domain.restricted")


def unlabelled(root: Path, per_side: dict[str, int], inside: str = "") -> DomainConfig:
    number = 0
    for side, count in per_side.items():
        (root / side / inside).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            Image.new("RGB", (8, 8), (number, 50, 100)).save(root / side / inside / f"{number:03}.png")
            number += 1
    return DomainConfig(name="mine", source="imagefolder", root=str(root), labels="none")


# ---- loading --------------------------------------------------------------------------------------------------------


def test_the_splits_hold_the_same_images_as_with_labels() -> None:
    with_labels, without = (
        load_restricted(replace(DIGITS, labels=labels), image_size=8, channels=1) for labels in ("given", "none")
    )
    assert without.classes == ("unlabelled",)
    for name, images in without.splits.items():
        assert torch.equal(images.images, with_labels[name].images)
        assert not images.labels.any()
        assert images.classes == without.classes
        assert without.hashes[name] == images.sha256() != with_labels.hashes[name]


def test_a_folder_may_hold_the_images_themselves(tmp_path: Path) -> None:
    config = unlabelled(tmp_path, {"train": 20, "test": 4})
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    domain = load_restricted(config, image_size=8, channels=3)
    assert {name: len(images) for name, images in domain.splits.items()} == {
        **{"adapt": 8, "query": 2, "attack": 8, "select": 2},
        "test": 4,
    }
    reds = [red for images in domain.splits.values() for red in images.images[:, 0, 0, 0].tolist()]
    assert sorted(reds) == list(range(24))
    limited = load_restricted(replace(config, per_class=10, test_per_class=1), image_size=8, channels=3)
    assert sum(map(len, limited.splits.values())) == 11
    with pytest.raises(UserError, match=r"^domain\.restricted\.root: there is no class folder in .*labels=none"):
        load_restricted(replace(config, labels="given"), image_size=8, channels=3)


@pytest.mark.parametrize(("per_side", "side"), [({"train": 0, "test": 4}, "train"), ({"train": 20, "test": 0}, "test")])
def test_a_folder_without_an_image_is_refused(tmp_path: Path, per_side: dict[str, int], side: str) -> None:
    config = unlabelled(tmp_path, per_side)
    with pytest.raises(UserError, match=rf"^domain\.restricted\.root: there is no image in {tmp_path / side}$"):
        load_restricted(config, image_size=8, channels=3)


# ---- clusters -------------------------------------------------------------------------------------------------------


@given(count=st.integers(4, 40), clusters=st.integers(2, 4), seed=st.integers(0, 2**31))
def test_every_image_belongs_to_the_nearest_mean(count: int, clusters: int, seed: int) -> None:
    """A fixed point of Lloyd's algorithm, in float64 and by brute force, and none of the clusters is empty."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 256, (count, 1, 1, 2), generator=generator, dtype=torch.uint8)
    adapt = MemoryImages(points, torch.zeros(count, dtype=torch.int64), ("any",))
    domain = LoadedDomain("points", ("any",), {"adapt": adapt}, {})
    if len(pixels(points).unique(dim=0)) < clusters:
        return
    labels = clustered(domain, clusters=clusters)["adapt"].labels
    means = torch.stack([pixels(points)[labels == label].mean(0) for label in range(clusters)])
    distances = torch.cdist(pixels(points), means)
    assert (distances.gather(1, labels[:, None])[:, 0] <= distances.min(1).values + 1e-3).all()
    assert len(labels.unique()) == clusters


def test_the_same_seed_gives_the_same_clusters_and_draws_nothing_from_the_global_generators() -> None:
    before = torch.get_rng_state()
    first, second = clustered(clusters=5), clustered(clusters=5)
    assert first.hashes == second.hashes
    assert torch.equal(torch.get_rng_state(), before)


def test_more_clusters_than_images_tell_apart_are_refused() -> None:
    alike = MemoryImages(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64), ("any",))
    for clusters, images in ((2, alike), (37, BANDS["adapt"])):
        with pytest.raises(UserError, match=rf"^domain\.restricted\.clusters: {clusters} is not allowed; .* fewer$"):
            clustered(LoadedDomain("d", images.classes, {"adapt": images}, {}), clusters=clusters)
