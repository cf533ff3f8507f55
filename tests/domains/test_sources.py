"""Sources: what is shipped, image folders, the class subset, limits, resizing, and every kind of bad data."""

from __future__ import annotations

import hashlib
import importlib.resources
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from sophon.config import DomainConfig
from sophon.domains import SOURCES, ImageSet, few_shot, load_restricted, load_source, sources
from sophon.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SHIPPED_CONFIGS = sorted((REPOSITORY / "conf" / "domain").glob("*.yaml"))
DIGITS = DomainConfig(name="digits", source="bundled", dataset="mnist", per_class=5, test_per_class=2)


def load(config: DomainConfig, image_size: int = 28, channels: int = 1) -> tuple[ImageSet, ImageSet]:
    return load_source(config, image_size=image_size, channels=channels, where="domain.original")


def refused(config: DomainConfig, image_size: int = 28, channels: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        load(config, image_size, channels)
    message = str(caught.value)
    assert "\n" not in message
    return message


def save_image(path: Path, color: object, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> DomainConfig:
    """Two classes, cat and dog: 4 training and 2 test images each; the red channel is the image's number."""
    for side, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                save_image(tmp_path / side / name / f"{number}.png", (10 * label + number, 50, 100))
    return DomainConfig(name="pets", source="imagefolder", root=str(tmp_path))


# --- bundled


@pytest.mark.parametrize(
    ("dataset", "train", "test"), [("fashion_mnist", 700, 200), ("mnist", 400, 100)], ids=["fashion_mnist", "mnist"]
)
def test_bundled_sets_are_whole_and_balanced(dataset: str, train: int, test: int) -> None:
    for images, count in zip(
        load(DomainConfig(name="x", source="bundled", dataset=dataset)), (train, test), strict=True
    ):
        assert images.images.shape == (10 * count, 1, 28, 28)
        assert images.images.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert torch.bincount(images.labels).tolist() == [count] * 10
        assert len(images.classes) == 10


def test_bundled_files_are_small_and_documented_with_their_hashes() -> None:
    data = importlib.resources.files("sophon.domains") / "data"
    readme = (data / "README.md").read_text(encoding="utf-8")
    for name, bundled in sources.BUNDLED.items():
        content = (data / f"{name}.npz").read_bytes()
        assert len(content) < 5_000_000
        assert hashlib.sha256(content).hexdigest() == bundled.sha256
        assert bundled.sha256 in readme
        assert (data / f"LICENSE.{name}").is_file()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_bundled_file(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((importlib.resources.files("sophon.domains") / "data" / "mnist.npz").read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    if damage != "missing":
        (tmp_path / "mnist.npz").write_bytes(content[:-1] if damage == "truncated" else content)
    monkeypatch.setattr(sources, "_DATA", tmp_path)
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
    assert "domain.original.dataset: 'cifar' is not known; allowed: fashion_mnist, mnist" in refused(
        replace(DIGITS, dataset="cifar")
    )
    assert "domain.original.dataset: 'cifar' is not known; allowed: celeba, cifar10, cifar100, " in refused(
        replace(DIGITS, source="torchvision", dataset="cifar")
    )


def test_classes_are_kept_in_the_given_order() -> None:
    train, test = load(replace(DIGITS, classes=["7", "1"]))
    assert train.classes == test.classes == ("7", "1")
    for picked, name in enumerate(train.classes):
        (alone, _) = load(replace(DIGITS, classes=[name]))
        assert torch.equal(train.images[train.labels == picked], alone.images)


def test_limits_are_seeded_nested_and_independent_of_the_other_options() -> None:
    train, test = load(DIGITS)
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


def test_a_limit_above_what_there_is_keeps_all() -> None:
    assert len(load(replace(DIGITS, classes=["0"], per_class=10_000))[0]) == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_class": 0}, "domain.original.per_class: 0 is not allowed; it must be >= 1, or null for all"),
        ({"test_per_class": -3}, "domain.original.test_per_class: -3 is not allowed"),
        ({"classes": []}, "domain.original.classes: [] is not allowed"),
        ({"classes": ["1", "1"]}, "domain.original.classes: ['1', '1'] is not allowed; name each class once"),
        ({"classes": ["1", "one"]}, "domain.original.classes: 'one' is not known; allowed: 0, 1, 2"),
    ],
)
def test_bad_options(change: dict[str, object], message: str) -> None:
    assert refused(replace(DIGITS, **change)).startswith(message)  # type: ignore[arg-type]


def test_bad_shapes() -> None:
    assert refused(DIGITS, channels=2) == "model.channels: 2 is not allowed; it must be 1 or 3"
    assert refused(DIGITS, image_size=0) == "model.image_size: 0 is not allowed; it must be >= 1"


def test_grey_images_are_repeated_and_resized() -> None:
    grey, colour = load(DIGITS)[0], load(DIGITS, channels=3)[0]
    assert torch.equal(colour.images, grey.images.expand(-1, 3, -1, -1))
    assert load(DIGITS, image_size=32, channels=3)[0].images.shape == (50, 3, 32, 32)
    small = load(DIGITS, image_size=7)[0].images
    # A resize with antialiasing keeps the mean brightness, to rounding.
    torch.testing.assert_close(small.float().mean(), grey.images.float().mean(), atol=1.0, rtol=0)


# --- imagefolder


def test_folder_order_and_pixels(folder: DomainConfig) -> None:
    train, test = load(folder, 8, 3)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert train.images[:, :, 0, 0].tolist() == [[10 * c + n, 50, 100] for c in range(2) for n in range(4)]
    assert test.images[:, 0, 3, 3].tolist() == [0, 1, 10, 11]


def test_colour_becomes_luminance(folder: DomainConfig) -> None:
    grey = load(folder, 8, 1)[0].images[0]
    assert grey.shape == (1, 8, 8)
    assert abs(int(grey[0, 0, 0]) - (0.299 * 0 + 0.587 * 50 + 0.114 * 100)) <= 1


def test_sizes_and_modes_may_differ(folder: DomainConfig) -> None:
    cats = Path(folder.root) / "train" / "cat"
    save_image(cats / "4.jpg", (200, 200, 200), (31, 5))
    save_image(cats / "5.png", 77, (3, 3), "L")
    save_image(cats / "6.png", (1, 2, 3, 255), (8, 8), "RGBA")
    save_image(cats / "7.webp", (9, 9, 9))
    (cats / "notes.txt").write_text("not an image")
    images = load(folder, 8, 3)[0].images
    assert images.shape == (12, 3, 8, 8)
    assert images[5].unique().tolist() == [77]
    assert images[6, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["val", "valid"])
def test_other_names_of_the_test_folder(folder: DomainConfig, name: str) -> None:
    (Path(folder.root) / "test").rename(Path(folder.root) / name)
    assert len(load(folder, 8, 3)[1]) == 4


def test_test_is_preferred_to_val(folder: DomainConfig) -> None:
    save_image(Path(folder.root) / "val" / "other" / "0.png", (0, 0, 0))
    assert load(folder, 8, 3)[1].classes == ("cat", "dog")


def test_only_what_is_kept_is_decoded(folder: DomainConfig) -> None:
    for path in Path(folder.root).glob("*/dog/*.png"):
        path.write_bytes(b"damaged")
    train, _ = load(replace(folder, classes=["cat"], per_class=2), 8, 3)
    assert len(train) == 2


def test_missing_folders(folder: DomainConfig, tmp_path: Path) -> None:
    assert "domain.original.root: there is no folder train in " in refused(replace(folder, root=str(tmp_path / "no")))
    (tmp_path / "test").rename(tmp_path / "exam")
    assert "there is no folder test (nor val, nor valid) in " in refused(folder)


def test_empty_folder(folder: DomainConfig, tmp_path: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    assert "Couldn't find any class folder in " in refused(replace(folder, root=str(tmp_path / "empty")))


def test_class_folder_without_images(folder: DomainConfig, tmp_path: Path) -> None:
    (tmp_path / "train" / "eel").mkdir()
    message = refused(folder)
    assert message.startswith(f"domain.original.root: {tmp_path / 'train'}: ")
    assert "no valid file for the classes eel" in message


def test_train_and_test_classes_differ(folder: DomainConfig, tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "eel" / "0.png", (0, 0, 0))
    assert refused(folder).endswith("differ in the classes eel")


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "broken"])
def test_unreadable_image_is_named(folder: DomainConfig, tmp_path: Path, content: str) -> None:
    path = tmp_path / "train" / "dog" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    broken = whole.replace(b"IDAT", b"IDAT"[::-1])
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2], "broken": broken}[content])
    assert refused(folder, 8, 3).startswith(f"domain.original.root: the image {path} cannot be read: ")


def test_folder_of_one_class_with_folders_inside(tmp_path: Path) -> None:
    for number in range(24):
        side, inner = ("train", f"{number // 10}0000") if number < 20 else ("test", "60000")
        save_image(tmp_path / side / "face" / inner / f"{number:05}.png", (number, 50, 100))
    config = DomainConfig(name="faces", source="imagefolder", root=str(tmp_path))
    domain = load_restricted(config, image_size=8, channels=3)
    assert domain.classes == ("face",)
    assert [len(domain[name]) for name in ("adapt", "query", "attack", "select", "test")] == [8, 2, 8, 2, 4]
    reds = [red for images in domain.splits.values() for red in images.images[:, 0, 0, 0].tolist()]
    assert sorted(reds) == list(range(24))
    assert all(not images.labels.any() for images in domain.splits.values())
    assert len(few_shot(domain["attack"], 1, torch.Generator())) == 1
    limited = load_restricted(replace(config, per_class=10, test_per_class=1), image_size=8, channels=3)
    assert [len(limited[name]) for name in ("adapt", "query", "attack", "select", "test")] == [4, 1, 4, 1, 1]


def test_images_of_more_than_8_bits_are_refused(folder: DomainConfig, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "train" / "cat" / "9.png")
    assert refused(folder, 8, 1).endswith("cannot be read: its pixels have mode I;16, not 8 bits")


def test_folder_takes_no_dataset(folder: DomainConfig) -> None:
    assert "domain.original.dataset: 'cifar10' is not allowed; leave it empty" in refused(
        replace(folder, dataset="cifar10")
    )


# --- shipped configurations


@pytest.mark.parametrize("path", SHIPPED_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_names_a_source_that_there_is(path: Path) -> None:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DomainConfig), OmegaConf.load(path)))
    assert isinstance(config, DomainConfig)
    assert config.name == path.stem
    assert not config.download
    if config.source == "bundled":
        train, test = load(replace(config, per_class=1, test_per_class=1))
        assert len(train) == len(test) == len(train.classes) == len(config.classes or range(10))
    elif config.source == "torchvision":
        assert config.dataset in sources.TORCHVISION
    else:
        assert (config.source, config.dataset) == ("imagefolder", "")


def test_configurations_are_shipped() -> None:
    assert len(SHIPPED_CONFIGS) >= 15
