"""What every source shares: what is shipped, the class subset, limits, resizing, and refusals."""

from __future__ import annotations

import importlib.resources
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sophon.config import DomainConfig
from sophon.domains import SOURCES, Domain, bundled
from sophon.errors import UserError
from sophon.ranges import check
from tests.domains import made

DIGITS = DomainConfig(name="digits", source="bundled", dataset="mnist", per_class=5, test_per_class=2)
FRACTIONS = DIGITS.fractions
load, refused = (partial(function, image_size=28, channels=1) for function in (made.load, made.refused))


# --- bundled


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_bundled_file(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((importlib.resources.files("sophon.domains") / "data" / "mnist.npz").read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    if damage != "missing":
        (tmp_path / "mnist.npz").write_bytes(content[:-1] if damage == "truncated" else content)
    monkeypatch.setattr(bundled, "_DATA", tmp_path)
    expected = "cannot be read" if damage == "missing" else "is damaged"
    message = refused(DIGITS)
    assert message.startswith("domain.original.dataset: ")
    assert expected in message
    assert "install sophon again" in message


# --- what every source shares


def test_unknown_source_and_data_set_list_what_there_is() -> None:
    assert set(SOURCES) == {"bundled", "torchvision", "imagefolder"}
    assert refused(replace(DIGITS, source="hub")) == (
        "domain.original.source: 'hub' is not known; allowed: bundled, imagefolder, torchvision"
    )
    assert "domain.original.dataset: 'coco' is not known; allowed: fashion_mnist, mnist" in refused(
        replace(DIGITS, dataset="coco")
    )
    assert "domain.original.dataset: 'coco' is not known; allowed: celeba, cifar10, cifar100, " in refused(
        replace(DIGITS, source="torchvision", dataset="coco")
    )


def test_classes_are_kept_in_the_given_order() -> None:
    train, test, _ = load(replace(DIGITS, classes=["7", "1"]))
    assert train.classes == test.classes == ("7", "1")
    for picked, name in enumerate(train.classes):
        alone = load(replace(DIGITS, classes=[name])).train
        assert torch.equal(train.images[train.labels == picked], alone.images)


def test_limits_are_seeded_nested_and_independent_of_the_other_options() -> None:
    train, test, _ = load(DIGITS)
    assert (Counter(train.labels.tolist())[3], Counter(test.labels.tolist())[3]) == (5, 2)
    threes = train.images[train.labels == 3]
    assert torch.equal(
        load(replace(DIGITS, classes=["9", "3"], test_per_class=7))[0].images,
        load(replace(DIGITS, classes=["9", "3"]))[0].images,
    )
    reordered = load(replace(DIGITS, classes=["9", "3"]))[0]
    assert torch.equal(reordered.images[reordered.labels == 1], threes)
    more = load(replace(DIGITS, classes=["3"], per_class=9))[0].images
    assert {image.numpy().tobytes() for image in threes} <= {image.numpy().tobytes() for image in more}
    assert load(DIGITS)[0].sha256() == train.sha256() != load(replace(DIGITS, split_seed=1))[0].sha256()


NOT_ALLOWED = {
    "no image": ({"per_class": 0}, "per_class: 0 is not allowed; give a whole number >= 1 or null"),
    "no class": ({"classes": []}, "classes: [] is not allowed"),
    "a class twice": ({"classes": ["1", "1"]}, "classes: ['1', '1'] is not allowed; name each class once"),
    "too much": ({"fractions": FRACTIONS | {"attack": 0.41}}, "fractions: their sum is 1.01; it must be <= 1"),
    "another split": (
        {"fractions": FRACTIONS | {"train": 0.1}},
        "fractions: ['adapt', 'attack', 'query', 'select', 't",
    ),
    "missing splits": ({"fractions": {"adapt": 0.5}}, "fractions: ['adapt'] is not allowed; give exactly ['adapt', '"),
}


@pytest.mark.parametrize("name", NOT_ALLOWED)
def test_what_a_domain_may_not_be(name: str) -> None:
    change, message = NOT_ALLOWED[name]
    with pytest.raises(UserError) as caught:
        check(replace(DIGITS, **change), "domain.original")  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"domain.original.{message}")
    with pytest.raises(UserError, match=r"^mine\."):
        Domain([], name="mine", **change)


def test_unknown_class_and_channels() -> None:
    assert "domain.original.classes: 'one' is not known; allowed: 0, 1, 2" in refused(replace(DIGITS, classes=["one"]))
    assert refused(DIGITS, channels=2) == "model.channels: 2 is not allowed; it must be 1 or 3"


def test_grey_images_are_repeated_and_resized() -> None:
    grey, colour = load(DIGITS)[0], load(DIGITS, channels=3)[0]
    assert torch.equal(colour.images, grey.images.expand(-1, 3, -1, -1))
    assert load(DIGITS, image_size=32, channels=3)[0].images.shape == (50, 3, 32, 32)
    small = load(DIGITS, image_size=7)[0].images
    # A resize with antialiasing keeps the mean brightness, to rounding.
    torch.testing.assert_close(small.float().mean(), grey.images.float().mean(), atol=1.0, rtol=0)
